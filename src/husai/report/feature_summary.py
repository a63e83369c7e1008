"""Feature reliability in five lines and three figures."""

from __future__ import annotations

from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from husai.evidence import rules

if TYPE_CHECKING:
    import pandas as pd

RAISED = ("certified", "certified, not above chance", "above chance", "recurs in some")
"""Statements that need a recurrence or a likeness."""


def summary_lines(results: dict) -> list[str]:
    """Five lines of markdown, and one for each limit and note.

    Args:
        results: `evidence.features.FeatureReliability` as JSON.
    """
    sae, bars, said, n = results["sae"], results["bars"], results["statements"], len(results["siblings"])
    held, alive = sae["heldout"], results["alive"]
    lines = [
        f"1. SAE: `{sae['label']}` on {results['subject']}, {results['hook_name']}; {sae['facts']['d_sae']} features, "
        f"{alive} of them alive on {results['heldout_tokens']:,} held-out tokens; explained variance "
        f"{held['explained_variance']:.3f}, L0 {held['l0']:.1f}. {_siblings(results)}",
        f"2. Recurrence: {percent(results['recur'])} of the alive features recur in a sibling (95 % interval over "
        f"siblings)"
        + _without_prototypes(results)
        + f"; {results['in_every'][-1]:.1%} recur in every one of {n}."
        + _partners(results),
        "3. " + _certified(results, said, bars, n),
        "4. " + _chance(results, said),
        f"5. The others: {said['prototype-like']} lie near a token mean or a centroid, which every training finds; "
        f"{said['split or merged']} are split or merged; {said['not found']} are not found; {said['withheld']} are "
        f"withheld; {said['dead']} are dead.",
    ]
    if results["differs"]:
        lines.append(
            "\n**The SAE differs from its siblings in more than the seed**: fewer of its features have a partner "
            f"than of theirs. Explained variance and L0: {held['explained_variance']:.3f} and {held['l0']:.1f} of the "
            f"SAE, {_figures(results)} of siblings."
        )
    return [*lines, *(f"\n**Limit**: {limit}" for limit in results["limits"]), *(f"\n{n}" for n in results["notes"])]


def percent(share: dict) -> str:
    """`5.0 % [3.6, 6.4]`; the share alone where there is no interval."""
    bounds = "" if share["low"] is None else f" [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    return f"{100 * share['estimate']:.1f} %{bounds}"


def _siblings(results: dict) -> str:
    counts = {origin: sum(s["origin"] == origin for s in results["siblings"]) for origin in ("trained", "supplied")}
    relatives = len(results["siblings"]) - sum(counts.values())
    if relatives:
        return f"Compared with {relatives} relatives, SAEs of other width or L0."
    made = results["training"]
    parts = [f"{counts['supplied']} supplied siblings"] if counts["supplied"] else []
    if made:
        parts.append(
            f"{counts['trained']} siblings trained on {made['tokens']:,} tokens ({made['recipe']} recipe: "
            f"{made['family']}, k {made['k']})"
            if made["recipe"] == "the SAE's own"
            else f"{counts['trained']} siblings trained on {made['tokens']:,} tokens (recipe: {made['recipe']}, "
            f"{made['family']}, k {made['k']})"
        )
    return f"Compared with {' and '.join(parts)}; explained variance and L0 of siblings {_figures(results)}."


def _without_prototypes(results: dict) -> str:
    others = results["recur_others"]
    return "" if others is None else f", {percent(others)} of those that are like no prototype"


def _partners(results: dict) -> str:
    """What tells an SAE that was trained otherwise from its siblings."""
    if not results["among_siblings"]:
        return ""
    own = float(np.mean([s["partners"] for s in results["siblings"]]))
    return (
        f" By decoder alone, {own:.1%} of its features have a partner in a sibling, and "
        f"{np.mean(results['among_siblings']):.1%} of a sibling's features have one in another sibling."
    )


def _certified(results: dict, said: dict, bars: dict, n: int) -> str:
    at = bars["certified_at"]
    if results["certified"] is None:
        return "Certified: nothing can be certified, for the reason below."
    needed = rules.siblings_needed(at)
    few = f" At π = {at:g} it takes {needed} siblings at least." if n < needed else ""
    chance = said["certified, not above chance"]
    return (
        f"Certified at π = {at:g}: {said['certified']} features recur in at least this share of trainings, and more "
        f"than chance explains; {chance} more are certified, but not above chance. Up to 5 % of the features below π "
        f"may be certified.{few}"
    )


