"""SAE checkpoints of other libraries, opened as ours. Which library wrote one is told by the names of its files; names
of tensors, never shapes, say which side is which."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from husai.dictionaries import checkpoints, finding, sources
from husai.dictionaries.checkpoints import checked, read_tensors, unit_decoder
from husai.dictionaries.finding import LEARNING_STEP, STEPS_FOLDER
from husai.dictionaries.keys import TABLE, Described, metadata_of
from husai.dictionaries.sae import SAE
from husai.runs.checkpoints import in_catalogue, is_name
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file
from husai.subjects.hooks import BLOCK, hook_name_of, same_place

log = logging.getLogger("husai")
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
"""Weights files of sparsify, dictionary_learning, the earlier study, Gemma Scope, and SAELens."""
UPLOAD = "model.safetensors"
"""Name of the weights in uploads to the hub, of any library and of language models."""
CONFIGS = ("cfg.json", "config.json")
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
    return unit_decoder(_open(sources.local(path)))


def _open(path: Path) -> SAE:
    openers = dict(zip(FILES, OPENERS, strict=True))
    if path.is_file():
        if path.name in openers:
            return openers[path.name](path.parent)
        if path.name == UPLOAD:
            return _upload(path.parent)
        return _learning_step(path) if LEARNING_STEP.fullmatch(path.name) else _earlier_study(path.parent, path.name)
    if len(kinds := [name for name in FILES if (path / name).is_file()]) > 1:
        raise BadInput(f"checkpoint: {path} holds {' and '.join(kinds)}; one of them expected")
    weights = weights_file(path)
    return _upload(path) if weights.name == UPLOAD else openers[weights.name](path)


def weights_file(path: Path) -> Path:
    """The file of weights of a checkpoint of any kind; of several, the first."""
    if in_catalogue(path):
        return sources.weights_of(path)[0]
    path = sources.local(path)
    names = (*FILES, UPLOAD)
    return path if path.is_file() else next((path / n for n in names if (path / n).is_file()), path / FILES[-1])


def checkpoint_sha256(path: Path) -> str:
    """What names the weights of a checkpoint of any kind."""
    return sources.sha256_of(path) if in_catalogue(path) else sha256_file(weights_file(path))


def find(root: Path, flag: str = "--sae-root", hook_name: str | None = None, untrained: bool = False) -> list[Path]:
    """The checkpoints of any kind at or below `root`, sorted: one of each training (`finding.of_each_run`).

    Args:
        hook_name: where SAEs of several places lie below `root`, those of this place.
        untrained: take a run's state before its first step where it is kept.

    Raises:
        BadInput: `root` is no folder or holds no checkpoint.
    """
    if not root.is_dir():
        raise BadInput(f"{flag}: {root} is not a folder")
    found = finding.of_each_run(finding.below(root, _here), untrained)
    if not found:
        raise BadInput(f"{flag}: no checkpoint ({', '.join(FILES)}) below {root}")
    return found if hook_name is None else _of_place(found, hook_name)


def _here(folder: Path, names: list[str]) -> list[Path]:
    """The checkpoints whose weights lie in a folder."""
    steps = [folder / name for name in names if LEARNING_STEP.fullmatch(name)] if folder.name == STEPS_FOLDER else []
    upload = UPLOAD in names and not set(FILES) & set(names) and _uploaded(folder) is not None
    return steps or ([folder] if set(FILES) & set(names) or upload else [])


def _of_place(found: list[Path], hook_name: str) -> list[Path]:
    """The checkpoints of one place of the model, where some are; else all, for a message that names one."""
    places = {path: place_of(path) for path in found}
    fitting = [path for path, place in places.items() if place and same_place(place, hook_name)]
    others = [path for path, place in places.items() if place and path not in fitting]
    if not fitting or not others:
        return found
    log.info("%s: left out with %d more SAEs of other places than %s", others[0], len(others) - 1, hook_name)
    return [path for path in found if path not in others]


def place_of(path: Path) -> str | None:
    """The place in the model that the files beside an SAE's weights say it was trained on; None where they do not."""
    folder = path.parent if path.is_file() else path
    folder = folder.parent if folder.name == STEPS_FOLDER else folder
    if (folder / FILES[0]).is_file():
        said_by_name = _hookpoint(folder)
        return said_by_name.get("hook_name") or said_by_name.get("hf_hook_name")
    for name in CONFIGS:
        if (folder / name).is_file():
            config = read_json(folder / name, "checkpoint")
            parts = [config.get(part) for part in ("metadata", "trainer")] if isinstance(config, dict) else []
            said = [part for part in (config, *parts) if isinstance(part, dict)]
            keys = ("hook_name", "hook_point", "submodule_name")
            place = next((part[key] for part in said for key in keys if part.get(key)), None)
            return None if place is None else hook_name_of(str(place))
    return None


