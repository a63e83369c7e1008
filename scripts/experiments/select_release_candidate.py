"""Select the condition of the studies that goes to the gate.

    python scripts/experiments/select_release_candidate.py --frontier-results FRONTIER.json \\
      --scaling-results SCALING.json --require-both-external
    python scripts/experiments/select_release_candidate.py --policy published --frontier-results … --scaling-results …

Candidates are conditions: SAEs that differ in their seed alone. Their score uses the lower ends of intervals, a third
of the data-set families, and fixed scales (docs/methods.md). Conditions that cannot be compared are excluded, with the
reason. The gate reads the other families, on SAEs that `run_candidate_confirmation.py` trains on fresh seeds. `--policy
published` is the earlier study's rule on its own files. Exit 1: there is no candidate.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence.levels import CONFIRMATION_SEEDS
from husai.runs.cli import nonnegative_float, positive_int, run_main

WEIGHTS = {"saebench": 0.5, "cebench": 0.5, "stability": 0.5, "train_ev": 0.1}


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/candidate_selection")
    for name in ("frontier", "scaling"):
        p.add_argument(f"--{name}-results", type=Path, action="append", default=[], help="results.json; repeatable")
    for name, weight in WEIGHTS.items():
        flag = f"--weight-{name.replace('_', '-')}"
        p.add_argument(flag, type=nonnegative_float, help=f"default: {weight}; published: stability has none")
    p.add_argument(
        "--min-seeds-per-group",
        type=positive_int,
        default=3,
        help="least number of seeds of a condition (default: %(default)s)",
    )
    p.add_argument("--uncertainty", choices=("lcb", "point"), default="lcb", help="default: %(default)s")
    p.add_argument(
        "--require-both-external", action="store_true", help="leave out what has not both benchmarks' figures"
    )
    p.add_argument(
        "--confirmation-seeds",
        type=positive_int,
        default=CONFIRMATION_SEEDS,
        help="number of fresh seeds that the confirmation must have, fixed here (default: %(default)s)",
    )
    p.add_argument("--policy", choices=("strict", "published"), default="strict", help="default: %(default)s")
    args = p.parse_args()
    if not args.frontier_results and not args.scaling_results:
        p.error("--frontier-results or --scaling-results: a study to select from expected")
    if args.policy == "published" and args.weight_stability:
        p.error("--weight-stability: the published rule knows no stability")
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import BadInput
    from husai.runs.phase import run_phase

    studies = [*args.frontier_results, *args.scaling_results]
    for path in studies:
        if not path.is_file():
            raise BadInput(f"--frontier-results, --scaling-results: {path} does not exist")
    run_phase(args, "candidate_selection", compute, summary, check=check)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Read the studies, and rank the comparable conditions."""
    from husai.runs.files import sha256_file

    named = {f"frontier {i}": path for i, path in enumerate(args.frontier_results, 1)}
    named |= {f"scaling {i}": path for i, path in enumerate(args.scaling_results, 1)}
    inputs = {name: sha256_file(path) for name, path in named.items()}
    weights = {n: w for n in WEIGHTS if (w := getattr(args, f"weight_{n}")) is not None}
    results = {"phase": "candidate_selection", "inputs": inputs, "policy": args.policy}
    if args.policy == "published":
        from husai.release import published
        from husai.runs.files import read_json

        parts_of_studies = [
            published.seeds(read_json(path, "study"), str(path), label) for label, path in named.items()
        ]
        rows, excluded = ([entry for part in parts for entry in part] for parts in zip(*parts_of_studies, strict=True))
        return results | published.select(rows, excluded, published.WEIGHTS | weights), []
    from husai.evidence.levels import FRESH_SEEDS, fresh_seeds
    from husai.evidence.rules import MINIMUM_SEEDS
    from husai.release import selection
    from husai.release.recompute import run_problems
    from husai.runs.errors import BadInput

    studies = []
    for label, path in named.items():
        results_of_study, problems = run_problems(path)
        if problems:
            raise BadInput(f"{label}: {path}: {problems[0]}")
        studies.append(selection.Study(label, inputs[label], results_of_study))
    rules = selection.Rules(
        WEIGHTS | weights,
        args.min_seeds_per_group,
        args.uncertainty,
        args.require_both_external,
        args.confirmation_seeds,
    )
    results |= selection.select(studies, rules)
    left = len(fresh_seeds(results["seeds_used"], len(FRESH_SEEDS)))
    if not MINIMUM_SEEDS <= args.confirmation_seeds <= left:
        raise BadInput(
            f"--confirmation-seeds: {MINIMUM_SEEDS} to {left} expected, because a verdict needs {MINIMUM_SEEDS} seeds "
            f"and {left} fresh ones are left; found {args.confirmation_seeds}"
        )
    return results, draw(results, args.output_dir / "figures")


