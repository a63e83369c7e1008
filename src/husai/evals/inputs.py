"""Cell-key entries of flags that know the domain. Imports nothing heavy, because repeated runs import this module."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from husai.runs.cells import Cells
from husai.runs.checkpoints import is_name
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY, digest, read_json, sha256_file
from husai.runs.inputs import by_checkpoint
from husai.subjects.sources import TextSource

CONFIRMED = "experiments/candidate_confirmation/results.json"
"""Results of `run_candidate_confirmation.py`, below --artifact-root."""


def by_named_checkpoint(given: Path | list[Path], flag: str) -> Any:
    """Content digests of checkpoints that are given by paths or names.

    Raises:
        BadInput: there is no such checkpoint.
    """
    if isinstance(given, list):
        return [by_named_checkpoint(path, flag) for path in given]
    if not is_name(given):
        return by_checkpoint(given, flag)
    from husai.dictionaries import foreign

    return [str(given), *(foreign.checkpoint_sha256(path) for path in foreign.find_all([given], flag))]


def by_checkout(given: Path, flag: str) -> str:
    """Digest of the code in a checkout of CE-Bench.

    Raises:
        BadInput: the folder holds no CE-Bench.
    """
    from husai.evals.cebench_checkout import code_digest

    return code_digest(given)


def by_text(given: TextSource, flag: str) -> str | None:
    """Fingerprint of a text: its name or its files. None for the packaged text."""
    return given.fingerprint()


def by_baseline_map(given: Path, flag: str) -> str:
    """Digest of a map of CE-Bench baselines and of the summaries that it names.

    Raises:
        BadInput: the map is damaged.
    """
    return digest([sha256_file(given), *map(sha256_file, summaries(given))])


def summaries(baseline_map: Path) -> list[Path]:
    """Files that a baseline map names, beside the map or in the repository; empty if the JSON is no table.

    Raises:
        BadInput: the map is missing, or is no JSON.
    """
    table = read_json(baseline_map, "baseline map")
    named = {v for v in table.values() if isinstance(v, str)} if isinstance(table, dict) else set()
    return [p for v in sorted(named) for p in (baseline_map.parent / v, REPOSITORY / v) if p.is_file()]


def look_up(args: argparse.Namespace) -> None:
    """Set --candidate to the confirmed candidate if neither --candidate nor --checkpoint is given.

    Raises:
        BadInput: both --candidate and --checkpoint are given.
    """
    if args.candidate and args.checkpoint:
        raise BadInput("--candidate and --checkpoint: one of them expected")
    confirmed = args.artifact_root / CONFIRMED
    if not args.candidate and not args.checkpoint and confirmed.is_file():
        args.candidate = confirmed


def run_stress(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
) -> None:
    """Run a phase (`runs.phase.run_phase`) about a candidate (`evals.flags.EvalParser.add_candidate`)."""
    from husai.runs.phase import run_phase

    look_up(args)
    run_phase(args, name, compute, summary)
