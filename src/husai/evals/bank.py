"""All that is asked of the SAEs on one activation bank: trained in stacked passes, compared over seeds with their
nulls, and held against the external benchmarks. One bank is one task of an executor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from husai.activations.language_model import check_hooks
from husai.activations.source import open_store
from husai.dictionaries.families import SAE_FAMILIES
from husai.evals import baselines, candidates, cebench, cebench_checkout, contrastive, sae_probes, saebench
from husai.evidence import conditions
from husai.evidence.data_sets import PAIR_SETS
from husai.evidence.levels import K
from husai.evidence.names import ALIVE
from husai.evidence.references import reference_family
from husai.runs import executor
from husai.runs.cells import Cells
from husai.runs.cli import prepare
from husai.runs.code import code_version
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import content_or_name, sha256_file
from husai.stability import study
from husai.subjects import pretrained
from husai.training.grid import members, train_or_find
from husai.training.recovered import Site
from husai.training.trainer import TrainingConfig

SEED = 42  # of the drawn pairs, as in run_husai_cebench_custom_eval.py

RECIPE = (
    *("rows", "batch_size", "learning_rate", "null_draws", "heldout_rows"),
    *("probe_ks", "noise_seeds", "max_pairs", "probing", "core_texts"),
)


@dataclass(frozen=True)
class Bank:
    """A study's part on one bank. JSON: it travels to wherever the task runs."""

    subject: str
    hook_name: str
    families: list[str]
    seeds: list[int]
    d_saes: list[int]
    ks: list[int]
    budgets: list[int]
    """Rows (tokens) that each SAE sees; each budget has a learning-rate schedule of its own."""
    rows: int
    """Of the bank."""
    batch_size: int
    learning_rate: float
    null_draws: int
    heldout_rows: int
    saebench: bool
    data_sets: list[str]
    probing: str
    """Whose probes: one of sae_probes.PROBINGS."""
    core_texts: int
    """Held-out documents for the cross-entropy with an SAE spliced in."""
    probe_ks: list[int]
    noise_seeds: list[int]
    cebench: bool
    stories: str | None
    pair_sets: list[str]
    """Data sets that pairs are built from where there are no stories."""
    max_pairs: int
    baseline_map: str | None
    cebench_repo: str | None
    output_dir: str
    artifact_root: str
    device: str
    threads: int
    force: bool = False

    @property
    def places(self) -> candidates.Places:
        return candidates.Places(Path(self.output_dir), Path(self.artifact_root), self.device, self.threads, self.force)


def shared(args: argparse.Namespace) -> dict:
    """The settings that all banks of a study share, from `evals.flags.Parser.add_study`: JSON."""
    return {
        "subject": str(args.subject),
        "rows": args.rows,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "null_draws": args.null_draws,
        "heldout_rows": args.heldout_rows,
        "saebench": args.run_saebench,
        "data_sets": sae_probes.check_data_sets(args.dataset_names) if args.run_saebench else [],
        "probing": args.probing,
        "core_texts": args.core_texts,
        "probe_ks": args.probe_ks,
        "noise_seeds": [43, 44],
        "cebench": args.run_cebench,
        "pair_sets": PAIR_SETS.split(","),
        "max_pairs": args.max_rows,
        **places_of(args),
    }


def places_of(args: argparse.Namespace) -> dict:
    """The settings of a bank that say what CE-Bench reads and where the bank works: JSON."""
    return {
        "stories": args.stories,
        "cebench_repo": args.cebench_repo and str(args.cebench_repo),
        "baseline_map": args.cebench_matched_baseline_map and str(args.cebench_matched_baseline_map),
        "output_dir": str(args.output_dir),
        "artifact_root": str(args.artifact_root),
        "device": args.device,
        "threads": args.threads,
        "force": args.force,
    }


@dataclass(frozen=True)
class Trained:
    """SAEs of a bank that differ in their seed alone."""

    family: str
    d_sae: int
    k: int
    budget: int
    members: list[dict]
    snapshot_steps: list[int]
    reference: bool
    """Trained only to be a reference."""


