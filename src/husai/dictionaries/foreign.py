"""SAE checkpoints of other libraries, opened as ours. Which library wrote one is told by the names of its files; names
of tensors, never shapes, say which side is which."""

from __future__ import annotations

import pickle
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor

from husai.dictionaries import checkpoints
from husai.dictionaries.checkpoints import checked, read_tensors
from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from husai.runs.files import read_json

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
FILES = ("sae.safetensors", "ae.pt", "sae_final.pt", checkpoints.WEIGHTS)
"""Of sparsify, dictionary_learning, the earlier study, and SAELens."""
# Tensors beside the weights that say nothing about encode or decode, or that are read by themselves.
BESIDE = {"k", "group_sizes", "feature_counts"}


def open_checkpoint(path: Path) -> SAE:
    """A checkpoint of SAELens (folder with `cfg.json` and `sae_weights.safetensors`; ours are such), of
    dictionary_learning (`config.json`, `ae.pt`), of sparsify (`cfg.json`, `sae.safetensors`), or of the earlier study
    (`sae_final.pt`, the file or its folder).

    Raises:
        BadInput: none of these, damaged, or with settings whose meaning is not known. No code of a pickle is run.
    """
    openers = dict(zip(FILES, (_sparsify, _dictionary_learning, _earlier_study, checkpoints.load), strict=True))
    return _earlier_study(path.parent, path.name) if path.is_file() else openers[weights_file(path).name](path)


def weights_file(path: Path) -> Path:
    """The file whose sha256 names a checkpoint of any kind."""
    return path if path.is_file() else next((path / n for n in FILES if (path / n).is_file()), path / FILES[-1])


def find(root: Path) -> list[Path]:
    """The checkpoint folders of any kind below `root`, sorted.

    Raises:
        BadInput: `root` is no folder or holds no checkpoint.
    """
    if not root.is_dir():
        raise BadInput(f"--sae-root: {root} is not a folder")
    folders = sorted({path.parent for name in FILES for path in root.rglob(name)})
    if not folders:
        raise BadInput(f"--sae-root: no checkpoint ({', '.join(FILES)}) below {root}")
    return folders


def _dictionary_learning(folder: Path) -> SAE:
    path, config = folder / "ae.pt", read_json(folder / "config.json", "checkpoint")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if name not in DICTIONARY_LEARNING:
        known = ", ".join(DICTIONARY_LEARNING)
        raise BadInput(f"checkpoint: {folder / 'config.json'}: trainer.dict_class {name!r}; one of {known} expected")
    architecture, subtract, names = DICTIONARY_LEARNING[name]
    state = _tensors(path)
    k = _k(state, trainer, path) if architecture == "topk" else None
    if "threshold" not in names:
        state.pop("threshold", None)  # AutoEncoderTopK keeps one that its encode does not use
    weights = _renamed(state, names, path)
    if name == "AutoEncoder":  # its own loader scales decoder rows to norm 1 in this way
        norms = weights["W_dec"].norm(dim=1)
        weights |= {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}
        weights["W_dec"] = weights["W_dec"] / norms.unsqueeze(1)
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    return _finished(weights, architecture, k, subtract, metadata, "dictionary_learning", path)


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
    return _finished(weights, "topk", k, not config.get("transcode", False), {}, "sparsify", path)


def _earlier_study(folder: Path, name: str = "sae_final.pt") -> SAE:
    path = folder / name
    saved = _torch_load(path)
    state = next((saved[name] for name in ("model_state_dict", "sae_state_dict") if name in saved), saved)
    if not isinstance(state, dict):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    about = {} if state is saved else saved
    state = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    architecture = about.get("architecture") or ("topk" if "k" in state or "k" in about else "relu")
    kinds = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    if architecture not in kinds:
        raise BadInput(f"checkpoint: {path}: architecture {architecture!r}; one of {', '.join(kinds)} expected")
    kind = kinds[architecture]
    k = _k(state, about, path) if kind == "topk" else None
    linear = "encoder.weight" in state
    names = dict(LINEAR if linear else DIRECT)
    if linear:  # takes nothing off its input, and may have no bias behind the decoder
        names["decoder.bias"] = "b_dec"
        if "decoder.weight" in state:
            state.setdefault("decoder.bias", torch.zeros(len(state["decoder.weight"])))
    if kind == "jumprelu":
        if "log_threshold" in state:
            state["threshold"] = state.pop("log_threshold").exp()
        names["threshold"] = "threshold"
    else:
        state.pop("threshold", None)
    weights = _renamed(state, names, path)
    for name, size in (("d_model", len(weights["W_enc"])), ("d_sae", len(weights["W_dec"]))):
        if name in about and about[name] != size:
            raise BadInput(f"checkpoint: {path}: {name} is {about[name]!r}; its tensors say {size}")
    return _finished(weights, kind, k, not linear, {}, "earlier study", path)


def _k(state: dict, config: dict, path: Path) -> int:
    k = config.get("k", state.get("k"))
    k = int(k) if isinstance(k, Tensor) and k.numel() == 1 else k
    if type(k) is not int or k < 1:
        raise BadInput(f"checkpoint: {path}: k is {k!r}; a positive whole number expected")
    return k


def _renamed(state: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The tensors in our names, `[in, out]`; BadInput where one is missing or unknown."""
    if missing := sorted(set(names) - set(state)):
        raise BadInput(f"checkpoint: {path}: {missing[0]} is missing")
    if unknown := sorted(set(state) - set(names) - BESIDE):
        raise BadInput(f"checkpoint: {path}: {unknown[0]} is not known; it may change what the SAE computes")
    turned = {"encoder.weight", "decoder.weight"}
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
    if weights["W_enc"].ndim != 2 or weights["W_dec"].ndim != 2:
        raise BadInput(f"checkpoint: {path}: encoder and decoder are no matrices")
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    if "threshold" in weights and weights["threshold"].ndim == 0:  # one for all features, as BatchTopK learns it
        if weights["threshold"] < 0:
            raise BadInput(f"checkpoint: {path}: its threshold was never learned; train it for longer")
        weights["threshold"] = weights["threshold"].expand(d_sae)
    if k is not None and k > d_sae:
        raise BadInput(f"checkpoint: {path}: k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    shapes = dict.fromkeys(weights, (d_sae,))
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
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"checkpoint: {path} holds more than tensors and plain values, or is no torch file") from None
    except (OSError, RuntimeError, EOFError, ValueError, BadZipFile) as error:
        raise BadInput(
            f"checkpoint: {path} cannot be read ({(str(error) or 'it is cut off').splitlines()[0]})"
        ) from None
    if not isinstance(saved, dict):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    return saved
