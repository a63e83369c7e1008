"""Prototypes: directions that follow from the activations without training, namely rows, token means and centroids.

Every seed reproduces prototypes. Therefore a score of stability cannot distinguish them from features. Prototypes are
used in two ways. Features near a prototype are labelled (`of_store`, `nearest`), and an SAE must code better than a
dictionary of prototypes (`dictionaries`, `TopKLeastSquares`). Stores are read in blocks, therefore memory does not grow
with the number of rows.
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
"""Fewest occurrences of a token that has a mean."""
BLOCK = 16_384
"""Number of rows, or of prototypes, in memory at a time."""
SAMPLE, SAMPLE_A_CENTROID = 32_768, 4
"""Rows for k-means and for random rows: the larger of a total number and a number for each direction."""
DRAWS = 3
"""Number of dictionaries of each kind of prototypes. Their figures are averaged."""
RIDGE = 1e-4
PRODUCTS = 2**24
"""Largest size of the tensor of chosen directions in memory at a time."""


# ---------------------------------------------------------------------------------------------------------------------
# Prototype-like features


def of_store(store: ActivationStore, artifact_root: Path, width: int) -> Tensor:
    """Prototypes of one third of a store's documents, unit rows `[n, d_in]`. They are made once and kept.

    Args:
        artifact_root: holds the prototypes, in controls/, which all phases share.
        width: number of features of the SAEs. There are as many centroids.
    """
    root = artifact_root / "controls"
    key = {"store": store.digest, "width": width, "code": code_version(of_store)}
    file = root / "prototypes" / f"{digest(key)[:16]}.safetensors"

    def compute() -> tuple[int, list[Path]]:
        rows = prototypes(store, width)
        write_bytes(file, to_bytes({"prototypes": rows.contiguous()}))
        return len(rows), [file]

    Cells(root / "cells").get("prototypes", key, compute)
    return load_file(file)["prototypes"]


def prototypes(store: ActivationStore, width: int) -> Tensor:
    """Unit rows `[n, d_in]`: centroids of one third of the documents, and means of tokens that occur LEAST times there.

    Each prototype counts twice: as it is, and less the mean of all rows. Stores without token labels have centroids
    alone.
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
    """Signed cosine of each direction with its nearest prototype, `[d_sae]`."""
    U = unit_rows(W_dec.to(prototypes))
    return torch.stack([(U @ part.T).amax(1) for part in prototypes.split(BLOCK)]).amax(0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a store


def blocks(store: ActivationStore, third: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Blocks of training rows: (rows `[n, d_in]`, their tokens `[n]`, or None if unknown).

    Args:
        third: read every third document; False: read the others. Stores without documents are divided by rows.
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
    """(the first rows, their tokens). The rows are a random sample, because a store's rows are in random order.

    Raises:
        BadInput: the store has no such rows.
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
    """(tokens that occur LEAST times, the most frequent first; the mean row of each token `[n, d_in]`).

    Memory: one row for each of these tokens.
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
    """Tokens that occur at least `least` times, the most frequent first.

    Args:
        counts: occurrences of each token `[vocabulary]`.
    """
    order = counts.argsort(descending=True, stable=True)
    return order[counts[order] >= max(1, least)]


# ---------------------------------------------------------------------------------------------------------------------
# Making of prototypes


def clusters(x: Tensor, n: int, seed: int) -> Tensor:
    """Centroids of k-means, `[n, d_in]`; fewer than n if there are fewer rows."""
    from sklearn.cluster import MiniBatchKMeans

    fitted = MiniBatchKMeans(min(n, len(x)), random_state=seed, n_init=1, batch_size=1024, max_iter=5).fit(x.numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def distinct(order: Tensor, tokens: Tensor | None) -> Tensor:
    """The same places of rows, reordered: the first place of each token comes before all other places.

    Args:
        order: places `[n]`. tokens: tokens of all rows. None: unknown, and the order is unchanged.
    """
    if tokens is None:
        return order
    _, at = np.unique(tokens[order].numpy(), return_index=True)
    first = torch.zeros(len(order), dtype=torch.bool)
    first[torch.from_numpy(at)] = True
    return torch.cat([order[first], order[~first]])


# ---------------------------------------------------------------------------------------------------------------------
# Dictionaries of prototypes as codes


def dictionaries(store: ActivationStore, width: int) -> dict[str, list[Tensor]]:
    """Kind -> DRAWS dictionaries `[up to width, d_in]` of centred prototypes, from two thirds of the documents.

    Token means are missing if tokens are unknown, or if no token occurs LEAST times.
    """
    mean = store.stats()[0].float()
    x, tokens = sample(store, False, width)
    x = x - mean
    streams = {
        kind: [generator(store.digest, kind, i) for i in range(DRAWS)] for kind in ("rows", "means", "centroids")
    }
    by_kind = {"rows": [x[distinct(torch.randperm(len(x), generator=g), tokens)[:width]] for g in streams["rows"]]}
    by_kind["centroids"] = [
        clusters(x, width, int(torch.randint(2**31, (), generator=g))) for g in streams["centroids"]
    ]
    if store.labelled and len(means := token_means(store, False)[1] - mean):
        by_kind["token means"] = [means[torch.randperm(len(means), generator=g)[:width]] for g in streams["means"]]
    return by_kind


@dataclass(frozen=True)
class TopKLeastSquares:
    """A code without an encoder: least squares on the k directions with the largest cosine with the row."""

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
        """`x [rows, d_in]` -> coefficients `[rows, n]`, of either sign, k of them non-zero."""
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
    by_kind: dict[str, list[Tensor]], mean: Tensor, k: int, store: ActivationStore, rows: range
) -> dict[str, float]:
    """Kind of prototypes -> explained variance of a store's rows, averaged over the kind's dictionaries.

    Args:
        by_kind: result of `dictionaries`. mean: mean of the activations that the prototypes were made from.
    """

    def one(W: Tensor) -> float:
        return evaluate(TopKLeastSquares.of(W, mean, k), store, rows)[0].explained_variance

    return {kind: float(np.mean([one(W) for W in of_kind])) for kind, of_kind in by_kind.items()}
