"""Every rule that decides something, once.

    python -m husai.evidence.rules     # the table "Rules" of docs/methods.md

A rule reads typed evidence, checks what must be true of it, and gives estimates with the inequality that each must
satisfy. The page of a phase, the gate and the audit call the same function. The table "Rules" of docs/methods.md is
made from here (`table`).

Outcomes: PASS; FAIL; MISSING, where the evidence does not answer (`Missing` says why).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import special

from husai.evidence import contrast, drop, levels
from husai.evidence.data_sets import families, gated
from husai.evidence.deltas import K
from husai.evidence.estimates import (
    Estimate,
    clopper_pearson_low,
    effect_for,
    jackknife,
    mean_over_seeds,
    mean_over_seeds_and_sets,
    pass_probability,
)
from husai.evidence.levels import CERTIFIED_AT, RECURS_CORRELATION, RECURS_COSINE, SPECTRAL_DRAWS
from husai.evidence.names import GAP, GATED_NULLS, PRIMARY_SCORE
from husai.evidence.references import L0_TOLERANCE, same_l0
from husai.evidence.schemas import (
    CODE_FIGURES,
    Acceptance,
    AlikeMember,
    Code,
    Comparison,
    Control,
    Gain,
    Heldout,
    Interval,
    OwnMember,
    OwnSection,
    PlantedRows,
    PlantedSection,
    PulledSection,
    Scored,
    Section,
    Setting,
    Shifted,
    SparsitySection,
    TrainedMember,
    pull,
)
from husai.runs.errors import BadInput

PASS: Literal["PASS"] = "PASS"
FAIL: Literal["FAIL"] = "FAIL"
MISSING: Literal["MISSING"] = "MISSING"
ROUNDING = 1e-12
SAME_SCORE = 1e-5
"""Largest difference of two accounts of one score, which rounding may make."""
POWER = 0.8
"""Pass probability for which a gate states the effect that it needs."""
MINIMUM_SEEDS = 5
EQUIVALENCE_MARGIN = 0.01
MOVED_AT_MOST = 0.02
"""Change of mcc over the last third of training: beyond, training is too short to judge by."""
MINIMUM_FAMILIES = 3
"""Families of data sets needed to generalise beyond the tested ones."""
SAME_DIRECTION = 1 - 1e-5
"""|cos| of two copies of a direction, bfloat16 copies included."""
SHARED_DECODER, SHARED_INITIALISATION = 0.25, 0.05
"""Shares of the smaller dictionary's directions in another. Trained ones may come to agree; initial ones never do."""
SAME_NUMBER, SAME_NUMBER_ERRORS = 0.1, 6.0
"""Excess of the mean |cos| of features of one number over that of neighbouring numbers, and the same in standard
errors. Independent SAEs reach 0.06 and 4, sorted by firing rate; SAEs of one initialisation 0.6 and 100."""
UNUSUAL_L0, FAR_L0 = 0.1, 0.5
"""Range of L0 over seeds, as a share of its median: said beyond the first; beyond the second refused where the files do
not say how the SAEs were trained."""
UNUSUAL_EV, FAR_EV = 0.1, 0.3
"""The same of an SAE's explained variance, as the distance from the median."""
MANY_DEAD = 0.2
"""Share of dead features from which the report page warns; the rule *fit* decides by another bound."""
NOT_SPARSE = 0.5
"""L0 as a share of the smaller of d_in and d_sae, from which the report page warns. Above, a code has more active
features than half the dimensions that it codes."""
FEW_DIMENSIONS = 8
"""Below, directions may coincide by chance."""
BELOW_BIGRAM = 0.8
"""Share of the bigram's bits per byte that a language model must stay below."""


def in_one_order(excess: float, errors: float) -> bool:
    """Whether features of one number are alike beyond those of neighbouring numbers (SAME_NUMBER)."""
    return excess > SAME_NUMBER and errors > SAME_NUMBER_ERRORS


def many_dead(share: float) -> bool:
    """Whether so many features are dead that a reader must know (MANY_DEAD)."""
    return share >= MANY_DEAD


def not_sparse(l0: float, d_in: int, d_sae: int) -> bool:
    """Whether a code has so many active features that it is no sparse one (NOT_SPARSE)."""
    return l0 >= NOT_SPARSE * min(d_in, d_sae)


def far_apart(l0: Sequence[float], explained_variance: Sequence[float], of_l0: float, of_ev: float) -> list[str]:
    """Sentences on figures of SAEs of one condition that lie further apart than these (UNUSUAL_L0, FAR_L0, …)."""
    said, middle = [], float(np.median(explained_variance))
    if max(l0) - min(l0) > of_l0 * float(np.median(l0)):
        said.append(f"L0 is {min(l0):.3g} to {max(l0):.3g}; a range of at most {of_l0:.0%} of the median expected")
    furthest = max(explained_variance, key=lambda value: abs(value - middle))
    if abs(furthest - middle) > of_ev:
        said.append(
            f"one explained variance is {furthest:.3f} beside a median of {middle:.3f}; a distance of at most "
            f"{of_ev:g} expected"
        )
    return said


def outlier_note(heldout: Sequence[Heldout]) -> list[str]:
    """A sentence on rows of many times the median norm, where held-out rows hold some."""
    known = [h.outliers for h in heldout if h.outliers is not None]
    dropped = [
        f"Outliers: {share:.2%} of all rows have more than {multiple:g} times the median norm and are left out "
        "(--max-norm-multiple)."
        for multiple, share in sorted({(h.dropped.max_norm_multiple, h.dropped.share) for h in heldout if h.dropped})
    ]
    if not known:
        return dropped
    share, ev = max(o.share for o in known), [o.explained_variance for o in known]
    times = max(o.norms["1"] / o.norms["0.5"] for o in known)
    return [
        *dropped,
        f"Outliers: {share:.2%} of the held-out rows have more than {levels.OUTLIER_NORM:g} times the median norm, the "
        f"largest {times:.0f} times. Without them the explained variance is {min(ev):.4f} to {max(ev):.4f}.",
    ]


class Missing(Exception):
    """Evidence that is absent, or that does not count."""


def require(holds: bool, reason: str) -> None:
    """Raise Missing with the reason unless something holds."""
    if not holds:
        raise Missing(reason)


def enough_seeds(n: int) -> None:
    require(n >= MINIMUM_SEEDS, f"{n} seeds; a verdict needs {MINIMUM_SEEDS}")