def find_all(paths: list[Path], flag: str, hook_name: str | None = None, untrained: bool = False) -> list[Path]:
    """The checkpoints at or below these paths and names, in their order, each once. Names stay names (`sources`).

    Args:
        hook_name, untrained: as in `find`.

    Raises:
        BadInput: a path does not exist, or holds no checkpoint.
    """
    for path in paths:
        if not is_name(path) and not path.exists():
            raise BadInput(f"{flag}: {path} does not exist")
    return list(dict.fromkeys(f for path in paths for f in _at_or_below(path, flag, hook_name, untrained)))


def _at_or_below(path: Path, flag: str, hook_name: str | None, untrained: bool) -> list[Path]:
    if in_catalogue(path):
        sources.refuse_unknown(path, flag)
        return [path]
    place = sources.local(path, flag)
    below = [place] if place.is_file() else find(place, flag, hook_name, untrained)
    return [sources.pinned(path, f, flag) for f in below] if is_name(path) else below


def folder_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint that is named by its folder, by its weights file, or on the hub. An SAE of SAELens'
    catalogue has none; its name is given back."""
    if in_catalogue(checkpoint):
        return checkpoint
    checkpoint = sources.local(checkpoint)
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def _dictionary_learning(folder: Path, weights: str = "ae.pt") -> SAE:
    return _learning(folder / weights, folder / "config.json")


def _learning_step(path: Path) -> SAE:
    """RUN/checkpoints/ae_<step>.pt, whose configuration lies in RUN."""
    folder = path.parent
    folder = folder.parent if folder.name == STEPS_FOLDER else folder
    return _learning(path, folder / "config.json", finding.step_of(path))


def _learning(path: Path, at: Path, step: int | None = None) -> SAE:
    """A checkpoint of dictionary_learning.

    Args:
        at: its configuration. step: of a checkpoint from before the end of the training; 0 is the untrained state.
    """
    config, where = read_json(at, "checkpoint"), f"checkpoint: {at}"
    trainer = config.get("trainer") if isinstance(config, dict) else None
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(name, str) or name not in DICTIONARY_LEARNING:
        known = ", ".join(DICTIONARY_LEARNING)
        raise BadInput(f"{where}: trainer.dict_class {name!r}; one of {known} expected")
    if unknown := sorted(set(config) - {"trainer", "buffer"}):
        raise BadInput(f"{where}: {unknown[0]} is not known; trainer and buffer expected")
    about = TABLE["dictionary_learning config.json trainer"].split(trainer, where)
    data = TABLE["dictionary_learning config.json buffer"].split(config.get("buffer") or {}, f"{where}: buffer")
    architecture, subtract, names = DICTIONARY_LEARNING[name]
    state = _tensors(path)
    if "TopK" not in name and (trainer.get("k") is not None or "k" in state):
        raise BadInput(f"{where}: k is {trainer.get('k', state.get('k'))!r} of {name}, which has none")
    k = _k(state, trainer, path) if "TopK" in name else None
    if "threshold" not in names:
        state.pop("threshold", None)  # AutoEncoderTopK keeps one that its encode does not use
    weights = _renamed(state, names, path)
    training = {"architecture": name} | about.training | data.training | ({} if k is None else {"k": k})
    place = _place(about.activations.pop("hook_name", None), data, where)
    activations = about.activations | data.activations | place
    metadata = metadata_of(Described({}, activations, training), where=where)
    metadata |= {} if step is None else {"checkpoint_step": step}
    k = k if architecture == "topk" else None
    sae = _finished(weights, architecture, k, subtract, metadata, "dictionary_learning", path, untrained=step == 0)
    _fits(trainer, "activation_dim", sae.d_in, path)
    _fits(trainer, "dict_size", sae.d_sae, path)
    return sae


def _place(submodule: Any, buffer: Described, where: str) -> dict[str, str]:
    """Metadata of the place that dictionary_learning names, and whether its activations are that module's output."""
    io = buffer.activations.get("io", "out")
    if io not in ("in", "out"):
        raise BadInput(f"{where}: buffer: io is {io!r}; activations of one place expected, 'in' or 'out'")
    if not submodule:
        return {}
    name = hook_name_of(str(submodule))
    if io == "in" and name != submodule:  # names of modules are read as their outputs
        name = re.sub(r"hook_resid_post$", "hook_resid_pre", re.sub(r"\.hook_out$", ".hook_in", name))
    if "hook_" not in name:
        return {"hf_hook_name": str(submodule)}
    return {"hook_name": name} | ({} if name == submodule else {"hf_hook_name": str(submodule)})


