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
    """Whether a setting is the one that was fixed in advance: the candidate's subject, hook, width, k, tokens and
    seeds, read from the hook before."""
    facts, seeds = candidate.facts, sorted(map(int, candidate.checkpoints))
    names = ("subject_digest", "d_sae", "k", "learning_rate", "tokens")
    alike = all(getattr(setting, name) == getattr(facts, name) for name in names)
    hooks = (hook_before(facts.hook_name or ""), facts.hook_name)
    return alike and (setting.hook_in, setting.hook_out) == hooks and sorted(setting.seeds) == seeds


def hook_before(hook_name: str) -> str:
    """Input hook of transcoders that write a hook: the same kind of hook one block earlier.

    In the first block it is the input of the block.

    Raises:
        BadInput: nothing comes before that hook, or it is of no block.
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
    """The inputs of the test beside the candidate and what transcoders read: label -> sha256."""
    found = {"activation store": stress.section.store_digest}
    found |= {f"transcoder {m.label}": m.checkpoint_sha256 for m in stress.transcoder.members}
    noise = stress.transcoder.gaussian
    return found | stress.section.control_inputs | ({} if noise is None else noise.inputs("transcoder, gaussian"))


def concluded(stress: TranscoderStress) -> TranscoderStress:
    """The same test with every conclusion made from its sections: the setting as the transcoders' records give it, the
    gain, the explained variance, and the verdict."""
    section, transcoders = stress.section, stress.transcoder
    setting = stress.setting.model_copy(update=_of_members(transcoders))
    setting = setting.model_copy(update={"preregistered": preregistered(setting, stress.candidate)})
    made = {
        "setting": setting,
        "gain": contrast.gain([transcoders], [section]) if _same_seeds(stress) else None,
        "explained_variance": {"candidate": contrast.heldout(section), "transcoder": contrast.heldout(transcoders)},
        "verdict": rules.verdict(lambda: rules.transcoder(setting, section, transcoders, stress.across)),
    }
    return stress.model_copy(update=made)


def _same_seeds(stress: TranscoderStress) -> bool:
    return stress.section.stability.labels == stress.transcoder.stability.labels


def _of_members(section: Section) -> dict:
    """The setting as the records of transcoders give it."""
    said: dict[str, Any] = {"subject_digest": section.subject_digest, "hook_out": section.hook_name}
    said["seeds"] = [m.seed for m in section.members]
    for name in ("d_sae", "k", "learning_rate"):
        (said[name],) = {getattr(m, name) for m in section.members}
    return said


def decisions(stress: TranscoderStress) -> dict:
    """Conclusions from the sections, and the SAEs concerned: place in the results -> value."""
    made = concluded(stress).to_json()
    again = {f"/{name}": made[name] for name in ("setting", "gain", "explained_variance", "verdict")}
    return again | {"/candidate/checkpoints": stress.section.checkpoints}
