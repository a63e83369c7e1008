"""Compute CE-Bench's contrastive score of SAEs, as published and corrected, against matched references.

    python scripts/experiments/run_husai_cebench_custom_eval.py --cebench-repo PATH --checkpoint CKPT \\
      --model-name pythia-70m-deduped --hook-layer 0 --hook-name blocks.0.hook_resid_pre --device cuda
    python scripts/experiments/run_husai_cebench_custom_eval.py --model-name husai-tiny --hook-layer 1 \\
      --checkpoint results/experiments/sae_training/checkpoints --random-model-checkpoint RANDOM_MODEL_SAES

With `--stories GulkoA/contrastive-stories-v3` the pairs are CE-Bench's own. A local copy is marked as unverified.
Without `--stories`, pairs are texts from the two classes of labelled sae-probes sets, and the metric is called
`contrastive_local`, because it is not CE-Bench. Scores grow with the width of an SAE (docs/methods.md). Therefore a
delta is taken only to a reference of the same width and L0, on bound-normalised corrected scores. `--cebench-repo` also
runs your checkout of CE-Bench, unmodified, on the same pairs.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence.data_sets import PAIR_SETS
from husai.runs.cli import name_list, nonnegative_float, positive_int, prepare, run_main, seed_list


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/cebench_custom")
    p.add_benchmark()
    p.add_cebench()
    p.add_argument(
        "--dataset-names", type=name_list, default=PAIR_SETS, help="data sets of local pairs (default: %(default)s)"
    )
    p.add_argument("--max-rows", type=positive_int, default=200, help="story pairs (default: %(default)s)")
    p.add_argument("--random-seed", type=int, default=42, help="seed of the drawn pairs (default: %(default)s)")
    p.add_argument(
        "--noise-seeds",
        type=seed_list,
        default="43,44,45,46",
        help="other draws of pairs, for the first SAE alone: the benchmark's own noise (default: %(default)s)",
    )
    p.add_argument("--matched-baseline-summary", type=Path, help="results.json of an earlier run, as references")
    p.add_baseline_map()
    p.add_argument("--as-baseline", action="store_true", help="also write the map that names this run's SAEs")
    p.add_argument(
        "--min-delta", type=nonnegative_float, help="exit 1 unless each condition's lower bound reaches this (0 to 1)"
    )
    args = p.parse_benchmark()
    if args.matched_baseline_summary and args.cebench_matched_baseline_map:
        p.error("--matched-baseline-summary and --cebench-matched-baseline-map: one of them expected")
    if args.random_seed in args.noise_seeds:
        p.error(f"--noise-seeds: {args.random_seed} is --random-seed; others expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    if args.min_delta is not None:
        from husai.evals import contrastive

        contrastive.refuse_unreachable(args.min_delta)
    if args.cebench_matched_baseline_map:
        from husai.evals import baselines

        args.matched_baseline_summary, args.no_reference = baselines.lookup(
            args.cebench_matched_baseline_map, args.hook_name
        )
    run_phase(args, "cebench_custom", compute, summary, check=check)


def check(results: dict) -> None:
    """Raise CheckFailed if a condition does not reach --min-delta, or has no delta."""
    from husai.evidence import rules
    from husai.runs.errors import CheckFailed

    if results["min_delta"] is None:
        return
    for c in results["conditions"]:
        why = rules.cebench_delta(results["benchmark"], c["delta"]["reference"], results["min_delta"])
        if why is not None:
            raise CheckFailed(f"--min-delta: {c['condition']}: {why}")


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Check all input, read the stories once for all SAEs, and compare."""
    device = prepare(args.device, args.threads)
    from husai.evals import baselines, cebench, contrastive, loaded, sae_probes

    references = args.matched_baseline_summary and baselines.read_summary(args.matched_baseline_summary)
    data_sets = [] if args.stories else sae_probes.check_data_sets(args.dataset_names)
    seeds = (args.random_seed, *args.noise_seeds)
    pairs, *others = (contrastive.drawn(args.stories, data_sets, args.max_rows, seed) for seed in seeds)
    repeats = dict(zip(args.noise_seeds, others, strict=True))
    saes = loaded.load(args, device)
    if args.min_delta is not None and references:
        cebench.refuse_unreachable(saes, args.min_delta, references)
    places = loaded.Places(args.output_dir, args.artifact_root, args.device, args.threads, args.force)
    no_reference = getattr(args, "no_reference", None)
    contrastive_results = cebench.evaluate(saes, pairs, repeats, places, references, no_reference, args.cebench_repo)
    settings = {"random_seed": args.random_seed, "min_delta": args.min_delta}
    results = contrastive_results.model_copy(update=settings).to_json()
    files = draw(results, args.output_dir / "figures")
    if args.as_baseline:
        files.append(baselines.write_map(args.output_dir / baselines.MAP, args.hook_name, "results.json"))
    return results, files


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary

