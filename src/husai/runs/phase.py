"""Runs a phase. Its whole result is a cell, which a repeated run reads without importing torch."""

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
        compute: function that returns the results, with `inputs` (label -> sha256), and the files that they depend on.
            The cell's key covers all code that the function may import.
        check: function that raises CheckFailed if the results fail a check. The results are kept.

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
    """All files below a phase's folder of checkpoints, on which its results depend."""
    return [p for p in (folder / "checkpoints").rglob("*") if p.is_file() and not p.name.startswith(".")]
