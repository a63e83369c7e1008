"""Estimates and verdict over all seeds, from scores of pairs of dictionaries and of their nulls. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np

from husai.evidence import rules
from husai.evidence.estimates import Estimate, jackknife, tost
from husai.evidence.names import ASKED_FOR_NULLS, GAP, GATED_NULLS, OTHERS, PRIMARY_SCORE, SCORES
from husai.evidence.schemas import Interval, ScoreSummary, Spread, Stability, StabilityVerdict


def computed(pairs: dict[tuple[int, int], dict], missing: dict[str, str]) -> list[str]:
    """Nulls that the pairs hold, in the order of the report."""
    asked_for = [n for n in ASKED_FOR_NULLS if all(n in value for value in pairs.values())]
    return [n for n in (*GATED_NULLS, *asked_for) if n not in missing]


def summarise(labels: Sequence[str], pairs: dict[tuple[int, int], dict], missing: dict[str, str]) -> Stability:
    """Estimates over all seeds: observed scores, each null, and the excess over each null, with intervals.

    Args:
        labels: one for each dictionary.
        pairs: results of `stability.compare.pair` for each i < j. Nulls may include "untrained" and "random_model".
        missing: null -> why it is missing.
    """
    seeds = len(labels)

    def matrix(name: str, s: str) -> np.ndarray:
        m = np.zeros((seeds, seeds))
        for (i, j), value in pairs.items():
            m[i, j] = m[j, i] = value[name]["mean"][s]
        return m

    present = computed(pairs, missing)
    scored = [s for s in (*SCORES, *OTHERS) if all(s in value["observed"]["mean"] for value in pairs.values())]
    scores = {}
    for name in scored:
        observed, nulls = matrix("observed", name), {null: matrix(null, name) for null in present}
        scores[name] = ScoreSummary(
            observed=Interval.of(jackknife(observed)),
            nulls={null: _spread(pairs, null, name, jackknife(m).estimate) for null, m in nulls.items()},
            excess={null: Interval.of(jackknife(observed - m)) for null, m in nulls.items()},
        )
    primary = scores[PRIMARY_SCORE]
    gated = [n for n in GATED_NULLS if n in present]
    highest = max(gated, key=lambda n: primary.nulls[n].mean)
    return Stability(
        labels=list(labels),
        scores=scores,
        mcc_gap_bound=max(value[name]["mean"][GAP] for value in pairs.values() for name in ("observed", *present)),
        missing_nulls=missing,
        verdict=_verdict(seeds, scores, highest, missing),
    )


def _spread(pairs: dict, null: str, score: str, mean: float) -> Spread:
    """Spread over draws of a null's mean over pairs."""
    values = [value[null]["draws"] for value in pairs.values()]
    if values[0] is None:
        return Spread(mean=mean, draws=0, q95_of_mean=None)
    of_draws = np.mean([v[score] for v in values], 0)
    return Spread(mean=mean, draws=len(of_draws), q95_of_mean=float(np.quantile(of_draws, 0.95)))


def _verdict(seeds: int, scores: dict[str, ScoreSummary], highest: str, missing: dict[str, str]) -> StabilityVerdict:
    """Verdict of the rule of stability. If it passes, the excess over the highest control may be claimed.

    If that excess does not exceed the registered minimum, an equivalence test shows whether it is within
    EQUIVALENCE_MARGIN of 0.
    """
    excesses = {name: scores[s].excess[null] for name, (s, null) in rules.STABLE.items() if _has(scores, s, null)}
    met = [name for name, excess in excesses.items() if rules.STABILITY.met_by(excess)]
    failed = [name for name in excesses if name not in met]
    absent = [n for n in GATED_NULLS if n in missing]
    absent += [] if len(excesses) == len(rules.STABLE) or absent else ["features without prototypes"]
    outcome: Literal["PASS", "FAIL", "MISSING"]
    facts = {"threshold": f"{rules.STABILITY.threshold:g}", "which": ", ".join(failed)}
    if seeds < rules.MINIMUM_SEEDS:
        outcome, reason, met = rules.MISSING, f"{seeds} seeds; a verdict needs {rules.MINIMUM_SEEDS}", []
    elif failed:
        outcome, reason = rules.FAIL, rules.STABILITY.failed.format(**facts)
    elif absent:
        outcome, reason = rules.MISSING, "not compared with: " + ", ".join(absent)
    else:
        outcome, reason = rules.PASS, rules.STABILITY.passed.format(**facts)
    claimable = scores[PRIMARY_SCORE].excess[highest]
    equivalence = None
    if outcome == rules.FAIL and not rules.STABILITY.met_by(claimable):
        margin = rules.EQUIVALENCE_MARGIN
        equivalence = asdict(tost(Estimate(**dict(claimable)), margin))
        p = f"(TOST, p = {equivalence['p_value']:.3g})"
        within, nor = f"within ±{margin} of the highest control", f"nor is it shown to lie within ±{margin} of it"
        reason += f"; {within if equivalence['equivalent'] else nor} {p}"
    return StabilityVerdict(
        score=PRIMARY_SCORE,
        outcome=outcome,
        reason=reason,
        sentence=rules.sentence(met),
        highest_null=highest,
        claimable_excess=claimable,
        equivalence=equivalence,
    )


def _has(scores: dict[str, ScoreSummary], score: str, null: str) -> bool:
    return score in scores and null in scores[score].excess
