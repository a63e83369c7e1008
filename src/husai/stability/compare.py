"""Scores of one pair of dictionaries, observed and under the nulls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from husai.evidence.names import GAP, NEAR, SCORES, STRATA
from husai.runs.seeds import generator
from husai.stability import nulls
from husai.stability.matching import match
from husai.stability.scores import MATCHED, score

BINS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Dictionary:
    """The parts of an SAE that a comparison reads."""

    W_dec: Tensor  # [d_sae, d_in]
    firing_rate: Tensor  # [d_sae], share of held-out rows on which each feature fires
    untrained: Tensor | None = None  # [d_sae, d_in], the same initialisation
    nearest: Tensor | None = None  # [d_sae], signed cosine with the nearest prototype; None if unknown

    @cached_property
    def alive(self) -> Tensor:
        """Features that fire on held-out rows, bool `[d_sae]`."""
        return self.firing_rate > 0

    @cached_property
    def apart(self) -> Tensor | None:
        """Features that are like no prototype, bool `[d_sae]`."""
        return None if self.nearest is None else self.nearest < NEAR

    @cached_property
    def others(self) -> Tensor | None:
        """Alive features that are like no prototype, bool `[d_sae]`."""
        return None if self.apart is None else self.alive & self.apart

    def digest(self) -> str:
        """sha256 of everything that scores read: directions and masks. It seeds the draws of the nulls."""
        return _sha256(self.W_dec, self.alive, self.untrained, self.apart)

    def content(self) -> str:
        """sha256 of everything that a comparison reads, including strata."""
        return _sha256(self.W_dec, self.firing_rate, self.untrained, self.nearest)


def _sha256(*tensors: Tensor | None) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def pair(
    a: Dictionary,
    b: Dictionary,
    spectrum: nulls.Spectrum,
    draws: int,
    threads: int,
    scores: tuple[str, ...] = SCORES,
) -> dict:
    """Scores of one pair, observed and under the nulls. Call it inside `one_torch_thread`.

    Args:
        spectrum: spectrum of the activations, with the mean direction separated.
        draws: number of draws of the spectral null. The isotropic null varies far less and gets a fifth of them.
        scores: one of SCORED. Prototypes are needed for OTHERS alone.

    Returns:
        {"observed" | null: {"mean": {score: value}, "draws": {score: [values]} or None, "histogram": counts of the
        matched cosines of alive features in BINS}}. `untrained` is present if both untrained states are known.
    """

    contents = a.digest(), b.digest()  # seeds of the draws, independent of names and places of checkpoints

    def drawn(name: str, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], n: int) -> dict:
        def one(i: int) -> tuple[dict[str, float], np.ndarray]:
            x, y = draw(generator("null", *contents, name, i))
            return scores_of(x, y, a, b, scores), histogram(x, y, a, b) if i == 0 else np.zeros(0)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            scores_of_draws, histograms = zip(*pool.map(one, range(n)), strict=True)
        values = {s: [x[s] for x in scores_of_draws] for s in scores}
        means = {s: float(np.mean(v)) for s, v in values.items()}
        means[GAP] = max(x[GAP] for x in scores_of_draws)
        return {"mean": means, "draws": values, "histogram": histograms[0].tolist()}

    before = {}
    if a.untrained is not None and b.untrained is not None:
        before["untrained"] = given(replace(a, W_dec=a.untrained), replace(b, W_dec=b.untrained), scores)
    x, y = (d.W_dec @ spectrum.components for d in (a, b))  # in these coordinates all cosines are the same
    return {
        "observed": given(a, b, scores),
        "isotropic": drawn("isotropic", partial(nulls.isotropic, x, y), max(1, draws // 5)),
        "spectral": drawn("spectral", lambda g: (x, spectrum.turned(y, g)), draws),
    } | before


def given(a: Dictionary, b: Dictionary, scores: tuple[str, ...]) -> dict:
    """Observed scores of two dictionaries, in the form of `pair`'s entries, with `strata`."""
    means = scores_of(a.W_dec, b.W_dec, a, b, scores)
    counts = histogram(a.W_dec, b.W_dec, a, b).tolist()
    return {"mean": means, "draws": None, "histogram": counts, "strata": strata(a, b)}


def strata(a: Dictionary, b: Dictionary) -> dict[str, list[list[float]]]:
    """Matched alive features by stratum.

    Returns:
        Figure of STRATA -> for each stratum: number of features of both sides, sum of their matched signed cosines,
        number of features matched at MATCHED or more.
    """
    places = [torch.nonzero(d.alive).squeeze(1) for d in (a, b)]
    if not all(map(len, places)):
        return {}
    matching = match(a.W_dec[places[0]], b.W_dec[places[1]], signed=True)
    cosines = np.concatenate([matching.cosines, matching.cosines])
    sides = ((a, places[0][matching.rows]), (b, places[1][matching.columns]))
    counted = {}
    for figure, edges in STRATA.items():
        values = [getattr(d, figure) for d, _ in sides]
        if any(v is None for v in values):
            continue
        of_both = torch.cat([v[at].double() for v, (_, at) in zip(values, sides, strict=True)])
        stratum = np.digitize(of_both.numpy(), edges[1:-1])
        weights = (None, cosines, (cosines >= MATCHED).astype(float))
        columns = [np.bincount(stratum, w, minlength=len(edges) - 1) for w in weights]
        counted[figure] = np.stack(columns, 1).tolist()
    return counted


def added(strata: Sequence[dict]) -> dict[str, list[list[float]]]:
    """Sum of the strata of several pairs. Figures that a pair lacks are left out."""
    shared = set(STRATA).intersection(*strata) if strata else ()
    return {f: np.sum([pair[f] for pair in strata], axis=0).tolist() for f in STRATA if f in shared}


def scores_of(x: Tensor, y: Tensor, a: Dictionary, b: Dictionary, scores: tuple[str, ...]) -> dict[str, float]:
    """Scores of directions `x` and `y`, with the masks of `a` and `b`."""
    return score(x, y, a.alive, b.alive, scores, a.others, b.others)


def histogram(x: Tensor, y: Tensor, a: Dictionary, b: Dictionary) -> np.ndarray:
    """Histogram over BINS of the matched cosines of `x` and `y`, for features that are alive in `a` and `b`."""
    x, y = x[a.alive], y[b.alive]
    matched = match(x, y, signed=True).cosines if len(x) and len(y) else np.zeros(0)
    return np.histogram(matched.clip(0, 1), BINS)[0]
