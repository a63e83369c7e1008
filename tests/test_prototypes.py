"""Prototypes of a store, features like one, and dictionaries of them as codes: against numpy and planted data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from husai.evidence import rules
from husai.evidence.coding import concluded
from husai.evidence.estimates import fitted_change
from husai.evidence.schemas import Code, Heldout
from husai.runs.errors import BadInput
from husai.stability import prototypes
from husai.stability.compare import Dictionary
from husai.stability.matching import unit_rows
from husai.stability.prototypes import TopKLeastSquares
from husai.training.grid import members
from husai.training.trainer import TrainingConfig, evaluate, train

WIDTH = 6


@pytest.fixture
def labelled(make_store):
    """(store of 300 rows of 12 tokens in 40 documents, the last 60 held out; its rows, tokens, documents)."""
    g = torch.Generator().manual_seed(1)
    documents = torch.arange(300) % 40
    documents[240:] += 40
    tokens = torch.randint(0, 12, (300,), generator=g) ** 2
    centres = 3 * torch.randn(200, 5, generator=g)
    x = centres[tokens] + torch.randn(300, 5, generator=g) + 1
    store = make_store(x, shard_rows=64, labels={"document": documents, "token": tokens}, heldout_rows=60)
    return store, x, tokens, documents


def oracle_means(x, tokens, chosen) -> dict[int, np.ndarray]:
    """Token -> the mean of its rows, of tokens that stand five times among the chosen rows."""
    x, tokens = x[chosen].numpy().astype(float), tokens[chosen].numpy()
    return {int(t): x[tokens == t].mean(0) for t in set(tokens) if (tokens == t).sum() >= 5}


def test_streamed_means_are_those_of_a_third_of_the_documents(labelled, monkeypatch):
    store, x, tokens, documents = labelled
    for third in (True, False):
        chosen = (torch.arange(300) < 240) & ((documents % 3 == 0) == third)
        expected = oracle_means(x, tokens, chosen)
        whole = prototypes.token_means(store, third)
        monkeypatch.setattr(prototypes, "BLOCK", 7)
        found, means = prototypes.token_means(store, third)
        assert set(found.tolist()) == set(expected)
        counts = [int((tokens[chosen] == t).sum()) for t in found]
        assert counts == sorted(counts, reverse=True)
        for token, mean in zip(found.tolist(), means.numpy(), strict=True):
            assert np.allclose(mean, expected[token], atol=1e-5)
        assert torch.equal(whole[0], found)
        assert torch.equal(whole[1], means)  # float64 sums: the size of a block changes nothing
        monkeypatch.undo()


def test_prototypes_hold_means_and_centroids_with_the_mean_and_without_it(labelled, tmp_path, monkeypatch):
    store, x, tokens, documents = labelled
    chosen = (torch.arange(300) < 240) & (documents % 3 == 0)
    rows = [*oracle_means(x, tokens, chosen).values(), *prototypes.clusters(x[chosen], WIDTH, 0).numpy()]
    mean = x.numpy().mean(0)
    expected = [r / np.linalg.norm(r) for row in rows for r in (row, row - mean)]
    found = prototypes.of_store(store, tmp_path, WIDTH)
    assert len(found) == len(expected)
    assert all(np.linalg.norm(found.numpy() - e, axis=1).min() < 1e-5 for e in expected)

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(prototypes, "prototypes", never)
    assert torch.equal(prototypes.of_store(store, tmp_path, WIDTH), found)  # read from the cell
    with pytest.raises(AssertionError):
        prototypes.of_store(store, tmp_path, WIDTH + 1)


def test_rows_without_documents_give_centroids_of_every_third(make_store):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(100, 4, generator=g)
    store = make_store(x)
    expected = prototypes.clusters(x[:80][::3], 3, 0)
    found = prototypes.prototypes(store, 3)
    mean = x.double().mean(0).float()
    assert torch.allclose(found, unit_rows(torch.cat([expected, expected - mean])), atol=1e-6)


def test_a_sample_for_centroids_is_bounded(make_store, monkeypatch):
    store = make_store(torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), shard_rows=50)
    monkeypatch.setattr(prototypes, "SAMPLE", 10)
    monkeypatch.setattr(prototypes, "BLOCK", 8)
    read = []
    monkeypatch.setattr(type(store), "read", lambda s, a, b: (read.append(b), s._slice("activations", a, b))[1])
    assert len(prototypes.sample(store, True, 2)[0]) == 10
    assert max(read) <= 40
    assert len(prototypes.sample(store, True, 5)[0]) == 20


def test_one_document_gives_no_prototypes(make_store):
    labels = {"document": torch.full((50,), 4), "token": torch.arange(50)}
    store = make_store(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), labels=labels, heldout_rows=10)
    with pytest.raises(BadInput, match="no rows to make prototypes of"):
        prototypes.prototypes(store, 2)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_nearest_prototype_is_that_of_the_largest_signed_cosine(n, m, block, seed):
    g = torch.Generator().manual_seed(seed)
    W, p = torch.randn(n, 3, generator=g), unit_rows(torch.randn(m, 3, generator=g))
    W[0] = -p[0]  # a feature opposite to a prototype is not like it
    cosines = (W.numpy() / np.linalg.norm(W.numpy(), axis=1, keepdims=True)) @ p.numpy().T
    before = prototypes.BLOCK
    prototypes.BLOCK = block
    try:
        found = prototypes.nearest(W, p)
    finally:
        prototypes.BLOCK = before
    assert np.allclose(found.numpy(), cosines.max(1), atol=1e-6)
    assert not Dictionary(p, torch.ones(len(p)), nearest=prototypes.nearest(p, p)).others.any()


# ---------------------------------------------------------------------------------------------------------------------
# Codes


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_row_is_coded_by_its_top_k_with_the_coefficients_of_numpy(n, k, products, seed):
    g = torch.Generator().manual_seed(seed)
    W, mean, x = (torch.randn(*shape, generator=g) for shape in ((n, 8), (8,), (5, 8)))
    code = TopKLeastSquares.of(W, mean, k)
    before = prototypes.PRODUCTS
    prototypes.PRODUCTS = products * 8
    try:
        features = code.encode(x)
    finally:
        prototypes.PRODUCTS = before
    U, centred = W.double().numpy(), (x - mean).double().numpy()
    U /= np.linalg.norm(U, axis=1, keepdims=True)
    for row, found in zip(centred, features.double().numpy(), strict=True):
        chosen = np.argsort(-(U @ row))[: min(k, n)]
        assert not np.delete(found, chosen).any()
        A = np.concatenate([U[chosen].T, 1e-2 * np.eye(len(chosen))])  # ridge: a row of sqrt(1e-4) for each
        expected, *_ = np.linalg.lstsq(A, np.concatenate([row, np.zeros(len(chosen))]), rcond=None)
        assert np.allclose(U[chosen].T @ found[chosen], U[chosen].T @ expected, atol=2e-3)
    assert torch.allclose(code.decode(features), features @ unit_rows(W) + mean)


def test_rows_of_distinct_tokens_come_first():
    tokens = torch.tensor([7, 7, 3, 9, 3, 7])
    order = torch.tensor([1, 4, 0, 2, 3, 5])
    assert prototypes.distinct(order, tokens).tolist() == [1, 4, 3, 0, 2, 5]
    assert prototypes.distinct(order, None) is order


def test_dictionaries_are_of_the_other_documents_and_seeded_by_content(labelled, monkeypatch):
    store, x, tokens, documents = labelled
    made = prototypes.dictionaries(store, WIDTH)
    others = x[(torch.arange(300) < 240) & (documents % 3 != 0)].numpy() - x.numpy().mean(0)
    assert {kind: len(of) for kind, of in made.items()} == dict.fromkeys(("rows", "centroids", "token means"), 3)
    for W in made["rows"]:
        at = [int(np.linalg.norm(others - w, axis=1).argmin()) for w in W.numpy()]
        assert np.allclose(others[at], W.numpy(), atol=1e-5)
        own = tokens[(torch.arange(300) < 240) & (documents % 3 != 0)][at]
        assert len(own.unique()) == WIDTH, "each of another token"
    assert not torch.equal(*made["rows"][:2])
    monkeypatch.setattr(prototypes, "BLOCK", 11)
    again = prototypes.dictionaries(store, WIDTH)
    assert all(torch.equal(a, b) for kind in made for a, b in zip(made[kind], again[kind], strict=True))


def test_explained_variance_is_that_of_numpy(labelled):
    store, x, _, _ = labelled
    mean, (_, heldout) = store.stats()[0].float(), store.split(0.2)
    made = prototypes.dictionaries(store, WIDTH)
    y = x[240:].numpy().astype(float)
    for kind, found in prototypes.explained_variance(made, mean, 2, store, heldout).items():
        expected = []
        for W in made[kind]:
            code = TopKLeastSquares.of(W, mean, 2)
            left = y - code.decode(code.encode(x[240:])).numpy()
            expected.append(1 - (left**2).sum() / ((y - y.mean(0)) ** 2).sum())
        assert found == pytest.approx(np.mean(expected), abs=1e-6)


def coded(own: list[float], **kinds: list[float]) -> Code:
    """SAEs of modular addition beside prototypes, a figure a seed."""

    def one(values: list[float]) -> dict:
        return {"explained_variance": {str(i): float(v) for i, v in enumerate(values)}, "ce_recovered": None}

    about = {"store_digest": "0" * 64, "heldout_digest": "1" * 64, "d_sae": 32, "tokens": None, "gain": {}}
    about |= {"k": {str(i): 3 for i in range(len(own))}, "saes": one(own)}
    return Code.model_validate(about | {"prototypes": {kind: one(values) for kind, values in kinds.items()}})


def test_trained_saes_code_better_than_prototypes_and_prototypes_not_than_themselves(make_store, planted, tmp_path):
    x, _ = planted
    store = make_store(x)
    _, heldout = store.split(0.2)
    config = TrainingConfig(tokens=60_000, batch_size=100, snapshots=2)
    trained, _ = train(store, members([1, 2, 3, 4, 5], [32], [3], [1e-2]), config, torch.device("cpu"), tmp_path / "s")
    mean, made = store.stats()[0].float(), prototypes.dictionaries(store, 32)
    bars = prototypes.explained_variance(made, mean, 3, store, heldout)
    assert bars.keys() == {"rows", "centroids"}
    bars = {kind: [value] * 5 for kind, value in bars.items()}
    saes = [evaluate(t.sae, store, heldout)[0].explained_variance for t in trained]
    assert rules.code(coded(saes, **bars)).failing() == []
    g = torch.Generator().manual_seed(0)
    drawn = [x[torch.randperm(4800, generator=g)[:32]] - mean for _ in range(5)]
    rows = [evaluate(TopKLeastSquares.of(W, mean, 3), store, heldout)[0].explained_variance for W in drawn]
    assert rules.code(coded(rows, **bars)).failing() == ["explained variance"]


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def test_the_best_kind_is_the_bar_for_each_figure():
    found = coded([0.5, 0.6, 0.7, 0.6, 0.6], rows=[0.1] * 5, centroids=[0.3, 0.5, 0.5, 0.4, 0.5])
    assert found.best("explained_variance") == "centroids"
    (estimate,) = rules.code(found).estimates.values()
    assert estimate.estimate == pytest.approx(np.mean([0.2, 0.1, 0.2, 0.2, 0.1]))
    gain = concluded(found).gain
    assert gain["rows"].explained_variance.estimate == pytest.approx(0.5)
    assert gain["rows"].ce_recovered is None


@pytest.mark.parametrize(
    ("own", "kinds", "why"),
    [
        ([0.5] * 4, ("rows", "centroids"), "4 seeds"),
        ([0.5] * 5, ("rows",), "prototypes of each kind expected: centroids, rows"),
    ],
)
def test_code_is_missing(own, kinds, why):
    with pytest.raises(rules.Missing, match=why):
        rules.code(coded(own, **{kind: [0.1] * len(own) for kind in kinds}))


@pytest.mark.parametrize(
    "change",
    [
        {"prototypes": {"rows": {"explained_variance": {"0": 0.1}, "ce_recovered": None}}},
        {"prototypes": {"eigenvectors": {"explained_variance": {"0": 0.1, "1": 0.1}, "ce_recovered": None}}},
        {"tokens": 10},
        {"k": {"0": 3}},
        {"prototypes": {}},
        {"saes": {"explained_variance": {"0": 0.1, "1": 0.1}, "ce_recovered": {"0": 0.1, "1": 0.1}}},
    ],
)
def test_figures_of_other_seeds_kinds_or_texts_are_refused(change):
    good = coded([0.5, 0.5], rows=[0.1, 0.1]).to_json()
    Code.model_validate(good)
    with pytest.raises(ValidationError):
        Code.model_validate(good | change)


def heldout(**changes: float) -> Heldout:
    return Heldout(**{"explained_variance": 0.6, "mse": 1.0, "l0": 3.0, "dead_share": 0.05} | changes)


@pytest.mark.parametrize(
    ("changes", "ce", "failing"),
    [
        ({}, 0.9, []),
        ({}, None, []),
        ({"explained_variance": 0.49}, 0.9, ["explained variance"]),
        ({"dead_share": 0.3}, 0.9, ["dead features"]),
        ({"dead_share": 0.3}, 0.4, ["dead features", "CE recovered"]),
    ],
)
def test_fit_asks_for_each_registered_bound(changes, ce, failing):
    shown = rules.fit([heldout(**changes)] * 5, ce and [ce] * 5)
    assert shown.failing() == failing


def test_fit_compares_the_end_of_the_interval():
    assert rules.fit([heldout(explained_variance=v) for v in (0.5, 0.5, 0.5, 0.5, 0.7)], None).failing() == [
        "explained variance"
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6, unique=True), st.integers(0, 2**32 - 1))
def test_a_change_is_that_of_the_line_of_least_squares(at, seed):
    at = sorted(at)
    values = np.random.default_rng(seed).normal(size=(len(at), 3, 3))
    scaled = (np.array(at) - at[0]) / (at[-1] - at[0])
    expected = np.polyfit(scaled, values.reshape(len(at), 9), 1)[0].reshape(3, 3)
    assert fitted_change(at, values) == pytest.approx(expected, abs=1e-9)
