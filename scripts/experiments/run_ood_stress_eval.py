"""Measure how much probes on an SAE's features lose under a shift of the data, beyond the model's own probes.

    python scripts/experiments/run_ood_stress_eval.py
    python scripts/experiments/run_ood_stress_eval.py --candidate CONFIRMATION/results.json
    python scripts/experiments/run_ood_stress_eval.py --checkpoint CKPTS --model-name husai-tiny --hook-layer 1
    python scripts/experiments/run_ood_stress_eval.py --skip-families

Probes are trained on a data set, and scored on its test rows and on its shifted version (another language, spelling or
register), by sae-probes' own functions or by exact probes (`--probing`). The drop is the loss of the SAE less the loss
of the model, on the data sets whose shift the model's own probe survives. The script also reports the SAE less the
model on a held-out family of data sets, and the SAE's fit to activations of shifted text. Without --candidate and
--checkpoint it uses the confirmed candidate below --artifact-root if there is one, else the embedded default.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence.data_sets import DATA_SETS
from husai.runs.cli import name_list, prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/ood_stress")
    p.add_candidate()
    p.add_argument(
        "--shifted", type=name_list, help="shifted versions, by name; fewer than all give no verdict (default: all)"
    )
    p.add_argument(
        "--dataset-names",
        type=name_list,
        default=DATA_SETS,
        help="names or sides of the data sets that the held-out family is compared with (default: %(default)s)",
    )
    p.add_probing()
    p.add_probe_ks()
    p.add_argument("--skip-families", action="store_true", help="leave the held-out family out")
    p.add_argument("--random-seed", type=int, default=42, help="seed of splits and probes (default: %(default)s)")
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "ood_stress", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Check all input, probe, measure and draw."""
    device = prepare(args.device, args.threads)
    from husai.evals import candidate, ood, sae_probes
    from husai.evals.loaded import Places

    sae_probes.versions(args.probing)
    chosen = ood.choose(args.shifted, [] if args.skip_families else args.dataset_names, args.random_seed)
    places = Places(args.output_dir, args.artifact_root, args.device, args.threads, args.force)
    settings = args.probing, tuple(args.probe_ks)
    results = ood.evaluate(candidate.find(args, device), chosen, *settings, places, cells).to_json()
    return results, draw(results, args.output_dir / "figures")


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results: dict, folder: Path) -> list[Path]:
    """Draw the AUC of SAE and model on each data set's test rows and shifted version, and the drop."""
    from husai.evidence.drop import CHANCE, drops
    from husai.evidence.estimates import mean_over_seeds
    from husai.evidence.schemas import Shifted
    from husai.report import figures

    shifted = results["shifted"]
    k, names = shifted["k"], shifted["data_sets"]

    def over_saes(columns) -> list[dict]:
        return [mean_over_seeds(column).to_json() for column in columns]

    series = {}
    for side, label in (("id", "own test rows"), ("ood", "shifted")):
        series[f"activations, {label}"] = [{"estimate": v, "low": None, "high": None} for v in shifted["llm"][side]]
        of_saes = [sae["test_auc"][k][side] for sae in shifted["saes"]]
        series[f"SAE, {label}"] = over_saes(zip(*of_saes, strict=True))
    each = over_saes(drops(Shifted.model_validate(shifted), k).T)
    label = f"test AUC (SAE: {k} features; line: chance)"
    auc = figures.Panel("Probes under shift", label, "", names, series, line=CHANCE)
    rows, loss = [*names, "mean of all"], [*each, shifted["drop"][k]]
    if shifted["drop_where_kept"][k]["estimate"] is not None:
        rows, loss = [*rows, "mean that decides"], [*loss, shifted["drop_where_kept"][k]]
    most = results["rule"]["max_drop"]
    label = f"drop of AUC, SAE − activations (at most {most} allowed)"
    return [
        figures.panels(
            folder / "ood_drop.png",
            [auc, figures.Panel("What the SAE loses beyond the model", label, "", rows, {"drop": loss})],
        )
    ]


