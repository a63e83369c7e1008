"""Statements about single features, from an SAE and its siblings: on a miniature model, and on arrays."""

import csv
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import husai
from husai.activations import language_model as lm
from husai.activations import source
from husai.dictionaries import checkpoints, recipes
from husai.dictionaries.sae import SAE
from husai.evals import features, forecast, random_model, siblings
from husai.evals.contexts import CONTEXTS, strongest_contexts
from husai.evals.loaded import LoadedSAEs, heldout_store, open_all
from husai.evidence import rules
from husai.evidence.estimates import clopper_pearson_low
from husai.evidence.features import COLUMNS, FeatureReliability
from husai.evidence.names import NEAR
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.stability.recurrence import NONE
from husai.subjects import pretrained
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig
from miniature import few_documents, save_structured

SCRIPT = "scripts/experiments/run_feature_reliability.py"
HOOK, ROWS, CPU = "blocks.1.hook_resid_pre", 3000, torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_documents() as corpus:
        yield corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="module")
def subject(few, root):
    return save_structured(root / "subject", few.train)


@pytest.fixture(scope="module")
def saes(root, subject):
    """Folders of five TopK SAEs that HUSAI trained on it."""
    store = source.open_store(root, CPU, 1, subject=subject, hook_name=HOOK, rows=ROWS)
    recipe = TrainingConfig(tokens=6000, batch_size=128)
    grid = members([1, 2, 3, 4, 5], [48], [1], [3e-3])
    records = train_or_find(Cells(root / "saes" / "cells"), store, grid, recipe, CPU, 1).members
    return [root / "saes" / r.checkpoint for r in records]


@pytest.fixture(scope="module")
def asked(root, subject, saes):
    model = pretrained.load(str(subject))
    store = heldout_store(model, HOOK, root, 1500, 1)
    return LoadedSAEs(str(subject), model, store, open_all(saes, store, "checkpoint", model, root))


@pytest.fixture
def reliability(run_script, root, subject, tmp_path):
    """`reliability(*checkpoints, **flags)` -> (exit code, its standard error, output folder)."""

    def run(*named, **flags):
        out = tmp_path / "out"
        arguments = ["--checkpoint", *named, "--model-name", subject, "--hook-name", HOOK, "--rows", 1500]
        arguments += ["--artifact-root", root, "--output-dir", out, "--threads", 1]
        for flag, value in flags.items():
            arguments += [f"--{flag.replace('_', '-')}", *([] if value is True else [value])]
        code, _, error = run_script(SCRIPT, *arguments)
        return code, error, out

    return run


# ---------------------------------------------------------------------------------------------------------------------
# From the shell


