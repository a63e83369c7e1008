"""Implementation of `sparse.py` in plain PyTorch on dense matrices, for devices without kernels and for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from husai.kernels.sparse import Choice, Kept


def select(x: Tensor, W: Tensor, bias: Tensor, choice: Choice) -> Kept:
    """The entries of x Wᵀ + bias to keep. `x [n, rows, d_in]`, `W [n, d_sae, d_in]`, `bias [n, d_sae]`."""
    (n, rows, _), d_sae = x.shape, W.shape[1]
    pre = torch.baddbmm(bias.unsqueeze(1), x, W.transpose(1, 2))
    offsets, features, values = [torch.zeros(1, dtype=torch.long, device=x.device)], [], []
    for i in range(n):
        if choice.across_batch:
            size = min(choice.k[i] * rows, pre[i].numel())
            top, places = pre[i].flatten().topk(size)
            places, order = places.sort()
            top = top[order]
            counts = torch.zeros(rows, dtype=torch.long, device=x.device)
            counts.index_add_(0, places // d_sae, torch.ones_like(places))
            chosen = places % d_sae
        else:
            size = min(choice.k[i], d_sae)
            top, places = pre[i].topk(size, dim=1)
            top, chosen = top.flatten(), places.flatten()
            counts = torch.full((rows,), size, device=x.device)
        offsets.append(counts.cumsum(0) + offsets[-1][-1])
        features.append(chosen.int())
        values.append(top.relu())
    sizes = tuple(len(v) for v in values)
    return Kept(rows, d_sae, sizes, torch.cat(offsets), torch.cat(features), torch.cat(values))


def residual(kept: Kept, values: Tensor, W: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(error = target − bias − Σ values · W `[n, rows, d_in]`, each entry's W[feature] · error, each row's ‖error‖²)"""
    features = _matrix(kept, values)
    error = target - torch.baddbmm(bias.unsqueeze(1), features, W)
    slopes = torch.bmm(error, W.transpose(1, 2)).view(-1, kept.d_sae)
    slopes = slopes[kept.row_of_entries(), kept.features.long()]
    return error, slopes, error.square().sum(-1).flatten()


def weighted_sums(kept: Kept, weights: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """For each feature over its entries: (Σ weights · (x − centre) `[n, d_sae, d_in]`, Σ weights `[n, d_sae]`)"""
    matrix = _matrix(kept, weights).transpose(1, 2)
    return torch.bmm(matrix, x - centre.unsqueeze(1)), matrix.sum(-1)


def activity(kept: Kept) -> tuple[Tensor, Tensor]:
    """(bool [n, d_sae], which features are active on any row; [n], how many entries are positive)"""
    positive = (kept.values > 0).long()
    places = kept.row_of_entries() // kept.rows * kept.d_sae + kept.features
    counts = torch.zeros(kept.n * kept.d_sae, dtype=torch.long, device=places.device).index_add_(0, places, positive)
    counts = counts.view(kept.n, kept.d_sae)
    return counts > 0, counts.sum(1)


def _matrix(kept: Kept, weights: Tensor) -> Tensor:
    return replace(kept, values=weights).dense()


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
    """One step of Adam on `p [n, …]`, in place, with decoupled weight decay (AdamW): p ← p (1 − rate · decay).

    Args:
        rate: learning rate of each member, `[n]`. corrections: 1 − β₁ᵗ and 1 − β₂ᵗ at step t, `[2]`.
        unit: rows keep norm 1. The part of the gradient along a row is removed.
    """
    if unit:
        g = g - (g * p).sum(-1, keepdim=True) * p
    rate = rate.to(p.dtype).view(-1, *[1] * (p.ndim - 1))
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    update = (m / corrections[0]).div_((v / corrections[1]).sqrt_().add_(1e-8))
    p.mul_(1 - rate * decay).sub_(update.mul_(rate))
    if unit:
        p.div_(p.norm(dim=-1, keepdim=True))
