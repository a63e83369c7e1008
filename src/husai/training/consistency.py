"""Assignment consistency: a pull of each decoder row towards its partner in a frozen reference dictionary.

    λ · [1 − mean_i |cos(d_i, r_π(i))|],  π the best one-to-one assignment of the rows by |cos|

π is computed again at regular intervals of steps. The pull makes dictionaries more like their references.
`run_assignment_consistency_v2.py` measures whether it makes independent dictionaries more similar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class References:
    """Dictionaries that members of a run can be pulled towards."""

    decoders: dict[str, Tensor]
    """sha256 of a checkpoint -> its `W_dec [d_sae, d_in]`."""
    assign: Callable[[Tensor, Tensor], Tensor]
    """(W_dec, reference) -> the reference's rows in the order of their partners (`stability.matching.partners`)."""
    every: int = 50
    """Steps between two assignments."""


class Consistency:
    """The pull of a stack of n members.

    Args:
        names: reference of each member; None: the member is not pulled.
        weights: λ of each member.
        like: tensor with the shape `[n, d_sae, d_in]`, dtype and device of the decoders.
    """

    def __init__(self, names: list[str | None], weights: list[float], references: References, like: Tensor):
        self.names, self.references = names, references
        self.weights = torch.tensor(weights, device=like.device, dtype=like.dtype)
        self.partners = torch.zeros_like(like)
        """`[n, d_sae, d_in]`: r_π(i) at the position of d_i."""

    @torch.no_grad()
    def assign(self, W_dec: Tensor) -> None:
        """Compute π of each member again."""
        for i, name in enumerate(self.names):
            if name is not None:
                partners = self.references.assign(W_dec[i].cpu(), self.references.decoders[name].cpu())
                self.partners[i].copy_(normalize(partners, dim=1))

    def loss(self, W_dec: Tensor) -> Tensor:
        """Weighted pull of each member, `[n]`, differentiable."""
        cosines = (normalize(W_dec, dim=-1) * self.partners).sum(-1)
        return self.weights * (1 - cosines.abs().mean(-1))
