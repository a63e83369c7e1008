"""Next step at an open gate: one command with the reader's own paths, or the reason why none applies."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from husai.evidence.estimates import narrowing
from husai.evidence.rules import MINIMUM_SEEDS
from husai.report.evidence import Phase
from husai.report.verdict import CONTROL, Decision, Gate
from husai.runs.checkpoints import is_name

EXPERIMENTS = "scripts/experiments"
CHECK, CONFIRMATION, SELECTION = (
    f"{EXPERIMENTS}/{name}.py"
    for name in ("run_release_check", "run_candidate_confirmation", "select_release_candidate")
)
RELIABILITY = f"{EXPERIMENTS}/run_feature_reliability.py"
STORIES = "GulkoA/contrastive-stories-v3"
"""CE-Bench's own stories, on the hub."""
PLACE = ("--model-name", "--subject", "--revision", "--dtype", "--text", "--text-column", "--text-split")
MACHINE = ("--artifact-root", "--device", "--threads")
"""Flags that name the reader's model, text and machine. Commands for other scripts repeat them."""
STRESS = {
    "random_model": f"{EXPERIMENTS}/run_random_model_stress_eval.py",
    "transcoder": f"{EXPERIMENTS}/run_transcoder_stress_eval.py",
    "ood": f"{EXPERIMENTS}/run_ood_stress_eval.py",
}
UNKNOWN = "These SAEs do not say how they were trained"


@dataclass(frozen=True)
class Step:
    """Next step."""

    text: str
    command: str | None
    """None: not applicable, and `text` gives the reason."""
    replaces_reason: bool = False
    """Whether `text` replaces the gate's own reason."""


@dataclass(frozen=True)
class ReportReader:
    """Facts of the reader's runs and subject."""

    root: str
    """Folder of the results, as the reader named it."""
    words: list[str]
    """Command line of the release check, or of the confirmation, that made the evidence about the SAEs."""
    supplied: bool
    """Whether the reader supplied the SAEs, and no study selected them."""
    hook_name: str | None = None
    subject: str | None = None
    seeds: int = 0
    d_sae: int | None = None
    k: int | None = None
    recipe_known: bool = True
    survives: bool | None = None
    """Whether the model's own probe survives a shift of the text. None: not tested."""
    places: list[str] = field(default_factory=list)
    """Paths of the checkpoints, relative to the folder of the confirmation."""
    selection: list[str] = field(default_factory=list)
    """Command line of the selection."""

    @classmethod
    def of(cls, phases: list[Phase], decision: Decision | None, root: Path, command: str | None) -> ReportReader:
        """Facts from the runs.

        Args:
            command: command line of the release check. None: commands come from the manifests of the runs.
        """
        commands = {p.phase: _words(p.manifest.command) for p in phases if p.manifest}
        results = {p.phase: p.results for p in phases if p.results}
        confirmed = results.get("candidate_confirmation", {})
        bank = confirmed.get("bank")
        candidate: dict = (decision.candidate if decision else None) or confirmed.get("candidate") or {}
        facts = known if isinstance(known := candidate.get("facts"), dict) else {}
        shifted = results.get("ood_stress", {}).get("shifted")
        kept = shifted.get("drop_where_kept", {}) if isinstance(shifted, dict) else {}
        survives = [isinstance(e, dict) and e.get("estimate") is not None for e in kept.values()]
        checkpoints = candidate.get("checkpoints")
        return cls(
            root=str(root),
            words=_words(command) if command else commands.get("candidate_confirmation", []),
            supplied=confirmed.get("origin") == "supplied" or command is not None,
            hook_name=facts.get("hook_name") or (bank.get("hook_name") if isinstance(bank, dict) else None),
            subject=confirmed.get("subject"),
            seeds=len(checkpoints) if isinstance(checkpoints, dict) else 0,
            d_sae=facts.get("d_sae"),
            k=facts.get("k"),
            recipe_known=not facts or facts.get("training") is not None,
            survives=any(survives) if survives else None,
            places=list(paths.values()) if isinstance(paths := confirmed.get("paths"), dict) else [],
            selection=commands.get("candidate_selection", []),
        )

    # Command lines

    def again(self, more: dict[str, list[str]] | None = None, without: tuple[str, ...] = ()) -> str:
        """The reader's own command with flags added or removed."""
        words = self.words or ["python", CHECK if self.supplied else CONFIRMATION]
        for flag in (*(more or {}), *without):
            words = _without(words, flag)
        return shlex.join(words + [word for flag, values in (more or {}).items() for word in (flag, *values)])

    def more_seeds(self, n: int) -> str:
        """The reader's command with n further SAEs, or with a confirmation on n more seeds."""
        if not self.supplied:
            words = self.selection or ["python", SELECTION]
            words = _without(words, "--confirmation-seeds")
            return shlex.join([*words, "--confirmation-seeds", str(self.seeds + n)])
        words = self.words or ["python", CHECK, "--checkpoint"]
        names = [f"SEED_{self.seeds + 1 + i}" for i in range(n)] if n <= FEW else [f"{n}_MORE_SAES"]
        for i, word in enumerate(words):
            if word in ("--checkpoint", "--checkpoints"):
                end = _end_of_values(words, i)
                return shlex.join([*words[:end], *names, *words[end:]])
        return shlex.join([*words, "--checkpoint", *names])

    def elsewhere(self, script: str, flags: dict[str, object]) -> str:
        """Command of another script on the reader's model, hook and text."""
        words = ["python", script]
        for flag in (*PLACE, *MACHINE):
            words += [word for argument in _values(self.words, flag) for word in (flag, argument)]
        if self.subject and not {"--model-name", "--subject"} & set(words):
            words += ["--model-name", self.subject]
        if self.hook_name:
            words += ["--hook-name", self.hook_name]
        return shlex.join(words + [str(w) for flag, value in flags.items() if value is not None for w in (flag, value)])

    def program(self) -> str:
        """Command of the whole program on the reader's model, hook and text."""
        named = {"SUBJECT": self.subject, "HOOK": self.hook_name}
        named["TEXT"] = next(iter(_values(self.words, "--text")), None)
        words = [f"{name}={shlex.quote(value)}" for name, value in named.items() if value not in (None, "packaged")]
        return " ".join([*words, f"bash {EXPERIMENTS}/run_b200_high_impact_queue.sh"])

    @property
    def checkpoints(self) -> list[str]:
        """Names of the SAEs as the reader gave them, or paths of the confirmation's checkpoints."""
        named = [v for flag in ("--checkpoint", "--checkpoints") for v in _values(self.words, flag)]
        folder = next(iter(_values(self.words, "--output-dir")), self.root)
        return named or [place if is_name(place) else os.path.normpath(f"{folder}/{place}") for place in self.places]

    @property
    def confirmed(self) -> str:
        return f"{self.root}/candidate_confirmation/results.json"


