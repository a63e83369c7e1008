"""Evidence folders, not trusted: the manifest is checked, and what rests on pairs of seeds is computed again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file
from husai.runs.folder import Manifest
from husai.stability.compare import summarise
from husai.stability.scores import GAP

NOT_KEPT = {"draws", "q95_of_mean"}
"""What rests on the single draws of a null, of which the evidence keeps the mean of each pair."""


def audit_evidence(root: Path) -> dict[str, list[str]]:
    """Every folder below docs/evidence with results or a manifest: name -> problems."""
    found = [p for name in ("results.json", "manifest.json") for p in (root / "docs" / "evidence").rglob(name)]
    return {str(folder.relative_to(root)): folder_problems(folder) for folder in sorted({p.parent for p in found})}


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with one evidence folder: its manifest, its files, what is computed again."""
    try:
        results = read_json(folder / "results.json", "evidence")
        manifest = Manifest.model_validate(read_json(folder / "manifest.json", "evidence"), strict=True)
    except BadInput as error:
        return [str(error)]
    except ValidationError as error:
        first = error.errors()[0]
        return [f"manifest.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"]
    except RecursionError:
        return ["results.json or manifest.json is nested too deep"]
    digests = {p.name: sha256_file(p) if p.is_file() else None for p in sorted(folder.iterdir())}
    problems = manifest_problems(manifest, results, digests)
    try:
        return problems + [f"{at}: {problem}" for at, study in studies(results) for problem in study_problems(study)]
    except (RecursionError, OverflowError) as error:
        return [*problems, f"results.json cannot be computed again ({type(error).__name__}: {error})"]


def manifest_problems(manifest: Manifest, results: Any, digests: dict[str, str | None]) -> list[str]:
    """Does the manifest speak of a finished run, of these results, and of every file beside them?

    Args:
        digests: name in the folder -> sha256, or None where it is no file. Figures lie flat in it.
    """
    problems = []
    if manifest.status != "complete" or manifest.return_code not in (0, 1):  # 1: a check did not hold, a result too
        ended = f"{manifest.status}, return code {manifest.return_code}"
        problems.append(f"the run is {ended}; complete and 0, or 1 for a check that did not hold, expected")
    if "summary.md" not in digests:
        problems.append("summary.md is missing")
    for name, sha256 in digests.items():
        expected = manifest.outputs.get(name, manifest.outputs.get(f"figures/{name}"))
        if name == "manifest.json":
            continue
        if expected is None:
            problems.append(f"{name} is not known to the manifest")
        elif sha256 != expected:
            problems.append(f"{name} is not the file that the manifest names (sha256 differs)")
    if not isinstance(results, dict) or results.get("inputs") != manifest.inputs:
        problems.append("the inputs in the results are not those in the manifest")
    return problems


def studies(value: Any, at: str = "") -> Iterator[tuple[str, dict]]:
    """(JSON pointer, object) of every object that has both `stability` and `pairs`."""
    if isinstance(value, dict) and {"stability", "pairs"} <= value.keys():
        yield at or "/", value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from studies(item, f"{at}/{key}")


def study_problems(study: dict) -> list[str]:
    """Compute `stability` again from `pairs`: every estimate, interval and null mean, and the verdict."""
    try:
        published = study["stability"]
        labels, missing = published["labels"], published["missing_nulls"]
        expected = set(combinations(range(len(labels)), 2))
        pairs = {
            (labels.index(p["a"]), labels.index(p["b"])): {
                null: {"mean": {GAP: 0.0} | scores, "draws": None}
                for null, scores in p.items()
                if null not in ("a", "b")
            }
            for p in study["pairs"]
        }
        if set(pairs) != expected or len(study["pairs"]) != len(expected):
            return ["pairs: each pair of labels once expected"]
        recomputed = summarise(labels, pairs, missing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"stability cannot be computed again from the pairs ({type(error).__name__}: {error})"]
    if GAP not in published:  # evidence from before there was one
        del recomputed[GAP]
    return list(differences(published, recomputed, "stability"))


def differences(published: Any, recomputed: Any, at: str) -> Iterator[str]:
    """Where two JSON values are not the same, numbers up to rounding."""
    if isinstance(published, dict) and isinstance(recomputed, dict):
        for key in sorted((published.keys() ^ recomputed.keys()) - NOT_KEPT):
            yield f"{at}/{key} is {'not recomputed' if key in published else 'missing'}"
        for key in [k for k in published if k in recomputed and k not in NOT_KEPT]:
            yield from differences(published[key], recomputed[key], f"{at}/{key}")
    elif type(published) is float and isinstance(recomputed, float):
        if not math.isclose(published, recomputed, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{at} is {published}, computed again {recomputed}"
    elif isinstance(published, bool) != isinstance(recomputed, bool) or published != recomputed:
        yield f"{at} is {published!r}, computed again {recomputed!r}"
