"""Differences between conditions on a benchmark: paired by data set (or story pair), over seeds, with an interval.

Pure functions of a run's results, so that the audit makes every estimate again.
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
"""Its key in results."""
Values = Mapping[str, np.ndarray]
"""identity of an SAE -> its figures, one a data set or story pair."""
R = TypeVar("R", bound=SAERecord)


def saebench(probing: Probing) -> list[dict]:
    """A row a condition: mean AUC at each k; differences at K to each baseline."""
    families, baselines = probing.families, probing.baselines
    probed: list[ProbedRecord | ProbedControl] = [*probing.saes, *probing.controls]
    values = {r.identity: np.array(r.test_auc[K]) for r in probed}
    llm = np.array(baselines["llm"].test_auc["llm"])
    rows = []
    for name, group in by_condition([r for r in probing.saes if r.candidate]).items():
        of = [values[r.identity] for r in group]
        pca = np.array(baselines[pca_name(group[0].facts)].test_auc[K])
        plain = [np.array(baselines[untrained_name(r.facts)].test_auc[K]) for r in group]
        auc = {k: mean([np.array(r.test_auc[k]) for r in group], families) for k in group[0].test_auc}
        delta = {
            "llm": paired(of, [llm] * len(of), families),
            "pca": paired(of, [pca] * len(of), families),
            "untrained": paired(of, plain, families),
            "random_model": against_controls(group, probing.controls, values, families),
            "reference": against_reference(group, probing.saes, values, families),
        }
        rows.append(_row(name, group) | {"auc": auc, "delta": delta})
    return rows


def contrastive(pairs: Contrastive) -> list[dict]:
    """A row a condition: the normalised score, and its differences to each baseline."""
    clusters = pairs.clusters
    scored: list[PairRecord | PairControl] = [*pairs.saes, *pairs.controls]
    references: list[PairRecord | Reference] = [*pairs.saes, *pairs.references]
    values = {r.identity: np.array(r.normalised_of_pairs) for r in scored}
    others = {r.identity: np.array(r.normalised_of_pairs) for r in references}
    both = zip(pairs.saes, pairs.untrained, strict=True)
    plain = {r.identity: np.array(u.normalised_of_pairs) for r, u in both}
    rows = []
    for name, group in by_condition([r for r in pairs.saes if r.candidate]).items():
        of = [values[r.identity] for r in group]
        if pairs.no_reference is not None:
            reference = none(pairs.no_reference)
        else:
            reference = against_reference(group, references, values, clusters, others)
            if reference["estimate"] is None and pairs.summary_refused:
                reference = none(f"{reference['reason']}; {pairs.summary_refused}")
        delta = {
            "untrained": paired(of, [plain[r.identity] for r in group], clusters),
            "random_model": against_controls(group, pairs.controls, values, clusters),
            "reference": reference,
        }
        rows.append(_row(name, group) | {"normalised": mean(of, clusters), "delta": delta})
    return rows


def _row(name: str, group: Sequence[SAERecord]) -> dict:
    seeds, l0 = [r.facts.seed for r in group], [r.facts.l0 for r in group]
    return {"condition": name, "facts": group[0].facts.to_json(), "seeds": seeds, "l0": float(np.mean(l0))}


def by_condition(records: Sequence[R]) -> dict[str, list[R]]:
    """Records that differ in their seed alone, in order of seeds."""
    groups: dict[str, list[R]] = {}
    for r in sorted(records, key=lambda r: (r.facts.seed or 0, r.identity)):
        groups.setdefault(r.condition, []).append(r)
    return dict(sorted(groups.items()))


def mean(figures: list[np.ndarray], clusters: list[str]) -> dict:
    """The estimate of a condition's mean: a row a seed, a column a data set."""
    return mean_over_seeds_and_sets(np.array(figures), clusters).to_json()


def paired(of: list[np.ndarray], against: list[np.ndarray], clusters: list[str]) -> dict:
    """The estimate of a mean difference. Pairs replicates by position, up to the shorter list: seeds of two
    architectures are labels, therefore any pairing is as good as another."""
    return mean([a - b for a, b in zip(of, against, strict=False)], clusters)


def none(reason: str) -> dict:
    """No difference, and why."""
    return {"estimate": None, "low": None, "high": None, "reason": reason}


def against_reference(
    group: Sequence[SAERecord],
    references: Sequence[SAERecord | Reference],
    values: Values,
    clusters: list[str],
    other_values: Values | None = None,
) -> dict:
    """The difference to the matched reference condition; none, with the reason, where nothing matches.

    Args:
        group: records of one condition; references: records of any.
        values: figures of the group; other_values: of the references, where these are kept apart.
    """
    match = matched(group, references)
    if match.reason is not None:
        return none(match.reason)
    others = values if other_values is None else other_values
    of = [values[r.identity] for r in group]
    against = [others[r.identity] for r in match.records]
    about = {"reference": match.records[0].condition, "reference_mean": float(np.mean(against))}
    return paired(of, against, clusters) | about


def against_controls(
    group: Sequence[SAERecord], controls: Sequence[SAERecord], values: Values, clusters: list[str]
) -> dict:
    """The difference to SAEs of the random-weights model of the same family, width, tokens and settings whose L0 lies
    within 10 %; none, with the reason, where there are none."""
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
                of = [values[a.identity] for a, _ in pairs]
                estimate = paired(of, [values[b.identity] for _, b in pairs], clusters)
                return estimate | {"reference": condition[0].condition}
            reason = "L0 differs by more than 10 %"
    return none(reason)
