"""SAEBench: sparse probing beside baselines, and core metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from husai.activations.language_model import harvest_prompts
from husai.dictionaries.checkpoints import checkpoint_digest
from husai.evals import baselines, sae_probes
from husai.evals.loaded import LoadedSAEs, Places, to_saelens
from husai.evals.sae_probes import ProbeTask, Settings
from husai.evidence import data_sets, deltas, estimates, references
from husai.evidence.schemas import (
    Core,
    Figures,
    ProbedControl,
    ProbedRecord,
    Probing,
    ProbingName,
    ProbingNoise,
    Repeats,
    ScoredRecord,
)
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.files import sha256_file, write_bytes
from husai.subjects import text
from husai.training.recovered import cross_entropies, recovered

PerDataSet = dict[str, dict[str, list[float]]]
"""k -> metric -> one a data set."""


@dataclass(frozen=True)
class Setup:
    """What is probed, and how."""

    data_sets: list[str]
    ks: list[int]
    """deltas.K among them."""
    seed: int = 42
    noise_seeds: tuple[int, ...] = (43, 44, 45, 46)
    """Further seeds of the benchmark, for the first SAE alone."""
    reg_type: str = "l1"
    binarize: bool = False
    results_path: Path | None = None
    """A file of figures for each SAE and data set; by default below the artifact root, where studies share them."""
    probing: ProbingName = sae_probes.OFFICIAL
    """Whose probes: one of sae_probes.PROBINGS."""
    core_texts: int = 200
    """Held-out documents of the core metrics."""


def evaluate(loaded: LoadedSAEs, setup: Setup, places: Places, cells: Cells) -> tuple[Probing, list[dict]]:
    """(the results, every figure as rows of a table).

    Raises:
        CheckFailed: the official code failed.
    """
    figures, repeats = probe(loaded, setup, places)
    core = core_metrics(loaded, setup.core_texts, cells, places.threads)
    first, *_ = records = [
        ProbedRecord(**dict(r), core=core[r.identity], **told(figures[r.identity])) for r in loaded.records
    ]
    results = Probing(
        phase="saebench_custom",
        inputs=loaded.inputs(),
        subject=loaded.subject.name,
        subject_digest=loaded.subject.digest,
        hook_name=loaded.hook_name,
        data_sets=setup.data_sets,
        families=data_sets.families(setup.data_sets),
        random_seed=setup.seed,
        probing=setup.probing,
        versions=sae_probes.versions(setup.probing),
        saes=records,
        controls=[ProbedControl(**dict(c.record), **told(figures[c.identity])) for c in loaded.control_saes],
        baselines={
            name: Figures(**told(f)) for name, f in figures.items() if name.startswith(("llm", "pca", "untrained"))
        },
        conditions=[],
        noise=noise(setup, first.label, [figures[first.identity], *repeats]),
        **loaded.source.record(),
    )
    labels = {c.identity: c.label for c in [*loaded.opened, *loaded.control_saes]}
    rows = [
        {"encoder": labels.get(key, key), "seed": setup.seed, "data_set": name, "k": k}
        | {metric: values[i] for metric, values in by_metric.items()}
        for key, of in figures.items()
        for k, by_metric in of.items()
        for i, name in enumerate(setup.data_sets)
    ]
    return results.model_copy(update={"conditions": deltas.saebench(results)}), rows


def probe(loaded: LoadedSAEs, setup: Setup, places: Places) -> tuple[dict[str, PerDataSet], list[PerDataSet]]:
    """({identity of an SAE, or name of a baseline: its figures}, the first SAE's at the noise seeds)."""
    work = places.output_dir / "encoders"

    def cache(model) -> str:
        folder = places.probe_activations(model)
        harvest_prompts(model, [loaded.hook_name], setup.data_sets, folder)
        return str(folder)

    subject, store, hook_name = loaded.subject, loaded.store, loaded.hook_name
    settings = Settings(
        subject.activations_digest,
        subject.name,
        hook_name,
        tuple(setup.data_sets),
        tuple(setup.ks),
        setup.reg_type,
        setup.binarize,
        setup.probing,
    )
    root = str(setup.results_path or places.artifact_root / "probes")  # controls of one store serve every study
    where = {"cache": cache(subject), "root": root, "device": places.device}

    def task(name: str, kind: str, path: Path | None, identity: str) -> ProbeTask:
        place = None if path is None else str(path)
        return ProbeTask(name, kind, place, identity, setup.seed, settings, **where)

    tasks = {"llm": task("llm", "llm", None, subject.activations_digest)}
    for c in loaded.opened:
        tasks[c.identity] = task(c.label, "sae", to_saelens(c.sae, subject, hook_name, work / c.label), c.identity)
        if (name := references.untrained_name(c.facts)) not in tasks:
            sae = baselines.untrained(store, *references.untrained_like(c.facts))
            folder = to_saelens(sae, subject, hook_name, work / name)
            tasks[name] = task(name, "sae", folder, checkpoint_digest(folder))
        if (name := references.pca_name(c.facts)) not in tasks:
            file = work / f"{name}.safetensors"
            write_bytes(file, save(baselines.principal_components(store, c.facts.d_sae)))
            tasks[name] = task(name, "encoder", file, sha256_file(file))
    if loaded.controls is not None:
        model = loaded.controls.subject
        on_random = replace(settings, subject_digest=model.activations_digest, model_name=model.name)
        on_random_cache = cache(model)
        for c in loaded.controls.saes:
            own = task(c.label, "sae", to_saelens(c.sae, model, hook_name, work / c.label), c.identity)
            tasks[c.identity] = replace(own, settings=on_random, cache=on_random_cache)
    again = [replace(tasks[loaded.saes[0].identity], seed=seed) for seed in setup.noise_seeds]
    found = sae_probes.run([*tasks.values(), *again], places.threads, places.output_dir / "workers", places.force)
    return dict(zip(tasks, found, strict=False)), found[len(tasks) :]


def told(figures: PerDataSet) -> dict:
    """What is kept of an encoder's figures: means, and the AUC of each data set."""
    means = {k: {m: float(np.mean(v)) for m, v in by_metric.items()} for k, by_metric in figures.items()}
    found = {"means": means, "test_auc": {k: by_metric["test_auc"] for k, by_metric in figures.items()}}
    return found if "llm" in figures else found | {"auc_by_validation": by_validation(figures)}


def by_validation(figures: PerDataSet) -> float:
    """Mean test AUC where each data set's k is the one with the highest validation AUC. Reported, never compared."""
    ks = list(figures)
    best = np.argmax([figures[k]["val_auc"] for k in ks], axis=0)
    return float(np.mean([figures[ks[b]]["test_auc"][i] for i, b in enumerate(best)]))


def noise(setup: Setup, label: str, runs: list[PerDataSet]) -> ProbingNoise:
    """How much one SAE's mean AUC moves with the benchmark's own seed."""
    means = {k: [float(np.mean(f[k]["test_auc"])) for f in runs] for k in map(str, setup.ks)}
    auc = {k: Repeats(**estimates.noise(of)) for k, of in means.items()}
    return ProbingNoise(label=label, seeds=[setup.seed, *setup.noise_seeds], auc=auc)


def scored(loaded: LoadedSAEs, core: dict[str, Core]) -> list[ScoredRecord]:
    """The records of the SAEs with their core metrics (by identity)."""
    return [ScoredRecord(**dict(r), core=core[r.identity]) for r in loaded.records]


def core_metrics(loaded: LoadedSAEs, documents: int, cells: Cells, threads: int) -> dict[str, Core]:
    """SAEBench's core metrics of each SAE (by its identity), all in the same forward passes, on held-out documents."""
    texts = loaded.source.heldout_texts(documents, loaded.subject.tokenizer)
    saes = loaded.opened
    key: dict[str, Any] = {"subject": loaded.subject.activations_digest, "hook_name": loaded.hook_name}
    key |= {"saes": [c.identity for c in saes], "texts": [*map(text.document_id, texts)], "threads": threads}
    key["code"] = code_version(cross_entropies)
    key["device"] = next(loaded.subject.model.parameters()).device.type

    def compute() -> tuple[dict, list[Path]]:
        return cross_entropies(loaded.subject, loaded.hook_name, [c.sae for c in saes], texts), []

    losses = cells.get("core", key, compute)
    kl = losses["kl_zeroed"]
    rows = zip(saes, recovered(losses), losses["spliced"], losses["kl_spliced"], strict=True)
    return {
        c.identity: Core(
            ce_loss_score=score,
            ce_loss_with_sae=loss,
            ce_loss_without_sae=losses["model"],
            ce_loss_with_ablation=losses["zeroed"],
            kl_div_score=(kl - divergence) / kl,
            kl_div_with_sae=divergence,
            kl_div_with_ablation=kl,
            tokens=losses["tokens"],
        )
        for c, score, loss, divergence in rows
    }
