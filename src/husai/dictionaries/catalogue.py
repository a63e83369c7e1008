"""Lists SAELens' catalogue: facts of each SAE from its name and the local hub cache, and whether HUSAI can judge it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from husai.dictionaries import foreign, sources
from husai.runs.checkpoints import CATALOGUE, in_catalogue
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY, read_json, write_json
from husai.runs.subjects import short_name
from husai.subjects.hooks import hook_name_of, same_model

OPENED = REPOSITORY / "docs" / "opened_saes.json"
"""SAEs that someone opened from the hub (`record_opened`)."""
IMITATED = {
    "connor_rob_hook_z": "one `.pt` file; rows of all heads side by side",
    "deepseek_r1": "one `.pt` file",
    "dictionary_learning_1": "`ae.pt` and `config.json` of dictionary_learning",
    "gemma_2": "`params.npz`; model and hook by the names of folders",
    "gemma_2_transcoder": "`params.npz`; model and hook by the names of folders",
    "gemma_3": "`params.safetensors`; model and hook by the names of folders",
    "goodfire": "one `.pt` or `.pth` file",
    "llama_scope": "`hyperparams.json` and safetensors; the scale of activations folded in",
    "llama_scope_r1_distill": "`config.json` and safetensors; the scale of activations folded in",
    "mntss_clt_layer_transcoder": "one layer of a cross-layer transcoder, its decoders summed: for encode alone",
    "mwhanna_transcoder": "safetensors and YAML",
    "qwen_scope": "one `.pt` file",
    "sae_lens": "`cfg.json` and safetensors of SAELens 2 to 6",
    "temporal": "`conf.yaml` and safetensors",
}
"""Loader of the catalogue -> the files that it reads. A test opens an imitation of each loader's repositories."""
TRANSCODERS = {"gemma_2_transcoder", "mntss_clt_layer_transcoder", "mwhanna_transcoder"}
REFUSED = {"temporal": "temporal"}
"""Loader -> the setting because of which `sources.behind` refuses all SAEs of this loader."""


@dataclass(frozen=True)
class Listed:
    """An SAE of the catalogue. A value is None if neither a name nor the local hub cache states it."""

    name: str
    """Argument of `--checkpoint`: release and id."""
    model: str
    hook: str | None
    width: str | None
    architecture: str | None
    loader: str
    status: str
    """`named`, `tested` or `opened`."""
    judged: str
    """`yes`, or why the release check does not judge it."""