ARMS = ("untrained", "random_model", "reference")


def draw(results: dict, folder: Path) -> list[Path]:
    from husai.report import figures

    conditions = results["conditions"]
    names = [c["condition"] for c in conditions]
    arms = {arm: [c["delta"][arm] for c in conditions] for arm in ARMS}
    title = f"{results['benchmark']}: the SAE less a baseline"
    return [figures.panels(folder / "cebench_deltas.png", [figures.Panel(title, "normalised score", "", names, arms)])]


def summary(results: dict) -> str:
    from husai.report.text import interval, stand_in

    local = results["benchmark"] == "contrastive_local"
    lines = [
        "# " + ("Contrastive score on local pairs (not CE-Bench)" if local else "CE-Bench on SAEs at hand"),
        "",
        f"{results['subject']}, {results['hook_name']}; {results['n_pairs']} story pairs ({results['source']}), "
        f"{results['stories_cut']} stories cut to the model's context. "
        + ("Pairs are built here from labelled texts: these figures are not CE-Bench's. " if local else "")
        + "Scores are of the corrected variant, divided by the largest that the width allows.",
        "",
        "| condition | SAEs | normalised, 95 % interval | − untrained | − random model | − matched reference |",
        "|---|---|---|---|---|---|",
    ]
    for c in results["conditions"]:
        cells = [interval(c["normalised"]), *(interval(c["delta"][arm], "+") for arm in ARMS)]
        lines.append(f"| {c['condition']} | {len(c['seeds'])} | {' | '.join(cells)} |")
    n = results["noise"]
    lines += [
        "",
        "Intervals: over training seeds and, clustered by subject, pairs (t; docs/methods.md).",
        f"The benchmark's own noise is not known: {n['reason']}."
        if n["reason"]
        else f"The benchmark's own noise: {len(n['seeds'])} draws of pairs for one SAE have a standard deviation of "
        f"{n['sd']:.4f}; the minimum detectable difference of two single runs is "
        f"{n['minimum_detectable_difference']:.4f}.",
        "",
        "| SAE | d_sae | L0 | published: contrastive | independence | interpretability | corrected: independence "
        "| interpretability | bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results["saes"]:
        p, c = r["published"], r["corrected"]
        values = (p["contrastive"], p["independence"], p["interpretability"], c["independence"], c["interpretability"])
        printed = " | ".join(f"{v:.4f}" for v in (*values, r["bound"]))
        lines.append(f"| {r['label']} | {r['facts']['d_sae']} | {r['facts']['l0']:.2f} | {printed} |")
    for r in results["saes"]:
        if r["checkout"]:
            o = r["checkout"]
            lines.append(
                f"\nYour checkout of CE-Bench ({o['commit'] or 'no commit'}) on {r['label']}: contrastive "
                f"{o['contrastive_score_mean']:.4f}, independent {o['independent_score_mean']:.4f}, interpretability "
                f"{o['interpretability_score_mean']:.4f}."
            )
    return "\n".join([*lines, *stand_in(results)]) + "\n"


if __name__ == "__main__":
    run_main(main)
