"""Types of evidence. A phase constructs the schema of its results; selection, gate, audit and report load this class.

Types are strict: unknown keys, strings or booleans for numbers, NaN, and null for a figure are refused, and the message
names the place. The order of fields is the order of keys in results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from husai.evidence.estimates import Estimate, noise
from husai.evidence.levels import K
from husai.evidence.names import GAP, GATED_NULLS, OTHERS, PRIMARY_SCORE, SCORED, STRATA
from husai.runs.errors import BadInput
from husai.runs.files import digest

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Names = Annotated[list[str], Field(min_length=1)]
Versions = Annotated[dict[str, Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Place = Annotated[str, Field(pattern=r"^[0-9]+$")]
"""A seed, or the number of an SAE in its group if seeds are unknown (`seed_names`)."""
ContrastiveName = Literal["cebench", "cebench_local_copy", "contrastive_local"]
"""Origin of story pairs (`evals.contrastive.Pairs`)."""
ProbingName = Literal["sae_probes", "sae_probes_exact"]
"""Implementation of the probes (`evals.sae_probes.PROBINGS`). Evidence without a name used sae-probes' own code."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def to_json(self) -> dict[str, Any]:
        """JSON of the given fields, as it is written into results."""
        return self.model_dump(exclude_unset=True, by_alias=True)


def same(a: float, b: float) -> bool:
    """True if two numbers are equal up to rounding."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def has(value: Any, name: str) -> bool:
    """True if JSON or a model holds a key. Discriminators of union types use it."""
    return name in value if isinstance(value, dict) else hasattr(value, name)


def refusal(error: ValidationError) -> str:
    """First problem of a validation error: the place, and the expected value."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


class Facts(Strict):
    """Facts about an SAE and its training. None: unknown. Facts of a group lack `l0` and `seed`."""

    source: str
    subject_digest: Sha256 | None
    hook_name: str | None
    family: str
    d_in: int
    d_sae: int
    k: int | None
    l0: Number | None = None
    learning_rate: Number | None
    tokens: int | None
    store_digest: Sha256 | None
    training: str | None
    """Digest of the settings of training."""
    seed: int | None = None
    control: str | None
    streamed: bool = False
    """Whether the SAE was trained on a stream, of which no store is kept. Absent: false."""

    @property
    def shared(self) -> Facts:
        """Facts that SAEs of other seeds share."""
        return Facts(**{n: value for n, value in self if n not in OF_ONE_SEED and n in self.model_fields_set})

    @property
    def whole(self) -> bool:
        """True for facts of one SAE, False for facts that a group shares."""
        return self.l0 is not None and "seed" in self.model_fields_set

    @property
    def known_l0(self) -> float:
        """L0 of one SAE. The facts must be `whole`."""
        assert self.l0 is not None
        return self.l0


OF_ONE_SEED = ("seed", "l0")
"""Facts in which the SAEs of one group differ."""


def _whole(facts: Facts) -> Facts:
    if not facts.whole:
        raise ValueError("l0 and seed expected")
    return facts


WholeFacts = Annotated[Facts, AfterValidator(_whole)]
"""Facts of one SAE."""


class Outliers(Strict):
    """Held-out rows whose norm exceeds `levels.OUTLIER_NORM` times the median norm."""

    share: Share
    explained_variance: Number
    """Explained variance of the other rows."""
    norms: dict[str, Number]
    """Quantile -> norm of a row, from at most `activations.outliers.SAMPLE` rows. `1`: the largest norm of all rows."""


class Dropped(Strict):
    """Rows that the store leaves out, including training rows (`activations.outliers.without_outliers`)."""

    max_norm_multiple: Number
    """Multiple of the median norm that the norms of these rows exceed."""
    share: Share


class Heldout(Strict):
    explained_variance: Number
    mse: Number
    l0: Number
    dead_share: Share
    outliers: Outliers | None = None
    """Absent if no row is an outlier."""
    dropped: Dropped | None = None
    """Absent if the store leaves no row out."""


class SAERecord(Strict):
    """One SAE: digests, facts, and figures on held-out rows."""

    candidate: bool
    """False: the SAE serves as a reference alone."""
    label: str
    condition: str
    """Name that SAEs of other seeds share."""
    checkpoint_sha256: Sha256
    identity: Sha256
    """Digest of the weights and of all settings that change encode or decode. Figures are stored under it."""
    facts: WholeFacts
    heldout: Heldout


def seed_names(seeds: Sequence[int | None]) -> list[str]:
    """Names of SAEs in evidence: seeds, or numbers if seeds are unknown."""
    return [str(i if seed is None else seed) for i, seed in enumerate(seeds)]


class SeedGroup(Strict):
    """n seeds of one configuration, named by content: a candidate, its control, its reference or its siblings."""

    condition: str
    facts: Facts
    """Facts that the SAEs share."""
    checkpoints: dict[Place, Sha256]
    """seed -> sha256 of the weights."""
    identities: dict[Place, Sha256]
    """seed -> identity (`SAERecord.identity`)."""

    @model_validator(mode="after")
    def _same_seeds(self) -> SeedGroup:
        if not self.checkpoints or self.checkpoints.keys() != self.identities.keys():
            raise ValueError("a checkpoint and an identity of each seed expected")
        if len(set(self.identities.values())) != len(self.identities):
            raise ValueError("identities: one SAE stands for several seeds")
        if not self.facts.model_fields_set.isdisjoint(OF_ONE_SEED):
            raise ValueError("facts: those that all of its SAEs share expected")
        return self

    @classmethod
    def of(cls, records: Sequence[SAERecord]) -> SeedGroup:
        """Group of these SAEs.

        Raises:
            BadInput: there is no SAE, the SAEs have several configurations, two have one seed, or an SAE occurs twice.
        """
        if not records:
            raise BadInput("checkpoint: no SAE of a candidate")
        shared, seeds = [r.facts.shared for r in records], seed_names([r.facts.seed for r in records])
        if other := next((i for i, facts in enumerate(shared) if facts != shared[0]), None):
            names = [name for name, value in shared[other] if getattr(shared[0], name) != value]
            raise BadInput(
                f"checkpoint: {records[0].label} and {records[other].label} differ in {', '.join(names)}: SAEs that "
                "differ in their seed alone expected"
            )
        if len(set(seeds)) < len(seeds):
            raise BadInput(f"checkpoint: two SAEs of one seed among {', '.join(seeds)}")
        trained_by_husai = shared[0].source == "husai"
        try:
            return cls(
                condition=records[0].condition if trained_by_husai else f"SAEs ({digest(shared[0].to_json())[:6]})",
                facts=shared[0],
                checkpoints=dict(zip(seeds, (r.checkpoint_sha256 for r in records), strict=True)),
                identities=dict(zip(seeds, (r.identity for r in records), strict=True)),
            )
        except ValidationError as error:
            labels = ", ".join(r.label for r in records)
            raise BadInput(f"checkpoint: {labels} are no seeds of one configuration ({refusal(error)})") from None


