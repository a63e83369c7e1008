"""Tests for each feature of one SAE whether it recurs in other trainings, the SAE's siblings.

    import husai
    comparison = husai.compare([a, b, c])      # decoders, arrays [d_sae, d_in]
    print(comparison.scores["mcc"], comparison.recurrence[0])

A *sibling* differs from the SAE in its seed alone. A feature *recurs* in a sibling if its one-to-one partner (signed,
`matching.py`) has a decoder cosine of at least 0.7. If activations are available, the two must also correlate on
held-out rows. *Recurrence* is k of n siblings, with a one-sided Clopper–Pearson bound.

*Above chance*: the statistic is the mean over siblings of the *mutual* similarity. It is the cosine with the nearest
feature of the sibling, or 0 if another feature of the SAE is nearer to that feature. Two tests read it. The first
rotates all siblings by the same draw of the spectral null (`nulls.py`): under the null a feature is exchangeable with
its rotations. The second permutes the labels of siblings and SAEs of Gaussian rows. The larger p-value counts.

Thresholds are in `evidence/rules.py`. Nothing here loads a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from husai.evidence import rules
from husai.evidence.estimates import Estimate, benjamini_hochberg, clopper_pearson_low, jackknife
from husai.evidence.features import COLUMNS
from husai.runs.errors import BadInput
from husai.runs.seeds import generator
from husai.stability import nulls, prototypes
from husai.stability.independence import refuse_copies
from husai.stability.matching import match, unit_rows
from husai.stability.nulls import Spectrum
from husai.stability.scores import MATCHED, pwmcc
from husai.training.trainer import TrainingConfig

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 1024
"""Number of the SAE's rows whose cosines with a whole sibling are in memory at a time."""
DRAWS = 20_000
"""Number of relabellings that are drawn if there are more."""
DRAWS_AT_ONCE = 256
ROUNDING = 1e-6
"""Sums of cosines that differ by less count as equal."""
NONE = -1
"""Feature number that means: no partner."""
FEWEST_ROTATIONS, POOL = 20, 2_000
"""Fewest rotations, and fewest null values of a stratum."""
WIDE = 4096
"""Width from which rotations use bfloat16 products by default, if the device multiplies bfloat16 faster."""
STRATA, STRATUM = 16, 64
"""Largest number of strata, and fewest features of a stratum."""
BFLOAT16 = 2.0**-8
"""Twice the largest relative rounding error of a bfloat16 number."""


# ---------------------------------------------------------------------------------------------------------------------
# Partners


@dataclass(frozen=True)
class Partners:
    """The one-to-one partners of an SAE's features in each sibling."""

    features: np.ndarray  # int [siblings, d_sae]; NONE if a smaller sibling leaves no partner
    cosines: np.ndarray  # float64 [siblings, d_sae], decoder cosines with partners; negative ones count 0

    @property
    def best(self) -> np.ndarray:
        """Sibling with the most similar partner of each feature, int `[d_sae]`."""
        return self.cosines.argmax(0)


def partners(W_dec: Tensor, siblings: Sequence[Tensor]) -> Partners:
    """Match `W_dec [d_sae, d_in]` with each sibling `[m, d_in]` by signed cosine."""
    features = np.full((len(siblings), len(W_dec)), NONE, np.int64)
    cosines = np.zeros((len(siblings), len(W_dec)))
    for i, sibling in enumerate(siblings):
        matching = match(W_dec, sibling, signed=True)
        features[i, matching.rows], cosines[i, matching.rows] = matching.columns, matching.cosines
    return Partners(features, cosines)


# ---------------------------------------------------------------------------------------------------------------------
# Above chance


@dataclass(frozen=True)
class Neighbours:
    """Nearest features of an SAE and its siblings by signed cosine; float32 `[siblings, d_sae]`, on the CPU."""

    largest: Tensor  # largest cosine with a feature of the sibling
    mutual: Tensor  # the same if no other feature of the SAE is nearer to that feature, else 0


@torch.no_grad()
def neighbours(
    W_dec: Tensor, siblings: Sequence[Tensor], bfloat16: bool = False, device: torch.device | str = "cpu"
) -> Neighbours:
    """Nearest features of `W_dec [d_sae, d_in]` in each sibling `[m, d_in]`, one-sided and mutual.

    Memory: the rounded dictionaries, and a few matrices of BLOCK × m cosines.

    Args:
        bfloat16: multiply rounded rows, which is at least twice as fast. Both figures are then upper bounds.
    """
    sibling_rows = [rounded(s, bfloat16, device) for s in siblings]
    return _neighbours(rounded(W_dec, bfloat16, device), sibling_rows)


