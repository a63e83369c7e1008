"""Scores, nulls and inference, against oracles, brute force and published figures."""

import re
import sys
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linear_sum_assignment

import processes
from husai.evidence import contrast, names, rules, stability
from husai.evidence.estimates import (
    Estimate,
    effect_for,
    jackknife,
    mean_over_seeds,
    mean_over_seeds_and_sets,
    pair_values,
    pass_probability,
    permutation_test,
    tost,
)
from husai.evidence.names import ALIVE, GAP, OTHERS, SCORES
from husai.evidence.schemas import Gain, Interval, OwnSection, PulledSection, SparsitySection
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.stability import compare, independence, nulls, study
from husai.stability.compare import Dictionary
from husai.stability.matching import match, unit_rows
from husai.stability.scores import FEWEST, max_cosines, mcc, pwmcc, score


def gaussian(seed, features, d=128):
    """As the published figures drew it: columns are features."""
    return torch.randn(d, features, generator=torch.Generator().manual_seed(seed)).T


def test_published_isotropic_value_1024():
    dictionaries = [gaussian(s, 1024) for s in range(1000, 1005)]
    values = [pwmcc(a, b) for a, b in combinations(dictionaries, 2)]
    assert np.mean(values) == pytest.approx(0.298829, abs=5e-7)


def test_published_isotropic_value_128():
    dictionaries = [gaussian(s, 128) for s in (100042, 100123, 100456)]
    assert np.mean([pwmcc(a, b) for a, b in combinations(dictionaries, 2)]) == pytest.approx(0.2479, abs=5e-5)


def rows(seed, n, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10**6), st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_a_permuted_rescaled_copy_scores_one_and_its_negative_only_by_abs_cosines(seed, n):
    a = rows(seed, n)
    g = torch.Generator().manual_seed(seed + 1)
    b = (a * (torch.rand(n, 1, generator=g) + 0.1))[torch.randperm(n, generator=g)]
    everything = torch.ones(n, dtype=torch.bool)
    scores = score(a, b, everything, everything, (*SCORES, *(OTHERS if n >= FEWEST else ())), everything, everything)
    assert scores.pop(GAP) == 0
    assert {name for name, v in scores.items() if v != pytest.approx(1, abs=1e-5)} == set()
    signs = torch.randint(0, 2, (n, 1), generator=g) * 2 - 1
    turned = score(a, b * signs, everything, everything)
    absolute = {name: v for name, v in turned.items() if name.startswith("pwmcc") or name.endswith("_abs")}
    assert all(v == pytest.approx(1, abs=1e-5) for v in absolute.values())
    assert turned["mcc_alive"] <= turned["mcc_alive_abs"] + 1e-6
    assert score(rows(seed, 1), -rows(seed, 1), everything[:1], everything[:1])["mcc"] == 0


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_scores_are_symmetric_and_bounded(seed, n, m):
    a, b = rows(seed, n), rows(seed + 1, m)
    for function in (pwmcc, mcc):
        assert function(a, b) == pytest.approx(function(b, a), abs=1e-6)
        assert 0 <= function(a, b) <= 1 + 1e-6
    if n == m:
        assert mcc(a, b) <= pwmcc(a, b) + 1e-6, "one-to-one partners are no closer than the closest ones"


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6), (6, 4)])
def test_mcc_against_all_assignments(n, m):
    a, b = rows(1, n, 3), rows(2, m, 3)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)  # noqa: E731
    cosines = (unit(a) @ unit(b).T).clamp_min(0).numpy()
    cosines = cosines if n <= m else cosines.T
    best = max(cosines[range(min(n, m)), list(p)].mean() for p in permutations(range(max(n, m)), min(n, m)))
    assert mcc(a, b) == pytest.approx(best, abs=1e-6)