# ---------------------------------------------------------------------------------------------------------------------
# An inequality, and what is held against it


@dataclass(frozen=True)
class Rule:
    """An inequality for one end of the 95 % interval of each estimate."""

    name: str
    figure: str
    """Name of the estimated figure."""
    end: str
    """`low` or `high`."""
    relation: str
    """`>`, `>=` or `<=`."""
    threshold: float
    """Registered value; a caller may ask for more."""
    passed: str = ""
    """Sentence of the phase's page where the rule holds; {threshold} and {ends} are filled in."""
    failed: str = ""
    """The same where it does not; {which} names the estimates that fail."""

    def holds(self, end: float | None, threshold: float | None = None) -> bool:
        """Whether an end of an interval satisfies the inequality; no interval satisfies none."""
        if end is None or not math.isfinite(end):
            return False
        limit = self.threshold if threshold is None else threshold
        return {">": end > limit, ">=": end >= limit, "<=": end <= limit}[self.relation]

    def met_by(self, interval: Estimate | Interval | Mapping, threshold: float | None = None) -> bool:
        """Whether an estimate's interval satisfies the inequality."""
        end = interval[self.end] if isinstance(interval, Mapping) else getattr(interval, self.end)
        return self.holds(end, threshold)

    def shown(self, estimates: dict[str, Estimate], n: int, threshold: float | None = None, **more) -> Shown:
        return Shown(self, estimates, self.threshold if threshold is None else threshold, n, **more)


@dataclass(frozen=True)
class Shown:
    """Estimates, each of which must satisfy a rule."""

    rule: Rule
    estimates: dict[str, Estimate]
    threshold: float
    n: int
    """Seeds."""
    families: int | None = None
    """Families of data sets, where these are a sample too."""
    note: str = ""
    """Words that follow the figure's name."""
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    """Name -> an estimate that stands beside the figure and decides nothing."""
    left_out: Sequence[str] = ()
    """Names of data sets or pairs that were measured and do not count."""

    def failing(self) -> list[str]:
        """Names of the estimates that do not satisfy the rule."""
        return [name for name, e in self.estimates.items() if not self.rule.met_by(e, self.threshold)]

    def worst(self) -> tuple[str, Estimate]:
        """The estimate that comes nearest to failing."""
        sign = -1 if self.rule.end == "high" else 1
        return min(self.estimates.items(), key=lambda item: sign * getattr(item[1], self.rule.end))

    def passes_at(self, truth: float) -> float:
        """Probability to pass if every figure were truly this: that of the estimate least likely to pass, and therefore
        an upper bound for all of them together."""
        return min(self._passes_at(truth, e) for e in self.estimates.values())

    def _passes_at(self, truth: float, estimate: Estimate) -> float:
        if (estimate.standard_error or 0) <= ROUNDING:  # seeds that do not differ leave nothing to chance
            return float(self.rule.holds(truth, self.threshold))
        return pass_probability(estimate, self.rule.end, self.threshold, truth)

    def effect_for(self, probability: float = POWER) -> float:
        """The true figure at which each estimate passes with at least this probability."""
        needed = [effect_for(e, self.rule.end, self.threshold, probability) for e in self.estimates.values()]
        return min(needed) if self.rule.end == "high" else max(needed)


def checked(judge: Callable[[], Shown]) -> Shown:
    """The result of a rule's function, with an interval for each estimate.

    Raises:
        Missing.
    """
    shown = judge()
    es = shown.estimates.values()
    require(bool(es) and all(e.low is not None and e.high is not None for e in es), "there is no interval")
    require(all(np.isfinite([e.estimate, e.low, e.high]).all() for e in es), "a figure is not finite")
    return shown


def verdict(judge: Callable[[], Shown]) -> dict[str, str]:
    """The outcome on a stress test's page: {"outcome", "reason"}."""
    try:
        shown = checked(judge)
    except (Missing, BadInput) as missing:
        return {"outcome": MISSING, "reason": str(missing)}
    failing = shown.failing()
    sentence = shown.rule.failed if failing else shown.rule.passed
    outcome = FAIL if failing else PASS
    ends = " and ".join(f"{getattr(e, shown.rule.end):.4f}" for e in shown.estimates.values())
    facts = {"threshold": f"{shown.threshold:g}", "which": ", ".join(failing), "ends": ends, "note": shown.note}
    return {"outcome": outcome, "reason": sentence.format(**facts)}


# ---------------------------------------------------------------------------------------------------------------------
# Stability


STABILITY = Rule(
    "stability",
    "excess over each control",
    *("low", ">", levels.MIN_STABILITY_EXCESS),
    "the lower end of each excess is above {threshold}",
    "not shown to be above {threshold}: {which}",
)
CHANCE = {
    "isotropic": ("mcc_alive", "isotropic"),
    "spectral": ("mcc_alive", "spectral"),
    "spectral, absolute": ("mcc_alive_abs", "spectral"),
    "gaussian": ("mcc_alive", "gaussian"),
}
"""Name of an excess -> its score, and the control that it is over."""
SINGLE = {f"single features, {null}": ("share70_alive", null) for null in ("spectral", "gaussian")}
NO_PROTOTYPES = {
    f"without prototypes: {name}": (score.replace("_alive", "_others"), null)
    for name, (score, null) in (CHANCE | SINGLE).items()
}
"""The same of features that are like no prototype."""
STABLE = CHANCE | SINGLE | NO_PROTOTYPES
LICENCES: tuple[tuple[str, list[str], str], ...] = (
    ("nothing", [], "Nothing is shown to be reproduced."),
    (
        "isotropic directions",
        ["isotropic"],
        "The average match between seeds exceeds that of random directions. The activations' spectrum can explain it.",
    ),
    (
        "the spectral null, signed and absolute",
        ["spectral", "spectral, absolute"],
        "The average match between seeds exceeds what the activations' spectrum explains. Gaussian activations with "
        "the same mean and covariance can explain it.",
    ),
    (
        "SAEs of Gaussian rows",
        ["gaussian"],
        "The average match between seeds exceeds what the activations' mean and covariance explain. Nothing is shown "
        "of single features.",
    ),
    (
        "the last two, in single features",
        [*SINGLE],
        "A share of the features is reproduced beyond what the activations' mean and covariance explain. Means of "
        "tokens, and centroids, can be all of them.",
    ),
    (
        "all of these, without prototypes",
        [*NO_PROTOTYPES],
        "A share of the features, means of tokens and centroids aside, is reproduced beyond what the activations' mean "
        "and covariance explain.",
    ),
)
"""(what was beaten, the excesses that show it beside those of the lines before, what may then be said). Only the last
passes."""
RECOVERY = Rule(
    "positive control",
    "recovery of the planted features (signed mcc)",
    *("low", ">=", levels.MIN_RECOVERY),
    "the interval of the recovery lies at or above {threshold}",
    "the recovery is not shown to be at least {threshold}",
)
PLANTED = PlantedRows(structure="independent", features=128, d_in=64, active=8, rows=20_000, seed=7)
"""Rows of the positive control, fixed in advance."""
PLANTED_HOOK = "planted"
PLANTED_TOKENS = (10_000, 30_000, 60_000)
"""Rows that the SAEs of each degree are trained for, fixed in advance. The last degree decides."""
PLANTED_BATCH, PLANTED_RATE = 256, 0.01
"""Batch size and learning rate of these SAEs, fixed in advance. Width and k are those of the planted features."""


