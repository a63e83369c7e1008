"""Reads decoders and covariances from bare arrays, for comparisons without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from husai.dictionaries import foreign
from husai.dictionaries.checkpoints import read_tensors
from husai.runs.errors import BadInput

ARRAYS = (".npy", ".safetensors", ".pt")


def read_decoder(path: Path, rows_are_features: bool | None = None) -> Tensor:
    """Feature directions `[d_sae, d_in]` of a checkpoint, or of a file with one matrix.

    Args:
        rows_are_features: orientation of a bare matrix, because its shape does not determine it.

    Raises:
        BadInput: the file does not exist, does not hold exactly one matrix, or its orientation is not given.
    """
    if path.suffix not in ARRAYS or path.name in foreign.FILES:
        return foreign.open_checkpoint(path).W_dec
    W = _one_matrix(path)
    if rows_are_features is None:
        raise BadInput(f"--rows-are-features: {path} is a bare matrix {tuple(W.shape)}; yes or no expected")
    return W if rows_are_features else W.T.contiguous()


def read_moments(path: Path) -> dict[str, Tensor | int]:
    """`covariance [d_in, d_in]`, and if the file or store has them `mean [d_in]`, `rows`, `token_means [n, d_in]`.

    Args:
        path: `.npy` file with a covariance, `.safetensors` file with these names, or activation store.

    Raises:
        BadInput: the path is none of these.
    """
    if path.is_dir():
        from husai.activations.outliers import moments as moments_of
        from husai.activations.store import ActivationStore

        store = ActivationStore.open(path)
        mean, covariance = moments_of(store)
        return {"covariance": covariance, "mean": mean, "rows": store.rows}
    if path.suffix == ".npy":
        return {"covariance": _one_matrix(path)}
    tensors = read_tensors(path)
    if "covariance" not in tensors:
        raise BadInput(f"--covariance: {path} holds {', '.join(sorted(tensors)) or 'nothing'}; covariance expected")
    moments: dict[str, Tensor | int] = {n: tensors[n] for n in ("covariance", "mean", "token_means") if n in tensors}
    return moments | ({"rows": int(tensors["rows"])} if "rows" in tensors else {})


def _one_matrix(path: Path) -> Tensor:
    if not path.is_file():
        raise BadInput(f"{path}: does not exist; a checkpoint or one of {', '.join(ARRAYS)} expected")
    if path.suffix == ".safetensors":
        matrices = [t for t in read_tensors(path).values() if t.ndim == 2]
    else:
        matrices = [t for t in _loaded(path) if t.ndim == 2]
    if len(matrices) != 1:
        raise BadInput(f"{path}: {len(matrices)} matrices; one decoder expected")
    if not matrices[0].is_floating_point():
        raise BadInput(f"{path}: numbers of type {matrices[0].dtype}; floating-point numbers expected")
    return matrices[0]


def _loaded(path: Path) -> list[Tensor]:
    """The tensors of a `.npy` or `.pt` file. Nothing in the file can run."""
    try:
        if path.suffix == ".npy":
            return [torch.from_numpy(np.load(path, allow_pickle=False))]
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # numpy and torch raise many types of exceptions for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: cannot be read as numbers alone ({reason})") from None
    values = saved.values() if isinstance(saved, dict) else [saved]
    return [value for value in values if isinstance(value, Tensor)]
