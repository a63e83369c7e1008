"""The best one-to-one assignment between the rows of two dictionaries by |cos|, or by the cosine with its sign, with a
proof of how good it is.

Signed, a pair with a negative cosine is worth 0: features are never negative, so that a feature and its negative are
two.

Exact: one dense float64 matrix. Bounded: an optimal assignment on a sparse graph of candidates, and by duality of
linear programming (Kuhn 1955) a bound on every other. With c_ij the worth of the pair (a_i, b_j), any prices v_j and
u_i = max_j (c_ij − v_j), an assignment σ of n rows to distinct columns has
Σ c_iσ(i) = Σ (c_iσ(i) − v_σ(i)) + Σ v_σ(i) ≤ Σ u_i + (the n largest v_j).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

EXACT_UP_TO = 2048
"""Features of the smaller dictionary up to which the exact way is taken where nothing is said."""
BLOCK = 2048
LOOK = 512
"""Rows whose cosines are held at a time when candidates are chosen."""
CANDIDATES = 32
"""Columns that each row first chooses from; later looks add half as many."""
ROUNDS = 10
TOLERANCE = 1e-6
"""A bound on the mean worth below which no more candidates are looked for."""
GRID = 2.0**-20
"""Candidates are matched by their worth rounded to this, whose sums are exact: rounding errors in near ties can make
scipy a thousand times slower. The bound is of the cosines themselves, and at most this much looser."""
JITTER = 1e-7
"""Largest random number added where candidates are chosen, so that equal rows do not all choose the same columns."""
SLACK = 1e-11
"""Added to the bound for float64 rounding: d_in · 2⁻⁵³ a cosine, 1e-12 at d_in 9,000."""


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment of all k = min(n, m) rows of the smaller dictionary."""

    cosines: np.ndarray  # float64 [k], what each pair is worth: |cos|, or max(cos, 0)
    rows: np.ndarray  # int [k], of the first dictionary
    columns: np.ndarray  # int [k], rows of the second dictionary
    gap_bound: float  # (mean worth of the best assignment) − (mean of `cosines`) is at most this; 0 where exact


def unit_rows(W_dec: Tensor) -> Tensor:
    """Rows scaled to norm 1; rows of zeros stay zero."""
    return W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)


def match(a: Tensor, b: Tensor, exact: bool | None = None, signed: bool = False) -> Matching:
    """Match the rows of `a [n, d]` and `b [m, d]`.

    Args:
        signed: a pair is worth max(cos, 0), in place of |cos|.
        exact: the optimum, with one dense matrix: 2.1 GB at 16,384 × 16,384. Otherwise the largest object is
            LOOK × max(n, m), and the cosines are those of the unit rows in float32. None: exact up to EXACT_UP_TO.

    Raises:
        ValueError: a value is not finite.
    """
    if len(a) > len(b):
        swapped = match(b, a, exact, signed)
        return Matching(swapped.cosines, swapped.columns, swapped.rows, swapped.gap_bound)
    a, b = unit_rows(a), unit_rows(b)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("matching: a dictionary holds a NaN or infinite value")
    exact = len(a) <= EXACT_UP_TO if exact is None else exact
    return _exact(a, b, signed) if exact or len(a) == 0 else _bounded(a.float(), b.float(), signed)


def partners(a: Tensor, b: Tensor) -> Tensor:
    """The rows of `b [n, d]` in the order of the rows of `a [n, d]` that the best assignment gives them to."""
    found = match(a, b.to(a.dtype))
    return b[torch.from_numpy(found.columns[np.argsort(found.rows)])]


def worth(cosines: Tensor, signed: bool) -> Tensor:
    """What pairs with these cosines are worth; overwrites them."""
    return cosines.clamp_min_(0) if signed else cosines.abs_()


def _exact(a: Tensor, b: Tensor, signed: bool) -> Matching:
    """The matrix is filled negated and minimised: scipy would copy it otherwise."""
    cost = np.empty((len(a), len(b)))
    for start in range(0, len(a), BLOCK):
        cost[start : start + BLOCK] = worth(a[start : start + BLOCK] @ b.T, signed).neg_().numpy()
    rows, columns = linear_sum_assignment(cost)
    return Matching(-cost[rows, columns], rows, columns, 0.0)


