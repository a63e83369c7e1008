"""Harvest a subject's activations at one hook point into a store.

    python scripts/analysis/extract_activations.py
    python scripts/analysis/extract_activations.py --subject results/subjects/SUBJECT --hook-name blocks.0.mlp.hook_post

Without --subject, the default modular-addition transformer is trained (or found) first. The store holds every pair
once, in random order; a store that exists for the same model, hook and position is found, not made again.
"""

from pathlib import Path

from husai.runs.cli import Parser, prepare, run_main


def parse():
    p = Parser(__doc__)
    p.add_shared()
    p.add_argument("--subject", type=Path, help="folder of a trained subject (default: the modular-addition one)")
    p.add_argument("--hook-name", default="blocks.0.hook_resid_post", help="default: %(default)s")
    p.add_argument("--position", type=int, help='token position (default: that of "=")')
    p.add_argument("--row-seed", type=int, default=0, help="of the order of the rows (default: %(default)s)")
    return p.parse_args()


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.activations.harvest import harvest_modular_addition
    from husai.activations.store import ActivationStore
    from husai.subjects import modular_addition

    subject = args.subject or modular_addition.train_or_find(
        modular_addition.ModularAdditionConfig(), args.artifact_root / "subjects", device, args.threads
    )
    folder = harvest_modular_addition(
        subject,
        args.artifact_root / "activations",
        args.hook_name,
        args.position,
        args.row_seed,
        device,
        args.threads,
        force=args.force,
    )
    store = ActivationStore.open(folder)
    print(f"store   {folder}")
    print(f"rows    {store.rows} x {store.d_in}, {store.manifest.hook_name} at position {store.manifest.position}")
    print(f"digest  {store.digest}")


if __name__ == "__main__":
    run_main(main)
