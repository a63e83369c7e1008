"""Opens SAE checkpoints of other libraries. The names of files identify the library. The names of tensors, never their
shapes, identify encoder and decoder."""

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
from husai.runs.checkpoints import in_catalogue, is_name, refuse_none
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file
from husai.subjects.hooks import BLOCK, hook_name_of, same_place

log = logging.getLogger("husai")
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
"""Names of torch's Linear layers, which store `[out, in]`. Both weights are transposed."""
DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

# dictionary_learning: class -> (architecture, whether b_dec is subtracted from the input, names of tensors -> ours)
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
"""Name of weights on the hub, used by all libraries and by language models."""
CONFIGS = ("cfg.json", "config.json")
# Tensors that do not affect encode or decode, or that are read separately.
BESIDE = {"k", "group_sizes", "feature_counts"}


def open_checkpoint(path: Path) -> SAE:
    """Open a checkpoint of any known library, or one that is given by name (`sources`). No code of a pickle runs.

    Known are SAELens and HUSAI (folder with `cfg.json` and `sae_weights.safetensors`), dictionary_learning
    (`config.json`, `ae.pt`), sparsify (`cfg.json`, `sae.safetensors`), Gemma Scope (`params.npz`), and the earlier
    study (`sae_final.pt`, the file or its folder).

    Raises:
        BadInput: the path is none of these, is damaged, or has settings of unknown meaning.
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
    """The weights file of a checkpoint; the first one if there are several."""
    if in_catalogue(path):
        return sources.weights_of(path)[0]
    path = sources.local(path)
    names = (*FILES, UPLOAD)
    return path if path.is_file() else next((path / n for n in names if (path / n).is_file()), path / FILES[-1])


def checkpoint_sha256(path: Path) -> str:
    """sha256 that names the weights of a checkpoint."""
    return sources.sha256_of(path) if in_catalogue(path) else sha256_file(weights_file(path))


def find(root: Path, flag: str = "--sae-root", hook_name: str | None = None, untrained: bool = False) -> list[Path]:
    """Checkpoints at or below `root`, sorted: one for each training (`finding.of_each_run`).

    Args:
        hook_name: if there are SAEs of several hooks below `root`, those of this hook are taken.
        untrained: take a run's state from before its first step, if the run kept it.

    Raises:
        BadInput: `root` is no folder or holds no checkpoint.
    """
    if not root.is_dir():
        raise BadInput(f"{flag}: {root} is not a folder")
    checkpoints_found = finding.of_each_run(finding.below(root, _here), untrained)
    if not checkpoints_found:
        raise BadInput(f"{flag}: no checkpoint ({', '.join(FILES)}) below {root}")
    return checkpoints_found if hook_name is None else _of_place(checkpoints_found, hook_name)


def _here(folder: Path, names: list[str]) -> list[Path]:
    """Checkpoints with weights in a folder."""
    steps = [folder / name for name in names if LEARNING_STEP.fullmatch(name)] if folder.name == STEPS_FOLDER else []
    upload = UPLOAD in names and not set(FILES) & set(names) and _uploaded(folder) is not None
    return steps or ([folder] if set(FILES) & set(names) or upload else [])


def _of_place(paths: list[Path], hook_name: str) -> list[Path]:
    """Checkpoints of one place of the model. If none is of this place, all: an error message then names one."""
    places = {path: place_of(path) for path in paths}
    fitting = [path for path, place in places.items() if place and same_place(place, hook_name)]
    others = [path for path, place in places.items() if place and path not in fitting]
    if not fitting or not others:
        return paths
    log.info("%s: left out with %d more SAEs of other places than %s", others[0], len(others) - 1, hook_name)
    return [path for path in paths if path not in others]


def place_of(path: Path) -> str | None:
    """Place in the model that an SAE was trained on, as the files beside its weights state; None if they do not."""
    folder = path.parent if path.is_file() else path
    folder = folder.parent if folder.name == STEPS_FOLDER else folder
    if (folder / FILES[0]).is_file():
        place_by_name = _hookpoint(folder)
        return place_by_name.get("hook_name") or place_by_name.get("hf_hook_name")
    for name in CONFIGS:
        if (folder / name).is_file():
            config = read_json(folder / name, "checkpoint")
            parts = [config.get(part) for part in ("metadata", "trainer")] if isinstance(config, dict) else []
            settings = [part for part in (config, *parts) if isinstance(part, dict)]
            keys = ("hook_name", "hook_point", "submodule_name")
            place = next((part[key] for part in settings for key in keys if part.get(key)), None)
            return None if place is None else hook_name_of(str(place))
    return None


def find_all(paths: list[Path], flag: str, hook_name: str | None = None, untrained: bool = False) -> list[Path]:
    """Checkpoints at or below these paths and names, in this order, each once. Names stay names (`sources`).

    Args:
        hook_name, untrained: see `find`.

    Raises:
        BadInput: a path does not exist, or holds no checkpoint.
    """
    refuse_none(paths, flag)
    return list(dict.fromkeys(f for path in paths for f in _at_or_below(path, flag, hook_name, untrained)))


def _at_or_below(path: Path, flag: str, hook_name: str | None, untrained: bool) -> list[Path]:
    if in_catalogue(path):
        sources.refuse_unknown(path, flag)
        return [path]
    place = sources.local(path, flag)
    below = [place] if place.is_file() else find(place, flag, hook_name, untrained)
    return [sources.pinned(path, f, flag) for f in below] if is_name(path) else below


def folder_of(checkpoint: Path) -> Path:
    """Folder of a checkpoint that is given by its folder, by its weights file, or by a hub name.

    An SAE of SAELens' catalogue has no folder; its name is returned.
    """
    if in_catalogue(checkpoint):
        return checkpoint
    checkpoint = sources.local(checkpoint)
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def _dictionary_learning(folder: Path, weights: str = "ae.pt") -> SAE:
    return _learning(folder / weights, folder / "config.json")


def _learning_step(path: Path) -> SAE:
    """Open RUN/checkpoints/ae_<step>.pt, with its configuration in RUN."""
    folder = path.parent
    folder = folder.parent if folder.name == STEPS_FOLDER else folder
    return _learning(path, folder / "config.json", finding.step_of(path))


def _learning(path: Path, at: Path, step: int | None = None) -> SAE:
    """Open a checkpoint of dictionary_learning.

    Args:
        at: file of its configuration. step: step of a checkpoint from before the end of training; 0 is untrained.
    """
    config, place_in_messages = read_json(at, "checkpoint"), f"checkpoint: {at}"
    trainer = config.get("trainer") if isinstance(config, dict) else None
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(name, str) or name not in DICTIONARY_LEARNING:
        known = ", ".join(DICTIONARY_LEARNING)
        raise BadInput(f"{place_in_messages}: trainer.dict_class {name!r}; one of {known} expected")
    if unknown := sorted(set(config) - {"trainer", "buffer"}):
        raise BadInput(f"{place_in_messages}: {unknown[0]} is not known; trainer and buffer expected")
    described = TABLE["dictionary_learning config.json trainer"].split(trainer, place_in_messages)
    data = TABLE["dictionary_learning config.json buffer"].split(
        config.get("buffer") or {}, f"{place_in_messages}: buffer"
    )
    architecture, subtract, names = DICTIONARY_LEARNING[name]
    state = _tensors(path)
    if "TopK" not in name and (trainer.get("k") is not None or "k" in state):
        raise BadInput(f"{place_in_messages}: k is {trainer.get('k', state.get('k'))!r} of {name}, which has none")
    k = _k(state, trainer, path) if "TopK" in name else None
    if "threshold" not in names:
        state.pop("threshold", None)  # AutoEncoderTopK keeps one that its encode does not use
    weights = _renamed(state, names, path)
    training = {"architecture": name} | described.training | data.training | ({} if k is None else {"k": k})
    place = _place(described.activations.pop("hook_name", None), data, place_in_messages)
    activations = described.activations | data.activations | place
    metadata = metadata_of(Described({}, activations, training), location=place_in_messages)
    metadata |= {} if step is None else {"checkpoint_step": step}
    k = k if architecture == "topk" else None
    sae = _finished(weights, architecture, k, subtract, metadata, "dictionary_learning", path, untrained=step == 0)
    _fits(trainer, "activation_dim", sae.d_in, path)
    _fits(trainer, "dict_size", sae.d_sae, path)
    return sae


def _place(submodule: Any, buffer: Described, location: str) -> dict[str, str]:
    """Metadata of the place that dictionary_learning names: the input or the output of a module."""
    io = buffer.activations.get("io", "out")
    if io not in ("in", "out"):
        raise BadInput(f"{location}: buffer: io is {io!r}; activations of one place expected, 'in' or 'out'")
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
    location = f"checkpoint: {folder / config_name}"
    if not isinstance(config, dict):
        raise BadInput(f"{location} does not hold an SAE's configuration")
    described = TABLE["sparsify cfg.json"].split(config, location)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise BadInput(f"{location}: activation {config.get('activation')!r}; 'topk', not signed, expected")
    state = read_tensors(path)
    k = _k(state, config, path)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if config.get("skip_connection") else {}
    weights_of = _renamed(state, names, path)
    run = _sparsify_run(folder, k)
    training = {"architecture": "topk", "k": k} | described.training if run else {}  # cfg.json alone is incomplete
    metadata = metadata_of(Described({}, _hookpoint(folder), training), *run, location=location)
    sae = _finished(weights_of, "topk", k, not config.get("transcode", False), metadata, "sparsify", path)
    _fits(config, "d_in", sae.d_in, path)
    if config.get("num_latents"):  # 0 means unknown
        _fits(config, "num_latents", sae.d_sae, path)
    return sae


def _hookpoint(folder: Path) -> dict[str, str]:
    """Metadata of the place of sparsify's RUN/<hookpoint>/ or RUN/<hookpoint>/seed<n>/, from the folder's name.

    No file states the place.
    """
    place = folder.resolve()
    name = place.parent.name if re.fullmatch(r"seed\d+", place.name) else place.name
    hook = hook_name_of(name)
    if "hook_" in hook:
        return {"hook_name": hook, "hf_hook_name": name}
    return {"hf_hook_name": name} if BLOCK.fullmatch(name) else {}


def _sparsify_run(folder: Path, k: int) -> list[Described]:
    """Settings in sparsify's configuration of the run, up to three levels up; empty without such a file."""
    for place in list(folder.resolve().parents)[:3]:
        at = place / "config.json"
        config = read_json(at, "checkpoint") if at.is_file() else None
        if isinstance(config, dict) and isinstance(config.get("sae"), dict):
            location = f"checkpoint: {at}"
            run = TABLE["sparsify config.json"].split(config, location)
            sae = TABLE["sparsify cfg.json"].split(config["sae"], f"{location}: sae")
            if sae.computes.get("k", k) != k:
                raise BadInput(f"{location}: sae.k is {sae.computes['k']!r}, and {k} in {folder}; one k expected")
            return [Described({}, run.activations, run.training | sae.training)]
    return []


