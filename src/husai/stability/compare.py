"""Pairs of dictionaries against their nulls, and what may be said over all seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from husai.evidence.names import GAP, SCORES
from husai.runs.errors import BadInput
from husai.runs.seeds import generator
from husai.stability import nulls
from husai.stability.matching import match, unit_rows
from husai.stability.scores import max_cosines, score

SAME_DIRECTION = 1 - 1e-5  # of a |cos|, bfloat16 copies included
ONE_TRAINING = 0.5  # median |cos|; of random directions in 8 dimensions it is 0.25
FEW_DIMENSIONS = 8  # below, directions may coincide by chance
BINS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Dictionary:
    """What the comparison needs of one SAE."""

    W_dec: Tensor  # [d_sae, d_in]
    alive: Tensor  # bool [d_sae]
    untrained: Tensor | None = None  # [d_sae, d_in], the same initialisation

    def digest(self) -> str:
        """sha256 of all that a comparison reads of it."""
        sha = hashlib.sha256()
        for tensor in (self.W_dec, self.alive, self.untrained):
            sha.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return sha.hexdigest()


def refuse_shared(labels: Sequence[str], dictionaries: Sequence[Dictionary]) -> None:
    """Raise BadInput where two dictionaries share their decoder or their initialisation: that is not stability."""
    if len(dictionaries) < 2:
        raise BadInput(f"{len(dictionaries)} SAE given: stability needs at least 2, and 5 for a verdict")
    for (name_a, a), (name_b, b) in combinations(zip(labels, dictionaries, strict=True), 2):
        if a.W_dec.shape[1] != b.W_dec.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.W_dec.shape[1]} and {b.W_dec.shape[1]}: one expected")
        # Trained directions may come to agree; initial ones never do.
        parts = (("decoder", a.W_dec, b.W_dec, 0.99), ("initialisation", a.untrained, b.untrained, 0.5))
        for what, x, y, share in parts:
            if x is not None and y is not None and shared(x, y, share):
                raise BadInput(f"{name_a} and {name_b} share their {what}: independently trained SAEs expected")


def refuse_one_training(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput for two decoders `[d_sae, d_in]` of one training, at two of its steps: feature by feature they
    point the same way, which independent seeds do not, for nothing puts their features into one order."""
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape == b.shape and a.shape[1] >= FEW_DIMENSIONS:
            alike = (unit_rows(a.float()) * unit_rows(b.float())).sum(1).abs().median().item()
            if alike > ONE_TRAINING:
                raise BadInput(
                    f"{name_a} and {name_b} seem to be of one training: the median |cos| of features of one number is "
                    f"{alike:.2f}; the last checkpoint of each of several trainings expected"
                )


def shared(x: Tensor, y: Tensor, share: float) -> bool:
    """Whether at least this share of the smaller dictionary's directions stands in the other, in whatever order, sign
    and scale; rows of zeros do not count."""
    if x.shape == y.shape and torch.equal(x, y):
        return True
    x, y = (w[w.norm(dim=1) > 0].float() for w in (x, y))
    if x.shape[1] < FEW_DIMENSIONS or min(len(x), len(y)) == 0:
        return False
    same = max_cosines(x, y)[0 if len(x) <= len(y) else 1] > SAME_DIRECTION
    return bool(same.double().mean() >= share)


def pair(
    a: Dictionary,
    b: Dictionary,
    spectrum: nulls.Spectrum,
    draws: int,
    threads: int,
    scores: tuple[str, ...] = SCORES,
) -> dict:
    """Scores of one pair, observed and under the nulls; to be called inside `one_torch_thread`.

    Args:
        draws: of the spectral null; the two Gaussian nulls, whose means vary far less, get a fifth of it.
        scores: SCORES, or ALIVE alone, which is faster.

    Returns:
        {"observed" | null: {"mean": {score: value}, "draws": {score: [values]} or None, "histogram": counts of the
        matched |cos| of alive features in BINS}}; a null that cannot be computed is None.
    """

    contents = a.digest(), b.digest()  # seed the draws: where a checkpoint lies and what it is called change nothing

    def drawn(name: str, draw: Callable, n: int) -> dict:
        def one(i: int) -> tuple[dict[str, float], np.ndarray]:
            x, y = draw(a.W_dec, b.W_dec, g=generator("null", *contents, name, i))
            return score(x, y, a.alive, b.alive, scores), histogram(x, y, a, b) if i == 0 else np.zeros(0)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found, histograms = zip(*pool.map(one, range(n)), strict=True)
        values = {s: [x[s] for x in found] for s in scores}
        means = {s: float(np.mean(v)) for s, v in values.items()}
        means[GAP] = max(x[GAP] for x in found)
        return {"mean": means, "draws": values, "histogram": histograms[0].tolist()}

    def given(x: Tensor, y: Tensor) -> dict:
        return {
            "mean": score(x, y, a.alive, b.alive, scores),
            "draws": None,
            "histogram": histogram(x, y, a, b).tolist(),
        }

    few = max(1, draws // 5)
    return {
        "observed": given(a.W_dec, b.W_dec),
        "isotropic": drawn("isotropic", nulls.isotropic, few),
        "untrained": None if a.untrained is None or b.untrained is None else given(a.untrained, b.untrained),
        "spectral": drawn("spectral", partial(nulls.spectral, spectrum=spectrum), draws),
        "covariance_matched": drawn("covariance_matched", partial(nulls.covariance_matched, spectrum=spectrum), few),
    }


def histogram(x: Tensor, y: Tensor, a: Dictionary, b: Dictionary) -> np.ndarray:
    """Counts in BINS of the matched |cos| of the rows of `x` and `y` that are alive in `a` and `b`."""
    x, y = x[a.alive], y[b.alive]
    matched = match(x, y).cosines if len(x) and len(y) else np.zeros(0)
    return np.histogram(matched.clip(0, 1), BINS)[0]
