"""Rows of activations whose norm is many times the median norm: attention sinks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.evidence.levels import OUTLIER_NORM, SHRUNK_NORM

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
