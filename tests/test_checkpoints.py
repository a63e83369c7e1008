"""Checkpoints in the SAELens layout: sae_lens opens them, and what is damaged or foreign is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from husai.dictionaries import checkpoints, foreign
from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.runs.errors import BadInput
from peers import in_unit_scale


def made(architecture: str, d_in: int = 8, d_sae: int = 20) -> SAE:
    """Random weights, decoder rows of norm 1, biases that are not zero."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    transcoder = "transcoder" in architecture
    d_out = 6 if transcoder else d_in
    vectors = {name: draw(d_sae) for name in ENCODER[ARCHITECTURES[architecture]] if name != "W_enc"}
    if "threshold" in vectors:
        vectors["threshold"] = vectors["threshold"].abs()
    W_dec = torch.nn.functional.normalize(draw(d_sae, d_out))
    weights = {"W_enc": draw(d_in, d_sae), "W_dec": W_dec, "b_dec": draw(d_out), **vectors}
    if "skip" in architecture:
        weights["W_skip"] = draw(d_out, d_in)
    metadata = {"model_name": "modular_addition", "hook_name": "blocks.0.hook_resid_post", "husai": {"seed": 1}}
    return SAE(weights, architecture, 4 if architecture == "topk" else None, not transcoder, metadata)


@pytest.fixture
def sae():
    return made("topk")


def test_round_trip(sae, tmp_path):
    rate = torch.linspace(0, 1, 20)
    files = checkpoints.save(sae, tmp_path, rate)
    assert {f.name for f in files} == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    loaded = checkpoints.load(tmp_path)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert loaded.metadata["husai"] == {"seed": 1}
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert torch.equal(sparsity > -9, rate > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sae_lens_opens_it_and_computes_the_same(architecture, tmp_path):
    from sae_lens import SAE as TheirSAE

    sae = made(architecture)
    checkpoints.save(sae, tmp_path, torch.ones(20))
    theirs = TheirSAE.load_from_disk(tmp_path)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)) * 3
    features = sae.encode(x)
    assert 0 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(theirs.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae.decode(features, x), rtol=1e-5, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    again = checkpoints.load(tmp_path)
    assert torch.equal(again.encode(x), features)
    assert (again.architecture, again.k, again.subtract_b_dec) == (sae.architecture, sae.k, sae.subtract_b_dec)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "gated"])
def test_what_sae_lens_saves_is_read(kind, tmp_path):
    from sae_lens import SAE as TheirSAE
    from sae_lens.registry import get_sae_training_class

    cls, config = get_sae_training_class(kind)
    extra = {"k": 3} if "topk" in kind else {}
    extra |= {"matryoshka_widths": [8, 20]} if "matryoshka" in kind else {}
    torch.manual_seed(0)
    training = cls(config(d_in=8, d_sae=20, apply_b_dec_to_input=True, **extra))
    with torch.no_grad():
        for name, p in training.named_parameters():
            if p.ndim == 1:
                p.add_(0.1 if name != "threshold" else 0.5)
        if "batchtopk" in kind:
            training.topk_threshold.fill_(0.05)
    training.save_inference_model(tmp_path)
    theirs, ours = TheirSAE.load_from_disk(tmp_path), checkpoints.load(tmp_path)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * 2
    assert (theirs.encode(x) > 0).any()
    features = in_unit_scale(theirs.encode(x), theirs.W_dec, topk=kind == "topk")
    torch.testing.assert_close(ours.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), rtol=1e-5, atol=1e-5)


OLD = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "prepend_bos": True,
    "dataset_trust_remote_code": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
    "metadata": None,
}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("standard", {"architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}}),
        ("standard", {"architecture": None, "activation_fn_str": "relu"}),
        (
            "topk",
            {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "k": None},
        ),
        ("gated", {"activation_fn_str": "relu", "normalize_activations": False}),
    ],
)
def test_configurations_of_sae_lens_5_are_read(architecture, config, tmp_path):
    from sae_lens import SAE as TheirSAE

    sae = made(architecture)
    checkpoints.save(sae, tmp_path)
    edit_config(**OLD, **config)(tmp_path)
    loaded = checkpoints.load(tmp_path)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(TheirSAE.load_from_disk(tmp_path).encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    assert loaded.metadata["model_name"] == "gpt2-small"
    assert loaded.metadata["hook_name"] == "blocks.8.hook_resid_pre"


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "cfg.json").read_text())
        for key, value in changes.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        (folder / "cfg.json").write_text(json.dumps(config))

    return edit


def edit_weights(change):
    def edit(folder):
        weights = load_file(folder / "sae_weights.safetensors")
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "sae_weights.safetensors")

    return edit


