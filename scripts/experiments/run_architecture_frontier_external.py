"""Which SAE family is worth its L0: stability, reconstruction and external benchmarks of all families on one bank.

    python scripts/experiments/run_architecture_frontier_external.py --architectures topk,relu,batchtopk,jumprelu \\
      --seeds 42,123,456 --run-saebench --run-cebench --cebench-repo PATH
    python scripts/experiments/run_architecture_frontier_external.py --ks 8,16,32 --run-saebench --run-cebench

All families and seeds are trained in stacked passes on one activation bank, steered to the same L0 (what was reached is
reported). Each condition stands beside its nulls and against its matched reference: ReLU with an L1 penalty, for ReLU
TopK; a reference that --architectures leaves out is trained as well. Without `--cebench-repo` the built-in scoring is
used, and without `--stories` its pairs are not CE-Bench's.
"""

from pathlib import Path

from husai.runs.cli import DEFAULT_SEEDS, PAIR_SETS, Parser, int_list, name_list, positive_int, run_main, seed_list

FAMILIES = ("topk", "relu", "batchtopk", "jumprelu", "gated", "matryoshka")


def parse():
    p = Parser(__doc__)
    p.add_common("results/experiments/architecture_frontier")
    p.add_study()
    p.add_executor()
    p.add_argument("--hook-name", default="blocks.1.hook_resid_pre", help="default: %(default)s")
    p.add_argument(
        "--architectures", type=name_list, default="topk,relu,batchtopk,jumprelu", help=f"of {', '.join(FAMILIES)}"
    )
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_argument("--d-sae", type=positive_int, default=512, help="features (default: %(default)s)")
    p.add_argument("--ks", type=int_list, default="16", help="L0 that each family is steered to (default: %(default)s)")
    p.add_argument("--tokens", type=positive_int, default=600_000, help="each SAE sees (default: %(default)s)")
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
    from husai.runs.phase import PACKAGES, run_phase

    if args.cebench_repo:
        from husai.benchmarks import cebench_checkout

        args.cebench_code = cebench_checkout.code_digest(args.cebench_repo)
    brought = ("subject", "cebench_matched_baseline_map")
    apart = ("cebench_repo", "executor", "ray_address")
    packages = (*PACKAGES, "benchmarks")
    run_phase(args, "architecture_frontier", __file__, compute, summary, brought, apart, check, packages)


def check(results: dict) -> None:
    """Raise CheckFailed where the bank failed: its reason is in the log."""


def compute(args, cells) -> tuple[dict, list[Path]]:
    """One bank, one task."""
    from husai.benchmarks import bank
    from husai.runs import executor

    settings = study(args)
    bank.check(bank.Bank(**settings))
    task = executor.Task(f"bank {args.hook_name}", "husai.benchmarks.bank:run", settings, gpus=gpus(args.device))
    (outcome,) = executor.run([task], args.executor, args.ray_address, args.threads, what="banks")
    found = bank.value(outcome, args.require_matched)
    results = {"phase": "architecture_frontier", "inputs": found["inputs"], "subject": args.subject, **found}
    results["pareto"] = bank.pareto(results["conditions"])
    return results, draw(results, args.output_dir / "figures")


def study(args) -> dict:
    """The task's arguments: JSON."""
    return {
        "subject": str(args.subject),
        "hook_name": args.hook_name,
        "families": args.architectures,
        "seeds": args.seeds,
        "d_saes": [args.d_sae],
        "ks": args.ks,
        "budgets": [args.tokens],
        **shared(args),
    }