@pytest.mark.slow
def test_one_sae(reliability, saes):
    """Siblings are trained, and each column follows from the others by the rules."""
    code, error, out = reliability(saes[0], siblings=6, contexts=5)
    assert code == 0, error
    results = FeatureReliability.model_validate(json.loads((out / "results.json").read_text()))
    table = pd.read_parquet(out / "features.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 48
    with open(out / "features.csv") as f:
        assert [int(row["recurs"]) for row in csv.DictReader(f)] == table["recurs"].tolist()

    assert [s.origin for s in results.siblings] == ["trained"] * 6
    assert results.gaussian == 6
    assert results.training.tokens == 6000
    assert results.training.recipe == "the SAE's own"
    assert table["low"].to_numpy() == pytest.approx(clopper_pearson_low(table["recurs"].to_numpy(), 6, 0.95))
    assert (table["certified"] == (table["low"] >= rules.CERTIFIED_AT)).all()
    assert (table["above_chance"] == (table["q_value"] <= rules.FALSE_SHARE)).all()
    worst = np.maximum(table["p_rotation"], table["p_permutation"])
    assert (table["q_value"] >= worst - 1e-12)[~table["dead"]].all()
    assert sum(results.statements.values()) == 48
    assert results.recur.estimate == pytest.approx((table["recurs"] / 6)[~table["dead"]].mean())
    assert results.recur.estimate > 0.1  # the subject has directions to find
    others = table[~table["dead"] & (table["prototype_cosine"] < NEAR)]
    above = results.above_chance
    assert (above.marked, above.features) == (int(others["above_chance"].sum()), len(others))
    assert above.features + above.prototypes == results.alive
    assert above.marked + above.prototypes_marked == int(table["above_chance"][~table["dead"]].sum())
    contexts = json.loads((out / "contexts.json").read_text())
    assert len(contexts) == 5
    assert all(c["contexts"] for c in contexts.values())


def test_several_saes(reliability, saes):
    """The first that is named is judged, the others are its siblings, and nothing is trained of them."""
    code, error, out = reliability(saes[2], saes[0], saes[1], saes[3], contexts=3)
    assert code == 0, error
    results = json.loads((out / "results.json").read_text())
    assert results["sae"]["label"] == saes[2].name
    assert [s["origin"] for s in results["siblings"]] == ["supplied"] * 3
    assert results["training"] is None
    assert results["limits"] == []


@pytest.mark.slow
def test_siblings_on_a_stream(reliability, saes):
    """Each token is seen once, and siblings still find what the SAE found."""
    code, error, out = reliability(saes[0], siblings=3, tokens=4096, buffer_rows=1024, contexts=2)
    assert code == 0, error
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["rows"] == results["training"]["tokens"] == 4096
    assert results["recur"]["estimate"] > 0.02  # three siblings of a few hundred steps find little


def test_in_python(asked, root, saes):
    """A notebook gets the same answer in one call, and an error in place of an exit."""
    where = {"model_name": asked.name, "hook_name": HOOK, "artifact_root": root, "rows": 1500, "threads": 1}
    found = husai.feature_reliability([saes[0], saes[1], saes[2]], contexts=2, **where)
    assert found.results.siblings[0].origin == "supplied"
    assert found.table["recurs"].max() <= 2
    assert len(found.contexts) == 2
    with pytest.raises(BadInput, match="--siblings"):
        husai.feature_reliability(saes[0], siblings=-1, **where)


def test_dry_run(reliability, saes):
    """A forecast, and nothing that is left."""
    code, error, out = reliability(saes[0], dry_run=True)
    assert code == 0, error
    assert not out.exists()


def test_the_forecast_counts_all_that_is_trained(asked, root):
    """Siblings, and an SAE of Gaussian rows for each sibling; of supplied siblings, one for each SAE."""
    for to_train, trained in ((0, 5), (2, 2 + 6)):
        found = forecast.estimate_siblings(
            asked, siblings.make_plan(asked, to_train, None, None), root, CPU, 4 + to_train
        )
        assert (found.saes, found.siblings) == (trained, to_train)
        assert found.training_seconds > 0


def test_relatives(reliability, saes):
    """Decoders alone: nothing is trained, certified, or called missing or above chance."""
    code, error, out = reliability(saes[0], relatives=saes[1], contexts=3)
    assert code == 0, error
    results = json.loads((out / "results.json").read_text())
    table = pd.read_parquet(out / "features.parquet")
    assert [s["origin"] for s in results["siblings"]] == ["relative"]
    assert results["certified"] is None
    assert results["above_chance"] is None
    assert table["certified"].isna().all()
    assert table["q_value"].isna().all()
    assert not results["statements"]["not found"]
    assert not results["statements"]["certified"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"siblings": 0}, "--siblings"),
        ({"features": "48"}, "--features"),
        ({"relatives": "nowhere"}, "nowhere"),
        ({"relatives": True}, "--relatives"),
        ({"tokens": 10, "relatives": True}, "--tokens"),
        ({"buffer_rows": 3}, "--buffer-rows"),
        ({"certify_at": 1.5}, "--certify-at"),
    ],
)
def test_bad_input(reliability, saes, flags, named):
    code, error, _ = reliability(saes[0], **flags)
    assert code == 2
    assert named in error.splitlines()[-1]


