"""Streams of activations: SAEs train on rows while the rows are harvested. Only a bounded buffer holds rows.

The rows of a stream have the order of its text. One pass of the model gives the rows of every hook. The buffer holds a
window of rows for each hook, in memory or in a file. A window is a function of its number, therefore an interrupted
training resumes with the window in which it stopped.
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
        inputs: text, cut into inputs of the subject.
        window_rows: number of rows of the buffer, for each hook.
        dtype: type of the rows in the buffer. None: the subject's type.
        buffer: folder for files of the windows. None: windows are in memory.
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
        """Seconds that the model has run."""

    @property
    def hooks(self) -> dict[str, HookStream]:
        """Hook -> stream of its rows."""
        return {hook: HookStream(self, hook) for hook in self.hook_names}

    @cached_property
    def widths(self) -> dict[str, int]:
        """Hook -> d_in."""
        return {hook: x.shape[1] for hook, x in self._part(0).items()}

    def fill(self, start: int, stop: int) -> None:
        """Fill the windows with rows start … stop−1. The previous rows are overwritten."""
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
        """Rows of a part, cached because neighbouring windows may share a part."""
        if self.last is None or self.last[0] != number:
            self.last = None  # free its memory before the next part is made
            self.last = number, self.sample(number)
        return self.last[1]

    def sample(self, number: int = 0) -> dict[str, Tensor]:
        """Rows of a part, computed by the model."""
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
    """Rows of one hook of a stream. Training reads it like a store."""

    stream: ActivationStream
    hook_name: str
    folder: Path = field(default=Path("a stream"), repr=False)
    """Name in error messages."""

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
        """Digest of the inputs of the rows, because the rows themselves are never stored together."""
        facts = {"subject": self.stream.subject.activations_digest, "inputs": self.stream.inputs.digest}
        return digest(facts | {"hook_name": self.hook_name, "dtype": self.stream.dtype, "in order": True})

    def split(self, heldout_fraction: float) -> tuple[range, range]:
        """(all rows, no rows). Held-out rows come from documents of the other side."""
        return range(self.rows), range(0)

    def window(self, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 in the stream's buffer. The next window overwrites them."""
        self.stream.fill(start, stop)
        return self.stream.windows[self.hook_name][: stop - start]

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of rows start … stop−1 as float32. The model computes them again, therefore read only a few parts."""
        parts = []
        for number in range(len(self.stream.parts)):
            first, last = self.stream.edges[number : number + 2]
            low, high = max(first, start), min(last, stop)
            if low < high:
                parts.append(self.stream._part(number)[self.hook_name][low - first : high - first])
        return torch.cat(parts).float()
