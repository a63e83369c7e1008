"""Trains and evaluates all SAEs of a study on one activation store (a *bank*).

SAEs are trained in stacked passes, compared over seeds with their nulls, and scored on the external benchmarks. One
bank is one task of an executor.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from torch import Tensor

from husai.activations.language_model import check_hooks
from husai.activations.source import open_store
from husai.activations.store import ActivationStore
from husai.dictionaries.families import SAE_FAMILIES
from husai.evals import baselines, cebench, cebench_checkout, coding, contrastive, loaded, sae_probes, saebench
from husai.evals.baselines import Summary
from husai.evals.loaded import LoadedSAE, LoadedSAEs, Places
from husai.evidence import conditions
from husai.evidence.data_sets import PAIR_SETS
from husai.evidence.levels import PROBING_SEED
from husai.evidence.names import ALIVE, SCORES
from husai.evidence.references import reference_family
from husai.evidence.schemas import Bank, ConditionSection, Contrastive, GridMember, Probing, ProbingName, Recipe
from husai.runs import executor
from husai.runs.cells import Cells
from husai.runs.cli import prepare
from husai.runs.code import code_version
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import content_or_name, sha256_file
from husai.stability import controls, study
from husai.stability.prototypes import of_store
from husai.subjects import pretrained
from husai.subjects.harvesting import Harvesting
from husai.subjects.sources import PACKAGED, TextSource
from husai.training.grid import members, train_or_find
from husai.training.recovered import Site
from husai.training.trainer import TrainingConfig


@dataclass(frozen=True)
class BankPlan:
    """Settings of a study on one bank. They are JSON, because an executor may run the task on another machine."""

    subject: str
    hook_name: str
    families: list[str]
    seeds: list[int]
    d_saes: list[int]
    ks: list[int]
    budgets: list[int]
    """Numbers of rows (tokens) that each SAE is trained on. Each budget has its own learning-rate schedule."""
    rows: int
    """Rows of the bank."""
    batch_size: int
    learning_rate: float
    null_draws: int
    heldout_rows: int
    saebench: bool
    data_sets: list[str]
    probing: ProbingName
    """Name of the probe implementation, one of sae_probes.PROBINGS."""
    core_texts: int
    """Number of held-out documents for the cross-entropy with an SAE spliced in."""
    probe_ks: list[int]
    noise_seeds: list[int]
    cebench: bool
    stories: str | None
    pair_sets: list[str]
    """Data sets that pairs are built from if `stories` is None."""
    max_pairs: int
    baseline_map: str | None
    cebench_repo: str | None
    output_dir: str
    artifact_root: str
    device: str
    threads: int
    force: bool = False
    text: str = PACKAGED
    """Source of the text (`subjects.sources.TextSource`)."""
    max_norm_multiple: float | None = None
    """Rows whose norm exceeds this multiple of the median norm are left out."""
    judged: bool = False
    """Whether the SAEs, all of one condition, get a verdict: controls are trained and prototypes are found."""

    @property
    def source(self) -> TextSource:
        return TextSource.parse(self.text)

    @property
    def harvesting(self) -> Harvesting:
        return Harvesting(max_norm_multiple=self.max_norm_multiple)

    @property
    def places(self) -> Places:
        return Places(Path(self.output_dir), Path(self.artifact_root), self.device, self.threads, self.force)


def shared(args: argparse.Namespace) -> dict:
    """Settings that all banks of a study share, from the flags of `evals.flags.EvalParser.add_study`, as JSON."""
    return {
        "subject": str(args.subject),
        "text": str(args.text),
        "max_norm_multiple": args.max_norm_multiple,
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
    """CE-Bench's inputs, folders and device of a bank, as JSON."""
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
class TrainedGroup:
    """SAEs of a bank that differ in their seed alone."""

    family: str
    d_sae: int
    k: int
    budget: int
    members: list[GridMember]
    snapshot_steps: list[int]
    reference: bool
    """Whether the SAEs serve as references alone."""


def check(plan: BankPlan) -> None:
    """Raise BadInput for a grid that cannot be trained or evaluated. Computes nothing."""
    if not all((plan.families, plan.seeds, plan.d_saes, plan.ks, plan.budgets)):
        raise BadInput("the product of architectures, seeds, widths, sparsities and budgets is empty")
    for k, d_sae in product(plan.ks, plan.d_saes):
        if k > d_sae:
            raise BadInput(f"an L0 of {k} cannot be reached with {d_sae} features")
    if unknown := sorted(set(plan.families) - set(SAE_FAMILIES)):
        raise BadInput(f"family {unknown[0]!r}: one of {', '.join(SAE_FAMILIES)} expected")
    if plan.saebench:
        sae_probes.versions(plan.probing)
        sae_probes.check_data_sets(plan.data_sets)
    if plan.cebench:
        if not plan.stories and plan.max_pairs < len(plan.pair_sets):
            raise BadInput(
                f"--max-rows {plan.max_pairs}: one of each of {len(plan.pair_sets)} data sets at least expected"
            )
        sae_probes.check_data_sets(plan.pair_sets)
        drawn_pairs(plan, PROBING_SEED)
        references(plan)


