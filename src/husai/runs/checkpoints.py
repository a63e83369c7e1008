"""Names of checkpoints in command lines and results. Imports nothing heavy, because repeated runs import this module.

A name is a path, `sae-lens:RELEASE/SAE_ID` or `hf:REPO[@REVISION]/PATH`, each as a `Path`.
`dictionaries.sources` opens names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from husai.runs.errors import BadInput
from husai.runs.files import relative

CATALOGUE, HUB = "sae-lens:", "hf:"
EXPECTED = "a .safetensors, .pt or .npz file, or a folder that holds one"
ARCHIVES = (b"PK", b"\x80", b"\x93NUMPY")
"""First bytes of an archive of torch or numpy, of an older torch file, and of a bare matrix."""


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


def refuse_none(paths: Iterable[Path], flag: str, expected: str = EXPECTED) -> None:
    """Raise BadInput for a path that is named twice, does not exist, or is a file of another kind than checkpoints.
    Names are not looked up."""
    paths = list(paths)
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise BadInput(f"{flag}: {repeated[0]} is named twice; each SAE once expected")
    for path in (p for p in paths if not is_name(p)):
        if not path.exists():
            raise BadInput(
                f"{flag}: {path} does not exist; a checkpoint ({expected}), {CATALOGUE}RELEASE/SAE_ID or "
                f"{HUB}REPO[@REVISION]/PATH expected"
            )
        if path.is_file() and not _may_hold_tensors(path):
            raise BadInput(f"{flag} {path}: no checkpoint ({expected}, expected)")


def _may_hold_tensors(path: Path) -> bool:
    """Whether a file begins as torch, numpy and safetensors files do."""
    with open(path, "rb") as file:
        first = file.read(9)
    return first.startswith(ARCHIVES) or first[8:] == b"{"  # safetensors: eight bytes of length, then JSON
