"""Adaptive L0: which sparsity k gives the most reproducible features, and does that hold on fresh seeds?

    python scripts/experiments/run_adaptive_l0_calibration.py
    python scripts/experiments/run_adaptive_l0_calibration.py --k-candidates 32
    python scripts/experiments/run_adaptive_l0_calibration.py --activation-cache-dir STORE --d-sae 1024 --ev-floor 0.7

Every candidate k is trained on the selection seeds. Chosen is the one whose excess stability is surest (the least lower
end of its intervals over the required nulls) among those whose held-out explained variance is surely above the floor.
What was chosen by looking is then tried on seeds that had no part in the choice: against the control k, the same seeds
and the same number of rows in both, with a paired interval. A single candidate that is the control runs it alone.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import DEFAULT_SEEDS, fraction, int_list, positive_int, prepare, run_main, seed_list


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/adaptive_l0_calibration")
    p.add_source("blocks.0.hook_resid_post")
    p.add_argument("--k-candidates", type=int_list, default="4,8,12,16,24,32,48,64", help="default: %(default)s")
    p.add_argument("--control-k", type=positive_int, default=32, help="default: %(default)s")
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="of the selection (default: %(default)s)")
    p.add_argument(
        "--confirmation-seeds",
        type=seed_list,
        default="2024,2025,2026,2027,2028",
        help="fresh ones (default: %(default)s)",
    )
    p.add_argument("--ev-floor", type=fraction, default=0.9, help="held-out (default: %(default)s)")
    p.add_recipe(d_sae=256, tokens=300_000, batch_size=512)
    args = p.parse_phase()
    for flag, seeds in (("seeds", args.seeds), ("confirmation-seeds", args.confirmation_seeds)):
        if len(seeds) < 3:
            p.error(f"--{flag}: at least 3 expected: two seeds give no interval to choose or confirm by")
    p.refuse_overlap(seeds=args.seeds, confirmation_seeds=args.confirmation_seeds)
    for k in (*args.k_candidates, args.control_k):
        if k > args.d_sae:
            p.error(f"k {k}: at most --d-sae {args.d_sae} expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import CheckFailed
    from husai.runs.phase import run_phase

    def check(results: dict) -> None:
        if results["chosen_k"] is None:
            raise CheckFailed(f"adaptive L0: no candidate keeps the held-out explained variance above {args.ev_floor}")

    run_phase(args, "adaptive_l0", compute, summary, check=check)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Subject -> activations -> candidates on selection seeds -> choice -> confirmation on fresh seeds."""
    device = prepare(args.device, args.threads)
    from husai.activations import source
    from husai.evidence import contrast, rules
    from husai.evidence.names import ALIVE
    from husai.stability import study
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig

    store = source.of_arguments(args, device)
    recipe = TrainingConfig(tokens=args.tokens, batch_size=args.batch_size)

    def arms(ks: list[int], seeds: list[int]) -> dict[int, dict]:
        """k -> its section: all of them trained in one pass."""
        grid = members(seeds, [args.d_sae], ks, [args.learning_rate])
        trained = train_or_find(cells, store, grid, recipe, device, args.threads)
        sections = {}
        for k in ks:
            alike = [m for m in trained["members"] if m["k"] == k]
            steps = trained["snapshot_steps"]
            section = study.score_trained(cells, store, alike, steps, args.null_draws, args.threads, scores=ALIVE)
            lower, ev = contrast.lower_bound(section), contrast.heldout(section)
            figures = {"k": k, "lower_bound": lower, "explained_variance": ev.to_json()}
            sections[k] = figures | study.brief(section)
        return sections

    # ----------------------------------------------------------------------------------------------------------------
    # Selection: the surest excess above the floor; ties go to the sparser one

    candidates = arms(args.k_candidates, args.seeds)
    chosen = rules.choose_k(list(candidates.values()), args.ev_floor)

    # ----------------------------------------------------------------------------------------------------------------
    # Confirmation on fresh seeds, against the control

    confirmed, gain, drop, outcome = {}, None, None, "no candidate meets the floor"
    if chosen is not None:
        confirmed = arms(list(dict.fromkeys([chosen, args.control_k])), args.confirmation_seeds)
        outcome = "the chosen k is the control's"
    if chosen is not None and len(confirmed) == 2:
        gain = contrast.gain([confirmed[chosen]], [confirmed[args.control_k]])
        drop = contrast.drop(confirmed[chosen], confirmed[args.control_k]).to_json()
        outcome = rules.gain_verdict(gain, len(args.confirmation_seeds))

    both = {"selection": list(candidates.values()), "confirmation": list(confirmed.values())}
    results = {
        "phase": "adaptive_l0_calibration",
        "inputs": {
            "activation store": store.digest,
            "subject": store.manifest.subject_digest,
            **{
                f"checkpoint {stage}, k {s['k']}, seed {m['seed']}": m["checkpoint_sha256"]
                for stage, sections in both.items()
                for s in sections
                for m in s["members"]
            },
        },
        "hook_name": store.manifest.hook_name,
        "d_sae": args.d_sae,
        "rows_seen": args.tokens,
        "ev_floor": args.ev_floor,
        "control_k": args.control_k,
        "chosen_k": chosen,
        "gain": gain,
        "ev_drop": drop,
        "outcome": outcome,
        **both,
    }
    everything = [*both["selection"], *both["confirmation"]]
    files = draw(results, args.output_dir)
    return results, [*files, *(f for s in everything for f in study.checkpoint_files(cells, s["members"]))]


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(results: dict, output_dir: Path) -> list[Path]:
    """The figure and the CSV of pairs."""
    from husai.report.figures import Panel, panels
    from husai.report.text import GAINS, pair_rows, write_csv

    candidates = sorted(results["selection"], key=lambda s: s["k"])
    ks = [s["k"] for s in candidates]
    label = "k, active features a row"
    series = {"excess over the highest null": [s["stability"]["verdict"]["claimable_excess"] for s in candidates]}
    unfinished = {next(iter(series)): [s["convergence"]["converged"] is False for s in candidates]}
    ev = {"held-out": [s["explained_variance"] for s in candidates]}
    ev["floor"] = [{"estimate": results["ev_floor"], "low": None, "high": None}] * len(ks)
    drawn = [
        Panel(f"Selection: k {results['chosen_k']} chosen", label, "excess of mcc_alive", ks, series, unfinished),
        Panel("Held-out explained variance", label, "explained variance", ks, ev),
    ]
    if results["gain"] is not None:
        confirmed = results["confirmation"]
        names = [f"k {s['k']}" for s in confirmed]
        excess = [s["stability"]["verdict"]["claimable_excess"] for s in confirmed]
        for null in GAINS[1:]:
            names.append(f"k {results['chosen_k']} − k {results['control_k']}, over {null}")
            excess.append(results["gain"][null])
        title = f"Fresh seeds: {results['outcome']}"
        drawn.append(Panel(title, "excess of mcc_alive; below, paired gain", "", names, {"excess": excess}))
    pairs = [
        row
        for stage in ("selection", "confirmation")
        for s in results[stage]
        for row in pair_rows(s, stage=stage, k=s["k"])
    ]
    return [panels(output_dir / "figures" / "adaptive_l0.png", drawn), write_csv(output_dir / "pairs.csv", pairs)]


