"""Fit of an SAE to activations of shifted text, compared with held-out text."""

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
"""Share of the variance of an SAE's reconstructions that lies in its subspace."""


def token_rows(subject: LanguageModel, documents: list[str]) -> int:
    """Number of rows that all tokens of the documents give."""
    cut = Cutter(subject, ENDLESS)
    encoded = subject.tokenizer(documents, add_special_tokens=False)["input_ids"]
    for i, (document, tokens) in enumerate(zip(documents, encoded, strict=True)):
        cut.add(i, text.document_id(document), np.array(tokens, dtype=np.int64))
    return ENDLESS - cut.missing


def shifted_store(subject: LanguageModel, hook_name: str, data_sets: list[str], root: Path, threads: int):
    """Store of activations of all tokens of the shifted versions' documents; found on disk or harvested."""
    documents = text.distinct(data_sets)
    rows = token_rows(subject, documents)
    folder = harvest_tokens(subject, [hook_name], documents, root / "activations", rows, threads=threads)[hook_name]
    return ActivationStore.open(folder)


@torch.inference_mode()
def subspace(sae: SAE, store: ActivationStore, batch: int = 8192) -> Tensor:
    """Subspace of an SAE's reconstructions of a store's rows, as orthonormal directions `[d_in, r]`, float64.

    It is spanned by the fewest principal directions that hold HELD of the reconstructions' variance. The span of all
    decoder rows would be uninformative, because an overcomplete dictionary spans the whole space.

    Raises:
        BadInput: all reconstructions are equal.
    """
    total = torch.zeros(sae.d_out, dtype=torch.float64)
    squares = torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64)
    for start in range(0, store.rows, batch):
        x = store.read(start, min(start + batch, store.rows))
        reconstructions = sae.decode(sae.encode(x), x).double()
        reconstructions -= sae.weights["b_dec"]  # smaller numbers have smaller rounding errors
        total += reconstructions.sum(0)
        squares += reconstructions.T @ reconstructions
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

    The share of dead features falls with the number of rows. Therefore both sides use equally many rows, which lie in
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
        measured = cells.get("activations", key, partial(measure, c.sae))
        records.append({"identity": c.identity, "seed": c.facts.seed, **measured})
    rows = {"rows": tested.store.rows, "shifted_rows": shifted.rows, "compared_rows": n}
    return rows | {"saes": records, "change": change(records)}
