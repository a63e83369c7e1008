"""Figures as text: how an estimate, a table, a file of pairs is written."""

from __future__ import annotations

from pathlib import Path

from husai.runs.files import write_text


def interval(e: dict, sign: str = "") -> str:
    """`0.597 [0.564, 0.629]`, four digits; `sign="+"` writes it for differences; `none: why` where there is none."""
    if e["estimate"] is None:
        return f"none: {e['reason']}"
    return f"{e['estimate']:{sign}.4f}" + (
        "" if e["low"] is None else f" [{e['low']:{sign}.4f}, {e['high']:{sign}.4f}]"
    )


GAINS = ("observed", "isotropic", "untrained", "spectral")
"""Estimates of `evidence.contrast.gain`: of `mcc_alive` itself, and of its excess over each required null."""
GAIN_HEADER = ["gain of `mcc_alive`", *(f"over {null}" for null in GAINS[1:])]


def gain_cells(gain: dict) -> list[str]:
    """One cell for each of GAIN_HEADER."""
    return [interval(gain[name], "+") for name in GAINS]


def gain_sentence(gain: dict) -> str:
    over = ", ".join(f"{interval(gain[null], '+')} over {null}" for null in GAINS[1:])
    return f"paired gain of `mcc_alive` {interval(gain['observed'], '+')}, of its excess {over}"


def at_rest(convergence: dict) -> str:
    """Whether stability had come to rest at the end of training, as a cell."""
    return {True: "yes", False: "**no**", None: "not known"}[convergence["converged"]]


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(map(str, r))} |" for r in (header, ["---"] * len(header), *rows)]


def write_csv(path: Path, rows: list[dict]) -> Path:
    """One line a row; columns as in the first row."""
    import pandas as pd

    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return path


def pair_rows(section: dict, **about) -> list[dict]:
    """Every pair of a section of results against what it was scored, a row each, for `write_csv`."""
    return [
        {**about, "a": pair["a"], "b": pair["b"], "against": against, **scores}
        for pair in section["pairs"]
        for against, scores in pair.items()
        if against not in ("a", "b")
    ]
