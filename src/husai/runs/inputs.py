"""Key of a phase's cell, from its command line.

Each flag declares its contribution once (`Parser.add_argument(..., counts=...)`): its value, the content of the
file or folder that it names, or nothing. By default a path counts by content and anything else by value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from husai.runs.errors import BadInput
from husai.runs.files import content_or_name, digest, sha256_file, tree_digest
from husai.runs.subjects import DTYPES, SubjectName, folder_of

Counts = Callable[[Any, str], Any]
"""(value of an argument, its flag) -> its contribution to the key (JSON)."""


class Arguments(argparse.Namespace):
    """Parsed arguments, with the contribution of each to the key."""

    __slots__ = ("counts",)
    counts: dict[str, Counts]


def by_value(value: Any, flag: str) -> Any:
    return value


def not_at_all(value: Any, flag: str) -> None:
    return None


def by_content(path: Path | list[Path], flag: str) -> Any:
    """Digest of a file, or of all files below a folder; a list of digests for a list of paths.

    Raises:
        BadInput: the file or folder does not exist, or is empty.
    """
    if isinstance(path, list):
        return [by_content(each, flag) for each in path]
    if not path.exists():
        raise BadInput(f"{flag}: {path} does not exist")
    return tree_digest(path, flag)


def by_checkpoint(path: Path | list[Path], flag: str) -> Any:
    """Content digests of checkpoints. JSON files beside a weights file count too."""
    if isinstance(path, list):
        return [by_checkpoint(each, flag) for each in path]
    if path.is_file():
        return digest([sha256_file(p) for p in (path, *sorted(path.parent.glob("*.json")))])
    return tree_digest(path, flag)


def by_subject(name: str | Path, flag: str) -> str:
    """Content digest of a subject's folder; the name of a subject that is not on this machine."""
    folder, subject = folder_of(name), SubjectName.parse(name)
    if folder is None:
        return str(name)
    content = tree_digest(folder, flag)
    return content if subject.dtype == DTYPES[0] else f"{content} {subject.dtype}"


def by_content_or_name(name: str, flag: str) -> str | None:
    """Content digest of a local file or folder. Any other name is returned unchanged."""
    return content_or_name(name)


def key_of(args: argparse.Namespace) -> dict[str, Any]:
    """Argument -> its contribution to the key, without arguments that are None.

    Raises:
        BadInput: a file or folder that an argument names does not exist.
    """
    counts = getattr(args, "counts", {})
    key = {}
    for name, value in vars(args).items():
        if value is not None:
            key[name] = counts.get(name, by_value)(value, f"--{name.replace('_', '-')}")
    return {name: value for name, value in key.items() if value is not None}
