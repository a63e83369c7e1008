"""The report card: one self-contained HTML page about the runs below a folder."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from pydantic import ValidationError

from husai.report import glossary, markup, verdict
from husai.report.evidence import Phase, not_run, phases, read_phase
from husai.report.features import Table
from husai.report.forest import Forest
from husai.report.markup import Picture
from husai.report.steps import ReportReader, general, next_step
from husai.report.tiles import Good
from husai.runs.errors import BadInput
from husai.runs.files import read_json
from husai.runs.folder import Manifest
from husai.runs.progress import duration

PHASES = {
    "candidate_confirmation": ("Confirmation", "How good and how stable are the selected SAEs on fresh seeds?"),
    "random_model_stress": ("Random-model stress", "Would a model with random weights give equally stable features?"),
    "transcoder_stress": ("Transcoder stress", "Do transcoders find the same features?"),
    "ood_stress": ("Shifted data", "What is left of the probes on text unlike the training text?"),
    "feature_reliability": ("Feature table", "Which single features can be trusted?"),
    "release_gate": ("Release gate", "May anything be claimed externally?"),
    "candidate_selection": ("Selection", "Which condition goes to the gate?"),
    "architecture_frontier": ("Architecture frontier", "At one L0, which architecture is both stable and useful?"),
    "external_metric_scaling": ("Scaling", "How do stability and benchmarks change with tokens, layer and width?"),
    "saebench_custom": ("SAEBench", "Are probes on few features as good as on a matched reference?"),
    "cebench_custom": ("CE-Bench", "How sharply do single features separate two contrasting texts?"),
    "official_external_benchmarks": ("The libraries' own benchmarks", "What do the benchmarks' own programs report?"),
    "core_ablations": ("Core ablations", "How does stability depend on sparsity, width and training?"),
    "adaptive_l0_calibration": ("Adaptive L0", "Which sparsity gives the most reproducible features on fresh seeds?"),
    "assignment_consistency_v2": (
        "Assignment consistency",
        "Does a pull towards a reference make independently trained SAEs more alike?",
    ),
    "language_model": ("The language model", "Does the model know enough for its features to be worth explaining?"),
    "4a": ("Phase 4a", "Are the features of SAEs with different seeds more alike than chance?"),
}
"""Known phases in the order of the page: title and question."""
SUPPLIED = ("Your SAEs", "How good, how stable and how useful are they?")
"""The confirmation of user-supplied SAEs."""
ABOUT_METHOD = ("4a", "positive_control")
"""Phases that check the method on other SAEs. A report on a reader's own SAEs leaves them out."""
ALT = {
    "matches": "Histogram of the cosines of matched features: trained SAEs beside each null",
    "over_training": "Stability against training steps with its interval, and the levels of the nulls",
    "loss_curves": "Loss on training batches against steps, a line for each seed",
    "cross_entropy": "Cross-entropy with each seed's SAE spliced in, beside the model's own and that with zeros",
    "sensitivity": "Excess of stability against the recovery of planted features, with intervals",
    "core_ablations": "Stability against sparsity and width, and the gain of each method, with intervals",
    "adaptive_l0": "Excess of stability over the highest null, and explained variance, against k",
    "assignment_v2": "Gain of stability against the strength of the pull, with intervals",
    "frontier": "Families against each other: stability, reconstruction and benchmarks, with intervals",
    "excess": "Excess of the candidate and of each draw of the random weights, and the gains, with intervals",
    "gain": "Scores of the candidate against transcoders and of both among themselves, over each null, with intervals",
    "ood_drop": "Probes under shift, and what the SAE loses beyond the model itself, with intervals",
    "selection": "Candidates against each other: stability and benchmarks, with intervals",
    "confirmation": "The candidate: stability over each null, benchmarks over each baseline, with intervals",
    "scaling": "Stability and benchmarks against tokens, layer and width, with intervals",
    "saebench_deltas": "Probing AUC of each condition less its baselines, with intervals",
    "cebench_deltas": "Contrastive score of each condition less its baselines, with intervals",
    "bits_per_byte": "Bits per byte of the model beside n-grams, by family of documents",
    "loss": "Loss of the language model in training and on held-out text",
    "probes": "Probe AUC on each data set with its interval, beside the random-weights model",
}
"""Alternative text of each figure."""


