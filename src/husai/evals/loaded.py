"""Opens SAEs on a subject's activations. Every phase opens its SAEs here."""

from __future__ import annotations

import argparse
import logging
import os
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.activations.language_model import harvest_tokens
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints, foreign, sources
from husai.dictionaries.sae import SAE
from husai.evidence.levels import random_weights
from husai.evidence.schemas import Facts, Heldout, OwnMember, SAERecord, SeedGroup, refusal
from husai.runs.cells import Cells
from husai.runs.checkpoints import is_name, read_place
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, write_bytes
from husai.runs.subjects import with_stated_version
from husai.stability.study import refuse_unfitting
from husai.subjects import pretrained
from husai.subjects.harvesting import Harvesting, agreed, line, recorded, refuse_other
from husai.subjects.hooks import same_model
from husai.subjects.pretrained import LanguageModel
from husai.subjects.sources import TextSource
from husai.training.trainer import TrainingConfig, evaluate

log = logging.getLogger("husai")
FLAGS = ("checkpoint", "reference")
"""Flags that name SAEs of the subject itself."""


@dataclass(frozen=True)
class LoadedSAE:
    """A checkpoint that fits the subject and the hook."""

    folder: Path
    sae: SAE
    record: SAERecord
    """Figures on held-out documents, which neither the subject nor any SAE was trained on."""
    firing_rate: Tensor
    """Share of the held-out rows on which each feature fires, `[d_sae]`."""

    @property
    def identity(self) -> str:
        return self.record.identity

    @property
    def label(self) -> str:
        return self.record.label

    @property
    def facts(self) -> Facts:
        return self.record.facts

    @property
    def member(self) -> OwnMember:
        """The SAE as a stability study names it."""
        r, seed = self.record, self.facts.seed
        label = r.label if seed is None else f"seed{seed}"
        return OwnMember(label=label, seed=seed, checkpoint_sha256=r.checkpoint_sha256, heldout=r.heldout)


@dataclass(frozen=True)
class LoadedSAEs:
    """SAEs of one hook of a subject."""

    name: str
    """Name of the subject, as the user gave it."""
    subject: LanguageModel
    store: ActivationStore
    """Held-out activations at the hook."""
    saes: list[LoadedSAE]
    references: list[LoadedSAE] = field(default_factory=list)
    """SAEs that serve as references alone: a difference may be taken against them."""
    controls: LoadedSAEs | None = None
    """SAEs trained on the random-weights model."""
    source: TextSource = field(default_factory=TextSource)
    """Text that the held-out documents are from."""
    untrained: dict[str, Path] = field(default_factory=dict)
    """Identity of an SAE -> its checkpoint from before training; empty unless the user gives them."""
    harvesting: Harvesting = field(default_factory=Harvesting)
    """How the SAEs' activations were made, as their files state."""

    @property
    def hook_name(self) -> str:
        return self.store.manifest.hook_name

    @property
    def opened(self) -> list[LoadedSAE]:
        """The SAEs of the subject itself."""
        return [*self.saes, *self.references]

    @property
    def records(self) -> list[SAERecord]:
        """Records of `opened`, in the same order."""
        return [c.record for c in self.opened]

    @property
    def other_model(self) -> str | None:
        """The model's name in the SAEs' files, if the subject is not known by it (--same-model)."""
        names = (other_model(c.sae, self.subject.known_as) for c in self.opened)
        return next((name for name in names if name), None)

    @property
    def control_saes(self) -> list[LoadedSAE]:
        return [] if self.controls is None else self.controls.saes

    @property
    def group(self) -> SeedGroup:
        """The SAEs as evidence names them: seeds of one configuration.

        Raises:
            BadInput: the SAEs have several configurations.
        """
        return SeedGroup.of([c.record for c in self.saes])

    @property
    def training_metadata(self) -> dict | None:
        """Training settings that HUSAI wrote (`training.grid`); None for SAEs of other libraries."""
        return self.saes[0].sae.metadata.get("husai") if self.saes[0].facts.source == "husai" else None

    @property
    def recipe(self) -> TrainingConfig:
        """Training configuration of the SAEs.

        Raises:
            BadInput: another library trained the SAEs, and the configuration is unknown.
        """
        training_metadata = self.training_metadata
        if training_metadata is None:
            raise BadInput(f"checkpoint: {self.saes[0].folder} does not say how it was trained, as HUSAI's own do")
        training = training_metadata["training"]
        return TrainingConfig(**training | {"betas": tuple(training["betas"])})

    def inputs(self) -> dict[str, str]:
        """Digests of everything that the results rest on: label -> sha256."""
        digests = {"subject": self.subject.digest, "held-out activations": self.store.digest}
        records = [*self.records, *(c.record for c in self.control_saes)]
        return digests | {f"checkpoint {r.label}": r.checkpoint_sha256 for r in records}

    def untrained_inputs(self) -> dict[str, str]:
        """Digests of the untrained states that the user gives: label -> sha256."""
        seeds = {identity: seed for seed, identity in self.group.identities.items()}
        return {
            f"untrained {seeds[identity]}": foreign.checkpoint_sha256(path) for identity, path in self.untrained.items()
        }


