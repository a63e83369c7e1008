"""The stability study of one set of SAEs on one store: every pair against every null, then inference over seeds."""

from __future__ import annotations

import logging
from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.dictionaries.foreign import open_checkpoint
from husai.kernels.workers import one_torch_thread
from husai.runs.cells import Cells, code_version
from husai.runs.errors import BadInput
from husai.runs.progress import progress
from husai.stability import compare
from husai.stability.compare import Dictionary
from husai.stability.inference import jackknife
from husai.stability.nulls import Spectrum
from husai.stability.scores import mcc, pwmcc, score
from husai.training.grid import SNAPSHOTS
from husai.training.trainer import evaluate

log = logging.getLogger("husai")


def own_dictionary(folder: Path) -> Dictionary:
    """A checkpoint that the grid trained, with its state before training."""
    alive = load_file(folder / checkpoints.SPARSITY)["sparsity"] > -9
    return Dictionary(checkpoints.load(folder).W_dec, alive, load_file(folder / SNAPSHOTS)["W_dec"][0])


def brought_dictionary(
    folder: Path, store: ActivationStore, heldout: range, untrained: Path | None
) -> tuple[Dictionary, dict]:
    """(a checkpoint that a user brings, its held-out figures).

    Args:
        untrained: folder of the same SAE before training, if there is one.

    Raises:
        BadInput: it was made for another width or hook than the store's.
    """
    sae = open_checkpoint(folder)
    if "transcoder" in sae.architecture or "W_skip" in sae.weights:
        raise BadInput(f"checkpoint: {folder} is a transcoder; an SAE of the activations expected")
    made_for = sae.metadata.get("hook_name")
    if sae.d_in != store.d_in:
        raise BadInput(f"checkpoint: {folder} has d_in {sae.d_in}; the activations have {store.d_in}")
    if made_for is not None and made_for != store.manifest.hook_name:
        raise BadInput(
            f"checkpoint: {folder} was made for {made_for}; the activations are of {store.manifest.hook_name}"
        )
    before = None if untrained is None else open_checkpoint(untrained).W_dec
    if before is not None and before.shape != sae.W_dec.shape:
        raise BadInput(f"checkpoint: {untrained} has another shape than {folder}, whose untrained state it should be")
    figures, firing_rate = evaluate(sae, store, heldout)
    return Dictionary(sae.W_dec, firing_rate > 0, before), figures


def compare_all(
    cells: Cells,
    store: ActivationStore,
    labels: list[str],
    dictionaries: list[Dictionary],
    shuffled: list[Dictionary] | None,
    draws: int,
    threads: int,
    missing: dict[str, str],
) -> dict:
    """Score all pairs, one cell each, and summarise them.

    Args:
        shuffled: SAEs trained on shuffled coordinates, in the same order, or None.
        missing: null -> why it is not there.
    """
    compare.refuse_shared(labels, dictionaries)
    _, covariance = store.stats()
    with one_torch_thread():
        spectrum = Spectrum.of(covariance, store.rows)
    all_pairs = list(combinations(range(len(labels)), 2))
    scored = {}
    with one_torch_thread(), progress("scoring pairs of SAEs against the nulls", len(all_pairs)) as advance:
        for i, j in all_pairs:
            key = {
                "dictionaries": [arm[n].digest() for arm in (dictionaries, shuffled or []) if arm for n in (i, j)],
                "labels": [labels[i], labels[j]],
                "store": store.digest,
                "draws": draws,
                "code": code_version("stability"),
            }

            def compute(i: int = i, j: int = j) -> tuple[dict, list[Path]]:
                path = ("null", labels[i], labels[j])
                value = compare.pair(dictionaries[i], dictionaries[j], spectrum, draws, path, threads)
                if shuffled:
                    a, b = shuffled[i], shuffled[j]
                    value["shuffled"] = {
                        "mean": score(a.W_dec, b.W_dec, a.alive, b.alive),
                        "draws": None,
                        "histogram": compare.histogram(a.W_dec, b.W_dec, a, b).tolist(),
                    }
                return value, []

            scored[i, j] = cells.get("pair", key, compute)
            advance(1)

    present = [n for n in ("observed", *compare.GATED_NULLS, *compare.REPORTED_NULLS) if n not in missing]
    return {
        "subject_digest": store.manifest.subject_digest,
        "hook_name": store.manifest.hook_name,
        "store_digest": store.digest,
        "rows": store.rows,
        "d_in": store.d_in,
        "effective_rank": spectrum.effective_rank(),
        "spectral_groups": [len(g) for g in spectrum.groups],
        "stability": compare.summarise(labels, scored, missing),
        "pairs": [
            {"a": labels[i], "b": labels[j], **{name: value[name]["mean"] for name in present}}
            for (i, j), value in scored.items()
        ],
        "histogram_bins": compare.BINS.tolist(),
        "histograms": {n: np.sum([v[n]["histogram"] for v in scored.values()], axis=0).tolist() for n in present},
    }


def over_training(cells: Cells, folders: list[Path], digests: list[str], steps: list[int]) -> list[dict]:
    """Stability of all features at each snapshot: [{"step", "mcc": estimate, "pwmcc": estimate}]."""

    def compute() -> tuple[list[dict], list[Path]]:
        decoders = [load_file(folder / SNAPSHOTS)["W_dec"] for folder in folders]
        points = []
        for index, step in enumerate(steps):
            point = {"step": step}
            for name, function in (("mcc", mcc), ("pwmcc", pwmcc)):
                matrix = np.zeros((len(folders), len(folders)))
                for i, j in combinations(range(len(folders)), 2):
                    matrix[i, j] = matrix[j, i] = function(decoders[i][index], decoders[j][index])
                point[name] = jackknife(matrix).to_json()
            points.append(point)
        return points, []

    key = {"digests": digests, "steps": steps, "code": code_version("stability")}
    with one_torch_thread():
        return cells.get("over_training", key, compute)
