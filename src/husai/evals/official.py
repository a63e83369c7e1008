"""Runs one of SAEBench's own evals, unmodified, on one SAE:

    python -m husai.evals.official core --checkpoint FOLDER --subject husai-tiny --output-dir DIR

SAEBench would download the model and the text. HUSAI gives it the opened subject, and documents that neither the
subject nor any SAE was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from husai.runs.errors import BadInput, CheckFailed
from husai.runs.machine import usable_cores

NOT_HERE = {
    "sparse_probing": "its data sets (bias_in_bios, amazon_reviews, github-code, ag_news, europarl) come from the hub; "
    "sparse_probing_sae_probes carries its own",
    "scr_and_tpp": "not used: SCR and TPP failed an independent audit (arXiv 2605.18229)",
    "absorption": "writes its probes into site-packages, and is meant for widths of 16k and more",
    "autointerp": "needs a paid judge (OpenAI)",
    "ravel": "does not run with transformers 5, and knows two models alone",
    "unlearning": "needs gated data",
    "mdl": "does not run: it imports a package that it does not declare, and is written for CUDA alone",
}
"""SAEBench's evals that HUSAI does not run -> the reason."""
EVALS = ("sparse_probing_sae_probes", "core", "meta_structure")
HEADLINE = {
    "sparse_probing_sae_probes": ("sae", "sae_top_5_test_auc"),
    "core": ("model_performance_preservation", "ce_loss_score"),
    "meta_structure": ("meta_structure", "decoder_fraction_variance_explained"),
}
RESULT = "*_eval_results.json"


def headline(name: str, folder: Path) -> tuple[str, float]:
    """(metric, figure) of an eval's result file.

    Raises:
        CheckFailed: there is no result, or the figure is missing. SAEBench writes -1 for NaN, and returns silently if
            an eval raised.
    """
    files = list(folder.glob(RESULT))
    category, metric = HEADLINE[name]
    try:
        (file,) = files
        value = json.loads(file.read_text())["eval_result_metrics"][category][metric]
    except (ValueError, KeyError, TypeError):
        raise CheckFailed(f"{name}: {len(files)} results with {metric} in {folder}; 1 expected") from None
    if not isinstance(value, float) or not math.isfinite(value) or value == -1:
        raise CheckFailed(f"{name}: {metric} is {value!r} in {files[0]}")
    return metric, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval", choices=EVALS)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder in the SAELens layout")
    parser.add_argument("--subject", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model-cache-path", type=Path, help="prompts' activations (sparse_probing_sae_probes)")
    parser.add_argument("--dataset-names", type=lambda t: t.split(","), help="data sets of sparse_probing_sae_probes")
    parser.add_argument("--documents", type=Path, help="JSON list of held-out texts, of core (default: packaged ones)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        if not (args.checkpoint / "cfg.json").is_file():
            raise BadInput(
                f"--checkpoint: {args.checkpoint} holds no cfg.json; a folder in the SAELens layout expected"
            )
        # An eval reads existing files as its own results.
        if args.output_dir.exists() and any(args.output_dir.iterdir()):
            raise BadInput(f"--output-dir: {args.output_dir} is not empty")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        RUNNERS[args.eval](args)
        print("{} = {:.6f}".format(*headline(args.eval, args.output_dir)))
    except (BadInput, CheckFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


def _opened(args):
    from sae_lens import SAE

    from husai.dictionaries.foreign import open_checkpoint
    from husai.subjects import pretrained
    from husai.subjects.harvesting import Harvesting

    sae = SAE.load_from_disk(args.checkpoint, device=args.device)
    metadata, place = open_checkpoint(args.checkpoint).metadata, f"--checkpoint: {args.checkpoint}"
    harvesting = Harvesting.read(metadata, sae.cfg.metadata.hook_name, place)
    return sae, pretrained.load(args.subject, device=args.device, harvesting=harvesting)


def _sae_probes(args) -> None:
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval

    from husai.activations.language_model import harvest_prompts

    sae, subject = _opened(args)
    harvest_prompts(subject, [sae.cfg.metadata.hook_name], args.dataset_names, args.model_cache_path)
    config = SparseProbingSaeProbesEvalConfig(
        model_name=subject.name,
        dataset_names=args.dataset_names,
        results_path=str(args.output_dir / "sae_probes"),
        model_cache_path=str(args.model_cache_path),
    )
    run_eval(config, [("husai", sae)], args.device, str(args.output_dir))


def _core(args) -> None:
    import tempfile

    from sae_bench.evals.core.main import multiple_evals
    from transformer_lens import HookedTransformer

    from husai.runs.files import read_json
    from husai.subjects import text

    sae, subject = _opened(args)
    if others := sorted(set(subject.harvesting.to_json()) - {"context_size", "prepend_bos"}):
        raise BadInput(f"core: SAEBench makes activations by itself, and does not apply {others[0]}; HUSAI's core does")
    texts = read_json(args.documents, "--documents") if args.documents else text.corpus().heldout
    with tempfile.TemporaryDirectory() as documents:
        with open(Path(documents) / "train.jsonl", "w") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
        with mock.patch.object(HookedTransformer, "from_pretrained_no_processing", return_value=subject.model):
            multiple_evals(
                [("husai", sae)],
                n_eval_reconstruction_batches=10,
                n_eval_sparsity_variance_batches=10,
                eval_batch_size_prompts=8,
                compute_featurewise_density_statistics=True,  # without it, its own schema refuses the result
                compute_featurewise_weight_based_metrics=True,
                exclude_special_tokens_from_reconstruction=True,
                dataset=documents,
                context_size=min(128, subject.n_ctx),
                output_folder=str(args.output_dir),
                device=args.device,
            )


def _meta_structure(args) -> None:
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
    from sae_bench.evals.meta_structure.main import run_eval
    from sae_lens import SAE

    sae = SAE.load_from_disk(args.checkpoint, device=args.device)
    run_eval(MetaStructureEvalConfig(), [("husai", sae)], args.device, str(args.output_dir))


RUNNERS = {"sparse_probing_sae_probes": _sae_probes, "core": _core, "meta_structure": _meta_structure}

if __name__ == "__main__":
    main()
