"""Another objective: transcoders (MLP input -> MLP output) beside SAEs of the MLP's output. Decoder rows of both lie in
the same space, where both are held against the same nulls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from husai.activations import source
from husai.activations.language_model import harvest_tokens
from husai.activations.store import ActivationStore
from husai.evals.candidate import training_store
from husai.evals.loaded import LoadedSAEs
from husai.evidence.rules import ARMS
from husai.evidence.schemas import Drawn, Section, Setting
from husai.evidence.transcoder import MODULAR_ADDITION, MODULAR_ADDITION_HOOKS, layer_of, mlp_hooks
from husai.runs.cells import Cells
from husai.stability import study
from husai.subjects import text
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig

LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class TranscoderTask:
    """A setting with what it is trained on."""

    setting: Setting
    """`preregistered` is filled in later, from the results (`evidence.transcoder.concluded`)."""
    config: TrainingConfig
    read: ActivationStore
    """What goes into the MLP."""
    written: ActivationStore
    """What comes out of it, row by row."""


def of_candidate(
    tested: LoadedSAEs, overrides: dict, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> TranscoderTask:
    """The MLP of the block whose hook the candidate reads, at the candidate's width, k, tokens, batch size and seeds.

    Args:
        overrides: `d_sae`, `k`, `tokens`, `seeds`, each None where it is the candidate's.
        rows: of the candidate's own activations (`candidate.training_store`); the MLP's are as many, of the same text.

    Raises:
        BadInput: the hook is of no block, or the candidate's training is not known.
    """
    config, made = tested.recipe, tested.made
    assert made is not None  # `recipe` would have refused
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
        "seeds": [c.facts.seed for c in tested.saes],
    }
    chosen = own | {name: value for name, value in overrides.items() if value is not None}
    setting = Setting(
        hook_in=hooks[0],
        hook_out=hooks[1],
        layer=layer,
        **chosen,
        batch_size=config.batch_size,
        learning_rate=made["learning_rate"],
        subject_digest=tested.subject.digest,
        own_subject=True,
        preregistered=False,
    )
    return TranscoderTask(setting, replace(config, tokens=setting.tokens), read, written)


def of_modular_addition(
    subject: str | None, overrides: dict, artifact_root: Path, device: torch.device, threads: int
) -> TranscoderTask:
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
        hook_in=MODULAR_ADDITION_HOOKS[0],
        hook_out=MODULAR_ADDITION_HOOKS[1],
        layer=0,
        **chosen,
        learning_rate=LEARNING_RATE,
        subject_digest=read.manifest.subject_digest,
        own_subject=subject is not None,
        preregistered=False,
    )
    return TranscoderTask(setting, TrainingConfig(tokens=setting.tokens, batch_size=setting.batch_size), read, written)


def sections(
    cells: Cells, task: TranscoderTask, draws: int, device: torch.device, threads: int
) -> dict[str, tuple[Section, Drawn]]:
    """Arm -> the stability study of its trained SAEs in the space of the MLP's output (`study.score_trained`)."""
    s, found = task.setting, {}
    for arm, family in ARMS.items():
        grid = members(s.seeds, [s.d_sae], [s.k], [s.learning_rate], (family,))
        store, target = (task.read, task.written) if arm == "transcoder" else (task.written, None)
        trained = train_or_find(cells, store, grid, task.config, device, threads, target)
        records, steps = trained["members"], trained["snapshot_steps"]
        found[arm] = study.score_trained(cells, task.written, records, steps, draws, threads)
    return found