def listed(model: str | None = None) -> list[Listed]:
    """The SAEs of the catalogue.

    Args:
        model: list only SAEs of this model, which may have any of its names (`hooks.same_model`).

    Raises:
        BadInput: the catalogue has no SAE of this model.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entries = get_pretrained_saes_directory().values()
    chosen = [entry for entry in entries if model is None or same_model(entry.model, model)]
    if model is not None and not chosen:
        models = {short_name(entry.model).lower() for entry in entries}
        similar = difflib.get_close_matches(short_name(model).lower(), models, 5) or sorted(models)
        raise BadInput(
            f"--model {model}: SAELens' catalogue has no SAE of it; one such as {', '.join(similar)} expected"
        )
    opened = {each["name"] for each in read_opened()}
    with sources.cached_only():
        loaders, _ = sources.loaders_that_run_nothing()
        fetch, shapes = loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes
        entries_listed: list[Listed] = []
        for entry in chosen:  # without a cached repository, names are the only source
            cached = _is_cached(entry.repo_id)
            loaders.hf_hub_download = fetch if cached else _absent
            loaders.get_safetensors_tensor_shapes = partial(_shapes, shapes if cached else _absent)
            entries_listed += _of(entry, loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, opened)
        return entries_listed


def _is_cached(repo: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").exists()


def _of(entry: Any, getters: dict, opened: set[str]) -> Iterator[Listed]:
    """The SAEs of a release.

    Args:
        getters: SAELens' table, loader -> function that reads a configuration.
    """
    loader = entry.conversion_func or "sae_lens"
    read = partial(_or_none, getters[loader], entry.repo_id)
    for sae_id, path in entry.saes_map.items():
        config = read(path, "cpu", False, {**(entry.config_overrides or {})}) or {}
        config |= config.get("metadata") or {}
        width = config.get("d_sae") or _width_in(f"{sae_id} {path}")
        architecture = config.get("architecture")
        if "topk" in (config.get("activation_fn"), config.get("activation_fn_str")):
            architecture = "topk"
        name = f"{CATALOGUE}{entry.release}/{sae_id}"
        yield Listed(
            name=name,
            model=entry.model,
            hook=config.get("hook_name") or config.get("hook_point") or _hook_in(sae_id),
            width=str(width) if width else None,
            architecture=architecture,
            loader=loader,
            status="opened" if name in opened else "tested" if loader in IMITATED else "named",
            judged=_judged(loader, architecture),
        )


def _absent(*_: Any, **__: Any) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not cached")


def _shapes(read: Any, repo: str, filename: str) -> dict:
    return _or_none(read, repo, filename) or {"w_enc": [None, None], "w_dec": [None]}


def _or_none(function: Any, *arguments: Any) -> Any:
    """Result of a function of SAELens; None if a file is missing or a name is uninformative."""
    try:
        return function(*arguments)
    except Exception:  # a listing may be incomplete; opening the SAE reports the error
        return None


def _hook_in(sae_id: str) -> str | None:
    """Hook in an id, in the spelling of TransformerLens or of dictionary_learning; None without a hook."""
    if hook := re.match(r"blocks\.\d+\.(?:attn\.)?hook_[a-z]+(?:_(?:pre|mid|post|out|z))?", sae_id):
        return hook[0]
    place = re.match(r"[a-z_]+_layer_\d+", sae_id)
    hook_name = hook_name_of(place[0]) if place else None
    return hook_name if hook_name and "hook_" in hook_name else None


def _width_in(name: str) -> str | None:
    """Width in a name: an exact number, or thousands such as `16k`; None without a width."""
    match = re.search(r"width[_-](?:2pow(\d+)|(\d+[km])(?![a-z0-9]))", name)
    return None if match is None else str(2 ** int(match[1])) if match[1] else match[2]


def _judged(loader: str, architecture: str | None) -> str:
    setting = REFUSED.get(loader) or (architecture if architecture in sources.REFUSED else None)
    if setting:
        return f"no: {setting}: {sources.REFUSED[setting]}"
    if loader in TRANSCODERS or "transcoder" in (architecture or ""):
        return "no: a transcoder, which is opened for encode and decode"
    return "yes"


# ---------------------------------------------------------------------------------------------------------------------
# SAEs that someone opened from the hub


def read_opened() -> list[dict]:
    """One entry for each opened SAE: name, sha256, architecture and shape. Empty if nobody opened one.

    Raises:
        BadInput: the file is damaged.
    """
    return read_json(OPENED, "opened SAEs") if OPENED.is_file() else []


def record_opened(names: list[str]) -> list[dict]:
    """Open SAEs of the catalogue, downloading files that the cache lacks, and record them; returns their entries.

    Raises:
        BadInput: an SAE cannot be opened.
    """
    entries = [_entry(Path(name)) for name in names]
    others = [each for each in read_opened() if each["name"] not in names]
    write_json(OPENED, sorted([*others, *entries], key=lambda each: each["name"]))
    return entries


def _entry(name: Path) -> dict:
    if not in_catalogue(name):
        raise BadInput(f"--open: {name} is no name in SAELens' catalogue; sae-lens:RELEASE/SAE_ID expected")
    sae = foreign.open_checkpoint(name)
    entry = {"name": str(name), "sha256": foreign.checkpoint_sha256(name), "architecture": sae.architecture}
    return entry | {"d_in": sae.d_in, "d_sae": sae.d_sae, "hook_name": sae.metadata.get("hook_name")}
