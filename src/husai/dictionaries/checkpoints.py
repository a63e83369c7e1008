"""SAE checkpoints in the SAELens layout: `cfg.json` + `sae_weights.safetensors` (+ `sparsity.safetensors`).

`sae_lens.SAE.load_from_disk(folder)` opens the files that `save` writes. Activations need no rescaling, because the
normalisation of the training is folded into the weights. `foreign.py` reads checkpoints of other libraries.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from husai.dictionaries import sources
from husai.dictionaries.keys import SAELENS_OBJECTS, TABLE, Described, metadata_of
from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_bytes, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
NEVER = 1e-10
"""Added to firing rates before their logarithm, as SAELens does; less than one row in a billion."""
SAE_LENS_VERSION = "6.54.12"  # the layout's version
# Settings that change encode or decode, and the only value that this code computes.
ASSUMED = {
    "normalize_activations": "none",
    "reshape_activations": "none",
}
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""Files with SAELens 6's scaling of activations. Checkpoints from before the end of training need them."""
STORE_STATE = "activations_store_state.safetensors"
"""File of SAELens 5 that holds the scaling among other tensors."""
RUNNER = "runner_cfg.json"
STANDARD = ("standard", "topk")
BY_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Training architectures whose SAEs encode with a threshold, as JumpReLU SAEs do."""
SQUARED = 1e-15, 1e15
"""Range of numbers whose squares neither overflow nor underflow in float32."""
UNIT = 1e-5
"""Largest distance from 1 of a norm that is not rescaled, because it is float32 rounding."""


def firing_rate(folder: Path) -> Tensor:
    """Share of the training's held-out rows on which each feature fires, float64 `[d_sae]`."""
    sparsity = load_file(folder / SPARSITY)["sparsity"].double()
    return (10**sparsity).where(sparsity > math.log10(10 * NEVER), 0.0)


def save(sae: SAE, folder: Path, firing_rate: Tensor | None = None) -> list[Path]:
    """Write a checkpoint folder; returns its files.

    Args:
        firing_rate: share of rows on which each feature fires, `[d_sae]`; saved as SAELens' log10 sparsity.

    Raises:
        BadInput: SAELens has no such architecture (a top-k SAE with a linear skip connection, as in sparsify).
    """
    if isinstance(sae, sources.PeerSAE):
        tensors, config = sae.saved()
        return _write(folder, tensors, config | {"metadata": sae.metadata}, firing_rate)
    skip = ("W_skip",) if "skip" in sae.architecture else ()
    if set(sae.weights) != {*ENCODER[ARCHITECTURES[sae.architecture]], "W_dec", "b_dec", *skip}:
        raise BadInput(f"checkpoint: {folder}: {sae.architecture} with {sorted(sae.weights)} has no SAELens layout")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.weights.items()}
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"k": sae.k} if sae.architecture == "topk" else {}),
        **({"d_out": sae.d_out} if "transcoder" in sae.architecture else {}),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        **ASSUMED,
        "metadata": {**sae.metadata, "sae_lens_version": SAE_LENS_VERSION},
    }
    return _write(folder, weights, config, firing_rate)


def _write(folder: Path, weights: dict[str, Tensor], config: dict, firing_rate: Tensor | None) -> list[Path]:
    write_bytes(folder / WEIGHTS, to_bytes(weights))
    write_json(folder / CONFIG, config)
    files = [folder / WEIGHTS, folder / CONFIG]
    if firing_rate is not None:
        write_bytes(folder / SPARSITY, to_bytes({"sparsity": (firing_rate.float() + NEVER).log10()}))
        files.append(folder / SPARSITY)
    return files