def test_blocks_do_not_change_the_scores(monkeypatch):
    a, b = rows(1, 50), rows(2, 70)
    expected = (*max_cosines(a, b), match(a, b).cosines)
    monkeypatch.setattr("husai.stability.scores.BLOCK", 7)
    for x, y in zip(expected, (*max_cosines(a, b), match(a, b).cosines), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    cosines = (torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T).abs()
    np.testing.assert_allclose(expected[0], cosines.amax(1), atol=1e-6)
    np.testing.assert_allclose(expected[1], cosines.amax(0), atol=1e-6)


def test_planted_overlap_is_found():
    """40 of 100 features shared, the others orthogonal to everything shared."""
    basis = torch.linalg.qr(rows(0, 200, 200))[0]
    a, b = basis[:100], torch.cat([basis[:40], basis[100:160]])
    everything = torch.ones(100, dtype=torch.bool)
    values = score(a, b, everything, everything)
    assert values["mcc"] == pytest.approx(0.4, abs=1e-4)
    assert values["share70"] == pytest.approx(0.4)
    alive = everything.clone()
    alive[40:] = False
    assert score(a, b, alive, alive)["mcc_alive"] == pytest.approx(1)
    assert score(a, b, alive, ~alive)["mcc_alive"] == pytest.approx(0, abs=1e-4)
    assert score(a, b, alive, torch.zeros(100, dtype=torch.bool))["pwmcc_alive"] == 0


def test_a_dictionary_narrower_than_its_space_keeps_its_orientation():
    """8 features in 12 coordinates: the features are the rows, whatever the shape looks like."""
    a, b = rows(1, 8), rows(2, 8)
    assert pwmcc(a, b) != pytest.approx(pwmcc(a.T, b.T), abs=1e-3)
    unit = lambda x: (x / x.norm(dim=1, keepdim=True)).numpy()  # noqa: E731
    cosines = np.abs(unit(a) @ unit(b).T)
    assert cosines.shape == (8, 8)
    assert pwmcc(a, b) == pytest.approx((cosines.max(0).mean() + cosines.max(1).mean()) / 2, abs=1e-6)


@pytest.mark.slow
def test_16384_features_need_under_4_gb():
    code = """
import resource, torch
from husai.stability.scores import mcc, pwmcc
a = torch.randn(16384, 64, generator=torch.Generator().manual_seed(0))
b = a[torch.randperm(16384, generator=torch.Generator().manual_seed(1))] + 0.02 * torch.randn(16384, 64)
assert pwmcc(a, b) > 0.99 and mcc(a, b) > 0.99
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peak = int(processes.run([sys.executable, "-c", code]).stdout)
    assert peak * 1024 < 4e9


# ---------------------------------------------------------------------------------------------------------------------
# Nulls


def covariance(d=12, seed=0):
    x = rows(seed, 5000, d) * torch.linspace(3, 0.3, d)
    x = x @ torch.linalg.qr(rows(seed + 9, d, d))[0]
    return torch.cov(x.T)


def test_spectral_null_keeps_what_it_should():
    spectrum = nulls.Spectrum.of(covariance(), 10**9)
    assert [len(g) for g in spectrum.groups] == [1] * 12
    a, b = rows(1, 30), rows(2, 20)
    same, flipped = nulls.spectral(a, b, spectrum, torch.Generator().manual_seed(0))
    assert same is a
    torch.testing.assert_close(flipped @ flipped.T, b @ b.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (flipped @ spectrum.components).abs(), (b @ spectrum.components).abs(), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(flipped, b, atol=0.1)
    assert torch.equal(b, rows(2, 20)), "the dictionary itself is left alone"


def test_a_mean_direction_that_is_set_apart_stays():
    mean = rows(7, 1)[0]
    spectrum = nulls.Spectrum.of(covariance(), 10**9, mean)
    torch.testing.assert_close(spectrum.components.T @ spectrum.components, torch.eye(12), rtol=0, atol=1e-5)
    assert spectrum.eigenvalues.sum().item() == pytest.approx(covariance().trace().item(), rel=1e-5)
    b = rows(2, 20)
    _, drawn = nulls.spectral(b, b, spectrum, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn @ mean, b @ mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn @ drawn.T, b @ b.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn, b, atol=0.1)


def test_a_mean_within_its_sampling_error_or_alone_in_its_space():
    spread = covariance()
    whole = nulls.Spectrum.of(spread, 1000)
    for mean in (torch.zeros(12), torch.full((12,), 1e-25)):
        assert torch.equal(nulls.Spectrum.of(spread, 1000, mean).components, whole.components)
    alone = nulls.Spectrum.of(torch.ones(1, 1), 1000, torch.ones(1))
    b = rows(2, 20, 1)
    assert torch.equal(nulls.spectral(b, b, alone, torch.Generator().manual_seed(0))[1], b)
    flat = torch.diag(torch.tensor([1.0, 2.0, 0.0]))  # the rows do not vary along their mean
    assert (nulls.Spectrum.of(flat, 1000, torch.tensor([0.0, 0.0, 3.0])).eigenvalues >= 0).all()


def test_degenerate_eigenspaces_are_rotated_not_flipped():
    values = torch.tensor([5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 0.0, 0.0])
    spectrum = nulls.Spectrum.of(torch.diag(values), 10_000)
    assert [len(g) for g in spectrum.groups] == [3, 1, 2, 2]
    b = rows(3, 15, 8)
    _, rotated = nulls.spectral(b, b, spectrum, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated @ rotated.T, b @ b.T, rtol=1e-4, atol=1e-4)
    for group in spectrum.groups:
        basis = spectrum.components[:, group.start : group.stop]
        torch.testing.assert_close((rotated @ basis).norm(dim=1), (b @ basis).norm(dim=1), rtol=1e-4, atol=1e-4)
    first = spectrum.components[:, :3]
    assert not torch.allclose((rotated @ first).abs(), (b @ first).abs(), atol=0.1)


def test_features_on_single_components_have_no_excess_and_others_do():
    d = 12
    spectrum = nulls.Spectrum.of(torch.diag(torch.linspace(3, 0.3, d)), 10**9)
    everything = torch.ones(d, dtype=torch.bool)
    axis_aligned = Dictionary(torch.eye(d), everything)
    value = compare.pair(axis_aligned, axis_aligned, spectrum, 10, 1)
    absolute = [value[name]["mean"]["mcc_alive_abs"] for name in ("spectral", "observed")]
    assert absolute[0] == pytest.approx(absolute[1], abs=1e-6), "signs alone are no features"
    mixed = Dictionary(torch.linalg.qr(rows(0, d, d))[0], everything)
    value = compare.pair(mixed, mixed, spectrum, 10, 1)
    assert value["observed"]["mean"]["mcc"] - value["spectral"]["mean"]["mcc"] > 0.3


def test_strata_count_each_matched_feature_once_on_either_side():
    rates = (
        torch.tensor([0.0, 5e-4, 1e-3, 0.05, 0.05, 0.5, 1.0]),
        torch.tensor([0.2, 0.0, 0.002, 0.002, 1e-4, 0.3, 0.9]),
    )
    near = torch.tensor([0.0, 0.3, 0.5, 0.69, 0.7, 0.9, -0.5]), torch.tensor([0.1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])
    a, b = (Dictionary(rows(i, 7), rate, nearest=n) for i, rate, n in zip((1, 2), rates, near, strict=True))
    b.W_dec[2] = 2 * a.W_dec[3]
    places = [np.flatnonzero(d.alive.numpy()) for d in (a, b)]
    A, B = (unit_rows(d.W_dec).numpy()[at] for d, at in zip((a, b), places, strict=True))
    worth = np.maximum(A @ B.T, 0)
    left, right = linear_sum_assignment(worth, maximize=True)
    found = compare.strata(a, b)
    for figure, values in (("firing_rate", rates), ("nearest", near)):
        edges, expected = names.STRATA[figure], np.zeros((4, 3))
        for i, j in zip(left, right, strict=True):
            for value in (values[0][places[0][i]], values[1][places[1][j]]):
                stratum = max(n for n in range(4) if float(value) >= edges[n] or n == 0)
                expected[stratum] += 1, worth[i, j], worth[i, j] >= 0.7
        assert np.allclose(found[figure], expected, atol=1e-6)
    assert sum(row[2] for row in found["nearest"]) >= 2, "the copy is matched"
    assert compare.strata(a, Dictionary(b.W_dec, torch.zeros(7))) == {}
    doubled = compare.added([found, found])
    assert np.allclose(doubled["nearest"], 2 * np.array(found["nearest"]))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_random_rotations_are_orthogonal_and_seeded(size):
    q = nulls.random_rotations(2000, size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.mT, torch.eye(size).expand_as(q), atol=1e-5, rtol=0)
    assert torch.equal(q, nulls.random_rotations(2000, size, torch.Generator().manual_seed(0)))
    assert q.mean(0).abs().max() < 0.08, "Haar measure has mean 0; QR without the sign correction has not"


def test_gaussian_nulls_have_their_covariance():
    c = covariance()
    spectrum = nulls.Spectrum.of(c, 5000)
    empty = torch.zeros(60_000, 12)
    drawn, other = nulls.covariance_matched(empty, empty, spectrum, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(drawn.T), c, rtol=0.05, atol=0.1)
    assert not torch.equal(drawn, other)
    drawn, _ = nulls.isotropic(empty, empty, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(drawn.T), torch.eye(12), rtol=0.05, atol=0.05)


def test_effective_rank():
    assert nulls.Spectrum.of(torch.eye(7), 100).effective_rank() == pytest.approx(7, rel=1e-5)
    assert nulls.Spectrum.of(torch.diag(torch.tensor([4.0, 0, 0])), 100).effective_rank() == pytest.approx(1, rel=1e-4)


def test_scoring_leaves_the_thread_count_as_it_was():
    code = """
import torch
from husai.kernels.workers import one_torch_thread
from husai.stability import compare, independence, nulls
from husai.evidence import contrast
torch.set_num_threads(2)
d = lambda s: compare.Dictionary(torch.randn(9, 4, generator=torch.Generator().manual_seed(s)), torch.ones(9).bool())
with one_torch_thread():
    assert torch.get_num_threads() == 1
    compare.pair(d(1), d(2), nulls.Spectrum.of(torch.eye(4), 100), 5, 2)
assert torch.get_num_threads() == 2
info = torch.__config__.parallel_info()
assert "mkl_get_max_threads() : 2" in info or "mkl_get_max_threads" not in info, info
"""
    processes.run([sys.executable, "-c", code])


def test_pair_does_not_depend_on_the_number_of_workers():
    spectrum = nulls.Spectrum.of(covariance(), 5000)
    alive = torch.ones(20, dtype=torch.bool)
    a, b = Dictionary(rows(1, 20), alive, rows(3, 20)), Dictionary(rows(2, 20), alive, rows(4, 20))
    assert compare.pair(a, b, spectrum, 10, 1) == compare.pair(a, b, spectrum, 10, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def symmetric(seed, s):
    m = np.random.default_rng(seed).normal(size=(s, s))
    return m + m.T


@pytest.mark.parametrize("s", [3, 5, 8])
def test_jackknife_against_its_definition(s):
    m = symmetric(s, s)
    pairs = list(combinations(range(s), 2))
    mean = np.mean([m[p] for p in pairs])
    deleted = np.array([np.mean([m[p] for p in pairs if i not in p]) for i in range(s)])
    error = np.sqrt((s - 1) / s * np.sum((deleted - deleted.mean()) ** 2))
    e = jackknife(m)
    assert e.estimate == pytest.approx(mean)
    assert e.standard_error == pytest.approx(error)
    assert (e.low, e.high) == pytest.approx(
        (mean - stats.t.ppf(0.975, s - 1) * error, mean + stats.t.ppf(0.975, s - 1) * error)
    )
    assert (e.n_seeds, e.reason) == (s, None)


@given(st.integers(0, 1000), st.integers(3, 7), st.floats(-5, 5), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_jackknife_moves_with_its_data(seed, s, shift, scale):
    m = symmetric(seed, s)
    order = np.random.default_rng(seed).permutation(s)
    e, moved = jackknife(m), jackknife((m * scale + shift)[np.ix_(order, order)])
    assert moved.estimate == pytest.approx(e.estimate * scale + shift, abs=1e-9)
    assert moved.high - moved.low == pytest.approx((e.high - e.low) * scale, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-10, 10), min_size=3, max_size=8), st.sampled_from([0.9, 0.95]))
def test_mean_over_seeds_is_the_t_interval(values, level):
    found = mean_over_seeds(values, level)
    assert found.estimate == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-6:
        theirs = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert (found.low, found.high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))


def test_mean_over_seeds_needs_three_for_an_interval_and_finite_figures():
    assert mean_over_seeds([1.0, 2.0]).low is None
    for bad in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="finite"):
            mean_over_seeds(bad)


def interval(estimate, low=None, high=None):
    fields = {"estimate": estimate, "low": low, "high": high, "standard_error": None if low is None else 0.1}
    return fields | {"n_seeds": 3, "method": "made up", "reason": None}


def arm(excess, seeds=(1, 2, 3), ev=None, lows=(0.2, 0.1, -0.05)):
    """A section with these excesses over the spectral null `[S, S]`.

    Args:
        ev: explained variances, one a seed. lows: lower ends of the summary's excess over each required null.
    """
    labels = [f"seed{s}" for s in seeds]
    score = lambda value: dict.fromkeys(ALIVE, float(value)) | {GAP: 0.0}  # noqa: E731
    pairs = [
        {
            "a": labels[i],
            "b": labels[j],
            "observed": score(0.5 + excess[i, j]),
            "isotropic": score(0.2),
            "gaussian": score(0.2),
            "spectral": score(0.5),
        }
        for i, j in combinations(range(len(seeds)), 2)
    ]
    each = {n: interval(low, low, low) for n, low in zip(names.GATED_NULLS, lows, strict=True)}
    spread = {"mean": 0.2, "draws": 0, "q95_of_mean": None}
    summary = {"observed": interval(0.5), "nulls": dict.fromkeys(names.GATED_NULLS, spread), "excess": each}
    verdict = {"score": "mcc_alive", "outcome": "MISSING", "reason": "", "sentence": "", "highest_null": "spectral"}
    verdict["equivalence"] = None
    members = [
        {"label": label, "seed": seed, "checkpoint_sha256": "0" * 64}
        | {"heldout": {"explained_variance": v, "mse": 0.1, "l0": 1.0, "dead_share": 0.0}}
        for label, seed, v in zip(labels, seeds, ev or [0.9] * len(seeds), strict=True)
    ]
    return OwnSection.model_validate(
        {
            "members": members,
            **{"subject_digest": "0" * 64, "hook_name": "hook", "store_digest": "0" * 64},
            **{"rows": 10, "d_in": 4, "effective_rank": 1.0},
            "stability": {
                **{"labels": labels, "scores": {"mcc_alive": summary}, "mcc_gap_bound": 0.0, "missing_nulls": {}},
                "verdict": verdict | {"claimable_excess": each["spectral"]},
            },
            "pairs": pairs,
            "gaussian": None,
            "others": None,
            "strata": [
                {"figure": "firing_rate", "low": low, "high": high, "features": 0.0, "mcc": None, "share70": None}
                for low, high in pairwise(names.STRATA["firing_rate"])
            ],
        }
    )


def test_means_without_one_seed():
    m, x, families = symmetric(0, 5), np.random.default_rng(0).normal(size=(5, 6)), list("aabbcc")
    rest = [[i for i in range(5) if i != left] for left in range(5)]
    for found, means in (
        (jackknife(m), [pair_values(m[np.ix_(r, r)]).mean() for r in rest]),
        (mean_over_seeds(list(x[:, 0])), [x[r, 0].mean() for r in rest]),
        (mean_over_seeds_and_sets(x, families), [x[r].mean() for r in rest]),
    ):
        assert found.without_one == pytest.approx((min(means), max(means)), abs=1e-12)
        assert "without_one" not in found.to_json()
    assert mean_over_seeds_and_sets(x[:2], families).without_one is None, "two seeds are no sample"


@given(values=st.lists(st.floats(-5, 5), min_size=10, max_size=10))
def test_a_lower_end_above_0_implies_each_mean_without_one_seed(values):
    m = np.zeros((5, 5))
    m[np.triu_indices(5, 1)] = values
    pairs, seeds = jackknife(m + m.T), mean_over_seeds(values[:5])
    for e in (pairs, seeds):
        assert e.low <= e.without_one[0] + 1e-9
        assert e.without_one[1] <= e.high + 1e-9


def estimate_of(seeds, level, error, end_at=0.0):
    half = stats.t.ppf((1 + level) / 2, seeds - 1) * error
    return Estimate(end_at, end_at - half, end_at + half, error, seeds, "made up", None, seeds - 1)


@pytest.mark.parametrize("seeds", [3, 5, 9])
@pytest.mark.parametrize(("end", "threshold", "truths"), [("low", 0.02, (0.0, 0.06)), ("high", 0.1, (0.0, 0.12, 0.1))])
@pytest.mark.parametrize("level", [0.95, 0.975])
def test_pass_probability_against_simulated_intervals(seeds, end, threshold, truths, level):
    rng, sd, n = np.random.default_rng(0), 0.03, 100_000
    estimate, quantile = estimate_of(seeds, level, sd / np.sqrt(seeds)), stats.t.ppf((1 + level) / 2, seeds - 1)
    needed = effect_for(estimate, end, threshold)
    for truth in (*truths, needed):
        x = rng.normal(truth, sd, (n, seeds))
        half = quantile * x.std(1, ddof=1) / np.sqrt(seeds)
        passed = x.mean(1) - half > threshold if end == "low" else x.mean(1) + half <= threshold
        expected = pass_probability(estimate, end, threshold, truth)
        assert abs(passed.mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / n) + 1e-9
        assert truth != needed or expected == pytest.approx(0.8, abs=1e-6)


@given(
    seeds=st.integers(3, 20),
    level=st.sampled_from([0.9, 0.95, 0.975, 0.9875]),
    error=st.floats(1e-4, 1.0),
    threshold=st.floats(-1, 1),
    probability=st.floats(0.05, 0.99),
)
def test_the_effect_is_the_inverse_of_the_pass_probability(seeds, level, error, threshold, probability):
    e = estimate_of(seeds, level, error)
    low = effect_for(e, "low", threshold, probability)
    assert pass_probability(e, "low", threshold, low) == pytest.approx(probability, abs=1e-4)
    assert pass_probability(e, "low", threshold, threshold) == pytest.approx((1 - level) / 2, abs=1e-6)
    high = effect_for(e, "high", threshold, probability)
    assert high - threshold == pytest.approx(threshold - low, abs=1e-6 * (1 + abs(low)))
    assert pass_probability(e, "low", threshold, low + error) > pass_probability(e, "low", threshold, low)


def test_a_gate_has_the_power_of_the_estimate_that_is_the_hardest_to_pass():
    narrow, wide = estimate_of(5, 0.95, 0.01), estimate_of(5, 0.95, 0.03)
    for rule, sign in ((rules.STABILITY, 1), (rules.OOD, -1)):
        shown = rule.shown({"narrow": narrow, "wide": wide}, 5)
        for truth in (0.0, 0.05):
            each = [pass_probability(e, rule.end, rule.threshold, truth) for e in (narrow, wide)]
            assert shown.passes_at(truth) == min(each)
        assert shown.effect_for() == effect_for(wide, rule.end, rule.threshold)
        assert sign * (shown.effect_for() - effect_for(narrow, rule.end, rule.threshold)) > 0
    without = Estimate(0.1, 0.1, 0.1, 0.0, 5, "all alike", None, 4)
    assert [pass_probability(without, "low", 0.05, truth) for truth in (0.0, 0.1)] == [0.0, 1.0]
    assert effect_for(without, "low", 0.05) == 0.05
    with pytest.raises(ValueError, match="interval"):
        pass_probability(jackknife(symmetric(0, 2)), "low", 0.0, 0.0)


def test_gains_pair_the_seeds():
    g = np.random.default_rng(0)
    base, more = (m + m.T for m in g.normal(size=(2, 3, 3)))
    np.fill_diagonal(base, 0)
    np.fill_diagonal(more, 0)
    a, b = arm(base + more), arm(base)
    np.testing.assert_allclose(b.scores("spectral"), base, atol=1e-12)
    found, expected = contrast.gain([a], [b]), jackknife(more)
    for estimate in (found.observed, *found.over.values()):
        assert estimate.estimate == pytest.approx(expected.estimate)
        assert estimate.low == pytest.approx(expected.low)
    both = contrast.gain([a, arm(base - more)], [b, b])
    assert both.observed.estimate == pytest.approx(0, abs=1e-12)
    mean, left_out = contrast.gain_and_left_out([a, arm(base - more)], b)
    assert (mean, left_out) == (both, [contrast.gain([arm(base - more)], [b]), found])
    assert contrast.gain_and_left_out([a], b) == (found, [])
    assert contrast.lower_bound(a) == -0.05
    with pytest.raises(ValueError, match="seeds"):
        contrast.gain([a], [arm(base, seeds=(1, 2, 4))])


def test_a_gain_that_is_the_fall_of_one_null_is_not_shown():
    """Features less alike than the control's, and the spectral null fallen further: no gain."""
    level = np.full((5, 5), 0.1) - np.diag([0.1] * 5)
    noise = np.triu(np.random.default_rng(0).normal(size=(5, 5)) / 1000, 1)
    control, less = arm(level, seeds=range(5)), arm(level - 0.05 + noise + noise.T, seeds=range(5))
    for pair in less.pairs:
        pair["spectral"]["mcc_alive"] -= 0.1
    found = contrast.gain([less], [control])
    assert found.spectral.low > 0 > found.isotropic.high
    assert found.least in ("isotropic", "gaussian")
    assert rules.gain_verdict(found, 5) == "not shown to differ"


def estimates(low, high):
    each = interval((low + high) / 2, low, high) if low is not None else interval(high)
    return Gain.model_validate({"observed": each} | dict.fromkeys(names.GATED_NULLS, each) | {"least": "spectral"})


@pytest.mark.parametrize(
    ("low", "high", "seeds", "outcome"),
    [
        (0.01, 0.02, 5, "better"),
        (0.01, 0.02, 4, rules.MISSING),
        (-0.02, -0.01, 5, "worse"),
        (-0.01, 0.01, 5, "not shown to differ"),
    ],
)
def test_verdict_of_a_gain(low, high, seeds, outcome):
    assert rules.gain_verdict(estimates(low, high), seeds) == outcome


def pulled(weight, low, lost):
    """An arm whose least gain has this lower end, and whose lost variance this upper end; None: no interval."""
    gain = estimates(low, 1.0)
    drop = Interval(**interval(-0.5, -1.0, lost) if lost is not None else interval(-0.5))
    return PulledSection.model_construct(weight=weight, gain=gain, ev_drop=drop)


@pytest.mark.parametrize(
    ("low", "lost", "seeds", "accepted", "named"),
    [
        (0.01, 0.04, 5, True, ""),
        (0.0, 0.04, 5, False, r"\bgain\b"),
        (0.01, 0.06, 5, False, r"^(?!.*λ).*\bvariance\b"),
        (0.01, 0.04, 4, False, r"\b4 seeds\b.*\b5\b"),
    ],
)
def test_acceptance(low, lost, seeds, accepted, named):
    lost, gain, arms = Interval(**interval(0.0, -0.1, lost)), estimates(low, 0.1), [pulled(0.1, 0.2, 0.0)]
    found = rules.acceptance(arms, gain, lost, seeds, 0.05)
    assert (found.accepted, found.weight) == (accepted, 0.1)
    assert found.outcome == ("accepted" if accepted else "not accepted")
    assert re.search(named, found.reason)
    one_null_short = gain.model_copy(update={"spectral": Interval(**interval(0.0, -0.01, 0.1))})
    assert not rules.acceptance(arms, one_null_short, Interval(**interval(0.0, 0.0, 0.0)), 5, 0.05).accepted


def test_acceptance_says_why_no_weight_was_chosen():
    """The variance that each λ costs, or gains without an interval: of two seeds, say."""
    costly = [pulled(0.1, 0.2, 0.06), pulled(0.2, 0.2, None)]
    assert re.search(r"\bλ\b.*\bvariance\b.*\b0\.05\b", rules.acceptance(costly, None, None, 0, 0.05).reason)
    found = rules.acceptance([*costly, pulled(0.3, None, 0.0)], None, None, 0, 0.05)
    assert (found.accepted, found.weight) == (False, None)
    assert re.search(r"\bgain\b.*\binterval\b", found.reason)
    with pytest.raises(ValueError, match=r"\b0\.1\b.*\bconfirmation\b"):
        rules.acceptance([pulled(0.1, 0.2, 0.0)], None, None, 0, 0.05)


def test_choices_by_what_is_sure():
    def candidate(k, ev, low):
        section = arm(np.zeros((3, 3)), ev=ev, lows=(low, 1.0, 1.0))
        return SparsitySection.model_construct(k=k, **dict(section))

    # The mean of `straddling` lies above the floor, its interval does not.
    fine, straddling = [0.95, 0.951, 0.949], [0.8, 0.95, 1.0]
    candidates = [
        candidate(4, straddling, 0.9),
        candidate(8, fine, 0.3),
        candidate(16, fine, 0.3),
        candidate(32, fine, 0.2),
    ]
    assert rules.choose_k(candidates, 0.9) == 8
    assert rules.choose_k(candidates, 0.99) is None

    arms = [pulled(0.1, 0.5, 0.06), pulled(0.2, 0.2, 0.05), pulled(0.3, 0.1, 0.0)]
    assert rules.choose_weight(arms, 0.05) == 0.2
    assert rules.choose_weight(arms, 0.001) == 0.3
    assert rules.choose_weight(arms[:1], 0.05) is None


def test_drop_is_what_the_arm_lost():
    section, control = (arm(np.zeros((3, 3)), ev=ev) for ev in ([0.8, 0.7, 0.9], [0.9, 0.85, 0.95]))
    found = contrast.drop(section, control)
    theirs = stats.ttest_rel([0.9, 0.85, 0.95], [0.8, 0.7, 0.9]).confidence_interval()
    assert found.estimate == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


@pytest.mark.parametrize(
    ("low", "high", "rest"), [(-0.02, 0.02, True), (-0.021, 0.01, False), (0.0, 0.03, False), (None, None, None)]
)
def test_at_rest(low, high, rest):
    assert rules.at_rest(Estimate(0.0, low, high, None, 5, "")) is rest


def test_training_is_followed_over_its_last_third():
    assert study.last_third([0, 1, 10, 100, 667, 834, 1000]) == [667, 834, 1000]
    assert study.last_third([0, 1, 10, 100, 1000]) == [100, 1000], "an older recipe has one snapshot there"
    assert study.last_third([0, 1]) == [0, 1]


def test_what_counts_as_shared():
    a, b = rows(1, 300, 16), rows(2, 300, 16)
    assert not independence.shared(a, b, 0.5)
    assert independence.shared(torch.cat([a, b[:1]]), a, 0.99), "one row appended"
    assert independence.shared(torch.cat([a[:-1], b[:1]]), a, 0.99), "one row exchanged"
    assert independence.shared(a.bfloat16().float(), a, 0.99), "rounded"
    pruned = a * (torch.arange(300) > 0).unsqueeze(1)
    assert independence.shared(pruned, pruned * 2, 0.99), "a zero row"
    assert independence.shared(torch.cat([a[:200], b[:100]]), a, 0.5)
    forty = torch.cat([a[:120], b[:180]])[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert independence.shared(forty, a, rules.SHARED_DECODER)
    assert independence.shared(forty, a, rules.SHARED_INITIALISATION)
    assert not independence.shared(torch.cat([a[:200], b[:100]]), a, 0.99)
    assert not independence.shared(rows(1, 5, 1), rows(2, 5, 1), 0.5), "on a line all directions coincide"


def test_alive_scores_alone_are_those_of_all_scores():
    a, b = rows(1, 9), rows(2, 7)
    alive_a, alive_b = torch.arange(9) > 2, torch.arange(7) != 1
    everything = score(a, b, alive_a, alive_b)
    alone = score(a, b, alive_a, alive_b, ALIVE)
    assert set(alone) == {*ALIVE, GAP}
    assert all(alone[name] == everything[name] for name in ALIVE)


def test_two_seeds_have_no_interval_and_one_is_refused():
    e = jackknife(symmetric(0, 2))
    assert (e.low, e.high, e.standard_error) == (None, None, None)
    assert "3 seeds" in e.reason
    with pytest.raises(ValueError, match="2 seeds"):
        jackknife(np.zeros((1, 1)))
    with pytest.raises(ValueError, match="symmetric"):
        jackknife(np.triu(symmetric(0, 4)))
    with pytest.raises(ValueError, match="symmetric"):
        jackknife(np.full((4, 4), np.nan))


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 4), (4, 3)])
def test_permutation_test_against_enumeration(first, second):
    m = symmetric(first, first + second)
    m[:first, :first] += 1.5

    def statistic(arm):
        rest = [i for i in range(first + second) if i not in arm]
        return abs(pair_values(m[np.ix_(arm, arm)]).mean() - pair_values(m[np.ix_(rest, rest)]).mean())

    observed = statistic(list(range(first)))
    values = [statistic(list(c)) for c in combinations(range(first + second), first)]
    assert permutation_test(m, first) == pytest.approx(np.mean([v >= observed - 1e-12 for v in values]))


