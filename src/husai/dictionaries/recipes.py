"""Settings of training that libraries write beside an SAE, flat: dotted key -> value. A table lists the settings in
which seed replicates may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from husai.dictionaries import foreign
from husai.dictionaries.keys import ACTIVATIONS
from husai.dictionaries.sae import SAE
from husai.runs.checkpoints import is_name
from husai.runs.files import read_json
from husai.subjects.hooks import BLOCK

FILES = ("runner_cfg.json", "config.json")
"""Configuration of SAELens' runner; of dictionary_learning's trainer and buffer, or of sparsify's run."""
LEVELS = 2
"""Folders above an SAE that may hold the file of its run: sparsify writes RUN/config.json and
RUN/<hookpoint>/seed<n>/, SAELens RUN/runner_cfg.json and RUN/<steps>/."""

MAY_DIFFER = {
    "seed": ("seed", "init_seed", "init_seeds", "data_seed", "order_seed", "shuffle_seed", "random_seed"),
    "name of the run": ("name", "run_name", "run_id", "id", "wandb_name", "wandb_id", "experiment_name", "notes"),
    "place of output": ("save_dir", "output_path", "output_dir", "checkpoint_path", "checkpoint_dir", "log_dir"),
    "time": ("timestamp", "timestamp_utc", "created_at", "started_at", "date", "time", "git_commit"),
    "what is kept on the way": (
        *("save_every", "save_best", "save_steps", "n_checkpoints", "save_final_checkpoint", "resume_from_checkpoint"),
        *("save_timeout_seconds", "checkpoint_every", "save_mse_every_n_steps"),
    ),
    "log": ("logger", "wandb", "log_to_wandb", "log_steps", "verbose", "eval_every_n_wandb_logs", "wandb_project"),
    "evaluation on the way": ("n_eval_batches", "eval_batch_size_prompts", "eval_every", "evals"),
    "machine": (
        *("device", "act_store_device", "devices", "distribute_modules", "num_workers", "hostname", "world_size"),
        *("propose", "compile_llm", "compile_sae", "llm_compilation_mode", "sae_compilation_mode"),
    ),
    "version of the library": ("sae_lens_version", "sae_lens_training_version", "version", "library_version"),
    "places of the whole run; each SAE's own is compared": ("hookpoints", "layers", "layer_stride"),
    "measured": ("norm_factor",),
}
"""Reason -> keys in which seed replicates may differ. Any part of a dotted key may match. Keys that begin with `wandb`
may differ as well."""
STARTS = ("finetune", "from_pretrained_path", "pretrained_path")
"""Keys that name the checkpoint an SAE was initialised from."""
SEEDED = {"dictionary_learning": "seed", "sparsify": "init_seeds"}
"""Library -> key of the seed of its initialisations. SAELens' seed orders the data alone."""


def may_differ(key: str) -> bool:
    """True if seed replicates may differ in a dotted key."""
    parts = key.split(".")
    allowed = {name for names in MAY_DIFFER.values() for name in names}
    return any(part in allowed or part.startswith("wandb") for part in parts)


def settings_of(path: Path, sae: SAE) -> dict[str, Any]:
    """Training settings in a checkpoint and the files beside it; empty if they state none.

    Raises:
        BadInput: a file exists but cannot be read.
    """
    if library(sae) == "husai":
        return flat(sae.metadata["husai"])
    if training := sae.metadata.get("training"):
        return flat({name: sae.metadata[name] for name in ACTIVATIONS if name in sae.metadata} | training)
    settings = flat({name: sae.metadata[name] for name in DETAILS if name in sae.metadata})
    if foreign.in_catalogue(path):
        return settings
    folder = foreign.folder_of(path)
    levels = 1 if is_name(path) else LEVELS + 1
    for place in [folder, *folder.resolve().parents][:levels]:
        for name in FILES:
            if (place / name).is_file():
                value = read_json(place / name, "checkpoint")
                return settings | (flat(value) if isinstance(value, dict) else {})
    return settings


DETAILS = ("training_architecture", "training_architecture_details", "sae_lens_training_version")
"""Keys of SAELens' metadata that describe a training."""


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    entries: dict[str, Any] = {}
    for key, entry in value.items():
        entries |= flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {f"{prefix}{key}": entry}
    return entries


def place_of(sae: SAE) -> str | None:
    """Place in the model that an SAE was trained on: a hook, or the library's name of a module without a hook.

    None if the files state no place, or the name is no place of a model.
    """
    module_name = sae.metadata.get("hf_hook_name")
    return sae.metadata.get("hook_name") or (module_name if module_name and BLOCK.fullmatch(module_name) else None)


def library(sae: SAE) -> str:
    """Name of the library that wrote a checkpoint."""
    metadata = sae.metadata.get("husai") or {}
    return "husai" if "training" in metadata else metadata.get("source", "SAELens")


def initial_seed(path: Path, sae: SAE, settings: dict[str, Any]) -> Any:
    """Seed of an SAE's initialisation, as its library wrote it; None if unknown."""
    key = SEEDED.get(library(sae))
    value = next((v for name, v in settings.items() if name.rpartition(".")[2] == key), None)
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0]
    name = foreign.folder_of(path).name  # each of several seeds has its own folder
    return name.removeprefix("seed") if name.startswith("seed") else None


TOKENS = ("training_tokens", "total_training_tokens", "tokens", "num_tokens")
"""Last parts of keys that hold the number of training tokens."""


def tokens_of(sae: SAE, settings: dict[str, Any]) -> int | None:
    """Number of tokens that an SAE was trained on, as its files state; None if they do not.

    Args:
        settings: result of `settings_of`. dictionary_learning writes steps and rows of a batch instead of tokens.
    """
    named = {key.rpartition(".")[2]: value for key, value in settings.items()}
    for key in TOKENS:
        if isinstance(named.get(key), int):
            return named[key]
    steps, batch = named.get("steps"), named.get("out_batch_size")
    if library(sae) == "dictionary_learning" and isinstance(steps, int) and isinstance(batch, int):
        return steps * batch
    return None
