"""The gate's decision as the page shows it. Contradictions in a decision are reported as doubts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, ValidationError

from husai.evidence import rules
from husai.report.evidence import Phase
from husai.report.markup import Scale, Strip, interval, number

CONTROL = "positive_control"
"""Gate on the method itself. It says nothing about the SAEs, and is not counted among their gates."""
GATES = {
    CONTROL: "Does the method find planted features, and find the same ones in every training?",
    "stability": "Do the same features come back in other trainings, more than in every control?",
    "code": "Do the SAEs code activations better than single rows, token means and centroids do?",
    "fit": "Are explained variance and CE recovered high enough, and are few enough features dead?",
    "random_model": "Do features come back more than those of the same model with random weights?",
    "transcoder": "Do transcoders of other seeds find the same features?",
    "ood": "On shifted data, do probes on the SAE's features lose hardly more than the model's own?",
    "saebench": "Are probes on few features better than those on a matched reference's features?",
    "cebench": "Do single features separate contrasting texts better than a matched reference's?",
}
"""Gate -> its question, in the order of the page."""
SHOWN = {
    CONTROL: "The method finds planted features, and finds the same ones in every training.",
    "stability": "A share of the features comes back in other trainings, beyond every control.",
    "code": "The SAEs code activations better than single rows, token means and centroids do.",
    "fit": "Explained variance and CE recovered are high enough, and few enough features are dead.",
    "random_model": "Features come back more than those of the same model with random weights.",
    "transcoder": "Transcoders of other seeds find the same features.",
    "ood": "On shifted data, probes on the SAE's features lose hardly more than the model's own.",
    "saebench": "Probes on few features are better than those on a matched reference's features.",
    "cebench": "Single features separate contrasting texts better than a matched reference's.",
}
"""Gate -> statement that its pass shows."""
NOTHING = "Nothing may be claimed externally."


class Beside(BaseModel):
    """An interval that decides nothing."""

    estimate: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None


FEW = 6
"""Largest number of uncounted data sets or pairs that are named."""


class Gate(BaseModel):
    """One gate of a decision; further keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    gate: str
    status: Literal["PASS", "FAIL", "MISSING"]
    question: str | None = None
    figure: str | float | None = None
    estimate: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    bound: Literal["low", "high"] | None = None
    """End of the interval that is compared with the threshold."""
    relation: Literal[">", ">=", "<="] | None = None
    threshold: FiniteFloat | None = None
    n: int | None = None
    level: FiniteFloat | None = None
    """Level of the interval, which depends on the attempt."""
    passes_at_no_effect: FiniteFloat | None = None
    effect_for_80: FiniteFloat | None = None
    """True figure at which the gate passes with probability 0.8."""
    without_one_seed: tuple[FiniteFloat, FiniteFloat] | None = None
    """Smallest and largest figure without one seed."""
    beside: dict[str, Beside] = Field(default_factory=dict)
    left_out: list[str] = Field(default_factory=list)
    """Data sets or pairs that were measured and do not count."""
    reason: str | None = None
    to_pass: str | None = None
    waived: str | None = None

    @property
    def margin(self) -> float | None:
        """Distance of the compared end from the threshold; negative if it does not pass."""
        end = {"low": self.low, "high": self.high, None: None}[self.bound]
        if end is None or self.threshold is None or self.relation is None:
            return None
        return self.threshold - end if self.relation == "<=" else end - self.threshold

    @property
    def contradicts_itself(self) -> bool:
        """True for a pass whose figures do not pass."""
        margin = self.margin
        return self.status == "PASS" and margin is not None and (margin < 0 or (margin == 0 and self.relation == ">"))

    # What the page shows

    @property
    def title(self) -> str:
        known = {"ood": "Shifted data (ood)", "saebench": "SAEBench", "cebench": "CE-Bench"}
        return known.get(self.gate, self.gate.replace("_", " ").capitalize())

    @property
    def asks(self) -> str:
        return GATES.get(self.gate) or self.question or ""

    @property
    def shows(self) -> str:
        """Meaning of a pass."""
        return SHOWN.get(self.gate, "")

    @property
    def state(self) -> str:
        """`pass`, `fail`, `missing`, or `waived` for a gate that did not pass and was waived."""
        return "waived" if self.waived and self.status != "PASS" else self.status.lower()

    @property
    def shown(self) -> str:
        return interval(self.estimate, self.low, self.high, sign=self.threshold == 0)

    @property
    def by_how_much(self) -> str | None:
        if self.margin is None or self.relation is None:
            return None
        relation = {">": "above", ">=": "at least", "<=": "at most"}[self.relation]
        reached = number({"low": self.low, "high": self.high, None: None}[self.bound] or 0.0)
        end = "lower" if self.bound == "low" else "upper"
        words = "clears the bound by" if self.margin >= 0 else "misses the bound by"
        return (
            f"The {end} end of the interval is {reached}. It must be {relation} {self.threshold:g}, "
            f"and {words} {number(abs(self.margin))}."
        )

    @property
    def power(self) -> str | None:
        """Sentences on the gate's power, and on the figure without one SAE."""
        if self.passes_at_no_effect is None or self.effect_for_80 is None:
            return None
        sentence = (
            f"If there were no effect, {100 * self.passes_at_no_effect:.2f} % of such studies would pass. "
            f"If the true figure were {number(self.effect_for_80)}, 80 % would."
        )
        if self.without_one_seed is not None:
            least, largest = (number(end) for end in self.without_one_seed)
            sentence += f" Without one of the SAEs the figure is {least} to {largest}."
        return sentence

    @property
    def more(self) -> list[str]:
        """Sentences on informational figures, and on data sets that do not count."""
        shown = {name: interval(e.estimate, e.low, e.high) for name, e in self.beside.items()}
        lines = [f"For information, {name}: {figure}. This figure decides nothing." for name, figure in shown.items()]
        if self.left_out:
            named, rest = ", ".join(self.left_out[:FEW]), len(self.left_out) - FEW
            named += f" and {rest} more" if rest > 0 else ""
            lines.append(f"Not counted, because no group of data sets may hold more than a quarter: {named}.")
        return lines

    @property
    def why(self) -> str | None:
        """The reason as a sentence; None if the figure and its distance from the bound show it."""
        margin = self.margin
        given = margin is not None and (margin >= 0) == (self.status == "PASS")
        if given or not self.reason:
            return None
        return f"{self.reason[0].upper()}{self.reason[1:].rstrip('.')}."

    @property
    def scale(self) -> Scale | None:
        values = [x for x in (self.estimate, self.low, self.high, self.threshold) if x is not None]
        return Scale.over([*values, 0.0]) if self.estimate is not None and self.threshold is not None else None

    @property
    def strip(self) -> Strip:
        """Strip of a gate that has a scale."""
        scale, estimate = self.scale, self.estimate
        assert scale is not None
        assert estimate is not None
        return Strip.of(scale, estimate, self.low, self.high)


