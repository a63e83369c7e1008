"""What a language model loses when an SAE stands in at its hook: cross-entropy with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from husai.activations.language_model import batches
from husai.dictionaries.sae import SAE
from husai.subjects.pretrained import LanguageModel

LOGITS = 2**27  # at once


@torch.inference_mode()
def cross_entropies(subject: LanguageModel, hook_name: str, saes: list[SAE], texts: list[str]) -> dict:
    """Mean cross-entropy of the next token and KL divergence from the model as it is, in nats, over the texts, each cut
    to n_ctx. The passes without an SAE are shared by all.

    An SAE replaces what it was trained on: every position but the first; what is predicted there is counted.

    Returns:
        {"model": as it is, "zeroed": with zeros in the activation's place, "spliced": with each SAE's reconstruction,
        "kl_zeroed", "kl_spliced": the same of KL(as it is ‖ changed), "tokens": how many were predicted}
    """
    tokenizer, model = subject.tokenizer, subject.model
    tokenizer.truncation_side = "right"
    encoded = tokenizer(texts, truncation=True, max_length=subject.n_ctx)["input_ids"]
    inputs = [torch.tensor(ids) for ids in encoded if len(ids) > 2]
    device = next(model.parameters()).device
    replacements = [torch.zeros_like, *(reconstruction(sae.to(device)) for sae in saes)]
    total, losses, divergences, count = 0.0, np.zeros(len(replacements)), np.zeros(len(replacements)), 0
    at_once = max(512, min(4096, LOGITS // len(tokenizer)))
    for chosen in batches(np.array([*map(len, inputs)]), at_once):
        tokens = torch.nn.utils.rnn.pad_sequence([inputs[i] for i in chosen], batch_first=True).to(device)
        lengths = torch.tensor([len(inputs[i]) for i in chosen], device=device)
        position = torch.arange(tokens.shape[1] - 1, device=device)
        counted = (position >= 1) & (position < lengths[:, None] - 1)  # what is predicted at these is counted
        targets = tokens[:, 1:][counted].unsqueeze(1)

        def predictions(hooks: list, tokens: Tensor = tokens, counted: Tensor = counted) -> Tensor:
            return model.run_with_hooks(tokens, fwd_hooks=hooks)[:, :-1][counted].float().log_softmax(-1)

        whole = predictions([])
        probability = whole.exp()
        total -= whole.gather(1, targets).sum().item()
        for i, replace in enumerate(replacements):
            changed = predictions([(hook_name, spliced(replace))])
            losses[i] -= changed.gather(1, targets).sum().item()
            divergences[i] += torch.linalg.vecdot(probability, whole - changed).sum().item()
        count += len(targets)
    zeroed, *others = (losses / count).tolist()
    kl_zeroed, *kl_others = (divergences / count).tolist()
    return {
        "model": total / count,
        "zeroed": zeroed,
        "spliced": others,
        "kl_zeroed": kl_zeroed,
        "kl_spliced": kl_others,
        "tokens": count,
    }


def reconstruction(sae: SAE) -> Callable[[Tensor], Tensor]:
    """Rows `[n, d_in]` -> what the SAE makes of them."""
    return lambda x: sae.decode(sae.encode(x), x)


def spliced(replace: Callable[[Tensor], Tensor]) -> Callable:
    """A hook that puts `replace` in the place of the activation `[batch, position, d_in]`, the first position aside."""

    def hook_function(x: Tensor, hook) -> Tensor:
        new = x.clone()
        new[:, 1:] = replace(x[:, 1:].flatten(0, 1)).reshape(x[:, 1:].shape).to(x.dtype)
        return new

    return hook_function


def recovered(losses: dict) -> list[float]:
    """Of each SAE: 1 where the model is as good as without it, 0 where as bad as with zeros in its place."""
    lost = losses["zeroed"] - losses["model"]
    return [(losses["zeroed"] - value) / lost for value in losses["spliced"]]
