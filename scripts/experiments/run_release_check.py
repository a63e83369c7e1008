"""Judge your SAEs: stability, benchmarks, stress tests, the gate, the feature table, and one report page.

    python scripts/experiments/run_release_check.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5 \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre
    python scripts/experiments/run_release_check.py --checkpoint MY_SAES --untrained MY_SAES_BEFORE_TRAINING \\
      --reference RELU_SAES --random-model-checkpoint RANDOM_SAES --stories GulkoA/contrastive-stories-v3

The input is the last checkpoint of each training, from HUSAI, SAELens, dictionary_learning or sparsify. The trainings
must differ in their seed alone: at least three, five for a verdict. `sae-lens:RELEASE/SAE_ID` and
`hf:REPO[@REVISION]/PATH` name checkpoints too (docs/sources.md). Unfit input is refused before anything is computed.
Each part runs in a separate process. A failed part is named with its log, and the other parts continue. The same
command again reads finished parts. Each group of SAEs has its own output folder. The check of the method itself (the
positive control) runs once, and all groups share it. HUSAI cannot see how you selected these SAEs, therefore the
decision is at best provisional. --dry-run says what would be trained, at what cost, and what would have no answer. It
trains nothing, but harvests the held-out rows (--rows), which the check then reuses. Exit 0 done, for every verdict
(--fail-on-gate-fail: 1 without a pass), 1 a part failed, 2 bad input.
"""

import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import positive_int, prepare, run_main
from husai.runs.inputs import not_at_all

SCRIPTS = Path(__file__).resolve().parents[1]
CHECKS = Path("results/experiments/release_check")
"""Folder with one folder for each group of SAEs (`folder_of`)."""
STRESS = ("random_model_stress", "transcoder_stress", "ood_stress")
GATE_FLAGS = {"candidate_confirmation": "confirmation", "positive_control": "phase4a"} | {
    name: name.removesuffix("_stress").replace("_", "-") for name in STRESS
}
"""Part -> name of its results in the gate's flags."""


@dataclass(frozen=True)
class Part:
    """A script that the check runs."""

    name: str
    script: str
    """Path below scripts/."""
    arguments: list[str]
    folder: Path | None = None
    """Folder of its results. None: it writes a page alone."""
    not_run: str | None = None
    """Reason why it cannot be run on these SAEs."""

    @property
    def words(self) -> list[str]:
        """Command line of the part."""
        output = [] if self.folder is None else ["--output-dir", str(self.folder)]
        return [sys.executable, str(SCRIPTS / self.script), *self.arguments, *output]


