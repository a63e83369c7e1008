"""SAEs of a stress test: the confirmed candidate, SAEs that the command line names, or the embedded default.

The test's evidence names these SAEs by content.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from husai.activations import source
from husai.activations.store import ActivationStore, StoreManifest
from husai.dictionaries import foreign, recipes
from husai.evals.loaded import (
    LoadedSAE,
    LoadedSAEs,
    Opener,
    heldout_store,
    in_order,
    open_all,
    refuse_twins,
    subject_and_harvesting,
    train_default,
)
from husai.evidence.levels import random_weights
from husai.evidence.schemas import Retrained, Supplied, read_evaluation, refusal
from husai.runs.checkpoints import read_place
from husai.runs.errors import BadInput
from husai.runs.files import read_json
from husai.stability.independence import refuse_copies
from husai.subjects.sources import TextSource

log = logging.getLogger("husai")


def find(args: argparse.Namespace, device: torch.device) -> LoadedSAEs:
    """Open and check the SAEs that the command line means. Call `evals.inputs.look_up` first.

    Raises:
        BadInput: a file is missing, differs from the one that the candidate's evidence names, or is of another kind.
    """
    name, hook_name, paths, expected, source = args.subject, args.hook_name, args.checkpoint, None, args.text
    evaluation = None
    any_name, multiple = args.same_model, args.max_norm_multiple
    if args.candidate:
        results = read_json(args.candidate, "candidate")
        try:
            evaluation = read_evaluation(results)
        except ValidationError as error:
            raise BadInput(
                f"--candidate: {args.candidate} is no result of run_candidate_confirmation.py ({refusal(error)})"
            ) from None
        expected, name, hook_name = evaluation.candidate, evaluation.subject, evaluation.bank.hook_name
        paths = [read_place(place, args.candidate.parent) for place in evaluation.paths.values()]
        source, multiple = text_of(evaluation, source), multiple_of(evaluation, multiple)
        any_name = isinstance(evaluation, Supplied) and evaluation.same_model is not None
        log.info("candidate: %s of %s", expected.condition, args.candidate)
    elif paths:
        log.info("candidate: the SAEs of --checkpoint")
    else:
        log.info("candidate: none was confirmed or named; the embedded default (TopK on husai-tiny) stands in")
        place = args.output_dir / "default", args.artifact_root, name, hook_name, device, args.threads, args.force
        root = train_default(*place, source)
        paths = sorted(p for p in root.iterdir() if p.name.startswith("topk_"))
    opener = Opener()
    flags = {"checkpoint": paths, "hook_name": hook_name, "subject": name, "dtype": args.dtype, "same_model": any_name}
    name, harvesting = subject_and_harvesting(argparse.Namespace(**flags, max_norm_multiple=multiple), opener)
    folders = foreign.find_all(paths, "--checkpoint", hook_name)
    refuse_copies([str(folder) for folder in folders], [opener.sae(folder).W_dec for folder in folders])
    subject = opener.subject(name, device, harvesting)
    for folder in folders:  # before the rows are harvested
        made_for = recipes.place_of(opener.sae(folder))
        if made_for is not None and not subject.same_place(made_for, hook_name):
            raise BadInput(f"--hook-name {hook_name}: {folder} was made for {made_for}")
    store = heldout_store(subject, hook_name, args.artifact_root, args.rows, args.threads, source)
    settings = args.artifact_root, opener, any_name
    saes = in_order(open_all(paths, store, "checkpoint", subject, *settings))
    refuse_twins(saes)
    untrained = _untrained(args, evaluation, saes)
    tested = LoadedSAEs(name, subject, store, saes, source=source, untrained=untrained, harvesting=harvesting)
    if expected is not None and tested.group != expected:
        raise BadInput(f"candidate: the checkpoints beside {args.candidate} are not those that it names")
    return tested


def _untrained(
    args: argparse.Namespace, evaluation: Retrained | Supplied | None, saes: list[LoadedSAE]
) -> dict[str, Path]:
    """Identity of an SAE -> its untrained state, from --untrained.

    Args:
        evaluation: the candidate's evidence, which names the untrained states by content. None: the states come in the
            order of --checkpoint.

    Raises:
        BadInput: there is not one state for each SAE, or the evidence names other states.
    """
    if not getattr(args, "untrained", None):
        return {}
    if evaluation is None:
        before = untrained_of(args)
        return {c.identity: before[c.folder] for c in saes}
    folders = foreign.find_all(args.untrained, "--untrained", evaluation.bank.hook_name, untrained=True)
    folder_of_digest = {foreign.checkpoint_sha256(folder): folder for folder in folders}
    digest_of_seed = (evaluation.untrained if isinstance(evaluation, Supplied) else None) or {}
    if set(digest_of_seed.values()) != set(folder_of_digest):
        raise BadInput("--untrained: the states from before training that the candidate's evidence names expected")
    return {evaluation.candidate.identities[seed]: folder_of_digest[sha256] for seed, sha256 in digest_of_seed.items()}


def untrained_of(args: argparse.Namespace) -> dict[Path, Path]:
    """Checkpoint -> its untrained state; empty without --untrained.

    Raises:
        BadInput: there is not one state for each checkpoint.
    """
    folders = foreign.find_all(args.checkpoint, "--checkpoint", args.hook_name)
    before = foreign.find_all(args.untrained, "--untrained", args.hook_name, untrained=True)
    if before and len(before) != len(folders):
        raise BadInput(
            f"--untrained: {len(before)} SAEs before training for {len(folders)} after; one of each expected, in the "
            "order of --checkpoint"
        )
    return dict(zip(folders, before, strict=True)) if before else {}


def text_of(evaluation: Retrained | Supplied, given: TextSource) -> TextSource:
    """Text source of a candidate's evidence.

    Raises:
        BadInput: --text names another source.
    """
    evidence_text = evaluation.bank.recipe.text if isinstance(evaluation, Retrained) else evaluation.bank.text
    source = TextSource.parse(evidence_text)
    if not given.packaged and given != source:
        raise BadInput(f"--text {given}: the candidate's evidence is on {source}; the same text expected")
    source.check()
    return source


def multiple_of(evaluation: Retrained | Supplied, given: float | None) -> float | None:
    """Multiple of the median norm above which a candidate's evidence leaves rows out; None if it keeps all rows.

    Raises:
        BadInput: --max-norm-multiple names another multiple.
    """
    settings = evaluation.bank.recipe if isinstance(evaluation, Retrained) else evaluation.harvesting
    evidence_multiple = None if settings is None else settings.max_norm_multiple
    if given not in (None, evidence_multiple):
        raise BadInput(
            f"--max-norm-multiple {given:g}: the candidate's evidence has {evidence_multiple or 'none'}; the same "
            "multiple expected"
        )
    return evidence_multiple


def activations_of(
    tested: LoadedSAEs, artifact_root: Path, rows: int, device: torch.device, threads: int, random_seed: int | None
) -> ActivationStore:
    """Store of activations of training documents at the candidate's hook; found below `artifact_root`, or harvested.

    Args:
        random_seed: seed of the random weights that replace the subject's. None: the subject's own weights.
    """
    subject, hook_name = tested.name, tested.hook_name
    machine = artifact_root, device, threads
    settings: dict[str, Any] = {"random_seed": random_seed, "text": tested.source, "harvesting": tested.harvesting}
    return source.open_store(*machine, subject=subject, hook_name=hook_name, rows=rows, **settings)


def folder_of_store(artifact_root: Path, digest: str) -> Path | None:
    """Folder of the store with a digest below `artifact_root`; None if there is none."""
    for path in sorted((artifact_root / "activations").glob("*/manifest.json")):
        try:
            if StoreManifest.model_validate(read_json(path)).digest == digest:
                return path.parent
        except (BadInput, ValidationError):  # a damaged store cannot be the one with this digest
            continue
    return None


def training_store(
    tested: LoadedSAEs,
    artifact_root: Path,
    rows: int | None,
    device: torch.device,
    threads: int,
    random_seed: int | None = None,
) -> ActivationStore:
    """Store of the activations that the SAEs were trained on, which their checkpoints name by digest.

    The store is found below `artifact_root`, or harvested again. SAEs that were trained on a stream have no store. They
    get activations of training documents of the same text.

    Args:
        rows: rows of the store. None: those of the store on disk, or after a stream as many as of the held-out store,
            with the outliers that it leaves out.
        random_seed: seed of the random weights that the SAEs were trained on. None: the subject's own weights.

    Raises:
        BadInput: the store is missing and `rows` is None, the harvested store has another digest, or the SAEs were
            trained on another control.
    """
    digest, control = tested.saes[0].facts.store_digest, tested.saes[0].facts.control
    if control != (None if random_seed is None else random_weights(random_seed)):
        raise BadInput(f"candidate: trained on {control}; SAEs of the subject's own activations expected")
    if digest is None:
        raise BadInput(f"checkpoint: {tested.saes[0].folder} does not name the activations that it was trained on")
    metadata = tested.training_metadata or {}
    if metadata.get("streamed"):
        if metadata.get("text") != tested.source.record().get("text"):
            log.warning(
                "the SAEs were trained on the text %s; their controls are of %s", metadata.get("text"), tested.source
            )
        of_heldout = tested.store.rows + (tested.store.manifest.dropped_rows or 0)
        return activations_of(tested, artifact_root, rows or of_heldout, device, threads, random_seed)
    if rows is None:
        if folder := folder_of_store(artifact_root, digest):
            return ActivationStore.open(folder)
        raise BadInput(
            f"checkpoint: the activations that {tested.saes[0].folder} was trained on (digest {digest[:12]}) are not "
            f"below {artifact_root / 'activations'}; --train-rows says how many to harvest"
        )
    store = activations_of(tested, artifact_root, rows, device, threads, random_seed)
    if store.digest != digest:
        raise BadInput(
            f"--train-rows {rows}: gives activations of digest {store.digest[:12]}; {tested.saes[0].folder} was "
            f"trained on {digest[:12]}: the same rows, --text, --threads and kind of machine expected"
        )
    return store
