"""Which features of an SAE can be trusted: the whole answer, from what the command line names to the feature table."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import pandas as pd
import torch

from husai.evals import candidate, features, siblings
from husai.evals.flags import EvalParser
from husai.evals.loaded import LoadedSAEs
from husai.evals.siblings import SiblingPlan
from husai.evidence.features import Bars, FeatureReliability
from husai.runs.cells import Cells
from husai.runs.cli import prepare
from husai.runs.errors import BadInput
from husai.subjects import harvesting

log = logging.getLogger("husai")


@dataclass(frozen=True)
class Prepared:
    """A comparison before anything is trained."""

    asked: LoadedSAEs
    """The user's SAEs. The first is judged."""
    plan: SiblingPlan | None
    """How siblings are trained; None: relatives take their place."""
    limits: list[str]
    """Why nothing can be certified, a sentence each."""
    notes: list[str]
    """Notes on the SAEs for the reader, a sentence each."""
    forecast: list[str]
    """Time, memory and disk of the training, as text."""


@dataclass(frozen=True)
class Reliability:
    """The answer."""

    results: FeatureReliability
    table: pd.DataFrame
    """One row a feature; `evidence.features.COLUMNS` explains its columns."""
    contexts: dict[str, dict]
    """Feature -> its strongest held-out contexts, and those of its nearest partner (`features.contexts`)."""


def compare(args: argparse.Namespace, device: torch.device) -> Prepared:
    """Open the SAEs, and plan and forecast what is trained.

    Args:
        args: of `evals.flags.EvalParser.add_feature_reliability`.

    Raises:
        BadInput: SAEs that cannot be compared, no sibling, or a feature that does not exist.
    """
    asked = siblings.first_named(candidate.find(args, device), args.checkpoint)
    width, others = asked.saes[0].sae.d_sae, len(asked.saes) - 1
    if unknown := [f for f in args.features or [] if not 0 <= f < width]:
        raise BadInput(f"--features {unknown[0]}: numbers from 0 to {width - 1} expected")
    siblings.refuse_dead(asked.saes[0])
    notes = [] if asked.said.complete else [harvesting.line(harvesting.recorded(asked.said, asked.subject))]
    if args.relatives is not None:
        if others:
            raise BadInput(
                f"--relatives: goes with one --checkpoint, whose features are judged; {others + 1} were given"
            )
        limits = ["Relatives are no fresh trainings, therefore nothing is certified."]
        return Prepared(asked, None, limits, notes, [])

    limits, more = siblings.check(asked)
    to_train = args.siblings if args.siblings is not None else 0 if others else siblings.DEFAULT
    if others + to_train == 0:
        raise BadInput("--siblings 0 with one checkpoint: one sibling expected at least")
    if to_train == 0 and (args.tokens or args.buffer_rows):
        raise BadInput("--tokens and --buffer-rows: nothing is trained for several checkpoints; --siblings N expected")
    plan = siblings.plan(asked, to_train, args.tokens, args.train_rows, args.buffer_rows)
    forecast = siblings.forecast(asked, plan, args.artifact_root, device, others + to_train, args.rotations)
    return Prepared(asked, plan, limits, [*notes, *more, *siblings.departures(asked, plan)], forecast.lines())


def answer(args: argparse.Namespace, cells: Cells, device: torch.device) -> Reliability:
    """Train the siblings, judge every feature, and collect contexts.

    Raises:
        BadInput: as `compare`.
        CheckFailed: the siblings miss the SAE's L0.
    """
    compared = compare(args, device)
    asked = compared.asked
    for line in [*compared.forecast, *compared.notes, *compared.limits]:
        log.info("%s", line)
    if compared.plan is None:
        group = siblings.relatives(asked, args.relatives)
    else:
        group = siblings.compared(asked, compared.plan, cells, args.artifact_root, device, args.threads)

    bars = Bars(cosine=args.recurs_cosine, correlation=args.recurs_correlation, certified_at=args.certify_at)
    judged = features.judge(asked, group, bars, args.artifact_root, device, args.rotations, not compared.limits)
    chosen = args.features or features.shown(judged.table, args.contexts)
    return Reliability(
        features.sum_up(asked, group, judged, bars, compared.limits, compared.notes),
        judged.table,
        features.contexts(asked, group, judged, chosen),
    )


def feature_reliability(checkpoint: Any, model_name: str, hook_name: str, **flags: Any) -> Reliability:
    """The same in Python.

        import husai
        found = husai.feature_reliability("MY_SAE", "husai-tiny", "blocks.1.hook_resid_pre", siblings=14)
        found.table.query("certified and above_chance")[["feature", "recurs", "low", "prototype"]]

    Args:
        checkpoint: path or name of an SAE, or a list of them, the first of which is judged.
        flags: those of `run_feature_reliability.py`, with underscores: `siblings=6`, `text="my.jsonl"`.

    Raises:
        BadInput: what the command refuses.
    """
    p = _Flags("")
    p.add_shared()
    p.add_feature_reliability()
    given = {"checkpoint": checkpoint, "model_name": model_name, "hook_name": hook_name} | flags
    words = []
    for name, value in given.items():
        if value is None or value is False:  # the flag's default
            continue
        if name == "features" and isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, values))]
    args = p.parse_feature_reliability(words)
    args.output_dir = args.artifact_root / "feature_reliability"
    device = prepare(args.device, args.threads)
    return answer(args, Cells(args.output_dir / "cells", args.force), device)


class _Flags(EvalParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)
