"""What an SAE's benchmark figure is held against: dictionaries without training, and matched references.

A delta is taken only against a reference of the same subject, hook, width, L0 (within 10 %), token budget and rows,
trained with the same settings; otherwise there is none, and the reason is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from husai.activations.store import ActivationStore
from husai.dictionaries.family import unit_rows
from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from husai.runs.files import read_json, write_json
from husai.runs.folder import REPOSITORY
from husai.runs.seeds import generator

L0_TOLERANCE = 0.1
ALIKE = ("subject_digest", "hook_name", "d_sae", "tokens", "store_digest", "training")
MAP = "cebench_baseline_map.json"


def untrained(store: ActivationStore, d_sae: int, k: int, seed: int) -> SAE:
    """A TopK SAE as it stands before training: directions uniform on the sphere, centred at the activations' mean."""
    W_dec = unit_rows(d_sae, store.d_in, [generator(seed, "untrained")])[0]
    mean, _ = store.stats()
    weights = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec, "b_dec": mean.float()}
    return SAE(weights, "topk", min(k, d_sae))


def same_l0(a: float, b: float) -> bool:
    """Within 10 % of the smaller one."""
    return max(a, b) <= (1 + L0_TOLERANCE) * min(a, b)


def untrained_like(facts: dict) -> tuple[int, int, int]:
    """(d_sae, k, seed) of the untrained SAE that stands beside one: of its width and L0 (its k, where it reached that
    within 10 %)."""
    reached = facts["k"] and same_l0(facts["k"], facts["l0"])
    return facts["d_sae"], facts["k"] if reached else max(1, round(facts["l0"])), facts["seed"] or 0


def untrained_name(facts: dict) -> str:
    return "untrained_d{}_k{}_seed{}".format(*untrained_like(facts))


def pca_name(facts: dict) -> str:
    return f"pca_{min(facts['d_sae'], facts['d_in'])}"


def principal_components(store: ActivationStore, d_sae: int) -> dict[str, Tensor]:
    """{"W": the min(d_sae, d_in) leading components `[d_in, n]`, "mean" `[d_in]`}; PCA of the size of an SAE."""
    mean, covariance = store.stats()
    _, vectors = torch.linalg.eigh(covariance.double())
    return {"W": vectors.flip(1)[:, :d_sae].float().contiguous(), "mean": mean.float().contiguous()}


# ---------------------------------------------------------------------------------------------------------------------
# Matched references


def reference_family(family: str) -> str:
    """ReLU with an L1 penalty; for a ReLU SAE, TopK."""
    return "topk" if family in ("relu", "standard") else "relu"


def unmatched(candidate: dict, reference: dict) -> str | None:
    """Why a reference (its facts, `candidates.facts_of`) is no match for a candidate; None if it is one."""
    for name in ALIKE:
        for who, facts in (("candidate", candidate), ("reference", reference)):
            if facts.get(name) is None:
                return f"{name} of the {who} is not known"
        if candidate[name] != reference[name]:
            return f"{name} differs: {_short(candidate[name])} and {_short(reference[name])}"
    a, b = candidate.get("l0"), reference.get("l0")
    if not (a and b and same_l0(a, b)):
        return f"L0 differs by more than 10 %: {_short(a)} and {_short(b)}"
    return None


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


@dataclass(frozen=True)
class Match:
    """The records of a reference condition, or why there is none."""

    records: list[dict]
    reason: str | None = None


def matched(candidates: list[dict], references: list[dict]) -> Match:
    """The reference condition that matches a candidate's condition; of several, the nearest in L0.

    Args:
        candidates: records of one condition (with `facts`); references: records of any, with `condition` and `facts`.
            Each seed's facts must match those of its partner, in order of seeds.
    """
    wanted = reference_family(candidates[0]["facts"]["family"])
    groups: dict[str, list[dict]] = {}
    for r in references:
        if r["facts"].get("family") in ((wanted, "standard") if wanted == "relu" else (wanted,)):
            groups.setdefault(r["condition"], []).append(r)
    if not groups:
        return Match([], f"no {wanted} reference whose facts are known is at hand")
    fitting, reasons = [], []
    for name in sorted(groups):
        pairs = list(zip(candidates, sorted(groups[name], key=lambda r: r["facts"]["seed"] or 0), strict=False))
        reason = next((why for c, r in pairs if (why := unmatched(c["facts"], r["facts"]))), None)
        reasons.append(reason)
        if reason is None:
            distance = abs(sum(c["facts"]["l0"] - r["facts"]["l0"] for c, r in pairs))
            fitting.append((distance / len(pairs), name, [r for _, r in pairs]))
    if fitting:
        return Match(min(fitting)[2])
    return Match([], max(reasons, key=lambda why: why.startswith("L0")))  # what came nearest


# ---------------------------------------------------------------------------------------------------------------------
# The map of CE-Bench baselines: hook name, layer or "default" -> path of a summary, or null


def lookup(path: Path, hook_name: str) -> tuple[Path | None, str | None]:
    """(the summary that a map names for a hook, None); (None, the reason) where it names none.

    A summary's path counts from the map's own folder, else from the repository's.

    Raises:
        BadInput: the map is damaged, or names a file that does not exist.
    """
    table = read_json(path, "baseline map")
    if not isinstance(table, dict) or not all(v is None or isinstance(v, str) for v in table.values()):
        raise BadInput(f"baseline map: {path}: an object of paths or nulls expected")
    layer = hook_name.split(".")[1] if hook_name.startswith("blocks.") else ""
    key = next((k for k in (hook_name, layer, "default") if k in table), None)
    if key is None or table[key] is None:
        return None, f"{path.name} names no baseline for {hook_name}"
    places = [path.parent / table[key], REPOSITORY / table[key]]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise BadInput(f"baseline map: {path}: {key!r} names {table[key]}, which does not exist")
    return found, None


def read_summary(path: Path) -> dict:
    """The results of an earlier CE-Bench run whose SAEs serve as references.

    Raises:
        BadInput: damaged. A summary that names no SAEs is read: nothing will match it.
    """
    summary = read_json(path, "baseline summary")
    if not isinstance(summary, dict):
        raise BadInput(f"baseline summary: {path}: an object expected")
    saes = summary.get("saes", [])
    kinds = {"facts": dict, "condition": str, "identity": str, "normalised": float, "normalised_of_pairs": list}
    if not isinstance(saes, list) or not all(
        isinstance(r, dict) and all(isinstance(r.get(name), kind) for name, kind in kinds.items()) for r in saes
    ):
        raise BadInput(f"baseline summary: {path}: saes: records with {', '.join(kinds)} expected")
    if any("seed" not in r["facts"] or len(r["normalised_of_pairs"]) != summary.get("n_pairs") for r in saes):
        raise BadInput(f"baseline summary: {path}: saes: a seed, and a score for each of n_pairs pairs expected")
    return summary | {"saes": saes}


def write_map(path: Path, hook_name: str, summary: str) -> Path:
    """Write a map that names a summary for one hook and nothing for any other."""
    layer = {hook_name.split(".")[1]: summary} if hook_name.startswith("blocks.") else {}
    write_json(path, {"default": None, hook_name: summary, **layer})
    return path