def load(folder: Path, weights_name: str = WEIGHTS, config_name: str = CONFIG) -> SAE:
    """Open a checkpoint folder in SAELens' layout. The returned SAE has decoder rows of norm 1 (`unit_decoder`).

    Checkpoints from before the end of a training keep the scale of activations next to the weights. It is folded into
    the weights.

    Raises:
        BadInput: the checkpoint is missing, truncated, non-finite or self-contradictory, or has an unknown architecture
            or layout.
    """
    config, path = read_json(folder / config_name, "checkpoint"), folder / weights_name
    place = f"checkpoint: {folder / config_name}"
    if not isinstance(config, dict):
        raise BadInput(f"{place} does not hold an SAE's configuration")
    whitened = config.get("normalize_activations") == "covariance_whitening" and (folder / WHITENING).is_file()
    if sources.beyond_formulas(config) and not whitened:
        sae = sources.open_folder(folder)
        sae.metadata |= modern(config, place, folder)[1]
        return unit_decoder(checked(sae, {name: tuple(t.shape) for name, t in sae.weights.items()}, path))
    saved = config
    config, metadata = modern(saved, place, folder)
    architecture, scaling = config["architecture"], config["normalize_activations"]
    transcoder = "transcoder" in architecture
    subtract = config.get("apply_b_dec_to_input", not transcoder)
    if not isinstance(subtract, bool) or (subtract and transcoder):
        raise BadInput(f"{place}: apply_b_dec_to_input is {subtract!r}; true or false expected, false for transcoders")
    needed = ["d_in", "d_sae", *(["k"] if architecture == "topk" else []), *(["d_out"] if transcoder else [])]
    sizes: dict[str, Any] = {name: config.get(name) for name in needed}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise BadInput(f"{place}: {name} is {size!r}; a positive whole number expected")
    d_in, d_sae, k = sizes["d_in"], sizes["d_sae"], sizes.get("k")
    if k is not None and k > d_sae:
        raise BadInput(f"{place}: k {k} with d_sae {d_sae}: k ≤ d_sae expected")
    weights = _inference(read_tensors(path), architecture, d_sae, path)
    architecture = "jumprelu" if architecture in BY_BATCH else architecture
    d_out = sizes.get("d_out", d_in)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ENCODER[ARCHITECTURES[architecture]], (d_sae,))
    shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if "skip" in architecture else {}
    sae = checked(SAE(weights, architecture, k, subtract, metadata), shapes, path)
    if config.get("rescale_acts_by_decoder_norm"):  # encode and decode as if decoder rows had norm 1: made so
        if (sae.W_dec.norm(dim=1) == 0).any():
            raise BadInput(f"checkpoint: {path}: a decoder row is zero and cannot be scaled to norm 1")
        # A threshold that a batch's k-th activation set is of activations that are scaled already.
        _scale_features(sae, sae.W_dec.norm(dim=1), but=("threshold",))
    if scaling == "expected_average_only_in":
        factor = _scale(folder, saved, place)
        b_dec = sae.weights["b_dec"] / factor
        sae.weights |= {"W_enc": sae.W_enc * factor, "W_dec": sae.W_dec / factor, "b_dec": b_dec}
    if whitened:
        _fold_whitening(sae, read_tensors(folder / WHITENING), folder / WHITENING)
    return unit_decoder(sae)


def _inference(state: dict[str, Tensor], architecture: str, d_sae: int, path: Path) -> dict[str, Tensor]:
    """Tensors for encode and decode, from the state of a training."""
    state = dict(state)
    if "scaling_factor" in state and bool((state["scaling_factor"] == 1).all()):
        del state["scaling_factor"]  # versions 3 to 5 wrote it even without fine-tuning
    if architecture == "jumprelu" and "log_threshold" in state:
        state["threshold"] = state.pop("log_threshold").exp()
    if architecture in BY_BATCH and "topk_threshold" in state:
        threshold = state.pop("topk_threshold").float().reshape(-1)
        if len(threshold) != 1:
            raise BadInput(f"checkpoint: {path}: topk_threshold holds {len(threshold)} numbers; one expected")
        state["threshold"] = threshold.expand(d_sae).clone()
    return state