def against_every_null(section: Scored) -> None:
    """Raise Missing for fewer than MINIMUM_SEEDS seeds, not every pair of them once, a required null that a pair lacks,
    or too few draws of the spectral one."""
    labels = section.stability.labels
    enough_seeds(len(labels))
    named = sorted(sorted((str(p["a"]), str(p["b"]))) for p in section.pairs)
    require(named == sorted(map(sorted, combinations(labels, 2))), "each pair of seeds once expected")
    compared = all(null in p for p in section.pairs for null in GATED_NULLS)
    require(compared, f"not every pair has the nulls {', '.join(GATED_NULLS)}")
    require(PRIMARY_SCORE in section.stability.scores, f"no summary of {PRIMARY_SCORE}")
    spectral = section.stability.scores[PRIMARY_SCORE].nulls.get("spectral")
    draws = spectral.draws if spectral else 0
    require(draws >= SPECTRAL_DRAWS, f"{draws} draws of the spectral null; {SPECTRAL_DRAWS} expected")


def stability(section: Section | OwnSection, level: float = 0.95, minimum: float | None = None) -> Shown:
    """The features of SAEs of several seeds are more alike than those of every control: on average, as single features,
    and without those that are like a prototype. Where untrained states are known of SAEs that a user supplies, they are
    one more control."""
    against_every_null(section)
    trained_alike(section)
    apart = section.others is not None and all(s in section.stability.scores for s, _ in STABLE.values())
    require(apart, "prototypes were not told apart")
    wanted = STABLE
    if isinstance(section, OwnSection) and all("untrained" in p for p in section.pairs):
        wanted = wanted | {"untrained": ("mcc_alive", "untrained")}
    estimates = {name: jackknife(section.scores(null, score), level) for name, (score, null) in wanted.items()}
    return STABILITY.shown(estimates, len(section.members), minimum)


def trained_alike(section: Section | OwnSection | Control, at_same_l0: bool = True) -> None:
    """Raise Missing unless the SAEs of Gaussian rows are those of the section's seeds, of other activations and at the
    same L0.

    Args:
        at_same_l0: False where the same k in training is all that is asked.
    """
    control = section.gaussian
    if control is None:
        raise Missing("no SAEs of Gaussian rows")
    own: Sequence[TrainedMember | OwnMember | AlikeMember] = section.members
    theirs = control.members
    require(len(theirs) == len(own), "SAEs of Gaussian rows: one for each of those under test expected")
    paired = zip(own, theirs, strict=True)
    require(all(a.seed in (None, b.seed) for a, b in paired), "SAEs of Gaussian rows have other seeds")
    require(control.subject_digest == section.subject_digest, "Gaussian rows of another subject")
    require(control.store_digest != section.store_digest, "its Gaussian rows are the activations themselves")
    shas = {m.checkpoint_sha256 for m in theirs}
    once = len(shas) == len(theirs) and shas.isdisjoint(m.checkpoint_sha256 for m in own)
    require(once, "an SAE of Gaussian rows stands twice")
    alike = all(_same_l0(a.heldout, b.heldout) for a, b in zip(own, theirs, strict=True))
    require(alike or not at_same_l0, f"L0 of the SAEs of Gaussian rows differs by more than {100 * L0_TOLERANCE:g} %")


def one_account(section: OwnSection, confirmed: Section | OwnSection) -> None:
    """Raise Missing for scores of the candidate's own pairs that are not those of its confirmation.

    Studies of another store are not compared. Drawn nulls are compared where both studies have the same nulls with as
    many draws, SAEs of Gaussian rows where both have the same SAEs.
    """
    if (section.checkpoints, section.store_digest) != (confirmed.checkpoints, confirmed.store_digest):
        return
    draws = _draws(section)
    shared = ["observed", *(null for null in draws if null != "gaussian" and draws == _draws(confirmed))]
    shared += ["gaussian"] if section.control_inputs == confirmed.control_inputs else []
    pairs, known = _by_checkpoints(section), _by_checkpoints(confirmed)
    require(pairs.keys() == known.keys(), "pairs of its own SAEs are not those of the confirmation")
    for saes, pair in pairs.items():
        for name in [name for name in shared if name in pair and name in known[saes]]:
            own, other = pair[name], known[saes][name]
            same = all(abs(own[score] - other[score]) <= SAME_SCORE for score in own.keys() & other.keys() - {GAP})
            which = f"{pair['a']} and {pair['b']}, {name}"
            why = f"scores of its own SAEs are not those of the confirmation ({which}); both by one version of HUSAI"
            require(same, f"{why} expected")


def _draws(section: Scored) -> dict[str, int]:
    """Null -> its draws."""
    primary = section.stability.scores.get(PRIMARY_SCORE)
    return {} if primary is None else {null: spread.draws for null, spread in primary.nulls.items()}


def _by_checkpoints(section: Section | OwnSection) -> dict[frozenset[str], dict]:
    """sha256 of both SAEs of a pair -> the pair."""
    sha256 = dict(zip(section.stability.labels, section.checkpoints.values(), strict=True))
    pairs: list[dict] = section.pairs
    return {frozenset(sha256.get(pair[side], "") for side in ("a", "b")): pair for pair in pairs}


def sentence(met: Container[str]) -> str:
    """What may be said of features.

    Args:
        met: names of the excesses of STABLE that the rule of stability holds for.
    """
    said = ""
    for _, needed, text in LICENCES:
        if not all(name in met for name in needed):
            break
        said = text
    return said


