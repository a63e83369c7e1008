"""One-to-one matching of two dictionaries' features: the assignment of largest Σ |cos|.

Exact by scipy's `linear_sum_assignment` on the dense matrix up to EXACT_UP_TO features. Beyond that the dense solver
takes minutes and gigabytes a pair; there an auction (Bertsekas, "The auction algorithm", 1988) runs on each feature's
CANDIDATES nearest features, and its prices prove how far from the optimum it can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

try:
    from numba import njit
except ImportError:  # the same auction, interpreted

    def njit(**_):
        return lambda function: function


EXACT_UP_TO = 2048
CANDIDATES = 64
BLOCK = 2048
STEP = 1e-4  # of the auction's bids; what it costs in mean |cos| is at most this
LEAST = 0.05  # how far below its last candidate a row goes on bidding
ROUNDING = 1e-6  # of a float32 cosine


@dataclass(frozen=True)
class Matching:
    cosines: np.ndarray
    """|cos| of each matched pair, `[min(n, m)]` float64."""
    rows: np.ndarray
    columns: np.ndarray
    gap_bound: float
    """The mean |cos| of the best assignment exceeds this one's by at most this; 0 where it is the best."""


def unit_rows(W_dec: Tensor) -> Tensor:
    """Rows scaled to norm 1; rows of zeros stay zero."""
    return W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)


def match(a: Tensor, b: Tensor, exact: bool | None = None) -> Matching:
    """Match the rows of `a [n, d]` with rows of `b [m, d]`; each row of the smaller one gets a partner.

    Args:
        exact: None: yes up to EXACT_UP_TO features.
    """
    if len(a) > len(b):
        other = match(b, a, exact)
        return Matching(other.cosines, other.columns, other.rows, other.gap_bound)
    a, b = unit_rows(a), unit_rows(b)
    if exact or (exact is None and len(a) <= EXACT_UP_TO):
        return _exact(a, b)
    return _auctioned(a, b)


def _exact(a: Tensor, b: Tensor) -> Matching:
    """The only large object is one float64 cost matrix (2.1 GB at 16,384 × 16,384): shorter side first and minimised,
    because scipy would copy it otherwise."""
    cost = np.empty((len(a), len(b)))
    for start in range(0, len(a), BLOCK):
        cost[start : start + BLOCK] = (a[start : start + BLOCK] @ b.T).abs().neg_().numpy()
    rows, columns = linear_sum_assignment(cost)
    return Matching(-cost[rows, columns], rows, columns, 0.0)


def _auctioned(a: Tensor, b: Tensor) -> Matching:
    values, columns = _candidates(a, b)
    prices = np.zeros(len(b))
    partner = np.full(len(a), -1)
    auction(values, columns, prices, partner, STEP)
    left, free = np.flatnonzero(partner < 0), np.setdiff1d(np.arange(len(b)), partner)
    if len(left):  # outbid on all their candidates: what is left of both sides, exactly
        rest = _exact(a[left], b[free])
        partner[left[rest.rows]] = free[rest.columns]
    cosines = (a * b[partner]).sum(1).abs().double().numpy()
    return Matching(cosines, np.arange(len(a)), partner, max(0.0, _upper_bound(a, b, prices) - cosines.mean()))


def _candidates(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(|cos|, column) of each row's largest, `[n, CANDIDATES]`; never more than BLOCK × m cosines at a time."""
    found = [(block @ b.T).abs().topk(min(CANDIDATES, len(b)), dim=1) for block in a.split(BLOCK)]
    return torch.cat([f.values for f in found]).double().numpy(), torch.cat([f.indices for f in found]).numpy()


@njit(cache=True, nogil=True)
def auction(values, columns, prices, partner, step):
    """Rows without a partner bid for the candidate that is worth most to them at its price, and raise the price by
    what it is worth more than their second best, plus `step`; who held it bids again. A row whose best is worth less
    than its last candidate gives up: a column that is no candidate may suit it as well. All arrays are updated."""
    n, k = values.shape
    owner = np.full(len(prices), -1)
    queue = np.arange(n)
    length = n
    while length > 0:
        length -= 1
        i = queue[length]
        best, second, at = -np.inf, -np.inf, -1
        for j in range(k):
            worth = values[i, j] - prices[columns[i, j]]
            if worth > best:
                second, best, at = best, worth, columns[i, j]
            elif worth > second:
                second = worth
        least = values[i, k - 1] - LEAST
        if best < least:
            continue
        prices[at] += best - max(second, least) + step
        previous = owner[at]
        owner[at] = i
        partner[i] = at
        if previous >= 0:
            partner[previous] = -1
            queue[length] = previous
            length += 1


def _upper_bound(a: Tensor, b: Tensor, prices: np.ndarray) -> float:
    """No assignment has a larger mean |cos|: for any prices p ≥ 0 of columns, Σ cos of an assignment is at most
    Σ_i max_j (cos_ij − p_j) + Σ_j p_j (linear programming duality; each row's value is at most its maximum plus the
    price of its column, and no column is paid for twice)."""
    p = torch.from_numpy(prices).to(b.dtype)
    best = [((block @ b.T).abs() - p).amax(1).double() for block in a.split(BLOCK)]
    return ((torch.cat(best).sum() + p.double().sum()) / len(a)).item() + ROUNDING
