"""One pass over a text source: each document once. The hash of a document decides whether it is held out.

A larger source therefore keeps the split. Memory: one batch of documents, and 16 bytes for each document read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from husai.runs.errors import BadInput
from husai.runs.files import write_bytes
from husai.subjects import text
from husai.subjects.sources import HELD_OUT_EVERY, Side

BATCH = 256
"""Documents that are read and hashed together."""
CHECKED_ROWS = 16
ROUND_TRIP = 0.95
"""Smallest share of a column's token ids that the subject's own tokenizer must reproduce."""


@dataclass(frozen=True)
class Document:
    sha256: str
    text: str
    tokens: np.ndarray | None
    """Token ids, int32; None if the source holds text."""

    @property
    def held_out(self) -> bool:
        return int(self.sha256[:8], 16) % HELD_OUT_EVERY == 0


class Reading:
    """One pass over a side in the source's order. Duplicates and documents of probing data sets are left out.

    Args:
        tokenizer: tokenizer of the subject, which decodes a column of token ids.
    """

    def __init__(self, side: Side, tokenizer: Any):
        self.side, self.tokenizer = side, tokenizer
        self.documents = self.duplicates = self.probing = self.empty = 0
        self.revision: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Facts of the documents read so far: the fields of `activations.store.TextUsed` except its digest."""
        names = ("revision", "documents", "duplicates", "probing", "empty")
        side = {"source": str(self.side.source), "heldout": self.side.heldout}
        return side | {name: getattr(self, name) for name in names}

    def __iter__(self) -> Iterator[Document]:
        source = self.side.source
        rows, self.revision = source.open()
        seen, elsewhere = Seen(), probing_documents()
        batches = iter(rows.iter(batch_size=BATCH))
        first = True
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # damaged rows raise various errors
                raise BadInput(f"--text {source.name}: cannot be read ({type(error).__name__}: {error})") from None
            if batch is None:
                return
            for document in self._documents(batch, first):
                key = bytes.fromhex(document.sha256[:32])
                if document.held_out != self.side.heldout:
                    continue
                if contains(elsewhere, key):
                    self.probing += 1
                elif not seen.add(key):
                    self.duplicates += 1
                else:
                    self.documents += 1
                    yield document
            first = False

    def _documents(self, batch: dict[str, list], first: bool) -> Iterator[Document]:
        source = self.side.source
        if source.column not in batch:
            raise BadInput(f"--text-column {source.column}: one of {', '.join(batch)} expected")
        values = [v for v in batch[source.column] if v is not None and not (hasattr(v, "__len__") and len(v) == 0)]
        self.empty += len(batch[source.column]) - len(values)
        if not values:
            return
        if isinstance(values[0], str):
            for value in values:
                if not isinstance(value, str):
                    raise BadInput(f"--text-column {source.column}: texts expected; found {type(value).__name__}")
                yield Document(text.document_id(value), value, None)
            return
        ids = [self._checked(v) for v in values]
        if first:
            self._refuse_other_tokenizer(ids[:CHECKED_ROWS])
        for tokens, decoded in zip(ids, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            yield Document(text.document_id(decoded), decoded, tokens)

    def _checked(self, value: Any) -> np.ndarray:
        column = f"--text-column {self.side.source.column}"
        tokens = np.asarray(value)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise BadInput(f"{column}: texts or lists of token ids expected; found {type(value).__name__}")
        if tokens.min() < 0 or tokens.max() >= len(self.tokenizer):
            raise BadInput(
                f"{column}: token id {tokens.max()}; ids below {len(self.tokenizer)}, of the subject's tokenizer, "
                "expected"
            )
        return tokens.astype(np.int32)

    def _refuse_other_tokenizer(self, rows: list[np.ndarray]) -> None:
        """Raise BadInput if the subject's tokenizer does not reproduce the ids of these rows."""
        special = set(self.tokenizer.all_special_ids)
        same = total = 0
        for row in rows:
            encoded_again = self.tokenizer(self.tokenizer.decode(row), add_special_tokens=False)["input_ids"]
            given, reproduced = (Counter(int(t) for t in ids if int(t) not in special) for ids in (row, encoded_again))
            same += (given & reproduced).total()
            total += max(given.total(), reproduced.total())
        if same < ROUND_TRIP * total:
            raise BadInput(
                f"--text-column {self.side.source.column}: token ids of the subject's tokenizer expected; it gives "
                f"{same / total:.0%} of them again. A column of text is read with any tokenizer"
            )


class Seen:
    """A set of 16-byte digests that takes 16 bytes for each: sorted runs whose lengths grow geometrically."""

    RECENT = 65_536

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []
        self.recent: set[bytes] = set()

    def add(self, key: bytes) -> bool:
        """Add a digest; returns True if it is new."""
        if key in self.recent or any(contains(run, key) for run in self.runs):
            return False
        self.recent.add(key)
        if len(self.recent) == self.RECENT:
            run = as_run(self.recent)
            self.recent.clear()
            while self.runs and len(self.runs[-1]) <= len(run):
                run = np.concatenate([self.runs.pop(), run])
                run.sort()
            self.runs.append(run)
        return True


def as_run(keys: set[bytes]) -> np.ndarray:
    """Sorted array of 16-byte digests."""
    return np.sort(np.array(list(keys), dtype="S16"))


def contains(run: np.ndarray, key: bytes) -> bool:
    """True if a sorted array of digests holds the key."""
    place = int(np.searchsorted(run, np.bytes_(key)))
    return place < len(run) and run[place] == np.bytes_(key).rstrip(b"\0")


@cache
def probing_documents() -> np.ndarray:
    """First 16 bytes of the sha256 of every text of the sae-probes data sets, sorted.

    It takes some ten seconds for each installed version of the package, and is kept in the user's cache.
    """
    text.data_folder()  # raises BadInput if the package is missing
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "husai"
    kept = home / f"probing_documents-{importlib.metadata.version('sae-probes')}.npy"
    with contextlib.suppress(OSError, ValueError):  # the file is missing or damaged
        run = np.load(kept)
        if run.dtype == np.dtype("S16") and len(run):
            return run
    digests: set[bytes] = set()
    for side in text.FAMILIES:
        for name in text.names(side):
            digests |= {hashlib.sha256(t.encode()).digest()[:16] for t in text.documents(name)}
    run, buffer = as_run(digests), io.BytesIO()
    np.save(buffer, run)
    with contextlib.suppress(OSError):
        write_bytes(kept, buffer.getvalue())
    return run


@cache
def first_texts(side: Side, n: int, tokenizer: Any) -> list[str]:
    """The first n documents of a side, or all of them."""
    texts = []
    for document in side.read(tokenizer):
        texts.append(document.text)
        if len(texts) == n:
            break
    return texts
