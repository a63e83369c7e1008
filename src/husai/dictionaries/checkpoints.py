"""SAE checkpoints in the SAELens layout: `cfg.json` + `sae_weights.safetensors` (+ `sparsity.safetensors`).

`sae_lens.SAE.load_from_disk(folder)` opens what `save` writes. Activations need no rescaling: whatever normalisation
training used is folded into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.dictionaries import topk
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_bytes, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SAE_LENS_VERSION = "6.54.12"  # the layout's version
# What would change encode or decode if it were set otherwise, and the only value that this code computes.
ASSUMED = {
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}


@dataclass
class SAE:
    """One trained SAE. `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int
    architecture: str = "topk"
    metadata: dict = field(default_factory=dict)
    """How it was made: model_name, hook_name, and under `husai` seeds, tokens, and digests of store and subject."""

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def _stack(self) -> topk.Params:
        return {name: getattr(self, name).unsqueeze(0) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def encode(self, x: Tensor) -> Tensor:
        """`x [rows, d_in]` -> features `[rows, d_sae]`."""
        return topk.keep_top(topk.pre_activations(self._stack(), x.unsqueeze(0)), torch.tensor([self.k]))[0]

    def decode(self, features: Tensor) -> Tensor:
        """features `[rows, d_sae]` -> `[rows, d_in]`."""
        return topk.decode(self._stack(), features.unsqueeze(0))[0]


def save(sae: SAE, folder: Path, firing_rate: Tensor | None = None) -> list[Path]:
    """Write a checkpoint folder; returns its files.

    Args:
        firing_rate: `[d_sae]`, share of rows on which each feature is active; saved as SAELens' log10 sparsity.
    """
    weights = {name: getattr(sae, name).detach().cpu().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    write_bytes(folder / WEIGHTS, to_bytes(weights))
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
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
    if config.get("architecture") != "topk":
        raise BadInput(f"{where}: architecture {config.get('architecture')!r} cannot be read; 'topk' expected")
    for key, expected in ASSUMED.items():
        if config.get(key, expected) != expected:
            raise BadInput(f"{where}: {key} is {config[key]!r}; only {expected!r} can be read")
    try:
        d_in, d_sae, k = (config[name] for name in ("d_in", "d_sae", "k"))
    except KeyError as error:
        raise BadInput(f"{where}: {error} is missing") from None
    if not all(type(n) is int and n > 0 for n in (d_in, d_sae, k)) or k > d_sae:
        raise BadInput(f"{where}: d_in {d_in!r}, d_sae {d_sae!r}, k {k!r}: positive whole numbers, k ≤ d_sae expected")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadInput(f"{where}: metadata is no object")
    path = folder / WEIGHTS
    if not path.is_file():
        raise BadInput(f"checkpoint: {path} does not exist")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is truncated or not safetensors ({error})") from None
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != shapes:
        raise BadInput(f"checkpoint: {path} holds {found}; {shapes} expected")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise BadInput(f"checkpoint: {path} holds NaN or infinite weights")
    return SAE(**weights, k=k, metadata=metadata)


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
