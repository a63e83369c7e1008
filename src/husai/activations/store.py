"""A sharded, memory-mapped, content-addressed store of activations.

A store is a folder: `shard-00000.safetensors`, … (each one tensor `activations [rows, d_in]`), `stats.safetensors`
(`mean [d_in]`, `covariance [d_in, d_in]`, float64) and `manifest.json`. Its digest covers all of them, the subject and
the hook, and results name the store by it. Rows are in random order. The last rows are held out. A store of a language
model states their number, because training rows and held-out rows share no documents (or no tokens). Its shards also
hold the int64 labels `document` and `token` of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from husai.evidence.schemas import Sha256
from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json, sha256_file, write_bytes, write_json
from husai.runs.subjects import DType
from husai.subjects.hooks import same_place


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    return sha256_file(path)


class Shard(BaseModel):
    model_config = ConfigDict(extra="forbid")
    file: str
    rows: int
    bytes: int
    sha256: str


class TextUsed(BaseModel):
    """Documents that were read from a text source (`subjects.sources`)."""

    model_config = ConfigDict(extra="forbid")
    source: str
    revision: str | None  # commit of a hub data set
    heldout: bool
    documents: int
    duplicates: int  # documents left out because an earlier one is the same
    probing: int  # documents left out because a probing data set holds them
    empty: int  # rows without text
    digest: Sha256  # of documents and tokens, in order


class StoreManifest(BaseModel):
    """Facts of a store."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    subject: str  # a readable name
    subject_digest: Sha256
    hook_name: str
    position: str
    rows: int
    d_in: int
    dtype: DType
    row_seed: int
    control: str | None  # e.g. "gaussian(seed=0)"; null for the model's own activations
    shards: list[Shard]
    stats_sha256: str
    heldout_rows: int | None = None  # number of held-out rows, the last ones; null: any last rows may be held out
    text: TextUsed | None = None  # documents of a text source; absent for the packaged text
    harvesting: dict[str, Any] | None = None
    """Differences of the activations from HUSAI's own way (`subjects.harvesting`); absent without a difference."""
    dropped_rows: int | None = None
    """Number of rows left out by `activations.outliers.without_outliers`; absent if it was not requested."""

    @property
    def digest(self) -> str:
        """Digest of the content. A text counts by the documents that were read, not by its place."""
        return digest(self.to_json() if self.text is None else self.to_json() | {"text": self.text.digest})

    def to_json(self) -> dict:
        optional = ("text", "harvesting", "dropped_rows")
        return self.model_dump(exclude={name for name in optional if getattr(self, name) is None})


class StoreWriter:
    """Writes a store: append rows, then `finish()`. Memory: one shard and a covariance matrix.

    Args:
        folder: an empty folder (see `runs.files.publish_directory`).
        shard_rows: rows of a shard.
    """

    def __init__(self, folder: Path, d_in: int, dtype: DType = "float32", shard_rows: int = 65_536):
        self.folder, self.d_in, self.dtype, self.shard_rows = folder, d_in, dtype, shard_rows
        self.shards: list[Shard] = []
        self.pending: list[Tensor] = []
        self.pending_labels: list[dict[str, Tensor]] = []
        self.rows = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64)
        self.scatter = torch.zeros(d_in, d_in, dtype=torch.float64)

    def append(self, x: Tensor, labels: dict[str, Tensor] | None = None) -> None:
        """Add rows `[n, d_in]`, with integer labels `[n]` of their origin. All calls must use the same label names.

        Raises:
            BadInput: a value is NaN or infinite.
        """
        x = x.detach().cpu()
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            row = self.rows + int((~finite).nonzero()[0])
            raise BadInput(f"activations: row {row} holds a NaN or infinite value; finite values expected")
        # Chan, Golub & LeVeque (1979): exact merging of means and scatter matrices.
        chunk = x.double()
        mean, n = chunk.mean(0), len(chunk)
        delta, total = mean - self.mean, self.rows + n
        centred = chunk - mean
        self.scatter += centred.T @ centred + torch.outer(delta, delta) * (self.rows * n / total)
        self.mean += delta * (n / total)
        self.rows = total
        self.pending.append(x.to(getattr(torch, self.dtype)))
        self.pending_labels.append(labels or {})
        while sum(map(len, self.pending)) >= self.shard_rows:
            self._flush(self.shard_rows)

    def _flush(self, rows: int) -> None:
        everything = torch.cat(self.pending)
        labels = {name: torch.cat([part[name] for part in self.pending_labels]) for name in self.pending_labels[0]}
        rest = len(everything) > rows
        self.pending = [everything[rows:]] if rest else []
        self.pending_labels = [{name: label[rows:] for name, label in labels.items()}] if rest else []
        path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        tensors = {"activations": everything, **labels}
        write_bytes(path, save({name: t[:rows].contiguous() for name, t in tensors.items()}))
        self.shards.append(
            Shard(file=path.name, rows=min(rows, len(everything)), bytes=path.stat().st_size, sha256=sha256_file(path))
        )

    def finish(
        self,
        subject: str,
        subject_digest: str,
        hook_name: str,
        position: str,
        row_seed: int,
        control: str | None,
        heldout_rows: int | None = None,
        text: TextUsed | None = None,
        harvesting: dict[str, Any] | None = None,
        dropped_rows: int | None = None,
    ) -> None:
        """Write pending rows, statistics and manifest."""
        if self.rows == 0:
            raise BadInput("activations: no rows were harvested; at least one expected")
        if self.pending:
            self._flush(self.shard_rows)
        stats = self.folder / "stats.safetensors"
        write_bytes(stats, save({"mean": self.mean, "covariance": self.scatter / max(1, self.rows - 1)}))
        manifest = StoreManifest(
            version=1,
            subject=subject,
            subject_digest=subject_digest,
            hook_name=hook_name,
            position=position,
            rows=self.rows,
            d_in=self.d_in,
            dtype=self.dtype,
            row_seed=row_seed,
            control=control,
            shards=self.shards,
            stats_sha256=sha256_file(stats),
            heldout_rows=heldout_rows,
            text=text,
            harvesting=harvesting,
            dropped_rows=dropped_rows,
        )
        write_json(self.folder / "manifest.json", manifest.to_json())


