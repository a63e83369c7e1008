"""Features to read: what each of a sample responds to, and whether the other seeds have found it too.

    python scripts/analysis/collect_feature_examples.py
    python scripts/analysis/collect_feature_examples.py --checkpoint SEED42 SEED123 SEED456 SEED789 SEED1011
    python scripts/analysis/collect_feature_examples.py --checkpoint CHECKPOINTS --features 100 \\
      --model-name husai-tiny --hook-name blocks.1.hook_resid_pre

The SAEs are the confirmed candidate's, or those of --checkpoint: of one recipe, differing in their seed. Of the first
seed a fixed sample is drawn, half of it stable: found again by every other seed, with |cos| >= 0.7 to the one-to-one
partner. Contexts are of documents that neither the model nor an SAE was trained on, the strongest of each document. A
sample illustrates and proves nothing: the figures on stability are phase 4a's.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import positive_int, prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/feature_examples")
    p.add_candidate()
    p.add_argument("--features", type=positive_int, default=60, help="to sample (default: %(default)s)")
    p.add_argument("--sample-seed", type=int, default=0, help="of the sample (default: %(default)s)")
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "feature_examples", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Open the seeds, match them, sample, read the documents."""
    device = prepare(args.device, args.threads)
    from husai.evals import candidate, feature_examples

    tested = candidate.find(args, device)
    given = (tested.subject, tested.store, tested.saes, tested.source.heldout(), args.features, args.sample_seed)
    found = feature_examples.collect(*given, tested.store.folder.parent)
    about = {"phase": "feature_examples", "inputs": tested.inputs(), "subject": tested.subject.name}
    source = tested.saes[0].facts.source
    about |= {} if source == "husai" else {"sae_source": source}
    return about | tested.source.record() | found, []


def summary(results: dict) -> str:
    from husai.report.text import stand_in, table

    features, others, alive = results["features"], len(results["seeds"]) - 1, results["alive"]
    rows = [
        [
            f["feature"],
            f"{f['firing_rate']:.2%}",
            f"{min(p['cosine'] for p in f['partners']):.4f}",
            "yes" if f["stable"] else "no",
        ]
        for f in features
    ]
    lines = [
        "# Features to read",
        "",
        f"{results['condition']} on {results['subject']}, {results['hook_name']}: {len(features)} of the "
        f"{alive} features that fire on {results['heldout_tokens']} held-out tokens. Of these {alive}, "
        f"{results['alive_stable']} are stable: each of the {others} other seeds has a partner with |cos| ≥ "
        f"{results['stable_from']}, one to one. The sample draws as many stable features as others, where there are "
        "enough, and so says nothing about their share.",
        "",
        *table(["feature", "fires on", "least abs. cosine with a partner", "stable"], rows),
    ]
    return "\n".join([*lines, *stand_in(results)]) + "\n"


if __name__ == "__main__":
    run_main(main)
