"""Assignment consistency: a pull of each decoder row towards its partner in a frozen reference dictionary.

    λ · [1 − mean_i |cos(d_i, r_π(i))|],  π the best one-to-one assignment of the rows by |cos|

π is found again every so many steps. The pull makes dictionaries more like their references; whether it makes
independent ones more like each other is what `run_assignment_consistency_v2.py` asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class References:
    """What the members of a run may be pulled towards."""

    decoders: dict[str, Tensor]
    """sha256 of a checkpoint -> its `W_dec [d_sae, d_in]`."""
    assign: Callable[[Tensor, Tensor], Tensor]
    """(W_dec, reference) -> the reference's rows in the order of their partners (`stability.matching.partners`)."""
    every: int = 50
    """Steps between two assignments."""


class Consistency:
    """Of a stack of n members.

    Args:
        names: each member's reference, or None for a member that is not pulled. weights: each member's λ.
        like: a tensor of the shape `[n, d_sae, d_in]`, dtype and device of the decoders.
    """

    def __init__(self, names: list[str | None], weights: list[float], references: References, like: Tensor):
        self.names, self.references = names, references
        self.weights = torch.tensor(weights, device=like.device, dtype=like.dtype)
        self.partners = torch.zeros_like(like)
        """`[n, d_sae, d_in]`: r_π(i) in the place of d_i."""

    @torch.no_grad()
    def assign(self, W_dec: Tensor) -> None:
        """Find each member's π anew."""
        for i, name in enumerate(self.names):
            if name is not None:
                found = self.references.assign(W_dec[i].cpu(), self.references.decoders[name].cpu())
                self.partners[i].copy_(normalize(found, dim=1))

    def loss(self, W_dec: Tensor) -> Tensor:
        """`[n]`, differentiable."""
        cosines = (normalize(W_dec, dim=-1) * self.partners).sum(-1)
        return self.weights * (1 - cosines.abs().mean(-1))
