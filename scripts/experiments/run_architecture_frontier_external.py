"""Compare SAE architectures at one L0: stability, reconstruction and external benchmarks on one activation store.

    python scripts/experiments/run_architecture_frontier_external.py --architectures topk,relu,batchtopk,jumprelu \\
      --seeds 42,123,456 --run-saebench --run-cebench --cebench-repo PATH
    python scripts/experiments/run_architecture_frontier_external.py --ks 8,16,32 --run-saebench --run-cebench

All architectures and seeds are trained in stacked passes on one activation store, and steered to the same L0; the
reached L0 is reported. Each condition is compared with its nulls and with its matched reference: ReLU with an L1
penalty, or TopK for ReLU. A reference that --architectures leaves out is trained too. Without `--cebench-repo` the
built-in scoring is used, and without `--stories` its pairs are not CE-Bench's.
"""

from pathlib import Path
from typing import Any

from husai.evals.flags import EvalParser
from husai.runs.cli import DEFAULT_SEEDS, int_list, name_list, positive_int, run_main, seed_list

FAMILIES = ("topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka")


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/architecture_frontier")
    p.add_study()
    p.add_executor()
    p.add_argument("--hook-name", default="blocks.1.hook_resid_pre", help="default: %(default)s")
    p.add_argument(
        "--architectures",
        type=name_list,
        default="topk,relu,batchtopk,jumprelu",
        help=f"one or several of {', '.join(FAMILIES)}",
    )
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_argument("--d-sae", type=positive_int, default=512, help="features (default: %(default)s)")
    p.add_argument("--ks", type=int_list, default="16", help="L0 that each SAE is steered to (default: %(default)s)")
    p.add_argument("--tokens", type=positive_int, default=600_000, help="rows each SAE sees (default: %(default)s)")
    args = p.parse_args()
    if unknown := [f for f in args.architectures if f not in FAMILIES]:
        p.error(f"--architectures {unknown[0]}: one of {', '.join(FAMILIES)} expected")
    if len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    if max(args.ks) > args.d_sae:
        p.error(f"--ks {max(args.ks)}: an L0 that --d-sae {args.d_sae} cannot reach")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    run_phase(args, "architecture_frontier", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train and evaluate all SAEs on one bank, which is one task."""
    from husai.evals import bank
    from husai.evidence import conditions

    settings = bank.shared(args) | {
        "hook_name": args.hook_name,
        "families": args.architectures,
        "seeds": args.seeds,
        "d_saes": [args.d_sae],
        "ks": args.ks,
        "budgets": [args.tokens],
    }
    banks = bank.run_all([settings], args)
    results: dict[str, Any] = {
        "phase": "architecture_frontier",
        "inputs": banks[0].inputs,
        "subject": str(args.subject),
    }
    results |= {"banks": [b.to_json() for b in banks], "pareto": conditions.pareto(banks[0].conditions)}
    return results, draw(results, args.output_dir / "figures")


def draw(results: dict, folder: Path) -> list[Path]:
    """Draw explained variance and stability against L0, and the deltas of both benchmarks against each other."""
    from husai.report import figures

    rows = results["banks"][0]["conditions"]
    points = [
        figures.Points.of("Reconstruction", "L0", "held-out explained variance", rows, "l0", "explained_variance"),
        figures.Points.of("Stability", "L0", "excess of mcc over the highest null", rows, "l0", "excess"),
    ]
    if any(r["saebench_delta"]["estimate"] is not None and r["cebench_delta"]["estimate"] is not None for r in rows):
        labels = (
            f"{results['banks'][0]['saebench']['probing']} AUC − matched reference",
            "normalised contrastive score − matched reference",
        )
        named = [r | ({"family": "relu, against topk"} if r["family"] == "relu" else {}) for r in rows]
        benchmark_points = figures.Points.of("Benchmarks", *labels, named, "saebench_delta", "cebench_delta")
        points.append(benchmark_points)
    return [figures.scatter(folder / "frontier.png", points, results["pareto"])]


def summary(results: dict) -> str:
    from husai.report.text import interval, strata_of_banks, table

    (bank,) = results["banks"]
    local = bank["cebench"] and bank["cebench"]["benchmark"] == "contrastive_local"
    header = [
        "condition",
        "SAEs",
        "L0",
        "explained variance",
        "CE loss score",
        "`mcc_alive`",
        "excess over the highest null",
    ]
    probing = bank["saebench"]["probing"] if bank["saebench"] else "SAEBench"
    header += ["outcome", f"`{probing}` AUC", "− matched reference", "contrastive, normalised", "− matched reference"]
    rows = [
        [
            r["condition"],
            len(r["seeds"]),
            *(interval(r[n]) for n in ("l0", "explained_variance", "ce_loss_score", "mcc_alive")),
            interval(r["excess"], "+"),
            r["outcome"] + (", still moving" if r["converged"] is False else ""),
            *(f(r, n) for n in ("saebench", "cebench") for f in (figure, difference)),
        ]
        for r in bank["conditions"]
    ]
    lines = [
        "# Architecture frontier",
        "",
        f"{results['subject']}, {bank['hook_name']}, {bank['rows']} rows; intervals: 95 %, over training seeds, "
        "of benchmarks over data sets too (docs/methods.md). With fewer than five seeds nothing is concluded.",
        "",
        *table(header, rows),
        "",
    ]
    if local:
        lines += ["The contrastive score is of pairs built from labelled texts: it is not CE-Bench's.", ""]
    if results["pareto"]:
        front = ", ".join(results["pareto"])
        lines += [f"Differences to ReLU, at one L0, that no other beats on both benchmarks (estimates): {front}.", ""]
    lines += [*strata_of_banks(results["banks"]), ""]
    return "\n".join(lines)


def figure(row: dict, name: str) -> str:
    from husai.report.text import interval

    return "not run" if row[name] is None else interval(row[name])


def difference(row: dict, name: str) -> str:
    from husai.report.text import interval

    return interval(row[f"{name}_delta"], "+")


if __name__ == "__main__":
    run_main(main)
