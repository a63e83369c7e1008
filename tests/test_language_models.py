"""Language models as subjects: loading, the random-weights control, harvests, probes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from husai.activations import language_model as lm
from husai.activations.probes import auc_interval, delong, probe
from husai.activations.store import ActivationStore
from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY
from husai.subjects import pretrained, text
from husai.subjects.hooks import hook_name_of
from husai.training.recovered import cross_entropies, recovered
from miniature import save_miniature

EXTRACT = "scripts/analysis/extract_activations.py"
EVALUATE = "scripts/analysis/evaluate_language_model.py"
PHASE4A = "scripts/experiments/run_phase4a_reproduction.py"
ABLATIONS = "scripts/experiments/run_core_ablations.py"
TRAIN = "scripts/experiments/train_husai_sae_on_cached_activations.py"
SHIPPED = REPOSITORY / "assets" / "husai-tiny-saes"
HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def documents():
    return text.distinct(["96_spam_is"])[:150]


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("subjects") / "miniature", documents, n_layers=3)


@pytest.fixture(scope="module")
def subject(folder):
    return pretrained.load(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_a_local_folder_opens_with_the_usual_hooks_and_agrees_with_transformers(folder, subject):
    assert (subject.name, subject.n_ctx, subject.control) == ("miniature", 32, None)
    ids = subject.tokenizer("two words")["input_ids"]
    assert ids[0] == subject.tokenizer.bos_token_id
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
        _, cache = subject.model.run_with_cache(torch.tensor([ids]))
    for layer in range(3):
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], states[layer], rtol=0, atol=1e-5)


def test_pythia_70m_as_it_is_configured(tmp_path, documents):
    """Its very configuration, with random weights: what a downloaded Pythia takes."""
    config = GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    )
    path = tmp_path / "pythia"
    GPTNeoXForCausalLM(config).save_pretrained(path)
    save_miniature(tmp_path / "t", documents, n_layers=3)
    for file in (tmp_path / "t").glob("tokenizer*.json"):
        shutil.copy(file, path)
    pythia = pretrained.load(str(path))
    assert pythia.n_ctx == 2048
    assert pythia.model.cfg.n_layers == 6
    hooks = ["blocks.0.hook_resid_pre", "blocks.3.hook_resid_pre"]
    folders = lm.harvest_tokens(pythia, hooks, documents, tmp_path / "activations", rows=200)
    assert ActivationStore.open(folders[hooks[1]]).d_in == 512
    ids = torch.tensor([pythia.tokenizer(documents[0])["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[3]
        _, cache = pythia.model.run_with_cache(ids, names_filter="blocks.3.hook_resid_pre")
    torch.testing.assert_close(cache["blocks.3.hook_resid_pre"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped .*LocalEntryNotFoundError"),
        ("gpt2", "LocalEntryNotFoundError"),
        ("no-such-model", "TransformerLens"),
    ],
)
def test_without_a_network_a_hub_name_names_the_offline_choices(name, named, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=f"subject {name}: .*{named}.* husai-tiny"):
        pretrained.load(name)


def test_folders_that_cannot_be_used_are_refused(folder, tmp_path):
    def copy(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match=rf"{empty} .*config\.json.*subject\.json"):
        pretrained.load(str(empty))
    weightless = copy("weightless")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=rf"{weightless} .*\*\.safetensors"):
        pretrained.load(str(weightless))
    changed = copy("changed")
    (changed / "digests.json").write_text(json.dumps({"files": {"config.json": "0" * 64}}))
    with pytest.raises(BadInput, match=rf"{changed}/config\.json .*digests\.json.*sha256"):
        pretrained.load(str(changed))
    damaged = copy("damaged")
    (damaged / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=f"transformers .*{damaged} .*model_type"):
        pretrained.load(str(damaged))


def test_the_control_keeps_the_mean_and_variance_of_each_matrix_and_nothing_else(folder, subject):
    model, _, _, _ = pretrained.load_transformers(str(folder))
    first, _, digest, control = pretrained.load_transformers(str(folder), random_seed=0)
    again, _, same, _ = pretrained.load_transformers(str(folder), random_seed=0)
    other, _, another, _ = pretrained.load_transformers(str(folder), random_seed=1)
    assert control == "random_weights(seed=0)"
    assert digest == same
    assert len({digest, another, subject.digest}) == 3
    rows = zip(model.named_parameters(), first.parameters(), again.parameters(), other.parameters(), strict=True)
    for (name, p), a, b, c in rows:
        assert torch.equal(a, b), name
        n = p.numel()
        if p.std(correction=0) == 0:
            assert torch.equal(a, p), "a constant stays"
            continue
        assert not torch.equal(a, c)
        assert abs(a.mean() - p.mean()) < 5 * p.std() / n**0.5, name
        assert abs(a.std() / p.std() - 1) < 5 / (2 * n) ** 0.5, name
        correlation = torch.corrcoef(torch.stack([a.flatten(), p.flatten()]))[0, 1]
        assert abs(correlation) < 5 / n**0.5, name


# ---------------------------------------------------------------------------------------------------------------------
# Every token, into stores


@pytest.fixture(scope="module")
def harvested(subject, documents, tmp_path_factory):
    root = tmp_path_factory.mktemp("activations")
    return root, lm.harvest_tokens(subject, HOOKS, documents, root, rows=2000, heldout_fraction=0.25)


def by_hand(folder, documents):
    """{(document, token, bytes of what stands before it): transformers' hidden states}, one input at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 31):
            piece = [0, *ids[start : start + 31]]
            with torch.no_grad():
                states = model(torch.tensor([piece]), output_hidden_states=True).hidden_states
            number = int(text.document_id(document)[:15], 16)
            rows += [(number, token, states[1][0, i], states[2][0, i]) for i, token in enumerate(piece) if i > 0]
    return rows


def test_harvested_rows_are_transformers_hidden_states(folder, documents, harvested):
    """Found again by document and token; of equal ones the nearest."""
    expected = {}
    for number, token, *states in by_hand(folder, documents):
        expected.setdefault((number, token), []).append(states)
    for hook, which in ((HOOKS[0], 0), (HOOKS[2], 1)):
        store = ActivationStore.open(harvested[1][hook])
        x = store.read(0, 2000)
        labels = zip(store.labels("document", 0, 2000).tolist(), store.labels("token", 0, 2000).tolist(), strict=True)
        for row, key in zip(x, labels, strict=True):
            assert min((row - states[which]).abs().max() for states in expected[key]) < 1e-5
        assert len({row.numpy().tobytes() for row in x}) > 1900
    assert 0 not in store.labels("token", 0, 2000), "the token that begins a text gives no row"


def test_stores_of_one_pass_correspond_and_hold_out_whole_documents(harvested, subject):
    stores = [ActivationStore.open(f, subject.digest, h) for h, f in harvested[1].items()]
    assert {s.rows for s in stores} == {2000}
    documents = stores[0].labels("document", 0, 2000)
    for other in stores[1:]:
        assert torch.equal(other.labels("document", 0, 2000), documents)
        assert torch.equal(other.labels("token", 0, 2000), stores[0].labels("token", 0, 2000))
    train, heldout = stores[0].split(0.9)
    assert 0.15 < len(heldout) / 2000 < 0.26, "the store's own split stands, whatever fraction is named"
    assert not set(documents[train.start : train.stop].tolist()) & set(documents[heldout.start :].tolist())
    runs = (documents[1:] != documents[:-1]).sum()
    assert runs > 1500, "rows of one document do not stay together"
    mean, _ = stores[0].stats()
    torch.testing.assert_close(mean, stores[0].read(0, 2000).double().mean(0))


def test_harvest_is_found_again_and_resumes_to_the_same_bytes(subject, documents, harvested, tmp_path, monkeypatch):
    root, folders = harvested
    monkeypatch.setattr(lm, "_harvest", None)  # nothing is computed again
    assert lm.harvest_tokens(subject, HOOKS, documents, root, rows=2000, heldout_fraction=0.25) == folders
    monkeypatch.undo()

    monkeypatch.setattr(lm, "PART_ROWS", 300)
    reference = lm.harvest_tokens(subject, HOOKS[:2], documents, tmp_path / "whole", rows=2000)
    original, calls = lm._harvest_part, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) in (3, 6):
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(lm, "_harvest_part", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lm.harvest_tokens(subject, HOOKS[:2], documents, tmp_path / "resumed", rows=2000)
    resumed = lm.harvest_tokens(subject, HOOKS[:2], documents, tmp_path / "resumed", rows=2000)
    assert len(calls) == 7 + 2, "finished parts were not computed again"
    assert not list((tmp_path / "resumed").glob(".*.work"))
    for hook in HOOKS[:2]:
        assert reference[hook].name == resumed[hook].name
        for file in reference[hook].iterdir():
            assert file.read_bytes() == (resumed[hook] / file.name).read_bytes()


def test_no_more_than_a_part_or_a_shard_is_held(subject, documents, tmp_path, monkeypatch):
    """Ten times the rows, the same largest tensors."""
    monkeypatch.setattr(lm, "PART_ROWS", 300)
    largest = []
    append, save = lm.StoreWriter.append, lm.save
    monkeypatch.setattr(lm.StoreWriter, "append", lambda s, x, *a: (largest.append(len(x)), append(s, x, *a))[1])
    monkeypatch.setattr(lm, "save", lambda t: (largest.append(len(t["token"])), save(t))[1])
    for rows in (400, 4000):
        largest.clear()
        lm.harvest_tokens(subject, HOOKS[:1], documents, tmp_path / str(rows), rows=rows)
        assert max(largest) < 2 * 300


def test_the_embedding_is_warned_of_and_held_out_by_token(subject, documents, tmp_path, caplog):
    hooks = ["blocks.0.hook_resid_pre", HOOKS[0]]
    folders = lm.harvest_tokens(subject, hooks, documents, tmp_path, rows=2000)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [hooks[0] in warning for warning in warned] == [True]
    store = ActivationStore.open(folders[hooks[0]])
    train, heldout = store.split(0.5)
    tokens = store.labels("token", 0, 2000)
    assert not set(tokens[: train.stop].tolist()) & set(tokens[heldout.start :].tolist())
    weight = subject.model.embed.weight.detach()
    torch.testing.assert_close(store.read(0, 2000), weight[tokens])
    assert store.manifest.position != ActivationStore.open(folders[HOOKS[0]]).manifest.position

    caplog.clear()
    again = lm.harvest_tokens(subject, hooks, documents, tmp_path, rows=2000, by_document=True)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert again[HOOKS[0]] == folders[HOOKS[0]]
    stores = [ActivationStore.open(again[hook]) for hook in hooks]
    for name in ("document", "token"):
        assert torch.equal(*(s.labels(name, 0, 2000) for s in stores)), "rows correspond"
    torch.testing.assert_close(stores[0].read(0, 2000), weight[stores[0].labels("token", 0, 2000)])


def test_values_say_what_is_the_embedding(subject, documents, tmp_path):
    """Names do not: under four of them 64 % of held-out rows were training rows."""
    alone = [
        "hook_embed",
        "embed.hook_out",
        "blocks.0.hook_in",
        "blocks.0.hook_resid_pre",
        "blocks.0.ln1.hook_normalized",
    ]
    others = ["blocks.0.attn.hook_out", "blocks.0.hook_resid_post", "blocks.1.hook_in", "ln_final.hook_normalized"]
    found = lm.check_hooks(subject, [*alone, *others])
    assert [hook for hook, what in found.items() if what.of_token] == alone
    assert {what.d_in for what in found.values()} == {16}

    store = ActivationStore.open(
        lm.harvest_tokens(subject, ["hook_embed"], documents, tmp_path, rows=2000)["hook_embed"]
    )
    train, heldout = store.split(0.2)
    rows = {tuple(row.tolist()) for row in store.read(0, train.stop)}
    assert not rows & {tuple(row.tolist()) for row in store.read(heldout.start, heldout.stop)}


@pytest.fixture
def another(folder, tmp_path):
    """`another(architecture, **sizes)` -> a small random model with the miniature's tokenizer."""

    def make(architecture, **sizes):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            architecture, vocab_size=400, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / architecture)
        for path in folder.glob("tokenizer*"):
            shutil.copy(path, tmp_path / architecture)
        return pretrained.load(str(tmp_path / architecture))

    return make