@dataclass
class ActivationStore:
    """An opened store. Files are memory-mapped, and `read` copies only the requested rows."""

    folder: Path
    manifest: StoreManifest

    @classmethod
    def open(cls, folder: Path, subject_digest: str | None = None, hook_name: str | None = None) -> ActivationStore:
        """Open a store and check every byte of it, once in each process. A few gigabytes take seconds.

        Args:
            subject_digest, hook_name: required subject and hook of the store. None: any.

        Raises:
            BadInput: the folder holds no store, a file is damaged, or the store has another subject or hook.
        """
        value = read_json(folder / "manifest.json", "activation store")
        try:
            manifest = StoreManifest.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the top level"
            raise BadInput(f"activation store: {folder / 'manifest.json'}: {place}: {first['msg']}") from None
        for name, expected, value_of_store, same in (
            ("subject", subject_digest, manifest.subject_digest, str.__eq__),
            ("hook", hook_name, manifest.hook_name, same_place),
        ):
            if expected is not None and not same(expected, value_of_store):
                raise BadInput(
                    f"activation store: {folder} was harvested from {name} {value_of_store}; {expected} expected"
                )
        store = cls(folder, manifest)
        for shard in manifest.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise BadInput(f"activation store: {path} is missing or truncated; {shard.bytes} bytes expected")
        store._verify()
        return store

    def _verify(self) -> None:
        """Check every byte against the digests of the manifest."""
        for file, expected in [(s.file, s.sha256) for s in self.manifest.shards] + [
            ("stats.safetensors", self.manifest.stats_sha256)
        ]:
            path = self.folder / file
            if not path.is_file() or _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) != expected:
                raise BadInput(
                    f"activation store: {path} is not the file that the manifest names (sha256 differs); "
                    "delete the folder to have it made again"
                )

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def d_in(self) -> int:
        return self.manifest.d_in

    @property
    def labelled(self) -> bool:
        """Whether rows have the labels `document` and `token`."""
        with safe_open(self.folder / self.manifest.shards[0].file, framework="pt") as f:
            return {"document", "token"} <= set(f.keys())

    def stats(self) -> tuple[Tensor, Tensor]:
        """(mean `[d_in]`, covariance `[d_in, d_in]`), float64, over all rows."""
        stats = load_file(self.folder / "stats.safetensors")
        return stats["mean"], stats["covariance"]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 as float32 `[stop − start, d_in]`."""
        x = self._slice("activations", start, stop).float()
        if not x.isfinite().all():
            raise BadInput(f"activation store: {self.folder}, rows {start} to {stop}: NaN or infinite value")
        return x

    def window(self, start: int, stop: int) -> Tensor:
        """Rows start … stop−1; the interface that stores share with streams."""
        return self.read(start, stop)

    def labels(self, name: str, start: int, stop: int) -> Tensor:
        """`document` (a number derived from its sha256) or `token` of rows start … stop−1, int64 `[stop − start]`."""
        return self._slice(name, start, stop)

    def _slice(self, name: str, start: int, stop: int) -> Tensor:
        parts, first = [], 0
        for shard in self.manifest.shards:
            low, high = max(start, first), min(stop, first + shard.rows)
            if low < high:
                try:
                    with safe_open(self.folder / shard.file, framework="pt") as f:
                        parts.append(f.get_slice(name)[low - first : high - first])
                except (SafetensorError, OSError) as error:
                    raise BadInput(f"activation store: {self.folder / shard.file} is damaged ({error})") from None
            first += shard.rows
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def split(self, heldout_fraction: float) -> tuple[range, range]:
        """(training rows, held-out rows). Rows are in random order, therefore the last rows are a random sample.

        A store that was split by document when it was made keeps this split, and ignores the fraction.
        """
        n = self.rows - (self.manifest.heldout_rows or max(2, round(self.rows * heldout_fraction)))
        if n < 1:
            raise BadInput(f"activation store: {self.folder} has {self.rows} rows; too few to hold some out")
        return range(n), range(n, self.rows)
