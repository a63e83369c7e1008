"""The strict release gate: a pure function of evidence. It is fail-closed: without sufficient evidence no gate passes.

Every gate is PASS, FAIL or MISSING. The module computes each bound from the figures of each seed (and data set).
Intervals and verdicts in the evidence are not used. The rules are in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from husai.evidence import deltas, levels, planted, random_model, rules, transcoder
from husai.evidence.data_sets import DATA_SETS, families, pair_names
from husai.evidence.estimates import Estimate, narrowing
from husai.evidence.levels import fresh_seeds
from husai.evidence.references import matched
from husai.evidence.rules import FAIL, MISSING, PASS, AgainstReference, Missing, Shown, require
from husai.evidence.schemas import (
    Bank,
    Contrastive,
    Evaluated,
    OODStress,
    OwnSection,
    Phase4a,
    Probing,
    RandomModelStress,
    Recipe,
    Retrained,
    SAERecord,
    Section,
    SeedGroup,
    Selection,
    Strict,
    Supplied,
    TranscoderStress,
    read_evaluation,
    refusal,
    seed_names,
)
from husai.runs.errors import BadInput
from husai.runs.files import digest

GATES = {
    "positive_control": "Does the method find planted features, and find them alike over seeds?",
    "stability": "Are the candidate's features more alike over seeds than every required null?",
    "code": "Does it code its activations better than dictionaries of single rows, token means and centroids?",
    "fit": "Do its explained variance, CE recovered and share of dead features reach their registered bounds?",
    "random_model": "More alike than those of SAEs trained alike on a model with random weights, in each draw?",
    "transcoder": "Do transcoders of other seeds find the candidate's features, more than every required null?",
    "ood": "On the shifted data sets that the model's own probe survives, does the candidate lose at most "
    f"{levels.MAX_OOD_DROP:g} of AUC more than it?",
    "saebench": "On SAEBench's probing, is it shown to be better than its matched reference?",
    "cebench": "On CE-Bench, is it shown to be better than its matched reference?",
}
"""Gate -> its question, in the order of the report."""
OF = {"positive_control": "phase4a", "random_model": "random_model", "transcoder": "transcoder", "ood": "ood"}
"""Gate -> the evidence that only this gate reads."""
MAKES = {
    "phase4a": "run_phase4a_reproduction.py",
    "selection": "select_release_candidate.py",
    "confirmation": "run_candidate_confirmation.py",
    "random_model": "run_random_model_stress_eval.py",
    "transcoder": "run_transcoder_stress_eval.py",
    "ood": "run_ood_stress_eval.py",
}
"""Evidence -> name of the script that writes it."""
UNCONFIRMED = "HUSAI cannot see how these SAEs were selected, nor whether their seeds are fresh"
UNKNOWN_TRAINING = "the SAEs do not say how they were trained"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the bounds. docs/methods.md states the defaults. A looser threshold never gives a pass."""

    min_stability_excess: float = rules.STABILITY.threshold
    min_transcoder_delta: float = rules.TRANSCODER.threshold
    max_ood_drop: float = rules.OOD.threshold
    min_saebench_delta: float = rules.SAEBENCH.threshold
    min_cebench_delta: float = rules.CEBENCH.threshold
    alpha: float = levels.ALPHA
    """Two-sided error level. Intervals have the level 1 − alpha."""

    def looser(self) -> list[str]:
        """Names of thresholds that are looser than in docs/methods.md."""
        registered = Thresholds()
        loose = [n for n in vars(self) if n.startswith("min") and getattr(self, n) < getattr(registered, n)]
        return loose + [n for n in ("max_ood_drop", "alpha") if getattr(self, n) > getattr(registered, n)]


@dataclass(frozen=True)
class File:
    """Results of a run, with the problems of their file."""

    path: str
    sha256: str | None
    results: Any
    problems: list[str] = field(default_factory=list)
    """Faults of the file or its manifest, and values that do not follow from the file's own figures."""


