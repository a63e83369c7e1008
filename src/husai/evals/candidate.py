"""Which SAEs a stress test is about: the confirmed candidate, SAEs that the command line names, or the embedded
default, and what binds the test's evidence to them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from husai.activations import source
from husai.activations.store import ActivationStore, StoreManifest
from husai.dictionaries import foreign
from husai.evals.loaded import (
    LoadedSAE,
    LoadedSAEs,
    Opener,
    agreed_by,
    heldout_store,
    in_order,
    open_all,
    refuse_twins,
    train_default,
)
from husai.evidence.levels import random_weights
from husai.evidence.schemas import Retrained, Supplied, read_evaluation, refusal
from husai.runs.checkpoints import read_place
from husai.runs.errors import BadInput
from husai.runs.files import read_json
from husai.subjects.sources import TextSource

log = logging.getLogger("husai")


def find(args: argparse.Namespace, device: torch.device) -> LoadedSAEs:
    """The SAEs that the command line means, after `evals.inputs.look_up`, opened and checked.

    Raises:
        BadInput: files that are missing or are others than the candidate's evidence names, or SAEs of several kinds.
    """
    name, hook_name, paths, expected, source = args.subject, args.hook_name, args.checkpoint, None, args.text
    found = None
    any_name, multiple = args.same_model, args.max_norm_multiple
    if args.candidate:
        results = read_json(args.candidate, "candidate")
        try:
            found = read_evaluation(results)
        except ValidationError as error:
            raise BadInput(
                f"--candidate: {args.candidate} is no result of run_candidate_confirmation.py ({refusal(error)})"
            ) from None
        expected, name, hook_name = found.candidate, found.subject, found.bank.hook_name
        paths = [read_place(place, args.candidate.parent) for place in found.paths.values()]
        source, multiple = text_of(found, source), multiple_of(found, multiple)
        any_name = isinstance(found, Supplied) and found.same_model is not None
        log.info("candidate: %s of %s", expected.condition, args.candidate)
    elif paths:
        log.info("candidate: the SAEs of --checkpoint")
    else:
        log.info("candidate: none was confirmed or named; the embedded default (TopK on husai-tiny) stands in")
        place = args.output_dir / "default", args.artifact_root, name, hook_name, device, args.threads, args.force
        root = train_default(*place, source)
        paths = sorted(p for p in root.iterdir() if p.name.startswith("topk_"))
    opener = Opener()
    named = {"checkpoint": paths, "hook_name": hook_name, "subject": name, "dtype": args.dtype, "same_model": any_name}
    name, said = agreed_by(argparse.Namespace(**named, max_norm_multiple=multiple), opener)
    subject = opener.subject(name, device, said)
    store = heldout_store(subject, hook_name, args.artifact_root, args.rows, args.threads, source)
    how = args.artifact_root, opener, any_name
    saes = in_order(open_all(paths, store, "checkpoint", subject, *how))
    refuse_twins(saes)
    untrained = _untrained(args, found, saes)
    tested = LoadedSAEs(name, subject, store, saes, source=source, untrained=untrained, said=said)
    if expected is not None and tested.group != expected:
        raise BadInput(f"candidate: the checkpoints beside {args.candidate} are not those that it names")
    return tested


def _untrained(args: argparse.Namespace, found: Retrained | Supplied | None, saes: list[LoadedSAE]) -> dict[str, Path]:
    """Identity -> the same SAE before training, as --untrained gives them.

    Args:
        found: the candidate's evidence, which names the states by content; None: they are in the order of --checkpoint.

    Raises:
        BadInput: not one for each, or others than the evidence names.
    """
    if not getattr(args, "untrained", None):
        return {}
    if found is None:
        before = untrained_of(args)
        return {c.identity: before[c.folder] for c in saes}
    folders = foreign.find_all(args.untrained, "--untrained", args.hook_name, untrained=True)
    given = {foreign.checkpoint_sha256(folder): folder for folder in folders}
    named = (found.untrained if isinstance(found, Supplied) else None) or {}
    if set(named.values()) != set(given):
        raise BadInput("--untrained: the states from before training that the candidate's evidence names expected")
    return {found.candidate.identities[seed]: given[sha256] for seed, sha256 in named.items()}


def untrained_of(args: argparse.Namespace) -> dict[Path, Path]:
    """Checkpoint -> the same SAE before training; empty where the user gives none.

    Raises:
        BadInput: not one for each.
    """
    folders = foreign.find_all(args.checkpoint, "--checkpoint", args.hook_name)
    before = foreign.find_all(args.untrained, "--untrained", args.hook_name, untrained=True)
    if before and len(before) != len(folders):
        raise BadInput(
            f"--untrained: {len(before)} SAEs before training for {len(folders)} after; one of each expected, in the "
            "order of --checkpoint"
        )
    return dict(zip(folders, before, strict=True)) if before else {}


def text_of(found: Retrained | Supplied, given: TextSource) -> TextSource:
    """The text that a candidate's evidence is on.

    Raises:
        BadInput: --text names another one.
    """
    named = found.bank.recipe.text if isinstance(found, Retrained) else found.bank.text
    source = TextSource.parse(named)
    if not given.packaged and given != source:
        raise BadInput(f"--text {given}: the candidate's evidence is on {source}; the same text expected")
    source.check()
    return source


def multiple_of(found: Retrained | Supplied, given: float | None) -> float | None:
    """The multiple of the median norm that a candidate's evidence leaves rows out by.

    Raises:
        BadInput: --max-norm-multiple names another one.
    """
    evidence = found.bank.recipe if isinstance(found, Retrained) else found.harvesting
    named = None if evidence is None else evidence.max_norm_multiple
    if given not in (None, named):
        raise BadInput(
            f"--max-norm-multiple {given:g}: the candidate's evidence has {named or 'none'}; the same one expected"
        )
    return named


def activations_of(
    tested: LoadedSAEs, artifact_root: Path, rows: int, device: torch.device, threads: int, random_seed: int | None
) -> ActivationStore:
    """Activations at the candidate's hook, of the text that SAEs are trained on; found below `artifact_root`, or
    harvested.

    Args:
        random_seed: of a draw of the random weights in the subject's place.
    """
    subject, hook_name = tested.name, tested.hook_name
    machine = artifact_root, device, threads
    made: dict[str, Any] = {"random_seed": random_seed, "text": tested.source, "harvesting": tested.said}
    return source.open_store(*machine, subject=subject, hook_name=hook_name, rows=rows, **made)


def training_store(
    tested: LoadedSAEs,
    artifact_root: Path,
    rows: int | None,
    device: torch.device,
    threads: int,
    random_seed: int | None = None,
) -> ActivationStore:
    """The activations that the SAEs were trained on, as their checkpoints name them: found below `artifact_root`, or
    harvested again. SAEs that trained on a stream left none: activations of the training documents of the same text.

    Args:
        rows: of the store; None: as many as the store has that lies there, or, after a stream, as the held-out one has.
        random_seed: of the draw of the random weights that they were trained on; None: on what the subject computes.

    Raises:
        BadInput: it is not there and `rows` is not given, what was harvested has another digest, or the SAEs were
            trained on something else.
    """
    wanted, control = tested.saes[0].facts.store_digest, tested.saes[0].facts.control
    if control != (None if random_seed is None else random_weights(random_seed)):
        raise BadInput(f"candidate: trained on {control}; SAEs of the subject's own activations expected")
    if wanted is None:
        raise BadInput(f"checkpoint: {tested.saes[0].folder} does not name the activations that it was trained on")
    made = tested.made or {}
    if made.get("streamed"):
        if made.get("text") != tested.source.record().get("text"):
            log.warning(
                "the SAEs were trained on the text %s; their controls are of %s", made.get("text"), tested.source
            )
        return activations_of(tested, artifact_root, rows or tested.store.rows, device, threads, random_seed)
    if rows is None:
        for path in sorted((artifact_root / "activations").glob("*/manifest.json")):
            try:
                if StoreManifest.model_validate(read_json(path)).digest == wanted:
                    return ActivationStore.open(path.parent)
            except (BadInput, ValidationError):  # another store's damage is not ours; ours would not have the digest
                continue
        raise BadInput(
            f"checkpoint: the activations that {tested.saes[0].folder} was trained on (digest {wanted[:12]}) are not "
            f"below {artifact_root / 'activations'}; --train-rows says how many to harvest"
        )
    store = activations_of(tested, artifact_root, rows, device, threads, random_seed)
    if store.digest != wanted:
        raise BadInput(
            f"--train-rows {rows}: gives activations of digest {store.digest[:12]}; {tested.saes[0].folder} was "
            f"trained on {wanted[:12]}"
        )
    return store