class Core(Strict):
    """SAEBench's core metrics."""

    ce_loss_score: Number
    ce_loss_with_sae: Number
    ce_loss_without_sae: Number
    ce_loss_with_ablation: Number
    kl_div_score: Number
    kl_div_with_sae: Number
    kl_div_with_ablation: Number
    tokens: int

    @model_validator(mode="after")
    def _scores_of_losses(self) -> Core:
        worst, loss, best = self.ce_loss_with_ablation, self.ce_loss_with_sae, self.ce_loss_without_sae
        if not same(self.ce_loss_score * (worst - best), worst - loss):
            raise ValueError("ce_loss_score: the share of the loss between ablation and the model's own expected")
        if not same(self.kl_div_score * self.kl_div_with_ablation, self.kl_div_with_ablation - self.kl_div_with_sae):
            raise ValueError("kl_div_score: the share of the divergence under ablation expected")
        return self


class ScoredRecord(SAERecord):
    core: Core


class Means(Strict):
    """Means over data sets."""

    test_auc: Number
    test_acc: Number
    test_f1: Number
    val_auc: Number


class Figures(Strict):
    means: dict[str, Means]
    test_auc: dict[str, list[Share]]
    """k -> one value for each data set."""
    auc_by_validation: Share | None = None

    @model_validator(mode="after")
    def _own_means(self) -> Figures:
        for k, values in self.test_auc.items():
            if not values or k not in self.means or not same(self.means[k].test_auc, sum(values) / len(values)):
                raise ValueError(f"means.{k}.test_auc: the mean of test_auc expected")
        if self.means.keys() != self.test_auc.keys() or not self.test_auc:
            raise ValueError("means: of the k of test_auc expected")
        if (self.auc_by_validation is None) != ("llm" in self.test_auc):
            raise ValueError("auc_by_validation: one of each but the model's own probe expected")
        return self


class ProbedRecord(Figures, ScoredRecord):
    """An SAE's probing figures."""


class Scores(Strict):
    """CE-Bench's three scores."""

    contrastive: Number
    independence: Number
    interpretability: Number


class PairScores(Strict):
    published: Scores
    corrected: Scores
    bound: Number
    normalised: Number
    normalised_of_pairs: list[Number]

    @model_validator(mode="after")
    def _own_means(self) -> PairScores:
        values, means = self.normalised_of_pairs, self.corrected.interpretability
        if not values or not same(self.normalised, sum(values) / len(values)):
            raise ValueError("normalised: the mean of normalised_of_pairs expected")
        if not same(self.normalised * self.bound, means):
            raise ValueError("normalised: corrected.interpretability as a share of the bound expected")
        return self


class PairRecord(PairScores, SAERecord):
    """An SAE's contrastive scores."""

    checkout: dict[str, Any] | None

    @model_validator(mode="after")
    def _own_bound(self) -> PairRecord:
        n = self.facts.d_sae
        if not same(self.bound, (n - 1) / n**0.5):
            raise ValueError(f"bound: the largest z of {n} numbers expected")
        return self


class Repeats(Strict):
    """An SAE's mean figure at further seeds of the benchmark (`estimates.noise`)."""

    means: Annotated[list[Number], Field(min_length=1)]
    sd: Number | None
    minimum_detectable_difference: Number | None

    @model_validator(mode="after")
    def _own_spread(self) -> Repeats:
        if self.sd is not None:
            expected, least = noise(self.means), self.minimum_detectable_difference
            if least is None or not all(
                map(same, (self.sd, least), (expected["sd"], expected["minimum_detectable_difference"]))
            ):
                raise ValueError("sd and minimum_detectable_difference: those of the means expected")
        elif self.minimum_detectable_difference is not None:
            raise ValueError("minimum_detectable_difference: none without sd expected")
        return self


class ProbingNoise(Strict):
    label: str
    seeds: list[int]
    auc: dict[str, Repeats]


class Draws(Strict):
    label: str
    seeds: list[int | None]
    """Seed of each draw of pairs; None: the run's own draw."""
    reason: str | None
    """Reason for which the draws measure no noise."""


class PairNoise(Repeats, Draws):
    """An SAE's mean score at further draws of pairs."""


class ProbedControl(Figures, SAERecord):
    """An SAE of the random-weights model."""


class PairControl(PairScores, SAERecord):
    """An SAE of the random-weights model."""


class Reference(Strict):
    """Part of a baseline summary's record that results keep."""

    condition: str
    facts: WholeFacts
    identity: Sha256
    normalised_of_pairs: list[Number]