@dataclass(frozen=True)
class Bundle:
    """All inputs of the gate."""

    files: dict[str, File | None]
    """File for each name in MAKES. None: it was not given."""
    on_disk: dict[str, str | None]
    """Seed -> identity of the candidate's checkpoint on the disk. None: it is absent or unreadable."""

    def given(self, label: str) -> File:
        """File of a label; it must have been given."""
        file = self.files[label]
        assert file is not None
        return file


class NoCandidate(Missing):
    """Gates about the candidate have no answer, because there is no valid candidate."""


UNREADABLE = (Missing, ValidationError, BadInput)
"""Exceptions for faults of the evidence. Any other exception is a fault of this code and ends with a traceback."""


def _why(error: Exception) -> str:
    """Description of a fault of the evidence."""
    return (
        f"the evidence is not what it should be: {refusal(error)}" if isinstance(error, ValidationError) else str(error)
    )


def decide(bundle: Bundle, thresholds: Thresholds, waived: dict[str, str]) -> dict:
    """Decide all gates from a bundle.

    Args:
        waived: gate -> reason of its waiver. A decision with a waiver never passes.

    Returns:
        {"pass_all", "provisional", "outcome", "unconfirmed": reason why the candidate is not confirmed, or None,
        "attempt": number of confirmations of its configuration, or None, "licensed": the sentence that its stability
        licenses, or None, "candidate", "thresholds", "looser_than_registered",
        "gates": [{"gate", "question", "status", "figure", "estimate", "low", "high", "level", "bound", "relation",
        "threshold", "n", "without_one_seed", "passes_at_no_effect", "effect_for_80", "beside": {name: further interval,
        which decides nothing}, "left_out": data sets or pairs that do not count, "reason", "to_pass", "waived"}]}
    """
    candidate = _Candidate(bundle)
    # User-supplied SAEs have no ledger. They get the level of a first attempt, and never pass.
    level = levels.level_of_attempt(candidate.attempt or 1, thresholds.alpha)
    of_control = 1 - thresholds.alpha
    stability = cache(lambda: _stability(candidate, level, thresholds.min_stability_excess))
    judges: dict[str, Callable[[], Shown]] = {
        "positive_control": lambda: _positive_control(bundle, candidate, of_control),
        "stability": stability,
        "code": lambda: _code(candidate, level),
        "fit": lambda: _fit(candidate, level),
        "random_model": lambda: _random_model(bundle, candidate, level),
        "transcoder": lambda: _transcoder(bundle, candidate, level, thresholds.min_transcoder_delta),
        "ood": lambda: _ood(bundle, candidate, level, thresholds.max_ood_drop),
        "saebench": lambda: _saebench(candidate, level, thresholds.min_saebench_delta),
        "cebench": lambda: _cebench(candidate, level, thresholds.min_cebench_delta),
    }
    level_of_gate = {name: of_control if name == "positive_control" else level for name in GATES}
    gates = [_judge(name, judges[name], level_of_gate[name]) | {"waived": waived.get(name)} for name in GATES]
    looser = thresholds.looser()
    all_pass = all(g["status"] == PASS for g in gates)
    provisional = bool(waived) or bool(looser) or candidate.unconfirmed is not None
    pass_all = all_pass and not provisional
    pass_or_waived = all(g["status"] == PASS or g["waived"] for g in gates)
    return {
        "pass_all": pass_all,
        "provisional": provisional,
        "outcome": "passed" if pass_all else "provisional" if provisional and pass_or_waived else "not passed",
        "unconfirmed": candidate.unconfirmed,
        "attempt": candidate.attempt,
        "licensed": _licensed(candidate, stability),
        "candidate": candidate.to_json(),
        "thresholds": vars(thresholds),
        "looser_than_registered": looser,
        "gates": gates,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Record of one gate


OF_ESTIMATE = ("estimate", "low", "high", "level", "bound", "relation", "threshold", "n")
OF_SPREAD = ("without_one_seed", "passes_at_no_effect", "effect_for_80")
"""Keys of a gate's record that are null without an estimate."""


def _judge(name: str, judge: Callable[[], Shown], level: float) -> dict:
    """Record of a gate."""
    to_find = f"evidence that counts, of {MAKES[OF.get(name, 'confirmation')]}"
    empty: dict = dict.fromkeys((*OF_ESTIMATE, *OF_SPREAD))
    empty |= {"beside": {}, "left_out": []}
    record = {"gate": name, "question": GATES[name]}
    try:
        shown = rules.checked(judge)
    except UNREADABLE as error:
        if isinstance(error, NoCandidate):
            to_find = f"a candidate that counts, of {MAKES['confirmation']}"
        return record | {"status": MISSING, "figure": None, **empty, "reason": _why(error), "to_pass": to_find}
    failing, (which, worst) = shown.failing(), shown.worst()
    rule, against = shown.rule, f" ({which})" if len(shown.estimates) > 1 else ""
    beside = shown.beside.items()
    end, reached = {"low": "lower", "high": "upper"}[rule.end], getattr(worst, rule.end)
    return record | {
        "status": FAIL if failing else PASS,
        "figure": rule.figure + shown.note + against,
        "estimate": worst.estimate,
        "low": worst.low,
        "high": worst.high,
        "level": level,
        "bound": rule.end,
        "relation": rule.relation,
        "threshold": shown.threshold,
        "n": shown.n,
        "without_one_seed": worst.without_one and list(worst.without_one),
        "passes_at_no_effect": round(shown.passes_at(0.0), 4),
        "effect_for_80": float(f"{shown.effect_for():.4g}"),
        "beside": {name: {end: getattr(e, end) for end in ("estimate", "low", "high")} for name, e in beside},
        "left_out": [*shown.left_out],
        "reason": f"the {end} end is {reached:+.4f}; {rule.relation} {shown.threshold:g} is required",
        "to_pass": _to_pass(shown, worst) if failing else None,
    }


def _to_pass(shown: Shown, worst: Estimate) -> str:
    times = narrowing(worst.estimate, getattr(worst, shown.rule.end), shown.rule.end, shown.threshold)
    if times is None:
        return f"the figure itself must change: the estimate, {worst.estimate:+.4f}, is on the wrong side"
    seeds = int(np.ceil(shown.n * times**2))
    if shown.families is not None:
        return (
            f"the estimate, {worst.estimate:+.4f}, is on the right side; if it is the true figure, an interval "
            f"{times:.1f} times as narrow shows it; this one is of {shown.families} families and {shown.n} seeds"
        )
    return (
        f"the estimate, {worst.estimate:+.4f}, is on the right side; if it is the true figure and seeds alone vary, "
        f"about {max(seeds, shown.n + 1)} seeds show it"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What must be true of the evidence before its figures count


T = TypeVar("T", bound=Strict)


def _read(bundle: Bundle, label: str, model: type[T]) -> T:
    return model.model_validate(_whole(bundle, label).results)


def _whole(bundle: Bundle, label: str) -> File:
    """A file without problems.

    Raises:
        Missing.
    """
    file, maker = bundle.files.get(label), MAKES[label]
    if file is None:
        raise Missing(f"no results of {maker} were given")
    if file.problems:
        raise Missing(f"{maker}: {file.problems[0]}")
    if file.sha256 is None:
        raise Missing(f"{maker}: {file.path} has no digest")
    return file


class _Candidate:
    """The candidate, checked once. Each gate about it raises its fault."""

    unconfirmed: str | None = None
    """Reason why the candidate is not confirmed, for user-supplied SAEs."""
    attempt: int | None = None
    """Number of confirmations of its configuration, this one included. None: unknown."""

    def __init__(self, bundle: Bundle):
        self._reason: Exception | None = None
        try:
            confirmation = bundle.files.get("confirmation")
            results = None if confirmation is None else confirmation.results
            if isinstance(results, dict) and results.get("origin") == "supplied":
                self.unconfirmed = UNCONFIRMED
                if other := results.get("same_model"):
                    self.unconfirmed += (
                        f"; --same-model alone says that {other} is their model {results.get('subject')}"
                    )
            self._check(bundle)
        except UNREADABLE as error:
            self._reason = error

    def _check(self, bundle: Bundle) -> None:
        chosen = None if self.unconfirmed else _read(bundle, "selection", Selection)
        confirmation = read_evaluation(_whole(bundle, "confirmation").results)
        group, bank = confirmation.candidate, confirmation.bank
        records = [r for r in bank.saes if r.candidate]
        rules.enough_seeds(len(records))
        require(group == SeedGroup.of(records), "the candidate's SAEs are not those that its bank evaluated")
        if isinstance(confirmation, Retrained):
            require(len(confirmation.bank.sections) == 1, "one condition, confirmed, expected")
        section = confirmation.section
        require(_members(section) == group.checkpoints, "its stability is that of other SAEs")
        _one_account(bank)
        require(group.facts.control is None, f"its SAEs were trained on {group.facts.control}")
        subject, hook_name = bank.inputs["subject"], bank.hook_name
        require(group.facts.subject_digest in (None, subject), "its bank is of another subject")
        require(group.facts.hook_name in (None, hook_name), "its bank is of another hook")
        self.place: dict[str, Any] = {"subject_digest": subject, "hook_name": hook_name, "d_in": group.facts.d_in}
        if isinstance(confirmation, Retrained):
            self.attempt = confirmation.attempt
            sha256 = bundle.given("selection").sha256
            assert chosen is not None  # only user-supplied SAEs have no selection
            assert sha256 is not None  # `_read` refuses a file without a digest
            self._check_retrained(confirmation, chosen, sha256)
        else:
            self._check_supplied(confirmation)
        _on_disk(bundle, confirmation)
        self.group, self.facts, self.bank, self.section = group, group.facts, bank, section
        seeds = seed_names([r.facts.seed for r in records])
        self.records = dict(zip(seeds, records, strict=True))
        self.labels = {seed: f"checkpoint {r.label}" for seed, r in zip(seeds, records, strict=True)}

    def _check_retrained(self, confirmation: Retrained, chosen: Selection, sha256: str) -> None:
        """Check that the selected recipe was trained again, on the fresh and fixed seeds."""
        facts, section, bank = confirmation.candidate.facts, confirmation.section, confirmation.bank
        place = self.place["subject_digest"], self.place["hook_name"]
        require((facts.subject_digest, facts.hook_name) == place, "its bank is of another subject or hook")
        made_of, seeds = facts.to_json(), [int(seed) for seed in confirmation.candidate.checkpoints]
        require(
            confirmation.selection.sha256 == sha256 == confirmation.inputs.get("selection"),
            "confirmed is another selection",
        )
        require(made_of == chosen.selected.get("facts"), "the confirmed candidate is not the selected one")
        name = confirmation.selection.id
        require(name == chosen.selected.get("id") == digest(made_of), "its configuration's digest differs")
        require(chosen.selected in chosen.candidates, "what was selected is no candidate of the selection")
        require(not set(seeds) & set(chosen.seeds_used), "its seeds are not fresh: a study used some")
        n = chosen.confirmation_seeds
        require(len(seeds) == n, f"{len(seeds)} seeds confirm it; {n} expected, as many as selection fixed")
        fixed = fresh_seeds(chosen.seeds_used, n)
        require(seeds == fixed, f"its seeds are not those that are fixed for a confirmation: {fixed}")
        self.stores = {facts.store_digest}
        _about(section, self)
        rules.own_training(section)
        recipes = {(m.family, m.d_sae, m.k, m.learning_rate) for m in section.members}
        require(recipes == {(facts.family, facts.d_sae, facts.k, facts.learning_rate)}, "members made otherwise")
        require(section.rows == bank.rows, "its stability is of other rows than its bank")
        inputs = bank.inputs | section.control_inputs | {"selection": sha256}
        require(confirmation.inputs == inputs, "its inputs are not its bank's and its control's")
        recipe = Recipe.model_validate(chosen.selected.get("recipe"))  # older recipes lack fields, which have defaults
        require(recipe == bank.recipe, "it was trained by another recipe than the selected one")
        require(
            confirmation.subject == chosen.selected.get("subject"), "its subject has another name than at selection"
        )
        require({"probing_seed", "versions"} <= chosen.cohort.keys(), "selection does not say what it compared")
        require(bank.store_digest == facts.store_digest, "its bank is of other activations")
        require(
            (section.d_sae, section.k, section.budget, section.family)
            == (facts.d_sae, facts.k, facts.tokens, facts.family),
            "its stability is that of another configuration",
        )
        self.cohort, self.data_sets = chosen.cohort, set(chosen.split.gate_data_sets)
        self.read = set(chosen.split.selection_families)

    def _check_supplied(self, confirmation: Supplied) -> None:
        """Check that the inputs of user-supplied SAEs are the digests in their evidence."""
        group, bank = confirmation.candidate, confirmation.bank
        require(all(r.condition == group.condition for r in bank.saes if r.candidate), "records of another condition")
        inputs = bank.inputs | confirmation.section.control_inputs
        for part in (bank.saebench, bank.cebench):
            inputs |= {f"checkpoint {r.label}": r.checkpoint_sha256 for r in part.controls} if part else {}
        inputs |= {f"untrained {seed}": sha256 for seed, sha256 in (confirmation.untrained or {}).items()}
        require(
            confirmation.inputs == inputs,
            "its inputs are not its subject, activations, checkpoints and untrained states",
        )
        scored = all("untrained" in p for p in confirmation.section.pairs)
        untrained = set(group.checkpoints) if scored else set()
        require(set(confirmation.untrained or {}) == untrained, "an untrained state of each SAE, or of none, expected")
        heldout = bank.inputs["held-out activations"]
        self.stores = {heldout}  # the store of the candidate's own study
        _about(confirmation.section, self)
        # A stress test may use the training activations. A stream leaves no store of these: a stress test of its SAEs
        # uses the activations that gave the prototypes, which are of documents of the same text.
        streamed = group.facts.streamed and bank.code is not None
        training = bank.code.store_digest if streamed and bank.code else group.facts.store_digest
        self.stores = {heldout, training} - {None}
        self.read, self.data_sets = set(), set(DATA_SETS.split(","))
        probing = bank.saebench
        self.cohort = {"probing_seed": levels.PROBING_SEED, "probing": probing and probing.probing}
        self.cohort["versions"] = probing and probing.versions

    def known(self) -> _Candidate:
        """This candidate, if it is valid.

        Raises:
            NoCandidate: it is not valid.
        """
        if self._reason is not None:
            why = _why(self._reason).replace("the evidence", "its evidence", 1)
            raise NoCandidate(f"there is no candidate: {why}")
        return self

    def to_json(self) -> dict | None:
        return None if self._reason is not None else self.group.to_json()

    def is_that_of(self, stress: RandomModelStress | TranscoderStress | OODStress, script: str) -> None:
        require(stress.candidate == self.group, f"{script}: it is about other SAEs than the candidate's")
        inputs = {self.labels[seed]: sha256 for seed, sha256 in self.group.checkpoints.items()}
        inputs |= {"subject": self.place["subject_digest"]} | _beside(stress)
        require(inputs.items() <= stress.inputs.items(), f"{script}: its inputs are not the SAEs that it speaks of")
        needed = {"held-out activations"}
        needed |= {"transcoder input"} if isinstance(stress, TranscoderStress) else set()
        needed |= {"shifted activations", "probed texts"} if isinstance(stress, OODStress) else set()
        require(needed <= stress.inputs.keys(), f"{script}: its inputs do not name {', '.join(sorted(needed))}")


def _on_disk(bundle: Bundle, confirmation: Retrained | Supplied) -> None:
    identities = confirmation.candidate.identities
    require(confirmation.paths.keys() == identities.keys(), "a path of each checkpoint expected")
    for seed, identity in identities.items():
        on_disk = bundle.on_disk.get(seed)
        require(on_disk is not None, f"the checkpoint of seed {seed} is not on the disk, or cannot be read")
        require(
            on_disk == identity,
            f"the checkpoint of seed {seed} on the disk is another than the evidence names",
        )


def _beside(stress: RandomModelStress | TranscoderStress | OODStress) -> dict[str, str]:
    """Inputs of a stress test other than the candidate."""
    if isinstance(stress, RandomModelStress):
        return random_model.inputs(stress.section, stress.random_models)
    return transcoder.inputs(stress) if isinstance(stress, TranscoderStress) else {}


def _one_account(bank: Bank | Evaluated) -> None:
    """Check that each SAE of a bank has one record, which its benchmarks repeat, and that the inputs fit."""
    saes = {r.identity: _kept(r) for r in bank.saes}
    require(len(saes) == len(bank.saes), "its bank has two records of an SAE")
    inputs = {n: bank.inputs.get(n) for n in ("subject", "held-out activations")}
    inputs |= {f"checkpoint {r.label}": r.checkpoint_sha256 for r in bank.saes}
    require(bank.inputs == inputs, "its bank's inputs are not its subject, activations and checkpoints")
    for name, part in (("SAEBench", bank.saebench), ("CE-Bench", bank.cebench)):
        if part is not None:
            controls = {f"checkpoint {r.label}": r.checkpoint_sha256 for r in part.controls}
            pairs_input = {"pairs": part.pairs_digest} if isinstance(part, Contrastive) else {}
            require({r.identity: _kept(r) for r in part.saes} == saes, f"{name} has other records of the SAEs")
            require(len(part.saes) == len(saes), f"{name} has two records of an SAE")
            require(part.noise.label in {r.label for r in part.saes}, f"{name}: noise of another SAE")
            place = (part.subject_digest, part.hook_name)
            require(place == (inputs["subject"], bank.hook_name), f"{name} was run on another subject or hook")
            require(part.inputs == inputs | controls | pairs_input, f"{name} has other inputs than its bank")
    if bank.saebench is not None:
        cores = {r.identity: r.core for r in bank.saes}
        require(all(r.core == cores[r.identity] for r in bank.saebench.saes), "SAEBench has other core metrics")


def _kept(record: SAERecord) -> dict:
    return {name: getattr(record, name) for name in SAERecord.model_fields}


def _members(section: Section | OwnSection) -> dict[str, str]:
    checkpoints = section.checkpoints
    require(len(checkpoints) == len(section.members), "a seed occurs twice")
    return checkpoints


def _about(section: Section | OwnSection, candidate: _Candidate) -> None:
    for name, value in candidate.place.items():
        require(getattr(section, name) == value, f"a stability study of another {name}")
    require(section.store_digest in candidate.stores, "a stability study of another store_digest")


# ---------------------------------------------------------------------------------------------------------------------
# The gates


def _positive_control(bundle: Bundle, candidate: _Candidate, level: float) -> Shown:
    results = _read(bundle, "phase4a", Phase4a)
    control = results.planted
    if control is None:
        raise Missing("phase 4a holds no planted features: it makes them on its default subject, modular addition")
    subject = candidate.place["subject_digest"] if candidate.to_json() else None
    require(control.data.digest != subject, "phase 4a is of the candidate's own subject: no positive control")
    named = planted.inputs(results.husai, control)
    require(results.inputs == named, "phase 4a: its inputs are not its subjects, stores and checkpoints")
    return rules.positive_control(control, level)


def _stability(candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    return rules.stability(c.section, level, minimum)


def _licensed(candidate: _Candidate, stability: Callable[[], Shown]) -> str | None:
    """Sentence that the beaten controls license, for an external claim if all gates pass.

    It names the token budget, unless training is known to have come to rest.
    """
    try:
        shown = rules.checked(stability)
    except UNREADABLE:
        return None
    failing = shown.failing()
    text = rules.sentence([name for name in shown.estimates if name not in failing])
    section = candidate.section
    at_rest = section.convergence.converged if isinstance(section, Section) else None
    return rules.with_budget(text, candidate.facts.tokens, at_rest)


def _code(candidate: _Candidate, level: float) -> Shown:
    c = candidate.known()
    section, records = c.bank.code, c.records
    require(
        section is not None, "its SAEs were not compared with dictionaries of prototypes: confirmation makes it again"
    )
    assert section is not None
    require(section.heldout_digest == c.bank.inputs["held-out activations"], "code: of other held-out activations")
    source = c.facts.store_digest if isinstance(c.bank, Bank) else section.store_digest
    require(section.store_digest == source, "code: prototypes of other activations than the SAEs were trained on")
    require(section.store_digest != section.heldout_digest, "code: prototypes of the held-out activations themselves")
    require(section.d_sae == c.facts.d_sae, "code: prototypes of another width")
    require(
        section.k == {seed: max(1, round(r.heldout.l0)) for seed, r in records.items()}, "code: of another L0 or seeds"
    )
    variance = {seed: r.heldout.explained_variance for seed, r in records.items()}
    spliced = {seed: r.core.ce_loss_score for seed, r in records.items()}
    require(section.saes.explained_variance == variance, "code: explained variance of other SAEs")
    require(section.saes.ce_recovered == spliced, "code: CE recovered of other SAEs")
    require({r.core.tokens for r in records.values()} == {section.tokens}, "code: CE recovered of other texts")
    return rules.code(section, level)


def _fit(candidate: _Candidate, level: float) -> Shown:
    records = candidate.known().records.values()
    return rules.fit([r.heldout for r in records], [r.core.ce_loss_score for r in records], level)


def _random_model(bundle: Bundle, candidate: _Candidate, level: float) -> Shown:
    c = candidate.known()
    if c.facts.training is None and bundle.files.get("random_model") is None:
        raise Missing(
            f"{UNKNOWN_TRAINING}: --random-model-checkpoint names SAEs trained alike on each draw of the random weights"
        )
    stress = _read(bundle, "random_model", RandomModelStress)
    script = MAKES["random_model"]
    c.is_that_of(stress, script)
    require(_members(stress.section) == c.group.checkpoints, f"{script}: its stability is that of other SAEs")
    _about(stress.section, c)
    seeds = [m.seed for m in stress.section.members]
    others = any([m.seed for m in control.members] != seeds for control in stress.random_models)
    require(c.facts.training is None or not others, f"{script}: its controls have other seeds")

    def judge() -> Shown:
        rules.one_account(stress.section, c.section)
        rules.same_sparsity(stress.section, c.bank.saes)
        return rules.random_model(stress.section, stress.random_models, level)

    return _of(script, judge)


def _of(script: str, judge: Callable[[], Shown]) -> Shown:
    """Result of a rule. If the evidence does not count, the reason names the script that wrote it."""
    try:
        return judge()
    except Missing as missing:
        raise Missing(f"{script}: {missing}") from None


def _transcoder(bundle: Bundle, candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    if c.facts.training is None:
        raise Missing(f"{UNKNOWN_TRAINING}, and so no transcoders can be trained alike; no flag says it")
    stress = _read(bundle, "transcoder", TranscoderStress)
    script, setting = MAKES["transcoder"], stress.setting
    c.is_that_of(stress, script)
    require(_members(stress.section) == c.group.checkpoints, f"{script}: its scores are those of other SAEs")
    _about(stress.section, c)
    require(transcoder.preregistered(setting, c.group), f"{script}: another setting than the candidate's own")
    arms = stress.section, stress.transcoder, stress.across

    def judge() -> Shown:
        rules.one_account(stress.section, c.section)
        rules.same_sparsity(stress.section, c.bank.saes)
        return rules.transcoder(setting, *arms, level=level, minimum=minimum)

    return _of(script, judge)


def _ood(bundle: Bundle, candidate: _Candidate, level: float, maximum: float) -> Shown:
    c, stress = candidate.known(), _read(bundle, "ood", OODStress)
    script, shifted = MAKES["ood"], stress.shifted
    c.is_that_of(stress, script)
    seeds = seed_names([s.seed for s in shifted.saes])
    identities = dict(zip(seeds, (s.identity for s in shifted.saes), strict=True))
    require(
        identities == c.group.identities and len(shifted.saes) == len(identities), f"{script}: figures of other SAEs"
    )
    _seed(c, shifted.random_seed)
    _same_probes(c, stress)
    return _of(script, lambda: rules.ood(shifted, stress.skipped, level, maximum))


def _saebench(candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    probing = c.bank.saebench
    if probing is None:
        raise Missing("SAEBench was not run")
    absent = sorted(c.data_sets - set(probing.data_sets))
    origin = "selection left" if c.unconfirmed is None else "--dataset-names holds by default"
    require(not absent, f"SAEBench: data sets that {origin} are missing: {', '.join(absent[:3])}")
    _same_probes(c, probing)
    _seed(c, probing.random_seed)
    require(probing.families == families(probing.data_sets), "SAEBench: families of other data sets")
    require(bool(c.data_sets), "selection read no probing figures, so that no data sets are left to it for the gate")
    judged = zip(probing.data_sets, probing.families, strict=True)
    # Extra data sets do not count.
    keep = [i for i, (name, f) in enumerate(judged) if name in c.data_sets and f not in c.read]
    names, groups = ([values[i] for i in keep] for values in (probing.data_sets, probing.families))
    values = {r.identity: np.array(r.test_auc[deltas.K])[keep] for r in probing.saes}
    figures = _against_reference(c, probing.saes, values, names, groups)
    by = "" if probing.probing == "sae_probes" else f" ({probing.probing})"
    return rules.shown_better(rules.SAEBENCH, figures, level, minimum, by)


def _cebench(candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    pairs = c.bank.cebench
    if pairs is None:
        raise Missing("CE-Bench was not run")
    rules.only_cebench(pairs.benchmark)
    require(pairs.no_reference is None, f"no reference: {pairs.no_reference}")
    keep = [i for i, f in enumerate(pairs.clusters) if f not in c.read]
    names, clusters = ([values[i] for i in keep] for values in (pair_names(pairs.clusters), pairs.clusters))
    values = {r.identity: np.array(r.normalised_of_pairs, dtype=float)[keep] for r in pairs.saes}
    # References of a baseline summary have no digests here, therefore they do not count.
    figures = _against_reference(c, pairs.saes, values, names, clusters)
    return rules.shown_better(rules.CEBENCH, figures, level, minimum)


def _against_reference(
    c: _Candidate, records: Sequence[SAERecord], values: deltas.Values, names: list[str], groups: list[str]
) -> AgainstReference:
    """Figures of the candidate and of its matched reference."""
    order = list(c.group.identities.values())
    group = [r for r in records if r.candidate and r.identity in order]
    group.sort(key=lambda r: order.index(r.identity))
    seeds = seed_names([r.facts.seed for r in group])
    candidate_figures = dict(zip(seeds, (r.identity for r in group), strict=True)) == c.group.identities
    require(candidate_figures and len(group) == len(order), "figures of other SAEs than the candidate's")
    require(all(r.facts.shared == c.facts for r in group), "facts of other SAEs than the candidate's")
    match = matched(group, records)
    hint = "" if c.unconfirmed is None else "; --reference names SAEs to compare with"
    if c.facts.training is None:
        hint = f". {UNKNOWN_TRAINING[0].upper()}{UNKNOWN_TRAINING[1:]}: --reference can name none that matches"
    require(match.reason is None, f"no matched reference: {match.reason}{hint}")
    require(len(match.records) >= len(group), f"{len(match.records)} reference SAEs for {len(group)} seeds")
    references = match.records
    require(len({r.identity for r in references}) == len(group), "one reference serves several seeds")
    candidate_figures, reference = (np.array([values[r.identity] for r in arm]) for arm in (group, references))
    pairs = zip(group, references, strict=True)
    variance = [r.heldout.explained_variance - other.heldout.explained_variance for r, other in pairs]
    return AgainstReference(candidate_figures, reference, variance, names, groups)


def _seed(c: _Candidate, seed: int) -> None:
    require(c.cohort["probing_seed"] in (None, seed), "another seed of the probing than at selection")


def _same_probes(c: _Candidate, evidence: Probing | OODStress) -> None:
    versions = c.cohort["versions"]
    name = None if versions is None else c.cohort.get("probing", "sae_probes")  # without versions there were no probes
    require(name in (None, evidence.probing), f"probes of another name than at selection: {name} expected")
    require(versions in (None, evidence.versions), "other versions of the benchmark's packages than at selection")
