"""The stability study of one set of SAEs on one store: every pair against every null, then inference over seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from husai.activations.outliers import moments
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints, recipes
from husai.dictionaries.foreign import open_checkpoint
from husai.dictionaries.sae import SAE
from husai.evidence import rules, stability
from husai.evidence.estimates import fitted_change, jackknife
from husai.evidence.names import GAP, OTHERS, SCORES, STRATA
from husai.evidence.schemas import (
    Alike,
    Comparison,
    Convergence,
    Drawn,
    Followed,
    GridMember,
    Heldout,
    Interval,
    Section,
    Snapshot,
    Stratum,
    TrainedMember,
    TrainedSAE,
)
from husai.kernels.workers import one_torch_thread
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.progress import progress
from husai.stability import compare, independence, prototypes
from husai.stability.compare import Dictionary
from husai.stability.nulls import Spectrum
from husai.stability.scores import FEWEST, mcc, pwmcc
from husai.subjects.harvesting import Harvesting, refuse_other
from husai.subjects.hooks import same_place
from husai.training.grid import SNAPSHOTS
from husai.training.trainer import evaluate

log = logging.getLogger("husai")
TEXT = ("prepend_bos", "context_size")
"""Settings of how a text is cut into inputs."""


@dataclass(frozen=True)
class ControlArm:
    """SAEs of a control, one for each of those under test, in their order."""

    store: ActivationStore
    """Activations that the SAEs were trained on."""
    dictionaries: list[Dictionary]
    alike: Alike
    """Record of the SAEs in evidence."""


def own_dictionary(folder: Path) -> Dictionary:
    """Dictionary of a checkpoint that HUSAI trained, with its untrained state."""
    return Dictionary(
        checkpoints.load(folder).W_dec, checkpoints.firing_rate(folder), load_file(folder / SNAPSHOTS)["W_dec"][0]
    )


def open_fitting(folder: Path, store: ActivationStore) -> SAE:
    """Open a checkpoint that fits a store's activations, as far as its files state.

    Raises:
        BadInput: the checkpoint is a transcoder, or was made for another width, hook or subject.
    """
    sae = open_checkpoint(folder)
    refuse_unfitting(folder, sae, store.manifest.hook_name, store.manifest.subject_digest, store.d_in)
    refuse_other_way(folder, sae, store)
    return sae


def refuse_unfitting(
    folder: Path,
    sae: SAE,
    hook_name: str,
    subject_digest: str,
    d_in: int,
    same: Callable[[str, str], bool] = same_place,
) -> None:
    """Raise BadInput for a transcoder, or for an SAE whose files name another width, hook or subject.

    Args:
        d_in: width of the activations. same: function that tells whether two names mean one place of the subject.
    """
    if "transcoder" in sae.architecture or "W_skip" in sae.weights:
        raise BadInput(f"checkpoint: {folder} is a transcoder; an SAE of the activations expected")
    made_for, subject = recipes.place_of(sae), (sae.metadata.get("husai") or {}).get("subject_digest")
    if d_in != sae.d_in:
        raise BadInput(f"checkpoint: {folder} has d_in {sae.d_in}; the activations have {d_in}")
    if made_for is not None and not same(made_for, hook_name):
        raise BadInput(f"checkpoint: {folder} was made for {made_for}; the activations are of {hook_name}")
    Harvesting.read(sae.metadata, hook_name, f"checkpoint: {folder}")  # refuses what cannot be applied
    if sae.metadata.get("checkpoint_step") == 0:
        raise BadInput(f"checkpoint: {folder} is a state from before training; give it as --untrained")
    if subject is not None and subject != subject_digest:
        raise BadInput(f"checkpoint: {folder} was trained on another subject than the activations are of")


def refuse_other_way(folder: Path, sae: SAE, store: ActivationStore) -> None:
    """Raise BadInput if a store's activations and an SAE's are known to be made in different ways.

    A store does not keep the tokenizer. Therefore it is unknown whether inputs that HUSAI made in its own way begin
    with the BOS token, and how long they are.
    """
    sae_harvesting = Harvesting.read(sae.metadata, store.manifest.hook_name, f"checkpoint: {folder}")
    store_harvesting = Harvesting.of_json(store.manifest.harvesting or {})
    known = {name: getattr(store_harvesting, name) for name in TEXT if getattr(sae_harvesting, name) is not None}
    if open_questions := [name for name, value in known.items() if value is None]:
        log.warning("%s: %s of its activations is not compared with that of the store", folder, open_questions[0])
    if sae_harvesting.complete:
        return refuse_other(sae_harvesting, sae_harvesting, store_harvesting, f"checkpoint: {folder}")
    cut = replace(sae_harvesting, prepend_bos=None, context_size=None)
    refuse_other(cut, sae_harvesting.without_subject(), store_harvesting, f"checkpoint: {folder}")


def external_dictionary(
    folder: Path, store: ActivationStore, heldout: range, untrained: Path | None
) -> tuple[Dictionary, Heldout]:
    """(dictionary of a user-supplied checkpoint, its held-out figures).

    Args:
        untrained: folder of the same SAE before training; None if there is none.

    Raises:
        BadInput: it was made for another width, hook or subject than the store's.
    """
    sae = open_fitting(folder, store)
    before = untrained_state(folder, sae, untrained)
    figures, firing_rate = evaluate(sae, store, heldout)
    return Dictionary(sae.W_dec, firing_rate, before), figures


def untrained_state(folder: Path, sae: SAE, untrained: Path | None) -> Tensor | None:
    """`W_dec` of the same SAE before training; None without a checkpoint of that state.

    Raises:
        BadInput: the untrained state has another shape.
    """
    before = None if untrained is None else open_checkpoint(untrained).W_dec
    if before is not None and before.shape != sae.W_dec.shape:
        raise BadInput(f"checkpoint: {untrained} has another shape than {folder}, whose untrained state it should be")
    return before


def compare_all(
    cells: Cells,
    store: ActivationStore,
    labels: list[str],
    dictionaries: list[Dictionary],
    draws: int,
    threads: int,
    missing: dict[str, str],
    gaussian: ControlArm | None = None,
    random_model: list[Dictionary] | None = None,
    scores: tuple[str, ...] = SCORES,
    prototype_rows: Tensor | None = None,
) -> tuple[Comparison, Drawn]:
    """Score all pairs, one cell for each, and summarise the scores.

    Args:
        missing: null -> why it is missing.
        gaussian: SAEs trained by the same recipe on Gaussian rows, in the same order.
        random_model: SAEs trained by the same recipe on the random-weights model, in the same order.
        scores: SCORES or ALIVE.
        prototype_rows: prototypes of the store, unit rows `[n, d_in]`. With prototypes, OTHERS are scored too.
    """
    independence.refuse_shared(labels, dictionaries)
    arms = {"gaussian": None if gaussian is None else gaussian.dictionaries, "random_model": random_model}
    if prototype_rows is not None:
        scores += OTHERS
        dictionaries = with_nearest_prototype(dictionaries, prototype_rows)
        arms = {name: arm and control_apart(arm, prototype_rows) for name, arm in arms.items()}
    mean, covariance = moments(store)
    with one_torch_thread():
        spectrum = Spectrum.of(covariance, store.rows, mean)
    all_pairs = list(combinations(range(len(labels)), 2))
    scored = {}
    with one_torch_thread(), progress("scoring pairs of SAEs against the nulls", len(all_pairs)) as advance:
        for i, j in all_pairs:
            key = {
                "dictionaries": [[arm and arm[n].content() for n in (i, j)] for arm in (dictionaries, *arms.values())],
                "store": store.digest,
                "draws": draws,
                "scores": scores,
                "code": code_version(compare_all),
            }

            def compute(i: int = i, j: int = j) -> tuple[dict, list[Path]]:
                value = compare.pair(dictionaries[i], dictionaries[j], spectrum, draws, threads, scores)
                return value | {n: compare.given(arm[i], arm[j], scores) for n, arm in arms.items() if arm}, []

            scored[i, j] = cells.get("pair", key, compute)
            advance(1)

    present = ["observed", *stability.computed(scored, missing)]
    compared = _comparison(
        store,
        labels,
        scored,
        missing,
        gaussian=None if gaussian is None else gaussian.alike,
        others=None if prototype_rows is None else [int(d.others.sum()) for d in dictionaries if d.others is not None],
    )
    drawn = Drawn(
        spectral_groups=[len(g) for g in spectrum.groups],
        histogram_bins=compare.BINS.tolist(),
        histograms={n: np.sum([v[n]["histogram"] for v in scored.values()], axis=0).tolist() for n in present},
    )
    return compared, drawn


def _comparison(
    store: ActivationStore, labels: list[str], scored: dict[tuple[int, int], dict], missing: dict[str, str], **more
) -> Comparison:
    with one_torch_thread():
        rank = Spectrum.of(moments(store)[1], store.rows).effective_rank()
    present = ["observed", *stability.computed(scored, missing)]
    return Comparison(
        subject_digest=store.manifest.subject_digest,
        hook_name=store.manifest.hook_name,
        store_digest=store.digest,
        rows=store.rows,
        d_in=store.d_in,
        effective_rank=rank,
        stability=stability.summarise(labels, scored, missing),
        pairs=[
            {"a": labels[i], "b": labels[j], **{name: value[name]["mean"] for name in present}}
            for (i, j), value in scored.items()
        ],
        strata=_strata([value["observed"]["strata"] for value in scored.values()]),
        **more,
    )


def _strata(of_pairs: list[dict]) -> list[Stratum]:
    """Strata of the features, over all pairs with matched features."""
    rows_of_strata, sides = [], 2 * len(of_pairs)
    for figure, rows in compare.added([pair for pair in of_pairs if pair]).items():
        for (low, high), (n, cosines, matched) in zip(pairwise(STRATA[figure]), rows, strict=True):
            shares = {"mcc": cosines / n, "share70": matched / n} if n else {"mcc": None, "share70": None}
            rows_of_strata.append(Stratum(figure=figure, low=low, high=high, features=n / sides, **shares))
    return rows_of_strata


def compare_across(
    cells: Cells,
    store: ActivationStore,
    labels: list[str],
    sides: tuple[list[Dictionary], list[Dictionary]],
    draws: int,
    threads: int,
    gaussian: tuple[list[Dictionary], list[Dictionary]],
    scores: tuple[str, ...] = SCORES,
) -> Comparison:
    """Score each dictionary of one side against the dictionaries of other seeds on the other side.

    Each pair of seeds is one cell. It has two scores, whose mean counts.

    Args:
        store: activations of the space of both sides. labels: one for each seed.
        sides: two lists with one dictionary for each seed. gaussian: the same, trained on Gaussian rows.
    """
    mean, covariance = moments(store)
    with one_torch_thread():
        spectrum = Spectrum.of(covariance, store.rows, mean)
    arms = [[replace(d, untrained=None) for d in side] for side in (*sides, *gaussian)]
    saes, partners, *noise = arms
    pairs = list(combinations(range(len(labels)), 2))
    scored = {}
    with one_torch_thread(), progress("scoring pairs of SAEs and transcoders against the nulls", len(pairs)) as advance:
        for i, j in pairs:
            key = {
                "dictionaries": [[arm[n].content() for n in (i, j)] for arm in arms],
                "store": store.digest,
                "draws": draws,
                "scores": scores,
                "code": code_version(compare_across),
            }

            def compute(i: int = i, j: int = j) -> tuple[dict, list[Path]]:
                directions = []
                for one, other in ((i, j), (j, i)):
                    value = compare.pair(saes[one], partners[other], spectrum, draws, threads, scores)
                    control = compare.given(noise[0][one], noise[1][other], scores)
                    directions.append(value | {"gaussian": control})
                return mean_of_two(*directions), []

            scored[i, j] = cells.get("pair_across", key, compute)
            advance(1)
    return _comparison(store, labels, scored, {}, gaussian=None, others=None)


def mean_of_two(first: dict, second: dict) -> dict:
    """Mean of two results of `compare.pair`, draw by draw. `mcc_gap_bound` is the larger of the two."""

    def of_null(a: dict, b: dict) -> dict:
        means = {s: (a["mean"][s] + b["mean"][s]) / 2 for s in a["mean"]}
        means[GAP] = max(a["mean"][GAP], b["mean"][GAP])
        draws = a["draws"] and {s: np.mean([a["draws"][s], b["draws"][s]], axis=0).tolist() for s in a["draws"]}
        return {"mean": means, "draws": draws}

    merged = {null: of_null(first[null], second[null]) for null in first}
    strata = compare.added([first["observed"]["strata"], second["observed"]["strata"]])
    merged["observed"]["strata"] = {figure: (np.array(rows) / 2).tolist() for figure, rows in strata.items()}
    return merged


def with_nearest_prototype(dictionaries: list[Dictionary], prototype_rows: Tensor) -> list[Dictionary]:
    """The same dictionaries, with each feature's cosine with its nearest prototype.

    Args:
        prototype_rows: prototypes, unit rows `[n, d_in]`.
    """
    return [replace(d, nearest=prototypes.nearest(d.W_dec, prototype_rows)) for d in dictionaries]


def control_apart(dictionaries: list[Dictionary], prototype_rows: Tensor) -> list[Dictionary]:
    """`with_nearest_prototype` for a control.

    All features of a control count if too few of them are like no prototype: any excess over an empty set would pass.
    """
    known = with_nearest_prototype(dictionaries, prototype_rows)
    few = [d.others is not None and int(d.others.sum()) < FEWEST for d in known]
    return [
        replace(d, nearest=torch.full_like(d.W_dec[:, 0], -1.0)) if f else d for d, f in zip(known, few, strict=True)
    ]


def last_third(steps: list[int]) -> list[int]:
    """Steps of the snapshots in the last third of training, at least the last two snapshots."""
    late = [step for step in steps if 3 * step >= 2 * steps[-1]]
    return late if len(late) > 1 else steps[-2:]


def over_training(cells: Cells, folders: list[Path], digests: list[str], steps: list[int], threads: int) -> Followed:
    """Stability of all features at each snapshot, and whether it is at rest at the end of training.

    The change at rest is the slope of mcc over the last third of training, times the length of that third. Pairs of
    seeds are matched across snapshots.
    """

    def compute() -> tuple[dict, list[Path]]:
        decoders = [load_file(folder / SNAPSHOTS)["W_dec"] for folder in folders]
        matrices = {(name, step): np.zeros((len(folders),) * 2) for name in ("mcc", "pwmcc") for step in steps}

        def one(index: int, i: int, j: int) -> None:
            for name, function in (("mcc", mcc), ("pwmcc", pwmcc)):
                value = function(decoders[i][index], decoders[j][index])
                matrices[name, steps[index]][i, j] = matrices[name, steps[index]][j, i] = value

        pairs = [(index, i, j) for index in range(len(steps)) for i, j in combinations(range(len(folders)), 2)]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda pair: one(*pair), pairs))
        points = [
            Snapshot(step=step, **{name: Interval.of(jackknife(matrices[name, step])) for name in ("mcc", "pwmcc")})
            for step in steps
        ]
        late = last_third(steps)
        change = fitted_change(late, np.stack([matrices["mcc", step] for step in late]))
        moved = Interval.of(jackknife(change))
        rest = Convergence(from_step=late[0], to_step=late[-1], moved=moved, converged=rules.at_rest(moved))
        return Followed(over_training=points, convergence=rest).to_json(), []

    key = {"digests": digests, "steps": steps, "code": code_version(over_training)}
    with one_torch_thread():
        return Followed.model_validate(cells.get("over_training", key, compute))


def score_trained(
    cells: Cells,
    store: ActivationStore,
    saes: Sequence[GridMember],
    snapshot_steps: list[int],
    draws: int,
    threads: int,
    gaussian: ControlArm | None = None,
    random_model: Sequence[GridMember] | None = None,
    scores: tuple[str, ...] = SCORES,
    prototype_rows: Tensor | None = None,
) -> tuple[Section, Drawn]:
    """Stability study of SAEs from `training.grid.train_or_find`, which differ in their seed alone.

    Args:
        random_model: SAEs of the random-weights model, in the same order.
        gaussian, scores, prototype_rows: see `compare_all`.
    """
    root = cells.folder.parent
    folders = [root / m.checkpoint for m in saes]
    members = [member_of(m) for m in saes]
    compared, drawn = compare_all(
        cells,
        store,
        [m.label for m in members],
        [own_dictionary(folder) for folder in folders],
        draws,
        threads,
        {} if gaussian else {"gaussian": "not part of this study"},
        gaussian,
        None if random_model is None else [own_dictionary(root / m.checkpoint) for m in random_model],
        scores,
        prototype_rows,
    )
    followed = over_training(cells, folders, [m.checkpoint_sha256 for m in members], snapshot_steps, threads)
    return Section(members=members, **dict(compared), **dict(followed)), drawn


def member_of(sae: GridMember) -> TrainedMember:
    """Record of a grid's SAE in a stability study."""
    shared = {name: getattr(sae, name) for name in TrainedSAE.model_fields}
    return TrainedMember(**shared, label=f"seed{sae.seed}")


