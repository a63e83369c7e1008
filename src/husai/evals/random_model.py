"""What a meaningless subject scores: SAEs trained like the candidate's on the random-weights control of its subject,
and on its activations with their coordinates shuffled across rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from husai.activations import source
from husai.activations.harvest import shuffled_coordinates
from husai.activations.store import ActivationStore
from husai.dictionaries import foreign
from husai.evals import loaded
from husai.evals.candidate import training_store
from husai.evals.loaded import LoadedSAE, LoadedSAEs, in_order
from husai.evidence.names import ALIVE
from husai.evidence.references import same_l0
from husai.evidence.schemas import Alike, AlikeMember, Control, Drawn, OwnSection
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.stability import study
from husai.stability.compare import Dictionary
from husai.training.grid import SNAPSHOTS, train_or_find
from husai.training.stack import Member

ALIKE = ("family", "d_sae", "k", "learning_rate", "tokens", "training")
"""Facts in which SAEs of the random-weights model that a user supplies must equal a candidate that HUSAI trained."""


@dataclass(frozen=True)
class ControlArm:
    """SAEs of a meaningless subject, one for each of the candidate's, in its order."""

    store: ActivationStore
    """Whose principal components its own spectral null is drawn in."""
    dictionaries: list[Dictionary]
    alike: Alike
    """Their record in evidence."""


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


def own_dictionaries(tested: LoadedSAEs, before: list[Path] | None = None) -> list[Dictionary]:
    """The candidate's dictionaries.

    Args:
        before: checkpoints of its SAEs before training, in their order, where these do not keep them themselves.
    """
    folders = [foreign.folder_of(c.folder) for c in tested.saes]
    if tested.made is not None and all((folder / SNAPSHOTS).is_file() for folder in folders):
        return [study.own_dictionary(folder) for folder in folders]
    return _external(tested.saes, before)


def section_of(
    cells: Cells,
    tested: LoadedSAEs,
    store: ActivationStore,
    random_model: ControlArm,
    shuffled: ControlArm | None,
    draws: int,
    threads: int,
) -> tuple[OwnSection, Drawn]:
    """The stability study of the candidate's own SAEs, both arms beside its nulls, pairs matched by seed.

    Args:
        store: whose principal components the spectral null is drawn in.
    """
    dictionaries, missing = own_dictionaries(tested), {"gaussian": "not part of this test"}
    members = [c.member for c in tested.saes]
    compared, drawn = study.compare_all(
        cells,
        store,
        [m.label for m in members],
        dictionaries,
        draws,
        threads,
        missing,
        random_model=random_model.dictionaries,
    )
    return OwnSection(members=members, **dict(compared)), drawn


def control_of(cells: Cells, random_model: ControlArm, labels: list[str], draws: int, threads: int) -> Control:
    """The SAEs of the random-weights subject, with a study of their own.

    Args:
        labels: the candidate's.
    """
    missing = {"gaussian": "not part of this test"}
    arguments = random_model.store, labels, random_model.dictionaries, draws, threads, missing
    compared, _ = study.compare_all(cells, *arguments, scores=ALIVE)
    return Control(**dict(random_model.alike), stability=compared.stability, pairs=compared.pairs)


def _external(saes: list[LoadedSAE], before: list[Path] | None = None) -> list[Dictionary]:
    """Dictionaries of SAEs, with their untrained states where the user gives them."""
    states: Sequence[Path | None] = before or [None] * len(saes)
    pairs = zip(saes, states, strict=True)
    return [Dictionary(c.sae.W_dec, c.alive, study.untrained_state(c.folder, c.sae, b)) for c, b in pairs]


def trained_arms(
    cells: Cells, tested: LoadedSAEs, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> tuple[ActivationStore, ControlArm, ControlArm]:
    """(the store that the candidate was trained on; SAEs trained alike on the random-weights model's activations of the
    same text; SAEs trained alike on shuffled coordinates).

    Args:
        rows: see `candidate.training_store`.

    Raises:
        BadInput: the SAEs' training is not known, or their store cannot be had.
    """
    config, grid = tested.recipe, grid_of(tested)
    store = training_store(tested, artifact_root, rows, device, threads)
    random_store = source.open_store(
        artifact_root,
        device,
        threads,
        subject=tested.name,
        hook_name=tested.hook_name,
        rows=store.rows,
        random_seed=0,
    )
    check_same_text(store, random_store)
    shuffled = ActivationStore.open(shuffled_coordinates(store, artifact_root / "activations"))
    root = cells.folder.parent

    def arm(control: ActivationStore) -> ControlArm:
        records = train_or_find(cells, control, grid, config, device, threads)["members"]
        members = [AlikeMember(**{name: r[name] for name in AlikeMember.model_fields}) for r in records]
        dictionaries = [study.own_dictionary(root / r["checkpoint"]) for r in records]
        named = Alike(subject_digest=control.manifest.subject_digest, store_digest=control.digest, members=members)
        return ControlArm(control, dictionaries, named)

    return store, arm(random_store), arm(shuffled)


def check_same_text(store: ActivationStore, control: ActivationStore) -> None:
    """Raise BadInput where the rows of two stores are not of the same documents, in the same order."""
    same = store.rows == control.rows and store.manifest.heldout_rows == control.manifest.heldout_rows
    if not same or not torch.equal(*(s.labels("document", 0, s.rows) for s in (store, control))):
        raise BadInput(
            f"candidate: its activations ({store.rows} rows, digest {store.digest[:12]}) are of other text than those "
            f"of the random-weights model ({control.rows} rows, digest {control.digest[:12]})"
        )


def supplied_arm(
    tested: LoadedSAEs, paths: list[Path], artifact_root: Path, rows: int, device: torch.device, threads: int
) -> ControlArm:
    """SAEs of the random-weights model that a user supplies, each checked against its partner.

    Args:
        rows: of the random-weights model's held-out activations.

    Raises:
        BadInput: another number of SAEs, other seeds, or trained otherwise than the candidate's, as far as is known.
    """
    flag = "--random-model-checkpoint"
    controls = loaded.open_controls(paths, tested.name, tested.hook_name, artifact_root, rows, device, threads)
    assert controls is not None  # paths are given
    saes = in_order(controls.saes)
    if len(saes) != len(tested.saes):
        raise BadInput(f"{flag}: {len(saes)} SAEs for the {len(tested.saes)} of the candidate; as many expected")
    for ours, theirs in zip(tested.saes, saes, strict=True):
        if (reason := unlike(ours, theirs, tested.made is not None)) is not None:
            raise BadInput(f"{flag}: {theirs.label} was not trained as {ours.label} was: {reason}")
    members = [
        AlikeMember(
            seed=c.facts.seed, checkpoint=None, checkpoint_sha256=c.record.checkpoint_sha256, heldout=c.record.heldout
        )
        for c in saes
    ]
    store_digest = saes[0].facts.store_digest
    if store_digest is None:
        raise BadInput(f"{flag}: {saes[0].label} does not name the activations that it was trained on")
    named = Alike(subject_digest=controls.subject.digest, store_digest=store_digest, members=members)
    return ControlArm(controls.store, _external(saes), named)


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
