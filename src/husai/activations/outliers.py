"""Rows of activations whose norm is many times the median norm: attention sinks."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.evidence.levels import OUTLIER_NORM, SHRUNK_NORM

AT_ONCE = 65_536
"""Rows that are read at a time."""
SAMPLE = 65_536
"""Rows that give the median norm. Rows lie in random order, and memory must not grow with their number."""


def norm_limit(norms: Tensor) -> float:
    """The largest norm that is no outlier's; infinite where most rows are zero.

    Args:
        norms: of a sample of the rows, `[rows]`.
    """
    return OUTLIER_NORM * norms.median().item() or math.inf


def sampled_norms(store: ActivationStore, rows: range) -> Tensor:
    """Norms `[at most SAMPLE]` of the first of these rows."""
    return store.read(rows.start, min(rows.start + SAMPLE, rows.stop)).norm(dim=1)


def shrunk(x: Tensor, limit: float) -> Tensor:
    """Rows `[rows, d_in]`; outliers brought down to SHRUNK_NORM medians, in their own direction. The others keep their
    bits.

    Args:
        limit: of `norm_limit`.
    """
    norms = x.norm(dim=1, keepdim=True)
    if not (norms > limit).any():
        return x
    return torch.where(norms > limit, x * (limit * SHRUNK_NORM / OUTLIER_NORM / norms), x)


def limit_of(store: ActivationStore) -> float:
    """The largest norm that is no outlier's; infinite where the store has no outlier."""
    return _of_store(store.folder, store.digest)[0]


def moments(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """(mean `[d_in]`, covariance `[d_in, d_in]`), float64, of the rows as SAEs are trained on them: outliers shrunk.

    Where no row is an outlier these are the moments that the store keeps, to the bit. Each process reads a store once.
    """
    return _of_store(store.folder, store.digest)[1]


@lru_cache(maxsize=4)
def _of_store(folder: Path, digest: str) -> tuple[float, tuple[Tensor, Tensor]]:
    store = ActivationStore.open(folder)
    limit, parts = norm_limit(sampled_norms(store, range(store.rows))), range(0, store.rows, AT_ONCE)
    mean = torch.zeros(store.d_in, dtype=torch.float64)
    largest = 0.0
    for start in parts:
        x = store.read(start, min(start + AT_ONCE, store.rows))
        largest = max(largest, x.norm(dim=1).max().item())
        mean += shrunk(x, limit).double().sum(0) / store.rows
    if largest <= limit:
        return math.inf, store.stats()

    covariance = torch.zeros(store.d_in, store.d_in, dtype=torch.float64)
    for start in parts:
        centred = shrunk(store.read(start, min(start + AT_ONCE, store.rows)), limit).double() - mean
        covariance += centred.T @ centred
    return limit, (mean, covariance / max(1, store.rows - 1))
