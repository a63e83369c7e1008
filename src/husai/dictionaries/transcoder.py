"""Transcoders (Dunefsky et al., arXiv 2406.11944): they map one hook's activations to another's, such as an MLP's input
to its output. Their activation function is that of BatchTopK SAEs. No decoder bias is subtracted from the input."""

from __future__ import annotations

import torch

from husai.dictionaries import batchtopk
from husai.dictionaries.family import Batch, Outcome, Params, Shape, unit_rows

PENALISED, UNIT_DECODER = False, True
ARCHITECTURE = "jumprelu_transcoder"
weights = batchtopk.weights


def init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """Encoder columns and decoder rows uniform on the unit sphere, drawn independently; biases zero."""
    n = len(generators)
    return {
        "W_enc": unit_rows(shape.d_sae, shape.d_in, generators).transpose(1, 2),
        "b_enc": torch.zeros(n, shape.d_sae),
        "W_dec": unit_rows(shape.d_sae, shape.d_out, generators),
        "b_dec": torch.zeros(n, shape.d_out),
    }


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """‖y − ŷ‖²/variance + aux_coefficient · AuxK, ŷ = f(x) W_dec + b_dec."""
    return batchtopk.loss(params, buffers, batch, transcoder=True)
