"""Matryoshka BatchTopK SAEs (Bussmann et al., "Learning multi-level features with Matryoshka sparse autoencoders",
arXiv 2503.17547): nested dictionaries, each of which must reconstruct. A dictionary holds the first features of the
next larger one."""

from __future__ import annotations

from husai.dictionaries import batchtopk
from husai.dictionaries.family import Batch, Outcome, Params

PENALISED, UNIT_DECODER = False, True
ARCHITECTURE = "jumprelu"
init, weights = batchtopk.init, batchtopk.weights
LEVELS = 5


def prefixes(d_sae: int) -> tuple[int, ...]:
    """Sizes of the nested dictionaries except the whole: d_sae/16, d_sae/8, d_sae/4, d_sae/2."""
    return tuple(size for level in range(LEVELS - 1, 0, -1) if (size := d_sae // 2**level) > 0)


def loss(params: Params, buffers: Params, batch: Batch) -> Outcome:
    """‖y − ŷ‖²/variance, averaged over the nested dictionaries, + aux_coefficient · AuxK."""
    return batchtopk.loss(params, buffers, batch, prefixes(params["W_dec"].shape[1]))
