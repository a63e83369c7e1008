"""SAEs that train while their activations are harvested: their figures are those of a store of the same rows in the
same order, whatever the buffer lies in, and an interrupted run goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch

from husai.activations import language_model as lm
from husai.activations.store import ActivationStore, StoreWriter
from husai.activations.stream import ActivationStream
from husai.dictionaries import checkpoints
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.subjects import pretrained
from husai.subjects.sources import TextSource
from husai.training import grid as grids
from husai.training import trainer
from husai.training.trainer import Training, TrainingConfig, run_together, train
from miniature import few_texts, save_miniature

TRAIN = "scripts/experiments/train_husai_sae_on_cached_activations.py"
HOOKS = ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
CPU = torch.device("cpu")
ROWS, WINDOW = 6000, 1536
CONFIG = TrainingConfig(tokens=ROWS, batch_size=128, window_rows=WINDOW, dead_after_tokens=1000)
GRID = grids.members([1, 2], [24], [3], [3e-3], ("topk", "jumprelu"))


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Several parts, whose edges lie inside windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "PART_ROWS", 1000)
        yield


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    texts = [f"Message {i}: {t}" for i, t in enumerate(few_texts().train * 4)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("subject") / "miniature", few_texts().train)


@pytest.fixture(scope="module")
def subject(folder):
    return pretrained.load(str(folder))


@pytest.fixture(scope="module")
def inputs(subject, jsonl, tmp_path_factory):
    return lm.Inputs.of(subject, TextSource(str(jsonl)).training(), ROWS, 0, tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def stores(subject, inputs, tmp_path_factory):
    """The same rows in the same order, as stores, with 100 more rows that are held out."""
    found, root = {}, tmp_path_factory.mktemp("stores")
    for hook in HOOKS:
        (root / hook).mkdir()
        writer = StoreWriter(root / hook, 16)
        for part in inputs.parts():
            rows, _, _ = lm.rows_of_part(subject, inputs, part, [hook], "float32")
            writer.append(rows[hook])
        writer.append(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)))
        writer.finish(subject.name, subject.digest, hook, "every token but the first", 0, None, heldout_rows=100)
        found[hook] = ActivationStore.open(root / hook)
    return found


def same(a, b):
    """Whether two trainings gave the same, bit by bit."""
    (first, steps), (second, others) = a, b
    assert steps == others
    for x, y in zip(first, second, strict=True):
        assert x.curve == y.curve
        assert torch.equal(x.decoders, y.decoders)
        for name, tensor in x.sae.weights.items():
            assert torch.equal(tensor, y.sae.weights[name]), name


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_stream_gives_the_figures_of_a_store_of_its_rows_in_its_order(subject, inputs, stores, tmp_path, on_disk):
    stream = ActivationStream(subject, HOOKS, inputs, WINDOW, buffer=tmp_path / "buffer" if on_disk else None)
    trainings = [Training(s, GRID, CONFIG, CPU, tmp_path / h, in_order=True) for h, s in stream.hooks.items()]
    run_together(trainings)
    for hook, training in zip(HOOKS, trainings, strict=True):
        expected = train(stores[hook], GRID, CONFIG, CPU, tmp_path / f"store {hook}", in_order=True)
        same(training.finish(), expected)
    assert {w.shape for w in stream.windows.values()} == {(WINDOW, 16)}
    assert len([*tmp_path.glob("buffer/*.window")]) == 2 * on_disk
    stream.close()
    assert not [*tmp_path.glob("buffer/*")]


def test_one_pass_of_the_model_serves_all(subject, inputs, tmp_path, monkeypatch):
    ran = []
    kept = lm.rows_of_part
    monkeypatch.setattr(
        "husai.activations.stream.rows_of_part",
        lambda s, i, part, hooks, dtype: (ran.append((part, tuple(hooks))), kept(s, i, part, hooks, dtype))[1],
    )
    config = replace(CONFIG, curve_points=3)
    topk = [m for m in GRID if m.family == "topk"]  # jumps are calibrated on the first rows, which are made again
    stream = ActivationStream(subject, HOOKS, inputs, WINDOW)
    trainings = [Training(s, topk, config, CPU, tmp_path / h, in_order=True) for h, s in stream.hooks.items()]
    ran.clear()
    run_together(trainings)
    assert sorted(p.start for p, _ in ran) == sorted(p.start for p in inputs.parts())
    assert {hooks for _, hooks in ran} == {tuple(HOOKS)}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_stream_goes_on_where_it_stopped(subject, inputs, stores, tmp_path, monkeypatch, stop):
    """Some interruptions come between the states of two hooks."""
    expected = {h: train(stores[h], GRID, CONFIG, CPU, tmp_path / f"store {h}", in_order=True) for h in HOOKS}

    def trainings():
        stream = ActivationStream(subject, HOOKS, inputs, WINDOW)
        return [Training(s, GRID, CONFIG, CPU, tmp_path / h, in_order=True) for h, s in stream.hooks.items()]

    saves = []

    def stopped(*arguments):
        if len(saves) == stop:
            raise KeyboardInterrupt
        saves.append(arguments[2])
        return kept(*arguments)

    kept = trainer._save
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save", stopped)
        patch.setattr(trainer.time, "monotonic", iter(range(0, 10**9, 100)).__next__)
        with pytest.raises(KeyboardInterrupt):
            run_together(trainings(), seconds_between_saves=0)
    again = trainings()
    assert max(t.start for t in again) > 0
    run_together(again)
    for hook, training in zip(HOOKS, again, strict=True):
        same(training.finish(), expected[hook])


def test_what_a_stream_cannot_give_is_refused(subject, inputs, tmp_path):
    def start(config, members=GRID):
        stream = ActivationStream(subject, HOOKS[:1], inputs, config.window_rows)
        return Training(stream.hooks[HOOKS[0]], members, config, CPU, tmp_path / "x", in_order=True)

    with pytest.raises(BadInput, match="--tokens 6001: "):
        start(replace(CONFIG, tokens=ROWS + 1))
    with pytest.raises(BadInput, match="--buffer-rows 1500: "):
        start(replace(CONFIG, window_rows=1500))
    with pytest.raises(BadInput, match="transcoders"):
        start(CONFIG, grids.members([1], [24], [3], [3e-3], ("transcoder",)))


def test_streamed_training_from_the_shell(jsonl, folder, subject, run_script, refused, tmp_path):
    out = tmp_path / "out"
    arguments = ["--model-name", folder, "--hook-name", ",".join(HOOKS), "--text", jsonl, "--tokens", 4000]
    arguments += ["--seeds", "1,2", "--d-sae", 24, "--k", 3, "--batch-size", 128, "--buffer-rows", 1000]
    arguments += ["--heldout-rows", 500, "--threads", 1, "--artifact-root", tmp_path, "--output-dir", out]
    code, _, err = run_script(TRAIN, *arguments)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert [(m["hook_name"], m["seed"]) for m in results["members"]] == [(h, s) for h in HOOKS for s in (1, 2)]
    assert results["text"]["source"] == str(jsonl)
    made = [checkpoints.load(out / m["checkpoint"]).metadata["husai"] for m in results["members"]]
    assert all(m["streamed"] and m["text"] == str(jsonl) and m["subject_digest"] == subject.digest for m in made)
    assert len({m["store_digest"] for m in made}) == 2
    stores = [ActivationStore.open(p) for p in (tmp_path / "activations").iterdir() if (p / "manifest.json").exists()]
    assert {s.rows for s in stores} == {500}, "held-out rows alone lie in stores"
    assert all(s.manifest.text.heldout for s in stores)
    before = (out / "results.json").read_bytes()
    assert run_script(TRAIN, *arguments)[0] == 0
    assert (out / "results.json").read_bytes() == before
    assert Cells(out / "cells").folder.exists()

    refused("one of them expected", TRAIN, "--output-dir", out)
    refused("--hook-name: ", TRAIN, "--model-name", folder, "--output-dir", out)
    refused("--epochs: ", TRAIN, *[a for a in arguments if a not in ("--tokens", 4000)], "--epochs", 2)
    refused("--buffer-rows: ", TRAIN, "--activation-cache-dir", out, "--buffer-rows", 5)
    refused("ended early", TRAIN, *arguments[:6], "--tokens", 10**8, "--artifact-root", tmp_path, "--output-dir", out)
