"""Share of a known dictionary that an SAE has recovered."""

from __future__ import annotations

from torch import Tensor

from husai.stability.matching import match


def recovery(W_dec: Tensor, features: Tensor) -> float:
    """Mean cosine of known features `[n, d_in]` with their one-to-one partners in a decoder `[d_sae, d_in]`, in [0, 1].

    Negative cosines and features without a partner count 0.
    """
    return float(match(W_dec, features, signed=True).cosines.sum() / len(features))