def test_positions_are_no_text(another):
    """With position embeddings, a token has other rows at other places, and a place has one row."""
    subject = another("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=32)
    names = ["hook_embed", "blocks.0.hook_resid_pre", "transformer.h.0"]
    found = lm.check_hooks(subject, [hook_name_of(name) for name in names])
    assert [what.of_token for what in found.values()] == [True, False, False]
    with pytest.raises(BadInput, match="--hook-name hook_pos_embed: "):
        lm.check_hooks(subject, ["hook_pos_embed"])


def test_a_model_says_whether_its_mlp_is_normalised(subject, another):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = another("gemma2", **sizes, head_dim=8, intermediate_size=32, max_position_embeddings=32, sliding_window=16)
    for part, module in (("mlp", "mlp"), ("attn", "self_attn")):
        names = f"blocks.1.hook_{part}_out", f"model.layers.1.{module}"
        assert [model.same_place(*names) for model in (subject, gemma)] == [True, False]
    assert gemma.same_place("blocks.1.hook_resid_pre", "model.layers.0")


@pytest.mark.parametrize(
    ("hooks", "rows", "named"),
    [
        (["blocks.9.hook_resid_pre"], 100, "--hook-name blocks.9.hook_resid_pre: .* blocks.0.hook_resid_pre"),
        (["blocks.1.hook_mlp_in"], 100, "--hook-name blocks.1.hook_mlp_in: "),
        (["blocks.1.attn.hook_result"], 100, "--hook-name blocks.1.attn.hook_result: "),
        (["blocks.1.attn.hook_pattern"], 1000, r"--hook-name blocks.1.attn.hook_pattern: .*\[\d+, 2, 6, 6\]"),
        (HOOKS[:1], 10**9, r"--rows 1000000000: .*\b\d{4}\b"),
        (HOOKS[:1], 2, "--rows 2: "),
    ],
)
def test_impossible_harvests_are_refused(subject, documents, tmp_path, hooks, rows, named):
    with pytest.raises(BadInput, match=named):
        lm.harvest_tokens(subject, hooks, documents, tmp_path, rows=rows)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]


