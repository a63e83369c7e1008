"""All rules that decide something, each defined once.

    python -m husai.evidence.rules     # the table "Rules" of docs/methods.md

A rule reads typed evidence, checks its conditions, and returns estimates with the inequality that each must satisfy.
The page of a phase, the gate and the audit call the same function. `table` prints the table "Rules" of docs/methods.md.

Outcomes are PASS, FAIL, and MISSING. MISSING means that the evidence gives no answer; `Missing` states the reason.
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
    ScoredRecord,
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
SAME_L0 = 0.02
"""Largest relative difference of an SAE's L0 on two samples of held-out rows."""
SAME_SCORE = 1e-5
"""Largest difference, by rounding, between two records of one score."""
POWER = 0.8
"""Pass probability for which a gate states the effect that it needs."""
MINIMUM_SEEDS = 5
EQUIVALENCE_MARGIN = 0.01
MOVED_AT_MOST = 0.02
"""Largest change of mcc over the last third of a training that is at rest."""
MINIMUM_FAMILIES = 3
"""Families of data sets needed to generalise beyond the tested ones."""
SAME_DIRECTION = 1 - 1e-5
"""|cos| of two copies of a direction, bfloat16 copies included."""
SHARED_DECODER, SHARED_INITIALISATION = 0.25, 0.05
"""Shares of common directions, relative to the smaller dictionary, from which decoders or initialisations are refused.
Trained directions may become equal, initial directions never do."""
SAME_NUMBER, SAME_NUMBER_ERRORS = 0.1, 6.0
"""Excess of the mean |cos| of features of one number over that of neighbouring numbers, and the same in standard
errors. Independent SAEs reach 0.06 and 4, sorted by firing rate; SAEs of one initialisation 0.6 and 100."""
UNUSUAL_L0, FAR_L0 = 0.1, 0.5
"""Range of L0 over seeds, as a share of its median. A range above the first is stated. A range above the second is
refused, if the files do not describe the training."""
UNUSUAL_EV, FAR_EV = 0.1, 0.3
"""The same thresholds for the distance of an SAE's explained variance from the median."""
MANY_DEAD = 0.2
"""Share of dead features from which the report page warns. The rule *fit* has another bound."""
NOT_SPARSE = 0.5
"""L0 as a share of the smaller of d_in and d_sae, from which the report page warns."""
FEW_DIMENSIONS = 8
"""Least number of dimensions in which directions do not coincide by chance."""
BELOW_BIGRAM = 0.8
"""Upper bound of a language model's bits per byte, as a share of the bigram's."""


def in_one_order(excess: float, errors: float) -> bool:
    """True if features with the same index match better than features with neighbouring indices (SAME_NUMBER)."""
    return excess > SAME_NUMBER and errors > SAME_NUMBER_ERRORS


def many_dead(share: float) -> bool:
    """True if the share of dead features reaches MANY_DEAD, thus the page warns."""
    return share >= MANY_DEAD


def not_sparse(l0: float, d_in: int, d_sae: int) -> bool:
    """True if the L0 is so large that the code is not sparse (NOT_SPARSE)."""
    return l0 >= NOT_SPARSE * min(d_in, d_sae)


def far_apart(l0: Sequence[float], explained_variance: Sequence[float], of_l0: float, of_ev: float) -> list[str]:
    """Sentences about differences between SAEs of one condition above the thresholds (UNUSUAL_L0, FAR_L0, …)."""
    sentences, median_ev = [], float(np.median(explained_variance))
    if max(l0) - min(l0) > of_l0 * float(np.median(l0)):
        sentences.append(f"L0 is {min(l0):.3g} to {max(l0):.3g}; a range of at most {of_l0:.0%} of the median expected")
    furthest = max(explained_variance, key=lambda value: abs(value - median_ev))
    if abs(furthest - median_ev) > of_ev:
        sentences.append(
            f"one explained variance is {furthest:.3f} beside a median of {median_ev:.3f}; a distance of at most "
            f"{of_ev:g} expected"
        )
    return sentences


def outlier_note(heldout: Sequence[Heldout]) -> list[str]:
    """Sentences about outlier rows: rows that were left out, and outliers among held-out rows."""
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
    """Raise Missing with the reason unless `holds`."""
    if not holds:
        raise Missing(reason)


