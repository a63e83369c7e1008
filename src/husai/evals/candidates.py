"""The SAEs that a benchmark is run on, with the facts that decide what each may be compared with."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.activations.language_model import harvest_tokens
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints, foreign
from husai.dictionaries.sae import SAE
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, sha256_file, write_bytes
from husai.stability.study import open_fitting
from husai.subjects import pretrained, text
from husai.subjects.pretrained import LanguageModel
from husai.training.trainer import evaluate


@dataclass(frozen=True)
class LoadedSAE:
    """A checkpoint that fits the subject and the hook."""

    folder: Path
    sha256: str
    """Of its weights file."""
    identity: str
    """Digest of the weights and of what else encode and decode depend on: figures are kept and compared under it."""
    sae: SAE
    facts: dict
    """How it was made (`facts_of`)."""
    heldout: dict
    """Figures of `training.trainer.evaluate` on documents that neither the subject nor an SAE was trained on."""
    alive: Tensor
    """Features that fire on these rows, bool `[d_sae]`."""

    @property
    def label(self) -> str:
        folder = self.folder.parent if self.folder.is_file() else self.folder
        return f"{folder.name}-{self.identity[:8]}"

    @property
    def condition(self) -> str:
        """What its siblings with other seeds share."""
        f = self.facts
        if f["source"] != "husai":
            return self.label
        name = f"{f['family']} d{f['d_sae']} k{f['k']}" + ("" if f["control"] is None else f" on {f['control']}")
        return f"{name} ({digest({k: v for k, v in f.items() if k not in ('seed', 'l0')})[:6]})"

    def to_json(self, candidate: bool = True) -> dict:
        """Its record in the results; `candidate` False: it serves as a reference alone."""
        return {
            "candidate": candidate,
            "label": self.label,
            "condition": self.condition,
            "checkpoint_sha256": self.sha256,
            "identity": self.identity,
            "facts": self.facts,
            "heldout": self.heldout,
        }


def facts_of(sae: SAE, l0: float) -> dict:
    """What matching goes by; None where a checkpoint does not say."""
    made = sae.metadata.get("husai") or {}
    training = made.get("training")
    ours = training is not None
    settings = {k: v for k, v in (training or {}).items() if k not in ("tokens", "propose")}
    return {
        "source": "husai" if ours else made.get("source", "SAELens"),
        "subject_digest": made.get("subject_digest"),
        "hook_name": sae.metadata.get("hook_name"),
        "family": made.get("family", sae.architecture),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": made.get("k", sae.k),
        "l0": l0,
        "learning_rate": made.get("learning_rate"),
        "tokens": training["tokens"] if ours else None,
        "store_digest": made.get("store_digest"),
        "training": digest(settings) if ours else None,
        "seed": made.get("seed"),
        "control": made.get("control"),
    }


def heldout_store(
    subject: LanguageModel, hook_name: str, artifact_root: Path, rows: int, threads: int
) -> ActivationStore:
    """Activations on documents that husai-tiny and every SAE of its stores were not trained on; found or harvested.

    Raises:
        BadInput: the subject has no such hook, or the documents give fewer rows.
    """
    folders = harvest_tokens(
        subject, [hook_name], text.corpus().heldout, artifact_root / "activations", rows, threads=threads
    )
    return ActivationStore.open(folders[hook_name])


def identity(sae: SAE, sha256: str) -> str:
    """What tells an SAE from others: its weights and how it encodes, which the configuration beside them says."""
    return digest([sha256, sae.architecture, sae.k, sae.subtract_b_dec])


def on_disk(path: Path, results: Any) -> dict[str, str | None]:
    """seed -> identity of the checkpoints that a confirmation, or what was brought in its place, names, as they lie
    beside it; None where one does not."""

    def one(place: Any) -> str | None:
        try:
            folder = path.parent / place
            return identity(foreign.open_checkpoint(folder), sha256_file(foreign.weights_file(folder)))
        except (BadInput, OSError, TypeError, ValueError):
            return None

    paths = results.get("paths") if isinstance(results, dict) else None
    return {seed: one(place) for seed, place in paths.items()} if isinstance(paths, dict) else {}


def measure(sae: SAE, name: str, store: ActivationStore, artifact_root: Path) -> tuple[dict, Tensor]:
    """(held-out figures, features that fire) of an SAE on all rows of a store; computed once for all phases.

    Args:
        name: its identity. artifact_root: the cell lies below it, in saes/.
    """
    cells = Cells(artifact_root / "saes" / "cells")
    key = {"sae": name, "store": store.digest, "threads": torch.get_num_threads(), "code": code_version(evaluate)}
    file = artifact_root / "saes" / f"{name[:16]}-{digest(key)[:16]}.safetensors"

    def compute() -> tuple[dict, list[Path]]:
        figures, firing_rate = evaluate(sae, store, range(store.rows))
        write_bytes(file, to_bytes({"firing_rate": firing_rate.contiguous()}))
        return figures, [file]

    return cells.get("heldout", key, compute), load_file(file)["firing_rate"] > 0


def open_all(
    paths: list[Path], store: ActivationStore, flag: str, subject: LanguageModel, artifact_root: Path
) -> list[LoadedSAE]:
    """All checkpoints at or below these paths, of any kind that can be read, each once.

    Raises:
        BadInput: a path without one, or an SAE made for another width, hook or subject.
    """
    found: dict[str, LoadedSAE] = {}
    for path in paths:
        if not path.exists():
            raise BadInput(f"--{flag}: {path} does not exist")
        for folder in [path] if path.is_file() else foreign.find(path, f"--{flag}"):
            sha = sha256_file(foreign.weights_file(folder))
            sae = open_fitting(folder, store)
            refuse_other_model(folder, sae, subject.name, flag)
            one, facts = identity(sae, sha), facts_of(sae, 0.0)
            if (key := digest([one, facts])) not in found:  # two recipes may give one SAE, which then stands for both
                figures, alive = measure(sae, one, store, artifact_root)
                found[key] = LoadedSAE(folder, sha, one, sae, facts | {"l0": figures["l0"]}, figures, alive)
    return sorted(found.values(), key=lambda c: (c.condition, c.facts["seed"] or 0, c.identity))


def refuse_other_model(folder: Path, sae: SAE, subject: str, flag: str) -> None:
    """Raise BadInput for an SAE without a subject's digest that names another model."""
    made_for = sae.metadata.get("model_name")
    if facts_of(sae, 0.0)["subject_digest"] is None and made_for and Path(made_for).name != subject:
        raise BadInput(f"--{flag}: {folder} was made for {made_for}; the subject is {subject}")


