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
"""How a text is cut into inputs."""


@dataclass(frozen=True)
class ControlArm:
    """SAEs of a control, one for each of those under test, in their order."""

    store: ActivationStore
    """What they were trained on."""
    dictionaries: list[Dictionary]
    alike: Alike
    """Their record in evidence."""


def own_dictionary(folder: Path) -> Dictionary:
    """A checkpoint that the grid trained, with its state before training."""
    return Dictionary(
        checkpoints.load(folder).W_dec, checkpoints.firing_rate(folder), load_file(folder / SNAPSHOTS)["W_dec"][0]
    )


def open_fitting(folder: Path, store: ActivationStore) -> SAE:
    """A checkpoint that was made for a store's activations, as far as it says.

    Raises:
        BadInput: a transcoder, or made for another width, hook or subject.
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
    """Raise BadInput for a transcoder, or an SAE of another width, hook or subject, as far as it says.

    Args:
        d_in: of the activations. same: whether two names are of one place of the subject.
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
    """Raise BadInput where a store's activations were made in another way than an SAE's, as far as both say.

    A store does not keep the tokenizer. Therefore nothing says whether its inputs begin with the BOS token, or how long
    they are, where that is HUSAI's own way.
    """
    said = Harvesting.read(sae.metadata, store.manifest.hook_name, f"checkpoint: {folder}")
    made = Harvesting.of_json(store.manifest.harvesting or {})
    known = {name: getattr(made, name) for name in TEXT if getattr(said, name) is not None}
    if open_questions := [name for name, value in known.items() if value is None]:
        log.warning("%s: %s of its activations is not compared with that of the store", folder, open_questions[0])
    if said.complete:
        return refuse_other(said, said, made, f"checkpoint: {folder}")
    cut = replace(said, prepend_bos=None, context_size=None)
    refuse_other(cut, said.without_subject(), made, f"checkpoint: {folder}")


def external_dictionary(
    folder: Path, store: ActivationStore, heldout: range, untrained: Path | None
) -> tuple[Dictionary, Heldout]:
    """(a checkpoint that a user supplies, its held-out figures).

    Args:
        untrained: folder of the same SAE before training, if there is one.

    Raises:
        BadInput: it was made for another width, hook or subject than the store's.
    """
    sae = open_fitting(folder, store)
    before = untrained_state(folder, sae, untrained)
    figures, firing_rate = evaluate(sae, store, heldout)
    return Dictionary(sae.W_dec, firing_rate, before), figures


def untrained_state(folder: Path, sae: SAE, untrained: Path | None) -> Tensor | None:
    """`W_dec` of the same SAE before training, where a checkpoint of it is given.

    Raises:
        BadInput: that checkpoint has another shape.
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
    of: Tensor | None = None,
) -> tuple[Comparison, Drawn]:
    """Score all pairs, one cell each, and summarise them.

    Args:
        missing: null -> why it is not there.
        gaussian: SAEs trained alike on Gaussian rows, in the same order.
        random_model: SAEs trained alike on the random-weights model, in the same order.
        scores: SCORES or ALIVE.
        of: prototypes of the store, unit rows `[n, d_in]`; with them, OTHERS are scored too.
    """
    independence.refuse_shared(labels, dictionaries)
    arms = {"gaussian": None if gaussian is None else gaussian.dictionaries, "random_model": random_model}
    if of is not None:
        scores += OTHERS
        dictionaries = told_apart(dictionaries, of)
        arms = {name: arm and control_apart(arm, of) for name, arm in arms.items()}
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
        others=None if of is None else [int(d.others.sum()) for d in dictionaries if d.others is not None],
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
    """Strata of the features of all pairs that have matched features."""
    made, sides = [], 2 * len(of_pairs)
    for figure, rows in compare.added([pair for pair in of_pairs if pair]).items():
        for (low, high), (n, cosines, matched) in zip(pairwise(STRATA[figure]), rows, strict=True):
            shares = {"mcc": cosines / n, "share70": matched / n} if n else {"mcc": None, "share70": None}
            made.append(Stratum(figure=figure, low=low, high=high, features=n / sides, **shares))
    return made


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
    """Score each dictionary of one side against those of the other side that are of another seed, one cell a pair of
    seeds. A pair of seeds has two scores, the mean of which counts.

    Args:
        store: the activations in whose space both sides lie. labels: one a seed.
        sides: for each seed, a dictionary of either kind. gaussian: the same, trained alike on Gaussian rows.
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
                found = []
                for one, other in ((i, j), (j, i)):
                    value = compare.pair(saes[one], partners[other], spectrum, draws, threads, scores)
                    control = compare.given(noise[0][one], noise[1][other], scores)
                    found.append(value | {"gaussian": control})
                return mean_of_two(*found), []

            scored[i, j] = cells.get("pair_across", key, compute)
            advance(1)
    return _comparison(store, labels, scored, {}, gaussian=None, others=None)


def mean_of_two(first: dict, second: dict) -> dict:
    """The mean of two outcomes of `compare.pair`, draw by draw; `mcc_gap_bound`: the larger."""

    def of_null(a: dict, b: dict) -> dict:
        means = {s: (a["mean"][s] + b["mean"][s]) / 2 for s in a["mean"]}
        means[GAP] = max(a["mean"][GAP], b["mean"][GAP])
        draws = a["draws"] and {s: np.mean([a["draws"][s], b["draws"][s]], axis=0).tolist() for s in a["draws"]}
        return {"mean": means, "draws": draws}

    merged = {null: of_null(first[null], second[null]) for null in first}
    both = compare.added([first["observed"]["strata"], second["observed"]["strata"]])
    merged["observed"]["strata"] = {figure: (np.array(rows) / 2).tolist() for figure, rows in both.items()}
    return merged


