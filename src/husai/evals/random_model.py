"""What a meaningless subject scores: SAEs trained like the candidate's on draws of its subject's random weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from husai.activations.store import ActivationStore
from husai.dictionaries import foreign
from husai.dictionaries.families import family_of
from husai.evals import loaded
from husai.evals.candidate import activations_of, training_store
from husai.evals.loaded import LoadedSAE, LoadedSAEs, in_order
from husai.evidence.levels import RANDOM_DRAWS, random_weights
from husai.evidence.names import PAIRED
from husai.evidence.references import same_l0
from husai.evidence.schemas import Alike, AlikeMember, Control, Drawn, OwnSection
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.stability import controls, study
from husai.stability.compare import Dictionary
from husai.stability.prototypes import of_store
from husai.stability.study import ControlArm
from husai.training.grid import SNAPSHOTS
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig

log = logging.getLogger("husai")
ALIKE = ("family", "d_sae", "k", "learning_rate", "tokens", "training")
"""Facts in which SAEs of the random-weights model that a user supplies must equal a candidate that HUSAI trained."""


SHARED_DOCUMENTS = 0.9
"""Least share of documents that stores have in common whose outliers are left out. A short document may lose all."""
PASSES, LEARNING_RATE = 10, 1e-3
"""Over the Gaussian rows, where SAEs do not say how they were trained."""


@dataclass(frozen=True)
class Draw:
    """SAEs of one draw of the random weights, one for each of the candidate's, in its order."""

    saes: ControlArm
    """SAEs of the activations of these weights."""
    gaussian: ControlArm
    """SAEs of Gaussian rows with the moments of these activations."""


def grid_of(tested: LoadedSAEs) -> list[Member]:
    """What it takes to train the candidate's SAEs again, one member each, in order of seeds.

    Raises:
        BadInput: they were pulled towards a reference of another run.
    """
    names = [f.name for f in fields(Member)]
    grid = [Member(**{n: c.sae.metadata["husai"][n] for n in names}) for c in tested.saes]
    if pulled := next((c for c, m in zip(tested.saes, grid, strict=True) if m.reference), None):
        raise BadInput(
            f"checkpoint: {pulled.label} was pulled towards a reference, which is not at hand to train a control alike"
        )
    return grid


def trained_alike(tested: LoadedSAEs) -> tuple[list[Member], TrainingConfig]:
    """What it takes to train SAEs like these, one for each: their own recipe, or, where that is not known, HUSAI's own
    at their width and L0, of their family if HUSAI has it and TopK else."""
    if tested.training_metadata is not None:
        return grid_of(tested), tested.recipe
    rows = tested.store.rows
    config = TrainingConfig(tokens=PASSES * rows, batch_size=min(1024, rows))
    grid = [
        Member(i, c.sae.d_sae, max(1, round(c.record.heldout.l0)), LEARNING_RATE, i, family_of(c.sae.architecture))
        for i, c in enumerate(tested.saes)
    ]
    return grid, config


def own_dictionaries(tested: LoadedSAEs) -> list[Dictionary]:
    """The candidate's dictionaries, with the untrained states that its SAEs keep or the user gives."""
    folders = [foreign.folder_of(c.folder) for c in tested.saes]
    if tested.training_metadata is not None and all((folder / SNAPSHOTS).is_file() for folder in folders):
        return [study.own_dictionary(folder) for folder in folders]
    states = [(c, tested.untrained.get(c.identity)) for c in tested.saes]
    return [Dictionary(c.sae.W_dec, c.firing_rate, study.untrained_state(c.folder, c.sae, b)) for c, b in states]