class Probing(Strict):
    """Results of SAEBench's probing (phase `saebench_custom`)."""

    phase: Literal["saebench_custom"]
    inputs: dict[str, Sha256]
    subject: str
    subject_digest: Sha256
    hook_name: str
    data_sets: Names
    families: Names
    random_seed: int
    probing: ProbingName = "sae_probes"
    versions: Versions
    saes: list[ProbedRecord]
    controls: list[ProbedControl]
    baselines: dict[str, Figures]
    conditions: list[Any]
    """Computed again by the audit."""
    noise: ProbingNoise
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""

    @model_validator(mode="after")
    def _one_a_data_set(self) -> Probing:
        n = len(self.data_sets)
        if len(self.families) != n or len(set(self.data_sets)) != n:
            raise ValueError("data_sets: distinct names, and a family of each, expected")
        records: list[ProbedRecord | ProbedControl] = [*self.saes, *self.controls]
        for record in records:
            if str(K) not in record.test_auc or any(len(v) != n for v in record.test_auc.values()):
                raise ValueError(f"{record.label}: an AUC at k = {K} of each of {n} data sets expected")
        if any(len(v) != n for b in self.baselines.values() for v in b.test_auc.values()):
            raise ValueError(f"baselines: an AUC of each of {n} data sets expected")
        first = next((r for r in self.saes if r.label == self.noise.label), None)
        if first is None:  # the gate requires it; selection may have left that SAE out
            return self
        if self.noise.auc.keys() != first.test_auc.keys() or self.noise.seeds[:1] != [self.random_seed]:
            raise ValueError("noise: of the k of the SAE, from the run's own seed on, expected")
        for k, repeats in self.noise.auc.items():
            if len(repeats.means) != len(self.noise.seeds) or not same(repeats.means[0], first.means[k].test_auc):
                raise ValueError(f"noise.{k}: a mean of each seed, the run's own first, expected")
        return self


class Contrastive(Strict):
    """Results of the contrastive score (phase `cebench_custom`)."""

    phase: Literal["cebench_custom"]
    inputs: dict[str, Sha256]
    subject: str
    subject_digest: Sha256
    hook_name: str
    benchmark: ContrastiveName
    source: str
    pairs_digest: Sha256
    n_pairs: int
    stories_cut: int
    clusters: Names
    saes: list[PairRecord]
    controls: list[PairControl]
    untrained: list[PairScores]
    references: list[Reference]
    summary_refused: str | None
    no_reference: str | None
    """Reason why no SAE may serve as a reference."""
    conditions: list[Any]
    noise: PairNoise
    random_seed: int | None = None
    """Seed of the drawn pairs; present for single runs."""
    min_delta: Number | None = None
    """Requested minimum; present for single runs."""
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""

    @model_validator(mode="after")
    def _one_a_pair(self) -> Contrastive:
        if len(self.clusters) != self.n_pairs or len(self.untrained) != len(self.saes):
            raise ValueError("a cluster of each pair, and an untrained SAE beside each SAE, expected")
        scored: list[PairScores | Reference] = [*self.saes, *self.untrained, *self.controls, *self.references]
        for r in scored:
            if len(r.normalised_of_pairs) != self.n_pairs:
                raise ValueError(f"a score of each of {self.n_pairs} pairs expected")
        first = next((r for r in self.saes if r.label == self.noise.label), None)
        first_alone = [s is None for s in self.noise.seeds] == [True] + [False] * (len(self.noise.means) - 1)
        if not first_alone:
            raise ValueError("noise: a mean of each draw, the run's own first, expected")
        if first is not None and not same(self.noise.means[0], first.normalised):
            raise ValueError("noise: the run's own mean first expected")
        return self


class TrainedSAE(Strict):
    """A checkpoint of `training.grid`."""

    seed: int
    d_sae: int
    k: int
    learning_rate: Number
    order_seed: int
    family: str
    assignment_weight: Number
    reference: str | None
    checkpoint: str
    """Folder, relative to the output folder of the training."""
    checkpoint_sha256: Sha256
    heldout: Heldout
    l0_miss: Number
    """Share by which the held-out L0 misses k."""


class TrainedMember(TrainedSAE):
    """An SAE of a stability study, which trained it."""

    label: str


class Interval(Strict):
    """An `estimates.Estimate`."""

    estimate: Number
    low: Number | None
    high: Number | None
    standard_error: Number | None
    n_seeds: int
    method: str
    reason: str | None

    @classmethod
    def of(cls, estimate: Estimate) -> Interval:
        return cls(**estimate.to_json())

    @model_validator(mode="after")
    def _whole(self) -> Interval:
        low, high, error = self.low, self.high, self.standard_error
        if low is None or high is None or error is None:
            fits = (low, high, error) == (None, None, None)
        else:
            fits = low <= self.estimate <= high
        if not fits:
            raise ValueError("an interval around the estimate, or none, expected")
        return self


class Snapshot(Strict):
    step: int
    mcc: Interval
    pwmcc: Interval


class Convergence(Strict):
    from_step: int
    to_step: int
    moved: Interval
    converged: bool | None


Pairs = Annotated[list[dict[str, str | dict[str, Number]]], Field(min_length=1)]
"""{"a", "b": labels, "observed" and each null: score -> value} of each pair."""


class Spread(Strict):
    """Spread of a null over its draws, which the evidence does not keep."""

    mean: Number
    draws: Annotated[int, Field(ge=0)]
    q95_of_mean: Number | None


class ScoreSummary(Strict):
    observed: Interval
    nulls: dict[str, Spread]
    excess: dict[str, Interval]


class StabilityVerdict(Strict):
    score: str
    outcome: Literal["PASS", "FAIL", "MISSING"]
    reason: str
    sentence: str
    """Licensed statement (`rules.sentence`)."""
    highest_null: str
    claimable_excess: Interval
    equivalence: dict[str, bool | Number] | None
    """An `estimates.Equivalence`; None if the excess is above the registered minimum."""


class Stability(Strict):
    """Result of `stability.summarise`. The audit computes it again."""

    labels: Names
    scores: dict[str, ScoreSummary]
    mcc_gap_bound: Number
    missing_nulls: dict[str, str]
    verdict: StabilityVerdict


