"""Adaptive L0: find the sparsity k with the most reproducible features, and confirm it on fresh seeds.

    python scripts/experiments/run_adaptive_l0_calibration.py
    python scripts/experiments/run_adaptive_l0_calibration.py --k-candidates 32
    python scripts/experiments/run_adaptive_l0_calibration.py --activation-cache-dir STORE --d-sae 1024 --ev-floor 0.7

Every candidate k is trained on the selection seeds. A candidate qualifies if the interval of its held-out explained
variance lies above the floor. The chosen k has the highest lower end of excess stability, where the lowest end over the
required nulls counts. The chosen k is then compared with the control k on fresh seeds, with the same seeds and number
of rows on both sides and a paired interval. A single candidate that is the control runs alone.
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
    p.add_argument(
        "--seeds", type=seed_list, default=DEFAULT_SEEDS, help="seeds of the selection (default: %(default)s)"
    )
    p.add_argument(
        "--confirmation-seeds",
        type=seed_list,
        default="2024,2025,2026,2027,2028",
        help="fresh seeds of the confirmation (default: %(default)s)",
    )
    p.add_argument(
        "--ev-floor", type=fraction, default=0.9, help="least held-out explained variance (default: %(default)s)"
    )
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
    """Harvest activations, train the candidates on selection seeds, choose, and confirm on fresh seeds."""
    device = prepare(args.device, args.threads)
    from husai.activations import source
    from husai.evidence import contrast, rules
    from husai.evidence.names import ALIVE
    from husai.evidence.schemas import AdaptiveL0, SparsitySection
    from husai.stability import study
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig

    store = source.of_arguments(args, device)
    recipe = TrainingConfig(tokens=args.tokens, batch_size=args.batch_size)

    def arms(ks: list[int], seeds: list[int]) -> dict[int, SparsitySection]:
        """k -> its section. All SAEs are trained in one pass."""
        grid = members(seeds, [args.d_sae], ks, [args.learning_rate])
        trained = train_or_find(cells, store, grid, recipe, device, args.threads)
        sections = {}
        for k in ks:
            members_of_k = [m for m in trained.members if m.k == k]
            steps = trained.snapshot_steps
            section, _ = study.score_trained(
                cells, store, members_of_k, steps, args.null_draws, args.threads, scores=ALIVE
            )
            lower, ev = contrast.lower_bound(section), contrast.heldout(section)
            sections[k] = SparsitySection(k=k, lower_bound=lower, explained_variance=ev, **dict(section))
        return sections

    # ----------------------------------------------------------------------------------------------------------------
    # Selection: the highest lower end of excess above the floor; ties go to the sparser k

    candidates = arms(args.k_candidates, args.seeds)
    chosen = rules.choose_k(list(candidates.values()), args.ev_floor)

    # ----------------------------------------------------------------------------------------------------------------
    # Confirmation on fresh seeds, against the control

    confirmed: dict[int, SparsitySection] = {}
    gain = drop = None
    if chosen is not None:
        confirmed = arms(list(dict.fromkeys([chosen, args.control_k])), args.confirmation_seeds)
    if chosen is not None and len(confirmed) == 2:
        gain = contrast.gain([confirmed[chosen]], [confirmed[args.control_k]])
        drop = contrast.drop(confirmed[chosen], confirmed[args.control_k])
    outcome = rules.sparsity_outcome(chosen, gain, len(args.confirmation_seeds))

    sections_by_stage = {"selection": list(candidates.values()), "confirmation": list(confirmed.values())}
    trained = [(stage, s.k, m) for stage, sections in sections_by_stage.items() for s in sections for m in s.members]
    results = AdaptiveL0(
        phase="adaptive_l0_calibration",
        inputs={
            "activation store": store.digest,
            "subject": store.manifest.subject_digest,
            **{f"checkpoint {stage}, k {k}, seed {m.seed}": m.checkpoint_sha256 for stage, k, m in trained},
        },
        hook_name=store.manifest.hook_name,
        d_sae=args.d_sae,
        rows_seen=args.tokens,
        ev_floor=args.ev_floor,
        control_k=args.control_k,
        chosen_k=chosen,
        gain=gain,
        ev_drop=drop,
        outcome=outcome,
        **sections_by_stage,
    )
    files = study.checkpoint_files(cells, [m.checkpoint for _, _, m in trained])
    return results.to_json(), [*draw(results, args.output_dir), *files]


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results, output_dir: Path) -> list[Path]:
    """The figure and the CSV of pairs."""
    from husai.report.figures import Panel, panels
    from husai.report.text import pair_rows, write_csv

    candidates = sorted(results.selection, key=lambda s: s.k)
    ks = [s.k for s in candidates]
    label = "k, active features a row"
    series = {"excess over the highest null": [s.stability.verdict.claimable_excess for s in candidates]}
    unfinished = {next(iter(series)): [s.convergence.converged is False for s in candidates]}
    floor = {"estimate": results.ev_floor, "low": None, "high": None}
    ev = {"held-out": [s.explained_variance for s in candidates], "floor": [floor] * len(ks)}
    drawn = [
        Panel(f"Selection: k {results.chosen_k} chosen", label, "excess of mcc_alive", ks, series, unfinished),
        Panel("Held-out explained variance", label, "explained variance", ks, ev),
    ]
    if results.gain is not None:
        names = [f"k {s.k}" for s in results.confirmation]
        excess = [s.stability.verdict.claimable_excess for s in results.confirmation]
        for null, over in results.gain.over.items():
            names.append(f"k {results.chosen_k} − k {results.control_k}, over {null}")
            excess.append(over)
        title = f"Fresh seeds: {results.outcome}"
        drawn.append(Panel(title, "excess of mcc_alive; below, paired gain", "", names, {"excess": excess}))
    stages = {"selection": results.selection, "confirmation": results.confirmation}
    pairs = [row for stage, sections in stages.items() for s in sections for row in pair_rows(s, stage=stage, k=s.k)]
    return [panels(output_dir / "figures" / "adaptive_l0.png", drawn), write_csv(output_dir / "pairs.csv", pairs)]


def summary(results: dict) -> str:
    from husai.evidence.schemas import AdaptiveL0, SparsitySection
    from husai.report.text import at_rest, gain_sentence, interval, strata, table

    phase = AdaptiveL0.model_validate(results)

    def cells(s: SparsitySection) -> list:
        lower, verdict = "none" if s.lower_bound is None else f"{s.lower_bound:+.4f}", s.stability.verdict
        excess = f"{interval(verdict.claimable_excess, '+')} ({verdict.highest_null})"
        return [s.k, interval(s.explained_variance), excess, lower, at_rest(s)]

    header = ["k", "held-out EV", "excess over the highest required null", "surest excess", "at rest"]
    if phase.chosen_k is None:
        outcome = f"**No candidate** keeps the held-out explained variance surely above {phase.ev_floor}."
    elif phase.gain is None or phase.ev_drop is None:
        outcome = f"k {phase.chosen_k} runs alone: {phase.outcome}."
    else:
        outcome = (
            f"**k {phase.chosen_k} against k {phase.control_k} on fresh seeds: {phase.outcome}**; "
            f"{gain_sentence(phase.gain)}; held-out EV lost {interval(phase.ev_drop, '+')}."
        )
    lines = [
        "# Adaptive L0",
        "",
        outcome,
        "",
        f"{phase.hook_name}, d_sae {phase.d_sae}, {phase.rows_seen} rows seen by each SAE; floor of the held-out "
        f"explained variance {phase.ev_floor}.",
        "",
        "## Selection",
        "",
        *table(header, [cells(s) for s in phase.selection]),
    ]
    if phase.confirmation:
        lines += ["", "## Confirmation, fresh seeds", "", *table(header, [cells(s) for s in phase.confirmation])]
    lines += [
        "",
        "*Surest excess*: the least lower end of the intervals of the excess of `mcc_alive` over the required nulls; "
        "the chosen k has the largest. Intervals: delete-one-seed jackknife, t(S−1).",
    ]
    arms = {f"k {s.k}": s for s in phase.selection} | {f"k {s.k}, fresh seeds": s for s in phase.confirmation}
    lines += ["", *strata(arms)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
