"""Train husai-tiny, a small GPT-NeoX language model, on the text of the sae-probes package.

    python scripts/training/train_tiny_lm.py
    python scripts/training/train_tiny_lm.py --output-dir assets/husai-tiny --force
    python scripts/training/train_tiny_lm.py --tokens 2000000 --output-dir results/subjects/hardly-trained

The repository ships the model, therefore this script is rarely needed. It takes about an hour on two cores and resumes
with the same command; an interruption loses at most a minute. transformers opens the folder, and `--model-name FOLDER`
studies the model. Exit code 1 if the model's bits per byte on held-out documents are not 20 % below those of a
Witten-Bell bigram, or not below those of a trigram.
"""

from pathlib import Path

from husai.runs.cli import Parser, positive_float, positive_int, prepare, run_main


def parse():
    p = Parser(__doc__)
    p.add_argument("--output-dir", type=Path, default=Path("results/subjects/husai-tiny"), help="default: %(default)s")
    p.add_machine()
    p.add_argument("--force", action="store_true", help="replace a model that is already there")
    p.add_argument("--tokens", type=positive_int, help="tokens of the training, repeats included")
    p.add_argument("--learning-rate", type=positive_float, help="learning rate of AdamW")
    p.add_argument("--batch-tokens", type=positive_int, help="tokens of a step")
    p.add_argument("--vocabulary", type=positive_int, help="size of the tokenizer's vocabulary, at least 257")
    p.add_argument("--n-layers", type=positive_int)
    p.add_argument("--d-model", type=positive_int, help="width of the residual stream; the MLP is four times as wide")
    p.add_argument("--n-heads", type=positive_int)
    p.add_argument("--n-ctx", type=positive_int, help="length of the longest input, in tokens")
    p.add_argument("--seed", type=int, help="seed of initialisation and batches (all defaults: TinyLMConfig)")
    args = p.parse_args()
    if args.vocabulary is not None and args.vocabulary < 257:
        p.error(f"--vocabulary {args.vocabulary}: at least 257 expected, 256 bytes and the end of a text")
    return args


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.runs.errors import BadInput, CheckFailed
    from husai.subjects import text, tiny_lm

    apart = ("output_dir", "device", "threads", "force")
    given = {k: v for k, v in vars(args).items() if k not in apart and v is not None}
    if args.d_model:
        given["d_mlp"] = 4 * args.d_model
    config = tiny_lm.TinyLMConfig(**given)
    if config.d_model % config.n_heads:
        raise BadInput(f"--d-model {config.d_model} with --n-heads {config.n_heads}: a multiple of the heads expected")
    record = tiny_lm.make(config, text.corpus(), args.output_dir, device, args.threads, args.force)
    figures = record["bits_per_byte"]
    print(f"subject        {args.output_dir}")
    print(f"parameters     {record['parameters']:,}")
    print(f"bits per byte  {', '.join(f'{name} {value:.4f}' for name, value in figures['all'].items())}")
    print(f"held out       {figures['documents']} documents, {figures['bytes']:,} bytes")
    missed = [f"{b['value']:.4f} is not {b['bar']} (below {b['below']:.4f})" for b in record["bars"] if not b["holds"]]
    if missed:
        raise CheckFailed("bits per byte of the language model: " + "; ".join(missed))


if __name__ == "__main__":
    run_main(main)