class Scored(Strict):
    """All pairs of SAEs, scored against their nulls. The audit computes `stability` again from `pairs`."""

    stability: Stability
    pairs: Pairs

    def scores(self, null: str | None = None, score: str = PRIMARY_SCORE) -> np.ndarray:
        """Score of each pair, less that of a null if one is named, `[S, S]`."""
        labels = self.stability.labels
        pairs: list[dict] = self.pairs
        matrix = np.zeros((len(labels), len(labels)))
        for pair in pairs:
            i, j = labels.index(pair["a"]), labels.index(pair["b"])
            below = pair[null][score] if null else 0.0
            matrix[i, j] = matrix[j, i] = pair["observed"][score] - below
        return matrix

    @model_validator(mode="after")
    def _whole(self) -> Scored:
        pairs: list[dict] = self.pairs
        named = [frozenset(p) for p in pairs]
        scored = [value for p in pairs for name, value in p.items() if name not in ("a", "b")]
        keys = {frozenset(value) if isinstance(value, dict) else None for value in scored}
        if len(set(named)) != 1 or len(keys) != 1 or keys - {frozenset((*scores, GAP)) for scores in SCORED}:
            raise ValueError("pairs: the same nulls, and the same scores of each, expected of all")
        if not {"a", "b", "observed"} <= named[0] or not all(isinstance(p[x], str) for p in pairs for x in ("a", "b")):
            raise ValueError("pairs: two labels, and what was observed, expected of each")
        if any(not 0 <= value[GAP] <= self.stability.mcc_gap_bound for value in scored):
            raise ValueError(f"pairs: a {GAP} beyond the one that is said")
        return self


class OnStore(Strict):
    """Activation store whose principal components define the spectral null."""

    subject_digest: Sha256
    hook_name: str
    store_digest: Sha256
    rows: int
    d_in: int
    effective_rank: Number


class AlikeMember(Strict):
    seed: int | None
    """None: unknown, for user-supplied SAEs."""
    checkpoint: str | None
    checkpoint_sha256: Sha256
    heldout: Heldout

    @classmethod
    def of(cls, sae: TrainedSAE) -> AlikeMember:
        return cls(**{name: getattr(sae, name) for name in cls.model_fields})


class Alike(Strict):
    """SAEs trained by the same recipe on a control."""

    subject_digest: Sha256
    store_digest: Sha256
    members: list[AlikeMember]

    def inputs(self, name: str) -> dict[str, str]:
        """Inputs of results that use these SAEs: label -> sha256."""
        checkpoints = {f"{name}: checkpoint {i}": m.checkpoint_sha256 for i, m in enumerate(self.members, 1)}
        return {f"{name}: subject": self.subject_digest, f"{name}: activations": self.store_digest} | checkpoints


class Stratum(Strict):
    """Matched alive features with a figure in [low, high), over all pairs and both sides. Strata decide nothing."""

    figure: str
    low: Number
    high: Number
    features: Number
    """Mean number of features for each SAE."""
    mcc: Number | None
    """None if no feature lies in the stratum. The same holds for `share70`."""
    share70: Number | None

    @model_validator(mode="after")
    def _empty(self) -> Stratum:
        if (self.features == 0) != (self.mcc is None) or (self.mcc is None) != (self.share70 is None):
            raise ValueError("a stratum has figures if it has features")
        return self


def _every_stratum(strata: list[Stratum]) -> list[Stratum]:
    edges: dict[str, list[tuple]] = {}
    for s in strata:
        edges.setdefault(s.figure, []).append((s.low, s.high))
    if any(edges[figure] != [*pairwise(STRATA.get(figure, ()))] for figure in edges):
        raise ValueError("strata: each stratum of a figure once expected, in order")
    return strata


Strata = Annotated[list[Stratum], AfterValidator(_every_stratum)]
"""Matched alive features by each figure of STRATA that is known."""


class Comparison(Scored, OnStore):
    """All pairs of SAEs on one store (`stability.study.compare_all`)."""

    gaussian: Alike | None
    """SAEs of Gaussian rows. None: not part of the study."""
    others: list[int] | None
    """Number of each SAE's alive features that are like no prototype. None: the study has no prototypes."""
    strata: Strata

    @model_validator(mode="after")
    def _all_reported(self) -> Comparison:
        if (self.others is None) == (OTHERS[0] in self.stability.scores):
            raise ValueError("others: expected with scores of features that are like no prototype, and else null")
        if self.others is not None and (len(self.others) != len(self.stability.labels) or min(self.others) < 0):
            raise ValueError("others: a number of features of each SAE expected")
        _strata_where_matched(self, self.strata)
        return self


def _strata_where_matched(scored: Scored, strata: list[Stratum]) -> None:
    """Raise ValueError for features that match and are not reported in strata."""
    pairs: list[dict] = scored.pairs
    if not strata and any(p["observed"].get(PRIMARY_SCORE, 0) > 0 for p in pairs):
        raise ValueError("strata: expected where features match")


M = TypeVar("M", bound="TrainedMember | OwnMember")


class Members(Strict, Generic[M]):
    members: Annotated[list[M], Field(min_length=1)]


class Compared(Comparison, Members[M], Generic[M]):
    """A comparison and the compared SAEs."""

    @property
    def control_inputs(self) -> dict[str, str]:
        """Inputs of results due to the SAEs of Gaussian rows: label -> sha256."""
        return {} if self.gaussian is None else self.gaussian.inputs("gaussian")

    @property
    def checkpoints(self) -> dict[str, str]:
        """seed -> sha256 of the weights, as in a `SeedGroup`."""
        seeds = seed_names([m.seed for m in self.members])
        return dict(zip(seeds, (m.checkpoint_sha256 for m in self.members), strict=True))

    @model_validator(mode="after")
    def _own_labels(self) -> Compared:
        labels, seeds = [m.label for m in self.members], [m.seed for m in self.members]
        named = labels == [f"seed{seed}" for seed in seeds] or set(seeds) == {None}
        if labels != self.stability.labels or len(set(labels)) != len(labels) or not named:
            raise ValueError("members: the labels of the stability study, seed<seed> of each whose seed is known")
        return self


class OwnMember(Strict):
    """An SAE under test."""

    label: str
    seed: int | None
    checkpoint_sha256: Sha256
    heldout: Heldout


class OwnSection(Compared[OwnMember]):
    """Comparison of the SAEs under test."""


class Followed(Strict):
    """SAEs followed over training (`stability.study.over_training`)."""

    over_training: list[Snapshot]
    convergence: Convergence


class Section(Followed, Compared[TrainedMember]):
    """SAEs that a study trained (`stability.study.score_trained`)."""

    @model_validator(mode="after")
    def _own_seeds(self) -> Section:
        n = len(self.members)
        followed = [self.convergence.moved, *(e for s in self.over_training for e in (s.mcc, s.pwmcc))]
        if any(e.n_seeds != n for e in followed):
            raise ValueError(f"over_training, convergence: of {n} seeds expected")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Phases that train their SAEs