def runs_as(**sae):
    return lambda folder: (folder / "runner_cfg.json").write_text(json.dumps({"sae": sae}))


def truncate(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "file", "named"),
    [
        (lambda f: (f / "cfg.json").unlink(), "cfg.json", ""),
        (lambda f: (f / "cfg.json").write_text("null"), "cfg.json", ""),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "sae_weights.safetensors", ""),
        (truncate, "sae_weights.safetensors", ""),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"PK\x03\x04 a pickle"), "sae_weights.safetensors", ""),
        (edit_config(architecture="relu"), "cfg.json", "architecture 'relu'"),
        (
            edit_config(normalize_activations="expected_average_only_in"),
            "cfg.json",
            "normalize_activations .*'expected",
        ),
        (edit_config(apply_b_dec_to_input=1), "cfg.json", r"apply_b_dec_to_input .*\b1\b"),
        (edit_config(activation_fn="tanh"), "cfg.json", "activation_fn 'tanh'"),
        (edit_config(finetuning_scaling_factor=True), "cfg.json", "finetuning_scaling_factor"),
        (
            edit_config(architecture="standard", k=None, rescale_acts_by_decoder_norm=True),
            "cfg.json",
            "rescale_acts_by_decoder_norm",
        ),
        (edit_config(whitening=0.1), "cfg.json", r"whitening .*0\.1"),
        (edit_config(activation_fn="relu", activation_fn_kwargs=[1]), "cfg.json", r"activation_fn_kwargs .*\[1\]"),
        (edit_config(architecture=["topk"]), "cfg.json", r"architecture \['topk'\]"),
        (
            edit_config(architecture="gated", activation_fn="topk", activation_fn_kwargs={"k": 2}),
            "cfg.json",
            "activation_fn 'topk'",
        ),
        (edit_config(metadata={"hook_name": "blocks.0.attn.hook_z"}, reshape_activations=None), "cfg.json", "hook_z"),
        (edit_config(k=21), "cfg.json", r"k 21 .*\b20\b"),
        (edit_config(k=True), "cfg.json", r"\bk .*True"),
        (edit_config(k=None), "cfg.json", r"\bk .*None"),
        (edit_config(architecture="standard", k=4), "cfg.json", r"\bk .*\b4\b.*standard"),
        (edit_config(metadata={"training_architecture_details": {"k": 5}}), "cfg.json", r"\bk .*\b4 .*\b5 "),
        (edit_config(metadata={"husai": {"k": 5}}), "cfg.json", r"\bk .*\b4 .*\b5 in metadata.husai"),
        (runs_as(k=5), "cfg.json", r"\bk .*\b4 .*\b5 in runner_cfg.json"),
        (runs_as(d_sae=16), "cfg.json", r"d_sae .*\b20 .*\b16 in runner_cfg.json"),
        (edit_config(metadata=[1]), "cfg.json", "metadata"),
        (edit_config(d_in=20, d_sae=8), "sae_weights.safetensors", "W_enc.*20, 8"),
        (edit_weights(lambda w: w.update(W_dec=w["W_dec"].T)), "sae_weights.safetensors", "W_dec.*8, 20.*W_dec.*20, 8"),
        (edit_weights(lambda w: w.update(threshold=torch.zeros(20))), "sae_weights.safetensors", "threshold"),
        (edit_weights(lambda w: w.pop("b_dec")), "sae_weights.safetensors", "b_dec"),
        (edit_weights(lambda w: w["W_dec"].fill_(float("nan"))), "sae_weights.safetensors", "NaN"),
        (edit_weights(lambda w: w["W_dec"].zero_()), "sae_weights.safetensors", "zeros"),
        (
            edit_weights(lambda w: w.update(b_enc=w["b_enc"].to(torch.complex64))),
            "sae_weights.safetensors",
            "torch.complex64",
        ),
    ],
)
def test_damaged_or_foreign_checkpoints_are_refused(sae, tmp_path, damage, file, named):
    checkpoints.save(sae, tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match=f"{tmp_path / file}.*{named}"):
        checkpoints.load(tmp_path)


def test_find(sae, tmp_path):
    with pytest.raises(BadInput, match=f"--sae-root: {tmp_path / 'none'}"):
        foreign.find(tmp_path / "none")
    with pytest.raises(BadInput, match=f"--sae-root: .*{tmp_path}"):
        foreign.find(tmp_path)
    for name in ("b", "a/deep"):
        checkpoints.save(sae, tmp_path / name)
    assert foreign.find(tmp_path) == [tmp_path / "a/deep", tmp_path / "b"]
