"""Gated SAEs (Rajamanoharan et al., arXiv 2404.16014): a gate decides which features are active, a second path sets
their magnitudes. Both share encoder directions. The L1 penalty acts on the gate alone, so magnitudes do not shrink."""

from __future__ import annotations

import torch
from torch import Tensor

from husai.dictionaries.family import Batch, Outcome, Params, Shape, dense_outcome, tied_init

PENALISED, UNIT_DECODER = True, True
ARCHITECTURE = "gated"


def init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """Tied; both biases and the log-scale of the magnitudes `r_mag [n, d_sae]` start at zero."""
    params = tied_init(shape, generators)
    b_enc = params.pop("b_enc")
    return params | {"b_gate": b_enc, "b_mag": b_enc.clone(), "r_mag": b_enc.clone()}


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """Equation 8: ‖y − ŷ‖² + penalty · Σ ReLU(gate) + ‖y − ReLU(gate) W_dec − b_dec‖², averaged over rows.

    The decoder of the last term has no gradient. Squared errors are in units of the variance, the penalty in units of
    its square root.
    """
    W_dec, b_dec = params["W_dec"], params["b_dec"].unsqueeze(1)
    shared = torch.bmm(batch.x - b_dec, params["W_enc"])
    gate = shared + params["b_gate"].unsqueeze(1)
    magnitude = (shared * params["r_mag"].exp().unsqueeze(1) + params["b_mag"].unsqueeze(1)).relu()
    features = magnitude * (gate > 0)
    gate = gate.relu()
    squares = (batch.y - torch.baddbmm(b_dec, features, W_dec)).square().sum((1, 2))
    by_gate = (batch.y - torch.baddbmm(b_dec.detach(), gate, W_dec.detach())).square().sum((1, 2))
    rows, variance = batch.x.shape[1], batch.variance
    penalty = buffers["penalty"] * gate.sum((1, 2)) / variance**0.5
    return dense_outcome(((squares + by_gate) / variance + penalty) / rows, squares, features, batch)


def weights(params: Params, buffers: Params) -> dict[str, Tensor]:
    return params
