"""Names of places in a model. Names of other libraries are translated into TransformerLens' names."""

from __future__ import annotations

import re
from functools import cache

from husai.runs.subjects import hub_name

MODULES = {
    "": "hook_resid_post",
    **dict.fromkeys(("mlp", "feed_forward"), "mlp.hook_out"),
    **dict.fromkeys(("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj", "mlp.fc2", "fc2"), "mlp.hook_out"),
    **dict.fromkeys(("attn", "attention", "self_attn", "self_attention"), "attn.hook_out"),
    **dict.fromkeys(("self_attn.o_proj", "self_attn.out_proj", "attention.dense", "attn.c_proj"), "attn.hook_out"),
}
"""Module inside a block of transformers' models -> hook at the module's output."""
EMBEDDINGS = ("embed_in", "embed_tokens", "wte", "word_embeddings")
SUBMODULES = {
    **{"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid"},
    **dict.fromkeys(("resid_post", "resid_out", "resid"), "hook_resid_post"),
    **dict.fromkeys(("mlp_out", "mlp"), "mlp.hook_out"),
    **dict.fromkeys(("attn_out", "attn"), "attn.hook_out"),
}
"""dictionary_learning's `<place>_layer_<n>` or `<place>_layer<n>` -> hook."""
BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks|block)\.(\d+)(?:\.([a-z_0-9.]+))?")
ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.o.hook_out": "attn.hook_out",
    "mlp.out.hook_out": "mlp.hook_out",
    "attn.o.hook_in": "attn.hook_z",
}
"""Hook of a block -> another name of the same place, in every model."""


def hook_name_of(place: str) -> str:
    """TransformerLens' name of a place that a library names by a module.

    transformers and sparsify: `gpt_neox.layers.0`, `model.layers.0.mlp`, `transformer.h.0`, `layers.0` (the output of
    the module). dictionary_learning: `resid_post_layer_0`. Any other name is returned unchanged.
    """
    if "hook_" in place:
        return place
    if match := re.fullmatch(r"(\w+?)_layer_?(\d+)", place):
        hook = SUBMODULES.get(match[1])
        return f"blocks.{match[2]}.{hook}" if hook else place
    if (match := BLOCK.fullmatch(place)) and (match[2] or "") in MODULES:
        return f"blocks.{int(match[1])}.{MODULES[match[2] or '']}"
    return "hook_embed" if place.rpartition(".")[2] in EMBEDDINGS else place


def canonical(place: str) -> str:
    """Canonical name of a place. The output of a block and the input of the next block are one place."""
    name = hook_name_of(place)
    if name == "embed.hook_out":
        return "hook_embed"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    block, hook = int(match[1]), ALIASES.get(match[2], match[2])
    return f"blocks.{block + 1}.hook_resid_pre" if hook == "hook_resid_post" else f"blocks.{block}.{hook}"


def same_place(one: str, other: str) -> bool:
    """True if two names mean one place in every model.

    `hook_mlp_out` and `mlp.hook_out` are two places in models that normalise the outputs of attention and MLP (Gemma
    2), and one place in most other models. `LanguageModel.same_place` decides for an opened model.
    """
    return canonical(one) == canonical(other)


def same_model(one: str, other: str) -> bool:
    """True if two names mean one model. Case does not matter, and TransformerLens' aliases count.

    A name without an owner matches every owner.
    """
    if (names := [hub_name(n).lower() for n in (one, other)])[0] == names[1]:
        return True
    (owner, name), (other_owner, other_name) = map(_owner_and_name, names)
    return name == other_name and (not owner or not other_owner or owner == other_owner)


def _owner_and_name(hub_name: str) -> tuple[str, str]:
    """(owner, name) of a model. An alias is replaced by TransformerLens' main name."""
    owner, _, name = hub_name.rpartition("/")
    return owner, _aliases().get(name, name)


@cache
def _aliases() -> dict[str, str]:
    """Lower-case alias -> name of the model, without owners."""
    from transformer_lens.supported_models import MODEL_ALIASES

    plain = {full.rpartition("/")[2].lower(): aliases for full, aliases in MODEL_ALIASES.items()}
    return {a.rpartition("/")[2].lower(): name for name, aliases in plain.items() for a in aliases}
