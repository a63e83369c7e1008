"""Core ablations: measure how stability depends on sparsity, width and training.

    python scripts/experiments/run_core_ablations.py
    python scripts/experiments/run_core_ablations.py --architectures topk,batchtopk --ks 8,16 --d-saes 256,512
    python scripts/experiments/run_core_ablations.py --activation-cache-dir STORE --d-sae 1024 --k 32 --tokens 5000000

There are two axes: k at a fixed width, and width at a fixed k. All conditions have the same seeds and number of rows,
and are scored against their nulls (docs/methods.md). A condition whose stability still changes at the end of training
is marked, because undertrained SAEs resemble chance. The same protocol tests methods that are said to raise stability,
and two controls that share an initialisation or a decoder and must be refused.
"""

from dataclasses import replace
from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import (
    DEFAULT_SEEDS,
    int_list,
    name_list,
    nonnegative_float,
    positive_int,
    prepare,
    run_main,
    seed_list,
)


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/core_ablations")
    p.add_source("blocks.0.hook_resid_post")
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_argument("--architectures", type=name_list, default="topk", help="default: %(default)s")
    p.add_argument(
        "--ks",
        type=int_list,
        default="8,16,32,64",
        help="numbers of active features, at the width --d-sae (default: %(default)s)",
    )
    p.add_argument(
        "--d-saes",
        type=int_list,
        default="64,128,256,512,1024",
        help="numbers of features, at the sparsity --k (default: %(default)s)",
    )
    p.add_argument("--k", type=positive_int, default=8, help="active features a row (default: %(default)s)")
    p.add_recipe(d_sae=256, tokens=300_000, batch_size=512)
    p.add_argument(
        "--weight-decay",
        type=nonnegative_float,
        default=0.01,
        help="value of the method that adds weight decay (default: %(default)s)",
    )
    p.add_argument("--no-methods", action="store_true", help="run the two axes alone")
    args = p.parse_phase()
    for k, d_sae in [*((k, args.d_sae) for k in args.ks), *((args.k, d) for d in args.d_saes)]:
        if k > d_sae:
            p.error(f"k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    if not args.no_methods and (args.k > args.d_sae // 2 or args.batch_size < 4):
        p.error("the methods halve --d-sae and quarter --batch-size: k ≤ d_sae/2 and 4 rows expected, or --no-methods")
    return args


def main() -> None:
    args = parse()
    from husai.runs.errors import CheckFailed
    from husai.runs.phase import run_phase

    def check(results: dict) -> None:
        if passed := [c["name"] for c in results["controls"] if not c["refused"]]:
            raise CheckFailed(f"core ablations: controls that had to be refused were not: {', '.join(passed)}")

    run_phase(args, "core_ablations", compute, summary, check=check)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Harvest activations, train all conditions, and score them; returns the results and the files of the plots."""
    device = prepare(args.device, args.threads)
    from husai.activations import source
    from husai.evidence import contrast
    from husai.evidence.names import ALIVE
    from husai.evidence.schemas import AblationMethod, AblationRow, CoreAblations, Grid, GridMember, RefusedControl
    from husai.runs.errors import BadInput
    from husai.stability import study
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig, check_members

    axes = list(dict.fromkeys([*((args.d_sae, k) for k in args.ks), *((d, args.k) for d in args.d_saes)]))
    recipe = TrainingConfig(tokens=args.tokens, batch_size=args.batch_size)

    def grid(d_sae: int = args.d_sae, k: int = args.k, families=args.architectures[:1], **kwargs) -> list:
        return members(args.seeds, [d_sae], [k], [args.learning_rate], families, **kwargs)

    conditions = [m for d_sae, k in axes for m in grid(d_sae, k, args.architectures)]
    check_members(conditions)
    if any("transcoder" in family for family in args.architectures):
        raise BadInput("--architectures: SAEs of the activations expected; transcoders need a second store")
    store = source.of_arguments(args, device)

    def train(grid: list, settings: TrainingConfig = recipe) -> Grid:
        return train_or_find(cells, store, grid, settings, device, args.threads)

    def scored(saes: list[GridMember], steps: list[int]) -> dict:
        section, _ = study.score_trained(cells, store, saes, steps, args.null_draws, args.threads, scores=ALIVE)
        figures = ("explained_variance", "l0", "dead_share")
        return dict(section) | {name: contrast.heldout(section, name) for name in figures}

    # ----------------------------------------------------------------------------------------------------------------
    # The two axes: all conditions of a width and architecture take each step together

    grid_of_axes = train(conditions)
    rows = []
    for family in args.architectures:
        for d_sae, k in axes:
            members_of_row = [m for m in grid_of_axes.members if (m.family, m.d_sae, m.k) == (family, d_sae, k)]
            on = [axis for axis, varies in (("k", d_sae == args.d_sae), ("d_sae", k == args.k)) if varies]
            name = f"{family}, d_sae {d_sae}, k {k}"
            names = {"name": name, "axes": on, "family": family, "d_sae": d_sae, "k": k}
            rows.append(AblationRow(**names, **scored(members_of_row, grid_of_axes.snapshot_steps)))

    # ----------------------------------------------------------------------------------------------------------------
    # Methods said to raise stability, and controls that must be refused: first architecture, at --d-sae and --k

    methods: list[AblationMethod] = []
    controls: list[RefusedControl] = []
    trained = [(row.name, m) for row in rows for m in row.members]
    if not args.no_methods:
        quarter, half = max(1, args.batch_size // 4), args.d_sae // 2
        variants = {
            "as it is": (recipe, args.d_sae),
            "encoder and decoder start apart": (replace(recipe, tied_init=False), args.d_sae),
            f"weight decay {args.weight_decay:g}": (replace(recipe, weight_decay=args.weight_decay), args.d_sae),
            "a quarter of the batch, four times the steps": (replace(recipe, batch_size=quarter), args.d_sae),
            "half the width, twice the rows": (replace(recipe, tokens=2 * args.tokens), half),
        }
        for name, (settings_of_method, d_sae) in variants.items():
            varied = train(grid(d_sae), settings_of_method)
            figures = scored(varied.members, varied.snapshot_steps)
            method = AblationMethod(name=name, d_sae=d_sae, rows_seen=settings_of_method.tokens, **figures)
            if methods:
                lost = contrast.drop(method, methods[0])
                method = method.model_copy(update={"gain": contrast.gain([method], methods[:1]), "ev_drop": lost})
            methods.append(method)
            trained += [(name, m) for m in method.members]
        for name, settings_of_method in (
            ("shared initialisation", recipe),
            ("shared frozen decoder", replace(recipe, freeze_decoder=True)),
        ):
            sharing = [study.member_of(m) for m in train(grid(init_seed=args.seeds[0]), settings_of_method).members]
            trained += [(name, m) for m in sharing]
            dictionaries = [study.own_dictionary(args.output_dir / m.checkpoint) for m in sharing]
            controls.append(RefusedControl(name=name, refused=study.refusal(args.seeds, dictionaries)))

    results = CoreAblations(
        phase="core_ablations",
        inputs={
            "activation store": store.digest,
            "subject": store.manifest.subject_digest,
            **{f"checkpoint {name}, seed {m.order_seed}": m.checkpoint_sha256 for name, m in trained},
        },
        hook_name=store.manifest.hook_name,
        d_in=store.d_in,
        effective_rank=rows[0].effective_rank,
        rows_seen=args.tokens,
        rows=rows,
        methods=methods,
        controls=controls,
    )
    files = study.checkpoint_files(cells, [m.checkpoint for _, m in trained])
    return results.to_json(), [*draw(results, args.output_dir), *files]


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(results, output_dir: Path) -> list[Path]:
    """The figure and the CSV of pairs."""
    from husai.evidence.names import COMPARED_NULLS
    from husai.report.figures import Panel, panels
    from husai.report.text import pair_rows, write_csv

    drawn = []
    for axis, label in (("k", "k, active features a row"), ("d_sae", "d_sae, features")):
        series, unfinished, x = {}, {}, []
        for family in dict.fromkeys(r.family for r in results.rows):
            rows_of_axis = [r for r in results.rows if axis in r.axes and r.family == family]
            rows_of_axis.sort(key=lambda r: getattr(r, axis))
            x = [getattr(r, axis) for r in rows_of_axis]
            series[family] = [r.stability.verdict.claimable_excess for r in rows_of_axis]
            unfinished[family] = [r.convergence.converged is False for r in rows_of_axis]
        drawn.append(Panel(f"Against {axis}", label, "excess over the highest null", x, series, unfinished))
    if results.methods:
        others = results.methods[1:]
        gains = {n: [getattr(m.gain, n) for m in others] for n in ("observed", *COMPARED_NULLS)}
        title = "Methods: gain of mcc_alive, and over each null"
        drawn.append(Panel(title, "gain over the recipe as it is, paired", "", [m.name for m in others], gains))
    curves = {r.name: [p.mcc for p in r.over_training] for r in results.rows}
    steps = [max(p.step, 0.5) for p in results.rows[0].over_training]
    drawn.append(Panel("Over training", "training step (0 drawn at 0.5)", "mcc, all features", steps, curves))
    figure = panels(output_dir / "figures" / "core_ablations.png", drawn)
    pairs = [row for s in (*results.rows, *results.methods) for row in pair_rows(s, condition=s.name)]
    return [figure, write_csv(output_dir / "pairs.csv", pairs)]


def summary(results: dict) -> str:
    from husai.evidence.schemas import CoreAblations, Reached
    from husai.report.text import GAIN_HEADER, at_rest, gain_cells, interval, strata, table

    phase = CoreAblations.model_validate(results)

    def cells(r: Reached) -> list[str]:
        verdict = r.stability.verdict
        return [
            interval(r.stability.scores["mcc_alive"].observed),
            f"{interval(verdict.claimable_excess, '+')} ({verdict.highest_null})",
            verdict.outcome,
            f"{at_rest(r)}, {interval(r.convergence.moved, '+')}",
            f"{r.explained_variance.estimate:.4f}",
            f"{r.l0.estimate:.1f}",
            f"{r.dead_share.estimate:.0%}",
        ]

    header = ["`mcc_alive`", "excess over the highest required null", "outcome", "at rest, moved by", "held-out EV"]
    header += ["L0", "dead"]
    lines = [
        "# Core ablations",
        "",
        f"{phase.hook_name}, {phase.d_in} coordinates of effective rank {phase.effective_rank:.1f}; "
        f"{phase.rows_seen} rows seen by each SAE, {len(phase.rows[0].members)} seeds a condition.",
        "",
        *table(["condition", *header], [[r.name, *cells(r)] for r in phase.rows]),
        "",
        "*At rest*: `mcc` of all features moved by at most 0.02 between the last two snapshots, its interval included. "
        "Intervals: delete-one-seed jackknife, t(S−1).",
    ]
    if phase.methods:
        methods = [
            [m.name, *gain_cells(m.gain), interval(m.ev_drop, "+"), *cells(m)]
            if m.gain and m.ev_drop
            else [m.name, *["–"] * 5, *cells(m)]
            for m in phase.methods
        ]
        lines += [
            "",
            "## Methods credited with higher stability, same seeds, against the recipe as it is",
            "",
            *table(["method", *GAIN_HEADER, "EV lost", *header], methods),
            "",
            f"{len(methods) - 1} methods were looked at on these seeds: one whose gain lies above 0 over every null "
            "is worth trying on fresh seeds, and no finding yet. Gains are paired by seed; weight decay is of "
            "encoders alone.",
            "",
            "## Controls that share what must not be shared",
            "",
            *(f"- {c.name}: {'refused, ' + c.refused if c.refused else '**NOT REFUSED**'}" for c in phase.controls),
        ]
    lines += ["", *strata({r.name: r for r in phase.rows} | {m.name: m for m in phase.methods})]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
