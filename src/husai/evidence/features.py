"""The feature table: one row a feature of one SAE. `COLUMNS` is its data dictionary."""

from __future__ import annotations

from dataclasses import dataclass

from husai.evidence import rules


@dataclass(frozen=True)
class Column:
    """A column of the feature table."""

    dtype: str
    """pandas' name of its type. Nullable types hold `<NA>` where a figure does not exist."""
    meaning: str


COLUMNS: dict[str, Column] = {
    "feature": Column("int64", "number of the feature: its row of W_dec"),
    "statement": Column("string", f"what may be said of it: {', '.join(rules.STATEMENTS)}"),
    "recurs": Column("int64", "siblings in which it recurs (k)"),
    "siblings": Column("int64", "siblings that were asked (n)"),
    "low": Column(
        "float64", "one-sided 95 % Clopper–Pearson bound of the share of trainings in which it recurs"
    ),
    "certified": Column("boolean", "the bound reaches π; empty where nothing can be certified"),
    "above_chance": Column("boolean", "q_value is at most 0.05; empty where a test was not run"),
    "q_value": Column("Float64", "Benjamini–Hochberg over the alive features, on the larger of the two p-values"),
    "p_rotation": Column("Float64", "p-value against siblings rotated by the spectral null"),
    "p_permutation": Column("Float64", "p-value against SAEs of Gaussian rows, by permuting labels"),
    "similarity": Column(
        "float64", "mean over siblings of the largest signed decoder cosine with any feature of the sibling"
    ),
    "similarity_rotated": Column("Float64", "the same, of rotated siblings"),
    "similarity_gaussian": Column("Float64", "the same, of SAEs of Gaussian rows"),
    "partner_cosine": Column("float64", "mean over siblings of the decoder cosine with the one-to-one partner"),
    "partner_correlation": Column(
        "Float64", "mean over siblings of the held-out correlation of activations with the partner"
    ),
    "encoder_cosine": Column("Float64", "mean over siblings of the encoder cosine with the partner"),
    "nearest_sibling": Column("string", "sibling with the most similar partner"),
    "nearest_partner": Column("Int64", "number of that partner in the sibling"),
    "nearest_cosine": Column("Float64", "decoder cosine with that partner"),
    "prototype_cosine": Column("Float64", "cosine with the nearest token mean or centroid of other documents"),
    "prototype": Column(
        "string", "that prototype: the token, or `centroid`; empty below a cosine of 0.7"
    ),
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
    """The data dictionary, as a table of markdown."""
    lines = [f"| `{name}` | {column.dtype} | {column.meaning} |" for name, column in COLUMNS.items()]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *lines]) + "\n"
