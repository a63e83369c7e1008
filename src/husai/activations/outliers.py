"""Outliers: rows of activations whose norm is many times the median norm, as at attention sinks.

Training shrinks them, or a store leaves them out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from husai.activations.store import ActivationStore, StoreWriter
from husai.evidence.levels import OUTLIER_NORM, SHRUNK_NORM
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, publish_directory

AT_ONCE = 65_536
"""Number of rows read at a time."""
LABELS = ("document", "token")
MULTIPLE = "max_norm_multiple"
"""Key of `StoreManifest.harvesting`."""
SAMPLE = 65_536
"""Number of rows from which the median norm is estimated. Rows are in random order, and memory must be bounded."""


def norm_limit(norms: Tensor) -> float:
    """Largest norm of a row that is no outlier; infinite if most rows are zero.

    Args:
        norms: norms of a sample of the rows, `[rows]`.
    """
    return OUTLIER_NORM * norms.median().item() or math.inf


def sampled_norms(store: ActivationStore, rows: range) -> Tensor:
    """Norms `[at most SAMPLE]` of the first of these rows."""
    return store.read(rows.start, min(rows.start + SAMPLE, rows.stop)).norm(dim=1)


def shrunk(x: Tensor, limit: float) -> Tensor:
    """Rows `[rows, d_in]` with outliers scaled down to SHRUNK_NORM median norms. Other rows are unchanged.

    Args:
        limit: result of `norm_limit`.
    """
    norms = x.norm(dim=1, keepdim=True)
    if not (norms > limit).any():
        return x
    return torch.where(norms > limit, x * (limit * SHRUNK_NORM / OUTLIER_NORM / norms), x)


def limit_of(store: ActivationStore) -> float:
    """Largest norm of a store's row that is no outlier; infinite if the store has no outlier."""
    return _of_store(store.folder, store.digest)[0]


def moments(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """(mean `[d_in]`, covariance `[d_in, d_in]`) of the rows as training reads them, with outliers shrunk; float64.

    Without outliers these are exactly the moments that the store keeps. Each process reads a store once.
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


def without_outliers(
    store: ActivationStore, multiple: float, root: Path, by: ActivationStore | None = None, force: bool = False
) -> ActivationStore:
    """The store without rows whose norm exceeds `multiple` times the median norm; found below `root` or made.

    Args:
        by: store of corresponding rows whose norms decide. None: the store itself.

    Raises:
        BadInput: no training row or no held-out row remains, or one of the stores has left rows out before.
    """
    m, by = store.manifest, by or store
    if m.dropped_rows is not None or by.manifest.dropped_rows is not None or store.rows != by.rows:
        raise BadInput(f"--max-norm-multiple: rows of {store.folder} were left out before; a whole store expected")
    key = {"store": store.digest, "by": by.digest, "multiple": multiple, "code": code_version(without_outliers)}
    folder = root / f"{m.subject}-within-{digest(key)[:16]}"
    limit = multiple * sampled_norms(by, range(by.rows)).median().item()
    first_heldout = store.rows - (m.heldout_rows or 0)

    def build(partial: Path) -> None:
        writer, heldout = StoreWriter(partial, store.d_in, m.dtype), 0
        for start in range(0, store.rows, AT_ONCE):
            part = start, min(start + AT_ONCE, store.rows)
            keep = by.read(*part).norm(dim=1) <= limit
            if not keep.any():
                continue
            labels = {name: store.labels(name, *part)[keep] for name in (LABELS if store.labelled else ())}
            writer.append(store.read(*part)[keep], labels)
            heldout += int(keep[max(0, first_heldout - start) :].sum())
        if writer.rows - heldout < 1 or (m.heldout_rows is not None and heldout < 1):
            raise BadInput(
                f"--max-norm-multiple {multiple:g}: {writer.rows} rows of {store.folder} are left, {heldout} of them "
                "held out; a larger multiple expected"
            )
        facts = m.subject, m.subject_digest, m.hook_name, m.position, m.row_seed, m.control
        writer.finish(
            *facts,
            heldout_rows=None if m.heldout_rows is None else heldout,
            text=m.text,
            harvesting=(m.harvesting or {}) | {MULTIPLE: multiple},
            dropped_rows=store.rows - writer.rows,
        )

    publish_directory(folder, build, replace=force)
    return ActivationStore.open(folder)
