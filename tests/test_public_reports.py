"""What users of other libraries reported: checkpoints as these libraries leave them, and command lines as users type
them. Each gives the library's own figures, or one line that says what to do."""

import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT
from husai.dictionaries import foreign
from husai.evals import loaded, supplied
from husai.runs.errors import BadInput
from peers import in_unit_scale

CHECK = ROOT / "scripts" / "experiments" / "run_release_check.py"
EXTRACT = "scripts/analysis/extract_activations.py"
TINY = ROOT / "assets" / "husai-tiny"
HOOK = "blocks.1.hook_resid_pre"
X = 2 * torch.randn(60, 16, generator=torch.Generator().manual_seed(3))


def weights(architecture, d_in=256, d_sae=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g))
    w = {"W_enc": torch.randn(d_in, d_sae, generator=g), "W_dec": W_dec, "b_dec": 0.1 * torch.randn(d_in, generator=g)}
    vectors = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    w |= {name: 0.1 * torch.randn(d_sae, generator=g) for name in vectors}
    return w | ({"threshold": 0.3 * torch.rand(d_sae, generator=g)} if architecture == "jumprelu" else {})


def write(folder, config, w, name="sae_weights.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({key: t.contiguous() for key, t in w.items()}, folder / name)
    return folder


def saelens(folder, seed=0, **about):
    """A SAELens 6 SAE of husai-tiny."""
    config = {"architecture": "topk", "k": 8, "d_in": 256, "d_sae": 512, "apply_b_dec_to_input": True}
    config |= {"normalize_activations": "none", "reshape_activations": "none"}
    about = {"model_name": "husai-tiny", "hook_name": HOOK, "sae_lens_version": "6.54.12"} | about
    return write(folder, config | {"metadata": about}, weights("topk", seed=seed))


@pytest.fixture(scope="module")
def opener():
    """One model for all tests."""
    return loaded.Opener()


@pytest.fixture
def looked_over(opener, monkeypatch):
    """`looked_over(*arguments)` -> the SAEs that the release check accepts before it computes anything."""
    parse = runpy.run_path(str(CHECK))["parse"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(CHECK), *map(str, arguments)])
        args = run.args = parse()
        return supplied.named(args, supplied.look_over(args, opener), opener)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of SAELens' trainings


