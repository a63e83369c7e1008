"""Compares SAEs with dictionaries of prototypes as codes: explained variance, and CE recovered with each spliced in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from husai.activations.store import ActivationStore
from husai.evals.loaded import LoadedSAEs
from husai.evidence.coding import concluded
from husai.evidence.schemas import Code, Coded, ScoredRecord, seed_names
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.stability import prototypes
from husai.stability.prototypes import TopKLeastSquares
from husai.subjects import text
from husai.training.recovered import cross_entropies, recovered


def evaluate(
    saes: LoadedSAEs,
    records: Sequence[ScoredRecord],
    source: ActivationStore,
    documents: int,
    artifact_root: Path,
    threads: int,
) -> Code:
    """Code quality of the candidate's SAEs and of dictionaries of prototypes at the same width and L0.

    Args:
        records: records of the bank, with held-out figures and core metrics.
        source: activations that the prototypes are made from.
        documents: number of held-out documents for CE recovered.
        artifact_root: holds the cells, in controls/, which all phases share.

    Raises:
        BadInput: `source` has another hook or subject than the held-out activations.
    """
    heldout = saes.store
    for name in ("subject_digest", "hook_name"):
        source_value, heldout_value = (getattr(s.manifest, name) for s in (source, heldout))
        if source_value != heldout_value:
            raise BadInput(f"activation store: {source.folder} is of {name} {source_value}; {heldout_value} expected")
    candidates = [r for r in records if r.candidate]
    seeds, width = seed_names([r.facts.seed for r in candidates]), candidates[0].facts.d_sae
    ks = dict(zip(seeds, (max(1, round(r.heldout.l0)) for r in candidates), strict=True))
    texts = saes.source.heldout_texts(documents, saes.subject.tokenizer)
    kinds_of_prototypes = cache(lambda: prototypes.dictionaries(source, width))
    mean = source.stats()[0].float()
    cells = Cells(artifact_root / "controls" / "cells")

    def at(k: int) -> dict[str, Any]:
        key: dict[str, Any] = {"store": source.digest, "heldout": heldout.digest, "width": width, "k": k}
        key |= {"texts": [*map(text.document_id, texts)], "threads": threads, "code": code_version(evaluate)}
        key |= {"subject": saes.subject.activations_digest, "device": next(saes.subject.model.parameters()).device.type}

        def compute() -> tuple[dict, list[Path]]:
            variance = prototypes.explained_variance(kinds_of_prototypes(), mean, k, heldout, range(heldout.rows))
            return {"explained_variance": variance} | spliced(saes, kinds_of_prototypes(), mean, k, texts), []

        return cells.get("code", key, compute)

    figures = {k: at(k) for k in sorted(set(ks.values()))}
    tokens = {value["tokens"] for value in figures.values()}
    kinds = list(figures[ks[seeds[0]]]["explained_variance"])

    def of_kind(kind: str) -> Coded:
        each = {
            name: {s: figures[k][name][kind] for s, k in ks.items()} for name in ("explained_variance", "ce_recovered")
        }
        return Coded(**each)

    code = Code(
        store_digest=source.digest,
        heldout_digest=heldout.digest,
        d_sae=width,
        k=ks,
        tokens=tokens.pop(),
        saes=Coded(
            explained_variance=dict(zip(seeds, (r.heldout.explained_variance for r in candidates), strict=True)),
            ce_recovered=dict(zip(seeds, (r.core.ce_loss_score for r in candidates), strict=True)),
        ),
        prototypes={kind: of_kind(kind) for kind in kinds},
        gain={},
    )
    return concluded(code)


def spliced(
    saes: LoadedSAEs, made: dict[str, list[Tensor]], mean: Tensor, k: int, texts: list[str]
) -> dict[str, dict[str, float] | int]:
    """CE recovered by the first dictionary of each kind, and the number of predicted tokens."""
    codes = [TopKLeastSquares.of(W, mean, k) for W, *_ in made.values()]
    losses = cross_entropies(saes.subject, saes.hook_name, codes, texts)
    return {"ce_recovered": dict(zip(made, recovered(losses), strict=True)), "tokens": losses["tokens"]}
