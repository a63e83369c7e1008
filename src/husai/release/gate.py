"""The strict release gate: a pure function of evidence. Fail-closed: what is not shown has not passed.

Every gate is PASS, FAIL or MISSING. Its bound is computed here, from the figure of each seed (and data set); what the
evidence itself says of intervals and verdicts counts for nothing. The rules are docs/methods.md's.
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
"""Gate -> what it asks, in the order in which they are reported."""
OF = {"positive_control": "phase4a", "random_model": "random_model", "transcoder": "transcoder", "ood": "ood"}
"""Gate -> the evidence of its own that it reads."""
MAKES = {
    "phase4a": "run_phase4a_reproduction.py",
    "selection": "select_release_candidate.py",
    "confirmation": "run_candidate_confirmation.py",
    "random_model": "run_random_model_stress_eval.py",
    "transcoder": "run_transcoder_stress_eval.py",
    "ood": "run_ood_stress_eval.py",
}
"""Evidence -> the script that makes it."""
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
    """Two-sided; intervals are of level 1 − alpha."""

    def looser(self) -> list[str]:
        """Names of thresholds that are looser than in docs/methods.md."""
        registered = Thresholds()
        loose = [n for n in vars(self) if n.startswith("min") and getattr(self, n) < getattr(registered, n)]
        return loose + [n for n in ("max_ood_drop", "alpha") if getattr(self, n) > getattr(registered, n)]


@dataclass(frozen=True)
class File:
    """Results of a run, as found."""

    path: str
    sha256: str | None
    results: Any
    problems: list[str] = field(default_factory=list)
    """Faults of the file or its manifest, and values that do not follow from the file's own figures."""


@dataclass(frozen=True)
class Bundle:
    """All that the gate reads."""

    files: dict[str, File | None]
    """File for each name in MAKES; None: not given."""
    on_disk: dict[str, str | None]
    """seed -> identity of the candidate's checkpoint as it lies on the disk; None: it is not there, or unreadable."""

    def given(self, label: str) -> File:
        """A file that is known to be given."""
        file = self.files[label]
        assert file is not None
        return file


class NoCandidate(Missing):
    """Nothing can be judged of a candidate that is not there."""


UNREADABLE = (Missing, ValidationError, BadInput)
"""Faults of the evidence. Any other exception is a fault of this code, and ends the gate with a traceback."""


def _why(error: Exception) -> str:
    """The fault of the evidence, in words."""
    return (
        f"the evidence is not what it should be: {refusal(error)}" if isinstance(error, ValidationError) else str(error)
    )


def decide(bundle: Bundle, thresholds: Thresholds, waived: dict[str, str]) -> dict:
    """The decision.

    Args:
        waived: gate -> why it need not hold; no decision with a waiver passes.

    Returns:
        {"pass_all", "provisional", "outcome", "unconfirmed": why the candidate is no confirmed one, or None, "attempt":
        number of confirmations of its configuration, or None, "licensed": the sentence that its stability licenses, or
        None, "candidate", "thresholds", "looser_than_registered",
        "gates": [{"gate", "question", "status", "figure", "estimate", "low", "high", "level", "bound", "relation",
        "threshold", "n", "without_one_seed", "passes_at_no_effect", "effect_for_80", "beside": {name: an interval that
        decides nothing}, "left_out": data sets or pairs that do not count, "reason", "to_pass", "waived"}]}
    """
    candidate = _Candidate(bundle)
    # User-supplied SAEs have no ledger: the level of a first attempt, and never a pass.
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
    at = {name: of_control if name == "positive_control" else level for name in GATES}
    gates = [_judge(name, judges[name], at[name]) | {"waived": waived.get(name)} for name in GATES]
    looser = thresholds.looser()
    held = all(g["status"] == PASS for g in gates)
    provisional = bool(waived) or bool(looser) or candidate.unconfirmed is not None
    pass_all = held and not provisional
    rest = all(g["status"] == PASS or g["waived"] for g in gates)
    return {
        "pass_all": pass_all,
        "provisional": provisional,
        "outcome": "passed" if pass_all else "provisional" if provisional and rest else "not passed",
        "unconfirmed": candidate.unconfirmed,
        "attempt": candidate.attempt,
        "licensed": _licensed(candidate, stability),
        "candidate": candidate.to_json(),
        "thresholds": vars(thresholds),
        "looser_than_registered": looser,
        "gates": gates,
    }


