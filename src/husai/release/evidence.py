"""Typed evidence: what selection and gate read of a phase's results. Strict: an unknown key, a string or boolean for a
number, NaN or null where a figure belongs is refused, with the place."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from husai.benchmarks import deltas

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Names = Annotated[list[str], Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def refusal(error: ValidationError) -> str:
    """The first thing that is wrong: where, and what was expected."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


class Facts(Strict):
    """How an SAE was made (`benchmarks.candidates.facts_of`), but for its seed and L0."""

    source: str
    subject_digest: Sha256 | None
    hook_name: str | None
    family: str
    d_in: int
    d_sae: int
    k: int | None
    learning_rate: Number | None
    tokens: int | None
    store_digest: Sha256 | None
    training: str | None
    control: str | None


class SeedFacts(Facts):
    l0: Number
    seed: int | None


class Heldout(Strict):
    explained_variance: Number
    mse: Number
    l0: Number
    dead_share: Share


class Record(Strict):
    """One SAE (`benchmarks.candidates.Candidate.to_json`)."""

    candidate: bool
    label: str
    condition: str
    checkpoint_sha256: Sha256
    identity: Sha256
    facts: SeedFacts
    heldout: Heldout


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


class ScoredRecord(Record):
    core: Core


class Figures(Strict):
    means: dict[str, dict[str, Number]]
    test_auc: dict[str, list[Share]]
    """k -> one a data set."""
    auc_by_validation: Share | None = None


class ProbedRecord(ScoredRecord, Figures):
    """An SAE's probing figures."""


class PairScores(Strict):
    published: dict[str, Number]
    corrected: dict[str, Number]
    bound: Number
    normalised: Number
    normalised_of_pairs: list[Number]


class PairRecord(Record, PairScores):
    """An SAE's contrastive scores."""

    checkout: Any


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
    versions: dict[str, str]
    saes: list[ProbedRecord]
    controls: list[Any]
    baselines: dict[str, Figures]
    conditions: list[Any]
    """Made again by the audit."""
    noise: dict[str, Any]

    @model_validator(mode="after")
    def _one_a_data_set(self) -> Probing:
        n = len(self.data_sets)
        if len(self.families) != n or len(set(self.data_sets)) != n:
            raise ValueError("data_sets: distinct names, and a family of each, expected")
        for record in self.saes:
            if deltas.K not in record.test_auc or any(len(v) != n for v in record.test_auc.values()):
                raise ValueError(f"{record.label}: an AUC at k = {deltas.K} of each of {n} data sets expected")
        return self


class Contrastive(Strict):
    """Results of the contrastive score (phase `cebench_custom`)."""

    phase: Literal["cebench_custom"]
    inputs: dict[str, Sha256]
    subject: str
    subject_digest: Sha256
    hook_name: str
    benchmark: Literal["cebench", "cebench_local_copy", "contrastive_local"]
    source: str
    pairs_digest: Sha256
    n_pairs: int
    stories_cut: int
    clusters: Names
    saes: list[PairRecord]
    controls: list[Any]
    untrained: list[PairScores]
    references: list[dict[str, Any]]
    summary_refused: str | None
    no_reference: str | None
    conditions: list[Any]
    noise: dict[str, Any]

    @model_validator(mode="after")
    def _one_a_pair(self) -> Contrastive:
        if len(self.clusters) != self.n_pairs or len(self.untrained) != len(self.saes):
            raise ValueError("a cluster of each pair, and an untrained SAE beside each SAE, expected")
        for r in [*self.saes, *self.untrained]:
            if len(r.normalised_of_pairs) != self.n_pairs:
                raise ValueError(f"a score of each of {self.n_pairs} pairs expected")
        return self


class Member(Strict):
    """An SAE of a stability study."""

    label: str
    seed: int
    checkpoint_sha256: Sha256
    heldout: Heldout
    # how it was trained (`training.grid`)
    checkpoint: str
    d_sae: int
    k: int
    learning_rate: Number
    order_seed: int
    family: str
    assignment_weight: Number
    reference: str | None
    l0_miss: Number


Pairs = Annotated[list[dict[str, str | dict[str, Number]]], Field(min_length=1)]
"""{"a", "b": labels, "observed" and each null: score -> value} of each pair."""


class Section(Strict):
    """A stability study (`stability.study.score_trained`, brief); the audit makes `stability` again from `pairs`."""

    members: Annotated[list[Member], Field(min_length=1)]
    subject_digest: Sha256
    hook_name: str
    store_digest: Sha256
    rows: int
    d_in: int
    effective_rank: Number
    stability: dict[str, Any]
    pairs: Pairs
    over_training: list[Any]
    convergence: dict[str, Any]

    @model_validator(mode="after")
    def _own_labels(self) -> Section:
        labels = [m.label for m in self.members]
        if labels != self.stability.get("labels") or len(set(labels)) != len(labels):
            raise ValueError("members: the labels of the stability study, each once, expected")
        if labels != [f"seed{m.seed}" for m in self.members]:
            raise ValueError("members: a label seed<seed> of each expected")
        return self


class ConditionSection(Section):
    """The study of one condition of a bank."""

    family: str
    d_sae: int
    k: int
    budget: int


