"""Common parts of all command lines. `--help` is instant, because nothing heavy is imported."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from husai.runs.errors import CRASHED, BadInput, CheckFailed
from husai.runs.inputs import Arguments, Counts, by_content, by_value, not_at_all
from husai.runs.machine import usable_cores

INTERRUPTED = threading.Event()
"""Set by SIGINT and SIGTERM, because an interrupted import can turn KeyboardInterrupt into another exception."""

DEFAULT_SEEDS = "42,123,456,789,1011"
_FOLDER_ERRORS = {
    errno.ENOENT,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class Parser(argparse.ArgumentParser):
    """argparse with unabbreviated flags, the script's docstring as help, and errors of one line."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "output and machine": (
            *("output_dir", "output", "artifact_root", "force", "device", "threads", "executor", "ray_address", "help"),
        ),
    }
    """Title in `--help` -> arguments, in the order of the page. All others form a group before the last one."""

    def __init__(self, doc: str):
        self.counts: dict[str, Counts] = {}
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add_argument(self, *flags: str, counts: Counts | None = None, **settings: Any) -> argparse.Action:
        """The method of argparse, with one more argument.

        Args:
            counts: contribution of the flag to the key of a phase's cell (`runs.inputs`).
        """
        action = super().add_argument(*flags, **settings)
        if counts is not None:
            self.counts[action.dest] = counts
        return action

    def format_help(self) -> str:
        """The script's docstring, then the usage line, then the groups of flags.

        Groups are formed here, because scripts and parser methods that add arguments then need not agree on them.
        """
        *first, last = self.groups.items()
        grouped = {dest for dests in self.groups.values() for dest in dests}
        others = tuple(action.dest for action in self._actions if action.dest not in grouped)
        formatter = self.formatter_class(prog=f"{self.prog} [options]")
        formatter.add_text(self.description)
        formatter.add_usage(self.usage, [a for a in self._actions if a.required], [])
        for title, dests in (*first, ("this script", others), last):
            formatter.start_section(title)
            formatter.add_arguments(action for action in self._actions if action.dest in dests)
            formatter.end_section()
        return formatter.format_help()

    def parse_args(self, args=None, namespace=None) -> Arguments:  # type: ignore[override]
        """Parsed arguments, with the contribution of each to the key of a cell."""
        arguments = super().parse_args(args, namespace or Arguments())
        # Arguments of groups bypass `add_argument`, therefore the default applies to them too.
        by_default = {a.dest: by_content if a.type is Path else by_value for a in self._actions}
        arguments.counts = by_default | self.counts
        return arguments

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {Path(self.prog).name} --help)\n")

    def add_common(self, output_dir: str) -> None:
        """Flags of every phase: --output-dir, and the flags of `add_shared`."""
        self.add_argument(
            "--output-dir", type=Path, default=Path(output_dir), counts=not_at_all, help="default: %(default)s"
        )
        self.add_shared()

    def add_shared(self) -> None:
        """--artifact-root, --device, --threads, --force."""
        self.add_argument(
            "--artifact-root",
            type=Path,
            default=Path("results"),
            counts=not_at_all,
            help="holds subjects/ and activations/, which phases share (default: %(default)s)",
        )
        self.add_machine()
        self.add_argument(
            "--force",
            "--force-rerun",
            action="store_true",
            counts=not_at_all,
            help="compute again what is already finished",
        )

    def add_executor(self) -> None:
        """Executor of a grid's tasks: --executor, --ray-address."""
        self.add_argument(
            "--executor",
            choices=("local", "ray"),
            default="local",
            counts=not_at_all,
            help="local: in this process; ray: side by side on a Ray cluster (default: %(default)s)",
        )
        self.add_argument(
            "--ray-address",
            counts=not_at_all,
            help="host:port of a Ray cluster that this machine belongs to, or auto to find it (default: one of this "
            "machine alone, for this run)",
        )

    def add_machine(self) -> None:
        """--device, --threads."""
        self.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
        self.add_argument(
            "--threads",
            type=positive_int,
            default=usable_cores(),
            help="CPU threads; part of what makes a result repeatable to the byte (default: the available cores)",
        )


def _number(text: str, kind: type, holds: Callable[[float], bool], expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def positive_int(text: str) -> int:
    return _number(text, int, lambda v: v >= 1, "a whole number of at least 1")


def fraction(text: str) -> float:
    return _number(text, float, lambda v: 0 < v < 1, "a number between 0 and 1")


def positive_float(text: str) -> float:
    return _number(text, float, lambda v: 0 < v < float("inf"), "a finite number above 0")


def finite_float(text: str) -> float:
    return _number(text, float, math.isfinite, "a finite number")


def nonnegative_float(text: str) -> float:
    return _number(text, float, lambda v: 0 <= v < float("inf"), "a finite number of at least 0")


def float_list(text: str) -> list[float]:
    """`0,0.01,0.1` -> [0.0, 0.01, 0.1]; distinct, not negative."""
    return _distinct([nonnegative_float(part.strip()) for part in text.split(",")], text)


def int_list(text: str) -> list[int]:
    """`8,16,32` -> [8, 16, 32]; distinct, positive."""
    values = [positive_int(part.strip()) for part in text.split(",")]
    return _distinct(values, text)


def index_list(text: str) -> list[int]:
    """`0,8,16` -> [0, 8, 16]; distinct, from 0 on."""
    values = [_number(part.strip(), int, lambda v: v >= 0, "a whole number of at least 0") for part in text.split(",")]
    return _distinct(values, text)


def name_list(text: str) -> list[str]:
    """`topk,relu` -> ["topk", "relu"]; distinct."""
    return _distinct([part.strip() for part in text.split(",")], text)


def seed_list(text: str) -> list[int]:
    """`42,123` -> [42, 123]; distinct, not negative."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as {DEFAULT_SEEDS}") from None
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a negative seed")
    return _distinct(values, text)


def _distinct(values: list, text: str) -> list:
    repeated = sorted({v for v in values if values.count(v) > 1})
    if repeated:
        raise argparse.ArgumentTypeError(f"{text!r} names {repeated[0]} twice; each must be given once")
    return values


def prepare(device: str, threads: int):
    """Fix the thread count and deterministic algorithms, on which the arithmetic depends. Returns the torch device.

    Raises:
        BadInput: this machine has no such device.
    """
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all memory is written before it is read
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: not available here ({str(error).splitlines()[0]})") from None


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`; exit with 0, 1 (check), 2 (input), 130 (interrupted) or CRASHED."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("husai").setLevel(logging.INFO)

    def interrupt(signum, frame):
        if INTERRUPTED.is_set():  # a signal to the process group arrives more than once
            return
        INTERRUPTED.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except BadInput as error:
        sys.exit(_one_line(error, 2))
    except CheckFailed as error:
        sys.exit(_one_line(error, 1))
    except (KeyboardInterrupt, Exception) as error:
        if INTERRUPTED.is_set() or isinstance(error, KeyboardInterrupt):
            print("interrupted: the same command resumes", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
            sys.exit(_one_line(error, 2))
        traceback.print_exc()
        sys.exit(CRASHED)
    sys.exit(0)


def _one_line(error: Exception, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code
