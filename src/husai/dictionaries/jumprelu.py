"""JumpReLU SAEs (Rajamanoharan et al., arXiv 2407.14435): each feature is active above its own threshold.

Thresholds are learned by straight-through estimators from the reconstruction error and an L0 penalty.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from husai.dictionaries.family import Batch, Outcome, Params, Shape, dense_outcome, tied_init
from husai.dictionaries.sae import SAE

PENALISED, UNIT_DECODER = True, True
ARCHITECTURE = "jumprelu"
BANDWIDTH = 0.1  # of the rectangle kernel; pre-activations are of order 1, as the activations are scaled
INITIAL_THRESHOLD = 0.1


def init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """Tied initialisation. The threshold is a parameter, because its logarithm hardly moves at Adam's step sizes."""
    n = len(generators)
    return tied_init(shape, generators) | {"threshold": torch.full((n, shape.d_sae), INITIAL_THRESHOLD)}


class _Jump(torch.autograd.Function):
    """(f, active) = (pre · H(pre − θ), H(pre − θ)), with the paper's estimators of the gradients to θ (equations 11 and
    12): −θ/ε · K((pre − θ)/ε) for f and −1/ε · K((pre − θ)/ε) for active, K the rectangle of width 1."""

    @staticmethod
    def forward(ctx, pre, threshold):
        threshold = threshold.unsqueeze(1)
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold)
        return pre * active, active

    @staticmethod
    def backward(ctx, to_features, to_active):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype)
        to_threshold = (threshold * to_features + to_active).mul_(near).sum(1) / -BANDWIDTH
        return to_features * (pre > threshold), to_threshold


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """‖y − ŷ‖²/variance + penalty · L0/d_sae, averaged over rows."""
    b_dec = params["b_dec"].unsqueeze(1)
    pre = torch.baddbmm(params["b_enc"].unsqueeze(1), batch.x - b_dec, params["W_enc"]).relu()
    features, active = _Jump.apply(pre, params["threshold"])
    squares = (batch.y - torch.baddbmm(b_dec, features, params["W_dec"])).square().sum((1, 2))
    rows = batch.x.shape[1]
    total = squares / (rows * batch.variance) + buffers["penalty"] * active.sum((1, 2)) / (rows * pre.shape[-1])
    return dense_outcome(total, squares, features, batch)


def calibrated(sae: SAE, x: Tensor, k: int) -> SAE:
    """The same SAE with thresholds multiplied by one factor, which gives rows `x [rows, d_in]` a mean L0 of k.

    The penalty's controller misses k slightly, because thresholds hardly move once the learning rate decays.
    """
    w = sae.weights
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    threshold = w["threshold"].clamp_min(torch.finfo(pre.dtype).tiny)
    ratio = (pre / threshold)[pre > 0]
    if len(ratio) == 0:
        return sae
    most = min(k * len(x), len(ratio) - 1)
    factor = ratio.kthvalue(len(ratio) - most).values  # `most` ratios lie above it
    return replace(sae, weights=w | {"threshold": threshold * factor})


def weights(params: Params, buffers: Params) -> dict[str, Tensor]:
    return params
