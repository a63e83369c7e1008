"""What the gate reads of a candidate: stability against every null, and both benchmarks.

    python scripts/experiments/run_candidate_confirmation.py
    python scripts/experiments/run_candidate_confirmation.py --candidate SELECTED.json \\
      --stories GulkoA/contrastive-stories-v3
    python scripts/experiments/run_candidate_confirmation.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5 \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre --untrained BEFORE_TRAINING --reference RELU_SAES

Choosing the best of several and then testing it on the same seeds and data sets would count luck as merit. Therefore a
selected recipe is trained again on seeds that no study used, and the benchmarks read the data-set families that
selection did not. `confirmations.json` below --artifact-root counts how often a configuration was tried; the gate is
stricter at each attempt. SAEs of your own (`--checkpoint`) are evaluated as they are: at least three that differ in
their seed alone, five for a verdict. HUSAI cannot see how those were selected, and the gate gives them no more than a
provisional decision. `run_release_check.py` runs this and all that follows. Exit 2: nothing was selected, a seed is not
fresh, or the SAEs do not belong together.
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
"""Flags that go with --checkpoint: a selection names its own recipe."""


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
        help="that no study used, as many as the selection fixed (default: fixed ones; the gate takes no others)",
    )
    p.add_supplied(required=False)
    p.set_defaults(dataset_names=None)  # a selection says which data sets it left
    p.add_baseline_map()
    args = p.parse_args()
    if args.seeds is not None and len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    if not args.checkpoint:
        p.refuse_unheard(args, OF_SUPPLIED, "goes with --checkpoint; the selection names its own")
        return args
    p.refuse_unheard(args, OF_SELECTION, "goes with a selection, not with --checkpoint")
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
    # The gate looks for the checkpoints where the results say that they lie: a move is another result.
    args.lie_at = [write_place(p, args.output_dir) for p in args.checkpoint]
    run_phase(args, "candidate_confirmation", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train the recipe again, or take the SAEs as they are; compare, probe and draw."""
    device = prepare(args.device, args.threads)
    from husai.evals import retrained, supplied

    found = supplied.evaluate(args, cells, device) if args.checkpoint else retrained.evaluate(args)
    return found.to_json(), draw(found, args.output_dir / "figures")


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(found, folder: Path) -> list[Path]:
    """The candidate against each null and each baseline of the benchmarks: what is above zero is above them."""
    from husai.report import figures

    excess, name = found.section.stability.scores["mcc_alive"].excess, found.candidate.condition
    over = {name: list(excess.values())}
    panels = [figures.Panel("mcc of alive features", "above the null", "", list(excess), over)]
    for title, label, _, delta in benchmarks(found):
        if known := {arm: d for arm, d in delta.items() if d["estimate"] is not None}:
            series = {name: list(known.values())}
            panels.append(figures.Panel(f"{title}: less a baseline", label, "", list(known), series))
    return [figures.panels(folder / "confirmation.png", panels)]


def benchmarks(found) -> list[tuple[str, str, dict, dict]]:
    """(name, figure, the candidate's estimate, baseline -> difference) of each benchmark."""
    rows = []
    for part in (found.bank.saebench, found.bank.cebench):
        (row,) = [c for c in part.conditions if c["condition"] == found.candidate.condition]
        if part is found.bank.saebench:
            rows.append((part.probing, "test AUC, k = 5", row["auc"]["5"], row["delta"]))
        else:
            rows.append((part.benchmark, "normalised score", row["normalised"], row["delta"]))
    return rows


def summary(results: dict) -> str:
    from husai.evidence.estimates import mean_over_seeds
    from husai.evidence.schemas import read_evaluation
    from husai.report.text import interval, stand_in, strata, table
    from husai.subjects.harvesting import line

    found = read_evaluation(results)
    section, own = found.section, [r for r in found.bank.saes if r.candidate]
    verdict, scores = section.stability.verdict, section.stability.scores
    reached = {
        "L0": [r.heldout.l0 for r in own],
        "held-out explained variance": [r.heldout.explained_variance for r in own],
        "dead features": [r.heldout.dead_share for r in own],
        "CE loss score": [r.core.ce_loss_score for r in own],
    }
    rows = [[name, interval(mean_over_seeds(values).to_json())] for name, values in reached.items()]
    rows += [[f"`{n}`", interval(scores[n].observed)] for n in ("mcc_alive", "mcc") if n in scores]
    rows += [[f"excess over {null}", interval(e, "+")] for null, e in scores["mcc_alive"].excess.items()]
    for name, what in (("share70_alive", "single features"), ("mcc_others", "without prototypes")):
        excess = scores[name].excess
        rows += [[f"{what}: excess over {null}", interval(e, "+")] for null, e in excess.items()]
    for kind, gain in found.bank.code.gain.items() if found.bank.code else ():
        named = {"explained variance": gain.explained_variance, "CE recovered": gain.ce_recovered}
        rows += [[f"{name} − that of {kind}", interval(g, "+")] for name, g in named.items() if g is not None]
    for name, figure, estimate, delta in benchmarks(found):
        rows.append([f"`{name}`, {figure}", interval(estimate)])
        rows += [[f"− {arm.replace('_', ' ')}", interval(d, "+")] for arm, d in delta.items()]
    probing = found.bank.saebench
    assert probing is not None  # a confirmation probes
    lines = [
        "# Confirmation of the candidate" if found.origin == "retrained" else "# SAEs of your own",
        "",
        f"**{verdict.outcome}**: {verdict.reason}{still_moving(section)}. *{verdict.sentence}*",
        "",
        f"{found.candidate.condition} of {found.subject}, {found.bank.hook_name}: {where_from(found)}.",
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
    if found.origin == "supplied":
        called = ", ".join(
            f"{seed} is {label}" for seed, label in zip(found.paths, section.stability.labels, strict=True)
        )
        notes = [*found.notes, *([line(found.harvesting.to_json())] if found.harvesting else [])]
        lines += [f"SAEs: {called}.", "", *(text for note in notes for text in (note, ""))]
        lines += ["HUSAI cannot see how you selected these SAEs, so the result cannot support an external claim.", ""]
        lines += stand_in(results)
    return "\n".join(lines)


def still_moving(section) -> str:
    convergence = getattr(section, "convergence", None)
    return ", still moving at the end of training" if convergence and convergence.converged is False else ""


def where_from(found) -> str:
    n, seeds = len(found.candidate.checkpoints), ", ".join(found.candidate.checkpoints)
    if found.origin == "retrained":
        return f"trained again with seeds {seeds}, which no study used; attempt {found.attempt} of this configuration"
    source = found.candidate.facts.source
    return f"{n} SAEs " + ("as HUSAI trained them" if source == "husai" else f"of {source}, their training not known")


if __name__ == "__main__":
    run_main(main)
