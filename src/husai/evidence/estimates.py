"""Inference over seeds. The unit is the seed: S seeds give S(S−1)/2 pairs, which are not independent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb

import numpy as np
from scipy import special

MOST_RELABELLINGS = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval (95 % unless `method` states another level), its standard error, and n."""

    estimate: float
    low: float | None
    high: float | None
    standard_error: float | None
    n_seeds: int
    method: str
    reason: str | None = None
    """Reason why there is no interval."""
    freedom: int | None = None
    """Degrees of freedom of the interval."""
    without_one: tuple[float, float] | None = None
    """Smallest and largest mean without one seed."""

    def to_json(self) -> dict:
        """Fields without `freedom` and `without_one`, which only power and leave-one-seed-out means need."""
        return {name: value for name, value in vars(self).items() if name not in ("freedom", "without_one")}


def _deleted(x: np.ndarray) -> np.ndarray:
    """Means of a figure's values without each of them in turn, `[n]`."""
    return (x.sum() - x) / (len(x) - 1)


def _least_and_largest(means: np.ndarray) -> tuple[float, float]:
    return float(means.min()), float(means.max())


def pair_values(matrix: np.ndarray) -> np.ndarray:
    """The upper triangle of a symmetric `[S, S]` matrix, `[S(S−1)/2]`, row by row."""
    return matrix[_upper(len(matrix))]


