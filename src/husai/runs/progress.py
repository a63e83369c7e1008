"""Progress with an ETA: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("husai")
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 1.0
LINE = "%s: %d/%d, about %.0f s left"
"""Line of a log, which `LINES` finds again."""
LINES = re.compile(rb"^[^\r\n]+: \d+/\d+, about \d+ s left(?=\n)", re.MULTILINE)
NEAR_THE_END = 4096
"""Bytes of a log that are searched for its last line of progress."""
_shown = None  # bars on the terminal; a nested bar appears below the outer one


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. An earlier run finished `done` of `total`, which does not count in the speed."""
    if sys.stderr.isatty():
        with _bars() as bars:
            task = bars.add_task(description, total=total, completed=done)

            def advance_bar(n: int = 1) -> None:
                bars.advance(task, n)

            try:
                yield advance_bar
            finally:
                bars.remove_task(task)
        return
    start = last = time.monotonic()
    finished = done

    def advance(n: int = 1) -> None:
        nonlocal last, finished
        finished += n
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and finished > done:
            last = now
            eta = (now - start) / (finished - done) * (total - finished)
            log.info(LINE, description, finished, total, eta)

    yield advance


def follow(title: str, path: Path, ended: Callable[[float], bool]) -> None:
    """Show the progress of another process from its log until it ends: one line that changes on a terminal, an
    occasional line elsewhere.

    Args:
        path: the log. ended: waits for so many seconds at most; returns whether the process has ended.
    """
    began = time.monotonic()
    shown, last, latest = "", began - SECONDS_BETWEEN_LINES, ""
    with _status(title) as update:
        while not ended(SECONDS_BETWEEN_LOOKS):
            latest, now = _latest(path) or latest, time.monotonic()
            update(": ".join(filter(None, (title, latest))) + f" ({duration(now - began)} so far)")
            if update is _nothing and latest != shown and now - last >= SECONDS_BETWEEN_LINES:
                shown, last = latest, now
                log.info("%s: %s", title, latest)


def _latest(path: Path) -> str:
    """The last line of progress near the end of a log; empty without one."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - NEAR_THE_END))
        lines = LINES.findall(file.read())
    return lines[-1].decode(errors="replace") if lines else ""


def _nothing(text: str) -> None:
    """Show nothing."""


@contextmanager
def _status(title: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text in the terminal's last line; elsewhere, `_nothing`."""
    if not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(title)) as status:
        yield lambda text: status.update(Text(text))


@contextmanager
def _bars():
    global _shown
    if _shown is not None:
        yield _shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as _shown:
        try:
            yield _shown
        finally:
            _shown = None