def enough_seeds(n: int) -> None:
    require(n >= MINIMUM_SEEDS, f"{n} seeds; a verdict needs {MINIMUM_SEEDS}")


# ---------------------------------------------------------------------------------------------------------------------
# An inequality, and its estimates


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
    """Registered value. A caller may require more."""
    passed: str = ""
    """Sentence of the phase's page if the rule holds, with places for {threshold} and {ends}."""
    failed: str = ""
    """Sentence of the phase's page if the rule fails; {which} names the failing estimates."""

    def holds(self, end: float | None, threshold: float | None = None) -> bool:
        """True if the end of an interval satisfies the inequality. Without an interval it does not."""
        if end is None or not math.isfinite(end):
            return False
        limit = self.threshold if threshold is None else threshold
        return {">": end > limit, ">=": end >= limit, "<=": end <= limit}[self.relation]

    def met_by(self, interval: Estimate | Interval | Mapping, threshold: float | None = None) -> bool:
        """True if an estimate's interval satisfies the inequality."""
        end = interval[self.end] if isinstance(interval, Mapping) else getattr(interval, self.end)
        return self.holds(end, threshold)

    def shown(self, estimates: dict[str, Estimate], n: int, threshold: float | None = None, **more) -> Shown:
        return Shown(self, estimates, self.threshold if threshold is None else threshold, n, **more)


@dataclass(frozen=True)
class Shown:
    """Estimates that must all satisfy a rule."""

    rule: Rule
    estimates: dict[str, Estimate]
    threshold: float
    n: int
    """Seeds."""
    families: int | None = None
    """Number of families of data sets, if these are a sample too."""
    note: str = ""
    """Words that follow the figure's name."""
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    """Name -> further estimate that is reported and decides nothing."""
    left_out: Sequence[str] = ()
    """Names of data sets or pairs that were measured and do not count."""

    def failing(self) -> list[str]:
        """Names of the estimates that do not satisfy the rule."""
        return [name for name, e in self.estimates.items() if not self.rule.met_by(e, self.threshold)]

    def worst(self) -> tuple[str, Estimate]:
        """Name and value of the estimate with the least margin."""
        sign = -1 if self.rule.end == "high" else 1
        return min(self.estimates.items(), key=lambda item: sign * getattr(item[1], self.rule.end))

    def passes_at(self, truth: float) -> float:
        """Pass probability if `truth` is the true value of every figure.

        It is the least probability of the estimates, and therefore an upper bound for all of them together.
        """
        return min(self._passes_at(truth, e) for e in self.estimates.values())

    def _passes_at(self, truth: float, estimate: Estimate) -> float:
        if (estimate.standard_error or 0) <= ROUNDING:  # without variation between seeds the outcome is certain
            return float(self.rule.holds(truth, self.threshold))
        return pass_probability(estimate, self.rule.end, self.threshold, truth)

    def effect_for(self, probability: float = POWER) -> float:
        """True value of the figures at which each estimate passes with at least this probability."""
        needed = [effect_for(e, self.rule.end, self.threshold, probability) for e in self.estimates.values()]
        return min(needed) if self.rule.end == "high" else max(needed)


def checked(judge: Callable[[], Shown]) -> Shown:
    """Result of a rule's function, after a check that each estimate has an interval.

    Raises:
        Missing.
    """
    shown = judge()
    es = shown.estimates.values()
    require(bool(es) and all(e.low is not None and e.high is not None for e in es), "there is no interval")
    require(all(np.isfinite([e.estimate, e.low, e.high]).all() for e in es), "a figure is not finite")
    return shown


def verdict(judge: Callable[[], Shown]) -> dict[str, str]:
    """Outcome for a stress test's page: {"outcome", "reason"}."""
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
"""Name of an excess -> its score and its control."""
SINGLE = {f"single features, {null}": ("share70_alive", null) for null in ("spectral", "gaussian")}
NO_PROTOTYPES = {
    f"without prototypes: {name}": (score.replace("_alive", "_others"), null)
    for name, (score, null) in (CHANCE | SINGLE).items()
}
"""The same excesses for features that are not prototype-like."""
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
"""(beaten controls, excesses that must hold in addition to those of earlier lines, licensed sentence). Only the last
line passes."""
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
"""Training rows of the SAEs of each degree, fixed in advance. The last degree decides."""
PLANTED_BATCH, PLANTED_RATE = 256, 0.01
"""Batch size and learning rate of these SAEs, fixed in advance. Width and k are those of the planted features."""


