"""External benchmarks: SAEBench's probing, CE-Bench's score, matched baselines, inference over seeds and data sets."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import processes
from husai.activations import language_model as lm
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import baselines, contrastive, loaded, sae_probes
from husai.evidence import data_sets, deltas, references
from husai.evidence.estimates import mean_over_seeds_and_sets, minimum_detectable_difference
from husai.evidence.schemas import Facts, Reference
from husai.runs.cells import Cells
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import REPOSITORY
from husai.subjects import pretrained, text
from husai.training.grid import members, train_or_find
from husai.training.recovered import cross_entropies
from husai.training.trainer import TrainingConfig
from miniature import few_texts, save_miniature

SAEBENCH = "scripts/experiments/run_husai_saebench_custom_eval.py"
CEBENCH = "scripts/experiments/run_husai_cebench_custom_eval.py"
OFFICIAL = "scripts/experiments/run_official_external_benchmarks.py"
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "published_cycle3"
HOOK = "blocks.1.hook_resid_pre"
SETS = ["95_toxic_is", "92_glue_sst2"]


@pytest.fixture(scope="module")
def few():
    return few_texts()


@pytest.fixture(autouse=True)
def _few_documents(monkeypatch, few):
    monkeypatch.setattr(text, "corpus", lambda: few)


@pytest.fixture(scope="module")
def folder(few, tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("subjects") / "miniature", few.train)


@pytest.fixture(scope="module")
def subject(folder):
    return pretrained.load(str(folder))


@pytest.fixture(scope="module")
def trained(folder, few, tmp_path_factory):
    """Folders of checkpoints: {"own": TopK and ReLU, three seeds; "random": TopK on the random-weights model}."""
    root, found = tmp_path_factory.mktemp("saes"), {}
    for name, random_seed, families in (("own", None, ("topk", "relu")), ("random", 0, ("topk",))):
        model = pretrained.load(str(folder), random_seed)
        store = lm.harvest_tokens(model, [HOOK], few.train, root / "activations", 4000)[HOOK]
        cells = Cells(root / name / "cells")
        grid = members([1, 2, 3], [24], [3], [3e-3], families)
        recipe = TrainingConfig(tokens=4000, batch_size=128)
        saes = train_or_find(cells, ActivationStore.open(store), grid, recipe, torch.device("cpu"), 1).members
        found[name] = (root / name / saes[0].checkpoint).parent
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Inference over seeds and data sets


def test_interval_over_seeds_and_data_sets_against_its_formula():
    rng = np.random.default_rng(0)
    x, families = rng.normal(size=(4, 6)), ["a", "a", "b", "c", "c", "c"]
    e = mean_over_seeds_and_sets(x, families)
    residual = x.mean(0) - x.mean()
    sums = [residual[:2].sum(), residual[2], residual[3:].sum()]
    variance = x.mean(1).var(ddof=1) / 4 + 3 / 2 * np.square(sums).sum() / 36
    assert e.estimate == pytest.approx(x.mean())
    assert e.standard_error == pytest.approx(np.sqrt(variance))
    assert e.high - e.estimate == pytest.approx(4.302653 * np.sqrt(variance), rel=1e-5)  # t(2)
    one = mean_over_seeds_and_sets(x[:1], families)
    assert (one.n_seeds, one.low is not None, one.method != e.method) == (1, True, True)
    alone = mean_over_seeds_and_sets(x, ["a"] * 6)
    assert alone.low is None
    assert "2 families" in alone.reason
    for bad in (np.full((2, 6), np.nan), np.zeros((0, 6)), np.zeros((3, 5))):
        with pytest.raises(ValueError, match="finite"):
            mean_over_seeds_and_sets(bad, families)


@pytest.mark.parametrize(("seed_sd", "family_sd", "noise_sd"), [(1, 0.1, 0.5), (0.1, 1, 0.5), (0.5, 0.5, 1), (0, 0, 1)])
def test_interval_over_seeds_and_data_sets_covers(seed_sd, family_sd, noise_sd):
    """Five seeds, ten families of one to four data sets; seeds, families and both together vary."""
    rng, covered, n = np.random.default_rng(1), 0, 1500
    of = np.repeat(np.arange(10), [1, 1, 2, 2, 2, 3, 3, 3, 4, 4])
    names = [str(f) for f in of]
    for _ in range(n):
        x = (
            seed_sd * rng.normal(size=(5, 1))
            + family_sd * rng.normal(size=10)[of]
            + noise_sd * rng.normal(size=(5, 25))
        )
        e = mean_over_seeds_and_sets(x, names)
        covered += e.low <= 0 <= e.high
    assert covered / n >= 0.935


def test_a_dominating_group_passes_falsely_and_no_longer_once_it_holds_a_quarter(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from inference_calibration import GATED, grouped

    rng = np.random.default_rng(0)
    found = [grouped(rng, 5, (12, 1, 1, 1, 1)) for _ in range(800)]
    assert np.mean([f["all sets"] for f in found]) > 0.1
    assert np.mean([f[GATED] for f in found]) < 0.05


def test_two_runs_rarely_differ_by_the_minimum_detectable_difference():
    rng, n = np.random.default_rng(0), 4000
    beyond = 0
    for _ in range(n):
        x = rng.normal(size=7)
        beyond += abs(x[5] - x[6]) > minimum_detectable_difference(x[:5])
    assert 0.03 <= beyond / n <= 0.07


# ---------------------------------------------------------------------------------------------------------------------
# Matched baselines


OWN = Facts(
    source="husai",
    subject_digest="a" * 64,
    hook_name=HOOK,
    family="topk",
    d_in=16,
    d_sae=64,
    k=8,
    l0=8.0,
    learning_rate=1e-3,
    tokens=1000,
    store_digest="d" * 64,
    training="t",
    seed=1,
    control=None,
)


def facts(**changed) -> Facts:
    return OWN.model_copy(update=changed)


def record(condition: str, identity: str = "", **changed) -> Reference:
    """A record with these facts; its identity is no digest where one is given."""
    found = Reference(condition=condition, facts=facts(**changed), identity="0" * 64, normalised_of_pairs=[])
    return found.model_copy(update={"identity": identity or condition})


def test_a_reference_matches_only_where_every_fact_does():
    assert references.unmatched(facts(), facts(family="relu", seed=9, l0=8.7)) is None
    for name in references.ALIKE:
        other = 65 if isinstance(getattr(OWN, name), int) else "other"
        assert {name, str(other)} <= set(references.unmatched(facts(), facts(**{name: other})).split())
        assert {name, "reference"} <= set(references.unmatched(facts(), facts(**{name: None})).split())
    assert {"L0", "8.0", "8.9"} <= set(references.unmatched(facts(), facts(l0=8.9)).split())
    assert {"L0", "8.0", "8.9"} <= set(references.unmatched(facts(l0=8.9), facts()).split())
    assert {"L0", "8.0", "0.0"} <= set(references.unmatched(facts(), facts(l0=0.0)).split())


def test_the_matched_reference_is_relu_or_for_relu_topk_and_the_nearest():
    near, far = record("near", family="relu", l0=8.1), record("far", family="relu", l0=8.6)
    assert references.matched([record("c")], [far, near, record("t")]).records == [near]
    assert references.matched([near], [record("t"), far]).records == [record("t")]
    none = references.matched([record("c")], [record("t")])
    assert (none.records, "relu" in none.reason) == ([], True)
    wide = references.matched([record("c")], [record("w", family="relu", d_sae=128)])
    assert all(word in wide.reason for word in ("d_sae", "64", "128"))
    delta = deltas.against_reference([record("c")], [record("w", family="relu", d_sae=128)], {}, [])
    assert delta == {"estimate": None, "low": None, "high": None, "reason": wide.reason}


def test_a_single_reference_gives_no_interval_over_seeds():
    """Five seeds against one SAE: what one reference is worth is not known, and its like is not made up."""

    group = [record("topk", f"c{s}", seed=s) for s in range(5)]
    first, second = (record("relu", name, family="relu", seed=s) for s, name in enumerate(("r", "r2")))
    values = {r.identity: np.arange(4.0) + i for i, r in enumerate(group)} | {"r": np.zeros(4), "r2": np.ones(4)}
    families = ["a", "a", "b", "c"]
    one = deltas.against_reference(group, [first], values, families)
    assert (one["n_seeds"], one["estimate"]) == (1, 1.5)
    two = deltas.against_reference(group, [first, second], values, families)
    assert two["n_seeds"] == 2, "the other three have no partner"
    methods = [mean_over_seeds_and_sets(np.arange(4.0 * n).reshape(n, 4), families).method for n in (1, 5)]
    assert (one["method"], methods[0] == methods[1]) == (methods[0], False), "an interval over data sets alone"


def test_controls_must_be_alike():
    def control(**changed) -> Reference:
        return record(str(changed), "k", **changed)

    group = [record("c")]
    values = {"c": np.ones(3), "k": np.zeros(3)}
    families = ["a", "b", "b"]
    assert deltas.against_controls(group, [control()], values, families)["estimate"] == 1
    for changed, why in (
        ({"family": "relu"}, "family"),
        ({"tokens": 7}, "tokens"),
        ({"l0": 9.0}, "L0"),
    ):
        assert why in deltas.against_controls(group, [control(**changed)], values, families)["reason"].split()
    assert "--random-model-checkpoint" in deltas.against_controls(group, [], values, families)["reason"]


def test_untrained_saes_have_the_l0_that_was_reached():
    assert references.untrained_like(facts(k=8, l0=8.6)) == (64, 8, 1)
    assert references.untrained_like(facts(k=8, l0=5.2)) == (64, 5, 1)
    assert references.untrained_like(facts(k=None, l0=0.2, seed=None)) == (64, 1, 0)


def test_damaged_summaries(tmp_path):
    whole = record("c", "1" * 64).model_copy(update={"normalised_of_pairs": [0.5]})
    written = whole.to_json() | {"normalised": 0.5}
    path = tmp_path / "summary.json"
    for damaged in (
        [],
        {"saes": 3},
        {"saes": [{}], "n_pairs": 1},
        *({"saes": [{k: v for k, v in written.items() if k != name}], "n_pairs": 1} for name in whole.to_json()),
        {"saes": [written], "n_pairs": 2},
        {"saes": [written | {"facts": {}}], "n_pairs": 1},
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(BadInput, match=str(path)):
            baselines.read_summary(path)
    path.write_text(json.dumps({"saes": [written], "n_pairs": 1}))
    assert baselines.read_summary(path) == baselines.Summary([whole], None)


def test_baseline_map(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    path = baselines.write_map(tmp_path / baselines.MAP, HOOK, "results.json")
    assert baselines.lookup(path, HOOK) == (tmp_path / "results.json", None)
    assert baselines.lookup(path, "blocks.1.hook_mlp_out") == (tmp_path / "results.json", None), "by its layer"
    by_module = tmp_path / "by_module.json"
    by_module.write_text(json.dumps({"gpt_neox.layers.0": "results.json", "1": None}))
    assert baselines.lookup(by_module, HOOK) == (tmp_path / "results.json", None)
    other = baselines.write_map(tmp_path / "other.json", "hook_embed", "results.json")
    assert baselines.lookup(other, "hook_embed")[0] == tmp_path / "results.json"
    found, reason = baselines.lookup(path, "blocks.2.hook_resid_pre")
    assert (found, {baselines.MAP, "blocks.2.hook_resid_pre"} <= set(reason.split())) == (None, True)
    path.write_text('{"default": "nowhere.json"}')
    with pytest.raises(BadInput, match=rf"{path}: 'default' .*nowhere\.json"):
        baselines.lookup(path, HOOK)
    for wrong in ("[]", '{"default": 3}'):
        path.write_text(wrong)
        with pytest.raises(BadInput, match=str(path)):
            baselines.lookup(path, HOOK)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published cycle-3 files are not on this machine")
def test_the_published_map_and_summary_give_no_difference_but_a_reason():
    path = PUBLISHED / "cebench_baseline_map.json"
    found, reason = baselines.lookup(path, HOOK)
    assert (found, {path.name, HOOK} <= set(reason.split())) == (None, True)
    summary = baselines.read_summary(PUBLISHED / "cebench_matched200_summary.json")
    assert "relu" in deltas.against_reference([record("c")], summary.references, {}, [])["reason"].split()


# ---------------------------------------------------------------------------------------------------------------------
# CE-Bench


@given(arrays(np.float64, (3, 17), elements=st.just(0.0) | st.floats(1e-3, 1e6)))
def test_the_largest_z_has_a_bound(x):
    assert (contrastive.largest_z(x) <= contrastive.bound(17) * (1 + 1e-9)).all()


def test_the_bound_is_reached_by_one_active_feature():
    for n in (8, 64, 1024):
        assert contrastive.largest_z(np.eye(1, n))[0] == pytest.approx(contrastive.bound(n))
    assert contrastive.largest_z(np.ones((1, 8)))[0] == 0


def test_an_unreachable_minimum_is_refused():
    contrastive.refuse_unreachable(0.0)
    contrastive.refuse_unreachable(0.3, reference=0.7)
    with pytest.raises(BadInput, match=r"--min-delta 1\.5: "):
        contrastive.refuse_unreachable(1.5)
    with pytest.raises(BadInput, match=r"--min-delta 0\.3: .*0\.7500"):
        contrastive.refuse_unreachable(0.3, reference=0.75)


def test_scores_are_those_of_the_published_procedure(subject, tmp_path):
    """The procedure story by story, as its paper and code have it, and with the data set's mean put right."""
    pairs = contrastive.local_pairs(SETS, 9, seed=3).rows
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)
    sae = SAE({"W_enc": W.T.contiguous(), "b_enc": torch.zeros(40), "W_dec": W, "b_dec": torch.zeros(16)}, "topk", 4)
    stories = [p["story1"] for p in pairs] + [p["story2"] for p in pairs]
    (means,), tokens, cut = contrastive.story_means(subject, HOOK, [sae], stories, tmp_path)
    found = contrastive.scores(means, tokens, rows_at_once=4)

    features = []
    for story in stories:
        ids = subject.tokenizer(story, truncation=True, max_length=32)["input_ids"]
        with torch.no_grad():
            _, cache = subject.model.run_with_cache(torch.tensor([ids]))
        features.append(sae.encode(cache[HOOK][0]).numpy())
    assert cut == sum(len(subject.tokenizer(s)["input_ids"]) > 32 for s in stories) > 0
    both = [np.concatenate([a, b]).mean(0) for a, b in zip(features[:9], features[9:], strict=True)]
    for variant, centre in (("published", np.zeros(40)), ("corrected", np.mean(both, 0))):
        for i in range(9):
            contrast = np.abs(features[i].mean(0) - features[9 + i].mean(0))
            independence = np.abs(both[i] - centre)
            for name, d in zip(contrastive.SCORES, (contrast, independence, contrast + independence), strict=True):
                assert found[variant][name][i] == pytest.approx(((d - d.mean()) / d.std(ddof=1)).max(), rel=1e-4)


