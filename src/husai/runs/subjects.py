"""Which subject a name or folder stands for. Imports nothing heavy: a repeated run reads only this."""

from __future__ import annotations

from pathlib import Path

from husai.runs.files import REPOSITORY

SHIPPED = {"husai-tiny": REPOSITORY / "assets" / "husai-tiny"}


def folder_of(subject: str | Path) -> Path | None:
    """The folder of a subject that lies on this machine; None for any other name."""
    folder = SHIPPED.get(str(subject), Path(subject))
    return folder if folder.is_dir() else None


def is_language_model(subject: str | Path | None) -> bool:
    """Whether this is the name or folder of a language model; False for none and for a folder of modular addition."""
    return subject is not None and not (Path(subject) / "subject.json").is_file()
