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
from husai.stability.matching import BLOCK, Matching, match, unit_rows

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
    best_a, best_b = max_cosines(a, b)
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
    parts = {"": (a, b), "_alive": (a[alive_a], b[alive_b])}
    if others_a is not None and others_b is not None:
        enough = min(int(others_a.sum()), int(others_b.sum())) >= FEWEST
        parts["_others"] = (a[others_a], b[others_b]) if enough else (a[:0], b[:0])
    values: dict[str, float] = {}
    gap = 0.0
    whole: dict[bool, Matching | None] = {}
    for part, (first, second) in parts.items():
        if "mcc" + part not in scores:
            continue
        empty = not len(first) or not len(second)
        for signed, names in ((True, ("mcc" + part, "share70" + part)), (False, ("mcc" + part + "_abs",))):
            if names[0] not in scores:
                continue
            # If all features fire, the matching of all features is that of the alive ones.
            known = whole if len(first) == len(a) and len(second) == len(b) else {}
            if signed not in known:
                known[signed] = None if empty else match(first, second, signed=signed)
            matching = known[signed]
            matched = (
                (0.0, 0.0) if matching is None else (matching.cosines.mean(), (matching.cosines >= MATCHED).mean())
            )
            values |= {name: float(value) for name, value in zip(names, matched, strict=False)}
            gap = gap if matching is None else max(gap, matching.gap_bound)
        if "pwmcc" + part in scores:
            values["pwmcc" + part] = 0.0 if empty else pwmcc(first, second)
    return {name: values[name] for name in scores} | {GAP: gap}
