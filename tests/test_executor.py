"""Tasks in this process and on a Ray cluster: the same values and bytes, failures reported, lost workers made good."""

import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import time

import psutil
import pytest
import torch

import processes
from conftest import ROOT
from husai.runs.cli import Parser
from husai.runs.errors import BadInput
from husai.runs.executor import Task, TaskOutcome, run
from husai.runs.files import sha256_file

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (requirements-cluster.txt)"
)


def task(name, function="threads", **arguments):
    return Task(name, f"executor_tasks:{function}", arguments)


def contents(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def trainings(folder, store):
    return [task(f"k {k}", "train", folder=str(folder), store=str(store.folder), k=k) for k in (3, 4)]


@pytest.fixture
def tests_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def test_a_failing_task_is_reported_and_the_others_finish(caplog):
    tasks = [task("bad", "fail", message="two\nlines"), task("user's", "refuse", message="no such file"), task("good")]
    with caplog.at_level(logging.INFO, "husai"):
        outcomes = run([*tasks, task("odd", "not_json")])
    assert outcomes[:2] == [
        TaskOutcome("bad", None, "RuntimeError: two lines"),
        TaskOutcome("user's", None, "no such file"),
    ]
    assert outcomes[2].value["torch"] == 1
    assert outcomes[2].reason is None
    assert "not JSON compliant" in outcomes[3].reason
    assert "Traceback" in caplog.text, "an error that nobody foresaw keeps its traceback"
    assert caplog.text.count("Traceback") == 2


def test_a_repeat_finds_the_cells(make_store, planted, tmp_path, monkeypatch):
    tasks = trainings(tmp_path / "out", make_store(planted[0]))
    first = run(tasks)
    assert all(o.reason is None for o in first), first
    monkeypatch.setattr("husai.training.trainer.Stack", None)
    assert run(tasks) == first


@pytest.mark.parametrize("name", ["executor_tasks:nothing", "no_such_module:f", "executor_tasks", ":f", ""])
def test_an_unknown_function_is_refused(name):
    with pytest.raises(BadInput, match=re.escape(f" {name}: ")):
        run([task("good"), Task("bad", name, {})])


def test_an_address_belongs_to_ray():
    with pytest.raises(BadInput, match=r"--ray-address auto: .*--executor ray"):
        run([task("good")], ray_address="auto")


def test_flags():
    parser = Parser("")
    parser.add_executor()
    assert vars(parser.parse_args([])) == {"executor": "local", "ray_address": None}
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--executor", "slurm"])


def test_without_ray_the_requirements_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"--executor ray: .*requirements-cluster\.txt"):
        run([task("good")], "ray")


@needs_ray
def test_an_address_that_does_not_answer_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unused = free.getsockname()[1]
    for address in (f"127.0.0.1:{unused}", "no.such.host.invalid:6379", "nonsense", "local", "127.0.0.1:99999999"):
        start = time.monotonic()
        with pytest.raises(BadInput, match=f"--ray-address {address}: ") as refusal:
            run([task("good")], "ray", address)
        assert "\n" not in str(refusal.value)
        assert time.monotonic() - start < 15


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes_and_makes_lost_workers_good(make_store, planted, tmp_path, tests_importable, caplog):
    """One cluster for all, because its start is what takes long."""
    import ray

    store = make_store(planted[0])
    local = run(trainings(tmp_path / "local", store), threads=2)
    lost = [
        task("lost once", "die", marker=str(tmp_path / "once"), times=1),
        task("lost always", "die", marker=str(tmp_path / "always"), times=9),
    ]
    failing = [task("bad", "fail", message="no"), task("here")]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        outcomes = run([*trainings(tmp_path / "ray", store), *lost, *failing], "ray", threads=2, retries=1)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert outcomes[:2] == local
        assert contents(tmp_path / "ray") == contents(tmp_path / "local")
        assert outcomes[2] == TaskOutcome("lost once", "alive", None)
        assert outcomes[3].value is None
        assert "WorkerCrashedError" in outcomes[3].reason
        assert "\n" not in outcomes[3].reason
        assert (tmp_path / "always").read_text() == ".."
        assert outcomes[4] == TaskOutcome("bad", None, "RuntimeError: no")
        assert outcomes[5].value == {"torch": 2, "here": os.getcwd()}
        assert "here: a word from the task" in caplog.text
        with pytest.raises(BadInput, match=r"--executor ray: .*\b64 GPUs"):
            run([Task("large", "executor_tasks:threads", {}, gpus=64)], "ray")
    finally:
        started = family()
        ray.shutdown()
    assert psutil.wait_procs(started, timeout=60)[1] == []


def family():
    """Ray's processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


SCRIPT = """
import sys
from husai.runs.cli import run_main
from husai.runs.executor import Task, run

def main():
    tasks = [Task(p, "executor_tasks:write_once", {"path": p}) for p in sys.argv[2:]]
    print([o.value for o in run(tasks, sys.argv[1])])

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=needs_ray)])
def test_an_interrupted_run_exits_130_and_resumes(executor, tmp_path, tests_importable):
    paths = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", SCRIPT, executor, *map(str, paths)]
    process = processes.start(command, cwd=ROOT / "src")
    deadline = time.monotonic() + 300
    while not paths[0].exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    ports = set()
    for p in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            ports |= {c.laddr.ip for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {ip.removeprefix("::ffff:") for ip in ports} == ({"127.0.0.1"} if executor == "ray" else set())
    process.send_signal(signal.SIGINT)
    _, err = processes.end(process, 120)
    assert process.returncode == 130, err
    assert [line.split(":")[0] for line in err.splitlines()] == ["interrupted"]
    assert psutil.wait_procs(started, timeout=60)[1] == []
    paths[1].write_text("finished")
    assert [o.value for o in run([task(p.name, "write_once", path=str(p)) for p in paths])] == ["finished"] * 2
