"""SAEBench: sparse probing with baselines, and core metrics."""

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
    """Settings of the sparse probing."""

    data_sets: list[str]
    ks: list[int]
    """Numbers of features of a probe. `deltas.K` must be among them."""
    seed: int = 42
    noise_seeds: tuple[int, ...] = (43, 44, 45, 46)
    """Further seeds of the benchmark, on which the first SAE alone is probed."""
    reg_type: str = "l1"
    binarize: bool = False
    results_path: Path | None = None
    """Folder of the figures. None: a folder below the artifact root, which all studies share."""
    probing: ProbingName = sae_probes.OFFICIAL
    """Name of the probe implementation, one of sae_probes.PROBINGS."""
    core_texts: int = 200
    """Number of held-out documents for the core metrics."""


def evaluate(loaded: LoadedSAEs, setup: Setup, places: Places, cells: Cells) -> tuple[Probing, list[dict]]:
    """(results of the phase, every figure as rows of a table).

    Raises:
        CheckFailed: the official code failed.
    """
    figures, repeats = probe(loaded, setup, places)
    core = core_metrics(loaded, setup.core_texts, cells, places.threads)
    first, *_ = records = [
        ProbedRecord(**dict(r), core=core[r.identity], **kept_figures(figures[r.identity])) for r in loaded.records
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
        controls=[ProbedControl(**dict(c.record), **kept_figures(figures[c.identity])) for c in loaded.control_saes],
        baselines={
            name: Figures(**kept_figures(f))
            for name, f in figures.items()
            if name.startswith(("llm", "pca", "untrained"))
        },
        conditions=[],
        noise=noise(setup, first.label, [figures[first.identity], *repeats]),
        **loaded.source.record(),
    )
    labels = {c.identity: c.label for c in [*loaded.opened, *loaded.control_saes]}
    rows = [
        {"encoder": labels.get(key, key), "seed": setup.seed, "data_set": name, "k": k}
        | {metric: values[i] for metric, values in by_metric.items()}
        for key, by_k in figures.items()
        for k, by_metric in by_k.items()
        for i, name in enumerate(setup.data_sets)
    ]
    return results.model_copy(update={"conditions": deltas.saebench(results)}), rows


def probe(loaded: LoadedSAEs, setup: Setup, places: Places) -> tuple[dict[str, PerDataSet], list[PerDataSet]]:
    """({identity of an SAE, or name of a baseline: its figures}, figures of the first SAE at the noise seeds)."""
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
    machine = {"cache": cache(subject), "root": root, "device": places.device}

    def task(name: str, kind: str, path: Path | None, identity: str) -> ProbeTask:
        place = None if path is None else str(path)
        return ProbeTask(name, kind, place, identity, setup.seed, settings, **machine)

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
            control = task(c.label, "sae", to_saelens(c.sae, model, hook_name, work / c.label), c.identity)
            tasks[c.identity] = replace(control, settings=on_random, cache=on_random_cache)
    repeats = [replace(tasks[loaded.saes[0].identity], seed=seed) for seed in setup.noise_seeds]
    figures = sae_probes.run([*tasks.values(), *repeats], places.threads, places.output_dir / "workers", places.force)
    return dict(zip(tasks, figures, strict=False)), figures[len(tasks) :]


def kept_figures(figures: PerDataSet) -> dict:
    """Figures of an encoder that results keep: means, and the test AUC of each data set."""
    means = {k: {m: float(np.mean(v)) for m, v in by_metric.items()} for k, by_metric in figures.items()}
    figures_kept = {"means": means, "test_auc": {k: by_metric["test_auc"] for k, by_metric in figures.items()}}
    return figures_kept if "llm" in figures else figures_kept | {"auc_by_validation": by_validation(figures)}


def by_validation(figures: PerDataSet) -> float:
    """Mean test AUC if each data set uses the k with its highest validation AUC. Reported, but never compared."""
    ks = list(figures)
    best = np.argmax([figures[k]["val_auc"] for k in ks], axis=0)
    return float(np.mean([figures[ks[b]]["test_auc"][i] for i, b in enumerate(best)]))


def noise(setup: Setup, label: str, runs: list[PerDataSet]) -> ProbingNoise:
    """Spread of one SAE's mean AUC over seeds of the benchmark itself."""
    means = {k: [float(np.mean(f[k]["test_auc"])) for f in runs] for k in map(str, setup.ks)}
    auc = {k: Repeats(**estimates.noise(values)) for k, values in means.items()}
    return ProbingNoise(label=label, seeds=[setup.seed, *setup.noise_seeds], auc=auc)


def scored(loaded: LoadedSAEs, core: dict[str, Core]) -> list[ScoredRecord]:
    """Records of the SAEs, with the core metrics of each identity."""
    return [ScoredRecord(**dict(r), core=core[r.identity]) for r in loaded.records]


def core_metrics(loaded: LoadedSAEs, documents: int, cells: Cells, threads: int) -> dict[str, Core]:
    """Identity of each SAE -> SAEBench's core metrics on held-out documents. All SAEs share the forward passes."""
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
