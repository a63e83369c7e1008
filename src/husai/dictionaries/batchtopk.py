"""BatchTopK SAEs: the k · rows largest pre-activations of a batch are active (Bussmann et al., arXiv 2412.06410).

At inference each row is encoded by itself. A threshold replaces the batch: the running mean of the smallest kept value.
The trained SAE is therefore a JumpReLU SAE with one threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from husai.dictionaries.family import Batch, Outcome, Params, kept_loss, tied_init
from husai.kernels.sparse import Choice

PENALISED, UNIT_DECODER = False, True
ARCHITECTURE = "jumprelu"
init = tied_init
MEMORY = 0.99  # of the running mean


def loss(
    params: Params, buffers: Params, batch: Batch, prefixes: tuple[int, ...] = (), transcoder: bool = False
) -> Outcome:
    """‖y − ŷ‖²/variance + aux_coefficient · AuxK. Updates the threshold."""
    choice = Choice(batch.k, across_batch=True)
    outcome, kept = kept_loss(params, batch, choice, prefixes, transcoder)
    with torch.no_grad():
        smallest = kept.smallest()
        old = buffers["threshold"]
        new = torch.where(old < 0, smallest, MEMORY * old + (1 - MEMORY) * smallest)
        buffers["threshold"].copy_(torch.where(smallest.isfinite(), new, old))
    return outcome


def weights(params: Params, buffers: Params) -> dict[str, Tensor]:
    return params | {"threshold": buffers["threshold"].clamp_min(0).expand_as(params["b_enc"]).clone()}
