"""How an SAE's activations were made: read from its files, applied, or refused. The oracles are transformers' hidden
states, TransformerLens' own processing of weights, and SAELens' store of activations."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from husai.activations import language_model as lm
from husai.activations.store import ActivationStore
from husai.activations.stream import ActivationStream
from husai.evals import loaded, random_model, supplied, transcoder
from husai.evals.loaded import Opener
from husai.runs.errors import BadInput
from husai.runs.subjects import with_stated_version
from husai.stability import study
from husai.subjects import pretrained, text
from husai.subjects.harvesting import UNKNOWN, Harvesting, agreed, line, recorded, refuse_other
from husai.subjects.sources import TextSource
from husai.training.recovered import cross_entropies
from miniature import few_texts, save_miniature

HOOK = "blocks.1.hook_resid_pre"
D = 16
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {"use_parallel_residual": True},
    "llama": {"num_key_value_heads": 1},
}
CENTRED = Harvesting(center_writing_weights=True)
OWN = Harvesting(complete=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(architecture)` -> a random model with the miniature's tokenizer, whose residual stream has a mean."""
    made = {}

    def make(architecture: str = "gpt2") -> Path:
        if architecture not in made:
            place = save_miniature(tmp_path_factory.mktemp("subjects") / "tinylm", few_texts().train)
            settings = {"vocab_size": 400, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
            torch.manual_seed(0)
            config = AutoConfig.for_model(architecture, **settings | SIZES | ARCHITECTURES[architecture])
            model = AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                p.data.mul_(3)
            embedding = model.get_input_embeddings().weight.data
            embedding += 0.3 * torch.randn(len(embedding), 1)
            for name in ("model.safetensors", "config.json", "digests.json", "generation_config.json"):
                (place / name).unlink(missing_ok=True)
            model.save_pretrained(place)
            made[architecture] = place
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def documents():
    return few_texts().heldout[:12]


def exact(directions: torch.Tensor) -> dict[str, torch.Tensor]:
    """A ReLU SAE that reconstructs exactly what lies in the span of orthonormal rows `[n, d]`."""
    both = torch.cat([directions, -directions])
    return {"W_enc": both.T, "b_enc": torch.zeros(len(both)), "W_dec": both, "b_dec": torch.zeros(both.shape[1])}


def save_sae(folder: Path, weights: dict, **metadata) -> Path:
    folder.mkdir(parents=True)
    d_in, d_sae = weights["W_enc"].shape
    config = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": False}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {"model_name": "tinylm", "hook_name": HOOK, "sae_lens_version": "6.54.12"} | metadata
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "sae_weights.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Centred writing weights


@pytest.mark.parametrize(
    ("architecture", "fold_ln"),
    [
        ("gpt2", False),
        ("llama", False),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("gpt_neox", True, marks=pytest.mark.slow),
    ],
)
def test_centring_is_what_transformer_lens_does_to_the_weights(folder, architecture, fold_ln):
    """Folding LayerNorms changes nothing more, and models without LayerNorm stay as they are."""
    subject = pretrained.load(str(folder(architecture)), harvesting=CENTRED)
    processed = pretrained.load(str(folder(architecture))).model
    processed.process_weights(
        fold_ln=fold_ln, center_writing_weights=True, center_unembed=fold_ln, fold_value_biases=fold_ln
    )
    inputs = [np.array([0, 5, 6, 7, 300]), np.array([0, 9, 11])]
    hooks = ["hook_embed", HOOK, "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    hooks = [hook for hook in hooks if hook in subject.model.hook_dict and not (fold_ln and hook.endswith("hook_z"))]
    _, cache = processed.run_with_cache(torch.tensor([[0, 5, 6, 7, 300], [0, 9, 11, 0, 0]]))
    plain = lm.run(pretrained.load(str(folder(architecture))), inputs, hooks)
    for hook, x in lm.run(subject, inputs, hooks).items():
        expected = cache[hook].flatten(2)
        torch.testing.assert_close(x[0], expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(x[1, :3], expected[1, :3], rtol=0, atol=2e-5)
        if hook in ("hook_embed", HOOK):
            assert ((x - plain[hook]).abs().max() > 0.05) == (architecture != "llama"), hook
    assert subject.harvesting == (Harvesting() if architecture == "llama" else CENTRED)


@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_a_spliced_sae_costs_what_it_costs_the_processed_model(folder, architecture, documents):
    """The oracle splices into the bridge over processed weights; the bridge over plain weights gives another loss."""
    subject = pretrained.load(str(folder(architecture)), harvesting=CENTRED)
    processed = pretrained.load(str(folder(architecture))).model
    processed.process_weights(fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False)
    W = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(1)), dim=1)
    weights = {"W_enc": W.T.contiguous(), "b_enc": torch.zeros(24), "W_dec": W, "b_dec": torch.ones(D) * 0.1}
    sae, texts = loaded.SAE(weights, "topk", 4), documents[:6]
    losses, total, n = cross_entropies(subject, HOOK, [sae], texts), 0.0, 0
    for ids in subject.tokenizer(texts, truncation=True, max_length=32)["input_ids"]:

        def splice(x, hook):
            return torch.cat([x[:, :1], sae.decode(sae.encode(x[0, 1:]))[None]], 1)

        logits = processed.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(HOOK, splice)])[0, 1:-1]
        total -= logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[2:, None]).sum().item()
        n += len(ids) - 2
    assert losses["tokens"] == n
    assert losses["spliced"][0] == pytest.approx(total / n, abs=1e-4)
    plain = cross_entropies(pretrained.load(str(folder(architecture))), HOOK, [sae], texts)
    assert abs(plain["spliced"][0] - total / n) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and positions


