"""Stress: another objective. Are transcoders of an MLP as reproducible as SAEs of its output?

    python scripts/experiments/run_transcoder_stress_eval.py
    python scripts/experiments/run_transcoder_stress_eval.py --candidate CONFIRMED/results.json --output-dir DIR
    python scripts/experiments/run_transcoder_stress_eval.py --checkpoint SAES --model-name husai-tiny \\
      --hook-name blocks.1.hook_resid_pre

Transcoders (what the MLP reads -> what it writes) and BatchTopK SAEs of what it writes, at one width, sparsity, budget
and the same seeds; decoder rows of both lie in the MLP's output and are held against nulls there. With a candidate: the
MLP of its block, at its settings; else that of the modular-addition transformer, at 256 features, k 8 and 1,000,000
rows. That one setting is judged (docs/methods.md, Rules); another, by `--d-sae`, `--k`, `--tokens` or `--seeds`, is
reported and decides nothing.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import positive_int, prepare, run_main, seed_list


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/transcoder_stress")
    p.add_candidate()
    p.set_defaults(subject=None)
    p.add_argument("--d-sae", type=positive_int, help="features (default: as judged)")
    p.add_argument("--k", type=positive_int, help="active features a row (default: as judged)")
    p.add_argument("--tokens", type=positive_int, help="rows each sees (default: as judged)")
    p.add_argument("--seeds", type=seed_list, help="default: as judged")
    p.add_train_rows()
    p.add_null_draws()
    args = p.parse_benchmark()
    if args.seeds and len(args.seeds) < 2:
        p.error(f"--seeds {args.seeds[0]}: one seed says nothing about stability; at least 2 expected, 5 for a verdict")
    return args


def main() -> None:
    args = parse()
    from husai.evals.inputs import run_stress

    run_stress(args, "transcoder_stress", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """What the MLP reads and writes -> transcoders and SAEs -> the paired gain."""
    device = prepare(args.device, args.threads)
    from husai.evals import transcoder
    from husai.evidence.schemas import TranscoderStress
    from husai.evidence.transcoder import concluded

    tested, task = task_of(args, device)
    arms = transcoder.sections(cells, task, args.null_draws, device, args.threads)
    sections = {arm: section for arm, (section, _) in arms.items()}
    inputs = tested.inputs() if tested else {"subject": task.setting.subject_digest}
    inputs |= {"MLP input": task.read.digest, "MLP output": task.written.digest}
    inputs |= {f"{arm} {m.label}": m.checkpoint_sha256 for arm, section in sections.items() for m in section.members}
    stress = TranscoderStress(
        phase="transcoder_stress",
        inputs=inputs,
        subject=task.read.manifest.subject,
        candidate=tested and tested.group,
        setting=task.setting,
        **sections,
        gain=None,
        explained_variance={},
        verdict={},
    )
    results = concluded(stress)
    return results.to_json(), draw(results, arms, args.output_dir)


def task_of(args, device) -> tuple:
    """(the candidate or None, what is trained): of the candidate, or of modular addition where none is named."""
    from husai.evals import candidate, transcoder
    from husai.runs.errors import BadInput
    from husai.runs.subjects import is_language_model

    overrides = {name: getattr(args, name) for name in ("d_sae", "k", "tokens", "seeds")}
    if not args.candidate and not args.checkpoint:
        if is_language_model(args.subject):
            raise BadInput(
                f"--model-name {args.subject}: a language model goes with --candidate or --checkpoint, whose settings "
                "are taken"
            )
        return None, transcoder.of_modular_addition(args.subject, overrides, args.artifact_root, device, args.threads)
    args.subject = args.subject or "husai-tiny"
    tested = candidate.find(args, device)
    task = transcoder.of_candidate(tested, overrides, args.artifact_root, args.train_rows, device, args.threads)
    return tested, task


# ---------------------------------------------------------------------------------------------------------------------
# What a reader sees


def draw(results, arms: dict, output_dir: Path) -> list[Path]:
    from husai.evidence.names import GATED_NULLS
    from husai.report import figures
    from husai.report.text import GAINS, pair_rows, write_csv

    folder, names = output_dir / "figures", {"transcoder": "transcoders", "sae": "SAEs of the output"}
    scores = {arm: section.stability.scores["mcc_alive"].excess for arm, (section, _) in arms.items()}
    excess = {name: [scores[arm][null] for null in GATED_NULLS] for arm, name in names.items()}
    over = [f"over {null}" for null in GATED_NULLS]
    gain = {"gain": [getattr(results.gain, name) for name in GAINS]}
    variance = {names[arm]: [e] for arm, e in results.explained_variance.items()}
    panels = [
        figures.Panel("Stability", "excess of mcc_alive", "", over, excess),
        figures.Panel("Gain of transcoders over SAEs", "gain of mcc_alive", "", ["itself", *over], gain),
        figures.Panel("Reconstruction", "held-out explained variance", "", ["MLP output"], variance),
    ]
    rows = [row for arm, (section, _) in arms.items() for row in pair_rows(section, arm=arm)]
    drawn = [
        figures.matches(section, histograms, folder / f"matches_{arm}.png")
        for arm, (section, histograms) in arms.items()
    ]
    return [*drawn, figures.panels(folder / "gain.png", panels), write_csv(output_dir / "pairs.csv", rows)]


def summary(results: dict) -> str:
    from husai.evidence import contrast
    from husai.evidence.names import GATED_NULLS
    from husai.evidence.schemas import TranscoderStress
    from husai.report.text import at_rest, gain_sentence, interval, table

    found = TranscoderStress.model_validate(results)
    s, verdict = found.setting, found.verdict
    assert found.gain is not None  # concluded
    arms = {"transcoders": found.transcoder, "SAEs of the output": found.sae}
    rows = []
    for (name, section), ev in zip(arms.items(), found.explained_variance.values(), strict=True):
        score = section.stability.scores["mcc_alive"]
        rows.append(
            [
                name,
                interval(score.observed),
                *(interval(score.excess[null], "+") for null in GATED_NULLS),
                section.stability.verdict.outcome,
                at_rest(section),
                interval(ev),
                *(interval(contrast.heldout(section, figure)) for figure in ("l0", "dead_share")),
            ]
        )
    header = ["", "`mcc_alive`", "excess over isotropic", "over untrained", "over spectral", "outcome", "at rest"]
    header += ["explained variance of the MLP's output", "L0", "dead features"]
    about = "the setting fixed in advance" if s.preregistered else "a setting of your own, which decides nothing"
    of = found.candidate.condition if found.candidate else "no candidate; modular addition"
    return "\n".join(
        [
            "# Stress: another objective",
            "",
            f"**{verdict['outcome']}**: {verdict['reason']}. Transcoders less SAEs: {gain_sentence(found.gain)}.",
            "",
            f"{of}: {s.hook_in} → {s.hook_out} of {found.subject}, d_sae {s.d_sae}, k {s.k}, "
            f"{s.tokens} rows each, {len(s.seeds)} seeds: {about}. Intervals: 95 %; delete-one-seed jackknife, "
            "of held-out figures t over seeds.",
            "",
            *table(header, rows),
            "",
            "SAEs read what they reconstruct, transcoders have to compute it: what each explains is no contest. Both "
            "are scored by decoder rows in the MLP's output, against nulls drawn there.",
            "",
        ]
    )


if __name__ == "__main__":
    run_main(main)
