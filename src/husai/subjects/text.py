"""Real, labelled text of the installed sae-probes package, split once, by name, into three sides.

`train` holds the training text of husai-tiny, `probe` the data sets for probes, `ood` the shifted data. A family is a
group of data sets made from the same source texts. Each family belongs to one side as a whole. The table is fixed
(`evidence.data_sets`). The text is read from the package and never copied.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

from husai.evidence.data_sets import FAMILIES
from husai.runs.errors import BadInput
from husai.runs.files import digest

SIDES_APART = {"0.4.2"}
"""Versions of sae-probes that are known to hold no training document on another side. A check takes seconds."""
OPENING = 100  # characters; documents with equal openings share a passage and are held out together
HELD_OUT_EVERY = 50


def names(side: str) -> list[str]:
    """Data sets of a side, in the order of the table."""
    return [name for family in FAMILIES[side].values() for name in family]


def expand(chosen: list[str]) -> list[str]:
    """Names of data sets. `train`, `probe` and `ood` expand to a whole side.

    Raises:
        BadInput: a name is neither a side nor a data set.
    """
    known = {name for side in FAMILIES for name in names(side)}
    for name in chosen:
        if name not in FAMILIES and name not in known:
            raise BadInput(f"data set {name!r}: train, probe, ood or a name of the sae-probes package expected")
    return [name for part in chosen for name in (names(part) if part in FAMILIES else [part])]


def distinct(chosen: list[str]) -> list[str]:
    """Documents of the chosen data sets or sides, each once, ordered by hash."""
    text_of_id = {document_id(text): text for name in expand(chosen) for text in documents(name)}
    return [text_of_id[key] for key in sorted(text_of_id)]


def data_folder() -> Path:
    """Data folder of the installed sae-probes package. The package is not imported.

    Raises:
        BadInput: the package is not installed.
    """
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("the sae-probes package, whose texts are read, is not installed: make setup")
    return Path(spec.submodule_search_locations[0]) / "data"


def path_of(name: str) -> Path:
    """File of a data set."""
    return data_folder() / ("OOD data" if name.endswith("_OOD") else "cleaned_data") / f"{name}.csv.zst"


@lru_cache(maxsize=8)  # a study reads a few data sets several times
def table(name: str):
    """A data set as a table: columns `prompt` and `target`, one row for each document. Do not modify it."""
    from pyarrow import csv  # three times as fast as pandas' own reader, and every data set equals it

    path = path_of(name)
    if not path.is_file():
        raise BadInput(f"data set {name!r}: the installed sae-probes package has no {path.name}")
    lines = csv.ParseOptions(newlines_in_values=True)
    columns = csv.ConvertOptions(include_columns=["prompt", "target"])
    return csv.read_csv(path, parse_options=lines, convert_options=columns).to_pandas()


def documents(name: str) -> list[str]:
    """Texts of a data set, in order, including repeats."""
    return [str(text) for text in table(name)["prompt"]]


def document_id(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def binary_sets() -> list[str]:
    """Data sets with two classes, which form the sae-probes benchmark."""
    import pandas as pd

    master = pd.read_csv(data_folder() / "probing_datasets_MASTER.csv.zst", compression="zstd")
    saved = master[master["Data type"] == "Binary Classification"]["Dataset save name"]
    return [name.split("/")[-1].removesuffix(".csv") for name in saved]


def probe_sets() -> list[str]:
    """The benchmark's data sets on the probe side."""
    binary = set(binary_sets())
    return [name for name in names("probe") if name in binary]


@dataclass(frozen=True)
class Corpus:
    """Training documents of a language model, and held-out ones. Each document once, ordered by hash."""

    train: list[str]
    heldout: list[str]
    heldout_families: list[str]
    """Family of each held-out document."""
    dropped: int
    """Number of documents left out of training because a probe or out-of-distribution set holds them too."""

    @cached_property
    def trained_on(self) -> frozenset[str]:
        """Ids of the training documents."""
        return frozenset(map(document_id, self.train))

    @property
    def digest(self) -> str:
        return digest({"train": [*map(document_id, self.train)], "heldout": [*map(document_id, self.heldout)]})


def documents_elsewhere() -> set[str]:
    """Ids of all documents of the probe and out-of-distribution sides."""
    return {document_id(text) for side in ("probe", "ood") for name in names(side) for text in documents(name)}


@cache
def corpus() -> Corpus:
    """The training side without documents that occur on another side. One opening in 50 is held out.

    The result is cached, because reading takes seconds and a study uses it many times.
    """
    data_folder()  # raises BadInput if the package is missing
    known = importlib.metadata.version("sae-probes") in SIDES_APART
    elsewhere = set() if known else documents_elsewhere()
    texts: dict[str, tuple[str, str]] = {}
    for family, members in FAMILIES["train"].items():
        for name in members:
            texts |= {document_id(text): (text, family) for text in documents(name)}
    kept = [texts[key] for key in sorted(texts) if key not in elsewhere]
    held = [int(document_id(text[:OPENING])[:8], 16) % HELD_OUT_EVERY == 0 for text, _ in kept]
    return Corpus(
        train=[text for (text, _), out in zip(kept, held, strict=True) if not out],
        heldout=[text for (text, _), out in zip(kept, held, strict=True) if out],
        heldout_families=[family for (_, family), out in zip(kept, held, strict=True) if out],
        dropped=len(texts) - len(kept),
    )
