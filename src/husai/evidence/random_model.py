"""Conclusions from the figures of the random-model stress test. Pure functions of its results."""

from __future__ import annotations

from husai.evidence import contrast, rules
from husai.evidence.names import GATED_NULLS
from husai.evidence.schemas import Control, OwnSection, RandomModelStress, seed_names


def decisions(stress: RandomModelStress) -> dict:
    """The verdict, the gain, and the SAEs that they are about: place in the results -> value."""
    members = stress.section.members
    shas = dict(zip(seed_names([m.seed for m in members]), (m.checkpoint_sha256 for m in members), strict=True))
    again = {"/verdict": verdict(stress.section, stress.random_model), "/candidate/checkpoints": shas}
    return again | {"/gain": gain(stress.section, stress.random_model)}


def verdict(section: OwnSection, control: Control) -> dict[str, str]:
    """The outcome of the rule for the candidate's section and its control."""
    return rules.verdict(lambda: rules.random_model(section, control))


def gain(section: OwnSection, control: Control) -> dict | None:
    """How much further the candidate lies above its nulls than SAEs of the random-weights subject above theirs; None
    where a required null is missing. It is only reported: activations of a lower rank give a higher `mcc_alive`,
    whatever the features mean."""
    if any(null in s.stability.missing_nulls for s in (section, control) for null in GATED_NULLS):
        return None
    return contrast.gain_of([section.arm], [control.arm])