def _uploaded(folder: Path) -> Callable[[], SAE] | None:
    """Function that opens `model.safetensors` of a folder; None if the files beside it describe no SAE."""
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
    description = saved
    state = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    has_k, has_threshold = "k" in state or "k" in description, {"threshold", "log_threshold"} & set(state)
    if "architecture" not in description and has_k and has_threshold:
        raise BadInput(f"checkpoint: {path} has both k and a threshold and no architecture: topk or batchtopk?")
    architecture = description.get("architecture", "topk" if has_k else "jumprelu" if has_threshold else "relu")
    kinds = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    if not isinstance(architecture, str) or architecture not in kinds:
        raise BadInput(f"checkpoint: {path}: architecture {architecture!r}; one of {', '.join(kinds)} expected")
    kind = kinds[architecture]
    k = _k(state, description, path) if kind == "topk" else None
    linear = "encoder.weight" in state
    names = dict(LINEAR if linear else DIRECT)
    if linear:  # subtracts nothing from its input, and may have no decoder bias
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
        _fits(description, name, size, path)
    return sae


def finite(sae: SAE, path: Path) -> SAE:
    """The SAE. Raises BadInput if a tensor holds no finite floats, or the decoder is zero."""
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
"""Functions that open the files of `FILES`, in the same order."""


