"""Run the queue's stages as children of one process that has already imported the libraries.

    python scripts/experiments/warm.py serve SOCKET PARENT
    python -S scripts/experiments/warm.py run SOCKET scripts/... ARGUMENT...

Imports of torch, transformers and sae-lens take several seconds of each stage. The server imports them once, computes
nothing, and forks a child for every command. The child imports HUSAI itself, because a change of HUSAI's code must
affect the next stage. Without a server, `run` starts the command with its own Python. In both cases the command has its
own process and return code, and the terminal and folder of the caller. The server ends with process PARENT. It serves
stages on the CPU alone: a library that it imports queries GPUs, and CUDA does not survive a fork.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import NoReturn

PAGE = ("numpy", "pydantic", "scipy.special", "jinja2", "markdown_it", "yaml", "PIL.Image")
SOME = ("torch", *PAGE, "scipy.optimize", "scipy.sparse.csgraph")
SUBJECT = (*SOME, "transformer_lens")
ALL = (
    *(*SUBJECT, "scipy.stats", "pandas", "sklearn.linear_model", "sklearn.metrics", "numba", "matplotlib.pyplot"),
    *("pyarrow.csv", "rich.progress", "psutil", "transformers.models.auto", "transformers.models.gpt_neox"),
    *("transformer_lens.model_bridge", "sae_lens", "sae_probes"),
)
NEEDS = {
    "queue_manifest.py": (),
    "train_modular_addition.py": SUBJECT,
    "run_stress_gated_release_policy.py": SOME,
    "verify_experiment_consistency.py": PAGE,
    "build_report.py": PAGE,
}
"""Script -> libraries to import before its fork; other scripts need ALL. A repeat of a finished queue needs few."""
KILLED = 137
"""Return code of a command whose process disappeared without one."""


def serve(path: str, parent: int) -> None:
    """Import the libraries, then fork a child for every connection."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_short(path))
    listener.listen(8)  # later callers wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children report their return codes themselves
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _end_with(parent)
    os.environ.setdefault("MPLBACKEND", "agg")
    importlib.import_module("husai")  # sets environment variables that torch reads at its first allocation
    ahead = [*SOME]
    while True:
        while ahead and not select.select([listener], [], [], 0)[0]:  # idle: import the next library
            load(ahead.pop(0))
        connection, _ = listener.accept()
        try:
            request, streams = _request(connection)
        except (OSError, ValueError):  # the caller is gone
            connection.close()
            continue
        needs = NEEDS.get(os.path.basename(request["arguments"][0]), ALL)
        for name in needs:
            load(name)
        if not set(needs) <= set(SOME):  # no repeated run: later stages need all libraries
            ahead = [*ALL]
        gc.freeze()  # garbage collections of children need not scan the libraries
        if os.fork() == 0:
            listener.close()
            os._exit(_child(connection, request, streams))
        connection.close()
        for stream in streams:
            os.close(stream)


def load(library: str) -> None:
    """Import a library if it is installed."""
    with contextlib.suppress(ImportError):  # the environment check names it
        importlib.import_module(library)


def _request(connection: socket.socket) -> tuple[dict, list[int]]:
    """(request of a caller, its three standard streams)."""
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    length, body = int.from_bytes(head, "big"), b""
    while len(body) < length:
        part = connection.recv(length - len(body))
        if not part:
            for stream in streams:
                os.close(stream)
            raise OSError("cut off")
        body += part
    return json.loads(body), list(streams)


def _child(connection: socket.socket, request: dict, streams: list[int]) -> int:
    """Become the command; returns its return code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _end_with(os.getppid())
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        open(n, mode, buffering, errors=errors, closefd=False)  # noqa: SIM115
        for n, mode, buffering, errors in (
            (0, "r", -1, None),
            (1, "w", 1 if os.isatty(1) else -1, None),
            (2, "w", 1, "backslashreplace"),
        )
    )
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.modules.pop("husai")  # import the present code again, which sets its environment variables
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    connection.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=_end_with_caller, args=(connection,), daemon=True).start()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    return code & 255


def _end_with_caller(connection: socket.socket) -> None:
    """Kill the command when its caller ends."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def run(path: str, arguments: list[str]) -> int:
    """Let the server run a command; returns its return code."""
    connection, stage, waiting = socket.socket(socket.AF_UNIX), 0, []

    def forward(number: int, frame=None) -> None:
        """Forward a signal, except Ctrl-C within the terminal's process group, which the child receives itself."""
        if not stage:
            waiting.append(number)
        elif number != signal.SIGINT or os.getpgid(stage) != os.getpgrp():
            with contextlib.suppress(ProcessLookupError):
                os.kill(stage, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            before[number] = signal.signal(number, forward)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    message = json.dumps(request).encode()
    answer = connection.makefile("rb")
    try:
        connection.connect(_short(path))
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        stage = int(answer.readline() or 0)
    except OSError:
        pass
    if not stage:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            return 130
        os.execvp("python", ["python", *arguments])
    for received in waiting:
        forward(received)
    code = answer.readline()
    return int(code) if code else KILLED


def _short(path: str) -> str:
    """A short name of the same file, because a socket's address holds 107 bytes."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    return f"/proc/self/fd/{folder}/{os.path.basename(path)}" if sys.platform == "linux" else path


def _end_with(parent: int) -> None:
    """Stop this process when its parent ends for any reason (Linux)."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(KILLED)


class _Parser(argparse.ArgumentParser):
    """A parser with errors of one line. HUSAI's own parser would cost an import."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["serve", "run"])
    parser.add_argument("socket", help="file that the server listens on")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="serve: process id of the parent; run: the command")
    args = parser.parse_args()
    if args.verb == "serve" and not (len(args.rest) == 1 and args.rest[0].isdigit()):
        parser.error("serve: the process id of the parent expected after SOCKET")
    if args.verb == "run" and not args.rest:
        parser.error("run: a script expected after SOCKET")
    if args.verb == "serve":
        serve(args.socket, int(args.rest[0]))
    sys.exit(run(args.socket, args.rest))


if __name__ == "__main__":
    main()
