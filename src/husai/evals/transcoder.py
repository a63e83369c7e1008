"""Another objective: transcoders that write the candidate's own hook, scored against the candidate's SAEs."""

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
    """A setting with what it is trained on."""

    setting: Setting
    """`preregistered` is filled in later, from the results (`evidence.transcoder.concluded`)."""
    config: TrainingConfig
    read: ActivationStore
    written: ActivationStore
    """What the candidate was trained on, row by row."""

    @property
    def grid(self) -> list[Member]:
        s = self.setting
        return members(s.seeds, [s.d_sae], [s.k], [s.learning_rate], ("transcoder",))


def task_of(
    tested: LoadedSAEs, overrides: dict, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> TranscoderTask:
    """The hook before the candidate's, at the candidate's width, k, tokens, batch size and seeds.

    Args:
        overrides: `d_sae`, `k`, `tokens`, each None where it is the candidate's.
        rows: of the candidate's own activations (`candidate.training_store`); those that transcoders read are as many,
            of the same text.

    Raises:
        BadInput: no hook comes before, or the candidate's training is not known.
    """
    config, made = tested.recipe, tested.training_metadata
    assert made is not None  # `recipe` would have refused
    hook = hook_before(tested.hook_name)
    written = training_store(tested, artifact_root, rows, device, threads)
    read = _read_beside(tested, hook, written, artifact_root / "activations", threads)
    random_model.check_same_text(written, read)
    own = {"d_sae": made["d_sae"], "k": made["k"], "tokens": config.tokens}
    setting = Setting(
        hook_in=hook,
        hook_out=tested.hook_name,
        **own | {name: value for name, value in overrides.items() if value is not None},
        batch_size=config.batch_size,
        learning_rate=made["learning_rate"],
        seeds=[m.order_seed for m in random_model.grid_of(tested)],
        subject_digest=tested.subject.digest,
        preregistered=False,
    )
    return TranscoderTask(setting, replace(config, tokens=setting.tokens), read, written)


def _read_beside(tested: LoadedSAEs, hook: str, written: ActivationStore, root: Path, threads: int) -> ActivationStore:
    """Activations at a hook, row by row those that are written; rows that these leave out are left out too."""
    way, m = tested.subject.harvesting, written.manifest
    subject = replace(tested.subject, harvesting=replace(way, max_norm_multiple=None))
    where = tested.source.training(), root, written.rows + (m.dropped_rows or 0)
    hooks = [hook] if m.dropped_rows is None else [hook, m.hook_name]
    folders = harvest_tokens(subject, hooks, *where, threads=threads, by_document=True)
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
    """(the candidate's SAEs among themselves, transcoders among themselves, the one against the other)."""
    own, _ = random_model.section_of(tested, task.written, artifact_root, draws, device, threads)
    trained = train_or_find(cells, task.read, task.grid, task.config, device, threads, task.written)
    noise = controls.gaussian_transcoders(
        artifact_root, task.read, task.written, task.grid, task.config, device, threads
    )
    saes, steps = trained.members, trained.snapshot_steps
    transcoders, drawn = study.score_trained(cells, task.written, saes, steps, draws, threads, noise, scores=PAIRED)
    gaussian = controls.gaussian(artifact_root, task.written, *random_model.trained_alike(tested), device, threads)
    folders = [cells.folder.parent / m.checkpoint for m in saes]
    sides = random_model.own_dictionaries(tested), [study.own_dictionary(folder) for folder in folders]
    own_side, partners = (random_model.near_prototypes(side, task.written, artifact_root) for side in sides)
    across = study.compare_across(
        cells,
        task.written,
        own.stability.labels,
        (own_side, partners),
        draws,
        threads,
        (gaussian.dictionaries, noise.dictionaries),
        ACROSS,
    )
    return own, (transcoders, drawn), across
