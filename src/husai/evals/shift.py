"""How an SAE fits the activations of shifted text, beside those of held-out text."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from husai.activations.language_model import Cutter, harvest_tokens
from husai.activations.store import ActivationStore
from husai.dictionaries.sae import SAE
from husai.evals.loaded import LoadedSAEs
from husai.evidence.drop import change
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.subjects import text
from husai.subjects.harvesting import ENDLESS
from husai.subjects.pretrained import LanguageModel
from husai.training.trainer import evaluate

HELD = 0.99
"""Share of the variance of an SAE's reconstructions that its subspace holds."""


def token_rows(subject: LanguageModel, documents: list[str]) -> int:
    """How many rows all tokens of these documents give."""
    cut = Cutter(subject, ENDLESS)
    encoded = subject.tokenizer(documents, add_special_tokens=False)["input_ids"]
    for i, (document, tokens) in enumerate(zip(documents, encoded, strict=True)):
        cut.add(i, text.document_id(document), np.array(tokens, dtype=np.int64))
    return ENDLESS - cut.missing


def shifted_store(subject: LanguageModel, hook_name: str, data_sets: list[str], root: Path, threads: int):
    """Activations of all tokens of the shifted versions' documents; found or harvested."""
    documents = text.distinct(data_sets)
    rows = token_rows(subject, documents)
    folder = harvest_tokens(subject, [hook_name], documents, root / "activations", rows, threads=threads)[hook_name]
    return ActivationStore.open(folder)


@torch.inference_mode()
def subspace(sae: SAE, store: ActivationStore, batch: int = 8192) -> Tensor:
    """Where the SAE's reconstructions of these rows lie: the fewest principal directions that hold HELD of their
    variance, orthonormal `[d_in, r]`, float64.

    Of an overcomplete dictionary all decoder rows together span everything, so their span says nothing.

    Raises:
        BadInput: all reconstructions are equal.
    """
    total = torch.zeros(sae.d_out, dtype=torch.float64)
    squares = torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64)
    for start in range(0, store.rows, batch):
        x = store.read(start, min(start + batch, store.rows))
        made = sae.decode(sae.encode(x), x).double()
        made -= sae.weights["b_dec"]  # what is left is smaller, and so are rounding errors
        total += made.sum(0)
        squares += made.T @ made
    mean = total / store.rows
    variances, directions = torch.linalg.eigh(squares / store.rows - mean[:, None] * mean)
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    held = variances.cumsum(0)
    if held[-1] <= 0:
        raise BadInput(f"checkpoint: its reconstructions of {store.folder} are all equal; no subspace")
    return directions[:, : int((held < HELD * held[-1]).sum()) + 1]


def outside(directions: Tensor, store: ActivationStore) -> float:
    """Share of the variance of a store's rows that lies outside a subspace: 1 − tr(UᵀΣU)/tr Σ."""
    _, covariance = store.stats()
    return float(1 - (directions.T @ covariance @ directions).trace() / covariance.trace())


def activations(tested: LoadedSAEs, shifted: ActivationStore, cells: Cells, threads: int) -> dict:
    """{"rows", "shifted_rows", "compared_rows", "saes": [{"identity", "seed", "rank", "id", "ood": figures}],
    "change": figure -> the estimate of ood − id}.

    Features that fire on none of more rows are fewer, so that both sides are measured on as many rows, which lie in
    random order.
    """
    n = min(tested.store.rows, shifted.rows)

    def measure(sae: SAE) -> tuple[dict, list[Path]]:
        directions = subspace(sae, tested.store)
        sides = {"id": tested.store, "ood": shifted}
        figures = {
            side: evaluate(sae, store, range(n))[0].to_json() | {"outside": outside(directions, store)}
            for side, store in sides.items()
        }
        return {"rank": directions.shape[1]} | figures, []

    records = []
    for c in tested.saes:
        key = {"sae": c.identity, "stores": [tested.store.digest, shifted.digest], "threads": threads}
        key |= {"code": code_version(subspace), "held": HELD}
        found = cells.get("activations", key, partial(measure, c.sae))
        records.append({"identity": c.identity, "seed": c.facts.seed, **found})
    rows = {"rows": tested.store.rows, "shifted_rows": shifted.rows, "compared_rows": n}
    return rows | {"saes": records, "change": change(records)}