def against_every_null(section: Scored) -> None:
    """Raise Missing unless a section has enough seeds, each pair once, and all required nulls with enough draws."""
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
    """Rule: features of SAEs with different seeds match better than those of every control.

    The match is compared on average, for single features, and without prototype-like features. If a user supplies
    untrained states of the SAEs, they are a further control.
    """
    against_every_null(section)
    trained_alike(section)
    complete = section.others is not None and all(s in section.stability.scores for s, _ in STABLE.values())
    require(complete, "no scores without prototype-like features")
    compared = STABLE
    if isinstance(section, OwnSection) and all("untrained" in p for p in section.pairs):
        compared = compared | {"untrained": ("mcc_alive", "untrained")}
    estimates = {name: jackknife(section.scores(null, score), level) for name, (score, null) in compared.items()}
    return STABILITY.shown(estimates, len(section.members), minimum)


def trained_alike(section: Section | OwnSection | Control, at_same_l0: bool = True) -> None:
    """Raise Missing unless the SAEs of Gaussian rows have the section's seeds, other activations and the same L0.

    Args:
        at_same_l0: False if the same k in training is sufficient.
    """
    control = section.gaussian
    if control is None:
        raise Missing("no SAEs of Gaussian rows")
    members: Sequence[TrainedMember | OwnMember | AlikeMember] = section.members
    control_members = control.members
    require(len(control_members) == len(members), "SAEs of Gaussian rows: one for each of those under test expected")
    paired = zip(members, control_members, strict=True)
    require(all(a.seed in (None, b.seed) for a, b in paired), "SAEs of Gaussian rows have other seeds")
    require(control.subject_digest == section.subject_digest, "Gaussian rows of another subject")
    require(control.store_digest != section.store_digest, "its Gaussian rows are the activations themselves")
    shas = {m.checkpoint_sha256 for m in control_members}
    once = len(shas) == len(control_members) and shas.isdisjoint(m.checkpoint_sha256 for m in members)
    require(once, "an SAE of Gaussian rows occurs twice")
    l0_agrees = all(_same_l0(a.heldout, b.heldout) for a, b in zip(members, control_members, strict=True))
    require(
        l0_agrees or not at_same_l0, f"L0 of the SAEs of Gaussian rows differs by more than {100 * L0_TOLERANCE:g} %"
    )


def one_account(section: OwnSection, confirmed: Section | OwnSection) -> None:
    """Raise Missing unless the scores of the candidate's own pairs equal those of its confirmation.

    Studies of another store are not compared. SAEs of Gaussian rows are compared if both studies have the same SAEs. A
    null's draws are seeded by the two dictionaries and their untrained states. Therefore equal draws have equal scores,
    and other nulls, or another number of draws, are refused: nothing else in the evidence would bind the nulls.
    """
    if (section.checkpoints, section.store_digest) != (confirmed.checkpoints, confirmed.store_digest):
        return
    draws = _draws(section)
    alike = draws == _draws(confirmed)
    require(alike, "nulls of its own SAEs are not drawn as in the confirmation; the same --null-draws expected")
    shared = ["observed", *(null for null in draws if null != "gaussian")]
    shared += ["gaussian"] if section.control_inputs == confirmed.control_inputs else []
    pairs, known = _by_checkpoints(section), _by_checkpoints(confirmed)
    require(pairs.keys() == known.keys(), "pairs of its own SAEs are not those of the confirmation")
    for saes, pair in pairs.items():
        for name in [name for name in shared if name in pair and name in known[saes]]:
            scores, confirmed_scores = pair[name], known[saes][name]
            same = all(
                abs(scores[score] - confirmed_scores[score]) <= SAME_SCORE
                for score in scores.keys() & confirmed_scores.keys() - {GAP}
            )
            which = f"{pair['a']} and {pair['b']}, {name}"
            why = f"scores of its own SAEs are not those of the confirmation ({which})"
            require(same, f"{why}; run both scripts with one version of HUSAI")


