"""Decisions of the gate, not trusted: each is made again from the evidence in the repository that it says it read."""

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


def again(decision: dict, root: Path) -> dict:
    """The decision, from the files below docs/evidence whose digests it names.

    Raises:
        LookupError, TypeError: it is no decision of the strict gate.
        BadInput: a file below docs/evidence is not readable.
    """
    there = {sha256_file(path): path for path in sorted((root / "docs" / "evidence").rglob("results.json"))}
    files: dict[str, File | None] = {}
    for label in gate.MAKES:
        sha256 = decision["read"][label]["sha256"]
        path = there.get(sha256)
        files[label] = None if path is None else File(str(path), sha256, *run_problems(path))
    if files["selection"]:
        named = [sha256 for sha256 in files["selection"].results["inputs"].values() if sha256 in there]
        studies = [File(str(there[sha256]), sha256, *run_problems(there[sha256])) for sha256 in named]
        files["selection"] = chosen_again(files["selection"], studies)
    waived = {g["gate"]: g["waived"] for g in decision["gates"] if g["waived"] is not None}
    return gate.decide(Bundle(files, decision["on_disk"]), Thresholds(**decision["thresholds"]), waived)


def problem(path: Path, decision: Any, root: Path) -> str | None:
    """Why a file is no decision of the strict gate that follows from the evidence in the repository; None if it is."""
    try:
        if (decision["phase"], decision["policy"]) != ("release_gate", "strict"):
            return "it is no decision of the strict gate"
        _, problems = run_problems(path)
        if problems:
            return problems[0]
        made = again(decision, root)
        said = {n: decision[n] for n in DECIDED} | {"unconfirmed": decision.get("unconfirmed")}  # older ones: confirmed
        found = next(differences(said, {n: made[n] for n in said}, "decision"), None)
    except (LookupError, TypeError, ValueError, AttributeError, BadInput, RecursionError) as error:
        return f"it is no decision of the strict gate ({type(error).__name__}: {error})"
    if found is not None:
        return f"made again from docs/evidence it is another: {found}"
    if [g["gate"] for g in decision["gates"]] != list(GATES):
        return "it does not say all gates"
    return None


def read_digests(decision: Any) -> set[str]:
    """sha256 of what a decision read; none where it does not say."""
    try:
        return {f["sha256"] for f in decision["read"].values()} - {None}
    except (LookupError, TypeError, AttributeError):
        return set()


def audit(root: Path) -> dict[str, list[str]]:
    """Every strict decision below docs/evidence by today's rules, passed or not, made again: folder -> problems."""
    found = {}
    for path in sorted((root / "docs" / "evidence").rglob("results.json")):
        if of_earlier_rules(path, root):
            continue
        try:
            decision = read_json(path, "evidence")
        except BadInput:
            continue  # the folder's own audit says so
        if (
            isinstance(decision, dict)
            and decision.get("phase") == "release_gate"
            and decision.get("policy") == "strict"
        ):
            why = problem(path, decision, root)
            found[str(path.parent.relative_to(root))] = [] if why is None else [why]
    return found
