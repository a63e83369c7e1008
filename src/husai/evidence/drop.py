"""Loss of an SAE under a shift beyond the loss of the model itself.

These are pure functions of a run's figures, because the audit computes every estimate again.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from husai.evidence import deltas
from husai.evidence.data_sets import FAMILIES
from husai.evidence.estimates import Estimate, mean_over_seeds, mean_over_seeds_and_sets
from husai.evidence.schemas import OODStress, Shifted, SideBySide

CHANCE = 0.5
UNUSABLE = ("90_glue_qnli_OOD",)
"""Shifted versions whose labels or texts do not fit, as `evals.ood.unusable` finds them."""
ACTIVATION_FIGURES = ("explained_variance", "l0", "dead_share", "outside")


def lost(auc: SideBySide) -> np.ndarray:
    """AUC on a data set's own test rows − AUC on its shifted version, `[data sets]`."""
    return np.array(auc.id) - np.array(auc.ood)


def drops(shifted: Shifted, k: str) -> np.ndarray:
    """Loss of each SAE less the loss of the model, `[SAEs, data sets]`; positive: the SAE loses more."""
    return np.array([lost(sae.test_auc[k]) for sae in shifted.saes]) - lost(shifted.llm)


def drop(shifted: Shifted) -> dict[str, dict]:
    """k -> estimate of the mean drop over training seeds and all data sets, clustered by `families`.

    It is reported and decides nothing.
    """
    ks = shifted.saes[0].test_auc
    return {k: mean_over_seeds_and_sets(drops(shifted, k), shifted.families).to_json() for k in ks}


def kept(shifted: Shifted) -> list[int]:
    """Places of the data sets on whose shifted version the model's own probe is above chance (`ood_low` above 0.5).

    If the model's probe falls to chance, the SAE's relative drop is uninformative.
    """
    return [i for i, low in enumerate(shifted.llm.ood_low) if low > CHANCE]


def names_kept(shifted: Shifted) -> list[str]:
    """Names of the shifted versions that `kept` finds."""
    return [f"{shifted.data_sets[i]}_OOD" for i in kept(shifted)]


def on_kept(shifted: Shifted, k: str, level: float = 0.95) -> Estimate:
    """Mean drop over the data sets that `kept` finds, one figure for each seed. The sets are fixed, the seeds a sample.

    Raises:
        ValueError: the model's own probe is above chance under no shift.
    """
    return mean_over_seeds(drops(shifted, k)[:, kept(shifted)].mean(1), level)


def drop_where_kept(shifted: Shifted) -> dict[str, dict]:
    """k -> estimate that the rule reads (`on_kept`)."""
    ks = shifted.saes[0].test_auc
    if not kept(shifted):
        return {k: deltas.none("the model's own probe is above chance under no shift") for k in ks}
    return {k: on_kept(shifted, k).to_json() for k in ks}


def unused(data_sets: list[str], skipped: Iterable[str]) -> list[str]:
    """Usable shifted versions that were not used. A test on a choice of versions would not be fair."""
    used = {f"{name}_OOD" for name in data_sets} | set(skipped)
    return [name for name in FAMILIES["ood"]["shifted"] if name not in used]


def gap(families: dict) -> dict[str, dict]:
    """Mean AUC of SAEs less that of the model. Informational.

    `id`: on the probe sets, over seeds and data sets. `ood`: on the held-out family, over seeds alone, because one
    family does not generalise to others. `difference`: ood − id for each seed, although the data sets differ.

    Args:
        families: `id`, `ood` ({"data_sets", "families"}); `llm` and `test_auc` of `saes`: {"id", "ood"}.
    """
    differences = {
        side: np.array([sae["test_auc"][side] for sae in families["saes"]]) - np.array(families["llm"][side])
        for side in ("id", "ood")
    }
    return {
        "id": mean_over_seeds_and_sets(differences["id"], families["id"]["families"]).to_json(),
        "ood": mean_over_seeds(differences["ood"].mean(1)).to_json(),
        "difference": mean_over_seeds(differences["ood"].mean(1) - differences["id"].mean(1)).to_json(),
    }


def change(saes: list[dict]) -> dict[str, dict]:
    """Change of each figure of activations: shifted text − held-out text, paired by SAE."""
    return {
        name: mean_over_seeds([sae["ood"][name] - sae["id"][name] for sae in saes]).to_json()
        for name in ACTIVATION_FIGURES
    }


def decisions(stress: OODStress) -> dict[str, dict]:
    """Conclusions of a run, computed again from its figures: place in the results -> value."""
    conclusions = {
        "/shifted/drop": drop(stress.shifted),
        "/shifted/drop_where_kept": drop_where_kept(stress.shifted),
        "/activations/change": change(stress.activations["saes"]),
    }
    return conclusions if stress.families is None else conclusions | {"/families/gap": gap(stress.families)}
