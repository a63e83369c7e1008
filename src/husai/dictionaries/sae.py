"""A trained SAE or transcoder: encode and decode, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

ENCODER = {
    "standard": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag"),
}
"""Kind of encoder -> its tensors. The decoder is `W_dec` and `b_dec`, for skip transcoders also `W_skip`."""
ARCHITECTURES = {
    **{name: name for name in ENCODER},
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens' names -> kind of encoder."""


class Autoencoder(Protocol):
    """Interface of objects that encode and decode rows: SAEs and dictionaries of prototypes."""

    @property
    def d_sae(self) -> int: ...
    def to(self, device: torch.device | str) -> Autoencoder: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor: ...


@dataclass
class SAE:
    """Tensors of an SAE, in SAELens' names and shapes: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_out]`,
    `b_dec [d_out]`; `threshold`, `b_gate`, `b_mag`, `r_mag` `[d_sae]`; `W_skip [d_out, d_in]`."""

    weights: dict[str, Tensor]
    architecture: str = "topk"
    k: int | None = None
    """Number of active features a row, for topk alone."""
    subtract_b_dec: bool = True
    """Whether the encoder subtracts b_dec from its input. Transcoders do not."""
    metadata: dict = field(default_factory=dict)
    """How the SAE was made: model_name, hook_name, and under `husai` family, seeds, tokens, and digests."""

    @property
    def W_enc(self) -> Tensor:
        return self.weights["W_enc"]

    @property
    def W_dec(self) -> Tensor:
        return self.weights["W_dec"]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE on another device."""
        return replace(self, weights={name: t.to(device) for name, t in self.weights.items()})

    def encode(self, x: Tensor) -> Tensor:
        """`x [rows, d_in]` -> features `[rows, d_sae]`."""
        w, kind = self.weights, ARCHITECTURES[self.architecture]
        if self.subtract_b_dec:
            x = x - w["b_dec"]
        if kind == "gated":
            gate = x @ w["W_enc"] + w["b_gate"]
            return (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu() * (gate > 0)
        pre = x @ w["W_enc"] + w["b_enc"]
        if kind == "topk":
            top, features = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, features, top.relu())
        return pre.relu() * (pre > w["threshold"]) if kind == "jumprelu" else pre.relu()

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """features `[rows, d_sae]` -> `[rows, d_out]`; skip transcoders also need their input `x [rows, d_in]`."""
        out = features @ self.weights["W_dec"] + self.weights["b_dec"]
        return out + x @ self.weights["W_skip"].T if "W_skip" in self.weights else out
