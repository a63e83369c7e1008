"""SAEs opened on a subject's activations: the one opener, and what it gives."""

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
from husai.runs.subjects import as_said
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
    """Its held-out figures are of documents that neither the subject nor an SAE was trained on."""
    firing_rate: Tensor
    """Share of these rows on which each feature fires, `[d_sae]`."""

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
        """Its record in a stability study."""
        r, seed = self.record, self.facts.seed
        label = r.label if seed is None else f"seed{seed}"
        return OwnMember(label=label, seed=seed, checkpoint_sha256=r.checkpoint_sha256, heldout=r.heldout)


@dataclass(frozen=True)
class LoadedSAEs:
    """SAEs of one hook of a subject."""

    name: str
    """The subject as it was named."""
    subject: LanguageModel
    store: ActivationStore
    """Held-out activations at the hook."""
    saes: list[LoadedSAE]
    references: list[LoadedSAE] = field(default_factory=list)
    """SAEs that a difference may be taken against, and nothing else."""
    controls: LoadedSAEs | None = None
    """SAEs trained on the random-weights model."""
    source: TextSource = field(default_factory=TextSource)
    """The text whose held-out documents the store is of."""
    untrained: dict[str, Path] = field(default_factory=dict)
    """Identity of an SAE -> its checkpoint from before training, where the user gives these."""
    said: Harvesting = field(default_factory=Harvesting)
    """How their activations were made, by their files."""

    @property
    def hook_name(self) -> str:
        return self.store.manifest.hook_name

    @property
    def opened(self) -> list[LoadedSAE]:
        """The SAEs of the subject itself."""
        return [*self.saes, *self.references]

    @property
    def records(self) -> list[SAERecord]:
        """One for each of `opened`."""
        return [c.record for c in self.opened]

    @property
    def other_model(self) -> str | None:
        """Name of the model in the files of the SAEs, where it is no name of the subject (--same-model)."""
        names = (other_model(c.sae, self.subject.known_as) for c in self.opened)
        return next((name for name in names if name), None)

    @property
    def control_saes(self) -> list[LoadedSAE]:
        return [] if self.controls is None else self.controls.saes

    @property
    def group(self) -> SeedGroup:
        """The SAEs as evidence names them.

        Raises:
            BadInput: they are of several configurations.
        """
        return SeedGroup.of([c.record for c in self.saes])

    @property
    def made(self) -> dict | None:
        """How the SAEs were trained (`training.grid`); None where it is not known."""
        return self.saes[0].sae.metadata.get("husai") if self.saes[0].facts.source == "husai" else None

    @property
    def recipe(self) -> TrainingConfig:
        """Their training.

        Raises:
            BadInput: it is not known, because they were trained elsewhere.
        """
        if self.made is None:
            raise BadInput(f"checkpoint: {self.saes[0].folder} does not say how it was trained, as HUSAI's own do")
        return TrainingConfig(**self.made["training"] | {"betas": tuple(self.made["training"]["betas"])})

    def inputs(self) -> dict[str, str]:
        """What the results rest on: label -> sha256."""
        found = {"subject": self.subject.digest, "held-out activations": self.store.digest}
        records = [*self.records, *(c.record for c in self.control_saes)]
        return found | {f"checkpoint {r.label}": r.checkpoint_sha256 for r in records}

    def untrained_inputs(self) -> dict[str, str]:
        """The states from before training that the user gives: label -> sha256."""
        seeds = {identity: seed for seed, identity in self.group.identities.items()}
        return {
            f"untrained {seeds[identity]}": foreign.checkpoint_sha256(path) for identity, path in self.untrained.items()
        }


