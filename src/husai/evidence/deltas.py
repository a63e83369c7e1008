"""Deltas between conditions on a benchmark, paired by data set or story pair, over seeds, with an interval.

Pure functions of a run's results, because the audit computes every estimate again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from husai.evidence import levels
from husai.evidence.estimates import mean_over_seeds_and_sets
from husai.evidence.references import matched, pca_name, same_l0, untrained_name
from husai.evidence.schemas import (
    Contrastive,
    PairControl,
    PairRecord,
    ProbedControl,
    ProbedRecord,
    Probing,
    Reference,
    SAERecord,
)

K = str(levels.K)
"""Key of `levels.K` in results."""
Values = Mapping[str, np.ndarray]
"""Identity of an SAE -> its figures, one for each data set or story pair."""
R = TypeVar("R", bound=SAERecord)


def saebench(probing: Probing) -> list[dict]:
    """One row for each condition: mean AUC at each k, and the delta at K to each baseline."""
    families, baselines = probing.families, probing.baselines
    probed: list[ProbedRecord | ProbedControl] = [*probing.saes, *probing.controls]
    values = {r.identity: np.array(r.test_auc[K]) for r in probed}
    llm = np.array(baselines["llm"].test_auc["llm"])
    rows = []
    for name, group in by_condition([r for r in probing.saes if r.candidate]).items():
        candidate_values = [values[r.identity] for r in group]
        pca = np.array(baselines[pca_name(group[0].facts)].test_auc[K])
        untrained_values = [np.array(baselines[untrained_name(r.facts)].test_auc[K]) for r in group]
        auc = {k: mean([np.array(r.test_auc[k]) for r in group], families) for k in group[0].test_auc}
        delta = {
            "llm": paired(candidate_values, [llm] * len(candidate_values), families),
            "pca": paired(candidate_values, [pca] * len(candidate_values), families),
            "untrained": paired(candidate_values, untrained_values, families),
            "random_model": against_controls(group, probing.controls, values, families),
            "reference": against_reference(group, probing.saes, values, families),
        }
        rows.append(_row(name, group) | {"auc": auc, "delta": delta})
    return rows


def contrastive(pairs: Contrastive) -> list[dict]:
    """One row for each condition: the normalised score, and its delta to each baseline."""
    clusters = pairs.clusters
    scored: list[PairRecord | PairControl] = [*pairs.saes, *pairs.controls]
    references: list[PairRecord | Reference] = [*pairs.saes, *pairs.references]
    values = {r.identity: np.array(r.normalised_of_pairs) for r in scored}
    others = {r.identity: np.array(r.normalised_of_pairs) for r in references}
    records_and_untrained = zip(pairs.saes, pairs.untrained, strict=True)
    untrained_values = {r.identity: np.array(u.normalised_of_pairs) for r, u in records_and_untrained}
    rows = []
    for name, group in by_condition([r for r in pairs.saes if r.candidate]).items():
        candidate_values = [values[r.identity] for r in group]
        if pairs.no_reference is not None:
            reference = none(pairs.no_reference)
        else:
            reference = against_reference(group, references, values, clusters, others)
            if reference["estimate"] is None and pairs.summary_refused:
                reference = none(f"{reference['reason']}; {pairs.summary_refused}")
        delta = {
            "untrained": paired(candidate_values, [untrained_values[r.identity] for r in group], clusters),
            "random_model": against_controls(group, pairs.controls, values, clusters),
            "reference": reference,
        }
        rows.append(_row(name, group) | {"normalised": mean(candidate_values, clusters), "delta": delta})
    return rows


def _row(name: str, group: Sequence[SAERecord]) -> dict:
    seeds, l0 = [r.facts.seed for r in group], [r.facts.l0 for r in group]
    return {"condition": name, "facts": group[0].facts.to_json(), "seeds": seeds, "l0": float(np.mean(l0))}


def by_condition(records: Sequence[R]) -> dict[str, list[R]]:
    """Condition -> its records, which differ in their seed alone, in order of seeds."""
    groups: dict[str, list[R]] = {}
    for r in sorted(records, key=lambda r: (r.facts.seed or 0, r.identity)):
        groups.setdefault(r.condition, []).append(r)
    return dict(sorted(groups.items()))


def mean(figures: list[np.ndarray], clusters: list[str]) -> dict:
    """Estimate of a condition's mean. `figures` holds one array `[data sets]` for each seed."""
    return mean_over_seeds_and_sets(np.array(figures), clusters).to_json()


def paired(figures: list[np.ndarray], against: list[np.ndarray], clusters: list[str]) -> dict:
    """Estimate of a mean difference. Replicates are paired by position, up to the length of the shorter list.

    Seeds of two architectures are mere labels, therefore every pairing is equally valid.
    """
    return mean([a - b for a, b in zip(figures, against, strict=False)], clusters)


def none(reason: str) -> dict:
    """An absent delta, with the reason."""
    return {"estimate": None, "low": None, "high": None, "reason": reason}


def against_reference(
    group: Sequence[SAERecord],
    references: Sequence[SAERecord | Reference],
    values: Values,
    clusters: list[str],
    other_values: Values | None = None,
) -> dict:
    """Delta to the matched reference condition; an absent delta if nothing matches.

    Args:
        group: records of one condition. references: records of any conditions.
        values: figures of the group. other_values: figures of the references; None: they are in `values`.
    """
    match = matched(group, references)
    if match.reason is not None:
        return none(match.reason)
    others = values if other_values is None else other_values
    figures = [values[r.identity] for r in group]
    against = [others[r.identity] for r in match.records]
    reference_facts = {"reference": match.records[0].condition, "reference_mean": float(np.mean(against))}
    return paired(figures, against, clusters) | reference_facts


def against_controls(
    group: Sequence[SAERecord], controls: Sequence[SAERecord], values: Values, clusters: list[str]
) -> dict:
    """Delta to SAEs of the random-weights model; an absent delta if no such SAEs match.

    Architecture, width, tokens and settings must be equal, and L0 within 10 %.
    """
    if not controls:
        return none("no checkpoint was given (--random-model-checkpoint)")
    first, reason = group[0].facts, ""
    for condition in by_condition(controls).values():
        for name in ("family", "d_sae", "tokens", "training"):
            if getattr(condition[0].facts, name) != getattr(first, name):
                reason = reason or f"none was trained alike: {name} differs"
                break
        else:
            pairs = list(zip(group, condition, strict=False))
            if all(same_l0(a.facts.known_l0, b.facts.known_l0) for a, b in pairs):
                figures = [values[a.identity] for a, _ in pairs]
                estimate = paired(figures, [values[b.identity] for _, b in pairs], clusters)
                return estimate | {"reference": condition[0].condition}
            reason = "L0 differs by more than 10 %"
    return none(reason)
