"""Runs tasks sequentially in this process, or in parallel on a Ray cluster, with identical bytes.

A task names a function, which writes its own cells below a given folder. A later run finds the cells that an
interrupted run finished. SAEs on one store belong to one task, because they are trained as one stack.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import husai
from husai.runs.cli import INTERRUPTED, prepare
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.machine import usable_cores
from husai.runs.progress import progress

log = logging.getLogger("husai")
SECONDS_TO_ANSWER = 5.0
"""Seconds that a Ray address has for an answer."""
NEW_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as on those systems, ports are open to this machine alone
}
EXISTING_CLUSTER = {  # fail within 15 s instead of minutes if the address is no Ray cluster
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_py_gcs_connect_timeout_s": "3",
    "RAY_gcs_rpc_server_connect_timeout_s": "2",
}
SECONDS_TO_STOP = 10.0
"""Seconds that interrupted tasks have to end."""
OBJECT_STORE_BYTES = 2**27  # tasks pass nothing but JSON; Ray would set aside a third of the memory


@dataclass(frozen=True)
class Task:
    """A call of `function` with `arguments`."""

    name: str
    function: str
    """package.module:function, importable where husai is."""
    arguments: dict[str, Any]
    """JSON. Paths are strings; relative paths refer to the working directory of the caller."""
    gpus: float = 0
    """Number of GPUs, or share of one, that Ray reserves. The task sees no others. The local executor ignores it."""


@dataclass(frozen=True)
class TaskOutcome:
    """Outcome of a task: its value (JSON), or the reason of its failure in one line."""

    name: str
    value: Any | None
    reason: str | None


def run(
    tasks: list[Task],
    executor: str = "local",
    ray_address: str | None = None,
    threads: int = 1,
    retries: int = 2,
    title: str = "tasks",
) -> list[TaskOutcome]:
    """Run all tasks, in order if local. A failed task is reported, and the others continue.

    Args:
        executor: "local" or "ray".
        ray_address: host:port of a cluster, or "auto" for the cluster of this machine. None: Ray starts a cluster on
            this machine, which ends with this process.
        threads: CPU threads of each task, and cores that Ray reserves for it.
        retries: number of retries after the loss of a worker or node. A task that raises is not retried.
        title: name of the tasks at the progress bar.

    Returns:
        One outcome for each task, in the order of the tasks.

    Raises:
        BadInput: a function does not exist, Ray is missing or does not answer, or no node has enough cores or GPUs.
        KeyboardInterrupt: all tasks were stopped. Their finished cells are kept.
    """
    for task in tasks:
        _function(task.function)
    if executor == "local" and ray_address is not None:
        raise BadInput(f"--ray-address {ray_address}: --executor ray expected with it")
    results = _local(tasks, threads) if executor == "local" else _on_ray(tasks, ray_address, threads, retries)
    outcomes: dict[int, TaskOutcome] = {}
    with closing(results), progress(title, len(tasks)) as advance:
        for i, result in results:
            name = tasks[i].name
            outcomes[i] = TaskOutcome(name, result.get("value"), result.get("reason"))
            for level, line in result.get("log", []):
                log.log(level, "%s: %s", name, line)
            if outcomes[i].reason is not None:
                log.warning("%s failed: %s", name, outcomes[i].reason)
            advance(1)
    return [outcomes[i] for i in range(len(tasks))]


def _function(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise BadInput(f"task function {name}: package.module:function expected ({error})") from None


def _call(function: str, arguments: dict, threads: int) -> dict:
    """{"value": result of the task after a round trip through JSON}, or {"reason": why it failed}."""
    try:
        prepare("cpu", threads)
        return {"value": json.loads(json.dumps(_function(function)(**arguments), allow_nan=False))}
    except (BadInput, CheckFailed) as error:
        return {"reason": _one_line(error)}
    except Exception as error:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt from None
        reason = f"{type(error).__name__}: {_one_line(error)}"
        return {"reason": reason, "log": [(logging.ERROR, traceback.format_exc().rstrip())]}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _local(tasks: list[Task], threads: int) -> Generator[tuple[int, dict]]:
    for i, task in enumerate(tasks):
        yield i, _call(task.function, task.arguments, threads)


def _on_ray(tasks: list[Task], address: str | None, threads: int, retries: int) -> Generator[tuple[int, dict]]:
    ray = _connect(address, threads)
    for gpus in {task.gpus for task in tasks}:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= gpus for n in nodes):
            raise BadInput(f"--executor ray: no node has the {threads} cores and {gpus:g} GPUs that a task asks for")
    paths = [str(Path(husai.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),  # the husai of this process, editable install or not
        "OMP_NUM_THREADS": str(threads),  # Ray sets it if it is unset
    }
    call = ray.remote(num_cpus=threads, max_retries=retries, runtime_env={"env_vars": environment})(_call_on_worker)
    pending = {
        call.options(num_gpus=t.gpus, name=t.name).remote(t.function, t.arguments, threads, os.getcwd()): i
        for i, t in enumerate(tasks)
    }
    try:
        while pending:
            for reference in ray.wait(list(pending), timeout=1.0)[0]:
                i = pending.pop(reference)
                try:
                    yield i, ray.get(reference)
                except ray.exceptions.RayError as error:  # errors of Ray itself; a task's own errors are in its result
                    yield i, {"reason": f"{type(error).__name__}: {_one_line(error)}"}
            if INTERRUPTED.is_set():
                raise KeyboardInterrupt
    finally:
        for reference in pending:
            ray.cancel(reference)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=SECONDS_TO_STOP)


class _Kept(logging.Handler):
    """Handler that keeps warnings as (level, message)."""

    def __init__(self, lines: list[tuple[int, str]]):
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def _call_on_worker(function: str, arguments: dict, threads: int, folder: str) -> dict:
    """`_call` in the caller's folder; the result includes logged warnings."""
    lines: list[tuple[int, str]] = []
    handler = _Kept(lines)
    log.addHandler(handler)
    try:
        os.chdir(folder)
        result = _call(function, arguments, threads)
    except OSError as error:
        result = {"reason": f"{socket.gethostname()} does not see the folder of the run ({error})"}
    finally:
        log.removeHandler(handler)
    return result | {"log": lines + result.get("log", [])}