# ---------------------------------------------------------------------------------------------------------------------
# One gate


OF_ESTIMATE = ("estimate", "low", "high", "level", "bound", "relation", "threshold", "n")
OF_SPREAD = ("without_one_seed", "passes_at_no_effect", "effect_for_80")
"""Keys of a gate's record that are null without an estimate."""


def _judge(name: str, judge: Callable[[], Shown], level: float) -> dict:
    """The gate's record."""
    to_find = f"evidence that counts, of {MAKES[OF.get(name, 'confirmation')]}"
    empty: dict = dict.fromkeys((*OF_ESTIMATE, *OF_SPREAD))
    empty |= {"beside": {}, "left_out": []}
    about = {"gate": name, "question": GATES[name]}
    try:
        shown = rules.checked(judge)
    except UNREADABLE as error:
        if isinstance(error, NoCandidate):
            to_find = f"a candidate that counts, of {MAKES['confirmation']}"
        return about | {"status": MISSING, "figure": None, **empty, "reason": _why(error), "to_pass": to_find}
    failing, (which, worst) = shown.failing(), shown.worst()
    rule, against = shown.rule, f" ({which})" if len(shown.estimates) > 1 else ""
    beside = shown.beside.items()
    end, reached = {"low": "lower", "high": "upper"}[rule.end], getattr(worst, rule.end)
    return about | {
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
            f"the estimate, {worst.estimate:+.4f}, is on the right side; were it true, an interval {times:.1f} "
            f"times as narrow would show it: it is of {shown.families} families of data sets and {shown.n} seeds"
        )
    return (
        f"the estimate, {worst.estimate:+.4f}, is on the right side; were it true and all the spread that of seeds, "
        f"about {max(seeds, shown.n + 1)} seeds would show it"
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
    """The candidate, checked once. Each gate about it raises what is wrong with it."""

    unconfirmed: str | None = None
    """Why the candidate is not confirmed, for user-supplied SAEs."""
    attempt: int | None = None
    """Number of confirmations of its configuration, this one included; None: not known."""

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
        found = read_evaluation(_whole(bundle, "confirmation").results)
        own, bank, records = found.candidate, found.bank, [r for r in found.bank.saes if r.candidate]
        rules.enough_seeds(len(records))
        require(own == SeedGroup.of(records), "the candidate's SAEs are not those that its bank evaluated")
        if isinstance(found, Retrained):
            require(len(found.bank.sections) == 1, "one condition, confirmed, expected")
        section = found.section
        require(_members(section) == own.checkpoints, "its stability is that of other SAEs")
        _one_account(bank)
        require(own.facts.control is None, f"its SAEs were trained on {own.facts.control}")
        subject, hook_name = bank.inputs["subject"], bank.hook_name
        require(own.facts.subject_digest in (None, subject), "its bank is of another subject")
        require(own.facts.hook_name in (None, hook_name), "its bank is of another hook")
        self.about: dict[str, Any] = {"subject_digest": subject, "hook_name": hook_name, "d_in": own.facts.d_in}
        if isinstance(found, Retrained):
            self.attempt = found.attempt
            sha256 = bundle.given("selection").sha256
            assert chosen is not None  # `unconfirmed` is for SAEs that a user supplies alone
            assert sha256 is not None  # `_read` refuses a file without a digest
            self._check_retrained(found, chosen, sha256)
        else:
            self._check_supplied(found)
        _on_disk(bundle, found)
        self.own, self.facts, self.bank, self.section = own, own.facts, bank, section
        seeds = seed_names([r.facts.seed for r in records])
        self.records = dict(zip(seeds, records, strict=True))
        self.labels = {seed: f"checkpoint {r.label}" for seed, r in zip(seeds, records, strict=True)}

    def _check_retrained(self, found: Retrained, chosen: Selection, sha256: str) -> None:
        """The selected recipe, and no other, trained again on seeds that are fresh and fixed."""
        facts, section, bank = found.candidate.facts, found.section, found.bank
        where = self.about["subject_digest"], self.about["hook_name"]
        require((facts.subject_digest, facts.hook_name) == where, "its bank is of another subject or hook")
        made_of, seeds = facts.to_json(), [int(seed) for seed in found.candidate.checkpoints]
        require(found.selection.sha256 == sha256 == found.inputs.get("selection"), "confirmed is another selection")
        require(made_of == chosen.selected.get("facts"), "the confirmed candidate is not the selected one")
        name = found.selection.id
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
        made = {(m.family, m.d_sae, m.k, m.learning_rate) for m in section.members}
        require(made == {(facts.family, facts.d_sae, facts.k, facts.learning_rate)}, "members made otherwise")
        require(section.rows == bank.rows, "its stability is of other rows than its bank")
        inputs = bank.inputs | section.control_inputs | {"selection": sha256}
        require(found.inputs == inputs, "its inputs are not its bank's and its control's")
        recipe = Recipe.model_validate(chosen.selected.get("recipe"))  # an older one lacks fields that have defaults
        require(recipe == bank.recipe, "it was trained by another recipe than the selected one")
        require(found.subject == chosen.selected.get("subject"), "its subject has another name than at selection")
        require({"probing_seed", "versions"} <= chosen.cohort.keys(), "selection does not say what it compared")
        require(bank.store_digest == facts.store_digest, "its bank is of other activations")
        require(
            (section.d_sae, section.k, section.budget, section.family)
            == (facts.d_sae, facts.k, facts.tokens, facts.family),
            "its stability is that of another configuration",
        )
        self.cohort, self.data_sets = chosen.cohort, set(chosen.split.gate_data_sets)
        self.read = set(chosen.split.selection_families)

    def _check_supplied(self, found: Supplied) -> None:
        """SAEs that a user supplies: what they are said to rest on is what they rest on."""
        own, bank = found.candidate, found.bank
        require(all(r.condition == own.condition for r in bank.saes if r.candidate), "records of another condition")
        inputs = bank.inputs | found.section.control_inputs
        for part in (bank.saebench, bank.cebench):
            inputs |= {f"checkpoint {r.label}": r.checkpoint_sha256 for r in part.controls} if part else {}
        inputs |= {f"untrained {seed}": sha256 for seed, sha256 in (found.untrained or {}).items()}
        require(found.inputs == inputs, "its inputs are not its subject, activations, checkpoints and untrained states")
        scored = all("untrained" in p for p in found.section.pairs)
        untrained = set(own.checkpoints) if scored else set()
        require(set(found.untrained or {}) == untrained, "an untrained state of each SAE, or of none, expected")
        heldout = bank.inputs["held-out activations"]
        self.stores = {heldout}  # the candidate's own study is on held-out activations
        _about(found.section, self)
        self.stores = {heldout, own.facts.store_digest} - {None}  # a stress test's may be on those of training
        self.read, self.data_sets = set(), set(DATA_SETS.split(","))
        probing = bank.saebench
        self.cohort = {"probing_seed": levels.PROBING_SEED, "probing": probing and probing.probing}
        self.cohort["versions"] = probing and probing.versions

    def known(self) -> _Candidate:
        """The candidate.

        Raises:
            NoCandidate: with what is wrong with it.
        """
        if self._reason is not None:
            why = _why(self._reason).replace("the evidence", "its evidence", 1)
            raise NoCandidate(f"there is no candidate: {why}")
        return self

    def to_json(self) -> dict | None:
        return None if self._reason is not None else self.own.to_json()

    def is_that_of(self, found: RandomModelStress | TranscoderStress | OODStress, script: str) -> None:
        require(found.candidate == self.own, f"{script}: it is about other SAEs than the candidate's")
        inputs = {self.labels[seed]: sha256 for seed, sha256 in self.own.checkpoints.items()}
        inputs |= {"subject": self.about["subject_digest"]} | _beside(found)
        require(inputs.items() <= found.inputs.items(), f"{script}: its inputs are not the SAEs that it speaks of")
        needed = {"held-out activations"}
        needed |= {"transcoder input"} if isinstance(found, TranscoderStress) else set()
        needed |= {"shifted activations", "probed texts"} if isinstance(found, OODStress) else set()
        require(needed <= found.inputs.keys(), f"{script}: its inputs do not name {', '.join(sorted(needed))}")


def _on_disk(bundle: Bundle, found: Retrained | Supplied) -> None:
    identities = found.candidate.identities
    require(found.paths.keys() == identities.keys(), "a path of each checkpoint expected")
    for seed, identity in identities.items():
        there = bundle.on_disk.get(seed)
        require(there is not None, f"the checkpoint of seed {seed} is not on the disk, or cannot be read")
        require(there == identity, f"the checkpoint of seed {seed} on the disk is another than the evidence names")


def _beside(found: RandomModelStress | TranscoderStress | OODStress) -> dict[str, str]:
    """Inputs of a stress test beside the candidate."""
    if isinstance(found, RandomModelStress):
        return random_model.inputs(found.section, found.random_models)
    return transcoder.inputs(found) if isinstance(found, TranscoderStress) else {}


def _one_account(bank: Bank | Evaluated) -> None:
    """Each SAE of a bank has one record, which its benchmarks repeat, and the inputs are the SAEs'."""
    saes = {r.identity: _kept(r) for r in bank.saes}
    require(len(saes) == len(bank.saes), "its bank has two records of an SAE")
    inputs = {n: bank.inputs.get(n) for n in ("subject", "held-out activations")}
    inputs |= {f"checkpoint {r.label}": r.checkpoint_sha256 for r in bank.saes}
    require(bank.inputs == inputs, "its bank's inputs are not its subject, activations and checkpoints")
    for name, part in (("SAEBench", bank.saebench), ("CE-Bench", bank.cebench)):
        if part is not None:
            controls = {f"checkpoint {r.label}": r.checkpoint_sha256 for r in part.controls}
            more = {"pairs": part.pairs_digest} if isinstance(part, Contrastive) else {}
            require({r.identity: _kept(r) for r in part.saes} == saes, f"{name} has other records of the SAEs")
            require(len(part.saes) == len(saes), f"{name} has two records of an SAE")
            require(part.noise.label in {r.label for r in part.saes}, f"{name}: noise of another SAE")
            about = (part.subject_digest, part.hook_name)
            require(about == (inputs["subject"], bank.hook_name), f"{name} was run on another subject or hook")
            require(part.inputs == inputs | controls | more, f"{name} has other inputs than its bank")
    if bank.saebench is not None:
        cores = {r.identity: r.core for r in bank.saes}
        require(all(r.core == cores[r.identity] for r in bank.saebench.saes), "SAEBench has other core metrics")


def _kept(record: SAERecord) -> dict:
    return {name: getattr(record, name) for name in SAERecord.model_fields}


def _members(section: Section | OwnSection) -> dict[str, str]:
    found = section.checkpoints
    require(len(found) == len(section.members), "a seed stands twice")
    return found


def _about(section: Section | OwnSection, candidate: _Candidate) -> None:
    for name, value in candidate.about.items():
        require(getattr(section, name) == value, f"a stability study of another {name}")
    require(section.store_digest in candidate.stores, "a stability study of another store_digest")


# ---------------------------------------------------------------------------------------------------------------------
# The gates


def _positive_control(bundle: Bundle, candidate: _Candidate, level: float) -> Shown:
    found = _read(bundle, "phase4a", Phase4a)
    control = found.planted
    if control is None:
        raise Missing("phase 4a holds no planted features: it makes them on its default subject, modular addition")
    subject = candidate.about["subject_digest"] if candidate.to_json() else None
    require(control.data.digest != subject, "phase 4a is of the candidate's own subject: no positive control")
    named = planted.inputs(found.husai, control)
    require(found.inputs == named, "phase 4a: its inputs are not its subjects, stores and checkpoints")
    return rules.positive_control(control, level)


def _stability(candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    return rules.stability(c.section, level, minimum)


def _licensed(candidate: _Candidate, stability: Callable[[], Shown]) -> str | None:
    """What the controls that the candidate beat license, for an external claim once every gate has passed. Unless
    training is known to have come to rest, the sentence names the budget."""
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
    found, own = c.bank.code, c.records
    require(found is not None, "its SAEs were not held against dictionaries of prototypes: confirmation makes it again")
    assert found is not None
    require(found.heldout_digest == c.bank.inputs["held-out activations"], "code: of other held-out activations")
    source = c.facts.store_digest if isinstance(c.bank, Bank) else found.store_digest
    require(found.store_digest == source, "code: prototypes of other activations than the SAEs were trained on")
    require(found.store_digest != found.heldout_digest, "code: prototypes of the held-out activations themselves")
    require(found.d_sae == c.facts.d_sae, "code: prototypes of another width")
    require(found.k == {seed: max(1, round(r.heldout.l0)) for seed, r in own.items()}, "code: of another L0 or seeds")
    variance = {seed: r.heldout.explained_variance for seed, r in own.items()}
    spliced = {seed: r.core.ce_loss_score for seed, r in own.items()}
    require(found.saes.explained_variance == variance, "code: explained variance of other SAEs")
    require(found.saes.ce_recovered == spliced, "code: CE recovered of other SAEs")
    require({r.core.tokens for r in own.values()} == {found.tokens}, "code: CE recovered of other texts")
    return rules.code(found, level)


def _fit(candidate: _Candidate, level: float) -> Shown:
    own = candidate.known().records.values()
    return rules.fit([r.heldout for r in own], [r.core.ce_loss_score for r in own], level)


def _random_model(bundle: Bundle, candidate: _Candidate, level: float) -> Shown:
    c = candidate.known()
    if c.facts.training is None and bundle.files.get("random_model") is None:
        raise Missing(
            f"{UNKNOWN_TRAINING}: --random-model-checkpoint names SAEs trained alike on each draw of the random weights"
        )
    found = _read(bundle, "random_model", RandomModelStress)
    script = MAKES["random_model"]
    c.is_that_of(found, script)
    require(_members(found.section) == c.own.checkpoints, f"{script}: its stability is that of other SAEs")
    _about(found.section, c)
    own = [m.seed for m in found.section.members]
    others = any([m.seed for m in control.members] != own for control in found.random_models)
    require(c.facts.training is None or not others, f"{script}: its controls have other seeds")

    def judge() -> Shown:
        rules.one_account(found.section, c.section)
        return rules.random_model(found.section, found.random_models, level)

    return _of(script, judge)


def _of(script: str, judge: Callable[[], Shown]) -> Shown:
    """The result of a rule. If the evidence does not count, the reason names the script that made it."""
    try:
        return judge()
    except Missing as missing:
        raise Missing(f"{script}: {missing}") from None


def _transcoder(bundle: Bundle, candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    if c.facts.training is None:
        raise Missing(f"{UNKNOWN_TRAINING}, and so no transcoders can be trained alike; no flag says it")
    found = _read(bundle, "transcoder", TranscoderStress)
    script, setting = MAKES["transcoder"], found.setting
    c.is_that_of(found, script)
    require(_members(found.section) == c.own.checkpoints, f"{script}: its scores are those of other SAEs")
    _about(found.section, c)
    require(transcoder.preregistered(setting, c.own), f"{script}: another setting than the candidate's own")
    arms = found.section, found.transcoder, found.across

    def judge() -> Shown:
        rules.one_account(found.section, c.section)
        return rules.transcoder(setting, *arms, level=level, minimum=minimum)

    return _of(script, judge)


def _ood(bundle: Bundle, candidate: _Candidate, level: float, maximum: float) -> Shown:
    c, found = candidate.known(), _read(bundle, "ood", OODStress)
    script, shifted = MAKES["ood"], found.shifted
    c.is_that_of(found, script)
    seeds = seed_names([s.seed for s in shifted.saes])
    identities = dict(zip(seeds, (s.identity for s in shifted.saes), strict=True))
    require(identities == c.own.identities and len(shifted.saes) == len(identities), f"{script}: figures of other SAEs")
    _seed(c, shifted.random_seed)
    _same_probes(c, found)
    return _of(script, lambda: rules.ood(shifted, found.skipped, level, maximum))


def _saebench(candidate: _Candidate, level: float, minimum: float) -> Shown:
    c = candidate.known()
    probing = c.bank.saebench
    if probing is None:
        raise Missing("SAEBench was not run")
    absent = sorted(c.data_sets - set(probing.data_sets))
    whose = "selection left" if c.unconfirmed is None else "--dataset-names holds by default"
    require(not absent, f"SAEBench: data sets that {whose} are missing: {', '.join(absent[:3])}")
    _same_probes(c, probing)
    _seed(c, probing.random_seed)
    require(probing.families == families(probing.data_sets), "SAEBench: families of other data sets")
    require(bool(c.data_sets), "selection read no probing figures, so that no data sets are left to it for the gate")
    judged = zip(probing.data_sets, probing.families, strict=True)
    keep = [i for i, (name, f) in enumerate(judged) if name in c.data_sets and f not in c.read]  # no more than those
    names, of = ([values[i] for i in keep] for values in (probing.data_sets, probing.families))
    values = {r.identity: np.array(r.test_auc[deltas.K])[keep] for r in probing.saes}
    figures = _against_reference(c, probing.saes, values, names, of)
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
    # The references of a baseline summary are bound to nothing here and do not count.
    figures = _against_reference(c, pairs.saes, values, names, clusters)
    return rules.shown_better(rules.CEBENCH, figures, level, minimum)


def _against_reference(
    c: _Candidate, records: Sequence[SAERecord], values: deltas.Values, names: list[str], groups: list[str]
) -> AgainstReference:
    """The candidate's figures beside those of its matched reference."""
    order = list(c.own.identities.values())
    group = [r for r in records if r.candidate and r.identity in order]
    group.sort(key=lambda r: order.index(r.identity))
    seeds = seed_names([r.facts.seed for r in group])
    own = dict(zip(seeds, (r.identity for r in group), strict=True)) == c.own.identities
    require(own and len(group) == len(order), "figures of other SAEs than the candidate's")
    require(all(r.facts.shared == c.facts for r in group), "facts of other SAEs than the candidate's")
    match = matched(group, records)
    hint = "" if c.unconfirmed is None else "; --reference names SAEs to compare with"
    if c.facts.training is None:
        hint = f". {UNKNOWN_TRAINING[0].upper()}{UNKNOWN_TRAINING[1:]}: --reference can name none that matches"
    require(match.reason is None, f"no matched reference: {match.reason}{hint}")
    require(len(match.records) >= len(group), f"{len(match.records)} reference SAEs for {len(group)} seeds")
    references = match.records
    require(len({r.identity for r in references}) == len(group), "a reference stands for several seeds")
    own, reference = (np.array([values[r.identity] for r in arm]) for arm in (group, references))
    both = zip(group, references, strict=True)
    variance = [r.heldout.explained_variance - other.heldout.explained_variance for r, other in both]
    return AgainstReference(own, reference, variance, names, groups)


def _seed(c: _Candidate, seed: int) -> None:
    require(c.cohort["probing_seed"] in (None, seed), "another seed of the probing than at selection")


def _same_probes(c: _Candidate, found: Probing | OODStress) -> None:
    versions = c.cohort["versions"]
    name = None if versions is None else c.cohort.get("probing", "sae_probes")  # without versions nothing was probed
    require(name in (None, found.probing), f"probes of another name than at selection: {name} expected")
    require(versions in (None, found.versions), "other versions of the benchmark's packages than at selection")