def with_budget(text: str, tokens: int | None, rested: bool | None) -> str:
    """A sentence about SAEs, which names their budget unless training had come to rest. Nothing shown needs no budget.

    Args:
        tokens, rested: None where they are not known.
    """
    if rested or text == LICENCES[0][2]:
        return text
    budget = "training of unknown length" if tokens is None else f"{tokens:,} tokens of training"
    rest = "which had not come to rest" if rested is False else "which may not have come to rest"
    return f"{text[:-1]}, after {budget}, {rest}."


def positive_control(planted: PlantedSection, level: float = 0.95) -> Shown:
    """SAEs that recover the planted features are stable, at the registered setting.

    Returns:
        The recovery where it is too low, else the stability of these SAEs.

    Raises:
        Missing: another setting than the registered one, or a degree without a verdict.
    """
    degrees, data = planted.degrees, planted.data
    require(data == PLANTED, "other planted features than the registered ones")
    registered = PLANTED_TOKENS, PLANTED_BATCH
    trained_for = tuple(d.tokens for d in degrees), planted.batch_size
    require(trained_for == registered, f"planted features: tokens and batch size {registered} expected, as registered")
    shas = [m.checkpoint_sha256 for d in degrees for m in d.study.members]
    require(len(set(shas)) == len(shas), "planted features: an SAE stands twice")
    require(len({d.study.store_digest for d in degrees}) == 1, "planted features: SAEs of several stores")
    for degree in degrees:
        study = degree.study
        own_training(study)
        on = study.subject_digest, study.hook_name, study.rows, study.d_in
        require(on == (data.digest, PLANTED_HOOK, data.rows, data.d_in), "planted features: SAEs of other rows")
        made = {(m.family, m.d_sae, m.k, m.learning_rate) for m in study.members}
        expected = {("topk", data.features, data.active, PLANTED_RATE)}
        require(made == expected, f"planted features: SAEs {expected} expected, as registered")
        shown = stability(study, level)
    recovered = RECOVERY.shown({"": mean_over_seeds(degrees[-1].recovery, level)}, len(degrees[-1].recovery))
    return recovered if recovered.failing() else shown


# ---------------------------------------------------------------------------------------------------------------------
# Codes and fit


CODE = Rule(
    "code",
    "gain over the best dictionary of prototypes",
    *("low", ">", levels.MIN_CODE_GAIN),
    "explained variance and CE recovered surely exceed those of the best dictionary of prototypes",
    "not shown to exceed that of the best dictionary of prototypes: {which}",
)
FIT = Rule(
    "fit",
    "distance from the registered bound",
    *("low", ">=", 0.0),
    "explained variance and CE recovered surely reach their floors, dead features their ceiling",
    "not shown to reach the registered bound: {which}",
)


def code(found: Code, level: float = 0.95) -> Shown:
    """SAEs code activations better than dictionaries of prototypes of their width, at their L0.

    The bar is the kind of prototypes with the highest mean over seeds, for each figure.
    """
    seeds = list(found.saes.explained_variance)
    enough_seeds(len(seeds))
    needed = {"rows", "centroids"} | ({"token means"} if found.saes.ce_recovered is not None else set())
    require(needed <= found.prototypes.keys(), f"prototypes of each kind expected: {', '.join(sorted(needed))}")
    figures = [figure for figure in CODE_FIGURES if getattr(found.saes, figure) is not None]
    gains = {CODE_FIGURES[f]: gain_over_prototypes(found, level)[found.best(f)][f] for f in figures}
    return CODE.shown(gains, len(seeds))


def gain_over_prototypes(found: Code, level: float = 0.95) -> dict[str, dict[str, Estimate]]:
    """Kind of prototypes -> figure -> how much better the SAEs are, over seeds."""

    def gain(own: Mapping[str, float], others: Mapping[str, float]) -> Estimate:
        return mean_over_seeds([own[seed] - others[seed] for seed in own], level)

    return {
        kind: {f: gain(own, getattr(coded, f)) for f in CODE_FIGURES if (own := getattr(found.saes, f)) is not None}
        for kind, coded in found.prototypes.items()
    }


def fit(heldout: Sequence[Heldout], ce_recovered: Sequence[float] | None, level: float = 0.95) -> Shown:
    """Held-out figures of SAEs of several seeds reach the registered floors and the ceiling of dead features.

    Args:
        ce_recovered: one a seed; None where the subject is no language model.
    """
    enough_seeds(len(heldout))
    distances = {
        "explained variance": [h.explained_variance - levels.MIN_EXPLAINED_VARIANCE for h in heldout],
        "dead features": [levels.MAX_DEAD_SHARE - h.dead_share for h in heldout],
    }
    if ce_recovered is not None:
        distances["CE recovered"] = [value - levels.MIN_CE_RECOVERED for value in ce_recovered]
    return FIT.shown({name: mean_over_seeds(values, level) for name, values in distances.items()}, len(heldout))


# ---------------------------------------------------------------------------------------------------------------------
# Stress tests


RANDOM_MODEL = Rule(
    "random model",
    "gain over SAEs of the random-weights model",
    *("low", ">", 0.0),
    "the interval of each gain over SAEs of the random-weights subject lies above 0, in each draw of the weights",
    "the gain over SAEs of the random-weights subject is not shown to be above 0: {which}",
)
TRANSCODER = Rule(
    "transcoder",
    "excess of the score between the candidate and transcoders",
    *("low", ">", levels.MIN_STABILITY_EXCESS),
    "the interval of the excess between the candidate and transcoders lies above {threshold} over each control",
    "the excess between the candidate and transcoders is not shown to be above {threshold} over {which}",
)
OOD = Rule(
    "shifted data",
    "AUC lost under shift, less the model's own loss",
    *("high", "<=", levels.MAX_OOD_DROP),
    "the upper end of the drop's interval{note} is {ends}: at most {threshold}",
    "the upper end of the drop's interval{note} is {ends}: at most {threshold} expected",
)