def parse():
    p = EvalParser(__doc__)
    p.add_argument(
        "--output-dir", type=Path, counts=not_at_all, help=f"default: a folder below {CHECKS}, named by the SAEs"
    )
    p.add_shared()
    p.add_supplied()
    p.add_train_rows()
    p.add_argument(
        "--phase4a-results",
        type=Path,
        help="results of phase 4a, with the positive control (default: those below --artifact-root, else it is run)",
    )
    p.add_argument(
        "--contexts", type=positive_int, default=200, help="features to read in their contexts (default: %(default)s)"
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be trained, and at what cost; train nothing")
    p.add_argument("--fail-on-gate-fail", action="store_true", help="exit 1 where the decision is not a pass")
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    typed = shlex.join(["python", "scripts/experiments/run_release_check.py", *sys.argv[1:]])
    from husai.runs.errors import BadInput, CheckFailed
    from husai.runs.files import content_or_name, read_json, write_json

    if args.phase4a_results:
        phase = read_json(args.phase4a_results, "--phase4a-results")
        if not isinstance(phase, dict) or phase.get("phase") != "4a":
            raise BadInput(f"--phase4a-results: {args.phase4a_results} is no result of run_phase4a_reproduction.py")
    device = prepare(args.device, args.threads)
    from husai.evals import cebench_checkout, loaded, sae_probes, supplied
    from husai.evals.loaded import Opener
    from husai.report.evidence import PARTS
    from husai.runs.folder import Run
    from husai.subjects import pretrained
    from husai.subjects.harvesting import recorded

    # All input is checked before anything runs.
    sae_probes.versions(args.probing)
    data_sets = sae_probes.check_data_sets(args.dataset_names)
    content_or_name(args.stories)
    if args.cebench_repo:
        cebench_checkout.code_digest(args.cebench_repo)
    opener = Opener()
    group = supplied.look_over(args, opener)
    names, not_run = supplied.named(args, group, opener), supplied.find_parts_not_run(args, group, opener)
    args.subject, harvesting = loaded.subject_and_harvesting(args, opener)
    make_folder(args.artifact_root)
    if args.dry_run:
        parts = evidence(args, Path("parts"), group, not_run)
        print(forecast(args, parts, loaded.load(args, device, opener), data_sets, device))
        return
    del opener  # frees its memory for the parts
    subject = pretrained.digest_of(args.subject)
    if args.output_dir is None:
        args.output_dir = CHECKS / folder_of(args.checkpoint, group.checkpoints.values())

    root = args.output_dir / "parts"
    config = {"subject": subject, "hook_name": args.hook_name, "candidate": group.to_json(), "data_sets": data_sets}
    with Run(args.output_dir, config, args.device, args.threads) as run:
        run.add_input("subject", subject)
        for seed, sha256 in group.checkpoints.items():
            run.add_input(f"checkpoint {seed}", sha256)
        done: list[dict] = []
        parts = [*evidence(args, root, group, not_run), gate(args, root)]
        count = len(parts) + 1  # and the page
        for part in parts:
            done.append(record(run, part, done, count))
        write_json(root / PARTS, {p["name"]: p["reason"] for p in done})
        report = args.output_dir / "report.html"
        arguments = ["--results-root", str(root), "--output", str(report), "--command", typed]
        page = Part("report", "analysis/build_report.py", arguments)
        done.append(record(run, page, done, count))

        decided = root / "release_gate" / "results.json"
        decision = read_json(decided, "decision") if decided.is_file() else None
        kept = ("pass_all", "outcome", "unconfirmed", "gates")
        results = {"phase": "release_check", "inputs": run.inputs, "hook_name": args.hook_name}
        results |= {"candidate": group.to_json(), "names": names, "parts": done}
        results |= args.text.record()
        if group.facts.source != "husai" or harvesting.to_json():
            results["harvesting"] = recorded(harvesting)
        results["decision"] = decision and {name: decision[name] for name in kept}
        text = summary(results)
        run.write(results, text)
        print(text)
        print(f"report   {report}")
        if failed := [p for p in done if p["return_code"] not in (None, 0)]:
            why = ", ".join(f"{p['name']} (return code {p['return_code']}, {run.folder / p['log']})" for p in failed)
            raise CheckFailed(f"{len(failed)} of {len(done)} parts failed: {why}")
        if args.fail_on_gate_fail and not (decision and decision["pass_all"]):
            raise CheckFailed(f"the gate is not passed: {decision['outcome'] if decision else 'there is no decision'}")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the check


def evidence(args, root: Path, group, not_run: dict[str, str]) -> list[Part]:
    """Parts whose results the gate and the page read, in order.

    Args:
        not_run: part that cannot run on these SAEs -> the reason.
    """
    machine = ["--artifact-root", str(args.artifact_root), "--device", args.device, "--threads", str(args.threads)]
    machine += ["--force"] if args.force else []
    draws = ["--null-draws", str(args.null_draws)]
    place = ["--model-name", str(args.subject), "--hook-name", args.hook_name, "--rows", str(args.rows)]
    place += ["--text", str(args.text)]
    probing = ["--probing", args.probing]
    arguments = ["--dataset-names", ",".join(args.dataset_names), *probing, "--max-rows", str(args.max_rows), *place]
    for flag in ("checkpoint", "untrained", "reference", "random_model_checkpoint"):
        arguments += given(flag, getattr(args, flag))
    for flag in ("stories", "cebench_repo"):
        arguments += given(flag, getattr(args, flag))
    arguments += ["--same-model"] if args.same_model else []
    arguments += given("max_norm_multiple", args.max_norm_multiple)
    candidate = [
        "--candidate",
        str(root / "candidate_confirmation" / "results.json"),
        "--rows",
        str(args.rows),
        *machine,
    ]
    # A stream leaves no store: its SAEs are tested on the activations that give the prototypes, of --rows rows.
    train_rows = None if group.facts.streamed else args.train_rows
    trained = [*candidate, *draws, *given("train_rows", train_rows), *given("untrained", args.untrained)]
    # The feature table finds the training activations that the stress tests left. Those of other libraries' SAEs are
    # not available.
    rows = None if group.facts.source == "husai" else args.train_rows or args.rows
    controls = given("random_model_checkpoint", args.random_model_checkpoint)

    parts = [
        Part("candidate_confirmation", "experiments/run_candidate_confirmation.py", [*arguments, *draws, *machine]),
        Part(
            "random_model_stress",
            "experiments/run_random_model_stress_eval.py",
            [*trained, *controls],
        ),
        Part("transcoder_stress", "experiments/run_transcoder_stress_eval.py", trained),
        Part("ood_stress", "experiments/run_ood_stress_eval.py", [*candidate, *probing, "--skip-families"]),
        Part(
            "feature_reliability",
            "experiments/run_feature_reliability.py",
            [*candidate, *given("train_rows", rows), "--contexts", str(args.contexts)],
        ),
    ]
    parts = [replace(p, folder=root / p.name, not_run=not_run.get(p.name)) for p in parts]
    if positive_control(args) is None:  # it comes last, because problems of the SAEs are then seen sooner
        shared = shared_control(args).parent
        parts.append(Part("positive_control", "experiments/run_phase4a_reproduction.py", [*machine, *draws], shared))
    return parts


def forecast(args, parts: list[Part], tested, data_sets: list[str], device) -> str:
    """What a check would train, at what cost, and which gates are certain to be MISSING."""
    from husai.evals.forecast import estimate_check
    from husai.report.text import table
    from husai.runs.progress import duration

    running = {p.name for p in parts if p.not_run is None}
    trainings = estimate_check(tested, running, device)
    rows = [[t.part, t.what, str(t.saes), f"{t.tokens:,}", duration(t.seconds)] for t in trainings]
    lines = table(["part", "what it trains", "SAEs", "tokens each", "about"], rows)
    total = f"{sum(t.saes for t in trainings)} SAEs, about {duration(sum(t.seconds for t in trainings))} of training"
    lines += ["", f"{total}; fewer if some exist already. Activations, probes and benchmarks take time too."]
    if "positive_control" in running:
        lines.append("positive_control trains SAEs of planted features and of modular addition, once for all checks.")
    if tested.training_metadata is None:
        lines.append("The files do not state the training: controls have HUSAI's recipe, ten passes over --rows.")
    elif args.train_rows:
        lines.append(
            f"--train-rows {args.train_rows}: whether these are the SAEs' activations is seen once they are there."
        )
    missing = gates_missing(args, parts, tested, data_sets)
    lines += ["", *(f"MISSING: {gate}: {why}." for gate, why in missing.items())]
    best = "not passed" if missing else "provisional, because HUSAI cannot see how you selected the SAEs"
    return "\n".join([*lines, f"The best possible decision is *{best}*."])


def gates_missing(args, parts: list[Part], tested, data_sets: list[str]) -> dict[str, str]:
    """Gate that is certain to be MISSING -> the reason."""
    from husai.evidence.data_sets import DATA_SETS
    from husai.evidence.references import matched
    from husai.evidence.rules import MINIMUM_SEEDS

    if len(tested.saes) < MINIMUM_SEEDS:
        return {"all gates about the SAEs": f"{len(tested.saes)} SAEs; {MINIMUM_SEEDS} expected"}
    missing = {p.name.removesuffix("_stress"): p.not_run for p in parts if p.not_run}
    if tested.training_metadata is None:
        missing["saebench, cebench"] = "no reference is matched while the training is unknown"
        return missing
    reference = matched([c.record for c in tested.saes], [c.record for c in tested.references])
    if reference.reason:
        missing["saebench, cebench"] = f"{reference.reason} (--reference)"
    elif left_out := sorted({*DATA_SETS.split(",")} - {*data_sets}):
        missing["saebench"] = f"--dataset-names lacks {', '.join(left_out[:3])}"
    if not reference.reason and not args.stories:
        missing["cebench"] = "no stories (--stories)"
    return missing


def given(flag: str, value) -> list[str]:
    """Words of a flag with its values; empty without values."""
    values = value if isinstance(value, list) else [value] if value is not None else []
    return [f"--{flag.replace('_', '-')}", *map(str, values)] if values else []


def make_folder(folder: Path) -> None:
    from husai.runs.errors import BadInput

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--artifact-root: {folder} cannot be made ({error.strerror})") from None


def folder_of(given: list[Path], sha256: Iterable[str]) -> str:
    """Name of the folder of a check: the user's name of the SAEs, and a digest of their weights."""
    from husai.runs.files import digest

    called = re.sub(r"[^A-Za-z0-9.]+", "-", given[0].name).strip("-.")[:40] or "saes"
    return f"{called}-{digest(sorted(sha256))[:8]}"


def shared_control(args) -> Path:
    """Results of the positive control that all checks below --artifact-root share."""
    return args.artifact_root / "experiments" / "positive_control" / "results.json"


def positive_control(args) -> Path | None:
    """Path of the positive control's results; None if it must be run."""
    from husai.release.recompute import run_problems
    from husai.runs.errors import BadInput

    if args.phase4a_results:
        return args.phase4a_results
    of_the_program = args.artifact_root / "experiments" / "phase4a_trained_vs_random" / "results.json"
    for path in (shared_control(args), of_the_program) if not args.force else ():
        try:
            results, problems = run_problems(path)
        except BadInput:  # there are none, or they are cut off
            continue
        if not problems and results.get("planted"):
            return path
    return None


def gate(args, root: Path) -> Part:
    """The gate on the results of the parts. Every file is named, therefore no other file is read."""
    read = {flag: root / name / "results.json" for name, flag in GATE_FLAGS.items()}
    read["phase4a"] = positive_control(args) or shared_control(args)
    arguments = [a for flag, path in read.items() for a in (f"--{flag}-results", str(path))]
    arguments += ["--external-candidate-json", str(root / "candidate_selection" / "results.json")]
    return Part(
        "release_gate",
        "experiments/run_stress_gated_release_policy.py",
        arguments,
        root / "release_gate",
    )


def record(run, part: Part, done: list[dict], count: int) -> dict:
    """Run one part of so many; its return code, log, and results."""
    from husai.runs.files import relative, sha256_file

    facts = {"name": part.name, "return_code": None, "seconds": None, "log": None, "result": None, "sha256": None}
    reason = part.not_run
    if "--candidate" in part.arguments and next(p for p in done if p["name"] == "candidate_confirmation")["reason"]:
        reason = reason or "it takes what candidate_confirmation leaves"
    if reason is None:
        code = run.command(part.name, part.words, f"part {len(done) + 1} of {count}, {part.name}")
        facts |= {"return_code": code, "seconds": run.commands[-1]["seconds"], "log": run.commands[-1]["log"]}
        reason = None if code == 0 else f"return code {code}: {last_line(run.folder / facts['log'])}"
    if reason is not None and part.folder is not None and part.folder.is_relative_to(run.output_dir):
        # Remove results of an earlier check, because they are not about this one. Its run folder keeps them.
        for name in ("results.json", "summary.md", "manifest.json", "release_policy.json", "release_policy.md"):
            (part.folder / name).unlink(missing_ok=True)
    elif part.folder is not None and (file := part.folder / "results.json").is_file():
        facts |= {"result": relative(file, run.output_dir), "sha256": sha256_file(file)}
    print(f"{part.name}: {reason or 'done'}", file=sys.stderr)
    return facts | {"reason": reason}


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def summary(results: dict) -> str:
    from husai.report.text import stand_in, table
    from husai.report.verdict import CONTROL
    from husai.subjects.harvesting import line

    candidate, decision = results["candidate"], results["decision"]
    lines = ["# Release check", ""]
    if decision is None:
        lines += ["**There is no decision**: the gate did not run.", ""]
    else:
        about_saes = [g["status"] for g in decision["gates"] if g["gate"] != CONTROL]
        counts = [about_saes.count(status) for status in ("PASS", "FAIL", "MISSING")]
        tally = "{} of {} gates about the SAEs are PASS, {} FAIL and {} MISSING".format(
            counts[0], len(about_saes), *counts[1:]
        )
        lines += [
            f"**{decision['outcome'].capitalize()}**: {tally}. {decision['unconfirmed']}, therefore the result "
            "supports no external claim.",
            "",
        ]
    called = ", ".join(f"{seed} ({name})" for seed, name in results["names"].items())
    lines += [f"{candidate['condition']}, {results['hook_name']}, SAEs {called}.", ""]
    lines += [line(results["harvesting"]), ""] if "harvesting" in results else []
    rows = [
        [p["name"], "" if p["seconds"] is None else f"{p['seconds']:.0f}", p["result"] or "", p["reason"] or "done"]
        for p in results["parts"]
    ]
    lines += table(["part", "seconds", "results", "what became of it"], rows)
    if decision is not None:
        gates = [[g["gate"], f"**{g['status']}**", g["reason"] or ""] for g in decision["gates"]]
        lines += ["", *table(["gate", "status", "why"], gates)]
    return "\n".join([*lines, *stand_in(results)]) + "\n"


if __name__ == "__main__":
    run_main(main)
