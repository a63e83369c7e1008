"""Audits decisions of the gate: each is computed again from the evidence in the repository that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from husai.release import gate
from husai.release.bundle import chosen_again
from husai.release.gate import GATES, Bundle, File, Thresholds
from husai.release.recompute import differences, of_earlier_rules, run_problems
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file

DECIDED = (
    "pass_all",
    "provisional",
    "outcome",
    "attempt",
    "licensed",
    "candidate",
    "thresholds",
    "looser_than_registered",
    "gates",
)


def decide_again(decision: dict, root: Path) -> dict:
    """The decision, computed again from the files below docs/evidence whose digests it names.

    Raises:
        LookupError, TypeError: the file is no decision of the strict gate.
        BadInput: a file below docs/evidence cannot be read.
    """
    path_of_digest = {sha256_file(path): path for path in sorted((root / "docs" / "evidence").rglob("results.json"))}
    files: dict[str, File | None] = {}
    for label in gate.MAKES:
        sha256 = decision["read"][label]["sha256"]
        path = path_of_digest.get(sha256)
        files[label] = None if path is None else File(str(path), sha256, *run_problems(path))
    if files["selection"]:
        digests_of_studies = [
            sha256 for sha256 in files["selection"].results["inputs"].values() if sha256 in path_of_digest
        ]
        studies = [
            File(str(path_of_digest[sha256]), sha256, *run_problems(path_of_digest[sha256]))
            for sha256 in digests_of_studies
        ]
        files["selection"] = chosen_again(files["selection"], studies)
    waived = {g["gate"]: g["waived"] for g in decision["gates"] if g["waived"] is not None}
    return gate.decide(Bundle(files, decision["on_disk"]), Thresholds(**decision["thresholds"]), waived)


def problem(path: Path, decision: Any, root: Path) -> str | None:
    """Reason why a file is no strict decision that follows from the repository's evidence; None if it is one."""
    try:
        if (decision["phase"], decision["policy"]) != ("release_gate", "strict"):
            return "it is no decision of the strict gate"
        _, problems = run_problems(path)
        if problems:
            return problems[0]
        recomputed = decide_again(decision, root)
        # Older decisions have no such key: they were about confirmed SAEs.
        published = {n: decision[n] for n in DECIDED} | {"unconfirmed": decision.get("unconfirmed")}
        difference = next(differences(published, {n: recomputed[n] for n in published}, "decision"), None)
    except (LookupError, TypeError, ValueError, AttributeError, BadInput, RecursionError) as error:
        return f"it is no decision of the strict gate ({type(error).__name__}: {error})"
    if difference is not None:
        return f"made again from docs/evidence it is another: {difference}"
    if [g["gate"] for g in decision["gates"]] != list(GATES):
        return "it does not say all gates"
    return None


def read_digests(decision: Any) -> set[str]:
    """sha256 of the files that a decision read; empty if it does not state them."""
    try:
        return {f["sha256"] for f in decision["read"].values()} - {None}
    except (LookupError, TypeError, AttributeError):
        return set()


def audit(root: Path) -> dict[str, list[str]]:
    """Folder -> problems of its decision, for every strict decision below docs/evidence under the present rules."""
    problems_of_folder = {}
    for path in sorted((root / "docs" / "evidence").rglob("results.json")):
        if of_earlier_rules(path, root):
            continue
        try:
            decision = read_json(path, "evidence")
        except BadInput:
            continue  # the audit of the folder reports it
        if (
            isinstance(decision, dict)
            and decision.get("phase") == "release_gate"
            and decision.get("policy") == "strict"
        ):
            why = problem(path, decision, root)
            problems_of_folder[str(path.parent.relative_to(root))] = [] if why is None else [why]
    return problems_of_folder
