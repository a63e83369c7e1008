"""A phase: one run, whose whole result is a cell, so that a repeat reads it without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.files import digest, sha256_file, tree_digest
from husai.runs.folder import Run
from husai.runs.subjects import folder_of

APART = ("output_dir", "artifact_root", "force", "layer")
"""Arguments that change no result."""


def run_phase(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
    brought: tuple[str, ...] = ("subject", "activation_cache_dir"),
    apart: tuple[str, ...] = (),
    check: Callable[[dict], None] | None = None,
) -> None:
    """Compute a phase, or read its finished cell, and write results, summary and manifest.

    Args:
        compute: the study itself; returns its results, with `inputs` (label -> sha256), and the files they rest on. A
            change of the code that it may import is another cell.
        brought: arguments that name folders which the user brings; they count by content, not by path.
        apart: further arguments that change no result.
        check: raises CheckFailed where the results, which are kept, do not hold.

    Raises:
        BadInput, CheckFailed.
    """
    contents = {flag: _contents(flag, given) for flag in brought if (given := getattr(args, flag)) is not None}
    left_out = (*APART, *brought, *apart)
    config = {k: v for k, v in vars(args).items() if k not in left_out and v is not None} | {"brought": contents}
    with Run(args.output_dir, config, args.device, args.threads) as run:
        cells = Cells(args.output_dir / "cells", args.force)
        key = {"config": config, "code": code_version(compute)}

        def whole() -> tuple[dict, list[Path]]:
            results, files = compute(args, cells)
            return results, sorted({*files, *checkpoints(args.output_dir)})

        results = cells.get(name, key, whole)
        run.inputs |= results["inputs"]
        text = summary(results)
        run.write(results, text)
        print(text)
        print(f"summary  {args.output_dir / 'summary.md'}")
        print(f"figures  {args.output_dir / 'figures'}")
        if check is not None:
            check(results)


def checkpoints(folder: Path) -> list[Path]:
    """All that training has left below a phase's folder: its results rest on these, references included."""
    return [p for p in (folder / "checkpoints").rglob("*") if p.is_file() and not p.name.startswith(".")]


def _contents(flag: str, given: Path | list[Path]) -> str | list[str]:
    what = f"--{flag.replace('_', '-')}"
    return [_content(flag, p, what) for p in given] if isinstance(given, list) else _content(flag, given, what)


def _content(flag: str, path: Path, what: str) -> str:
    """What a brought folder counts by: its content; a subject that is not on this machine counts by its name."""
    if flag != "subject" and path.is_file():  # a checkpoint's configuration lies beside its weights
        return digest([sha256_file(p) for p in (path, *sorted(path.parent.glob("*.json")))])
    if flag != "subject":
        return tree_digest(path, what)
    folder = folder_of(path)
    return str(path) if folder is None else tree_digest(folder, what)