def same_sparsity(section: OwnSection, records: Iterable[ScoredRecord]) -> None:
    """Raise Missing unless the SAEs of a stress test have the L0 of their records, up to other held-out rows."""
    known = {record.checkpoint_sha256: record.heldout.l0 for record in records}
    for member in section.members:
        require(member.checkpoint_sha256 in known, "an SAE that the confirmation does not hold")
        same = same_l0(member.heldout.l0, known[member.checkpoint_sha256], SAME_L0)
        require(same, f"L0 of its own SAEs differs from that of the confirmation by more than {100 * SAME_L0:g} %")


def _draws(section: Scored) -> dict[str, int]:
    """Null -> number of its draws."""
    primary = section.stability.scores.get(PRIMARY_SCORE)
    return {} if primary is None else {null: spread.draws for null, spread in primary.nulls.items()}


def _by_checkpoints(section: Section | OwnSection) -> dict[frozenset[str], dict]:
    """Digests of both SAEs of a pair -> the pair."""
    sha256 = dict(zip(section.stability.labels, section.checkpoints.values(), strict=True))
    pairs: list[dict] = section.pairs
    return {frozenset(sha256.get(pair[side], "") for side in ("a", "b")): pair for pair in pairs}


def sentence(met: Container[str]) -> str:
    """Sentence about the features that the beaten controls license.

    Args:
        met: names of the excesses of STABLE for which the rule of stability holds.
    """
    licensed = ""
    for _, needed, text in LICENCES:
        if not all(name in met for name in needed):
            break
        licensed = text
    return licensed


def with_budget(text: str, tokens: int | None, rested: bool | None) -> str:
    """Sentence about SAEs with their token budget, unless training had come to rest or nothing is shown.

    Args:
        tokens, rested: None if unknown.
    """
    if rested or text == LICENCES[0][2]:
        return text
    budget = "training of unknown length" if tokens is None else f"{tokens:,} tokens of training"
    rest = "which had not come to rest" if rested is False else "which may not have come to rest"
    return f"{text[:-1]}, after {budget}, {rest}."


def positive_control(planted: PlantedSection, level: float = 0.95) -> Shown:
    """Rule: SAEs that recover the planted features are stable, in the registered setting.

    Returns:
        The recovery if it is too low, else the stability of these SAEs.

    Raises:
        Missing: the setting is not the registered one, or a degree has no verdict.
    """
    degrees, data = planted.degrees, planted.data
    require(data == PLANTED, "other planted features than the registered ones")
    registered = PLANTED_TOKENS, PLANTED_BATCH
    trained_for = tuple(d.tokens for d in degrees), planted.batch_size
    require(trained_for == registered, f"planted features: tokens and batch size {registered} expected, as registered")
    shas = [m.checkpoint_sha256 for d in degrees for m in d.study.members]
    require(len(set(shas)) == len(shas), "planted features: an SAE occurs twice")
    require(len({d.study.store_digest for d in degrees}) == 1, "planted features: SAEs of several stores")
    for degree in degrees:
        study = degree.study
        own_training(study)
        activations = study.subject_digest, study.hook_name, study.rows, study.d_in
        require(
            activations == (data.digest, PLANTED_HOOK, data.rows, data.d_in), "planted features: SAEs of other rows"
        )
        recipes = {(m.family, m.d_sae, m.k, m.learning_rate) for m in study.members}
        expected = {("topk", data.features, data.active, PLANTED_RATE)}
        require(recipes == expected, f"planted features: SAEs {expected} expected, as registered")
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


def code(section: Code, level: float = 0.95) -> Shown:
    """Rule: SAEs code activations better than dictionaries of prototypes with the same width and L0.

    For each figure, the baseline is the kind of prototypes with the highest mean over seeds.
    """
    seeds = list(section.saes.explained_variance)
    enough_seeds(len(seeds))
    needed = {"rows", "centroids"} | ({"token means"} if section.saes.ce_recovered is not None else set())
    require(needed <= section.prototypes.keys(), f"prototypes of each kind expected: {', '.join(sorted(needed))}")
    figures = [figure for figure in CODE_FIGURES if getattr(section.saes, figure) is not None]
    gains = {CODE_FIGURES[f]: gain_over_prototypes(section, level)[section.best(f)][f] for f in figures}
    return CODE.shown(gains, len(seeds))


