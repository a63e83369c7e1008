"""Implementation of `sparse.py` on a GPU: Triton kernels (`gpu_kernels.py`) over the whole stack.

The host does not wait for the device if no feature is dead.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from husai.kernels import dense
from husai.kernels import gpu_kernels as kernels
from husai.kernels.dense import activity  # noqa: F401 (part of what a backend offers)
from husai.kernels.sparse import Choice, Kept

PRODUCT_BYTES = 2**30
"""Largest number of bytes of pre-activations at a time."""
EXTRA = 32  # proposals beyond the k largest; on the CPU their number follows from a bound


def select(x: Tensor, W: Tensor, bias: Tensor, choice: Choice) -> Kept:
    """The entries of x Wᵀ + bias to keep. `x [n, rows, d_in]`, `W [n, d_sae, d_in]`, `bias [n, d_sae]`."""
    if choice.across_batch:
        return dense.select(x, W, bias, choice)
    (n, rows, _), d_sae, k = x.shape, W.shape[1], max(choice.k)
    piece = max(1, PRODUCT_BYTES // (n * d_sae * (2 if choice.propose else x.element_size())))
    parts = [_rows(x[:, first : first + piece], W, bias, k, choice.propose) for first in range(0, rows, piece)]
    values, features = (torch.cat(t, 1) for t in zip(*parts, strict=True))
    if min(choice.k) < k:  # members that keep fewer
        kept = torch.tensor(choice.k, device=x.device).view(-1, 1, 1)
        values = values.masked_fill(torch.arange(k, device=x.device) >= kept, 0)
    offsets = torch.arange(n * rows + 1, device=x.device) * k
    return Kept(rows, d_sae, (rows * k,) * n, offsets, features.flatten().int(), values.flatten().relu())


def _rows(x: Tensor, W: Tensor, bias: Tensor, k: int, propose: bool) -> tuple[Tensor, Tensor]:
    """(values, features) `[n, rows, k]` of the largest pre-activations, largest first."""
    if not propose:
        return torch.baddbmm(bias.unsqueeze(1), x, W.transpose(1, 2)).topk(k, dim=-1)
    product = torch.bmm(x.bfloat16(), W.transpose(1, 2).bfloat16()) + bias.unsqueeze(1).bfloat16()
    proposals = product.topk(min(k + EXTRA, W.shape[1]), dim=-1, sorted=False).indices
    values, order = gather_dots(proposals, W, bias, x).topk(k, dim=-1)
    return values, proposals.gather(-1, order)


def gather_dots(features: Tensor, W: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """W[features] · x + bias[features] for `features [n, rows, entries]` of each row of `x [n, rows, d_in]`."""
    x = _rows_together(x)
    features, W, bias = features.contiguous(), W.contiguous(), bias.contiguous()
    out = x.new_empty(features.shape)
    n, rows, entries = features.shape
    sizes = (entries, rows, W.shape[1], W.shape[2], x.stride(0))
    kernels.gather_dots[(n * rows,)](features, W, bias, x, out, *sizes, BLOCK=_block(W.shape[2]))
    return out


def residual(kept: Kept, values: Tensor, W: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(error = target − bias − Σ values · W `[n, rows, d_in]`, each entry's W[feature] · error, each row's ‖error‖²)"""
    d_in = W.shape[2]
    target = _rows_together(target.detach())
    error = target.new_empty(kept.n, kept.rows, d_in)
    slopes, squares = torch.empty_like(values), values.new_empty(kept.n * kept.rows)
    values, W, bias = values.contiguous(), W.contiguous(), bias.contiguous()
    kernels.residual[(kept.n * kept.rows,)](
        *(kept.offsets, kept.features, values, W, bias, target, error, slopes, squares),
        *(kept.rows, kept.d_sae, d_in, target.stride(0)),
        BLOCK=_block(d_in),
    )
    return error, slopes, squares


def weighted_sums(kept: Kept, weights: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """For each feature over its entries: (Σ weights · (x − centre) `[n, d_sae, d_in]`, Σ weights `[n, d_sae]`)"""
    if kept.order is None:
        rows_of = kept.row_of_entries()
        places, order = (rows_of // kept.rows * kept.d_sae + kept.features).sort(stable=True)
        features = torch.arange(kept.n * kept.d_sae + 1, device=places.device)
        kept.order = torch.searchsorted(places, features), rows_of, order
    d_in = x.shape[2]
    x = _rows_together(x)
    sums, totals = weights.new_empty(kept.n, kept.d_sae, d_in), weights.new_empty(kept.n, kept.d_sae)
    kernels.weighted_sums[(kept.n * kept.d_sae,)](
        *(*kept.order, weights.contiguous(), x, centre.contiguous(), sums, totals),
        *(kept.rows, kept.d_sae, d_in, x.stride(0)),
        BLOCK=_block(d_in),
    )
    return sums, totals


def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rate: Tensor,
    decay: float,
    betas: tuple,
    corrections: Tensor,
    unit: bool,
) -> None:
    """As `dense.adam`, for parameters whose rows are contiguous."""
    d = p.shape[-1]
    rows = p[0].numel() // d
    constants = (float(decay), *map(float, betas), rows, d)
    kernels.adam[(len(p) * rows,)](
        p, g.contiguous(), m, v, rate.to(p.dtype), corrections.to(p.dtype), *constants, UNIT=unit, BLOCK=_block(d)
    )


def _block(d: int) -> int:
    return triton.next_power_of_2(d)


def _rows_together(x: Tensor) -> Tensor:
    """`x [n, rows, d]` with contiguous rows. Members may share rows (stride 0)."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
