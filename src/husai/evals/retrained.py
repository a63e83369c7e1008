"""The selected recipe, trained again on fresh seeds: what the gate reads of a candidate that a study selected."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from husai.evals import bank, sae_probes
from husai.evidence.data_sets import DATA_SETS, PAIR_SETS, families
from husai.evidence.levels import fresh_seeds
from husai.evidence.schemas import (
    Facts,
    LedgerEntry,
    Recipe,
    Retrained,
    Selected,
    Selection,
    refusal,
)
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import locked, read_json, sha256_file, write_json

LEDGER = "confirmations.json"
"""Ledger of all confirmations, below --artifact-root: neither --force nor another output folder starts it anew."""


def evaluate(args: argparse.Namespace) -> Retrained:
    """Train the recipe again; stability and benchmarks of the SAEs that come out.

    Args:
        args: of `run_candidate_confirmation.py`; `candidate` names the selection.

    Raises:
        BadInput: nothing was selected, a seed is not fresh, the seeds are not as many as selection fixed, selection has
            read all data sets, or the ledger of confirmations is damaged.
        CheckFailed: the recipe gives other facts here than it gave in the study.
    """
    sha256 = sha256_file(args.candidate)
    try:
        selection = Selection.model_validate(read_json(args.candidate, "candidate"))
        chosen = selection.selected
        facts, recipe = Facts.model_validate(chosen["facts"]), Recipe.model_validate(chosen["recipe"])
        subject, selected = chosen["subject"], Selected(sha256=sha256, id=chosen["id"])
    except ValidationError as error:
        raise BadInput(f"--candidate: {args.candidate} is no selection with a candidate ({refusal(error)})") from None
    except (KeyError, TypeError) as error:
        raise BadInput(f"--candidate: {args.candidate} is no selection with a candidate ({error})") from None
    hook_name, k, tokens = facts.hook_name, facts.k, facts.tokens
    if hook_name is None or k is None or tokens is None:
        raise BadInput(
            f"--candidate: {args.candidate}: hook_name, k and tokens of the candidate expected; found {hook_name}, {k} "
            f"and {tokens}"
        )
    fixed = selection.confirmation_seeds
    seeds = args.seeds or fresh_seeds(selection.seeds_used, fixed)
    if old := sorted(set(seeds) & set(selection.seeds_used)):
        raise BadInput(f"--seeds {old[0]}: a study used it; seeds that none did expected")
    if len(seeds) != fixed:
        raise BadInput(f"--seeds: {fixed} seeds expected, as many as the selection fixed; found {len(seeds)}")
    confirmations(args.artifact_root)  # a damaged ledger is seen before anything is trained
    names = args.dataset_names or selection.split.gate_data_sets or DATA_SETS.split(",")
    read = set(selection.split.selection_families)

    def left(sets: list[str]) -> list[str]:
        sets = sae_probes.check_data_sets(sets)
        return [n for n, family in zip(sets, families(sets), strict=True) if family not in read]

    if not (data_sets := left(names)):
        raise BadInput("--dataset-names: selection has read the families of all of them; others expected")
    plan = bank.BankPlan(
        **dict(recipe),
        subject=subject,
        hook_name=hook_name,
        families=[facts.family],
        seeds=seeds,
        d_saes=[facts.d_sae],
        ks=[k],
        budgets=[tokens],
        saebench=True,
        data_sets=data_sets,
        cebench=True,
        judged=True,
        pair_sets=left(PAIR_SETS.split(",")),
        **bank.places_of(args),
    )
    bank.check(plan)
    trained_bank = bank.trained(plan)
    candidate = trained_bank.saes.group
    if other := [n for n, value in candidate.facts if value != getattr(facts, n)]:
        why = "(--threads, device and packages as in the study expected)"
        raise CheckFailed(f"the recipe cannot be trained again here: {', '.join(other)} came out otherwise {why}")
    # Before anything is scored: an attempt that is broken off once figures can be seen is an attempt.
    ledger = noted(args.artifact_root, LedgerEntry.of(selected, candidate))
    found = bank.scored(trained_bank)
    return Retrained(
        phase="candidate_confirmation",
        inputs=found.inputs | found.sections[0].control_inputs | {"selection": sha256},
        subject=subject,
        candidate=candidate,
        paths={str(m.seed): m.checkpoint for m in found.sections[0].members},
        selection=selected,
        attempt=len(ledger),
        ledger=ledger,
        bank=found,
    )


def confirmations(root: Path) -> list[LedgerEntry]:
    """The ledger of confirmations; empty where there is none yet.

    Raises:
        BadInput: it is damaged.
    """
    path = root / LEDGER
    if not path.exists():
        return []
    try:
        entries = TypeAdapter(list[LedgerEntry]).validate_python(read_json(path, "ledger of confirmations"))
    except ValidationError as error:
        raise BadInput(f"--artifact-root: {path} is no ledger of confirmations ({refusal(error)})") from None
    if any(entry in entries[:i] for i, entry in enumerate(entries)):
        raise BadInput(f"--artifact-root: {path} is no ledger of confirmations (an entry stands twice)")
    return entries


def noted(root: Path, entry: LedgerEntry) -> list[LedgerEntry]:
    """Write a confirmation into the ledger unless it stands there already; all of its configuration up to this one."""
    with locked(root / f".{LEDGER}.lock"):
        entries = confirmations(root)
        if entry not in entries:
            entries.append(entry)
            write_json(root / LEDGER, [e.to_json() for e in entries])
    own = [e for e in entries if e.candidate == entry.candidate]
    return own[: own.index(entry) + 1]