def _scale(folder: Path, config: dict, location: str) -> float:
    """Factor by which the training scaled activations; 1 if the weights hold it already.

    SAELens folds the factor into the weights at the end of training. Versions 3.15 to 5 still write
    `expected_average_only_in` into the cfg.json of the last checkpoint, `final_<tokens>`, because they write the whole
    configuration of the run.

    Raises:
        BadInput: the files do not show whether the factor is folded in.
    """
    if (folder / SCALER).is_file():
        saved = read_json(folder / SCALER, "checkpoint")
        factor = saved.get("scaling_factor") if isinstance(saved, dict) else None
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise BadInput(f"checkpoint: {folder / SCALER}: scaling_factor is {factor!r}; a positive number expected")
        return factor
    if "training_tokens" in config:  # the configuration of a run
        if (folder / STORE_STATE).is_file() and version(config) >= (5, 2):
            with safe_open(folder / STORE_STATE, framework="pt") as state:
                name = "estimated_norm_scaling_factor"  # absent: folded, then forgotten
                return float(state.get_tensor(name)) if name in state.keys() else 1.0  # noqa: SIM118
        names = {folder.name, folder.resolve().name}
        ended = any(re.fullmatch(r"final_\d+", name) for name in names)
        one_only = config.get("n_checkpoints") == 0 and not any(name.isdigit() for name in names)
        if (ended or one_only) and version(config) >= (3, 15):
            return 1.0
    raise BadInput(
        f"{location}: normalize_activations is 'expected_average_only_in', and no file says by what activations were "
        f"scaled or that the weights hold it; a checkpoint with {SCALER} or the last one of its training, "
        "final_<tokens>, expected"
    )


def version(config: dict) -> tuple[int, ...]:
    """SAELens' version as numbers; (0,) for old layouts without a version."""
    text = str(config.get("sae_lens_version") or "")
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2]) or (0,)


def _scale_features(sae: SAE, factor: Tensor, but: tuple[str, ...] = ()) -> None:
    """Multiply features by a factor, `[d_sae]` or one number, and divide decoder rows by it. The map is unchanged."""
    names = {"W_enc", "b_enc", "b_gate", "b_mag", "threshold"} & set(sae.weights) - set(but)
    sae.weights |= {name: sae.weights[name] * factor for name in names}
    sae.weights["W_dec"] = sae.W_dec / (factor.unsqueeze(1) if factor.ndim else factor)


def _fold_whitening(sae: SAE, tensors: dict[str, Tensor], path: Path) -> None:
    """Fold z = (x − mean) @ matrix, and its inverse behind the decoder, into the weights."""
    shapes = {"mean": (sae.d_in,), "matrix": (sae.d_in, sae.d_in), "inverse_matrix": (sae.d_in, sae.d_in)}
    if (sizes := {name: tuple(tensor.shape) for name, tensor in tensors.items()}) != shapes:
        raise BadInput(f"checkpoint: {path} holds {sizes}; {shapes} expected")
    mean, matrix, inverse = (tensors[name].double() for name in shapes)
    w = {name: tensor.double() for name, tensor in sae.weights.items()}
    w["W_enc"] = matrix @ w["W_enc"]
    if not sae.subtract_b_dec:
        shift = mean @ w["W_enc"]
        for name in {"b_enc", "b_gate"} & set(w):
            w[name] = w[name] - shift
        if "b_mag" in w:
            w["b_mag"] = w["b_mag"] - shift * w["r_mag"].exp()
    w |= {"W_dec": w["W_dec"] @ inverse, "b_dec": w["b_dec"] @ inverse + mean}
    sae.weights = {name: tensor.float() for name, tensor in w.items()}


def unit_decoder(sae: SAE) -> SAE:
    """The same SAE with decoder rows of norm 1.

    Encoder × s with decoder ÷ s computes the same map, and no figure may depend on s. The scales of a TopK SAE's
    features decide which features are the k largest. Therefore one common factor brings their median norm to 1.
    """
    if isinstance(sae, sources.PeerSAE):
        sae.unit()
        return sae
    largest = sae.W_dec.abs().amax(1)
    extreme = (largest > 0) & ((largest < SQUARED[0]) | (largest > SQUARED[1]))
    norms = (sae.W_dec.double() if extreme.any() else sae.W_dec).norm(dim=1).float()
    if ARCHITECTURES[sae.architecture] == "topk":
        norms = norms[norms > 0].median()
    factor = torch.where(norms > 0, norms, 1.0)
    if (factor - 1).abs().max() > UNIT:
        _scale_features(sae, factor)
    return sae