def test_a_copy_is_no_second_sae(reliability, saes, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saes[0], copy)
    code, error, out = reliability(saes[0], copy)
    assert code == 2
    assert f"{saes[0]} and {copy} are the same decoder" in error.splitlines()[-1]
    assert not (out / "results.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def test_own_recipe(asked):
    """Siblings of an SAE that HUSAI trained differ in their seeds alone, and share none with it."""
    made = siblings.make_plan(asked, 4, None, None)
    own = asked.saes[0].sae.metadata["husai"]
    assert made.config == asked.recipe
    assert made.recipe_known
    assert made.fewer_tokens is None
    assert {(m.family, m.d_sae, m.k, m.learning_rate) for m in made.grid} == {("topk", 48, 1, own["learning_rate"])}
    assert len({m.seed for m in made.grid} | {c.facts.seed for c in asked.saes}) == 9
    assert siblings.make_plan(asked, 4, 100, None).fewer_tokens is not None


@pytest.mark.parametrize(("architecture", "k", "family"), [("topk", 1, "topk"), ("standard", None, "relu")])
def test_unknown_recipe(asked, architecture, k, family):
    """Of an SAE from elsewhere, width, architecture and measured L0 are kept; nothing may be said to be missing."""
    c = asked.saes[0]
    sae = SAE(c.sae.weights, architecture, k, c.sae.subtract_b_dec, {"hook_name": HOOK})
    facts = c.record.facts.model_copy(update={"source": "SAELens"})
    other = replace(asked, saes=[replace(c, sae=sae, record=c.record.model_copy(update={"facts": facts}))])
    made = siblings.make_plan(other, 3, None, 500)
    assert siblings.departures(other, made) == []
    assert {m.family for m in random_model.trained_alike(other)[0]} == {family}, "controls too"
    assert not made.recipe_known
    assert made.rows == 500
    assert made.fewer_tokens is not None
    assert {(m.family, m.d_sae, m.k) for m in made.grid} == {(family, 48, 1)}


@pytest.mark.parametrize(
    ("source_name", "settings", "tokens"),
    [
        (None, {"training_tokens": 300}, 300),
        (None, {"cfg.total_training_tokens": 7}, 7),
        ("dictionary_learning", {"trainer.steps": 10, "buffer.out_batch_size": 32}, 320),
        ("sparsify", {"batch_size": 32}, None),
    ],
)
def test_tokens_of(source_name, settings, tokens):
    sae = SAE({}, metadata={} if source_name is None else {"husai": {"source": source_name}})
    assert recipes.tokens_of(sae, settings) == tokens


def test_l0_is_matched(asked, root, monkeypatch):
    """A penalised architecture that misses the L0 is aimed anew once, and refused if it still misses."""
    tried = []

    def trained(asked, made, *rest):
        tried.append(made.grid[0].k)
        reached = 20.0 if len(tried) == 1 else asked.saes[0].record.heldout.l0
        heldout = asked.saes[0].record.heldout.model_copy(update={"l0": reached})
        c = asked.saes[0]
        return [replace(c, record=c.record.model_copy(update={"heldout": heldout}))]

    monkeypatch.setattr(siblings, "_trained", trained)
    plan = siblings.make_plan(asked, 1, None, None)
    plan = replace(plan, grid=[replace(plan.grid[0], k=10)])
    _, made = siblings.train(asked, plan, None, Cells(root / "cells"), root, CPU, 1)
    assert tried[0] == 10
    assert made.grid[0].k == max(1, round(10 * asked.saes[0].record.heldout.l0 / 20))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_coactivation_is_numpys(asked):
    """Correlations are Pearson's, and rows are read in blocks without a difference."""
    first, second, third = (c.sae for c in asked.saes[:3])
    g = np.random.default_rng(0)
    partner = np.stack([g.permutation(48), g.permutation(48)])
    partner[0, :3] = NONE
    found = features.coactivation(first, [second, third], partner, asked.store, CPU)
    x = asked.store.read(0, asked.store.rows)
    f, others = first.encode(x).numpy(), [second.encode(x).numpy(), third.encode(x).numpy()]
    for i, j in itertools.product(range(2), range(48)):
        own, theirs = f[:, j], others[i][:, partner[i, j]]
        varies = partner[i, j] != NONE and own.std() > 0 and theirs.std() > 0
        expected = np.corrcoef(own, theirs)[0, 1] if varies else 0
        assert found.correlations[i, j] == pytest.approx(expected, abs=1e-5)
    alive = (f > 0).any(0)
    means = f.sum(0)[alive] / (f > 0).sum(0)[alive]
    assert found.mean_activation[alive] == pytest.approx(means, rel=1e-5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_by_number_of_siblings(hits):
    """The mean over all choices of j of n siblings, enumerated."""
    n, k = 6, np.array(hits)
    recurrent = np.arange(n)[:, None] < k  # [siblings, features]
    every, some = features.by_number_of_siblings(k, n)
    for j in range(1, n + 1):
        chosen = [recurrent[list(c)] for c in itertools.combinations(range(n), j)]
        assert every[j - 1] == pytest.approx(np.mean([c.all(0).mean() for c in chosen]))
        assert some[j - 1] == pytest.approx(np.mean([c.any(0).mean() for c in chosen]))


def test_deciles_hold_each_alive_feature_once():
    rate = np.r_[np.zeros(5), np.linspace(0.001, 0.5, 95)]
    recurrent = np.random.default_rng(0).random((4, 100)) < 0.3
    found = features.deciles(rate, recurrent)
    assert sum(d.features for d in found) == 95
    assert all(a.high <= b.low for a, b in itertools.pairwise(found))
    total = sum(d.features * d.recur.estimate for d in found)
    assert total / 95 == pytest.approx(recurrent[:, 5:].mean())


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 8))))
def test_shares_over_siblings_lie_between_0_and_1(recurrent):
    share = features.share_over_siblings(recurrent, np.ones(recurrent.shape[1], bool))
    assert share.estimate == pytest.approx(recurrent.mean())
    if len(recurrent) < 3 or len(set(recurrent.sum(1))) == 1:
        assert share.low is None
        assert share.reason is not None
    else:
        assert 0 <= share.low <= share.estimate <= share.high <= 1
        assert share.low < share.high


