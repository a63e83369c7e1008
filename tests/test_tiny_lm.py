"""The embedded language model: its text, its n-gram bars, its training, and the weights that are shipped."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import ROOT
from husai.evidence import data_sets
from husai.runs.files import sha256_file
from husai.runs.subjects import SHIPPED
from husai.subjects import text, tiny_lm
from husai.subjects.ngrams import WittenBell
from husai.subjects.tiny_lm import END, IGNORED, TinyLMConfig, Windows

SCRIPT = "scripts/training/train_tiny_lm.py"


@pytest.fixture(scope="module")
def corpus():
    return text.corpus()


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_each_data_set_lies_in_one_family_on_one_side():
    table = [name for side in data_sets.FAMILIES for name in text.names(side)]
    assert len(set(table)) == len(table)
    installed = [*text.data_folder().glob("cleaned_data/*.csv.zst"), *text.data_folder().glob("OOD data/*_OOD.csv.zst")]
    assert set(table) == {p.name.removesuffix(".csv.zst") for p in installed}
    assert len(text.binary_sets()) == 113
    assert len(text.probe_sets()) == 94
    assert set(text.expand(["ood", "36_sciq_tf"])) == {*text.names("ood"), "36_sciq_tf"}


@pytest.mark.slow
def test_tables_are_those_that_pandas_reads():
    for name in (name for side in text.FAMILIES for name in text.names(side)):
        expected = pd.read_csv(text.path_of(name), compression="zstd")[["prompt", "target"]]
        pd.testing.assert_frame_equal(text.table.__wrapped__(name), expected)


def test_no_probe_or_shifted_text_is_trained_on(corpus):
    elsewhere = text.documents_elsewhere()
    train, heldout = ({text.document_id(d) for d in part} for part in (corpus.train, corpus.heldout))
    assert (len(train), len(heldout)) == (len(corpus.train), len(corpus.heldout)), "each document once"
    assert not elsewhere & (train | heldout)
    assert not train & heldout
    assert not {d[:100] for d in corpus.train} & {d[:100] for d in corpus.heldout}
    families = dict(zip(map(text.document_id, corpus.heldout), corpus.heldout_families, strict=True))
    yelp = {text.document_id(d) for d in text.documents("111_yelp_data")}
    assert {d for d, family in families.items() if family == "yelp"} == yelp & heldout


def test_a_training_document_of_another_side_is_dropped(monkeypatch, tmp_path):
    sides = {"train": {"a": ["t"]}, "probe": {"b": ["p"]}, "ood": {"c": ["o"]}}
    texts = {"t": ["one", "two", "three", "two"], "p": ["two"], "o": ["three", "four"]}
    monkeypatch.setattr(text, "FAMILIES", sides)
    monkeypatch.setattr(text, "SIDES_APART", set())
    monkeypatch.setattr(text, "documents", texts.__getitem__)
    small = text.corpus.__wrapped__()
    assert small.train + small.heldout == ["one"]
    assert small.dropped == 2


# ---------------------------------------------------------------------------------------------------------------------
# n-grams, against the formula written out


def brute_force(documents, vocabulary, context, word):
    """P(word | context) by counting afresh; context is a tuple, oldest token first."""
    if context is None:
        return 1 / vocabulary
    followers = Counter()
    for d in documents:
        padded = [0] * len(context) + list(d)
        for i in range(len(d)):
            if tuple(padded[i : i + len(context)]) == context:
                followers[padded[i + len(context)]] += 1
    lower = brute_force(documents, vocabulary, context[1:] if context else None, word)
    total, kinds = sum(followers.values()), len(followers)
    return lower if total == 0 else (followers[word] + kinds * lower) / (total + kinds)


documents = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(documents, documents, st.integers(1, 3))
def test_witten_bell_is_the_formula(training, heldout, order):
    arrays = [[np.array(d, np.int32) for d in part] for part in (training, heldout)]
    model = WittenBell(order, 4).fit(arrays[0])
    expected = [
        brute_force(training, 4, tuple(([0] * (order - 1) + d)[i : i + order - 1]), w)
        for d in heldout
        for i, w in enumerate(d)
    ]
    np.testing.assert_allclose(model.probabilities(arrays[1]), expected, rtol=1e-12)
    for first in range(4):  # a distribution after any context
        after = [np.array([first, w], np.int32) for w in range(4)]
        assert model.probabilities(after)[1::2].sum() == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and windows


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return tiny_lm.train_tokenizer(corpus.train[:400], 400)


def test_any_text_survives_the_tokenizer(tokenizer):
    for string in ("", "plain words", "héllo – 日本語 \U0001f600\n\ttabs  and  spaces", "<not a tag>"):
        encoded = tokenizer.encode(string)
        assert encoded.ids[0] == END
        assert tokenizer.decode(encoded.ids) == string
        assert tiny_lm.tokenise(tokenizer, [string])[0].tolist() == [*encoded.ids[1:], END]
    assert tokenizer.get_vocab_size() == 400


@given(st.lists(st.integers(1, 23), min_size=1, max_size=9), st.integers(2, 7), st.integers(1, 40), st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_each_token_is_one_target_predicted_from_its_own_document(lengths, n_ctx, batch_tokens, overlap):
    overlap = min(overlap, n_ctx - 1)
    numbers = np.arange(1, sum(lengths) + 1, dtype=np.int32)  # all different: a token says where it stands
    pieces = np.split(numbers, np.cumsum(lengths)[:-1])
    document_of = {int(t): i for i, piece in enumerate(pieces) for t in piece}
    start_of = {int(piece[0]) for piece in pieces}
    windows = Windows.of(pieces, n_ctx, overlap=overlap)
    seen = []
    for chosen in windows.epoch(batch_tokens, 3):
        inputs, targets = windows.batch(chosen)
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= n_ctx
        assert len(chosen) == 1 or inputs.numel() <= batch_tokens
        for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
            scored = [t for t in y if t != IGNORED]
            skipped = 0 if y[0] != IGNORED else overlap
            assert x[0] == END
            assert x[1 + skipped : skipped + len(scored)] == scored[:-1], "each stands before the next target"
            assert len({document_of[t] for t in [*scored, *(t for t in x if t != END)]}) == 1
            assert y[0] in start_of or skipped == overlap, "with context, but at the start of a document"
            seen += scored
    assert sorted(seen) == numbers.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Training

SMALL = TinyLMConfig(
    vocabulary=400,
    n_layers=1,
    d_model=16,
    n_heads=2,
    d_mlp=32,
    n_ctx=32,
    tokens=12_000,
    batch_tokens=512,
    warmup_tokens=500,
    history_tokens=3000,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(corpus, tokenizer):
    """(training, held-out) windows of a few documents."""
    return [
        Windows.of(tiny_lm.tokenise(tokenizer, part), SMALL.n_ctx) for part in (corpus.train[:40], corpus.heldout[:8])
    ]


def test_a_batch_scores_each_window_as_if_it_were_alone(small):
    windows = small[0]
    model = tiny_lm.build_model(SMALL).eval()
    chosen = np.array([0, 5, int(windows.lengths.argmin()), 9])
    with torch.no_grad():
        alone = [tiny_lm.cross_entropy(model, *windows.batch(chosen[i : i + 1])).item() for i in range(4)]
        together = tiny_lm.cross_entropy(model, *windows.batch(chosen)).item()
        inputs, targets = windows.batch(chosen[:1])
        theirs = model(
            input_ids=torch.cat([inputs, targets[:, -1:]], 1), labels=torch.cat([inputs, targets[:, -1:]], 1)
        )
    assert together == pytest.approx(sum(alone), rel=1e-6)
    assert alone[0] / targets.numel() == pytest.approx(theirs.loss.item(), rel=1e-5)


class Killed(Exception):
    pass


def test_training_learns_and_resumes_bit_identically(small, tmp_path, monkeypatch):
    whole, history = tiny_lm.train(SMALL, *small, CPU, tmp_path / "whole")
    assert history[-1]["heldout_loss"] < history[0]["heldout_loss"] < math.log(SMALL.vocabulary) + 0.1
    assert history[-1]["tokens"] >= SMALL.tokens
    assert len(history) == 4

    original, calls = tiny_lm.cross_entropy, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) % 11 == 0:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(tiny_lm, "cross_entropy", dies)
    for _ in range(100):
        try:
            resumed, again = tiny_lm.train(SMALL, *small, CPU, tmp_path / "state", seconds_between_saves=0)
            break
        except Killed:
            continue
    assert len(calls) > 22, "it was interrupted"
    assert again == history
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_training_or_a_damaged_one_is_not_used(small, tmp_path, caplog):
    config = replace(SMALL, tokens=600)
    reference, _ = tiny_lm.train(config, *small, CPU, tmp_path / "reference")
    other, _ = tiny_lm.train(replace(config, seed=1), *small, CPU, tmp_path / "state")
    again, _ = tiny_lm.train(config, *small, CPU, tmp_path / "state")
    assert [str(tmp_path / "state") in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True]
    assert not torch.equal(reference.lm_head.weight, other.lm_head.weight)
    assert torch.equal(reference.lm_head.weight, again.lm_head.weight)
    data = bytearray((tmp_path / "state").read_bytes())
    data[-3] ^= 1
    (tmp_path / "state").write_bytes(data)
    again, _ = tiny_lm.train(config, *small, CPU, tmp_path / "state")
    assert [str(tmp_path / "state") in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True] * 2
    assert torch.equal(reference.lm_head.weight, again.lm_head.weight)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = replace(SMALL, tokens=1000, batch_tokens=10, warmup_tokens=100, decay_fraction=0.5)
    factors = [config.learning_rate_factor(t) for t in (0, 50, 200, 500, 750, 1000)]
    assert factors == pytest.approx([0.1, 0.6, 1, 1, 0.5, 0], abs=1e-12)


def test_bits_per_byte_of_every_model_by_hand(corpus, tokenizer):
    few = replace(corpus, train=corpus.train[:30], heldout=corpus.heldout[:5], heldout_families=list("aabbb"))
    model = tiny_lm.build_model(SMALL).eval()
    tokenise = lambda texts: tiny_lm.tokenise(tokenizer, texts)  # noqa: E731
    figures = tiny_lm.bits_per_byte(model, tokenise, few, SMALL.vocabulary, SMALL.n_ctx)
    bits = []
    for document in tokenise(few.heldout):
        for start in range(0, max(1, len(document) - 16), 16):
            piece = torch.from_numpy(document[start : start + 32].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=torch.cat([torch.tensor([END]), piece[:-1]])[None]).logits[0]
            of_targets = -logits.log_softmax(-1)[range(len(piece)), piece] / math.log(2)
            bits.append(of_targets[16 if start else 0 :].sum().item())
    size = sum(len(d.encode()) for d in few.heldout)
    assert figures["bytes"] == size
    assert figures["tokens"] == sum(map(len, tokenise(few.heldout)))
    assert figures["all"]["model"] == pytest.approx(sum(bits) / size, rel=1e-5)
    bigram = WittenBell(2, SMALL.vocabulary).fit(tokenise(few.train)).bits(tokenise(few.heldout))
    assert figures["all"]["bigram"] == pytest.approx(bigram.sum() / size)
    weights = [sum(len(d.encode()) for d in part) / size for part in (few.heldout[:2], few.heldout[2:])]
    for name, value in figures["all"].items():
        parts = [figures["families"][f][name] for f in "ab"]
        assert value == pytest.approx(np.dot(weights, parts))


def test_bars_are_20_percent_below_the_bigram_and_below_the_trigram():
    figures = lambda **values: {"all": values}  # noqa: E731
    holds = lambda f: [b["holds"] for b in tiny_lm.bars(f)]  # noqa: E731
    assert holds(figures(model=1.59, bigram=2.0, trigram=1.6)) == [True, True]
    assert holds(figures(model=1.61, bigram=2.0, trigram=1.7)) == [False, True]
    assert holds(figures(model=1.55, bigram=2.0, trigram=1.5)) == [True, False]


def test_the_script_makes_a_folder_and_says_that_a_bar_is_missed(corpus, run_script, refused, tmp_path, monkeypatch):
    few = replace(corpus, train=corpus.train[:60], heldout=corpus.heldout[:6], heldout_families=list("aaabbb"))
    monkeypatch.setattr(text, "corpus", lambda: few)
    arguments = ["--tokens", 600, "--batch-tokens", 512, "--vocabulary", 300, "--n-layers", 1, "--d-model", 16]
    arguments += ["--n-heads", 2, "--n-ctx", 32, "--threads", 1, "--output-dir", tmp_path / "lm"]
    code, out, err = run_script(SCRIPT, *arguments)
    assert code == 1
    assert {"bigram", "trigram"} <= set(err.splitlines()[-1].split())
    assert f"{json.loads((tmp_path / 'lm' / 'training.json').read_text())['bits_per_byte']['all']['model']:.4f}" in out
    assert {p.name for p in tmp_path.iterdir()} == {"lm", ".lm.lock"}, "no state is left behind"
    before = {p.name: p.read_bytes() for p in (tmp_path / "lm").iterdir()}
    assert run_script(SCRIPT, *arguments)[0] == 1, "found, and still below its bars"
    refused([tmp_path / "lm", "--force"], SCRIPT, *arguments, "--seed", 7)
    assert run_script(SCRIPT, *arguments, "--force")[0] == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "lm").iterdir()} == before, "trained again to the same bytes"
    refused(["--vocabulary 200: ", "257"], SCRIPT, "--vocabulary", 200)
    refused(["--d-model 30", "--n-heads 4"], SCRIPT, "--d-model", 30, "--n-heads", 4)


# ---------------------------------------------------------------------------------------------------------------------
# What the repository ships


def test_the_shipped_files_are_those_that_were_made(corpus):
    folder = SHIPPED["husai-tiny"]
    digests = json.loads((folder / "digests.json").read_text())["files"]
    assert {p.name for p in folder.iterdir()} == {*digests, "digests.json"}
    assert {name: sha256_file(folder / name) for name in digests} == digests
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6
    record = json.loads((folder / "training.json").read_text())
    assert record["data_digest"] == corpus.digest
    assert record["config"] == json.loads(json.dumps(vars(TinyLMConfig()))), "the defaults train the shipped model"
    assert record["bars"] == tiny_lm.bars(record["bits_per_byte"])
    assert all(b["holds"] for b in record["bars"])
    assert (folder / "README.md").read_text() == tiny_lm.model_card(record)
    assert str(ROOT) not in "".join(p.read_text() for p in folder.glob("*.json"))


@pytest.mark.slow
def test_the_shipped_weights_have_the_recorded_bits_per_byte(corpus):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHIPPED["husai-tiny"]
    record = json.loads((folder / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(folder)("Any text.")["input_ids"] == tokenizer.encode("Any text.").ids
    family = [d for d, f in zip(corpus.heldout, corpus.heldout_families, strict=True) if f == "yelp"]
    n_ctx = model.config.max_position_embeddings
    windows = Windows.of(tiny_lm.tokenise(tokenizer, family), n_ctx, overlap=n_ctx // 2)
    bits = tiny_lm.nats(model, windows, np.arange(len(windows.starts))) / math.log(2)
    found = bits / sum(len(d.encode()) for d in family)
    assert found == pytest.approx(record["bits_per_byte"]["families"]["yelp"]["model"], abs=2e-4)
