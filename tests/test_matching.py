"""The fast matching against scipy on the dense matrix: what it finds, and what it claims about what it missed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from husai.evidence.names import GAP
from husai.stability import matching
from husai.stability.matching import match, unit_rows
from husai.stability.scores import mcc, score

KINDS = ["random", "shared", "clustered", "anisotropic", "equal", "zeros"]


def dictionaries(kind: str, n: int, m: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    if kind == "shared":  # the same features, in another order, with some noise
        b = torch.cat([a, b])[torch.randperm(n + m, generator=g)[:m]] + 0.1 * b
    if kind == "clustered":  # many rows want the same few partners
        a, b = (x[torch.randint(max(1, len(x) // 8), (len(x),), generator=g)] + 0.01 * x for x in (a, b))
    if kind == "anisotropic":
        a, b = (x * torch.arange(1, d + 1) ** -1.0 for x in (a, b))
    if kind == "equal":
        a, b = a[:1].expand(n, d).clone(), b[:1].expand(m, d).clone()
    if kind == "zeros":
        a[::2], b[::3] = 0, 0
    return a, b


def worths(a: torch.Tensor, b: torch.Tensor, signed: bool = False) -> np.ndarray:
    cosines = (unit_rows(a).double() @ unit_rows(b).double().T).numpy()
    return np.maximum(cosines, 0) if signed else np.abs(cosines)


def optimum(a: torch.Tensor, b: torch.Tensor, signed: bool = False) -> float:
    found = worths(a, b, signed)
    return found[linear_sum_assignment(found, maximize=True)].mean()


@settings(deadline=None, max_examples=120)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    d=st.sampled_from([2, 5, 40]),
    seed=st.integers(0, 10**6),
    signed=st.booleans(),
)
def test_the_bound_holds_and_the_matching_is_one_to_one(kind, n, m, d, seed, signed):
    a, b = dictionaries(kind, n, m, d, seed)
    found, best = match(a, b, exact=False, signed=signed), optimum(a, b, signed)
    assert len(found.cosines) == len(set(found.rows)) == len(set(found.columns)) == min(n, m)
    np.testing.assert_allclose(found.cosines, worths(a, b, signed)[found.rows, found.columns], atol=1e-5)
    assert found.gap_bound >= 0
    assert best - 1e-6 <= found.cosines.mean() + found.gap_bound, "the bound is proven, whatever the input"
    assert found.cosines.mean() <= best + 1e-6
    small = match(a, b, signed=signed)
    assert small.gap_bound == 0, "small dictionaries are matched exactly"
    assert small.cosines.mean() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "m"), [("random", 1500), ("shared", 1500), ("random", 1800), ("anisotropic", 1500), ("clustered", 1500)]
)
def test_near_the_optimum_and_says_so(kind, m):
    """Features of an anisotropic space crowd together, as in real activations: many near ties."""
    a, b = dictionaries(kind, 1500, m, 64, 0)
    found = match(a, b, exact=False)
    assert optimum(a, b) - found.cosines.mean() < 1e-5
    assert found.gap_bound < 1e-5


def test_sides_may_be_exchanged_and_signs_flipped():
    a, b = dictionaries("shared", 70, 90, 16, 1)
    one, other = match(a, b, exact=False), match(b, -a, exact=False)
    np.testing.assert_array_equal(np.sort(one.cosines), np.sort(other.cosines))
    assert set(zip(one.rows, one.columns, strict=True)) == set(zip(other.columns, other.rows, strict=True))


def test_a_feature_is_not_its_negative():
    a, _ = dictionaries("random", 40, 40, 64, 3)
    assert match(a, -a).cosines.min() == pytest.approx(1, abs=1e-6)
    assert match(a, -a, signed=True).cosines.max() < 0.7


def test_the_gap_reaches_the_scores(monkeypatch):
    a, b = dictionaries("random", 60, 60, 16, 2)
    everything = torch.ones(60).bool()
    assert score(a, b, everything, everything)[GAP] == 0
    monkeypatch.setattr(matching, "EXACT_UP_TO", 10)
    fast = score(a, b, everything, everything)
    assert 0 < fast[GAP] < 1e-4
    assert fast["mcc"] - 1e-6 <= mcc(a, b, exact=True) <= fast["mcc"] + fast[GAP]
