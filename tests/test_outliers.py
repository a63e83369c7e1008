"""Rows of many times the median norm: what training and held-out figures make of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from husai.activations.harvest import gaussian_rows
from husai.activations.outliers import moments, norm_limit, shrunk
from husai.activations.store import ActivationStore, StoreWriter
from husai.evidence import rules
from husai.evidence.levels import OUTLIER_NORM, SHRUNK_NORM
from husai.stability.recovery import recovery
from husai.training.stack import Member
from husai.training.trainer import Scaling, TrainingConfig, evaluate, train

D_IN, FEATURES, ACTIVE, ROWS = 16, 32, 3, 8000
CONFIG = TrainingConfig(tokens=60_000, batch_size=256)


def planted(seed=0):
    """(rows `[ROWS, D_IN]`, features `[FEATURES, D_IN]`)"""
    g = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(FEATURES, D_IN, generator=g))
    active = torch.rand(ROWS, FEATURES, generator=g).topk(ACTIVE, dim=1).indices
    strength = 1 + torch.rand(ROWS, ACTIVE, generator=g)
    return torch.zeros(ROWS, FEATURES).scatter(1, active, strength) @ features, features


def with_sinks(x, times, share=1e-3):
    g = torch.Generator().manual_seed(1)
    at, sink = torch.rand(len(x), generator=g) < share, normalize(torch.randn(1, D_IN, generator=g))
    y = x.clone()
    y[at] = x.norm(dim=1).median() * times * sink * (1 + 0.05 * torch.randn(int(at.sum()), 1, generator=g))
    return y, at


def stored(x, folder):
    folder.mkdir()
    writer = StoreWriter(folder, x.shape[1])
    writer.append(x)
    writer.finish("s", "0" * 64, "blocks.1.hook_resid_pre", "x", 0, None)
    return ActivationStore.open(folder)


def trained(store, folder):
    (result, *_), _ = train(
        store, [Member(1, FEATURES, ACTIVE, 3e-3, 1)], CONFIG, torch.device("cpu"), folder / "state"
    )
    return result.sae


def test_sinks_neither_scale_training_nor_hide_in_its_figures(tmp_path):
    x, features = planted()
    clean = stored(x, tmp_path / "clean")
    sae = trained(clean, tmp_path)
    _, heldout = clean.split(0.2)
    before = evaluate(sae, clean, heldout)[0]
    assert before.outliers is None

    for times in (100, 1000):
        y, at = with_sinks(x, times)
        store = stored(y, tmp_path / f"sinks{times}")
        assert Scaling.of(store, CONFIG, torch.float32).scale == pytest.approx(
            Scaling.of(clean, CONFIG, torch.float32).scale, rel=0.01
        )
        other = trained(store, tmp_path)
        figures = evaluate(other, store, heldout)[0]
        assert recovery(other.W_dec, features) > recovery(sae.W_dec, features) - 0.03
        assert figures.outliers.explained_variance > before.explained_variance - 0.03
        assert figures.outliers.share == at[heldout.start :].double().mean().item()
        assert figures.outliers.norms["1"] > 0.8 * times * figures.outliers.norms["0.5"]
        (said,) = rules.outlier_note([figures])
        assert f"{figures.outliers.explained_variance:.4f}" in said

        rows = y[heldout.start :].double()
        rest = (rows - other.decode(other.encode(rows.float())).double()).numpy()
        keep = np.linalg.norm(rows, axis=1) <= OUTLIER_NORM * np.median(np.linalg.norm(rows, axis=1))
        for value, kept in ((figures.explained_variance, slice(None)), (figures.outliers.explained_variance, keep)):
            part = rows.numpy()[kept]
            expected = 1 - np.square(rest[kept]).sum() / np.square(part - part.mean(0)).sum()
            assert value == pytest.approx(expected, abs=1e-6)


def test_nulls_have_the_moments_of_the_rows_that_train(tmp_path):
    x, _ = planted()
    clean = stored(x, tmp_path / "clean")
    assert all(map(torch.equal, moments(clean), clean.stats()))
    y, _ = with_sinks(x, 300)
    store = stored(y, tmp_path / "sinks")

    rows = y.double().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    median = np.median(norms)
    rows = np.where(norms > OUTLIER_NORM * median, rows * SHRUNK_NORM * median / norms, rows)
    mean, covariance = moments(store)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-6)
    assert store.stats()[1].trace() > 50 * covariance.trace()

    (folder,) = gaussian_rows([store], tmp_path)
    drawn = ActivationStore.open(folder)
    torch.testing.assert_close(drawn.stats()[1], covariance, rtol=0, atol=0.05 * covariance.trace().item())
    pair = [ActivationStore.open(f) for f in gaussian_rows([store, clean], tmp_path)]
    assert torch.equal(pair[0].read(0, 100), drawn.read(0, 100))
    together = torch.cat([s.read(0, ROWS) for s in pair], 1)
    true = np.cov(np.concatenate([rows, x.double().numpy()], 1).T)
    np.testing.assert_allclose(np.cov(together.T), true, atol=0.05 * np.trace(true))


@given(seed=st.integers(0, 1000), times=st.floats(11, 1e4), n=st.integers(0, 5))
@settings(deadline=None)
def test_outliers_alone_are_shrunk_in_their_own_direction(seed, times, n):
    x = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)))
    y = x.clone()
    y[:n] *= times
    limit = norm_limit(y.norm(dim=1))
    assert limit == pytest.approx(OUTLIER_NORM, rel=1e-5)
    small = shrunk(y, limit)
    assert torch.equal(small[n:], x[n:])
    assert torch.allclose(small[:n], SHRUNK_NORM * x[:n], rtol=1e-4)


def test_where_most_rows_are_zero_no_row_is_an_outlier():
    x = torch.zeros(10, 3)
    x[0] = 5
    assert torch.equal(shrunk(x, norm_limit(x.norm(dim=1))), x)
