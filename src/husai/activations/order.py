"""Order in which a training reads the rows: seeded, resumable, and without all rows in memory.

An epoch permutes blocks of neighbouring rows, reads a window of blocks at a time, and permutes the rows inside the
window. Reading is sequential within blocks, and the buffer is one window. The order is a pure function of (seed, rows
seen so far), therefore a resumed run continues exactly where it stopped. A store that fits into a window is permuted in
full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.runs.seeds import generator

if TYPE_CHECKING:
    from husai.activations.stream import HookStream


class WindowReader:
    """Reads rows in the order of their source, each once, shuffled inside windows.

    All readers of a stream share its window, which is refilled in place. Therefore a window holds whole batches, and
    the next window is read only when one of its batches is needed.

    Args:
        source: store or stream, whose rows are read a window at a time.
        rows: number of rows to read, from the first on.
        seed: seed of the order inside each window.
        position: number of rows already seen, from which the reader continues.
        window_rows: rows of the buffer, a multiple of the batch size.
    """

    def __init__(self, source: ActivationStore | HookStream, rows: int, seed: int, position: int, window_rows: int):
        self.source, self.rows = source, rows
        self.seed, self.position, self.window_rows = seed, position, window_rows
        self.number = -1

    def take(self, n: int) -> Tensor:
        """The next `n` rows `[n, d_in]`, float32."""
        number, offset = divmod(self.position, self.window_rows)
        if number != self.number:
            start = number * self.window_rows
            self.window = self.source.window(start, min(start + self.window_rows, self.rows))
            self.order = torch.randperm(len(self.window), generator=generator(self.seed, "window", 0, number))
            self.number = number
        assert offset + n <= len(self.window), "a window holds whole batches"
        self.position += n
        return self.window[self.order[offset : offset + n]].float()


class BatchReader:
    """An endless stream of shuffled rows.

    Args:
        store: store to read.
        rows: contiguous range of rows.
        seed: seed of the order.
        position: number of rows already seen, from which the stream continues.
        window_rows, block_rows: rows buffered at a time, and rows that are read as one block.
        held: all of `rows`, if they are in memory already.
    """

    def __init__(
        self,
        store: ActivationStore,
        rows: range,
        seed: int,
        position: int = 0,
        window_rows: int = 65_536,
        block_rows: int = 1_024,
        held: Tensor | None = None,
    ):
        self.store, self.rows, self.seed, self.held = store, rows, seed, held
        self.block_rows = min(block_rows, window_rows)
        self.blocks_per_window = window_rows // self.block_rows
        self.epoch, self.offset = divmod(position, len(rows))
        self._start_epoch()
        while self.offset >= (length := sum(map(len, self._window_blocks()))):  # skip whole windows without reading
            self.offset -= length
            self.window += 1
        self._load_window()

    def _start_epoch(self) -> None:
        blocks = -(-len(self.rows) // self.block_rows)
        self.blocks = torch.randperm(blocks, generator=generator(self.seed, "blocks", self.epoch))
        self.window = 0

    def _window_blocks(self) -> list[range]:
        chosen = self.blocks[self.window * self.blocks_per_window : (self.window + 1) * self.blocks_per_window]
        return [self.rows[int(b) * self.block_rows : (int(b) + 1) * self.block_rows] for b in chosen]

    def _load_window(self) -> None:
        blocks = self._window_blocks()
        numbers = torch.cat([torch.arange(block.start, block.stop) for block in blocks])
        order = torch.randperm(len(numbers), generator=generator(self.seed, "window", self.epoch, self.window))
        if self.held is not None:
            self.buffer = self.held[numbers[order] - self.rows.start]
        else:
            self.buffer = torch.cat([self.store.read(block.start, block.stop) for block in blocks])[order]

    def take(self, n: int) -> Tensor:
        """The next `n` rows `[n, d_in]`. A batch may extend into the next epoch. Each epoch has each row once."""
        parts, missing = [], n
        while missing:
            part = self.buffer[self.offset : self.offset + missing]
            parts.append(part)
            missing -= len(part)
            self.offset += len(part)
            if self.offset == len(self.buffer):
                self.offset = 0
                self.window += 1
                if self.window * self.blocks_per_window >= len(self.blocks):
                    self.epoch += 1
                    self._start_epoch()
                self._load_window()
        return parts[0] if len(parts) == 1 else torch.cat(parts)
