"""Five architectures, small and random, with a text of one's own: from activations to the release check's page."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ROOT
from husai.subjects import tiny_lm
from miniature import few_texts

PHASE4A = "scripts/experiments/run_phase4a_reproduction.py"
FRONTIER = "scripts/experiments/run_architecture_frontier_external.py"
ABLATIONS = "scripts/experiments/run_core_ablations.py"
TRAIN = "scripts/experiments/train_husai_sae_on_cached_activations.py"
CHECK = "scripts/experiments/run_release_check.py"
CONTROL = ROOT / "docs" / "evidence" / "embedded_queue" / "phase4a_trained_vs_random" / "results.json"
HOOK = "blocks.1.hook_resid_pre"
SIZES = {"vocab_size": 400, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
SHAPES = {
    "gpt2": SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": LLAMA,
    "gemma2": LLAMA | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "qwen3": LLAMA,
}


@pytest.fixture
def texts():
    return [f"Message {i}: {t}" for i, t in enumerate(few_texts().train * 8)]


@pytest.fixture
def own(tmp_path, texts):
    """`own(architecture)` -> (folder of a model, file of its text)."""

    def make(name):
        torch.manual_seed(0)
        folder, path = tmp_path / name, tmp_path / "text.jsonl"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPES[name]))
        for p in model.parameters():  # as drawn, a block hardly changes what enters it
            p.data.mul_(4)
        model.save_pretrained(folder)
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        tokenizer = tiny_lm.train_tokenizer(texts[:600], 400)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
        path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
        return folder, path

    return make


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", SHAPES)
def test_from_a_text_to_the_page(own, texts, architecture, run_script, tmp_path):
    folder, path = own(architecture)
    text = ["--text", path, "--text-column", "body"]
    about = ["--model-name", folder, "--hook-name", HOOK, *text, "--threads", 1, "--artifact-root", tmp_path / "root"]
    small = ["--d-sae", 24, "--seeds", "1,2,3", "--batch-size", 128]

    def run(script, name, *arguments):
        out = tmp_path / name
        code, said, err = run_script(script, *about, "--output-dir", out, *arguments)
        assert code == 0, f"{script}: {err[-2000:]}"
        return json.loads((out / "results.json").read_text()), said

    found, _ = run(PHASE4A, "phase4a", *small, "--rows", 8000, "--k", 3, "--tokens", 4000, "--null-draws", 5)
    assert found["husai"]["rows"] == 8000
    assert found["husai"]["cross_entropy"]["tokens"] > 0

    study = ["--architectures", "topk,relu", "--ks", 3, "--tokens", 4000, "--rows", 8000, "--heldout-rows", 1000]
    study += ["--null-draws", 100, "--max-rows", 8, "--core-texts", 10, "--probing", "sae_probes_exact"]
    study += ["--run-saebench", "--dataset-names", "96_spam_is"]
    found, _ = run(FRONTIER, "frontier", *small, *study)
    assert found["banks"][0]["recipe"]["text"] == f"{path}?column=body"

    found, _ = run(TRAIN, "saes", *small, "--k", 3, "--tokens", 20_000, "--buffer-rows", 2048, "--heldout-rows", 1000)
    saes = [tmp_path / "saes" / m["checkpoint"] for m in found["members"]]
    given = ["--rows", 1000, "--null-draws", 100, "--max-rows", 24, "--contexts", 4, "--train-rows", 8000]
    given += ["--dataset-names", "96_spam_is", "--phase4a-results", CONTROL]
    found, said = run(CHECK, "check", "--checkpoint", *saes, *given)
    assert {p["name"]: p["reason"] for p in found["parts"] if p["reason"]} == {}, said
    assert found["text"] == f"{path}?column=body"
    assert (tmp_path / "check" / "report.html").is_file()
    part = tmp_path / "check/parts/feature_reliability"
    assert json.loads((part / "results.json").read_text())["text"] == found["text"]
    contexts = json.loads((part / "contexts.json").read_text())
    shown = ["".join(c["text"]) for f in contexts.values() for c in f["contexts"]]
    assert all(any(part in t for t in texts) for part in shown), "contexts are of the text that was named"
