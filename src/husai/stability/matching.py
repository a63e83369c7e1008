"""The best one-to-one assignment between the rows of two dictionaries, with a bound on its distance from the optimum.

Pairs are weighted by |cos|, or by max(cos, 0) (*signed*). A negative signed cosine counts 0 because features are
non-negative: a feature and its negative are two features.

Exact: one dense float64 matrix. Bounded: an optimal assignment on a sparse graph of candidates, and a bound on every
other assignment by duality of linear programming (Kuhn 1955). Let c_ij be the worth of the pair (a_i, b_j), v_j any
prices, and u_i = max_j (c_ij − v_j). Then an assignment σ of n rows to distinct columns has
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
"""Largest width of the smaller dictionary that is matched exactly by default."""
BLOCK = 2048
LOOK = 512
"""Number of rows whose cosines are in memory at a time when candidates are chosen."""
CANDIDATES = 32
"""Number of candidate columns of each row in the first round. Later rounds add half as many."""
ROUNDS = 10
TOLERANCE = 1e-6
"""Gap of the mean worth below which the search for candidates ends."""
GRID = 2.0**-20
"""Worths are rounded to multiples of this number for the matching, because sums of such multiples are exact. Rounding
errors in near ties can make scipy a thousand times slower. The bound holds for the cosines themselves, and is looser by
at most this number."""
JITTER = 1e-7
"""Largest random number added to worths when candidates are chosen. Otherwise equal rows choose the same columns."""
NOT_FINITE = "matching: a dictionary holds a NaN or infinite value"
SLACK = 1e-11
"""Margin of the bound for float64 rounding, which is d_in · 2⁻⁵³ for each cosine: 1e-12 at d_in 9,000."""


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment of all k = min(n, m) rows of the smaller dictionary."""

    cosines: np.ndarray  # float64 [k], worth of each pair: |cos|, or max(cos, 0)
    rows: np.ndarray  # int [k], of the first dictionary
    columns: np.ndarray  # int [k], rows of the second dictionary
    gap_bound: float  # (mean worth of the best assignment) − (mean of `cosines`) is at most this; 0 where exact


def unit_rows(W_dec: Tensor) -> Tensor:
    """Rows scaled to norm 1; rows of zeros stay zero."""
    return W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)


def match(a: Tensor, b: Tensor, exact: bool | None = None, signed: bool = False) -> Matching:
    """Match the rows of `a [n, d]` and `b [m, d]`.

    Args:
        signed: the worth of a pair is max(cos, 0) instead of |cos|.
        exact: find the optimum with one dense matrix, which takes 2.1 GB at 16,384 × 16,384. False: the largest matrix
            is LOOK × max(n, m), and cosines are computed in float32. None: exact up to EXACT_UP_TO rows.

    Raises:
        ValueError: a value is not finite.
    """
    if len(a) > len(b):
        swapped = match(b, a, exact, signed)
        return Matching(swapped.cosines, swapped.columns, swapped.rows, swapped.gap_bound)
    a, b = unit_rows(a), unit_rows(b)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(NOT_FINITE)
    exact = len(a) <= EXACT_UP_TO if exact is None else exact
    return _exact(a, b, signed) if exact or len(a) == 0 else _bounded(a.float(), b.float(), signed)


def partners(a: Tensor, b: Tensor) -> Tensor:
    """Rows of `b [n, d]`, reordered so that row i is the best assignment's partner of row i of `a [n, d]`."""
    matching = match(a, b.to(a.dtype))
    return b[torch.from_numpy(matching.columns[np.argsort(matching.rows)])]


def worth(cosines: Tensor, signed: bool) -> Tensor:
    """Worth of pairs with these cosines. Overwrites the cosines."""
    return cosines.clamp_min_(0) if signed else cosines.abs_()


def match_cosines(cosines: Tensor, signed: bool = False) -> Matching:
    """Optimal matching of rows whose cosines `[n, m]` are known. `signed`: see `match`.

    Raises:
        ValueError: a cosine is not finite.
    """
    if len(cosines) > cosines.shape[1]:
        swapped = match_cosines(cosines.T, signed)
        return Matching(swapped.cosines, swapped.columns, swapped.rows, swapped.gap_bound)
    if not cosines.isfinite().all():
        raise ValueError(NOT_FINITE)
    return _optimal(worth(cosines.to(torch.float64, copy=True), signed).neg_().numpy())