def test_permutation_test_sees_a_difference_and_refuses_tiny_arms():
    m = symmetric(1, 10) * 0.01
    m[:5, :5] += 1
    assert permutation_test(m, 5) == pytest.approx(2 / 252), "the observed split and its mirror image"
    with pytest.raises(ValueError, match="seeds"):
        permutation_test(m, 9)
    with pytest.raises(ValueError, match="relabellings"):
        permutation_test(np.zeros((40, 40)), 20)


def test_tost():
    e = Estimate(0.01, -0.01, 0.03, 0.01, 5, "m")
    expected = max(stats.t.sf((0.01 + 0.05) / 0.01, 4), stats.t.sf((0.05 - 0.01) / 0.01, 4))
    assert tost(e, 0.05).p_value == pytest.approx(expected)
    assert tost(e, 0.05).equivalent
    assert not tost(e, 0.02).equivalent, "not different from 0 is not the same as equal"
    with pytest.raises(ValueError, match="positive"):
        tost(e, 0)
    with pytest.raises(ValueError, match="equivalence"):
        tost(jackknife(symmetric(0, 2)), 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Verdict


def outcome(seeds=5, excess=0.2, noise=0.02, missing=(), scores=(*names.SCORES, *names.OTHERS), **by_score):
    """Verdict on made-up pairs whose observed scores exceed each null by `excess` on average.

    Args:
        by_score: another excess of the scores that begin like this.
    """
    rng = np.random.default_rng(0)
    effect = rng.normal(0, noise, seeds)

    def values(of_pair=0.0, observed=False):
        more = {s: next((v for n, v in by_score.items() if s.startswith(n)), excess) for s in scores}
        return {"mean": {s: 0.3 + observed * (more[s] + of_pair) for s in scores} | {GAP: 0.0}, "draws": None}

    nulls_ = [n for n in names.GATED_NULLS if n not in missing]
    pairs = {
        (i, j): {"observed": values(effect[i] + effect[j], True)} | {n: values() for n in nulls_}
        for i, j in combinations(range(seeds), 2)
    }
    return stability.summarise([*map(str, range(seeds))], pairs, dict.fromkeys(missing, "not given")).verdict


def test_verdicts():
    assert outcome().outcome == "PASS"
    assert outcome().claimable_excess.low > 0
    assert outcome(excess=0.0).outcome == "FAIL"
    assert outcome(excess=-0.3).outcome == "FAIL"
    unclear = outcome(excess=0.02, noise=0.2)
    assert unclear.outcome == "FAIL"
    assert not unclear.equivalence["equivalent"], "a wide interval is no evidence of equality"
    assert outcome(excess=0.0, noise=1e-4).equivalence["equivalent"]
    assert outcome().equivalence is None
    for n in (2, 3, 4):
        assert outcome(seeds=n).outcome == "MISSING", "fewer than five seeds are never a pass"
        assert outcome(seeds=n).sentence == rules.LICENCES[0][2]
    for null in names.GATED_NULLS:
        verdict = outcome(missing=(null,))
        assert verdict.outcome == "MISSING"
        assert null in verdict.reason


def test_an_effect_below_the_registered_one_is_none():
    least = rules.STABILITY.threshold
    assert least > 0
    assert outcome(excess=least - 1e-3, noise=1e-5).outcome == "FAIL"
    assert outcome(excess=least + 1e-3, noise=1e-5).outcome == "PASS"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (outcome(excess=0.0), 0),
        (outcome(missing=("spectral", "gaussian")), 1),
        (outcome(missing=("gaussian",)), 2),
        (outcome(mcc_alive_abs=0.0), 1),
        (outcome(share70=0.0), 3),
        (outcome(mcc_others=0.0), 4),
        (outcome(share70_others=0.0), 4),
        (outcome(scores=names.ALIVE), 4),
        (outcome(), 5),
    ],
)
def test_what_was_beaten_licenses_a_sentence(found, line):
    assert found.sentence == rules.LICENCES[line][2]
    assert (found.outcome == "PASS") == (line == 5)