def random_model(section: OwnSection, controls: Sequence[Control], level: float = 0.95) -> Shown:
    """The candidate's features are more alike than those of SAEs trained alike on each draw of the random weights: by
    the score, and by how far it lies above each required null.

    Args:
        section: the candidate's study. controls: one a draw of the weights, in the order of `levels.RANDOM_DRAWS`.
    """
    enough_seeds(len(section.members))
    drawn = [levels.random_subject(section.subject_digest, draw) for draw in levels.RANDOM_DRAWS]
    absent = [str(n) for n, sha in zip(levels.RANDOM_DRAWS, drawn, strict=True) if sha not in _subjects(controls)]
    hint = "--random-model-checkpoint names SAEs trained alike on each"
    require(not absent, f"no SAEs of draw {', '.join(absent)} of its subject's random weights; {hint}")
    require(_subjects(controls) == drawn, "SAEs of one draw of the random weights twice, or of another one")
    own = [m.seed for m in section.members]
    against_every_null(section)
    trained_alike(section)
    estimates: dict[str, Estimate] = {}
    for draw, control in zip(levels.RANDOM_DRAWS, controls, strict=True):
        seeds = [m.seed for m in control.members]
        same = seeds == own or (set(own) == {None} and len(seeds) == len(own))
        require(same and control.stability.labels == section.stability.labels, "its controls have other seeds")
        pairs = zip(section.members, control.members, strict=True)
        alike = all(_same_l0(a.heldout, b.heldout) for a, b in pairs)
        require(alike, f"L0 of its controls differs by more than {100 * L0_TOLERANCE:g} %")
        against_every_null(control)
        trained_alike(control)
        estimates |= {
            f"draw {draw}, {over}": contrast.gain_over(null, [section], [control], level)
            for over, null in (("the score itself", None), *((f"over {null}", null) for null in GATED_NULLS))
        }
    shas = [m.checkpoint_sha256 for m in section.members]
    shas += [m.checkpoint_sha256 for control in controls for m in control.members]
    require(len(set(shas)) == len(shas), "a control stands twice")
    return RANDOM_MODEL.shown(estimates, len(section.members))


def _subjects(controls: Sequence[Control]) -> list[str]:
    return [control.subject_digest for control in controls]


def _same_l0(a: Heldout, b: Heldout) -> bool:
    return min(a.l0, b.l0) > 0 and same_l0(a.l0, b.l0)


def transcoder(
    setting: Setting,
    section: OwnSection,
    transcoders: Section,
    across: Comparison,
    level: float = 0.95,
    minimum: float | None = None,
) -> Shown:
    """The candidate's features are found by transcoders of other seeds, more than each control of stability explains.

    Args:
        section: the candidate's SAEs among themselves. transcoders: transcoders among themselves. across: the one
            against the other.
    """
    require(setting.preregistered, "the setting is not the one that was fixed in advance")
    enough_seeds(len(section.members))
    own_training(transcoders)
    for arm in (section, transcoders):
        require([m.seed for m in arm.members] == setting.seeds, "an arm with other seeds")
    made = {(m.family, m.d_sae, m.k, m.learning_rate) for m in transcoders.members}
    expected = {("transcoder", setting.d_sae, setting.k, setting.learning_rate)}
    require(made == expected, "transcoders of another width, k or learning rate than the setting's")
    for study in (section, transcoders, across):
        about = study.hook_name, study.subject_digest, study.store_digest
        expected_about = setting.hook_out, setting.subject_digest, section.store_digest
        require(about == expected_about, "a study of another space, subject or store")
    require(across.stability.labels == section.stability.labels, "scores of other seeds")
    shas = [m.checkpoint_sha256 for arm in (section, transcoders) for m in arm.members]
    require(len(set(shas)) == len(shas), "an SAE stands twice")
    trained_alike(section)
    trained_alike(transcoders, at_same_l0=False)  # held-out L0 of BatchTopK is that of a learned threshold
    noise = {arm.gaussian.store_digest for arm in (section, transcoders) if arm.gaussian is not None}
    require(len(noise) == 1, "SAEs and transcoders of different Gaussian rows")
    against_every_null(across)
    scored = all(score in across.stability.scores for score, _ in CHANCE.values())
    require(scored, "candidate and transcoders were not matched by absolute cosines")
    excess = {name: jackknife(across.scores(null, score), level) for name, (score, null) in CHANCE.items()}
    return TRANSCODER.shown(excess, len(setting.seeds), minimum)


def own_training(section: Section) -> None:
    """Raise Missing unless the SAEs of a study were trained each by itself, by one recipe."""
    alone = all(m.assignment_weight == 0 and m.reference is None for m in section.members)
    require(alone, "SAEs that were pulled to a common reference are not independent")
    recipes = {(m.family, m.d_sae, m.k, m.learning_rate) for m in section.members}
    require(len(recipes) == 1, "SAEs of several recipes are no condition")


def ood(shifted: Shifted, skipped: Iterable[str], level: float = 0.95, maximum: float | None = None) -> Shown:
    """On the shifted sets that the model's own probe survives, the SAEs lose no more than the model itself. These sets
    are fixed and named; the seeds are the sample.

    Args:
        skipped: shifted versions that cannot be used.
    """
    seeds = len(shifted.saes)
    require(seeds >= MINIMUM_SEEDS, f"SAEs: {seeds}; a verdict needs {MINIMUM_SEEDS} training seeds")
    skipped = set(skipped)
    others = [*drop.unused(shifted.data_sets, skipped), *sorted(skipped - set(drop.UNUSABLE))]
    require(not others, f"a verdict takes all shifted versions; {(others or [''])[0]} was left out")
    require(skipped == set(drop.UNUSABLE), f"labels of {', '.join(drop.UNUSABLE)} do not fit; it must be skipped")
    require(shifted.k == K, f"k = {K} expected")
    require(shifted.families == families(shifted.data_sets), "families of other data sets")
    names = drop.names_kept(shifted)
    require(bool(names), "not answerable on this subject: the model's own probe is above chance under no shift")
    every = mean_over_seeds_and_sets(drop.drops(shifted, shifted.k), shifted.families, level)
    more = {"note": f" on {', '.join(names)}", "beside": {f"the same on all {len(shifted.data_sets)} sets": every}}
    return OOD.shown({"": drop.on_kept(shifted, shifted.k, level)}, seeds, maximum, **more)


# ---------------------------------------------------------------------------------------------------------------------
# External benchmarks


SAEBENCH = Rule("SAEBench", f"AUC at k = {K}", "low", ">", levels.MIN_SAEBENCH_DELTA)
CEBENCH = Rule("CE-Bench", "normalised score", "low", ">", levels.MIN_CEBENCH_DELTA)


