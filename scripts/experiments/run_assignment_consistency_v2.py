"""Assignment consistency v2: test whether a pull towards a reference makes independently trained SAEs more similar.

    python scripts/experiments/run_assignment_consistency_v2.py --device cpu
    python scripts/experiments/run_assignment_consistency_v2.py --lambdas 0,0.05,0.2 --fail-on-acceptance-fail
    python scripts/experiments/run_assignment_consistency_v2.py --activation-cache-dir STORE --reference CKPT

Loss: reconstruction + λ · [1 − mean |cos(d_i, r_π(i))|]. r is a frozen reference dictionary. π is the best assignment,
computed again every --assign-every steps. References are never among the scored SAEs. In the earlier study 4 of 10
pairs held the reference, and these pairs made most of the gain.

*own*: every seed has its own reference, trained independently of all others. Only this arm can show that the pull finds
features instead of copying them. Therefore it decides the acceptance: λ is chosen on the selection seeds, and its
paired gain over λ = 0 is measured on fresh seeds with fresh references. *shared*: all seeds have one reference. This
arm is reported for several references, without each reference in turn, and with pairs counted as in the earlier study.
"""

from dataclasses import replace
from pathlib import Path

from husai.evals.flags import EvalParser
from husai.evidence import levels
from husai.runs.cli import DEFAULT_SEEDS, float_list, positive_float, positive_int, prepare, run_main, seed_list
from husai.runs.inputs import by_checkpoint, not_at_all

