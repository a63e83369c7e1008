"""Conclusions from the figures of the transcoder stress test, and the setting that was fixed in advance."""

from __future__ import annotations

import re

from husai.evidence import contrast, rules
from husai.evidence.schemas import Section, Setting
from husai.runs.cli import DEFAULT_SEEDS, int_list
from husai.runs.errors import BadInput

MODULAR_ADDITION = {"d_sae": 256, "k": 8, "tokens": 1_000_000, "batch_size": 1024, "seeds": int_list(DEFAULT_SEEDS)}
"""The judged setting, if there is no candidate."""
MODULAR_ADDITION_HOOKS = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"  # no LayerNorm between them


def preregistered(setting: dict, candidate: dict | None) -> bool:
    """Whether a setting is the one that was fixed in advance: the candidate's (its block, `evidence.binding.block`)
    subject, block, width, k, tokens and seeds; MODULAR_ADDITION on the default subject where there is none."""
    hooks = setting["hook_in"], setting["hook_out"]
    if candidate is None:
        alike = all(setting[name] == value for name, value in MODULAR_ADDITION.items())
        return alike and hooks == MODULAR_ADDITION_HOOKS and not setting["own_subject"]
    facts, seeds = candidate["facts"], sorted(map(int, candidate["checkpoints"]))
    alike = all(setting[name] == facts[name] for name in ("subject_digest", "d_sae", "k", "learning_rate", "tokens"))
    return alike and hooks == mlp_hooks(layer_of(facts["hook_name"] or "")) and sorted(setting["seeds"]) == seeds


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


def verdict(setting: dict, transcoder: dict, sae: dict) -> dict[str, str]:
    """The outcome of the rule for the sections of both arms."""
    made, arms = Setting.model_validate(setting), [Section.model_validate(s) for s in (transcoder, sae)]
    return rules.verdict(lambda: rules.transcoder(made, *arms))


def decisions(results: dict) -> dict:
    """Conclusions from the sections of both arms: place in the results -> value. They are the setting as the SAEs'
    records give it, the gain, the explained variance, and the verdict."""
    arms = {arm: results[arm] for arm in rules.ARMS}
    said = [{"subject_digest": s["subject_digest"], "hook_out": s["hook_name"]} for s in arms.values()]
    for section, about in zip(arms.values(), said, strict=True):
        about["seeds"] = [m["seed"] for m in section["members"]]
        for name in ("d_sae", "k", "learning_rate"):
            (about[name],) = {m[name] for m in section["members"]}
    setting = results["setting"] | said[0]
    setting["preregistered"] = preregistered(setting, results["candidate"]) and said[0] == said[1]
    gain = contrast.gain([arms["transcoder"]], [arms["sae"]])
    return {
        "/setting": setting,
        "/gain": gain,
        "/explained_variance": {arm: contrast.heldout(section).to_json() for arm, section in arms.items()},
        "/verdict": verdict(setting, **arms),
    }
