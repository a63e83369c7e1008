"""SAEs that a user brings to be judged: what is refused before anything is computed, and what the gate reads of them.

Nothing was selected and nothing confirmed, so that the gate gives such SAEs no more than a provisional decision."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from husai.dictionaries import foreign
from husai.dictionaries.sae import SAE
from husai.evals import candidates, cebench, contrastive, random_model, sae_probes, saebench
from husai.evals.candidate import Tested, in_order
from husai.evidence import deltas
from husai.evidence.binding import block, places
from husai.evidence.data_sets import PAIR_SETS
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.runs.files import relative, sha256_file
from husai.stability import independence, study
from husai.stability.compare import Dictionary
from husai.subjects import pretrained
from husai.training.grid import SNAPSHOTS

MINIMUM = 3
"""SAEs, for an interval over seeds; five for a verdict."""
SEED, NOISE_SEEDS, KS = 42, (43, 44), [1, 5, 16]
"""Of splits, probes and drawn pairs, as in the studies. Fixed: who may choose them may choose among results."""


@dataclass(frozen=True)
class Brought:
    """The SAEs of a command line, read and found fit to be judged together."""

    folders: list[Path]
    """As they were named."""
    block: dict
    before: dict[Path, Path]
    """Folder -> checkpoint of the same SAE before training, where the user gives them."""

    @property
    def trained_here(self) -> bool:
        """Whether it is known how they were trained, which decides what a gate can be judged on."""
        return self.block["facts"]["source"] == "husai"


def look_over(args: argparse.Namespace) -> Brought:
    """Read all that is brought, and compute nothing.

    Args:
        args: of `evals.flags.Parser.add_brought`.

    Raises:
        BadInput: fewer than MINIMUM SAEs; SAEs of several conditions, of another subject or hook, that share a decoder
            or an initialisation, that are of one training, or that were trained on a control or towards a reference;
            references, controls, stories or a positive control that could not be read later.
    """
    folders = _found(args.checkpoint, "--checkpoint")
    if len(folders) < MINIMUM:
        raise BadInput(
            f"--checkpoint: {len(folders)} SAEs; one each of at least {MINIMUM} seeds expected, 5 for a verdict"
        )
    where = pretrained.open_folder(str(args.subject))
    subject, name = pretrained.describe(where), Path(args.subject).name
    width = _width(args.hook_name, where)
    saes = [foreign.open_checkpoint(folder) for folder in folders]
    references = _found(args.reference, "--reference")
    for flag, these in (("checkpoint", zip(folders, saes, strict=True)), ("reference", _opened(references))):
        for folder, sae in these:
            candidates.refuse_other_model(folder, sae, name, flag)
            study.refuse_unfitting(folder, sae, args.hook_name, subject, width)
    for each in zip(folders, saes, strict=True):
        _refuse_pulled(*each)
    controls = _found(args.random_model_checkpoint, "--random-model-checkpoint")
    if controls:
        if len(controls) != len(folders):
            raise BadInput(
                f"--random-model-checkpoint: {len(controls)} SAEs for the {len(folders)} of --checkpoint; as many "
                "expected"
            )
        candidates.seed_of_control(sae for _, sae in _opened(controls))
    contrastive.refuse_unknown(args.stories)
    before = _found(args.untrained, "--untrained")
    initial = [_initial(*each) for each in zip(folders, saes, strict=True)]
    if before:
        if len(before) != len(folders):
            raise BadInput(
                f"--untrained: {len(before)} SAEs before training for {len(folders)} after; one of each expected, in "
                "the order of --checkpoint"
            )
        if None not in initial:
            raise BadInput("--untrained: the SAEs of --checkpoint keep their untrained states themselves")
        initial = [foreign.open_checkpoint(folder).W_dec for folder in before]
    if torch.device(args.device).type == "cpu":
        torch.set_num_threads(args.threads)
    dictionaries = [
        Dictionary(s.W_dec, torch.ones(s.d_sae, dtype=torch.bool), b) for s, b in zip(saes, initial, strict=True)
    ]
    labels = [str(folder) for folder in folders]
    independence.refuse_shared(labels, dictionaries)
    independence.refuse_one_training(labels, [sae.W_dec for sae in saes])
    records = [_record(*each) for each in zip(folders, saes, strict=True)]
    return Brought(folders, block(records), dict(zip(folders, before, strict=True)) if before else {})


def _found(paths: list[Path], flag: str) -> list[Path]:
    """The checkpoints at or below these paths, in their order, each once."""
    if absent := next((path for path in paths if not path.exists()), None):
        raise BadInput(f"{flag}: {absent} does not exist")
    return list(dict.fromkeys(f for path in paths for f in ([path] if path.is_file() else foreign.find(path, flag))))


def _opened(folders: list[Path]) -> Iterator[tuple[Path, SAE]]:
    return ((folder, foreign.open_checkpoint(folder)) for folder in folders)


def _width(hook_name: str, model: Path) -> int | None:
    """Of the activations at a hook; None where the model's configuration does not say it.

    Raises:
        BadInput: the model has no such block.
    """
    blocks, width = pretrained.sizes(model)
    if (block := re.match(r"blocks\.(\d+)\.", hook_name)) and int(block[1]) >= blocks:
        raise BadInput(f"--hook-name {hook_name}: the subject has {blocks} blocks, the first of them blocks.0")
    residual = re.fullmatch(r"blocks\.\d+\.hook_(resid_(pre|mid|post)|mlp_out|attn_out)", hook_name)
    return width if residual else None


def _initial(folder: Path, sae: SAE) -> torch.Tensor | None:
    """What HUSAI keeps of an SAE before training."""
    path, ours = _snapshots(folder), candidates.facts_of(sae, 0.0)["source"] == "husai"
    return study.own_dictionary(path.parent).untrained if ours and path.is_file() else None


def _snapshots(folder: Path) -> Path:
    return (folder.parent if folder.is_file() else folder) / SNAPSHOTS


def _refuse_pulled(folder: Path, sae: SAE) -> None:
    made = sae.metadata.get("husai") or {}
    if made.get("control") is not None:
        raise BadInput(f"checkpoint: {folder} was trained on {made['control']}; an SAE of the subject itself expected")
    if made.get("reference") is not None or made.get("assignment_weight"):
        raise BadInput(f"checkpoint: {folder} was pulled towards a reference: independently trained SAEs expected")


def _record(folder: Path, sae: SAE) -> dict:
    sha256 = sha256_file(foreign.weights_file(folder))
    about = {"label": str(folder), "condition": "", "facts": candidates.facts_of(sae, 0.0)}
    return about | {"checkpoint_sha256": sha256, "identity": candidates.identity(sae, sha256)}


# ---------------------------------------------------------------------------------------------------------------------
# What the gate reads


def evaluate(args: argparse.Namespace, cells: Cells, device: torch.device) -> dict:
    """Stability against every null, and both benchmarks: the results of the phase.

    Raises:
        BadInput: as `look_over`, or whatever does not fit the subject and the hook.
        CheckFailed: a benchmark's own code failed.
    """
    brought = look_over(args)
    data_sets = sae_probes.check_data_sets(args.dataset_names)
    sae_probes.versions(args.probing)
    stories = None if args.stories else sae_probes.check_data_sets(PAIR_SETS.split(","))
    pairs, *others = (contrastive.drawn(args.stories, stories, args.max_rows, s) for s in (SEED, *NOISE_SEEDS))

    lineup = candidates.lineup(args, device)
    lineup = replace(lineup, saes=in_order(lineup.saes))
    tested = Tested(str(args.subject), lineup.subject, lineup.store, lineup.saes)
    section, untrained = stability(cells, tested, brought, args.null_draws, args.threads)
    where = candidates.Places(args.output_dir, args.artifact_root, args.device, args.threads, args.force)
    asked = saebench.Probing(data_sets, KS, SEED, NOISE_SEEDS, probing=args.probing)
    probing, _ = saebench.evaluate(lineup, asked, where, cells)
    given = (lineup, pairs, dict(zip(NOISE_SEEDS, others, strict=True)), where)
    contrast = cebench.evaluate(*given, checkout=args.cebench_repo, subject_name=str(args.subject))

    core = {r["identity"]: r["core"] for r in probing["saes"]}
    records = [r | {"core": core[r["identity"]]} for r in lineup.records()]
    own = tested.block
    for each in (records, probing["saes"], contrast["saes"]):  # nothing says of SAEs from elsewhere that they are one
        for r in each:
            r["condition"] = own["condition"] if r["candidate"] else r["condition"]
    probing["conditions"], contrast["conditions"] = deltas.saebench(probing), deltas.contrastive(contrast)
    bank = {"hook_name": lineup.hook_name, "inputs": replace(lineup, controls=[]).inputs(), "saes": records}
    return {
        "phase": "brought_candidate",
        "inputs": lineup.inputs() | {f"untrained {seed}": sha256 for seed, sha256 in (untrained or {}).items()},
        "subject": str(args.subject),
        "hook_name": lineup.hook_name,
        "candidate": own,
        "paths": dict(zip(own["checkpoints"], (relative(c.folder, args.output_dir) for c in tested.saes), strict=True)),
        "untrained": untrained,
        "section": section,
        "bank": bank | {"saebench": probing, "cebench": contrast},
    }


def stability(cells: Cells, tested: Tested, brought: Brought, draws: int, threads: int) -> tuple[dict, dict | None]:
    """(the study of all pairs, on held-out activations; seed -> sha256 of the untrained state, None without them)."""
    before = [brought.before[c.folder] for c in tested.saes] if brought.before else None
    dictionaries, missing = random_model.own_dictionaries(tested, before)
    missing["shuffled"] = "the SAEs were not trained here"
    members, untrained = tested.members, None
    if "untrained" not in missing:
        files = [foreign.weights_file(b) for b in before] if before else [_snapshots(c.folder) for c in tested.saes]
        seeds = places([m["seed"] for m in members])
        untrained = dict(zip(seeds, map(sha256_file, files), strict=True))
    labels = [m["label"] for m in members]
    found = study.compare_all(cells, tested.store, labels, dictionaries, None, draws, threads, missing)
    return study.brief({"members": members, **found}), untrained