def refuse_twins(candidates: list[LoadedSAE]) -> None:
    """Raise BadInput for two SAEs of one condition and seed: which of them is meant?"""
    seeds: dict[tuple, LoadedSAE] = {}
    for c in candidates:
        if c.facts["source"] == "husai" and (other := seeds.setdefault((c.condition, c.facts["seed"]), c)) is not c:
            raise BadInput(f"checkpoint: {c.folder} and {other.folder} are of one condition and seed; one expected")


def seed_of_control(saes: Iterable[SAE]) -> int:
    """By which seed the weights of the model were drawn that all of these SAEs were trained on.

    Raises:
        BadInput: of none, or of several.
    """
    said = {(sae.metadata.get("husai") or {}).get("control") or "none" for sae in saes}
    seeds = [re.fullmatch(r"random_weights\(seed=(\d+)\)", control) for control in said]
    if len(seeds) != 1 or seeds[0] is None:
        raise BadInput(
            f"--random-model-checkpoint: the models whose SAEs they are: {', '.join(sorted(said))}; SAEs that HUSAI "
            "trained on one random-weights model expected (runbook, SAEs of your own)"
        )
    return int(seeds[0][1])


def open_controls(
    paths: list[Path], subject: str, hook_name: str, artifact_root: Path, rows: int, device: torch.device, threads: int
) -> tuple[LanguageModel | None, list[LoadedSAE]]:
    """(the random-weights model, the SAEs trained on it); (None, []) where no path is given.

    Raises:
        BadInput: an SAE of the model itself, or of several random models.
    """
    if not paths:
        return None, []
    flag = "--random-model-checkpoint"
    folders = [f for path in paths for f in ([path] if path.is_file() else foreign.find(path, flag))]
    random_model = pretrained.load(subject, seed_of_control(map(foreign.open_checkpoint, folders)), device)
    store = heldout_store(random_model, hook_name, artifact_root, rows, threads)
    controls = open_all(paths, store, "random-model-checkpoint", random_model, artifact_root)
    refuse_twins(controls)
    return random_model, controls