class Read(BaseModel):
    path: str
    sha256: str | None
    """None: there was no such file."""


class Decision(BaseModel):
    """Results of the release gate. Further keys are ignored."""

    model_config = ConfigDict(extra="ignore")

    phase: Literal["release_gate"]
    pass_all: StrictBool
    gates: list[Gate]
    policy: str = "strict"
    provisional: StrictBool = False
    unconfirmed: str | None = None
    """Reason why the candidate is not a confirmed one."""
    attempt: int | None = None
    """Number of confirmations of the configuration, including this one."""
    licensed: str | None = None
    """Sentence that the stability of the SAEs supports."""

    looser_than_registered: list[str] = Field(default_factory=list)
    candidate: dict | None = None
    read: dict[str, Read] = Field(default_factory=dict)

    @property
    def licenses(self) -> bool:
        """True if the sentence claims anything."""
        return self.licensed not in (None, rules.LICENCES[0][2])

    def candidate_facts(self, subjects: dict[str, str]) -> list[tuple[str, str]]:
        """(label, value) of facts of the candidate in the decision. `subjects`: digest -> name."""
        c = self.candidate or {}
        facts = c["facts"] if isinstance(c.get("facts"), dict) else {}
        checkpoints = c["checkpoints"] if isinstance(c.get("checkpoints"), dict) else {}
        seeds = c["seeds"] if isinstance(c.get("seeds"), list) else [*checkpoints]
        subject = str(c.get("subject") or facts.get("subject_digest") or "")
        name = subjects.get(subject)
        facts_shown = {
            "SAEs": c.get("condition"),
            "Model": f"{name} ({subject[:12]}…)" if name else subject,
            "Hook": c.get("hook_name") or facts.get("hook_name"),
            "Seeds" if facts.get("source", "husai") == "husai" else "Numbers": ", ".join(map(str, seeds)),
            "Attempt": self.attempt,
        }
        return [(label, str(which)[:300]) for label, which in facts_shown.items() if which]


@dataclass
class Verdict:
    """The top of the page."""

    headline: str
    sentence: str
    state: str
    """`pass`, `fail`, `waived`, or `none` for no decision or a contradictory one."""
    decision: Decision | None = None
    gates: list[Gate] = field(default_factory=list)
    """Known gates in order, then others. A gate that the decision does not name is MISSING."""
    doubts: list[str] = field(default_factory=list)
    """Reasons why the decision cannot be trusted."""
    run: Phase | None = None
    candidate_facts: list[tuple[str, str]] = field(default_factory=list)
    """(label, value) of facts of the candidate."""

    def count(self, state: str) -> int:
        return sum(g.state == state for g in self.gates)

    @property
    def control(self) -> Gate | None:
        """The gate on the method itself."""
        return next((g for g in self.gates if g.gate == CONTROL), None)

    @property
    def shown(self) -> list[Gate]:
        """Gates about the SAEs that passed."""
        return [g for g in self.gates if g.state == "pass" and g.gate != CONTROL]

    @property
    def open(self) -> list[Gate]:
        """Gates that did not pass; failed ones come first."""
        rest = [g for g in self.gates if g.state != "pass"]
        return sorted(rest, key=lambda g: g.status == "MISSING")


