"""Prototypes of a store, features like one, and dictionaries of them as codes: against numpy and planted data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from husai.runs.errors import BadInput
from husai.stability import prototypes
from husai.stability.matching import unit_rows

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
def test_apart_is_that_no_prototype_has_a_cosine_of_seven_tenths(n, m, block, seed):
    g = torch.Generator().manual_seed(seed)
    W, p = torch.randn(n, 3, generator=g), unit_rows(torch.randn(m, 3, generator=g))
    W[0] = -p[0]  # a feature opposite to a prototype is not like it
    cosines = (W.numpy() / np.linalg.norm(W.numpy(), axis=1, keepdims=True)) @ p.numpy().T
    before = prototypes.BLOCK
    prototypes.BLOCK = block
    try:
        found = prototypes.apart(W, p)
    finally:
        prototypes.BLOCK = before
    assert found.tolist() == (cosines.max(1) < 0.7).tolist()
    assert not prototypes.apart(p, p).any()
