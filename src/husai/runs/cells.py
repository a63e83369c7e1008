"""The cell cache: what is finished is read, not computed again.

A cell's key is sha256(its configuration + the digests of its inputs + the version of the code that computes it), so
that a change in any of the three is another cell. A finished cell is one atomically written JSON file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json, sha256_file, write_json

log = logging.getLogger("husai")


class Cells:
    """Finished cells in `folder`, one JSON file each.

    Args:
        folder: where the cells lie; artefacts of a cell are named relative to its parent.
        force: compute again what is there.
    """

    def __init__(self, folder: Path, force: bool = False):
        self.folder, self.force = folder, force

    def get(self, name: str, config: dict, compute: Callable[[], tuple[Any, list[Path]]]) -> Any:
        """The cell's value: read if the cell and all its artefacts are whole, else computed and written.

        Args:
            name: a readable prefix of the file name.
            config: everything that the value depends on; its digest is the key.
            compute: returns the value (JSON) and the files it rests on, which must lie below the parent of `folder`.
        """
        key = digest(config)
        path = self.folder / f"{name}-{key[:16]}.json"
        if not self.force and path.exists():
            problem, value = self._read(path, key)
            if problem is None:
                return value
            log.warning("cell %s: %s; computing it again", path.name, problem)
        value, artefacts = compute()
        root = self.folder.parent
        entry = {
            "key": key,
            "config": config,
            "artefacts": {str(p.relative_to(root)): sha256_file(p) for p in sorted(artefacts)},
            "value_sha256": digest(value),
            "value": value,
        }
        write_json(path, entry)
        return value

    def _read(self, path: Path, key: str) -> tuple[str | None, Any]:
        try:
            entry = read_json(path, "cell")
            if entry["key"] != key:
                return "it was written for another key", None
            if digest(entry["value"]) != entry["value_sha256"]:
                return "its value was changed after it was written", None
            for name, expected in entry["artefacts"].items():
                artefact = self.folder.parent / name
                if not artefact.is_file():
                    return f"its artefact {name} is missing", None
                if sha256_file(artefact) != expected:
                    return f"its artefact {name} was changed after it was written", None
        except (BadInput, KeyError, TypeError, AttributeError) as error:
            return f"it is damaged ({error})", None
        return None, entry["value"]