def test_too_few_features_without_prototypes_score_nothing():
    a, few = rows(1, 30), torch.arange(30) < FEWEST - 1
    everything = torch.ones(30, dtype=torch.bool)
    scored = score(a, a, everything, everything, (*SCORES, *OTHERS), few, everything)
    assert [scored[name] for name in OTHERS] == [0, 0, 0]
    assert scored["mcc_alive"] == pytest.approx(1)


def test_a_control_without_others_counts_whole():
    g = torch.Generator().manual_seed(0)
    W, alive = torch.randn(40, 12, generator=g), torch.ones(40, dtype=torch.bool)
    of = torch.nn.functional.normalize(W[:35], dim=1)
    (own,), (control,) = (
        tell([Dictionary(W, alive)], of) for tell in (study.with_nearest_prototype, study.control_apart)
    )
    assert own.others.sum() <= 5
    assert control.others.all()


def test_shared_decoders_and_initialisations_are_refused():
    alive = torch.ones(5, dtype=torch.bool)
    a, b = rows(1, 5), rows(2, 5)
    ok = [Dictionary(a, alive, rows(3, 5)), Dictionary(b, alive, rows(4, 5))]
    independence.refuse_shared(["a", "b"], ok)
    with pytest.raises(BadInput, match=r"^a and b\b.* decoder\b"):
        independence.refuse_shared(["a", "b"], [ok[0], Dictionary(a.clone(), alive, rows(4, 5))])
    with pytest.raises(BadInput, match=r"^a and b\b.* initialisation\b"):
        independence.refuse_shared(["a", "b"], [ok[0], Dictionary(b, alive, rows(3, 5))])
    turned = -2 * a[[3, 1, 0, 4, 2]]
    with pytest.raises(BadInput, match=r"^a and b\b.* decoder\b"):
        independence.refuse_shared(["a", "b"], [ok[0], Dictionary(turned, alive, rows(4, 5))])
    with pytest.raises(BadInput, match="d_in 12 and 3"):
        independence.refuse_shared(["a", "b"], [ok[0], Dictionary(rows(1, 5, 3), alive)])
    with pytest.raises(BadInput, match=r"^1 SAE\b.*\b2\b.*\b5\b"):
        independence.refuse_shared(["a"], ok[:1])


