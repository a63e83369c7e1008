"""Checks that SAEs are seed replicates: by the settings in their files, and by the spread of their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from husai.dictionaries import recipes
from husai.dictionaries.sae import SAE
from husai.evidence import rules
from husai.evidence.schemas import Heldout
from husai.runs.errors import BadInput, Dependent
from husai.subjects.hooks import same_model, same_place

SHOWN = 60
"""Largest number of characters of a value in a message."""
ALIKE = {"hook_name": same_place, "hf_hook_name": same_place, "model_name": same_model}
"""Key -> function that tells whether two names mean one thing. Values of other keys must be equal."""


def check(flag: str, paths: Sequence[Path], saes: Sequence[SAE], heldout: Sequence[Heldout] = ()) -> list[str]:
    """Notes on SAEs that are judged as seeds of one condition; empty if nothing is unusual.

    Args:
        flag: flag that named the SAEs, for messages. heldout: held-out figures; empty if not measured.

    Raises:
        BadInput: the files show that two SAEs differ in more than their seed or share an initialisation, or the files
            state nothing and the figures are far apart.
    """
    settings = [recipes.settings_of(*each) for each in zip(paths, saes, strict=True)]
    conditions = [*map(_condition, saes)]
    _refuse_difference(flag, list(zip(paths, conditions, strict=True)))
    _refuse_difference(flag, [each for each in zip(paths, settings, strict=True) if each[1]])
    _refuse_one_start(flag, paths, saes, settings)

    silent = [path for path, setting in zip(paths, settings, strict=True) if not setting]
    notes = []
    if silent:
        notes.append(
            f"The files of {len(silent)} of {len(paths)} SAEs ({silent[0]}, …) do not say how they were trained. "
            "Whether they differ in their seed alone is judged by their figures."
        )
    if heldout:
        figures = [h.l0 for h in heldout], [h.explained_variance for h in heldout]
        if silent and (far := rules.far_apart(*figures, rules.FAR_L0, rules.FAR_EV)):
            raise BadInput(
                f"{flag}: {silent[0]} does not say how it was trained; {'; '.join(far)}; the files that its library "
                "writes beside it, or SAEs that differ in their seed alone, expected"
            )
        far = rules.far_apart(*figures, rules.UNUSUAL_L0, rules.UNUSUAL_EV)
        notes += [f"Figures of seeds of one condition lie apart: {each}." for each in far]
        notes += rules.outlier_note(heldout)
    return notes


def _condition(sae: SAE) -> dict[str, Any]:
    """Condition of an SAE, as far as its weights and names show it."""
    return {
        "source": recipes.library(sae),
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "subtract_b_dec": sae.subtract_b_dec,
        "hook_name": recipes.place_of(sae),
        "model_name": sae.metadata.get("model_name"),
    }


def _refuse_difference(flag: str, described: list[tuple[Path, dict[str, Any]]]) -> None:
    """Raise BadInput if the settings of an SAE differ from those of the first in more than the seed."""
    for path, other in described[1:]:
        first_path, first = described[0]
        keys = [key for key in dict.fromkeys([*first, *other]) if not recipes.may_differ(key)]
        different = [key for key in keys if key not in first or key not in other or not _alike(key, first, other)]
        if different:
            shown = ", ".join(f"{key} ({_shown(first, key)} and {_shown(other, key)})" for key in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise BadInput(
                f"{flag}: {first_path} and {path} differ in {shown}{more}; SAEs that differ in their "
                "seed alone expected"
            )


def _alike(key: str, first: dict[str, Any], other: dict[str, Any]) -> bool:
    one, two = first[key], other[key]
    return one == two or (key in ALIKE and None not in (one, two) and ALIKE[key](str(one), str(two)))


def _shown(settings: dict[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "not said"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _refuse_one_start(
    flag: str, paths: Sequence[Path], saes: Sequence[SAE], settings: Sequence[dict[str, Any]]
) -> None:
    """Raise Dependent if two SAEs start from one checkpoint, or share the seed of their initialisation."""
    seen: dict[str, Path] = {}
    for path, sae, setting in zip(paths, saes, settings, strict=True):
        starts = [f"{k}: {v}" for k, v in setting.items() if k.rpartition(".")[2] in recipes.STARTS and v]
        seed = recipes.initial_seed(path, sae, setting)
        starts += [] if seed is None else [f"{recipes.SEEDED[recipes.library(sae)]}: {seed}"]
        for start in starts:
            if start in seen:
                raise Dependent(
                    f"{flag}: {seen[start]} and {path} share their initialisation ({start}); independently initialised "
                    "SAEs expected"
                )
            seen[start] = path
