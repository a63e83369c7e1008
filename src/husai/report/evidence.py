"""Reads the runs below a folder for the report card, and checks each against its manifest.

A damaged run raises no error. Its section states the problem, and the other runs are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file
from husai.runs.folder import Manifest

PARTS = "parts.json"
"""File beside the parts of a release check: part -> reason why it left no results; null if it left some."""


def not_run(root: Path) -> dict[str, str]:
    """Part of a release check -> reason why it left no results."""
    try:
        content = read_json(root / PARTS, "parts")
    except BadInput:
        return {}
    parts = content if isinstance(content, dict) else {}
    return {name: reason for name, reason in parts.items() if isinstance(reason, str)}


@dataclass
class Phase:
    """A run, in one folder below the root."""

    folder: Path
    results: dict = field(default_factory=dict)
    """Empty if they are missing, damaged, or not the file that the manifest names."""
    sha256: str | None = None
    """Digest of results.json on disk."""
    manifest: Manifest | None = None
    seconds: float | None = None
    """Duration of the longest run that gave these results, because a repeat only reads finished cells."""
    summary: str | None = None
    """Markdown. None if it is missing, or not the file that the manifest names."""
    figures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Further files that the manifest names: tables, maps."""
    problems: list[str] = field(default_factory=list)
    """Problems of the run, as sentences."""
    notes: list[str] = field(default_factory=list)
    """Notes on an intact run, as sentences."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def phase(self) -> str:
        """Kind of run; the folder's name if the results do not state it."""
        phase = self.results.get("phase")
        return phase if isinstance(phase, str) else self.name


def phases(root: Path) -> list[Phase]:
    """Runs in the folders directly below `root`, by name.

    Raises:
        BadInput: the folder does not exist, or holds no run.
    """
    if not root.is_dir():
        raise BadInput(f"--results-root: {root} is not a folder")
    runs = [read_phase(folder) for folder in sorted(root.iterdir()) if folder.is_dir() and is_phase(folder)]
    if not runs:
        raise BadInput(f"--results-root: {root} holds no run; {root}/PHASE/results.json expected")
    return runs


def is_phase(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("results.json", "manifest.json")) or any(folder.glob("run_*/"))


def read_phase(folder: Path) -> Phase:
    """Read those results, summary and figures of a run that its manifest names."""
    phase = Phase(folder)
    phase.manifest = _manifest(folder / "manifest.json", phase.problems)
    _later_run(phase)
    named = phase.manifest.outputs if phase.manifest else {}
    if path := _whole(phase, "results.json", named):
        try:
            results = read_json(path, "results")
            phase.results = results if isinstance(results, dict) else {}
            if not phase.results:
                phase.problems.append("results.json holds no object.")
        except BadInput:
            phase.problems.append("results.json is not strict JSON.")
    if (folder / "results.json").is_file():
        phase.sha256 = sha256_file(folder / "results.json")
    if path := _whole(phase, "summary.md", named):
        phase.summary = path.read_text(errors="replace")
    for name in sorted(named):
        parts = PurePosixPath(name)
        if parts.suffix in (".png", ".csv") or name.endswith("_map.json"):
            places = [folder / name, folder / parts.name]  # copied evidence has no subfolders
            path = next((p for p in places if p.is_file() and ".." not in parts.parts), None)
            if path is None:
                continue
            if sha256_file(path) != named[name]:
                phase.problems.append(f"{name} is not the file that the manifest names, therefore it is not shown.")
                continue
            (phase.figures if parts.suffix == ".png" else phase.others).append(path)
    _note_facts(phase)
    return phase


def _manifest(path: Path, problems: list[str]) -> Manifest | None:
    if not path.is_file():
        problems.append("There is no manifest.json: no run was completed, and the files cannot be checked.")
        return None
    try:
        manifest = Manifest.model_validate(read_json(path, "manifest"))
    except (BadInput, ValidationError):
        problems.append("manifest.json is damaged: the files cannot be checked.")
        return None
    if manifest.status != "complete":
        problems.append(f"The run is not complete: {manifest.status}, return code {manifest.return_code}.")
    return manifest


def _whole(phase: Phase, name: str, named: dict[str, str]) -> Path | None:
    """Path of a file if it exists and is the one that the manifest names; else None."""
    path = phase.folder / name
    if not path.is_file():
        if phase.manifest is not None:
            phase.problems.append(f"{name} is missing.")
    elif phase.manifest is not None and named.get(name) != sha256_file(path):
        phase.problems.append(f"{name} is not the file that the manifest names (its sha256 differs).")
    elif phase.manifest is not None:
        return path
    return None


def _later_run(phase: Phase) -> None:
    """Add a problem if the last run is not the one that is shown."""
    manifest = phase.manifest
    runs = sorted(p for p in phase.folder.glob("run_*") if p.is_dir())
    if runs and (manifest is None or runs[-1].name > manifest.run_id):
        problems: list[str] = []
        last = _manifest(runs[-1] / "manifest.json", problems)
        state = f"{last.status}, return code {last.return_code}" if last else "no manifest: running, or killed"
        phase.problems.append(
            f"The last run is {runs[-1].name}: {state}." + (f" The page shows {manifest.run_id}." if manifest else "")
        )


def _seconds(phase: Phase, manifest: Manifest) -> float:
    """Longest duration among the run folders with the same results."""
    sha, seconds = manifest.outputs.get("results.json"), [manifest.wall_seconds]
    for path in phase.folder.glob("run_*/manifest.json"):
        run = _manifest(path, [])
        if run is not None and run.outputs.get("results.json") == sha:
            seconds.append(run.wall_seconds)
    return max(seconds)


def _note_facts(phase: Phase) -> None:
    """Add duration and notes from an intact manifest."""
    manifest = phase.manifest
    if manifest is None:
        return
    phase.seconds = _seconds(phase, manifest)
    if manifest.return_code != 0 and manifest.status == "complete" and phase.phase != "release_gate":
        phase.notes.append(f"A check of this phase did not hold (return code {manifest.return_code}).")
    if manifest.git_dirty:
        phase.notes.append("The code had changes that were not committed.")
    if manifest.git_commit is None:
        phase.notes.append(f"The commit is not known: {manifest.git_reason}.")