def test_local_pairs_are_of_two_classes_and_seeded():
    a, again, other = (contrastive.local_pairs(SETS, 7, seed=s) for s in (1, 1, 2))
    assert a == again
    assert a.digest != other.digest
    assert (len(a.rows), a.benchmark) == (7, "contrastive_local")
    table = text.table(SETS[1])
    label = dict(zip(table["prompt"], table["target"], strict=True))
    ours = [p for p in a.rows if p["subject"] == SETS[1]]
    assert len(ours) == 3
    assert all(label[p["story1"]] != label[p["story2"]] for p in ours)
    with pytest.raises(BadInput, match=r"--max-rows 100000: 95_toxic_is .*\b364\b.*\b50000\b"):
        contrastive.local_pairs(SETS, 100_000, 0)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "folder"])
def test_stories_from_a_local_copy(tmp_path, suffix):
    import datasets

    rows = [{"story0": "x", "story1": f"a {i}", "story2": f"b {i}", "subject": "s"} for i in range(6)]
    table, path = datasets.Dataset.from_list(rows), tmp_path / f"stories.{suffix}"
    write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet, "folder": table.save_to_disk}
    write[suffix](str(path))
    pairs = contrastive.published_pairs(str(path), None, 0)
    assert (pairs.benchmark, len(pairs.rows)) == ("cebench_local_copy", 6)
    assert pairs.rows[0] == {"story1": "a 0", "story2": "b 0", "subject": "s"}
    assert len(contrastive.published_pairs(str(path), 4, 0).rows) == 4


