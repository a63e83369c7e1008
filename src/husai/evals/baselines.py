"""Untrained dictionaries that SAEs are compared with, and the map of CE-Bench baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.dictionaries.family import unit_rows
from husai.dictionaries.sae import SAE
from husai.evidence.schemas import Reference, refusal
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY, read_json, write_json
from husai.runs.seeds import generator
from husai.subjects.hooks import same_place

MAP = "cebench_baseline_map.json"


def untrained(store: ActivationStore, d_sae: int, k: int, seed: int) -> SAE:
    """An untrained TopK SAE: directions uniform on the sphere, centred at the mean of the activations."""
    W_dec = unit_rows(d_sae, store.d_in, [generator(seed, "untrained")])[0]
    mean, _ = store.stats()
    weights = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec, "b_dec": mean.float()}
    return SAE(weights, "topk", min(k, d_sae))


def principal_components(store: ActivationStore, d_sae: int) -> dict[str, Tensor]:
    """PCA of the width of an SAE: {"W": the min(d_sae, d_in) leading components `[d_in, n]`, "mean" `[d_in]`}."""
    mean, covariance = store.stats()
    _, vectors = torch.linalg.eigh(covariance.double())
    return {"W": vectors.flip(1)[:, :d_sae].float().contiguous(), "mean": mean.float().contiguous()}


# ---------------------------------------------------------------------------------------------------------------------
# The map of CE-Bench baselines: hook name, layer or "default" -> path of a summary, or null


def lookup(path: Path, hook_name: str) -> tuple[Path | None, str | None]:
    """(the summary that a map names for a hook, None), or (None, why it names no summary).

    The path of a summary is relative to the map's folder, else to the repository.

    Raises:
        BadInput: the map is damaged, or names a file that does not exist.
    """
    table = read_json(path, "baseline map")
    if not isinstance(table, dict) or not all(v is None or isinstance(v, str) for v in table.values()):
        raise BadInput(f"baseline map: {path}: an object of paths or nulls expected")
    layer = hook_name.split(".")[1] if hook_name.startswith("blocks.") else ""
    places = [name for name in table if same_place(name, hook_name)]
    key = next((k for k in (hook_name, *places, layer, "default") if k in table), None)
    if key is None or table[key] is None:
        return None, f"{path.name} names no baseline for {hook_name}"
    candidates = [path.parent / table[key], REPOSITORY / table[key]]
    summary = next((p for p in candidates if p.is_file()), None)
    if summary is None:
        raise BadInput(f"baseline map: {path}: {key!r} names {table[key]}, which does not exist")
    return summary, None


@dataclass(frozen=True)
class Summary:
    """References of an earlier CE-Bench run."""

    references: list[Reference]
    pairs_digest: str | None


def read_summary(path: Path) -> Summary:
    """The results of an earlier CE-Bench run whose SAEs serve as references.

    Raises:
        BadInput: the file is damaged. A summary without SAEs is no error, because nothing will match it.
    """
    summary = read_json(path, "baseline summary")
    if not isinstance(summary, dict) or not isinstance(saes := summary.get("saes", []), list):
        raise BadInput(f"baseline summary: {path}: an object with a list `saes` expected")
    try:
        references = [Reference(**{name: r[name] for name in Reference.model_fields}) for r in saes]
    except ValidationError as error:
        raise BadInput(f"baseline summary: {path}: saes: {refusal(error)}") from None
    except (LookupError, TypeError) as error:
        raise BadInput(f"baseline summary: {path}: saes: records expected ({type(error).__name__}: {error})") from None
    if any(not r.normalised_of_pairs or len(r.normalised_of_pairs) != summary.get("n_pairs") for r in references):
        raise BadInput(f"baseline summary: {path}: saes: a score for each of n_pairs pairs expected")
    return Summary(references, summary.get("pairs_digest"))


def write_map(path: Path, hook_name: str, summary: str) -> Path:
    """Write a map that names a summary for one hook and nothing for any other."""
    layer = {hook_name.split(".")[1]: summary} if hook_name.startswith("blocks.") else {}
    write_json(path, {"default": None, hook_name: summary, **layer})
    return path
