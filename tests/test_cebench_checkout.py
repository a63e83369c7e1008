"""Running a checkout of CE-Bench: the real one where CEBENCH_REPO names it, and small ones for what can go wrong."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import processes
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import cebench_checkout
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.subjects import SHIPPED
from husai.subjects import text

HOOK, K = "blocks.1.hook_resid_pre", 16


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    """(decoder `[512, 256]`, checkpoint folder): a TopK SAE of random unit directions on husai-tiny."""
    W = torch.nn.functional.normalize(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = {"W_enc": W.T.contiguous(), "b_enc": torch.zeros(512), "W_dec": W, "b_dec": torch.zeros(256)}
    folder = tmp_path_factory.mktemp("sae")
    checkpoints.save(SAE(weights, "topk", K, metadata={"model_name": "husai-tiny", "hook_name": HOOK}), folder)
    return W.numpy(), folder


@pytest.fixture(scope="module")
def pairs():
    """Six pairs of film reviews; the first story is longer than husai-tiny's 256 tokens."""
    texts = text.documents("92_glue_sst2")[:12]
    found = [
        {"story1": a, "story2": b, "subject": s} for a, b, s in zip(texts[::2], texts[1::2], "aabbcc", strict=True)
    ]
    found[0]["story1"] = " ".join(texts * 4)
    return found


def published_procedure(pairs, W):
    """(contrastive, independent, interpretability), as CE-Bench computes them; W `[512, 256]`."""
    from husai.subjects.pretrained import load_transformers

    model, tokenizer, _, _ = load_transformers("husai-tiny")
    rows = []
    for pair in pairs:
        sums, counts = [], []
        for story in (pair["story1"], pair["story2"]):
            ids = tokenizer(story, truncation=True, max_length=256)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            with torch.no_grad():
                x = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0].numpy()
            pre = x @ W.T
            active = np.where(pre >= np.sort(pre, axis=1)[:, [-K]], np.maximum(pre, 0), 0)
            sums.append(active.sum(0))
            counts.append(len(ids))
        contrast = np.abs(sums[0] / counts[0] - sums[1] / counts[1])
        mean = np.abs(sum(sums) / sum(counts))
        rows.append([(d.max() - d.mean()) / d.std(ddof=1) for d in (contrast, mean, contrast + mean)])
    assert counts[0] < 256  # one story is cut, others are not
    return np.mean(rows, axis=0)


@pytest.mark.skipif("CEBENCH_REPO" not in os.environ, reason="CEBENCH_REPO names no checkout of CE-Bench")
def test_the_real_checkout_gives_the_published_procedure(dictionary, pairs, tmp_path, monkeypatch):
    W, folder = dictionary
    repo = Path(os.environ["CEBENCH_REPO"])
    monkeypatch.setenv("PYTHONPATH", str(repo))  # its old sae_lens must not come before the installed one
    result = cebench_checkout.run(repo, "husai-tiny", None, folder, pairs, tmp_path, "cpu")
    found = [result[name] for name in cebench_checkout.SCORES]
    np.testing.assert_allclose(found, published_procedure(pairs, W), atol=1e-4)
    assert result["total_rows"] == 6
    assert result["return_code"] == 0
    assert set(result["stand_ins"]) <= set(cebench_checkout.IMPORTS)
    assert not list(repo.rglob("*.pyc"))


LATER_VERSION = f"""
import json, sys
from pathlib import Path
from openai import OpenAI
from sae_lens.toolkit.pretrained_saes_directory import get_pretrained_saes_directory
from stw import Stopwatch
from transformer_lens import HookedTransformer

def run_eval_once(dataset, device, sae_release, sae_id, config):
    watch = Stopwatch(start=True, verbose=True)
    model = HookedTransformer.from_pretrained_no_processing(config.model_name, device=device, dtype=config.llm_dtype)
    ids = [model.tokenizer(row["story1"]).to(device)["input_ids"] for row in dataset]
    shapes = [list(model.run_with_cache(model.W_E.new_tensor(i).long())[1]["{HOOK}"].shape) for i in ids]
    folder = Path("interpretability_eval") / sae_release / "custom_sae"
    folder.mkdir(parents=True)
    scores = {{name: {{"max": 1.5, "mean": 0.0}} for name in {cebench_checkout.SCORES}}}
    seen = {{"ids": ids, "shapes": shapes, "k": sae_id.cfg.k, "model": config.model_name}}
    (folder / "results.json").write_text(json.dumps(scores | {{"total_rows": len(dataset)}} | seen))
    watch.lap("done"), watch.stop(), print("stopped", watch)
"""


