"""How much of a dictionary that is known an SAE has found."""

from __future__ import annotations

from torch import Tensor

from husai.stability.matching import match


def recovery(W_dec: Tensor, features: Tensor) -> float:
    """Mean cosine of the known features `[n, d_in]` with decoder rows `[d_sae, d_in]`, one to one, in [0, 1].

    A negative cosine counts 0, and so does a feature without a partner.
    """
    return float(match(W_dec, features, signed=True).cosines.sum() / len(features))