def test_what_a_killed_process_left_beside_a_checkpoint_is_no_part_of_it(tmp_path):
    folder = tmp_path / "checkpoints/a"
    folder.mkdir(parents=True)
    for name in ("cfg.json", ".cfg.json.8243.tmp", "sae_weights.safetensors"):
        (folder / name).write_text("{}")
    found = study.checkpoint_files(Cells(tmp_path / "cells"), ["checkpoints/a"])
    assert [path.name for path in found] == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize(
    "partner",
    [
        lambda a, b: torch.cat([a[: int(0.4 * len(a))], b[int(0.4 * len(a)) :]]),
        lambda a, b: a + 0.9 * b,
        lambda a, b: 3 * a,
    ],
    ids=["40 % of the rows", "a part of each row", "scaled"],
)
@pytest.mark.parametrize(("n", "d"), [(24, 16), (600, 64), (9000, 32)])
def test_features_in_one_order_are_refused_with_both_causes(partner, n, d):
    a, b = unit_rows(rows(1, n, d)), unit_rows(rows(2, n, d))
    with pytest.raises(BadInput, match=r"^x and y .*initialisation.*two steps of one run"):
        independence.refuse_dependent(["x", "y"], [a, partner(a, b)])
    same, other, errors = independence.same_number(a, partner(a, b))
    assert same == pytest.approx((unit_rows(a) * unit_rows(partner(a, b))).sum(1).abs().mean().item(), abs=0.02)
    assert rules.in_one_order(same - other, errors)


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_features_in_another_order_are_independent(seed, share):
    """However many features two SAEs have in common, and ordered in the large by groups."""
    a, b = rows(seed, 300, 16), rows(seed + 1, 300, 16)
    b[: int(300 * share)] = a[: int(300 * share)]
    groups = [b[:60], b[60:]]
    g = torch.Generator().manual_seed(seed)
    b = torch.cat([group[torch.randperm(len(group), generator=g)] for group in groups])
    a[:60, 0] += 3
    b[:60, 0] += 3
    independence.refuse_dependent(["x", "y"], [a, b])


def test_the_pass_probability_far_in_a_tail_is_0_or_1():
    e = Estimate(0.19, 0.18, 0.20, 0.0022, 5, "m", freedom=4)
    for low, truth in ((0.02, -5.0), (0.02, 0.0), (0.02, 0.19), (0.02, 5.0)):
        assert pass_probability(e, "low", low, truth) == pytest.approx(float(truth > 0.1), abs=1e-6)
