"""Train a grid of SAEs (architectures x seeds x widths x sparsities) in one pass, on a store or on a stream.

    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir results/activations/STORE
    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir STORE \\
      --architecture topk,batchtopk,relu --d-sae 128,256 --k 8,16 --seeds 42,123,456 --tokens 2000000
    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir MLP_IN_STORE \\
      --target-activation-cache-dir MLP_OUT_STORE --architecture transcoder,skip_transcoder
    python scripts/experiments/train_husai_sae_on_cached_activations.py --model-name google/gemma-2-2b \\
      --dtype bfloat16 --hook-name blocks.12.hook_resid_post,blocks.20.hook_resid_post --text my_text.jsonl \\
      --tokens 300000000 --batch-size 4096 --buffer-rows 1048576 --d-sae 16384 --k 64 --device cuda

ReLU, JumpReLU and gated SAEs are steered to an L0 of k. The reached L0 is reported, and a miss of more than 10 % is
marked. With `--model-name` the activations are a stream, and no store is made: rows pass a buffer of --buffer-rows
rows, are shuffled in it, and are seen once. One pass of the model serves all SAEs of all hooks. Figures equal those of
a store with the same rows in the same order. Use a store (extract_activations.py) for rows that are read more than
once.

The script writes one checkpoint folder in SAELens' layout for each SAE (`sae_lens.SAE.load_from_disk` opens it),
held-out figures and loss curves. The same command resumes an interrupted run, and finds a finished one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from husai.evals.flags import EvalParser
from husai.runs.cli import (
    DEFAULT_SEEDS,
    fraction,
    int_list,
    name_list,
    nonnegative_float,
    positive_float,
    positive_int,
    prepare,
    run_main,
    seed_list,
)
from husai.runs.inputs import by_subject

if TYPE_CHECKING:
    from husai.evidence.schemas import Grid, GridMember
    from husai.runs.cells import Cells
    from husai.training.trainer import TrainingConfig

OF_STREAM = ("revision", "dtype", "text", "hook_name", "buffer_rows", "buffer_on_disk", "heldout_rows")
OF_STORE = ("target_activation_cache_dir", "epochs", "heldout_fraction")


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/sae_training")
    p.add_argument("--activation-cache-dir", type=Path, help="a store of extract_activations.py")
    p.add_argument("--target-activation-cache-dir", type=Path, help="transcoders: the store they reconstruct")
    p.add_model_name(None, counts=by_subject, help="instead: a language model, whose activations are a stream")
    p.add_argument("--hook-name", type=name_list, help="hooks of the stream, one or several (A,B)")
    p.add_text()
    p.add_argument(
        "--buffer-rows",
        type=positive_int,
        default=262_144,
        help="rows of a stream's buffer, for each hook; rounded down to whole batches (default: %(default)s)",
    )
    p.add_argument("--buffer-on-disk", action="store_true", help="the buffer lies in files below --output-dir")
    p.add_argument(
        "--heldout-rows", type=positive_int, default=100_000, help="held-out rows of a stream (default: %(default)s)"
    )
    p.add_argument(
        "--architecture",
        type=name_list,
        default="topk",
        help="topk,batchtopk,matryoshka,relu,jumprelu,gated, or transcoder,skip_transcoder (default: %(default)s)",
    )
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_argument("--d-sae", type=int_list, default="256", help="widths (default: %(default)s)")
    p.add_argument("--k", type=int_list, default="8", help="active features a row (default: %(default)s)")
    p.add_argument("--learning-rate", type=positive_float, default=3e-3, help="default: %(default)s")
    p.add_argument("--batch-size", type=positive_int, default=1024, help="default: %(default)s")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens", type=positive_int, default=1_000_000, help="rows each SAE sees (default: %(default)s)"
    )
    budget.add_argument("--epochs", type=positive_int, help="instead: passes over the training rows of a store")
    p.add_argument(
        "--heldout-fraction", type=fraction, default=0.2, help="held-out share of a store (default: %(default)s)"
    )
    p.add_argument(
        "--arithmetic",
        choices=["float32", "float64"],
        default="float32",
        help="arithmetic of training (default: %(default)s)",
    )
    p.add_argument(
        "--weight-decay", type=nonnegative_float, default=0.0, help="weight decay of encoders (default: %(default)s)"
    )
    p.add_argument("--untied-init", action="store_true", help="encoders do not start as their decoder's transpose")
    p.add_argument("--freeze-decoder", action="store_true", help="a control: decoders stay as initialised")
    p.add_argument("--init-seed", type=int, help="a control: one initialisation for all; --seeds order the data alone")
    p.add_argument("--b-dec-init", choices=["geometric_median", "mean"], default="geometric_median")
    args = p.parse_args()
    if (args.activation_cache_dir is None) == (args.subject is None):
        p.error("--activation-cache-dir (a store) or --model-name (a stream): one of them expected")
    if args.subject and args.max_norm_multiple:
        p.error("--max-norm-multiple: goes with --activation-cache-dir; rows of a stream cannot be left out")
    if args.subject is None:
        p.refuse_unused(args, OF_STREAM, "goes with --model-name, whose activations are a stream")
        return args
    p.refuse_unused(args, OF_STORE, "goes with --activation-cache-dir, not with a stream")
    if args.hook_name is None:
        p.error("--hook-name: the hooks of the stream expected")
    args.buffer_rows -= args.buffer_rows % args.batch_size
    if args.buffer_rows == 0:
        p.error(f"--buffer-rows: at least --batch-size {args.batch_size} expected")
    return args


@dataclass(frozen=True)
class Plan:
    """A training on a store or on a stream."""

    config: TrainingConfig
    inputs: dict[str, str]
    """Name -> digest."""
    source: str
    """Subject and hooks, for the summary."""
    text: dict[str, Any] | None
    """Text that was read (`TextUsed`); None for the packaged text."""
    train: Callable[[Cells], Grid]


def missed(sae: GridMember) -> str:
    """Remark for the table if the held-out L0 misses k by more than 10 %; else empty."""
    return f" (misses {sae.k} by {sae.l0_miss:+.0%})" if abs(sae.l0_miss) > 0.1 else ""


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.runs.cells import Cells
    from husai.runs.folder import Run
    from husai.training.grid import members
    from husai.training.trainer import check_members

    grid = members(args.seeds, args.d_sae, args.k, [args.learning_rate], args.architecture, args.init_seed)
    check_members(grid)
    plan = (on_store if args.subject is None else on_stream)(args, grid, device)
    settings: dict[str, Any] = {"members": [asdict(m) for m in grid], "training": asdict(plan.config)}
    settings |= {"inputs": plan.inputs, "arithmetic": args.arithmetic}

    with Run(args.output_dir, settings, args.device, args.threads) as run:
        run.inputs |= plan.inputs
        trained = plan.train(Cells(args.output_dir / "cells", args.force))
        text = {} if plan.text is None else {"text": plan.text}
        run.write(trained.to_json() | text, summary(trained, plan))
    print(args.output_dir / "summary.md")


def recipe(args, tokens: int, **more) -> TrainingConfig:
    from husai.training.trainer import TrainingConfig

    return TrainingConfig(
        tokens=tokens,
        batch_size=args.batch_size,
        b_dec_init=args.b_dec_init,
        weight_decay=args.weight_decay,
        tied_init=not args.untied_init,
        freeze_decoder=args.freeze_decoder,
        **more,
    )


def on_store(args, grid, device) -> Plan:
    import torch

    from husai.activations.outliers import without_outliers
    from husai.activations.store import ActivationStore
    from husai.training.grid import train_or_find
    from husai.training.trainer import check_target

    store = ActivationStore.open(args.activation_cache_dir)
    target = args.target_activation_cache_dir and ActivationStore.open(args.target_activation_cache_dir)
    if multiple := args.max_norm_multiple:
        root = args.artifact_root / "activations"
        store = without_outliers(store, multiple, root, by=target)
        target = target and without_outliers(target, multiple, root)
    train_rows, _ = store.split(args.heldout_fraction)
    check_target(store, target, grid)
    tokens = args.epochs * len(train_rows) if args.epochs else args.tokens
    config = recipe(args, tokens, heldout_fraction=args.heldout_fraction)
    dtype = getattr(torch, args.arithmetic)
    return Plan(
        config,
        inputs={"activation store": store.digest} | ({"target activation store": target.digest} if target else {}),
        source=f"{store.manifest.subject}, {store.manifest.hook_name}",
        text=None if store.manifest.text is None else store.manifest.text.model_dump(),
        train=lambda cells: train_or_find(cells, store, grid, config, device, args.threads, target, dtype=dtype),
    )


def on_stream(args, grid, device) -> Plan:
    """Plan of a training on a stream: rows are harvested while the SAEs train."""
    import torch

    from husai.activations.language_model import Inputs, check_hooks
    from husai.activations.stream import ActivationStream
    from husai.evals.loaded import heldout_store
    from husai.subjects import pretrained
    from husai.training.grid import train_on_stream

    subject = pretrained.load(str(args.subject), device=device)
    check_hooks(subject, args.hook_name, by_document=True)  # check hooks before a large text is read
    root = args.artifact_root / "activations"
    inputs = Inputs.of(subject, args.text.training(), args.tokens, 0, root)
    buffer = args.output_dir / "buffer" if args.buffer_on_disk else None
    stream = ActivationStream(subject, args.hook_name, inputs, args.buffer_rows, buffer=buffer)
    place = args.artifact_root, args.heldout_rows, args.threads, args.text
    heldout = {hook: heldout_store(subject, hook, *place) for hook in args.hook_name}
    config = recipe(args, args.tokens, window_rows=args.buffer_rows)
    dtype = getattr(torch, args.arithmetic)
    digests = {f"stream of {hook}": rows.digest for hook, rows in stream.hooks.items()}
    digests |= {f"held-out activations of {hook}": store.digest for hook, store in heldout.items()}
    return Plan(
        config,
        inputs={"subject": subject.digest} | digests,
        source=f"{subject.name}, {', '.join(args.hook_name)}, streamed",
        text=None if inputs.used is None else inputs.used.model_dump(),
        train=lambda cells: train_on_stream(cells, stream, heldout, grid, config, device, args.threads, dtype=dtype),
    )


def summary(trained: Grid, plan: Plan) -> str:
    hooks = trained.members[0].hook_name is not None
    lines = [
        "# SAEs on cached activations" if not hooks else "# SAEs on a stream of activations",
        "",
        f"{plan.source}; {plan.config.tokens} rows seen by each SAE; figures on held-out rows.",
        "",
    ]
    if (used := plan.text) is not None:
        lines += [
            f"Text: {used['source']}, {used['documents']} documents; left out: {used['duplicates']} repeated, "
            f"{used['probing']} of probing data sets, {used['empty']} empty.",
            "",
        ]
    header = "| family | d_sae | k | seed | explained variance | MSE | L0 | dead share | checkpoint |"
    lines += [("| hook " if hooks else "") + header, "|---" * (10 if hooks else 9) + "|"]
    for m in trained.members:
        h = m.heldout
        lines.append(
            (f"| {m.hook_name} " if hooks else "")
            + f"| {m.family} | {m.d_sae} | {m.k} | {m.seed} | {h.explained_variance:.4f} | "
            f"{h.mse:.4g} | {h.l0:.2f}{missed(m)} | {h.dead_share:.3f} | `{m.checkpoint}` |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