def gain_over_prototypes(section: Code, level: float = 0.95) -> dict[str, dict[str, Estimate]]:
    """Kind of prototypes -> figure -> gain of the SAEs, over seeds."""

    def gain(of_saes: Mapping[str, float], of_prototypes: Mapping[str, float]) -> Estimate:
        return mean_over_seeds([of_saes[seed] - of_prototypes[seed] for seed in of_saes], level)

    return {
        kind: {
            f: gain(by_seed, getattr(coded, f))
            for f in CODE_FIGURES
            if (by_seed := getattr(section.saes, f)) is not None
        }
        for kind, coded in section.prototypes.items()
    }


def fit(heldout: Sequence[Heldout], ce_recovered: Sequence[float] | None, level: float = 0.95) -> Shown:
    """Rule: held-out figures of SAEs reach the registered floors, and dead features stay below the ceiling.

    Args:
        ce_recovered: one value for each seed; None if the subject is no language model.
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
    """Rule: the candidate's features match better than those of SAEs of each draw of the random weights.

    The rule compares the score and its excess over each required null.

    Args:
        section: the candidate's study. controls: one for each draw, in the order of `levels.RANDOM_DRAWS`.
    """
    enough_seeds(len(section.members))
    drawn = [levels.random_subject(section.subject_digest, draw) for draw in levels.RANDOM_DRAWS]
    absent = [str(n) for n, sha in zip(levels.RANDOM_DRAWS, drawn, strict=True) if sha not in _subjects(controls)]
    hint = "--random-model-checkpoint names SAEs trained alike on each"
    require(not absent, f"no SAEs of draw {', '.join(absent)} of its subject's random weights; {hint}")
    require(_subjects(controls) == drawn, "SAEs of one draw of the random weights twice, or of another one")
    candidate_seeds = [m.seed for m in section.members]
    against_every_null(section)
    trained_alike(section)
    estimates: dict[str, Estimate] = {}
    for draw, control in zip(levels.RANDOM_DRAWS, controls, strict=True):
        seeds = [m.seed for m in control.members]
        same = seeds == candidate_seeds or (set(candidate_seeds) == {None} and len(seeds) == len(candidate_seeds))
        require(same and control.stability.labels == section.stability.labels, "its controls have other seeds")
        pairs = zip(section.members, control.members, strict=True)
        l0_agrees = all(_same_l0(a.heldout, b.heldout) for a, b in pairs)
        require(l0_agrees, f"L0 of its controls differs by more than {100 * L0_TOLERANCE:g} %")
        against_every_null(control)
        trained_alike(control)
        estimates |= {
            f"draw {draw}, {over}": contrast.gain_over(null, [section], [control], level)
            for over, null in (("the score itself", None), *((f"over {null}", null) for null in GATED_NULLS))
        }
    shas = [m.checkpoint_sha256 for m in section.members]
    shas += [m.checkpoint_sha256 for control in controls for m in control.members]
    require(len(set(shas)) == len(shas), "a control occurs twice")
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
    """Rule: transcoders of other seeds find the candidate's features, beyond each control of stability.

    Args:
        section: study of the candidate's SAEs. transcoders: study of transcoders. across: scores between the two.
    """
    require(setting.preregistered, "the setting is not the one that was fixed in advance")
    enough_seeds(len(section.members))
    own_training(transcoders)
    for arm in (section, transcoders):
        require([m.seed for m in arm.members] == setting.seeds, "an arm with other seeds")
    recipes = {(m.family, m.d_sae, m.k, m.learning_rate) for m in transcoders.members}
    expected = {("transcoder", setting.d_sae, setting.k, setting.learning_rate)}
    require(recipes == expected, "transcoders of another width, k or learning rate than the setting's")
    for study in (section, transcoders, across):
        place = study.hook_name, study.subject_digest, study.store_digest
        expected_place = setting.hook_out, setting.subject_digest, section.store_digest
        require(place == expected_place, "a study of another space, subject or store")
    require(across.stability.labels == section.stability.labels, "scores of other seeds")
    shas = [m.checkpoint_sha256 for arm in (section, transcoders) for m in arm.members]
    require(len(set(shas)) == len(shas), "an SAE occurs twice")
    trained_alike(section)
    trained_alike(transcoders, at_same_l0=False)  # a learned threshold determines the held-out L0 of BatchTopK
    noise = {arm.gaussian.store_digest for arm in (section, transcoders) if arm.gaussian is not None}
    require(len(noise) == 1, "SAEs and transcoders of different Gaussian rows")
    against_every_null(across)
    scored = all(score in across.stability.scores for score, _ in CHANCE.values())
    require(scored, "candidate and transcoders were not matched by absolute cosines")
    excess = {name: jackknife(across.scores(null, score), level) for name, (score, null) in CHANCE.items()}
    return TRANSCODER.shown(excess, len(setting.seeds), minimum)


def own_training(section: Section) -> None:
    """Raise Missing unless the SAEs of a study were trained independently, with one recipe."""
    alone = all(m.assignment_weight == 0 and m.reference is None for m in section.members)
    require(alone, "SAEs that were pulled to a common reference are not independent")
    recipes = {(m.family, m.d_sae, m.k, m.learning_rate) for m in section.members}
    require(len(recipes) == 1, "SAEs of several recipes are no condition")


def ood(shifted: Shifted, skipped: Iterable[str], level: float = 0.95, maximum: float | None = None) -> Shown:
    """Rule: on shifted sets where the model's probe is above chance, SAEs lose at most a little more than the model.

    These sets are fixed and named. The seeds are the sample.

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
    """Figures of a candidate's seeds and of their matched references."""

    own: np.ndarray
    """Figures `[S, D]` of each seed on each data set or pair."""
    reference: np.ndarray
    """Figures `[S, D]` of the references, paired by seed."""
    explained_variance: list[float]
    """Difference between each seed and its reference in held-out explained variance."""
    names: Sequence[str]
    """Names of the data sets or pairs."""
    groups: Sequence[str]
    """Family of each data set, or cluster of each pair."""