def run_all(settings: list[dict], args: argparse.Namespace) -> list[Bank]:
    """Run one task for each bank on the executor that the command line names; returns the banks.

    Raises:
        BadInput: a bank cannot be trained or evaluated, or has no matched reference despite --require-matched.
        CheckFailed: a task failed. The same command reads the finished ones from their cells.
    """
    if args.executor == "ray" and args.device not in ("cpu", "cuda"):
        raise BadInput(f"--device {args.device}: a task on Ray sees the GPU it is given, as cuda; cpu or cuda expected")
    if args.executor == "local":
        prepare(args.device, args.threads)
    subject = pretrained.load(str(args.subject))
    for each in settings:
        check_hooks(subject, [each["hook_name"]])
        Site.of(subject, each["hook_name"])
        check(BankPlan(**each))
    gpus = float(args.device != "cpu")
    tasks = [executor.Task(f"bank of {s['hook_name']}", f"{__name__}:run", s, gpus) for s in settings]
    outcomes = executor.run(tasks, args.executor, args.ray_address, args.threads, title="banks")
    failed = [f"{o.name}: {o.reason}" for o in outcomes if o.reason is not None]
    if failed:
        raise CheckFailed("; ".join(failed))
    banks = [Bank.model_validate(o.value) for o in outcomes]
    if args.require_matched and (why := conditions.unmatched([row for bank in banks for row in bank.conditions])):
        raise BadInput(f"--require-matched: {why}")
    return banks


def run(**settings) -> dict:
    """The task of an executor: `evaluated`, with settings and result as JSON."""
    return evaluated(BankPlan(**settings)).to_json()


@dataclass(frozen=True)
class TrainedBank:
    """The SAEs of a bank, trained; none of their scores is computed yet."""

    plan: BankPlan
    cells: Cells
    store: ActivationStore
    groups: list[TrainedGroup]

    @cached_property
    def saes(self) -> LoadedSAEs:
        """The SAEs with their language model and held-out figures, opened when first needed."""
        plan = self.plan
        root, device = Path(plan.artifact_root), prepare(plan.device, plan.threads)
        subject = pretrained.load(plan.subject, device=device, harvesting=plan.harvesting)
        heldout = loaded.heldout_store(subject, plan.hook_name, root, plan.heldout_rows, plan.threads, plan.source)

        def open_group(reference: bool) -> list[LoadedSAE]:
            groups = [g for g in self.groups if g.reference == reference]
            paths = [Path(plan.output_dir) / m.checkpoint for g in groups for m in g.members]
            return loaded.open_all(paths, heldout, "checkpoint", subject, root)

        references = loaded.as_references(open_group(True))
        return LoadedSAEs(plan.subject, subject, heldout, open_group(False), references, source=plan.source)


def evaluated(plan: BankPlan) -> Bank:
    """Train the bank's SAEs, compare them over seeds, and score them on the benchmarks."""
    return scored(trained(plan))


def trained(plan: BankPlan) -> TrainedBank:
    """Train the bank's SAEs, or find them."""
    device = prepare(plan.device, plan.threads)
    cells = Cells(Path(plan.output_dir) / "cells", plan.force)
    machine = Path(plan.artifact_root), device, plan.threads
    store = open_store(
        *machine,
        subject=plan.subject,
        hook_name=plan.hook_name,
        rows=plan.rows,
        text=plan.source,
        harvesting=plan.harvesting,
    )
    return TrainedBank(plan, cells, store, train(plan, cells, store, device))


def scored(bank: TrainedBank) -> Bank:
    """Compare the bank's SAEs over seeds, then open them and score them on the benchmarks."""
    plan, cells, store = bank.plan, bank.cells, bank.store
    device, sections = prepare(plan.device, plan.threads), []
    for g in (g for g in bank.groups if not g.reference):
        arguments = cells, store, g.members, g.snapshot_steps, plan.null_draws, plan.threads
        prototype_rows, gaussian = controls_of(plan, g, store, device) if plan.judged else (None, None)
        scores = SCORES if plan.judged else ALIVE
        section, _ = study.score_trained(*arguments, gaussian, scores=scores, prototype_rows=prototype_rows)
        sections.append(ConditionSection(family=g.family, d_sae=g.d_sae, k=g.k, budget=g.budget, **dict(section)))

    saes = bank.saes
    probing = pairs = None
    if plan.saebench:
        setup = saebench.Setup(
            plan.data_sets,
            plan.probe_ks,
            noise_seeds=tuple(plan.noise_seeds),
            probing=plan.probing,
            core_texts=plan.core_texts,
        )
        key = key_of(plan, saes)
        value = cells.get(
            "saebench", key, lambda: (saebench.evaluate(saes, setup, plan.places, cells)[0].to_json(), [])
        )
        probing = Probing.model_validate(value)
    if plan.cebench:
        key = key_of(plan, saes) | references_key(plan)
        pairs = Contrastive.model_validate(
            cells.get("cebench", key, lambda: (contrastive_scores(plan, saes).to_json(), []))
        )
    core = saebench.core_metrics(saes, plan.core_texts, cells, plan.threads)
    records = saebench.scored(saes, core)
    root = plan.places.artifact_root
    coded = {"code": coding.evaluate(saes, records, store, plan.core_texts, root, plan.threads)} if plan.judged else {}
    results = Bank(
        saebench=probing,
        cebench=pairs,
        hook_name=plan.hook_name,
        store_digest=store.digest,
        rows=store.rows,
        train_rows=len(store.split(TrainingConfig.heldout_fraction)[0]),
        inputs=saes.inputs(),
        saes=records,
        sections=sections,
        recipe=recipe_again(plan),
        conditions=[],
        **coded,
    )
    return results.model_copy(update={"conditions": conditions.conditions(results)})


