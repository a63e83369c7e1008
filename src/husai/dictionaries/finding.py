"""Finds checkpoints below a folder: one for each training, the last one if a run keeps several."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from husai.runs.files import read_json

log = logging.getLogger("husai")
STEP = re.compile(r"(?P<word>step|steps|checkpoint|ckpt|iter|tokens|samples|epoch)?[_-]?(?P<number>\d+)")
FINAL = re.compile(r"final([_-]\d+)?|last|latest")
STATE = ("trainer_state.pt", "activation_scaler.json", "activations_store_state.safetensors")
"""Files of SAELens in a checkpoint folder from which a training resumes."""
LEARNING_STEP = re.compile(r"ae_(\d+)\.pt")
"""Name of dictionary_learning's RUN/checkpoints/ae_<step>.pt."""
STEPS_FOLDER, BEST = "checkpoints", "best"


def below(root: Path, checkpoints_in: Callable[[Path, list[str]], list[Path]]) -> list[Path]:
    """Checkpoints at or below a folder, sorted. Links to folders are followed; each folder is visited once.

    Args:
        checkpoints_in: function (folder, names of its files) -> checkpoints in the folder.
    """
    checkpoints: list[Path] = []
    visited: set[str] = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            inner.clear()
            continue
        visited.add(real)
        inner.sort()
        checkpoints += checkpoints_in(Path(folder), files)
    return sorted(checkpoints)


def of_each_run(checkpoints: list[Path], untrained: bool = False) -> list[Path]:
    """One checkpoint of each training, sorted. The log names runs with several checkpoints.

    Args:
        untrained: take a run's state from before its first step, if the run kept it.
    """
    runs: dict[Path, list[Path]] = defaultdict(list)
    steps = dict(_steps(checkpoints))
    for path in checkpoints:
        runs[steps.get(path, path)].append(path)
    for run, final in _finals_elsewhere(runs):
        runs[final] += runs.pop(run)
    kept = []
    for run, members in runs.items():
        start = [p for p in members if untrained and step_of(p) == 0]
        # The output of a training has the name of the run. `final` is later than every step.
        last = max(members, key=lambda p: (p == run, bool(FINAL.fullmatch(p.name)), step_of(p) or 0))
        chosen = start[0] if start else last
        kept.append(chosen)
        if len(members) > 1:
            _say(f"{chosen}: taken of the {len(members)} checkpoints of one training")
    return sorted(kept)


def step_of(path: Path) -> int | None:
    """Step in the name of a checkpoint; None without a step."""
    match = LEARNING_STEP.fullmatch(path.name) or STEP.fullmatch(path.name)
    return int(match[match.lastindex or 1]) if match else None


def _steps(checkpoints: list[Path]) -> Iterator[tuple[Path, Path]]:
    """(checkpoint, folder or checkpoint that represents its run), for checkpoints that are one of several of a run.

    Folders whose names are numbers may be seeds or steps. They are steps if SAELens' training state lies in them and
    their configurations name one run.
    """
    siblings: dict[Path, list[Path]] = defaultdict(list)
    for path in checkpoints:
        if LEARNING_STEP.fullmatch(path.name):
            at = path.parent
            yield path, at.parent if at.name == STEPS_FOLDER else at
        else:
            siblings[path.parent].append(path)
    for parent, members in siblings.items():
        finals = [p for p in members if FINAL.fullmatch(p.name)]
        others = [p for p in members if p not in finals]
        matches = [STEP.fullmatch(p.name) for p in others]
        if len(finals) > 1 or not all(matches) or len(members) < 2:
            continue
        are_steps_by_name = bool(finals) or all(m and m["word"] for m in matches)
        if are_steps_by_name or all(any((p / name).is_file() for name in STATE) for p in others):
            runs = [_run(p) for p in members]
            if all(run == runs[0] for run in runs):
                yield from ((p, parent) for p in members)


def _run(checkpoint: Path) -> Any:
    """(folder of checkpoints, seed) from SAELens' configuration. All steps of a run share both."""
    for name in ("runner_cfg.json", "cfg.json"):
        if (checkpoint / name).is_file():
            config = read_json(checkpoint / name, "checkpoint")
            if isinstance(config, dict) and "checkpoint_path" in config:
                return config["checkpoint_path"], config.get("seed")
    return None


def _finals_elsewhere(runs: dict[Path, list[Path]]) -> list[tuple[Path, Path]]:
    """(run, the run that holds its final SAE): RUN/checkpoints/… with RUN or RUN/output, and sparsify's RUN/best/….

    SAELens' output names the folder of its checkpoints. If it does not, RUN must hold exactly one SAE and one run of
    checkpoints.
    """
    pairs, outputs = [], {}
    for run, members in runs.items():
        run_settings = _run(members[0]) if len(members) == 1 and members[0] == run and run.is_dir() else None
        if run_settings and run_settings[0] and not any((run / name).is_file() for name in STATE):
            outputs[Path(run_settings[0]).name] = run
    for run in runs:
        parts = run.parts
        if (final := outputs.get(run.name) or outputs.get(run.parent.name)) and final != run:
            pairs.append((run, final))
        elif STEPS_FOLDER in parts[:-1]:
            at = Path(*parts[: len(parts) - 1 - parts[::-1].index(STEPS_FOLDER)])
            same = [r for r in runs if r.is_relative_to(at)]
            outside = [r for r in same if not r.is_relative_to(at / STEPS_FOLDER)]
            if len(outside) == 1 and len(same) == 2:
                pairs.append((run, outside[0]))
        elif BEST in parts[:-1]:
            at = Path(*parts[: parts.index(BEST)])
            hook = Path(*parts[parts.index(BEST) + 1 :])
            names = [at / hook, at / hook.relative_to(hook.parts[0])] if len(hook.parts) > 1 else [at / hook]
            pairs += [(run, name) for name in names if name in runs and name != run][:1]
    return pairs


@cache
def _say(line: str) -> None:
    """Log a line, once in each process."""
    log.info("%s", line)
