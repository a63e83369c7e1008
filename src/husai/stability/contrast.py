"""One arm of SAEs against another: what is compared, and with which interval. Both arms have the same seeds.

An arm is a section of results as `study.score_trained` gives it.
"""

from __future__ import annotations

import numpy as np

from husai.stability.compare import GATED_NULLS, PRIMARY_SCORE
from husai.stability.inference import Estimate, jackknife, mean_over_seeds


def excess_matrix(section: dict) -> np.ndarray:
    """`[S, S]`: PRIMARY_SCORE of each pair, less that of the section's highest required null."""
    labels = section["stability"]["labels"]
    null = section["stability"]["verdict"]["highest_null"]
    matrix = np.zeros((len(labels), len(labels)))
    for pair in section["pairs"]:
        i, j = labels.index(pair["a"]), labels.index(pair["b"])
        matrix[i, j] = matrix[j, i] = pair["observed"][PRIMARY_SCORE] - pair[null][PRIMARY_SCORE]
    return matrix


def lower_bound(section: dict) -> float | None:
    """The least lower end of the intervals of the excess of PRIMARY_SCORE over the required nulls: what is sure."""
    excess = section["stability"]["scores"][PRIMARY_SCORE]["excess"]
    ends = [excess[null]["low"] for null in GATED_NULLS if null in excess]
    return None if None in ends else min(ends)


def gain_matrix(section: dict, control: dict) -> np.ndarray:
    """`[S, S]`: how much more claimable excess each pair has in an arm than in its control.

    Raises:
        ValueError: the arms have other seeds.
    """
    if section["stability"]["labels"] != control["stability"]["labels"]:
        raise ValueError("two arms of the same seeds, in the same order, expected")
    return excess_matrix(section) - excess_matrix(control)


def gain(section: dict, control: dict) -> Estimate:
    """How much more claimable excess an arm has than its control, the same seeds in both: pairs are matched."""
    return jackknife(gain_matrix(section, control))


def mean_gain(matrices: list[np.ndarray]) -> Estimate:
    """The mean of several arms' gains over the same seeds, such as one arm a reference."""
    return jackknife(np.mean(matrices, axis=0))


def heldout(section: dict, figure: str = "explained_variance") -> Estimate:
    """A held-out figure, over seeds."""
    return mean_over_seeds([m["heldout"][figure] for m in section["members"]])


def drop(section: dict, control: dict) -> Estimate:
    """How much less held-out variance an arm explains than its control, the same seeds in both."""
    figures = [[m["heldout"]["explained_variance"] for m in s["members"]] for s in (control, section)]
    return mean_over_seeds([a - b for a, b in zip(*figures, strict=True)])