def test_bad_stories(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.jsonl").write_text('{"story1": "a", "subject": "s"}\n')
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "a.jsonl"), r"a\.jsonl: .*story2"),
        (str(tmp_path / "empty"), r"empty .*\.jsonl"),
        ("nowhere", f"--stories nowhere: .*{contrastive.PUBLISHED}"),
    ):
        with pytest.raises(BadInput, match=message):
            contrastive.published_pairs(name, None, 0)


# ---------------------------------------------------------------------------------------------------------------------
# SAEBench


def test_core_metrics_are_saebenchs(subject, few, tmp_path):
    """On the same tokens as SAEBench's own function, which pads nothing: texts of one length."""
    from sae_bench.evals.core.main import get_recons_loss
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE as TheirSAE

    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)
    sae = SAE({"W_enc": W.T.contiguous(), "b_enc": torch.zeros(40), "W_dec": W, "b_dec": torch.zeros(16)}, "topk", 4)
    encoded = [subject.tokenizer(t)["input_ids"] for t in few.heldout]
    texts = [t for t, ids in zip(few.heldout, encoded, strict=True) if len(ids) >= 32][:8]
    ours = cross_entropies(subject, HOOK, [sae], texts)

    tokens = torch.tensor([ids[:32] for ids in encoded if len(ids) >= 32][:8])
    theirs = TheirSAE.load_from_disk(loaded.to_saelens(sae, subject, HOOK, tmp_path))
    load_and_format_sae("husai", theirs, "cpu")  # brings its cfg into the form that core reads
    with torch.no_grad():
        losses = get_recons_loss(
            theirs,
            subject.model,
            tokens,
            None,
            compute_kl=True,
            compute_ce_loss=True,
            ignore_tokens={subject.tokenizer.bos_token_id},
            exclude_special_tokens_from_reconstruction=True,
        )
    assert ours["tokens"] == 8 * 30
    assert ours["model"] == pytest.approx(losses["ce_loss_without_sae"][:, 1:].mean().item(), rel=1e-5)
    assert ours["spliced"][0] == pytest.approx(losses["ce_loss_with_sae"][:, 1:].mean().item(), rel=1e-5)
    assert ours["kl_spliced"][0] == pytest.approx(losses["kl_div_with_sae"][:, 1:-1].mean().item(), rel=1e-3)
    assert ours["kl_zeroed"] > ours["kl_spliced"][0] > 0


