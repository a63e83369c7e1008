"""How alike two dictionaries are. Feature directions are the rows of `W_dec [d_sae, d_in]`, never guessed from a shape.

`pwmcc`: symmetrised mean of the largest |cos| (the earlier study's score; several features may share a partner).
`mcc`: mean |cos| of the best one-to-one assignment (Hungarian, `matching.py`). `share70`: share of those pairs with
|cos| ≥ 0.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from husai.evidence.names import GAP, SCORES
from husai.stability.matching import BLOCK, match, unit_rows

MATCHED = 0.7


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


def mcc(a: Tensor, b: Tensor, exact: bool | None = None) -> float:
    """Mean |cos| of the best one-to-one assignment of the smaller dictionary into the larger, in [0, 1] (`match`)."""
    return float(match(a, b, exact).cosines.mean())


def score(a: Tensor, b: Tensor, alive_a: Tensor, alive_b: Tensor, scores: tuple[str, ...] = SCORES) -> dict[str, float]:
    """Scores of one pair of dictionaries, all of SCORES or ALIVE; `alive_a [n]`, `alive_b [m]` bool. Empty dictionaries
    score 0.

    With them `mcc_gap_bound`: by how much the two `mcc` may fall short of the best assignment's.
    """
    values: dict[str, float] = {}
    gap = 0.0
    everything = alive_a.all() and alive_b.all() and scores == SCORES
    parts = (("", a, b), ("_alive", a[alive_a], b[alive_b]))
    for suffix, first, second in parts if scores == SCORES else parts[1:]:
        if suffix and everything:
            values |= {name + suffix: values[name] for name in ("pwmcc", "mcc", "share70")}
        elif len(first) == 0 or len(second) == 0:
            values |= {name + suffix: 0.0 for name in ("pwmcc", "mcc", "share70")}
        else:
            matching = match(first, second)
            values["pwmcc" + suffix] = pwmcc(first, second)
            values["mcc" + suffix] = float(matching.cosines.mean())
            values["share70" + suffix] = float((matching.cosines >= MATCHED).mean())
            gap = max(gap, matching.gap_bound)
    return values | {GAP: gap}
