"""Columns of the feature table (one row for each feature of an SAE) and types of its summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from husai.evidence import levels, rules
from husai.evidence.schemas import Heldout, Interval, Number, SAERecord, Sha256, Share, Strict


@dataclass(frozen=True)
class Column:
    """A column of the feature table."""

    dtype: str
    """pandas' name of the type. Nullable types hold `<NA>` if a figure does not exist."""
    meaning: str


COLUMNS: dict[str, Column] = {
    "feature": Column("int64", "number of the feature: its row of W_dec"),
    "statement": Column("string", f"what may be said of it: {', '.join(rules.STATEMENTS)}"),
    "recurs": Column("int64", "siblings in which it recurs (k)"),
    "siblings": Column("int64", "number of siblings (n)"),
    "low": Column(
        "Float64",
        "one-sided 95 % Clopper–Pearson bound of the share of trainings in which it recurs; empty if the "
        "siblings are no fresh trainings, as relatives",
    ),
    "certified": Column("boolean", "the bound reaches π, which few siblings never do; empty where `low` is"),
    "above_chance": Column("boolean", "q_value is at most 0.05; empty where a test was not run"),
    "q_value": Column(
        "Float64",
        "Benjamini–Hochberg on the larger of the two p-values, over alive features; prototype-like ones apart",
    ),
    "p_rotation": Column("Float64", "p-value against siblings rotated by the spectral null"),
    "p_permutation": Column("Float64", "p-value against SAEs of Gaussian rows, by permuting labels"),
    "similarity": Column(
        "float64", "mean over siblings of the largest signed decoder cosine with any feature of the sibling"
    ),
    "similarity_mutual": Column(
        "Float64",
        "the same, with 0 for a sibling whose feature is nearer to another one of this SAE; both tests read it",
    ),
    "similarity_rotated": Column(
        "Float64", "`similarity` with siblings that are rotated by the spectral null, all alike"
    ),
    "similarity_gaussian": Column("Float64", "`similarity`, of SAEs of Gaussian rows"),
    "partner_cosine": Column("float64", "mean over siblings of the decoder cosine with the one-to-one partner"),
    "partner_correlation": Column(
        "Float64", "mean over siblings of the held-out correlation of activations with the partner"
    ),
    "encoder_cosine": Column("Float64", "mean over siblings of the encoder cosine with the partner"),
    "nearest_sibling": Column("string", "sibling with the most similar partner"),
    "nearest_partner": Column("Int64", "number of that partner in the sibling"),
    "nearest_cosine": Column("Float64", "decoder cosine with that partner"),
    "prototype_cosine": Column("Float64", "cosine with the nearest token mean or centroid of other documents"),
    "prototype": Column("string", "that prototype: the token, or `centroid`; empty below a cosine of 0.7"),
    "rebuilt": Column(
        "int64",
        f"siblings in which it does not recur and at most {rules.REBUILT_BY} features rebuild its direction",
    ),
    "firing_rate": Column("float64", "share of held-out tokens on which it fires"),
    "mean_activation": Column("Float64", "mean activation on the held-out tokens on which it fires"),
    "dead": Column("boolean", "fires on no held-out token"),
    "dense": Column("boolean", f"fires on more than {rules.DENSE:.0%} of the held-out tokens"),
    "encoder_decoder_cosine": Column("Float64", "cosine between its encoder and its decoder direction"),
}
"""Column -> its type and meaning, in the order of the table."""


def dictionary() -> str:
    """The data dictionary: Markdown tables of the columns and of the statements."""
    lines = [f"| `{name}` | {column.dtype} | {column.meaning} |" for name, column in COLUMNS.items()]
    statements = [f"| {name} | {meaning} |" for name, meaning in rules.STATEMENTS.items()]
    columns = ["| column | type | meaning |", "|---|---|---|", *lines]
    return "\n".join([*columns, "", "| `statement` | meaning |", "|---|---|", *statements]) + "\n"


class Bars(Strict):
    """Thresholds of the statements. Each one is a flag."""

    cosine: Number = levels.RECURS_COSINE
    correlation: Number = levels.RECURS_CORRELATION
    certified_at: Share = levels.CERTIFIED_AT


class Sibling(Strict):
    """An SAE that the judged SAE is compared with."""

    label: str
    origin: Literal["trained", "supplied", "relative"]
    checkpoint_sha256: Sha256
    d_sae: int
    heldout: Heldout | None
    """None for a relative, because only its decoder is read."""
    partners: Share
    """Share of the judged SAE's features whose one-to-one partner reaches the threshold of decoder cosines."""


class Decile(Strict):
    """A tenth of the alive features, by firing rate."""

    low: Number
    high: Number
    features: int
    recur: Interval
    """Share of these features that recur in a sibling."""


class AboveChance(Strict):
    """Number of alive features that are marked as above chance. Prototype-like features are tested apart."""

    marked: int
    features: int
    """Number of alive features that are like no prototype."""
    prototypes_marked: int
    prototypes: int
    """Number of alive prototype-like features."""

    def sentence(self) -> str:
        """Both counts in words, without a full stop."""
        words = f"{self.marked:,} of {self.features:,} features"
        if not self.prototypes:
            return words
        return (
            f"{words}, prototype-like ones aside; {self.prototypes_marked:,} of {self.prototypes:,} prototype-like "
            "ones, which are tested apart"
        )


class SiblingTraining(Strict):
    """Recipe of the trained siblings."""

    family: str
    d_sae: int
    k: int
    tokens: int
    rows: int
    """Number of different activations among these tokens."""
    learning_rate: Number
    batch_size: int
    recipe: Literal["the SAE's own", "HUSAI's own, at the SAE's width and L0"]
    recipe_tokens: int | None
    """Number of tokens of the judged SAE's training. None: its files do not state it."""


class FeatureReliability(Strict):
    """Results of `run_feature_reliability.py`. The features are in a separate table."""

    phase: Literal["feature_reliability"]
    inputs: dict[str, str]
    """Label -> sha256 of each input."""
    subject: str
    hook_name: str
    text: str | None
    """Source of the text. None: the packaged text."""
    sae: SAERecord
    siblings: list[Sibling]
    training: SiblingTraining | None
    """None if no sibling was trained."""
    bars: Bars
    heldout_tokens: int
    rotations: int | None
    gaussian: int
    """Number of SAEs of Gaussian rows. 0: *above chance* is not tested."""
    statements: dict[str, int]
    """Statement -> number of features."""
    alive: int
    recur: Interval
    """Share of the alive features that recur in a sibling."""
    recur_others: Interval | None
    """The same share of alive features that are like no prototype. None if all are prototype-like."""
    certified: Share | None
    """Share of the alive features. None if nothing can be certified."""
    above_chance: AboveChance | None
    """None if chance is not tested."""
    deciles: list[Decile]
    in_every: list[Share]
    """Expected share of the alive features that recur in every one of j siblings, j = 1 … n."""
    in_some: list[Share]
    """Expected share of the alive features that recur in at least one of j siblings, j = 1 … n."""
    differs: bool | None
    """Whether the SAE's features recur less in siblings than siblings' features do, by the 95 % prediction interval for
    one more sibling. None: too few siblings."""
    among_siblings: list[Share]
    """Share of each sibling's features with a partner in the other siblings."""
    limits: list[str]
    """Limits of the statements, one sentence each."""
    notes: list[str]
    """Notes on the SAEs, one sentence each."""
    table_sha256: Sha256
    """Digest of features.csv."""