def test_untrained_and_pca_baselines(make_store):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 6, generator=g) * torch.tensor([5.0, 3, 1, 1, 0.5, 0.1]) + 4
    store = make_store(x)
    sae = baselines.untrained(store, 32, 3, seed=1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(sae.weights["b_dec"], x.mean(0), rtol=1e-4, atol=1e-4)
    assert ((sae.encode(x) > 0).sum(1) <= 3).all()
    assert not torch.equal(sae.W_dec, baselines.untrained(store, 32, 3, seed=2).W_dec)
    pca = baselines.principal_components(store, 4)
    variance = ((x - pca["mean"]) @ pca["W"]).var(0)
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1][:4]
    np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-3)


def test_data_sets_that_are_trained_on_or_unknown_are_refused(few, monkeypatch):
    assert sae_probes.check_data_sets(SETS) == SETS
    assert len(sae_probes.check_data_sets(["probe"])) == 94
    for names, message in (
        (["100_news_fake"], "--dataset-names: 100_news_fake "),
        (["2_hist_fig_birthyear"], r"--dataset-names: 2_hist_fig_birthyear .*\b113\b"),
        (["nothing"], "'nothing'"),
        (["95_toxic_is", "probe"], r"--dataset-names: 95_toxic_is \D*$"),
    ):
        with pytest.raises(BadInput, match=message):
            sae_probes.check_data_sets(names)
    assert len(set(data_sets.families(sae_probes.check_data_sets(["probe"])))) > 20
    seen = text.Corpus(train=text.documents(SETS[0])[:7], heldout=[], heldout_families=[], dropped=0)
    monkeypatch.setattr(text, "corpus", lambda: seen)
    with pytest.raises(BadInput, match=r"--dataset-names: 95_toxic_is .*\b10\b"):
        sae_probes.check_data_sets(SETS)