class InOrder(Strict):
    """Base of types whose keys keep the order in which they were first published."""

    KEYS: ClassVar[tuple[str, ...]]

    @classmethod
    def __pydantic_init_subclass__(cls, **given: Any) -> None:
        """Raise TypeError for a field that KEYS lacks, because it would not be written."""
        if not set(cls.model_fields) <= set(cls.KEYS):
            raise TypeError(f"{cls.__name__}.KEYS: {', '.join(set(cls.model_fields) - set(cls.KEYS))} expected too")

    @model_serializer(mode="wrap")
    def _in_order(self, write: Callable) -> dict[str, Any]:
        values = write(self)
        return {name: values[name] for name in self.KEYS if name in values}


class Drawn(InOrder):
    """Histograms of a comparison, for figures. They decide nothing."""

    KEYS = (
        *("members", "curve_steps", "snapshot_steps", *OnStore.model_fields, "spectral_groups"),
        *(*Scored.model_fields, "histogram_bins", "histograms", *Followed.model_fields),
        *("gaussian", "others", "strata", "random_model", "cross_entropy", "notes"),
    )
    spectral_groups: list[int]
    """Sizes of the groups of principal components that the spectral null rotates."""
    histogram_bins: list[Number]
    histograms: dict[str, list[int]]
    """`observed` or a null -> counts of the matched cosines of alive features."""


class GridMember(TrainedSAE, InOrder):
    """An SAE of a grid, with its training curve."""

    KEYS = ("hook_name", *TrainedSAE.model_fields, "curve", "aux_steps")
    hook_name: str | None = None
    """Absent for SAEs of a store."""
    curve: list[Number]
    """‖x − x̂‖² / variance on the batches at `Grid.curve_steps`."""
    aux_steps: int
    """Number of steps on which the SAE had dead features."""


class Grid(Strict):
    """SAEs of one training (`training.grid`)."""

    members: Annotated[list[GridMember], Field(min_length=1)]
    curve_steps: list[int]
    snapshot_steps: list[int]
    """Steps at which each checkpoint keeps the decoder."""


class Phase4aMember(TrainedMember, InOrder):
    KEYS = (*TrainedSAE.model_fields, "curve", "aux_steps", "label")
    curve: list[Number]
    aux_steps: int


class CrossEntropy(Strict):
    """Losses of a language model with each SAE spliced in (`training.recovered`)."""

    model: Number
    zeroed: Number
    spliced: list[Number]
    kl_zeroed: Number
    kl_spliced: list[Number]
    tokens: int
    recovered: list[Number]


class Phase4aSection(Drawn, Section):
    members: Annotated[list[Phase4aMember], Field(min_length=1)]  # type: ignore[assignment]  # pydantic: narrowed
    curve_steps: list[int]
    snapshot_steps: list[int]
    random_model: list[AlikeMember] | None = None
    """SAEs of the random-weights model, if the subject is a language model."""
    cross_entropy: CrossEntropy | None = None
    """Losses, if the subject is a language model."""


class SuppliedMember(OwnMember):
    seed: int | None = None
    """Optional, because phase 4a does not write it."""


class Phase4aSupplied(Drawn, OwnSection):
    """Comparison of user-supplied SAEs."""

    members: Annotated[list[SuppliedMember], Field(min_length=1)]  # type: ignore[assignment]  # pydantic: narrowed
    notes: list[str] = []
    """Notes on the SAEs (`stability.replicates`)."""


class PlantedRows(Strict):
    """Rows generated from planted features (`subjects.planted`)."""

    structure: Literal["independent", "correlated", "hierarchical"]
    features: Annotated[int, Field(ge=1)]
    d_in: Annotated[int, Field(ge=1)]
    active: Annotated[int, Field(ge=1)]
    """Mean number of active features a row."""
    rows: Annotated[int, Field(ge=1)]
    seed: int

    @model_validator(mode="after")
    def _halves(self) -> PlantedRows:
        if self.structure == "hierarchical" and self.features % 2:
            raise ValueError("features: an even number expected, because each parent has one child")
        return self

    @property
    def digest(self) -> str:
        """Digest of the subject that a store of these rows names."""
        return digest({"planted features": self.to_json()})


class PlantedDegree(Strict):
    """SAEs of planted rows, trained for one number of tokens."""

    tokens: int
    recovery: Annotated[list[Share], Field(min_length=1)]
    """Signed mean cosine of the planted features with each SAE's decoder (`stability.recovery`)."""
    study: Section

    @model_validator(mode="after")
    def _one_a_member(self) -> PlantedDegree:
        if len(self.recovery) != len(self.study.members):
            raise ValueError("recovery: one value for each SAE expected")
        return self


class Sensitivity(Strict):
    """Verdict on SAEs at one degree of recovery."""

    tokens: int
    recovery: Interval
    over: str | None
    """Name of the estimate that is nearest to failing. None: there is no verdict."""
    excess: Interval | None
    passes: bool
    reason: str


class PlantedSection(Strict):
    """The positive control: SAEs that recover planted features to several degrees."""

    data: PlantedRows
    batch_size: int
    degrees: Annotated[list[PlantedDegree], Field(min_length=1)]
    """Degrees in the order of their tokens. The last one decides."""
    sensitivity: list[Sensitivity]


class Phase4a(Strict):
    """Results of `run_phase4a_reproduction.py`."""

    phase: Literal["4a"]
    inputs: dict[str, Sha256]
    husai: Annotated[
        Annotated[Phase4aSection, Tag("trained")] | Annotated[Phase4aSupplied, Tag("supplied")],
        Discriminator(lambda value: "trained" if has(value, "over_training") else "supplied"),
    ]
    published: Phase4aSection | None = None
    """SAEs in the earlier study's setting."""
    published_figures: dict[str, Any]
    planted: PlantedSection | None = None
    """The positive control; present if the phase ran on its default subject."""


