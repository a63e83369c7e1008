"""Version of the code that computes a value. Changed comments do not count; changed constants of imported modules do.

It is part of the keys of cells, checkpoints and activation stores.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import husai
from husai.runs.files import write_text

PACKAGE = Path(husai.__file__).resolve().parent
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of a statement that hold other statements."""
DISTRIBUTIONS = {"PIL": "pillow", "markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Package -> its distribution, if the names differ. A query of the environment would take half a second."""
KEPT = 2000
"""Largest number of parsed source files that the package's `__pycache__` keeps."""


class Parsed(NamedTuple):
    """Facts of a source file."""

    tree: str
    """sha256 of the syntax tree without docstrings."""
    names: frozenset[str]
    """Dotted names that the file may import."""


@cache
def code_version(*computing: Callable | Path) -> str:
    """sha256 of the syntax trees of an import closure, and of the versions of the packages that it imports.

    The closure begins at the files that define the functions. It holds every module of husai, and every module beside
    a script, that is imported there or inside functions. Comments and docstrings do not count. A package counts by its
    installed version; `constraints.txt` pins its dependencies.

    Args:
        computing: functions that compute the value, or files of scripts.
    """
    files, packages = closure(frozenset(file_of(c) for c in computing))
    sha = hashlib.sha256(f"python {sys.version_info.major}.{sys.version_info.minor}\n".encode())
    for package in sorted(packages):
        sha.update(f"{package} {installed(package)}\n".encode())
    places = {path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.name: path for path in files}
    for place, path in sorted((str(place), path) for place, path in places.items()):
        sha.update(f"{place} {parsed(path).tree}\n".encode())
    return sha.hexdigest()


def file_of(computing: Callable | Path) -> Path:
    if isinstance(computing, Path):
        return computing.resolve()
    while isinstance(computing, partial):
        computing = computing.func
    return Path(inspect.unwrap(computing).__code__.co_filename).resolve()


@cache
def closure(roots: frozenset[Path]) -> tuple[frozenset[Path], frozenset[str]]:
    """(files that the roots import, including the roots; names of the packages that they import)."""
    files: set[Path] = set()
    packages: set[str] = set()
    left = list(roots)
    while left:
        path = left.pop()
        if path in files:
            continue
        files.add(path)
        for name in parsed(path).names:
            imported, package = modules(name, path), name.split(".")[0]
            left += imported
            if not imported and package not in (*sys.stdlib_module_names, PACKAGE.name):
                packages.add(package)
    keep(PACKAGE)
    return frozenset(files), frozenset(packages)


def modules(name: str, importer: Path) -> list[Path]:
    """Files that run when a file imports a dotted name: the module and its parent packages.

    Empty for third-party packages. A script also imports modules beside it.
    """
    parts = name.split(".")
    if parts[0] != PACKAGE.name and importer.is_relative_to(PACKAGE):
        return []
    root = PACKAGE.parent if parts[0] == PACKAGE.name else importer.parent
    places = [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    return [p for place in places for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()]


@cache
def parsed(path: Path) -> Parsed:
    """Facts of a source file, cached by content across processes.

    Parsing the whole package takes half a second, which every process of a queue would spend.
    """
    source, known = path.read_bytes(), kept(PACKAGE)
    key = hashlib.sha256(own_digest() + source).hexdigest()
    if key not in known:
        known[key] = parse(source, path)
    return known[key]


@cache
def own_digest() -> bytes:
    """Digest of this file, because cached facts depend on it."""
    return hashlib.sha256(Path(__file__).read_bytes()).digest()


def store_of(package: Path) -> Path:
    return package / "__pycache__" / f"code-{sys.version_info.major}{sys.version_info.minor}.json"


@cache
def kept(package: Path) -> dict[str, Parsed]:
    """Digest of a source -> its facts, from earlier processes; empty if the file is missing or damaged."""
    try:
        entries = json.loads(store_of(package).read_text())
        return {key: Parsed(str(tree), frozenset(map(str, names))) for key, (tree, names) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(package: Path) -> None:
    """Write the facts that this process added, if the package's folder is writable."""
    known, path = kept(package), store_of(package)
    entries = {key: [facts.tree, sorted(facts.names)] for key, facts in [*known.items()][-KEPT:]}
    text = json.dumps(entries)
    with contextlib.suppress(OSError):
        if not path.exists() or path.read_text() != text:
            write_text(path, text)


def parse(source: bytes, path: Path) -> Parsed:
    """Facts of a source.

    Raises:
        ValueError: a relative import.
    """
    tree = ast.parse(source, str(path))
    names, left = set(), [tree]
    while left:
        statement = left.pop()
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            if statement.level or not statement.module:
                raise ValueError(f"{path}: a relative import, whose module the code's version would not see")
            # `modules` decides whether an imported name is a module or an object of a module.
            names |= {f"{statement.module}.{alias.name}" for alias in statement.names}
        for block in BLOCKS:
            if isinstance(inner := getattr(statement, block, None), list):
                inner[:] = [s for s in inner if not is_text(s)]
                left += inner
    return Parsed(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(names))


def is_text(statement: ast.AST) -> bool:
    """True for a bare string: a docstring, or the description of a field."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@cache
def installed(package: str) -> str:
    """Installed version of the distribution of a top-level package; "absent" if it is not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "absent"
