"""SAE checkpoints in the SAELens layout: `cfg.json` + `sae_weights.safetensors` (+ `sparsity.safetensors`).

`sae_lens.SAE.load_from_disk(folder)` opens what `save` writes. Activations need no rescaling: whatever normalisation
training used is folded into the weights. Checkpoints of other libraries: `foreign.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.dictionaries import sources
from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_bytes, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
NEVER = 1e-10
"""Added to firing rates before their logarithm, as SAELens does; less than one row in a billion."""
SAE_LENS_VERSION = "6.54.12"  # the layout's version
# What would change encode or decode if it were set otherwise, and the only value that this code computes.
ASSUMED = {
    "normalize_activations": "none",
    "reshape_activations": "none",
}
SIZES = ("d_in", "d_sae", "d_out", "k")
# Keys of SAELens before version 6 that say where an SAE belongs; since then they are in `metadata`.
MOVED = {
    "model_name": "model_name",
    "hook_name": "hook_name",
    "hook_point": "hook_name",
    "hook_layer": "hook_layer",
    "hook_point_layer": "hook_layer",
    "hook_head_index": "hook_head_index",
    "hook_point_head_index": "hook_head_index",
    "context_size": "context_size",
    "prepend_bos": "prepend_bos",
    "dataset_path": "dataset_path",
    "neuronpedia_id": "neuronpedia_id",
    "sae_lens_training_version": "sae_lens_training_version",
    "sae_lens_version": "sae_lens_version",
    "hook_name_out": "hook_name_out",
}
STANDARD = ("standard", "topk")
# Where and how it was made, or settings of training alone.
HARMLESS = {
    *("dtype", "device", "dataset_trust_remote_code", "model_from_pretrained_kwargs", "seqpos_slice"),
    *("l1_coefficient", "lp_norm", "use_ghost_grads", "normalize_sae_decoder", "noise_scale", "mse_loss_normalization"),
    *("decoder_orthogonal_init", "decoder_heuristic_init", "decoder_heuristic_init_norm", "jumprelu_init_threshold"),
    *("init_encoder_as_decoder_transpose", "scale_sparsity_penalty_by_decoder_norm", "jumprelu_bandwidth"),
}
READ = {"architecture", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", *SIZES}


def firing_rate(folder: Path) -> Tensor:
    """Share of the held-out rows of a checkpoint's training on which each feature fires, float64 `[d_sae]`."""
    sparsity = load_file(folder / SPARSITY)["sparsity"].double()
    return (10**sparsity).where(sparsity > math.log10(10 * NEVER), 0.0)


def save(sae: SAE, folder: Path, firing_rate: Tensor | None = None) -> list[Path]:
    """Write a checkpoint folder; returns its files.

    Args:
        firing_rate: `[d_sae]`, share of rows on which each feature is active; saved as SAELens' log10 sparsity.

    Raises:
        BadInput: SAELens has no such architecture (a top-k SAE beside a linear map, as sparsify makes them).
    """
    if isinstance(sae, sources.PeerSAE):
        tensors, config = sae.saved()
        return _write(folder, tensors, config | {"metadata": sae.metadata}, firing_rate)
    skip = ("W_skip",) if "skip" in sae.architecture else ()
    if set(sae.weights) != {*ENCODER[ARCHITECTURES[sae.architecture]], "W_dec", "b_dec", *skip}:
        raise BadInput(f"checkpoint: {folder}: {sae.architecture} with {sorted(sae.weights)} has no SAELens layout")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.weights.items()}
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"k": sae.k} if sae.architecture == "topk" else {}),
        **({"d_out": sae.d_out} if "transcoder" in sae.architecture else {}),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        **ASSUMED,
        "metadata": {**sae.metadata, "sae_lens_version": SAE_LENS_VERSION},
    }
    return _write(folder, weights, config, firing_rate)


def _write(folder: Path, weights: dict[str, Tensor], config: dict, firing_rate: Tensor | None) -> list[Path]:
    write_bytes(folder / WEIGHTS, to_bytes(weights))
    write_json(folder / CONFIG, config)
    files = [folder / WEIGHTS, folder / CONFIG]
    if firing_rate is not None:
        write_bytes(folder / SPARSITY, to_bytes({"sparsity": (firing_rate.float() + NEVER).log10()}))
        files.append(folder / SPARSITY)
    return files


