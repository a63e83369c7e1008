"""Single features over trainings: partners, chance, bounds, and decoders compared without a model."""

import doctest
import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import nnls

import husai
from husai.evidence import rules
from husai.evidence.estimates import benjamini_hochberg, clopper_pearson_high, clopper_pearson_low
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY
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


@pytest.mark.parametrize("n", [3, 4, 14])
def test_an_sae_of_another_seed_seldom_differs(n):
    """Effects of SAEs and of pairs: an SAE like its siblings is below the interval in at most 2.5 %."""
    draws, g = 2000, np.random.default_rng(n)
    differ = 0
    for _ in range(draws):
        effect, pair = g.normal(size=n + 1), np.triu(g.normal(size=(n + 1, n + 1)), 1)
        shares = effect[:, None] + effect + pair + pair.T
        among = (shares[1:, 1:].sum(1) - shares.diagonal()[1:]) / (n - 1)
        differ += bool(rules.differs_from_siblings(shares[0, 1:], among))
    assert differ / draws < 0.025 + 3 * np.sqrt(0.025 / draws)


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def mutual_of(a, b):
    """The cosines of nearest neighbours, ten lines of numpy."""
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b))
    cosines = a @ b.T
    at = cosines.argmax(1)
    most = cosines.max(1)
    return most, np.where(cosines.argmax(0)[at] == np.arange(len(a)), most.clip(0), 0)