def summary(results: dict) -> str:
    from husai.report.text import at_rest, gain_sentence, interval, table

    def cells(s: dict) -> list[str]:
        lower = "none" if s["lower_bound"] is None else f"{s['lower_bound']:+.4f}"
        verdict = s["stability"]["verdict"]
        excess = f"{interval(verdict['claimable_excess'], '+')} ({verdict['highest_null']})"
        return [s["k"], interval(s["explained_variance"]), excess, lower, at_rest(s["convergence"])]

    header = ["k", "held-out EV", "excess over the highest required null", "surest excess", "at rest"]
    chosen, control = results["chosen_k"], results["control_k"]
    if chosen is None:
        outcome = f"**No candidate** keeps the held-out explained variance surely above {results['ev_floor']}."
    elif results["gain"] is None:
        outcome = f"k {chosen} runs alone: {results['outcome']}."
    else:
        outcome = (
            f"**k {chosen} against k {control} on fresh seeds: {results['outcome']}**; "
            f"{gain_sentence(results['gain'])}; held-out EV lost {interval(results['ev_drop'], '+')}."
        )
    lines = [
        "# Adaptive L0",
        "",
        outcome,
        "",
        f"{results['hook_name']}, d_sae {results['d_sae']}, {results['rows_seen']} rows seen by each SAE; floor of the "
        f"held-out explained variance {results['ev_floor']}.",
        "",
        "## Selection",
        "",
        *table(header, [cells(s) for s in results["selection"]]),
    ]
    if results["confirmation"]:
        lines += ["", "## Confirmation, fresh seeds", "", *table(header, [cells(s) for s in results["confirmation"]])]
    lines += [
        "",
        "*Surest excess*: the least lower end of the intervals of the excess of `mcc_alive` over the required nulls; "
        "the chosen k has the largest. Intervals: delete-one-seed jackknife, t(S−1).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