def reference_decoder(folder: Path, store: ActivationStore, d_sae: int, scored: list[int]) -> Tensor:
    """`W_dec` of a user-supplied reference.

    Args:
        scored: seeds of the compared SAEs. A reference with one of these seeds would be compared with itself.

    Raises:
        BadInput: the reference has another width, hook, subject or number of features, or one of the scored seeds.
    """
    sae = open_fitting(folder, store)
    if sae.d_sae != d_sae:
        raise BadInput(f"checkpoint: {folder} has {sae.d_sae} features; a reference needs d_sae {d_sae}")
    if (seed := (sae.metadata.get("husai") or {}).get("seed")) in scored:
        raise BadInput(f"checkpoint: {folder} was trained with seed {seed}, which is scored; another seed expected")
    return sae.W_dec


def mcc_with_reference(root: Path, section: Section, reference: Tensor) -> float:
    """`mcc_alive` if the reference were among the scored SAEs, as in the earlier study.

    All features of the reference count as alive.
    """
    dictionaries = [own_dictionary(root / m.checkpoint) for m in section.members]
    with one_torch_thread():
        values = [mcc(d.W_dec[d.alive], reference) if d.alive.any() else 0.0 for d in dictionaries]
    pairs: list[dict] = section.pairs
    return float(np.mean(values + [pair["observed"]["mcc_alive"] for pair in pairs]))


def refusal(labels: list, dictionaries: list[Dictionary]) -> str | None:
    """Reason why the stability code refuses to compare the dictionaries; None if it accepts them."""
    try:
        independence.refuse_shared([f"seed{label}" for label in labels], dictionaries)
    except BadInput as error:
        return str(error)
    return None


def checkpoint_files(cells: Cells, checkpoints: Iterable[str]) -> list[Path]:
    """Files of the checkpoints that a phase's cell rests on. Hidden files of killed processes are left out.

    Args:
        checkpoints: folders of the checkpoints, relative to the output folder.
    """
    folders = [cells.folder.parent / checkpoint for checkpoint in checkpoints]
    return [path for folder in folders for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
