"""Draws the figures of a phase from its results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from husai.evidence.names import GATED_NULLS, NEAR
from husai.evidence.schemas import Drawn, Interval, Phase4aSection, Scored, Section, Sensitivity
from husai.report.markup import few_colours
from husai.report.names import NAMES

COLOURS = {
    "observed": "#0b6e99",
    "isotropic": "#9a9a9a",
    "untrained": "#5f5f5f",
    "spectral": "#d9730d",
    "gaussian": "#ad1a72",
    "random_model": "#4f7f3b",
    "reference": "#0b6e99",
    "llm": "#ad1a72",
    "pca": "#d9730d",
}


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.set_dpi(150)
    figure.canvas.draw()
    path.write_bytes(few_colours(Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))))
    plt.close(figure)
    return path


def matches(section: Scored, drawn: Drawn, path: Path) -> Path:
    """Distribution of the cosines of matched features over all pairs, observed and under each null."""
    edges = np.array(drawn.histogram_bins)
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for name, counts in drawn.histograms.items():
        share = np.array(counts) / max(1, sum(counts))
        main = name == "observed"
        axis.stairs(
            share, edges, label=NAMES.get(name, name), color=COLOURS[name], fill=main, alpha=0.45 if main else 1, lw=1.8
        )
    axis.set(xlabel="cosine of matched alive features", ylabel="share of matches", xlim=(0, 1), ylim=(0, None))
    verdict = section.stability.verdict
    outcome = "" if verdict.outcome == "MISSING" else f"{verdict.outcome}: "
    axis.set_title(f"{outcome}{_interval(verdict.claimable_excess)} over {verdict.highest_null}", loc="left")
    axis.legend(frameon=False)
    return _save(figure, path)


def over_training(section: Section, path: Path) -> Path:
    """Stability against training steps, with its interval over seeds and the nulls' levels at the end."""
    points = section.over_training
    steps = np.array([max(p.step, 0.5) for p in points])  # the untrained state has a place on the log axis
    ends = [(p.mcc.low, p.mcc.high) for p in points]
    low, high = np.array([(np.nan, np.nan) if None in end else end for end in ends], dtype=float).T
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.fill_between(steps, low, high, color=COLOURS["observed"], alpha=0.2, lw=0)
    axis.plot(steps, [p.mcc.estimate for p in points], "o-", color=COLOURS["observed"], label=NAMES["observed"])
    for name, null in section.stability.scores["mcc"].nulls.items():
        if name in GATED_NULLS:
            axis.axhline(null.mean, color=COLOURS[name], ls="--", lw=1.4, label=f"{name} (at the end)")
    axis.set(xscale="log", xlabel="training step (0 drawn at 0.5)", ylabel="mcc, all features", ylim=(0, 1))
    axis.set_title("Stability over training, mean over pairs of seeds, 95 % interval", loc="left")
    axis.legend(frameon=False)
    return _save(figure, path)


def loss_curves(section: Phase4aSection, path: Path) -> Path:
    """Unexplained share of the variance on training batches, one line for each seed."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for member in section.members:
        axis.plot(section.curve_steps, member.curve, lw=1.3, label=f"seed {member.seed}")
    axis.set(yscale="log", xlabel="training step", ylabel="‖x − x̂‖² / variance")
    axis.set_title("Loss on training batches", loc="left")
    axis.legend(frameon=False, ncols=2)
    return _save(figure, path)


def sensitivity(degrees: Sequence[Sensitivity], path: Path) -> Path:
    """Least excess of stability against the recovery of planted features, with intervals. Filled points pass."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.axhline(0, color=COLOURS["isotropic"], lw=1)
    for point in degrees:
        x, y = point.recovery, point.excess
        if y is None:
            continue
        fill = COLOURS["observed"] if point.passes else "white"
        spans = [_reach(e) for e in (x, y)]
        style = {"color": COLOURS["observed"], "markerfacecolor": fill, "capsize": 3}
        axis.errorbar(x.estimate, y.estimate, xerr=spans[0], yerr=spans[1], fmt="o", **style)
        axis.annotate(
            f"{point.tokens:,} tokens", (x.estimate, y.estimate), (-8, 6), textcoords="offset points", ha="right"
        )
    axis.set(xlabel="recovery of the planted features", ylabel="least excess over a required null", xlim=(0, 1))
    axis.set_title("Which recovery the method sees: 95 % intervals, filled where it passes", loc="left")
    return _save(figure, path)


def _reach(e: Interval) -> list[list[float]] | None:
    """Distances of an interval's ends from its estimate, for error bars; None without an interval."""
    return None if e.low is None or e.high is None else [[e.estimate - e.low], [e.high - e.estimate]]


