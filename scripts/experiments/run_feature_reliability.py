"""Judge each feature of an SAE: a calibrated statement about each feature, from siblings with other seeds.

    python scripts/experiments/run_feature_reliability.py --checkpoint MY_SAE \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre
    python scripts/experiments/run_feature_reliability.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5
    python scripts/experiments/run_feature_reliability.py --checkpoint sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre \\
      --model-name gpt2 --hook-name blocks.8.hook_resid_pre --text Skylion007/openwebtext --tokens 300000000 --dry-run

With one checkpoint, siblings of the same architecture, width and L0 are trained, each with its own initialisation and
data order. With several, the statements are about the first one, and the others are its siblings. --relatives uses
decoders of other SAEs at the hook, of any width, and trains nothing. A forecast of time, memory and disk comes first;
--dry-run stops after it. It trains nothing, but harvests the held-out rows (--rows), which the run then reuses. The
script writes features.csv and features.parquet (one row for each feature; columns.md explains the columns),
results.json, summary.md, contexts.json, figures, and report.html. Exit 0 done, 1 the siblings miss the SAE's L0, 2 bad
input.
"""  # noqa: E501

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evals.inputs import look_up
from husai.runs.cli import prepare, run_main
from husai.runs.inputs import not_at_all


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/feature_reliability")
    p.add_feature_reliability()
    p.add_argument(
        "--dry-run",
        action="store_true",
        counts=not_at_all,
        help="stop after the forecast, which harvests held-out rows",
    )
    return p.parse_feature_reliability()


def main() -> None:
    args = parse()
    from husai.runs.errors import BadInput
    from husai.runs.phase import run_phase

    look_up(args)
    if not args.candidate and not args.checkpoint:
        raise BadInput("--checkpoint: the SAE whose features are judged expected; none was named")
    if args.dry_run:
        device = prepare(args.device, args.threads)
        from husai.evals import reliability

        print(*reliability.compare(args, device).forecast, sep="\n")
        return
    run_phase(args, "feature_reliability", compute, summary)
    print(f"features {args.output_dir / 'features.csv'}")
    print(f"page     {args.output_dir / 'report.html'}")


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train the siblings, judge every feature, and write tables, contexts and pages."""
    device = prepare(args.device, args.threads)
    from husai.evals import reliability
    from husai.evidence.features import dictionary
    from husai.report import figures
    from husai.report.features import feature_page
    from husai.runs.files import write_json, write_text

    reliability_of_features, out = reliability.answer(args, cells, device), args.output_dir
    results = reliability_of_features.results.to_json()
    files = {
        name: out / name for name in ("features.csv", "features.parquet", "columns.md", "contexts.json", "report.html")
    }
    write_text(files["features.csv"], reliability_of_features.table.to_csv(index=False))
    reliability_of_features.table.to_parquet(files["features.parquet"], index=False)
    write_text(files["columns.md"], dictionary())
    write_json(files["contexts.json"], reliability_of_features.contexts)
    write_text(
        files["report.html"], feature_page(results, reliability_of_features.table, reliability_of_features.contexts)
    )
    return results, [*files.values(), *figures.of_features(results, reliability_of_features.table, out / "figures")]


def summary(results: dict) -> str:
    from husai.report.feature_summary import summary_lines

    return "\n".join(["# Which features can you trust?", "", *summary_lines(results)]) + "\n"


if __name__ == "__main__":
    run_main(main)
