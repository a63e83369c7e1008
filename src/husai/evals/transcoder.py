"""Stress test: transcoders that reconstruct the candidate's hook, scored against the candidate's SAEs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from husai.activations.language_model import harvest_tokens
from husai.activations.outliers import MULTIPLE, without_outliers
from husai.activations.store import ActivationStore
from husai.evals import random_model
from husai.evals.candidate import training_store
from husai.evals.loaded import LoadedSAEs
from husai.evidence.names import ACROSS, PAIRED
from husai.evidence.schemas import Comparison, Drawn, OwnSection, Section, Setting
from husai.evidence.transcoder import hook_before
from husai.runs.cells import Cells
from husai.stability import controls, study
from husai.training.grid import members, train_or_find
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig


@dataclass(frozen=True)
class TranscoderTask:
    """A setting with its training configuration and activations."""

    setting: Setting
    """Setting. `preregistered` is filled in later, from the results (`evidence.transcoder.concluded`)."""
    config: TrainingConfig
    read: ActivationStore
    written: ActivationStore
    """Target activations: those that the candidate was trained on, row by row."""

    @property
    def grid(self) -> list[Member]:
        s = self.setting
        return members(s.seeds, [s.d_sae], [s.k], [s.learning_rate], ("transcoder",))


def task_of(
    tested: LoadedSAEs, overrides: dict, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> TranscoderTask:
    """Task with the hook before the candidate's, and the candidate's width, k, tokens, batch size and seeds.

    Args:
        overrides: `d_sae`, `k`, `tokens`. None: that of the candidate.
        rows: number of the candidate's activations (`candidate.training_store`). Transcoders read equally many rows of
            the same text.

    Raises:
        BadInput: there is no hook before, or the candidate's training is unknown.
    """
    config, metadata = tested.recipe, tested.training_metadata
    assert metadata is not None  # else `recipe` raises BadInput
    hook = hook_before(tested.hook_name)
    written = training_store(tested, artifact_root, rows, device, threads)
    read = _read_beside(tested, hook, written, artifact_root / "activations", threads)
    random_model.check_same_text(written, read)
    candidate_sizes = {"d_sae": metadata["d_sae"], "k": metadata["k"], "tokens": config.tokens}
    setting = Setting(
        hook_in=hook,
        hook_out=tested.hook_name,
        **candidate_sizes | {name: value for name, value in overrides.items() if value is not None},
        batch_size=config.batch_size,
        learning_rate=metadata["learning_rate"],
        seeds=[m.order_seed for m in random_model.grid_of(tested)],
        subject_digest=tested.subject.digest,
        preregistered=False,
    )
    return TranscoderTask(setting, replace(config, tokens=setting.tokens), read, written)


def _read_beside(tested: LoadedSAEs, hook: str, written: ActivationStore, root: Path, threads: int) -> ActivationStore:
    """Activations at a hook, with the same rows as the target store, and without the rows that it leaves out."""
    harvesting, m = tested.subject.harvesting, written.manifest
    subject = replace(tested.subject, harvesting=replace(harvesting, max_norm_multiple=None))
    source = tested.source.training(), root, written.rows + (m.dropped_rows or 0)
    hooks = [hook] if m.dropped_rows is None else [hook, m.hook_name]
    folders = harvest_tokens(subject, hooks, *source, threads=threads, by_document=True)
    read, *beside = (ActivationStore.open(folders[name]) for name in hooks)
    if not beside:
        return read
    return without_outliers(read, (m.harvesting or {})[MULTIPLE], root, by=beside[0])


def sections(
    cells: Cells,
    tested: LoadedSAEs,
    task: TranscoderTask,
    artifact_root: Path,
    draws: int,
    device: torch.device,
    threads: int,
) -> tuple[OwnSection, tuple[Section, Drawn], Comparison]:
    """(study of the candidate's SAEs, study of the transcoders, scores between the two)."""
    own_section, _ = random_model.section_of(tested, task.written, artifact_root, draws, device, threads)
    trained = train_or_find(cells, task.read, task.grid, task.config, device, threads, task.written)
    noise = controls.gaussian_transcoders(
        artifact_root, task.read, task.written, task.grid, task.config, device, threads
    )
    saes, steps = trained.members, trained.snapshot_steps
    transcoders, drawn = study.score_trained(cells, task.written, saes, steps, draws, threads, noise, scores=PAIRED)
    gaussian = random_model.gaussian_control(tested, task.written, artifact_root, device, threads)
    folders = [cells.folder.parent / m.checkpoint for m in saes]
    sides = random_model.own_dictionaries(tested), [study.own_dictionary(folder) for folder in folders]
    own_side, partners = (random_model.near_prototypes(side, task.written, artifact_root) for side in sides)
    across = study.compare_across(
        cells,
        task.written,
        own_section.stability.labels,
        (own_side, partners),
        draws,
        threads,
        (gaussian.dictionaries, noise.dictionaries),
        ACROSS,
    )
    return own_section, (transcoders, drawn), across
