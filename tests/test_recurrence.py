"""Single features over trainings: partners, chance, bounds, and decoders compared without a model."""

import doctest
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import nnls

import husai
from husai.evidence import rules
from husai.evidence.estimates import benjamini_hochberg, clopper_pearson_high, clopper_pearson_low
from husai.runs.errors import BadInput
from husai.stability import nulls, recurrence
from husai.stability.nulls import Spectrum


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def spectrum():
    """Of activations in 12 dimensions, one eigenvalue falling after the other."""
    return Spectrum.of(torch.diag(torch.linspace(3, 0.3, 12)), 10_000)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates and rules


@given(st.integers(1, 40), st.data())
def test_bounds_are_scipys(n, data):
    k = data.draw(st.integers(0, n))
    test = stats.binomtest(k, n, alternative="greater").proportion_ci(0.95, method="exact")
    assert clopper_pearson_low(k, n) == pytest.approx(test.low, abs=1e-10)
    test = stats.binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact")
    assert clopper_pearson_high(k, n) == pytest.approx(test.high, abs=1e-10)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_q_values_are_scipys(p):
    assert benjamini_hochberg(np.array(p)) == pytest.approx(stats.false_discovery_control(p), abs=1e-12)


def test_siblings_needed():
    """Fourteen of fourteen for 0.8; one miss needs 22."""
    assert rules.siblings_needed(0.8) == 14
    assert rules.siblings_needed(0.8, 1) == 22
    assert rules.siblings_needed(0.5) == 5


def test_what_is_said_of_a_feature():
    k = np.array([14, 14, 6, 2, 14, 0, 0, 0])
    marked = np.array([1, 0, 1, 0, 1, 0, 0, 0], bool)
    prototype, rebuilt = np.array([0, 0, 0, 0, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 0, 8, 0, 0])
    dead = np.arange(8) == 7
    given_ = (k, clopper_pearson_low(k, 14), marked, prototype, rebuilt, dead, 14)
    said = ["certified", "certified, not above chance", "above chance", "recurs in some", "prototype-like"]
    assert [*rules.statements(*given_, 0.8, False)] == [*said, "split or merged", "not found", "dead"]
    assert [*rules.statements(*given_, 0.8, True)][6] == "withheld"
    assert [*rules.statements(*given_, None, False)][:2] == ["above chance", "recurs in some"]
    assert {*said, "split or merged", "not found", "dead", "withheld"} == set(rules.STATEMENTS)