def judge(run: Phase | None, phases: list[Phase]) -> Verdict:
    """Verdict from a run of the gate and the runs beside it."""
    if run is None:
        return Verdict("No verdict", f"The release gate has not judged these results. {NOTHING}", "none")
    try:
        decision = Decision.model_validate(run.results)
    except ValidationError as error:
        first = error.errors()[0]
        doubts = [*run.problems]
        if run.results:
            doubts.append(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        return Verdict(
            "No valid gate decision", f"The result of the gate cannot be read. {NOTHING}", "none", None, [], doubts, run
        )
    gates = in_order(decision.gates)
    doubts = [*run.problems, *contradictions(decision, gates), *stale(decision, phases)]
    verdict = Verdict("", "", "fail", decision, gates, doubts, run, decision.candidate_facts(subject_names(phases)))
    passed, waived = verdict.count("pass"), verdict.count("waived")
    sae_gates = [g for g in gates if g.gate != CONTROL]
    counts = f"{sum(g.state == 'pass' for g in sae_gates)} of {len(sae_gates)} gates passed."
    if (control := verdict.control) is not None and control.status != "PASS":
        counts += " The check of the method itself did not."
    if not decision.pass_all and decision.unconfirmed and passed == len(gates):
        verdict.headline, verdict.state = "No pass: provisional", "waived"
        verdict.sentence = f"{counts} {NOTHING}"
    elif not decision.pass_all and decision.provisional and waived + passed == len(gates):
        verdict.headline, verdict.state = "No pass: provisional", "waived"
        verdict.sentence = f"{counts} A waived or loosened gate makes no pass. {NOTHING}"
    elif not decision.pass_all:
        verdict.headline, verdict.sentence = "Not passed", f"{counts} {NOTHING}"
    elif doubts:
        verdict.headline, verdict.state = "Not established", "none"
        verdict.sentence = f"The decision claims a pass and contradicts itself. {NOTHING}"
    else:
        verdict.headline, verdict.state = "Passed", "pass"
        verdict.sentence = f"{counts} You may claim externally what these gates tested, and no more."
    return verdict


def subject_names(phases: list[Phase]) -> dict[str, str]:
    """Digest of a subject -> its name, from the runs."""
    names = {}
    for phase in phases:
        inputs, name = phase.results.get("inputs"), phase.results.get("subject")
        if isinstance(inputs, dict) and isinstance(inputs.get("subject"), str) and isinstance(name, str):
            names[inputs["subject"]] = name
    return names


def in_order(gates: list[Gate]) -> list[Gate]:
    named = {g.gate: g for g in gates}
    absent = Gate(gate="", status="MISSING", reason="the decision does not name this gate")
    known = [named.get(name) or absent.model_copy(update={"gate": name}) for name in GATES]
    return known + [g for g in gates if g.gate not in GATES]


def contradictions(decision: Decision, gates: list[Gate]) -> list[str]:
    """Sentences on contradictions inside the decision."""
    names = [g.gate for g in decision.gates]
    sentences = [f"The gate {name} is listed twice." for name in sorted({n for n in names if names.count(n) > 1})]
    sentences += [
        f"{g.title}: listed as passed, but its own figures do not pass." for g in gates if g.contradicts_itself
    ]
    open_gates = [g.title for g in gates if g.state in ("fail", "missing")]
    if decision.pass_all and open_gates:
        sentences.append(f"The decision claims that all gates passed, but some did not: {', '.join(open_gates)}")
    lenient = decision.provisional or decision.policy != "strict" or decision.looser_than_registered
    if decision.pass_all and (lenient or any(g.waived for g in gates)):
        sentences.append("The decision claims a pass although it is provisional, waived or loosened.")
    if decision.pass_all and not decision.read:
        sentences.append("The decision names no file that it read.")
    return sentences


def stale(decision: Decision, phases: list[Phase]) -> list[str]:
    """Sentences on files that changed since the gate read them."""
    digests = {p.sha256 for p in phases}
    sentences = []
    for label, read in decision.read.items():
        folder = PurePosixPath(read.path).parent.name
        runs = [p for p in phases if p.name == folder and p.sha256 is not None]
        if (
            read.sha256 is not None
            and read.sha256 not in digests
            and runs
            and PurePosixPath(read.path).name == "results.json"
        ):
            sentences.append(f"{label}: {folder}/results.json has changed since the gate read it.")
        elif decision.pass_all and read.sha256 not in digests:
            sentences.append(f"{label}: the file that the gate read is not here.")
    return sentences
