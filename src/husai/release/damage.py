"""Damaged evidence, to try the gate on: every kind of damage at every place of every file.

A case is a bundle that passed, with one thing changed, and the gates that must no longer hold. Its files' problems are
found again and its digests are taken for signed again, so that only schema, binding and recomputation can tell.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from husai.release.gate import GATES, Bundle, Thresholds, decide
from husai.release.recompute import results_problems
from husai.runs.files import digest

OF_FILE = {
    "phase4a": ("positive_control",),
    "selection": tuple(g for g in GATES if g != "positive_control"),
    "confirmation": tuple(g for g in GATES if g != "positive_control"),
    "random_model": ("random_model",),
    "transcoder": ("transcoder",),
    "ood": ("ood",),
}
"""File -> the gates that rest on it."""
INFORMATIONAL: dict[str, str] = {}
"""Places (patterns) whose values nobody decides by -> why. What stands there may be edited, and nothing more."""
FEW = 3
"""Items of a list that are tried."""


@dataclass(frozen=True)
class Case:
    """A damaged bundle."""

    kind: str
    place: str
    """file/key/…"""
    bundle: Bundle
    gates: tuple[str, ...]
    """Must not hold any more."""
    thresholds: Thresholds = Thresholds()
    waived: tuple[str, ...] = ()

    def caught(self) -> bool:
        """Whether the gate does not pass, and none of these gates; first without computing the evidence again."""
        if self._refused(self.bundle):
            return True
        files = dict(self.bundle.files)
        label = self.place.split("/")[0]
        if (file := files.get(label)) is None:
            return False
        try:
            problems = results_problems(file.results)
        except (RecursionError, OverflowError) as error:
            problems = [str(error)]
        files[label] = replace(file, problems=problems)
        return self._refused(Bundle(files, self.bundle.on_disk))

    def _refused(self, bundle: Bundle) -> bool:
        decision = decide(bundle, self.thresholds, dict.fromkeys(self.waived, "said"))
        status = {g["gate"]: g["status"] for g in decision["gates"]}
        return not decision["pass_all"] and not any(status[g] == "PASS" for g in self.gates)


# ---------------------------------------------------------------------------------------------------------------------
# One value


NOTHING = object()
"""The damage does not apply here, or changes nothing."""


def _edited(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + int(rng.integers(1, 9))
    if isinstance(value, float):
        return value + float(rng.choice([-1, 1]) * rng.uniform(0.001, 0.1))
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]$", lambda m: "0" if m[0] != "0" else "1", value) if len(value) == 64 else value + "2"
    return NOTHING


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


VALUES: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    "null": lambda v, rng: None if v is not None else NOTHING,
    "number as text": lambda v, rng: str(v) if _number(v) else NOTHING,
    "number as boolean": lambda v, rng: bool(v) if _number(v) else NOTHING,
    "text as number": lambda v, rng: 1 if isinstance(v, str) else NOTHING,
    "NaN": lambda v, rng: float("nan") if _number(v) else NOTHING,
    "infinity": lambda v, rng: float("inf") if _number(v) else NOTHING,
    "list as object": lambda v, rng: {str(i): x for i, x in enumerate(v)} if isinstance(v, list) else NOTHING,
    "object as list": lambda v, rng: list(v.values()) if isinstance(v, dict) else NOTHING,
    "emptied": lambda v, rng: type(v)() if isinstance(v, dict | list) and v else NOTHING,
    "shorter": lambda v, rng: v[:-1] if isinstance(v, list) and v else NOTHING,
    "longer": lambda v, rng: [*v, v[-1]] if isinstance(v, list) and v else NOTHING,
    "unknown key": lambda v, rng: v | {"unknown": 0.5} if isinstance(v, dict) else NOTHING,
    "edited": _edited,
}
"""Damage to a value; keys are removed and renamed beside."""


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place below a JSON value; of a list the first, the last, and one in the middle."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value)) if len(value) <= FEW else [0, len(value) // 2, len(value) - 1]
    else:
        return
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(results: dict, at: tuple, change: Callable[[Any, Any], None]) -> dict:
    """Results with `change(parent, key)` done at a place; only what lies on the way there is copied."""
    results = top = copy.copy(results)
    for key in at[:-1]:
        results[key] = copy.copy(results[key])
        results = results[key]
    change(results, at[-1])
    return top


def of_values(bundle: Bundle, rng: np.random.Generator) -> Iterator[Case]:
    """Each kind of damage at each place of each file."""
    for label, file in bundle.files.items():
        for at in places(file.results):
            place = "/".join((label, *map(str, at)))
            value = _at(file.results, at)
            named = isinstance(at[-1], str)

            def case(kind: str, change: Callable, label=label, file=file, at=at, place=place) -> Case:
                results = changed(file.results, at, change)
                files = bundle.files | {label: replace(file, results=results, sha256=digest([place, kind]))}
                return Case(kind, place, Bundle(files, bundle.on_disk), OF_FILE[label])

            for kind, damage in VALUES.items():
                new = damage(value, rng)
                if new is not NOTHING and not (kind == "edited" and informational(place)):
                    yield case(kind, lambda parent, key, new=new: parent.__setitem__(key, new))
            if named:
                yield case("key removed", lambda parent, key: parent.pop(key))
                yield case("key renamed", lambda parent, key: parent.__setitem__(f"{key}_", parent.pop(key)))


def _at(value: Any, at: tuple) -> Any:
    for key in at:
        value = value[key]
    return value


def informational(place: str) -> bool:
    return any(re.fullmatch(pattern, place) for pattern in INFORMATIONAL)