def facts_of(sae: SAE, l0: float | None = None) -> Facts:
    """How an SAE was made; None where a checkpoint does not say.

    Args:
        l0: on held-out rows; None: the facts that SAEs of other seeds share.

    Raises:
        BadInput: its metadata is not what HUSAI writes.
    """
    try:
        return _facts_of(sae, l0)
    except (ValidationError, LookupError, TypeError, AttributeError) as error:
        why = refusal(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise BadInput(f"checkpoint: its metadata is not what HUSAI writes ({why})") from None


def _facts_of(sae: SAE, l0: float | None) -> Facts:
    made = sae.metadata.get("husai") or {}
    training = made.get("training")
    ours = training is not None
    settings = {k: v for k, v in (training or {}).items() if k not in ("tokens", "propose")}
    of_one_seed: dict[str, Any] = {} if l0 is None else {"l0": l0, "seed": made.get("seed")}
    return Facts(
        source="husai" if ours else made.get("source", "SAELens"),
        subject_digest=made.get("subject_digest"),
        hook_name=sae.metadata.get("hook_name"),
        family=made.get("family", sae.architecture),
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        k=made.get("k", sae.k),
        learning_rate=made.get("learning_rate"),
        tokens=None if training is None else training["tokens"],
        store_digest=made.get("store_digest"),
        training=digest(settings) if ours else None,
        control=made.get("control"),
        **of_one_seed,
    )


def record_of(folder: Path, sae: SAE, sha256: str, heldout: Heldout) -> SAERecord:
    """The record of an SAE.

    Args:
        sha256: of its weights file. heldout: its figures on held-out rows.
    """
    facts, name = facts_of(sae, heldout.l0), identity(sae, sha256)
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
    """Activations on held-out documents of a source, which no SAE of a store of this source was trained on; found or
    harvested.

    Args:
        source: by default the packaged text, whose held-out documents husai-tiny was not trained on.

    Raises:
        BadInput: the subject has no such hook, or the documents give fewer rows.
    """
    documents, root = (source or TextSource()).heldout(), artifact_root / "activations"
    return ActivationStore.open(harvest_tokens(subject, [hook_name], documents, root, rows, threads=threads)[hook_name])


def identity(sae: SAE, sha256: str) -> str:
    """What tells an SAE from others: its weights and how it encodes, which the configuration beside them says."""
    peer = [sae.computes] if isinstance(sae, sources.PeerSAE) else []
    return digest([sha256, sae.architecture, sae.k, sae.subtract_b_dec, *peer])


def on_disk(path: Path, results: Any) -> dict[str, str | None]:
    """seed -> identity of the checkpoints that an evaluation of the candidate names, as they lie beside it; None where
    one does not."""

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
    """(held-out figures, firing rates `[d_sae]`) of an SAE on all rows of a store; computed once for all phases.

    Args:
        name: its identity. artifact_root: the cell lies below it, in saes/.
    """
    cells = Cells(artifact_root / "saes" / "cells")
    key = {"sae": name, "store": store.digest, "threads": torch.get_num_threads(), "code": code_version(evaluate)}
    file = artifact_root / "saes" / f"{name[:16]}-{digest(key)[:16]}.safetensors"

    def compute() -> tuple[dict, list[Path]]:
        figures, firing_rate = evaluate(sae, store, range(store.rows))
        write_bytes(file, to_bytes({"firing_rate": firing_rate.contiguous()}))
        return figures.to_json(), [file]

    return Heldout.model_validate(cells.get("heldout", key, compute)), load_file(file)["firing_rate"]


def _subject(name: str, device: torch.device, said: Harvesting) -> LanguageModel:
    """A subject whose activations are made as the files of SAEs say; the log says how."""
    subject = pretrained.load(name, device=device, harvesting=said)
    if said.to_json() or not said.complete:
        log.info("%s", line(recorded(said, subject)))
    return subject


class Opener:
    """Opens each model and checkpoint once, however many steps of one process read it."""

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
    """All checkpoints at or below these paths, of any kind that can be read, each once, in order of seeds.

    Args:
        opener: of a process that has read some of them before.
        any_name: accept SAEs whose files give their model another name (--same-model).

    Raises:
        BadInput: a path without one, or an SAE made for another width, hook or subject.
    """
    opener, about = opener or Opener(), store.manifest
    made = Harvesting.of_json(about.harvesting or {})
    opened: dict[str, LoadedSAE] = {}
    folders = foreign.find_all(paths, f"--{flag}", about.hook_name)
    names = names_of(folders)
    for folder in folders:
        sae, sha = opener.sae(folder), opener.sha256(folder)
        refuse_unfitting(folder, sae, about.hook_name, about.subject_digest, store.d_in, subject.same_place)
        refuse_other_model(folder, sae, subject.known_as, flag, any_name)
        said = said_by(folder, sae, about.hook_name)
        refuse_other(said, subject.resolve(said), made, f"--{flag}: {folder}")
        name = identity(sae, sha)
        if (key := digest([name, facts_of(sae, 0.0).to_json()])) in opened:
            continue  # the same SAE again; two recipes that give one SAE are two
        heldout, firing_rate = measure(sae, name, store, artifact_root)
        record = record_of(folder, sae, sha, heldout)
        if record.facts.source != "husai":
            record = record.model_copy(update={"label": names[folder], "condition": names[folder]})
        opened[key] = LoadedSAE(folder, sae, record, firing_rate)
    return sorted(opened.values(), key=lambda c: (c.record.condition, c.facts.seed or 0, c.identity))


def said_by(folder: Path, sae: SAE, hook_name: str) -> Harvesting:
    """How an SAE's activations were made, by its files."""
    return Harvesting.read(sae.metadata, hook_name, f"checkpoint: {folder}")


def agreed_of(folders: list[Path], saes: list[SAE], hook_name: str | None, flag: str) -> Harvesting:
    """How the activations of all these SAEs were made, by their files.

    Args:
        hook_name: None: the one that each SAE names.

    Raises:
        BadInput: two say different things.
    """
    said = []
    for folder, sae in zip(folders, saes, strict=True):
        said.append((str(folder), said_by(folder, sae, hook_name or str(sae.metadata.get("hook_name")))))
    return agreed(said, f"--{flag}")


def with_multiple(said: Harvesting, given: float | None) -> Harvesting:
    """How activations are made, with --max-norm-multiple.

    Raises:
        BadInput: the files of the SAEs say another one.
    """
    asked = Harvesting(max_norm_multiple=given, complete=said.complete)
    return agreed([("the files of the SAEs", said), ("the command line", asked)], "--max-norm-multiple")


def agreed_by(args: argparse.Namespace, opener: Opener) -> tuple[str, Harvesting]:
    """(the subject in the revision and dtype that the files of the SAEs say, how their activations were made).

    Args:
        args: of `evals.flags.EvalParser.add_benchmark`.

    With --same-model the revision is the command line's.

    Raises:
        BadInput: two SAEs, or an SAE and a flag, say different things.
    """
    named = {flag: foreign.find_all(getattr(args, flag, []), f"--{flag}", args.hook_name) for flag in FLAGS}
    folders = [folder for of_flag in named.values() for folder in of_flag]
    found = agreed_of(folders, [opener.sae(folder) for folder in folders], args.hook_name, "checkpoint")
    found = with_multiple(found, getattr(args, "max_norm_multiple", None))
    any_revision, dtype = getattr(args, "same_model", False), getattr(args, "dtype", None)
    return as_said(args.subject, None if any_revision else found.revision, found.dtype, dtype), found


def names_of(checkpoints: list[Path]) -> dict[Path, str]:
    """What a user calls each checkpoint: its folder, or a file of another name than a library gives, below the folder
    that holds all of them."""

    def place_of(c: Path) -> Path:
        return c if c.is_file() and c.name not in foreign.FILES else foreign.folder_of(c)

    places = {c: c if is_name(c) else Path(os.path.abspath(place_of(c))) for c in checkpoints}
    local = [place.parent for c, place in places.items() if not is_name(c)]
    root = Path(os.path.commonpath(local)) if local else Path()
    return {c: str(place if is_name(c) else place.relative_to(root)) for c, place in places.items()}


def as_references(saes: list[LoadedSAE]) -> list[LoadedSAE]:
    """The same SAEs, which serve as references alone."""
    return [replace(c, record=c.record.model_copy(update={"candidate": False})) for c in saes]


Ordered = TypeVar("Ordered", LoadedSAE, SAERecord)


def in_order(saes: list[Ordered]) -> list[Ordered]:
    """The SAEs in order of seeds, which is that of their numbers (`seed_names`). Unknown seeds are replaced by
    identities, which nobody can choose."""
    return sorted(saes, key=lambda c: (c.facts.seed or 0, c.identity))


def other_model(sae: SAE, subject: str) -> str | None:
    """Name of the model in an SAE without a subject's digest, where it is no name of the subject."""
    made_for = sae.metadata.get("model_name")
    named = made_for is not None and facts_of(sae).subject_digest is None
    return str(made_for) if named and not same_model(str(made_for), subject) else None


def refuse_other_model(folder: Path, sae: SAE, subject: str, flag: str, any_name: bool = False) -> None:
    """Raise BadInput for an SAE without a subject's digest that names another model.

    Args:
        any_name: only say so, because the user knows that it is the same model.
    """
    if made_for := other_model(sae, subject):
        if not any_name:
            raise BadInput(
                f"--{flag}: {folder} was made for {made_for}; the subject is {subject}; --same-model says that both "
                "are one model"
            )
        log.warning("--same-model: %s was made for %s, which is taken for %s", folder, made_for, subject)


def refuse_twins(saes: list[LoadedSAE]) -> None:
    """Raise BadInput for two SAEs of one condition and seed: which of them is meant?"""
    seeds: dict[tuple, LoadedSAE] = {}
    for c in saes:
        other = seeds.setdefault((c.record.condition, c.facts.seed), c)
        if c.facts.source == "husai" and other is not c:
            raise BadInput(f"checkpoint: {c.folder} and {other.folder} are of one condition and seed; one expected")


def controls_by_draw(paths: list[Path], opener: Opener) -> dict[int, list[Path]]:
    """Seed of a draw of the random weights -> the SAEs at or below these paths that were trained on it.

    Raises:
        BadInput: an SAE that HUSAI did not train on a random-weights model.
    """
    found: dict[int, list[Path]] = {}
    for folder in foreign.find_all(paths, "--random-model-checkpoint"):
        control = (opener.sae(folder).metadata.get("husai") or {}).get("control") or "none"
        draw = re.fullmatch(r"random_weights\(seed=(\d+)\)", control)
        if draw is None:
            raise BadInput(
                f"--random-model-checkpoint: the random weights that {folder} was trained on: {control}; SAEs that "
                "HUSAI trained on a random-weights model expected (runbook, SAEs of your own)"
            )
        found.setdefault(int(draw[1]), []).append(folder)
    return dict(sorted(found.items()))


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
    said: Harvesting | None = None,
) -> LoadedSAEs | None:
    """The SAEs that a benchmark compares with: those of the first draw of the random weights; None where no path is
    given.

    Raises:
        BadInput: an SAE of the model itself.
    """
    opener = opener or Opener()
    by_draw = controls_by_draw(paths, opener)
    if not by_draw:
        return None
    seed, folders = next(iter(by_draw.items()))
    if len(by_draw) > 1:
        log.info("benchmarks compare with SAEs of %s alone", random_weights(seed))
    return open_draw(folders, seed, name, hook_name, artifact_root, rows, device, threads, opener, source, said)


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
    said: Harvesting | None = None,
) -> LoadedSAEs:
    """SAEs of one draw of the random weights of a subject, with held-out activations of it.

    Args:
        said: how the activations of the SAEs of the subject itself were made.
    """
    random_model = pretrained.load(name, seed, device, said)
    source = source or TextSource()
    store = heldout_store(random_model, hook_name, artifact_root, rows, threads, source)
    controls = open_all(folders, store, "random-model-checkpoint", random_model, artifact_root, opener)
    refuse_twins(controls)
    return LoadedSAEs(name, random_model, store, controls, source=source)


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
        return self.model_cache_path or self.artifact_root / "probe_activations" / model.activations_digest[:16]


