"""Held-out contexts in which single features fire most."""

from __future__ import annotations

import numpy as np
import torch

from husai.activations.language_model import Inputs, batches, run
from husai.dictionaries.sae import SAE
from husai.runs.progress import progress
from husai.subjects.pretrained import LanguageModel

CONTEXTS = 8
WINDOW = 24  # tokens of a context


@torch.inference_mode()
def strongest_contexts(
    subject: LanguageModel, hook_name: str, requests: list[tuple[SAE, list[int]]], inputs: Inputs
) -> list[list[dict]]:
    """The CONTEXTS documents in which each feature fires most, with the tokens around the peak.

    Args:
        requests: SAEs, each with the numbers of its features. The model reads the text once for all SAEs.

    Returns:
        For each feature, SAE by SAE, `[{"text": [piece, …], "values": [activation, …]}]`, strongest first. Neighbouring
        tokens on which the feature does not fire are joined into one piece with the value 0.
    """
    device = next(subject.model.parameters()).device
    saes = [(sae.to(device), features) for sae, features in requests]
    tokens, peaks = [], []
    values: list[np.ndarray] = []  # of each input, float32 [tokens, features]
    with progress("reading documents", len(inputs.rows)) as advance:
        for part in inputs.parts():
            token_lists = inputs.tokens(part)
            values_of_part: list = [None] * len(token_lists)
            for chosen in batches(np.array([*map(len, token_lists)])):
                x = run(subject, [token_lists[i] for i in chosen], [hook_name])[hook_name]
                rows = [x[row, 1 : len(token_lists[i])] for row, i in enumerate(chosen)]  # position 0 gives no row
                fired = [sae.encode(torch.cat(rows))[:, features].float() for sae, features in saes]
                for i, of_input in zip(chosen, torch.cat(fired, 1).cpu().split([*map(len, rows)]), strict=True):
                    values_of_part[i] = of_input.numpy()
                    values_of_part[i][~subject.harvesting.kept(token_lists[i])[1:]] = 0
                advance(len(chosen))
            tokens += [t[1:] for t in token_lists]
            values += values_of_part
            peaks += [v.max(0) for v in values_of_part]
    strength = np.stack(peaks)  # [inputs, features]
    contexts = []
    for column in range(strength.shape[1]):
        shown: dict[str, dict] = {}  # keyed by text, because news texts occur more than once
        documents_read: set[int] = set()  # a long document is cut into several inputs and counts once
        for i in np.argsort(-strength[:, column], kind="stable"):
            if strength[i, column] <= 0 or len(shown) == CONTEXTS:
                break
            if inputs.owner[i] not in documents_read:
                documents_read.add(inputs.owner[i])
                context = _context(subject.tokenizer, tokens[i], values[i][:, column])
                shown.setdefault("".join(context["text"]), context)
        contexts.append([*shown.values()])
    return contexts


def _context(tokenizer, tokens: np.ndarray, values: np.ndarray) -> dict:
    peak = int(values.argmax())
    # Two thirds of the window precede the peak, because the model reads left to right.
    first = max(0, min(peak - 2 * WINDOW // 3, len(tokens) - WINDOW))
    text: list[str] = []
    kept: list[float] = []
    for token, value in zip(tokens[first : first + WINDOW], values[first : first + WINDOW], strict=True):
        piece = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
        if value <= 0 and kept and kept[-1] == 0:
            text[-1] += piece
        else:
            text.append(piece)
            kept.append(float(f"{max(value, 0.0):.3g}"))
    return {"text": text, "values": kept}