def test_partners_and_neighbours_are_those_of_the_dense_matrix():
    a, b = drawn(20, 6), drawn(15, 6, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    near = recurrence.neighbours(a, [b, a])
    largest, mutual = mutual_of(a, b)
    assert near.largest[0].numpy() == pytest.approx(largest, abs=1e-6)
    assert near.mutual[0].numpy() == pytest.approx(mutual, abs=1e-6)
    assert 0 < (mutual > 0).sum() < 20
    assert near.mutual[1].numpy() == pytest.approx(1)
    found = recurrence.partners(a, [b])
    own = found.features[0] >= 0
    assert own.sum() == 15
    assert (found.cosines[0][~own] == 0).all()
    expected = cosines[np.flatnonzero(own), found.features[0][own]].clamp_min(0)
    assert found.cosines[0][own] == pytest.approx(expected.numpy(), abs=1e-6)


@settings(deadline=None, max_examples=20)  # the first product in bfloat16 compiles its kernel
@given(st.integers(1, 300), st.integers(0, 5))
def test_bfloat16_gives_upper_bounds(d_in, seed):
    a, b = drawn(9, d_in, seed=seed), drawn(13, d_in, seed=seed + 100)
    exact, bound = recurrence.neighbours(a.double(), [b]), recurrence.neighbours(a, [b], bfloat16=True)
    for name in ("largest", "mutual"):
        assert (getattr(bound, name) >= getattr(exact, name) - 1e-6).all()
    assert (bound.largest - exact.largest < 0.03).all()


def test_p_values_of_rotations_are_places_in_their_stratum():
    mutual, turned = drawn(200).abs(), recurrence.Neighbours(drawn(5, 200, seed=1), drawn(5, 200, seed=2).abs())
    p = recurrence.rotation_p_values(mutual, turned)
    strata = recurrence.strata_of(turned.largest.double().mean(0).numpy())
    assert np.bincount(strata).tolist() == [67, 67, 66]
    for i in (0, 50, 199):
        pool = turned.mutual[:, strata == strata[i]]
        assert p[i] == pytest.approx((1 + (pool >= mutual[i]).sum()) / (1 + pool.numel()))
    assert recurrence.strata_of(np.arange(10)).max() == 0
    assert recurrence.strata_of(np.arange(20_000)).max() == 15


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


@pytest.mark.nightly
def test_p_values_of_rotations_agree_with_direct_draws():
    """200 features, 10⁵ direct draws: the features' own values are among the draws, and those of a stratum alike."""
    spectrum = Spectrum.of(torch.diag(torch.linspace(3, 0.3, 12)), 10_000)
    # Lone components alone: the rotation is a sign for each, which all rows of all siblings share.
    assert all(len(group) == 1 for group in spectrum.groups)
    W = drawn(200, 12)
    siblings = [drawn(40, 12, seed=s + 1) @ torch.diag(torch.linspace(1.7, 0.5, 12)) for s in range(3)]
    observed = recurrence.neighbours(W, siblings).mutual.mean(0)
    p = recurrence.rotation_p_values(observed, recurrence.rotated(W, siblings, spectrum, 100))
    g, reached, draws, U = torch.Generator().manual_seed(7), torch.zeros(200), 100_000, recurrence.unit_rows(W)
    units = [recurrence.unit_rows(s) for s in siblings]
    components = spectrum.components
    for _ in range(draws // 100):
        signs = torch.where(torch.rand(100, 1, 12, generator=g) < 0.5, 1.0, -1.0)
        turned, total = (U @ components * signs) @ components.T, torch.zeros(100, 200)
        for b in units:
            cosines = turned @ b.T
            most, at = cosines.max(2)
            total += torch.where(cosines.amax(1).gather(1, at) <= most + 1e-6, most.clamp_min(0), 0.0)
        reached += (total / 3 >= observed - 1e-6).sum(0)
    direct = reached.numpy() / draws
    assert np.corrcoef(p, direct)[0, 1] > 0.95
    assert np.abs(p - direct).mean() < 0.05
    assert ((p <= 0.05) == (direct <= 0.05)).mean() > 0.9


def test_planted_draws_of_the_spectral_null_are_no_features():
    """Siblings resemble each other. A drawn direction near to one is near to all, and is still marked seldom."""
    spectrum = Spectrum.of(torch.eye(12), 10_000)
    shared, p = drawn(40, 12), []
    for seed in range(5):
        siblings = [shared + 0.2 * drawn(40, 12, seed=100 * seed + s) for s in range(6)]
        W = nulls.spectral(shared, shared, spectrum, torch.Generator().manual_seed(seed))[1]
        p.append(
            recurrence.rotation_p_values(
                recurrence.neighbours(W, siblings).mutual.mean(0),
                recurrence.rotated(W, siblings, spectrum, 20, (seed,)),
            )
        )
    share = np.mean(np.concatenate(p) <= 0.1)
    assert 0.05 < share < 0.15


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
# Calibration


@pytest.fixture
def calibration(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("feature_calibration")


def calibrated(shares, true=(10, 9), recurred=450, rejected=0):
    """Studies of 20 marked directions each."""
    certified = {"features": 10, "recurred": recurred, "trainings": 500, "rejected": rejected}
    return [
        {
            "marked": 20,
            "false": round(20 * share),
            "false_share": share,
            "planted": {kind: [5, 1] for kind in ("spectral draws", "rows", "token means", "centroids")},
            "own": [40, 20],
            "true": list(true),
            "true_not_prototype": list(true),
            "certified": {share: dict(certified) for share in ("0.5", "0.8")},
        }
        for share in shares
    ]


@pytest.mark.parametrize(
    ("studies", "kept"),
    [
        (calibrated([0.0] * 4), True),
        (calibrated([0.05, 0.0, 0.05, 0.0]), True),
        (calibrated([0.1, 0.05, 0.05, 0.05]), False),  # the mean
        (calibrated([0.15, 0.0, 0.0, 0.0]), False),  # the bound
        (calibrated([0.0] * 4, true=(10, 7)), False),
        (calibrated([0.0] * 4, recurred=350), False),  # less than 0.8
        (calibrated([0.0] * 4, rejected=1), False),
    ],
)
def test_which_calibration_is_kept(calibration, studies, kept):
    world = calibration.WORLDS["independent"]
    assert bool(calibration.failures({"a": calibration.summary(world, studies)})) != kept


def test_a_world_without_features_counts_studies(calibration):
    """Of studies whose share is 0 or 1, the bound is Clopper and Pearson's."""
    world = calibration.WORLDS["low-rank"]
    found = calibration.summary(world, calibrated([0.0] * 79 + [1.0], true=(0, 0)))
    assert found["false_share_high"] == pytest.approx(stats.beta.ppf(0.95, 2, 79))


@pytest.mark.slow
def test_the_calibration_from_the_shell(run_script, tmp_path):
    script = "benchmarks/feature_calibration.py"
    given_ = ["--smoke", "--artifact-root", str(tmp_path), "--output-dir", str(tmp_path)]
    code, _, error = run_script(script, *given_)
    assert code == 0, error
    found = json.loads((tmp_path / "feature_calibration.json").read_text())
    assert {*found["worlds"]} == {"independent", "low-rank"}
    assert found["worlds"]["low-rank"]["true"] == [0, 0]
    planted = found["studies"]["independent"][0]["planted"]
    assert sum(n for n, _ in planted.values()) <= 16
    assert "| independent | 1 |" in (tmp_path / "feature_calibration.md").read_text()


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