def load(args: argparse.Namespace, device: torch.device, opener: Opener | None = None) -> LoadedSAEs:
    """The SAEs that a benchmark's command line names (`evals.flags.EvalParser.add_benchmark`).

    Args:
        opener: of a process that has read some of them before.

    Raises:
        BadInput: whatever does not fit the subject and the hook.
    """
    opener = opener or Opener()
    name, said = agreed_by(args, opener)
    subject = opener.subject(name, device, said)
    place = (args.hook_name, args.artifact_root, args.rows)
    store = heldout_store(subject, *place, args.threads, args.text)
    how = args.artifact_root, opener, args.same_model
    saes = open_all(args.checkpoint, store, "checkpoint", subject, *how)
    known = {c.identity for c in saes}
    references = open_all(args.reference, store, "reference", subject, *how)
    references = as_references([c for c in references if c.identity not in known])
    refuse_twins([*saes, *references])
    machine: dict[str, Any] = {"device": device, "threads": args.threads, "opener": opener, "source": args.text}
    controls = open_controls(args.random_model_checkpoint, name, *place, **machine, said=said)
    return LoadedSAEs(name, subject, store, saes, references, controls, args.text, said=said)


def to_saelens(sae: SAE, subject: LanguageModel, hook_name: str, folder: Path) -> Path:
    """Write an SAE in the SAELens layout, with what the benchmarks look for in its metadata."""
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
    """The SAEs that a benchmark takes where none is named: TopK and ReLU, each the other's reference, five seeds.

    Returns:
        The folder that holds them; found where they were trained before.
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
