"""The store and the order of its rows."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from husai.activations.harvest import gaussian_rows, harvest_modular_addition
from husai.activations.order import BatchReader
from husai.activations.store import ActivationStore, StoreWriter
from husai.runs.errors import BadInput
from husai.subjects import modular_addition as ma


def rows(n=2500, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, d + 1) + 3


@pytest.mark.parametrize("shard_rows", [1, 7, 999, 1000, 2500, 65_536])
def test_round_trip_and_statistics(make_store, shard_rows):
    x = rows(n=60 if shard_rows == 1 else 2500)
    store = make_store(x, shard_rows=shard_rows)
    assert (store.rows, store.d_in) == tuple(x.shape)
    assert torch.equal(store.read(0, store.rows), x)
    assert torch.equal(store.read(13, 31), x[13:31])
    mean, covariance = store.stats()
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy().T), rtol=1e-10)


def test_split_holds_out_the_last_rows(make_store):
    train, heldout = make_store(rows()).split(0.2)
    assert (train, heldout) == (range(2000), range(2000, 2500))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused_with_their_place(tmp_path, bad):
    x = rows()
    x[1234, 2] = bad
    writer = StoreWriter(tmp_path, 5)
    writer.append(x[:1000])
    with pytest.raises(BadInput, match=r"row 1234 .*NaN"):
        writer.append(x[1000:])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit_manifest(change):
    def edit(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
        (edit_manifest(lambda m: m.update(rows="many")), "manifest.json: rows:"),
        (edit_manifest(lambda m: m.update(surprise=1)), "manifest.json: surprise:"),
        (edit_manifest(lambda m: m.pop("hook_name")), "manifest.json: hook_name:"),
        (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.safetensors"),
        (lambda f: (f / "shard-00001.safetensors").write_bytes(b"x"), "shard-00001.safetensors"),
        (lambda f: flip(f / "shard-00001.safetensors"), "shard-00001.safetensors"),
        (lambda f: flip(f / "stats.safetensors"), "stats.safetensors"),
    ],
)
def test_damaged_stores_are_refused(make_store, damage, place):
    store = make_store(rows(), shard_rows=1000)
    damage(store.folder)
    with pytest.raises(BadInput, match=f"{store.folder}/{re.escape(place)}"):
        ActivationStore.open(store.folder)


def test_a_store_of_another_subject_or_hook_is_refused(make_store):
    folder = make_store(rows()).folder
    with pytest.raises(BadInput, match=r"0{64}.* 1{64}"):
        ActivationStore.open(folder, subject_digest="1" * 64)
    with pytest.raises(BadInput, match=r"\bhook\b.* other\b"):
        ActivationStore.open(folder, hook_name="other")
    assert ActivationStore.open(folder, subject_digest="0" * 64, hook_name="hook").rows == 2500


def test_harvest_equals_the_models_own_cache(small_subject, small_activations):
    _, folder = small_subject
    model, config, description = ma.load(folder)
    store = ActivationStore.open(small_activations, description["digest"], "blocks.0.hook_resid_post")
    tokens, _, _, _ = ma.dataset(config)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    expected = cache["blocks.0.hook_resid_post"][:, 2]
    found = store.read(0, store.rows)
    order = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    torch.testing.assert_close(order(found), order(expected), rtol=0, atol=1e-6)
    assert not torch.allclose(found, expected), "the rows are in random order"


def test_another_hook_position_or_subject_is_another_store(small_subject):
    root, folder = small_subject
    make = lambda *a: harvest_modular_addition(folder, root / "activations", *a)  # noqa: E731
    stores = {make("blocks.0.hook_resid_post"), make("blocks.0.mlp.hook_post"), make("blocks.0.hook_resid_post", 1)}
    assert len(stores) == 3
    assert make("blocks.0.hook_resid_post") in stores


@pytest.mark.parametrize(
    ("hook", "position", "named"),
    [
        ("blocks.7.hook_resid_post", None, "--hook-name blocks.7.hook_resid_post: .*blocks.0.hook_resid_pre"),
        ("blocks.0.attn.hook_q", None, r"--hook-name blocks.0.attn.hook_q: .*\[1, 3, 2, 8\]"),
        ("blocks.0.hook_resid_post", 3, "--position 3: .*2"),
    ],
)
def test_impossible_harvests_are_refused(small_subject, hook, position, named):
    root, folder = small_subject
    with pytest.raises(BadInput, match=named):
        harvest_modular_addition(folder, root / "activations", hook, position)
    assert not list((root / "activations").glob(".*.partial/manifest.json"))


def test_gaussian_rows_keep_the_second_moments_and_nothing_else(make_store, tmp_path):
    g = torch.Generator().manual_seed(0)
    sparse = (torch.rand(6000, 12, generator=g) < 0.1) * torch.rand(6000, 12, generator=g)
    x = sparse @ torch.randn(12, 6, generator=g) + 3
    y = x[:, :4] @ torch.randn(4, 3, generator=g)
    stores = [make_store(rows, name=name) for rows, name in ((x, "x"), (y, "y"))]
    drawn = [ActivationStore.open(folder) for folder in gaussian_rows(stores, tmp_path)]
    assert {s.manifest.control for s in drawn} == {"gaussian(seed=0)"}
    assert [(s.rows, s.manifest.heldout_rows) for s in drawn] == [(s.rows, s.manifest.heldout_rows) for s in stores]
    of, new = (torch.cat([s.read(0, 6000) for s in each], 1).double() for each in (stores, drawn))
    assert (new.mean(0) - of.mean(0)).abs().max() < 0.05
    spread = of.std(0)[:, None] * of.std(0)
    assert ((torch.cov(new.T) - torch.cov(of.T)) / spread).abs().max() < 0.06  # 4 standard errors, across hooks too
    kurtosis = [stats.kurtosis(v.numpy()) for v in (of, new)]
    assert kurtosis[0].max() > 1
    assert np.abs(kurtosis[1]).max() < 0.3
    again = gaussian_rows(stores, tmp_path / "again")
    assert [ActivationStore.open(folder).digest for folder in again] == [s.digest for s in drawn]
    assert gaussian_rows(stores[:1], tmp_path) == [drawn[0].folder], "a joint draw begins with the first store's own"
    alone = ActivationStore.open(gaussian_rows(stores[:1], tmp_path / "alone")[0])
    assert alone.digest == drawn[0].digest
    with pytest.raises(BadInput):
        gaussian_rows([stores[0], make_store(y[:100], name="short")], tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Order


def labelled(make_store, n, name="store"):
    """A store whose row i holds the number i."""
    return make_store(torch.arange(n, dtype=torch.float32).unsqueeze(1), name=name, shard_rows=97)


@pytest.mark.parametrize(("window", "block"), [(64, 16), (64, 64), (1000, 10), (30, 7), (1, 1)])
def test_each_epoch_shows_each_row_once(make_store, window, block):
    store = labelled(make_store, 300)
    reader = BatchReader(store, range(20, 270), seed=3, window_rows=window, block_rows=block)
    epochs = [reader.take(250).flatten().tolist() for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20, 270))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


@given(
    st.integers(0, 900), st.lists(st.integers(1, 120), min_size=1, max_size=6), st.integers(5, 90), st.integers(1, 30)
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_stream_resumes_at_any_row_and_does_not_depend_on_batching(tmp_path_factory, start, batches, window, block):
    folder = tmp_path_factory.mktemp("order")
    writer = StoreWriter(folder, 1, shard_rows=50)
    writer.append(torch.arange(200, dtype=torch.float32).unsqueeze(1))
    writer.finish("s", "0" * 64, "h", "0", 0, None)
    store = ActivationStore.open(folder)
    reader = lambda position: BatchReader(store, range(180), 1, position, window, block)  # noqa: E731
    whole = reader(0).take(start + sum(batches))
    resumed = reader(start)
    parts = torch.cat([resumed.take(n) for n in batches])
    assert torch.equal(parts, whole[start:])


def test_orders_differ_between_seeds_and_hold_one_window(make_store):
    store = labelled(make_store, 500)
    first = BatchReader(store, range(500), 1, window_rows=100, block_rows=20)
    second = BatchReader(store, range(500), 2, window_rows=100, block_rows=20)
    assert not torch.equal(first.take(100), second.take(100))
    for _ in range(30):
        first.take(37)
        assert len(first.buffer) <= 100


def test_a_non_finite_shard_is_refused_when_read(make_store):
    store = make_store(rows())
    from safetensors.torch import save_file

    x = rows()
    x[7, 0] = float("nan")
    save_file({"activations": x}, store.folder / "shard-00000.safetensors")
    with pytest.raises(BadInput, match=f"{store.folder}, rows 0 to 100: NaN"):
        store.read(0, 100)
