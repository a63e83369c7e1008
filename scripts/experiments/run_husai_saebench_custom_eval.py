"""Run SAEBench's sparse probing (sae-probes) and core metrics on SAEs, with baselines and intervals.

    python scripts/experiments/run_husai_saebench_custom_eval.py --checkpoint CKPT --model-name pythia-70m-deduped \\
      --hook-layer 0 --hook-name blocks.0.hook_resid_pre --device cuda
    python scripts/experiments/run_husai_saebench_custom_eval.py --model-name husai-tiny --hook-layer 1 \\
      --checkpoint results/experiments/sae_training/checkpoints --random-model-checkpoint RANDOM_MODEL_SAES

A checkpoint is one of HUSAI, SAELens, dictionary_learning or sparsify, or a folder of checkpoints. SAEBench's own code
(`sparse_probing_sae_probes`) probes activations that are harvested once for all SAEs. The baselines of an SAE are a
probe on the activations themselves, PCA of the same size, an untrained SAE of the same width and L0, SAEs of the
random-weights model and, if one matches (docs/methods.md), a reference SAE. The AUC at k = 5, fixed in advance, counts.
"""

from pathlib import Path

from husai.evals.flags import EvalParser, probe_ks
from husai.evidence.levels import K
from husai.runs.cli import name_list, prepare, run_main, seed_list
from husai.runs.inputs import not_at_all


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/saebench_custom")
    p.add_benchmark()
    p.add_argument(
        "--dataset-names", type=name_list, default="probe", help="names or sides of data sets (default: %(default)s)"
    )
    p.add_argument("--ks", type=probe_ks, default="1,2,5,16", help="features a probe may use (default: %(default)s)")
    p.add_argument("--reg-type", choices=["l1", "l2"], default="l1", help="penalty of probes (default: %(default)s)")
    p.add_argument("--binarize", action="store_true", help="probes see only whether a feature is active")
    p.add_argument("--random-seed", type=int, default=42, help="seed of splits and probes (default: %(default)s)")
    p.add_argument(
        "--noise-seeds",
        type=seed_list,
        default="43,44,45,46",
        help="further such seeds, for the first SAE alone: the benchmark's own noise (default: %(default)s)",
    )
    p.add_probing()
    p.add_argument(
        "--results-path", type=Path, counts=not_at_all, help="figures of each data set (default: ARTIFACT_ROOT/probes)"
    )
    p.add_argument(
        "--model-cache-path", type=Path, counts=not_at_all, help="prompts' activations (default: below ARTIFACT_ROOT)"
    )
    args = p.parse_benchmark()
    if args.probing == "sae_probes_exact" and args.reg_type != "l1":
        p.error(f"--reg-type {args.reg_type}: exact probes are L1; --probing sae_probes expected")
    if args.random_seed in args.noise_seeds:
        p.error(f"--noise-seeds: {args.random_seed} is --random-seed; others expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    run_phase(args, "saebench_custom", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Check all input, then harvest, probe, measure and compare."""
    device = prepare(args.device, args.threads)
    from husai.evals import loaded, sae_probes, saebench
    from husai.report.text import write_csv

    sae_probes.versions(args.probing)
    setup = saebench.Setup(
        sae_probes.check_data_sets(args.dataset_names),
        args.ks,
        args.random_seed,
        tuple(args.noise_seeds),
        args.reg_type,
        args.binarize,
        args.results_path,
        args.probing,
    )
    places = loaded.Places(
        args.output_dir, args.artifact_root, args.device, args.threads, args.force, args.model_cache_path
    )
    probing, rows = saebench.evaluate(loaded.load(args, device), setup, places, cells)
    results = probing.to_json()
    files = [write_csv(args.output_dir / "per_data_set.csv", rows), *draw(results, args.output_dir / "figures")]
    return results, files


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


ARMS = ("llm", "pca", "untrained", "random_model", "reference")


def draw(results: dict, folder: Path) -> list[Path]:
    from husai.report import figures

    conditions = results["conditions"]
    names = [c["condition"] for c in conditions]
    arms = {arm: [c["delta"][arm] for c in conditions] for arm in ARMS}
    panel = figures.Panel(f"{results['probing']}: the SAE less a baseline", f"test AUC, k = {K}", "", names, arms)
    return [figures.panels(folder / "saebench_deltas.png", [panel])]


def summary(results: dict) -> str:
    from husai.report.text import interval, stand_in

    families, noise = len(set(results["families"])), results["noise"]["auc"][str(K)]
    lines = [
        "# SAEBench on SAEs at hand",
        "",
        f"{results['subject']}, {results['hook_name']}: `{results['probing']}` on {len(results['data_sets'])} sets of "
        f"{families} families, mean test AUC with {K} features (fixed in advance). A logistic probe on the activations "
        f"themselves has {results['baselines']['llm']['means']['llm']['test_auc']:.4f}.",
        "",
        "| condition | SAEs | L0 | AUC, 95 % interval | − hook's own probe | − PCA | − untrained | − random model "
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
    return "\n".join([*lines, *stand_in(results)]) + "\n"


def ks(results: dict) -> list[str]:
    return list(results["saes"][0]["means"])


def aucs(results: dict) -> str:
    return " | ".join(f"AUC, k = {k}" for k in ks(results))


if __name__ == "__main__":
    run_main(main)