def test_an_sae_is_told_by_how_it_encodes_too(make_store, subject, tmp_path):
    """The same weights with another k are another SAE: both are kept, under other labels."""
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    store = make_store(x, subject_digest=subject.digest, hook_name=HOOK)
    sae = baselines.untrained(store, 24, 4, seed=0)
    for k in (2, 4):
        checkpoints.save(SAE(sae.weights, "topk", k), tmp_path / "saes" / str(k))
    found = loaded.open_all([tmp_path / "saes"], store, "checkpoint", subject, tmp_path / "root")
    assert len({c.identity for c in found}) == len({c.label for c in found}) == 2
    assert len({c.record.checkpoint_sha256 for c in found}) == 1
    other = {"model_name": "gpt2", "hook_name": HOOK}
    checkpoints.save(SAE(sae.weights, "topk", 2, True, other), tmp_path / "other")
    with pytest.raises(BadInput, match=f"{tmp_path / 'other'} .*gpt2.* miniature"):
        loaded.open_all([tmp_path / "other"], store, "checkpoint", subject, tmp_path / "root")


def test_two_saes_of_one_condition_and_seed_are_refused(trained, make_store, subject, tmp_path):
    store = make_store(torch.randn(500, 16), subject_digest=subject.digest, hook_name=HOOK)
    found = loaded.open_all([trained["own"]], store, "checkpoint", subject, tmp_path / "root")
    loaded.refuse_twins(found)
    from dataclasses import replace

    other = found[0].record.model_copy(update={"identity": "1" * 64})
    with pytest.raises(BadInput, match=f"{found[0].folder} "):
        loaded.refuse_twins([*found, replace(found[0], record=other)])