def read_facts(sae: SAE, l0: float | None = None) -> Facts:
    """Facts about an SAE and its training. A fact that the checkpoint does not state is None.

    Args:
        l0: L0 on held-out rows. None leaves out L0 and seed, which differ between seeds.

    Raises:
        BadInput: the metadata does not have the form that HUSAI writes.
    """
    try:
        return _read_facts(sae, l0)
    except (ValidationError, LookupError, TypeError, AttributeError) as error:
        why = refusal(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise BadInput(f"checkpoint: its metadata is not what HUSAI writes ({why})") from None


def _read_facts(sae: SAE, l0: float | None) -> Facts:
    husai = sae.metadata.get("husai") or {}
    training = husai.get("training")
    trained_by_husai = training is not None
    settings = {k: v for k, v in (training or {}).items() if k not in ("tokens", "propose")}
    more: dict[str, Any] = {} if l0 is None else {"l0": l0, "seed": husai.get("seed")}
    more |= {"streamed": True} if husai.get("streamed") else {}
    return Facts(
        source="husai" if trained_by_husai else husai.get("source", "SAELens"),
        subject_digest=husai.get("subject_digest"),
        hook_name=sae.metadata.get("hook_name"),
        family=husai.get("family", sae.architecture),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=husai.get("k", sae.k),
        learning_rate=husai.get("learning_rate"),
        tokens=None if training is None else training["tokens"],
        store_digest=husai.get("store_digest"),
        training=digest(settings) if trained_by_husai else None,
        control=husai.get("control"),
        **more,
    )


def record_of(folder: Path, sae: SAE, sha256: str, heldout: Heldout) -> SAERecord:
    """Evidence record of an SAE.

    Args:
        sha256: digest of the weights file. heldout: figures on held-out rows.
    """
    facts, name = read_facts(sae, heldout.l0), identity(sae, sha256)
    label = f"{foreign.folder_of(folder).name}-{name[:8]}"
    condition, shared = label, facts.shared
    if facts.source == "husai":
        condition = f"{facts.family} d{facts.d_sae} k{facts.k}"
        condition += "" if facts.control is None else f" on {facts.control}"
        condition += f" ({digest(shared.to_json())[:6]})"
    return SAERecord(
        candidate=True,
        label=label,
        condition=condition,
        checkpoint_sha256=sha256,
        identity=name,
        facts=facts,
        heldout=heldout,
    )


def heldout_store(
    subject: LanguageModel,
    hook_name: str,
    artifact_root: Path,
    rows: int,
    threads: int,
    source: TextSource | None = None,
) -> ActivationStore:
    """Store of activations on held-out documents, which no SAE was trained on; found on disk or harvested.

    Args:
        source: text source. None: the packaged text, whose held-out documents husai-tiny never saw.

    Raises:
        BadInput: the subject has no such hook, or the documents give fewer rows than asked for.
    """
    documents, root = (source or TextSource()).heldout(), artifact_root / "activations"
    return ActivationStore.open(harvest_tokens(subject, [hook_name], documents, root, rows, threads=threads)[hook_name])


def identity(sae: SAE, sha256: str) -> str:
    """Digest that identifies an SAE. It covers the weights and every setting that changes `encode`."""
    peer = [sae.computes] if isinstance(sae, sources.PeerSAE) else []
    return digest([sha256, sae.architecture, sae.k, sae.subtract_b_dec, *peer])


def on_disk(path: Path, results: Any) -> dict[str, str | None]:
    """seed -> identity of each checkpoint that an evaluation names, read from disk; None if it cannot be read.

    Args:
        path: file of the evaluation; checkpoint paths are relative to its folder. results: its content.
    """

    def one(place: Any) -> str | None:
        try:
            folder = read_place(place, path.parent)
            with sources.cached_only():
                return identity(foreign.open_checkpoint(folder), foreign.checkpoint_sha256(folder))
        except (BadInput, OSError, TypeError, ValueError):
            return None

    paths = results.get("paths") if isinstance(results, dict) else None
    return {seed: one(place) for seed, place in paths.items()} if isinstance(paths, dict) else {}


def measure(sae: SAE, name: str, store: ActivationStore, artifact_root: Path) -> tuple[Heldout, Tensor]:
    """(held-out figures, firing rates `[d_sae]`) of an SAE on all rows of a store. All phases share the result.

    Args:
        name: identity of the SAE. artifact_root: holds the cell, in saes/.
    """
    cells = Cells(artifact_root / "saes" / "cells")
    key = {"sae": name, "store": store.digest, "threads": torch.get_num_threads(), "code": code_version(evaluate)}
    file = artifact_root / "saes" / f"{name[:16]}-{digest(key)[:16]}.safetensors"

    def compute() -> tuple[dict, list[Path]]:
        figures, firing_rate = evaluate(sae, store, range(store.rows))
        write_bytes(file, to_bytes({"firing_rate": firing_rate.contiguous()}))
        return figures.to_json(), [file]

    return Heldout.model_validate(cells.get("heldout", key, compute)), load_file(file)["firing_rate"]


def _subject(name: str, device: torch.device, harvesting: Harvesting) -> LanguageModel:
    """Load a subject whose activations are made as the SAEs' files state, and log the settings."""
    subject = pretrained.load(name, device=device, harvesting=harvesting)
    if harvesting.to_json() or not harvesting.complete:
        log.info("%s", line(recorded(harvesting, subject)))
    return subject


class Opener:
    """Cache of opened models and checkpoints: one process opens each of them once."""

    def __init__(self) -> None:
        self.sae = cache(foreign.open_checkpoint)
        self.sha256 = cache(foreign.checkpoint_sha256)
        self.subject = cache(_subject)


def open_all(
    paths: list[Path],
    store: ActivationStore,
    flag: str,
    subject: LanguageModel,
    artifact_root: Path,
    opener: Opener | None = None,
    any_name: bool = False,
) -> list[LoadedSAE]:
    """Open all checkpoints at or below these paths, each once, in order of seeds.

    Args:
        opener: cache of this process. None: a new one.
        any_name: accept SAEs whose files give the model another name (--same-model).

    Raises:
        BadInput: a path holds no checkpoint, or an SAE was made for another width, hook or subject.
    """
    opener, manifest = opener or Opener(), store.manifest
    store_harvesting = Harvesting.of_json(manifest.harvesting or {})
    opened: dict[str, LoadedSAE] = {}
    folders = foreign.find_all(paths, f"--{flag}", manifest.hook_name)
    names = user_names(folders)
    for folder in folders:
        sae, sha = opener.sae(folder), opener.sha256(folder)
        refuse_unfitting(folder, sae, manifest.hook_name, manifest.subject_digest, store.d_in, subject.same_place)
        refuse_other_model(folder, sae, subject.known_as, flag, any_name)
        sae_harvesting = read_harvesting(folder, sae, manifest.hook_name)
        refuse_other(sae_harvesting, subject.resolve(sae_harvesting), store_harvesting, f"--{flag}: {folder}")
        name = identity(sae, sha)
        if (key := digest([name, read_facts(sae, 0.0).to_json()])) in opened:
            continue  # a second copy of the same SAE; equal weights from two recipes count as two SAEs
        heldout, firing_rate = measure(sae, name, store, artifact_root)
        record = record_of(folder, sae, sha, heldout)
        if record.facts.source != "husai":
            record = record.model_copy(update={"label": names[folder], "condition": names[folder]})
        opened[key] = LoadedSAE(folder, sae, record, firing_rate)
    return sorted(opened.values(), key=lambda c: (c.record.condition, c.facts.seed or 0, c.identity))


def read_harvesting(folder: Path, sae: SAE, hook_name: str) -> Harvesting:
    """Harvesting settings of an SAE's activations, from its files."""
    return Harvesting.read(sae.metadata, hook_name, f"checkpoint: {folder}")


def common_harvesting(folders: list[Path], saes: list[SAE], hook_name: str | None, flag: str) -> Harvesting:
    """Common harvesting settings of the activations of all SAEs, from their files.

    Args:
        hook_name: hook that the SAEs read. None: the hook that each SAE names.

    Raises:
        BadInput: two SAEs contradict each other.
    """
    stated = []
    for folder, sae in zip(folders, saes, strict=True):
        stated.append((str(folder), read_harvesting(folder, sae, hook_name or str(sae.metadata.get("hook_name")))))
    return agreed(stated, f"--{flag}")


def with_multiple(harvesting: Harvesting, given: float | None) -> Harvesting:
    """Harvesting with the multiple of --max-norm-multiple.

    Raises:
        BadInput: the SAEs' files state another multiple.
    """
    requested = Harvesting(max_norm_multiple=given, complete=harvesting.complete)
    return agreed([("the files of the SAEs", harvesting), ("the command line", requested)], "--max-norm-multiple")


def subject_and_harvesting(args: argparse.Namespace, opener: Opener) -> tuple[str, Harvesting]:
    """(name of the subject with revision and dtype, how the SAEs' activations were made), both from the SAEs' files.

    With --same-model, the revision comes from the command line.

    Args:
        args: parsed flags of `evals.flags.EvalParser.add_benchmark`.

    Raises:
        BadInput: two SAEs, or an SAE and a flag, contradict each other.
    """
    paths_by_flag = {flag: foreign.find_all(getattr(args, flag, []), f"--{flag}", args.hook_name) for flag in FLAGS}
    folders = [folder for of_flag in paths_by_flag.values() for folder in of_flag]
    harvesting = common_harvesting(folders, [opener.sae(folder) for folder in folders], args.hook_name, "checkpoint")
    harvesting = with_multiple(harvesting, getattr(args, "max_norm_multiple", None))
    any_revision, dtype = getattr(args, "same_model", False), getattr(args, "dtype", None)
    return with_stated_version(
        args.subject, None if any_revision else harvesting.revision, harvesting.dtype, dtype
    ), harvesting


def user_names(checkpoints: list[Path]) -> dict[Path, str]:
    """Checkpoint -> the name that its user knows: its path below the folder that holds all checkpoints.

    A file counts by its own name if no library writes files of that name, else by its folder.
    """

    def place_of(c: Path) -> Path:
        return c if c.is_file() and c.name not in foreign.FILES else foreign.folder_of(c)

    places = {c: c if is_name(c) else Path(os.path.abspath(place_of(c))) for c in checkpoints}
    local = [place.parent for c, place in places.items() if not is_name(c)]
    root = Path(os.path.commonpath(local)) if local else Path()
    return {c: str(place if is_name(c) else place.relative_to(root)) for c, place in places.items()}


def as_references(saes: list[LoadedSAE]) -> list[LoadedSAE]:
    """The same SAEs, marked as references that are not judged."""
    return [replace(c, record=c.record.model_copy(update={"candidate": False})) for c in saes]


Ordered = TypeVar("Ordered", LoadedSAE, SAERecord)


def in_order(saes: list[Ordered]) -> list[Ordered]:
    """The SAEs in order of seeds, which is also the order of their numbers (`seed_names`).

    SAEs without a known seed are ordered by identity, because nobody can choose an identity.
    """
    return sorted(saes, key=lambda c: (c.facts.seed or 0, c.identity))


def other_model(sae: SAE, subject: str) -> str | None:
    """The model's name in an SAE's metadata, if the subject is not known by it and no digest names the subject."""
    made_for = sae.metadata.get("model_name")
    named = made_for is not None and read_facts(sae).subject_digest is None
    return str(made_for) if named and not same_model(str(made_for), subject) else None


def refuse_other_model(folder: Path, sae: SAE, subject: str, flag: str, any_name: bool = False) -> None:
    """Raise BadInput for an SAE that names another model and has no digest of its subject.

    Args:
        any_name: warn instead, because the user says that both names mean one model (--same-model).
    """
    if made_for := other_model(sae, subject):
        if not any_name:
            raise BadInput(
                f"--{flag}: {folder} was made for {made_for}; the subject is {subject}; --same-model says that both "
                "are one model"
            )
        log.warning("--same-model: %s was made for %s, which is taken for %s", folder, made_for, subject)


def refuse_twins(saes: list[LoadedSAE]) -> None:
    """Raise BadInput for two SAEs of one condition and seed, because a seed must name one SAE."""
    seeds: dict[tuple, LoadedSAE] = {}
    for c in saes:
        other = seeds.setdefault((c.record.condition, c.facts.seed), c)
        if c.facts.source == "husai" and other is not c:
            raise BadInput(f"checkpoint: {c.folder} and {other.folder} are of one condition and seed; one expected")


def controls_by_draw(paths: list[Path], opener: Opener) -> dict[int, list[Path]]:
    """Seed of a draw of the random weights -> the SAEs at or below these paths that were trained on that draw.

    Raises:
        BadInput: HUSAI did not train an SAE on a random-weights model.
    """
    folders: dict[int, list[Path]] = {}
    for folder in foreign.find_all(paths, "--random-model-checkpoint"):
        control = (opener.sae(folder).metadata.get("husai") or {}).get("control") or "none"
        draw = re.fullmatch(r"random_weights\(seed=(\d+)\)", control)
        if draw is None:
            raise BadInput(
                f"--random-model-checkpoint: the random weights that {folder} was trained on: {control}; SAEs that "
                "HUSAI trained on a random-weights model expected (runbook, SAEs of your own)"
            )
        folders.setdefault(int(draw[1]), []).append(folder)
    return dict(sorted(folders.items()))


def open_controls(
    paths: list[Path],
    name: str,
    hook_name: str,
    artifact_root: Path,
    rows: int,
    device: torch.device,
    threads: int,
    opener: Opener | None = None,
    source: TextSource | None = None,
    harvesting: Harvesting | None = None,
) -> LoadedSAEs | None:
    """Control SAEs of a benchmark: those of the first draw of the random weights. None without a path.

    Raises:
        BadInput: an SAE was trained on the model itself.
    """
    opener = opener or Opener()
    by_draw = controls_by_draw(paths, opener)
    if not by_draw:
        return None
    seed, folders = next(iter(by_draw.items()))
    if len(by_draw) > 1:
        log.info("benchmarks compare with SAEs of %s alone", random_weights(seed))
    return open_draw(folders, seed, name, hook_name, artifact_root, rows, device, threads, opener, source, harvesting)


def open_draw(
    folders: list[Path],
    seed: int,
    name: str,
    hook_name: str,
    artifact_root: Path,
    rows: int,
    device: torch.device,
    threads: int,
    opener: Opener,
    source: TextSource | None = None,
    harvesting: Harvesting | None = None,
) -> LoadedSAEs:
    """SAEs of one draw of a subject's random weights, opened on held-out activations of that draw.

    Args:
        harvesting: how the activations of the subject's own SAEs were made.
    """
    random_model = pretrained.load(name, seed, device, harvesting)
    source = source or TextSource()
    store = heldout_store(random_model, hook_name, artifact_root, rows, threads, source)
    controls = open_all(folders, store, "random-model-checkpoint", random_model, artifact_root, opener)
    refuse_twins(controls)
    return LoadedSAEs(name, random_model, store, controls, source=source, harvesting=harvesting or Harvesting())


@dataclass(frozen=True)
class Places:
    """Folders, device and threads of a benchmark."""

    output_dir: Path
    artifact_root: Path
    device: str
    threads: int
    force: bool = False
    model_cache_path: Path | None = None
    """Folder for activations of prompts. None: a folder below `artifact_root`."""

    def probe_activations(self, model: LanguageModel) -> Path:
        """Folder of a model's activations of prompts, which all SAEs of the model share."""
        return self.model_cache_path or self.artifact_root / "probe_activations" / model.activations_digest[:16]


def load(args: argparse.Namespace, device: torch.device, opener: Opener | None = None) -> LoadedSAEs:
    """Open the SAEs that a benchmark's command line names (`evals.flags.EvalParser.add_benchmark`).

    Args:
        opener: cache of this process. None: a new one.

    Raises:
        BadInput: an SAE, control or reference does not fit the subject and the hook.
    """
    opener = opener or Opener()
    name, harvesting = subject_and_harvesting(args, opener)
    subject = opener.subject(name, device, harvesting)
    place = (args.hook_name, args.artifact_root, args.rows)
    store = heldout_store(subject, *place, args.threads, args.text)
    settings = args.artifact_root, opener, args.same_model
    saes = open_all(args.checkpoint, store, "checkpoint", subject, *settings)
    candidates = {c.identity for c in saes}
    references = open_all(args.reference, store, "reference", subject, *settings)
    references = as_references([c for c in references if c.identity not in candidates])
    refuse_twins([*saes, *references])
    machine: dict[str, Any] = {"device": device, "threads": args.threads, "opener": opener, "source": args.text}
    controls = open_controls(args.random_model_checkpoint, name, *place, **machine, harvesting=harvesting)
    return LoadedSAEs(name, subject, store, saes, references, controls, args.text, harvesting=harvesting)


def to_saelens(sae: SAE, subject: LanguageModel, hook_name: str, folder: Path) -> Path:
    """Write an SAE in the SAELens layout, with the metadata that the benchmarks read; returns the folder."""
    metadata = {"prepend_bos": True} | sae.metadata | {"model_name": subject.name, "hook_name": hook_name}
    checkpoints.save(replace(sae, metadata=metadata), folder)
    return folder


def train_default(
    output_dir: Path,
    artifact_root: Path,
    subject: str,
    hook_name: str,
    device: torch.device,
    threads: int,
    force: bool,
    source: TextSource | None = None,
) -> Path:
    """Train the default SAEs of a benchmark: TopK and ReLU, five seeds each.

    Each architecture is the other's reference.

    Returns:
        Folder of the checkpoints. SAEs that were trained before are reused.
    """
    from husai.activations.source import open_store
    from husai.runs.cli import DEFAULT_SEEDS, int_list
    from husai.training.grid import members, train_or_find

    machine = artifact_root, device, threads
    store = open_store(*machine, subject=subject, hook_name=hook_name, rows=200_000, text=source)
    grid = members(int_list(DEFAULT_SEEDS), [512], [16], [3e-3], ("topk", "relu"))
    recipe = TrainingConfig(tokens=600_000, batch_size=512)
    trained = train_or_find(Cells(output_dir / "cells", force), store, grid, recipe, device, threads)
    return output_dir / Path(trained.members[0].checkpoint).parent
