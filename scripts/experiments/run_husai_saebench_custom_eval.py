"""SAEBench's sparse probing (sae-probes) and core metrics on SAEs at hand, with baselines and intervals.

    python scripts/experiments/run_husai_saebench_custom_eval.py --checkpoint CKPT --model-name pythia-70m-deduped \\
      --hook-layer 0 --hook-name blocks.0.hook_resid_pre --device cuda
    python scripts/experiments/run_husai_saebench_custom_eval.py --model-name husai-tiny --hook-layer 1 \\
      --checkpoint results/experiments/sae_training/checkpoints --random-model-checkpoint RANDOM_MODEL_SAES

A checkpoint is one of HUSAI, SAELens, dictionary_learning or sparsify, or a folder that holds some. Probing runs by
SAEBench's own code (`sparse_probing_sae_probes`), on activations that are harvested once for all SAEs. An SAE's figure
stands beside the residual stream's own probe, PCA of its size, an untrained SAE of its width and L0, SAEs of the
random-weights model, and, where one at hand matches (docs/methods.md), a reference SAE. The AUC at k = 5, fixed in
advance, is the one that counts.
"""

from dataclasses import replace
from pathlib import Path

from husai.runs.cli import Parser, int_list, name_list, prepare, run_main, seed_list

K = 5  # of the headline figure
FOLDERS = ("checkpoint", "reference", "random_model_checkpoint", "subject")


