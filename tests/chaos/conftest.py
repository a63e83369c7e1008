"""The miniature, and the queue that ran through on it: what the tests here compare with."""

import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from filelock import FileLock
from harness import Queue

import processes
from miniature import few_texts, save_miniature


def pytest_collection_modifyitems(items):
    """The longest first: the other worker takes the others."""
    items.sort(key=lambda item: "test_kill" not in item.nodeid)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    """One process imports the libraries for every queue of this worker, which is killed without it."""
    socket = tmp_path_factory.mktemp("server") / "socket"
    with open(f"{socket}.log", "w") as log:
        command = [sys.executable, "scripts/experiments/warm.py", "serve", socket, os.getpid()]
        process = processes.start(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + 30
    while not socket.exists():
        assert process.poll() is None, Path(f"{socket}.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.environ["HUSAI_SERVER"] = str(socket)
    harness.server = process.pid
    yield
    processes.kill(process)


@pytest.fixture(scope="session")
def subject(shared) -> Path:
    """The miniature: what is tested is what survives, not what it says."""
    folder = shared / "miniature"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            save_miniature(folder, few_texts().train)
    return folder


@pytest.fixture(scope="session")
def undisturbed(shared, subject) -> Queue:
    """The queue that ran through, once for all."""
    queue = Queue(shared / "undisturbed", subject)
    with FileLock(f"{queue.out}.lock"):
        if not (shared / "ran").exists():
            code, said = queue.run()
            assert code == 1, said  # nothing of it holds, and the gate says so
            assert "failed:" not in said, said
            (shared / "ran").touch()
    return queue
