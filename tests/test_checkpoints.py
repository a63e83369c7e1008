"""Checkpoints in the SAELens layout: sae_lens opens them, and what is damaged or foreign is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from husai.dictionaries import checkpoints
from husai.dictionaries.checkpoints import SAE
from husai.runs.errors import BadInput


@pytest.fixture
def sae():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    metadata = {"model_name": "modular_addition", "hook_name": "blocks.0.hook_resid_post", "husai": {"seed": 1}}
    return SAE(draw(8, 20), draw(20), draw(20, 8), draw(8), k=4, metadata=metadata)


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


def test_sae_lens_opens_it_and_computes_the_same(sae, tmp_path):
    from sae_lens import SAE as TheirSAE

    checkpoints.save(sae, tmp_path, torch.ones(20))
    theirs = TheirSAE.load_from_disk(tmp_path)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)) * 3
    features = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), sae.decode(features), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert (features > 0).sum(1).max() == 4


def test_what_sae_lens_saves_is_read(tmp_path):
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    theirs = TopKSAE(TopKSAEConfig(d_in=8, d_sae=20, k=3, apply_b_dec_to_input=True))
    with torch.no_grad():
        theirs.b_dec += 0.5
        theirs.b_enc += 0.1
    theirs.save_model(tmp_path)
    ours = checkpoints.load(tmp_path)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), rtol=1e-5, atol=1e-5)


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "cfg.json").read_text())
        for key, value in changes.items():
            if value is None:
                del config[key]
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


def truncate(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cfg.json").unlink(), "cfg.json does not exist"),
        (lambda f: (f / "cfg.json").write_text("null"), "does not hold an SAE's configuration"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "sae_weights.safetensors does not exist"),
        (truncate, "truncated or not safetensors"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"PK\x03\x04 a pickle"), "not safetensors"),
        (edit_config(architecture="relu"), "architecture 'relu' cannot be read"),
        (edit_config(normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        (edit_config(apply_b_dec_to_input=False), "apply_b_dec_to_input is False"),
        (edit_config(k=21), "k ≤ d_sae expected"),
        (edit_config(k=True), "positive whole numbers"),
        (edit_config(k=None), "'k' is missing"),
        (edit_config(metadata=[1]), "metadata is no object"),
        (edit_config(d_in=20, d_sae=8), "holds .* expected"),
        (edit_weights(lambda w: w.update(W_dec=w["W_dec"].T)), "holds .* expected"),
        (edit_weights(lambda w: w.update(threshold=torch.zeros(20))), "holds .* expected"),
        (edit_weights(lambda w: w.pop("b_dec")), "holds .* expected"),
        (edit_weights(lambda w: w["W_dec"].fill_(float("nan"))), "NaN or infinite weights"),
    ],
)
def test_damaged_or_foreign_checkpoints_are_refused(sae, tmp_path, damage, message):
    checkpoints.save(sae, tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match=message):
        checkpoints.load(tmp_path)


def test_find(sae, tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        checkpoints.find(tmp_path / "none")
    with pytest.raises(BadInput, match="no checkpoint"):
        checkpoints.find(tmp_path)
    for name in ("b", "a/deep"):
        checkpoints.save(sae, tmp_path / name)
    assert checkpoints.find(tmp_path) == [tmp_path / "a/deep", tmp_path / "b"]
