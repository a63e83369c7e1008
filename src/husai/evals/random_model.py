"""What a meaningless subject scores: SAEs trained like the candidate's on the random-weights control of its subject,
and on its activations with their coordinates shuffled across rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from husai.activations import source
from husai.activations.harvest import shuffled_coordinates
from husai.activations.store import ActivationStore
from husai.evals import candidates
from husai.evals.candidate import Tested, in_order, training_store
from husai.evidence.names import ALIVE
from husai.evidence.references import same_l0
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.stability import study
from husai.stability.compare import Dictionary
from husai.training.grid import SNAPSHOTS, train_or_find
from husai.training.stack import Member

ALIKE = ("family", "d_sae", "k", "learning_rate", "tokens", "training")
"""Facts in which SAEs of the random-weights model that a user brings must equal a candidate that HUSAI trained."""


@dataclass(frozen=True)
class Arm:
    """SAEs of a meaningless subject, one for each of the candidate's, in its order."""

    store: ActivationStore
    """Whose principal components its own spectral null is drawn in."""
    dictionaries: list[Dictionary]
    results: dict
    """{"subject_digest", "store_digest", "members": [{seed, checkpoint: its folder below the output folder, None where
    it was brought; checkpoint_sha256; heldout}]}"""


def grid_of(tested: Tested) -> list[Member]:
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


def own_dictionaries(tested: Tested, before: list[Path] | None = None) -> tuple[list[Dictionary], dict[str, str]]:
    """(the candidate's dictionaries, null -> why it is not there).

    Args:
        before: checkpoints of its SAEs before training, in their order, where these do not keep them themselves.
    """
    folders = [c.folder.parent if c.folder.is_file() else c.folder for c in tested.saes]
    if tested.made is not None and all((folder / SNAPSHOTS).is_file() for folder in folders):
        return [study.own_dictionary(folder) for folder in folders], {}
    missing = {} if before else {"untrained": "the SAEs' untrained states are not beside them"}
    return _external(tested.saes, before), missing


def section_of(
    cells: Cells,
    tested: Tested,
    store: ActivationStore,
    random_model: Arm,
    shuffled: Arm | None,
    draws: int,
    threads: int,
) -> dict:
    """The stability study of the candidate's own SAEs, both arms beside its nulls, pairs matched by seed: {"members":
    [{label, seed, checkpoint_sha256, heldout}], **`study.compare_all`}.

    Args:
        store: whose principal components the spectral null is drawn in.
    """
    dictionaries, missing = own_dictionaries(tested)
    if shuffled is None:
        missing["shuffled"] = "the SAEs were not trained here"
    members = tested.members
    controls = (shuffled and shuffled.dictionaries, draws, threads, missing, random_model.dictionaries)
    found = study.compare_all(cells, store, [m["label"] for m in members], dictionaries, *controls)
    return {"members": members, **found}


def control_of(cells: Cells, random_model: Arm, labels: list[str], draws: int, threads: int) -> dict:
    """The results of the random-weights subject's SAEs, with a study of their own: `stability` and `pairs`.

    Args:
        labels: the candidate's.
    """
    missing = {"shuffled": "not part of this control"}
    if any(d.untrained is None for d in random_model.dictionaries):
        missing["untrained"] = "the SAEs' untrained states are not beside them"
    arguments = random_model.store, labels, random_model.dictionaries, None, draws, threads, missing
    found = study.compare_all(cells, *arguments, scores=ALIVE)
    return random_model.results | {name: found[name] for name in ("stability", "pairs")}


def _external(saes: list[candidates.LoadedSAE], before: list[Path] | None = None) -> list[Dictionary]:
    """Dictionaries of SAEs, with their untrained states where the user gives them."""
    pairs = zip(saes, before or [None] * len(saes), strict=True)
    return [Dictionary(c.sae.W_dec, c.alive, study.untrained_state(c.folder, c.sae, b)) for c, b in pairs]


