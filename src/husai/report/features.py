"""The page of a feature table: all features in one table with sorting, filters and search, and contexts of features.

The page is one self-contained HTML file. It embeds the rows as columns, and a script draws the visible rows, because a
browser cannot hold tens of thousands of rows as elements.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup
from pydantic import ValidationError

from husai.evidence import rules
from husai.evidence.features import COLUMNS, AboveChance, FeatureReliability
from husai.evidence.schemas import Interval
from husai.report import glossary
from husai.report.evidence import Phase
from husai.report.markup import TEMPLATES, environment
from husai.report.text import percent
from husai.report.tiles import Tile

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4
"""Significant digits of a figure. More would double the file without any use."""
CONTEXT_BYTES = 9_000_000
"""Largest size of all contexts. A page of 16,384 features stays below 15 MB."""
TONES = {
    "certified": "pass",
    "certified, not above chance": "waived",
    "above chance": "pass",
    "recurs in some": "some",
    "prototype-like": "waived",
    "split or merged": "some",
    "not found": "missing",
    "withheld": "missing",
    "dead": "missing",
}
"""Statement -> its colour class on the page."""
NAMES = {
    "feature": "Feature",
    "statement": "Statement",
    "recurs": "Recurs in",
    "low": "At least",
    "q_value": "q-value",
    "partner_cosine": "Cosine",
    "partner_correlation": "Correlation",
    "firing_rate": "Fires on",
    "prototype": "Prototype",
}
"""Columns of the table -> their headers. The details of a row have all columns."""


def feature_page(results: dict, table: pd.DataFrame, contexts: Mapping[str, dict]) -> str:
    """HTML of the page.

    Args:
        results: `evidence.features.FeatureReliability` as JSON.
        table: one row for each feature, with the columns `evidence.features.COLUMNS`.
        contexts: feature -> its strongest contexts and those of its nearest partner (`evals.features.contexts`).

    Raises:
        ValidationError: `results` has another shape.
        KeyError: `table` lacks a column.
    """
    reliability = FeatureReliability.model_validate(results)
    kept, left_out = within(contexts, CONTEXT_BYTES)
    columns = {name: encoded(table[name].tolist()) for name in COLUMNS}
    numbers = {statement: i for i, statement in enumerate(rules.STATEMENTS)}
    data = {
        "columns": columns | {"statement": [numbers[name] for name in table["statement"]]},
        "statements": list(rules.STATEMENTS),
        "tones": [TONES[name] for name in rules.STATEMENTS],
        "meanings": rules.STATEMENTS,
        "names": NAMES,
        "about": {name: column.meaning for name, column in COLUMNS.items()},
        "peers": peers(reliability),
        "contexts": kept,
    }
    script = (TEMPLATES / "features.js").read_text()
    page = environment().get_template("features.html")
    return glossary.explain(
        page.render(
            r=reliability,
            peers=peers(reliability),
            compared=compared(reliability),
            tiles=tiles(reliability),
            statements=[(n, TONES[n], reliability.statements.get(n, 0), m) for n, m in rules.STATEMENTS.items()],
            columns=COLUMNS,
            names=NAMES,
            left_out=left_out,
            deciles=[(f"{d.low:.2g}", f"{d.high:.2g}", d.features, d.recur) for d in reliability.deciles],
            terms=[*glossary.TERMS.values()],
            data=Markup(embedded(data)),
            script=Markup(script),
            script_sha=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Embedded data


def encoded(values: list) -> list:
    """JSON values of a column: figures with DIGITS significant digits, 1 and 0 for booleans, null for no value."""
    return [_encoded(value) for value in values]


def _encoded(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")
    return value if isinstance(value, int | str) else None


def within(contexts: Mapping[str, dict], most: int) -> tuple[dict[str, dict], int]:
    """(the first contexts that fit into a number of bytes, number of features whose contexts are left out)."""
    kept: dict[str, dict] = {}
    room = most
    for feature, of_feature in contexts.items():
        partner = of_feature["partner"]
        shown = {"contexts": _rounded(of_feature["contexts"])}
        if partner is not None:
            shown["partner"] = partner | {"contexts": _rounded(partner["contexts"])}
        room -= len(embedded(shown)) + len(feature) + 4
        if room < 0:
            return kept, len(contexts) - len(kept)
        kept[feature] = shown
    return kept, 0


def _rounded(contexts: list[dict]) -> list[dict]:
    return [{"text": c["text"], "values": [float(f"{v:.3g}") for v in c["values"]]} for c in contexts]


def embedded(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


# ---------------------------------------------------------------------------------------------------------------------
# Sentences and tiles


def peers(reliability: FeatureReliability) -> str:
    """Name of the SAEs for comparison: siblings, or relatives, which are not fresh trainings."""
    return "relatives" if any(s.origin == "relative" for s in reliability.siblings) else "siblings"


def compared(reliability: FeatureReliability) -> str:
    """Sentence on the SAEs for comparison."""
    n = {
        origin: sum(s.origin == origin for s in reliability.siblings) for origin in ("trained", "supplied", "relative")
    }
    if n["relative"]:
        return f"It was compared with {n['relative']} relatives: SAEs of the same hook with another width or L0."
    parts = [f"{n['supplied']} siblings that you supplied"] if n["supplied"] else []
    if n["trained"]:
        tokens = f" on {reliability.training.tokens:,} tokens" if reliability.training else ""
        parts.append(f"{n['trained']} siblings that HUSAI trained{tokens}")
    return f"It was compared with {' and '.join(parts)}. {_likeness(reliability)}"


def _likeness(reliability: FeatureReliability) -> str:
    """Sentence on the settings that siblings share with the SAE."""
    training = reliability.training
    if training is None or (training.recipe == "the SAE's own" and training.tokens == training.recipe_tokens):
        return "Siblings differ in their seed alone."
    if training.recipe == "the SAE's own":
        return "Trained siblings differ from it in their seed and in the number of tokens."
    return f"HUSAI did not train this SAE, therefore the recipe of trained siblings is {training.recipe}."


def tiles(reliability: FeatureReliability) -> list[Tile]:
    """Tiles at the top of the page."""
    held, n, counts = reliability.sae.heldout, len(reliability.siblings), reliability.statements
    at = f"{100 * reliability.bars.certified_at:g}\u00a0%"
    word = peers(reliability)
    alive = f"of {reliability.alive:,} alive features"
    sure = "none" if reliability.certified is None else f"{counts.get('certified', 0):,}"
    needed = rules.siblings_needed(reliability.bars.certified_at)
    few = f" This takes at least {needed} siblings." if n < needed else ""
    note = (
        "Nothing can be certified, for the reason below."
        if reliability.certified is None
        else f"They recur in at least {at} of trainings, and more than by chance. Up to 5 % of the features below that "
        f"share may be certified.{few}"
    )
    return [
        Tile("Certified", sure, alive, note),
        _above_chance(reliability.above_chance),
        Tile(
            f"Recur in a {word.removesuffix('s')}",
            percent(reliability.recur.estimate),
            _bounds(reliability.recur, word),
            f"The mean over {n} {word}.",
        ),
        Tile(
            "Prototype-like",
            f"{counts.get('prototype-like', 0):,}",
            alive,
            "They lie near the mean of a token, or a centroid, and recur or are above chance. Others that lie there "
            "count as not found.",
        ),
        Tile("Dead features", f"{counts.get('dead', 0):,}", f"of {reliability.sae.facts.d_sae:,} features", ""),
        Tile("Explained variance", f"{held.explained_variance:.3f}", f"L0 {held.l0:.4g}", "On held-out tokens."),
    ]


def _above_chance(counts: AboveChance | None) -> Tile:
    if counts is None:
        return Tile("Above chance", "Not tested.", "", "")
    note = "Features that resemble those of other trainings more than chance explains."
    if not counts.prototypes:
        return Tile("Above chance", f"{counts.marked:,}", f"of {counts.features:,} alive features", note)
    apart = f" Tested apart: {counts.prototypes_marked:,} of {counts.prototypes:,} prototype-like ones."
    return Tile(
        "Above chance", f"{counts.marked:,}", f"of {counts.features:,}, prototype-like features aside", note + apart
    )


@dataclass(frozen=True)
class Table:
    """A feature table, as the report on the SAEs shows it."""

    sae: str
    compared: str
    tiles: list[Tile]
    limits: list[str]
    page: str | None
    """Link to the page of the feature table; None if there is none."""

    @classmethod
    def of(cls, run: Phase, output: Path) -> Table | None:
        """The feature table of a run. None, with a problem added to the run, if its results have another shape.

        Args:
            output: place of the page that links to the table.
        """
        if not run.results:
            return None
        try:
            reliability = FeatureReliability.model_validate(run.results)
        except ValidationError as error:
            run.problems.append(f"results.json has another shape than this version reads ({type(error).__name__})")
            return None
        page = run.folder / "report.html"
        link = quote(os.path.relpath(page, output.parent)) if page.is_file() else None
        return cls(
            reliability.sae.label,
            compared(reliability),
            tiles(reliability),
            [*reliability.limits, *reliability.notes],
            link,
        )


def _bounds(e: Interval, word: str) -> str:
    if e.low is None or e.high is None:
        return ""
    return f"{100 * e.low:.1f} to {percent(e.high)} over {word}".replace("-", "−")
