"""What tests of other libraries' checkpoints share."""

import torch


def in_unit_scale(features: torch.Tensor, W_dec: torch.Tensor, topk: bool = False) -> torch.Tensor:
    """Features `[rows, d_sae]` of a library's SAE in the scale of ours: that of decoder rows `W_dec [d_sae, d_in]` of
    norm 1, of a TopK SAE of median norm 1."""
    norms = W_dec.detach().norm(dim=1)
    return features.detach() * (norms.median() if topk else norms)
