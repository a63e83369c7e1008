"""Checks and evaluates SAEs that a user supplies.

HUSAI cannot see how these SAEs were selected. Therefore the gate's decision about them is at best provisional.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from husai.activations.language_model import check_hooks
from husai.activations.source import open_store
from husai.dictionaries import foreign
from husai.dictionaries.sae import SAE
from husai.evals import cebench, coding, contrastive, loaded, random_model, sae_probes, saebench
from husai.evals.candidate import folder_of_store, untrained_of
from husai.evals.loaded import LoadedSAE, LoadedSAEs, Opener, Places, in_order
from husai.evidence.data_sets import PAIR_SETS
from husai.evidence.levels import PROBING_SEED, random_weights
from husai.evidence.schemas import (
    Evaluated,
    Harvested,
    Heldout,
    OwnSection,
    SAERecord,
    SeedGroup,
    Supplied,
    seed_names,
)
from husai.evidence.transcoder import hook_before
from husai.runs.cells import Cells
from husai.runs.checkpoints import write_place
from husai.runs.errors import BadInput
from husai.runs.files import sha256_file
from husai.stability import independence, replicates, study
from husai.stability.compare import Dictionary
from husai.stability.independence import refuse_copies
from husai.stability.prototypes import of_store
from husai.subjects import pretrained
from husai.subjects.harvesting import recorded, refuse_other
from husai.subjects.pretrained import LanguageModel
from husai.training.grid import SNAPSHOTS

log = logging.getLogger("husai")
MINIMUM = 3
"""Fewest SAEs for an interval over seeds. A verdict needs five."""
RANDOM_MODEL, TRANSCODERS = "random_model_stress", "transcoder_stress"
"""Parts of a release check that train SAEs alike."""
NOISE_SEEDS, KS = (43, 44), [1, 5, 16]
"""Further seeds of probes and drawn pairs, and numbers of features of a probe. Studies use the same."""


def look_over(args: argparse.Namespace, opener: Opener | None = None) -> SeedGroup:
    """Read and check all that the user supplies. Nothing is computed but two short inputs of the subject.

    Args:
        args: parsed flags of `evals.flags.EvalParser.add_supplied`.
        opener: cache of a process that evaluates the SAEs afterwards.

    Raises:
        BadInput: there are fewer than MINIMUM SAEs. SAEs have several conditions, or another subject or hook. Two SAEs
            share a decoder or an initialisation, or are checkpoints of one run. An SAE was trained on a control or
            towards a reference. References, controls or stories cannot be read.
    """
    opener, folders = opener or Opener(), foreign.find_all(args.checkpoint, "--checkpoint", args.hook_name)
    saes = [opener.sae(folder) for folder in folders]
    labels = [str(folder) for folder in folders]
    refuse_copies(labels, [sae.W_dec for sae in saes])
    if len(folders) < MINIMUM:
        raise BadInput(
            f"--checkpoint: {len(folders)} SAEs; one each of at least {MINIMUM} seeds expected, 5 for a verdict"
        )
    known_as = pretrained.known_as(args.subject)
    references = foreign.find_all(args.reference, "--reference", args.hook_name)
    for flag, paths in (("checkpoint", folders), ("reference", references)):
        for folder in paths:
            loaded.refuse_other_model(folder, opener.sae(folder), known_as, flag, args.same_model)
    name, harvesting = loaded.subject_and_harvesting(args, opener)
    subject = opener.subject(name, torch.device("cpu"), harvesting)
    width = check_hooks(subject, [args.hook_name])[args.hook_name].d_in
    for folder in (*folders, *references):
        expected_input = args.hook_name, subject.digest, width, subject.same_place
        study.refuse_unfitting(folder, opener.sae(folder), *expected_input)
    for each in zip(folders, saes, strict=True):
        _refuse_pulled(*each)
    for seed, of_draw in loaded.controls_by_draw(args.random_model_checkpoint, opener).items():
        if len(of_draw) != len(folders):
            raise BadInput(
                f"--random-model-checkpoint: {len(of_draw)} SAEs of {random_weights(seed)} for the {len(folders)} of "
                "--checkpoint; as many of each draw expected"
            )
    _refuse_other_way(args, subject, opener)
    contrastive.refuse_unknown(args.stories)
    initial = [_initial(*each) for each in zip(folders, saes, strict=True)]
    if before := untrained_of(args):
        if None not in initial:
            raise BadInput("--untrained: the SAEs of --checkpoint keep their untrained states themselves")
        initial = [foreign.open_checkpoint(before[folder]).W_dec for folder in folders]
    if torch.device(args.device).type == "cpu":
        torch.set_num_threads(args.threads)
    dictionaries = [Dictionary(s.W_dec, torch.ones(s.d_sae), b) for s, b in zip(saes, initial, strict=True)]
    replicates.check("--checkpoint", folders, saes)
    independence.refuse_shared(labels, dictionaries)
    independence.refuse_dependent(labels, [sae.W_dec for sae in saes])
    # All parts use this order. Therefore a number means the same SAE in every part.
    return SeedGroup.of(in_order([_record(folder, opener) for folder in folders]))


def find_parts_not_run(args: argparse.Namespace, group: SeedGroup, opener: Opener) -> dict[str, str]:
    """Part of a release check that cannot run on SAEs that `look_over` accepted -> the reason; empty if all can."""
    if group.facts.source != "husai":
        why = "the SAEs do not say how they were trained"
        reasons = {RANDOM_MODEL: f"{why}; --random-model-checkpoint names SAEs of the control", TRANSCODERS: why}
        return {part: why for part, why in reasons.items() if part != RANDOM_MODEL or not args.random_model_checkpoint}
    digest = group.facts.store_digest
    if digest is None:
        return dict.fromkeys((RANDOM_MODEL, TRANSCODERS), "the SAEs do not name the activations of their training")
    there = group.facts.streamed or args.train_rows or folder_of_store(args.artifact_root, digest)
    if not there:
        why = f"the activations that the SAEs were trained on are not below {args.artifact_root / 'activations'}"
        return dict.fromkeys((RANDOM_MODEL, TRANSCODERS), f"{why}; --train-rows says how many to harvest")
    try:
        hook_before(args.hook_name)
    except BadInput as error:
        return {TRANSCODERS: str(error)}
    return {}


def named(args: argparse.Namespace, group: SeedGroup, opener: Opener) -> dict[str, str]:
    """Number or seed of each SAE in results -> the name that the user knows."""
    names = loaded.user_names(foreign.find_all(args.checkpoint, "--checkpoint", args.hook_name))
    of_identity = {loaded.identity(opener.sae(c), opener.sha256(c)): name for c, name in names.items()}
    return {seed: of_identity[identity] for seed, identity in group.identities.items()}


def _refuse_other_way(args: argparse.Namespace, subject: LanguageModel, opener: Opener) -> None:
    """Refuse SAEs if HUSAI would make their activations in another way than their training did."""
    for flag in (*loaded.FLAGS, "random_model_checkpoint"):
        flag_name = f"--{flag.replace('_', '-')}"
        for folder in foreign.find_all(getattr(args, flag), flag_name, args.hook_name):
            harvesting = loaded.read_harvesting(folder, opener.sae(folder), args.hook_name)
            refuse_other(harvesting, subject.resolve(harvesting), subject.harvesting, f"{flag_name}: {folder}")


def _initial(folder: Path, sae: SAE) -> torch.Tensor | None:
    """Untrained decoder of an SAE that HUSAI trained; None for SAEs of other libraries."""
    path, trained_by_husai = _snapshots(folder), loaded.read_facts(sae).source == "husai"
    return study.own_dictionary(path.parent).untrained if trained_by_husai and path.is_file() else None


def _snapshots(folder: Path) -> Path:
    return foreign.folder_of(folder) / SNAPSHOTS


def _refuse_pulled(folder: Path, sae: SAE) -> None:
    metadata = sae.metadata.get("husai") or {}
    if metadata.get("control") is not None:
        raise BadInput(
            f"checkpoint: {folder} was trained on {metadata['control']}; an SAE of the subject itself expected"
        )
    if metadata.get("reference") is not None or metadata.get("assignment_weight"):
        raise BadInput(f"checkpoint: {folder} was pulled towards a reference: independently trained SAEs expected")


def _record(folder: Path, opener: Opener) -> SAERecord:
    """Record of an SAE before any measurement. Its label is its folder, because messages name the folder."""
    nothing = Heldout(explained_variance=0.0, mse=0.0, l0=0.0, dead_share=0.0)
    record = loaded.record_of(folder, opener.sae(folder), opener.sha256(folder), nothing)
    return record.model_copy(update={"label": str(folder)})


# ---------------------------------------------------------------------------------------------------------------------
# Evidence for the gate


def evaluate(args: argparse.Namespace, cells: Cells, device: torch.device) -> Supplied:
    """Results of the phase: stability against every null, and both benchmarks.

    Raises:
        BadInput: as `look_over`, or an SAE does not fit the subject and the hook.
        CheckFailed: a benchmark's own code failed.
    """
    opener = Opener()
    look_over(args, opener)
    names = sae_probes.check_data_sets(args.dataset_names)
    sae_probes.versions(args.probing)
    pair_sets = [] if args.stories else sae_probes.check_data_sets(PAIR_SETS.split(","))
    pairs, *others = (
        contrastive.drawn(args.stories, pair_sets, args.max_rows, s) for s in (PROBING_SEED, *NOISE_SEEDS)
    )

    saes = loaded.load(args, device, opener)
    before = untrained_of(args)
    saes = replace(
        saes, saes=in_order(saes.saes), untrained={c.identity: before[c.folder] for c in saes.saes if before}
    )
    group_files = [c.folder for c in saes.saes], [c.sae for c in saes.saes], [c.record.heldout for c in saes.saes]
    notes = replicates.check("--checkpoint", *group_files)
    if other := saes.other_model:
        notes.append(f"--same-model alone says that {other}, which the SAEs' files name, is {saes.subject.known_as}.")
    for note in notes:
        log.warning("%s", note)
    group = saes.group
    if group.facts.source != "husai":  # other libraries do not name the condition of an SAE
        saes = replace(saes, saes=[_of_condition(c, group.condition) for c in saes.saes])
    section, untrained = stability(cells, saes, args, device)
    places = Places(args.output_dir, args.artifact_root, args.device, args.threads, args.force)
    setup = saebench.Setup(names, KS, PROBING_SEED, NOISE_SEEDS, probing=args.probing)
    probing, _ = saebench.evaluate(saes, setup, places, cells)
    repeats = dict(zip(NOISE_SEEDS, others, strict=True))
    contrast = cebench.evaluate(saes, pairs, repeats, places, checkout=args.cebench_repo)

    core = {r.identity: r.core for r in probing.saes}
    scored = saebench.scored(saes, core)
    # Prototypes are made from training documents, because the code is measured on held-out documents.
    place: dict[str, Any] = {"subject": saes.name, "hook_name": saes.hook_name, "rows": args.rows}
    source = open_store(args.artifact_root, device, args.threads, **place, text=args.text, harvesting=saes.harvesting)
    bank = Evaluated(
        saebench=probing,
        cebench=contrast,
        hook_name=saes.hook_name,
        inputs=replace(saes, controls=None).inputs(),
        saes=scored,
        code=coding.evaluate(saes, scored, source, setup.core_texts, args.artifact_root, args.threads),
        **args.text.record(),
    )
    paths = (write_place(c.folder, args.output_dir) for c in saes.saes)
    more: dict[str, Any] = {} if other is None else {"same_model": other}
    if group.facts.source != "husai" or saes.harvesting.to_json():
        more |= {"harvesting": Harvested(**recorded(saes.harvesting, saes.subject))}
    return Supplied(
        phase="candidate_confirmation",
        origin="supplied",
        inputs=saes.inputs()
        | section.control_inputs
        | {f"untrained {seed}": sha256 for seed, sha256 in (untrained or {}).items()},
        subject=saes.name,
        candidate=group,
        paths=dict(zip(group.checkpoints, paths, strict=True)),
        untrained=untrained,
        section=section,
        bank=bank,
        notes=notes,
        **more,
    )


def _of_condition(c: LoadedSAE, condition: str) -> LoadedSAE:
    return replace(c, record=c.record.model_copy(update={"condition": condition}))


def stability(
    cells: Cells, saes: LoadedSAEs, args: argparse.Namespace, device: torch.device
) -> tuple[OwnSection, dict[str, str] | None]:
    """(the study of all pairs on held-out activations; seed -> sha256 of the untrained state, None without states)."""
    dictionaries = random_model.own_dictionaries(saes)
    members, states = [c.member for c in saes.saes], None
    if all(d.untrained is not None for d in dictionaries):
        given = [saes.untrained[c.identity] for c in saes.saes if saes.untrained]
        initial = [foreign.checkpoint_sha256(path) for path in given]
        initial = initial or [sha256_file(_snapshots(c.folder)) for c in saes.saes]
        states = dict(zip(seed_names([m.seed for m in members]), initial, strict=True))
    labels = [m.label for m in members]
    gaussian = random_model.gaussian_control(saes, saes.store, args.artifact_root, device, args.threads)
    store_prototypes = of_store(saes.store, args.artifact_root, saes.saes[0].sae.d_sae)
    arguments = cells, saes.store, labels, dictionaries, args.null_draws, args.threads
    compared, _ = study.compare_all(*arguments, {}, gaussian, prototype_rows=store_prototypes)
    return OwnSection(members=members, **dict(compared)), states
