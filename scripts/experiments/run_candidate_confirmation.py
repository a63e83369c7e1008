"""Evaluate a candidate for the gate: stability against every null, and both benchmarks.

    python scripts/experiments/run_candidate_confirmation.py
    python scripts/experiments/run_candidate_confirmation.py --candidate SELECTED.json \\
      --stories GulkoA/contrastive-stories-v3
    python scripts/experiments/run_candidate_confirmation.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5 \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre --untrained BEFORE_TRAINING --reference RELU_SAES

A test of the best of several candidates on the same seeds and data sets would reward luck. Therefore the selected
recipe is trained again on seeds that no study used, and the benchmarks use the data-set families that selection did not
read. `confirmations.json` below --artifact-root counts the attempts of a configuration; the gate is stricter at each
attempt. User-supplied SAEs (`--checkpoint`) are evaluated without training: at least three that differ in their seed
alone, five for a verdict. HUSAI cannot see how you selected them, therefore the gate's decision is at best provisional.
`run_release_check.py` runs this script and all later parts. Exit 2: nothing was selected, a seed is not fresh, or the
SAEs are not seeds of one condition.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence.data_sets import DATA_SETS
from husai.runs.cli import prepare, run_main, seed_list

OF_SELECTION = ("candidate", "seeds", "cebench_matched_baseline_map")
OF_SUPPLIED = (
    *("subject", "revision", "dtype", "text", "hook_name", "hook_layer", "rows", "untrained", "reference"),
    "random_model_checkpoint",
    *("probing", "max_rows", "null_draws", "same_model", "max_norm_multiple"),
)
"""Flags that need --checkpoint, because a selection names its own recipe."""


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/candidate_confirmation")
    p.add_argument(
        "--candidate",
        type=Path,
        default=Path("results/experiments/candidate_selection/results.json"),
        help="results of select_release_candidate.py (default: %(default)s)",
    )
    p.add_argument(
        "--seeds",
        type=seed_list,
        help="seeds that no study used, as many as the selection fixed (default: fixed ones; the gate takes no others)",
    )
    p.add_supplied(required=False)
    p.set_defaults(dataset_names=None)  # a selection names the data sets that it left
    p.add_baseline_map()
    args = p.parse_args()
    if args.seeds is not None and len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    if not args.checkpoint:
        p.refuse_unused(args, OF_SUPPLIED, "goes with --checkpoint; the selection names its own")
        return args
    p.refuse_unused(args, OF_SELECTION, "goes with a selection, not with --checkpoint")
    args.candidate = None
    args.dataset_names = args.dataset_names or DATA_SETS.split(",")
    if args.output_dir == p.get_default("output_dir"):  # a confirmed candidate is not replaced
        args.output_dir = Path("results/experiments/supplied_candidate")
    return p.with_hook(args)


def main() -> None:
    args = parse()
    from husai.runs.checkpoints import write_place
    from husai.runs.errors import BadInput
    from husai.runs.phase import run_phase

    if args.candidate and not args.candidate.is_file():
        raise BadInput(f"--candidate: {args.candidate} does not exist; select_release_candidate.py makes it")
    # Results hold the places of checkpoints, where the gate looks for them. A move changes the results.
    args.lie_at = [write_place(p, args.output_dir) for p in args.checkpoint]
    run_phase(args, "candidate_confirmation", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train the recipe again, or open the user's SAEs; then compare, probe and draw."""
    device = prepare(args.device, args.threads)
    from husai.evals import retrained, supplied

    evaluation = supplied.evaluate(args, cells, device) if args.checkpoint else retrained.evaluate(args)
    return evaluation.to_json(), draw(evaluation, args.output_dir / "figures")


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(evaluation, folder: Path) -> list[Path]:
    """Draw the candidate's excess over each null, and its delta to each baseline of the benchmarks."""
    from husai.report import figures

    excess, name = evaluation.section.stability.scores["mcc_alive"].excess, evaluation.candidate.condition
    over = {name: list(excess.values())}
    panels = [figures.Panel("mcc of alive features", "above the null", "", list(excess), over)]
    for title, label, _, delta in benchmarks(evaluation):
        if known := {arm: d for arm, d in delta.items() if d["estimate"] is not None}:
            series = {name: list(known.values())}
            panels.append(figures.Panel(f"{title}: less a baseline", label, "", list(known), series))
    return [figures.panels(folder / "confirmation.png", panels)]