def _connect(address: str | None, threads: int):
    """The ray module, connected until this process ends.

    Raises:
        BadInput: Ray is not installed, or nothing answers.
    """
    # Ray reads these variables when it is imported.
    variables = NEW_CLUSTER if address is None else EXISTING_CLUSTER
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise BadInput("--executor ray: Ray is missing; pip install -r requirements-cluster.txt") from None
    if address is not None:
        _answers(address)
    if ray.is_initialized():
        return ray
    logging.getLogger("ray").setLevel(logging.ERROR)
    start: dict[str, Any] = {"address": address}
    if address is None:
        cores = max(threads, usable_cores())
        start = {"address": "local", "num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES}
        start["include_dashboard"] = False
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**start, configure_logging=False, log_to_driver=False)
    except Exception as error:
        flag = "--executor ray" if address is None else f"--ray-address {address}"
        cause = str(error.__cause__ or error).strip().splitlines()[-1]  # the text may begin with a traceback
        raise BadInput(f"{flag}: Ray cannot be reached or started ({cause})") from None
    finally:
        for s, handler in handlers.items():  # Ray installs its own handlers
            signal.signal(s, handler)
    return ray


def _answers(address: str) -> None:
    """Raise BadInput if nothing answers at the address. Ray itself would try for minutes and print messages."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host, _, port = (canonicalize_bootstrap_address(address) or address).rpartition(":")
        socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:  # Ray's ConnectionError is an OSError
        expected = "host:port, or auto on a machine of a running cluster"
        raise BadInput(f"--ray-address {address}: no answer ({_one_line(error)}); {expected} expected") from None
