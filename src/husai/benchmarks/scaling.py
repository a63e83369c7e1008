"""What an axis of a study does: contrasts paired by seed, and power laws. Pure functions of conditions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from husai.benchmarks.deltas import none
from husai.stability import contrast
from husai.stability.inference import mean_over_seeds

AXES = ("budget", "layer", "d_sae", "k", "family")
FIGURES = ("explained_variance", "ce_loss_score", "saebench", "cebench")
"""Of a condition, with a value a seed."""
POINTS = 4
"""That a power law is fitted to, at least."""


def contrasts(rows: list[dict], sections: list[dict]) -> list[dict]:
    """Of each axis with several values, each step from one to the next: the change of each figure, the same seeds and
    the same other settings on both sides, averaged over these settings within a seed; then over seeds.

    Args:
        rows: conditions (`bank.conditions`, with `layer`); sections: their stability studies, in the same order.

    Returns:
        [{"axis", "from", "to", "settings": how many were averaged, figure: estimate, "stability": the gain of
        `contrast.gain`}]
    """
    found = []
    for axis in AXES:
        values = sorted({r[axis] for r in rows})
        for low, high in pairwise(values):
            matched = _matched(rows, axis, low, high)
            if not matched:
                continue
            entry = {"axis": axis, "from": low, "to": high, "settings": len(matched)}
            for name in FIGURES:
                pairs = [(rows[i][name], rows[j][name]) for i, j in matched]
                entry[name] = none("not run")
                if all(a and b for a, b in pairs):
                    steps = [np.array(b["of_seeds"]) - np.array(a["of_seeds"]) for a, b in pairs]
                    entry[name] = mean_over_seeds(np.mean(steps, axis=0)).to_json()
            entry["stability"] = contrast.gain([sections[j] for _, j in matched], [sections[i] for i, _ in matched])
            found.append(entry)
    return found


def _matched(rows: list[dict], axis: str, low, high) -> list[tuple[int, int]]:
    """Positions of conditions that differ in this axis alone, with the same seeds."""
    at = {tuple(r[a] for a in AXES): i for i, r in enumerate(rows)}
    pairs = []
    for i, r in enumerate(rows):
        if r[axis] != low:
            continue
        partner = at.get(tuple(high if a == axis else r[a] for a in AXES))
        if partner is not None and rows[partner]["seeds"] == r["seeds"]:
            pairs.append((i, partner))
    return pairs


def power_laws(rows: list[dict]) -> list[dict]:
    """1 − explained variance against each numeric axis that has POINTS values or more: the exponent of each seed's
    least-squares line in logarithms, over the settings that have all values, then over seeds.

    Returns:
        [{"axis", "figure", "values", "settings", "exponent": estimate}]
    """
    found = []
    for axis in ("budget", "d_sae", "k"):
        values = sorted({r[axis] for r in rows})
        if len(values) < POINTS:
            continue
        lines: dict[tuple, dict] = {}
        for r in rows:
            lines.setdefault(tuple(r[a] for a in AXES if a != axis), {})[r[axis]] = r
        whole = [of for of in lines.values() if len(of) == len(values)]
        whole = [of for of in whole if len({tuple(r["seeds"]) for r in of.values()}) == 1]
        if not whole:
            continue
        x = np.log(values)
        slopes = []
        for of in whole:
            y = np.log([1 - np.array(of[v]["explained_variance"]["of_seeds"]) for v in values])  # [values, seeds]
            slopes.append(np.polyfit(x, y, 1)[0])
        exponent = mean_over_seeds(np.mean(slopes, axis=0)).to_json()
        about = {"axis": axis, "figure": "1 - explained_variance", "values": values, "settings": len(whole)}
        found.append(about | {"exponent": exponent})
    return found