def train(plan: BankPlan, cells: Cells, store, device) -> list[TrainedGroup]:
    """Train every SAE of the bank, one stacked pass for each budget, and the references that the grid lacks."""
    architectures = list(plan.families)
    reference_architectures = {reference_family(f) for f in architectures} if plan.saebench or plan.cebench else set()
    missing = sorted(reference_architectures - set(architectures))
    groups = []
    for budget in plan.budgets:
        grid = members(plan.seeds, plan.d_saes, plan.ks, [plan.learning_rate], (*architectures, *missing))
        result = train_or_find(cells, store, grid, recipe_of(plan, budget), device, plan.threads)
        for family, d_sae, k in product((*architectures, *missing), plan.d_saes, plan.ks):
            saes = [m for m in result.members if (m.family, m.d_sae, m.k) == (family, d_sae, k)]
            groups.append(TrainedGroup(family, d_sae, k, budget, saes, result.snapshot_steps, family in missing))
    return groups


def controls_of(plan: BankPlan, g: TrainedGroup, store: ActivationStore, device) -> tuple[Tensor, study.ControlArm]:
    """(prototypes of the store, SAEs with the same recipe on Gaussian rows)."""
    root = Path(plan.artifact_root)
    grid = members(plan.seeds, [g.d_sae], [g.k], [plan.learning_rate], (g.family,))
    gaussian = controls.gaussian(root, store, grid, recipe_of(plan, g.budget), device, plan.threads)
    return of_store(store, root, g.d_sae), gaussian


def recipe_again(plan: BankPlan) -> Recipe:
    """The settings that train a condition of the bank again."""
    optional = plan.source.record()
    optional |= {} if plan.max_norm_multiple is None else {"max_norm_multiple": plan.max_norm_multiple}
    named = set(Recipe.model_fields) - {"text", "max_norm_multiple"}
    return Recipe(**{n: getattr(plan, n) for n in Recipe.model_fields if n in named} | optional)


def recipe_of(plan: BankPlan, budget: int) -> TrainingConfig:
    return TrainingConfig(tokens=budget, batch_size=min(plan.batch_size, budget))


def key_of(plan: BankPlan, saes: LoadedSAEs) -> dict:
    """The key of a benchmark's cell."""
    probing_settings = ("data_sets", "probing", "core_texts", "probe_ks", "noise_seeds")
    named = (*probing_settings, "pair_sets", "max_pairs", "device", "threads")
    key = {n: getattr(plan, n) for n in named} | {"inputs": saes.inputs(), "code": code_version(evaluated)}
    return key | {"candidates": [c.identity for c in saes.saes]}


def references_key(plan: BankPlan) -> dict:
    """Part of the cell key of CE-Bench: its inputs other than the SAEs."""
    path, reason = baseline(plan)
    key = {"stories": content_or_name(plan.stories), "baseline": reason if path is None else sha256_file(path)}
    return key | {"checkout": plan.cebench_repo and cebench_checkout.code_digest(Path(plan.cebench_repo))}


def drawn_pairs(plan: BankPlan, seed: int) -> contrastive.Pairs:
    return contrastive.drawn(plan.stories, plan.pair_sets, plan.max_pairs, seed)


def baseline(plan: BankPlan) -> tuple[Path | None, str | None]:
    """(the summary that the map names for the hook, None), or (None, why the map names none; None without a map)."""
    return baselines.lookup(Path(plan.baseline_map), plan.hook_name) if plan.baseline_map else (None, None)


def references(plan: BankPlan) -> tuple[Summary | None, str | None]:
    """(results of the summary, None), or (None, why there is no summary)."""
    path, reason = baseline(plan)
    return (None if path is None else baselines.read_summary(path)), reason


def contrastive_scores(plan: BankPlan, saes: LoadedSAEs) -> Contrastive:
    checkout = Path(plan.cebench_repo) if plan.cebench_repo else None
    repeats = {seed: drawn_pairs(plan, seed) for seed in plan.noise_seeds}
    return cebench.evaluate(saes, drawn_pairs(plan, PROBING_SEED), repeats, plan.places, *references(plan), checkout)