@dataclass(frozen=True)
class AgainstReference:
    """Figures of a candidate's seeds, and of their matched references."""

    own: np.ndarray
    """`[S, D]`: of each seed on each data set or pair."""
    reference: np.ndarray
    """`[S, D]`, paired by seed."""
    explained_variance: list[float]
    """Difference of each seed to its reference, on held-out rows."""
    names: Sequence[str]
    """Names of the data sets or pairs."""
    groups: Sequence[str]
    """Family of each data set, or cluster of each pair."""


def shown_better(
    rule: Rule, figures: AgainstReference, level: float = 0.95, minimum: float | None = None, named: str = ""
) -> Shown:
    """The candidate is shown to be better than its matched reference, on sets of which no group holds more than a
    quarter.

    Args:
        named: words that follow the figure's name.
    """
    enough_seeds(len(figures.own))
    enough_families(figures.groups)
    keep = gated(figures.names, figures.groups)
    own, reference = figures.own[:, keep], figures.reference[:, keep]
    if rule is CEBENCH:
        reachable(float(reference.mean()), rule.threshold if minimum is None else minimum)
    groups = [figures.groups[i] for i in keep]
    return rule.shown(
        {"": mean_over_seeds_and_sets(own - reference, groups, level)},
        len(own),
        minimum,
        families=len(set(groups)),
        note=f"{named} less the matched reference's",
        beside={"held-out explained variance less the reference's": mean_over_seeds(figures.explained_variance, level)},
        left_out=sorted(set(figures.names) - {figures.names[i] for i in keep}),
    )


def enough_families(of: Iterable[str]) -> None:
    n = len(set(of))
    require(n >= MINIMUM_FAMILIES, f"{n} families of data sets; at least {MINIMUM_FAMILIES} expected")


def only_cebench(benchmark: str) -> None:
    why = f"the stories are not CE-Bench's own: {benchmark}, provisional; --stories names those on the hub"
    require(benchmark == "cebench", why)


def reachable(reference: float, minimum: float) -> None:
    """Raise Missing where no SAE can be better than the reference by a minimum."""
    why = f"refused: no SAE can reach {minimum:g} above a reference of {reference:.3f} of 1"
    require(levels.within_reach(reference, minimum), why)


def cebench_delta(benchmark: str, delta: Mapping, minimum: float) -> str | None:
    """Why a condition's difference to its matched reference does not reach a minimum; None where it does."""
    try:
        only_cebench(benchmark)
        require(delta["estimate"] is not None, delta["reason"] or "there is no difference")
        enough_seeds(delta["n_seeds"])
        reachable(delta["reference_mean"], minimum)
        require(delta["low"] is not None, delta["reason"] or "there is no interval")
    except Missing as missing:
        return f"{MISSING}: {missing}"
    return None if CEBENCH.met_by(delta, minimum) else f"lower bound {delta['low']:.4f}; above {minimum:g} expected"


# ---------------------------------------------------------------------------------------------------------------------
# Inside a study: whether training came to rest, which k or weight is chosen, whether a gain is accepted


BETTER = Rule("gain", "gain over each required null", "low", ">", 0.0)
KEPT = Rule("explained variance lost", "held-out explained variance lost", "high", "<=", levels.MAX_EV_LOST)


def at_rest(moved: Estimate | Interval) -> bool | None:
    """Whether the interval of the change over the last third lies within ±MOVED_AT_MOST; None without an interval."""
    if moved.low is None or moved.high is None:
        return None
    return moved.low >= -MOVED_AT_MOST and moved.high <= MOVED_AT_MOST


def better(gain: Gain) -> bool:
    """Whether a gain is shown over each required null."""
    return all(BETTER.met_by(e) for e in gain.over.values())


def gain_verdict(gain: Gain, seeds: int) -> str:
    """The outcome of a gain: `better`, `worse`, `not shown to differ`, or MISSING with too few seeds."""
    if seeds < MINIMUM_SEEDS or gain.observed.low is None:
        return MISSING
    if better(gain):
        return "better"
    worse = all(e.high is not None and e.high < 0 for e in gain.over.values())
    return "worse" if worse else "not shown to differ"


def sparsity_outcome(chosen: int | None, gain: Gain | None, seeds: int) -> str:
    """The outcome of a choice of k: that of its gain over the control's on fresh seeds, where there is one."""
    if chosen is None:
        return "no candidate meets the floor"
    return "the chosen k is the control's" if gain is None else gain_verdict(gain, seeds)


def choose_k(candidates: Sequence[SparsitySection], floor: float) -> int | None:
    """The k with the largest `contrast.lower_bound` among sections whose held-out explained variance is surely at
    least `floor`. Ties go to the sparser k. None if no section qualifies."""
    surely = [(s, contrast.heldout(s).low) for s in candidates]
    allowed = [s for s, low in surely if low is not None and low >= floor]
    return max(allowed, key=lambda s: (contrast.lower_bound(s), -s.k)).k if allowed else None


def choose_weight(arms: Sequence[PulledSection], max_drop: float) -> float | None:
    """The λ with the largest lower end of its least gain among arms that surely lose at most `max_drop` of the
    explained variance, and whose gain has an interval. None if no arm qualifies."""
    kept = [a for a in arms if KEPT.met_by(a.ev_drop, max_drop)]
    surely = [(low, a.weight) for a in kept if (low := a.gain.over_least.low) is not None]
    return max(surely, key=lambda pair: pair[0])[1] if surely else None


def acceptance(
    arms: Sequence[PulledSection], gain: Gain | None, lost: Interval | None, seeds: int, max_drop: float
) -> Acceptance:
    """Whether the pull of `choose_weight` is accepted, by its gain and the explained variance it lost on fresh seeds.

    Raises:
        ValueError: a weight was chosen and its confirmation is missing.
    """
    weight = choose_weight(arms, max_drop)
    rule = f"gain over each required null > 0 and EV lost <= {max_drop}, surely; own references, fresh seeds"
    if weight is None and any(KEPT.met_by(a.ev_drop, max_drop) for a in arms):
        failed = ["no gain of a λ that keeps the explained variance has an interval"]
    elif weight is None:
        failed = [f"no λ keeps the explained variance lost surely at most {max_drop}"]
    elif gain is None or lost is None:
        raise ValueError(f"λ = {weight}: a confirmation on fresh seeds expected")
    else:
        failed = [f"{seeds} seeds; {MINIMUM_SEEDS} needed"] if seeds < MINIMUM_SEEDS else []
        if not better(gain):
            failed.append("the gain is not shown to be above 0")
        if not KEPT.met_by(lost, max_drop):
            failed.append("the explained variance is not shown to be kept")
    outcome = "not accepted" if failed else "accepted"
    reason = "; ".join(failed) or "all hold"
    return Acceptance(accepted=not failed, outcome=outcome, rule=rule, reason=reason, **pull(weight))