def test_attention_heads_give_one_row_a_token(subject):
    """At hook_z the heads stand side by side, as the output projection reads them."""
    tokens = np.arange(1, 9)
    rows = lm.run(subject, [tokens], ["blocks.0.attn.hook_z"])["blocks.0.attn.hook_z"]
    _, cache = subject.model.run_with_cache(torch.from_numpy(tokens)[None])
    torch.testing.assert_close(rows, cache["blocks.0.attn.hook_z"].flatten(2))
    assert rows.shape == (1, 8, subject.model.cfg.d_model)


def test_a_pass_stops_at_the_last_layer_that_is_asked_for(subject):
    assert lm.where_to_stop(["blocks.2.hook_resid_pre"]) == (2, "blocks.2.hook_resid_pre")
    assert lm.where_to_stop(["blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"]) == (2, "blocks.2.hook_resid_pre")
    assert lm.where_to_stop(["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]) == (2, None)
    assert lm.where_to_stop(["blocks.0.hook_resid_pre"]) == (1, None)
    assert lm.where_to_stop(["blocks.1.hook_resid_pre", "ln_final.hook_normalized"]) == (None, None)
    tokens = [np.array([0, 5, 6, 7]), np.array([0, 9])]
    _, cache = subject.model.run_with_cache(torch.tensor([[0, 5, 6, 7], [0, 9, 0, 0]]))
    for hooks in (["blocks.2.hook_resid_pre", HOOKS[1]], ["blocks.0.hook_resid_pre"], ["ln_final.hook_normalized"]):
        for hook, x in lm.run(subject, tokens, hooks).items():
            torch.testing.assert_close(x, cache[hook], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The last token of each prompt, and sae-probes' own code on it


@pytest.mark.slow
def test_prompts_equal_what_sae_probes_would_compute(subject, tmp_path):
    from sae_probes.generate_model_activations import ensure_dataset_activations

    hooks = [HOOKS[0], "blocks.0.hook_resid_pre"]
    name = "96_spam_is"
    ours = lm.harvest_prompts(subject, hooks, [name, "5_hist_fig_ismale_OOD"], tmp_path / "ours")
    ensure_dataset_activations(
        model_name=subject.name,
        dataset_short_names=[name],
        hook_names=hooks,
        model_cache_path=tmp_path / "theirs",
        device="cpu",
        max_seq_len=subject.n_ctx,
        model=subject.model,
    )
    for hook in hooks:
        a, b = (
            torch.load(f / f"{name}_{hook}.pt", weights_only=True)
            for f in (ours, tmp_path / "theirs" / f"model_activations_{subject.name}")
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    shifted = tmp_path / "ours" / f"model_activations_{subject.name}_OOD" / f"5_hist_fig_ismale_OOD_{hooks[0]}.pt"
    assert torch.load(shifted, weights_only=True).shape == (299, 16)


def test_a_cache_of_another_subject_is_refused(subject, folder, tmp_path):
    lm.harvest_prompts(subject, HOOKS[:1], ["95_toxic_is"], tmp_path)
    file = tmp_path / "model_activations_miniature" / f"95_toxic_is_{HOOKS[0]}.pt"
    before = file.stat().st_mtime_ns
    lm.harvest_prompts(subject, HOOKS[:1], ["95_toxic_is"], tmp_path)
    assert file.stat().st_mtime_ns == before, "what is there is kept"
    control = pretrained.load(str(folder), random_seed=3)
    assert control.name == "miniature-random3"
    lm.harvest_prompts(control, HOOKS[:1], ["95_toxic_is"], tmp_path)
    again = torch.load(tmp_path / "model_activations_miniature-random3" / file.name, weights_only=True)
    assert not torch.equal(again, torch.load(file, weights_only=True))
    (tmp_path / "model_activations_miniature" / "subject.json").write_text('{"subject": "other", "n_ctx": 32}')
    with pytest.raises(BadInput, match=f"{file.parent} "):
        lm.harvest_prompts(subject, HOOKS[:1], ["95_toxic_is"], tmp_path)


@pytest.mark.slow
def test_sae_probes_own_code_runs_on_the_harvest(subject, run_script, folder, documents, tmp_path, monkeypatch):
    """From the shell to `run_baseline_evals` and `run_sae_evals`, unmodified, without a model or a network."""
    import sae_probes
    from sae_lens import SAE
    from transformer_lens import HookedTransformer

    name, hook = "96_spam_is", HOOKS[0]
    common = ["--subject", folder, "--hook-name", hook, "--artifact-root", tmp_path, "--threads", 1]
    code, out, err = run_script(EXTRACT, *common, "--layout", "sae-probes", "--data-sets", name)
    assert code == 0, err
    assert "model_name        miniature" in out
    code, out, err = run_script(EXTRACT, *common, "--data-sets", f"{name},95_toxic_is", "--rows", 3000)
    assert code == 0, err
    assert "rows    3000 x 16, blocks.1.hook_resid_pre" in out
    store = out.split()[1]
    saes = ["--activation-cache-dir", store, "--output-dir", tmp_path / "saes", "--seeds", "1,2", "--d-sae", 24]
    code, _, err = run_script(TRAIN, *saes, "--k", 4, "--tokens", 4000, "--threads", 1)
    assert code == 0, err
    members = json.loads((tmp_path / "saes" / "results.json").read_text())["members"]
    sae = SAE.load_from_disk(tmp_path / "saes" / members[0]["checkpoint"])

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", None)
    setting = {"model_name": "miniature", "hook_name": hook, "setting": "normal", "datasets": [name], "device": "cpu"}
    setting |= {"model_cache_path": tmp_path / "probe_activations", "results_path": tmp_path / "results"}
    sae_probes.run_baseline_evals(**setting)
    sae_probes.run_sae_evals(sae=sae, reg_type="l1", ks=[1, 5], **setting)
    baseline, *_ = (json.loads(p.read_text()) for p in (tmp_path / "results").rglob("*logreg*.json"))
    (sparse,) = (json.loads(p.read_text()) for p in (tmp_path / "results").rglob("*l1.json"))
    assert [s["k"] for s in sparse] == [1, 5]
    assert baseline[0]["test_auc"] > 0.6
    ours = probe(tmp_path / "probe_activations" / "model_activations_miniature" / f"{name}_{hook}.pt", name)
    assert ours["auc"]["estimate"] == pytest.approx(baseline[0]["test_auc"], abs=2e-3), "theirs is fitted in float32"
    assert ours["validation_auc"] == pytest.approx(baseline[0]["val_auc"], abs=2e-3)


def test_delong_is_the_variance_of_the_two_class_averages():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.7, 1, 40), np.round(rng.normal(0, 1, 30), 1)
    positive[:5] = negative[:5]  # ties
    auc, error = delong(positive, negative)
    beats = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0  # noqa: E731
    over_p = [np.mean([beats(p, n) for n in negative]) for p in positive]
    over_n = [np.mean([beats(p, n) for p in positive]) for n in negative]
    assert auc == pytest.approx(np.mean(over_p))
    assert error**2 == pytest.approx(np.var(over_p, ddof=1) / 40 + np.var(over_n, ddof=1) / 30)
    assert delong(np.ones(5), np.zeros(5)) == (1.0, 0.0)


def test_auc_intervals_cover():
    """Normal scores with a known AUC, 400 test sets: 95 % of intervals cover, within what 400 draws can tell."""
    from scipy.stats import norm

    rng = np.random.default_rng(1)
    for shift in (0.0, 1.0, 2.5):
        truth, covered = norm.cdf(shift / 2**0.5), 0
        for _ in range(400):
            low, high = auc_interval(*delong(rng.normal(shift, 1, 100), rng.normal(0, 1, 100)))
            assert 0 <= low <= high <= 1
            covered += low <= truth <= high
        assert 0.915 <= covered / 400 <= 0.98, shift
    assert auc_interval(1.0, 0.0) == (1.0, 1.0)


@pytest.mark.slow
def test_evaluation_from_the_shell(folder, run_script, tmp_path, monkeypatch, documents):
    spam = text.documents("96_spam_is")
    few = text.Corpus(train=spam[150:400], heldout=spam[400:420], heldout_families=["a"] * 20, dropped=0)
    monkeypatch.setattr(text, "corpus", lambda: few)
    arguments = ["--subject", folder, "--artifact-root", tmp_path, "--output-dir", tmp_path / "out", "--threads", 1]
    arguments += ["--hook-name", ",".join(HOOKS[:2]), "--data-sets", "95_toxic_is,96_spam_is"]
    code, out, err = run_script(EVALUATE, *arguments)
    assert code == 1, "an untrained model misses the bars"
    assert {"bigram", "trigram"} <= set(re.findall(r"\w+", err.splitlines()[-1]))
    (results,) = (json.loads(p.read_text()) for p in (tmp_path / "out").glob("run_*/results.json"))
    assert set(results["probes"]) == set(HOOKS[:2])
    for records in (*results["probes"].values(), *results["control"].values()):
        assert [r["data_set"] for r in records] == ["95_toxic_is", "96_spam_is"]
        assert all(r["auc"]["low"] <= r["auc"]["estimate"] <= r["auc"]["high"] for r in records)
    assert results["counts"][HOOKS[0]]["data_sets"] == 2
    assert "| 95_toxic_is |" in out
    for figure in ("bits_per_byte", "probes"):
        assert (tmp_path / "out" / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_from_the_shell(refused, folder, tmp_path):
    for arguments, named in (
        (["--subject", "no-such-model"], "no-such-model"),
        (["--subject", folder, "--hook-name", "blocks.7.hook_resid_pre"], "--hook-name blocks.7.hook_resid_pre: "),
        (["--subject", folder, "--hook-name", "gpt_neox.layers.7"], "--hook-name blocks.7.hook_resid_post: "),
        (["--subject", folder, "--data-sets", "nothing"], "'nothing'"),
        (["--subject", folder, "--data-sets", "95_toxic_is", "--rows", 10**8], "--rows 100000000: "),
        (["--subject", folder, "--layout", "sae-probes", "--data-sets", "x"], "'x'"),
    ):
        refused(named, EXTRACT, "--artifact-root", tmp_path, "--threads", 1, *arguments)


UNKNOWN, SILENT, SQUARE = "gpt_neox.layers.9", "blocks.1.hook_mlp_in", "blocks.1.attn.hook_pattern"


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (EXTRACT, SILENT),
        (EVALUATE, SILENT),
        (PHASE4A, UNKNOWN),
        (PHASE4A, SQUARE),
        (ABLATIONS, SILENT),
        (TRAIN, SQUARE),
        ("scripts/experiments/run_adaptive_l0_calibration.py", UNKNOWN),
        ("scripts/experiments/run_assignment_consistency_v2.py", SILENT),
        ("scripts/experiments/run_architecture_frontier_external.py", UNKNOWN),
        ("scripts/experiments/run_husai_saebench_custom_eval.py", SILENT),
        ("scripts/experiments/run_transcoder_stress_eval.py", SILENT),
        ("scripts/experiments/run_random_model_stress_eval.py", UNKNOWN),
        ("scripts/experiments/run_feature_reliability.py", SQUARE),
    ],
)
def test_every_script_refuses_a_hook_before_anything_runs(script, name, refused, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: subject)
    monkeypatch.setattr(lm.Inputs, "of", lambda *_, **__: pytest.fail("a text was read"))
    place = ["--model-name", "husai-tiny", "--hook-name", name, "--artifact-root", tmp_path / "root", "--threads", 1]
    place += [] if script == EXTRACT else ["--output-dir", tmp_path / "out"]
    place += ["--checkpoint", SHIPPED] if "saebench" in script or "reliability" in script else []
    refused(f"--hook-name {hook_name_of(name)}: ", script, *place)
    assert not (tmp_path / "root" / "activations").exists()


def test_hooks_of_the_transformer_are_refused_before_it_is_trained(refused, small_subject, tmp_path):
    for name in ("blocks.3.hook_resid_post", "blocks.0.hook_mlp_in", "blocks.0.attn.hook_pattern"):
        for script in (EXTRACT, PHASE4A, ABLATIONS):
            arguments = ["--artifact-root", tmp_path / "root", "--threads", 1, "--hook-name", name]
            arguments += [] if script == EXTRACT else ["--output-dir", tmp_path / "out"]
            refused(f"--hook-name {name}: ", script, *arguments)
    assert not (tmp_path / "root" / "subjects").exists()
    both = "blocks.0.hook_resid_post,blocks.3.hook_resid_post"
    given = ["--subject", small_subject[1], "--artifact-root", tmp_path / "root", "--threads", 1]
    refused("blocks.3.hook_resid_post: ", EXTRACT, *given, "--hook-name", both)
    assert not (tmp_path / "root" / "activations").exists()


def test_a_module_is_a_hook_wherever_one_is_named(run_script, folder, tmp_path):
    common = ["--data-sets", "95_toxic_is", "--rows", 3000, "--threads", 1, "--artifact-root", tmp_path]
    digests = []
    for name in ("gpt_neox.layers.0", "blocks.0.hook_resid_post"):
        code, out, err = run_script(EXTRACT, "--subject", folder, "--hook-name", name, *common)
        assert code == 0, err
        digests.append(out.split()[-1])
    assert digests[0] == digests[1]


def test_the_random_model_flag_gives_another_store(run_script, folder, small_subject, tmp_path):
    common = ["--hook-name", HOOKS[0], "--data-sets", "95_toxic_is", "--rows", 3000, "--threads", 1]
    common += ["--artifact-root", tmp_path]
    stores = []
    for extra in ([], ["--random-model"], ["--random-model", "--random-seed", 1]):
        code, out, err = run_script(EXTRACT, "--subject", folder, *common, *extra)
        assert code == 0, err
        stores.append(ActivationStore.open(tmp_path / out.split()[1]))
    assert [s.manifest.control for s in stores] == [None, "random_weights(seed=0)", "random_weights(seed=1)"]
    assert len({s.manifest.subject_digest for s in stores}) == 3
    code, out, err = run_script(
        EXTRACT, "--subject", small_subject[1], "--artifact-root", tmp_path, "--threads", 1, "--random-model"
    )
    assert code == 0, err
    assert ActivationStore.open(tmp_path / out.split()[1]).manifest.control == "random_weights(seed=0)"


# ---------------------------------------------------------------------------------------------------------------------
# SAEs of a language model


def test_cross_entropy_recovered(subject, folder, documents):
    """An SAE that changes nothing recovers all, one that gives zeros nothing; the model's own loss is transformers'."""
    eye = torch.eye(16)
    mirror = torch.cat([eye, -eye])  # relu(x) − relu(−x) = x
    nothing = {"W_enc": mirror.T, "b_enc": torch.zeros(32), "b_dec": torch.zeros(16)}
    perfect = SAE(nothing | {"W_dec": mirror}, "standard")
    zeros = SAE(nothing | {"W_dec": torch.zeros(32, 16)}, "standard")
    losses = cross_entropies(subject, HOOKS[0], [perfect, zeros], documents[:20])
    assert recovered(losses) == pytest.approx([1, 0], abs=1e-4)
    assert losses["spliced"][1] == pytest.approx(losses["zeroed"], rel=1e-6)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = count = 0
    for document in documents[:20]:
        ids = torch.tensor(
            [[0, *AutoTokenizer.from_pretrained(folder)(document, add_special_tokens=False)["input_ids"]]]
        )
        ids = ids[:, :32]
        with torch.no_grad():
            logits = model(ids).logits[0]
        total += torch.nn.functional.cross_entropy(logits[1:-1], ids[0, 2:], reduction="sum").item()
        count += ids.shape[1] - 2
    assert losses["tokens"] == count
    assert losses["model"] == pytest.approx(total / count, rel=1e-5)


def test_core_ablations_on_a_language_model(folder, subject, documents, run_script, tmp_path, monkeypatch):
    """The way that a phase other than 4a takes from its command line to a language model's activations."""
    monkeypatch.setattr(text, "corpus", lambda: text.Corpus(documents, heldout=[], heldout_families=[], dropped=0))
    arguments = ["--subject", folder, "--hook-name", HOOKS[0], "--rows", 2000, "--seeds", "1,2,3", "--no-methods"]
    arguments += ["--d-sae", 24, "--k", 3, "--ks", "3,6", "--d-saes", "12,24", "--tokens", 2000, "--batch-size", 100]
    arguments += ["--null-draws", 5, "--threads", 1, "--artifact-root", tmp_path, "--output-dir", tmp_path / "out"]
    code, _, err = run_script(ABLATIONS, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["inputs"]["subject"] == subject.digest
    assert (results["hook_name"], results["d_in"]) == (HOOKS[0], 16)
    assert [(r["d_sae"], r["k"]) for r in results["rows"]] == [(24, 3), (24, 6), (12, 3)]
    (store,) = (p for p in (tmp_path / "activations").iterdir() if not p.name.startswith("."))
    assert ActivationStore.open(store).rows == 2000


@pytest.mark.slow
def test_phase4a_on_a_language_model(folder, run_script, tmp_path, monkeypatch):
    spam = text.distinct(["96_spam_is", "95_toxic_is"])
    few = text.Corpus(train=spam[:1400], heldout=spam[1400:1500], heldout_families=["a"] * 100, dropped=0)
    monkeypatch.setattr(text, "corpus", lambda: few)
    arguments = ["--subject", folder, "--hook-name", HOOKS[0], "--rows", 12_000, "--seeds", "1,2,3", "--d-sae", 24]
    arguments += ["--k", 3, "--tokens", 4000, "--batch-size", 128, "--null-draws", 5, "--threads", 1]
    arguments += ["--artifact-root", tmp_path, "--output-dir", tmp_path / "out"]
    code, out, err = run_script(PHASE4A, *arguments)
    assert code == 0, err
    section = json.loads((tmp_path / "out" / "results.json").read_text())["husai"]
    nulls = section["stability"]["scores"]["mcc_alive"]["nulls"]
    assert {"isotropic", "spectral", "gaussian", "random_model"} <= set(nulls)
    assert section["rows"] == 12_000
    assert len(section["random_model"]) == 3
    pairs = [p["random_model"]["mcc_alive"] for p in section["pairs"]]
    assert nulls["random_model"]["mean"] == pytest.approx(np.mean(pairs))
    stores = [ActivationStore.open(p) for p in (tmp_path / "activations").iterdir() if not p.name.startswith(".")]
    assert {s.manifest.control for s in stores} == {None, "random_weights(seed=0)", "gaussian(seed=0)"}
    assert len(section["cross_entropy"]["recovered"]) == 3
    assert "recovered" in out
    assert (tmp_path / "out" / "figures" / "cross_entropy.png").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run_script(PHASE4A, *arguments)[0] == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before
