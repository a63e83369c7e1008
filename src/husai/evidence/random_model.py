"""Conclusions from the figures of the random-model stress test. Pure functions of its results."""

from __future__ import annotations

from husai.evidence import contrast, rules
from husai.evidence.binding import places
from husai.evidence.names import GATED_NULLS
from husai.evidence.schemas import Control, OwnSection


def decisions(results: dict) -> dict:
    """The verdict, and of which SAEs it speaks, from the section: place in the results -> value."""
    members = results["section"]["members"]
    seeds = places([m["seed"] for m in members])
    own = dict(zip(seeds, (m["checkpoint_sha256"] for m in members), strict=True))
    again = {"/verdict": verdict(results["section"], results["random_model"]), "/candidate/checkpoints": own}
    return again | {"/gain": gain(results["section"], results["random_model"])}


def verdict(section: dict, control: dict) -> dict[str, str]:
    """The outcome of the rule for the candidate's section and its control."""
    own, other = OwnSection.model_validate(section), Control.model_validate(control)
    return rules.verdict(lambda: rules.random_model(own, other))


def gain(section: dict, control: dict) -> dict | None:
    """How much further the candidate lies above its nulls than SAEs of the random-weights subject above theirs
    (`contrast.gain`); None where a required null is missing. Reported, for activations of a lower rank give
    a higher `mcc_alive` whatever they mean."""
    if any(null in s["stability"]["missing_nulls"] for s in (section, control) for null in GATED_NULLS):
        return None
    return contrast.gain([section], [control])
