"""Stress test: check whether transcoders, which have another objective, find the candidate's features.

    python scripts/experiments/run_transcoder_stress_eval.py
    python scripts/experiments/run_transcoder_stress_eval.py --candidate CONFIRMED/results.json --output-dir DIR
    python scripts/experiments/run_transcoder_stress_eval.py --checkpoint SAES --model-name husai-tiny \\
      --hook-name blocks.1.hook_resid_pre

Transcoders reconstruct the candidate's hook from the hook of the same kind one block earlier (in the first block, from
its input), at the candidate's width, sparsity, budget and seeds. The SAE of each seed is scored against the transcoders
of the other seeds, with the same nulls as between SAEs. Only this setting is judged (docs/methods.md, Rules). Another
setting, by `--d-sae`, `--k` or `--tokens`, is reported and decides nothing.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import positive_int, prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/transcoder_stress")
    p.add_candidate()
    p.add_untrained()
    p.add_argument("--d-sae", type=positive_int, help="number of features (default: as the judged SAEs)")
    p.add_argument("--k", type=positive_int, help="active features a row (default: as the judged SAEs)")
    p.add_argument("--tokens", type=positive_int, help="rows that each transcoder sees (default: as the judged SAEs)")
    p.add_train_rows()
    p.add_null_draws()
    return p.parse_benchmark()


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "transcoder_stress", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Open the candidate, train transcoders, and score them against the candidate."""
    device = prepare(args.device, args.threads)
    from husai.evals import candidate, transcoder
    from husai.evidence import transcoder as rule
    from husai.evidence.schemas import TranscoderStress

    tested = candidate.find(args, device)
    overrides = {name: getattr(args, name) for name in ("d_sae", "k", "tokens")}
    task = transcoder.task_of(tested, overrides, args.artifact_root, args.train_rows, device, args.threads)
    settings = args.artifact_root, args.null_draws, device, args.threads
    section, (transcoders, drawn), across = transcoder.sections(cells, tested, task, *settings)
    stress = TranscoderStress(
        phase="transcoder_stress",
        inputs=tested.inputs() | tested.untrained_inputs() | {"transcoder input": task.read.digest},
        subject=tested.subject.name,
        candidate=tested.group,
        setting=task.setting,
        section=section,
        transcoder=transcoders,
        across=across,
        gain=None,
        explained_variance={},
        verdict={},
        **tested.source.record(),
    )
    stress = stress.model_copy(update={"inputs": stress.inputs | rule.inputs(stress)})
    results = rule.concluded(stress)
    return results.to_json(), draw(results, drawn, args.output_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results, drawn, output_dir: Path) -> list[Path]:
    from husai.evidence.names import GATED_NULLS
    from husai.evidence.rules import CHANCE
    from husai.report import figures
    from husai.report.text import GAINS, pair_rows, write_csv

    folder, arms = output_dir / "figures", arms_of(results)
    scores = {name: arm.stability.scores for name, arm in arms.items()}
    excess = {
        name: [known[score].excess[null] if score in known else None for score, null in CHANCE.values()]
        for name, known in scores.items()
    }
    over = [f"over {null}" for null in GATED_NULLS]
    gain = {"gain": [getattr(results.gain, name) for name in GAINS]}
    variance = {names: [e] for names, e in results.explained_variance.items()}
    panels = [
        figures.Panel(
            "Scores against the nulls", "excess of mcc_alive", "", [f"over {name}" for name in CHANCE], excess
        ),
        figures.Panel("Gain of transcoders over the candidate", "gain of mcc_alive", "", ["itself", *over], gain),
        figures.Panel("Reconstruction", "held-out explained variance", "", ["candidate's hook"], variance),
    ]
    rows = [row for name, arm in arms.items() for row in pair_rows(arm, arm=name)]
    return [
        figures.matches(results.transcoder, drawn, folder / "matches_transcoder.png"),
        figures.panels(folder / "gain.png", panels),
        write_csv(output_dir / "pairs.csv", rows),
    ]


def arms_of(results) -> dict:
    return {
        "candidate against transcoders": results.across,
        "candidate among themselves": results.section,
        "transcoders among themselves": results.transcoder,
    }


def summary(results: dict) -> str:
    from husai.evidence import contrast, rules
    from husai.evidence.schemas import OwnSection, Section, TranscoderStress
    from husai.report.text import at_rest, gain_sentence, interval, stand_in, strata, table

    stress = TranscoderStress.model_validate(results)
    s, verdict = stress.setting, stress.verdict
    assert stress.gain is not None  # the seeds are the candidate's
    rows = []
    for name, study in arms_of(stress).items():
        scores = study.stability.scores
        excesses = [scores[s].excess[null] if s in scores else None for s, null in rules.CHANCE.values()]
        known = [interval(e, "+") if e else "not computed" for e in excesses]
        rows.append([name, interval(scores["mcc_alive"].observed), *known])
    header = ["", "`mcc_alive`", *(f"excess over {control}" for control in rules.CHANCE)]
    arms: dict[str, OwnSection | Section] = {"candidate": stress.section, "transcoders": stress.transcoder}
    heldout = [
        [name, *(interval(contrast.heldout(arm, f)) for f in ("explained_variance", "l0", "dead_share"))]
        for name, arm in arms.items()
    ]
    origin = "the setting fixed in advance" if s.preregistered else "a setting of your own, which decides nothing"
    return "\n".join(
        [
            "# Stress: another objective",
            "",
            f"**{verdict['outcome']}**: {verdict['reason']}.",
            "",
            f"{stress.candidate.condition} at {s.hook_out} of {stress.subject}; transcoders from {s.hook_in} to it, "
            f"d_sae {s.d_sae}, k {s.k}, {s.tokens} rows each, {len(s.seeds)} seeds: {origin}. Intervals: 95 %; "
            "delete-one-seed jackknife, of held-out figures t over seeds.",
            "",
            *table(header, rows),
            "",
            *table(["", "held-out explained variance", "L0", "dead features"], heldout),
            "",
            "The first line is judged: the SAE of each seed against the transcoders of the other seeds. *Absolute* "
            "means matching by |cos|. Reported beside it: transcoders among themselves less the candidate's SAEs among "
            "themselves, "
            f"{gain_sentence(stress.gain)}. Training of transcoders was at rest: {at_rest(stress.transcoder)}. "
            "SAEs read what they reconstruct, transcoders compute it, "
            "therefore their explained variances are not compared.",
            "",
            *strata(arms_of(stress)),
            "",
            *stand_in(results),
        ]
    )


if __name__ == "__main__":
    run_main(main)
