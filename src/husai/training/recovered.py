"""What a language model loses when an SAE stands in at its hook: cross-entropy with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from husai.activations.language_model import batches
from husai.dictionaries.sae import SAE
from husai.subjects.pretrained import LanguageModel


@torch.inference_mode()
def cross_entropies(subject: LanguageModel, hook_name: str, saes: list[SAE], texts: list[str]) -> dict:
    """Mean cross-entropy of the next token, in nats, over the texts, each cut to n_ctx.

    An SAE replaces what it was trained on: every position but the first; what is predicted there is counted.

    Returns:
        {"model": as it is, "zeroed": with zeros in the activation's place, "spliced": with each SAE's reconstruction,
        "tokens": how many were predicted}
    """
    tokenizer, model = subject.tokenizer, subject.model
    tokenizer.truncation_side = "right"
    encoded = tokenizer(texts, truncation=True, max_length=subject.n_ctx)["input_ids"]
    inputs = [torch.tensor(ids) for ids in encoded if len(ids) > 2]
    replacements = [None, torch.zeros_like, *(reconstruction(sae) for sae in saes)]
    device = next(model.parameters()).device
    totals, count = np.zeros(len(replacements)), 0
    for chosen in batches(np.array([*map(len, inputs)]), 4096):
        tokens = torch.nn.utils.rnn.pad_sequence([inputs[i] for i in chosen], batch_first=True).to(device)
        targets = tokens[:, 1:].clone()
        targets[:, 0] = -100
        for row, i in enumerate(chosen):
            targets[row, len(inputs[i]) - 1 :] = -100
        for i, replace in enumerate(replacements):
            logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, spliced(replace))] if replace else [])
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            totals[i] += loss.item()
        count += int((targets != -100).sum())
    model_loss, zeroed, *others = (totals / count).tolist()
    return {"model": model_loss, "zeroed": zeroed, "spliced": others, "tokens": count}


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
