"""One arm of SAEs against another, and what is decided by it. Both arms have the same seeds; their pairs are matched.

Decisions are pure functions of sections of results (`study.score_trained`), because the audit makes them again from
the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from husai.evidence.estimates import Estimate, jackknife, mean_over_seeds
from husai.evidence.names import GATED_NULLS, PRIMARY_SCORE


class Arm(NamedTuple):
    """SAEs of several seeds, and the scores of their pairs."""

    labels: list[str]
    pairs: list[dict]

    @classmethod
    def of(cls, section: dict) -> Arm:
        return cls(section["stability"]["labels"], section["pairs"])

    def scores(self, null: str | None = None) -> np.ndarray:
        """`[S, S]`: PRIMARY_SCORE of each pair, less that of a null where one is named."""
        matrix = np.zeros((len(self.labels), len(self.labels)))
        for pair in self.pairs:
            i, j = self.labels.index(pair["a"]), self.labels.index(pair["b"])
            below = pair[null][PRIMARY_SCORE] if null else 0.0
            matrix[i, j] = matrix[j, i] = pair["observed"][PRIMARY_SCORE] - below
        return matrix


def lower_bound(section: dict) -> float | None:
    """The least lower end of the intervals of the excess of PRIMARY_SCORE over the required nulls: what is sure."""
    excess = section["stability"]["scores"][PRIMARY_SCORE]["excess"]
    ends = [excess[null]["low"] for null in GATED_NULLS if null in excess]
    return None if None in ends else min(ends)


def gain(arms: Sequence[dict], controls: Sequence[dict]) -> dict:
    """`gain_of` the arms that these sections hold."""
    return gain_of([Arm.of(a) for a in arms], [Arm.of(c) for c in controls])


def gain_of(arms: Sequence[Arm], controls: Sequence[Arm]) -> dict:
    """How much more an arm has than its control: of PRIMARY_SCORE itself, and of its excess over each required null.

    A gain over one null can come from that null's fall. Therefore a gain counts as shown only over each of them.

    Args:
        arms, controls: in pairs; with several pairs, the mean of their gains over the same seeds is taken.

    Returns:
        {"observed": estimate, null: estimate for each required null, "least": the null with the lowest lower end}

    Raises:
        ValueError: an arm and its control have other seeds.
    """
    for arm, control in zip(arms, controls, strict=True):
        if arm.labels != control.labels:
            raise ValueError("two arms of the same seeds, in the same order, expected")

    def estimate(null: str | None) -> Estimate:
        differences = [a.scores(null) - c.scores(null) for a, c in zip(arms, controls, strict=True)]
        return jackknife(np.mean(differences, axis=0))

    over = {null: estimate(null) for null in GATED_NULLS}
    sure = {null: e.estimate if e.low is None else e.low for null, e in over.items()}
    least = min(sure, key=lambda null: sure[null])
    return {"observed": estimate(None).to_json(), **{null: e.to_json() for null, e in over.items()}, "least": least}


def heldout(section: dict, figure: str = "explained_variance") -> Estimate:
    """A held-out figure, over seeds."""
    return mean_over_seeds([m["heldout"][figure] for m in section["members"]])


def drop(section: dict, control: dict) -> Estimate:
    """How much less held-out variance an arm explains than its control, the same seeds in both."""
    figures = [[m["heldout"]["explained_variance"] for m in s["members"]] for s in (control, section)]
    return mean_over_seeds([a - b for a, b in zip(*figures, strict=True)])
