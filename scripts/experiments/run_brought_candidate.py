"""SAEs that were trained elsewhere, or here outside of a study: stability against every null, and both benchmarks.

    python scripts/experiments/run_brought_candidate.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5 \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre
    python scripts/experiments/run_brought_candidate.py --checkpoint MY_SAES --untrained MY_SAES_BEFORE_TRAINING \\
      --reference RELU_SAES --random-model-checkpoint RANDOM_SAES --stories GulkoA/contrastive-stories-v3

What the stress tests and the gate read (`--candidate`, `--confirmation-results`) of SAEs that no study selected: at
least three that differ in their seed alone, five for a verdict. The untrained null is taken from what HUSAI keeps
beside its checkpoints, else from --untrained. `run_release_check.py` runs this and all that follows.
"""

from pathlib import Path

from husai.evals.flags import Parser
from husai.runs.cli import prepare, run_main


def parse():
    p = Parser(__doc__)
    p.add_common("results/experiments/brought_candidate")
    p.add_brought()
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.runs.files import relative
    from husai.runs.phase import run_phase

    # The gate looks for the checkpoints where the results say that they lie: a move is another result.
    args.lie_at = [relative(p, args.output_dir) for p in args.checkpoint]
    run_phase(args, "brought_candidate", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Check all that is brought, then compare, probe and draw."""
    device = prepare(args.device, args.threads)
    from husai.evals import brought

    results = brought.evaluate(args, cells, device)
    return results, draw(results, args.output_dir / "figures")


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(results: dict, folder: Path) -> list[Path]:
    """The SAEs against each null and against the baselines of both benchmarks: what is above zero is above them."""
    from husai.report import figures

    excess, name = results["section"]["stability"]["scores"]["mcc_alive"]["excess"], results["candidate"]["condition"]
    panels = [figures.Panel("mcc of alive features", "above the null", "", list(excess), {name: list(excess.values())})]
    for part, label in (("saebench", "test AUC, k = 5"), ("cebench", "normalised score")):
        (row,) = [c for c in results["bank"][part]["conditions"] if c["condition"] == name]
        delta = {arm: d for arm, d in row["delta"].items() if d["estimate"] is not None}
        title = results["bank"][part]["benchmark" if part == "cebench" else "probing"]
        panels.append(figures.Panel(f"{title}: less a baseline", label, "", list(delta), {name: list(delta.values())}))
    return [figures.panels(folder / "brought.png", panels)]


def summary(results: dict) -> str:
    from husai.report.text import interval, table

    own, section, bank = results["candidate"], results["section"], results["bank"]
    stability, facts, name = section["stability"], own["facts"], own["condition"]
    verdict, score = stability["verdict"], stability["scores"]["mcc_alive"]
    probing, pairs = (
        next(c for c in bank[part]["conditions"] if c["condition"] == name) for part in ("saebench", "cebench")
    )
    rows = [["`mcc_alive`", interval(score["observed"])]]
    rows += [[f"excess over {null}", interval(e, "+")] for null, e in score["excess"].items()]
    rows.append([f"`{bank['saebench']['probing']}` AUC, k = 5", interval(probing["auc"]["5"])])
    rows += [[f"− {arm.replace('_', ' ')}", interval(d, "+")] for arm, d in probing["delta"].items()]
    rows.append([f"contrastive, normalised ({bank['cebench']['benchmark']})", interval(pairs["normalised"])])
    rows += [[f"− {arm.replace('_', ' ')}", interval(d, "+")] for arm, d in pairs["delta"].items()]
    heldout = [m["heldout"] for m in section["members"]]
    ends = {n: f"{min(h[n] for h in heldout):.4f} to {max(h[n] for h in heldout):.4f}" for n in heldout[0]}
    known = "as HUSAI trained them" if facts["source"] == "husai" else f"of {facts['source']}, their training not known"
    lines = [
        "# SAEs as they were brought",
        "",
        f"**{verdict['outcome']}**: {verdict['reason']}.",
        "",
        f"{name}, {known}: {len(heldout)} SAEs of {facts['d_sae']} features, of {results['subject']} at "
        f"{results['hook_name']}. On held-out activations: explained variance {ends['explained_variance']}, L0 "
        f"{ends['l0']}, dead features {ends['dead_share']}.",
        "",
        *table(["figure", "95 % interval"], rows),
        "",
        *[f"Not computed: {null} ({why})." for null, why in stability["missing_nulls"].items()],
        "",
        "What these SAEs were chosen from is not known, nor whether their seeds are fresh: no external claim rests on "
        "them, whatever the figures.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