def check(results: dict) -> None:
    from husai.runs.errors import CheckFailed

    if results["selected"] is None:
        raise CheckFailed(f"no candidate: all of {len(results['excluded'])} conditions are left out (see the summary)")


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results: dict, folder: Path) -> list[Path]:
    """Draw the candidates' deltas on both benchmarks, and stability against explained variance."""
    from husai.report import figures

    rows = [c | c["figures"] for c in results["candidates"]]
    if not rows:
        return []
    points = [
        figures.Points.of(
            "Internal", "held-out explained variance", "excess of mcc over the nulls", rows, "train_ev", "stability"
        )
    ]
    if all("saebench" in r and "cebench" in r for r in rows):
        labels = "sae-probes AUC − matched reference", "contrastive score − matched reference"
        points.append(figures.Points.of("Benchmarks, selection's third", *labels, rows, "saebench", "cebench"))
    return [figures.scatter(folder / "selection.png", points, results["front"])]


def summary(results: dict) -> str:
    from husai.report.text import interval, table

    if results["policy"] == "published":
        header = ["seed", "score", "on the front", *results["weights"]]
        front = [r["condition"] for r in results["front"]]
        ranked = sorted(results["candidates"], key=lambda r: -r["score"])
        rows = [
            [
                r["condition"],
                f"{r['score']:.4f}",
                "yes" if r["condition"] in front else "",
                *(f"{v:.4f}" for v in r["figures"].values()),
            ]
            for r in ranked
        ]
        lines = ["# Selection by the earlier study's rule", ""]
        if (chosen := results["selected"]) is None:
            lines.append("**None**: every record is left out, for the reasons below.")
        else:
            lines.append(
                f"**{chosen['condition']}**, one seed of {results['n']}: min–max over the cohort, points alone. "
                "Nothing is released by this rule."
            )
        return "\n".join([*lines, "", *table(header, rows), "", *left_out(results["excluded"])])
    chosen, rules, split = results["selected"], results["rules"], results["split"]
    lines = ["# Release candidate", ""]
    if chosen is None:
        lines += ["**None**: every condition is left out, for the reasons below.", ""]
    else:
        lines += [
            f"**{chosen['condition']}** of {chosen['subject']}, {chosen['facts']['hook_name']} "
            f"({len(chosen['seeds'])} seeds, {chosen['study']}). A choice, not a finding: what it claims is tried on "
            f"{results['confirmation_seeds']} fresh seeds and on the families that selection did not read.",
            "",
        ]
    bound = "the lower end of its interval" if rules["uncertainty"] == "lcb" else "its estimate"
    weighted = ", ".join(f"{rules['weights'].get(n, 0):g} × {n} / {rules['scales'][n]:g}" for n in rules["figures"])
    lines += [
        f"Score: {weighted}, of each {bound}. Families read: {', '.join(split['selection_families']) or 'none'}.",
        "",
    ]
    names = [n for n in results["rules"]["scales"] if any(n in c["figures"] for c in results["candidates"])]
    rows = [
        [
            c["condition"],
            c["study"],
            len(c["seeds"]),
            f"{c['l0']:.1f}",
            f"{c['score']:+.3f}",
            "yes" if c["pareto"] else "",
        ]
        + [interval(c["figures"][n], "+") for n in names]
        for c in results["candidates"]
    ]
    lines += [*table(["condition", "study", "seeds", "L0", "score", "on the front", *names], rows), ""]
    if results["cohort"] and results["cohort"]["benchmark"] not in (None, "cebench"):
        lines += [
            "The contrastive score is of pairs built from labelled texts: it is not CE-Bench's, and no gate counts it.",
            "",
        ]
    return "\n".join([*lines, *left_out(results["excluded"])])


def left_out(excluded: list[dict]) -> list[str]:
    """Lines of Markdown: excluded conditions with their reasons."""
    from husai.report.text import table

    if not excluded:
        return []
    return ["Left out:", "", *table(["study", "condition", "why"], [list(e.values()) for e in excluded]), ""]


if __name__ == "__main__":
    run_main(main)