@dataclass(frozen=True)
class Panel:
    """Estimates with intervals, against numbers on an axis, or one below the other if `x` holds names."""

    title: str
    x_label: str
    y_label: str
    x: list
    series: Mapping[str, Sequence[dict | Interval | None]]
    """Name -> one estimate for each x, None where it was not computed. Ends are None without an interval."""
    unfinished: dict[str, list[bool]] | None = None
    """Points of each series that are drawn hollow, because stability was still changing at the end of training."""
    line: float = 0
    """Position of the reference line beside names: no difference, or chance."""


NOT_COMPUTED = {"estimate": np.nan, "low": None, "high": None}
"""Estimate that is not drawn."""


def panels(path: Path, drawn: list[Panel]) -> Path:
    """Draw panels side by side, two in a row if there are more than three."""
    columns = len(drawn) if len(drawn) <= 3 else 2
    lines = -(-len(drawn) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        named = isinstance(panel.x[0], str)
        places = np.arange(len(panel.x))[::-1] if named else np.array(panel.x, dtype=float)
        for i, (name, series) in enumerate(panel.series.items()):
            known = [NOT_COMPUTED if e is None else e for e in series]
            estimates = [e if isinstance(e, dict) else e.to_json() for e in known]
            value = np.array([e["estimate"] for e in estimates], dtype=float)
            ends = [[e["estimate"] if e[s] is None else e[s] for e in estimates] for s in ("low", "high")]
            ends = np.array(ends, dtype=float)
            error = np.abs(ends - value)
            colour = COLOURS.get(name, f"C{i}")
            style = {"color": colour, "label": NAMES.get(name, name), "capsize": 3}
            if named:
                shift = 0.12 * (i - (len(panel.series) - 1) / 2)
                axis.errorbar(value, places - shift, xerr=error, fmt="o", **style)
                continue
            if all(e["low"] is None for e in estimates):
                axis.plot(places, value, "--", color=colour, label=style["label"])
                continue
            axis.errorbar(places, value, yerr=error, fmt="o-", **style)
            if panel.unfinished:
                hollow = np.array(panel.unfinished[name])
                label = "still moving at the end of training" if hollow.any() else None
                axis.plot(places[hollow], value[hollow], "o", mfc="white", mec=colour, ls="none", zorder=5, label=label)
        if named:
            axis.axvline(panel.line, color="#5f5f5f", lw=1)
            axis.xaxis.set_major_locator(plt.MaxNLocator(6))
            axis.set(yticks=places, yticklabels=panel.x, ylim=(-0.6, len(panel.x) - 0.4), xlabel=panel.x_label)
        else:
            log = places.min() > 0 and places.max() / places.min() > 3
            axis.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale="log" if log else "linear")
            if "excess" in panel.y_label:
                axis.axhline(0, color="#5f5f5f", lw=1)
            axis.set_xticks(places, [f"{x:g}" for x in panel.x])
            axis.minorticks_off()
        axis.set_title(panel.title, loc="left")
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.14), "ncols": 2} if named else {}
            axis.legend(frameon=False, fontsize="small", **below)
    return _save(figure, path)


@dataclass(frozen=True)
class Points:
    """Conditions as points with error bars in both directions, one colour for each architecture."""

    title: str
    x_label: str
    y_label: str
    points: list[tuple[str, str, dict, dict]]
    """(condition, family, x, y): estimates."""

    @classmethod
    def of(cls, title: str, x_label: str, y_label: str, rows: list[dict], x: str, y: str) -> Points:
        """Points of rows with `condition`, `family` and estimates x and y. Rows without an estimate are left out."""
        points = [(r["condition"], r["family"], r[x], r[y]) for r in rows]
        return cls(title, x_label, y_label, [p for p in points if None not in (p[2]["estimate"], p[3]["estimate"])])


