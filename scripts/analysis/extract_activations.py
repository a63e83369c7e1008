"""Harvest a subject's activations into stores, or into the files that sae-probes reads.

    python scripts/analysis/extract_activations.py
    python scripts/analysis/extract_activations.py --model-name results/subjects/SUBJECT \\
      --hook-name blocks.0.mlp.hook_post
    python scripts/analysis/extract_activations.py --model-name husai-tiny --hook-name blocks.1.hook_resid_pre
    python scripts/analysis/extract_activations.py --model-name husai-tiny --hook-name blocks.1.hook_resid_pre \\
      --random-model
    python scripts/analysis/extract_activations.py --model-name google/gemma-2-2b --dtype bfloat16 \\
      --hook-name blocks.12.hook_resid_post --text my_text.jsonl --rows 5000000
    python scripts/analysis/extract_activations.py --model-name pythia-70m-deduped \\
      --hook-name blocks.2.hook_resid_pre --layout sae-probes --data-sets 87_glue_cola,92_glue_sst2

A subject is a folder of a modular-addition transformer (by default found, or trained first), `husai-tiny`, a local
Hugging Face folder, or a hub name that TransformerLens knows. A store of modular addition holds every pair once. A
store of a language model holds --rows rows: every token of a document except the first. Rows are in random order.
Several hooks (A,B) share one forward pass and give one store each. Existing stores are reused, and an interrupted
harvest resumes.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import fraction, name_list, positive_int, prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_shared()
    p.add_model_name(None, help="folder or name (default: the modular-addition transformer)")
    p.add_argument(
        "--hook-name",
        type=name_list,
        help="default: blocks.0.hook_resid_post of modular addition, blocks.1.hook_resid_pre of a language model",
    )
    p.add_argument("--random-model", action="store_true", help="redraw all weights, mean and variance kept")
    p.add_argument("--random-seed", type=int, default=0, help="seed of --random-model (default: %(default)s)")
    p.add_argument("--row-seed", type=int, default=0, help="seed of the order of the rows (default: %(default)s)")
    p.add_argument("--position", type=int, help='modular addition: token position (default: that of "=")')
    p.add_argument(
        "--layout",
        choices=["store", "sae-probes"],
        default="store",
        help="stores of all tokens, or the last token of each prompt where sae-probes looks (default: %(default)s)",
    )
    p.add_argument(
        "--data-sets",
        type=name_list,
        help="names, or train, probe, ood (default: what husai-tiny learned from, or the probe sets)",
    )
    p.add_argument("--rows", type=positive_int, default=1_000_000, help="rows of a store (default: %(default)s)")
    p.add_argument(
        "--heldout-fraction",
        type=fraction,
        default=0.2,
        help="share of held-out documents, whose rows are the last of the store (default: %(default)s)",
    )
    p.add_argument(
        "--store-dtype", choices=["float32", "bfloat16"], help="type of the rows of a store (default: that of --dtype)"
    )
    p.add_argument("--probe-cache-dir", type=Path, help="default: ARTIFACT_ROOT/probe_activations")
    p.add_text()
    args = p.parse_args()
    if not args.text.packaged and (args.data_sets or args.subject is None):
        p.error(f"--text {args.text}: goes with a language model as --model-name, and not with --data-sets")
    if args.max_norm_multiple and (args.layout != "store" or args.subject is None):
        p.error("--max-norm-multiple: goes with stores of a language model; prompts and pairs keep all rows")
    return args


def main() -> None:
    args = parse()
    device = prepare(args.device, args.threads)
    from husai.runs.subjects import is_language_model

    if not is_language_model(args.subject):
        report(modular_addition_stores(args, device))
    elif args.layout == "store":
        report(language_model_stores(args, device))
    else:
        prompts(args, device)


def random_seed(args) -> int | None:
    return args.random_seed if args.random_model else None


def modular_addition_stores(args, device) -> list[Path]:
    from husai.activations.harvest import check_modular_addition, harvest_modular_addition
    from husai.subjects import modular_addition

    config = modular_addition.ModularAdditionConfig()
    if args.subject:
        config = modular_addition.ModularAdditionConfig(**modular_addition.describe(Path(args.subject))["config"])
    if args.hook_name:
        check_modular_addition(config, args.hook_name)
    subject = args.subject or modular_addition.train_or_find(
        config, args.artifact_root / "subjects", device, args.threads
    )
    return [
        harvest_modular_addition(
            Path(subject),
            args.artifact_root / "activations",
            hook,
            args.position,
            args.row_seed,
            device,
            args.threads,
            force=args.force,
            random_seed=random_seed(args),
        )
        for hook in args.hook_name or ["blocks.0.hook_resid_post"]
    ]


def language_model_stores(args, device) -> list[Path]:
    from husai.activations.language_model import harvest_tokens
    from husai.subjects import pretrained, text
    from husai.subjects.harvesting import Harvesting

    documents = text.distinct(args.data_sets) if args.data_sets else args.text.training()
    way = Harvesting(max_norm_multiple=args.max_norm_multiple)
    folders = harvest_tokens(
        pretrained.load(args.subject, random_seed(args), device, way),
        args.hook_name or ["blocks.1.hook_resid_pre"],
        documents,
        args.artifact_root / "activations",
        args.rows,
        args.row_seed,
        args.heldout_fraction,
        args.store_dtype,
        args.threads,
        args.force,
    )
    return [*folders.values()]


def prompts(args, device) -> None:
    from husai.activations.language_model import harvest_prompts
    from husai.subjects import pretrained, text

    data_sets = text.expand(args.data_sets) if args.data_sets else text.probe_sets()
    hooks = args.hook_name or ["blocks.1.hook_resid_pre"]
    cache = args.probe_cache_dir or args.artifact_root / "probe_activations"
    subject = pretrained.load(args.subject, random_seed(args), device)
    harvest_prompts(subject, hooks, data_sets, cache, args.force)
    print(f"model_cache_path  {cache}")
    print(f"model_name        {subject.name}")
    print(f"hook_name         {', '.join(hooks)}")
    print(f"data sets         {len(data_sets)}")


def report(folders: list[Path]) -> None:
    from husai.activations.store import ActivationStore

    for folder in folders:
        store = ActivationStore.open(folder)
        print(f"store   {folder}")
        print(f"rows    {store.rows} x {store.d_in}, {store.manifest.hook_name} at position {store.manifest.position}")
        if (used := store.manifest.text) is not None:
            left_out = f"{used.duplicates} repeated, {used.probing} of probing data sets, {used.empty} empty left out"
            print(f"text    {used.source}: {used.documents} documents ({left_out})")
        print(f"digest  {store.digest}")


if __name__ == "__main__":
    run_main(main)
