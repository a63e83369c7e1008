"""Differences between conditions on a benchmark: paired by data set (or story pair), over seeds, with an interval."""

from __future__ import annotations

import numpy as np

from husai.benchmarks import baselines
from husai.stability.inference import mean_over_seeds_and_sets

Values = dict[str, np.ndarray]
"""sha256 of a checkpoint -> its figures, one a data set or story pair."""


def by_condition(records: list[dict]) -> dict[str, list[dict]]:
    """Records that differ in their seed alone, in order of seeds."""
    groups: dict[str, list[dict]] = {}
    for r in sorted(records, key=lambda r: (r["facts"]["seed"] or 0, r["checkpoint_sha256"])):
        groups.setdefault(r["condition"], []).append(r)
    return dict(sorted(groups.items()))


def mean(figures: list[np.ndarray], clusters: list[str]) -> dict:
    """The estimate of a condition's mean: a row a seed, a column a data set."""
    return mean_over_seeds_and_sets(np.array(figures), clusters).to_json()


def paired(of: list[np.ndarray], against: list[np.ndarray], clusters: list[str]) -> dict:
    """The estimate of a mean difference. A single `against` serves all seeds; else the first is paired with the first,
    as far as both go (seeds of two families are labels, so that any pairing is as good)."""
    if len(against) == 1:
        against = against * len(of)
    return mean([a - b for a, b in zip(of, against, strict=False)], clusters)


def none(reason: str) -> dict:
    """No difference, and why."""
    return {"estimate": None, "low": None, "high": None, "reason": reason}


def against_reference(
    group: list[dict], references: list[dict], values: Values, clusters: list[str], other_values: Values | None = None
) -> dict:
    """The difference to the matched reference condition; none, with the reason, where nothing matches.

    Args:
        group: records of one condition; references: records of any.
        values: figures of the group; other_values: of the references, where these are kept apart.
    """
    match = baselines.matched(group, references)
    if match.reason is not None:
        return none(match.reason)
    others = values if other_values is None else other_values
    of = [values[r["checkpoint_sha256"]] for r in group]
    against = [others[r["checkpoint_sha256"]] for r in match.records]
    about = {"reference": match.records[0]["condition"], "reference_mean": float(np.mean(against))}
    return paired(of, against, clusters) | about


def against_controls(group: list[dict], controls: list[dict], values: Values, clusters: list[str]) -> dict:
    """The difference to SAEs of the random-weights model of the same width, k, tokens and settings, of the same family
    where there are such; none, with the reason, where there are none."""
    first = group[0]["facts"]
    alike = ("d_sae", "k", "tokens", "training")
    fitting = [c for c in controls if all(c["facts"][name] == first[name] for name in alike)]
    if not fitting:
        why = "none has this one's width, k, tokens and training settings" if controls else "no checkpoint was given"
        return none(f"{why} (--random-model-checkpoint)")
    conditions = by_condition(fitting)
    same = [name for name, of in conditions.items() if of[0]["facts"]["family"] == first["family"]]
    chosen = conditions[(same or sorted(conditions))[0]]
    of = [values[r["checkpoint_sha256"]] for r in group]
    estimate = paired(of, [values[r["checkpoint_sha256"]] for r in chosen], clusters)
    return estimate | {"reference": chosen[0]["condition"]}