def scatter(path: Path, drawn: list[Points], front: list[str]) -> Path:
    """Draw panels of points side by side. Conditions of `front` are ringed on panels other than that of L0."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.6 * len(drawn), 4.4), squeeze=False)
    families = sorted({p[1] for panel in drawn for p in panel.points})
    colour = {family: f"C{i}" for i, family in enumerate(families)}
    for axis, panel in zip(axes[0], drawn, strict=True):
        for family in families:
            points = sorted((p for p in panel.points if p[1] == family), key=lambda p: p[2]["estimate"])
            if not points:
                continue
            sides = [[p[2] for p in points], [p[3] for p in points]]
            values = [[e["estimate"] for e in side] for side in sides]
            errors = [
                [[np.nan if e[end] is None else abs(e[end] - e["estimate"]) for e in side] for end in ("low", "high")]
                for side in sides
            ]
            line = "-" if panel.x_label == "L0" and len(points) > 1 else "none"
            style = {"xerr": errors[0], "yerr": errors[1], "fmt": "o", "ls": line, "capsize": 3, "lw": 1.3}
            axis.errorbar(*values, **style, color=colour[family], label=family)
        if panel.x_label != "L0":
            axis.axhline(0, color="#5f5f5f", lw=1)
            axis.axvline(0, color="#5f5f5f", lw=1)
            ringed = [p for p in panel.points if p[0] in front]
            xs, ys = [p[2]["estimate"] for p in ringed], [p[3]["estimate"] for p in ringed]
            axis.plot(xs, ys, "o", ms=13, mfc="none", mec="#5f5f5f", label="not beaten on both")
        elif panel.y_label.startswith("excess"):
            axis.axhline(0, color="#5f5f5f", lw=1)
        axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axis.set_title(panel.title, loc="left")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    return _save(figure, path)


def _interval(e: Interval) -> str:
    bounds = "no interval" if e.low is None else f"{e.low:+.4f} to {e.high:+.4f}"
    return f"excess {e.estimate:+.4f} ({bounds})"


def save_lines(path: Path, panels: list[tuple[str, list[float], dict[str, list[float]]]], y_label: str) -> Path:
    """Panels (x label, x values, {name: y values}) side by side, both axes logarithmic, one legend."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=True, squeeze=False)
    for axis, (x_label, x, lines) in zip(axes[0], panels, strict=True):
        for name, y in lines.items():
            axis.plot(x, y, "o-", lw=2.4 if name.startswith("HUSAI") else 1.4, label=name)
        axis.set(xlabel=x_label, xscale="log", yscale="log")
        axis.set_xticks(x, [f"{value:,}" for value in x], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y_label)
    axes[0][-1].legend(frameon=False)
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# The feature table


def of_features(results: dict, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Recurrence by firing rate; observed similarity against both nulls; recurrence by number of siblings."""
    drawn = [_by_frequency(results, folder / "recurrence_by_frequency.png")]
    drawn.append(_by_siblings(results, folder / "recurrence_by_siblings.png"))
    others = table[~table["dead"].astype(bool) & (table["prototype_cosine"].astype(float) < NEAR)]
    if others["similarity_rotated"].notna().any():
        drawn.append(_against_null(others, folder / "observed_against_null.png"))
    return drawn


def _by_frequency(results: dict, path: Path) -> Path:
    deciles = results["deciles"]
    middle = [float(np.sqrt(d["low"] * d["high"])) for d in deciles]
    shares = [d["recur"]["estimate"] for d in deciles]
    bounds = np.array([[d["recur"][end] for d in deciles] for end in ("low", "high")], float)  # NaN: no interval
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.errorbar(middle, shares, np.abs(bounds - np.array(shares)), fmt="o-", color=COLOURS["observed"], capsize=3)
    axis.set(xscale="log", xlabel="share of held-out tokens on which a feature fires (tenths of the alive features)")
    axis.set(ylabel="share that recurs in a sibling", ylim=(0, 1))
    return _save(figure, path)


def _by_siblings(results: dict, path: Path) -> Path:
    at = range(1, len(results["in_every"]) + 1)
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.plot(at, results["in_some"], "o-", color=COLOURS["spectral"], label="in at least one sibling")
    axis.plot(at, results["in_every"], "o-", color=COLOURS["observed"], label="in every sibling")
    axis.set(xlabel="number of siblings", ylabel="share of the alive features that recur", ylim=(0, 1))
    axis.legend(frameon=False)
    return _save(figure, path)


def _against_null(table: pd.DataFrame, path: Path) -> Path:
    named = {"similarity": "observed", "similarity_rotated": "spectral", "similarity_gaussian": "gaussian"}
    labels = {"observed": "siblings", "spectral": "rotated siblings", "gaussian": "SAEs of Gaussian rows"}
    edges = np.linspace(0, 1, 51)
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for column, name in named.items():
        values = table[column].dropna().to_numpy(float)
        if len(values):
            share = np.histogram(values.clip(0, 1), edges)[0] / len(values)
            main = name == "observed"
            fill = {"fill": main, "alpha": 0.45 if main else 1.0, "lw": 1.8}
            axis.stairs(share, edges, label=labels[name], color=COLOURS[name], **fill)
    axis.set(xlabel="mean over siblings of the largest decoder cosine")
    axis.set(ylabel="share of the alive features, prototype-like ones aside")
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.legend(frameon=False)
    return _save(figure, path)
