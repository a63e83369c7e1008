"""Reads the evidence of the gate, and records all inputs. `release.gate` makes the decision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from husai.release import gate, selection
from husai.release import published as earlier
from husai.release.gate import Bundle, File, Thresholds
from husai.release.recompute import differences, run_problems
from husai.runs.errors import BadInput
from husai.runs.files import canonical_json, read_json, sha256_file


def read(path: Path) -> File | None:
    """Results of a run with their problems; None if there is no file."""
    if not path.is_file():
        return None
    sha256 = sha256_file(path)
    try:
        results, problems = run_problems(path)
        return File(str(path), sha256, results, problems)
    except (BadInput, RecursionError, OverflowError) as error:
        return File(str(path), sha256, None, [f"it cannot be read ({error})"])


def chosen_again(selected: File, studies: list[File]) -> File:
    """A selection with its problems. It has one if a selection from the same studies gives another result.

    Args:
        studies: results of studies. They must include those that the selection names by digest.
    """
    at_hand = {study.sha256: study for study in studies}
    try:
        digests, rules = selected.results["inputs"], selected.results["rules"]
        if absent := next((label for label, sha256 in digests.items() if sha256 not in at_hand), None):
            return replace(
                selected, problems=[*selected.problems, f"the study that it calls {absent} is not available"]
            )
        if bad := next((s for sha256 in digests.values() if (s := at_hand[sha256]).problems), None):
            return replace(selected, problems=[*selected.problems, f"a study that it read: {bad.problems[0]}"])
        read_studies = [selection.Study(label, sha256, at_hand[sha256].results) for label, sha256 in digests.items()]
        given = {n: rules[n] for n in ("weights", "min_seeds", "uncertainty", "require_both_external")}
        given |= {"confirmation_seeds": selected.results["confirmation_seeds"]}
        selected_again = json.loads(canonical_json(selection.select(read_studies, selection.Rules(**given))))
        problems = list(
            differences({name: selected.results[name] for name in selected_again}, selected_again, "selection")
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problems = [f"it cannot be made again ({type(error).__name__}: {error})"]
    return replace(selected, problems=[*selected.problems, *problems[:1]])


def strict(
    paths: dict[str, Path],
    thresholds: Thresholds,
    waived: dict[str, str],
    studies: list[Path],
    on_disk: Callable[[Path, Any], dict[str, str | None]],
) -> dict:
    """Results of the strict policy: the decision of `gate.decide`, with the digests of the evidence.

    The inputs of the selection hold the digests of the studies.

    Args:
        paths: label of `gate.MAKES` -> file. studies: results that the selection was made from.
        on_disk: function that identifies the checkpoints of a confirmation (`evals.loaded.on_disk`).
    """
    files = {label: read(path) for label, path in paths.items()}
    if files["selection"]:
        files["selection"] = chosen_again(files["selection"], [f for path in studies if (f := read(path))])
    confirmation = files["confirmation"]
    disk = on_disk(paths["confirmation"], confirmation.results) if confirmation else {}
    decision = gate.decide(Bundle(files, disk), thresholds, waived)
    return {
        "phase": "release_gate",
        "inputs": {label: f.sha256 for label, f in files.items() if f},
        "policy": "strict",
        **decision,
        "on_disk": disk,
        "read": {label: {"path": str(paths[label]), "sha256": f.sha256 if f else None} for label, f in files.items()},
    }


def published(paths: dict[str, Path], thresholds: Thresholds) -> dict:
    """Results of the earlier study's policy on its files, with the status of each gate under the strict policy.

    Raises:
        BadInput: a file is missing, or is no file of that study.
    """
    results_by_label = {n: read_json(paths[n], n) for n in ("phase4a", "transcoder", "ood", "selection")}
    selected = (
        results_by_label["selection"].get("selected") if isinstance(results_by_label["selection"], dict) else None
    )
    if not isinstance(selected, dict) or results_by_label["selection"].get("policy") != "published":
        raise BadInput(f"selection: {paths['selection']} was not made with --policy published")
    minima = {"saebench": thresholds.min_saebench_delta, "cebench": thresholds.min_cebench_delta}
    verdict = earlier.gate(
        results_by_label["phase4a"],
        results_by_label["transcoder"],
        results_by_label["ood"],
        selected,
        minima,
        thresholds.max_ood_drop,
    )
    gates = earlier.beside_strict(results_by_label["transcoder"], results_by_label["ood"], selected, verdict)
    return {
        "phase": "release_gate",
        "inputs": {n: sha256_file(paths[n]) for n in results_by_label},
        "policy": "published",
        "pass_all": False,
        "provisional": False,
        "outcome": "not passed",
        "candidate": None,
        "published": verdict,
        "gates": gates,
        "read": {n: {"path": str(paths[n]), "sha256": sha256_file(paths[n])} for n in results_by_label},
    }
