"""The cell cache: finished results are read instead of computed again.

The key of a cell is sha256(its configuration + the digests of its inputs + the version of the code that computes it). A
change in any of the three gives another cell. A finished cell is one atomically written JSON file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json, sha256_file, write_json

log = logging.getLogger("husai")
_used: ContextVar[set[Path] | None] = ContextVar("used", default=None)
"""Artefacts of the cells that the current computation has read."""


class Cells:
    """Finished cells in `folder`, one JSON file each.

    Args:
        folder: folder of the cells. Names of artefacts are relative to its parent.
        force: compute finished cells again.
    """

    def __init__(self, folder: Path, force: bool = False):
        self.folder, self.force = folder, force

    def get(self, name: str, config: dict, compute: Callable[[], tuple[Any, list[Path]]]) -> Any:
        """Value of a cell. It is read if the cell and all its artefacts are intact, else computed and written.

        Args:
            name: readable prefix of the file name.
            config: everything that the value depends on. Its digest is the key.
            compute: function that returns the value (JSON) and the files that it depends on. Files of cells that it
                reads, such as controls that phases share, are added.
        """
        key = digest(config)
        path = self.folder / f"{name}-{key[:16]}.json"
        if not self.force and path.exists():
            problem, value, artefacts = self._read(path, key)
            if problem is None:
                _note(artefacts)
                return value
            log.warning("cell %s: %s; computing it again", path.name, problem)
        inner: set[Path] = set()
        outer = _used.set(inner)
        try:
            value, files = compute()
        finally:
            _used.reset(outer)
        root = self.folder.parent.resolve()
        artefacts = {path.resolve() for path in files} | inner
        _note(artefacts)
        entry = {
            "key": key,
            "config": config,
            "artefacts": {os.path.relpath(p, root): sha256_file(p) for p in sorted(artefacts)},
            "value_sha256": digest(value),
            "value": value,
        }
        write_json(path, entry)
        return value

    def _read(self, path: Path, key: str) -> tuple[str | None, Any, set[Path]]:
        """(problem of the cell or None, its value, its artefacts)."""
        root = self.folder.parent.resolve()
        artefacts: set[Path] = set()
        try:
            entry = read_json(path, "cell")
            if entry["key"] != key:
                return "it was written for another key", None, artefacts
            if digest(entry["value"]) != entry["value_sha256"]:
                return "its value was changed after it was written", None, artefacts
            for name, expected in entry["artefacts"].items():
                artefact = Path(os.path.normpath(root / name))
                if not artefact.is_file():
                    return f"its artefact {name} is missing", None, artefacts
                if sha256_file(artefact) != expected:
                    return f"its artefact {name} was changed after it was written", None, artefacts
                artefacts.add(artefact)
        except (BadInput, KeyError, TypeError, AttributeError) as error:
            return f"it is damaged ({error})", None, artefacts
        return None, entry["value"], artefacts


def _note(artefacts: set[Path]) -> None:
    """Add artefacts to those of the cell that is being computed."""
    if (outer := _used.get()) is not None:
        outer |= artefacts
