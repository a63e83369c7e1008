"""Stress test: compare the candidate with SAEs of the same recipe on its random-weights control.

    python scripts/experiments/run_random_model_stress_eval.py
    python scripts/experiments/run_random_model_stress_eval.py --candidate CONFIRMED/results.json --output-dir DIR
    python scripts/experiments/run_random_model_stress_eval.py --checkpoint SAES --model-name husai-tiny \\
      --hook-name blocks.1.hook_resid_pre --random-model-checkpoint RANDOM_SAES_0 RANDOM_SAES_1 RANDOM_SAES_2

The candidate's recipe is trained again, with its seeds, on equally many activations of the same model with redrawn
weights, in three draws. Each draw has its own SAEs of Gaussian rows with the same mean and covariance. If features
agree between seeds no more than those of a random-weights model, they are no evidence about the model. The rule is in
docs/methods.md. The recipe of SAEs from other libraries is unknown. For these, `--random-model-checkpoint` names SAEs
of the random-weights model, as many for each of the draws 0, 1 and 2 as --checkpoint names.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evals.inputs import by_named_checkpoint
from husai.runs.cli import prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/random_model_stress")
    p.add_candidate()
    p.add_untrained()
    p.add_train_rows()
    p.add_argument(
        "--random-model-checkpoint",
        type=Path,
        counts=by_named_checkpoint,
        nargs="+",
        default=[],
        help="SAEs trained alike on draws 0, 1 and 2 of the random weights, in place of training them",
    )
    p.add_null_draws()
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "random_model_stress", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Open the candidate, train or open SAEs of each draw of the random weights, and score all pairs."""
    device = prepare(args.device, args.threads)
    from husai.evals import candidate, random_model
    from husai.evidence import random_model as rule
    from husai.evidence.schemas import RandomModelStress

    tested = candidate.find(args, device)
    machine = device, args.threads
    refuse_unknown_recipe(args, tested)
    store = random_model.own_store(tested, args.artifact_root, args.train_rows, *machine)
    if paths := args.random_model_checkpoint:
        sizes = args.artifact_root, args.rows, args.train_rows
        draws = random_model.supplied_draws(tested, paths, *sizes, *machine)
    else:
        draws = random_model.trained_draws(tested, store, args.artifact_root, *machine)
    section, drawn = random_model.section_of(tested, store, args.artifact_root, args.null_draws, *machine)
    labels = section.stability.labels
    controls = [random_model.control_of(cells, draw, labels, args.null_draws, args.threads) for draw in draws]
    results = RandomModelStress(
        phase="random_model_stress",
        inputs=tested.inputs() | tested.untrained_inputs() | rule.inputs(section, controls),
        subject=tested.subject.name,
        candidate=tested.group,
        section=section,
        random_models=controls,
        gains=rule.gains(section, controls),
        verdict=rule.verdict(section, controls),
        **tested.source.record(),
    )
    return results.to_json(), draw(results, drawn, args.output_dir)


def refuse_unknown_recipe(args, tested) -> None:
    """Raise BadInput if controls can neither be trained nor are given."""
    from husai.runs.errors import BadInput

    if tested.training_metadata is None and not args.random_model_checkpoint:
        raise BadInput(
            f"checkpoint: {tested.saes[0].label} does not say how it was trained; --random-model-checkpoint expected, "
            "SAEs trained alike on draws 0, 1 and 2 of the random weights"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results, drawn, output_dir: Path) -> list[Path]:
    from husai.evidence import random_model as rule
    from husai.evidence.names import GATED_NULLS
    from husai.report import figures
    from husai.report.text import GAINS, pair_rows, write_csv

    names = rule.draw_names(results.section, results.random_models)
    arms = {"candidate": results.section} | dict(zip(names, results.random_models, strict=True))
    excess = {name: arm.stability.scores["mcc_alive"].excess for name, arm in arms.items()}
    over = [f"over {null}" for null in GATED_NULLS]
    panels = [
        figures.Panel(
            "Excess over each null",
            "excess of mcc_alive",
            "",
            over,
            {name: [estimates[null] for null in GATED_NULLS] for name, estimates in excess.items()},
        ),
        figures.Panel(
            "Gain of the candidate over each draw",
            "gain of mcc_alive",
            "",
            ["itself", *over],
            {
                name: [getattr(gain, estimates) for estimates in GAINS]
                for name, gain in zip(names, results.gains, strict=True)
            },
        ),
    ]
    rows = [row for name, arm in arms.items() for row in pair_rows(arm, arm=name)]
    return [
        figures.matches(results.section, drawn, output_dir / "figures" / "matches.png"),
        figures.panels(output_dir / "figures" / "excess.png", panels),
        write_csv(output_dir / "pairs.csv", rows),
    ]


def summary(results: dict) -> str:
    from husai.evidence import contrast, random_model
    from husai.evidence.names import GATED_NULLS
    from husai.evidence.schemas import Control, OwnSection, RandomModelStress
    from husai.report.text import GAINS, interval, stand_in, strata, table

    stress = RandomModelStress.model_validate(results)
    section, verdict = stress.section, stress.verdict
    lines = [
        "# Stress: a meaningless subject",
        "",
        f"**{verdict['outcome']}**: {verdict['reason']}.",
        "",
        f"{stress.candidate.condition}, {len(section.members)} SAEs of {stress.subject} at "
        f"{section.hook_name}; intervals: 95 %, delete-one-seed jackknife over seeds.",
        "",
        "Gain of the candidate over SAEs trained alike on each draw of the random weights, of `mcc_alive` and of its "
        "excess over each null of the own activations:",
        "",
    ]
    header = ["draw", "`mcc_alive` itself", *(f"excess over {null}" for null in GATED_NULLS)]
    names = random_model.draw_names(section, stress.random_models)
    gains = dict(zip(names, stress.gains, strict=True))
    rows = [[name, *(interval(getattr(gain, n), "+") for n in GAINS)] for name, gain in gains.items()]
    lines += [*table(header, rows), ""]

    arms: dict[str, OwnSection | Control] = {"the candidate": section}
    arms |= dict(zip(names, stress.random_models, strict=True))
    rows = []
    for name, arm in arms.items():
        score = arm.stability.scores["mcc_alive"]
        excess = [interval(score.excess[null], "+") for null in GATED_NULLS]
        heldout = [interval(contrast.heldout(arm, f)) for f in ("explained_variance", "l0", "dead_share")]
        rows.append([name, interval(score.observed), *excess, *heldout])
    header = ["SAEs of", "`mcc_alive`", *(f"excess over {null}" for null in GATED_NULLS)]
    lines += [*table([*header, "held-out explained variance", "L0", "dead features"], rows), ""]
    lines += [*strata(arms), ""]
    lines += [
        "A random-weights model keeps the mean and variance of each weight matrix and nothing that was learned. Each "
        "null is drawn in the activations of its own subject; `gaussian` are SAEs trained alike on Gaussian rows with "
        "the same mean and covariance.",
        "",
    ]
    return "\n".join([*lines, *stand_in(results)])


if __name__ == "__main__":
    run_main(main)
