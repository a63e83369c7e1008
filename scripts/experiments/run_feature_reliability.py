"""Which features of an SAE can you trust? A calibrated statement about each of them, from siblings with other seeds.

    python scripts/experiments/run_feature_reliability.py --checkpoint MY_SAE \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre
    python scripts/experiments/run_feature_reliability.py --checkpoint SEED1 SEED2 SEED3 SEED4 SEED5
    python scripts/experiments/run_feature_reliability.py --checkpoint sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre \\
      --model-name gpt2 --hook-name blocks.8.hook_resid_pre --text Skylion007/openwebtext --tokens 300000000 --dry-run

One checkpoint: siblings are trained here, of the same architecture, width and L0, each with its own initialisation and
data order. Several: the statements are about the first, and the others are its siblings. --relatives takes other SAEs of
the hook, of whatever width, by their decoders alone; nothing is trained. A forecast of time, memory and disk comes first;
--dry-run stops there. Leaves features.csv and features.parquet (one row a feature; columns.md explains the columns),
results.json, summary.md, contexts.json, figures, and report.html. Exit 0 done, 1 the siblings miss the SAE's L0, 2 bad
input.
"""  # noqa: E501

import argparse
from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evals.inputs import by_named_checkpoint, look_up
from husai.evidence import rules
from husai.runs.cli import fraction, int_list, positive_int, prepare, run_main
from husai.runs.inputs import not_at_all


def parse() -> argparse.Namespace:
    p = EvalParser(__doc__)
    p.add_common("results/experiments/feature_reliability")
    p.add_candidate()
    p.add_argument(
        "--siblings", type=int, help="to train: 14 for one checkpoint, none for several where nothing is said"
    )
    p.add_argument("--tokens", type=positive_int, help="that each sibling sees (default: as many as the SAE saw)")
    p.add_argument("--train-rows", type=positive_int, help="of the store they are of (default: up to 1000000)")
    p.add_argument(
        "--buffer-rows",
        type=positive_int,
        help="train siblings while the model gives activations, each token once, through a buffer of so many rows",
    )
    p.add_argument(
        "--relatives",
        type=Path,
        nargs="*",
        counts=by_named_checkpoint,
        metavar="SAE",
        help="other SAEs of the hook in place of siblings; without a name: those of SAELens' catalogue",
    )
    p.add_argument("--features", type=int_list, help="whose contexts are collected, as 12,34 (default: a sample)")
    p.add_argument("--contexts", type=positive_int, default=200, help="size of that sample (default: %(default)s)")
    p.add_argument("--recurs-cosine", type=fraction, default=rules.RECURS_COSINE, help="bar (default: %(default)s)")
    p.add_argument(
        "--recurs-correlation", type=fraction, default=rules.RECURS_CORRELATION, help="bar (default: %(default)s)"
    )
    p.add_argument(
        "--certify-at",
        type=fraction,
        default=rules.CERTIFIED_AT,
        help="share π of trainings that a certified feature recurs in (default: %(default)s)",
    )
    p.add_argument("--rotations", type=positive_int, help="of each sibling (default: by the number of siblings)")
    p.add_argument("--dry-run", action="store_true", counts=not_at_all, help="stop after the forecast")
    args = p.parse_benchmark()
    if args.siblings is not None and args.siblings < 0:
        p.error(f"--siblings {args.siblings}: 0 or more expected")
    if args.relatives is not None:
        p.refuse_unheard(
            args, ("siblings", "tokens", "train_rows", "buffer_rows"), "nothing is trained with --relatives"
        )
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import BadInput
    from husai.runs.phase import run_phase

    look_up(args)
    if not args.candidate and not args.checkpoint:
        raise BadInput("--checkpoint: the SAE whose features are judged expected; none was named")
    if args.dry_run:
        device = prepare(args.device, args.threads)
        print(*planned(args, device)[-1], sep="\n")
        return
    run_phase(args, "feature_reliability", compute, summary)
    print(f"features {args.output_dir / 'features.csv'}")


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def planned(args, device):
    """(the user's SAEs, how siblings are trained, why nothing can be certified, notes, lines of the forecast)."""
    from husai.evals import candidate, siblings
    from husai.runs.errors import BadInput

    asked = siblings.first_named(candidate.find(args, device), args.checkpoint)
    width, others = asked.saes[0].sae.d_sae, len(asked.saes) - 1
    if unknown := [f for f in args.features or [] if not 0 <= f < width]:
        raise BadInput(f"--features {unknown[0]}: numbers from 0 to {width - 1} expected")
    if args.relatives is not None:
        return asked, None, ["Relatives are no fresh trainings, therefore nothing is certified."], [], []

    limits, notes = siblings.check(asked)
    to_train = args.siblings if args.siblings is not None else 0 if others else siblings.DEFAULT
    if others + to_train == 0:
        raise BadInput("--siblings 0 with one checkpoint: one sibling expected at least")
    plan = siblings.plan(asked, to_train, args.tokens, args.train_rows, args.buffer_rows)
    forecast = siblings.forecast(asked, plan, args.artifact_root, device, others + to_train)
    return asked, plan, limits, notes, forecast.lines()


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train the siblings, judge every feature, and write what a reader opens."""
    device = prepare(args.device, args.threads)
    import logging

    from husai.evals import features, siblings
    from husai.evidence.features import Bars, dictionary
    from husai.report import feature_summary
    from husai.runs.files import write_json, write_text

    asked, plan, limits, notes, forecast = planned(args, device)
    for line in [*forecast, *notes, *limits]:
        logging.getLogger("husai").info("%s", line)
    bars = Bars(cosine=args.recurs_cosine, correlation=args.recurs_correlation, certified_at=args.certify_at)
    if plan is None:
        group = siblings.relatives(asked, args.relatives)
    else:
        group = siblings.compared(asked, plan, cells, args.artifact_root, device, args.threads)

    judged = features.judge(asked, group, bars, args.artifact_root, device, args.rotations, not limits)
    table, out = judged.table, args.output_dir
    files = {name: out / name for name in ("features.csv", "features.parquet", "columns.md", "contexts.json")}
    write_text(files["features.csv"], table.to_csv(index=False))
    table.to_parquet(files["features.parquet"], index=False)
    write_text(files["columns.md"], dictionary())
    results = features.sum_up(asked, group, judged, bars, limits, notes, files["features.csv"]).to_json()

    chosen = args.features or features.shown(table, args.contexts)
    contexts = features.contexts(asked, group, judged, chosen)
    write_json(files["contexts.json"], contexts)
    return results, [*files.values(), *feature_summary.figures(results, table, out / "figures")]


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def summary(results: dict) -> str:
    from husai.report.feature_summary import summary_lines

    return "\n".join(["# Which features can you trust?", "", *summary_lines(results)]) + "\n"


if __name__ == "__main__":
    run_main(main)