def _chance(results: dict, said: dict) -> str:
    if results["above_chance"] is None:
        return "Above chance: not tested, for the reason below."
    return (
        f"Above chance: {results['above_chance']:.1%} of the alive features, against rotated siblings and "
        f"{results['gaussian']} SAEs of Gaussian rows. Benjamini–Hochberg controls the expected share of false ones "
        "among those marked. Shared draws make p-values dependent, therefore the realised share is measured "
        f"(docs/benchmarks/feature_calibration.md).{_least(results)}"
    )


def _least(results: dict) -> str:
    """A sentence where so few SAEs are compared that no feature can be marked."""
    n = len(results["siblings"])
    least = 1 / comb(n + results["gaussian"], n)
    if least <= rules.FALSE_SHARE:
        return ""
    return f" The least p-value of so few SAEs is {least:.2g}, therefore no feature can be marked."


def _figures(results: dict) -> str:
    held = [s["heldout"] for s in results["siblings"] if s["heldout"] is not None]
    figures = [[h[name] for h in held] for name in ("explained_variance", "l0")]
    ends = [[f"{end(f):.3g}" for end in (min, max)] for f in figures]
    ev, l0 = (low if low == high else f"{low} to {high}" for low, high in ends)
    return f"{ev} and {l0}"


def figures(results: dict, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Recurrence by firing rate; observed similarity against both nulls; recurrence by number of siblings."""
    drawn = [_by_frequency(results, folder / "recurrence_by_frequency.png")]
    drawn.append(_by_siblings(results, folder / "recurrence_by_siblings.png"))
    if table["similarity_rotated"].notna().any():
        drawn.append(_against_null(table, folder / "observed_against_null.png"))
    return drawn


def _by_frequency(results: dict, path: Path) -> Path:
    from husai.report.figures import COLOURS, _save, plt

    deciles = results["deciles"]
    middle = [float(np.sqrt(d["low"] * d["high"])) for d in deciles]
    shares = [d["recur"]["estimate"] for d in deciles]
    bounds = [[d["recur"][end] for d in deciles] for end in ("low", "high")]
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    if None in bounds[0]:
        axis.plot(middle, shares, "o-", color=COLOURS["observed"])
    else:
        reach = np.abs(np.array(bounds) - np.array(shares))
        axis.errorbar(middle, shares, reach, fmt="o-", color=COLOURS["observed"], capsize=3)
    axis.set(xscale="log", xlabel="share of held-out tokens on which a feature fires (tenths of the alive features)")
    axis.set(ylabel="share that recurs in a sibling", ylim=(0, 1))
    return _save(figure, path)


def _by_siblings(results: dict, path: Path) -> Path:
    from husai.report.figures import COLOURS, _save, plt

    at = range(1, len(results["in_every"]) + 1)
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.plot(at, results["in_some"], "o-", color=COLOURS["spectral"], label="in at least one sibling")
    axis.plot(at, results["in_every"], "o-", color=COLOURS["observed"], label="in every sibling")
    axis.set(xlabel="number of siblings", ylabel="share of the alive features that recur", ylim=(0, 1))
    axis.legend(frameon=False)
    return _save(figure, path)


def _against_null(table: pd.DataFrame, path: Path) -> Path:
    from husai.report.figures import COLOURS, _save, plt

    named = {"similarity": "observed", "similarity_rotated": "spectral", "similarity_gaussian": "gaussian"}
    labels = {"observed": "siblings", "spectral": "rotated siblings", "gaussian": "SAEs of Gaussian rows"}
    alive, edges = table[~table["dead"].astype(bool)], np.linspace(0, 1, 51)
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for column, name in named.items():
        values = alive[column].dropna().to_numpy(float)
        if len(values):
            share = np.histogram(values.clip(0, 1), edges)[0] / len(values)
            main = name == "observed"
            fill = {"fill": main, "alpha": 0.45 if main else 1.0, "lw": 1.8}
            axis.stairs(share, edges, label=labels[name], color=COLOURS[name], **fill)
    axis.set(xlabel="mean over siblings of the largest decoder cosine", ylabel="share of the alive features")
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.legend(frameon=False)
    return _save(figure, path)
