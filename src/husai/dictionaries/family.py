"""Interface between SAE architectures and the trainer, with code that architectures share.

An architecture is a module with `PENALISED` (a penalty makes codes sparse, and a controller steers it to the target
L0), `UNIT_DECODER` (decoder rows are kept at norm 1) and three functions:

    init(shape, generators)                      -> parameters of a stack, `[n, …]`
    loss(params, buffers, batch)                 -> Outcome
    weights(params, buffers)                     -> the trained member's tensors, in SAELens' names

Parameters carry one leading axis n, the member: `W_enc [n, d_in, d_sae]`, `b_enc [n, d_sae]`,
`W_dec [n, d_sae, d_out]`, `b_dec [n, d_out]`; activations are `x [n, rows, d_in]`. `W_enc` is a transposed view:
the encoder weights of a feature must be contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from husai.kernels.sparse import Choice, Kept, encode, reconstruct

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Shape of the members of a stack."""

    d_in: int
    d_out: int
    d_sae: int


@dataclass(frozen=True)
class Batch:
    """One step's input to a stack of n members."""

    x: Tensor
    """`[n, rows, d_in]`, centred, of unit variance a coordinate on average."""
    y: Tensor
    """Target of the reconstruction, `[n, rows, d_out]`: x itself, or for transcoders another hook's activations."""
    k: tuple[int, ...]
    """For each member: active features a row. Top-k architectures keep exactly k; the others aim at k."""
    dead: tuple[Tensor, ...]
    """For each member: its dead features, int64."""
    aux_coefficient: float = 1 / 32
    propose: bool = False
    """See `kernels.sparse.Choice`."""

    @property
    def variance(self) -> float:
        """Total variance of `y`: the unit of every loss."""
        return self.y.shape[-1]


@dataclass(frozen=True)
class Outcome:
    """Outcome of one step, for each member of a stack."""

    loss: Tensor
    """`[n]`, differentiable."""
    error: Tensor
    """`[n]`, ‖y − ŷ‖²/variance, averaged over rows."""
    fired: Tensor
    """bool `[n, d_sae]`: active on some row."""
    l0: Tensor
    """`[n]`, active features a row."""


def unit_rows(rows: int, columns: int, generators: list[torch.Generator]) -> Tensor:
    """Directions uniform on the sphere, one matrix for each generator: `[n, rows, columns]`."""
    matrices = [torch.randn(rows, columns, generator=g) for g in generators]
    return torch.stack([m / m.norm(dim=1, keepdim=True) for m in matrices])


def tied_init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """Decoder rows uniform on the unit sphere, the encoder their transpose, biases zero (Gao et al., section 2.4)."""
    W_dec = unit_rows(shape.d_sae, shape.d_in, generators)
    n = len(generators)
    return {
        "W_enc": W_dec.clone().transpose(1, 2),
        "b_enc": torch.zeros(n, shape.d_sae),
        "W_dec": W_dec,
        "b_dec": torch.zeros(n, shape.d_in),
    }


def kept_loss(
    params: Params, batch: Batch, choice: Choice, prefixes: tuple[int, ...] = (), transcoder: bool = False
) -> tuple[Outcome, Kept]:
    """Loss of the architectures that keep the largest pre-activations: reconstruction error plus AuxK.

    Args:
        prefixes: sizes of nested dictionaries smaller than the whole. The error is averaged over all of them.
        transcoder: do not subtract the decoder bias from the input.
    """
    x, y, W_dec = batch.x, batch.y, params["W_dec"]
    b_in = None if transcoder else params["b_dec"]
    rows = x.shape[1]
    target = y - torch.bmm(x, params["W_skip"]) if "W_skip" in params else y
    values, kept = encode(params["W_enc"], params["b_enc"], b_in, x, choice)
    squares, error = reconstruct(values, W_dec, params["b_dec"], target, kept)
    main = squares / (rows * batch.variance)
    loss = main
    for size in prefixes:
        inside = torch.where(kept.features < size, values, 0)
        nested, _ = reconstruct(inside, W_dec, params["b_dec"], target, kept)
        loss = loss + nested / (rows * batch.variance)
    loss = loss / (1 + len(prefixes))
    if batch.aux_coefficient and any(len(d) for d in batch.dead):
        loss = loss + batch.aux_coefficient * auxiliary(params, batch, error, squares, b_in)
    fired, active = kept.activity()
    return Outcome(loss, main.detach(), fired, active / rows), kept


def auxiliary(params: Params, batch: Batch, error: Tensor, squares: Tensor, b_in: Tensor | None) -> Tensor:
    """AuxK (Gao et al., arXiv 2406.04093, section 3.3 and appendix A.2), `[n]`.

    The d_in/2 largest pre-activations of dead features, after ReLU, model the residual of the kept features. The
    gradient reaches encoder and decoder of these features. Members without dead features have loss 0. Products are
    dense, which is faster because a large share of few features is kept.

    Args:
        error: residual of the kept features, `[n, rows, d_out]`. squares: its squared norm, `[n]`.
    """
    k = max(1, batch.x.shape[-1] // 2)
    stacks = params["W_enc"].transpose(1, 2), params["b_enc"], params["W_dec"]
    losses = []
    for i, (dead, *parameters) in enumerate(zip(batch.dead, *(p.unbind() for p in stacks), strict=True)):
        if len(dead) == 0:
            losses.append(error.new_zeros(()))
            continue
        W_enc, b_enc, W_dec = (_Rows.apply(p, dead) for p in parameters)
        bias = b_enc if b_in is None else b_enc - W_enc @ b_in[i]
        features = torch.addmm(bias, batch.x[i], W_enc.T)
        if len(dead) > k:
            largest, places = features.topk(k, dim=1)
            features = torch.zeros_like(features).scatter(1, places, largest)
        losses.append(mse_loss(features.relu() @ W_dec, error[i], reduction="sum"))
    return torch.stack(losses) / squares.detach().clamp_min(torch.finfo(error.dtype).tiny)


class _Rows(torch.autograd.Function):
    """`p[rows]` for distinct rows. The gradient of index_select is slow because it allows for repeated rows."""

    @staticmethod
    def forward(ctx, p, rows):
        ctx.save_for_backward(rows)
        ctx.shape = p.shape
        return p.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient), None


def dense_outcome(loss: Tensor, squares: Tensor, features: Tensor, batch: Batch) -> Outcome:
    """Outcome of an architecture whose `features [n, rows, d_sae]` are computed in full."""
    active = features.detach() > 0
    error = squares.detach() / (batch.x.shape[1] * batch.variance)
    return Outcome(loss, error, active.any(1), active.sum((1, 2)).float() / batch.x.shape[1])
