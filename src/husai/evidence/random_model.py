"""Conclusions from the figures of the random-model stress test. Pure functions of its results."""

from __future__ import annotations

from husai.evidence import contrast, rules
from husai.evidence.names import GATED_NULLS
from husai.evidence.schemas import Alike, Control, Gain, OwnSection, RandomModelStress


def decisions(stress: RandomModelStress) -> dict:
    """The verdict, the gain, and the SAEs that they are about: place in the results -> value."""
    section, control = stress.section, stress.random_model
    again = {"/verdict": verdict(section, control), "/candidate/checkpoints": section.checkpoints}
    return again | {"/gain": gain(section, control)}


def inputs(store_digest: str, random_model: Alike, shuffled: Alike | None) -> dict[str, str]:
    """The inputs of the test beside the candidate: label -> sha256.

    Args:
        store_digest: of the activations that the candidate's own study is on.
    """
    named = {"activation store": store_digest}
    for name, arm in (("random_model", random_model), ("shuffled", shuffled)):
        if arm is not None:
            named |= {f"{name}: subject": arm.subject_digest, f"{name}: activations": arm.store_digest}
            named |= {f"{name}: checkpoint {i}": m.checkpoint_sha256 for i, m in enumerate(arm.members, 1)}
    return named


def verdict(section: OwnSection, control: Control) -> dict[str, str]:
    """The outcome of the rule for the candidate's section and its control."""
    return rules.verdict(lambda: rules.random_model(section, control))


def gain(section: OwnSection, control: Control) -> Gain | None:
    """How much further the candidate lies above its nulls than SAEs of the random-weights subject above theirs; None
    where a required null is missing. It is only reported: activations of a lower rank give a higher `mcc_alive`,
    whatever the features mean."""
    if any(null in s.stability.missing_nulls for s in (section, control) for null in GATED_NULLS):
        return None
    return contrast.gain([section], [control])
