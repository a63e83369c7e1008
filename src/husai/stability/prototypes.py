"""Prototypes: directions that the activations give without training. Single rows, means of tokens, centroids.

Every seed finds them again, so that a score of stability does not tell them from features. They enter twice: features
whose direction lies near a prototype are told apart (`of_store`, `nearest`), and an SAE must code better than a
dictionary of them (`dictionaries`, `TopKLeastSquares`). Stores are read in blocks, therefore memory does not grow with
their rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, write_bytes
from husai.runs.seeds import generator
from husai.stability.matching import unit_rows
from husai.training.trainer import TrainingConfig, evaluate

LEAST = 5
"""Occurrences that the mean of a token needs."""
BLOCK = 16_384
"""Rows, or prototypes, in memory at a time."""
SAMPLE, SAMPLE_A_CENTROID = 32_768, 4
"""Rows that k-means and random rows are drawn from: at most so many, or so many for each direction if that is more."""
DRAWS = 3
"""Dictionaries of a kind of prototypes, whose figures are averaged."""
RIDGE = 1e-4
PRODUCTS = 2**24
"""Numbers of the directions that code rows, in memory at a time."""


# ---------------------------------------------------------------------------------------------------------------------
# Membership


def of_store(store: ActivationStore, artifact_root: Path, width: int) -> Tensor:
    """Prototypes of a third of the documents, unit rows `[n, d_in]`; found, or made and kept.

    Args:
        artifact_root: they lie below it, in controls/, for all phases on the store.
        width: number of features of the SAEs, and of centroids.
    """
    root = artifact_root / "controls"
    key = {"store": store.digest, "width": width, "code": code_version(of_store)}
    file = root / "prototypes" / f"{digest(key)[:16]}.safetensors"

    def compute() -> tuple[int, list[Path]]:
        made = prototypes(store, width)
        write_bytes(file, to_bytes({"prototypes": made.contiguous()}))
        return len(made), [file]

    Cells(root / "cells").get("prototypes", key, compute)
    return load_file(file)["prototypes"]


def prototypes(store: ActivationStore, width: int) -> Tensor:
    """Unit rows: centroids of a third and, where tokens are known, the mean of each that stands there LEAST times.

    Each counts with the mean of all rows and without it.
    """
    mean = store.stats()[0].float()
    x, _ = sample(store, True, width)
    made = [clusters(x, width, 0)]
    if store.labelled:
        made.append(token_means(store, True)[1])
    p = torch.cat(made)
    return unit_rows(torch.cat([p, p - mean]))


@torch.no_grad()
def nearest(W_dec: Tensor, prototypes: Tensor) -> Tensor:
    """Signed cosine of each direction with the prototype nearest to it, `[d_sae]`."""
    U = unit_rows(W_dec.to(prototypes))
    return torch.stack([(U @ part.T).amax(1) for part in prototypes.split(BLOCK)]).amax(0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a store


def blocks(store: ActivationStore, third: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(rows `[n, d_in]`, their tokens `[n]` where known) of the training rows, in blocks.

    Args:
        third: of every third document; else of all others. Of rows, where there are no documents.
    """
    rows, _ = store.split(TrainingConfig.heldout_fraction)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        tokens, numbers = None, torch.arange(start, stop)
        if store.labelled:
            tokens, numbers = (store.labels(name, start, stop) for name in ("token", "document"))
        chosen = (numbers % 3 == 0) == third
        if chosen.any():
            yield store.read(start, stop)[chosen], None if tokens is None else tokens[chosen]


def sample(store: ActivationStore, third: bool, width: int) -> tuple[Tensor, Tensor | None]:
    """The first rows, which are a random sample because rows lie in random order, and their tokens.

    Raises:
        BadInput: there are none.
    """
    most, x, tokens = max(SAMPLE, SAMPLE_A_CENTROID * width), [], []
    for part, of_part in blocks(store, third):
        x.append(part)
        tokens += [] if of_part is None else [of_part]
        if sum(map(len, x)) >= most:
            break
    if not x:
        raise BadInput(f"activation store: {store.folder}: no rows to make prototypes of; several documents expected")
    return torch.cat(x)[:most], torch.cat(tokens)[:most] if tokens else None


def token_means(store: ActivationStore, third: bool) -> tuple[Tensor, Tensor]:
    """(tokens that stand there LEAST times, the commonest first; the mean row of each `[n, d_in]`).

    Memory: a row for each of these tokens.
    """
    counts = torch.zeros(1, dtype=torch.int64)
    for _, tokens in blocks(store, third):
        assert tokens is not None
        seen = tokens.bincount(minlength=len(counts))
        seen[: len(counts)] += counts
        counts = seen
    chosen = commonest(counts, LEAST)
    place = torch.full((len(counts),), -1)
    place[chosen] = torch.arange(len(chosen))
    sums = torch.zeros(len(chosen), store.d_in, dtype=torch.float64)
    for x, tokens in blocks(store, third):
        assert tokens is not None
        at = place[tokens]
        sums.index_add_(0, at[at >= 0], x[at >= 0].double())
    return chosen, (sums / counts[chosen, None]).float()


