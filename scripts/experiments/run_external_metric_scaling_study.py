"""Measure how tokens, width and layer affect SAEs: reconstruction, stability and external benchmarks on a full grid.

    python scripts/experiments/run_external_metric_scaling_study.py --token-budgets 10000,30000 --hook-layers 0,1 \\
      --d-sae-values 1024,2048 --seeds 42,123,456 --run-saebench --run-cebench --cebench-repo PATH \\
      --cebench-matched-baseline-map docs/evidence/phase4e_cebench_matched200/cebench_baseline_map.json
    python scripts/experiments/run_external_metric_scaling_study.py --executor ray --run-saebench

A budget is the exact number of tokens that each SAE sees, with its own learning-rate schedule. Each layer is one
activation store and one task of the executor. The effect of an axis is estimated by contrasts that are paired by seed.
A layer without a baseline in the map gets no delta, and the study continues.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import DEFAULT_SEEDS, int_list, name_list, positive_int, run_main, seed_list


def layer_list(text: str) -> list[int]:
    """`0,1` -> [0, 1]; distinct, not negative."""
    return seed_list(text)


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/external_metric_scaling")
    p.add_study()
    p.add_executor()
    p.add_argument("--token-budgets", type=int_list, default="100000,200000,400000,800000", help="(%(default)s)")
    p.add_argument("--hook-layers", type=layer_list, default="1,2", help="blocks.LAYER.hook_resid_pre (%(default)s)")
    p.add_argument("--d-sae-values", type=int_list, default="512,1024", help="features (default: %(default)s)")
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_argument("--architectures", type=name_list, default="topk", help="default: %(default)s")
    p.add_argument("--k", type=positive_int, default=16, help="active features a row (default: %(default)s)")
    args = p.parse_args()
    if len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    if args.k > min(args.d_sae_values):
        p.error(f"--k {args.k}: an L0 that {min(args.d_sae_values)} features cannot reach")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    run_phase(args, "external_metric_scaling", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Run one task for each layer, then estimate the effect of each axis."""
    from husai.evals import bank
    from husai.evidence import conditions

    settings = [
        bank.shared(args)
        | {
            "hook_name": f"blocks.{layer}.hook_resid_pre",
            "families": args.architectures,
            "seeds": args.seeds,
            "d_saes": args.d_sae_values,
            "ks": [args.k],
            "budgets": args.token_budgets,
            "output_dir": str(args.output_dir / f"layer_{layer}"),
        }
        for layer in args.hook_layers
    ]
    banks = bank.run_all(settings, args)
    results = {
        "phase": "external_metric_scaling",
        "inputs": {f"{b.hook_name}, {label}": sha256 for b in banks for label, sha256 in b.inputs.items()},
        "subject": str(args.subject),
        "banks": [b.to_json() for b in banks],
        "contrasts": conditions.contrasts(banks),
        "power_laws": conditions.power_laws([row for b in banks for row in b.conditions]),
    }
    return results, draw(results, args.output_dir / "figures")


def draw(results: dict, folder: Path) -> list[Path]:
    """Draw each figure against the budget, one line for each layer and width."""
    from husai.report import figures

    rows = [row for scored_bank in results["banks"] for row in scored_bank["conditions"]]
    budgets = sorted({r["budget"] for r in rows})
    lines: dict[str, list[dict]] = {}
    for r in sorted(rows, key=lambda r: r["budget"]):
        lines.setdefault(f"{r['family']}, layer {r['layer']}, d_sae {r['d_sae']}", []).append(r)
    panels = []
    for name, label in (
        ("explained_variance", "held-out explained variance"),
        ("excess", "excess of mcc over the highest null"),
        ("saebench", f"{probing_name(results)} test AUC, k = 5"),
        ("cebench", "contrastive score, normalised"),
    ):
        series = {
            line: [r[name] for r in rows_of_line]
            for line, rows_of_line in lines.items()
            if all(r[name] for r in rows_of_line)
        }
        if series:
            panels.append(figures.Panel(label, "tokens seen", label, budgets, series))
    return [figures.panels(folder / "scaling.png", panels)]


def probing_name(results: dict) -> str:
    """Name of the probe implementation of all banks."""
    return next((b["saebench"]["probing"] for b in results["banks"] if b["saebench"]), "SAEBench")


def summary(results: dict) -> str:
    from husai.evidence.schemas import Gain
    from husai.report.text import GAIN_HEADER, gain_cells, interval, strata_of_banks, table

    rows = [row for scored_bank in results["banks"] for row in scored_bank["conditions"]]
    names = (
        "l0",
        "explained_variance",
        "mcc_alive",
        "excess",
        "saebench",
        "saebench_delta",
        "cebench",
        "cebench_delta",
    )
    header = [
        "layer",
        "family",
        "d_sae",
        "tokens",
        "epochs",
        "SAEs",
        "L0",
        "explained variance",
        "`mcc_alive`",
        "excess",
    ]
    header += [
        f"`{probing_name(results)}` AUC",
        "− matched reference",
        "contrastive, normalised",
        "− matched reference",
    ]

    changes = ["axis", "from", "to", "settings", "L0", "explained variance", *GAIN_HEADER]
    changes += [f"`{probing_name(results)}` AUC", "contrastive"]
    empty = [""] * (len(changes) - 5)

    def cell(row: dict, name: str) -> str:
        sign = "+" if name == "excess" or name.endswith("delta") else ""
        return "not run" if row[name] is None else interval(row[name], sign)

    lines = [
        "# Scaling: tokens, layer, width",
        "",
        f"{results['subject']}; 95 % intervals over training seeds (of benchmarks, over data sets too). With fewer "
        "than five seeds nothing is concluded.",
        "",
        *table(
            header,
            [
                [r["layer"], r["family"], r["d_sae"], f"{r['budget']:,}", f"{r['epochs']:.2f}", len(r["seeds"])]
                + [cell(r, n) for n in names]
                for r in rows
            ],
        ),
        "",
        "Change from one value of an axis to the next, the same seeds and other settings on both sides:",
        "",
        *table(
            changes,
            [
                [c["axis"], c["from"], c["to"], c["settings"]]
                + (
                    [f"none: {c['reason']}", *empty]
                    if c["reason"]
                    else [interval(c[n], "+") for n in ("l0", "explained_variance")]
                    + gain_cells(Gain.model_validate(c["stability"]))
                    + [interval(c[n], "+") for n in ("saebench", "cebench")]
                )
                for c in results["contrasts"]
            ],
        ),
        "",
    ]
    for law in results["power_laws"]:
        setting = ", ".join(f"{a} {v}" for a, v in law["setting"].items() if a != "budget" or law["axis"] != "budget")
        fit = f"{len(law['values'])} values; largest residual {law['largest_residual']:.3f}"
        power = f"1 − explained variance goes with {law['axis']} to the power {interval(law['exponent'])}"
        lines.append(f"- {power} ({setting}; {fit}; up to {law['epochs']:.1f} epochs).")
    if not results["power_laws"]:
        lines.append("No axis has four values: no power law is fitted.")
    lines += ["", *strata_of_banks(results["banks"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
