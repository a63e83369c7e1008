"""List the external benchmarks that can run on this machine, and run them in their own code.

    python scripts/experiments/run_official_external_benchmarks.py
    python scripts/experiments/run_official_external_benchmarks.py --execute
    python scripts/experiments/run_official_external_benchmarks.py --execute --checkpoint CKPT --cebench-repo PATH

Without `--execute` the script lists the installed versions, the data and weights that it found, and the evals that
would run, with a guess at their time. With `--execute` every command runs in a separate process. If one fails, the
others still run, and the script then exits with 1. Commands, return codes and logs are in the manifest. Without
`--checkpoint` the embedded default is trained: TopK and ReLU SAEs of husai-tiny, five seeds.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from husai.evals.flags import EvalParser
from husai.runs.cli import name_list, prepare, run_main

SCRIPTS = Path(__file__).resolve().parent
EVALS = ("saebench_custom", "cebench_custom", "sparse_probing_sae_probes", "core", "meta_structure")
SECONDS = {"sae-probes": 0.4, "llm": 0.5, "official": 15.0, "story": 0.02}
"""Seconds on two CPU cores, for a guess at the time of a run (docs/benchmarks/eval_speed.md): `sae-probes` for an SAE
and data set, `llm` for the model's probe and data set, `official` for the start of an official eval, and `story` for a
story pair and SAE."""


CORE_DOCUMENTS = 2000
"""Held-out documents of a text source that SAEBench's core eval may read."""


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/official_external_benchmarks")
    p.add_benchmark(needs_checkpoint=False)
    p.add_argument("--execute", action="store_true", help="run the evals; without it, they are only listed")
    p.add_cebench()
    p.add_argument(
        "--dataset-names", type=name_list, default="probe", help="data sets of sae-probes (default: %(default)s)"
    )
    p.add_argument("--evals", type=name_list, help=f"evals to run, out of {', '.join(EVALS)} (default: all)")
    args = p.parse_benchmark()
    if unknown := [name for name in args.evals or [] if name not in EVALS]:
        p.error(f"--evals {unknown[0]}: one of {', '.join(EVALS)} expected")
    return args


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.evals import cebench_checkout, loaded, official, sae_probes
    from husai.runs.errors import CheckFailed
    from husai.runs.files import content_or_name
    from husai.runs.folder import Run
    from husai.subjects import pretrained

    # All input is checked before anything runs.
    data_sets = sae_probes.check_data_sets(args.dataset_names)
    subject = pretrained.digest_of(args.subject)
    if args.cebench_repo:
        cebench_checkout.code_digest(args.cebench_repo)
    given = loaded.load(args, device) if args.checkpoint else None
    supplied = given.saes if given else []
    plan = [{"name": n, "seconds": guess(n, len(supplied) or 10, len(data_sets))} for n in args.evals or EVALS]

    config = {"subject": subject, "hook_name": args.hook_name, "data_sets": data_sets, "execute": args.execute}
    config |= {"checkpoints": [c.identity for c in supplied], "stories": content_or_name(args.stories)}
    with Run(args.output_dir, config, args.device, args.threads) as run:
        run.add_input("subject", subject)
        for c in supplied:
            run.add_input(f"checkpoint {c.label}", c.record.checkpoint_sha256)
        results: dict[str, Any] = {
            "phase": "official_external_benchmarks",
            "inputs": run.inputs,
            "versions": sae_probes.versions(),
            "preflight": [{**p, "runs": True, "reason": None} for p in plan]
            + [{"name": n, "seconds": None, "runs": False, "reason": why} for n, why in official.NOT_HERE.items()],
            "data": data_at_hand(args, data_sets),
            "checkpoints": [c.label for c in supplied] or "the embedded default, trained with --execute",
            "executed": [],
        }
        if args.execute:
            results["executed"] = execute(args, run, device, data_sets, given)
        run.write(results, summary(results))
        print(summary(results))
        failed = [e for e in results["executed"] if e["return_code"] != 0 or e["reason"]]
        if failed:
            why = ", ".join(f"{e['name']} (return code {e['return_code']}, {e['log']})" for e in failed)
            raise CheckFailed(f"{len(failed)} of {len(results['executed'])} commands failed: {why}")


def guess(name: str, n_saes: int, n_data_sets: int) -> float:
    """Seconds that an eval may take."""
    if name == "cebench_custom":
        return SECONDS["official"] + SECONDS["story"] * 200 * 2 * n_saes
    if name == "saebench_custom":  # with an untrained SAE for each, PCA, and the runs for the noise
        return SECONDS["official"] + SECONDS["sae-probes"] * n_data_sets * (2 * n_saes + 5)
    more = (SECONDS["sae-probes"] + SECONDS["llm"]) * n_data_sets if name.startswith("sparse_probing") else 0
    return SECONDS["official"] + more


def data_at_hand(args, data_sets: list[str]) -> dict[str, str]:
    """Description of each benchmark's data."""
    local = "no --stories: contrastive pairs of labelled texts, which are not CE-Bench's"
    stories = Path(args.stories).name if args.stories else local
    checkout = str(args.cebench_repo.name) if args.cebench_repo else "no --cebench-repo: its own code does not run"
    probing = f"{len(data_sets)} data sets, in the installed sae-probes package"
    return {"sae-probes": probing, "CE-Bench stories": stories, "CE-Bench checkout": checkout}


