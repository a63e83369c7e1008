"""Rows of many times the median norm: what training and held-out figures make of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from husai.activations import outliers, source
from husai.activations.harvest import gaussian_rows
from husai.activations.outliers import moments, norm_limit, shrunk, without_outliers
from husai.activations.store import ActivationStore, StoreWriter
from husai.evidence import rules
from husai.evidence.levels import OUTLIER_NORM, SHRUNK_NORM
from husai.runs.errors import BadInput
from husai.stability.recovery import recovery
from husai.subjects.harvesting import Harvesting
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


# ---------------------------------------------------------------------------------------------------------------------
# Left out


def labelled(x, folder, **about):
    """A store whose rows say their numbers as documents and tokens; the last fifth is held out."""
    folder.mkdir()
    writer, numbers = StoreWriter(folder, x.shape[1], shard_rows=700), torch.arange(len(x))
    writer.append(x, {"document": numbers, "token": numbers % 7})
    writer.finish("s", "0" * 64, "blocks.1.hook_resid_pre", "x", 0, None, heldout_rows=len(x) // 5, **about)
    return ActivationStore.open(folder)


def test_rows_beyond_a_multiple_of_the_median_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(outliers, "AT_ONCE", 1000)
    x, _ = planted()
    y, at = with_sinks(x, 300)
    whole, other = labelled(y, tmp_path / "whole"), labelled(2 * x, tmp_path / "other")
    store = without_outliers(whole, 10, tmp_path)
    norms = np.linalg.norm(y.numpy(), axis=1)
    keep = norms <= 10 * np.median(norms)
    assert 0 < (~keep).sum() == at.sum()
    assert np.array_equal(store.read(0, store.rows).numpy(), y.numpy()[keep])
    assert np.array_equal(store.labels("document", 0, store.rows).numpy(), np.flatnonzero(keep))
    assert np.array_equal(store.labels("token", 0, store.rows).numpy(), np.flatnonzero(keep) % 7)
    heldout = len(x) // 5
    assert store.manifest.heldout_rows == keep[-heldout:].sum()
    assert store.manifest.dropped_rows == (~keep).sum()
    assert store.manifest.harvesting == {"max_norm_multiple": 10}
    assert store.digest != whole.digest
    assert without_outliers(whole, 10, tmp_path).folder == store.folder
    assert without_outliers(whole, 20, tmp_path).folder != store.folder

    beside = without_outliers(other, 10, tmp_path, by=whole)
    assert torch.equal(beside.labels("document", 0, beside.rows), store.labels("document", 0, store.rows))

    _, rows = store.split(0.2)
    figures = evaluate(trained(store, tmp_path), store, rows)[0]
    assert figures.outliers is None
    assert figures.dropped.share == pytest.approx((~keep).mean())
    (said,) = rules.outlier_note([figures, figures])
    assert "10 times" in said
    assert "dropped" not in evaluate(trained(other, tmp_path / "other"), other, range(100))[0].to_json()

    for wrong in (lambda: without_outliers(store, 10, tmp_path), lambda: without_outliers(whole, 0.1, tmp_path)):
        with pytest.raises(BadInput, match="--max-norm-multiple"):
            wrong()


def test_a_given_store_is_read_without_its_outliers(tmp_path):
    y, at = with_sinks(planted()[0], 300)
    labelled(y, tmp_path / "given")
    way = Harvesting(max_norm_multiple=10)
    place = {"store": tmp_path / "given", "harvesting": way}
    store = source.open_store(tmp_path / "root", torch.device("cpu"), 1, **place)
    assert store.rows == len(y) - at.sum()
    assert store.folder.parent == tmp_path / "root" / "activations"
