"""SAEBench on a lineup of SAEs: sparse probing beside baselines, and core metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from husai.activations.language_model import harvest_prompts
from husai.dictionaries.checkpoints import checkpoint_digest
from husai.evals import baselines, sae_probes
from husai.evals.candidates import Lineup, LoadedSAE, Places, to_saelens
from husai.evals.sae_probes import Settings, Task
from husai.evidence import data_sets, deltas, references
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.files import sha256_file, write_bytes
from husai.subjects import text
from husai.training.recovered import cross_entropies, recovered

Figures = dict[str, dict[str, list[float]]]
"""k -> metric -> one a data set."""


@dataclass(frozen=True)
class Probing:
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
    probing: str = sae_probes.OFFICIAL
    """Whose probes: one of sae_probes.PROBINGS."""
    core_texts: int = 200
    """Held-out documents of the core metrics."""


def evaluate(lineup: Lineup, probing: Probing, places: Places, cells: Cells) -> tuple[dict, list[dict]]:
    """(the results, every figure as rows of a table).

    Raises:
        CheckFailed: the official code failed.
    """
    figures, repeats = probe(lineup, probing, places)
    core = core_metrics(lineup, probing.core_texts, cells, places.threads)
    results: dict[str, Any] = {
        "phase": "saebench_custom",
        "inputs": lineup.inputs(),
        "subject": lineup.subject.name,
        "subject_digest": lineup.subject.digest,
        "hook_name": lineup.hook_name,
        "data_sets": probing.data_sets,
        "families": data_sets.families(probing.data_sets),
        "random_seed": probing.seed,
        "probing": probing.probing,
        "versions": sae_probes.versions(probing.probing),
        "saes": [r | {"core": core[r["identity"]]} for r in lineup.records()],
        "controls": [c.to_json() for c in lineup.controls],
        "baselines": {name: told(f) for name, f in figures.items() if name.startswith(("llm", "pca", "untrained"))},
    }
    for name in ("saes", "controls"):
        results[name] = [r | told(figures[r["identity"]]) for r in results[name]]
    results["conditions"] = deltas.saebench(results)
    results["noise"] = noise(probing, results["saes"][0], [figures[lineup.saes[0].identity], *repeats])
    labels = {c.identity: c.label for c in [*lineup.opened, *lineup.controls]}
    rows = [
        {"encoder": labels.get(key, key), "seed": probing.seed, "data_set": name, "k": k}
        | {metric: values[i] for metric, values in by_metric.items()}
        for key, of in figures.items()
        for k, by_metric in of.items()
        for i, name in enumerate(probing.data_sets)
    ]
    return results, rows


def probe(lineup: Lineup, probing: Probing, places: Places) -> tuple[dict[str, Figures], list[Figures]]:
    """({identity of an SAE, or name of a baseline: its figures}, the first SAE's at the noise seeds)."""
    work = places.output_dir / "encoders"

    def cache(model) -> str:
        folder = places.probe_activations(model)
        harvest_prompts(model, [lineup.hook_name], probing.data_sets, folder)
        return str(folder)

    subject, store, hook_name = lineup.subject, lineup.store, lineup.hook_name
    lists = tuple(probing.data_sets), tuple(probing.ks)
    how = probing.reg_type, probing.binarize, probing.probing
    settings = Settings(subject.digest, subject.name, hook_name, *lists, *how)
    root = str(probing.results_path or places.artifact_root / "probes")  # controls of one store serve every study
    where = {"cache": cache(subject), "root": root, "device": places.device}

    def task(name: str, kind: str, path: Path | None, identity: str) -> Task:
        return Task(name, kind, path and str(path), identity, probing.seed, settings, **where)

    tasks = {"llm": task("llm", "llm", None, subject.digest)}
    for c in lineup.opened:
        tasks[c.identity] = task(c.label, "sae", to_saelens(c.sae, subject, hook_name, work / c.label), c.identity)
        if (name := references.untrained_name(c.facts)) not in tasks:
            sae = baselines.untrained(store, *references.untrained_like(c.facts))
            folder = to_saelens(sae, subject, hook_name, work / name)
            tasks[name] = task(name, "sae", folder, checkpoint_digest(folder))
        if (name := references.pca_name(c.facts)) not in tasks:
            file = work / f"{name}.safetensors"
            write_bytes(file, save(baselines.principal_components(store, c.facts["d_sae"])))
            tasks[name] = task(name, "encoder", file, sha256_file(file))
    if lineup.random_model:
        model = lineup.random_model
        on_random = replace(settings, subject_digest=model.digest, model_name=model.name)
        of_random = {"settings": on_random, "cache": cache(model)}
        for c in lineup.controls:
            own = task(c.label, "sae", to_saelens(c.sae, model, hook_name, work / c.label), c.identity)
            tasks[c.identity] = replace(own, **of_random)
    again = [replace(tasks[lineup.saes[0].identity], seed=seed) for seed in probing.noise_seeds]
    found = sae_probes.run([*tasks.values(), *again], places.threads, places.output_dir / "workers", places.force)
    return dict(zip(tasks, found, strict=False)), found[len(tasks) :]


def told(figures: Figures) -> dict:
    """What is kept of an encoder's figures: means, and the AUC of each data set."""
    means = {k: {m: float(np.mean(v)) for m, v in by_metric.items()} for k, by_metric in figures.items()}
    found = {"means": means, "test_auc": {k: by_metric["test_auc"] for k, by_metric in figures.items()}}
    return found if "llm" in figures else found | {"auc_by_validation": by_validation(figures)}


def by_validation(figures: Figures) -> float:
    """Mean test AUC where each data set's k is the one with the highest validation AUC. Reported, never compared."""
    ks = list(figures)
    best = np.argmax([figures[k]["val_auc"] for k in ks], axis=0)
    return float(np.mean([figures[ks[b]]["test_auc"][i] for i, b in enumerate(best)]))


def noise(probing: Probing, first: dict, runs: list[Figures]) -> dict:
    """How much one SAE's mean AUC moves with the benchmark's own seed."""
    answer = {"label": first["label"], "seeds": [probing.seed, *probing.noise_seeds], "auc": {}}
    for k in map(str, probing.ks):
        answer["auc"][k] = deltas.noise([float(np.mean(f[k]["test_auc"])) for f in runs])
    return answer


def core_metrics(lineup: Lineup, documents: int, cells: Cells, threads: int) -> dict[str, dict]:
    """SAEBench's core metrics of each SAE (by its identity), all in the same forward passes, on held-out documents."""
    texts = text.corpus().heldout[:documents]
    saes: list[LoadedSAE] = lineup.opened
    key = {"subject": lineup.subject.digest, "hook_name": lineup.hook_name, "saes": [c.identity for c in saes]}
    key |= {"texts": [*map(text.document_id, texts)], "threads": threads}
    key["code"] = code_version(cross_entropies)
    key["device"] = next(lineup.subject.model.parameters()).device.type

    def compute() -> tuple[dict, list[Path]]:
        return cross_entropies(lineup.subject, lineup.hook_name, [c.sae for c in saes], texts), []

    losses = cells.get("core", key, compute)
    kl = losses["kl_zeroed"]
    rows = zip(saes, recovered(losses), losses["spliced"], losses["kl_spliced"], strict=True)
    return {
        c.identity: {
            "ce_loss_score": score,
            "ce_loss_with_sae": loss,
            "ce_loss_without_sae": losses["model"],
            "ce_loss_with_ablation": losses["zeroed"],
            "kl_div_score": (kl - divergence) / kl,
            "kl_div_with_sae": divergence,
            "kl_div_with_ablation": kl,
            "tokens": losses["tokens"],
        }
        for c, score, loss, divergence in rows
    }