def _sparsify(folder: Path, weights: str = "sae.safetensors", config_name: str = "cfg.json") -> SAE:
    path, config = folder / weights, read_json(folder / config_name, "checkpoint")
    where = f"checkpoint: {folder / config_name}"
    if not isinstance(config, dict):
        raise BadInput(f"{where} does not hold an SAE's configuration")
    own = TABLE["sparsify cfg.json"].split(config, where)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise BadInput(f"{where}: activation {config.get('activation')!r}; 'topk', not signed, expected")
    state = read_tensors(path)
    k = _k(state, config, path)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if config.get("skip_connection") else {}
    weights_of = _renamed(state, names, path)
    run = _sparsify_run(folder, k)
    training = {"architecture": "topk", "k": k} | own.training if run else {}  # cfg.json alone says too little
    metadata = metadata_of(Described({}, _hookpoint(folder), training), *run, where=where)
    sae = _finished(weights_of, "topk", k, not config.get("transcode", False), metadata, "sparsify", path)
    _fits(config, "d_in", sae.d_in, path)
    if config.get("num_latents"):  # 0: not said
        _fits(config, "num_latents", sae.d_sae, path)
    return sae


def _hookpoint(folder: Path) -> dict[str, str]:
    """Metadata of the place of sparsify's RUN/<hookpoint>/ or RUN/<hookpoint>/seed<n>/: the folder's name is all that
    says it."""
    place = folder.resolve()
    name = place.parent.name if re.fullmatch(r"seed\d+", place.name) else place.name
    hook = hook_name_of(name)
    if "hook_" in hook:
        return {"hook_name": hook, "hf_hook_name": name}
    return {"hf_hook_name": name} if BLOCK.fullmatch(name) else {}


def _sparsify_run(folder: Path, k: int) -> list[Described]:
    """Settings in sparsify's configuration of the run, one or more levels up; empty where there is none."""
    for place in list(folder.resolve().parents)[:3]:
        at = place / "config.json"
        config = read_json(at, "checkpoint") if at.is_file() else None
        if isinstance(config, dict) and isinstance(config.get("sae"), dict):
            where = f"checkpoint: {at}"
            run = TABLE["sparsify config.json"].split(config, where)
            sae = TABLE["sparsify cfg.json"].split(config["sae"], f"{where}: sae")
            if sae.computes.get("k", k) != k:
                raise BadInput(f"{where}: sae.k is {sae.computes['k']!r}, and {k} in {folder}; one k expected")
            return [Described({}, run.activations, run.training | sae.training)]
    return []


def _uploaded(folder: Path) -> Callable[[], SAE] | None:
    """How to open `model.safetensors` of a folder; None where the files beside it describe no SAE."""
    for name in CONFIGS:
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name, "checkpoint")
        if not isinstance(config, dict):
            continue
        if "trainer" in config:
            return lambda: _dictionary_learning(folder, UPLOAD)
        if "d_in" in config and ({"num_latents", "expansion_factor"} & set(config)) and "d_sae" not in config:
            return lambda name=name: _sparsify(folder, UPLOAD, name)  # type: ignore[misc]
        if "d_sae" in config:
            return lambda name=name: checkpoints.load(folder, UPLOAD, name)  # type: ignore[misc]
    return None


def _upload(folder: Path) -> SAE:
    opener = _uploaded(folder)
    if opener is None:
        raise BadInput(
            f"checkpoint: {folder / UPLOAD} has no cfg.json or config.json that describes an SAE; that of SAELens, "
            "dictionary_learning or sparsify expected beside it"
        )
    return opener()


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
    return unit_decoder(checked(sae, {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}, path))


def _gemma_scope(folder: Path) -> SAE:
    return finite(sources.open_gemma_scope(folder), folder / sources.GEMMA_SCOPE)


OPENERS: tuple[Callable[[Path], SAE], ...] = (
    _sparsify,
    _dictionary_learning,
    _earlier_study,
    _gemma_scope,
    checkpoints.load,
)
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
    untrained: bool = False,
) -> SAE:
    plain = all(t.layout == torch.strided and t.is_floating_point() for t in weights.values())
    if not plain or weights["W_enc"].ndim != 2 or weights["W_dec"].ndim != 2:
        raise BadInput(f"checkpoint: {path}: its weights are no dense matrices and vectors of floats")
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    if "threshold" in weights and weights["threshold"].ndim == 0:  # one for all features, as BatchTopK learns it
        if weights["threshold"] < 0 and not untrained:
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
    state = read_tensors(path) if path.suffix == ".safetensors" else _torch_load(path)
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
