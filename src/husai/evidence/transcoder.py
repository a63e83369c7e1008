"""Conclusions from the figures of the transcoder stress test, and the setting that was fixed in advance."""

from __future__ import annotations

import re
from typing import Any

from husai.evidence import contrast, rules
from husai.evidence.schemas import Section, SeedGroup, Setting, TranscoderStress
from husai.runs.cli import DEFAULT_SEEDS, int_list
from husai.runs.errors import BadInput

MODULAR_ADDITION = {"d_sae": 256, "k": 8, "tokens": 1_000_000, "batch_size": 1024, "seeds": int_list(DEFAULT_SEEDS)}
"""The judged setting, if there is no candidate."""
MODULAR_ADDITION_HOOKS = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"  # no LayerNorm between them


def preregistered(setting: Setting, candidate: SeedGroup | None) -> bool:
    """Whether a setting is the one that was fixed in advance: the candidate's subject, block, width, k, tokens and
    seeds; MODULAR_ADDITION on the default subject where there is no candidate."""
    hooks = setting.hook_in, setting.hook_out
    if candidate is None:
        alike = all(getattr(setting, name) == value for name, value in MODULAR_ADDITION.items())
        return alike and hooks == MODULAR_ADDITION_HOOKS and not setting.own_subject
    facts, seeds = candidate.facts, sorted(map(int, candidate.checkpoints))
    names = ("subject_digest", "d_sae", "k", "learning_rate", "tokens")
    alike = all(getattr(setting, name) == getattr(facts, name) for name in names)
    return alike and hooks == mlp_hooks(layer_of(facts.hook_name or "")) and sorted(setting.seeds) == seeds


def layer_of(hook_name: str) -> int:
    """The block that a hook is of.

    Raises:
        BadInput: of none.
    """
    if (block := re.match(r"blocks\.(\d+)\.", hook_name)) is None:
        raise BadInput(f"--hook-name {hook_name}: of no block, whose MLP is meant? blocks.LAYER.… expected")
    return int(block[1])


def mlp_hooks(layer: int) -> tuple[str, str]:
    """(what the MLP of a language model's block reads, what it writes)."""
    return f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"


def concluded(stress: TranscoderStress) -> TranscoderStress:
    """The same test with every conclusion made from its sections: the setting as the SAEs' records give it, the gain,
    the explained variance, and the verdict."""
    arms = {arm: getattr(stress, arm) for arm in rules.ARMS}
    said = [_of_members(section) for section in arms.values()]
    setting = stress.setting.model_copy(update=said[0])
    judged = preregistered(setting, stress.candidate) and said[0] == said[1]
    setting = setting.model_copy(update={"preregistered": judged})
    made = {
        "setting": setting,
        "gain": contrast.gain([stress.transcoder], [stress.sae]),
        "explained_variance": {arm: contrast.heldout(section) for arm, section in arms.items()},
        "verdict": rules.verdict(lambda: rules.transcoder(setting, stress.transcoder, stress.sae)),
    }
    return stress.model_copy(update=made)


def _of_members(section: Section) -> dict:
    """The setting as the records of an arm give it."""
    said: dict[str, Any] = {"subject_digest": section.subject_digest, "hook_out": section.hook_name}
    said["seeds"] = [m.seed for m in section.members]
    for name in ("d_sae", "k", "learning_rate"):
        (said[name],) = {getattr(m, name) for m in section.members}
    return said


def decisions(stress: TranscoderStress) -> dict:
    """What is concluded from both arms: place in the results -> value."""
    made = concluded(stress).to_json()
    return {f"/{name}": made[name] for name in ("setting", "gain", "explained_variance", "verdict")}
