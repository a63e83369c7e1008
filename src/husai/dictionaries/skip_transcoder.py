"""Skip transcoders (Paulo et al., arXiv 2501.18823): a transcoder plus a linear map,
ŷ = f(x) W_dec + b_dec + x W_skip."""

from __future__ import annotations

import torch

from husai.dictionaries import transcoder
from husai.dictionaries.family import Params, Shape

PENALISED, UNIT_DECODER = False, True
ARCHITECTURE = "jumprelu_skip_transcoder"
loss, weights = transcoder.loss, transcoder.weights


def init(shape: Shape, generators: list[torch.Generator]) -> Params:
    """As a transcoder; the linear map `W_skip [n, d_in, d_out]` starts at zero."""
    return transcoder.init(shape, generators) | {"W_skip": torch.zeros(len(generators), shape.d_in, shape.d_out)}
