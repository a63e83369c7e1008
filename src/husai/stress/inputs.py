"""What a stress test's command line brings counts by its content. Imports nothing heavy: a repeated run reads this."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json
from husai.runs.phase import run_phase

CONFIRMED = "experiments/candidate_confirmation/results.json"
"""Below --artifact-root: what `run_candidate_confirmation.py` leaves."""


def look_up(args: argparse.Namespace) -> None:
    """Fill in --candidate where none is given and one is confirmed; give its content an argument of its own.

    Raises:
        BadInput: --candidate beside --checkpoint, or no such file.
    """
    if args.candidate and args.checkpoint:
        raise BadInput("--candidate and --checkpoint: one of them expected")
    found = args.artifact_root / CONFIRMED
    if not args.candidate and not args.checkpoint and found.is_file():
        args.candidate = found
    if args.candidate:
        args.candidate_content = digest(read_json(args.candidate, "candidate"))


def run_stress(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
    brought: tuple[str, ...] = (),
) -> None:
    """A phase (`runs.phase.run_phase`) about a candidate (`runs.cli.Parser.add_candidate`).

    Args:
        brought: further arguments that name what the user brings.
    """
    look_up(args)
    run_phase(args, name, compute, summary, ("subject", "checkpoint", *brought), ("candidate",))
