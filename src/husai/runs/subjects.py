"""Names and folders of subjects. Imports nothing heavy, because repeated runs import this module."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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
    """Precision of weights and arithmetic."""

    @classmethod
    def parse(cls, subject: str | Path) -> SubjectName:
        text = str(subject)
        match = None if Path(text).exists() else VERSIONED.fullmatch(text)
        if match is None:
            return cls(text)
        return cls(match["name"], match["revision"], "bfloat16" if match["dtype"] else "float32")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.name + revision + (f"#{self.dtype}" if self.dtype != DTYPES[0] else "")


def with_version(subject: str | Path | None, revision: str | None, dtype: DType | None) -> str | Path | None:
    """Name of a subject with the values of --revision and --dtype; unchanged without them.

    Raises:
        BadInput: a flag does not apply to this subject.
    """
    if revision is None and dtype in (None, DTYPES[0]):
        return subject
    flag = f"--dtype {dtype}" if revision is None else f"--revision {revision}"
    if subject is None or not is_language_model(subject):
        raise BadInput(f"{flag}: goes with a language model as --model-name")
    if revision is not None and folder_of(subject) is not None:
        raise BadInput(f"{flag}: a hub name as --model-name expected; {subject} is a folder")
    return str(SubjectName(str(subject), revision, dtype or DTYPES[0]))


def with_stated_version(
    subject: str | Path, revision: str | None, dtype: DType | None, given: DType | None = None, flag: str = "checkpoint"
) -> str:
    """Name of a subject in the revision and dtype that the SAEs' files state.

    Args:
        revision, dtype: values in these files; None where they state none.
        given: value of --dtype. flag: name of the flag that gave the SAEs, for messages.

    Raises:
        BadInput: the command line gives another revision or dtype, or the revision of a folder is unknown.
    """
    named = SubjectName.parse(subject)
    if revision not in (None, "main", named.revision):
        if named.revision is not None:
            raise BadInput(
                f"--revision {named.revision}: the SAEs of --{flag} were trained on revision {revision}; one of both "
                "expected"
            )
        folder = folder_of(subject)
        if folder is not None and revision not in _revisions_of(folder):
            raise BadInput(
                f"--{flag}: trained on revision {revision} of the model, and the folder {subject} does not say its "
                "revision; the hub's name of the model as --model-name, or --same-model where the folder holds this "
                "revision, expected"
            )
        named = replace(named, revision=None if folder else revision)
    if dtype not in (None, named.dtype) or (dtype and given not in (None, dtype)):
        if given is not None or named.dtype != DTYPES[0]:
            raise BadInput(
                f"--dtype {given or named.dtype}: the SAEs of --{flag} were trained on a model of {dtype}; one of both "
                "expected"
            )
        named = replace(named, dtype=dtype)
    return str(named)


def _revisions_of(folder: Path) -> set[str]:
    """Names of the revision in a snapshot of the hub's cache: its commit, branches and tags."""
    if folder.parent.name != "snapshots":
        return set()
    refs = folder.parents[1] / "refs"
    named = {str(p.relative_to(refs)) for p in refs.rglob("*") if p.is_file() and p.read_text().strip() == folder.name}
    return {folder.name} | named


def folder_of(subject: str | Path) -> Path | None:
    """Folder of a subject on this machine; None if the name is no local folder."""
    name = SubjectName.parse(subject).name
    folder = SHIPPED.get(name, Path(name))
    return folder if folder.is_dir() else None


def short_name(subject: str | Path) -> str:
    """Short name of a subject, which names its files. SAEs of other libraries name their model so."""
    path = Path(SubjectName.parse(subject).name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):  # the hub's cache
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def hub_name(subject: str | Path) -> str:
    """OWNER/NAME of a model if its name or its place in the hub's cache gives the owner; else NAME."""
    path = Path(SubjectName.parse(subject).name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    owned = len(path.parts) == 2 and not path.is_absolute() and folder_of(subject) is None
    return str(path) if owned else path.name


def is_language_model(subject: str | Path | None) -> bool:
    """True for the name or folder of a language model; false for None and for a folder of modular addition."""
    return subject is not None and not (Path(subject) / "subject.json").is_file()
