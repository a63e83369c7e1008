"""Text sources: the packaged text, files and folders, saved data sets, and streamed data sets of the hub.

All readers belong to the `datasets` library, and no data set runs its own code. Imports nothing heavy, because repeated
runs import this module. `reading` iterates over the documents.
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
"""One in this many documents of a source is held out. The packaged text uses `text.HELD_OUT_EVERY` instead."""
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix of a file -> reader of the `datasets` library."""
COMPRESSED = (".gz", ".zst")
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class TextSource:
    """A named text, with the column and split to read."""

    name: str = PACKAGED
    column: str = "text"
    split: str = "train"

    @classmethod
    def parse(cls, spec: str) -> TextSource:
        """The inverse of `str`."""
        name, mark, query = spec.rpartition("?")
        if not mark or not re.fullmatch(r"((column|split)=[^&]*&?)+", query):
            return cls(spec)
        return cls(name, **dict(parse_qsl(query)))

    def __str__(self) -> str:
        """NAME, or NAME?column=C&split=S if these are not the defaults. Evidence and plans hold this form."""
        changed = {n: v for n in ("column", "split") if (v := getattr(self, n)) != getattr(TextSource, n)}
        return self.name + (f"?{urlencode(changed)}" if changed else "")

    @property
    def packaged(self) -> bool:
        return self.name == PACKAGED

    def record(self) -> dict[str, Any]:
        """Entry of results that names the text; empty for the packaged text."""
        return {} if self.packaged else {"text": str(self)}

    @property
    def path(self) -> Path | None:
        """The file or folder; None for the packaged text and for a name of the hub."""
        return None if self.packaged or not Path(self.name).exists() else Path(self.name)

    def check(self) -> None:
        """Raise BadInput unless the source is the packaged text, a readable file or folder, or has the form of a hub
        name. Reads no document and does not use the network."""
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
        """Files of a local source, in reading order; None for a saved data set.

        Raises:
            BadInput: no file can be read, or there are files of several kinds.
        """
        path = self.path
        assert path is not None
        if path.is_file():
            paths = [path]
        elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return None
        else:
            below = (p for p in path.rglob("*") if p.is_file())
            shown = (p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
            paths = sorted(p for p in shown if suffix_of(p))
        kinds = sorted({READERS.get(suffix_of(p) or "", "") for p in paths})
        if len(kinds) != 1 or not kinds[0]:
            problem = f"files of {len(kinds)} kinds ({', '.join(kinds)})" if len(kinds) > 1 else "no such file"
            raise BadInput(
                f"--text {path}: files of one kind ({', '.join(READERS)}, also {', '.join(COMPRESSED)}) or a folder of "
                f"datasets.save_to_disk expected; found {problem}"
            )
        return paths

    def fingerprint(self) -> str | None:
        """Entry of a phase's key: names, sizes and times of local files. None for the packaged text.

        Hashing the content would take as long as the phase. Evidence names the used text by content (`TextUsed`).
        """
        if self.packaged:
            return None
        if self.path is None:
            return str(self)
        files = self.files() or sorted(p for p in self.path.rglob("*") if p.is_file())
        facts = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
        return digest([self.column, self.split, facts])

    def training(self) -> list[str] | Side:
        """Training documents: a list without duplicates, or a side of a stream."""
        return text.corpus().train if self.packaged else Side(self, heldout=False)

    def heldout(self) -> list[str] | Side:
        """Documents held out of `training`."""
        return text.corpus().heldout if self.packaged else Side(self, heldout=True)

    def heldout_texts(self, n: int, tokenizer: Any) -> list[str]:
        """The first n held-out documents, or all if there are fewer.

        Raises:
            BadInput: the source has no held-out document.
        """
        if self.packaged:
            return text.corpus().heldout[:n]
        from husai.subjects.reading import first_texts

        texts = first_texts(Side(self, heldout=True), n, tokenizer)
        if not texts:
            raise BadInput(f"--text {self.name}: none of its documents is held out; a larger source expected")
        return texts

    def open(self) -> tuple[Any, str | None]:
        """(a `datasets.IterableDataset`, the revision of a data set of the hub).

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
        except Exception as error:  # readers of six formats raise various errors
            raise BadInput(f"--text {self.name}: cannot be read ({type(error).__name__}: {error})") from None

    def _open_hub(self) -> tuple[Any, str | None]:
        import datasets
        from huggingface_hub import HfApi

        hub = HUB_NAME.fullmatch(self.name)
        assert hub is not None  # `check` guarantees it
        revision = HfApi().dataset_info(hub["repository"], revision=hub["revision"]).sha
        arguments = {"name": hub["config"], "revision": revision, "split": self.split}
        return datasets.load_dataset(hub["repository"], **arguments, streaming=True), revision


def suffix_of(path: Path) -> str | None:
    """`.jsonl` for `a.jsonl` and for `a.jsonl.zst`; None for a file without a reader."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


@dataclass(frozen=True)
class Side:
    """The training or the held-out documents of a stream."""

    source: TextSource
    heldout: bool

    def read(self, tokenizer: Any) -> Reading:
        """One pass over the documents of the side."""
        from husai.subjects.reading import Reading

        return Reading(self, tokenizer)


def with_flags(name: str | TextSource, column: str, split: str) -> TextSource:
    """Source that --text, --text-column and --text-split name. It is checked.

    Raises:
        BadInput: as `TextSource.check`.
    """
    source = name if isinstance(name, TextSource) else TextSource.parse(name)
    changed = {n: v for n, v in (("column", column), ("split", split)) if v != getattr(TextSource, n)}
    source = replace(source, **changed)
    source.check()
    return source
