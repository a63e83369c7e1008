"""Conclusions from the figures of the random-model stress test. Pure functions of its results."""

from __future__ import annotations

from collections.abc import Sequence

from husai.evidence import contrast, levels, rules
from husai.evidence.schemas import Control, Gain, OwnSection, RandomModelStress


def decisions(stress: RandomModelStress) -> dict:
    """Conclusions of the test: place in the results -> value."""
    section, controls = stress.section, stress.random_models
    conclusions = {"/verdict": verdict(section, controls), "/candidate/checkpoints": section.checkpoints}
    return conclusions | {"/gains": gains(section, controls)}


def inputs(section: OwnSection, controls: Sequence[Control]) -> dict[str, str]:
    """Inputs of the test other than the candidate: label -> sha256."""
    named = {"activation store": section.store_digest} | section.control_inputs
    for i, control in enumerate(controls, 1):
        named |= control.inputs(f"random_model {i}") | control.gaussian.inputs(f"random_model {i}, gaussian")
    return named


def verdict(section: OwnSection, controls: Sequence[Control]) -> dict[str, str]:
    """The outcome of the rule for the candidate's section and its controls."""
    return rules.verdict(lambda: rules.random_model(section, controls))


def draw_names(section: OwnSection, controls: Sequence[Control]) -> list[str]:
    """Name of each control: the draw of its weights."""
    known = {levels.random_subject(section.subject_digest, draw): f"draw {draw}" for draw in levels.RANDOM_DRAWS}
    return [known.get(c.subject_digest, f"another draw ({c.subject_digest[:6]})") for c in controls]


def gains(section: OwnSection, controls: Sequence[Control]) -> list[Gain]:
    """Gain of the candidate over SAEs of each draw: in the score, and in its excess over each null."""
    return [contrast.gain([section], [control]) for control in controls]