class Recipe(Strict):
    """What it takes, beside a condition, to train on a bank again (`benchmarks.bank.RECIPE`)."""

    rows: int
    batch_size: int
    learning_rate: Number
    null_draws: int
    heldout_rows: int
    probe_ks: list[int]
    noise_seeds: list[int]
    max_pairs: int


class Bank(Strict):
    """One bank of a study (`benchmarks.bank.run`)."""

    saebench: Probing | None
    cebench: Contrastive | None
    hook_name: str
    store_digest: Sha256
    rows: int
    train_rows: int
    inputs: dict[str, Sha256]
    saes: list[ScoredRecord]
    sections: list[ConditionSection]
    recipe: Recipe
    conditions: list[Any]


class Binding(Strict):
    """Which SAEs evidence is about (`stress.candidate.block`)."""

    condition: str
    facts: Facts
    checkpoints: dict[str, Sha256]
    """seed -> sha256 of the weights."""
    identities: dict[str, Sha256]
    """seed -> digest of the weights and of how they are used."""

    @model_validator(mode="after")
    def _same_seeds(self) -> Binding:
        if not self.checkpoints or self.checkpoints.keys() != self.identities.keys():
            raise ValueError("a checkpoint and an identity of each seed expected")
        if len(set(self.identities.values())) != len(self.identities):
            raise ValueError("identities: one SAE stands for several seeds")
        return self


class Selected(Strict):
    sha256: Sha256
    id: Sha256


class Confirmation(Strict):
    """Results of `run_candidate_confirmation.py`: the candidate on fresh seeds."""

    phase: Literal["candidate_confirmation"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: Binding
    paths: dict[str, str]
    """seed -> checkpoint, from the folder of these results."""
    selection: Selected
    bank: Bank


class Alike(Strict):
    """SAEs trained alike on a control."""

    subject_digest: Sha256
    store_digest: Sha256
    members: list[dict[str, Any]]


class Control(Alike):
    """Of the random-weights subject, with the stability study of their own, on their own subject's activations."""

    stability: dict[str, Any]
    pairs: Pairs


class OwnMember(Strict):
    """An SAE under test."""

    label: str
    seed: int
    checkpoint_sha256: Sha256
    heldout: Heldout


class OwnSection(Strict):
    """Stability of the SAEs under test (`stability.study.compare_all`)."""

    members: Annotated[list[OwnMember], Field(min_length=1)]
    subject_digest: Sha256
    hook_name: str
    store_digest: Sha256
    rows: int
    d_in: int
    effective_rank: Number
    stability: dict[str, Any]
    pairs: Pairs


class RandomModelStress(Strict):
    """Results of `run_random_model_stress_eval.py`."""

    phase: Literal["random_model_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: Binding
    random_model: Control
    shuffled: Alike | None
    section: OwnSection
    gain: dict[str, Any] | None
    verdict: dict[str, str]


class Setting(Strict):
    """What transcoders and SAEs were trained on, and how."""

    preregistered: bool
    hook_in: str
    hook_out: str
    d_sae: int
    k: int
    tokens: int
    batch_size: int
    learning_rate: Number
    seeds: list[int]
    subject_digest: Sha256
    own_subject: bool
    """Whether a subject was named in place of the default one."""
    layer: int


class TranscoderStress(Strict):
    """Results of `run_transcoder_stress_eval.py`."""

    phase: Literal["transcoder_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: Binding | None
    setting: Setting
    transcoder: Section
    sae: Section
    gain: dict[str, Any]
    explained_variance: dict[str, Any]
    verdict: dict[str, str]


class SideBySide(Strict):
    """Figures of data sets as they are, and shifted."""

    id: list[Share]
    ood: list[Share]


class Model(SideBySide):
    """The model's own activations."""

    ood_low: list[Share] | None = None
    """Lower ends of the intervals of `ood`."""


class ShiftedSAE(Strict):
    identity: Sha256
    seed: int
    test_auc: dict[str, SideBySide]


class Shifted(Strict):
    data_sets: Names
    families: Names
    k: str
    prompts: list[int] | None = None
    """Of each shifted version."""
    random_seed: int
    llm: Model
    saes: Annotated[list[ShiftedSAE], Field(min_length=1)]
    drop: dict[str, Any]
    drop_where_kept: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_a_data_set(self) -> Shifted:
        n = len(self.data_sets)
        sides = [self.llm, *(s.test_auc[self.k] for s in self.saes if self.k in s.test_auc)]
        if len(sides) != 1 + len(self.saes) or len(self.families) != n or len(set(self.data_sets)) != n:
            raise ValueError(f"distinct data sets, and an AUC at k = {self.k} of each SAE, expected")
        if any(len(values) != n for side in sides for values in (side.id, side.ood)):
            raise ValueError(f"a figure of each of {n} data sets expected")
        return self


class OODStress(Strict):
    """Results of `run_ood_stress_eval.py`."""

    phase: Literal["ood_stress"]
    inputs: dict[str, Sha256]
    subject: str
    candidate: Binding
    rule: dict[str, Number]
    shifted: Shifted
    families: dict[str, Any] | None
    activations: dict[str, Any]
    versions: dict[str, str]
    skipped: dict[str, str]


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
    selected: dict[str, Any]
