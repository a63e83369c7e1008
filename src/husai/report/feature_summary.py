"""Summary of feature reliability in five lines."""

from __future__ import annotations

from math import comb

import numpy as np

from husai.evidence import rules
from husai.evidence.features import AboveChance
from husai.report.text import percent, percent_interval


def summary_lines(results: dict) -> list[str]:
    """Five lines of Markdown, and one for each limit and note.

    Args:
        results: `evidence.features.FeatureReliability` as JSON.
    """
    sae, bars, counts, n = results["sae"], results["bars"], results["statements"], len(results["siblings"])
    held, alive = sae["heldout"], results["alive"]
    lines = [
        f"1. SAE: `{sae['label']}` on {results['subject']}, {results['hook_name']}; {sae['facts']['d_sae']} features, "
        f"{alive} of them alive on {results['heldout_tokens']:,} held-out tokens; explained variance "
        f"{held['explained_variance']:.3f}, L0 {held['l0']:.1f}. {_siblings(results)}",
        f"2. Recurrence: {percent_interval(results['recur'])} of the alive features recur in a sibling"
        + (" (95 % interval over siblings)" if results["recur"]["low"] is not None else "")
        + _without_prototypes(results)
        + f"; {percent(results['in_every'][-1])} recur in every one of {n}."
        + _partners(results),
        "3. " + _certified(results, counts, bars, n),
        "4. " + _chance(results, counts),
        f"5. The others: {counts['recurs in some']} recur in some siblings, which chance can explain; "
        f"{counts['prototype-like']} lie near a token mean or a centroid, which every training finds; "
        f"{counts['split or merged']} are split or merged; {counts['not found']} are not found; "
        f"{counts['withheld']} are withheld; {counts['dead']} are dead.",
    ]
    if results["differs"]:
        lines.append(
            "\n**The SAE may differ from its siblings in more than the seed**: fewer of its features have a partner "
            "than of theirs. An unusual seed can have the same effect: by chance, about one SAE in forty has this "
            f"note. Explained variance and L0: {held['explained_variance']:.3f} and {held['l0']:.1f} of the "
            f"SAE, {_figures(results)} of siblings."
        )
    return [*lines, *(f"\n**Limit**: {limit}" for limit in results["limits"]), *(f"\n{n}" for n in results["notes"])]


def _siblings(results: dict) -> str:
    counts = {origin: sum(s["origin"] == origin for s in results["siblings"]) for origin in ("trained", "supplied")}
    relatives = len(results["siblings"]) - sum(counts.values())
    if relatives:
        return f"Compared with {relatives} relatives, SAEs of other width or L0."
    training = results["training"]
    parts = [f"{counts['supplied']} supplied siblings"] if counts["supplied"] else []
    if training:
        own_recipe = training["recipe"] == "the SAE's own"
        recipe = f"{training['recipe']} recipe: " if own_recipe else f"recipe: {training['recipe']}, "
        parts.append(
            f"{counts['trained']} siblings trained on {training['tokens']:,} tokens ({recipe}{training['family']}, "
            f"k {training['k']})"
        )
    return f"Compared with {' and '.join(parts)}; explained variance and L0 of siblings {_figures(results)}."


def _without_prototypes(results: dict) -> str:
    others = results["recur_others"]
    return "" if others is None else f", {percent_interval(others)} of those that are like no prototype"


def _partners(results: dict) -> str:
    """Sentence on partners. It reveals an SAE that was trained in another way than its siblings."""
    if not results["among_siblings"]:
        return ""
    share = float(np.mean([s["partners"] for s in results["siblings"]]))
    return (
        f" By decoder alone, {share:.1%} of its features have a partner in a sibling, and "
        f"{np.mean(results['among_siblings']):.1%} of a sibling's features have one in another sibling."
    )


def _certified(results: dict, counts: dict, bars: dict, n: int) -> str:
    at = bars["certified_at"]
    if results["certified"] is None:
        return "Certified: nothing can be certified, for the reason below."
    needed = rules.siblings_needed(at)
    few = f" At π = {at:g} it takes {needed} siblings at least." if n < needed else ""
    chance = counts["certified, not above chance"]
    return (
        f"Certified at π = {at:g}: {counts['certified']} features recur in at least this share of trainings, and more "
        f"than chance explains; {chance} more are certified, but not above chance. Up to 5 % of the features below π "
        f"may be certified.{few}"
    )


def _chance(results: dict, counts: dict) -> str:
    if results["above_chance"] is None:
        return "Above chance: not tested, for the reason below."
    return (
        f"Above chance: {AboveChance(**results['above_chance']).sentence()}. The comparison is with rotated "
        f"siblings and {results['gaussian']} SAEs of Gaussian rows. Benjamini–Hochberg controls the expected share "
        "of false ones among those marked. Shared draws make p-values dependent, therefore the realised share is "
        f"measured (docs/benchmarks/feature_calibration.md).{_least(results)}"
    )


def _least(results: dict) -> str:
    """A sentence if too few SAEs are compared for any feature to be marked; else empty."""
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