def _bounded(a: Tensor, b: Tensor, signed: bool) -> Matching:
    """Match among candidates; rows that may be worth more elsewhere get more of them, until the gap closes."""
    n, m = len(a), len(b)
    rows, upper = np.arange(n), np.inf
    edges, rest = _look(a, b, np.zeros(m), CANDIDATES, signed, both_sides=True)
    edges = np.union1d(edges, rows * (m + 1))  # row i may take column i, so that every row can be matched
    values = _worths(a, b, edges, signed)
    for _ in range(ROUNDS):
        columns, prices = _assign(edges, values, n, m)
        cosines = values[np.searchsorted(edges, rows * m + columns)]
        known = _row_maxima(edges, values, prices, n)
        # The other rows are certain to have their best column among their candidates.
        doubtful = np.flatnonzero(rest - prices.min() > known)
        found, limit = _look(a[doubtful], b, prices, CANDIDATES // 2, signed)
        found = np.setdiff1d(doubtful[found // m] * m + found % m, edges)
        place = np.searchsorted(edges, found)
        edges, values = np.insert(edges, place, found), np.insert(values, place, _worths(a, b, found, signed))
        most = _row_maxima(edges, values, prices, n)
        nothing_better = (most <= known + GRID).all()
        most[doubtful] = np.maximum(most[doubtful], limit)
        upper = min(upper, most.mean() + np.sort(prices)[-n:].sum() / n)
        if nothing_better or upper - cosines.mean() <= TOLERANCE:
            break
    return Matching(cosines, rows, columns, float(max(0.0, upper - cosines.mean()) + SLACK))


def _look(
    a: Tensor, b: Tensor, prices: np.ndarray, k: int, signed: bool, both_sides: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k columns that each row likes best at these prices, by worth − price: one pass over all cosines.

    Args:
        both_sides: also the row that each column likes best in each block.

    Returns:
        (edges i · m + j, unsorted; for each row a number that worth − price of no other column exceeds).
    """
    m = len(b)
    jitter = JITTER * torch.rand(min(LOOK, len(a)), m, generator=torch.Generator().manual_seed(0))
    jitter -= torch.from_numpy(prices).float()
    edges, limits = [np.zeros(0, np.int64)], [np.zeros(0)]
    for start in range(0, len(a), LOOK):
        net = worth(a[start : start + LOOK] @ b.T, signed)
        net += jitter[: len(net)]
        i = torch.arange(start, start + len(net))
        best, j = net.topk(min(k, m), dim=1)
        edges.append((i[:, None] * m + j).flatten().numpy())
        # A float32 dot product of unit rows is off by at most d · 2⁻²⁴ (Higham 2002, section 3.1), the rest by 2⁻²².
        limits.append(best[:, -1].double().numpy() + 1.01 * a.shape[1] * 2.0**-24 + 2.0**-22)
        if both_sides:
            edges.append((i[net.argmax(0)] * m + torch.arange(m)).numpy())
    return np.concatenate(edges), np.concatenate(limits)


def _worths(a: Tensor, b: Tensor, edges: np.ndarray, signed: bool) -> np.ndarray:
    """What the edges are worth, in float64."""
    values = np.empty(len(edges))
    a, b = a.numpy(), b.numpy()
    for start in range(0, len(edges), 256):  # small enough for the cache
        i, j = np.divmod(edges[start : start + 256], len(b))
        values[start : start + 256] = np.einsum("ij,ij->i", a[i].astype(np.float64), b[j].astype(np.float64))
    return np.maximum(values, 0) if signed else np.abs(values)


def _row_maxima(edges: np.ndarray, values: np.ndarray, prices: np.ndarray, n: int) -> np.ndarray:
    """Largest worth − price of each row `[n]` among the edges, which are sorted."""
    i, j = np.divmod(edges, len(prices))
    return np.maximum.reduceat(values - prices[j], np.searchsorted(i, np.arange(n)))


def _assign(edges: np.ndarray, values: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(column of each row `[n]` in an optimal assignment on the graph, prices of the columns `[m]`, at least 0).

    The price of a column is what the rows would gain in all if there were a second one like it: the longest path of
    rows that each move on by one column, the last of them into it.
    """
    i, j = np.divmod(edges, m)
    values = np.round(values / GRID) * GRID
    graph = csr_array((2 - values, (i, j)), shape=(n, m))  # costs above 0: a 0 would be no edge
    columns = min_weight_full_bipartite_matching(graph)[1]
    own = values[np.searchsorted(edges, np.arange(n) * m + columns)]
    order = np.argsort(j, kind="stable")
    before, gain = columns[i[order]], (values - own[i])[order]
    after, start = np.unique(j[order], return_index=True)
    prices = np.zeros(m)
    for _ in range(n):
        longer = np.maximum(0, np.maximum.reduceat(prices[before] + gain, start))
        if np.array_equal(longer, prices[after]):
            break
        prices[after] = longer
    return columns, prices
