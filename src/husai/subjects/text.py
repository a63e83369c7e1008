"""Real, labelled text that the installed sae-probes package carries, split once, by name, into three sides.

`train` is what husai-tiny learns from, `probe` what probes are trained and scored on, `ood` what stands for a shift of
the data. A family is a group of data sets made from the same source texts, and lies on one side as a whole. The table
is fixed: subjects, probes and stress tests all read it here. The text itself is read from the package, never copied.
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
"""Versions of sae-probes in which no training document occurs on another side, which takes seconds to find out."""
OPENING = 100  # characters: documents that begin alike share a passage, and are held out together
HELD_OUT_EVERY = 50


def names(side: str) -> list[str]:
    """The data sets of a side, in the table's order."""
    return [name for family in FAMILIES[side].values() for name in family]


def expand(chosen: list[str]) -> list[str]:
    """Names of data sets, where `train`, `probe` and `ood` stand for a whole side.

    Raises:
        BadInput: a name that is neither a side nor a data set.
    """
    known = {name for side in FAMILIES for name in names(side)}
    for name in chosen:
        if name not in FAMILIES and name not in known:
            raise BadInput(f"data set {name!r}: train, probe, ood or a name of the sae-probes package expected")
    return [name for part in chosen for name in (names(part) if part in FAMILIES else [part])]


def distinct(chosen: list[str]) -> list[str]:
    """The documents of the chosen data sets (or sides), each once, ordered by hash."""
    found = {document_id(text): text for name in expand(chosen) for text in documents(name)}
    return [found[key] for key in sorted(found)]


def data_folder() -> Path:
    """Where the installed sae-probes package keeps its data; found without importing it.

    Raises:
        BadInput: the package is not installed.
    """
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("the sae-probes package, whose texts are read, is not installed: make setup")
    return Path(spec.submodule_search_locations[0]) / "data"


def path_of(name: str) -> Path:
    """The file of a data set."""
    return data_folder() / ("OOD data" if name.endswith("_OOD") else "cleaned_data") / f"{name}.csv.zst"


@lru_cache(maxsize=8)  # a study asks several times for the few data sets that it reads
def table(name: str):
    """A data set as pandas reads it: columns `prompt` and `target`, a row a document. Not to be changed."""
    import pandas as pd

    path = path_of(name)
    if not path.is_file():
        raise BadInput(f"data set {name!r}: the installed sae-probes package has no {path.name}")
    return pd.read_csv(path, compression="zstd")


def documents(name: str) -> list[str]:
    """The texts of a data set, in its order, repeats included."""
    return [str(text) for text in table(name)["prompt"]]


def document_id(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def binary_sets() -> list[str]:
    """The data sets with two classes: those of the sae-probes benchmark."""
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
    """What a language model is trained on, and the documents held out of it. Each document once, ordered by hash."""

    train: list[str]
    heldout: list[str]
    heldout_families: list[str]
    """Family of each held-out document."""
    dropped: int
    """Training documents that a probe or out-of-distribution set also holds; left out."""

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
    """The training side without whatever occurs on another side; one opening in 50 is held out.

    Kept, because it takes seconds to read and hash, and a study asks for it many times.
    """
    data_folder()  # says what to do without the package
    known = importlib.metadata.version("sae-probes") in SIDES_APART
    elsewhere = set() if known else documents_elsewhere()
    found: dict[str, tuple[str, str]] = {}
    for family, members in FAMILIES["train"].items():
        for name in members:
            found |= {document_id(text): (text, family) for text in documents(name)}
    kept = [found[key] for key in sorted(found) if key not in elsewhere]
    held = [int(document_id(text[:OPENING])[:8], 16) % HELD_OUT_EVERY == 0 for text, _ in kept]
    return Corpus(
        train=[text for (text, _), out in zip(kept, held, strict=True) if not out],
        heldout=[text for (text, _), out in zip(kept, held, strict=True) if out],
        heldout_families=[family for (_, family), out in zip(kept, held, strict=True) if out],
        dropped=len(found) - len(kept),
    )