class Gain(Strict):
    """Gain of an arm over its control: in PRIMARY_SCORE, and in its excess over each required null."""

    observed: Interval
    isotropic: Interval
    spectral: Interval
    gaussian: Interval | None = None
    """None: not part of the study."""
    least: Literal["isotropic", "spectral", "gaussian"]
    """Null over which the gain has the lowest lower end."""

    @property
    def over(self) -> dict[str, Interval]:
        """Required null -> gain in the excess over this null."""
        return {null: e for null in GATED_NULLS if (e := getattr(self, null)) is not None}

    @model_validator(mode="after")
    def _over_least(self) -> Gain:
        if self.least not in self.over:
            raise ValueError("least: one of the nulls that the gain is over expected")
        return self

    @property
    def over_least(self) -> Interval:
        return self.over[self.least]


class AblationNames(Strict):
    name: str
    axes: list[str]
    """Axes of the condition: k, d_sae."""
    family: str
    d_sae: int
    k: int


class MethodNames(Strict):
    name: str
    d_sae: int
    rows_seen: int


class Reached(Section):
    """Means over seeds on held-out rows."""

    explained_variance: Interval
    l0: Interval
    dead_share: Interval


class AblationRow(Reached, AblationNames):
    """A condition of the axes."""


class AblationMethod(Reached, MethodNames):
    """A method that is said to raise stability. The first one is the unchanged recipe, which has no gain."""

    gain: Gain | None = None
    ev_drop: Interval | None = None


class RefusedControl(Strict):
    """SAEs that share an initialisation or a decoder, and must be refused."""

    name: str
    refused: str | None
    """Reason of the refusal. None: they were not refused."""


class CoreAblations(Strict):
    """Results of `run_core_ablations.py`."""

    phase: Literal["core_ablations"]
    inputs: dict[str, Sha256]
    hook_name: str
    d_in: int
    effective_rank: Number
    rows_seen: int
    rows: Annotated[list[AblationRow], Field(min_length=1)]
    methods: list[AblationMethod]
    controls: list[RefusedControl]

    @model_validator(mode="after")
    def _gains_over_the_first(self) -> CoreAblations:
        for i, method in enumerate(self.methods):
            if (method.gain is None, method.ev_drop is None) != (i == 0, i == 0):
                raise ValueError(f"methods.{i}: a gain and a drop of each method but the first expected")
        return self


class Sparsity(Strict):
    k: int
    lower_bound: Number | None
    """Smallest lower end of the excess (`contrast.lower_bound`)."""
    explained_variance: Interval


class SparsitySection(Section, Sparsity):
    """SAEs of one k."""


class AdaptiveL0(Strict):
    """Results of `run_adaptive_l0_calibration.py`."""

    phase: Literal["adaptive_l0_calibration"]
    inputs: dict[str, Sha256]
    hook_name: str
    d_sae: int
    rows_seen: int
    ev_floor: Number
    control_k: int
    chosen_k: int | None
    gain: Gain | None
    ev_drop: Interval | None
    outcome: str
    selection: list[SparsitySection]
    confirmation: list[SparsitySection]
    """The chosen k on fresh seeds, and the control's k if it differs."""

    @model_validator(mode="after")
    def _gain_of_two(self) -> AdaptiveL0:
        ks = [] if self.chosen_k is None else list(dict.fromkeys([self.chosen_k, self.control_k]))
        if [s.k for s in self.confirmation] != ks:
            raise ValueError("confirmation: the chosen k, and the control's where it is another, expected")
        two_confirmations = len(ks) == 2
        if (self.gain is not None, self.ev_drop is not None) != (two_confirmations, two_confirmations):
            raise ValueError("gain, ev_drop: of two confirmations, and of no fewer, expected")
        return self


LAMBDA = Field(alias="lambda")


def pull(weight: float | None) -> dict[str, Any]:
    """Keyword argument for the λ of a schema, because `lambda` is no name in Python."""
    return {"lambda": weight}


class Pull(Strict):
    weight: Annotated[Number, LAMBDA]

    def given(self) -> dict[str, Any]:
        """Fields, by the names that a schema takes."""
        return {"lambda" if name == "weight" else name: value for name, value in self}


class Pulled(Pull):
    gain: Gain
    ev_drop: Interval


class UnpulledSection(Section, Pull):
    """SAEs at λ = 0, on fresh seeds."""


class PulledSection(Section, Pulled):
    """SAEs that were pulled towards references, against those at λ = 0."""


class ReferenceName(Strict):
    sha256: Sha256


class ReferenceSection(PulledSection, ReferenceName):
    """SAEs that were pulled towards one reference."""


class SharedArm(Pull):
    """SAEs whose seeds all share one reference, for several references."""

    gain: Gain
    leave_one_reference_out: list[Gain]
    gain_counting_the_reference: Number
    """Gain of `mcc_alive` with the reference counted as one of the SAEs, as in the earlier study."""
    references: Annotated[list[ReferenceSection], Field(min_length=1)]


class Acceptance(Strict):
    accepted: bool
    outcome: str
    rule: str
    weight: Annotated[Number | None, LAMBDA]
    reason: str


class AssignmentConsistency(Strict):
    """Results of `run_assignment_consistency_v2.py`."""

    phase: Literal["assignment_consistency_v2"]
    inputs: dict[str, Sha256]
    hook_name: str
    d_sae: int
    k: int
    rows_seen: int
    max_ev_drop: Number
    acceptance: Acceptance
    control: Section
    own: list[PulledSection]
    shared: list[SharedArm]
    confirmation: list[
        Annotated[
            Annotated[UnpulledSection, Tag("control")] | Annotated[PulledSection, Tag("pulled")],
            Discriminator(lambda value: "pulled" if has(value, "gain") else "control"),
        ]
    ]
    """λ = 0 and the chosen λ on fresh seeds. Empty: no λ was chosen."""

    @property
    def confirmed(self) -> tuple[UnpulledSection, PulledSection] | None:
        match self.confirmation:
            case [UnpulledSection() as control, PulledSection() as pulled]:
                return control, pulled
        return None

    @model_validator(mode="after")
    def _two_or_none(self) -> AssignmentConsistency:
        if self.confirmation and self.confirmed is None:
            raise ValueError("confirmation: λ = 0 and the chosen λ, or nothing, expected")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Studies of banks, and the candidate


