"""Compare the decoders of SAEs that differ in their seed, without a model: which features recur?

    python scripts/analysis/compare_decoders.py assets/husai-tiny-saes --covariance assets/husai-tiny-saes-activations.safetensors
    python scripts/analysis/compare_decoders.py seed0.npy seed1.npy seed2.npy --rows-are-features yes

The input is checkpoints of any library, folders of checkpoints, names (sae-lens:RELEASE/SAE_ID, hf:REPO/PATH), or bare
matrices (.npy, .safetensors, .pt). The script prints mcc, pwmcc and share70 with jackknife intervals over the SAEs,
with the scores of random directions and, with --covariance, of the spectral null. Then it counts the other SAEs in which
features recur. Few SAEs cannot certify a feature, and then nothing is counted as certified. It gives figures alone; the
release check gives a verdict. Exit 0 done, 2 bad input.
"""  # noqa: E501

import argparse
from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import run_main


def parse() -> argparse.Namespace:
    p = EvalParser(__doc__)
    p.add_argument("decoders", nargs="+", type=Path, help="at least two SAEs or matrices, or a folder of checkpoints")
    p.add_argument(
        "--covariance", type=Path, help="activation store, .npy, or .safetensors with covariance, mean, rows"
    )
    p.add_argument(
        "--rows-are-features", choices=["yes", "no"], help="orientation of bare matrices, if their shape leaves it open"
    )
    return p.parse_args()


def main() -> None:
    args = parse()
    import numpy as np

    import husai
    from husai.dictionaries import foreign
    from husai.dictionaries.decoders import ARRAYS, read_decoder, read_moments
    from husai.evidence import rules
    from husai.report.text import interval, table

    bare = [p for p in args.decoders if p.suffix in ARRAYS and p.name not in foreign.FILES]
    named = [p for p in args.decoders if p not in bare]
    paths = bare + (foreign.find_all(named, "decoders") if named else [])
    rows = None if args.rows_are_features is None else args.rows_are_features == "yes"
    moments = read_moments(args.covariance) if args.covariance else {}
    labels = [str(p) for p in paths]
    comparison = husai.compare([read_decoder(p, rows) for p in paths], labels=labels, **moments)

    widths = sorted({len(k) for k in comparison.recurrence})
    if len(widths) > 1:
        print(
            f"The SAEs differ in width, from {widths[0]} to {widths[-1]} features: they do not differ in their seed "
            "alone. A narrow SAE has too few partners for the features of a wide one.\n"
        )

    has_interval = all(estimate.low is not None for estimate in comparison.scores.values())
    header = ["score", "observed, 95 % interval" if has_interval else "observed", "random directions"]
    header += ["spectral null"] if comparison.spectral is not None else []
    scores = []
    for name, estimate in comparison.scores.items():
        row = [name, interval(estimate.to_json()), f"{comparison.isotropic[name]:.4f}"]
        scores.append(row + ([f"{comparison.spectral[name]:.4f}"] if comparison.spectral is not None else []))
    print(*table(header, scores), "", sep="\n")

    others = len(labels) - 1
    needed = rules.siblings_needed(rules.CERTIFIED_AT)
    certifiable = others >= needed
    header = ["SAE", "features", "recur in no other", "in at least one other", "in all others"]
    header += ["certified"] if certifiable else []
    header += ["above the spectral null"] if comparison.q_values is not None else []
    lines = []
    for i, (label, k, bound) in enumerate(zip(labels, comparison.recurrence, comparison.bounds, strict=True)):
        counts = [len(k), int((k == 0).sum()), int((k > 0).sum()), int((k == others).sum())]
        counts += [int(rules.certified(bound).sum())] if certifiable else []
        above = [] if comparison.q_values is None else [int((comparison.q_values[i] <= rules.FALSE_SHARE).sum())]
        lines.append([label, *counts, *above])
    print(*table(header, lines), "", sep="\n")
    print(
        f"A feature recurs in another SAE if its one-to-one partner there has a decoder cosine of at least "
        f"{rules.RECURS_COSINE:g}.\nCertified: the one-sided 95 % bound of its share of trainings reaches "
        f"{rules.CERTIFIED_AT:g}. This needs at least {needed} other SAEs"
        + ("." if certifiable else f"; with {others}, no feature can be certified.")
    )
    if not has_interval:
        print("An interval over seeds needs at least three SAEs.")
    if comparison.q_values is not None:
        share = float(np.mean([(q <= rules.FALSE_SHARE).mean() for q in comparison.q_values]))
        print(f"{share:.0%} of the features lie above the spectral null. That alone does not make a feature stable.")


if __name__ == "__main__":
    run_main(main)