FEW = 5
"""Largest number of further SAEs that a command names individually."""
MANY = 30
"""Largest number of SAEs that a step suggests."""


def _words(command: str) -> list[str]:
    """Words of a command line. `--flag=value` gives two words."""
    words = shlex.split(command)
    return [part for w in words for part in (w.split("=", 1) if w.startswith("--") else [w])]


def _end_of_values(words: list[str], i: int) -> int:
    """End of the values of the flag at `i`."""
    return next((j for j in range(i + 1, len(words)) if words[j].startswith("--")), len(words))


def _values(words: list[str], flag: str) -> list[str]:
    return [v for i, word in enumerate(words) if word == flag for v in words[i + 1 : _end_of_values(words, i)]]


def _without(words: list[str], flag: str) -> list[str]:
    """The words without a flag and its values."""
    kept, i = [], 0
    while i < len(words):
        end = _end_of_values(words, i) if words[i] == flag else i
        kept += [] if words[i] == flag else [words[i]]
        i = max(end, i + 1)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# An open gate


def next_step(gate: Gate, reader: ReportReader) -> Step:
    """Next step at a gate that did not pass."""
    return _failed(gate, reader) if gate.status == "FAIL" else _missing(gate, reader)


def _missing(gate: Gate, reader: ReportReader) -> Step:
    name = gate.gate
    if name == CONTROL and not reader.supplied:  # a release check runs it itself
        return Step(
            "Run the check of the method itself. Its result is shared by all later reports.",
            f"python {EXPERIMENTS}/run_phase4a_reproduction.py",
        )
    if name == "transcoder" and not reader.recipe_known:
        return Step(f"{UNKNOWN}, therefore no transcoder can be trained alike.", None, True)
    if name in ("saebench", "cebench") and not reader.recipe_known:
        return Step(f"{UNKNOWN}, therefore no reference SAE can be matched to them.", None)
    if name == "ood" and reader.survives is False:
        return Step(
            "The model's own probes fall to chance on every shifted data set, therefore the loss of an SAE's probes "
            "says nothing.",
            None,
        )
    if name != CONTROL and 0 < reader.seeds < MINIMUM_SEEDS:
        short = MINIMUM_SEEDS - reader.seeds
        return Step(
            f"Add {short} SAE{'s' if short > 1 else ''} of the same configuration with other seeds. A verdict needs "
            f"{MINIMUM_SEEDS}.",
            reader.more_seeds(short),
        )
    given = set(reader.words)
    if name == "random_model" and not reader.recipe_known and "--random-model-checkpoint" not in given:
        return Step(
            f"{UNKNOWN}. Train SAEs in your own way on the model with random weights, as many as yours in each of the "
            "draws 0, 1 and 2, and name their folders.",
            reader.again({"--random-model-checkpoint": ["RANDOM_SAES_0", "RANDOM_SAES_1", "RANDOM_SAES_2"]}),
        )
    if name in ("saebench", "cebench"):
        more: dict[str, list[str]] = {}
        texts = []
        if name == "cebench" and "--stories" not in given:
            more["--stories"] = [STORIES]
            texts.append("CE-Bench's own stories are on the Hugging Face hub.")
        if reader.supplied and "--reference" not in given:
            more["--reference"] = ["REFERENCE_SAES"]
            texts.append(
                "REFERENCE_SAES are SAEs of another architecture (ReLU, or TopK if yours are ReLU) with the width, L0 "
                "and training tokens of yours."
            )
        left = ("--dataset-names",) if reader.supplied and name == "saebench" else ()
        if more or (left and left[0] in given):
            return Step(" ".join(texts) or "Use all data sets of the benchmark.", reader.again(more, left))
    if name in STRESS and not reader.supplied:
        return Step(
            "Run this stress test on the confirmed SAEs.",
            shlex.join(["python", STRESS[name], "--candidate", reader.confirmed]),
        )
    return Step("Run the same command again. Finished parts are read, and the missing one is computed.", reader.again())


