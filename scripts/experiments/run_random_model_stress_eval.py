"""Stress: what does a meaningless subject score? The candidate beside SAEs trained alike on its random-weights control.

    python scripts/experiments/run_random_model_stress_eval.py
    python scripts/experiments/run_random_model_stress_eval.py --candidate CONFIRMED/results.json --output-dir DIR
    python scripts/experiments/run_random_model_stress_eval.py --checkpoint SAES --model-name husai-tiny \\
      --hook-name blocks.1.hook_resid_pre --random-model-checkpoint RANDOM_SAES

The candidate's recipe is trained again, with its seeds, on as many activations of the same model with all weights
redrawn, and on its own activations with their coordinates shuffled across rows. Features that agree from seed to seed
no more than those of a model that has learned nothing say nothing about the model. The rule is in docs/methods.md. SAEs
that were trained elsewhere have no recipe here: `--random-model-checkpoint` gives those of the random-weights model.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import prepare, run_main
from husai.runs.inputs import by_checkpoint


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/random_model_stress")
    p.add_candidate()
    p.add_train_rows()
    p.add_argument(
        "--random-model-checkpoint",
        type=Path,
        counts=by_checkpoint,
        nargs="+",
        default=[],
        help="SAEs trained alike on the random-weights model, in place of training them",
    )
    p.add_null_draws()
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "random_model_stress", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """The candidate -> SAEs of both meaningless subjects -> all of them scored, pair by pair."""
    device = prepare(args.device, args.threads)
    from husai.evals import candidate, random_model
    from husai.evidence import random_model as rule
    from husai.evidence.schemas import RandomModelStress

    tested = candidate.find(args, device)
    store, control, shuffled = controls(args, cells, device, tested)
    section, drawn = random_model.section_of(cells, tested, store, control, shuffled, args.null_draws, args.threads)
    meaningless = random_model.control_of(cells, control, section.stability.labels, args.null_draws, args.threads)

    results = RandomModelStress(
        phase="random_model_stress",
        inputs=tested.inputs() | rule.inputs(store.digest, meaningless, shuffled and shuffled.alike),
        subject=tested.subject.name,
        candidate=tested.group,
        random_model=meaningless,
        shuffled=shuffled and shuffled.alike,
        section=section,
        gain=rule.gain(section, meaningless),
        verdict=rule.verdict(section, meaningless),
    )
    return results.to_json(), draw(section, drawn, args.output_dir)


def controls(args, cells, device, tested) -> tuple:
    """(whose principal components the spectral null is drawn in; SAEs of the random-weights model; SAEs of shuffled
    coordinates, None where the user supplies the first)."""
    from husai.evals import random_model
    from husai.runs.errors import BadInput

    machine = device, args.threads
    if paths := args.random_model_checkpoint:
        return tested.store, random_model.supplied_arm(tested, paths, args.artifact_root, args.rows, *machine), None
    if tested.made is None:
        raise BadInput(
            f"checkpoint: {tested.saes[0].label} does not say how it was trained; --random-model-checkpoint expected, "
            "SAEs trained alike on the random-weights model"
        )
    return random_model.trained_arms(cells, tested, args.artifact_root, args.train_rows, *machine)


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(section, drawn, output_dir: Path) -> list[Path]:
    from husai.report import figures
    from husai.report.text import pair_rows, write_csv

    excess = section.stability.scores["mcc_alive"].excess
    names = [figures.NAMES.get(null, null) for null in excess]
    panel = figures.Panel("The candidate's excess", "excess of mcc_alive", "", names, {"over": [*excess.values()]})
    return [
        figures.matches(section, drawn, output_dir / "figures" / "matches.png"),
        figures.panels(output_dir / "figures" / "excess.png", [panel]),
        write_csv(output_dir / "pairs.csv", pair_rows(section)),
    ]


def summary(results: dict) -> str:
    from husai.evidence import contrast
    from husai.evidence.schemas import Alike, OwnSection, RandomModelStress
    from husai.report.text import gain_sentence, interval, table

    found = RandomModelStress.model_validate(results)
    section, verdict = found.section, found.verdict
    scores = section.stability.scores
    excess = scores["mcc_alive"].excess["random_model"]
    lines = [
        "# Stress: a meaningless subject",
        "",
        f"**{verdict['outcome']}**: {verdict['reason']}. Excess of `mcc_alive`: {interval(excess, '+')}.",
        "",
        f"{found.candidate.condition}, {len(section.members)} SAEs of {found.subject} at "
        f"{section.hook_name}; intervals: 95 %, delete-one-seed jackknife over seeds.",
        "",
    ]
    rows = []
    for name in ("mcc_alive", "share70_alive"):
        score = scores[name]
        for null, value in score.nulls.items():
            over = interval(score.excess[null], "+")
            rows.append([f"`{name}`", interval(score.observed), null, f"{value.mean:.4f}", over])
    lines += table(["score", "candidate", "against", "its mean", "excess"], rows)

    arms: dict[str, OwnSection | Alike | None] = {"the candidate": section}
    arms |= {"the random-weights model": found.random_model, "shuffled coordinates": found.shuffled}
    figures = ("explained_variance", "l0", "dead_share")
    rows = [[name, *(interval(contrast.heldout(arm, f)) for f in figures)] for name, arm in arms.items() if arm]
    lines += ["", *table(["SAEs of", "held-out explained variance", "L0", "dead features"], rows), ""]
    if found.gain:
        lines += [
            f"Beyond the nulls of each subject's own activations (reported; the rule does not read it): "
            f"{gain_sentence(found.gain)}.",
            "",
        ]
    lines += [f"Not computed: {null} ({why})." for null, why in section.stability.missing_nulls.items()]
    lines += [
        "The random-weights model keeps the mean and variance of each weight matrix and nothing that was learned. "
        "Shuffled coordinates keep each coordinate's distribution and lose their relations; they decide nothing here.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