def _k(state: dict, config: dict, path: Path) -> int:
    values = [k.item() if isinstance(k, Tensor) and k.numel() == 1 else k for k in (config.get("k"), state.get("k"))]
    k = values[0] if values[0] is not None else values[1]
    if None not in values and values[0] != values[1]:
        raise BadInput(
            f"checkpoint: {path}: k is {values[0]!r} in its configuration and {values[1]!r} among its tensors"
        )
    if type(k) is not int or k < 1:
        raise BadInput(f"checkpoint: {path}: k is {k!r}; a positive whole number expected")
    return k


def _fits(config: dict, name: str, size: int, path: Path) -> None:
    if config.get(name, size) != size:
        raise BadInput(f"checkpoint: {path}: {name} is {config[name]!r} in its configuration; its tensors say {size}")


def _renamed(state: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The tensors in HUSAI's names, `[in, out]`. Raises BadInput for a missing or unknown tensor."""
    if missing := sorted(set(names) - set(state)):
        raise BadInput(f"checkpoint: {path}: {missing[0]} is missing")
    if unknown := sorted(set(state) - set(names) - BESIDE):
        raise BadInput(f"checkpoint: {path}: {unknown[0]} is not known; it may change what the SAE computes")
    linear = {"encoder.weight", "decoder.weight"} & set(names)
    # torch deprecates `.T` of any other shape.
    turned = {foreign_name for foreign_name in linear if state[foreign_name].ndim == 2}
    return {
        husai_name: state[foreign_name].T if foreign_name in turned else state[foreign_name]
        for foreign_name, husai_name in names.items()
    }


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
    if "threshold" in weights and weights["threshold"].ndim == 0:  # BatchTopK learns one threshold for all features
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
    """Load a dictionary that torch saved. Only tensors and plain values are unpickled, therefore no code can run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on pickles; weights_only is set below
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise various errors
        if type(error).__name__ == "UnpicklingError":
            raise BadInput(
                f"checkpoint: {path} holds more than tensors and plain values, or is no torch file"
            ) from None
        stated = str(error).splitlines() if isinstance(error, (OSError, RuntimeError)) else []
        reason = stated[0] if stated else "it is damaged or cut off"  # others name a byte or a key of the pickle
        raise BadInput(f"checkpoint: {path} cannot be read ({reason}); a file that torch.save wrote expected") from None
    if not isinstance(saved, dict):
        raise BadInput(f"checkpoint: {path}: a dictionary of tensors expected")
    return saved