def runner_5(architecture, normalize, **more):
    """Fields of version 5's LanguageModelSAERunnerConfig, which its trainings write as cfg.json."""
    return {
        **{"model_name": "gpt2", "model_class_name": "HookedTransformer", "hook_name": HOOK, "hook_layer": 1},
        **{"hook_eval": "NOT_IN_USE", "hook_head_index": None, "dataset_path": "some/text", "context_size": 128},
        **{"dataset_trust_remote_code": True, "streaming": True, "is_dataset_tokenized": True, "verbose": True},
        **{"use_cached_activations": False, "cached_activations_path": None, "architecture": architecture},
        **{"d_in": 16, "d_sae": 40, "b_dec_init_method": "zeros", "expansion_factor": None, "noise_scale": 0.0},
        **{"activation_fn": "relu", "activation_fn_kwargs": {}, "normalize_sae_decoder": False, "seed": 42},
        **{"from_pretrained_path": None, "apply_b_dec_to_input": False, "decoder_orthogonal_init": False},
        **{"decoder_heuristic_init": True, "decoder_heuristic_init_norm": 0.1, "n_batches_in_buffer": 64},
        **{"init_encoder_as_decoder_transpose": True, "training_tokens": 1000000, "finetuning_tokens": 0},
        **{"store_batch_size_prompts": 16, "normalize_activations": normalize, "seqpos_slice": [None]},
        **{"device": "cpu", "act_store_device": "cpu", "dtype": "float32", "prepend_bos": True, "autocast": False},
        **{"jumprelu_init_threshold": 0.001, "jumprelu_bandwidth": 0.001, "autocast_lm": False, "compile_llm": False},
        **{"llm_compilation_mode": None, "compile_sae": False, "sae_compilation_mode": None, "lr": 5e-5},
        **{"train_batch_size_tokens": 4096, "adam_beta1": 0.9, "adam_beta2": 0.999, "mse_loss_normalization": None},
        **{"l1_coefficient": 5, "lp_norm": 1.0, "scale_sparsity_penalty_by_decoder_norm": True, "lr_end": 5e-6},
        **{"l1_warm_up_steps": 100, "lr_scheduler_name": "constant", "lr_warm_up_steps": 0, "lr_decay_steps": 200},
        **{"n_restart_cycles": 1, "finetuning_method": None, "use_ghost_grads": False, "feature_sampling_window": 1000},
        **{"dead_feature_window": 1000, "dead_feature_threshold": 1e-4, "n_eval_batches": 10, "log_to_wandb": False},
        **{"eval_batch_size_prompts": None, "log_activations_store_to_wandb": False, "wandb_project": "p"},
        **{"log_optimizer_state_to_wandb": False, "wandb_id": None, "run_name": "r", "wandb_entity": None},
        **{"wandb_log_frequency": 30, "eval_every_n_wandb_logs": 20, "resume": False, "n_checkpoints": 0},
        **{"checkpoint_path": "checkpoints/x", "model_kwargs": {}, "tokens_per_buffer": 33554432},
        **{"model_from_pretrained_kwargs": {"center_writing_weights": False}, "exclude_special_tokens": False},
        **{"sae_lens_version": "5.11.0", "sae_lens_training_version": "5.11.0"},
        **more,
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_the_last_checkpoint_of_a_saelens_5_training(architecture, normalize, tmp_path):
    from sae_lens import SAE

    more = {"activation_fn": "topk", "activation_fn_kwargs": {"k": 4}} if architecture == "topk" else {}
    w = weights(architecture, 16, 40)
    folder = write(tmp_path / "final_1000000", runner_5(architecture, normalize, **more), w)
    theirs, ours = SAE.load_from_disk(folder), foreign.open_checkpoint(folder)
    torch.testing.assert_close(ours.encode(X), theirs.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(X)), theirs(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_what_a_saelens_6_training_leaves(kind, tmp_path):
    """RUN/output by `save_inference_model`, checkpoints/<steps> by `save_model` of the class that trains."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    cls, config = get_sae_training_class(kind)
    extra = {"k": 3} if "topk" in kind else {}
    extra |= {"matryoshka_widths": [10, 40]} if "matryoshka" in kind else {}
    torch.manual_seed(0)
    training = cls(config(d_in=16, d_sae=40, **extra))
    with torch.no_grad():
        for name, p in training.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 if name == "threshold" else 0.05)
        if "batchtopk" in kind:
            training.topk_threshold.fill_(0.04)
    training.cfg.metadata.model_name, training.cfg.metadata.hook_name = "gpt2", HOOK
    training.save_inference_model(tmp_path / "output")
    training.save_model(tmp_path / "checkpoint")
    theirs = SAE.load_from_disk(tmp_path / "output")
    features = in_unit_scale(theirs.encode(X), theirs.W_dec, topk=kind == "topk")
    assert (features > 0).any()
    for folder in (tmp_path / "output", tmp_path / "checkpoint"):
        ours = foreign.open_checkpoint(folder)
        torch.testing.assert_close(ours.encode(X), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(X)), theirs(X), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Names of models, folders and places


def test_one_model_by_several_names(looked_over, tmp_path):
    commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    snapshot = tmp_path / "hub/models--acme--tiny-neox/snapshots" / commit
    saes = [saelens(tmp_path / "saes" / f"seed{seed}", seed, model_name="acme/tiny-neox") for seed in range(3)]
    places = [
        snapshot,
        tmp_path / "tiny-neox",
        tmp_path / "renamed",
        tmp_path / "hub/models--other--tiny-neox/snapshots/a",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(TINY)
        about = ["--checkpoint", *saes, "--model-name", place, "--hook-name", HOOK]
        if place in places[:2]:
            assert len(looked_over(*about)) == 3
        else:
            with pytest.raises(BadInput, match=r"^--checkpoint: .*acme/tiny-neox.*--same-model"):
                looked_over(*about)
            assert len(looked_over(*about, "--same-model")) == 3


def test_links_to_checkpoints(looked_over, tmp_path):
    """A folder of links to the last checkpoint of each training, and the hub's cache, whose files are links."""
    for seed in range(3):
        for step in ("step_1000", "final"):
            saelens(tmp_path / f"runs/seed{seed}" / step, seed * 10 + (step == "final"))
        links, blobs = tmp_path / "links", tmp_path / f"hub/snapshots/abc/seed{seed}"
        links.mkdir(exist_ok=True)
        blobs.mkdir(parents=True)
        (links / f"seed{seed}").symlink_to(tmp_path / f"runs/seed{seed}/final")
        for name in ("cfg.json", "sae_weights.safetensors"):
            (blobs / name).symlink_to(tmp_path / f"runs/seed{seed}/final" / name)
    names = [f"seed{seed}" for seed in range(3)]
    for given in ([links], sorted(links.iterdir()), [blobs.parent]):
        assert sorted(looked_over("--checkpoint", *given, "--hook-name", HOOK).values()) == names


def sparsify(folder, seed):
    w = weights("topk", seed=seed)
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 512, "k": 8}
    config |= {"multi_topk": False, "skip_connection": False, "d_in": 256}
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    return write(folder, config, tensors, "sae.safetensors")


def test_several_places_in_one_run_of_sparsify(looked_over, tmp_path):
    runs = [tmp_path / f"run{seed}" for seed in range(3)]
    for seed, run in enumerate(runs):
        for layer in (0, 1):
            sparsify(run / f"layers.{layer}", 10 * seed + layer)
        (run / "config.json").write_text("{}")
    for name in ("blocks.1.hook_resid_post", "gpt_neox.layers.1"):
        found = looked_over("--checkpoint", *runs, "--hook-name", name)
        assert sorted(found.values()) == [f"run{seed}/layers.1" for seed in range(3)]
        with pytest.raises(BadInput, match=r"run0/layers\.0 .*blocks\.0\.hook_resid_post.*blocks\.1\.hook_resid_post"):
            looked_over("--checkpoint", *[run / "layers.0" for run in runs], "--hook-name", name)


def test_places_that_are_no_hooks_are_compared_too(looked_over, tmp_path):
    saes = [sparsify(tmp_path / f"run{seed}/layers.1.input_layernorm", seed) for seed in range(3)]
    with pytest.raises(BadInput, match=r"layers\.1\.input_layernorm"):
        looked_over("--checkpoint", *saes, "--hook-name", "blocks.1.hook_resid_post")
    own = [sparsify(tmp_path / f"mine{seed}", seed) for seed in range(3)]  # called as the user likes
    assert len(looked_over("--checkpoint", *own, "--hook-name", HOOK)) == 3


EVERY_HOOK = {
    "blocks.1.hook_resid_mid": False,  # a parallel block has none
    "blocks.1.hook_mlp_in": False,
    "blocks.1.attn.hook_result": False,
    "blocks.1.hook_in": True,
    "blocks.1.attn.hook_z": True,
    "blocks.0.hook_in": True,
    "hook_embed": True,
    "embed.hook_out": True,
    "blocks.1.attn.hook_q_input": False,
    "blocks.1.ln1.hook_scale": True,
    "blocks.1.ln1.hook_normalized": True,
    "ln_final.hook_normalized": True,
    "unembed.hook_out": True,
    "blocks.1.mlp.hook_pre": True,
    "gpt_neox.layers.1": True,
    "blocks.1.hook_resid_post": True,
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVERY_HOOK)
def test_every_hook_by_name(name, run_script, refused, tmp_path):
    arguments = ["--subject", "husai-tiny", "--rows", 1500, "--artifact-root", tmp_path, "--threads", 1]
    if EVERY_HOOK[name]:
        code, _, err = run_script(EXTRACT, *arguments, "--hook-name", name)
        assert code == 0, err
    else:
        refused(f"--hook-name {name}: ", EXTRACT, *arguments, "--hook-name", name)
        assert not (tmp_path / "activations").exists()


# ---------------------------------------------------------------------------------------------------------------------
# How activations were made


@pytest.mark.parametrize(
    ("about", "applied"),
    [
        ({"prepend_bos": False}, {"prepend_bos": False}),
        ({"seqpos_slice": [10, None]}, {"seqpos_slice": [10, None]}),
        ({"context_size": 16}, {"context_size": 16}),
        ({"exclude_special_tokens": True}, {"exclude_special_tokens": True}),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, {"center_writing_weights": True}),
        ({"hook_head_index": 3}, None),
        ({"model_from_pretrained_kwargs": {"revision": "step1000"}}, None),
    ],
)
def test_activations_made_otherwise_are_not_taken_silently(about, applied, looked_over, opener, tmp_path):
    saes = [saelens(tmp_path / f"s{seed}", seed, **about) for seed in range(3)]
    given = "--checkpoint", *saes, "--hook-name", HOOK
    if applied is None:
        with pytest.raises(BadInput, match=r"hook_head_index|revision"):
            looked_over(*given)
    else:
        assert len(looked_over(*given)) == 3
        assert loaded.subject_and_harvesting(looked_over.args, opener)[1].to_json() == applied


def test_same_model_is_in_record_and_decision():
    """`Supplied.same_model` becomes part of why the decision is provisional."""
    from husai.release import gate

    confirmed = {"origin": "supplied", "same_model": "acme/x", "subject": "husai-tiny"}
    files = dict.fromkeys(gate.MAKES) | {"confirmation": gate.File("results.json", "0" * 64, confirmed)}
    decision = gate.decide(gate.Bundle(files, {}), gate.Thresholds(), {})
    assert "--same-model" in decision["unconfirmed"]
    assert "acme/x" in decision["unconfirmed"]