def parse():
    p = Parser(__doc__)
    p.add_common("results/experiments/saebench_custom")
    p.add_benchmark()
    p.add_argument("--dataset-names", type=name_list, default="probe", help="names or sides (default: %(default)s)")
    p.add_argument("--ks", type=int_list, default="1,2,5,16", help="features a probe may use (default: %(default)s)")
    p.add_argument("--reg-type", choices=["l1", "l2"], default="l1", help="of probes (default: %(default)s)")
    p.add_argument("--binarize", action="store_true", help="probes see only whether a feature is active")
    p.add_argument("--random-seed", type=int, default=42, help="of splits and probes (default: %(default)s)")
    p.add_argument(
        "--noise-seeds",
        type=seed_list,
        default="43,44,45,46",
        help="further such seeds, for the first SAE alone: the benchmark's own noise (default: %(default)s)",
    )
    p.add_argument("--results-path", type=Path, help="sae-probes' own files (default: OUTPUT_DIR/sae_probes)")
    p.add_argument("--model-cache-path", type=Path, help="prompts' activations (default: below ARTIFACT_ROOT)")
    args = p.parse_benchmark()
    if K not in args.ks:
        p.error(f"--ks {','.join(map(str, args.ks))}: {K} must be among them, at which differences are taken")
    if args.random_seed in args.noise_seeds:
        p.error(f"--noise-seeds: {args.random_seed} is --random-seed; others expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import PACKAGES, run_phase

    apart = ("results_path", "model_cache_path")
    packages = (*PACKAGES, "benchmarks")
    run_phase(args, "saebench_custom", __file__, compute, summary, FOLDERS, apart, packages=packages)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Check all that is brought, then harvest, probe, measure, and compare."""
    device = prepare(args.device, args.threads)
    from husai.benchmarks import candidates, deltas, sae_probes
    from husai.subjects import pretrained

    sae_probes.versions()
    data_sets = sae_probes.check_data_sets(args.dataset_names)
    subject = pretrained.load(args.subject, device=device)
    place = (args.hook_name, args.artifact_root, args.rows)
    store = candidates.heldout_store(subject, *place, args.threads)
    saes = candidates.open_all(args.checkpoint, store, "checkpoint")
    known = {c.sha256 for c in saes}
    references = [c for c in candidates.open_all(args.reference, store, "reference") if c.sha256 not in known]
    random_model, controls = candidates.open_controls(
        args.random_model_checkpoint, args.subject, *place, device, args.threads
    )

    figures, repeats = probe(args, data_sets, subject, store, [*saes, *references], random_model, controls)
    core = core_metrics(args, cells, subject, [*saes, *references])
    results = {
        "phase": "saebench_custom",
        "inputs": inputs(args, subject, store, [*saes, *references, *controls]),
        "subject": subject.name,
        "subject_digest": subject.digest,
        "hook_name": args.hook_name,
        "data_sets": data_sets,
        "families": sae_probes.families(data_sets),
        "random_seed": args.random_seed,
        "versions": sae_probes.versions(),
        "saes": [
            c.to_json(c.sha256 in known) | {"core": core[c.sha256]} | probed(figures[c.sha256])
            for c in [*saes, *references]
        ],
        "controls": [c.to_json() | probed(figures[c.sha256]) for c in controls],
        "baselines": {name: probed(f) for name, f in figures.items() if name.startswith(("llm", "pca", "untrained"))},
    }
    results["conditions"] = deltas.saebench(results)
    results["noise"] = noise(args, results["saes"][0], [figures[saes[0].sha256], *repeats])
    records = results["saes"]
    return results, [write_csv(args, data_sets, records, figures), *draw(results, args.output_dir / "figures")]


def inputs(args, subject, store, opened) -> dict[str, str]:
    found = {"subject": subject.digest, "held-out activations": store.digest}
    return found | {f"checkpoint {c.label}": c.sha256 for c in opened}


# ---------------------------------------------------------------------------------------------------------------------
# Figures: of each SAE and baseline, at each k, one a data set


def probe(args, data_sets, subject, store, saes, random_model, controls) -> tuple[dict[str, dict], list[dict]]:
    """({sha256 of an SAE, or name of a baseline: {k: {metric: figures}}}, the first SAE's at the noise seeds)."""
    from safetensors.torch import save

    from husai.activations.language_model import harvest_prompts
    from husai.benchmarks import baselines, candidates, sae_probes
    from husai.dictionaries.checkpoints import checkpoint_digest
    from husai.runs.files import sha256_file, write_bytes

    work = args.output_dir / "encoders"
    root = args.model_cache_path or args.artifact_root / "probe_activations"

    def cache(model) -> Path:
        folder = root if args.model_cache_path else root / model.digest[:16]
        harvest_prompts(model, [args.hook_name], data_sets, folder)
        return folder

    settings = sae_probes.Settings(
        subject.digest,
        subject.name,
        args.hook_name,
        tuple(data_sets),
        tuple(args.ks),
        args.reg_type,
        args.binarize,
    )
    where = {
        "cache": str(cache(subject)),
        "root": str(args.results_path or args.output_dir / "sae_probes"),
        "device": args.device,
    }

    def task(name: str, kind: str, path: Path | None, sha256: str, seed: int = args.random_seed):
        return sae_probes.Task(name, kind, path and str(path), sha256, seed, settings, **where)

    tasks = {"llm": task("llm", "llm", None, subject.digest)}
    for c in saes:
        folder = candidates.to_saelens(c.sae, subject, args.hook_name, work / c.label)
        tasks[c.sha256] = task(c.label, "sae", folder, c.sha256)
        d_sae, k, seed = baselines.untrained_like(c.facts)
        name = baselines.untrained_name(c.facts)
        if name not in tasks:
            sae = baselines.untrained(store, d_sae, k, seed)
            folder = candidates.to_saelens(sae, subject, args.hook_name, work / name)
            tasks[name] = task(name, "sae", folder, checkpoint_digest(folder))
        name = baselines.pca_name(c.facts)
        file = work / f"{name}.safetensors"
        if name not in tasks:
            write_bytes(file, save(baselines.principal_components(store, d_sae)))
            tasks[name] = task(name, "encoder", file, sha256_file(file))
    for c in controls:
        folder = candidates.to_saelens(c.sae, random_model, args.hook_name, work / c.label)
        on_random = replace(settings, subject_digest=random_model.digest, model_name=random_model.name)
        of_random = {"settings": on_random, "cache": str(cache(random_model))}
        tasks[c.sha256] = replace(task(c.label, "sae", folder, c.sha256), **of_random)
    noise = [replace(tasks[saes[0].sha256], seed=seed) for seed in args.noise_seeds]
    found = sae_probes.run([*tasks.values(), *noise], args.threads, args.output_dir / "sae_probes_work", args.force)
    return dict(zip(tasks, found, strict=False)), found[len(tasks) :]


def core_metrics(args, cells, subject, saes) -> dict[str, dict]:
    """SAEBench's core metrics of each SAE (by sha256), all in the same forward passes, on held-out documents."""
    from husai.runs.cells import code_version
    from husai.subjects import text
    from husai.training.recovered import cross_entropies, recovered

    texts = text.corpus().heldout[:200]
    key = {"subject": subject.digest, "hook_name": args.hook_name, "saes": [c.sha256 for c in saes]}
    key |= {"texts": [*map(text.document_id, texts)], "threads": args.threads}

    def compute() -> tuple[dict, list[Path]]:
        return cross_entropies(subject, args.hook_name, [c.sae for c in saes], texts), []

    losses = cells.get("core", key | {"code": code_version("training", "activations", "subjects")}, compute)
    kl = losses["kl_zeroed"]
    rows = zip(saes, recovered(losses), losses["spliced"], losses["kl_spliced"], strict=True)
    return {
        c.sha256: {
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


def probed(figures: dict) -> dict:
    """What is kept of an encoder's figures: means, and the AUC of each data set."""
    import numpy as np

    means = {k: {m: float(np.mean(v)) for m, v in by_metric.items()} for k, by_metric in figures.items()}
    found = {"means": means, "test_auc": {k: by_metric["test_auc"] for k, by_metric in figures.items()}}
    return found if "llm" in figures else found | {"auc_by_validation": by_validation(figures)}


def by_validation(figures: dict) -> float:
    """Mean test AUC where each data set's k is the one with the highest validation AUC. Reported, never compared."""
    import numpy as np

    ks = list(figures)
    best = np.argmax([figures[k]["val_auc"] for k in ks], axis=0)
    return float(np.mean([figures[ks[b]]["test_auc"][i] for i, b in enumerate(best)]))


def noise(args, first: dict, runs: list[dict]) -> dict:
    """How much one SAE's mean AUC moves with the benchmark's own seed."""
    import numpy as np

    from husai.stability.inference import minimum_detectable_difference

    answer = {"label": first["label"], "seeds": [args.random_seed, *args.noise_seeds], "auc": {}}
    for k in map(str, args.ks):
        means = [float(np.mean(f[k]["test_auc"])) for f in runs]
        mdd = minimum_detectable_difference(means)
        answer["auc"][k] = {"means": means, "sd": float(np.std(means, ddof=1)), "minimum_detectable_difference": mdd}
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def write_csv(args, data_sets: list[str], records: list[dict], figures) -> Path:
    """Every figure of every encoder, a row a data set and k."""
    from husai.report.text import write_csv

    labels = {r["checkpoint_sha256"]: r["label"] for r in records}
    rows = [
        {"encoder": labels.get(key, key), "seed": args.random_seed, "data_set": name, "k": k}
        | {metric: values[i] for metric, values in by_metric.items()}
        for key, of in figures.items()
        for k, by_metric in of.items()
        for i, name in enumerate(data_sets)
    ]
    return write_csv(args.output_dir / "per_data_set.csv", rows)


ARMS = ("llm", "pca", "untrained", "random_model", "reference")


def draw(results: dict, folder: Path) -> list[Path]:
    from husai.report import figures

    conditions = results["conditions"]
    names = [c["condition"] for c in conditions]
    arms = {arm: [c["delta"][arm] for c in conditions] for arm in ARMS}
    panel = figures.Panel("sae-probes: the SAE less a baseline", f"test AUC, k = {K}", "", names, arms)
    return [figures.panels(folder / "saebench_deltas.png", [panel])]


def summary(results: dict) -> str:
    from husai.report.text import interval

    families, noise = len(set(results["families"])), results["noise"]["auc"][str(K)]
    lines = [
        "# SAEBench on SAEs at hand",
        "",
        f"{results['subject']}, {results['hook_name']}: sae-probes on {len(results['data_sets'])} data sets of "
        f"{families} families, mean test AUC with {K} features (fixed in advance). The residual stream's own logistic "
        f"probe has {results['baselines']['llm']['means']['llm']['test_auc']:.4f}.",
        "",
        "| condition | SAEs | L0 | AUC, 95 % interval | − residual stream | − PCA | − untrained | − random model "
        "| − matched reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in results["conditions"]:
        cells = [interval(c["auc"][str(K)]), *(interval(c["delta"][arm], "+") for arm in ARMS)]
        lines.append(f"| {c['condition']} | {len(c['seeds'])} | {c['l0']:.1f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Intervals: over training seeds and, clustered by family, data sets (t; docs/methods.md). With fewer than five "
        "seeds nothing is concluded from them.",
        f"The benchmark's own noise: {len(results['noise']['seeds'])} runs of one SAE with other splits have a "
        f"standard deviation of {noise['sd']:.4f}; the minimum detectable difference of two single runs is "
        f"{noise['minimum_detectable_difference']:.4f}.",
        "",
        "| SAE | L0 | explained variance | CE loss score | KL score | " + aucs(results) + " | by validation |",
        "|---|---|---|---|---|" + "---|" * (len(ks(results)) + 1),
    ]
    for r in results["saes"]:
        core, h = r["core"], r["heldout"]
        values = " | ".join(f"{r['means'][k]['test_auc']:.4f}" for k in ks(results))
        lines.append(
            f"| {r['label']} | {h['l0']:.2f} | {h['explained_variance']:.4f} | {core['ce_loss_score']:.4f} | "
            f"{core['kl_div_score']:.4f} | {values} | {r['auc_by_validation']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def ks(results: dict) -> list[str]:
    return list(results["saes"][0]["means"])


def aucs(results: dict) -> str:
    return " | ".join(f"AUC, k = {k}" for k in ks(results))


if __name__ == "__main__":
    run_main(main)
