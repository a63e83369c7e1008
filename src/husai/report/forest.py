"""Forest plot of a phase on the page: intervals of stability over the nulls, as lines on one scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from husai.evidence.rules import CHANCE
from husai.report import markup
from husai.report.markup import Scale, Strip
from husai.report.names import NAMES


@dataclass
class Row:
    name: str
    estimate: float
    low: float | None
    high: float | None
    strip: Strip
    firm: bool
    """Whether the null is required for a verdict."""

    @property
    def value(self) -> str:
        return markup.interval(self.estimate, self.low, self.high)


@dataclass
class Forest:
    """Intervals of the excess of stability over the nulls, on one scale."""

    caption: str
    outcomes: str
    """`8 of 13 PASS, …`."""
    claim: str | None
    """Excess of one set of SAEs over the highest required null."""
    scale: Scale
    rows: list[Row]

    @classmethod
    def of(cls, results: dict) -> Forest | None:
        """Rows of one set of SAEs (of LEAD if named): its excess over each null. Of several: over its highest null."""
        try:
            sections = [*stability_sections(results)]
            lead, null = LEAD.get(results.get("phase", ""), (None, None))
            lead = lead if lead in results else None  # older results of the transcoder stress have other sets
            if lead or len(sections) == 1:
                stability = results[lead]["stability"] if lead else sections[0][1]
                score, null = stability["verdict"]["score"], null or stability["verdict"]["highest_null"]
                excess, required = stability["scores"][score]["excess"], {*CHANCE, null}
                by_other_scores = {
                    name: stability["scores"][other]["excess"][control]
                    for name, (other, control) in CHANCE.items()
                    if name not in excess and control in stability["scores"].get(other, {}).get("excess", {})
                }
                excess = excess | by_other_scores
                rows = [(NAMES.get(n, n), e, n in required) for n, e in excess.items()]
                ends = markup.interval(*(excess[null][end] for end in ("estimate", "low", "high")))
                claim = f"{score} {ends} over {NAMES.get(null, null)}"
                caption = f"Excess of {score} over each control, with its 95 % interval. Filled dots are required."
            else:
                rows, claim = [(name, s["verdict"]["claimable_excess"], True) for name, s in sections], None
                caption = "Excess of stability over the highest required control, with its 95 % interval."
            if not rows:
                return None
            values = [x for _, e, _ in rows for x in (e["estimate"], e["low"], e["high"]) if x is not None]
            scale = Scale.over([*values, 0.0])
            counts = Counter(s["verdict"]["outcome"] for _, s in sections)
            outcomes = ", ".join(f"{n} of {len(sections)} {outcome}" for outcome, n in counts.items())
            if "verdict" in results:  # a stress test judges by its own rule
                outcomes = results["verdict"]["outcome"]
            drawn = []
            for name, e, firm in rows:
                middle, low, high = e["estimate"], e["low"], e["high"]
                if middle is not None:
                    drawn.append(Row(name, middle, low, high, Strip.of(scale, middle, low, high), firm))
            return cls(caption, outcomes, claim, scale, drawn)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # an older or later shape: the summary's table has the figures


LEAD = {"4a": ("husai", None), "transcoder_stress": ("across", None)}
"""Phase -> (key of its main set of SAEs, null that its rule reads; None: the highest required one)."""


def stability_sections(value, name: str = "") -> Iterator[tuple[str, dict]]:
    """(name, stability) of every set of SAEs that was compared, in the order of the results."""
    if isinstance(value, list):
        for item in value:
            yield from stability_sections(item, name)
    elif isinstance(value, dict):
        if isinstance(value.get("stability"), dict) and "verdict" in value["stability"]:
            yield " · ".join(filter(None, (name, _label(value)))), value["stability"]
            return
        for key, item in value.items():
            yield from stability_sections(item, GROUPS.get(key, name))


GROUPS = {
    "husai": "HUSAI",
    "published": "the earlier study's setting",
    "planted": "planted features",
    "methods": "method",
    "selection": "selection",
    "confirmation": "fresh seeds",
    "control": "no pull",
    "own": "own reference",
    "section": "candidate",
    "random_models": "random weights",
    "transcoder": "transcoders",
    "across": "candidate against transcoders",
}
"""Key of results -> name of the group in a row."""


def _label(section: dict) -> str | None:
    if isinstance(section.get("name") or section.get("condition"), str):
        return section.get("name") or section.get("condition")
    if "lambda" in section:
        return f"λ {section['lambda']:g}"
    family = f"{section['family']} d{section['d_sae']} " if "family" in section else ""
    return f"{family}k {section['k']}" if "k" in section else None
