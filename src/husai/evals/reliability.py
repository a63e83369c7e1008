"""Judges each feature of an SAE: the whole analysis, from the command line's SAEs to the feature table."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import pandas as pd
import torch

from husai.evals import candidate, features, forecast, siblings
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

    user_saes: LoadedSAEs
    """The user's SAEs. The first one is judged."""
    plan: SiblingPlan | None
    """Recipe of the siblings. None: relatives replace siblings."""
    limits: list[str]
    """Reasons why nothing can be certified, one sentence each."""
    notes: list[str]
    """Notes on the SAEs, one sentence each."""
    forecast: list[str]
    """Time, memory and disk of the training, as lines of text."""


@dataclass(frozen=True, repr=False)
class Reliability:
    """Results of the analysis."""

    results: FeatureReliability
    table: pd.DataFrame
    """One row for each feature. `evidence.features.COLUMNS` explains the columns."""
    contexts: dict[str, dict]
    """Feature -> its strongest held-out contexts and those of its nearest partner (`features.contexts`)."""

    def __repr__(self) -> str:
        results, n = self.results, len(self.results.siblings)
        above = "not tested" if results.above_chance is None else results.above_chance.sentence()
        certified = "none" if results.certified is None else f"{results.statements['certified']:,}"
        return (
            f"Reliability of {results.sae.label}, {results.alive:,} alive features, {n} SAEs for comparison\n"
            f"  recur in one of them: {results.recur.estimate:.1%}\n"
            f"  certified: {certified}\n"
            f"  above chance: {above}"
        )


def compare(args: argparse.Namespace, device: torch.device) -> Prepared:
    """Open the SAEs, plan the siblings, and forecast the cost of their training.

    Args:
        args: parsed flags of `evals.flags.EvalParser.add_feature_reliability`.

    Raises:
        BadInput: the SAEs cannot be compared, there is no sibling, or a feature does not exist.
    """
    user_saes = siblings.first_named(candidate.find(args, device), args.checkpoint)
    width, others = user_saes.saes[0].sae.d_sae, len(user_saes.saes) - 1
    if unknown := [f for f in args.features or [] if not 0 <= f < width]:
        raise BadInput(f"--features {unknown[0]}: numbers from 0 to {width - 1} expected")
    siblings.refuse_dead(user_saes.saes[0])
    notes = (
        []
        if user_saes.harvesting.complete
        else [harvesting.line(harvesting.recorded(user_saes.harvesting, user_saes.subject))]
    )
    if args.relatives is not None:
        if others:
            raise BadInput(
                f"--relatives: goes with one --checkpoint, whose features are judged; {others + 1} were given"
            )
        limits = ["Relatives are not fresh trainings, therefore nothing is certified."]
        return Prepared(user_saes, None, limits, notes, [])

    limits, more = siblings.check(user_saes)
    to_train = args.siblings if args.siblings is not None else 0 if others else siblings.DEFAULT
    if others + to_train == 0:
        raise BadInput("--siblings 0 with one checkpoint: one sibling expected at least")
    if to_train == 0 and (args.tokens or args.buffer_rows):
        raise BadInput("--tokens and --buffer-rows: nothing is trained for several checkpoints; --siblings N expected")
    plan = siblings.make_plan(user_saes, to_train, args.tokens, args.train_rows, args.buffer_rows)
    sizes = args.artifact_root, device, others + to_train, args.rotations
    lines = forecast.estimate_siblings(user_saes, plan, *sizes).lines()
    return Prepared(user_saes, plan, limits, [*notes, *more, *siblings.departures(user_saes, plan)], lines)


def answer(args: argparse.Namespace, cells: Cells, device: torch.device) -> Reliability:
    """Train the siblings, judge every feature, and collect contexts of features.

    Raises:
        BadInput: as `compare`.
        CheckFailed: the siblings miss the SAE's L0.
    """
    compared = compare(args, device)
    user_saes = compared.user_saes
    for line in [*compared.forecast, *compared.notes, *compared.limits]:
        log.info("%s", line)
    if compared.plan is None:
        group = siblings.relatives(user_saes, args.relatives)
    else:
        group = siblings.compared(user_saes, compared.plan, cells, args.artifact_root, device, args.threads)

    bars = Bars(cosine=args.recurs_cosine, correlation=args.recurs_correlation, certified_at=args.certify_at)
    judged = features.judge(user_saes, group, bars, args.artifact_root, device, args.rotations, not compared.limits)
    chosen = args.features or features.shown(judged.table, args.contexts)
    return Reliability(
        features.sum_up(user_saes, group, judged, bars, compared.limits, compared.notes),
        judged.table,
        features.contexts(user_saes, group, judged, chosen),
    )


def feature_reliability(checkpoint: Any, model_name: str, hook_name: str, **flags: Any) -> Reliability:
    """Judge each feature of an SAE from Python, as `run_feature_reliability.py` does.

        import husai
        reliability = husai.feature_reliability("MY_SAE", "husai-tiny", "blocks.1.hook_resid_pre", siblings=14)
        reliability.table.query("statement == 'certified'")[["feature", "recurs", "low", "prototype_cosine"]]

    Args:
        checkpoint: path or name of an SAE, or a list of SAEs. The first one is judged.
        flags: flags of `run_feature_reliability.py`, with underscores: `siblings=6`, `text="my.jsonl"`.

    Raises:
        BadInput: the command would refuse the input.
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