def _exact(a: Tensor, b: Tensor, signed: bool) -> Matching:
    """Optimal matching of unit rows. At no time are all cosines in memory in two forms."""
    cost = np.empty((len(a), len(b)))
    for start in range(0, len(a), BLOCK):
        cost[start : start + BLOCK] = worth(a[start : start + BLOCK] @ b.T, signed).neg_().numpy()
    return _optimal(cost)


def _optimal(cost: np.ndarray) -> Matching:
    """Assignment with the smallest sum of costs, negated worths `[n, m]` with n ≤ m. Overwrites the costs.

    The worths are negated because scipy would copy a matrix that it maximises. Row minima are subtracted first, and
    column minima if the matrix is square, because the cost of every assignment contains them. This makes scipy a
    quarter faster.
    """
    of_rows = cost.min(1, initial=0)
    cost -= of_rows[:, None]
    of_columns = cost.min(0, initial=np.inf) if len(cost) == cost.shape[1] else np.zeros(cost.shape[1])
    cost -= of_columns
    rows, columns = linear_sum_assignment(cost)
    least = cost[rows, columns] + of_rows[rows] + of_columns[columns]
    return Matching(np.maximum(-least, 0), rows, columns, 0.0)


def _bounded(a: Tensor, b: Tensor, signed: bool) -> Matching:
    """Match among candidates. Rows that may have a better column get more candidates until the gap is small."""
    n, m = len(a), len(b)
    rows, upper = np.arange(n), np.inf
    edges, rest = _look(a, b, np.zeros(m), CANDIDATES, signed, both_sides=True)
    edges = np.union1d(edges, rows * (m + 1))  # row i may take column i, so that every row can be matched
    values = _worths(a, b, edges, signed)
    for _ in range(ROUNDS):
        columns, prices = _assign(edges, values, n, m)
        cosines = values[np.searchsorted(edges, rows * m + columns)]
        known = _row_maxima(edges, values, prices, n)
        # All other rows are known to have their best column among their candidates.
        doubtful = np.flatnonzero(rest - prices.min() > known)
        new_edges, limit = _look(a[doubtful], b, prices, CANDIDATES // 2, signed)
        new_edges = np.setdiff1d(doubtful[new_edges // m] * m + new_edges % m, edges)
        place = np.searchsorted(edges, new_edges)
        edges, values = np.insert(edges, place, new_edges), np.insert(values, place, _worths(a, b, new_edges, signed))
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
    """The k columns with the largest worth − price for each row, from one pass over all cosines.

    Args:
        both_sides: add the row with the largest worth − price for each column, in each block of rows.

    Returns:
        (edges i · m + j, unsorted; for each row an upper bound of worth − price over all other columns).
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
    """Worth of each edge, in float64."""
    values = np.empty(len(edges))
    a, b = a.numpy(), b.numpy()
    for start in range(0, len(edges), 256):  # small enough for the cache
        i, j = np.divmod(edges[start : start + 256], len(b))
        values[start : start + 256] = np.einsum("ij,ij->i", a[i].astype(np.float64), b[j].astype(np.float64))
    return np.maximum(values, 0) if signed else np.abs(values)


def _row_maxima(edges: np.ndarray, values: np.ndarray, prices: np.ndarray, n: int) -> np.ndarray:
    """Largest worth − price of each row `[n]` over its edges. The edges are sorted."""
    i, j = np.divmod(edges, len(prices))
    return np.maximum.reduceat(values - prices[j], np.searchsorted(i, np.arange(n)))


def _assign(edges: np.ndarray, values: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(column of each row `[n]` in an optimal assignment on the graph, non-negative prices of the columns `[m]`).

    The price of a column is the total gain if the column existed twice. It is the length of the longest path of rows
    that each move to the next row's column, and the last of which moves to the copy.
    """
    i, j = np.divmod(edges, m)
    values = np.round(values / GRID) * GRID
    graph = csr_array((2 - values, (i, j)), shape=(n, m))  # positive costs, because a sparse 0 is no edge
    columns = min_weight_full_bipartite_matching(graph)[1]
    assigned = values[np.searchsorted(edges, np.arange(n) * m + columns)]
    order = np.argsort(j, kind="stable")
    before, gain = columns[i[order]], (values - assigned[i])[order]
    after, start = np.unique(j[order], return_index=True)
    prices = np.zeros(m)
    for _ in range(n):
        longer = np.maximum(0, np.maximum.reduceat(prices[before] + gain, start))
        if np.array_equal(longer, prices[after]):
            break
        prices[after] = longer
    return columns, prices