def rounded(W_dec: Tensor, bfloat16: bool, device: torch.device | str) -> Tensor:
    """Unit rows on a device, in float32 or bfloat16."""
    return unit_rows(W_dec.float()).to(device, torch.bfloat16 if bfloat16 else torch.float32)


def _neighbours(a: Tensor, siblings: Sequence[Tensor]) -> Neighbours:
    """`neighbours` of rounded unit rows.

    Each sibling takes two products. The first gives the largest cosine of every row on both sides. The second finds
    cosines that reach both maxima up to twice the error ε of a cosine. Pairs that are mutual without rounding are
    mutual here.
    """
    error = ROUNDING
    if a.dtype == torch.bfloat16:
        # Each rounded unit row is off by at most 2⁻⁹ of its norm, the stored product by 2⁻⁹ of itself.
        error = BFLOAT16 * 1.5 + 2 * BFLOAT16**2 + a.shape[1] * 2.0**-24
    largest_of_siblings, mutual = [], []
    for b in siblings:
        most, bar = [], torch.full((len(b),), -torch.inf, dtype=a.dtype, device=a.device)
        for part in a.split(BLOCK):
            cosines = part @ b.T
            most.append(cosines.amax(1))
            bar = torch.maximum(bar, cosines.amax(0))
        near = bar - 2 * error
        is_mutual = [
            (((c := part @ b.T) >= near) & (c >= row_maxima[:, None] - 2 * error)).any(1)
            for part, row_maxima in zip(a.split(BLOCK), most, strict=True)
        ]
        largest = torch.cat(most).float() + (error if a.dtype == torch.bfloat16 else 0)
        largest_of_siblings.append(largest.cpu())
        mutual.append(torch.where(torch.cat(is_mutual), largest.clamp_min(0), 0.0).cpu())
    return Neighbours(torch.stack(largest_of_siblings), torch.stack(mutual))


def rotations_for(d_sae: int) -> int:
    """Default number of rotations."""
    return max(FEWEST_ROTATIONS, int(np.ceil(POOL / min(d_sae, STRATUM))))


