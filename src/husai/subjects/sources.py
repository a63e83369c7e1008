"""Text sources: the packaged text, files and folders, saved data sets, and data sets of the hub, read as a stream.

Every reader is the `datasets` library's; no data set runs code of its own. Imports nothing heavy: a repeated run reads
only this. `reading` goes over the documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from husai.runs.errors import BadInput
from husai.runs.files import digest
from husai.subjects import text

if TYPE_CHECKING:
    from husai.subjects.reading import Reading

PACKAGED = "packaged"
HELD_OUT_EVERY = 10
"""One document in so many is held out of a source; of the packaged text one opening in `text.HELD_OUT_EVERY` is."""
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix of a file -> reader of the `datasets` library."""
COMPRESSED = (".gz", ".zst")
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class TextSource:
    """A text, by name, and the part of it that is read."""

    name: str = PACKAGED
    column: str = "text"
    split: str = "train"

    @classmethod
    def parse(cls, spec: str) -> TextSource:
        """The source that `str` of it names."""
        name, mark, query = spec.rpartition("?")
        if not mark or not re.fullmatch(r"((column|split)=[^&]*&?)+", query):
            return cls(spec)
        return cls(name, **dict(parse_qsl(query)))

    def __str__(self) -> str:
        """NAME, or NAME?column=C&split=S where these are not the usual ones: what evidence and plans hold."""
        changed = {n: v for n in ("column", "split") if (v := getattr(self, n)) != getattr(TextSource, n)}
        return self.name + (f"?{urlencode(changed)}" if changed else "")

    @property
    def packaged(self) -> bool:
        return self.name == PACKAGED

    def record(self) -> dict[str, Any]:
        """What results say of it: nothing of the packaged text."""
        return {} if self.packaged else {"text": str(self)}

    @property
    def path(self) -> Path | None:
        """The file or folder; None for the packaged text and for a name of the hub."""
        return None if self.packaged or not Path(self.name).exists() else Path(self.name)

    def check(self) -> None:
        """Raise BadInput for what is neither the packaged text, nor a file or folder that can be read, nor spelt like a
        name of the hub. Reads no document and asks no network."""
        if self.packaged:
            if self != TextSource():
                raise BadInput("--text-column and --text-split: go with --text SOURCE; --text is packaged")
        elif self.path is not None:
            files = self.files()
            if files is not None and self.split != TextSource.split:
                raise BadInput(f"--text-split {self.split}: {self.name} has no splits; it goes with saved data sets")
        elif not (hub := HUB_NAME.fullmatch(self.name)) or suffix_of(Path(hub["repository"])):
            raise BadInput(
                f"--text {self.name}: packaged, a file or folder, or a name of the hub (org/name[:config][@revision]) "
                "expected; there is no such file"
            )

    def files(self) -> list[Path] | None:
        """The files of a local source, in the order in which they are read; None for a saved data set.

        Raises:
            BadInput: none that can be read, or files of several kinds.
        """
        path = self.path
        assert path is not None
        if path.is_file():
            found = [path]
        elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return None
        else:
            below = (p for p in path.rglob("*") if p.is_file())
            shown = (p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
            found = sorted(p for p in shown if suffix_of(p))
        kinds = sorted({READERS.get(suffix_of(p) or "", "") for p in found})
        if len(kinds) != 1 or not kinds[0]:
            what = f"files of {len(kinds)} kinds ({', '.join(kinds)})" if len(kinds) > 1 else "no such file"
            raise BadInput(
                f"--text {path}: files of one kind ({', '.join(READERS)}, also {', '.join(COMPRESSED)}) or a folder of "
                f"datasets.save_to_disk expected; found {what}"
            )
        return found

    def fingerprint(self) -> str | None:
        """What the key of a phase holds: names, sizes and times of local files, because to read them all would take as
        long as the phase. What was used is named by its content (`TextUsed`). None for the packaged text."""
        if self.packaged:
            return None
        if self.path is None:
            return str(self)
        files = self.files() or sorted(p for p in self.path.rglob("*") if p.is_file())
        about = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
        return digest([self.column, self.split, about])

    def training(self) -> list[str] | Side:
        """Documents to train on: a list, each once, or a side of a stream."""
        return text.corpus().train if self.packaged else Side(self, heldout=False)

    def heldout(self) -> list[str] | Side:
        """Documents held out of `training`."""
        return text.corpus().heldout if self.packaged else Side(self, heldout=True)

    def heldout_texts(self, n: int, tokenizer: Any) -> list[str]:
        """The first n held-out documents, or all of them where there are fewer.

        Raises:
            BadInput: a source without one.
        """
        if self.packaged:
            return text.corpus().heldout[:n]
        from husai.subjects.reading import first_texts

        found = first_texts(Side(self, heldout=True), n, tokenizer)
        if not found:
            raise BadInput(f"--text {self.name}: none of its documents is held out; a larger source expected")
        return found

    def open(self) -> tuple[Any, str | None]:
        """(a `datasets.IterableDataset`, the revision of a hub's data set).

        Raises:
            BadInput: the source cannot be read, or has no such split.
        """
        import datasets

        datasets.disable_progress_bars()
        try:
            if self.path is None:
                return self._open_hub()
            files = self.files()
            if files is not None:
                reader = READERS[suffix_of(files[0]) or ""]
                names = [str(p) for p in files]
                return datasets.load_dataset(reader, data_files=names, split="train", streaming=True), None
            saved = datasets.load_from_disk(str(self.path))
            if isinstance(saved, datasets.DatasetDict):
                if self.split not in saved:
                    raise BadInput(f"--text-split {self.split}: one of {', '.join(saved)} expected")
                saved = saved[self.split]
            return saved.to_iterable_dataset(), None
        except BadInput:
            raise
        except Exception as error:  # whatever readers of six formats raise
            raise BadInput(f"--text {self.name}: cannot be read ({type(error).__name__}: {error})") from None

    def _open_hub(self) -> tuple[Any, str | None]:
        import datasets
        from huggingface_hub import HfApi

        hub = HUB_NAME.fullmatch(self.name)
        assert hub is not None  # `check` saw to it
        revision = HfApi().dataset_info(hub["repository"], revision=hub["revision"]).sha
        about = {"name": hub["config"], "revision": revision, "split": self.split}
        return datasets.load_dataset(hub["repository"], **about, streaming=True), revision


def suffix_of(path: Path) -> str | None:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.zst`; None for a file that no reader takes."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


@dataclass(frozen=True)
class Side:
    """The training or the held-out documents of a stream."""

    source: TextSource
    heldout: bool

    def read(self, tokenizer: Any) -> Reading:
        """One pass over its documents."""
        from husai.subjects.reading import Reading

        return Reading(self, tokenizer)


def with_flags(name: str | TextSource, column: str, split: str) -> TextSource:
    """The source that --text, --text-column and --text-split name, checked.

    Raises:
        BadInput: as `TextSource.check`.
    """
    source = name if isinstance(name, TextSource) else TextSource.parse(name)
    changed = {n: v for n, v in (("column", column), ("split", split)) if v != getattr(TextSource, n)}
    source = replace(source, **changed)
    source.check()
    return source