def load(folder: Path) -> SAE:
    """Open a checkpoint folder.

    Raises:
        BadInput: it is missing, truncated, of another family or layout, non-finite, or its shapes do not fit cfg.json.
    """
    config = read_json(folder / CONFIG, "checkpoint")
    where = f"checkpoint: {folder / CONFIG}"
    if not isinstance(config, dict):
        raise BadInput(f"{where} does not hold an SAE's configuration")
    if sources.beyond_formulas(config):
        sae = sources.open_folder(folder)
        return checked(sae, {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}, folder / WEIGHTS)
    config = modern(config, where)
    architecture, metadata = config["architecture"], config["metadata"]
    transcoder = "transcoder" in architecture
    subtract = config.get("apply_b_dec_to_input", not transcoder)
    if not isinstance(subtract, bool) or (subtract and transcoder):
        raise BadInput(f"{where}: apply_b_dec_to_input is {subtract!r}; true or false expected, false for transcoders")
    needed = ["d_in", "d_sae", *(["k"] if architecture == "topk" else []), *(["d_out"] if transcoder else [])]
    sizes: dict[str, Any] = {name: config.get(name) for name in needed}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise BadInput(f"{where}: {name} is {size!r}; a positive whole number expected")
    d_in, d_sae, k = sizes["d_in"], sizes["d_sae"], sizes.get("k")
    if k is not None and k > d_sae:
        raise BadInput(f"{where}: k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    weights = read_tensors(folder / WEIGHTS)
    d_out = sizes.get("d_out", d_in)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ENCODER[ARCHITECTURES[architecture]], (d_sae,))
    shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if "skip" in architecture else {}
    sae = checked(SAE(weights, architecture, k, subtract, metadata), shapes, folder / WEIGHTS)
    # As if decoder rows had norm 1: made so.
    return unit_decoder(sae, folder / WEIGHTS) if config.get("rescale_acts_by_decoder_norm") else sae


def unit_decoder(sae: SAE, path: Path) -> SAE:
    """The same map with decoder rows of norm 1, for encoders that are scaled along; BadInput where a row is zero."""
    norms = sae.W_dec.norm(dim=1)
    if (norms == 0).any():
        raise BadInput(f"checkpoint: {path}: a decoder row is zero and cannot be scaled to norm 1")
    sae.weights |= {"W_enc": sae.W_enc * norms, "b_enc": sae.weights["b_enc"] * norms}
    sae.weights["W_dec"] = sae.W_dec / norms.unsqueeze(1)
    return sae


def modern(config: dict, where: str) -> dict:
    """A `cfg.json` of SAELens 5 or later in the terms of version 6; BadInput for what would change encode or decode and
    is not computed here, and for keys whose meaning is not known."""
    config = dict(config)
    metadata = config.pop("metadata", None) or {}
    if not isinstance(metadata, dict):
        raise BadInput(f"{where}: metadata is no object")
    metadata = metadata | {MOVED[key]: config.pop(key) for key in list(config) if key in MOVED}
    activation = config.pop("activation_fn", None) or config.pop("activation_fn_str", None)
    arguments = config.pop("activation_fn_kwargs", None) or {}
    config.pop("activation_fn_str", None)
    if not isinstance(arguments, dict):
        raise BadInput(f"{where}: activation_fn_kwargs is {arguments!r}; an object expected")
    if activation == "topk" and set(arguments) == {"k"} and config.get("architecture", "standard") in STANDARD:
        config |= {"architecture": "topk", "k": arguments["k"]}
    elif activation not in (None, "relu") or arguments:
        raise BadInput(f"{where}: activation_fn {activation!r} with {arguments}; relu, or topk with k, expected")
    if config.pop("finetuning_scaling_factor", False):
        raise BadInput(f"{where}: finetuning_scaling_factor is set; an SAE without one expected")
    if config.get("normalize_activations") in (None, False):
        config.pop("normalize_activations", None)
    old = metadata.get("sae_lens_version") is None and "reshape_activations" not in config
    if old and "hook_z" in str(metadata.get("hook_name", "")):
        raise BadInput(f"{where}: an SAE of hook_z without reshape_activations reshapes its input; none expected")
    for key, expected in ASSUMED.items():
        if (value := config.pop(key, expected)) != expected:
            raise BadInput(
                f"{where}: {key} is {value!r}; only {expected!r} can be read (fold it into the weights first)"
            )
    architecture = config.setdefault("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(f"{where}: architecture {architecture!r} cannot be read; one of {known} expected")
    if config.get("rescale_acts_by_decoder_norm") and architecture != "topk":
        raise BadInput(f"{where}: rescale_acts_by_decoder_norm is set; it is known of topk alone")
    for key in sorted(set(config) - READ - HARMLESS):
        raise BadInput(f"{where}: {key} ({config[key]!r}) is not known; it may change what the SAE computes")
    return config | {"metadata": metadata}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or BadInput."""
    if not path.is_file():
        raise BadInput(f"checkpoint: {path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is truncated or not safetensors ({error})") from None


def checked(sae: SAE, shapes: dict[str, tuple[int, ...]], path: Path) -> SAE:
    """The SAE in float32, or BadInput where its tensors are others than `shapes` says, not finite, or no decoder."""
    found = {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}
    if found != shapes:
        raise BadInput(f"checkpoint: {path} holds {found}; {shapes} expected")
    if other := [str(tensor.dtype) for tensor in sae.weights.values() if not tensor.is_floating_point()]:
        raise BadInput(f"checkpoint: {path} holds {other[0]}; floating-point numbers expected")
    sae.weights = {name: tensor.float() for name, tensor in sae.weights.items()}
    if not all(tensor.isfinite().all() for tensor in sae.weights.values()):
        raise BadInput(f"checkpoint: {path} holds NaN or infinite weights")
    if not sae.W_dec.any():
        raise BadInput(f"checkpoint: {path}: the decoder holds only zeros")
    return sae


def checkpoint_digest(folder: Path) -> str:
    """sha256 of the weights file: what a result names when it speaks of this SAE."""
    return sha256_file(folder / WEIGHTS)
