"""Tiles at the top of the page: quality of the SAEs, with each SAE's value."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import ValidationError

from husai.evidence import levels, rules
from husai.evidence.quality import Quality
from husai.report.evidence import Phase
from husai.report.text import percent


@dataclass(frozen=True)
class Tile:
    """One figure."""

    name: str
    value: str
    spread: str
    """Range over the SAEs."""
    note: str
    """Value to compare with."""
    places: list[float] = field(default_factory=list)
    """Value of each SAE, in per cent of the line from 0 to 1."""
    bound: float | None = None
    """Place of the value that the rule *fit* requires."""
    unusual: bool = False


@dataclass(frozen=True)
class Good:
    """Quality of the SAEs: tiles, warnings and a table."""

    names: list[str]
    tiles: list[Tile]
    warnings: list[str]
    columns: list[str]
    rows: list[list[str]]
    """One row for each SAE, with its name first."""

    @classmethod
    def of(cls, run: Phase | None) -> Good | None:
        """Quality from a confirmation. None, with a problem added to the run, if its results have another shape."""
        if run is None or not run.results:
            return None
        try:
            q = Quality.of(run.results)
        except (ValidationError, KeyError) as error:
            run.problems.append(f"results.json has another shape than this version reads ({type(error).__name__})")
            return None
        return cls(q.names, tiles(q), q.warnings(), *each(q))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float], form: str) -> str:
    """`0.621 to 0.625 in 5 SAEs`."""
    low, high = (f"{x:{form}}".replace("-", "−").replace("%", " %") for x in (min(values), max(values)))
    n = f"{len(values)} SAE{'s' if len(values) != 1 else ''}"
    return f"{low} in each of {n}" if low == high and len(values) > 1 else f"{low} to {high} in {n}"


def tiles(q: Quality) -> list[Tile]:
    def places(values: list[float]) -> list[float]:
        return [round(100 * min(1.0, max(0.0, v)), 2) for v in values]

    floors = levels.MIN_EXPLAINED_VARIANCE, levels.MIN_CE_RECOVERED
    named = ("Explained variance", q.explained_variance), ("CE recovered", q.ce_recovered)
    tiles_of_page = [
        Tile(
            name,
            f"{mean(values):.3f}".replace("-", "−"),
            spread(values, ".3f"),
            f"At least {floor:g} is required.",
            places(values),
            100 * floor,
            min(values) < floor,
        )
        for (name, values), floor in zip(named, floors, strict=True)
    ]
    dead = q.dead_share
    tiles_of_page.append(
        Tile(
            "Dead features",
            percent(mean(dead)),
            spread(dead, ".1%"),
            f"At most {levels.MAX_DEAD_SHARE:.0%} may be dead.".replace("%", " %"),
            places(dead),
            100 * levels.MAX_DEAD_SHARE,
            any(map(rules.many_dead, dead)),
        )
    )
    if q.stable is not None and q.stable_share is not None:
        controls = "" if q.stable_of_controls is None else f"Controls reach at most {percent(q.stable_of_controls)}."
        tiles_of_page.append(
            Tile(
                "Stable share",
                percent(q.stable.estimate),
                spread(q.stable_share, ".1%"),
                controls,
                places(q.stable_share),
            )
        )
    full = any(rules.not_sparse(l0, q.d_in, q.d_sae) for l0 in q.l0)
    sparsity = places([l0 / q.d_sae for l0 in q.l0])
    width = f"Of {q.d_sae:,} features; the input has {q.d_in:,} dimensions."
    tiles_of_page.append(Tile("L0", f"{mean(q.l0):.4g}", spread(q.l0, ".4g"), width, sparsity, None, full))
    if q.auc is not None:
        others = [("PCA", q.auc_of_pca), ("the model's own activations", q.auc_of_model)]
        beside = " and ".join(f"{value:.3f} on {name}" for name, value in others if value is not None)
        below = q.auc_of_pca is not None and mean(q.auc) < q.auc_of_pca
        note = f"The same probes reach {beside}." if beside else ""
        auc = f"{mean(q.auc):.3f}"
        tiles_of_page.append(Tile("Probe AUC", auc, spread(q.auc, ".3f"), note, places(q.auc), None, below))
    return tiles_of_page


def each(q: Quality) -> tuple[list[str], list[list[str]]]:
    """(names of columns, a row for each SAE)."""
    columns: dict[str, list[str]] = {
        "SAE": q.names,
        "explained variance": [f"{v:.4f}".replace("-", "−") for v in q.explained_variance],
        "CE recovered": [f"{v:.4f}".replace("-", "−") for v in q.ce_recovered],
        "dead features": [percent(v) for v in q.dead_share],
        "L0": [f"{v:.4g}" for v in q.l0],
    }
    if q.stable_share is not None:
        columns["stable share"] = [percent(v) for v in q.stable_share]
    if q.auc is not None:
        columns["probe AUC"] = [f"{v:.4f}" for v in q.auc]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