def _failed(gate: Gate, reader: ReportReader) -> Step:
    name, reached = gate.gate, {"low": gate.low, "high": gate.high, None: None}[gate.bound]
    times = None
    if gate.estimate is not None and reached is not None and gate.threshold is not None and gate.bound is not None:
        times = narrowing(gate.estimate, reached, gate.bound, gate.threshold)
    why = "The estimate itself is on the wrong side, therefore more SAEs cannot change this result."
    if times is not None and gate.n is not None and name != CONTROL:
        needed = max(math.ceil(gate.n * times**2), gate.n + 1)
        why = f"The estimate is on the required side, and its interval is {times:.1f} times too wide."
        if needed <= MANY:
            text = f"{why} If the estimate is true, about {needed} SAEs with different seeds show it."
            if name in ("saebench", "cebench"):
                text += " More SAEs do not reduce the spread between data sets, therefore even these can fail."
            return Step(text, reader.more_seeds(needed - gate.n))
        why += f" About {needed:,} SAEs with different seeds would be necessary, which is out of reach."
    if name == CONTROL:
        return Step(
            "The method did not find planted features on this machine. No other gate can be trusted until it does.",
            f"python {EXPERIMENTS}/run_phase4a_reproduction.py",
        )
    if name == "transcoder":
        return Step(
            f"{why} The match with transcoders is not shown beyond the controls, and no setting is left open.", None
        )
    if name == "ood":
        words = ["python", STRESS["ood"], "--candidate", reader.confirmed, "--probe-ks", "1,5,16,64"]
        words += ["--output-dir", f"{reader.root}/../ood_more_features"]
        return Step(f"{why} This command shows whether probes on more features survive the shift.", shlex.join(words))
    if name in ("stability", "random_model"):
        flags: dict[str, object] = {"--d-sae": reader.d_sae}
        return Step(
            f"{why} Train SAEs at another sparsity: this command finds the one with the most reproducible features.",
            reader.elsewhere(f"{EXPERIMENTS}/run_adaptive_l0_calibration.py", flags),
        )
    flags = {"--d-sae": reader.d_sae, "--ks": reader.k}
    script = f"{EXPERIMENTS}/run_architecture_frontier_external.py"
    command = reader.elsewhere(script, flags)
    command += {"saebench": " --run-saebench", "cebench": f" --run-cebench --stories {STORIES}"}.get(name, "")
    return Step(f"{why} This command compares other architectures at the same width and L0.", command)


# ---------------------------------------------------------------------------------------------------------------------
# Beyond single gates


def general(reader: ReportReader, open_gates: list[Gate], has_table: bool) -> list[tuple[str, Step]]:
    """(heading, step) of suggestions that do not depend on a single gate.

    Args:
        has_table: whether a feature table is among the results.
    """
    steps = []
    missing = [g for g in open_gates if g.status == "MISSING"]
    given = set(reader.words)
    more: dict[str, list[str]] = {}
    if reader.supplied and reader.recipe_known and any(g.gate in ("saebench", "cebench") for g in missing):
        more |= {} if "--reference" in given else {"--reference": ["REFERENCE_SAES"]}
        more |= {} if "--stories" in given else {"--stories": [STORIES]}
    if len(more) > 1 and reader.seeds >= MINIMUM_SEEDS:
        steps.append(("Close the gates that lack evidence", Step("One command adds all of it.", reader.again(more))))
    table = reader.elsewhere(RELIABILITY, {}) + " --checkpoint " + shlex.join(reader.checkpoints)
    heading = "Ask which single features you can trust"
    text = "The feature table counts the trainings in which a feature recurs, and tests whether chance explains it."
    if has_table:
        heading = "Certify more features"
        text = (
            "The feature table compares the first SAE with the others. "
            "Fourteen siblings that HUSAI trains certify more of its features."
        )
        table += " --siblings 14"
    steps.append((heading, Step(text, table)))
    if reader.supplied:
        steps.append(
            (
                "Make an external claim",
                Step(
                    "HUSAI cannot see how you selected these SAEs, therefore this report supports no external claim. "
                    "The whole program selects a recipe, trains it again on fresh seeds and judges these SAEs.",
                    reader.program(),
                ),
            )
        )
    return steps
