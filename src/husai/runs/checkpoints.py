"""How command lines and results name checkpoints. Imports nothing heavy: a repeated run reads only this.

A checkpoint is named by its path, as `sae-lens:RELEASE/SAE_ID`, or as `hf:REPO[@REVISION]/PATH`; either way it is a
`Path`. `dictionaries.sources` says what the names mean.
"""

from __future__ import annotations

from pathlib import Path

from husai.runs.files import relative

CATALOGUE, HUB = "sae-lens:", "hf:"


def in_catalogue(path: Path | str) -> bool:
    """Whether this names an SAE of SAELens' catalogue."""
    return str(path).startswith(CATALOGUE)


def is_name(path: Path | str) -> bool:
    """Whether this names a checkpoint of the catalogue or of the hub, in place of a path."""
    return str(path).startswith((CATALOGUE, HUB))


def write_place(path: Path, folder: Path) -> str:
    """How a file in `folder` refers to a checkpoint: a name as it is, a path from there."""
    return str(path) if is_name(path) else relative(path, folder)


def read_place(place: str, folder: Path) -> Path:
    """The checkpoint that a file in `folder` refers to (`write_place`)."""
    return Path(place) if is_name(place) else folder / place
