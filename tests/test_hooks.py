"""Names of places in a model."""

import pytest

from husai.subjects.hooks import hook_name_of, same_model, same_place


@pytest.mark.parametrize(
    ("place", "hook"),
    [
        ("gpt_neox.layers.0", "blocks.0.hook_resid_post"),
        ("model.layers.12", "blocks.12.hook_resid_post"),
        ("model.language_model.layers.3", "blocks.3.hook_resid_post"),
        ("transformer.h.7", "blocks.7.hook_resid_post"),
        ("layers.1", "blocks.1.hook_resid_post"),
        ("h.1", "blocks.1.hook_resid_post"),
        ("layers.1.mlp", "blocks.1.mlp.hook_out"),
        ("model.layers.1.self_attn", "blocks.1.attn.hook_out"),
        ("gpt_neox.layers.1.attention", "blocks.1.attn.hook_out"),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h", "blocks.1.mlp.hook_out"),
        ("model.layers.12.self_attn.o_proj", "blocks.12.attn.hook_out"),
        ("transformer.h.3.mlp.c_proj", "blocks.3.mlp.hook_out"),
        ("model.layers.1.input_layernorm", "model.layers.1.input_layernorm"),
        ("gpt_neox.embed_in", "hook_embed"),
        ("resid_post_layer_3", "blocks.3.hook_resid_post"),
        ("mlp_out_layer_0", "blocks.0.mlp.hook_out"),
        ("attn_out_layer3", "blocks.3.attn.hook_out"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.hook_post"),
        ("somewhere.else", "somewhere.else"),
    ],
)
def test_modules_are_translated(place, hook):
    assert hook_name_of(place) == hook


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", True),
        ("blocks.1.hook_resid_pre", "gpt_neox.layers.0", True),
        ("blocks.1.hook_in", "blocks.0.hook_out", True),
        ("blocks.1.hook_mlp_out", "layers.1.mlp", False),
        ("blocks.1.mlp.out.hook_out", "layers.1.mlp", True),
        ("embed.hook_out", "hook_embed", True),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", False),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre", False),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out", False),
        ("layers.1", "layers.2", False),
    ],
)
def test_two_names_of_one_place(one, other, same):
    assert same_place(one, other) == same_place(other, one) == same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt2-small", "gpt2", True),
        ("openai-community/gpt2", "gpt2-small", True),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped", True),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b", True),
        ("acme/tiny-neox", "hub/models--acme--tiny-neox/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", True),
        ("gpt2", "gpt2-medium", False),
        ("acme/tiny-neox", "tiny_neox_v2", False),
        ("owner1/x", "owner2/x", False),
        ("owner1/x", "X", True),
        ("acme/gpt2", "openai-community/gpt2", False),
        ("acme/gpt2", "gpt2-small", True),
        ("owner2/x", "hub/models--owner1--x/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", False),
    ],
)
def test_names_of_one_model(one, other, same):
    assert same_model(one, other) == same
