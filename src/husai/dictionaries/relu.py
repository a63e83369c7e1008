"""ReLU SAEs with an L1 penalty on activations weighted by their decoder row's norm (Conerly et al., "Update on how we
train SAEs", Transformer Circuits, April 2024). Decoder rows are free; `weights` folds their norms into the encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from husai.dictionaries.family import Batch, Outcome, Params, Shape, dense_outcome, tied_init

PENALISED, UNIT_DECODER = True, False
ARCHITECTURE = "standard"


def init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """Tied, decoder rows of norm 0.1."""
    params = tied_init(shape, generators)
    return params | {"W_dec": params["W_dec"] * 0.1, "W_enc": params["W_enc"] * 0.1}


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """‖y − ŷ‖²/variance + penalty · Σ f ‖W_dec row‖ / √variance, averaged over rows."""
    W_dec, b_dec = params["W_dec"], params["b_dec"].unsqueeze(1)
    features = torch.baddbmm(params["b_enc"].unsqueeze(1), batch.x - b_dec, params["W_enc"]).relu()
    squares = (batch.y - torch.baddbmm(b_dec, features, W_dec)).square().sum((1, 2))
    weighted = torch.einsum("nrf,nf->n", features, W_dec.norm(dim=-1)) / batch.variance**0.5
    rows = batch.x.shape[1]
    total = squares / (rows * batch.variance) + buffers["penalty"] * weighted / rows
    return dense_outcome(total, squares, features, batch)


def weights(params: Params, buffers: Params) -> dict[str, Tensor]:
    norms = params["W_dec"].norm(dim=-1)
    return params | {
        "W_enc": params["W_enc"] * norms,
        "b_enc": params["b_enc"] * norms,
        "W_dec": params["W_dec"] / norms.unsqueeze(-1),
    }