# ---------------------------------------------------------------------------------------------------------------------
# Single features

CERTIFIED_LEVEL = 0.95
FALSE_SHARE = 0.05
"""Expected share of false ones among features that are marked as above chance (Benjamini–Hochberg)."""
REBUILT_BY, REBUILT_COSINE = 3, 0.9
"""Most features of a sibling, and least cosine with what they rebuild, for a feature that is split or merged there."""
DENSE = 0.1
"""Share of tokens on which a feature fires, above which it counts as dense."""
CALIBRATED_SHARE, CALIBRATED_BOUND, FEATURE_POWER = 0.05, 0.07, 0.8
"""Calibration: largest realised share of false ones, its largest 95 % upper bound, and least share of true features of
at least RARE firing that are marked."""
RARE = 0.001

STATEMENTS = {
    "certified": "recurs in at least the share π of trainings, and more than chance explains",
    "certified, not above chance": "recurs in at least the share π of trainings; chance can explain it",
    "above chance": "is more alike than chance explains; too few trainings show that it recurs",
    "recurs in some": "recurs in a sibling; chance can explain it",
    "prototype-like": "lies near a token mean or a centroid, which every training finds",
    "split or merged": "does not recur; a few features of most siblings rebuild its direction",
    "not found": "does not recur, and few features of a sibling do not rebuild it",
    "withheld": "does not recur; what the SAE was compared with cannot show that it is missing",
    "dead": "does not fire on the held-out tokens",
}
"""Statement about a feature -> its meaning."""


def recurs(
    cosines: np.ndarray,
    correlations: np.ndarray | None,
    cosine: float = RECURS_COSINE,
    correlation: float = RECURS_CORRELATION,
) -> np.ndarray:
    """Whether each feature recurs in each sibling, bool `[siblings, features]`.

    Args:
        cosines: signed, with the one-to-one partner. correlations: of their held-out activations; None: not known, and
            the cosine alone decides.
    """
    found = np.asarray(cosines) >= cosine
    return found if correlations is None else found & (np.asarray(correlations) >= correlation)


def certified(bounds: np.ndarray, share: float = CERTIFIED_AT) -> np.ndarray:
    """Whether lower bounds of recurrence reach the share; rounding aside."""
    return np.asarray(bounds) >= share - ROUNDING


def siblings_needed(share: float = CERTIFIED_AT, misses: int = 0) -> int:
    """Fewest siblings of which all but `misses` certify a feature at a share."""
    n = misses + 1
    while not certified(clopper_pearson_low(n - misses, n, CERTIFIED_LEVEL), share):
        n += 1
    return n


def above_chance(q_values: np.ndarray) -> np.ndarray:
    """Whether q-values mark their features."""
    return np.asarray(q_values) <= FALSE_SHARE


def differs_from_siblings(own: Sequence[float], among: Sequence[float]) -> bool | None:
    """Whether an SAE recurs less than its siblings do among each other: its mean share lies below the 95 % prediction
    interval of one more sibling's. None with fewer than three siblings.

    Args:
        own: share of its features with a partner in each sibling, by decoder cosine. among: the same of each sibling,
            its mean over the others.
    """
    if len(among) < 3:
        return None
    spread = math.sqrt(1 + 1 / len(among)) * float(np.std(among, ddof=1))
    return (
        float(np.mean(own)) < float(np.mean(among)) + float(special.stdtrit(len(among) - 1, 0.025)) * spread - ROUNDING
    )