def trained_arms(
    cells: Cells, tested: Tested, artifact_root: Path, rows: int | None, device: torch.device, threads: int
) -> tuple[ActivationStore, Arm, Arm]:
    """(the store that the candidate was trained on; SAEs trained alike on the random-weights model's activations of the
    same text; SAEs trained alike on shuffled coordinates).

    Args:
        rows: see `candidate.training_store`.

    Raises:
        BadInput: the SAEs' training is not known, or their store cannot be had.
    """
    config, grid = tested.recipe, grid_of(tested)
    store = training_store(tested, artifact_root, rows, device, threads)
    where = {"subject": tested.name, "hook_name": tested.hook_name, "rows": store.rows}
    random_store = source.open_store(artifact_root, device, threads, **where, random_seed=0)
    check_same_text(store, random_store)
    shuffled = ActivationStore.open(shuffled_coordinates(store, artifact_root / "activations"))
    root = cells.folder.parent

    def arm(control: ActivationStore) -> Arm:
        records = train_or_find(cells, control, grid, config, device, threads)["members"]
        kept = ("seed", "checkpoint", "checkpoint_sha256", "heldout")
        about = {"subject_digest": control.manifest.subject_digest, "store_digest": control.digest}
        about["members"] = [{name: r[name] for name in kept} for r in records]
        return Arm(control, [study.own_dictionary(root / r["checkpoint"]) for r in records], about)

    return store, arm(random_store), arm(shuffled)


def check_same_text(store: ActivationStore, control: ActivationStore) -> None:
    """Raise BadInput where the rows of two stores are not of the same documents, in the same order."""
    same = store.rows == control.rows and store.manifest.heldout_rows == control.manifest.heldout_rows
    if not same or not torch.equal(*(s.labels("document", 0, s.rows) for s in (store, control))):
        raise BadInput(
            f"candidate: its activations ({store.rows} rows, digest {store.digest[:12]}) are of other text than those "
            f"of the random-weights model ({control.rows} rows, digest {control.digest[:12]})"
        )


def brought_arm(
    tested: Tested, paths: list[Path], artifact_root: Path, rows: int, device: torch.device, threads: int
) -> Arm:
    """SAEs of the random-weights model that a user brings, each checked against its partner.

    Args:
        rows: of the random-weights model's held-out activations.

    Raises:
        BadInput: another number of SAEs, other seeds, or trained otherwise than the candidate's, as far as is known.
    """
    flag = "--random-model-checkpoint"
    where = tested.name, tested.hook_name, artifact_root, rows, device, threads
    model, controls = candidates.open_controls(paths, *where)
    controls = in_order(controls)
    if len(controls) != len(tested.saes):
        raise BadInput(f"{flag}: {len(controls)} SAEs for the {len(tested.saes)} of the candidate; as many expected")
    for ours, theirs in zip(tested.saes, controls, strict=True):
        if (reason := unlike(ours, theirs, tested.made is not None)) is not None:
            raise BadInput(f"{flag}: {theirs.label} was not trained as {ours.label} was: {reason}")
    store = candidates.heldout_store(model, tested.hook_name, artifact_root, rows, threads)
    members = [
        {"seed": c.facts["seed"], "checkpoint": None, "checkpoint_sha256": c.sha256, "heldout": c.heldout}
        for c in controls
    ]
    about = {"subject_digest": model.digest, "store_digest": controls[0].facts["store_digest"], "members": members}
    return Arm(store, _external(controls), about)


def unlike(ours: candidates.LoadedSAE, theirs: candidates.LoadedSAE, recipe_known: bool) -> str | None:
    """In what an SAE of the random-weights model differs from its partner; None if in nothing that counts. Where the
    partner's recipe is not known, width, activation and L0 (within 10 %) count."""
    if recipe_known:
        differing = [n for n in (*ALIKE, "seed") if ours.facts[n] != theirs.facts[n]]
        return f"{differing[0]} differs" if differing else None
    for name in ("d_sae", "architecture"):
        a, b = getattr(ours.sae, name), getattr(theirs.sae, name)
        if a != b:
            return f"{name} {b}, {a} expected"
    a, b = ours.facts["l0"], theirs.facts["l0"]
    return None if same_l0(a, b) else f"L0 differs by more than 10 %: {a:.1f} and {b:.1f}"