def write_checkout(folder, code):
    """A checkout of git's with a broken sae_lens at its root."""
    for path, content in {
        "ce_bench/CE_Bench.py": code,
        "sae_lens/__init__.py": "raise RuntimeError('shadowed')",
    }.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(content)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        processes.run(git + arguments)
    return folder


@pytest.mark.slow
def test_a_later_version_gets_the_subject_and_gives_dicts(dictionary, pairs, tmp_path, monkeypatch):
    repo = write_checkout(tmp_path / "repo", LATER_VERSION)
    (repo / "sae_lens/__init__.py").write_text("raise RuntimeError('changed')")
    monkeypatch.setenv("PYTHONPATH", str(repo))
    old = tmp_path / "work" / "interpretability_eval" / "older" / "results.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    result = cebench_checkout.run(repo, "husai-tiny", 3, dictionary[1], pairs[:2], tmp_path / "work", "cpu")

    assert {result[name] for name in cebench_checkout.SCORES} == {1.5}
    assert re.fullmatch("[0-9a-f]{40}", result["commit"])
    assert result["modified"] is True
    assert not list(repo.rglob("*.pyc"))
    (results,) = (tmp_path / "work").rglob("results.json")
    seen = json.loads(results.read_text())
    tokenizer = Tokenizer.from_file(str(SHIPPED["husai-tiny"] / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    assert seen["ids"] == [tokenizer.encode(pair["story1"]).ids for pair in pairs[:2]]
    assert seen["shapes"] == [[1, len(ids), 256] for ids in seen["ids"]]
    assert len(seen["ids"][0]) == 256
    assert (seen["k"], seen["model"]) == (K, "husai-tiny-random3")
    assert "stopped" in (tmp_path / "work" / "cebench.log").read_text()


def test_no_checkout(dictionary, tmp_path):
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / cebench_checkout.SCRIPT))):
        cebench_checkout.run(tmp_path, "husai-tiny", None, dictionary[1], [], tmp_path / "work", "cpu")
    assert not (tmp_path / "work").exists()


def test_an_exit_code_is_told_with_the_last_line_and_the_log(dictionary, tmp_path, monkeypatch):
    repo = write_checkout(tmp_path / "repo", "")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback\necho 'ValueError: no such thing' >&2\necho\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckFailed) as failed:
        cebench_checkout.run(repo, "husai-tiny", None, dictionary[1], [], tmp_path / "work", "cpu")
    for told in ("3", "ValueError: no such thing", f"{tmp_path}/work/cebench.log"):
        assert told in str(failed.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, r"\b0 results\.json"),
        ('{"total_rows": 2', r"results\.json .*\b2\b"),
        ('{"total_rows": 3}', r"results\.json .*\b2\b"),
        ('{"total_rows": 2, "contrastive_score_mean": NaN}', "contrastive_score_mean .*nan"),
        ('{"total_rows": 2, "contrastive_score_mean": {"mean": 0.0}}', "contrastive_score_mean .*None"),
        ('{"total_rows": 2, "contrastive_score_mean": {"max": Infinity}}', "contrastive_score_mean .*inf"),
    ],
)
def test_a_result_that_cannot_be_used(content, named, tmp_path):
    results = tmp_path / "interpretability_eval" / "husai" / "custom_sae" / "results.json"
    results.parent.mkdir(parents=True)
    if content is not None:
        results.write_text(content)
    with pytest.raises(CheckFailed, match=named) as failed:
        cebench_checkout.read_scores(tmp_path, 2)
    assert str(failed.value).endswith("cebench.log")


def test_files_that_lie_inside_another_repository_have_no_commit(tmp_path):
    repo = write_checkout(tmp_path / "repo", "")
    assert cebench_checkout.revision(repo)["modified"] is False
    assert cebench_checkout.revision(repo / "ce_bench") == {"commit": None, "modified": None}