def statements(
    recurrent: np.ndarray,
    bounds: np.ndarray,
    marked: np.ndarray,
    prototype: np.ndarray,
    rebuilt: np.ndarray,
    dead: np.ndarray,
    siblings: int,
    share: float | None,
    withheld: bool,
) -> np.ndarray:
    """Statement about each feature, one of STATEMENTS, `[features]`.

    Args:
        recurrent: siblings in which it recurs. bounds: their Clopper–Pearson bounds. marked: above chance. prototype:
            like one. rebuilt: siblings in which it does not recur and is rebuilt. dead: fires nowhere.
        share: to certify at; None: nothing can be certified, because the siblings are no fresh trainings.
        withheld: why nothing is said to be missing is known.
    """
    sure = certified(bounds, share) if share is not None else np.zeros(len(bounds), bool)
    missing = "withheld" if withheld else "not found"
    kinds = {
        "dead": dead,
        "prototype-like": prototype & (sure | marked | (recurrent > 0)),
        "certified": sure & marked,
        "certified, not above chance": sure,
        "above chance": marked,
        "recurs in some": recurrent > 0,
        "split or merged": 2 * rebuilt > siblings,
    }
    return np.select([*kinds.values()], [*kinds], missing)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table() -> str:
    """The rules as they stand in docs/methods.md."""
    seeds, over_nulls = f"S ≥ {MINIMUM_SEEDS}", "over isotropic, spectral (signed and absolute) and gaussian"
    low, high = "lower end of the 95 % interval", "upper end of the 95 % interval"
    rows = {
        "phase 4a": f"{seeds}, {SPECTRAL_DRAWS} draws of the spectral null, and the {low} of each of "
        f"these is above {STABILITY.threshold:g}: the excess of `{PRIMARY_SCORE}` {over_nulls}; that of the share of "
        "features matched at 0.7 or more, over spectral and gaussian; both of the features that are like no prototype",
        "husai-tiny": f"bits per byte below {BELOW_BIGRAM:g} × the bigram's, and below the trigram's, on the same "
        "held-out documents",
        "what may be claimed": "the sentence that the controls which were beaten license (table below), and the excess "
        f"of `{PRIMARY_SCORE}` over the highest control, with its interval",
        "at rest": "the 95 % interval of the slope of `mcc`, all features, over the last third of training, as the "
        f"change over that third, lies within ±{MOVED_AT_MOST:g}; else the condition is marked as still moving",
        "adaptive L0, choice": "among the k whose mean held-out EV has its interval's lower end at or above the "
        f"floor: the largest least-lower-end of the excess of `{PRIMARY_SCORE}` over the required nulls; ties go to "
        "the sparser",
        "adaptive L0, confirmation": f"on {seeds} fresh seeds, the paired gain over the control k: better if its lower "
        f"end is above {BETTER.threshold:g} over each required null, worse if its upper end is below 0 over each",
        "assignment consistency v2": f"own references, fresh seeds ({seeds}) and fresh references: the gain's lower "
        f"end is above {BETTER.threshold:g} over each required null, and the upper end of the EV lost is at most "
        f"{KEPT.threshold:g}",
        "gate, positive control": f"SAEs of the planted features, {PLANTED_TOKENS[-1]:,} tokens each: the {low} of the "
        f"recovery is at least {RECOVERY.threshold:g}, and as phase 4a",
        "gate, stability": f"the candidate's SAEs, {seeds} fresh seeds: as phase 4a",
        "attempts": "a confirmation has exactly the seeds that selection fixed; at attempt j = 1, 2, … of a "
        "configuration, the gates about the candidate read intervals of level 1 − α/2ʲ instead of 95 %, "
        f"α = {levels.ALPHA:g}",
        "selection": "of SAEBench's families, and of the clusters of pairs, a third, at least three, in the order of "
        "the sha256 of their names; the gate reads the others",
        "SAEBench": f"{seeds}, {MINIMUM_FAMILIES} families that selection did not read, none with more than a quarter "
        f"of the data sets (of three families: a third), and the {low} of the AUC at k = {K} less that of the matched "
        f"reference is above the minimum ({SAEBENCH.threshold:g} where none is set): shown to be better",
        "CE-Bench": f"{seeds}, CE-Bench's own stories, clusters of pairs as SAEBench's families, and the {low} of the "
        "normalised corrected score less that of the matched reference is above the minimum "
        f"({CEBENCH.threshold:g} where none is set): shown to be better; refused where that reference's score plus the "
        f"minimum exceeds {levels.LARGEST_SCORE:g}",
        "code": f"{seeds}, and the {low} of the SAEs' explained variance less that of the best kind of dictionary of "
        f"prototypes is above {CODE.threshold:g}; on a language model CE recovered likewise",
        "fit": f"{seeds}, the {low} of explained variance is at least {levels.MIN_EXPLAINED_VARIANCE:g}, on a language "
        f"model that of CE recovered is at least {levels.MIN_CE_RECOVERED:g}, and the {high} of the share of dead "
        f"features is at most {levels.MAX_DEAD_SHARE:g}",
        "shifted data": f"{seeds}, all shifted versions whose labels are those of their data set tried, and the {high} "
        f"over seeds of the drop at k = {K} is at most {OOD.threshold:g}: the mean over those versions under which "
        "the model's own probe is above chance, which the result names; with none, the subject cannot answer",
        "random model": f"{seeds}, L0 within {L0_TOLERANCE * 100:g} % of its controls', and the {low} of each gain "
        f"over SAEs trained alike on the random-weights subject is above {RANDOM_MODEL.threshold:g}: the gain of "
        f"`{PRIMARY_SCORE}` and of its excess over each required null, in each of {len(levels.RANDOM_DRAWS)} draws of "
        "the weights",
        "transcoder": f"{seeds}, the setting fixed in advance, and the {low} of each of these is above the minimum "
        f"({TRANSCODER.threshold:g} where none is set, as in phase 4a): the excess of `{PRIMARY_SCORE}` between the "
        f"candidate's SAEs and transcoders of other seeds, {over_nulls}",
        "single features, recurs": f"in a sibling: signed decoder cosine with the one-to-one partner of at least "
        f"{RECURS_COSINE:g}, and held-out correlation with it of at least {RECURS_CORRELATION:g}",
        "single features, certified": f"the one-sided {100 * CERTIFIED_LEVEL:g} % Clopper–Pearson bound of k of n "
        f"siblings is at least π ({CERTIFIED_AT:g} where none is set)",
        "single features, above chance": "the larger of two p-values of the mean mutual similarity (siblings "
        "rotated alike; permuted labels of siblings and SAEs of Gaussian rows) has a Benjamini–Hochberg q of at most "
        f"{FALSE_SHARE:g}, prototype-like features and others apart",
        "single features, prototype-like": "signed cosine of at least 0.7 with a token mean or a centroid of other "
        "documents",
        "single features, split or merged": "does not recur, and in more than half of the siblings a non-negative sum "
        f"of at most {REBUILT_BY} features has a cosine of at least {REBUILT_COSINE:g} with it",
        "single features, calibration": "in each world, realised share of false ones among *above chance*, "
        f"prototype-like ones aside: at most {CALIBRATED_SHARE:g}, its 95 % upper bound at most {CALIBRATED_BOUND:g}; "
        "pooled recurrence of certified features in fresh trainings: at least π; share of them whose fresh trainings "
        f"reject π: at most {CALIBRATED_SHARE:g}; share of marked ones among true features that the SAE holds and that "
        f"fire on {100 * RARE:g} % of the rows: at least {FEATURE_POWER:g}",
        "one condition": "of user-supplied SAEs, what the library wrote is equal but for seeds, names, places of "
        f"output, logs and the machine; L0 that ranges over more than {UNUSUAL_L0:.0%} of its median, or an explained "
        f"variance more than {UNUSUAL_EV:g} from the median, is said; {FAR_L0:.0%} and {FAR_EV:g} are refused where "
        "the files of an SAE say nothing",
        "refused, rows": f"two SAEs of whose decoders {SHARED_DECODER * 100:g} %, or of whose initialisations "
        f"{SHARED_INITIALISATION * 100:g} %, of the smaller one's rows stand in the other (cosine above 1 − 10⁻⁵), in "
        "whatever order, sign and scale",
        "refused, order": "two user-supplied SAEs whose mean |cos| of features of one number exceeds that of features "
        f"of neighbouring numbers by more than {SAME_NUMBER:g} and by more than {SAME_NUMBER_ERRORS:g} standard errors",
    }
    lines = ["| rule | inequality |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    return "\n".join(lines) + "\n"


def licences() -> str:
    """The table of sentences as it stands in docs/methods.md."""
    outcomes = [FAIL] * (len(LICENCES) - 1) + [PASS]
    rows = [f"| {what} | {text} | {outcome} |" for (what, _, text), outcome in zip(LICENCES, outcomes, strict=True)]
    return (
        "\n".join(["| beaten, beside the lines above | what may be said | stability |", "|---|---|---|", *rows]) + "\n"
    )


if __name__ == "__main__":
    print(table(), licences(), sep="\n", end="")
