"""Comparison partners of an SAE: controls of its size, and matched references.

A delta needs a reference of the same subject, hook, width, L0 (within 10 %), token budget and rows, trained with the
same settings. Without such a reference the reason is recorded instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from husai.evidence.schemas import Facts, Reference, SAERecord

L0_TOLERANCE = 0.1
ALIKE = ("subject_digest", "hook_name", "d_sae", "tokens", "store_digest", "training")


def same_l0(a: float, b: float, tolerance: float = L0_TOLERANCE) -> bool:
    """True if the larger L0 exceeds the smaller one by at most this share."""
    return max(a, b) <= (1 + tolerance) * min(a, b)


def untrained_like(facts: Facts) -> tuple[int, int, int]:
    """(d_sae, k, seed) of the untrained SAE for comparison: the SAE's width, and its k, or its L0 if that misses k."""
    k = facts.k if facts.k and same_l0(facts.k, facts.known_l0) else max(1, round(facts.known_l0))
    return facts.d_sae, k, facts.seed or 0


def untrained_name(facts: Facts) -> str:
    return "untrained_d{}_k{}_seed{}".format(*untrained_like(facts))


def pca_name(facts: Facts) -> str:
    return f"pca_{min(facts.d_sae, facts.d_in)}"


def reference_family(family: str) -> str:
    """Architecture of an SAE's reference: ReLU with an L1 penalty, and TopK for a ReLU SAE."""
    return "topk" if family in ("relu", "standard") else "relu"


def unmatched(candidate: Facts, reference: Facts) -> str | None:
    """Reason why a reference does not match a candidate; None if it matches."""
    for name in ALIKE:
        values = [getattr(facts, name) for facts in (candidate, reference)]
        if None in values:
            return f"{name} of the {'candidate' if values[0] is None else 'reference'} is not known"
        if values[0] != values[1]:
            return f"{name} differs: {_short(values[0])} and {_short(values[1])}"
    if not (candidate.l0 and reference.l0 and same_l0(candidate.l0, reference.l0)):
        return f"L0 differs by more than 10 %: {_short(candidate.l0)} and {_short(reference.l0)}"
    return None


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


R = TypeVar("R", bound=SAERecord | Reference)


@dataclass(frozen=True)
class Match(Generic[R]):
    """Records of a reference condition, or the reason why none matches."""

    records: list[R]
    reason: str | None = None


def matched(candidates: Sequence[SAERecord], references: Sequence[R]) -> Match[R]:
    """Reference condition that matches a candidate's condition. If several match, the nearest in L0.

    Args:
        candidates: records of one condition. references: records of any conditions. They are paired in order of seeds,
            and the facts of each pair must match.
    """
    family = reference_family(candidates[0].facts.family)
    groups: dict[str, list[R]] = {}
    for r in references:
        if r.facts.family in ((family, "standard") if family == "relu" else (family,)):
            groups.setdefault(r.condition, []).append(r)
    if not groups:
        return Match([], f"no {family} reference whose facts are known is available")
    fitting: list[tuple[float, str, list[R]]] = []
    reasons: list[str] = []
    for name in sorted(groups):
        pairs = list(zip(candidates, sorted(groups[name], key=lambda r: r.facts.seed or 0), strict=False))
        reason = next((why for c, r in pairs if (why := unmatched(c.facts, r.facts))), None)
        if reason is not None:
            reasons.append(reason)
        else:
            distance = abs(sum(c.facts.known_l0 - r.facts.known_l0 for c, r in pairs))
            fitting.append((distance / len(pairs), name, [r for _, r in pairs]))
    if fitting:
        return Match(min(fitting, key=lambda each: each[:2])[2])
    return Match([], max(reasons, key=lambda why: why.startswith("L0")))  # the reference that came nearest