def summary(results: dict) -> str:
    from husai.evidence import rules
    from husai.evidence.schemas import Shifted
    from husai.report.text import interval, stand_in, table

    shifted, candidate = results["shifted"], results["candidate"]
    evidence = Shifted.model_validate(shifted)
    verdict = rules.verdict(lambda: rules.ood(evidence, results["skipped"]))
    k, families = shifted["k"], dict.fromkeys(shifted["families"])
    lines = [
        "# Out-of-distribution stress",
        "",
        f"**{verdict['outcome']}**: {verdict['reason']}.",
        "",
        f"{results['subject']}, {candidate['facts']['hook_name']}, {candidate['condition']}, "
        f"SAEs: {len(shifted['saes'])}. {where_kept(evidence, results['probing'])}",
        f"On all {len(shifted['data_sets'])} data sets, of {len(families)} families ({', '.join(families)}), the drop "
        f"is {interval(shifted['drop'][k], '+')}, seeds and data sets both samples. Where the model keeps nothing, "
        "the drop is little more than how far the SAE is behind on the data set itself: this mean decides nothing.",
        "",
        *table(
            ["features", "drop that decides, 95 % interval", "on all data sets"],
            [[n, interval(e, "+"), interval(shifted["drop"][n], "+")] for n, e in shifted["drop_where_kept"].items()],
        ),
        "",
        *table(
            ["data set", "SAE", "SAE, shifted", "activations", "activations, shifted", "drop", "shifted prompts"],
            per_data_set(shifted),
        ),
        "",
    ]
    lines += [f"Not used: {name} ({reason})." for name, reason in results["skipped"].items()]
    if results["families"]:
        lines += ["", *of_families(results["families"])]
    return "\n".join([*lines, "", *of_activations(results["activations"]), *stand_in(results)]) + "\n"


def where_kept(evidence, probing: str) -> str:
    """Sentences on the drop that decides, and on its shifted versions.

    Args:
        evidence: `schemas.Shifted`.
    """
    from husai.evidence.drop import names_kept
    from husai.report.text import interval

    names = names_kept(evidence)
    if not names:
        return "The activations' own probe is above chance (DeLong, 95 %) under no shift."
    lost = interval(evidence.drop_where_kept[evidence.k], "+")
    return (
        f"A probe on {evidence.k} features (`{probing}`) loses {lost} of test AUC under shift beyond what the probe on "
        "the model's own activations loses (positive: the SAE loses more; "
        f"interval over seeds), on {', '.join(names)}. The activations' own probe is above chance (DeLong, 95 %) under "
        f"these {len(names)} of {len(evidence.data_sets)} shifts, and the figure speaks of no other."
    )


def per_data_set(shifted: dict) -> list[list]:
    import numpy as np

    from husai.evidence.drop import drops
    from husai.evidence.schemas import Shifted

    k, llm = shifted["k"], shifted["llm"]
    saes = {side: np.mean([sae["test_auc"][k][side] for sae in shifted["saes"]], 0) for side in ("id", "ood")}
    columns = saes["id"], saes["ood"], llm["id"], llm["ood"]
    lost = drops(Shifted.model_validate(shifted), k).mean(0)
    rows = zip(shifted["data_sets"], *columns, lost, shifted["prompts"], strict=True)
    return [[name, *(f"{v:.4f}" for v in auc), f"{drop:+.4f}", n] for name, *auc, drop, n in rows]


def of_families(families: dict) -> list[str]:
    from husai.report.text import interval, table

    gap, sets = families["gap"], [len(families[side]["data_sets"]) for side in ("id", "ood")]
    rows = [
        [f"{sets[0]} probe sets", interval(gap["id"], "+")],
        [f"{sets[1]} sets of {families['ood']['families'][0]}", interval(gap["ood"], "+")],
        ["difference", interval(gap["difference"], "+")],
    ]
    return [
        "A family of another kind of text, which nothing was trained on, by the official benchmark. Its data sets are "
        "one family: their interval and that of the difference are over SAEs alone and say nothing of other texts. "
        "Nothing is decided by them.",
        "",
        *table([f"AUC of {families['k']} features − AUC of the activations", "95 % interval"], rows),
    ]


def of_activations(section: dict) -> list[str]:
    import numpy as np

    from husai.report.text import interval, table

    names = {
        "explained_variance": "explained variance",
        "l0": "L0",
        "dead_share": "share of features that never fire",
        "outside": "share of the variance outside the SAE's subspace",
    }
    ranks = [sae["rank"] for sae in section["saes"]]
    rows = [
        [
            label,
            *(f"{np.mean([sae[side][name] for sae in section['saes']]):.4f}" for side in ("id", "ood")),
            interval(section["change"][name], "+"),
        ]
        for name, label in names.items()
    ]
    return [
        f"The activations themselves, {section['compared_rows']} of held-out and as many of shifted text; an SAE's "
        f"subspace ({min(ranks)} to {max(ranks)} directions) holds 99 % of the variance of its reconstructions of "
        "held-out text.",
        "",
        *table(["figure", "held-out text", "shifted text", "change, 95 % interval over SAEs"], rows),
    ]


if __name__ == "__main__":
    run_main(main)