def by_hand(subject, documents, way: Harvesting) -> dict[tuple[int, int], list[torch.Tensor]]:
    """(document, token) -> rows, as SAELens' settings say: transformers' hidden states, one input at a time."""
    n = min(way.context_size or 32, 32)
    begins = [0] if way.prepend_bos in (None, True) else []
    positions = range(n)[slice(*way.seqpos_slice or (None,))]
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for document in documents:
        ids = subject.tokenizer(document, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), n - len(begins)):
            piece = [*begins, *ids[start : start + n - len(begins)]]
            with torch.no_grad():
                states = subject.transformer(torch.tensor([piece]), output_hidden_states=True).hidden_states[1][0]
            for i, token in enumerate(piece):
                if i > 0 and i in positions and token not in (way.exclude_special_tokens or ()):
                    found.setdefault((int(text.document_id(document)[:15], 16), token), []).append(states[i])
    return found


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(Harvesting(prepend_bos=False, context_size=9, seqpos_slice=(3, None)), marks=pytest.mark.slow),
        Harvesting(seqpos_slice=(2, 20, 3), exclude_special_tokens=(*range(5, 60),)),
    ],
)
def test_rows_are_those_of_the_settings(folder, documents, way, tmp_path):
    subject = pretrained.load(str(folder()), harvesting=way)
    expected = by_hand(subject, documents, way)
    whole = sum(map(len, expected.values()))
    store = ActivationStore.open(lm.harvest_tokens(subject, [HOOK], documents, tmp_path, rows=whole)[HOOK])
    labels = zip(store.labels("document", 0, whole).tolist(), store.labels("token", 0, whole).tolist(), strict=True)
    for row, key in zip(store.read(0, whole), labels, strict=True):
        distances = [(row - other).abs().max() for other in expected[key]]
        assert min(distances) < 1e-5
        del expected[key][int(np.argmin(distances))]  # each is harvested once
    assert not any(expected.values())
    assert store.manifest.harvesting == subject.harvesting.to_json()
    with pytest.raises(BadInput, match="--rows"):
        lm.harvest_tokens(subject, [HOOK], documents, tmp_path, rows=whole + 1)
    plain = lm.harvest_tokens(pretrained.load(str(folder())), [HOOK], documents, tmp_path, rows=whole)[HOOK]
    manifest = ActivationStore.open(plain).manifest
    assert manifest.digest != store.digest
    assert "harvesting" not in manifest.to_json(), "stores of HUSAI's own way keep their digests"