class Condition(Strict):
    """Values of a study's axes."""

    family: str
    d_sae: int
    k: int
    budget: int


class ConditionSection(Section, Condition):
    """Comparison of the SAEs of one condition of a bank."""


class Recipe(Strict):
    """Settings that, with a condition, suffice to train and evaluate on a bank again."""

    rows: int
    batch_size: int
    learning_rate: Number
    null_draws: int
    heldout_rows: int
    probe_ks: list[int]
    noise_seeds: list[int]
    max_pairs: int
    probing: ProbingName = "sae_probes"
    core_texts: int = 200
    text: str = "packaged"
    """Source of the bank's text (`subjects.sources.TextSource`)."""
    max_norm_multiple: Number | None = None
    """Multiple of the median norm above which the bank leaves rows out. Absent: no row is left out."""


class Coded(Strict):
    """Code quality of SAEs, or of dictionaries of one kind of prototypes: one value for each seed."""

    explained_variance: dict[Place, Number]
    ce_recovered: dict[Place, Number] | None
    """None: the subject is no language model."""


class CodeGain(Strict):
    """Gain in code quality of SAEs over dictionaries of one kind of prototypes."""

    explained_variance: Interval
    ce_recovered: Interval | None


CODE_FIGURES = {"explained_variance": "explained variance", "ce_recovered": "CE recovered"}
"""Field of `Coded` -> its name."""


class Code(Strict):
    """Code quality of SAEs and of dictionaries of prototypes at the same width and L0 (`stability.prototypes`)."""

    store_digest: Sha256
    """Activations that the prototypes were made from."""
    heldout_digest: Sha256
    """Activations that were coded."""
    d_sae: int
    k: dict[Place, int]
    """Seed -> rounded L0 of its SAE, the number of prototypes that code a row."""
    tokens: int | None
    """Number of predicted tokens for CE recovered."""
    saes: Coded
    prototypes: Annotated[dict[Literal["rows", "centroids", "token means"], Coded], Field(min_length=1)]
    """Kind -> figures at each seed's k."""
    gain: dict[str, CodeGain]
    """Kind -> gain of the SAEs over it (`rules.gain_over_prototypes`). The audit computes it again."""

    def best(self, figure: str) -> str:
        """Kind of prototypes with the highest mean of a figure."""
        return max(self.prototypes, key=lambda kind: sum(getattr(self.prototypes[kind], figure).values()))

    @model_validator(mode="after")
    def _same_seeds(self) -> Code:
        all_coded = [self.saes, *self.prototypes.values()]
        spliced = [c.ce_recovered for c in all_coded]
        keys = [c.explained_variance.keys() for c in all_coded] + [c.keys() for c in spliced if c is not None]
        if not self.k or any(each != self.k.keys() for each in keys):
            raise ValueError("code: figures of the same seeds expected")
        if (None in spliced) != (self.tokens is None) or (None in spliced and any(spliced)):
            raise ValueError("code: CE recovered of all, and its tokens, or of none expected")
        return self


class Evaluated(Strict):
    """SAEs of one hook, on the external benchmarks."""

    saebench: Probing | None
    cebench: Contrastive | None
    hook_name: str
    inputs: dict[str, Sha256]
    saes: list[ScoredRecord]
    code: Code | None = None
    """Code quality of the candidate's SAEs; present for confirmations."""
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""


class Bank(Strict):
    """One bank of a study (`evals.bank.run`)."""

    saebench: Probing | None
    cebench: Contrastive | None
    hook_name: str
    store_digest: Sha256
    rows: int
    train_rows: Annotated[int, Field(gt=0)]
    inputs: dict[str, Sha256]
    saes: list[ScoredRecord]
    sections: list[ConditionSection]
    recipe: Recipe
    conditions: list[Any]
    code: Code | None = None
    """Code quality of the candidate's SAEs; present for confirmations."""


class Selected(Strict):
    sha256: Sha256
    id: Sha256


class Evaluation(Strict):
    """Evaluation of a candidate, which the gate reads (`run_candidate_confirmation.py`)."""

    phase: Literal["candidate_confirmation"]
    origin: Literal["retrained", "supplied"] = "retrained"
    inputs: dict[str, Sha256]
    subject: str
    candidate: SeedGroup
    paths: dict[str, str]
    """seed -> path of the checkpoint, relative to the folder of these results."""


class LedgerEntry(Strict):
    """Entry for one confirmation of a configuration, by digests."""

    selection: Sha256
    candidate: Sha256
    """Digest of the configuration (`Selected.id`)."""
    seeds: Annotated[list[int], Field(min_length=1)]
    saes: Sha256
    """Digest of the SAEs' identities, in order of seeds."""

    @classmethod
    def of(cls, selection: Selected, candidate: SeedGroup) -> LedgerEntry:
        return cls(
            selection=selection.sha256,
            candidate=selection.id,
            seeds=[int(seed) for seed in candidate.checkpoints],
            saes=digest(candidate.identities),
        )


class Retrained(Evaluation):
    """Evaluation of the selected recipe, trained again on fresh seeds."""

    origin: Literal["retrained"] = "retrained"
    selection: Selected
    attempt: int
    """Number of confirmations of this configuration, including this one."""
    ledger: list[LedgerEntry]
    """Entries of these confirmations, the earliest first."""
    bank: Bank

    @model_validator(mode="after")
    def _own_attempt(self) -> Retrained:
        entries = self.ledger
        if entries[-1:] != [LedgerEntry.of(self.selection, self.candidate)]:
            raise ValueError("ledger: this confirmation as the last entry expected")
        if any(e.candidate != self.selection.id or e in entries[:i] for i, e in enumerate(entries)):
            raise ValueError("ledger: distinct confirmations of this configuration alone expected")
        if self.attempt != len(entries):
            raise ValueError(f"attempt: {len(entries)} expected, the number of entries of the ledger")
        return self

    @property
    def section(self) -> ConditionSection:
        return self.bank.sections[0]


class Control(Scored, Alike):
    """Stability study of SAEs of one draw of the random weights, on activations of that draw."""

    gaussian: Alike
    """SAEs of Gaussian rows with the same moments as these activations."""
    strata: Strata

    @model_validator(mode="after")
    def _all_reported(self) -> Control:
        _strata_where_matched(self, self.strata)
        return self


