"""Train the modular-addition transformer, or find the trained one.

    python scripts/training/train_modular_addition.py
    python scripts/training/train_modular_addition.py --modulus 59 --seed 7

The transformer learns (a, b, =) -> (a + b) mod p from a part of the pairs. It is accepted after several consecutive
epochs with the target accuracy on held-out pairs; otherwise the exit code is 1. The script prints the subject's folder,
its held-out accuracy and its key frequencies.
"""

from husai.runs.cli import Parser, fraction, nonnegative_float, positive_float, positive_int, prepare, run_main


def parse():
    p = Parser(__doc__)
    p.add_shared()
    p.add_argument("--modulus", type=positive_int, default=113, help="an odd number (default: %(default)s)")
    p.add_argument("--epochs", type=positive_int, default=100, help="largest number of epochs (default: %(default)s)")
    p.add_argument(
        "--learning-rate", type=positive_float, default=3e-3, help="learning rate of AdamW (default: %(default)s)"
    )
    p.add_argument(
        "--weight-decay", type=nonnegative_float, default=1.0, help="weight decay of AdamW (default: %(default)s)"
    )
    p.add_argument("--batch-size", type=positive_int, default=1024, help="pairs a step (default: %(default)s)")
    p.add_argument(
        "--train-fraction", type=fraction, default=0.8, help="share of the pairs for training (default: %(default)s)"
    )
    p.add_argument(
        "--seed", type=int, default=42, help="seed of split, initialisation and batches (default: %(default)s)"
    )
    args = p.parse_args()
    if args.modulus % 2 == 0 or args.modulus < 11:
        p.error(f"--modulus {args.modulus}: an odd number of at least 11 expected")
    return args


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.subjects import modular_addition as subject

    config = subject.ModularAdditionConfig(
        modulus=args.modulus,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        batch_size=args.batch_size,
        train_fraction=args.train_fraction,
        seed=args.seed,
    )
    folder = subject.train_or_find(config, args.artifact_root / "subjects", device, args.threads, force=args.force)
    model, config, description = subject.load(folder)
    frequencies, share = subject.key_frequencies(model.embed.W_E[: config.modulus].detach())
    training = description["training"]
    print(f"subject            {folder}")
    print(f"held-out accuracy  {training['heldout_accuracy']:.4f} after {training['epochs']} epochs")
    print(f"key frequencies    {frequencies}, {share:.1%} of the embedding's power")


if __name__ == "__main__":
    run_main(main)
