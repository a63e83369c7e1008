"""Atomic files, locks, and digests of files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from husai.runs.errors import BadInput

REPOSITORY = Path(__file__).resolve().parents[3]


def canonical_json(value: Any) -> str:
    """Canonical JSON of a value: sorted keys, no spaces. Raises ValueError for NaN or Infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def relative(path: Path, folder: Path) -> str:
    """Path relative to a folder, because files must not name places of one machine."""
    return os.path.relpath(path.resolve(), folder.resolve())


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: after a crash `path` holds all old bytes or all new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically. Raises ValueError for NaN or Infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, name: str = "file") -> Any:
    """Read strict JSON.

    Raises:
        BadInput: the file is missing, unreadable, not JSON, or holds NaN or Infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not strict JSON")

    try:
        return json.loads(path.read_text(), parse_constant=refuse)
    except FileNotFoundError:
        raise BadInput(f"{name}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{name}: {path} is not readable as strict JSON ({error})") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an advisory lock file at `path`. The system releases the lock when the process ends for any reason.

    Raises:
        BadInput: `wait` is false and another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BadInput(f"{path.parent} is in use by another run (lock {path.name}); wait for it to end") from None
        yield


def publish_directory(final: Path, build: Callable[[Path], None], replace: bool = False) -> None:
    """Fill a hidden folder by `build`, then rename it. Therefore no incomplete folder is ever visible.

    Two processes that need the same folder build it once. With `replace`, an existing folder is replaced.
    """
    with locked(final.parent / f".{final.name}.lock"):
        if final.exists() and not replace:
            return
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old)
        else:
            os.replace(partial, final)


def content_or_name(name: str | None) -> str | None:
    """Content digest of a local file or folder. Any other name is returned unchanged."""
    return tree_digest(Path(name), name) if name is not None and Path(name).exists() else name


def tree_digest(path: Path, name: str) -> str:
    """sha256 of a file, or of the names and contents of all files below a folder, except hidden ones.

    Raises:
        BadInput: the folder does not exist, or holds no file.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise BadInput(f"{name}: {path} is not a folder")
    below = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    files = sorted(p for p in below if not any(part.startswith(".") for part in p.parts))
    if not files:
        raise BadInput(f"{name}: {path} holds no file")
    return digest({str(p): sha256_file(path / p) for p in files})
