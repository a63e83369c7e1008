"""SAE checkpoints of other libraries, opened as ours. Which library wrote one is told by the names of its files; names
of tensors, never shapes, say which side is which."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from husai.dictionaries import checkpoints, sources
from husai.dictionaries.checkpoints import checked, read_tensors
from husai.dictionaries.sae import SAE
from husai.runs.checkpoints import in_catalogue, is_name
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
"""torch's Linear layers store `[out, in]`: both weights are transposed on the way."""
DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

# dictionary_learning: class -> (architecture, whether b_dec is taken off the input, names of tensors -> ours)
DICTIONARY_LEARNING = {
    "AutoEncoder": ("standard", True, LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("standard", False, LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        True,
        {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec"}
        | {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", False, DIRECT | {"threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", True, LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, DIRECT | {"threshold": "threshold"}),
}
FILES = ("sae.safetensors", "ae.pt", "sae_final.pt", sources.GEMMA_SCOPE, checkpoints.WEIGHTS)
"""Of sparsify, dictionary_learning, the earlier study, Gemma Scope, and SAELens."""
# Tensors beside the weights that say nothing about encode or decode, or that are read by themselves.
BESIDE = {"k", "group_sizes", "feature_counts"}


def open_checkpoint(path: Path) -> SAE:
    """A checkpoint of SAELens (folder with `cfg.json` and `sae_weights.safetensors`; ours are such), of
    dictionary_learning (`config.json`, `ae.pt`), of sparsify (`cfg.json`, `sae.safetensors`), or of the earlier study
    (`sae_final.pt`, the file or its folder), of Gemma Scope (`params.npz`), or one that is named (`sources`).

    Raises:
        BadInput: none of these, damaged, or with settings whose meaning is not known. No code of a pickle is run.
    """
    if in_catalogue(path):
        return finite(sources.open_named(path), path)
    path, openers = sources.local(path), dict(zip(FILES, OPENERS, strict=True))
    if path.is_file():
        return openers[path.name](path.parent) if path.name in openers else _earlier_study(path.parent, path.name)
    if len(kinds := [name for name in FILES if (path / name).is_file()]) > 1:
        raise BadInput(f"checkpoint: {path} holds {' and '.join(kinds)}; one of them expected")
    return openers[weights_file(path).name](path)


def weights_file(path: Path) -> Path:
    """The file of weights of a checkpoint of any kind; of several, the first."""
    if in_catalogue(path):
        return sources.weights_of(path)[0]
    path = sources.local(path)
    return path if path.is_file() else next((path / n for n in FILES if (path / n).is_file()), path / FILES[-1])


def checkpoint_sha256(path: Path) -> str:
    """What names the weights of a checkpoint of any kind."""
    return sources.sha256_of(path) if in_catalogue(path) else sha256_file(weights_file(path))


def find(root: Path, flag: str = "--sae-root") -> list[Path]:
    """The checkpoint folders of any kind below `root`, sorted.

    Raises:
        BadInput: `root` is no folder or holds no checkpoint.
    """
    if not root.is_dir():
        raise BadInput(f"{flag}: {root} is not a folder")
    folders = sorted({path.parent for name in FILES for path in root.rglob(name)})
    if not folders:
        raise BadInput(f"{flag}: no checkpoint ({', '.join(FILES)}) below {root}")
    return folders


def find_all(paths: list[Path], flag: str) -> list[Path]:
    """The checkpoints at or below these paths and names, in their order, each once. Names stay names (`sources`).

    Raises:
        BadInput: a path does not exist, or holds no checkpoint.
    """
    for path in paths:
        if not is_name(path) and not path.exists():
            raise BadInput(f"{flag}: {path} does not exist")
    return list(dict.fromkeys(f for path in paths for f in _at_or_below(path, flag)))


def _at_or_below(path: Path, flag: str) -> list[Path]:
    if in_catalogue(path):
        sources.refuse_unknown(path, flag)
        return [path]
    place = sources.local(path, flag)
    below = [place] if place.is_file() else find(place, flag)
    return [sources.pinned(path, f, flag) for f in below] if is_name(path) else below


def folder_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint that is named by its folder, by its weights file, or on the hub. An SAE of SAELens'
    catalogue has none; its name is given back."""
    if in_catalogue(checkpoint):
        return checkpoint
    checkpoint = sources.local(checkpoint)
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def _dictionary_learning(folder: Path) -> SAE:
    path, config = folder / "ae.pt", read_json(folder / "config.json", "checkpoint")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(name, str) or name not in DICTIONARY_LEARNING:
        known = ", ".join(DICTIONARY_LEARNING)
        raise BadInput(f"checkpoint: {folder / 'config.json'}: trainer.dict_class {name!r}; one of {known} expected")
    architecture, subtract, names = DICTIONARY_LEARNING[name]
    state = _tensors(path)
    k = _k(state, trainer, path) if architecture == "topk" else None
    if "threshold" not in names:
        state.pop("threshold", None)  # AutoEncoderTopK keeps one that its encode does not use
    weights = _renamed(state, names, path)
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": _hook_name(trainer.get("submodule_name"))}
    sae = _finished(weights, architecture, k, subtract, metadata, "dictionary_learning", path)
    _fits(trainer, "activation_dim", sae.d_in, path)
    _fits(trainer, "dict_size", sae.d_sae, path)
    return checkpoints.unit_decoder(sae, path) if name == "AutoEncoder" else sae  # as its own loader does


def _hook_name(submodule: str | None) -> str | None:
    """dictionary_learning's name of a place in the model (`resid_post_layer_3`) as TransformerLens has it; None where
    it says nothing that is known."""
    places = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
    match = re.fullmatch(r"(\w+)_layer_(\d+)", submodule or "")
    if match and match[1] in places:
        return f"blocks.{match[2]}.{places[match[1]]}"
    return submodule if submodule and "hook_" in submodule else None


def _sparsify(folder: Path) -> SAE:
    path, config = folder / "sae.safetensors", read_json(folder / "cfg.json", "checkpoint")
    where = f"checkpoint: {folder / 'cfg.json'}"
    if not isinstance(config, dict):
        raise BadInput(f"{where} does not hold an SAE's configuration")
    known = {"activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk"}
    known |= {"skip_connection", "transcode", "d_in", "signed"}
    if unknown := sorted(set(config) - known):
        raise BadInput(f"{where}: {unknown[0]} is not known; it may change what the SAE computes")
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise BadInput(f"{where}: activation {config.get('activation')!r}; 'topk', not signed, expected")
    state = read_tensors(path)
    k = _k(state, config, path)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if config.get("skip_connection") else {}
    weights = _renamed(state, names, path)
    sae = _finished(weights, "topk", k, not config.get("transcode", False), {}, "sparsify", path)
    _fits(config, "d_in", sae.d_in, path)
    if config.get("num_latents"):  # 0: not said
        _fits(config, "num_latents", sae.d_sae, path)
    return sae


def _earlier_study(folder: Path, name: str = "sae_final.pt") -> SAE:
    path = folder / name
    saved = _torch_load(path)
    state = next((saved[name] for name in ("model_state_dict", "sae_state_dict") if name in saved), saved)
    if not isinstance(state, dict):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    about = saved
    state = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    has_k, has_threshold = "k" in state or "k" in about, {"threshold", "log_threshold"} & set(state)
    if "architecture" not in about and has_k and has_threshold:
        raise BadInput(f"checkpoint: {path} has both k and a threshold and no architecture: topk or batchtopk?")
    architecture = about.get("architecture", "topk" if has_k else "jumprelu" if has_threshold else "relu")
    kinds = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    if not isinstance(architecture, str) or architecture not in kinds:
        raise BadInput(f"checkpoint: {path}: architecture {architecture!r}; one of {', '.join(kinds)} expected")
    kind = kinds[architecture]
    k = _k(state, about, path) if kind == "topk" else None
    linear = "encoder.weight" in state
    names = dict(LINEAR if linear else DIRECT)
    if linear:  # takes nothing off its input, and may have no bias behind the decoder
        names["decoder.bias"] = "b_dec"
        if "decoder.weight" in state:
            state.setdefault("decoder.bias", torch.zeros(state["decoder.weight"].shape[:1]))
    if kind == "jumprelu":
        if "log_threshold" in state:
            state["threshold"] = state.pop("log_threshold").exp()
        names["threshold"] = "threshold"
    else:
        state.pop("threshold", None)
    weights = _renamed(state, names, path)
    sae = _finished(weights, kind, k, not linear, {}, "earlier study", path)
    for name, size in (("d_model", sae.d_in), ("d_sae", sae.d_sae)):
        _fits(about, name, size, path)
    return sae


def finite(sae: SAE, path: Path) -> SAE:
    """The SAE, or BadInput where a tensor is no finite float, or the decoder is zero."""
    return checked(sae, {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}, path)


def _gemma_scope(folder: Path) -> SAE:
    return finite(sources.open_gemma_scope(folder), folder / sources.GEMMA_SCOPE)


OPENERS = (_sparsify, _dictionary_learning, _earlier_study, _gemma_scope, checkpoints.load)
"""One for each of `FILES`."""


def _k(state: dict, config: dict, path: Path) -> int:
    found = [k.item() if isinstance(k, Tensor) and k.numel() == 1 else k for k in (config.get("k"), state.get("k"))]
    k = found[0] if found[0] is not None else found[1]
    if None not in found and found[0] != found[1]:
        raise BadInput(f"checkpoint: {path}: k is {found[0]!r} in its configuration and {found[1]!r} among its tensors")
    if type(k) is not int or k < 1:
        raise BadInput(f"checkpoint: {path}: k is {k!r}; a positive whole number expected")
    return k


def _fits(config: dict, name: str, size: int, path: Path) -> None:
    if config.get(name, size) != size:
        raise BadInput(f"checkpoint: {path}: {name} is {config[name]!r} in its configuration; its tensors say {size}")


def _renamed(state: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The tensors in our names, `[in, out]`; BadInput where one is missing or unknown."""
    if missing := sorted(set(names) - set(state)):
        raise BadInput(f"checkpoint: {path}: {missing[0]} is missing")
    if unknown := sorted(set(state) - set(names) - BESIDE):
        raise BadInput(f"checkpoint: {path}: {unknown[0]} is not known; it may change what the SAE computes")
    linear = {"encoder.weight", "decoder.weight"} & set(names)
    turned = {theirs for theirs in linear if state[theirs].ndim == 2}  # torch deprecates `.T` of any other shape
    return {ours: state[theirs].T if theirs in turned else state[theirs] for theirs, ours in names.items()}


def _finished(
    weights: dict[str, Tensor],
    architecture: str,
    k: int | None,
    subtract: bool,
    metadata: dict,
    source: str,
    path: Path,
) -> SAE:
    plain = all(t.layout == torch.strided and t.is_floating_point() for t in weights.values())
    if not plain or weights["W_enc"].ndim != 2 or weights["W_dec"].ndim != 2:
        raise BadInput(f"checkpoint: {path}: its weights are no dense matrices and vectors of floats")
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    if "threshold" in weights and weights["threshold"].ndim == 0:  # one for all features, as BatchTopK learns it
        if weights["threshold"] < 0:
            raise BadInput(f"checkpoint: {path}: its threshold was never learned; train it for longer")
        weights["threshold"] = weights["threshold"].expand(d_sae)
    if k is not None and k > d_sae:
        raise BadInput(f"checkpoint: {path}: k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(weights, (d_sae,))
    shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if "W_skip" in weights else {}
    weights = {name: t.contiguous() for name, t in weights.items()}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return checked(SAE(weights, architecture, k, subtract, metadata | {"husai": {"source": source}}), shapes, path)


def _tensors(path: Path) -> dict[str, Tensor]:
    state = _torch_load(path)
    if not all(isinstance(t, Tensor) for t in state.values()):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    return dict(state)


def _torch_load(path: Path) -> dict:
    """A dictionary saved by torch. Only tensors and plain values are unpickled: nothing else in a file can run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on pickles; the line below says what matters
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged archive happens to cause
        if type(error).__name__ == "UnpicklingError":
            raise BadInput(
                f"checkpoint: {path} holds more than tensors and plain values, or is no torch file"
            ) from None
        raise BadInput(
            f"checkpoint: {path} cannot be read ({(str(error) or 'it is cut off').splitlines()[0]})"
        ) from None
    if not isinstance(saved, dict):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    return saved
