"""TopK SAEs: the k largest pre-activations of each row, then ReLU (Gao et al., "Scaling and evaluating sparse
autoencoders", arXiv 2406.04093)."""

from __future__ import annotations

from torch import Tensor

from husai.dictionaries.family import Batch, Outcome, Params, kept_loss, tied_init
from husai.kernels.sparse import Choice

PENALISED, UNIT_DECODER = False, True
ARCHITECTURE = "topk"
init = tied_init


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """‖y − ŷ‖²/variance + aux_coefficient · AuxK."""
    outcome, _ = kept_loss(params, batch, Choice(batch.k, propose=batch.propose))
    return outcome


def weights(params: Params, buffers: Params) -> dict[str, Tensor]:
    return params