def own_store(
    tested: LoadedSAEs, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> ActivationStore:
    """The activations that the candidate's study is on: those that it was trained on; held-out ones where its training
    is not known.

    Args:
        rows: see `candidate.training_store`.
    """
    return (
        tested.store
        if tested.training_metadata is None
        else training_store(tested, artifact_root, rows, device, threads)
    )


def section_of(
    tested: LoadedSAEs, store: ActivationStore, artifact_root: Path, draws: int, device: torch.device, threads: int
) -> tuple[OwnSection, Drawn]:
    """The stability study of the candidate's own SAEs; phases that need it share its cells.

    Args:
        store: `own_store`. draws: of the spectral null.
    """
    gaussian = controls.gaussian(artifact_root, store, *trained_alike(tested), device, threads)
    members = [c.member for c in tested.saes]
    labels, dictionaries = [m.label for m in members], near_prototypes(own_dictionaries(tested), store, artifact_root)
    cells = Cells(artifact_root / "controls" / "cells")
    compared, drawn = study.compare_all(cells, store, labels, dictionaries, draws, threads, {}, gaussian, scores=PAIRED)
    return OwnSection(members=members, **dict(compared)), drawn


def near_prototypes(dictionaries: list[Dictionary], store: ActivationStore, artifact_root: Path) -> list[Dictionary]:
    """The same dictionaries, which know their cosines with the store's prototypes: matches are reported by them."""
    return study.with_nearest_prototype(dictionaries, of_store(store, artifact_root, len(dictionaries[0].W_dec)))


def control_of(cells: Cells, draw: Draw, labels: list[str], draws: int, threads: int) -> Control:
    """The SAEs of one draw of the random weights, with a study of their own.

    Args:
        labels: the candidate's. draws: of the spectral null.
    """
    arm = draw.saes
    arguments = cells, arm.store, labels, arm.dictionaries, draws, threads
    compared, _ = study.compare_all(*arguments, {}, draw.gaussian, scores=PAIRED)
    found = dict(arm.alike) | {n: getattr(compared, n) for n in ("stability", "pairs", "strata")}
    return Control(**found, gaussian=draw.gaussian.alike)


def trained_draws(
    tested: LoadedSAEs, store: ActivationStore, artifact_root: Path, device: torch.device, threads: int
) -> list[Draw]:
    """SAEs trained alike on the activations that each draw of the random weights computes of the same text, and on
    Gaussian rows of these.

    Args:
        store: that the candidate was trained on.

    Raises:
        BadInput: the SAEs' training is not known, or their text cannot be had.
    """
    recipe = grid_of(tested), tested.recipe
    found = []
    for seed in RANDOM_DRAWS:
        log.info("%s: the candidate's recipe on its activations", random_weights(seed))
        drawn = activations_of(tested, artifact_root, store.rows, device, threads, seed)
        check_same_text(store, drawn)
        arms = (f(artifact_root, drawn, *recipe, device, threads) for f in (controls.trained, controls.gaussian))
        found.append(Draw(*arms))
    return found


def check_same_text(store: ActivationStore, control: ActivationStore) -> None:
    """Raise BadInput where the rows of two stores are not of the same documents, in the same order."""
    if any(s.manifest.dropped_rows is not None for s in (store, control)):  # each leaves its own rows out
        same = all(s.manifest.heldout_rows is not None for s in (store, control))
        documents = [s.labels("document", 0, s.rows).unique() for s in (store, control)] if same else []
        if same and torch.isin(*documents).double().mean() > SHARED_DOCUMENTS:
            return
    same = store.rows == control.rows and store.manifest.heldout_rows == control.manifest.heldout_rows
    if not same or not torch.equal(*(s.labels("document", 0, s.rows) for s in (store, control))):
        raise BadInput(
            f"candidate: its activations ({store.rows} rows, digest {store.digest[:12]}) are of other text than those "
            f"of the random-weights model ({control.rows} rows, digest {control.digest[:12]})"
        )


def supplied_draws(
    tested: LoadedSAEs,
    paths: list[Path],
    artifact_root: Path,
    rows: int,
    train_rows: int | None,
    device: torch.device,
    threads: int,
) -> list[Draw]:
    """SAEs of the random-weights model that a user supplies, each checked against its partner, by draw of the weights.

    Args:
        rows: of each random-weights model's held-out activations.
        train_rows: of those that the SAEs were trained on (`candidate.training_store`), on which the study of a draw is
            where the candidate's recipe is known.

    Raises:
        BadInput: another number of SAEs of a draw, other seeds, or trained otherwise than the candidate's, as far as
            is known.
    """
    flag, opener, found = "--random-model-checkpoint", loaded.Opener(), []
    for seed, folders in loaded.controls_by_draw(paths, opener).items():
        place = tested.name, tested.hook_name, artifact_root, rows, device, threads
        opened = loaded.open_draw(folders, seed, *place, opener, tested.source, tested.harvesting)
        opened = replace(opened, saes=in_order(opened.saes))
        saes = opened.saes
        if len(saes) != len(tested.saes):
            raise BadInput(
                f"{flag}: {len(saes)} SAEs of {random_weights(seed)} for the {len(tested.saes)} of the candidate; as "
                "many of each draw expected"
            )
        for ours, theirs in zip(tested.saes, saes, strict=True):
            if (reason := unlike(ours, theirs, tested.training_metadata is not None)) is not None:
                raise BadInput(f"{flag}: {theirs.label} was not trained as {ours.label} was: {reason}")
        store_digest = saes[0].facts.store_digest
        if store_digest is None:
            raise BadInput(f"{flag}: {saes[0].label} does not name the activations that it was trained on")
        members = [
            AlikeMember(
                seed=c.facts.seed,
                checkpoint=None,
                checkpoint_sha256=c.record.checkpoint_sha256,
                heldout=c.record.heldout,
            )
            for c in saes
        ]
        named = Alike(subject_digest=opened.subject.digest, store_digest=store_digest, members=members)
        store = opened.store
        if tested.training_metadata is not None:
            store = training_store(opened, artifact_root, train_rows, device, threads, seed)
        gaussian = controls.gaussian(artifact_root, store, grid_of(opened), opened.recipe, device, threads)
        found.append(Draw(ControlArm(store, own_dictionaries(opened), named), gaussian))
    return found


def unlike(ours: LoadedSAE, theirs: LoadedSAE, recipe_known: bool) -> str | None:
    """In what an SAE of the random-weights model differs from its partner; None if in nothing that counts. Where the
    partner's recipe is not known, width, activation and L0 (within 10 %) count."""
    if recipe_known:
        differing = [n for n in (*ALIKE, "seed") if getattr(ours.facts, n) != getattr(theirs.facts, n)]
        return f"{differing[0]} differs" if differing else None
    for name in ("d_sae", "architecture"):
        a, b = getattr(ours.sae, name), getattr(theirs.sae, name)
        if a != b:
            return f"{name} {b}, {a} expected"
    a, b = ours.record.heldout.l0, theirs.record.heldout.l0
    return None if same_l0(a, b) else f"L0 differs by more than 10 %: {a:.1f} and {b:.1f}"