def shown_better(
    rule: Rule, figures: AgainstReference, level: float = 0.95, minimum: float | None = None, named: str = ""
) -> Shown:
    """Rule: the candidate is shown to be better than its matched reference.

    It counts sets of which no group has more than a quarter.

    Args:
        named: words that follow the figure's name.
    """
    enough_seeds(len(figures.own))
    enough_families(figures.groups)
    keep = gated(figures.names, figures.groups)
    candidate, reference = figures.own[:, keep], figures.reference[:, keep]
    if rule is CEBENCH:
        reachable(float(reference.mean()), rule.threshold if minimum is None else minimum)
    groups = [figures.groups[i] for i in keep]
    return rule.shown(
        {"": mean_over_seeds_and_sets(candidate - reference, groups, level)},
        len(candidate),
        minimum,
        families=len(set(groups)),
        note=f"{named} less the matched reference's",
        beside={"held-out explained variance less the reference's": mean_over_seeds(figures.explained_variance, level)},
        left_out=sorted(set(figures.names) - {figures.names[i] for i in keep}),
    )


def enough_families(groups: Iterable[str]) -> None:
    n = len(set(groups))
    require(n >= MINIMUM_FAMILIES, f"{n} families of data sets; at least {MINIMUM_FAMILIES} expected")


def only_cebench(benchmark: str) -> None:
    why = f"the stories are not CE-Bench's own: {benchmark}, provisional; --stories names those on the hub"
    require(benchmark == "cebench", why)


def reachable(reference: float, minimum: float) -> None:
    """Raise Missing if no SAE can exceed the reference by the minimum."""
    why = f"refused: no SAE can reach {minimum:g} above a reference of {reference:.3f} of 1"
    require(levels.within_reach(reference, minimum), why)


def cebench_delta(benchmark: str, delta: Mapping, minimum: float) -> str | None:
    """Reason why a condition's delta does not reach a minimum; None if it does."""
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
# Rules inside a study: training at rest, the choice of k or weight, acceptance of a gain


BETTER = Rule("gain", "gain over each required null", "low", ">", 0.0)
KEPT = Rule("explained variance lost", "held-out explained variance lost", "high", "<=", levels.MAX_EV_LOST)


