"""Held-out text that single features respond to."""

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
    subject: LanguageModel, hook_name: str, wanted: list[tuple[SAE, list[int]]], inputs: Inputs
) -> list[list[dict]]:
    """The CONTEXTS documents in which each feature fires most, each with the tokens around its peak.

    Args:
        wanted: SAEs with the features asked for. The model reads the text once for all of them.

    Returns:
        For each feature, SAE by SAE, `[{"text": [piece, …], "values": [activation, …]}]`, strongest first; neighbouring
        tokens on which the feature is silent are one piece, with the value 0.
    """
    device = next(subject.model.parameters()).device
    saes = [(sae.to(device), features) for sae, features in wanted]
    tokens, peaks = [], []
    values: list[np.ndarray] = []  # of each input, float32 [tokens, features]
    with progress("reading documents", len(inputs.rows)) as advance:
        for part in inputs.parts():
            of_part = inputs.tokens(part)
            found: list = [None] * len(of_part)
            for chosen in batches(np.array([*map(len, of_part)])):
                x = run(subject, [of_part[i] for i in chosen], [hook_name])[hook_name]
                for row, i in enumerate(chosen):  # position 0 gives no row, here as in the stores
                    rows = x[row, 1 : len(of_part[i])]
                    fired = [sae.encode(rows)[:, features].float() for sae, features in saes]
                    found[i] = torch.cat(fired, 1).cpu().numpy()
                    found[i][~subject.harvesting.kept(of_part[i])[1:]] = 0
                advance(len(chosen))
            tokens += [t[1:] for t in of_part]
            values += found
            peaks += [v.max(0) for v in found]
    strength = np.stack(peaks)  # [inputs, features]
    contexts = []
    for column in range(strength.shape[1]):
        shown: dict[str, dict] = {}  # by text: news agencies repeat themselves
        read: set[int] = set()  # long documents are several inputs, and count once
        for i in np.argsort(-strength[:, column], kind="stable"):
            if strength[i, column] <= 0 or len(shown) == CONTEXTS:
                break
            if inputs.owner[i] not in read:
                read.add(inputs.owner[i])
                context = _context(subject.tokenizer, tokens[i], values[i][:, column])
                shown.setdefault("".join(context["text"]), context)
        contexts.append([*shown.values()])
    return contexts


def _context(tokenizer, tokens: np.ndarray, values: np.ndarray) -> dict:
    peak = int(values.argmax())
    first = max(0, min(peak - 2 * WINDOW // 3, len(tokens) - WINDOW))  # more of what came before, which it has seen
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