def commonest(counts: Tensor, least: int) -> Tensor:
    """Tokens that stand somewhere `least` times, the commonest first.

    Args:
        counts: occurrences of each token `[vocabulary]`.
    """
    order = counts.argsort(descending=True, stable=True)
    return order[counts[order] >= max(1, least)]


# ---------------------------------------------------------------------------------------------------------------------
# What prototypes are made by


def clusters(x: Tensor, n: int, seed: int) -> Tensor:
    """Centroids of k-means, as many as there are rows if these are fewer, `[n, d_in]`."""
    from sklearn.cluster import MiniBatchKMeans

    made = MiniBatchKMeans(min(n, len(x)), random_state=seed, n_init=1, batch_size=1024, max_iter=5).fit(x.numpy())
    return torch.from_numpy(made.cluster_centers_).float()


def distinct(order: Tensor, tokens: Tensor | None) -> Tensor:
    """Places of rows in the same order, the first of each token before all others.

    Args:
        order: places `[n]`. tokens: of all rows; None: not known, and each row stands for itself.
    """
    if tokens is None:
        return order
    _, at = np.unique(tokens[order].numpy(), return_index=True)
    first = torch.zeros(len(order), dtype=torch.bool)
    first[torch.from_numpy(at)] = True
    return torch.cat([order[first], order[~first]])


# ---------------------------------------------------------------------------------------------------------------------
# Dictionaries of prototypes, and how they code


def dictionaries(store: ActivationStore, width: int) -> dict[str, list[Tensor]]:
    """Kind -> DRAWS dictionaries `[up to width, d_in]`, of rows less the mean of all, from two thirds of the documents.

    Token means are missing where tokens are not known, or none stands there LEAST times.
    """
    mean = store.stats()[0].float()
    x, tokens = sample(store, False, width)
    x = x - mean
    streams = {
        kind: [generator(store.digest, kind, i) for i in range(DRAWS)] for kind in ("rows", "means", "centroids")
    }
    made = {"rows": [x[distinct(torch.randperm(len(x), generator=g), tokens)[:width]] for g in streams["rows"]]}
    made["centroids"] = [clusters(x, width, int(torch.randint(2**31, (), generator=g))) for g in streams["centroids"]]
    if store.labelled and len(means := token_means(store, False)[1] - mean):
        made["token means"] = [means[torch.randperm(len(means), generator=g)[:width]] for g in streams["means"]]
    return made


@dataclass(frozen=True)
class TopKLeastSquares:
    """A code without an encoder: each row by the k directions with the largest cosine, with least squares."""

    directions: Tensor  # [n, d_in], unit rows
    mean: Tensor  # [d_in]
    k: int

    @classmethod
    def of(cls, W_dec: Tensor, mean: Tensor, k: int) -> TopKLeastSquares:
        return cls(unit_rows(W_dec), mean, min(k, len(W_dec)))

    @property
    def d_sae(self) -> int:
        return len(self.directions)

    def to(self, device: torch.device | str) -> TopKLeastSquares:
        return replace(self, directions=self.directions.to(device), mean=self.mean.to(device))

    def encode(self, x: Tensor) -> Tensor:
        """`x [rows, d_in]` -> coefficients `[rows, n]`, k of them not zero; of either sign."""
        ridge = RIDGE * torch.eye(self.k, device=x.device)
        features = torch.zeros(len(x), self.d_sae, device=x.device)
        size = max(1, PRODUCTS // (self.k * x.shape[1]))
        for part, into in zip((x - self.mean).split(size), features.split(size), strict=True):
            projected = part @ self.directions.T
            top, chosen = projected.topk(self.k, dim=1)
            A = self.directions[chosen]  # [rows, k, d_in]
            weights = torch.linalg.solve(A @ A.transpose(1, 2) + ridge, top.unsqueeze(2))
            into.scatter_(1, chosen, weights.squeeze(2))
        return features

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        return features @ self.directions + self.mean


def explained_variance(
    made: dict[str, list[Tensor]], mean: Tensor, k: int, store: ActivationStore, rows: range
) -> dict[str, float]:
    """Kind of prototypes -> explained variance of the rows of a store, the mean over its dictionaries.

    Args:
        made: of `dictionaries`. mean: of the activations that they were made of.
    """

    def one(W: Tensor) -> float:
        return evaluate(TopKLeastSquares.of(W, mean, k), store, rows)[0].explained_variance

    return {kind: float(np.mean([one(W) for W in of_kind])) for kind, of_kind in made.items()}