@cache
def _upper(s: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(s, 1)


@cache
def _without_one(s: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pairs without each seed in turn, `[S, (S−1)(S−2)/2]` both."""
    pairs = np.stack(_upper(s), 1)
    remaining = np.stack([pairs[(pairs != i).all(1)] for i in range(s)])
    return remaining[..., 0], remaining[..., 1]


@cache
def _quantile(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t."""
    return float(special.stdtrit(freedom, 0.5 + level / 2))


def jackknife(matrix: np.ndarray, level: float = 0.95) -> Estimate:
    """Mean of a pairwise score over S seeds, with the delete-one-seed jackknife interval and t(S−1).

    θ₍ₛ₎ is the mean of the pairs without seed s, and SE² = (S−1)/S · Σ(θ₍ₛ₎ − mean θ)² (Efron & Stein 1981; for this
    U-statistic of order 2 see Arvesen 1969).

    Args:
        matrix: symmetric `[S, S]`; the diagonal is ignored.

    Raises:
        ValueError: there are fewer than two seeds, or the matrix is not square, or is not symmetric and finite off the
            diagonal.
    """
    matrix = np.asarray(matrix, dtype=float)
    s = len(matrix)
    if matrix.shape != (s, s) or s < 2:
        raise ValueError(f"a square matrix over at least 2 seeds expected, got shape {matrix.shape}")
    above, below = pair_values(matrix), pair_values(matrix.T)
    if not (np.isfinite(above).all() and (np.abs(above - below) <= 1e-12).all()):
        raise ValueError("pairwise scores must be finite and symmetric")
    mean = float(above.mean())
    method = f"mean over pairs; delete-one-seed jackknife, t(S-1), {100 * level:g}%"
    if s < 3:
        return Estimate(mean, None, None, None, s, method, "at least 3 seeds are needed for an interval")
    deleted = matrix[_without_one(s)].mean(1)
    error = float(np.sqrt((s - 1) / s * ((deleted - deleted.mean()) ** 2).sum()))
    half = _quantile(level, s - 1) * error
    return Estimate(mean, mean - half, mean + half, error, s, method, None, s - 1, _least_and_largest(deleted))


def fitted_change(at: list[int], values: np.ndarray) -> np.ndarray:
    """Change from the first to the last point of the least-squares line through each series.

    Args:
        at: x-values, at least two different ones. values: `[len(at), ...]`.
    """
    x = np.asarray(at, dtype=float)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return (x[-1] - x[0]) * np.tensordot(weights, np.asarray(values, dtype=float), 1)


def mean_over_seeds(values: list[float], level: float = 0.95) -> Estimate:
    """Mean over seeds with the t(S−1) interval. For paired differences this is the interval of the paired t test.

    Raises:
        ValueError: there is no value, or a value is not finite.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError("finite figures expected, one a seed")
    mean, method = float(x.mean()), f"mean over seeds, t(S-1), {100 * level:g}%"
    if len(x) < 3:
        return Estimate(mean, None, None, None, len(x), method, "at least 3 seeds are needed for an interval")
    error = float(x.std(ddof=1) / np.sqrt(len(x)))
    half, without_one = _quantile(level, len(x) - 1) * error, _least_and_largest(_deleted(x))
    return Estimate(mean, mean - half, mean + half, error, len(x), method, None, len(x) - 1, without_one)


def mean_over_seeds_and_sets(values: np.ndarray, families: list[str], level: float = 0.95) -> Estimate:
    """Mean of a figure, usually of paired differences, over S training seeds and D data sets.

    Both are samples: other seeds would give other SAEs, and data sets of one family share their source. The variance is
    s²/S over the seeds' means, plus the variance of the mean over data sets clustered by family,
    F/(F−1) Σ_f (Σ_{d∈f} (x̄_d − x̄))²/D² (Liang & Zeger 1986). Residual variance counts in both terms, which is
    conservative. The t quantile has the smaller number of degrees of freedom. With fewer than three seeds the variance
    has the second term alone, and the interval does not cover other trainings.

    Args:
        values: `[S, D]`. families: D names.

    Raises:
        ValueError: there is no value, or a value is not finite.
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 2 or 0 in x.shape or x.shape[1] != len(families) or not np.isfinite(x).all():
        raise ValueError("finite figures expected, a row a seed, a column a data set")
    s, d = x.shape
    mean, residuals = float(x.mean()), x.mean(0) - x.mean()
    sums = np.array([residuals[np.array(families) == f].sum() for f in dict.fromkeys(families)])
    f = len(sums)
    if f < 2:
        method = f"mean over {d} data sets"
        return Estimate(
            mean, None, None, None, s, method, "at least 2 families of data sets are needed for an interval"
        )
    variance, freedom = f / (f - 1) * float((sums**2).sum()) / d**2, f - 1
    method = f"mean over {d} data sets of {f} families; clustered by family, t(F-1), {100 * level:g}%; not over seeds"
    if s >= 3:
        variance, freedom = variance + float(x.mean(1).var(ddof=1)) / s, min(f, s) - 1
        method = f"mean over seeds and {d} data sets of {f} families; both variances, t({freedom}), {100 * level:g}%"
    error = float(np.sqrt(variance))
    half = _quantile(level, freedom) * error
    without_one = _least_and_largest(_deleted(x.mean(1))) if s >= 3 else None
    return Estimate(mean, mean - half, mean + half, error, s, method, None, freedom, without_one)


def pass_probability(estimate: Estimate, end: str, threshold: float, truth: float) -> float:
    """Probability that an end of the interval lies beyond a threshold if the true figure is `truth`.

    (X − c)/s has the noncentral t distribution with noncentrality (θ − c)/σ. σ is replaced by s.

    Args:
        estimate: an estimate with an interval. end: `low` must lie above the threshold, `high` must lie below it.
    """
    error, critical, sign = _scale(estimate, end)
    if error == 0:
        return float(sign * (truth - threshold) > 0)
    centre = sign * (truth - threshold) / error
    missed = float(special.nctdtr(estimate.freedom, centre, critical))
    if math.isnan(missed):  # scipy gives NaN far in a tail, where the probability is 0 or 1
        missed = float(centre < critical)
    return 1 - missed


def effect_for(estimate: Estimate, end: str, threshold: float, probability: float = 0.8) -> float:
    """The true figure at which `pass_probability` is this probability."""
    error, critical, sign = _scale(estimate, end)
    if error == 0:
        return threshold
    return threshold + sign * error * float(special.nctdtrinc(estimate.freedom, 1 - probability, critical))


def narrowing(estimate: float, reached: float, end: str, threshold: float) -> float | None:
    """Factor by which an interval must shrink for its end to reach a threshold, if the estimate is the true figure.

    Args:
        reached: value of the compared end. end: `low` or `high`.

    Returns:
        At most 1 if the end reaches the threshold; None if the estimate itself is not beyond the threshold.
    """
    margin = (estimate - threshold) * (-1 if end == "high" else 1)
    return abs(reached - estimate) / margin if margin > 0 else None


def _scale(estimate: Estimate, end: str) -> tuple[float, float, int]:
    """(standard error, quantile of the interval, 1 for lower ends and −1 for upper ones)."""
    error, reached = estimate.standard_error, getattr(estimate, end)
    if error is None or reached is None or estimate.freedom is None:
        raise ValueError("an estimate with an interval and its degrees of freedom expected")
    sign = -1 if end == "high" else 1
    return error, abs(estimate.estimate - reached) / error if error > 0 else 0.0, sign


def minimum_detectable_difference(repeats: list[float], level: float = 0.95) -> float:
    """Smallest difference of two single runs of a benchmark that exceeds its own noise: t(n−1)·√2·s.

    Args:
        repeats: figures of one SAE at n ≥ 2 seeds of the benchmark.
    """
    x = np.asarray(repeats, dtype=float)
    return float(special.stdtrit(len(x) - 1, 0.5 + level / 2) * np.sqrt(2) * x.std(ddof=1))


def noise(means: list[float]) -> dict:
    """Spread of an SAE's mean figure between runs of a benchmark that differ in the benchmark's own seed."""
    spread = {"sd": float(np.std(means, ddof=1)), "minimum_detectable_difference": minimum_detectable_difference(means)}
    return {"means": means} | spread


def permutation_test(matrix: np.ndarray, first: int) -> float:
    """Exact two-sided p-value that two arms of seeds have the same mean within-arm score.

    All ways to split the S seeds into arms of the given sizes are enumerated. The statistic is |mean within the first −
    mean within the second|. The test is valid only if the arms are exchangeable under the null, including equal
    variance.

    Args:
        matrix: scores of all pairs, also across arms, `[S, S]`. first: size of the first arm, whose seeds come first.

    Raises:
        ValueError: an arm has fewer than two seeds, or there are too many relabellings to enumerate.
    """
    matrix = np.asarray(matrix, dtype=float)
    s = len(matrix)
    second = s - first
    if min(first, second) < 2:
        raise ValueError("each arm needs at least two seeds")
    if comb(s, first) > MOST_RELABELLINGS:
        raise ValueError(f"{comb(s, first)} relabellings; at most {MOST_RELABELLINGS} are enumerated")
    off = matrix - np.diag(np.diag(matrix))
    arms = _relabellings(s, first)
    # z indicates the first arm, M holds the scores: z'Mz inside it, (1−z)'M(1−z) = 1'M1 − 2z'M1 + z'Mz outside.
    inside = np.einsum("ps,ps->p", arms @ off, arms)
    within_first = inside / (first * (first - 1))
    within_second = (off.sum() - 2 * arms @ off.sum(1) + inside) / (second * (second - 1))
    statistic = np.abs(within_first - within_second)
    return float((statistic >= statistic[0] * (1 - 1e-9) - 1e-12).mean())


@cache
def _relabellings(s: int, first: int) -> np.ndarray:
    """Indicators of all ways to choose `first` of `s` seeds, `[relabellings, s]`; the observed one comes first."""
    arms = np.zeros((comb(s, first), s))
    np.put_along_axis(arms, np.array(list(combinations(range(s), first))), 1.0, axis=1)
    return arms


@dataclass(frozen=True)
class Equivalence:
    """Outcome of two one-sided tests."""

    p_value: float
    equivalent: bool
    margin: float
    alpha: float


def tost(estimate: Estimate, margin: float, alpha: float = 0.05) -> Equivalence:
    """Test of equivalence, |θ| < margin, by two one-sided t tests (Schuirmann 1987).

    Raises:
        ValueError: the margin is not positive, or the estimate has no standard error.
    """
    if margin <= 0:
        raise ValueError(f"margin {margin}: a positive number expected")
    if estimate.standard_error is None:
        raise ValueError(f"no equivalence test: {estimate.reason}")
    if estimate.standard_error == 0:
        p = 0.0 if abs(estimate.estimate) < margin else 1.0
    else:
        df = estimate.n_seeds - 1
        lower = special.stdtr(df, -(estimate.estimate + margin) / estimate.standard_error)
        upper = special.stdtr(df, (estimate.estimate - margin) / estimate.standard_error)
        p = float(max(lower, upper))
    return Equivalence(p, p < alpha, margin, alpha)


# ---------------------------------------------------------------------------------------------------------------------
# Single features


def clopper_pearson_low(hits: np.ndarray | int, n: int, level: float = 0.95) -> np.ndarray:
    """One-sided lower confidence bound of a probability after `hits` in `n` independent trials; 0 without a hit.

    Clopper & Pearson (1934): the bound is the probability under which `hits` or more occur with probability 1 − level.
    It is the 1 − level quantile of Beta(hits, n − hits + 1). With n hits it is (1 − level)^(1/n).

    Args:
        hits: whole numbers 0 … n, of any shape.

    Raises:
        ValueError: n < 1, or hits outside 0 … n.
    """
    k = np.asarray(hits, dtype=float)
    if n < 1 or (k < 0).any() or (k > n).any():
        raise ValueError(f"hits between 0 and n, and n of at least 1, expected; n is {n}")
    return np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, 1 - level), 0.0)


def clopper_pearson_high(hits: int, n: int, level: float = 0.95) -> float:
    """One-sided upper confidence bound of a probability; 1 if all trials hit."""
    return float(1 - clopper_pearson_low(n - hits, n, level))


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """q-values `[m]`. Marking all with q ≤ α controls the false discovery rate at α.

    Benjamini & Hochberg (1995), for independent or positively dependent p-values. The q-value at rank i is the smallest
    p₍ⱼ₎ · m / j over the ranks j ≥ i.

    Raises:
        ValueError: a p-value outside 0 … 1, or NaN.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values between 0 and 1 expected, in one row")
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(0, 1)
    return q