SEEDS = {
    "reference_seeds": ("7,11,13,17,19", "of the references, one a seed"),
    "confirmation_seeds": ("2024,2025,2026,2027,2028", "fresh ones"),
    "confirmation_reference_seeds": ("3024,3025,3026,3027,3028", "of their references"),
}


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/assignment_consistency_v2")
    p.add_source("blocks.0.hook_resid_post")
    p.add_argument("--lambdas", type=float_list, default="0,0.01,0.05,0.1,0.2", help="default: %(default)s")
    p.add_argument("--assign-every", type=positive_int, default=50, help="steps (default: %(default)s)")
    p.add_argument(
        "--seeds", type=seed_list, default=DEFAULT_SEEDS, help="seeds of the selection (default: %(default)s)"
    )
    for name, (default, text) in SEEDS.items():
        flag = f"--{name.replace('_', '-')}"
        p.add_argument(flag, type=seed_list, default=default, help=f"{text} (default: %(default)s)")
    p.add_argument(
        "--shared-references", type=positive_int, default=3, help="references of the shared arm (default: %(default)s)"
    )
    p.add_argument(
        "--reference", type=Path, counts=by_checkpoint, help="a checkpoint that the shared arm takes in their place"
    )
    p.add_argument(
        "--max-ev-drop",
        type=positive_float,
        default=levels.MAX_EV_LOST,
        help="largest loss of held-out explained variance (default: %(default)s)",
    )
    p.add_argument(
        "--fail-on-acceptance-fail",
        action="store_true",
        counts=not_at_all,
        help="exit 1 where the acceptance does not hold",
    )
    p.add_argument("--k", type=positive_int, default=8, help="active features a row (default: %(default)s)")
    p.add_recipe(d_sae=256, tokens=200_000, batch_size=512)
    args = p.parse_phase()
    p.refuse_overlap(**{name: getattr(args, name) for name in ("seeds", *SEEDS)})
    if min(len(args.seeds), len(args.confirmation_seeds)) < 3:
        p.error(
            "--seeds, --confirmation-seeds: at least 3 expected: two seeds give no interval to choose or confirm by"
        )
    for seeds, references in (("seeds", "reference_seeds"), ("confirmation_seeds", "confirmation_reference_seeds")):
        if len(getattr(args, references)) != len(getattr(args, seeds)):
            p.error(f"--{references.replace('_', '-')}: one for each of --{seeds.replace('_', '-')} expected")
    if 0 not in args.lambdas or len(args.lambdas) < 2:
        p.error("--lambdas: 0, the control, and at least one more expected")
    if args.shared_references > len(args.reference_seeds):
        p.error(f"--shared-references {args.shared_references}: at most the {len(args.reference_seeds)} references")
    if args.k > args.d_sae:
        p.error(f"--k {args.k}: at most --d-sae {args.d_sae} expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import CheckFailed
    from husai.runs.phase import run_phase

    def check(results: dict) -> None:
        if args.fail_on_acceptance_fail and not results["acceptance"]["accepted"]:
            raise CheckFailed(f"assignment consistency: not accepted: {results['acceptance']['reason']}")

    run_phase(args, "assignment_v2", compute, summary, check=check)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Harvest activations, train references and both arms at each λ, choose λ, and confirm it."""
    device = prepare(args.device, args.threads)
    from torch import Tensor

    from husai.activations import source
    from husai.dictionaries import checkpoints
    from husai.dictionaries.foreign import weights_file
    from husai.evidence import contrast, rules
    from husai.evidence.names import ALIVE
    from husai.evidence.schemas import (
        AssignmentConsistency,
        Grid,
        GridMember,
        PulledSection,
        ReferenceSection,
        Section,
        SharedArm,
        UnpulledSection,
        pull,
    )
    from husai.runs.files import sha256_file
    from husai.stability import study
    from husai.stability.matching import partners
    from husai.training.consistency import References
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig

    store = source.of_arguments(args, device)
    recipe = TrainingConfig(tokens=args.tokens, batch_size=args.batch_size)
    decoders: dict[str, Tensor] = {}  # sha256 of a reference's checkpoint -> W_dec

    def train(grid: list) -> Grid:
        pull = References(decoders, partners, args.assign_every)
        return train_or_find(cells, store, grid, recipe, device, args.threads, references=pull)

    def plain(seeds: list[int]) -> list:
        return members(seeds, [args.d_sae], [args.k], [args.learning_rate])

    def pulled(seeds: list[int], weight: float, names: list[str]) -> list:
        return [replace(m, assignment_weight=weight, reference=n) for m, n in zip(plain(seeds), names, strict=True)]

    # ----------------------------------------------------------------------------------------------------------------
    # References: trained by the same recipe on separate seeds, and never scored

    references = train(plain([*args.reference_seeds, *args.confirmation_reference_seeds])).members
    for r in references:
        decoders[r.checkpoint_sha256] = checkpoints.load(args.output_dir / r.checkpoint).W_dec
    own_references = [r.checkpoint_sha256 for r in references[: len(args.seeds)]]
    own_fresh = [r.checkpoint_sha256 for r in references[len(args.seeds) :]]
    shared = own_references[: args.shared_references]
    if args.reference:
        name = sha256_file(weights_file(args.reference))
        seeds = [*args.seeds, *args.confirmation_seeds]
        decoders[name] = study.reference_decoder(args.reference, store, args.d_sae, seeds)
        shared = [name]

    # ----------------------------------------------------------------------------------------------------------------
    # Selection seeds: own references and shared ones, at every λ, in one pass

    lambdas = sorted(args.lambdas)[1:]
    arms: dict[tuple[str, float, str | None], list] = {("control", 0.0, None): plain(args.seeds)}
    arms |= {("own", weight, None): pulled(args.seeds, weight, own_references) for weight in lambdas}
    arms |= {("shared", w, name): pulled(args.seeds, w, [name] * len(args.seeds)) for w in lambdas for name in shared}
    # A shared reference is also the own reference of a seed.
    grid = list(dict.fromkeys(m for arm in arms.values() for m in arm))
    selection = train(grid)
    sae_of = dict(zip(grid, selection.members, strict=True))

    def score(saes: list[GridMember]) -> Section:
        steps = selection.snapshot_steps  # the confirmation has the same number of rows
        return study.score_trained(cells, store, saes, steps, args.null_draws, args.threads, scores=ALIVE)[0]

    scored = {key: score([sae_of[m] for m in arm]) for key, arm in arms.items()}
    control = scored["control", 0.0, None]

    def pulled_section(section: Section, control: Section, weight: float) -> PulledSection:
        gain, drop = contrast.gain([section], [control]), contrast.drop(section, control)
        return PulledSection(gain=gain, ev_drop=drop, **pull(weight), **dict(section))

    # Apparent gain if the reference counted as one of the SAEs, as in the earlier study.
    def counting(section: Section, name: str) -> float:
        return study.mcc_with_reference(args.output_dir, section, decoders[name])

    control_counting = {name: counting(control, name) for name in shared}
    arm_own = [pulled_section(scored["own", weight, None], control, weight) for weight in lambdas]
    arm_shared = []
    for weight in lambdas:
        each = {name: pulled_section(scored["shared", weight, name], control, weight) for name in shared}
        counted = [counting(section, name) - control_counting[name] for name, section in each.items()]
        mean, left_out = contrast.gain_and_left_out(list(each.values()), control)
        arm_shared.append(
            SharedArm(
                **pull(weight),
                gain=mean,
                leave_one_reference_out=left_out,
                gain_counting_the_reference=sum(counted) / len(counted),
                references=[ReferenceSection(sha256=name, **section.given()) for name, section in each.items()],
            )
        )

    # ----------------------------------------------------------------------------------------------------------------
    # The λ with the highest lower end of gain among those that keep explained variance, on fresh seeds and references

    chosen = rules.choose_weight(arm_own, args.max_ev_drop)
    confirmation: list[UnpulledSection | PulledSection] = []
    gain = drop = None
    if chosen is not None:
        fresh = args.confirmation_seeds
        saes = train([*plain(fresh), *pulled(fresh, chosen, own_fresh)]).members
        base, section = score(saes[: len(fresh)]), score(saes[len(fresh) :])
        confirmed = pulled_section(section, base, chosen)
        confirmation = [UnpulledSection(**pull(0.0), **dict(base)), confirmed]
        gain, drop = confirmed.gain, confirmed.ev_drop

    trained = [m for section in (*scored.values(), *confirmation) for m in section.members]
    results = AssignmentConsistency(
        phase="assignment_consistency_v2",
        inputs={
            "activation store": store.digest,
            "subject": store.manifest.subject_digest,
            **{f"reference {i}": name for i, name in enumerate(decoders)},
            **{f"checkpoint {m.checkpoint.split('/')[-1]}": m.checkpoint_sha256 for m in trained},
        },
        hook_name=store.manifest.hook_name,
        d_sae=args.d_sae,
        k=args.k,
        rows_seen=args.tokens,
        max_ev_drop=args.max_ev_drop,
        acceptance=rules.acceptance(arm_own, gain, drop, len(args.confirmation_seeds), args.max_ev_drop),
        control=control,
        own=arm_own,
        shared=arm_shared,
        confirmation=confirmation,
    )
    folders = [*(m.checkpoint for m in trained), *(r.checkpoint for r in references)]
    return results.to_json(), [*draw(results, args.output_dir), *study.checkpoint_files(cells, folders)]


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results, output_dir: Path) -> list[Path]:
    """The figure and the CSV of pairs."""
    from husai.report.figures import Panel, panels
    from husai.report.text import pair_rows, write_csv

    names = [f"λ {a.weight:g}" for a in results.own]
    gains = {"own references": [a.gain.over_least for a in results.own]}
    gains["shared reference"] = [a.gain.over_least for a in results.shared]
    drops = {"own references": [a.ev_drop for a in results.own]}
    drawn = [
        Panel("Gain over λ = 0, selection seeds", "gain of mcc_alive over the least null, paired", "", names, gains),
        Panel("Explained variance lost", "held-out EV lost, paired", "", names, drops),
    ]
    if results.confirmed:
        _, fresh = results.confirmed
        names = ["mcc_alive", *(f"over {null}" for null in fresh.gain.over), "EV lost"]
        figures = [fresh.gain.observed, *fresh.gain.over.values(), fresh.ev_drop]
        title = f"Fresh seeds and references, λ {fresh.weight:g}: {results.acceptance.outcome}"
        drawn.append(Panel(title, "paired gain", "", names, {"": figures}))
    sections = [("control", results.control)]
    sections += [(f"own, lambda {a.weight:g}", a) for a in results.own]
    sections += [(f"shared {i}, lambda {a.weight:g}", r) for a in results.shared for i, r in enumerate(a.references)]
    sections += [(f"confirmation, lambda {a.weight:g}", a) for a in results.confirmation]
    pairs = [row for name, section in sections for row in pair_rows(section, arm=name)]
    return [panels(output_dir / "figures" / "assignment_v2.png", drawn), write_csv(output_dir / "pairs.csv", pairs)]


def summary(results: dict) -> str:
    from husai.evidence.schemas import AssignmentConsistency
    from husai.report.text import GAIN_HEADER, gain_cells, gain_sentence, interval, strata, table

    phase = AssignmentConsistency.model_validate(results)
    accepted = phase.acceptance
    lines = [
        "# Assignment consistency v2",
        "",
        f"**{'Accepted' if accepted.accepted else 'Not accepted'}**: {accepted.reason} ({accepted.rule}).",
        "",
        f"{phase.hook_name}, d_sae {phase.d_sae}, k {phase.k}, {phase.rows_seen} rows each.",
    ]
    if phase.confirmed:
        _, fresh = phase.confirmed
        lines += [
            "",
            f"Confirmation, λ {fresh.weight:g}, fresh seeds, each with a reference of its own: "
            f"{gain_sentence(fresh.gain)}; held-out EV lost {interval(fresh.ev_drop, '+')}.",
        ]
    rows_of_own = [[f"{a.weight:g}", *gain_cells(a.gain), interval(a.ev_drop, "+")] for a in phase.own]
    lines += ["", "## Own references, selection seeds", "", *table(["λ", *GAIN_HEADER, "EV lost"], rows_of_own)]
    shared = [
        [
            f"{a.weight:g}",
            *gain_cells(a.gain),
            ", ".join(f"{g.over_least.estimate:+.4f}" for g in a.leave_one_reference_out) or "one reference",
            f"{a.gain_counting_the_reference:+.4f}",
        ]
        for a in phase.shared
    ]
    lines += ["", "## One reference shared by all seeds: reported, never accepted", ""]
    header = [
        "λ",
        *GAIN_HEADER,
        "over the least null, leaving one reference out",
        "of `mcc_alive` if it were scored too",
    ]
    lines += table(header, shared)
    lines += [
        "",
        "*Gain*: against λ = 0, the same seeds in both; the shared arm's is the mean over references, its interval "
        "over seeds given these references. Intervals: delete-one-seed jackknife, t(S−1); of EV, t(S−1).",
    ]
    arms = {"λ 0": phase.control} | {f"λ {a.weight:g}": a for a in phase.own}
    arms |= {f"λ {a.weight:g}, fresh seeds": a for a in phase.confirmation}
    lines += ["", *strata(arms)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
