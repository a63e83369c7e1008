"""Files that are either whole or absent, and digests of what they hold."""

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
    """One spelling for one value: sorted keys, no spaces, no NaN or Infinity (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def relative(path: Path, folder: Path) -> str:
    """The path from a folder, so that what is written there names no machine's places."""
    return os.path.relpath(path.resolve(), folder.resolve())


def write_bytes(path: Path, data: bytes) -> None:
    """Write atomically: after a crash `path` holds the old bytes or the new ones, never a part."""
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
    """Strict JSON (no NaN, no Infinity: ValueError), written atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str = "file") -> Any:
    """Read strict JSON.

    Raises:
        BadInput: the file is missing, unreadable, not JSON, or holds NaN or Infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not strict JSON")

    try:
        return json.loads(path.read_text(), parse_constant=refuse)
    except FileNotFoundError:
        raise BadInput(f"{what}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{what}: {path} is not readable as strict JSON ({error})") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an advisory lock file at `path`; the system releases it when the process ends, however it ends.

    Raises:
        BadInput: `wait` is false and another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BadInput(f"{path.parent} is in use by another run (lock {path.name}); wait for it to end") from None
        yield


def publish_directory(final: Path, build: Callable[[Path], None], replace: bool = False) -> None:
    """Let `build` fill a hidden folder, then show it under its name in one rename: no half-made folder is ever seen.

    Two processes that want the same folder build it once. With `replace`, an existing folder gives way.
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
    """Content digest of a local file or folder; any other name as it is."""
    return tree_digest(Path(name), name) if name is not None and Path(name).exists() else name


def tree_digest(path: Path, what: str) -> str:
    """sha256 of a file, or of the names and contents of all files below a folder, without hidden ones.

    Raises:
        BadInput: there is no such folder, or it holds no file.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise BadInput(f"{what}: {path} is not a folder")
    below = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    files = sorted(p for p in below if not any(part.startswith(".") for part in p.parts))
    if not files:
        raise BadInput(f"{what}: {path} holds no file")
    return digest({str(p): sha256_file(path / p) for p in files})
