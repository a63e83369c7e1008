"""Scores of the similarity of two dictionaries. Feature directions are the rows of `W_dec [d_sae, d_in]`.

`mcc`: mean of max(cos, 0) over the best one-to-one assignment (Hungarian, `matching.py`). Features are non-negative,
therefore a feature and its negative differ. `share70`: share of the assigned pairs with a cosine of at least 0.7.
`pwmcc`: symmetrised mean of the largest |cos|, the earlier study's score, in which several features may share a
partner. Suffixes: `_alive` reads features that fire; `_others` reads alive features that are like no prototype; `_abs`
uses |cos|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from husai.evidence.names import GAP, SCORES
from husai.stability import matching
from husai.stability.matching import BLOCK, Matching, match, match_cosines, unit_rows

MATCHED = 0.7
FEWEST = 10
"""Fewest features that are like no prototype. With fewer, their scores are 0."""


def max_cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest |cos| of each row of `a [n, d]` in `b [m, d]`, and of each row of `b` in `a`: `[n]`, `[m]`.

    Blocked: memory is BLOCK × m, not n × m.
    """
    a, b = unit_rows(a), unit_rows(b)
    best_a, best_b = [], torch.zeros(len(b), dtype=b.dtype)
    for block in a.split(BLOCK):
        cosines = (block @ b.T).abs()
        best_a.append(cosines.amax(1))
        best_b = torch.maximum(best_b, cosines.amax(0))
    return torch.cat(best_a), best_b


def pwmcc(a: Tensor, b: Tensor) -> float:
    """Symmetrised mean-max |cos| of `a [n, d]` and `b [m, d]`, in [0, 1]."""
    return _mean_of_sides(*max_cosines(a, b))


def _mean_of_sides(best_a: Tensor, best_b: Tensor) -> float:
    return 0.5 * (best_a.double().mean() + best_b.double().mean()).item()


def mcc(a: Tensor, b: Tensor, exact: bool | None = None, signed: bool = True) -> float:
    """Mean worth of the best one-to-one assignment of the smaller dictionary into the larger, in [0, 1] (`match`)."""
    return float(match(a, b, exact, signed=signed).cosines.mean())


def score(
    a: Tensor,
    b: Tensor,
    alive_a: Tensor,
    alive_b: Tensor,
    scores: tuple[str, ...] = SCORES,
    others_a: Tensor | None = None,
    others_b: Tensor | None = None,
) -> dict[str, float]:
    """Scores of one pair of dictionaries. Empty dictionaries score 0.

    `mcc_gap_bound` is an upper bound on how far an `mcc` lies below that of the best assignment.

    Args:
        alive_a, others_a: masks of the rows of `a [n, d]`, bool `[n]`. alive_b, others_b: masks of `b`. Fewer than
            FEWEST others score 0.
        scores: one of SCORED.
    """
    every_a, every_b = torch.ones(len(a), dtype=torch.bool), torch.ones(len(b), dtype=torch.bool)
    parts = {"": (every_a, every_b), "_alive": (alive_a, alive_b)}
    if others_a is not None and others_b is not None:
        enough = min(int(others_a.sum()), int(others_b.sum())) >= FEWEST
        parts["_others"] = (others_a, others_b) if enough else (~every_a, ~every_b)
    # Cosines of small dictionaries are computed once for all parts. Of others, parts would be large copies.
    cosines = unit_rows(a) @ unit_rows(b).T if max(len(a), len(b)) <= matching.EXACT_UP_TO else None
    values: dict[str, float] = {}
    gap = 0.0
    whole: dict[bool, Matching | None] = {}
    for part, (rows_a, rows_b) in parts.items():
        if "mcc" + part not in scores:
            continue
        complete, empty = bool(rows_a.all() and rows_b.all()), not (rows_a.any() and rows_b.any())
        within = cosines if complete or cosines is None else cosines[rows_a][:, rows_b]
        for signed, names in ((True, ("mcc" + part, "share70" + part)), (False, ("mcc" + part + "_abs",))):
            if names[0] not in scores:
                continue
            # If all features fire, the matching of all features is that of the alive ones.
            known = whole if complete else {}
            if signed not in known:
                if empty:
                    known[signed] = None
                elif within is not None:
                    known[signed] = match_cosines(within, signed)
                else:
                    known[signed] = match(a[rows_a], b[rows_b], signed=signed)
            assigned = known[signed]
            matched = (
                (0.0, 0.0) if assigned is None else (assigned.cosines.mean(), (assigned.cosines >= MATCHED).mean())
            )
            values |= {name: float(value) for name, value in zip(names, matched, strict=False)}
            gap = gap if assigned is None else max(gap, assigned.gap_bound)
        if "pwmcc" + part in scores:
            if empty:
                values["pwmcc" + part] = 0.0
            elif within is not None:
                values["pwmcc" + part] = _mean_of_sides(*(within.abs().amax(dim) for dim in (1, 0)))
            else:
                values["pwmcc" + part] = pwmcc(a[rows_a], b[rows_b])
    return {name: values[name] for name in scores} | {GAP: gap}