def at_rest(moved: Estimate | Interval) -> bool | None:
    """True if the interval of the change over the last third is within ±MOVED_AT_MOST; None without an interval."""
    if moved.low is None or moved.high is None:
        return None
    return moved.low >= -MOVED_AT_MOST and moved.high <= MOVED_AT_MOST


def better(gain: Gain) -> bool:
    """True if a gain is shown over each required null."""
    return all(BETTER.met_by(e) for e in gain.over.values())


def gain_verdict(gain: Gain, seeds: int) -> str:
    """Outcome of a gain: `better`, `worse`, `not shown to differ`, or MISSING with too few seeds."""
    if seeds < MINIMUM_SEEDS or gain.observed.low is None:
        return MISSING
    if better(gain):
        return "better"
    worse = all(e.high is not None and e.high < 0 for e in gain.over.values())
    return "worse" if worse else "not shown to differ"


def sparsity_outcome(chosen: int | None, gain: Gain | None, seeds: int) -> str:
    """Outcome of a choice of k, by its gain over the control's k on fresh seeds."""
    if chosen is None:
        return "no candidate meets the floor"
    return "the chosen k is the control's" if gain is None else gain_verdict(gain, seeds)


def choose_k(candidates: Sequence[SparsitySection], floor: float) -> int | None:
    """Chosen k: the largest `contrast.lower_bound` among sections whose explained variance is surely at least `floor`.

    Ties go to the sparser k. None if no section qualifies.
    """
    surely = [(s, contrast.heldout(s).low) for s in candidates]
    allowed = [s for s, low in surely if low is not None and low >= floor]
    return max(allowed, key=lambda s: (contrast.lower_bound(s), -s.k)).k if allowed else None


def choose_weight(arms: Sequence[PulledSection], max_drop: float) -> float | None:
    """Chosen λ: the largest lower end of the least gain among arms that surely lose at most `max_drop` of the EV.

    None if no arm with an interval qualifies.
    """
    kept = [a for a in arms if KEPT.met_by(a.ev_drop, max_drop)]
    surely = [(low, a.weight) for a in kept if (low := a.gain.over_least.low) is not None]
    return max(surely, key=lambda pair: pair[0])[1] if surely else None


def acceptance(
    arms: Sequence[PulledSection], gain: Gain | None, lost: Interval | None, seeds: int, max_drop: float
) -> Acceptance:
    """Acceptance of the pull of `choose_weight`, by its gain and its loss of explained variance on fresh seeds.

    Raises:
        ValueError: a weight was chosen, and its confirmation is missing.
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
"""Expected share of false features among those marked as above chance (Benjamini–Hochberg)."""
REBUILT_BY, REBUILT_COSINE = 3, 0.9
"""Largest number of a sibling's features, and least cosine of their sum, for a split or merged feature."""
DENSE = 0.1
"""Share of tokens on which a feature fires, above which it counts as dense."""
CALIBRATED_SHARE, CALIBRATED_BOUND, FEATURE_POWER = 0.05, 0.07, 0.8
"""Calibration: largest realised share of false features, its largest 95 % upper bound, and least share of marked
features among true features that fire on at least RARE of the rows."""
RARE = 0.001

