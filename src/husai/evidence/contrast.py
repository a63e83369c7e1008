"""Compares two arms of SAEs. Both arms have the same seeds, and their pairs of seeds are matched.

Pure functions of sections of results, because the audit computes everything again from the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from husai.evidence.estimates import Estimate, jackknife, mean_over_seeds
from husai.evidence.names import GATED_NULLS, PRIMARY_SCORE
from husai.evidence.schemas import Alike, Compared, Gain, Interval, Scored


def lower_bound(section: Scored) -> float | None:
    """Smallest lower end among the intervals of the excess of PRIMARY_SCORE over the required nulls."""
    excess = section.stability.scores[PRIMARY_SCORE].excess
    ends = [excess[null].low for null in GATED_NULLS if null in excess]
    sure = [end for end in ends if end is not None]
    return min(sure) if len(sure) == len(ends) else None


def has_null(null: str, sections: Sequence[Scored]) -> bool:
    return all(null in section.pairs[0] for section in sections)


def gain_over(null: str | None, arms: Sequence[Scored], controls: Sequence[Scored], level: float = 0.95) -> Estimate:
    """Gain of an arm over its control, in PRIMARY_SCORE or, for a named null, in the excess over this null.

    Args:
        arms, controls: in pairs; with several pairs, the mean of their gains over the same seeds is taken.

    Raises:
        ValueError: an arm and its control have other seeds.
    """
    pairs = list(zip(arms, controls, strict=True))
    if any(arm.stability.labels != control.stability.labels for arm, control in pairs):
        raise ValueError("two arms of the same seeds, in the same order, expected")
    return jackknife(np.mean([arm.scores(null) - control.scores(null) for arm, control in pairs], axis=0), level)


def gain(arms: Sequence[Scored], controls: Sequence[Scored]) -> Gain:
    """`gain_over` no null, and over each required null that all sections hold.

    A gain over one null can come from a decrease of that null. Therefore a gain is shown only if it is shown over each
    null. `least` is the null with the lowest lower end.
    """
    over = {null: gain_over(null, arms, controls) for null in GATED_NULLS if has_null(null, [*arms, *controls])}
    sure = {null: e.estimate if e.low is None else e.low for null, e in over.items()}
    estimates = {"observed": gain_over(None, arms, controls)} | over
    least = min(sure, key=lambda null: sure[null])
    return Gain.model_validate({name: Interval.of(e) for name, e in estimates.items()} | {"least": least})


def gain_and_left_out(arms: Sequence[Scored], control: Scored) -> tuple[Gain, list[Gain]]:
    """(mean gain of several arms over one control, the same without each arm in turn; empty for a single arm)."""
    others = [[*arms[:i], *arms[i + 1 :]] for i in range(len(arms)) if len(arms) > 1]
    mean, *left_out = [gain(group, [control] * len(group)) for group in (arms, *others)]
    return mean, left_out


def heldout(section: Compared | Alike, figure: str = "explained_variance") -> Interval:
    """Mean of a held-out figure over seeds."""
    return Interval.of(mean_over_seeds([getattr(m.heldout, figure) for m in section.members]))


def drop(section: Compared, control: Compared) -> Interval:
    """Loss of explained held-out variance of an arm against its control, with the same seeds in both."""
    figures = [[m.heldout.explained_variance for m in s.members] for s in (control, section)]
    return Interval.of(mean_over_seeds([a - b for a, b in zip(*figures, strict=True)]))
