"""Names of places in a model: what other libraries call a place, as TransformerLens calls it."""

from __future__ import annotations

import re

from husai.runs.subjects import short_name

MODULES = {
    "": "hook_resid_post",
    "mlp": "mlp.hook_out",
    "feed_forward": "mlp.hook_out",
    "attn": "attn.hook_out",
    "attention": "attn.hook_out",
    "self_attn": "attn.hook_out",
    "self_attention": "attn.hook_out",
}
"""Module inside a block of transformers' models -> hook at its output."""
EMBEDDINGS = ("embed_in", "embed_tokens", "wte", "word_embeddings")
SUBMODULES = {"resid_post": "hook_resid_post", "mlp_out": "mlp.hook_out", "attn_out": "attn.hook_out"}
"""dictionary_learning's `<place>_layer_<n>` -> hook."""
BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks|block)\.(\d+)(?:\.([a-z_]+))?")
ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "hook_mlp_out": "mlp.hook_out",
    "hook_attn_out": "attn.hook_out",
    "attn.o.hook_out": "attn.hook_out",
    "mlp.out.hook_out": "mlp.hook_out",
    "attn.o.hook_in": "attn.hook_z",
}
"""Hook of a block -> another name of the same place, in all but a few models."""


def hook_name_of(place: str) -> str:
    """TransformerLens' name of a place that a library names by its module.

    transformers and sparsify: `gpt_neox.layers.0`, `model.layers.0.mlp`, `transformer.h.0`, `layers.0` (the output of
    the module). dictionary_learning: `resid_post_layer_0`. Any other name comes back as it is.
    """
    if "hook_" in place:
        return place
    if match := re.fullmatch(r"(\w+)_layer_(\d+)", place):
        hook = SUBMODULES.get(match[1])
        return f"blocks.{match[2]}.{hook}" if hook else place
    if (match := BLOCK.fullmatch(place)) and (match[2] or "") in MODULES:
        return f"blocks.{int(match[1])}.{MODULES[match[2] or '']}"
    return "hook_embed" if place.rpartition(".")[2] in EMBEDDINGS else place


def canonical(place: str) -> str:
    """One name for all names of a place: the output of a block is the input of the next one."""
    name = hook_name_of(place)
    if name == "embed.hook_out":
        return "hook_embed"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    block, hook = int(match[1]), ALIASES.get(match[2], match[2])
    return f"blocks.{block + 1}.hook_resid_pre" if hook == "hook_resid_post" else f"blocks.{block}.{hook}"


def same_place(one: str, other: str) -> bool:
    """Whether two names are of one place, as far as names say.

    Limit: models that normalise the output of a block's parts (Gemma 2) compute other values at `hook_mlp_out` than at
    `mlp.hook_out`. Names cannot say so.
    """
    return canonical(one) == canonical(other)


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: case and owner aside, or by TransformerLens' aliases."""
    names = [short_name(n).lower() for n in (one, other)]
    if names[0] == names[1]:
        return True
    from transformer_lens.supported_models import MODEL_ALIASES

    known = ({n.rpartition("/")[2].lower() for n in (full, *short)} for full, short in MODEL_ALIASES.items())
    return any(set(names) <= names_of_one for names_of_one in known)