def test_contexts_are_of_held_out_text(asked, few):
    """The strongest documents, each once; silent neighbours are one piece; partners beside them."""
    own, sibling = asked.saes[:2]
    inputs = lm.Inputs.of(asked.subject, few.heldout, asked.store.rows, 0)
    alive = np.flatnonzero(own.firing_rate > 0)[:4].tolist()
    found = strongest_contexts(asked.subject, HOOK, [(own.sae, alive), (sibling.sae, [0, 1])], inputs)
    alone = strongest_contexts(asked.subject, HOOK, [(sibling.sae, [0, 1])], inputs)
    assert found[4:] == alone
    tokens = inputs.tokens(range(len(inputs.rows)))
    x = [lm.run(asked.subject, [t], [HOOK])[HOOK][0, 1:] for t in tokens]
    for feature, of_feature in zip(alive, found, strict=False):
        peaks = [max(c["values"]) for c in of_feature]
        assert 1 <= len(peaks) <= CONTEXTS
        assert peaks == sorted(peaks, reverse=True)
        strongest = max(own.sae.encode(rows)[:, feature].max().item() for rows in x)
        assert peaks[0] == pytest.approx(strongest, rel=0.01)
        for c in of_feature:
            assert any("".join(c["text"]) in document for document in few.heldout)
            assert not any(a == b == 0 for a, b in itertools.pairwise(c["values"]))


@given(st.lists(st.sampled_from(list(rules.STATEMENTS)), min_size=1, max_size=60), st.integers(1, 20))
def test_shown_takes_of_each_statement(said, n):
    table = pd.DataFrame({"feature": range(len(said)), "statement": said, "dead": [s == "dead" for s in said]})
    chosen = features.shown(table, n)
    alive = [s for s in said if s != "dead"]
    assert len(chosen) == len(set(chosen)) == min(n, len(alive))
    assert not {said[f] for f in chosen} & {"dead"}
    if n >= len(set(alive)):
        assert {said[f] for f in chosen} == set(alive)


def test_saes_that_differ_in_more_than_their_seed(asked, saes, root):
    """Another width is no sibling."""
    sae = checkpoints.load(saes[0])
    narrow = {
        n: w[:, :40] if n == "W_enc" else w[:40] if n in ("W_dec", "b_enc") else w for n, w in sae.weights.items()
    }
    c = replace(asked.saes[0], sae=replace(sae, weights=narrow))
    with pytest.raises(BadInput, match="d_sae"):
        siblings.check(replace(asked, saes=[asked.saes[1], c]))