def modern(config: dict, location: str, folder: Path) -> tuple[dict, dict]:
    """(settings of a `cfg.json` of SAELens 3 or later, converted to version 6; `SAE.metadata`).

    Args:
        folder: folder of the checkpoint. SAELens 6 writes the configuration of the run into it.

    Raises:
        BadInput: a setting is unknown, contradicts another, or changes the SAE's map in a way HUSAI does not compute.
    """
    file_metadata = config.get("metadata") or {}
    if not isinstance(file_metadata, dict):
        raise BadInput(f"{location}: metadata is no object")
    config = {key: value for key, value in config.items() if key != "metadata"}
    described = TABLE["sae_lens cfg.json"].split(config, location)
    settings = dict(described.computes)
    activation = settings.pop("activation_fn", None) or settings.pop("activation_fn_str", None)
    arguments = settings.pop("activation_fn_kwargs", None) or {}
    settings.pop("activation_fn_str", None)
    if not isinstance(arguments, dict):
        raise BadInput(f"{location}: activation_fn_kwargs is {arguments!r}; an object expected")
    if activation == "topk" and set(arguments) == {"k"} and settings.get("architecture", "standard") in STANDARD:
        if settings.get("k") not in (None, arguments["k"]):
            raise BadInput(f"{location}: k is {settings['k']!r} and activation_fn_kwargs {arguments!r}; one k expected")
        settings |= {"architecture": "topk", "k": arguments["k"]}
    elif activation not in (None, "relu") or arguments:
        raise BadInput(f"{location}: activation_fn {activation!r} with {arguments}; relu, or topk with k, expected")
    if settings.pop("finetuning_scaling_factor", False):
        raise BadInput(f"{location}: finetuning_scaling_factor is set; an SAE without one expected")
    if not {"reshape_activations", "sae_lens_version"} & {*config, *file_metadata} and "hook_z" in str(
        file_metadata.get("hook_name")
    ):
        raise BadInput(f"{location}: an SAE of hook_z without reshape_activations reshapes its input; none expected")
    architecture = settings.setdefault("architecture", "standard")
    scaling = settings.get("normalize_activations")
    if scaling in (None, False):
        scaling = "none"
    settings["normalize_activations"] = scaling = "expected_average_only_in" if scaling is True else scaling
    trained = file_metadata.get("training_architecture") or architecture
    details = file_metadata.get("training_architecture_details")
    details, runner = details if isinstance(details, dict) else {}, _runner(folder, location)
    settings_by_file = {
        CONFIG: settings,
        "training_architecture_details": details,
        RUNNER: runner[0].computes if runner else {},
    }
    if settings.get("k") is not None and isinstance(husai := file_metadata.get("husai"), dict):
        settings_by_file["metadata.husai"] = husai  # for other architectures, this k is the target L0
    _refuse_contradiction(settings_by_file, trained, location)
    training = details | described.training
    if training or runner:  # else the files state nothing
        training["architecture"] = trained
        training |= {} if settings.get("k") is None else {"k": settings["k"]}
        training |= {} if scaling == "none" else {"normalize_activations": scaling}
    in_metadata = {
        k: v for k, v in file_metadata.items() if not k.startswith("training_") and v not in (None, [], {}, ())
    }
    if "husai" in file_metadata:  # trained by HUSAI: `husai` holds the settings
        return _computed(settings, location), dict(file_metadata)
    described_parts = Described({}, in_metadata), Described({}, described.activations, training)
    return _computed(settings, location), metadata_of(*described_parts, *runner, location=location)


def _refuse_contradiction(settings_by_file: dict[str, dict], trained: str, place: str) -> None:
    """Raise BadInput if two files state different sizes, or a file states k for an architecture without k.

    Args:
        settings_by_file: file -> its settings. trained: architecture of the training.
    """
    for name in ("d_in", "d_sae", "k"):
        values = {file: config[name] for file, config in settings_by_file.items() if config.get(name) is not None}
        if len({*map(repr, values.values())}) > 1:
            listed = ", ".join(f"{value!r} in {file}" for file, value in values.items())
            raise BadInput(f"{place}: {name} is {listed}; one {name} expected")
        if name == "k" and values and trained in ("standard", "gated"):
            file, k = next(iter(values.items()))
            raise BadInput(f"{place}: k is {k!r} ({file}) in a {trained} SAE, which has none; one of both expected")