@dataclass(frozen=True)
class Places:
    """Where a benchmark works, and with what."""

    output_dir: Path
    artifact_root: Path
    device: str
    threads: int
    force: bool = False
    model_cache_path: Path | None = None
    """Activations of prompts; by default below `artifact_root`."""

    def probe_activations(self, model: LanguageModel) -> Path:
        """The folder of a model's activations of prompts, which all SAEs share."""
        return self.model_cache_path or self.artifact_root / "probe_activations" / model.digest[:16]


@dataclass(frozen=True)
class Lineup:
    """What a benchmark is run on."""

    subject: LanguageModel
    hook_name: str
    store: ActivationStore
    """Held-out activations of the subject."""
    saes: list[LoadedSAE]
    references: list[LoadedSAE]
    """Further SAEs, that a difference may be taken against."""
    random_model: LanguageModel | None
    controls: list[LoadedSAE]
    """SAEs trained on the random-weights model."""

    @property
    def opened(self) -> list[LoadedSAE]:
        """The SAEs of the subject itself."""
        return [*self.saes, *self.references]

    def inputs(self) -> dict[str, str]:
        """What the results rest on: label -> sha256."""
        found = {"subject": self.subject.digest, "held-out activations": self.store.digest}
        return found | {f"checkpoint {c.label}": c.sha256 for c in [*self.opened, *self.controls]}

    def records(self) -> list[dict]:
        """Of `opened`."""
        return [c.to_json() for c in self.saes] + [c.to_json(candidate=False) for c in self.references]


def lineup(args: argparse.Namespace, device: torch.device) -> Lineup:
    """What a benchmark's command line names (`evals.flags.Parser.add_benchmark`).

    Raises:
        BadInput: whatever does not fit the subject and the hook.
    """
    subject = pretrained.load(args.subject, device=device)
    place = (args.hook_name, args.artifact_root, args.rows)
    store = heldout_store(subject, *place, args.threads)
    saes = open_all(args.checkpoint, store, "checkpoint", subject, args.artifact_root)
    known = {c.identity for c in saes}
    references = open_all(args.reference, store, "reference", subject, args.artifact_root)
    references = [c for c in references if c.identity not in known]
    refuse_twins([*saes, *references])
    controls = open_controls(args.random_model_checkpoint, args.subject, *place, device, args.threads)
    return Lineup(subject, args.hook_name, store, saes, references, *controls)


def to_saelens(sae: SAE, subject: LanguageModel, hook_name: str, folder: Path) -> Path:
    """Write an SAE in the SAELens layout, with what the benchmarks look for in its metadata."""
    metadata = sae.metadata | {"model_name": subject.name, "hook_name": hook_name, "prepend_bos": True}
    checkpoints.save(SAE(sae.weights, sae.architecture, sae.k, sae.subtract_b_dec, metadata), folder)
    return folder


def train_default(
    output_dir: Path, artifact_root: Path, subject: str, hook_name: str, device: torch.device, threads: int, force: bool
) -> Path:
    """The SAEs that a benchmark takes where none is named: TopK and ReLU, each the other's reference, five seeds.

    Returns:
        The folder that holds them; found where they were trained before.
    """
    from husai.activations.source import open_store
    from husai.runs.cli import DEFAULT_SEEDS, int_list
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig

    store = open_store(artifact_root, device, threads, subject=subject, hook_name=hook_name, rows=200_000)
    grid = members(int_list(DEFAULT_SEEDS), [512], [16], [3e-3], ("topk", "relu"))
    recipe = TrainingConfig(tokens=600_000, batch_size=512)
    trained = train_or_find(Cells(output_dir / "cells", force), store, grid, recipe, device, threads)
    return output_dir / Path(trained["members"][0]["checkpoint"]).parent
