"""Activations that SAEs train on while they are harvested: no row lies anywhere but in a buffer of bounded size.

A stream's rows are those of its text in order. One pass of the model gives the rows of every hook. The buffer holds a
window of rows for each hook, in memory or in a file. A window is a function of its number, therefore an interrupted
training goes on with the window in which it stopped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from husai.activations.language_model import Inputs, check_hooks, rows_of_part
from husai.activations.store import TextUsed
from husai.runs.errors import BadInput
from husai.runs.files import digest
from husai.runs.subjects import DType
from husai.subjects.pretrained import LanguageModel

log = logging.getLogger("husai")


class ActivationStream:
    """Rows of several hooks of a subject, a window at a time.

    Args:
        inputs: the text, cut for the subject; their rows are the stream's.
        window_rows: rows of the buffer, for each hook.
        dtype: of the rows in the buffer; by default that of the subject.
        buffer: folder for files that hold the windows; None: in memory.
    """

    def __init__(
        self,
        subject: LanguageModel,
        hook_names: list[str],
        inputs: Inputs,
        window_rows: int,
        dtype: DType | None = None,
        buffer: Path | None = None,
    ):
        for name, hook in check_hooks(subject, hook_names, by_document=True).items():
            if hook.of_token:
                log.warning(
                    "%s of %s gives one row for each token: held-out documents repeat rows that the stream trains on",
                    *(name, subject.name),
                )
        if subject.harvesting.max_norm_multiple:
            raise BadInput(
                "--max-norm-multiple: rows of a stream cannot be left out, because they are counted before they are "
                "made; a store, without --buffer-rows, expected"
            )
        self.subject, self.hook_names, self.inputs = subject, hook_names, inputs
        self.dtype: DType = dtype or subject.dtype
        self.rows = int(inputs.rows.sum())
        self.window_rows = min(window_rows, self.rows)
        self.parts = inputs.parts()
        counts = (int(inputs.rows[part.start : part.stop].sum()) for part in self.parts)
        self.edges = [0, *accumulate(counts)]  # rows before each part, and all
        self.buffer = buffer
        self.windows: dict[str, Tensor] = {}
        self.held: tuple[int, int] | None = None  # rows that the windows hold
        self.last: tuple[int, dict[str, Tensor]] | None = None  # (number, rows) of the part that was run last
        self.seconds = 0.0
        """Time that the model took."""

    @property
    def hooks(self) -> dict[str, HookStream]:
        """Hook -> its rows."""
        return {hook: HookStream(self, hook) for hook in self.hook_names}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Hook -> d_in."""
        return {hook: x.shape[1] for hook, x in self._part(0).items()}

    def fill(self, start: int, stop: int) -> None:
        """Let the windows hold rows start … stop−1, in place of what they held."""
        if self.held == (start, stop):
            return
        began, self.held = time.monotonic(), None
        for number in range(len(self.parts)):
            first, last = self.edges[number : number + 2]
            low, high = max(first, start), min(last, stop)
            if low < high:
                for hook, rows in self._part(number).items():
                    self._window(hook, rows.shape[1])[low - start : high - start] = rows[low - first : high - first]
        self.held = start, stop
        self.seconds += time.monotonic() - began

    def _part(self, number: int) -> dict[str, Tensor]:
        """Rows of a part, which neighbouring windows may share."""
        if self.last is None or self.last[0] != number:
            self.last = None  # before the next one is made
            self.last = number, self.sample(number)
        return self.last[1]

    def sample(self, number: int = 0) -> dict[str, Tensor]:
        """Rows of a part, made anew."""
        rows, _, _ = rows_of_part(self.subject, self.inputs, self.parts[number], self.hook_names, self.dtype)
        for hook, x in rows.items():
            if not x.isfinite().all():
                raise BadInput(f"activations: {hook}: a NaN or infinite value; finite values expected")
        return rows

    def _window(self, hook: str, d_in: int) -> Tensor:
        if hook not in self.windows:
            size, dtype = self.window_rows * d_in, getattr(torch, self.dtype)
            if self.buffer is None:
                flat = torch.empty(size, dtype=dtype)
            else:
                self.buffer.mkdir(parents=True, exist_ok=True)
                flat = torch.from_file(str(self.buffer / f"{hook}.window"), shared=True, size=size, dtype=dtype)
            self.windows[hook] = flat.view(self.window_rows, d_in)
        return self.windows[hook]

    def close(self) -> None:
        """Free the windows, and delete their files."""
        self.windows, self.held, self.last = {}, None, None
        if self.buffer is not None:
            for hook in self.hook_names:
                (self.buffer / f"{hook}.window").unlink(missing_ok=True)


@dataclass(frozen=True)
class HookStream:
    """The rows of one hook of a stream: what training reads in place of a store."""

    stream: ActivationStream
    hook_name: str
    folder: Path = field(default=Path("a stream"), repr=False)
    """Named by errors."""

    @property
    def rows(self) -> int:
        return self.stream.rows

    @property
    def d_in(self) -> int:
        return self.stream.widths[self.hook_name]

    @property
    def text(self) -> TextUsed | None:
        return self.stream.inputs.used

    @property
    def digest(self) -> str:
        """Names the rows by what they are made of: they are never together anywhere."""
        about = {"subject": self.stream.subject.activations_digest, "inputs": self.stream.inputs.digest}
        return digest(about | {"hook_name": self.hook_name, "dtype": self.stream.dtype, "in order": True})

    def split(self, heldout_fraction: float) -> tuple[range, range]:
        """(all rows, none): held-out rows are of documents of the other side."""
        return range(self.rows), range(0)

    def window(self, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 in the stream's buffer, where the next window takes their place."""
        self.stream.fill(start, stop)
        return self.stream.windows[self.hook_name][: stop - start]

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of rows start … stop−1 as float32; of a part or two, because they are made anew."""
        parts = []
        for number in range(len(self.stream.parts)):
            first, last = self.stream.edges[number : number + 2]
            low, high = max(first, start), min(last, stop)
            if low < high:
                parts.append(self.stream._part(number)[self.hook_name][low - first : high - first])
        return torch.cat(parts).float()
