"""Copy the evidence of runs, without checkpoints and activations, into a folder that is kept and audited.

    python scripts/analysis/mirror_evidence.py --results-root results/experiments --output docs/evidence/embedded_queue

The script copies results.json, summary.md, manifest.json, and the figures and decisions that each manifest names. If a
file differs from its sha256 in the manifest, nothing is copied. Nothing is removed. The audit computes the copies again
(`make audit-results`), and build_report.py makes a report card from them.
"""

from pathlib import Path

from husai.runs.cli import Parser, run_main


def parse():
    p = Parser(__doc__)
    p.add_argument("--results-root", type=Path, required=True, help="holds a folder a run")
    p.add_argument("--output", type=Path, required=True, help="folder that receives the same folders")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.runs.errors import BadInput
    from husai.runs.files import write_bytes

    runs = sorted(path.parent for path in args.results_root.glob("*/manifest.json"))
    if not runs:
        raise BadInput(f"--results-root: {args.results_root} holds no run")
    files_of_run = {run.name: files(run) for run in runs}

    for run, paths in files_of_run.items():
        for path in paths:
            write_bytes(args.output / run / path.name, path.read_bytes())
    print(f"{len(files_of_run)} runs  {args.output}")


def files(run: Path) -> list[Path]:
    """Files of one run's folder to copy.

    Raises:
        BadInput: the run is not complete, or a file differs from its sha256 in the manifest.
    """
    from husai.runs.errors import BadInput
    from husai.runs.files import read_json, sha256_file
    from husai.runs.folder import Manifest

    try:
        manifest = Manifest.model_validate(read_json(run / "manifest.json", "manifest"))
    except ValueError as error:
        raise BadInput(f"manifest: {run / 'manifest.json'} is damaged ({error})") from None
    if manifest.status != "complete":
        raise BadInput(f"--results-root: {run} holds no complete run, its manifest says {manifest.status}")
    kept = {name: sha256 for name, sha256 in manifest.outputs.items() if name != "config.json" and name[-4:] != ".csv"}
    named = {run / name: sha256 for name, sha256 in kept.items()}
    for path, sha256 in named.items():
        if not path.is_file() or sha256_file(path) != sha256:
            raise BadInput(f"--results-root: {path} is missing or is not what its manifest says")
    return [run / "manifest.json", *named]


if __name__ == "__main__":
    run_main(main)
