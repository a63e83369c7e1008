"""A phase: one run, whose whole result is a cell, so that a repeat reads it without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.folder import Run
from husai.runs.inputs import key_of


def run_phase(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
    check: Callable[[dict], None] | None = None,
) -> None:
    """Compute a phase, or read its finished cell, and write results, summary and manifest.

    Args:
        compute: the study itself; returns its results, with `inputs` (label -> sha256), and the files they rest on. A
            change of the code that it may import is another cell.
        check: raises CheckFailed where the results, which are kept, do not hold.

    Raises:
        BadInput, CheckFailed.
    """
    config = key_of(args)
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