@pytest.fixture(scope="module")
def task(subject, few, tmp_path_factory):
    """A probing task of one SAE, its prompts harvested."""
    root = tmp_path_factory.mktemp("probing")
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    sae = SAE({"W_enc": W.T.contiguous(), "b_enc": torch.zeros(24), "W_dec": W, "b_dec": torch.zeros(16)}, "topk", 4)
    path = loaded.to_saelens(sae, subject, HOOK, root / "sae")
    lm.harvest_prompts(subject, [HOOK], SETS, root / "cache")
    settings = sae_probes.Settings(subject.digest, subject.name, HOOK, tuple(SETS), (1, 5))
    sha = checkpoints.checkpoint_digest(path)
    places = {"cache": str(root / "cache"), "root": str(root / "results"), "device": "cpu"}
    return sae_probes.ProbeTask("sae", "sae", str(path), sha, 42, settings, **places)


@pytest.mark.nightly  # test_probing.py holds the exact probes against the library
def test_probing_is_the_librarys_own_and_never_stale(task, tmp_path):
    from dataclasses import replace

    from sae_lens import SAE as TheirSAE
    from sae_probes import run_sae_evals

    llm = replace(task, label="llm", kind="llm", path=None, identity=task.settings.subject_digest)
    figures, of_model = sae_probes.run([task, llm], 2, tmp_path)
    s = task.settings
    run_sae_evals(
        TheirSAE.load_from_disk(task.path), s.model_name, HOOK, "l1", "normal", [1, 5],
        results_path=tmp_path / "direct", model_cache_path=task.cache, datasets=SETS, device="cpu",
    )  # fmt: skip
    for i, name in enumerate(SETS):
        direct = json.loads(
            (tmp_path / f"direct/sae_probes_miniature/normal_setting/{name}_{HOOK}_l1.json").read_text()
        )
        for row in direct:
            for metric in sae_probes.METRICS:
                assert figures[str(row["k"])][metric][i] == pytest.approx(row[metric], abs=1e-6)
    assert all(0 < v < 1 for v in of_model["llm"]["test_auc"])
    (aggregate,) = (json.loads(p.read_text()) for p in task.folder.glob("*_eval_results.json"))
    assert aggregate["eval_result_metrics"]["sae"]["sae_top_5_test_auc"] == pytest.approx(
        np.mean(figures["5"]["test_auc"])
    )

    # Another SAE of the same name, another seed, other data sets: other folders.
    others = [replace(task, identity="0" * 64), replace(task, seed=43), replace(task, kind="llm")]
    others.append(replace(task, settings=replace(s, data_sets=tuple(SETS[:1]))))
    assert len({t.folder for t in (task, *others)}) == 5
    # A file that an interruption cut off is made again, whole ones are kept.
    before = task.file(SETS[0]).read_bytes()
    task.file(SETS[0]).write_bytes(before[:40])
    kept = task.file(SETS[1]).stat().st_mtime_ns
    assert sae_probes.run([task], 1, tmp_path) == [figures]
    assert task.file(SETS[1]).stat().st_mtime_ns == kept
    # A figure that is not finite, or a data set that is not there, is no result.
    rows = json.loads(before)
    rows[0]["test_auc"] = float("nan")
    task.file(SETS[0]).write_text(json.dumps(rows))
    with pytest.raises(CheckFailed, match=f"95_toxic_is .*{task.file(SETS[0])}"):
        sae_probes.figures(task)
    (task.folder / "key.json").write_text("{}")
    with pytest.raises(BadInput, match=f"{task.folder} "):
        sae_probes.run([task], 1, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# From the shell


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """An artifact root that these tests share: what one has harvested, the next one finds."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def common(folder, artifacts, tmp_path):
    where = ["--artifact-root", artifacts, "--output-dir", tmp_path / "out", "--threads", 1]
    return ["--model-name", folder, "--hook-layer", 1, "--rows", 1000, *where]


@pytest.mark.slow
def test_saebench_from_the_shell(run_script, trained, common, tmp_path):
    arguments = ["--checkpoint", trained["own"], "--random-model-checkpoint", trained["random"], *common]
    arguments += ["--dataset-names", ",".join(SETS), "--ks", "5", "--noise-seeds", "43"]
    code, out, err = run_script(SAEBENCH, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["saes"]) == 6
    topk = next(c for c in results["conditions"] if c["condition"].startswith("topk"))
    of = [np.mean(r["test_auc"]["5"]) for r in results["saes"] if r["condition"] == topk["condition"]]
    llm = results["baselines"]["llm"]["test_auc"]["llm"]
    assert topk["auc"]["5"]["estimate"] == pytest.approx(np.mean(of))
    assert topk["delta"]["llm"]["estimate"] == pytest.approx(np.mean(of) - np.mean(llm))
    untrained = [
        np.mean(b["test_auc"]["5"]) for name, b in results["baselines"].items() if name.startswith("untrained_d24_k3_")
    ]
    assert topk["delta"]["untrained"]["estimate"] == pytest.approx(np.mean(of) - np.mean(untrained))
    random_model = [np.mean(r["test_auc"]["5"]) for r in results["controls"]]
    assert topk["delta"]["random_model"]["estimate"] == pytest.approx(np.mean(of) - np.mean(random_model))
    assert topk["delta"]["llm"]["low"] < topk["delta"]["llm"]["estimate"] < topk["delta"]["llm"]["high"]
    assert topk["delta"]["reference"]["reason"].startswith("L0 "), "ReLU was hardly trained"
    assert results["noise"]["auc"]["5"]["minimum_detectable_difference"] > 0
    assert f"none: {topk['delta']['reference']['reason']}" in out
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run_script(SAEBENCH, *arguments)[0] == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_cebench_from_the_shell(run_script, trained, common, tmp_path):
    arguments = ["--checkpoint", trained["own"], "--random-model-checkpoint", trained["random"], *common]
    arguments += ["--dataset-names", ",".join(SETS), "--max-rows", 12, "--noise-seeds", "43,44", "--as-baseline"]
    code, out, err = run_script(CEBENCH, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["benchmark"], results["n_pairs"]) == ("contrastive_local", 12)
    assert "not CE-Bench" in out.splitlines()[0]
    for r in results["saes"]:
        assert r["normalised"] == pytest.approx(r["corrected"]["interpretability"] / r["bound"])
        assert 0 < r["normalised"] <= 1
    # The same SAEs against themselves as the baseline: ReLU takes TopK's figures from the map, at the same pairs.
    again = ["--cebench-matched-baseline-map", tmp_path / "out" / baselines.MAP, "--min-delta", 0.0]
    code, _, err = run_script(CEBENCH, *arguments, "--output-dir", tmp_path / "second", *again)
    assert code == 1
    assert "MISSING" in err
    assert "contrastive_local" in err, "a minimum is met on CE-Bench's own stories alone"
    second = json.loads((tmp_path / "second" / "results.json").read_text())
    assert len(second["references"]) == 6
    assert second["conditions"] == results["conditions"], "the same SAEs as references once more"


def test_stories_count_by_their_content(run_script, trained, common, tmp_path):
    """A local copy that changes is another input; and where every draw is the same, noise is not known."""
    one = next(p for p in sorted(trained["own"].iterdir()) if p.name.startswith("topk"))
    stories = tmp_path / "stories.jsonl"
    digests = []
    for word in ("one", "two"):
        rows = [{"story1": f"{word} {i} here", "story2": f"there {i}", "subject": str(i % 3)} for i in range(5)]
        stories.write_text("".join(json.dumps(r) + "\n" for r in rows))
        code, out, err = run_script(CEBENCH, "--checkpoint", one, *common, "--stories", stories)
        assert code == 0, err
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        digests.append(results["pairs_digest"])
        assert results["benchmark"] == "cebench_local_copy"
        assert results["noise"]["minimum_detectable_difference"] is None
        assert results["noise"]["reason"] in out
    assert digests[0] != digests[1]
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    stories.write_text('{"story1": "", "story2": "b", "subject": "s"}\n')
    config = next((tmp_path / "out").glob("run_*/config.json")).read_text()
    assert str(stories) not in config


@pytest.mark.slow
def test_bad_input_from_the_shell(refused, trained, common, small_activations, tmp_path, make_store):
    own = ["--checkpoint", trained["own"], *common]
    nowhere = tmp_path / "map.json"
    nowhere.write_text('{"default": "nowhere.json"}')
    (tmp_path / "stories.csv").write_text("story1,subject\na,s\n")
    wide = SAE(
        {"W_enc": torch.eye(8), "b_enc": torch.zeros(8), "W_dec": torch.eye(8), "b_dec": torch.zeros(8)}, "standard"
    )
    checkpoints.save(wide, tmp_path / "wide")
    for script, arguments, named in (
        (SAEBENCH, [*own, "--hook-name", "blocks.7.hook_resid_pre", "--hook-layer", 7], "blocks.7.hook_resid_pre: "),
        (SAEBENCH, [*own, "--hook-name", "blocks.0.hook_mlp_out"], ["--hook-layer 1", "blocks.0.hook_mlp_out"]),
        (SAEBENCH, [*own, "--dataset-names", "nothing"], "'nothing'"),
        (SAEBENCH, [*own, "--ks", "1,2"], ["--ks: ", "'1,2'"]),
        (SAEBENCH, ["--checkpoint", tmp_path / "none", *common], ["--checkpoint", tmp_path / "none"]),
        (SAEBENCH, ["--checkpoint", tmp_path / "wide", *common], [tmp_path / "wide", "d_in 8", "16"]),
        (SAEBENCH, ["--checkpoint", trained["random"], *common], ["checkpoint: ", trained["random"]]),
        (SAEBENCH, [*own, "--random-model-checkpoint", trained["own"]], ["--random-model-checkpoint: ", ": none;"]),
        (CEBENCH, [*own, "--cebench-matched-baseline-map", nowhere], [f"{nowhere}: 'default'", "nowhere.json"]),
        (CEBENCH, [*own, "--stories", tmp_path / "stories.csv"], [tmp_path / "stories.csv", "story2"]),
        (CEBENCH, [*own, "--min-delta", 1.5], "--min-delta 1.5: "),
        (CEBENCH, [*own, "--max-rows", 0], ["--max-rows: ", "'0'"]),
        (CEBENCH, [*own, "--cebench-repo", tmp_path], tmp_path / "ce_bench" / "CE_Bench.py"),
        (OFFICIAL, [*common, "--cebench-repo", tmp_path], tmp_path / "ce_bench" / "CE_Bench.py"),
        (OFFICIAL, [*common, "--checkpoint", tmp_path / "wide"], [tmp_path / "wide", "d_in 8"]),
    ):
        refused(named, script, *arguments)
        assert not (tmp_path / "out" / "results.json").exists()


def test_preflight_says_what_would_run(run_script, common, tmp_path):
    code, out, err = run_script(OFFICIAL, *common)
    assert code == 0, err
    assert "--execute" in out.strip().splitlines()[-1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {p["name"] for p in results["preflight"] if p["runs"]} >= {"saebench_custom", "cebench_custom", "core"}
    assert all(p["reason"] for p in results["preflight"] if not p["runs"])


@pytest.mark.nightly  # a stopped harness, which CI runs, fails the same way
def test_a_failed_command_fails_the_run_after_the_others(run_script, trained, common, tmp_path, few):
    """The checkout of CE-Bench raises; SAEBench's own evals, in their own processes, still run."""
    (tmp_path / "repo" / "ce_bench").mkdir(parents=True)
    (tmp_path / "repo" / "ce_bench" / "CE_Bench.py").write_text("raise RuntimeError('broken checkout')\n")
    one = next(p for p in sorted(trained["own"].iterdir()) if p.name.startswith("topk"))
    arguments = [*common, "--execute", "--checkpoint", one, "--evals", "cebench_custom,core"]
    code, _, err = run_script(OFFICIAL, *arguments, "--cebench-repo", tmp_path / "repo")
    assert code == 1, err
    assert re.search(r"^error: 1 of 2 .*: cebench_custom \(.*\b1\b", err, re.M)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    failed, core = results["executed"]
    assert (failed["return_code"], core["return_code"], core["metric"]) == (1, 0, "ce_loss_score")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [c["return_code"] for c in manifest["commands"]] == [1, 0]
    assert (manifest["status"], manifest["return_code"]) == ("complete", 1)
    code, _, err = run_script(OFFICIAL, *common, "--evals", "magic")
    assert (code, "--evals magic" in err) == (2, True)
    assert "broken checkout" in next((tmp_path / "out").glob("run_*/logs/cebench_custom.log")).read_text()


@pytest.mark.slow
def test_a_stopped_harness_leaves_no_worker_behind(trained, folder, tmp_path):
    """SIGTERM in the middle of probing: exit 130, no process of ours goes on, and the command is in the manifest."""
    import os
    import signal
    import subprocess
    import sys
    import time

    import psutil

    from conftest import ROOT

    arguments = ["--checkpoint", trained["own"], "--model-name", folder, "--hook-layer", 1, "--rows", 500]
    arguments += ["--execute", "--evals", "saebench_custom", "--dataset-names", SETS[0], "--threads", 1]
    arguments += ["--artifact-root", tmp_path, "--output-dir", tmp_path / "out"]
    command = [sys.executable, ROOT / OFFICIAL, *arguments]
    harness = processes.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        below = psutil.Process(harness.pid).children(recursive=True)
        if any("husai.evals.sae_probes" in " ".join(p.cmdline()) for p in below if p.is_running()):
            break
        assert harness.poll() is None, "it ended before it probed"
        time.sleep(0.2)
    os.kill(harness.pid, signal.SIGTERM)
    processes.end(harness, 30)
    assert harness.returncode == 130
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    (manifest,) = (json.loads(p.read_text()) for p in (tmp_path / "out").glob("run_*/manifest.json"))
    assert (manifest["status"], len(manifest["commands"])) == ("interrupted", 1)
