"""Another objective: transcoders (MLP input -> MLP output) beside SAEs of the MLP's output. Decoder rows of both lie in
the same space, where both are held against the same nulls."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from husai.activations import source
from husai.activations.language_model import harvest_tokens
from husai.activations.store import ActivationStore
from husai.runs.cells import Cells
from husai.runs.cli import DEFAULT_SEEDS, int_list
from husai.runs.errors import BadInput
from husai.stability import contrast, study
from husai.stability.compare import GATED_NULLS, MINIMUM_SEEDS
from husai.stress.candidate import Tested, training_store
from husai.subjects import text
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig

FAMILIES = {"transcoder": "transcoder", "sae": "batchtopk"}
"""Arm -> family. A transcoder's activation is BatchTopK: the arms differ in what they read, and start as such do (an
SAE's encoder as its decoder's transpose, a transcoder's apart)."""
MODULAR_ADDITION = {"d_sae": 256, "k": 8, "tokens": 1_000_000, "batch_size": 1024, "seeds": int_list(DEFAULT_SEEDS)}
"""What is gated where there is no candidate."""
MODULAR_ADDITION_HOOKS = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"  # no LayerNorm between them
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Setting:
    """How both arms are trained."""

    hook_in: str
    """What the MLP reads: after LayerNorm, where there is one."""
    hook_out: str
    layer: int
    d_sae: int
    k: int
    tokens: int
    batch_size: int
    learning_rate: float
    seeds: list[int]
    subject_digest: str
    own_subject: bool
    """Whether a subject was named in place of the default one."""


def preregistered(setting: dict, candidate: dict | None) -> bool:
    """Whether a setting is the one that was fixed in advance: the candidate's (its block, `stress.candidate.block`)
    subject, block, width, k, tokens and seeds; MODULAR_ADDITION on the default subject where there is none."""
    hooks = setting["hook_in"], setting["hook_out"]
    if candidate is None:
        alike = all(setting[name] == value for name, value in MODULAR_ADDITION.items())
        return alike and hooks == MODULAR_ADDITION_HOOKS and not setting["own_subject"]
    facts, seeds = candidate["facts"], sorted(map(int, candidate["checkpoints"]))
    alike = all(setting[name] == facts[name] for name in ("subject_digest", "d_sae", "k", "learning_rate", "tokens"))
    return alike and hooks == mlp_hooks(layer_of(facts["hook_name"])) and sorted(setting["seeds"]) == seeds


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


def verdict(results: dict, minimum: float = 0.0) -> dict:
    """The rule (docs/methods.md, Rules): {"outcome": `holds`, `does not hold` or `inconclusive`, "reason"}.

    Args:
        results: of the phase: `setting`, `transcoder` (its section) and `gain`.
        minimum: of the gain.
    """
    seeds = len(results["transcoder"]["stability"]["labels"])
    if not results["setting"]["preregistered"]:
        return {"outcome": "inconclusive", "reason": "the setting is not the one that was fixed in advance"}
    if seeds < MINIMUM_SEEDS:
        return {"outcome": "inconclusive", "reason": f"{seeds} seeds; a verdict needs {MINIMUM_SEEDS}"}
    failed = [null for null in GATED_NULLS if results["gain"][null]["low"] < minimum]
    if failed:
        reason = f"the gain is not shown to be at least {minimum:g} over {', '.join(failed)}"
        return {"outcome": "does not hold", "reason": reason}
    reason = f"the interval of the gain lies at or above {minimum:g} over each required null"
    return {"outcome": "holds", "reason": reason}


def decisions(results: dict) -> dict:
    """What follows from the sections of both arms: place in the results -> value. Of the setting, what the SAEs say
    themselves; gain, explained variance, whether the setting is the one fixed in advance, and the verdict."""
    arms = {arm: results[arm] for arm in FAMILIES}
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
        "/verdict": verdict(results | {"setting": setting, "gain": gain}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, on what


@dataclass(frozen=True)
class Task:
    """A setting with what it is trained on."""

    setting: Setting
    config: TrainingConfig
    read: ActivationStore
    """What goes into the MLP."""
    written: ActivationStore
    """What comes out of it, row by row."""


def of_candidate(
    tested: Tested, overrides: dict, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> Task:
    """The MLP of the block whose hook the candidate reads, at the candidate's width, k, tokens, batch size and seeds.

    Args:
        overrides: `d_sae`, `k`, `tokens`, `seeds`, each None where it is the candidate's.
        rows: of the candidate's own activations (`candidate.training_store`); the MLP's are as many, of the same text.

    Raises:
        BadInput: the hook is of no block, or the candidate's training is not known.
    """
    config, made = tested.recipe, tested.made
    layer = layer_of(tested.hook_name)
    hooks = mlp_hooks(layer)
    rows = training_store(tested, artifact_root, rows, device, threads).rows
    where = artifact_root / "activations", rows
    folders = harvest_tokens(tested.subject, [*hooks], text.corpus().train, *where, threads=threads)
    read, written = (ActivationStore.open(folders[hook]) for hook in hooks)
    own = {
        "d_sae": made["d_sae"],
        "k": made["k"],
        "tokens": config.tokens,
        "seeds": [c.facts["seed"] for c in tested.saes],
    }
    chosen = own | {name: value for name, value in overrides.items() if value is not None}
    setting = Setting(
        *hooks,
        layer,
        **chosen,
        batch_size=config.batch_size,
        learning_rate=made["learning_rate"],
        subject_digest=tested.subject.digest,
        own_subject=True,
    )
    return Task(setting, replace(config, tokens=setting.tokens), read, written)


def of_modular_addition(
    subject: str | None, overrides: dict, artifact_root: Path, device: torch.device, threads: int
) -> Task:
    """The MLP of the transformer that solved modular addition, at MODULAR_ADDITION.

    Args:
        subject: folder of another one; None: the default, trained where it is missing.
    """
    read, written = (
        source.open_store(artifact_root, device, threads, subject=subject, hook_name=hook)
        for hook in MODULAR_ADDITION_HOOKS
    )
    chosen = MODULAR_ADDITION | {name: value for name, value in overrides.items() if value is not None}
    setting = Setting(
        *MODULAR_ADDITION_HOOKS,
        layer=0,
        **chosen,
        learning_rate=LEARNING_RATE,
        subject_digest=read.manifest.subject_digest,
        own_subject=subject is not None,
    )
    return Task(setting, TrainingConfig(tokens=setting.tokens, batch_size=setting.batch_size), read, written)


def sections(cells: Cells, task: Task, draws: int, device: torch.device, threads: int) -> dict[str, dict]:
    """Arm -> its SAEs trained, and their stability study in the space of the MLP's output (`study.score_trained`)."""
    s, found = task.setting, {}
    for arm, family in FAMILIES.items():
        grid = members(s.seeds, [s.d_sae], [s.k], [s.learning_rate], (family,))
        store, target = (task.read, task.written) if arm == "transcoder" else (task.written, None)
        trained = train_or_find(cells, store, grid, task.config, device, threads, target)
        records, steps = trained["members"], trained["snapshot_steps"]
        found[arm] = study.score_trained(cells, task.written, records, steps, draws, threads)
    return found
