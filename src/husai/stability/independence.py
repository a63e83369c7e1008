"""Refusal of dictionaries that were not trained independently. Their agreement says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from husai.evidence import rules
from husai.runs.errors import BadInput, Dependent
from husai.stability.compare import Dictionary
from husai.stability.matching import unit_rows
from husai.stability.scores import max_cosines

NUMBERS, NEIGHBOURS = 4096, 8
"""Features of a dictionary that the test of its order reads, and numbers on either side that it compares with."""


def refuse_shared(labels: Sequence[str], dictionaries: Sequence[Dictionary]) -> None:
    """Raise BadInput where two dictionaries share their decoder or their initialisation: that is not stability."""
    if len(dictionaries) < 2:
        raise BadInput(f"{len(dictionaries)} SAE given: stability needs at least 2, and 5 for a verdict")
    for (name_a, a), (name_b, b) in combinations(zip(labels, dictionaries, strict=True), 2):
        if a.W_dec.shape[1] != b.W_dec.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.W_dec.shape[1]} and {b.W_dec.shape[1]}: one expected")
        # Trained directions may come to agree in part; initial ones never do.
        parts = (
            ("decoder", a.W_dec, b.W_dec, rules.SHARED_DECODER),
            ("initialisation", a.untrained, b.untrained, rules.SHARED_INITIALISATION),
        )
        for what, x, y, share in parts:
            if x is not None and y is not None and shared(x, y, share):
                raise BadInput(f"{name_a} and {name_b} share their {what}: independently trained SAEs expected")


def refuse_dependent(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput where features of one number are more alike than features of neighbouring numbers.

    Nothing puts the features of two independently trained SAEs into one order. A common initialisation does, and so do
    two steps of one run.

    Args:
        decoders: `[d_sae, d_in]` each. Those of different shapes, or of few dimensions, are not compared.
    """
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape == b.shape and a.shape[1] >= rules.FEW_DIMENSIONS:
            same, other, errors = same_number(a, b)
            if rules.in_one_order(same - other, errors):
                raise Dependent(
                    f"{name_a} and {name_b} are not independent: the mean |cos| of features of one number is "
                    f"{same:.2f}, of features of neighbouring numbers {other:.2f}; they share their initialisation or "
                    "are two steps of one run; the last checkpoints of independent trainings expected"
                )


def same_number(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """(mean |cos| of rows of one number, the same of rows of neighbouring numbers, difference in standard errors of
    independent dictionaries).

    Neighbours are compared because some trainings order features in the large, as Matryoshka's groups do. At most
    NUMBERS rows are read, evenly spaced.

    Args:
        a, b: `[d_sae, d_in]`, of one shape.
    """
    n = len(a)
    numbers = torch.linspace(0, n - 1, min(n, NUMBERS)).round().long()
    rows = unit_rows(a[numbers].float())

    def cosines(shift: int) -> Tensor:
        return (rows * unit_rows(b[(numbers + shift) % n].float())).sum(1).abs().double()

    same = cosines(0)
    shifts = [shift for shift in range(-NEIGHBOURS, NEIGHBOURS + 1) if shift % n]
    if not shifts:
        return same.mean().item(), 0.0, 0.0
    others = torch.stack([cosines(shift) for shift in shifts])
    difference = (same.mean() - others.mean()).item()
    error = others.std(correction=0).item() / len(numbers) ** 0.5
    return same.mean().item(), others.mean().item(), difference / error if error else 0.0


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