STATEMENTS = {
    "certified": "recurs in at least the share π of trainings, and more than chance explains",
    "certified, not above chance": "recurs in at least the share π of trainings; chance can explain it",
    "above chance": "resembles features of other trainings more than chance explains; recurs in few or none of them",
    "recurs in some": "recurs in a sibling; chance can explain it",
    "prototype-like": "lies near a token mean or a centroid, which every training finds",
    "split or merged": "does not recur; a few features of most siblings rebuild its direction",
    "not found": "does not recur, and no sum of a few features of a sibling comes close to it",
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
    """True where a feature recurs in a sibling, `[siblings, features]`.

    Args:
        cosines: signed cosines with the one-to-one partner. correlations: correlations of their held-out activations;
            None: unknown, and the cosine alone decides.
    """
    close = np.asarray(cosines) >= cosine
    return close if correlations is None else close & (np.asarray(correlations) >= correlation)


def certified(bounds: np.ndarray, share: float = CERTIFIED_AT) -> np.ndarray:
    """True where the lower bound of recurrence reaches the share, up to rounding."""
    return np.asarray(bounds) >= share - ROUNDING


def siblings_needed(share: float = CERTIFIED_AT, misses: int = 0) -> int:
    """Least number of siblings that certify a feature which recurs in all but `misses` of them."""
    n = misses + 1
    while not certified(clopper_pearson_low(n - misses, n, CERTIFIED_LEVEL), share):
        n += 1
    return n


def above_chance(q_values: np.ndarray) -> np.ndarray:
    """True where the q-value marks its feature."""
    return np.asarray(q_values) <= FALSE_SHARE


def differs_from_siblings(own: Sequence[float], among: Sequence[float]) -> bool | None:
    """True if an SAE recurs less in its siblings than these recur in each other; None with fewer than three siblings.

    Its mean share must be below the 95 % prediction interval for one more sibling. Siblings' means share their pairs,
    therefore they spread less than the means of independent SAEs, by (n − 2)/(n − 1) for n siblings; the spread is
    divided by this factor. An SAE that differs in its seed alone is below the interval in about 2.5 %.

    Args:
        own: shares of its features with a partner in each sibling, by decoder cosine. among: mean share of each sibling
            over the other siblings.
    """
    if len(among) < 3:
        return None
    n = len(among)
    spread = math.sqrt(1 + 1 / n) * float(np.std(among, ddof=1)) * (n - 1) / (n - 2)
    return float(np.mean(own)) < float(np.mean(among)) + float(special.stdtrit(n - 1, 0.025)) * spread - ROUNDING


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
        recurrent: number of siblings in which it recurs. bounds: Clopper–Pearson bounds. marked: above chance.
            prototype: prototype-like. rebuilt: number of siblings that rebuild it without recurrence. dead: without
            activity.
        share: π of certified features; None: no feature is certified, because the siblings are no fresh trainings.
        withheld: True if the comparison cannot show that a feature is missing.
    """
    is_certified = certified(bounds, share) if share is not None else np.zeros(len(bounds), bool)
    missing = "withheld" if withheld else "not found"
    kinds = {
        "dead": dead,
        "prototype-like": prototype & (is_certified | marked | (recurrent > 0)),
        "certified": is_certified & marked,
        "certified, not above chance": is_certified,
        "above chance": marked,
        "recurs in some": recurrent > 0,
        "split or merged": 2 * rebuilt > siblings,
    }
    return np.select([*kinds.values()], [*kinds], missing)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table() -> str:
    """Table of the rules for docs/methods.md."""
    seeds, over_nulls = f"S ≥ {MINIMUM_SEEDS}", "over isotropic, spectral (signed and absolute) and gaussian"
    low, high = "lower end of the 95 % interval", "upper end of the 95 % interval"
    rows = {
        "phase 4a": f"{seeds}, {SPECTRAL_DRAWS} draws of the spectral null, and the {low} of each of "
        f"these is above {STABILITY.threshold:g}: the excess of `{PRIMARY_SCORE}` {over_nulls}; that of the share of "
        "features matched at 0.7 or more, over spectral and gaussian; both of the features that are like no prototype",
        "husai-tiny": f"bits per byte below {BELOW_BIGRAM:g} × the bigram's, and below the trigram's, on the same "
        "held-out documents",
        "what may be claimed": "the sentence that the controls that were beaten support ([table](#nulls)), and the "
        f"excess of `{PRIMARY_SCORE}` over the highest control, with its interval",
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
        f"({TRANSCODER.threshold:g} by default, the minimum of stability): the excess of `{PRIMARY_SCORE}` between the "
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
    """Table of licensed sentences for docs/methods.md."""
    outcomes = [FAIL] * (len(LICENCES) - 1) + [PASS]
    rows = [
        f"| {controls} | {text} | {outcome} |" for (controls, _, text), outcome in zip(LICENCES, outcomes, strict=True)
    ]
    return (
        "\n".join(["| beaten, beside the lines above | what may be said | stability |", "|---|---|---|", *rows]) + "\n"
    )


if __name__ == "__main__":
    print(table(), licences(), sep="\n", end="")
