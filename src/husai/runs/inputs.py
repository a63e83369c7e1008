"""Key of a phase's cell, from its command line.

Each flag says once how it counts (`Parser.add_argument(..., counts=...)`): by its value, by the content of what it
names, or not at all. By default a path counts by content and anything else by value.
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
"""(argument, its flag) -> what the key holds (JSON)."""


class Arguments(argparse.Namespace):
    """Parsed arguments, and how each counts."""

    __slots__ = ("counts",)
    counts: dict[str, Counts]


def by_value(given: Any, flag: str) -> Any:
    return given


def not_at_all(given: Any, flag: str) -> None:
    return None


def by_content(given: Path | list[Path], flag: str) -> Any:
    """Digest of a file, or of all below a folder; of a list, one each.

    Raises:
        BadInput: there is no such file or folder, or it is empty.
    """
    if isinstance(given, list):
        return [by_content(path, flag) for path in given]
    if not given.exists():
        raise BadInput(f"{flag}: {given} does not exist")
    return tree_digest(given, flag)


def by_checkpoint(given: Path | list[Path], flag: str) -> Any:
    """Content of checkpoints. The configuration of a weights file lies beside it, and counts too."""
    if isinstance(given, list):
        return [by_checkpoint(path, flag) for path in given]
    if given.is_file():
        return digest([sha256_file(p) for p in (given, *sorted(given.parent.glob("*.json")))])
    return tree_digest(given, flag)


def by_subject(given: str | Path, flag: str) -> str:
    """Content of a subject's folder; a subject that is not on this machine counts by its name."""
    folder, subject = folder_of(given), SubjectName.parse(given)
    if folder is None:
        return str(given)
    content = tree_digest(folder, flag)
    return content if subject.dtype == DTYPES[0] else f"{content} {subject.dtype}"


def by_content_or_name(given: str, flag: str) -> str | None:
    """Content of a local file or folder; any other name counts by itself."""
    return content_or_name(given)


def key_of(args: argparse.Namespace) -> dict[str, Any]:
    """Argument -> how it counts, of those that are given.

    Raises:
        BadInput: what an argument names is not there.
    """
    counts = getattr(args, "counts", {})
    key = {}
    for name, given in vars(args).items():
        if given is not None:
            key[name] = counts.get(name, by_value)(given, f"--{name.replace('_', '-')}")
    return {name: value for name, value in key.items() if value is not None}