@torch.no_grad()
def rotated(
    W_dec: Tensor,
    siblings: Sequence[Tensor],
    spectrum: Spectrum,
    rotations: int,
    stream: Sequence[int | str] = (),
    bfloat16: bool = False,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """`neighbours` under rotations by the spectral null, averaged over siblings: `[rotations, d_sae]`.

    All siblings share a rotation. The code rotates the features instead, because the inverse rotation has the same
    distribution.

    Args:
        spectrum: spectrum of the activations, with the mean direction separated.
        stream: names the draws.
    """
    sibling_rows, neighbours_of_draws = [rounded(s, bfloat16, device) for s in siblings], []
    for r in range(rotations):
        drawn = nulls.spectral(W_dec, W_dec.float(), spectrum, generator("recurrence", *stream, r))[1]
        neighbours_of_draws.append(_neighbours(rounded(drawn, bfloat16, device), sibling_rows))
    return Neighbours(
        torch.stack([f.largest.mean(0) for f in neighbours_of_draws]),
        torch.stack([f.mutual.mean(0) for f in neighbours_of_draws]),
    )


def strata_of(level: np.ndarray) -> np.ndarray:
    """Stratum of each feature, int `[d_sae]`. Features of one stratum have similar levels.

    There are at most STRATA strata, of at least STRATUM features each if the SAE has so many.
    """
    count = int(np.clip(len(level) // STRATUM, 1, STRATA))
    strata = np.empty(len(level), np.int64)
    strata[np.argsort(level, kind="stable")] = np.arange(len(level)) * count // len(level)
    return strata


def rotation_p_values(mutual: Tensor, turned: Neighbours) -> np.ndarray:
    """p-value of each feature, `[d_sae]`: its rank among all rotations of the features of its stratum.

    A direction that the spectral null draws is exchangeable with its own rotations. Features of one stratum are about
    equally near to rotated siblings. The observed value counts as one of the draws (Phipson & Smyth 2010).

    Args:
        mutual: mutual similarity, averaged over siblings, `[d_sae]`. turned: result of `rotated`.
    """
    strata, p = strata_of(turned.largest.double().mean(0).numpy()), np.empty(len(mutual))
    for s in range(strata.max() + 1):
        members = np.flatnonzero(strata == s)
        pool = np.sort(turned.mutual[:, members].double().numpy(), axis=None)
        below = np.searchsorted(pool, mutual[members].double().numpy() - ROUNDING)
        p[members] = (1 + len(pool) - below) / (1 + len(pool))
    return p


def permutation_p_values(siblings: Tensor, gaussian: Tensor, draws: int = DRAWS) -> np.ndarray:
    """One-sided permutation p-value of each feature: siblings against SAEs of Gaussian rows, `[d_sae]`.

    Each relabelling calls n of the n + m SAEs siblings. All relabellings are enumerated if there are at most `draws`;
    else `draws` are sampled. The smallest p-value for n siblings and n Gaussian SAEs is 1/C(2n, n).

    Args:
        siblings: mutual similarities `[n, d_sae]`. gaussian: the same for Gaussian SAEs, `[m, d_sae]`.
    """
    values = torch.cat([siblings, gaussian]).double()
    n, total_saes = len(siblings), len(values)
    total = values[:n].sum(0) - ROUNDING
    exact = comb(total_saes, n) <= draws
    if exact:
        labels = torch.zeros(comb(total_saes, n), total_saes, dtype=torch.float64)
        labels.scatter_(1, torch.tensor([*combinations(range(total_saes), n)]), 1.0)
    else:
        order = torch.rand(draws, total_saes, generator=generator("recurrence", "labels")).argsort(1)[:, :n]
        labels = torch.zeros(draws, total_saes, dtype=torch.float64).scatter_(1, order, 1.0)
    reached = torch.zeros(values.shape[1], dtype=torch.int64)
    for part in labels.split(DRAWS_AT_ONCE):
        reached += (part @ values >= total).sum(0)
    return (reached.double() / len(labels) if exact else (1 + reached.double()) / (1 + draws)).numpy()


@dataclass(frozen=True)
class Chance:
    """Similarity of each feature, observed and by chance, with p-values; `[d_sae]` each."""

    similarity: np.ndarray  # largest signed cosine, averaged over siblings
    mutual: np.ndarray  # mutual similarity, averaged over siblings; the tests read it
    rotated: np.ndarray  # `similarity` of rotated siblings, averaged over rotations
    gaussian: np.ndarray | None  # `similarity` of SAEs of Gaussian rows
    p_rotation: np.ndarray
    p_permutation: np.ndarray | None
    rotations: int

    @property
    def p_value(self) -> np.ndarray:
        """The larger of the two p-values."""
        return self.p_rotation if self.p_permutation is None else np.maximum(self.p_rotation, self.p_permutation)

    def q_values(self, tested: np.ndarray, prototype: np.ndarray | None = None) -> np.ndarray:
        """Benjamini–Hochberg q-values over the tested features; 1 for the others.

        Args:
            tested: mask of the tested features, bool `[d_sae]`.
            prototype: mask of prototype-like features, bool `[d_sae]`. They are corrected separately, because many
                small p-values of one kind would let false positives of the other kind pass.
        """
        q = np.ones(len(self.p_value))
        for kind in [tested] if prototype is None else [tested & ~prototype, tested & prototype]:
            q[kind] = benjamini_hochberg(self.p_value[kind])
        return q


def chance(
    W_dec: Tensor,
    siblings: Sequence[Tensor],
    spectrum: Spectrum,
    gaussian: Sequence[Tensor] | None = None,
    rotations: int | None = None,
    draws: int = DRAWS,
    bfloat16: bool | None = None,
    stream: Sequence[int | str] = (),
    device: torch.device | str = "cpu",
) -> Chance:
    """Both tests of every feature against chance.

    Args:
        W_dec: `[d_sae, d_in]`. siblings, gaussian: decoders `[m, d_in]` of siblings, and of SAEs of Gaussian rows.
        rotations: number of rotations. None: `rotations_for`.
        bfloat16: see `neighbours`. It applies to rotations alone, whose cosines it can only raise. None: from WIDE
            features on, if the device multiplies bfloat16 faster.
    """
    rotations = rotations or rotations_for(len(W_dec))
    if bfloat16 is None:
        bfloat16 = len(W_dec) >= WIDE and TrainingConfig().proposes(torch.device(device), W_dec.shape[1])
    observed = neighbours(W_dec, siblings, device=device)
    turned = rotated(W_dec, siblings, spectrum, rotations, stream, bfloat16, device)
    noise = neighbours(W_dec, gaussian, device=device) if gaussian else None
    mutual = observed.mutual.mean(0)
    return Chance(
        similarity=observed.largest.mean(0).double().numpy(),
        mutual=mutual.double().numpy(),
        rotated=turned.largest.double().mean(0).numpy(),
        gaussian=None if noise is None else noise.largest.mean(0).double().numpy(),
        p_rotation=rotation_p_values(mutual, turned),
        p_permutation=None if noise is None else permutation_p_values(observed.mutual, noise.mutual, draws),
        rotations=rotations,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Split or merged


@torch.no_grad()
def rebuilt(W_dec: Tensor, sibling: Tensor, most: int = rules.REBUILT_BY) -> tuple[Tensor, Tensor]:
    """(cosine of each row of `W_dec [n, d_in]` with a non-negative sum of up to `most` rows of `sibling [m, d_in]`,
    `[n]`; numbers of these rows, int `[n, most]`, filled up with NONE).

    Rows are chosen greedily: each has the largest cosine with the residual (orthogonal matching pursuit). Coefficients
    come from non-negative least squares. A better choice of rows may exist.
    """
    a, b = unit_rows(W_dec.float()), unit_rows(sibling.float())
    most = min(most, len(b))
    subsets = [s for size in range(1, most + 1) for s in combinations(range(most), size)]
    cosines, features = [], []
    for part in a.split(BLOCK):
        residual, chosen = part, torch.full((len(part), most), NONE)
        best = torch.zeros(len(part))
        weights = torch.zeros(len(part), most)
        for step in range(most):
            scores = residual @ b.T
            if step:
                scores.scatter_(1, chosen[:, :step], -torch.inf)
            chosen[:, step] = scores.argmax(1)
            atoms = b[chosen[:, : step + 1]].double()  # [n, step + 1, d_in]
            gram, to = atoms @ atoms.transpose(1, 2), (atoms @ part.double()[:, :, None])[:, :, 0]
            for subset in (s for s in subsets if max(s) == step):
                columns = torch.tensor(subset)
                # lstsq in place of solve: two equal rows make the matrix singular.
                solved = torch.linalg.lstsq(gram[:, columns[:, None], columns], to[:, columns, None]).solution[:, :, 0]
                squares = (solved * to[:, columns]).sum(1)
                better = (solved >= 0).all(1) & (squares.clamp_min(0).sqrt() > best + ROUNDING)
                best = torch.where(better, squares.clamp_min(0).sqrt().float(), best)
                filled = torch.zeros(len(part), most).index_copy_(1, columns, solved.float())
                weights = torch.where(better[:, None], filled, weights)
            residual = part - (weights[:, : step + 1, None] * atoms.float()).sum(1)
        cosines.append(best.clamp_max(1))
        features.append(torch.where(weights > 0, chosen, NONE))
    return torch.cat(cosines), torch.cat(features)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders alone


@dataclass(frozen=True)
class DecoderComparison:
    """Comparison of decoders without activations."""

    labels: list[str]
    scores: dict[str, Estimate]
    """mcc, pwmcc and share70 over all pairs, with delete-one jackknife intervals."""
    isotropic: dict[str, float]
    """Scores of Gaussian directions of the same shapes."""
    spectral: dict[str, float] | None
    """Scores of decoders rotated by the spectral null; None without a covariance."""
    partners: list[Partners]
    """Partners of each decoder's features in all others."""
    chances: list[Chance] | None
    prototypes: list[np.ndarray] | None
    """Largest cosine of each decoder's features with a token mean `[d_sae]`; None without token means."""

    @cached_property
    def recurrence(self) -> list[np.ndarray]:
        """For each decoder: number of other decoders in which each feature recurs by cosine, int `[d_sae]`."""
        return [rules.recurs(p.cosines, None).sum(0) for p in self.partners]

    @property
    def bounds(self) -> list[np.ndarray]:
        """One-sided lower 95 % bounds of the probability that each feature recurs, `[d_sae]` each."""
        return [clopper_pearson_low(k, len(self.labels) - 1, rules.CERTIFIED_LEVEL) for k in self.recurrence]

    @property
    def q_values(self) -> list[np.ndarray] | None:
        """q-values against the spectral null, corrected within each decoder; None without a covariance."""
        return None if self.chances is None else [c.q_values(np.ones(len(c.p_value), bool)) for c in self.chances]

    def table(self, i: int = 0) -> pd.DataFrame:
        """Feature table of decoder i, one row for each feature.

        It has the columns of `evidence.features.COLUMNS` that need no activations.
        """
        import pandas as pd

        partners, chance = self.partners[i], None if self.chances is None else self.chances[i]
        bounds = self.bounds[i]
        columns = {
            "feature": np.arange(len(bounds)),
            "recurs": self.recurrence[i],
            "siblings": len(self.labels) - 1,
            "low": bounds,
            "certified": rules.certified(bounds),
            "partner_cosine": partners.cosines.mean(0),
        }
        if chance is not None and self.q_values is not None:
            q = self.q_values[i]
            columns |= {"above_chance": rules.above_chance(q), "q_value": q, "p_rotation": chance.p_rotation}
            columns |= {"similarity": chance.similarity, "similarity_rotated": chance.rotated}
        if self.prototypes is not None:
            columns |= {"prototype_cosine": self.prototypes[i]}
        dtypes = {name: column.dtype for name, column in COLUMNS.items() if name in columns}
        return pd.DataFrame(columns)[[*dtypes]].astype(dtypes)


def compare(
    decoders: Sequence[Any],
    covariance: Any = None,
    mean: Any = None,
    rows: int = 100_000,
    token_means: Any = None,
    labels: Sequence[str] | None = None,
    rotations: int | None = None,
    draws: int = 5,
) -> DecoderComparison:
    """Compare decoders without a model: scores of all pairs, and the recurrence of each feature.

    >>> import husai, numpy as np
    >>> shared = np.random.default_rng(0).normal(size=(40, 64))     # features that all three have
    >>> a, b, c = (np.vstack([shared, np.random.default_rng(seed).normal(size=(10, 64))]) for seed in (1, 2, 3))
    >>> comparison = husai.compare([a, b, c])
    >>> [round(comparison.scores[name].estimate, 2) for name in ("mcc", "share70")]
    [0.83, 0.8]
    >>> round(comparison.isotropic["mcc"], 2)
    0.25
    >>> comparison.recurrence[0][:3], comparison.recurrence[0][-3:]  # the first decoder's features, in two others
    (array([2, 2, 2]), array([0, 0, 0]))
    >>> float(comparison.bounds[0][0].round(2))  # 2 of 2 is little evidence: the feature recurs in at least 22 %
    0.22

    Args:
        decoders: at least two arrays or tensors `[d_sae, d_in]`, one row for each feature. Widths may differ.
        covariance: covariance `[d_in, d_in]` of the activations. It enables the spectral null and a test of each
            feature.
        mean: mean `[d_in]` of the activations. The spectral null leaves its direction unchanged.
        rows: number of rows that the covariance was estimated from.
        token_means: mean activations of tokens, `[n, d_in]`. Each counts as it is, and less `mean`.
        labels: names of the decoders.
        rotations: number of rotations for the test of each feature. None: by the number of features.
        draws: number of draws of each null of the scores, for each pair.

    Raises:
        BadInput: there are fewer than two decoders, values are not finite, shapes differ, or a decoder occurs twice.
    """
    names = list(labels) if labels is not None else [f"decoder {i}" for i in range(len(decoders))]
    W = [as_decoder(d, name) for d, name in zip(decoders, names, strict=True)]
    refuse_unlike(names, W)
    pairs = list(combinations(range(len(W)), 2))
    spectrum, near = None, None
    if covariance is not None:
        spectrum = spectrum_of(covariance, mean, rows, W[0].shape[1])
    if token_means is not None:
        directions = directions_of(token_means, mean)
        near = [prototypes.nearest(w, directions).double().numpy() for w in W]

    matrices = {name: np.zeros((len(W), len(W))) for name in ("mcc", "pwmcc", "share70")}
    all_partners = [Partners(np.full((len(W) - 1, len(w)), NONE), np.zeros((len(W) - 1, len(w)))) for w in W]
    for i, j in pairs:
        matching = match(W[i], W[j], signed=True)
        values = _scores(matching.cosines, W[i], W[j])
        for name, value in values.items():
            matrices[name][i, j] = matrices[name][j, i] = value
        all_partners[i].features[j - 1, matching.rows], all_partners[i].cosines[j - 1, matching.rows] = (
            matching.columns,
            matching.cosines,
        )
        all_partners[j].features[i, matching.columns], all_partners[j].cosines[i, matching.columns] = (
            matching.rows,
            matching.cosines,
        )
    return DecoderComparison(
        labels=names,
        scores={name: jackknife(matrix) for name, matrix in matrices.items()},
        isotropic=_null_scores(W, pairs, draws, "isotropic", nulls.isotropic),
        spectral=None
        if spectrum is None
        else _null_scores(W, pairs, draws, "spectral", lambda a, b, g: nulls.spectral(a, b, spectrum, g)),
        partners=all_partners,
        chances=None
        if spectrum is None
        else [
            chance(w, [v for v in W if v is not w], spectrum, rotations=rotations, stream=("compare", i))
            for i, w in enumerate(W)
        ],
        prototypes=near,
    )


def _scores(cosines: np.ndarray, a: Tensor, b: Tensor) -> dict[str, float]:
    return {"mcc": cosines.mean(), "pwmcc": pwmcc(a, b), "share70": (cosines >= MATCHED).mean()}


def _null_scores(W: Sequence[Tensor], pairs: list[tuple[int, int]], draws: int, name: str, draw) -> dict[str, float]:
    """Mean scores of null pairs. Pairs of equal shapes share isotropic draws, which depend on shapes alone."""
    scores_of_pairs: list[dict[str, float]] = []
    shapes = {}
    for i, j in pairs:
        key = (W[i].shape, W[j].shape) if name == "isotropic" else (i, j)
        if key not in shapes:
            drawn = []
            for r in range(draws):
                a, b = draw(W[i], W[j], g=generator("compare", name, i, j, r))
                drawn.append(_scores(match(a, b, signed=True).cosines, a, b))
            shapes[key] = {score: float(np.mean([d[score] for d in drawn])) for score in drawn[0]}
        scores_of_pairs.append(shapes[key])
    return {score: float(np.mean([f[score] for f in scores_of_pairs])) for score in scores_of_pairs[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Input


def as_decoder(value: Any, name: str) -> Tensor:
    """A decoder as a float32 tensor `[d_sae, d_in]`.

    Raises:
        BadInput: the value is no matrix, or holds a number that is not finite.
    """
    W = torch.as_tensor(value).detach().cpu()
    if W.ndim != 2 or 0 in W.shape:
        raise BadInput(f"{name}: shape {tuple(W.shape)}; a matrix [features, d_in] expected")
    W = W.float()
    if not W.isfinite().all():
        raise BadInput(f"{name}: holds a NaN or infinite value; finite numbers expected")
    if not W.any(1).any():
        raise BadInput(f"{name}: all its rows are zero; feature directions expected")
    return W


def refuse_unlike(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput for fewer than two decoders, different d_in, or equal decoders."""
    if len(decoders) < 2:
        raise BadInput(f"{len(decoders)} decoder given; at least two are compared")
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape[1] != b.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.shape[1]} and {b.shape[1]}; one d_in expected")
    refuse_copies(labels, decoders)


def spectrum_of(covariance: Any, mean: Any, rows: int, d_in: int) -> Spectrum:
    """Spectrum of a covariance `[d_in, d_in]`, with the direction of the mean `[d_in]` separated.

    Raises:
        BadInput: a shape differs from the decoders', or the covariance is not finite or not symmetric.
    """
    C = torch.as_tensor(covariance).double()
    if C.shape != (d_in, d_in):
        raise BadInput(f"covariance: shape {tuple(C.shape)}; {(d_in, d_in)} expected, as the decoders have")
    if not C.isfinite().all() or not torch.allclose(C, C.T, rtol=1e-4, atol=1e-6 * float(C.abs().max())):
        raise BadInput("covariance: not finite, or not symmetric")
    m = None if mean is None else torch.as_tensor(mean).double()
    if m is not None and m.shape != (d_in,):
        raise BadInput(f"mean: shape {tuple(m.shape)}; {(d_in,)} expected")
    return Spectrum.of((C + C.T) / 2, rows, m)


def directions_of(token_means: Any, mean: Any) -> Tensor:
    """Unit directions of token means `[n, d_in]`: as they are and, if `mean` is given, less the mean of all rows."""
    P = torch.as_tensor(token_means).float()
    return unit_rows(P if mean is None else torch.cat([P, P - torch.as_tensor(mean).float()]))
