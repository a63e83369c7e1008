"""What single features respond to, and whether other seeds have found them too: a sample to read, not a score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from husai.activations.language_model import Inputs, batches, run
from husai.activations.store import ActivationStore
from husai.dictionaries.sae import SAE
from husai.evals.loaded import LoadedSAE
from husai.runs.errors import BadInput
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.stability.matching import match
from husai.subjects.pretrained import LanguageModel
from husai.subjects.sources import Side
from husai.training.trainer import evaluate

STABLE = 0.7
"""Cosine with its partner from which a feature counts as found again; `share70` has the same bar."""
CONTEXTS = 8
WINDOW = 24  # tokens of a context


@dataclass(frozen=True)
class Partners:
    """The features of one SAE in the others, one to one."""

    features: np.ndarray  # int [others, d_sae]
    cosines: np.ndarray  # float64 [others, d_sae], cosines with them; negative ones count 0

    @property
    def stable(self) -> np.ndarray:
        """`[d_sae]` bool: found again by every other SAE."""
        return (self.cosines >= STABLE).all(0)


def one_condition(candidates: list[LoadedSAE]) -> None:
    """Raise BadInput unless these are SAEs of one width that differ in their seed alone, two at least."""
    conditions = sorted({c.record.condition for c in candidates if c.facts.source == "husai"})
    widths = sorted({c.sae.d_sae for c in candidates})
    if len(conditions) > 1 or len(widths) > 1:
        raise BadInput(f"--checkpoint: {', '.join(conditions) or f'widths {widths}'}: SAEs of one condition expected")
    if len(candidates) < 2:
        raise BadInput(f"--checkpoint: {len(candidates)} SAE; features are followed across seeds: at least 2 expected")


def partners(candidates: list[LoadedSAE]) -> Partners:
    """Match the first SAE with each of the others."""
    first, others = candidates[0].sae, candidates[1:]
    features = np.empty((len(others), first.d_sae), np.int64)
    cosines = np.empty((len(others), first.d_sae))
    with progress("matching features", len(others)) as advance:
        for i, other in enumerate(others):
            found = match(first.W_dec.cpu(), other.sae.W_dec.cpu(), signed=True)
            features[i, found.rows], cosines[i, found.rows] = found.columns, found.cosines
            advance(1)
    return Partners(features, cosines)


def sample(stable: np.ndarray, alive: np.ndarray, n: int, seed: int) -> list[int]:
    """n of the features that fire, as many stable ones as others where there are enough of both, sorted.

    Args:
        stable, alive: `[d_sae]` bool.
    """
    groups = [np.flatnonzero(alive & stable), np.flatnonzero(alive & ~stable)]
    orders = [g[torch.randperm(len(g), generator=generator(seed, "features", i)).numpy()] for i, g in enumerate(groups)]
    first = min(len(groups[0]), max((n + 1) // 2, n - len(groups[1])))
    return sorted(int(f) for f in [*orders[0][:first], *orders[1][: n - first]])


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


def collect(
    subject: LanguageModel,
    store: ActivationStore,
    candidates: list[LoadedSAE],
    documents: list[str] | Side,
    n: int,
    seed: int,
    root: Path,
) -> dict:
    """A sample of the first SAE's features, with what they respond to and their partners in the others.

    Args:
        store: held-out activations of `documents`, row seed 0: firing rates are of its rows, contexts of its texts.
        root: folder that the store lies in.

    Raises:
        BadInput: the SAEs are not of one condition, or no feature fires.
    """
    one_condition(candidates)
    first, hook_name = candidates[0], store.manifest.hook_name
    found = partners(candidates)
    _, rate = evaluate(first.sae, store, range(store.rows))
    rate = rate.numpy()
    alive, stable = rate > 0, found.stable
    chosen = sample(stable, alive, n, seed)
    if not chosen:
        raise BadInput(f"--checkpoint: no feature of {first.folder} fires on {store.rows} held-out tokens")
    inputs = Inputs.of(subject, documents, store.rows, 0, root)
    contexts = strongest_contexts(subject, hook_name, [(first.sae, chosen)], inputs)
    seeds = [c.label if c.facts.seed is None else c.facts.seed for c in candidates]
    return {
        "condition": first.record.condition,
        "labels": [c.label for c in candidates],
        "seeds": seeds,
        "hook_name": hook_name,
        "heldout_tokens": store.rows,
        "d_sae": first.sae.d_sae,
        "alive": int(alive.sum()),
        "alive_stable": int((alive & stable).sum()),
        "stable_from": STABLE,
        "features": [
            {
                "feature": f,
                "firing_rate": float(rate[f]),
                "stable": bool(stable[f]),
                "partners": [
                    {"seed": other, "feature": int(theirs), "cosine": round(float(cosine), 4)}
                    for other, theirs, cosine in zip(seeds[1:], found.features[:, f], found.cosines[:, f], strict=True)
                ],
                "contexts": c,
            }
            for f, c in zip(chosen, contexts, strict=True)
        ],
    }