def check(bank: Bank) -> None:
    """Raise BadInput, before anything is computed, for a grid that cannot be trained or evaluated."""
    if not all((bank.families, bank.seeds, bank.d_saes, bank.ks, bank.budgets)):
        raise BadInput("the product of families, seeds, widths, sparsities and budgets is empty")
    for k, d_sae in product(bank.ks, bank.d_saes):
        if k > d_sae:
            raise BadInput(f"an L0 of {k} cannot be reached with {d_sae} features")
    if unknown := sorted(set(bank.families) - set(SAE_FAMILIES)):
        raise BadInput(f"family {unknown[0]!r}: one of {', '.join(SAE_FAMILIES)} expected")
    if bank.saebench:
        if K not in bank.probe_ks:
            raise BadInput(f"--probe-ks {','.join(map(str, bank.probe_ks))}: {K}, which is judged, is missing")
        sae_probes.versions(bank.probing)
        sae_probes.check_data_sets(bank.data_sets)
    if bank.cebench:
        if not bank.stories and bank.max_pairs < len(bank.pair_sets):
            raise BadInput(
                f"--max-rows {bank.max_pairs}: one of each of {len(bank.pair_sets)} data sets at least expected"
            )
        sae_probes.check_data_sets(bank.pair_sets)
        pairs(bank, SEED)
        references(bank)


def run_all(settings: list[dict], args: argparse.Namespace) -> list[dict]:
    """Run a task a bank, by the executor that the command line names, and return what `run` gives of each.

    Raises:
        BadInput: a bank that cannot be trained or evaluated, or, with --require-matched, one without a reference.
        CheckFailed: some failed; those that did not are kept as cells, which the same command finds.
    """
    if args.executor == "ray" and args.device not in ("cpu", "cuda"):
        raise BadInput(f"--device {args.device}: a task on Ray sees the GPU it is given, as cuda; cpu or cuda expected")
    if args.executor == "local":
        prepare(args.device, args.threads)
    subject = pretrained.load(str(args.subject))
    for each in settings:
        check_hooks(subject, [each["hook_name"]])
        Site.of(subject, each["hook_name"])
        check(Bank(**each))
    gpus = float(args.device != "cpu")
    tasks = [executor.Task(f"bank of {s['hook_name']}", f"{__name__}:run", s, gpus) for s in settings]
    outcomes = executor.run(tasks, args.executor, args.ray_address, args.threads, what="banks")
    failed = [f"{o.name}: {o.reason}" for o in outcomes if o.reason is not None]
    if failed:
        raise CheckFailed("; ".join(failed))
    found: list[dict] = [o.value for o in outcomes if o.value is not None]
    if args.require_matched and (why := conditions.unmatched([row for f in found for row in f["conditions"]])):
        raise BadInput(f"--require-matched: {why}")
    return found


def run(**settings) -> dict:
    """The bank's results: {"hook_name", "store_digest", "rows", "train_rows", "inputs", "saes": records with held-out
    and core figures, "saebench", "cebench": results of the benchmarks, or None, "sections": the stability studies,
    "conditions": rows in their order (`conditions.conditions`), "recipe": what of `Bank` it takes to do it again}."""
    bank = Bank(**settings)
    device = prepare(bank.device, bank.threads)
    cells = Cells(Path(bank.output_dir) / "cells", bank.force)
    store = open_store(
        Path(bank.artifact_root), device, bank.threads, subject=bank.subject, hook_name=bank.hook_name, rows=bank.rows
    )
    groups, sections = train(bank, cells, store, device), []
    for g in (g for g in groups if not g.reference):
        arguments = cells, store, g.members, g.snapshot_steps, bank.null_draws, bank.threads
        section = study.score_trained(*arguments, no_control="not part of this study", scores=ALIVE)
        about = {"family": g.family, "d_sae": g.d_sae, "k": g.k, "budget": g.budget}
        sections.append(about | study.brief(section))

    subject = pretrained.load(bank.subject, device=device)
    heldout = candidates.heldout_store(
        subject, bank.hook_name, Path(bank.artifact_root), bank.heldout_rows, bank.threads
    )

    def opened(reference: bool) -> list[candidates.LoadedSAE]:
        paths = [Path(bank.output_dir) / m["checkpoint"] for g in groups if g.reference == reference for m in g.members]
        return candidates.open_all(paths, heldout, "checkpoint", subject, Path(bank.artifact_root))

    lineup = candidates.Lineup(subject, bank.hook_name, heldout, opened(False), opened(True), None, [])
    found = {"saebench": None, "cebench": None}
    if bank.saebench:
        noise_seeds = tuple(bank.noise_seeds)
        how = {"noise_seeds": noise_seeds, "probing": bank.probing, "core_texts": bank.core_texts}
        probing = saebench.Probing(bank.data_sets, bank.probe_ks, **how)
        found["saebench"] = evaluate(
            cells, "saebench", bank, lineup, lambda: saebench.evaluate(lineup, probing, bank.places, cells)[0]
        )
    if bank.cebench:
        found["cebench"] = evaluate(cells, "cebench", bank, lineup, lambda: contrastive_scores(bank, lineup))
    core = saebench.core_metrics(lineup, bank.core_texts, cells, bank.threads)
    found |= {"hook_name": bank.hook_name, "store_digest": store.digest, "rows": store.rows}
    found["train_rows"] = len(store.split(TrainingConfig.heldout_fraction)[0])
    found |= {"inputs": lineup.inputs(), "saes": [r | {"core": core[r["identity"]]} for r in lineup.records()]}
    found |= {"sections": sections, "recipe": {name: getattr(bank, name) for name in RECIPE}}
    return found | {"conditions": conditions.conditions(found)}


