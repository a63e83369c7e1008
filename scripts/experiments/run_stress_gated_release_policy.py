"""Decide whether a claim may be made: the strict release gate on the results of all earlier phases.

    python scripts/experiments/run_stress_gated_release_policy.py \\
      --phase4a-results results/experiments/phase4a_trained_vs_random/results.json \\
      --random-model-results RANDOM.json --transcoder-results TRANSCODER.json --ood-results OOD.json \\
      --external-candidate-json SELECTED.json --confirmation-results CONFIRMATION.json --external-mode joint \\
      --min-saebench-delta 0.0 --min-cebench-delta 0.0 \\
      --require-transcoder --require-ood --require-external --fail-on-gate-fail
    python scripts/experiments/run_stress_gated_release_policy.py --waive transcoder --reason "no MLP at this hook" …
    python scripts/experiments/run_stress_gated_release_policy.py --policy published --phase4a-results … …

Each gate is PASS, FAIL or MISSING. `pass_all` is true only if every gate is PASS on its bound (docs/methods.md, Rules).
All gates are required, with or without the --require flags. A waiver, a mode other than joint, or a threshold looser
than the registered one is recorded and makes the decision provisional, which is no pass. Evidence about other SAEs than
the candidate's, or evidence that does not follow from its own figures, counts as missing. User-supplied SAEs
(`run_candidate_confirmation.py --checkpoint`) are judged by the same rules, and their decision is at best provisional.
`--policy published` gives the earlier study's verdicts on its files, and shows where the strict rules differ. Writes
`release_policy.json` and `.md`. Exit 0 passed (or no --fail-on-gate-fail), 1 not passed, 2 bad usage.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence import levels
from husai.runs.cli import finite_float, fraction, nonnegative_float, run_main
from husai.runs.inputs import not_at_all

EXPERIMENTS = Path("results/experiments")


def parse():
    p = EvalParser(__doc__)
    default = EXPERIMENTS / "release_gate"
    p.add_argument("--output-dir", type=Path, default=default, counts=not_at_all, help="default: %(default)s")
    for name, folder in (
        ("phase4a", "phase4a_trained_vs_random"),
        ("random-model", "random_model_stress"),
        ("transcoder", "transcoder_stress"),
        ("ood", "ood_stress"),
        ("confirmation", "candidate_confirmation"),
    ):
        default = EXPERIMENTS / folder / "results.json"
        p.add_argument(f"--{name}-results", type=Path, default=default, help="default: %(default)s")
    p.add_argument(
        "--external-candidate-json",
        type=Path,
        default=EXPERIMENTS / "candidate_selection" / "results.json",
        help="results of select_release_candidate.py (default: %(default)s); SAEs of your own need none",
    )
    studies = [EXPERIMENTS / n / "results.json" for n in ("architecture_frontier", "external_metric_scaling")]
    p.add_argument(
        "--study-results",
        type=Path,
        action="append",
        help=f"studies of the selection, repeatable, to select again (default: {studies[0]}, {studies[1]})",
    )
    p.add_argument("--external-mode", choices=("joint", "saebench", "cebench"), default="joint", help="default: joint")
    p.add_argument(
        "--min-saebench-delta", type=finite_float, default=levels.MIN_SAEBENCH_DELTA, help="AUC (default: %(default)s)"
    )
    p.add_argument(
        "--min-cebench-delta",
        type=finite_float,
        default=levels.MIN_CEBENCH_DELTA,
        help="minimum, as a share of the bound (default: %(default)s)",
    )
    p.add_argument(
        "--min-stability-excess",
        type=finite_float,
        default=levels.MIN_STABILITY_EXCESS,
        help="least excess over each control (default: %(default)s)",
    )
    p.add_argument(
        "--min-transcoder-delta",
        type=finite_float,
        default=levels.MIN_STABILITY_EXCESS,
        help="least excess of mcc_alive over each control (default: %(default)s)",
    )
    p.add_argument(
        "--max-ood-drop", type=nonnegative_float, default=levels.MAX_OOD_DROP, help="AUC (default: %(default)s)"
    )
    p.add_argument(
        "--alpha", type=fraction, default=levels.ALPHA, help="intervals are of level 1 - alpha (default: %(default)s)"
    )
    for name in ("random-model", "transcoder", "ood", "external"):
        p.add_argument(
            f"--require-{name}",
            action="store_true",
            help="no effect: every gate is required, and the record states the flag",
        )
    p.add_argument(
        "--waive", action="append", default=[], metavar="GATE", help="gate to waive; the decision is then no pass"
    )
    p.add_argument(
        "--reason", action="append", default=[], metavar="TEXT", help="reason of a waiver, one for each --waive"
    )
    p.add_argument("--fail-on-gate-fail", action="store_true", help="exit 1 where the decision is not a pass")
    p.add_argument("--policy", choices=("strict", "published"), default="strict", help="default: %(default)s")
    args = p.parse_args()
    args.study_results = args.study_results or studies
    if len(args.waive) != len(args.reason) or not all(text.strip() for text in args.reason):
        p.error(f"--waive {' '.join(args.waive)}: a --reason for each expected")
    if repeated := sorted({g for g in args.waive if args.waive.count(g) > 1}):
        p.error(f"--waive {repeated[0]} is given twice")
    return args


def main() -> None:
    args = parse()
    from husai.release import bundle
    from husai.release.gate import GATES, Thresholds
    from husai.runs.errors import BadInput, CheckFailed
    from husai.runs.files import write_json, write_text
    from husai.runs.folder import Run

    if unknown := [g for g in args.waive if g not in GATES]:
        raise BadInput(f"--waive {unknown[0]}: one of {', '.join(GATES)} expected")
    paths = {
        "phase4a": args.phase4a_results,
        "selection": args.external_candidate_json,
        "confirmation": args.confirmation_results,
        "random_model": args.random_model_results,
        "transcoder": args.transcoder_results,
        "ood": args.ood_results,
    }
    thresholds = Thresholds(**{name: getattr(args, name) for name in vars(Thresholds())})
    waived = dict(zip(args.waive, args.reason, strict=True))
    if args.external_mode != "joint":
        other = "cebench" if args.external_mode == "saebench" else "saebench"
        waived.setdefault(other, f"--external-mode {args.external_mode}")
    config = {k: v if isinstance(v, str | bool | float) else str(v) for k, v in vars(args).items() if k != "output_dir"}

    def on_disk(path: Path, results: object) -> dict[str, str | None]:
        from husai.evals import loaded  # imports torch, which is needed only for SAEs on disk

        return loaded.on_disk(path, results)

    with Run(args.output_dir, config, "cpu", 1) as run:
        results = (
            bundle.published(paths, thresholds)
            if args.policy == "published"
            else bundle.strict(paths, thresholds, waived, args.study_results, on_disk)
        )
        run.inputs |= results["inputs"]
        text = published_summary(results) if args.policy == "published" else summary(results)
        run.write(results, text)
        write_json(run.folder / "release_policy.json", results)
        write_text(run.folder / "release_policy.md", text)
        for name in ("release_policy.json", "release_policy.md"):
            write_text(args.output_dir / name, (run.folder / name).read_text())
        print(text)
        print(f"decision  {args.output_dir / 'release_policy.json'}")
        if args.fail_on_gate_fail and not results["pass_all"]:
            open_gates = [g["gate"] for g in results["gates"] if g["status"] != "PASS"]
            raise CheckFailed(f"the gate is not passed: {', '.join(open_gates) or results['outcome']}")


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def summary(results: dict) -> str:
    """Summary on one page: the verdict, each gate, and the requirements of open gates."""
    from husai.report.text import table
    from husai.report.verdict import Gate

    gates, candidate = results["gates"], results["candidate"]
    counts = {status: sum(g["status"] == status for g in gates) for status in ("PASS", "FAIL", "MISSING")}
    candidate_line = "No candidate is confirmed."
    if candidate is not None:
        seeds = ", ".join(candidate["checkpoints"])
        hook = candidate["facts"]["hook_name"] or "whose hook they do not say"
        candidate_line = f"Candidate: {candidate['condition']}, {hook}, seeds {seeds}."
        if results["attempt"] is not None:
            candidate_line += f" Attempt {results['attempt']} of this configuration."
    verdict = {
        "passed": "**PASSED.** Every gate holds on its bound: the claim may be made, of this subject, hook and recipe.",
        "not passed": "**NOT PASSED.** No external claim may be made.",
        "provisional": "**NOT PASSED, provisional.** What was not waived holds; no external claim may be made.",
    }[results["outcome"]]
    if results["unconfirmed"] and results["outcome"] == "provisional" and counts["PASS"] == len(gates):
        verdict = (
            "**NOT PASSED, provisional.** Every gate holds. HUSAI cannot see how you selected these SAEs, so the "
            "result cannot support an external claim."
        )
    lines = [
        "# Release gate",
        "",
        f"{verdict} Of {len(gates)} gates {counts['PASS']} pass, {counts['FAIL']} fail, and {counts['MISSING']} "
        f"{'lacks' if counts['MISSING'] == 1 else 'lack'} evidence.",
        "",
        candidate_line,
        "",
    ]
    if results["licensed"] is not None:
        heading = (
            "What may be claimed" if results["pass_all"] else "What its stability supports, inside this project alone"
        )
        lines += [f"{heading}: *{results['licensed']}*", ""]
    for g in gates:
        if g["waived"]:
            lines += [f"**Waived: {g['gate']}** ({g['waived']}). A decision with a waiver is never a pass.", ""]
    if results["unconfirmed"]:
        lines += [f"**Not confirmed**: {results['unconfirmed']}. Such a decision is never a pass.", ""]
    if results["looser_than_registered"]:
        lines += [f"**Looser than registered: {', '.join(results['looser_than_registered'])}.** Never a pass.", ""]
    rows = [
        [
            g["gate"],
            f"**{g['status']}**",
            "" if g["estimate"] is None else f"{g['estimate']:+.4f} [{g['low']:+.4f}, {g['high']:+.4f}]",
            "" if g["estimate"] is None else f"{100 * g['level']:g} %",
            ""
            if g["estimate"] is None
            else f"{'lower' if g['bound'] == 'low' else 'upper'} end {g['relation']} {g['threshold']:g}",
            g["n"] or "",
        ]
        for g in gates
    ]
    lines += [*table(["gate", "status", "figure [interval]", "level", "required", "seeds"], rows), ""]
    lines += power(gates)
    wrong = [g for g in gates if g["status"] != "PASS"]
    if wrong:
        lines += ["What is open, and what it would take:", ""]
        lines += [f"- **{g['gate']}**: {g['question']} {g['reason']}. To pass: {g['to_pass']}." for g in wrong]
        lines.append("")
    lines += ["What was measured:", ""]
    for g in gates:
        if g["figure"]:
            lines.append(" ".join([f"- {g['gate']}: {g['figure']}.", *Gate.model_validate(g).more]))
    lines += ["", *evidence_read(results)]
    return "\n".join(lines) + "\n"


def power(gates: list[dict]) -> list[str]:
    """Lines of Markdown: power of each gate."""
    from husai.report.text import table

    rows = [
        [
            g["gate"],
            f"{100 * g['passes_at_no_effect']:.2f} %",
            f"{g['effect_for_80']:+.4f}",
            "" if g["without_one_seed"] is None else " to ".join(f"{end:+.4f}" for end in g["without_one_seed"]),
        ]
        for g in gates
        if g["estimate"] is not None
    ]
    if not rows:
        return []
    header = ["gate", "passes at no effect", "true figure that passes in 80 %", "figure without one seed"]
    sentence = (
        "Power of each gate, its standard error taken for the true one. Of several estimates, the one that is the "
    )
    return [f"{sentence}hardest to pass counts (docs/methods.md).", "", *table(header, rows), ""]


def published_summary(results: dict) -> str:
    from husai.report.text import table

    verdicts = results["published"]["gates"]
    words = {True: "pass", False: "fail"}
    rows = [
        [g["gate"], words[g["published"]], f"{g['figure']:+.4f}", g["status"], g["reason"]] for g in results["gates"]
    ]
    lines = [
        "# The earlier study's policy on its own files",
        "",
        f"Its verdict: **pass_all = {str(verdicts['pass_all']).lower()}**, by points against thresholds. The strict "
        "gate takes none of it for evidence:",
        "",
        *table(["gate", "its verdict", "its point", "strict", "why"], rows),
        "",
        *evidence_read(results),
    ]
    return "\n".join(lines) + "\n"


def evidence_read(results: dict) -> list[str]:
    files = [
        f"- {label}: `{f['path']}` ({f['sha256'][:12] if f['sha256'] else 'not there'})"
        for label, f in results["read"].items()
    ]
    return ["Evidence read:", "", *files]


if __name__ == "__main__":
    run_main(main)