def test_an_sae_that_differs_from_its_siblings():
    assert rules.differs_from_siblings([0.3, 0.3], [0.6, 0.61, 0.59, 0.6])
    assert not rules.differs_from_siblings([0.6, 0.59], [0.6, 0.61, 0.59, 0.6])
    assert rules.differs_from_siblings([0.3], [0.6, 0.6]) is None


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def test_partners_and_maxima_are_those_of_the_dense_matrix():
    a, b = drawn(20, 6), drawn(15, 6, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert torch.allclose(recurrence.maxima(a, b), cosines.amax(1), atol=1e-6)
    found = recurrence.partners(a, [b])
    own = found.features[0] >= 0
    assert own.sum() == 15
    assert (found.cosines[0][~own] == 0).all()
    expected = cosines[np.flatnonzero(own), found.features[0][own]].clamp_min(0)
    assert found.cosines[0][own] == pytest.approx(expected.numpy(), abs=1e-6)


@given(st.integers(1, 300), st.integers(0, 5))
def test_bfloat16_gives_an_upper_bound(d_in, seed):
    a, b = drawn(9, d_in, seed=seed), drawn(13, d_in, seed=seed + 100)
    exact, bound = recurrence.maxima(a.double(), b), recurrence.maxima(a, b, bfloat16=True)
    assert (bound >= exact - 1e-6).all()
    assert (bound - exact < 0.02).all()


def test_the_resampled_null_is_every_tuple():
    """With few siblings and rotations all tuples can be listed; the drawn p-value is theirs up to its own error."""
    observed, rotated = drawn(2, 30), drawn(6, 2, 30, seed=1)
    pools = torch.cat([observed[None], rotated])
    sums = torch.stack([pools[i, 0] + pools[j, 1] for i, j in itertools.product(range(7), repeat=2)])
    exact = (sums >= observed.sum(0) - 1e-6).double().mean(0).numpy()
    assert recurrence.rotation_p_values(observed, rotated) == pytest.approx(exact, abs=0.015)


def test_permuted_labels_are_scipys():
    a, b = drawn(3, 8), drawn(4, 8, seed=1)
    expected = stats.permutation_test(
        (a.numpy(), b.numpy()),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        alternative="greater",
        vectorized=True,
        axis=0,
        n_resamples=np.inf,
    ).pvalue
    assert recurrence.permutation_p_values(a, b) == pytest.approx(expected)
    assert recurrence.permutation_p_values(a + 100, b).max() == pytest.approx(1 / 35)
    assert recurrence.permutation_p_values(a, b, draws=30) == pytest.approx(expected, abs=0.3)  # drawn, not listed


def test_chance_knows_features_from_rotated_ones(spectrum):
    """Half of the features stand in each sibling; the other half of each sibling is a rotation of them."""
    W = drawn(40, 12)
    siblings = []
    for s in range(5):
        g = torch.Generator().manual_seed(s)
        siblings.append(torch.cat([W[:20] + 0.1 * drawn(20, 12, seed=s), nulls.spectral(W, W[20:], spectrum, g)[1]]))
    noise = [nulls.spectral(W, W, spectrum, torch.Generator().manual_seed(50 + s))[1] for s in range(5)]
    found = recurrence.chance(W, siblings, spectrum, noise, draws=4000)
    q = found.q_values(np.ones(40, bool))
    assert (q[:20] <= 0.05).mean() > 0.9
    assert (q[20:] <= 0.05).mean() <= 0.1
    assert found.p_permutation.min() >= 1 / 252 - 1e-12


@pytest.mark.slow
def test_the_resampled_null_agrees_with_direct_draws(spectrum):
    """200 features; 10⁵ direct draws of all siblings together, against the tuples of a hundred rotations."""
    W, siblings = (
        drawn(200, 12),
        [drawn(30, 12, seed=s + 1) @ torch.diag(torch.linspace(1.7, 0.5, 12)) for s in range(3)],
    )
    observed = torch.stack([recurrence.maxima(W, s) for s in siblings])
    rotated = recurrence.rotated_maxima(W, siblings, spectrum, 100)
    resampled = recurrence.rotation_p_values(observed, rotated)
    reached, draws, U = torch.zeros(200), 100_000, recurrence.unit_rows(W)
    g = torch.Generator().manual_seed(7)
    # Lone components alone: the rotation is a sign for each, which all rows of a sibling share.
    assert all(len(group) == 1 for group in spectrum.groups)
    parts = [(recurrence.unit_rows(s) @ spectrum.components) for s in siblings]
    own = U @ spectrum.components
    for _ in range(draws // 100):
        total = torch.zeros(100, 200)
        for part in parts:
            signs = torch.where(torch.rand(100, 1, 12, generator=g) < 0.5, 1.0, -1.0)
            total += (own @ (part * signs).transpose(1, 2)).amax(2)
        reached += (total >= observed.sum(0) - 1e-6).sum(0)
    direct = reached.numpy() / draws
    assert np.abs(resampled - direct).max() < 0.15
    assert np.abs(resampled - direct).mean() < 0.03
    assert ((resampled <= 0.05) == (direct <= 0.05)).mean() > 0.95


@given(st.integers(0, 200))
def test_rebuilding_is_non_negative_least_squares(seed):
    a, b = drawn(5, 7, seed=seed), drawn(9, 7, seed=seed + 1000)
    cosines, features = recurrence.rebuilt(a, b)
    for row, cosine, chosen in zip(recurrence.unit_rows(a).double(), cosines, features, strict=True):
        atoms = recurrence.unit_rows(b).double()[chosen[chosen >= 0]]
        residual = nnls(atoms.T.numpy(), row.numpy())[1] if len(atoms) else 1.0
        assert float(cosine) == pytest.approx(np.sqrt(max(0, 1 - residual**2)), abs=1e-5)


def test_a_split_feature_is_rebuilt():
    b = drawn(30, 40)
    a = b[:2].sum(0, keepdim=True) + 0.3 * b[2]
    cosine, features = recurrence.rebuilt(a, b)
    assert float(cosine) > 0.999
    assert set(features[0].tolist()) == {0, 1, 2}
    assert float(recurrence.rebuilt(-b[:1], b)[0]) < 0.9  # a negative is no feature


# ---------------------------------------------------------------------------------------------------------------------
# Decoders without a model


def test_the_example_of_the_documentation():
    result = doctest.testmod(recurrence)
    assert result.attempted > 5
    assert result.failed == 0


def test_three_lines():
    shared = drawn(10, 16)
    a, b = (torch.cat([shared, drawn(4, 16, seed=s)]) for s in (1, 2))
    found = husai.compare([a, b], covariance=np.eye(16), mean=np.ones(16), token_means=shared[:3], rotations=50)
    assert (found.recurrence[0][:10] == 1).all()
    assert found.recurrence[0][10:].sum() <= 1
    assert (found.prototypes[0][:3] > 0.999).all()
    assert found.spectral["mcc"] < found.scores["mcc"].estimate


@pytest.mark.parametrize(
    ("decoders", "named"),
    [
        ([drawn(3, 4)], "1 decoder"),
        ([drawn(3, 4), drawn(3, 5)], "d_in"),
        ([drawn(3, 4), drawn(3, 4)], "same decoder"),
        ([drawn(3, 4), torch.full((3, 4), torch.nan)], "decoder 1"),
        ([drawn(3, 4), torch.zeros(3, 4)], "decoder 1"),
        ([drawn(3, 4), drawn(4)], "decoder 1"),
    ],
)
def test_decoders_that_cannot_be_compared(decoders, named):
    with pytest.raises(BadInput, match=named):
        husai.compare(decoders)