def told_apart(dictionaries: list[Dictionary], of: Tensor) -> list[Dictionary]:
    """The same dictionaries, which know which of their features are like no prototype.

    Args:
        of: prototypes, unit rows `[n, d_in]`.
    """
    return [replace(d, nearest=prototypes.nearest(d.W_dec, of)) for d in dictionaries]


def control_apart(dictionaries: list[Dictionary], of: Tensor) -> list[Dictionary]:
    """`told_apart` of a control. Where one has too few features that are like no prototype, all of its count: with
    none to compare with, any excess would be shown."""
    known = told_apart(dictionaries, of)
    few = [d.others is not None and int(d.others.sum()) < FEWEST for d in known]
    return [
        replace(d, nearest=torch.full_like(d.W_dec[:, 0], -1.0)) if f else d for d, f in zip(known, few, strict=True)
    ]


def last_third(steps: list[int]) -> list[int]:
    """The snapshots of the last third of training; the last two, if fewer lie there."""
    late = [step for step in steps if 3 * step >= 2 * steps[-1]]
    return late if len(late) > 1 else steps[-2:]


def over_training(cells: Cells, folders: list[Path], digests: list[str], steps: list[int], threads: int) -> Followed:
    """Stability of all features at each snapshot, and whether it has come to rest: the slope of mcc over the last third
    of training, pairs of seeds matched, as the change that it makes there."""

    def compute() -> tuple[dict, list[Path]]:
        decoders = [load_file(folder / SNAPSHOTS)["W_dec"] for folder in folders]
        found = {(name, step): np.zeros((len(folders),) * 2) for name in ("mcc", "pwmcc") for step in steps}

        def one(index: int, i: int, j: int) -> None:
            for name, function in (("mcc", mcc), ("pwmcc", pwmcc)):
                value = function(decoders[i][index], decoders[j][index])
                found[name, steps[index]][i, j] = found[name, steps[index]][j, i] = value

        pairs = [(index, i, j) for index in range(len(steps)) for i, j in combinations(range(len(folders)), 2)]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda pair: one(*pair), pairs))
        points = [
            Snapshot(step=step, **{name: Interval.of(jackknife(found[name, step])) for name in ("mcc", "pwmcc")})
            for step in steps
        ]
        late = last_third(steps)
        change = fitted_change(late, np.stack([found["mcc", step] for step in late]))
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
    of: Tensor | None = None,
) -> tuple[Section, Drawn]:
    """The stability study of SAEs that `training.grid.train_or_find` trained: one a seed, alike but for it.

    Args:
        random_model: SAEs of the random-weights model.
        gaussian, scores, of: see `compare_all`.
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
        of,
    )
    followed = over_training(cells, folders, [m.checkpoint_sha256 for m in members], snapshot_steps, threads)
    return Section(members=members, **dict(compared), **dict(followed)), drawn


def member_of(sae: GridMember) -> TrainedMember:
    """An SAE of a grid, as a stability study names it."""
    shared = {name: getattr(sae, name) for name in TrainedSAE.model_fields}
    return TrainedMember(**shared, label=f"seed{sae.seed}")


def reference_decoder(folder: Path, store: ActivationStore, d_sae: int, scored: list[int]) -> Tensor:
    """`W_dec` of a checkpoint that a user brings as a reference.

    Args:
        scored: seeds of the SAEs that are compared; a reference of one of them would be compared with itself.

    Raises:
        BadInput: it was made for another width, hook or subject than the store's, has another number of features, or
            comes of a seed that is scored.
    """
    sae = open_fitting(folder, store)
    if sae.d_sae != d_sae:
        raise BadInput(f"checkpoint: {folder} has {sae.d_sae} features; a reference needs d_sae {d_sae}")
    if (seed := (sae.metadata.get("husai") or {}).get("seed")) in scored:
        raise BadInput(f"checkpoint: {folder} was trained with seed {seed}, which is scored; another seed expected")
    return sae.W_dec


def mcc_with_reference(root: Path, section: Section, reference: Tensor) -> float:
    """What `mcc_alive` would be if the reference, all of whose features count as alive, were among the SAEs that are
    scored, as it was in the earlier study."""
    own = [own_dictionary(root / m.checkpoint) for m in section.members]
    with one_torch_thread():
        values = [mcc(d.W_dec[d.alive], reference) if d.alive.any() else 0.0 for d in own]
    pairs: list[dict] = section.pairs
    return float(np.mean(values + [pair["observed"]["mcc_alive"] for pair in pairs]))


def refusal(labels: list, dictionaries: list[Dictionary]) -> str | None:
    """Why the stability code refuses to compare these; None if it does not."""
    try:
        independence.refuse_shared([f"seed{label}" for label in labels], dictionaries)
    except BadInput as error:
        return str(error)
    return None


def checkpoint_files(cells: Cells, checkpoints: Iterable[str]) -> list[Path]:
    """Files of the checkpoints that a phase's cell rests on, without hidden ones that a killed process left beside.

    Args:
        checkpoints: their folders, relative to the output folder.
    """
    folders = [cells.folder.parent / checkpoint for checkpoint in checkpoints]
    return [path for folder in folders for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
