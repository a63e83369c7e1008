"""Processes of the tests: in a group of their own, with default signal handlers, and never without a time limit.

Many CI runners start a suite with SIGINT ignored, which children inherit: a test that sends it would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0
"""Seconds for what takes some on an idle machine."""


def start(command: list, **given) -> subprocess.Popen:
    """Start a command at the repository's root, its output as text in pipes unless `given` says otherwise."""
    usual = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], **usual | given, start_new_session=True, preexec_fn=_default_handlers)


def end(process: subprocess.Popen, seconds: float = LIMIT, text: str | None = None) -> tuple[str, str]:
    """Give a process its standard input, wait for it; (stdout, stderr). If it takes longer, the test fails and the
    process's group is killed."""
    try:
        return process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"{process.args} took more than {seconds:g} s")
    except BaseException:
        kill(process)
        raise


def run(
    command: list, seconds: float = LIMIT, check: bool = True, input: str | None = None, **given
) -> subprocess.CompletedProcess:
    """Run a command to its end. The test fails if it takes longer, or with `check` if its return code is not 0."""
    process = start(command, **given, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE)
    out, err = end(process, seconds, input)
    if check and process.returncode:
        pytest.fail(f"{process.args} ended with {process.returncode}: {err or out}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the whole group of a process that `start` started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _default_handlers() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
