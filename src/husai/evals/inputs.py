"""How flags of the domain enter a cell's key. Imports nothing heavy: a repeated run reads this."""

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
"""Below --artifact-root: what `run_candidate_confirmation.py` leaves."""


def by_named_checkpoint(given: Path | list[Path], flag: str) -> Any:
    """Content of checkpoints, whether paths or names give them.

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
    """The code of a checkout of CE-Bench.

    Raises:
        BadInput: there is none.
    """
    from husai.evals.cebench_checkout import code_digest

    return code_digest(given)


def by_text(given: TextSource, flag: str) -> str | None:
    """A text by its name, or by its files; the packaged one does not count."""
    return given.fingerprint()


def by_baseline_map(given: Path, flag: str) -> str:
    """A map of CE-Bench baselines, with the summaries that it names.

    Raises:
        BadInput: the map is damaged.
    """
    return digest([sha256_file(given), *map(sha256_file, summaries(given))])


def summaries(baseline_map: Path) -> list[Path]:
    """The files that a baseline map names, beside it or in the repository; none where it is no table.

    Raises:
        BadInput: it is missing, or no JSON.
    """
    table = read_json(baseline_map, "baseline map")
    named = {v for v in table.values() if isinstance(v, str)} if isinstance(table, dict) else set()
    return [p for v in sorted(named) for p in (baseline_map.parent / v, REPOSITORY / v) if p.is_file()]


def look_up(args: argparse.Namespace) -> None:
    """Fill in --candidate where none is given and one is confirmed.

    Raises:
        BadInput: --candidate beside --checkpoint, or no such file.
    """
    if args.candidate and args.checkpoint:
        raise BadInput("--candidate and --checkpoint: one of them expected")
    found = args.artifact_root / CONFIRMED
    if not args.candidate and not args.checkpoint and found.is_file():
        args.candidate = found


def run_stress(
    args: argparse.Namespace,
    name: str,
    compute: Callable[[argparse.Namespace, Cells], tuple[dict, list[Path]]],
    summary: Callable[[dict], str],
) -> None:
    """A phase (`runs.phase.run_phase`) about a candidate (`evals.flags.EvalParser.add_candidate`)."""
    from husai.runs.phase import run_phase

    look_up(args)
    run_phase(args, name, compute, summary)
