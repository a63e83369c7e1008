"""Progress with an ETA: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("husai")
SECONDS_BETWEEN_LINES = 30.0
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
            log.info("%s: %d/%d, about %.0f s left", description, finished, total, eta)

    yield advance


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