def execute(args, run, device, data_sets: list[str], saes) -> list[dict]:
    """Run all commands one after another; returns a record of each."""
    from husai.evals import loaded, official
    from husai.evidence import deltas
    from husai.runs.files import write_json

    if saes is None:
        given = (args.output_dir, args.artifact_root, args.subject, args.hook_name, device, args.threads, args.force)
        args.checkpoint = [loaded.train_default(*given, args.text)]
        saes = loaded.load(args, device)
    for label, sha256 in saes.inputs().items():
        run.add_input(label, sha256)
    subject = saes.subject
    places = loaded.Places(args.output_dir, args.artifact_root, args.device, args.threads)
    cache = places.probe_activations(subject)
    common = ["--device", args.device]
    shared = ["--checkpoint", *map(str, args.checkpoint), "--model-name", saes.name, *common]
    shared += ["--hook-name", args.hook_name, "--text", str(args.text)]
    shared += ["--threads", str(args.threads), "--artifact-root", str(args.artifact_root), "--rows", str(args.rows)]
    for flag in ("reference", "random_model_checkpoint"):
        if getattr(args, flag):
            shared += [f"--{flag.replace('_', '-')}", *map(str, getattr(args, flag))]
    shared += ["--max-norm-multiple", str(args.max_norm_multiple)] if args.max_norm_multiple else []
    shared += [flag for flag, given in (("--same-model", args.same_model), ("--force", args.force)) if given]

    def custom(name: str, *more: str) -> tuple[str, list[str], Path]:
        folder = args.output_dir / name
        script = str(SCRIPTS / f"run_husai_{name}_eval.py")
        return name, [sys.executable, script, *shared, "--output-dir", str(folder), *more], folder

    stories = ["--stories", args.stories] if args.stories else []
    checkout = ["--cebench-repo", str(args.cebench_repo)] if args.cebench_repo else []
    commands = [
        custom("saebench_custom", "--dataset-names", ",".join(data_sets), "--model-cache-path", str(cache)),
        custom("cebench_custom", *stories, *checkout),
    ]
    commands = [c for c in commands if c[0] in (args.evals or EVALS)]
    documents = []
    if not args.text.packaged:
        file = args.output_dir / "official" / "documents.json"
        write_json(file, args.text.heldout_texts(CORE_DOCUMENTS, subject.tokenizer))
        documents = ["--documents", str(file)]
    for group in deltas.by_condition([c.record for c in saes.saes]).values():  # one SAE a condition
        c = next(c for c in saes.saes if c.record is group[0])
        layout = loaded.to_saelens(c.sae, subject, args.hook_name, args.output_dir / "encoders" / c.label)
        for name in (n for n in args.evals or EVALS if n in official.EVALS):
            folder = args.output_dir / "official" / f"{name}-{c.label}"
            command = [sys.executable, "-m", "husai.evals.official", name, "--checkpoint", str(layout)]
            command += ["--subject", saes.name, "--output-dir", str(folder), *common]
            command += ["--threads", str(args.threads)]
            if name == "sparse_probing_sae_probes":
                command += ["--dataset-names", ",".join(data_sets), "--model-cache-path", str(cache)]
            command += documents if name == "core" else []
            commands.append((f"{name}-{c.label}".replace("/", "-"), command, folder))
    return [record(run, *command) for command in commands]


def record(run, name: str, command: list[str], folder: Path) -> dict:
    """Run one command; returns its return code, its log, and its main figure."""
    from husai.evals import official
    from husai.runs.errors import CheckFailed
    from husai.runs.files import sha256_file

    if "-m" in command:
        shutil.rmtree(folder, ignore_errors=True)  # SAEBench would reuse any results in its folder
    code = run.command(name, command)
    facts = {"name": name, "return_code": code, "log": run.commands[-1]["log"], "seconds": run.commands[-1]["seconds"]}
    answer = facts | {"result": None, "sha256": None, "metric": None, "figure": None, "reason": None}
    if code != 0:
        return answer | {"reason": f"return code {code}"}
    file = folder / "results.json"
    if "-m" in command:
        try:
            metric, figure = official.headline(command[3], folder)
        except CheckFailed as error:
            return answer | {"reason": str(error)}
        answer |= {"metric": metric, "figure": figure}
        (file,) = folder.glob(official.RESULT)
    return answer | {"result": str(file.relative_to(run.output_dir)), "sha256": sha256_file(file)}


def summary(results: dict) -> str:
    lines = ["# External benchmarks", "", "| eval | runs here | about | why not |", "|---|---|---|---|"]
    for p in results["preflight"]:
        seconds = f"{p['seconds'] / 60:.1f} min" if p["seconds"] else ""
        lines.append(f"| {p['name']} | {'yes' if p['runs'] else 'no'} | {seconds} | {p['reason'] or ''} |")
    lines += ["", *(f"- {name}: {description}" for name, description in results["data"].items())]
    lines += [f"- {name} {version}" for name, version in results["versions"].items()]
    if not results["executed"]:
        return "\n".join([*lines, "", "Nothing was run: --execute does it."]) + "\n"
    lines += ["", "| command | return code | seconds | result | figure |", "|---|---|---|---|---|"]
    for e in results["executed"]:
        figure = e["reason"] or (f"{e['metric']} {e['figure']:.4f}" if e["metric"] else "see its summary")
        lines.append(f"| {e['name']} | {e['return_code']} | {e['seconds']:.0f} | {e['result'] or ''} | {figure} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
