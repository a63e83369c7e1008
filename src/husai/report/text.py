"""Text of estimates, tables and files of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from husai.evidence.names import COMPARED_NULLS, GATED_NULLS
from husai.runs.files import write_text

if TYPE_CHECKING:
    from husai.evidence.schemas import Comparison, Control, Gain, Interval, Scored, Section


def interval(e: dict | Interval, sign: str = "") -> str:
    """`0.5970 [0.5640, 0.6290]`. `sign="+"` adds signs, for differences. `none: reason` without an estimate."""
    e = e if isinstance(e, dict) else e.to_json()
    if e["estimate"] is None:
        return f"none: {e['reason']}"
    return f"{e['estimate']:{sign}.4f}" + (
        "" if e["low"] is None else f" [{e['low']:{sign}.4f}, {e['high']:{sign}.4f}]"
    )


def percent(share: float) -> str:
    """`5.0 %`."""
    return f"{100 * share:.1f} %"


def percent_interval(e: dict) -> str:
    """`5.0 % [3.6, 6.4]`, or the share alone without an interval."""
    bounds = "" if e["low"] is None else f" [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"
    return percent(e["estimate"]) + bounds


GAINS = ("observed", *GATED_NULLS)
"""Estimates of a `Gain`: of `mcc_alive` itself, and of its excess over each required null."""
GAIN_HEADER = ["gain of `mcc_alive`", *(f"over {null}" for null in COMPARED_NULLS)]
"""Columns of a gain in phases that compare arms."""


def gain_cells(gain: Gain) -> list[str]:
    """One cell for each of GAIN_HEADER."""
    return [interval(e, "+") for e in (gain.observed, *(gain.over[null] for null in COMPARED_NULLS))]


def gain_sentence(gain: Gain) -> str:
    over = ", ".join(f"{interval(e, '+')} over {null}" for null, e in gain.over.items())
    return f"paired gain of `mcc_alive` {interval(gain.observed, '+')}, of its excess {over}"


def at_rest(section: Section) -> str:
    """Cell that tells whether stability was at rest at the end of training."""
    return {True: "yes", False: "**no**", None: "not known"}[section.convergence.converged]


def strata(arms: Mapping[str, Comparison | Control]) -> list[str]:
    """Lines of Markdown: matches of features by firing rate and by cosine with the nearest prototype.

    Args:
        arms: name of the SAEs -> their comparison.
    """
    named = {"firing_rate": "share of held-out rows it fires on", "nearest": "cosine with the nearest prototype"}
    rows = [
        [name, named[s.figure], f"{s.low:g} to {s.high:g}", f"{s.features:.1f}", f"{s.mcc:.4f}", f"{s.share70:.1%}"]
        for name, arm in arms.items()
        for s in arm.strata
        if s.mcc is not None and s.share70 is not None
    ]
    header = ["SAEs", "figure of a feature", "stratum", "features an SAE", "mean matched cosine"]
    header.append("matched at 0.7 or more")
    return ["Matched alive features, all pairs of SAEs together:", "", *table(header, rows)] if rows else []


def strata_of_banks(banks: list[dict]) -> list[str]:
    """`strata` of each condition of the banks in a study's results."""
    from husai.evidence.schemas import Bank

    arms: dict[str, Comparison | Control] = {}
    for bank in map(Bank.model_validate, banks):
        names = [row["condition"] for row in bank.conditions]
        arms |= dict(zip(names, bank.sections, strict=True))
    return strata(arms)


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, r))} |" for r in (header, ["---"] * len(header), *rows)]


def stand_in(results: dict) -> list[str]:
    """Lines of a summary that warn if the packaged text replaces the text that SAEs were trained on."""
    named = [results, results.get("bank") or {}]
    facts = (
        [results["candidate"]["facts"]] if results.get("candidate") else [s["facts"] for s in results.get("saes", [])]
    )
    sources = {f["source"] for f in facts} | {results.get("sae_source", "husai")}
    if any(r.get("text") for r in named) or sources == {"husai"}:
        return []
    return [
        "",
        "**The text is a stand-in.** These SAEs were trained elsewhere, on text that HUSAI has not seen; "
        "held-out figures are of the packaged text (news, reviews, code, wiki facts). Pass `--text` to name theirs.",
        "",
    ]


def write_csv(path: Path, rows: list[dict]) -> Path:
    """Write rows as CSV, with the columns of the first row; returns the path."""
    import pandas as pd

    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return path


def pair_rows(section: Scored, **facts) -> list[dict]:
    """Rows for `write_csv`: one for each pair of a section, observed and under each null, with extra columns."""
    return [
        {**facts, "a": pair["a"], "b": pair["b"], "against": compared_with, **scores}
        for pair in section.pairs
        for compared_with, scores in pair.items()
        if isinstance(scores, dict)
    ]
