"""Sparse codes of a stack of SAEs, differentiable. Only the encoder's product is dense.

A stack has n members; `x [n, rows, d_in]`, `W_enc [n, d_in, d_sae]`, `W_dec [n, d_sae, d_in]`. Few pre-activations of
each member are kept, and `Kept` holds them. All work after the choice uses the kept entries alone:

    values, kept = encode(...)                 x − b_dec in the encoder; gradients reach W_enc, b_enc and b_dec
    squares, error = reconstruct(values, …)    Σ ‖target − b_dec − values W_dec‖²; gradients reach values and decoder

The work itself is in `cpu.py` (numba), `gpu.py` (Triton) or `dense.py` (plain PyTorch, slower, the same numbers).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


@dataclass
class Kept:
    """Kept entries of a stack's pre-activations.

    Entries of row r of member i are at `offsets[i · rows + r] : offsets[i · rows + r + 1]`.
    """

    rows: int
    d_sae: int
    sizes: tuple[int, ...]
    """Number of entries of each member. They are contiguous."""
    offsets: Tensor  # int64 [n · rows + 1]
    features: Tensor  # int32 [entries], 0 … d_sae − 1
    values: Tensor  # [entries], ≥ 0; a 0 keeps its place in a row of fixed length and means nothing
    order: tuple | None = None  # a backend's own: the entries sorted by feature

    @property
    def n(self) -> int:
        return len(self.sizes)

    def row_of_entries(self) -> Tensor:
        """int64 [entries], counted over the whole stack"""
        counts = self.offsets.diff()
        rows = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.features))

    def activity(self) -> tuple[Tensor, Tensor]:
        """(bool [n, d_sae], which features are active on any row; [n], how many entries are positive)"""
        return backend(self.values.device.type).activity(self)

    def smallest(self) -> Tensor:
        """Smallest positive value of each member, `[n]`; infinite without a positive value."""
        positive = torch.where(self.values > 0, self.values, torch.inf)
        nothing = positive.new_full((1,), torch.inf)
        return torch.stack([torch.cat([v, nothing]).amin() for v in positive.split(self.sizes)])

    def dense(self) -> Tensor:
        """`[n, rows, d_sae]`"""
        flat = self.values.new_zeros(self.n * self.rows, self.d_sae)
        flat.index_put_((self.row_of_entries(), self.features.long()), self.values, accumulate=True)
        return flat.view(self.n, self.rows, self.d_sae)


@cache
def backend(device_type: str) -> ModuleType:
    """Module for a device: Triton on CUDA, numba on a CPU, PyTorch if they are missing."""
    if device_type == "cuda" and find_spec("triton"):
        from husai.kernels import gpu

        return gpu
    if device_type == "cpu" and find_spec("numba"):
        from husai.kernels import cpu

        return cpu
    from husai.kernels import dense

    return dense


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_enc, b_enc, b_dec, x, kept):
        ctx.save_for_backward(W_enc, b_dec, x)
        ctx.kept = kept
        return kept.values.clone()

    @staticmethod
    def backward(ctx, gradient):
        W_enc, b_dec, x = ctx.saved_tensors
        kept = ctx.kept
        weights = torch.where(kept.values > 0, gradient, 0)
        W_grad, b_grad = backend(x.device.type).weighted_sums(kept, weights, x, b_dec)
        b_dec_grad = -torch.matmul(W_enc, b_grad.unsqueeze(-1)).squeeze(-1)
        return W_grad.transpose(1, 2), b_grad, b_dec_grad, None, None


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, b_dec, target, kept):
        error, slopes, squares = backend(target.device.type).residual(kept, values, W_dec, b_dec, target)
        ctx.save_for_backward(values, error, slopes)
        ctx.kept = kept
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        return squares.view(kept.n, kept.rows).sum(1), error

    @staticmethod
    def backward(ctx, gradient, _):
        values, error, slopes = ctx.saved_tensors
        kept = ctx.kept
        scale = -2 * gradient
        per_entry = torch.cat([s.expand(size) for s, size in zip(scale, kept.sizes, strict=True)])
        nothing = error.new_zeros(kept.n, error.shape[-1])
        W_grad, _ = backend(error.device.type).weighted_sums(kept, values * per_entry, error, nothing)
        b_grad = error.sum(1) * scale.unsqueeze(-1)
        target_grad = -scale.view(-1, 1, 1) * error if ctx.needs_input_grad[3] else None
        return slopes * per_entry, W_grad, b_grad, target_grad, None


@dataclass(frozen=True)
class Choice:
    """Rule for the pre-activations that a stack keeps. Only positive ones are kept."""

    k: tuple[int, ...]
    """For each member: number of kept entries a row."""
    across_batch: bool = False
    """Keep the k · rows largest entries of the whole batch, in any rows (BatchTopK)."""
    propose: bool = False
    """Propose entries by a bfloat16 product, and compute the proposals in float32. The kept set is that of float32."""


def encode(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, x: Tensor, choice: Choice) -> tuple[Tensor, Kept]:
    """Kept entries of (x − b_dec) W_enc + b_enc.

    Args:
        b_dec: `[n, d_in]`; None if nothing is subtracted from the input (transcoders).

    Returns:
        (values `[entries]`, differentiable; their places)
    """
    if b_dec is None:
        b_dec = W_enc.new_zeros(W_enc.shape[:2])
    with torch.no_grad():
        bias = b_enc - torch.matmul(b_dec.unsqueeze(1), W_enc).squeeze(1)
        kept = backend(x.device.type).select(x, W_enc.transpose(1, 2), bias, choice)
    return _Encode.apply(W_enc, b_enc, b_dec, x, kept), kept


def reconstruct(values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Distance of the decoded entries from `target [n, rows, d_in]`.

    Returns:
        (Σ over rows of ‖target − b_dec − values W_dec‖², `[n]`, differentiable; the residual `[n, rows, d_in]`)
    """
    return _Reconstruct.apply(values, W_dec, b_dec, target, kept)
