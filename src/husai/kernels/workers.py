"""Distributes shares of work over threads. Numba kernels and torch's products release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Context in which torch uses one thread, because its callers already run in parallel.

    A worker that sets the number also sets it for MKL in the whole process, therefore it is restored at the end.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def deal(work: Callable, shares: Iterable[tuple]) -> None:
    """Call `work(*share)` for each share, on as many threads as torch is set to; the first error is raised."""
    threads = torch.get_num_threads()
    if threads == 1:
        for share in shares:
            work(*share)
        return
    with one_torch_thread():
        for done in [pool(threads).submit(work, *share) for share in shares]:
            done.result()


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of pieces of 0 … total, each of at most `size`."""
    for first in range(0, total, size):
        yield first, min(first + size, total)