class Harvested(Strict):
    """How a text became activations, in SAELens' names (`subjects.harvesting`).

    `unknown`: no file beside the SAEs states the value, and HUSAI used its own.
    """

    prepend_bos: bool | Literal["unknown"]
    context_size: int | Literal["unknown"]
    """Largest number of tokens of an input."""
    seqpos_slice: list[int | None] | Literal["unknown"]
    exclude_special_tokens: list[int] | Literal["unknown"]
    """Tokens that give no rows."""
    hook_head_index: int | None = None
    """Absent: all heads."""
    center_writing_weights: bool | Literal["unknown"]
    autocast_lm: bool | Literal["unknown"]
    max_norm_multiple: Number | None = None
    """Multiple of the median norm above which rows are left out. Absent: no row is left out."""
    dtype: str
    revision: str


class Supplied(Evaluation):
    """Evaluation of user-supplied SAEs. HUSAI cannot see how they were selected."""

    origin: Literal["supplied"]
    untrained: dict[str, Sha256] | None
    """seed -> sha256 of the file that holds its untrained state."""
    section: OwnSection
    bank: Evaluated
    notes: list[str] = []
    """Notes on the SAEs (`stability.replicates`)."""
    same_model: str | None = None
    """Name of the model in the SAEs' files, if --same-model alone identifies it with the subject."""
    harvesting: Harvested | None = None
    """How the SAEs' activations were made. Absent for SAEs that HUSAI trained in its own way."""


def read_evaluation(results: Any) -> Retrained | Supplied:
    """Evaluation of a candidate from results.

    Raises:
        ValidationError: the results are no evaluation.
    """
    supplied = isinstance(results, dict) and results.get("origin") == "supplied"
    return Supplied.model_validate(results) if supplied else Retrained.model_validate(results)


class RandomModelStress(Strict):
    """Results of `run_random_model_stress_eval.py`."""

    phase: Literal["random_model_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: SeedGroup
    section: OwnSection
    random_models: Annotated[list[Control], Field(min_length=1)]
    """One study for each draw of the weights."""
    gains: list[Gain]
    """Gains of the candidate over each draw."""
    verdict: dict[str, str]
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""


class Setting(Strict):
    """Setting of the transcoders' training."""

    hook_in: str
    """Hook whose activations the transcoders read."""
    hook_out: str
    """Hook whose activations the transcoders reconstruct: the candidate's hook."""
    d_sae: int
    k: int
    tokens: int
    batch_size: int
    learning_rate: Number
    seeds: list[int]
    subject_digest: Sha256
    preregistered: bool
    """Whether the setting was fixed in advance (`transcoder.preregistered`)."""


class TranscoderStress(Strict):
    """Results of `run_transcoder_stress_eval.py`."""

    phase: Literal["transcoder_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: SeedGroup
    setting: Setting
    section: OwnSection
    """Comparison of the candidate's SAEs with each other."""
    transcoder: Section
    """Comparison of transcoders with each other."""
    across: Comparison
    """Comparison of the candidate's SAEs with transcoders of other seeds (`stability.study.compare_across`)."""
    gain: Gain | None
    """Gain of transcoders among themselves over the candidate's SAEs; None: not concluded yet."""
    explained_variance: dict[str, Interval]
    verdict: dict[str, str]
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""


class SideBySide(Strict):
    """Figures of data sets (`id`) and of their shifted versions (`ood`)."""

    id: list[Share]
    ood: list[Share]


class Model(SideBySide):
    """Figures of the model's own activations."""

    ood_low: list[Share]
    """Lower ends of the intervals of `ood`."""


class ShiftedSAE(Strict):
    identity: Sha256
    seed: int | None
    test_auc: dict[str, SideBySide]


class Shifted(Strict):
    data_sets: Names
    families: Names
    prompts: list[int]
    """Number of prompts of each shifted version."""
    k: str
    random_seed: int
    llm: Model
    saes: Annotated[list[ShiftedSAE], Field(min_length=1)]
    drop: dict[str, Any]
    drop_where_kept: dict[str, Any]

    @model_validator(mode="after")
    def _one_a_data_set(self) -> Shifted:
        n = len(self.data_sets)
        sides = [self.llm, *(s.test_auc[self.k] for s in self.saes if self.k in s.test_auc)]
        if len(sides) != 1 + len(self.saes) or len(self.families) != n or len(set(self.data_sets)) != n:
            raise ValueError(f"distinct data sets, and an AUC at k = {self.k} of each SAE, expected")
        if any(len(values) != n for side in sides for values in (side.id, side.ood)):
            raise ValueError(f"a figure of each of {n} data sets expected")
        if len(self.llm.ood_low) != n:
            raise ValueError(f"llm.ood_low: one of each of {n} data sets expected")
        return self


class OODStress(Strict):
    """Results of `run_ood_stress_eval.py`."""

    phase: Literal["ood_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: SeedGroup
    rule: dict[str, Number]
    shifted: Shifted
    families: dict[str, Any] | None
    activations: dict[str, Any]
    probing: ProbingName = "sae_probes"
    versions: Versions
    skipped: dict[str, str]
    text: str = "packaged"
    """Source of the held-out text (`subjects.sources.TextSource`)."""


class Split(Strict):
    selection_families: Names
    gate_families: Names
    gate_data_sets: list[str]

    @model_validator(mode="after")
    def _apart(self) -> Split:
        if set(self.selection_families) & set(self.gate_families):
            raise ValueError("a family that selection read is left for the gate")
        return self


class Selection(Strict):
    """Results of `select_release_candidate.py`, strict policy."""

    phase: Literal["candidate_selection"]
    inputs: dict[str, Sha256]
    policy: Literal["strict"]
    rules: dict[str, Any]
    cohort: dict[str, Any]
    split: Split
    candidates: list[dict[str, Any]]
    excluded: list[dict[str, Any]]
    front: list[str]
    seeds_used: list[int]
    confirmation_seeds: int
    """Number of fresh seeds of the confirmation, which is fixed before it."""
    selected: dict[str, Any]
