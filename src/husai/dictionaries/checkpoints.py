"""SAE checkpoints in the SAELens layout: `cfg.json` + `sae_weights.safetensors` (+ `sparsity.safetensors`).

`sae_lens.SAE.load_from_disk(folder)` opens what `save` writes. Activations need no rescaling: whatever normalisation
training used is folded into the weights. Checkpoints of other libraries: `foreign.py`.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_bytes, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_LENS_VERSION = "6.54.12"  # the layout's version
# What would change encode or decode if it were set otherwise, and the only value that this code computes.
ASSUMED = {
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}


def save(sae: SAE, folder: Path, firing_rate: Tensor | None = None) -> list[Path]:
    """Write a checkpoint folder; returns its files.

    Args:
        firing_rate: `[d_sae]`, share of rows on which each feature is active; saved as SAELens' log10 sparsity.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.weights.items()}
    write_bytes(folder / WEIGHTS, to_bytes(weights))
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
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, **sae.metadata},
    }
    write_json(folder / CONFIG, config)
    files = [folder / WEIGHTS, folder / CONFIG]
    if firing_rate is not None:
        write_bytes(folder / SPARSITY, to_bytes({"sparsity": (firing_rate.float() + 1e-10).log10()}))
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
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(f"{where}: architecture {architecture!r} cannot be read; one of {known} expected")
    for key, expected in ASSUMED.items():
        if config.get(key, expected) != expected:
            raise BadInput(f"{where}: {key} is {config[key]!r}; only {expected!r} can be read")
    transcoder = "transcoder" in architecture
    subtract = config.get("apply_b_dec_to_input", not transcoder)
    if not isinstance(subtract, bool) or (subtract and transcoder):
        raise BadInput(f"{where}: apply_b_dec_to_input is {subtract!r}; true or false expected, false for transcoders")
    sizes = {"d_in": None, "d_sae": None}
    sizes |= {"k": None} if architecture == "topk" else {}
    sizes |= {"d_out": None} if transcoder else {}
    for name in sizes:
        sizes[name] = config.get(name)
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise BadInput(f"{where}: {name} is {sizes[name]!r}; a positive whole number expected")
    d_in, d_sae, k = sizes["d_in"], sizes["d_sae"], sizes.get("k")
    if k is not None and k > d_sae:
        raise BadInput(f"{where}: k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadInput(f"{where}: metadata is no object")
    weights = read_tensors(folder / WEIGHTS)
    d_out = sizes.get("d_out", d_in)
    shapes = dict.fromkeys(ENCODER[ARCHITECTURES[architecture]], (d_sae,))
    shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if "skip" in architecture else {}
    return checked(SAE(weights, architecture, k, subtract, metadata), shapes, folder / WEIGHTS)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or BadInput."""
    if not path.is_file():
        raise BadInput(f"checkpoint: {path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is truncated or not safetensors ({error})") from None


def checked(sae: SAE, shapes: dict[str, tuple[int, ...]], path: Path) -> SAE:
    """The SAE in float32, or BadInput where its tensors are others than `shapes` says or not finite."""
    found = {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}
    if found != shapes:
        raise BadInput(f"checkpoint: {path} holds {found}; {shapes} expected")
    sae.weights = {name: tensor.float() for name, tensor in sae.weights.items()}
    if not all(tensor.isfinite().all() for tensor in sae.weights.values()):
        raise BadInput(f"checkpoint: {path} holds NaN or infinite weights")
    return sae


def checkpoint_digest(folder: Path) -> str:
    """sha256 of the weights file: what a result names when it speaks of this SAE."""
    return sha256_file(folder / WEIGHTS)


def find(root: Path) -> list[Path]:
    """The checkpoint folders below `root`, sorted.

    Raises:
        BadInput: `root` is no folder or holds no checkpoint.
    """
    if not root.is_dir():
        raise BadInput(f"--sae-root: {root} is not a folder")
    folders = sorted(path.parent for path in root.rglob(CONFIG) if (path.parent / WEIGHTS).exists())
    if not folders:
        raise BadInput(f"--sae-root: no checkpoint ({CONFIG} + {WEIGHTS}) below {root}")
    return folders
