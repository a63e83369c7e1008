"""TopK SAEs (Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093), one or a stack of them.

Parameters carry one leading axis n, the member: `W_enc [n, d_in, d_sae]`, `b_enc [n, d_sae]`, `W_dec [n, d_sae, d_in]`,
`b_dec [n, d_in]`; activations are `x [n, rows, d_in]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Params = dict[str, Tensor]


def init(d_in: int, d_sae: int, b_dec: Tensor, generators: list[torch.Generator]) -> Params:
    """One member a generator: decoder rows uniform on the unit sphere, the encoder their transpose, `b_enc` zero.

    Args:
        b_dec: `[d_in]`, where every member's `b_dec` starts (a statistic of the data, not of a seed).
    """
    rows = [torch.randn(d_sae, d_in, generator=g) for g in generators]
    W_dec = torch.stack([r / r.norm(dim=1, keepdim=True) for r in rows])
    return {
        "W_enc": W_dec.transpose(1, 2).contiguous(),
        "b_enc": torch.zeros(len(rows), d_sae),
        "W_dec": W_dec,
        "b_dec": b_dec.float().repeat(len(rows), 1),
    }


def pre_activations(params: Params, x: Tensor) -> Tensor:
    """(x − b_dec) W_enc + b_enc, `[n, rows, d_sae]` (equation 3: the decoder's bias is taken off the input)."""
    return torch.baddbmm(params["b_enc"].unsqueeze(1), x - params["b_dec"].unsqueeze(1), params["W_enc"])


def keep_top(pre: Tensor, k: Tensor) -> Tensor:
    """The k largest of each row, then ReLU; zero elsewhere. `k [n]` may differ between members."""
    values, indices = pre.topk(int(k.max()), dim=-1)
    kept = torch.arange(values.shape[-1], device=pre.device) < k.view(-1, 1, 1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu() * kept)


def decode(params: Params, features: Tensor) -> Tensor:
    """features W_dec + b_dec, `[n, rows, d_in]`."""
    return torch.baddbmm(params["b_dec"].unsqueeze(1), features, params["W_dec"])


def loss(
    params: Params, x: Tensor, k: Tensor, dead: Tensor, variance: float, k_aux: int, aux_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each member's loss on a batch.

    AuxK (section 3.3 and appendix A.2): the `k_aux` largest pre-activations of dead features, ReLU after the
    selection, model what the kept features left over; the gradient reaches those features' encoder and decoder.

    Args:
        k: `[n]`. dead: bool `[n, d_sae]`. variance: total variance of the activations, the loss's unit.

    Returns:
        (loss `[n]`, its main term ‖x − x̂‖²/variance `[n]`, which features fired, bool `[n, d_sae]`)
    """
    pre = pre_activations(params, x)
    features = keep_top(pre, k)
    error = x - decode(params, features)
    main = error.square().sum(-1).mean(-1) / variance
    fired = (features.detach() > 0).any(1)
    if aux_coefficient == 0 or not dead.any():
        return main, main.detach(), fired
    # Only the dead features' columns are touched. Members with fewer dead features than others carry some that are not:
    # −inf keeps those out of the selection, and relu(−inf) = 0 where fewer than k_aux are dead.
    columns = dead.int().topk(int(dead.sum(1).max()), dim=1).indices
    candidates = pre.gather(2, columns.unsqueeze(1).expand(-1, pre.shape[1], -1))
    candidates = candidates.masked_fill(~dead.gather(1, columns).unsqueeze(1), -torch.inf)
    values, indices = candidates.topk(min(k_aux, columns.shape[1]), dim=-1)
    revived = torch.zeros_like(candidates).scatter(-1, indices, values.relu())
    directions = params["W_dec"].gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    target = error.detach()
    residual = (target - torch.bmm(revived, directions)).square().sum((1, 2))
    auxiliary = residual / target.square().sum((1, 2)).clamp_min(torch.finfo(target.dtype).tiny)
    return main + aux_coefficient * auxiliary * dead.any(1), main.detach(), fired
