"""Run the queue's stages in children of one process that has already imported the libraries.

    python scripts/experiments/warm.py serve SOCKET PARENT
    python -S scripts/experiments/warm.py run SOCKET scripts/... ARGUMENT...

Importing torch, transformers and sae-lens costs several seconds of each stage. The server imports them once and forks a
child for every command, before anything has computed. The child imports HUSAI itself, because a change of HUSAI's code
must reach the next stage. Without a server `run` starts the command with its own Python. Either way the command has its
own process, its own return code, and the terminal and folder of the caller. The server ends with process PARENT.
docs/benchmarks/demo_profile.md: what it saves.
"""

import argparse
import array
import atexit
import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback

LIBRARIES = (
    *("torch", "numpy", "scipy.stats", "scipy.optimize", "scipy.sparse.csgraph", "pandas", "pydantic", "rich.progress"),
    *("sklearn.linear_model", "sklearn.metrics", "numba", "safetensors.torch", "psutil", "filelock"),
    *("transformers.models.auto", "transformers.models.gpt_neox", "transformer_lens.model_bridge"),
    *("sae_lens", "sae_probes", "matplotlib.pyplot", "jinja2", "markdown_it", "PIL.Image"),
)
KILLED = 137
"""Return code of a command whose process disappeared without one."""


def serve(path: str, parent: int) -> None:
    """Import the libraries, then fork a child for every connection."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_short(path))
    listener.listen(8)  # whoever connects meanwhile waits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the children: they report themselves
    _end_with(parent)
    os.environ.setdefault("MPLBACKEND", "agg")
    importlib.import_module("husai")  # alone, for its environment variables: torch reads them at its first allocation
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # the environment check names it
            importlib.import_module(name)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(_child(connection))
        connection.close()


def _child(connection: socket.socket) -> int:
    """Become the command; its return code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _end_with(os.getppid())
    length = int.from_bytes(_read(connection, 4), "big")
    _, ancillary, *_ = connection.recvmsg(1, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i", ancillary[0][2])
    asked = json.loads(_read(connection, length))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(n, mode, closefd=False), line_buffering=n == 2 or os.isatty(n))
        for n, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as a process that imports husai has it
    os.chdir(asked["folder"])
    sys.argv = asked["arguments"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    connection.sendall(f"{os.getpid()}\n".encode())
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if code == 1 and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    return code & 255


def run(path: str, arguments: list[str]) -> int:
    """Let the server run a command; its return code."""
    connection, pid = socket.socket(socket.AF_UNIX), b""
    asked = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(asked).encode()
    try:
        connection.connect(_short(path))
        connection.sendall(len(message).to_bytes(4, "big"))
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(message)
        answer = connection.makefile("rb")
        pid = answer.readline()
    except OSError:
        pass
    if not pid:
        os.execvp("python", ["python", *arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is of the same group, which Ctrl-C reaches
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _terminate(int(pid)))
    code = answer.readline()
    return int(code) if code else KILLED


def _short(path: str) -> str:
    """The same file by a name that fits a socket's address, which holds 107 bytes."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    return f"/proc/self/fd/{folder}/{os.path.basename(path)}" if sys.platform == "linux" else path


def _terminate(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _read(connection: socket.socket, n: int) -> bytes:
    found = b""
    while len(found) < n:
        part = connection.recv(n - len(found))
        if not part:
            os._exit(KILLED)  # the caller is gone
        found += part
    return found


def _end_with(parent: int) -> None:
    """Let this process be stopped when its parent is gone, however it went (Linux)."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(KILLED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["serve", "run"])
    parser.add_argument("socket", help="file that the server listens on")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="serve: process id of the parent; run: the command")
    args = parser.parse_args()
    if args.verb == "serve":
        serve(args.socket, int(args.rest[0]))
    sys.exit(run(args.socket, args.rest))


if __name__ == "__main__":
    main()
