"""Conclusions from the figures of the transcoder stress test, and the setting that was fixed in advance."""

from __future__ import annotations

import re
from typing import Any

from husai.evidence import contrast, rules
from husai.evidence.schemas import Section, SeedGroup, Setting, TranscoderStress
from husai.runs.errors import BadInput

FIRST = "blocks.0.hook_resid_pre"
"""Hook at the input of the first block."""
BEFORE_ALL = (FIRST, "blocks.0.hook_in")


def preregistered(setting: Setting, candidate: SeedGroup) -> bool:
    """True if a setting is the one that was fixed in advance.

    It has the candidate's subject, hook, width, k, tokens and seeds, and its input is the hook before.
    """
    facts, seeds = candidate.facts, sorted(map(int, candidate.checkpoints))
    names = ("subject_digest", "d_sae", "k", "learning_rate", "tokens")
    same_recipe = all(getattr(setting, name) == getattr(facts, name) for name in names)
    hooks = (hook_before(facts.hook_name or ""), facts.hook_name)
    return same_recipe and (setting.hook_in, setting.hook_out) == hooks and sorted(setting.seeds) == seeds


def hook_before(hook_name: str) -> str:
    """Input hook of transcoders for an output hook: the same kind of hook one block earlier.

    In the first block it is the input of the block.

    Raises:
        BadInput: there is no hook before, or the hook belongs to no block.
    """
    if (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)) is None:
        raise BadInput(
            f"--hook-name {hook_name}: of no block, so that no hook comes before it; blocks.LAYER.… expected"
        )
    if hook_name in BEFORE_ALL:
        raise BadInput(f"--hook-name {hook_name}: nothing comes before it that transcoders could read")
    number = int(block[1])
    return f"blocks.{number - 1}.{block[2]}" if number else FIRST


def inputs(stress: TranscoderStress) -> dict[str, str]:
    """Inputs of the test other than the candidate and the input activations: label -> sha256."""
    digests = {"activation store": stress.section.store_digest}
    digests |= {f"transcoder {m.label}": m.checkpoint_sha256 for m in stress.transcoder.members}
    gaussian_control = stress.transcoder.gaussian
    return (
        digests
        | stress.section.control_inputs
        | ({} if gaussian_control is None else gaussian_control.inputs("transcoder, gaussian"))
    )


def concluded(stress: TranscoderStress) -> TranscoderStress:
    """The test with all conclusions computed from its sections: setting, gain, explained variance and verdict."""
    section, transcoders = stress.section, stress.transcoder
    setting = stress.setting.model_copy(update=_of_members(transcoders))
    setting = setting.model_copy(update={"preregistered": preregistered(setting, stress.candidate)})
    conclusions = {
        "setting": setting,
        "gain": contrast.gain([transcoders], [section]) if _same_seeds(stress) else None,
        "explained_variance": {"candidate": contrast.heldout(section), "transcoder": contrast.heldout(transcoders)},
        "verdict": rules.verdict(lambda: rules.transcoder(setting, section, transcoders, stress.across)),
    }
    return stress.model_copy(update=conclusions)


def _same_seeds(stress: TranscoderStress) -> bool:
    return stress.section.stability.labels == stress.transcoder.stability.labels


def _of_members(section: Section) -> dict:
    """Setting according to the records of the transcoders."""
    setting: dict[str, Any] = {"subject_digest": section.subject_digest, "hook_out": section.hook_name}
    setting["seeds"] = [m.seed for m in section.members]
    for name in ("d_sae", "k", "learning_rate"):
        (setting[name],) = {getattr(m, name) for m in section.members}
    return setting


def decisions(stress: TranscoderStress) -> dict:
    """Conclusions from the sections, and the candidate's SAEs: place in the results -> value."""
    results = concluded(stress).to_json()
    by_place = {f"/{name}": results[name] for name in ("setting", "gain", "explained_variance", "verdict")}
    return by_place | {"/candidate/checkpoints": stress.section.checkpoints}
