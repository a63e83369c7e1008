"""Refusal of dictionaries that were not trained independently. Their agreement says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from husai.evidence import rules
from husai.runs.errors import BadInput
from husai.stability.compare import Dictionary
from husai.stability.matching import unit_rows
from husai.stability.scores import max_cosines


def refuse_shared(labels: Sequence[str], dictionaries: Sequence[Dictionary]) -> None:
    """Raise BadInput where two dictionaries share their decoder or their initialisation: that is not stability."""
    if len(dictionaries) < 2:
        raise BadInput(f"{len(dictionaries)} SAE given: stability needs at least 2, and 5 for a verdict")
    for (name_a, a), (name_b, b) in combinations(zip(labels, dictionaries, strict=True), 2):
        if a.W_dec.shape[1] != b.W_dec.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.W_dec.shape[1]} and {b.W_dec.shape[1]}: one expected")
        # Trained directions may come to agree; initial ones never do.
        parts = (
            ("decoder", a.W_dec, b.W_dec, rules.SHARED_DECODER),
            ("initialisation", a.untrained, b.untrained, rules.SHARED_INITIALISATION),
        )
        for what, x, y, share in parts:
            if x is not None and y is not None and shared(x, y, share):
                raise BadInput(f"{name_a} and {name_b} share their {what}: independently trained SAEs expected")


def refuse_one_training(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput for two decoders `[d_sae, d_in]` of one training, at two of its steps: feature by feature they
    point the same way, which independent seeds do not, for nothing puts their features into one order."""
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape == b.shape and a.shape[1] >= rules.FEW_DIMENSIONS:
            alike = (unit_rows(a.float()) * unit_rows(b.float())).sum(1).abs().median().item()
            if alike > rules.ONE_TRAINING:
                raise BadInput(
                    f"{name_a} and {name_b} seem to be of one training: the median |cos| of features of one number is "
                    f"{alike:.2f}; the last checkpoint of each of several trainings expected"
                )


def shared(x: Tensor, y: Tensor, share: float) -> bool:
    """Whether at least this share of the smaller dictionary's directions stands in the other, in whatever order, sign
    and scale; rows of zeros do not count."""
    if x.shape == y.shape and torch.equal(x, y):
        return True
    x, y = (w[w.norm(dim=1) > 0].float() for w in (x, y))
    if x.shape[1] < rules.FEW_DIMENSIONS or min(len(x), len(y)) == 0:
        return False
    same = max_cosines(x, y)[0 if len(x) <= len(y) else 1] > rules.SAME_DIRECTION
    return bool(same.double().mean() >= share)
