"""Confirmation: the selected recipe is trained again on fresh seeds, and the gate reads these SAEs."""

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
"""Ledger of all confirmations, below --artifact-root. Neither --force nor another output folder resets it."""


def evaluate(args: argparse.Namespace) -> Retrained:
    """Train the selected recipe again; returns stability and benchmarks of the new SAEs.

    Args:
        args: those of `run_candidate_confirmation.py`. `candidate` names the selection.

    Raises:
        BadInput: there is no selected condition, a seed is not fresh, the number of seeds is not that of the selection,
            selection has read all data sets, or the ledger of confirmations is damaged.
        CheckFailed: the facts of the new SAEs differ from those in the study.
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
    confirmations(args.artifact_root)  # finds a damaged ledger before any training
    names = args.dataset_names or selection.split.gate_data_sets or DATA_SETS.split(",")
    read = set(selection.split.selection_families)

    def unread(sets: list[str]) -> list[str]:
        sets = sae_probes.check_data_sets(sets)
        return [n for n, family in zip(sets, families(sets), strict=True) if family not in read]

    if not (data_sets := unread(names)):
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
        pair_sets=unread(PAIR_SETS.split(",")),
        **bank.places_of(args),
    )
    bank.check(plan)
    trained_bank = bank.trained(plan)
    candidate = trained_bank.saes.group
    if differing := [n for n, value in candidate.facts if value != getattr(facts, n)]:
        why = "(--threads, device and packages as in the study expected)"
        raise CheckFailed(f"the recipe cannot be trained again here: {', '.join(differing)} came out otherwise {why}")
    # The entry is written before scores exist, because an attempt that is stopped after them must count.
    ledger = noted(args.artifact_root, LedgerEntry.of(selected, candidate))
    scored_bank = bank.scored(trained_bank)
    return Retrained(
        phase="candidate_confirmation",
        inputs=scored_bank.inputs | scored_bank.sections[0].control_inputs | {"selection": sha256},
        subject=subject,
        candidate=candidate,
        paths={str(m.seed): m.checkpoint for m in scored_bank.sections[0].members},
        selection=selected,
        attempt=len(ledger),
        ledger=ledger,
        bank=scored_bank,
    )


def confirmations(root: Path) -> list[LedgerEntry]:
    """Entries of the ledger of confirmations; none if there is no ledger yet.

    Raises:
        BadInput: the ledger is damaged.
    """
    path = root / LEDGER
    if not path.exists():
        return []
    try:
        entries = TypeAdapter(list[LedgerEntry]).validate_python(read_json(path, "ledger of confirmations"))
    except ValidationError as error:
        raise BadInput(f"--artifact-root: {path} is no ledger of confirmations ({refusal(error)})") from None
    if any(entry in entries[:i] for i, entry in enumerate(entries)):
        raise BadInput(f"--artifact-root: {path} is no ledger of confirmations (an entry occurs twice)")
    return entries


def noted(root: Path, entry: LedgerEntry) -> list[LedgerEntry]:
    """Add a confirmation to the ledger once; returns all entries of its configuration up to this one."""
    with locked(root / f".{LEDGER}.lock"):
        entries = confirmations(root)
        if entry not in entries:
            entries.append(entry)
            write_json(root / LEDGER, [e.to_json() for e in entries])
    same_configuration = [e for e in entries if e.candidate == entry.candidate]
    return same_configuration[: same_configuration.index(entry) + 1]