def test_one_head_is_the_one_that_saelens_reads(folder, documents):
    from sae_lens import ActivationsStore

    hook = "blocks.1.attn.hook_z"
    subject = pretrained.load(str(folder()), harvesting=Harvesting(hook_head_index=1))
    tokens = np.array([0, 5, 6, 7, 300])
    fields = {"hook_head_index": 1, "hook_name": hook, "seqpos_slice": (None,), "model_kwargs": {}, "d_in": D // 2}
    peer = Namespace(model=subject.model, autocast_lm=False, device="cpu", **fields)
    expected = ActivationsStore.get_activations(peer, torch.from_numpy(tokens)[None])
    torch.testing.assert_close(lm.run(subject, [tokens], [hook])[hook], expected)
    losses = cross_entropies(subject, hook, [loaded.SAE(exact(torch.eye(D // 2)), "standard", None, False)], documents)
    assert losses["spliced"][0] == pytest.approx(losses["model"], abs=1e-5), "the other head stays as it is"
    assert losses["zeroed"] != pytest.approx(losses["model"], abs=1e-5)
    with pytest.raises(BadInput, match="hook_head_index"):
        lm.run(replace(subject, harvesting=Harvesting(hook_head_index=2)), [tokens], [hook])


def test_prompts_are_made_alike(folder, tmp_path):
    """The last token of a prompt, cut on the left to the SAE's context, without BOS."""
    subject, name = (
        pretrained.load(str(folder()), harvesting=Harvesting(prepend_bos=False, context_size=5)),
        "96_spam_is",
    )
    place = lm.harvest_prompts(subject, [HOOK], [name], tmp_path)
    rows = torch.load(place / f"{name}_{HOOK}.pt", weights_only=True)
    for row, prompt in zip(rows[:40], text.documents(name)[:40], strict=True):
        ids = subject.tokenizer(prompt, add_special_tokens=False)["input_ids"][-5:]
        with torch.no_grad():
            states = subject.transformer(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(row, states[-1], rtol=0, atol=1e-5)
    with pytest.raises(BadInput):  # where others look for activations of HUSAI's own way
        lm.harvest_prompts(pretrained.load(str(folder())), [HOOK], [name], tmp_path)


def test_autocast_is_saelens_autocast(folder):
    subject = pretrained.load(str(folder()), harvesting=Harvesting(autocast_lm=True))
    tokens = np.array([0, 5, 6, 7, 300])
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = subject.model.run_with_cache(torch.from_numpy(tokens)[None], names_filter=[HOOK])
    found = lm.run(subject, [tokens], [HOOK])[HOOK]
    torch.testing.assert_close(found, cache[HOOK].float())
    assert not torch.equal(found, lm.run(pretrained.load(str(folder())), [tokens], [HOOK])[HOOK])


# ---------------------------------------------------------------------------------------------------------------------
# From the files


@pytest.mark.parametrize(
    ("said", "hook_name", "key"),
    [
        ({"hook_head_index": 3}, HOOK, "hook_head_index"),
        ({"seqpos_slice": [0, -5]}, HOOK, "context_size"),
        ({"seqpos_slice": [5, None, -1]}, HOOK, "seqpos_slice"),
        ({"seqpos_slice": "all"}, HOOK, "seqpos_slice"),
        ({"context_size": 1}, HOOK, "context_size"),
        ({"prepend_bos": "yes"}, HOOK, "prepend_bos"),
        ({"exclude_special_tokens": [-1]}, HOOK, "exclude_special_tokens"),
        ({"load_in_8bit": True}, HOOK, "load_in_8bit"),
        ({"model_class_name": "HookedMamba"}, HOOK, "model_class_name"),
        ({"model_kwargs": {"start_at_layer": 1}}, HOOK, "model_kwargs"),
        ({"model_from_pretrained_kwargs": {"quantize": 4}}, HOOK, "quantize"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": "yes"}}, HOOK, "center_writing_weights"),
        ({"model_from_pretrained_kwargs": {"torch_dtype": "torch.float16"}}, HOOK, "dtype"),
        ({"model_from_pretrained_kwargs": {"checkpoint_value": 3000}, "model_name": "gpt2"}, HOOK, "checkpoint_value"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "blocks.1.ln2.hook_normalized", "fold_ln"),
        ({"model_from_pretrained_kwargs": {"fold_value_biases": True}}, "blocks.1.attn.hook_z", "fold_value_biases"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_its_key(said, hook_name, key):
    with pytest.raises(BadInput, match=key):
        Harvesting.read(said, hook_name, "checkpoint: S")


def test_what_changes_nothing_is_accepted():
    kwargs = {
        "center_writing_weights": False,
        "fold_ln": True,
        "center_unembed": True,
        "device": "cuda:0",
        "n_devices": 4,
    }
    said = {"seqpos_slice": [None], "exclude_special_tokens": False, "model_from_pretrained_kwargs": kwargs}
    read = Harvesting.read(said | {"context_size": -1, "model_class_name": "HookedTransformer"}, HOOK, "S")
    assert read.without_subject() == Harvesting()
    normalized = Harvesting.read({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "ln_final.x", "S")
    assert normalized.center_writing_weights is None, "a LayerNorm's output is the same"
    pythia = {"model_name": "pythia-70m", "model_from_pretrained_kwargs": {"checkpoint_value": 3000}}
    assert Harvesting.read(pythia, HOOK, "S").revision == "step3000"
    ours = Harvesting.read({"husai": {"training": {}}, "prepend_bos": True}, HOOK, "S")
    assert ours == Harvesting()
    assert ours.complete


ways = st.builds(
    Harvesting,
    prepend_bos=st.none() | st.booleans(),
    context_size=st.none() | st.integers(8, 64),
    seqpos_slice=st.none() | st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(7, 70)),
    exclude_special_tokens=st.none() | st.booleans() | st.tuples(st.integers(0, 9)),
    center_writing_weights=st.none() | st.booleans(),
)


@given(ways, ways, st.lists(st.integers(0, 9), min_size=8, max_size=32))
def test_one_spelling_for_one_way(one, other, tokens):
    """Ways that are one on a subject keep the same positions; a way agrees with itself and with silence."""
    tokenizer = FakeTokenizer()
    tokens = tokens[: min(way.context_size or 32 for way in (one, other))]
    a, b = one.on(tokenizer, 32, True), other.on(tokenizer, 32, True)
    assert a.on(tokenizer, 32, True) == a
    kept = a.kept(np.array(tokens))
    assert not kept[:1].any()
    positions = range(32)[slice(*one.seqpos_slice or (None,))]
    special = {0} if one.exclude_special_tokens is True else set(one.exclude_special_tokens or ())
    assert [*np.flatnonzero(kept)] == [i for i, t in enumerate(tokens) if i and i in positions and t not in special]
    if a == b:
        assert (kept == b.kept(np.array(tokens))).all()
    assert Harvesting.of_json(json.loads(json.dumps(one.to_json()))) == one
    assert agreed([("A", one), ("B", Harvesting()), ("C", OWN)], "--checkpoint") == one
    refuse_other(one, a, a, "A")
    refuse_other(Harvesting(), Harvesting(), b, "A")


class FakeTokenizer:
    """Puts token 0 before every text."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [0, 1]}


def test_ways_that_differ_are_refused():
    with pytest.raises(BadInput, match=r"^--checkpoint: prepend_bos is True in A and False in B;"):
        agreed([("A", Harvesting(prepend_bos=True)), ("B", Harvesting(prepend_bos=False))], "--checkpoint")
    with pytest.raises(BadInput, match="context_size"):
        refuse_other(OWN, OWN, Harvesting(context_size=16), "--random-model-checkpoint: R")
    with pytest.raises(BadInput, match="seqpos_slice"):
        Harvesting(seqpos_slice=(0, 1)).on(FakeTokenizer(), 32, True)
    with pytest.raises(BadInput, match="center_writing_weights"):
        CENTRED.on(FakeTokenizer(), 32, None)
    tokenizer = FakeTokenizer()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(BadInput, match="prepend_bos"):
        Harvesting(prepend_bos=True).on(tokenizer, 32, True)


def test_revision_and_dtype_agree_with_the_command_line(tmp_path):
    assert with_stated_version("pythia-70m", None, None) == "pythia-70m"
    assert with_stated_version("pythia-70m", "step3000", "bfloat16") == "pythia-70m@step3000#bfloat16"
    assert with_stated_version("pythia-70m@step3000", "step3000", None) == "pythia-70m@step3000"
    assert with_stated_version("pythia-70m#bfloat16", None, "bfloat16", "bfloat16") == "pythia-70m#bfloat16"
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "607a30d7"
    snapshot.mkdir(parents=True)
    (refs := tmp_path / "models--acme--tiny" / "refs").mkdir()
    (refs / "step1000").write_text("607a30d7")
    assert with_stated_version(snapshot, "step1000", None) == str(snapshot)
    for wrong in (
        ("pythia-70m@step1000", "step3000", None),
        ("pythia-70m#bfloat16", None, "float32"),
        ("pythia-70m", None, "bfloat16", "float32"),
        (tmp_path, "step3000", None),
        (snapshot, "step2000", None),
    ):
        with pytest.raises(BadInput, match=r"step|bfloat16"):
            with_stated_version(*wrong)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to figures


@pytest.fixture
def corpus(monkeypatch):
    few = few_texts()
    monkeypatch.setattr(text, "corpus", lambda: few)


def arguments(root: Path, folder: Path, saes: list[Path], **more) -> Namespace:
    args = {"checkpoint": saes, "reference": [], "random_model_checkpoint": [], "untrained": [], "subject": str(folder)}
    args |= {"hook_name": HOOK, "rows": 400, "text": TextSource(), "artifact_root": root / "artifacts", "dtype": None}
    args |= {"stories": None, "device": "cpu", "threads": 1, "same_model": False}
    return Namespace(**args | more)


@pytest.mark.parametrize(
    ("metadata", "way"),
    [
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, CENTRED),
        pytest.param({"prepend_bos": False}, Harvesting(prepend_bos=False), marks=pytest.mark.slow),
        ({"context_size": 8, "seqpos_slice": [1, 4]}, Harvesting(context_size=8, seqpos_slice=(1, 4))),
    ],
)
def test_an_sae_exact_on_its_own_activations_is_exact_here(folder, corpus, metadata, way, tmp_path):
    """Cases 14 and 23: the SAE spans the directions of its own activations alone, by which it reads EV 1."""
    subject = pretrained.load(str(folder()), harvesting=way)
    own = lm.harvest_tokens(subject, [HOOK], text.corpus().heldout, tmp_path / "own", rows=400)[HOOK]
    span = torch.linalg.svd(ActivationStore.open(own).read(0, 400), full_matrices=False)
    directions = span.Vh[1e-4 * span.S[0] < span.S]
    saes = []
    for seed in range(3):
        turn = torch.linalg.qr(
            torch.randn(len(directions), len(directions), generator=torch.Generator().manual_seed(seed))
        )
        about = {"context_size": 32} | metadata
        saes.append(save_sae(tmp_path / "saes" / f"s{seed}", exact(turn.Q @ directions), **about))
    args, opener = arguments(tmp_path, folder(), saes), Opener()
    assert supplied.look_over(args, opener).condition
    opened = loaded.load(args, torch.device("cpu"), opener)
    for c in opened.saes:
        assert c.record.heldout.explained_variance == pytest.approx(1, abs=1e-4)
    record = recorded(opened.harvesting, opened.subject)
    assert record["revision"] == UNKNOWN
    made = opened.store.manifest.harvesting
    assert all(record[name] == value for name, value in made.items() if name != "seqpos_slice")
    assert all(name in line(record) for name in record)

    silent = arguments(tmp_path, folder(), [save_sae(tmp_path / "silent", exact(directions))])
    (bare,) = loaded.load(silent, torch.device("cpu")).saes
    if way == CENTRED:
        assert bare.record.heldout.explained_variance < 0.6, "what it reads where the files say nothing"
    with pytest.raises(BadInput, match=r"center_writing|prepend_bos|context_size|seqpos_slice"):
        loaded.open_all(
            saes, loaded.load(silent, torch.device("cpu")).store, "checkpoint", bare_subject(folder()), tmp_path
        )


def bare_subject(folder: Path):
    return pretrained.load(str(folder))


def test_a_store_is_compared_as_far_as_it_says(make_store):
    """Without the subject nothing says how a store's inputs begin."""
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    plain = make_store(x, "plain", hook_name=HOOK)
    centred_store = make_store(x, "centred", hook_name=HOOK, harvesting=CENTRED.to_json())

    def sae(**metadata):
        return loaded.SAE({}, "standard", metadata=metadata)

    silent, ours = sae(context_size=16, prepend_bos=True), sae(husai={"training": {}})
    centred = sae(model_from_pretrained_kwargs={"center_writing_weights": True})
    head = sae(seqpos_slice=[5, None])
    for fitting, store in ((silent, plain), (ours, plain), (centred, centred_store), (silent, centred_store)):
        study.refuse_other_way(Path("S"), fitting, store)
    for other, store in ((centred, plain), (head, plain), (ours, centred_store)):
        with pytest.raises(BadInput, match="alike"):
            study.refuse_other_way(Path("S"), other, store)


def test_saes_of_one_group_agree(folder, corpus, tmp_path):
    saes = [save_sae(tmp_path / f"s{i}", exact(torch.eye(D)), prepend_bos=i == 0) for i in range(3)]
    with pytest.raises(BadInput, match="prepend_bos"):
        loaded.load(arguments(tmp_path, folder(), saes), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Rows of many times the median norm


def test_rows_of_large_norm_are_left_out_of_every_store(folder, corpus, tmp_path):
    """A transcoder's two stores leave out the same rows, those that the candidate's hook decides."""
    way, place = Harvesting(max_norm_multiple=1.1), tmp_path / "artifacts" / "activations"
    subject, plain = (pretrained.load(str(folder()), harvesting=w) for w in (way, None))
    documents, hook = text.corpus().train, "blocks.1.hook_resid_mid"
    store = ActivationStore.open(lm.harvest_tokens(subject, [HOOK], documents, place, rows=800)[HOOK])
    whole = ActivationStore.open(lm.harvest_tokens(plain, [HOOK], documents, place, rows=800)[HOOK])
    norms = whole.read(0, 800).norm(dim=1)
    keep = norms <= 1.1 * norms.median()
    assert 0 < store.manifest.dropped_rows == int((~keep).sum()) < 400
    assert torch.equal(store.read(0, store.rows), whole.read(0, 800)[keep])
    tested = Namespace(subject=subject, source=TextSource())
    read = transcoder._read_beside(tested, hook, store, place, 1)
    random_model.check_same_text(store, read)
    assert read.rows == store.rows
    assert torch.equal(*(s.labels("token", 0, s.rows) for s in (store, read)))

    saes = [save_sae(tmp_path / "s", exact(torch.eye(D)))]
    opened = loaded.load(arguments(tmp_path, folder(), saes, max_norm_multiple=1.1), torch.device("cpu"))
    assert opened.saes[0].record.heldout.dropped.max_norm_multiple == 1.1
    assert recorded(opened.harvesting, opened.subject)["max_norm_multiple"] == 1.1
    with pytest.raises(BadInput, match="--max-norm-multiple"):
        ActivationStream(subject, [HOOK], lm.Inputs.of(subject, documents, 100, 0), 64)
