"""Refuses dictionaries that were not trained independently, because their agreement is no evidence of stability."""

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
"""Number of features that the test of order reads, and of neighbours on either side that each is compared with."""


def refuse_copies(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput if two decoders are equal."""
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape == b.shape and torch.equal(a, b):
            raise BadInput(f"{name_a} and {name_b} are the same decoder; independently trained SAEs expected")


def refuse_shared(labels: Sequence[str], dictionaries: Sequence[Dictionary]) -> None:
    """Raise BadInput if two dictionaries share their decoder or their initialisation."""
    if len(dictionaries) < 2:
        raise BadInput(f"{len(dictionaries)} SAE given: stability needs at least 2, and 5 for a verdict")
    for (name_a, a), (name_b, b) in combinations(zip(labels, dictionaries, strict=True), 2):
        if a.W_dec.shape[1] != b.W_dec.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.W_dec.shape[1]} and {b.W_dec.shape[1]}: one expected")
        # Trained directions may agree in part. Independent initial directions do not.
        parts = (
            ("decoder", a.W_dec, b.W_dec, rules.SHARED_DECODER),
            ("initialisation", a.untrained, b.untrained, rules.SHARED_INITIALISATION),
        )
        for name, x, y, share in parts:
            if x is not None and y is not None and shared(x, y, share):
                raise BadInput(f"{name_a} and {name_b} share their {name}: independently trained SAEs expected")


def refuse_dependent(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput if features with equal numbers are more similar than features with neighbouring numbers.

    The features of two independently trained SAEs have no common order. A common initialisation gives them one, and so
    does a common run.

    Args:
        decoders: `[d_sae, d_in]` each. Decoders of different shapes, or with few dimensions, are not compared.
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
    """(mean |cos| of rows with equal numbers, mean |cos| of rows with neighbouring numbers, their difference in
    standard errors of independent dictionaries).

    Neighbours are the baseline because some trainings order features coarsely, as Matryoshka groups do. At most NUMBERS
    rows are read, evenly spaced.

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
    """Whether the larger dictionary holds at least this share of the smaller one's directions.

    Order, sign and scale do not matter. Rows of zeros do not count.
    """
    if x.shape == y.shape and torch.equal(x, y):
        return True
    x, y = (w[w.norm(dim=1) > 0].float() for w in (x, y))
    if x.shape[1] < rules.FEW_DIMENSIONS or min(len(x), len(y)) == 0:
        return False
    same = max_cosines(x, y)[0 if len(x) <= len(y) else 1] > rules.SAME_DIRECTION
    return bool(same.double().mean() >= share)
