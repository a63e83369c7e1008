"""The selected recipe on fresh seeds: what the gate reads of a candidate.

    python scripts/experiments/run_candidate_confirmation.py
    python scripts/experiments/run_candidate_confirmation.py --candidate SELECTED.json \\
      --stories GulkoA/contrastive-stories-v3

Choosing the best of several and then testing it on the same seeds and data sets would count luck as merit. So the
recipe is trained again, with seeds that no study used, and its SAEs are held against their nulls, against their matched
reference, and against the benchmarks on the families that selection did not read. Exit 2: nothing was selected, or a
seed is not fresh.
"""

from pathlib import Path

from husai.evals.flags import Parser
from husai.evidence.data_sets import DATA_SETS, PAIR_SETS, families
from husai.runs.cli import name_list, run_main, seed_list


def parse():
    p = Parser(__doc__)
    p.add_common("results/experiments/candidate_confirmation")
    p.add_argument(
        "--candidate",
        type=Path,
        default=Path("results/experiments/candidate_selection/results.json"),
        help="results of select_release_candidate.py (default: %(default)s)",
    )
    p.add_argument(
        "--seeds", type=seed_list, help="that no study used (default: five that are fixed; the gate takes no others)"
    )
    p.add_argument(
        "--dataset-names", type=name_list, help="probing data sets (default: those of the studies that selection left)"
    )
    p.add_cebench()
    p.add_baseline_map()
    args = p.parse_args()
    if args.seeds is not None and len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import BadInput
    from husai.runs.phase import run_phase

    if not args.candidate.is_file():
        raise BadInput(f"--candidate: {args.candidate} does not exist; select_release_candidate.py makes it")
    run_phase(args, "candidate_confirmation", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Train the recipe again; stability and benchmarks of what comes out."""
    from pydantic import ValidationError

    from husai.evals import bank, sae_probes
    from husai.evidence.binding import block
    from husai.evidence.schemas import Facts, Recipe, Selection, refusal
    from husai.release.selection import fresh_seeds
    from husai.runs.cli import prepare
    from husai.runs.errors import BadInput, CheckFailed
    from husai.runs.files import read_json, sha256_file
    from husai.stability.study import checkpoint_files

    read_sha256 = sha256_file(args.candidate)
    try:
        selection = Selection.model_validate(read_json(args.candidate, "candidate"))
        chosen, split, used = selection.selected, selection.split.model_dump(), selection.seeds_used
        facts, recipe, subject = (
            Facts(**chosen["facts"]).model_dump(),
            Recipe(**chosen["recipe"]).model_dump(),
            chosen["subject"],
        )
    except ValidationError as error:
        raise BadInput(f"--candidate: {args.candidate} is no selection with a candidate ({refusal(error)})") from None
    except (KeyError, TypeError) as error:
        raise BadInput(f"--candidate: {args.candidate} is no selection with a candidate ({error})") from None
    args.seeds = args.seeds or fresh_seeds(used, 5)
    if old := sorted(set(args.seeds) & set(used)):
        raise BadInput(f"--seeds {old[0]}: a study used it; seeds that none did expected")
    names = args.dataset_names or split["gate_data_sets"] or DATA_SETS.split(",")
    read = set(split["selection_families"])

    def left(sets: list[str]) -> list[str]:
        sets = sae_probes.check_data_sets(sets)
        return [n for n, f in zip(sets, families(sets), strict=True) if f not in read]

    if not (data_sets := left(names)):
        raise BadInput("--dataset-names: selection has read the families of all of them; others expected")
    settings = recipe | {
        "subject": subject,
        "hook_name": facts["hook_name"],
        "families": [facts["family"]],
        "seeds": args.seeds,
        "d_saes": [facts["d_sae"]],
        "ks": [facts["k"]],
        "budgets": [facts["tokens"]],
        "saebench": True,
        "data_sets": data_sets,
        "cebench": True,
        "pair_sets": left(PAIR_SETS.split(",")),
        **bank.places_of(args),
    }
    prepare(args.device, args.threads)
    bank.check(bank.Bank(**settings))
    found = bank.run(**settings)
    candidate = block([r for r in found["saes"] if r["candidate"]])
    if other := [n for n, v in candidate["facts"].items() if v != facts[n]]:
        why = "(--threads, device and packages as in the study expected)"
        raise CheckFailed(f"the recipe cannot be trained again here: {', '.join(other)} came out otherwise {why}")
    members = found["sections"][0]["members"]
    results = {
        "phase": "candidate_confirmation",
        "inputs": found["inputs"] | {"selection": read_sha256},
        "subject": subject,
        "candidate": candidate,
        "paths": {str(m["seed"]): m["checkpoint"] for m in members},
        "selection": {"sha256": read_sha256, "id": chosen["id"]},
        "bank": found,
    }
    return results, checkpoint_files(cells, members) + draw(results, args.output_dir / "figures")


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(results: dict, folder: Path) -> list[Path]:
    """The candidate against each null and its reference: what is above zero is above them."""
    from husai.report import figures

    (row,), section = results["bank"]["conditions"], results["bank"]["sections"][0]
    excess = section["stability"]["scores"]["mcc_alive"]["excess"]
    panels = [
        figures.Panel(
            "mcc of alive features", "above the null", "", list(excess), {row["condition"]: list(excess.values())}
        )
    ]
    names = {"saebench": "SAEBench, AUC", "cebench": f"{results['bank']['cebench']['benchmark']}, of its bound"}
    external = {label: row[f"{n}_delta"] for n, label in names.items() if row[f"{n}_delta"]["estimate"] is not None}
    if external:
        series = {row["condition"]: list(external.values())}
        panels.append(figures.Panel("Benchmarks", "above the matched reference", "", list(external), series))
    return [figures.panels(folder / "confirmation.png", panels)]


def summary(results: dict) -> str:
    from husai.report.text import interval, table

    found, section = results["bank"], results["bank"]["sections"][0]
    (row,) = found["conditions"]
    excess = section["stability"]["scores"]["mcc_alive"]["excess"]
    lines = [
        "# Confirmation of the candidate",
        "",
        f"**{row['condition']}** of {results['subject']}, {found['hook_name']}: trained again with seeds "
        f"{', '.join(map(str, row['seeds']))}, that no study used. Stability: {row['outcome']}"
        f"{', still moving at the end of training' if row['converged'] is False else ''}.",
        "",
        *table(
            ["figure", "95 % interval"],
            [
                ["L0", interval(row["l0"])],
                ["held-out explained variance", interval(row["explained_variance"])],
                ["CE loss score", interval(row["ce_loss_score"])],
                ["`mcc_alive`", interval(row["mcc_alive"])],
                *([f"excess over {null}", interval(e, "+")] for null, e in excess.items()),
                [f"`{found['saebench']['probing']}` AUC, k = 5", interval(row["saebench"])],
                ["− matched reference", interval(row["saebench_delta"], "+")],
                [f"contrastive, normalised ({found['cebench']['benchmark']})", interval(row["cebench"])],
                ["− matched reference", interval(row["cebench_delta"], "+")],
            ],
        ),
        "",
        f"Probing data sets, of families that selection did not read: {', '.join(found['saebench']['data_sets'])}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
