"""Train a grid of SAEs (families x seeds x widths x sparsities) on a store, all in one pass.

    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir results/activations/STORE
    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir STORE \\
      --architecture topk,batchtopk,relu --d-sae 128,256 --k 8,16 --seeds 42,123,456 --tokens 2000000
    python scripts/experiments/train_husai_sae_on_cached_activations.py --activation-cache-dir MLP_IN_STORE \\
      --target-activation-cache-dir MLP_OUT_STORE --architecture transcoder,skip_transcoder

ReLU, JumpReLU and gated SAEs are steered to an L0 of k; what they reach is reported, and a miss of more than 10 % said.

Writes one SAELens-layout checkpoint folder an SAE (`sae_lens.SAE.load_from_disk` opens it), held-out figures and
loss curves. An interrupted run resumes with the same command; a finished one is found.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from husai.runs.cli import (
    DEFAULT_SEEDS,
    Parser,
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


def parse():
    p = Parser(__doc__)
    p.add_common("results/experiments/sae_training")
    p.add_argument("--activation-cache-dir", type=Path, required=True, help="a store of extract_activations.py")
    p.add_argument("--target-activation-cache-dir", type=Path, help="transcoders: the store they reconstruct")
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
    budget.add_argument("--epochs", type=positive_int, help="instead: passes over the training rows")
    p.add_argument("--heldout-fraction", type=fraction, default=0.2, help="default: %(default)s")
    p.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="of the arithmetic (default: %(default)s)"
    )
    p.add_argument("--weight-decay", type=nonnegative_float, default=0.0, help="of encoders (default: %(default)s)")
    p.add_argument("--untied-init", action="store_true", help="encoders do not start as their decoder's transpose")
    p.add_argument("--freeze-decoder", action="store_true", help="a control: decoders stay as initialised")
    p.add_argument("--init-seed", type=int, help="a control: one initialisation for all; --seeds order the data alone")
    p.add_argument("--b-dec-init", choices=["geometric_median", "mean"], default="geometric_median")
    return p.parse_args()


def missed(record: dict) -> str:
    """Said in the table where the held-out L0 lies far from k."""
    miss = record["l0_miss"]
    return f" (misses {record['k']} by {miss:+.0%})" if abs(miss) > 0.1 else ""


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    import torch

    from husai.activations.store import ActivationStore
    from husai.runs.cells import Cells
    from husai.runs.folder import Run
    from husai.training.grid import members, train_or_find
    from husai.training.trainer import TrainingConfig, check_members, check_target

    store = ActivationStore.open(args.activation_cache_dir)
    target = args.target_activation_cache_dir and ActivationStore.open(args.target_activation_cache_dir)
    train_rows, _ = store.split(args.heldout_fraction)
    grid = members(args.seeds, args.d_sae, args.k, [args.learning_rate], args.architecture, args.init_seed)
    check_members(grid)
    check_target(store, target, grid)
    config = TrainingConfig(
        tokens=args.epochs * len(train_rows) if args.epochs else args.tokens,
        batch_size=args.batch_size,
        heldout_fraction=args.heldout_fraction,
        b_dec_init=args.b_dec_init,
        weight_decay=args.weight_decay,
        tied_init=not args.untied_init,
        freeze_decoder=args.freeze_decoder,
    )
    settings: dict[str, Any] = {"members": [asdict(m) for m in grid], "training": asdict(config)}
    settings |= {"store": store.digest, "target": target and target.digest, "dtype": args.dtype}

    with Run(args.output_dir, settings, args.device, args.threads) as run:
        run.inputs["activation store"] = store.digest
        if target:
            run.inputs["target activation store"] = target.digest
        cells = Cells(args.output_dir / "cells", args.force)
        dtype = getattr(torch, args.dtype)
        results = train_or_find(cells, store, grid, config, device, args.threads, target, dtype=dtype)
        lines = [
            "# SAEs on cached activations",
            "",
            f"{store.manifest.subject}, {store.manifest.hook_name}; {config.tokens} rows seen by each SAE; "
            "figures on held-out rows.",
            "",
            "| family | d_sae | k | seed | explained variance | MSE | L0 | dead share | checkpoint |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for m in results["members"]:
            h = m["heldout"]
            lines.append(
                f"| {m['family']} | {m['d_sae']} | {m['k']} | {m['seed']} | {h['explained_variance']:.4f} | "
                f"{h['mse']:.4g} | {h['l0']:.2f}{missed(m)} | {h['dead_share']:.3f} | `{m['checkpoint']}` |"
            )
        run.write(results, "\n".join(lines) + "\n")
    print(args.output_dir / "summary.md")


if __name__ == "__main__":
    run_main(main)