def benchmarks(evaluation) -> list[tuple[str, str, dict, dict]]:
    """(name, figure, estimate of the candidate, baseline -> delta) of each benchmark."""
    rows = []
    for part in (evaluation.bank.saebench, evaluation.bank.cebench):
        (row,) = [c for c in part.conditions if c["condition"] == evaluation.candidate.condition]
        if part is evaluation.bank.saebench:
            rows.append((part.probing, "test AUC, k = 5", row["auc"]["5"], row["delta"]))
        else:
            rows.append((part.benchmark, "normalised score", row["normalised"], row["delta"]))
    return rows


def summary(results: dict) -> str:
    from husai.evidence.estimates import mean_over_seeds
    from husai.evidence.schemas import read_evaluation
    from husai.report.text import interval, stand_in, strata, table
    from husai.subjects.harvesting import line

    evaluation = read_evaluation(results)
    section, member_records = evaluation.section, [r for r in evaluation.bank.saes if r.candidate]
    verdict, scores = section.stability.verdict, section.stability.scores
    reached = {
        "L0": [r.heldout.l0 for r in member_records],
        "held-out explained variance": [r.heldout.explained_variance for r in member_records],
        "dead features": [r.heldout.dead_share for r in member_records],
        "CE loss score": [r.core.ce_loss_score for r in member_records],
    }
    rows = [[name, interval(mean_over_seeds(values).to_json())] for name, values in reached.items()]
    rows += [[f"`{n}`", interval(scores[n].observed)] for n in ("mcc_alive", "mcc") if n in scores]
    rows += [[f"excess over {null}", interval(e, "+")] for null, e in scores["mcc_alive"].excess.items()]
    for name, title in (("share70_alive", "single features"), ("mcc_others", "without prototypes")):
        excess = scores[name].excess
        rows += [[f"{title}: excess over {null}", interval(e, "+")] for null, e in excess.items()]
    for kind, gain in evaluation.bank.code.gain.items() if evaluation.bank.code else ():
        named = {"explained variance": gain.explained_variance, "CE recovered": gain.ce_recovered}
        rows += [[f"{name} − that of {kind}", interval(g, "+")] for name, g in named.items() if g is not None]
    for name, figure, estimate, delta in benchmarks(evaluation):
        rows.append([f"`{name}`, {figure}", interval(estimate)])
        rows += [[f"− {arm.replace('_', ' ')}", interval(d, "+")] for arm, d in delta.items()]
    probing = evaluation.bank.saebench
    assert probing is not None  # a confirmation probes
    lines = [
        "# Confirmation of the candidate" if evaluation.origin == "retrained" else "# SAEs of your own",
        "",
        f"**{verdict.outcome}**: {verdict.reason}{still_moving(section)}. *{verdict.sentence}*",
        "",
        f"{evaluation.candidate.condition} of {evaluation.subject}, {evaluation.bank.hook_name}: "
        f"{where_from(evaluation)}.",
        "",
        *table(["figure", "95 % interval"], rows),
        "",
        *[f"Not computed: {null} ({why})." for null, why in section.stability.missing_nulls.items()],
        "",
        *strata({"the candidate": section}),
        "",
        f"Probing data sets: {', '.join(probing.data_sets)}.",
        "",
    ]
    if evaluation.origin == "supplied":
        called = ", ".join(
            f"{seed} is {label}" for seed, label in zip(evaluation.paths, section.stability.labels, strict=True)
        )
        notes = [*evaluation.notes, *([line(evaluation.harvesting.to_json())] if evaluation.harvesting else [])]
        lines += [f"SAEs: {called}.", "", *(text for note in notes for text in (note, ""))]
        lines += ["HUSAI cannot see how you selected these SAEs, so the result cannot support an external claim.", ""]
        lines += stand_in(results)
    return "\n".join(lines)


def still_moving(section) -> str:
    convergence = getattr(section, "convergence", None)
    return ", still moving at the end of training" if convergence and convergence.converged is False else ""


def where_from(evaluation) -> str:
    n, seeds = len(evaluation.candidate.checkpoints), ", ".join(evaluation.candidate.checkpoints)
    if evaluation.origin == "retrained":
        return (
            f"trained again with seeds {seeds}, which no study used; attempt {evaluation.attempt} of this configuration"
        )
    source = evaluation.candidate.facts.source
    return f"{n} SAEs " + ("as HUSAI trained them" if source == "husai" else f"of {source}, their training not known")


if __name__ == "__main__":
    run_main(main)
