"""Conclusions from the figures of SAEs and of dictionaries of prototypes."""

from __future__ import annotations

from husai.evidence import rules
from husai.evidence.estimates import Estimate
from husai.evidence.schemas import Code, CodeGain, Interval


def concluded(code: Code) -> Code:
    """The same record with the SAEs' gain over each kind of prototypes."""
    gains = rules.gain_over_prototypes(code)

    def of_kind(explained_variance: Estimate, ce_recovered: Estimate | None = None) -> CodeGain:
        spliced = None if ce_recovered is None else Interval.of(ce_recovered)
        return CodeGain(explained_variance=Interval.of(explained_variance), ce_recovered=spliced)

    gain = {kind: of_kind(**gains[kind]) for kind in gains}
    return code.model_copy(update={"gain": gain})
