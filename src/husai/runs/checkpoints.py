"""Names of checkpoints in command lines and results. Imports nothing heavy, because repeated runs import this module.

A name is a path, `sae-lens:RELEASE/SAE_ID` or `hf:REPO[@REVISION]/PATH`, each as a `Path`.
`dictionaries.sources` opens names.
"""

from __future__ import annotations

from pathlib import Path

from husai.runs.files import relative

CATALOGUE, HUB = "sae-lens:", "hf:"


def in_catalogue(path: Path | str) -> bool:
    """True for the name of an SAE in SAELens' catalogue."""
    return str(path).startswith(CATALOGUE)


def is_name(path: Path | str) -> bool:
    """True for a name in the catalogue or on the hub, False for a path."""
    return str(path).startswith((CATALOGUE, HUB))


def write_place(path: Path, folder: Path) -> str:
    """Reference to a checkpoint from a file in `folder`: a name as it is, a relative path otherwise."""
    return str(path) if is_name(path) else relative(path, folder)


def read_place(place: str, folder: Path) -> Path:
    """The checkpoint that a file in `folder` refers to (`write_place`)."""
    return Path(place) if is_name(place) else folder / place
