"""Texts of any source: every format gives the same inputs, sides and splits follow the document's hash, what is left
out is counted, and what cannot be read is refused in one line."""

import gzip
import hashlib
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from husai.activations import language_model as lm
from husai.activations.store import ActivationStore
from husai.runs.errors import BadInput
from husai.runs.subjects import SubjectName, folder_of, with_version
from husai.subjects import pretrained, reading, text
from husai.subjects.sources import TextSource, with_flags
from miniature import few_texts, save_miniature

EXTRACT = "scripts/analysis/extract_activations.py"
HOOK = "blocks.1.hook_resid_pre"
datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def documents():
    """Distinct ones, none of which a probing data set holds."""
    return [f"Message {i}: {t}" for i, t in enumerate(few_texts().train * 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    return save_miniature(tmp_path_factory.mktemp("subject") / "miniature", documents[:300])


@pytest.fixture(scope="module")
def subject(folder):
    return pretrained.load(str(folder))


@pytest.fixture
def jsonl(tmp_path, documents):
    def write(texts=documents, name="a.jsonl", column="text"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({column: t, "n": i}) + "\n" for i, t in enumerate(texts)))
        return path

    return write


def is_held_out(document: str) -> bool:
    return int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 10 == 0


def test_every_format_gives_the_same_inputs(jsonl, subject, documents, tmp_path):
    lines = jsonl().read_bytes()
    rows = datasets.Dataset.from_dict({"text": documents})
    (tmp_path / "b.json").write_text(json.dumps([{"text": t} for t in documents]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as f:
        f.write(lines)
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    rows.to_parquet(tmp_path / "e.parquet")
    rows.to_csv(tmp_path / "f.csv")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows.select([0]), test=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    for i, half in enumerate((documents[:900], documents[900:])):
        (tmp_path / f"folder/{i}.txt").write_text("\n".join(half) + "\n")
    (tmp_path / "folder/README.md").write_text("not read")
    ids = [subject.tokenizer(t, add_special_tokens=False)["input_ids"] for t in documents]
    datasets.Dataset.from_dict({"ids": ids}).to_parquet(tmp_path / "ids.parquet")

    names = "a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst", "e.parquet", "f.csv", "saved", "folder"
    sources = [TextSource(str(tmp_path / name)) for name in names]
    sources.append(TextSource(str(tmp_path / "splits"), split="test"))
    sources.append(TextSource(str(tmp_path / "ids.parquet"), column="ids"))
    found = set()
    for source in sources:
        source.check()
        inputs = lm.Inputs.of(subject, source.training(), 3000, 0, tmp_path / "activations")
        found.add(inputs.digest)
        assert inputs.rows.sum() == 3000
    assert len(found) == 1

    expected = [t for t in documents if not is_held_out(t)][:8]
    read = [subject.tokenizer.decode(t[1:]) for t in inputs.tokens(range(20))]
    assert "".join(read).startswith(
        "".join(subject.tokenizer.decode(i) for t, i in zip(documents, ids, strict=True) if t in expected[:3])
    )


def test_sides_and_splits_follow_the_hash_of_a_document(jsonl, subject, documents, tmp_path):
    root, source = tmp_path / "activations", TextSource(str(jsonl()))
    sides = {
        held: [d.text for d in side.read(subject.tokenizer)]
        for held, side in ((False, source.training()), (True, source.heldout()))
    }
    assert sides[False] == [t for t in documents if not is_held_out(t)]
    assert sides[True] == [t for t in documents if is_held_out(t)]
    assert source.heldout_texts(3, subject.tokenizer) == sides[True][:3]

    splits = {}
    for rows in (4000, 9000):  # more rows: a document keeps its part of the store
        folder = lm.harvest_tokens(subject, [HOOK], source.training(), root, rows)[HOOK]
        store = ActivationStore.open(folder)
        train, heldout = ({*store.labels("document", r.start, r.stop).tolist()} for r in store.split(0.2))
        assert not train & heldout
        splits[rows] = train, heldout
    assert splits[4000][0] <= splits[9000][0]
    assert splits[4000][1] <= splits[9000][1]


def test_what_is_left_out_is_counted(jsonl, subject, documents, tmp_path):
    probing = text.documents("96_spam_is")[:7]
    rows = [*documents[:200], *documents[:30], *probing, "", *documents[200:400]]
    source = TextSource(str(jsonl(rows)))
    counts = {"documents": 0, "duplicates": 0, "probing": 0, "empty": 1}
    read = []
    for side in (source.training(), source.heldout()):
        pass_ = side.read(subject.tokenizer)
        read += [d.text for d in pass_]
        for name in ("documents", "duplicates", "probing"):
            counts[name] += pass_.record[name]
        assert pass_.record["empty"] == 1
    assert sorted(read) == sorted(documents[:400])
    assert counts == {"documents": 400, "duplicates": 30, "probing": len({*probing}), "empty": 1}


def test_the_store_names_its_text_by_content(jsonl, subject, documents, tmp_path):
    first, moved = jsonl(), jsonl(name="moved.jsonl")
    stores = []
    for root, path in (("x", first), ("y", moved)):
        documents_of = TextSource(str(path)).training()
        folder = lm.harvest_tokens(subject, [HOOK], documents_of, tmp_path / root, 2000)[HOOK]
        stores.append(ActivationStore.open(folder))
    used = stores[0].manifest.text
    assert used.source == str(first)
    assert used.revision is None
    assert 0 < used.documents < len(documents)
    assert stores[0].digest == stores[1].digest, "a place is no content"
    changed = stores[0].manifest.model_copy(update={"text": used.model_copy(update={"digest": "0" * 64})})
    assert changed.digest != stores[0].digest
    packaged = lm.harvest_tokens(subject, [HOOK], documents, tmp_path / "z", 2000)[HOOK]
    assert "text" not in json.loads((packaged / "manifest.json").read_text())


def test_a_stream_is_read_as_far_as_the_rows_need(jsonl, subject, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH", 16)
    source, pulled = TextSource(str(jsonl())), []
    kept = reading.Reading._documents

    def counted(self, batch, first):
        pulled.append(len(batch["text"]))
        return kept(self, batch, first)

    monkeypatch.setattr(reading.Reading, "_documents", counted)
    inputs = lm.Inputs.of(subject, source.training(), 500, 0, tmp_path / "few")
    assert sum(pulled) <= 300 + 16, "the tokenizer takes 256 documents at a time"
    pulled.clear()
    again = lm.Inputs.of(subject, source.training(), 500, 0, tmp_path / "few")
    assert not pulled, "found, not read again"
    for a, b in zip(inputs.tokens(range(5)), again.tokens(range(5)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(BadInput, match=r"--rows 10000000: .* \d+ rows"):
        lm.Inputs.of(subject, source.training(), 10_000_000, 0, tmp_path / "all")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=1500))
def test_digests_seen_are_a_set_of_16_bytes_each(numbers):
    """Beside Python's own set, trailing zero bytes included."""
    seen, expected = reading.Seen(), set()
    seen.RECENT = 64
    for number in numbers:
        key = number.to_bytes(2, "big") + bytes(14)
        assert seen.add(key) == (key not in expected)
        expected.add(key)
    assert sum(map(len, seen.runs)) + len(seen.recent) == len(expected)
    assert all(run.nbytes == 16 * len(run) for run in seen.runs)
    assert len(seen.runs) <= 12


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (TextSource("none.jsonl"), "--text none.jsonl: "),
        (TextSource("no/such/place"), "--text no/such/place: "),
        (TextSource("data/x.parquet"), "--text data/x.parquet: "),
        (TextSource(column="body"), "--text-column"),
    ],
)
def test_what_names_no_text_is_refused_before_anything_is_read(source, named):
    with pytest.raises(BadInput, match=named):
        source.check()


def test_texts_that_cannot_be_read_are_refused(jsonl, subject, tmp_path):
    path = jsonl()

    def read(source):
        source.check()
        return [*source.training().read(subject.tokenizer)]

    with pytest.raises(BadInput, match=r"--text-column body: .*text"):
        read(TextSource(str(path), column="body"))
    with pytest.raises(BadInput, match="--text-split test: "):
        read(TextSource(str(path), split="test"))
    (tmp_path / "mixed").mkdir()
    for name in ("a.csv", "b.txt"):
        (tmp_path / "mixed" / name).write_text("text\na\n")
    with pytest.raises(BadInput, match="2 kinds"):
        read(TextSource(str(tmp_path / "mixed")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no such file"):
        read(TextSource(str(tmp_path / "empty")))
    (tmp_path / "damaged.parquet").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"--text .*damaged\.parquet"):
        read(TextSource(str(tmp_path / "damaged.parquet")))
    with pytest.raises(BadInput, match="--text-column n: "):
        read(TextSource(str(path), column="n"))


def test_token_ids_of_another_tokenizer_are_refused(subject, documents, tmp_path):
    ids = [subject.tokenizer(t, add_special_tokens=False)["input_ids"] for t in documents]
    shuffled = torch.randperm(len(subject.tokenizer), generator=torch.Generator().manual_seed(0)).tolist()
    for name, column, named in (
        ("other", [[shuffled[i] for i in row] for row in ids], "of them again"),
        ("beyond", [[10_000_000]], "token id 10000000"),
        ("nested", [[[1, 2]]], "lists of token ids"),
    ):
        datasets.Dataset.from_dict({"ids": column}).to_parquet(path := tmp_path / f"{name}.parquet")
        with pytest.raises(BadInput, match=named):
            next(iter(TextSource(str(path), "ids").training().read(subject.tokenizer)))


def test_names_of_sources_and_subjects_come_back():
    for source in (TextSource(), TextSource("org/name:en@v1"), TextSource("a?b.jsonl", "my column", "test&more")):
        assert TextSource.parse(str(source)) == source
    assert with_flags("org/name", "body", "train") == TextSource("org/name", "body")
    assert with_flags("org/name?column=body", "text", "train") == TextSource("org/name", "body")
    for name in (SubjectName("org/m"), SubjectName("m", "step3000"), SubjectName("org/m", "main", "bfloat16")):
        assert SubjectName.parse(str(name)) == name
    assert folder_of("husai-tiny#bfloat16") == folder_of("husai-tiny")
    for subject, revision, dtype in (("husai-tiny", "main", "float32"), (None, None, "bfloat16")):
        with pytest.raises(BadInput, match=r"--(revision|dtype)"):
            with_version(subject, revision, dtype)


def test_a_subject_in_bfloat16(folder, subject, documents, tmp_path):
    """Its activations are transformers' own in bfloat16, and the store keeps them without loss."""
    from transformers import AutoModelForCausalLM

    low = pretrained.load(f"{folder}#bfloat16")
    assert low.digest != subject.digest
    assert (low.dtype, next(low.model.parameters()).dtype) == ("bfloat16", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = np.array([0, *subject.tokenizer(documents[0], add_special_tokens=False)["input_ids"]])[:32]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(lm.run(low, [tokens], [HOOK])[HOOK], expected.float(), rtol=0.02, atol=0.02)
    store = ActivationStore.open(lm.harvest_tokens(low, [HOOK], documents, tmp_path, 1000)[HOOK])
    assert store.manifest.dtype == "bfloat16"
    assert store.manifest.subject_digest == pretrained.digest_of(f"{folder}#bfloat16")


def test_extraction_from_the_shell(jsonl, folder, run_script, refused, tmp_path):
    common = ["--model-name", folder, "--hook-name", HOOK, "--rows", 2000, "--threads", 1]
    common += ["--artifact-root", tmp_path / "out"]
    path = jsonl(column="body")
    code, out, err = run_script(EXTRACT, *common, "--text", path, "--text-column", "body", "--dtype", "bfloat16")
    assert code == 0, err
    store = ActivationStore.open(tmp_path / out.split()[1])
    assert store.manifest.text.source == f"{path}?column=body"
    assert store.manifest.dtype == "bfloat16"
    assert f"{store.manifest.text.documents} documents" in out
    refused("x.jsonl: packaged, ", EXTRACT, *common, "--text", tmp_path / "x.jsonl")
    refused("--text-column and --text-split: ", EXTRACT, *common, "--text-column", "body")
    refused("goes with a language model", EXTRACT, "--text", path)
    refused("--revision step1: ", EXTRACT, *common, "--revision", "step1")


def test_a_source_that_changed_is_another_key(jsonl):
    path = jsonl()
    source = TextSource(str(path))
    before = source.fingerprint()
    assert replace(source, column="n").fingerprint() != before
    path.write_text(path.read_text() + "{}\n")
    assert source.fingerprint() != before
    assert TextSource().fingerprint() is None