def train(bank: Bank, cells: Cells, store, device) -> list[Trained]:
    """Every SAE of the bank, a stacked pass a budget, references of the other family where they are missing."""
    wanted = list(bank.families)
    needed = {reference_family(f) for f in wanted} if bank.saebench or bank.cebench else set()
    missing = sorted(needed - set(wanted))
    groups = []
    for budget in bank.budgets:
        grid = members(bank.seeds, bank.d_saes, bank.ks, [bank.learning_rate], (*wanted, *missing))
        recipe = TrainingConfig(tokens=budget, batch_size=min(bank.batch_size, budget))
        result = train_or_find(cells, store, grid, recipe, device, bank.threads)
        for family, d_sae, k in product((*wanted, *missing), bank.d_saes, bank.ks):
            of = [m for m in result["members"] if (m["family"], m["d_sae"], m["k"]) == (family, d_sae, k)]
            groups.append(Trained(family, d_sae, k, budget, of, result["snapshot_steps"], family in missing))
    return groups


def evaluate(cells: Cells, name: str, bank: Bank, lineup, compute: Callable[[], dict]) -> dict:
    """A benchmark's results as a cell."""
    named = ("data_sets", "probing", "core_texts", "probe_ks", "noise_seeds")
    named += ("pair_sets", "max_pairs", "device", "threads")
    key = {n: getattr(bank, n) for n in named} | {"inputs": lineup.inputs(), "code": code_version(run)}
    key["candidates"] = [c.identity for c in lineup.saes]
    if name == "cebench":
        path, reason = baseline(bank)
        key |= {"stories": content_or_name(bank.stories), "baseline": reason if path is None else sha256_file(path)}
        key["checkout"] = bank.cebench_repo and cebench_checkout.code_digest(Path(bank.cebench_repo))
    return cells.get(name, key, lambda: (compute(), []))


def pairs(bank: Bank, seed: int) -> contrastive.Pairs:
    return contrastive.drawn(bank.stories, bank.pair_sets, bank.max_pairs, seed)


def baseline(bank: Bank) -> tuple[Path | None, str | None]:
    """(the summary that the map names for the hook, None), or (None, why it names none; None without a map)."""
    return baselines.lookup(Path(bank.baseline_map), bank.hook_name) if bank.baseline_map else (None, None)


def references(bank: Bank) -> tuple[dict | None, str | None]:
    """(the summary's results, None), or (None, why there are none)."""
    path, reason = baseline(bank)
    return (None if path is None else baselines.read_summary(path)), reason


def contrastive_scores(bank: Bank, lineup) -> dict:
    checkout = bank.cebench_repo and Path(bank.cebench_repo)
    repeats = {seed: pairs(bank, seed) for seed in bank.noise_seeds}
    given = (bank.places, *references(bank), checkout, bank.subject)
    return cebench.evaluate(lineup, pairs(bank, SEED), repeats, *given)