def render(root: Path, gate: Path | None, output: Path, command: str | None = None) -> str:
    """HTML of the page.

    Args:
        root: folder with one folder for each phase.
        gate: results.json of a gate, instead of the one below `root`.
        output: place of the page. Links to the evidence are relative to it.
        command: command line of the release check that made the results. Suggested steps begin with it.

    Raises:
        BadInput: `root` or `gate` does not exist, or `root` holds no run.
    """
    runs = phases(root)
    if gate is not None and not gate.is_file():
        raise BadInput(f"--gate: {gate} does not exist; the results.json of a release gate expected")
    if gate is not None and gate.name != "results.json":
        raise BadInput(f"--gate: {gate}: the results.json of a release gate expected, beside its manifest.json")
    # A run of the earlier study's policy decides nothing, and is shown as an ordinary run.
    strict = [p for p in runs if p.results.get("policy") != "published"]
    decided = read_phase(gate.parent) if gate else _last(strict, "release_gate")
    decision = verdict.judge(decided, runs)
    table = _last(runs, "feature_reliability")
    confirmed = _last(runs, "candidate_confirmation")
    reader = ReportReader.of(runs, decision.decision, root, command or _command_of_check(root))
    order = [*PHASES]
    elsewhere = [decided, table]  # the page has separate parts for these runs
    shown = sorted(
        (p for p in runs if all(p is not other for other in elsewhere)),
        key=lambda p: (order.index(p.phase) if p.phase in PHASES else len(order), p.name),
    )
    if reader.supplied:
        shown = [p for p in shown if p.phase not in ABOUT_METHOD]
    good = Good.of(confirmed)
    sections = [PageSection(p, output) for p in shown]
    page = markup.environment().get_template("card.html")
    return glossary.explain(
        page.render(
            verdict=decision,
            supplied=reader.supplied,
            not_run=[(PHASES.get(name, (name,))[0], reason) for name, reason in not_run(root).items()],
            good=good,
            steps={g.gate: next_step(g, reader) for g in decision.open},
            general=general(reader, decision.open, table is not None) if confirmed is not None else [],
            gate=PageSection(decided, output) if decided else None,
            read=_where_read(decision.decision, sections),
            sections=sections,
            features=PageSection(table, output) if table else None,
            table=Table.of(table, output) if table else None,
            absent=[] if reader.supplied else _absent(runs, decided),
            terms=[*glossary.TERMS.values()],
            root=root.parent.name if reader.supplied and root.name == "parts" else root.name,
            last=max((p.manifest.started_utc for p in runs if p.manifest), default=None),
        )
    )


def _command_of_check(root: Path) -> str | None:
    """Command line of the release check whose parts these are; None without a finished release check."""
    results, manifest = (root.parent / name for name in ("results.json", "manifest.json"))
    try:
        content = read_json(results, "results")
        if isinstance(content, dict) and content.get("phase") == "release_check":
            return Manifest.model_validate(read_json(manifest, "manifest")).command
    except (BadInput, ValidationError):
        pass
    return None


def _absent(runs: list[Phase], decided: Phase | None) -> list[tuple[str, str]]:
    """(title, question) of each phase of the program that was not run."""
    present = {p.phase for p in [*runs, *([decided] if decided else [])]}
    return [PHASES[p] for p in PHASES if p not in present]


def _last(runs: list[Phase], kind: str) -> Phase | None:
    """The latest intact run of a kind, else a damaged one."""
    of_kind = [p for p in runs if kind in (p.phase, p.name)]
    return max(of_kind, key=lambda p: (not p.problems, p.manifest.started_utc if p.manifest else ""), default=None)


def _where_read(
    decision: verdict.Decision | None, sections: list[PageSection]
) -> list[tuple[str, str, str | None, str | None]]:
    """(label, path, sha256, anchor of the section that shows it) of each file that the gate read."""
    if decision is None:
        return []
    anchors = {s.run.sha256: s.anchor for s in sections if s.run.sha256}
    return [(label, r.path, r.sha256, anchors.get(r.sha256 or "")) for label, r in decision.read.items()]


# ---------------------------------------------------------------------------------------------------------------------
# A phase


class PageSection:
    """A run as the page shows it."""

    def __init__(self, run: Phase, output: Path):
        self.run = run
        self.anchor = f"run-{quote(run.name, safe='')}"
        self.asks: str | None
        self.title, self.asks = PHASES.get(run.phase, (run.name, None))
        if isinstance(run.results, dict) and run.results.get("origin") == "supplied":
            self.title, self.asks = SUPPLIED
        self.heading = markup.title(run.summary) if run.summary else None
        self.outcome = markup.outcome(run.summary) if run.summary and run.results else None
        self.text = markup.html(run.summary) if run.summary else None
        self.figures: list[tuple[str, str, Picture]] = []
        """(name, alternative text, image) of each figure. The first one is the phase's main figure."""
        for path in sorted(run.figures, key=lambda p: ([*ALT].index(p.stem) if p.stem in ALT else len(ALT), p.name)):
            if (picture := markup.picture(path)) is None:
                run.problems.append(f"{path.name} is no image, therefore it is not shown.")
            else:
                self.figures.append((path.stem.replace("_", " "), self.alt(path), picture))
        self.forest = Forest.of(run.results)
        if self.outcome is None and self.forest is not None:
            self.outcome = self.forest.outcomes
        folder = quote(os.path.relpath(run.folder, output.parent))
        files = [run.folder / n for n in ("results.json", "summary.md", "manifest.json")] + run.others
        self.links = [(p.name, f"{folder}/{quote(str(p.relative_to(run.folder)))}") for p in files if p.is_file()]

    def alt(self, path: Path) -> str:
        stem = path.stem.removesuffix("_published")
        suffix = ", in the earlier study's setting" if stem != path.stem else ""
        description = ALT.get(stem) or f"{self.title}: {stem.replace('_', ' ')}"
        return f"{description}{suffix}. The table beside it has the numbers."

    @property
    def state(self) -> str:
        return "fail" if self.run.problems else "waived" if self.run.notes else "pass"

    @property
    def took(self) -> str:
        """Duration of a run with a manifest, as text."""
        seconds = self.run.seconds
        assert seconds is not None
        return duration(seconds)
