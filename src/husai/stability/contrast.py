"""One arm of SAEs against another, and what is decided by it. Both arms have the same seeds; their pairs are matched.

An arm is a section of results as `study.score_trained` gives it. Decisions are pure functions of sections, so that the
audit can make them again from the evidence.
"""

from __future__ import annotations

import numpy as np

from husai.stability.compare import GATED_NULLS, MINIMUM_SEEDS, PRIMARY_SCORE
from husai.stability.inference import Estimate, jackknife, mean_over_seeds

MOVED_AT_MOST = 0.02
"""Of mcc between the last two snapshots: beyond, training is too short to judge by."""


def score_matrix(section: dict, null: str | None = None) -> np.ndarray:
    """`[S, S]`: PRIMARY_SCORE of each pair, less that of a null where one is named."""
    labels = section["stability"]["labels"]
    matrix = np.zeros((len(labels), len(labels)))
    for pair in section["pairs"]:
        i, j = labels.index(pair["a"]), labels.index(pair["b"])
        below = pair[null][PRIMARY_SCORE] if null else 0.0
        matrix[i, j] = matrix[j, i] = pair["observed"][PRIMARY_SCORE] - below
    return matrix


def lower_bound(section: dict) -> float | None:
    """The least lower end of the intervals of the excess of PRIMARY_SCORE over the required nulls: what is sure."""
    excess = section["stability"]["scores"][PRIMARY_SCORE]["excess"]
    ends = [excess[null]["low"] for null in GATED_NULLS if null in excess]
    return None if None in ends else min(ends)


def gain(arms: list[dict], controls: list[dict]) -> dict:
    """How much more an arm has than its control: of PRIMARY_SCORE itself, and of its excess over each required null.

    A gain over a null alone can come of the null's fall; so a gain counts as shown only if it is over each of them.

    Args:
        arms, controls: sections in pairs; with several, the mean of their gains over the same seeds is taken.

    Returns:
        {"observed": estimate, null: estimate for each required null, "least": the null with the lowest lower end}

    Raises:
        ValueError: an arm and its control have other seeds.
    """
    for arm, control in zip(arms, controls, strict=True):
        if arm["stability"]["labels"] != control["stability"]["labels"]:
            raise ValueError("two arms of the same seeds, in the same order, expected")

    def estimate(null: str | None) -> Estimate:
        differences = [score_matrix(a, null) - score_matrix(c, null) for a, c in zip(arms, controls, strict=True)]
        return jackknife(np.mean(differences, axis=0))

    over = {null: estimate(null) for null in GATED_NULLS}
    least = min(over, key=lambda null: over[null].estimate if over[null].low is None else over[null].low)
    return {"observed": estimate(None).to_json(), **{null: e.to_json() for null, e in over.items()}, "least": least}


def heldout(section: dict, figure: str = "explained_variance") -> Estimate:
    """A held-out figure, over seeds."""
    return mean_over_seeds([m["heldout"][figure] for m in section["members"]])


def drop(section: dict, control: dict) -> Estimate:
    """How much less held-out variance an arm explains than its control, the same seeds in both."""
    figures = [[m["heldout"]["explained_variance"] for m in s["members"]] for s in (control, section)]
    return mean_over_seeds([a - b for a, b in zip(*figures, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Decisions (docs/methods.md, Rules)


def at_rest(moved: dict) -> bool | None:
    """Whether the interval of a change lies within ±MOVED_AT_MOST; None without an interval."""
    return None if moved["low"] is None else moved["low"] >= -MOVED_AT_MOST and moved["high"] <= MOVED_AT_MOST


def verdict(found: dict, seeds: int) -> str:
    """What a gain shows: `better`, `worse`, `not shown to differ`, or `inconclusive` with too few seeds."""
    if seeds < MINIMUM_SEEDS or found["observed"]["low"] is None:
        return "inconclusive"
    if all(found[null]["low"] > 0 for null in GATED_NULLS):
        return "better"
    return "worse" if all(found[null]["high"] < 0 for null in GATED_NULLS) else "not shown to differ"


def choose_k(candidates: list[dict], floor: float) -> int | None:
    """Of sections with `k`: that with the largest `lower_bound`, of those whose held-out explained variance is surely
    at least `floor`; ties go to the sparser. None where there is none."""
    allowed = [s for s in candidates if heldout(s).low is not None and heldout(s).low >= floor]
    return max(allowed, key=lambda s: (lower_bound(s), -s["k"]))["k"] if allowed else None


def choose_weight(arms: list[dict], max_drop: float) -> float | None:
    """Of arms with `lambda`, `gain` and `ev_drop`: that with the largest lower end of its least gain, of those that
    surely lose at most `max_drop` of the explained variance. None where there is none."""
    kept = [a for a in arms if a["ev_drop"]["high"] is not None and a["ev_drop"]["high"] <= max_drop]
    return max(kept, key=lambda a: a["gain"][a["gain"]["least"]]["low"])["lambda"] if kept else None


def acceptance(weight: float | None, found: dict | None, lost: dict | None, seeds: int, max_drop: float) -> dict:
    """Whether a pull of this weight is accepted, by its gain and the explained variance it lost on fresh seeds."""
    rule = f"gain over each required null > 0 and EV lost <= {max_drop}, surely; own references, fresh seeds"
    if weight is None:
        failed = [f"no λ keeps the explained variance lost surely at most {max_drop}"]
    else:
        failed = [f"{seeds} seeds; {MINIMUM_SEEDS} needed"] if seeds < MINIMUM_SEEDS else []
        if not all(found[null]["low"] is not None and found[null]["low"] > 0 for null in GATED_NULLS):
            failed.append("the gain is not shown to be above 0")
        if lost["high"] is None or lost["high"] > max_drop:
            failed.append("the explained variance is not shown to be kept")
    outcome = "not accepted" if failed else "accepted"
    reason = "; ".join(failed) or "all hold"
    return {"accepted": not failed, "outcome": outcome, "rule": rule, "lambda": weight, "reason": reason}
