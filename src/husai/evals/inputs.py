"""What a command line brings counts by its content. Imports nothing heavy: a repeated run reads this."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from husai.evals.cebench_checkout import code_digest
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.runs.files import content_or_name, digest, read_json, sha256_file
from husai.runs.folder import REPOSITORY
from husai.runs.phase import run_phase

CONFIRMED = "experiments/candidate_confirmation/results.json"
"""Below --artifact-root: what `run_candidate_confirmation.py` leaves."""


def count_by_content(args: argparse.Namespace) -> tuple[str, ...]:
    """Give what --stories, --cebench-repo and --cebench-matched-baseline-map hold arguments of their own, so that a
    change in them is another result; returns these flags, whose paths count for nothing.

    Raises:
        BadInput: there is no CE-Bench at --cebench-repo, or the map is damaged.
    """
    flags = ("stories", "cebench_repo", "cebench_matched_baseline_map")
    args.stories_content = content_or_name(args.stories)
    if args.cebench_repo:
        args.cebench_code = code_digest(args.cebench_repo)
    if path := args.cebench_matched_baseline_map:
        args.baseline_map_content = digest([sha256_file(path), *map(sha256_file, summaries(path))])
    return flags


def summaries(baseline_map: Path) -> list[Path]:
    """The files that a baseline map names, beside it or in the repository; none where it is no table.

    Raises:
        BadInput: it is missing, or no JSON.
    """
    table = read_json(baseline_map, "baseline map")
    named = {v for v in table.values() if isinstance(v, str)} if isinstance(table, dict) else set()
    return [p for v in sorted(named) for p in (baseline_map.parent / v, REPOSITORY / v) if p.is_file()]


def run_study(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
) -> None:
    """A phase (`runs.phase.run_phase`) of whole banks; where its tasks run changes no result."""
    apart = ("executor", "ray_address", *count_by_content(args))
    run_phase(args, name, compute, summary, ("subject",), apart)


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