def _runner(folder: Path, location: str) -> list[Described]:
    """Settings in the configuration of a SAELens 6 run; empty if the file is missing."""
    if not (folder / RUNNER).is_file():
        return []
    runner, at = read_json(folder / RUNNER, "checkpoint"), f"checkpoint: {folder / RUNNER}"
    if not isinstance(runner, dict) or not isinstance(runner.get("sae", {}), dict):
        raise BadInput(f"{at} does not hold the configuration of a run")
    described = TABLE["sae_lens runner_cfg.json"].split(runner, at)
    inner = {k: v for k, v in described.computes.get("sae", {}).items() if k not in ("metadata", "dtype", "device")}
    sae = TABLE["sae_lens cfg.json"].split(inner, at)
    trained: dict[str, Any] = {k: sae.computes[k] for k in ("k", "rescale_acts_by_decoder_norm") if k in sae.computes}
    scaling = sae.computes.get("normalize_activations", "none")
    trained |= {} if scaling == "none" else {"normalize_activations": scaling}
    sizes: dict[str, Any] = {name: sae.computes[name] for name in ("d_in", "d_sae", "k") if name in sae.computes}
    return [Described(sizes, described.activations, described.training | sae.training | trained)]


def _computed(settings: dict, location: str) -> dict:
    """The settings. Raises BadInput for a setting that HUSAI does not compute."""
    architecture = settings["architecture"]
    known = (*ARCHITECTURES, *BY_BATCH)
    if sources.beyond_formulas(settings):
        return settings  # SAELens' own object computes it
    for key in sorted(set(SAELENS_OBJECTS) & set(settings)):
        raise BadInput(f"{location}: {key} is {settings[key]!r} in a {architecture} SAE, which has none")
    if not isinstance(architecture, str) or architecture not in known:
        raise BadInput(f"{location}: architecture {architecture!r} cannot be read; one of {', '.join(known)} expected")
    for key, expected in ASSUMED.items():
        values = (expected, "expected_average_only_in") if key == "normalize_activations" else (expected,)
        if (value := settings.get(key, expected)) not in values:
            raise BadInput(
                f"{location}: {key} is {value!r}; only {expected!r} can be read (fold it into the weights first)"
            )
    if settings.get("rescale_acts_by_decoder_norm") and architecture not in ("topk", *BY_BATCH):
        raise BadInput(f"{location}: rescale_acts_by_decoder_norm is set; it is known of topk alone")
    return settings


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises BadInput if the file cannot be read."""
    if not path.is_file():
        raise BadInput(f"checkpoint: {path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"checkpoint: {path} is truncated or not safetensors ({error})") from None


def checked(sae: SAE, shapes: dict[str, tuple[int, ...]], path: Path) -> SAE:
    """The SAE in float32. Raises BadInput for other shapes than `shapes`, for non-finite values, or a zero decoder."""
    sizes = {name: tuple(tensor.shape) for name, tensor in sae.weights.items()}
    if sizes != shapes:
        raise BadInput(f"checkpoint: {path} holds {sizes}; {shapes} expected")
    if other := [str(tensor.dtype) for tensor in sae.weights.values() if not tensor.is_floating_point()]:
        raise BadInput(f"checkpoint: {path} holds {other[0]}; floating-point numbers expected")
    sae.weights = {name: tensor.float() for name, tensor in sae.weights.items()}
    if not all(tensor.isfinite().all() for tensor in sae.weights.values()):
        raise BadInput(f"checkpoint: {path} holds NaN or infinite weights")
    if not sae.W_dec.any():
        raise BadInput(f"checkpoint: {path}: the decoder holds only zeros")
    return sae


def checkpoint_digest(folder: Path) -> str:
    """sha256 of the weights file, by which results name the SAE."""
    return sha256_file(folder / WEIGHTS)
