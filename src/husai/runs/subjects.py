"""Which subject a name or folder stands for. Imports nothing heavy: a repeated run reads only this."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY

SHIPPED = {"husai-tiny": REPOSITORY / "assets" / "husai-tiny"}
DType = Literal["float32", "bfloat16"]
DTYPES = get_args(DType)
VERSIONED = re.compile(r"(?P<name>[^@]+?)(@(?P<revision>[\w./-]+))?(#(?P<dtype>bfloat16))?")


@dataclass(frozen=True)
class SubjectName:
    """A subject as evidence and plans name it: NAME, NAME@REVISION, NAME#bfloat16 or NAME@REVISION#bfloat16."""

    name: str
    """A name, or a folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: DType = "float32"
    """Of weights and arithmetic."""

    @classmethod
    def parse(cls, subject: str | Path) -> SubjectName:
        text = str(subject)
        found = None if Path(text).exists() else VERSIONED.fullmatch(text)
        if found is None:
            return cls(text)
        return cls(found["name"], found["revision"], "bfloat16" if found["dtype"] else "float32")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.name + revision + (f"#{self.dtype}" if self.dtype != DTYPES[0] else "")


def with_version(subject: str | Path | None, revision: str | None, dtype: DType) -> str | Path | None:
    """A subject with the revision and dtype of --revision and --dtype; as it is where these are not given.

    Raises:
        BadInput: they do not go with this subject.
    """
    if revision is None and dtype == DTYPES[0]:
        return subject
    flag = f"--dtype {dtype}" if revision is None else f"--revision {revision}"
    if subject is None or not is_language_model(subject):
        raise BadInput(f"{flag}: goes with a language model as --model-name")
    if revision is not None and folder_of(subject) is not None:
        raise BadInput(f"{flag}: a hub name as --model-name expected; {subject} is a folder")
    return str(SubjectName(str(subject), revision, dtype))


def folder_of(subject: str | Path) -> Path | None:
    """The folder of a subject that lies on this machine; None for any other name."""
    name = SubjectName.parse(subject).name
    folder = SHIPPED.get(name, Path(name))
    return folder if folder.is_dir() else None


def short_name(subject: str | Path) -> str:
    """What names a subject's files, and the model that SAEs of other libraries were made for."""
    path = Path(SubjectName.parse(subject).name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):  # the hub's cache
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def hub_name(subject: str | Path) -> str:
    """OWNER/NAME of a model, as far as what it is called says its owner: the hub's cache and hub names do."""
    path = Path(SubjectName.parse(subject).name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    owned = len(path.parts) == 2 and not path.is_absolute() and folder_of(subject) is None
    return str(path) if owned else path.name


def is_language_model(subject: str | Path | None) -> bool:
    """Whether this is the name or folder of a language model; False for none and for a folder of modular addition."""
    return subject is not None and not (Path(subject) / "subject.json").is_file()
