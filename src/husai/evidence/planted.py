"""Conclusions from the figures of the positive control, and the inputs of phase 4a. Pure functions of its results."""

from __future__ import annotations

from collections.abc import Sequence

from husai.evidence import rules
from husai.evidence.estimates import mean_over_seeds
from husai.evidence.schemas import (
    Interval,
    Phase4a,
    Phase4aSection,
    Phase4aSupplied,
    PlantedDegree,
    PlantedSection,
    Sensitivity,
)
from husai.runs.errors import BadInput


def sensitivity(degrees: Sequence[PlantedDegree]) -> list[Sensitivity]:
    """Verdict of the rule of stability at each degree of recovery."""
    return [_at(degree) for degree in degrees]


def _at(degree: PlantedDegree) -> Sensitivity:
    try:
        shown = rules.checked(lambda: rules.stability(degree.study))
        (over, worst), failing = shown.worst(), shown.failing()
        excess, passes = Interval.of(worst), not failing
        reason = (shown.rule.failed if failing else shown.rule.passed).format(
            which=", ".join(failing), threshold=f"{shown.threshold:g}"
        )
    except (rules.Missing, BadInput) as missing:
        over, excess, passes, reason = None, None, False, f"{rules.MISSING}: {missing}"
    recovered = Interval.of(mean_over_seeds(degree.recovery))
    return Sensitivity(tokens=degree.tokens, recovery=recovered, over=over, excess=excess, passes=passes, reason=reason)


def turns_at(degrees: Sequence[Sensitivity]) -> tuple[float, float] | None:
    """(largest recovery that fails, smallest recovery from which on all pass); None if the verdict never changes."""
    ordered = sorted(degrees, key=lambda s: s.recovery.estimate)
    failing = [i for i, s in enumerate(ordered) if not s.passes]
    if not failing or failing[-1] == len(ordered) - 1:
        return None
    last = failing[-1]
    return ordered[last].recovery.estimate, ordered[last + 1].recovery.estimate


def decisions(phase: Phase4a) -> dict:
    """Conclusions of phase 4a: place in the results -> value."""
    if phase.planted is None:
        return {}
    return {"/planted/sensitivity": sensitivity(phase.planted.degrees)}


def inputs(husai: Phase4aSection | Phase4aSupplied, planted: PlantedSection | None) -> dict[str, str]:
    """The inputs of phase 4a: label -> sha256."""
    inputs_of_phase = {"subject": husai.subject_digest, "activation store": husai.store_digest}
    inputs_of_phase |= {f"checkpoint {m.label}": m.checkpoint_sha256 for m in husai.members} | husai.control_inputs
    for degree in planted.degrees if planted else []:
        study = degree.study
        study_inputs = {f"checkpoint {m.label}": m.checkpoint_sha256 for m in study.members} | study.control_inputs
        inputs_of_phase |= {"planted rows": study.store_digest}
        inputs_of_phase |= {
            f"planted, {degree.tokens} tokens: {label}": sha256 for label, sha256 in study_inputs.items()
        }
    return inputs_of_phase
