"""Figures of the conditions of a study, and effects of its axes.

Pure functions of the banks' results, because the audit computes all of them again.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np

from husai.evidence import contrast, deltas, references
from husai.evidence.estimates import mean_over_seeds, mean_over_seeds_and_sets
from husai.evidence.schemas import Bank, Condition

AXES = ("budget", "layer", "d_sae", "k", "family")
FIGURES = ("l0", "explained_variance", "ce_loss_score")
"""Figures of a condition that have a value for each seed."""
BENCHMARKS = {"saebench": "families", "cebench": "clusters"}
"""Benchmark -> field that clusters its data sets or pairs."""
POINTS = 4
"""Fewest points for a power law."""


def conditions(bank: Bank) -> list[dict]:
    """One row for each condition: held-out figures, stability, and each benchmark's figure and delta, with intervals.

    Raises:
        ValueError: results of a benchmark lack a condition.
    """
    records = {(r.checkpoint_sha256, r.facts.family, r.facts.d_sae, r.facts.k): r for r in bank.saes}
    parts = bank.hook_name.split(".")
    rows = []
    for s in bank.sections:
        member_records = [records[m.checkpoint_sha256, s.family, s.d_sae, s.k] for m in s.members]
        row = {
            "condition": member_records[0].condition,
            "facts": member_records[0].facts.to_json(),
            "layer": int(parts[1]) if parts[0] == "blocks" else None,
            **{name: getattr(s, name) for name in Condition.model_fields},
            "epochs": s.budget / bank.train_rows,
            "seeds": [m.seed for m in s.members],
            "checkpoints": {str(m.seed): m.checkpoint_sha256 for m in s.members},
            "l0": over_seeds([r.heldout.l0 for r in member_records]),
            "explained_variance": over_seeds([r.heldout.explained_variance for r in member_records]),
            "dead_share": over_seeds([r.heldout.dead_share for r in member_records]),
            "ce_loss_score": over_seeds([r.core.ce_loss_score for r in member_records]),
            "mcc_alive": s.stability.scores["mcc_alive"].observed.to_json(),
            "excess": s.stability.verdict.claimable_excess.to_json(),
            "outcome": s.stability.verdict.outcome,
            "converged": s.convergence.converged,
        }
        for name in BENCHMARKS:
            row[name], row[f"{name}_delta"] = None, deltas.none("not run")
            if (part := getattr(bank, name)) is None:
                continue
            benchmark_row = next((c for c in part.conditions if c["condition"] == row["condition"]), None)
            if benchmark_row is None:
                raise ValueError(f"{name}: a row of {row['condition']} expected")
            row[name] = benchmark_row["auc"][deltas.K] if name == "saebench" else benchmark_row["normalised"]
            row[f"{name}_delta"] = benchmark_row["delta"]["reference"]
        rows.append(row)
    return rows


def over_seeds(values: list[float]) -> dict:
    """Estimate of a mean over seeds, with the values in order of seeds."""
    return mean_over_seeds(values).to_json() | {"of_seeds": [float(v) for v in values]}


def unmatched(rows: list[dict]) -> str | None:
    """Reason why a condition has no delta on a benchmark that was run; None if all conditions have one."""
    for row in rows:
        for name in BENCHMARKS:
            if row[name] is not None and (delta := row[f"{name}_delta"])["estimate"] is None:
                return f"{row['condition']}: {name}: {delta['reason']}"
    return None


def pareto(rows: list[dict]) -> list[str]:
    """Conditions on the Pareto front of both benchmarks' deltas, among conditions of the same k, by estimates.

    Only deltas to one reference architecture are comparable. Conditions with ReLU references take part. ReLU conditions
    have TopK references and do not.
    """
    points = {}
    for r in rows:
        x, y = r["saebench_delta"]["estimate"], r["cebench_delta"]["estimate"]
        if None not in (x, y) and references.reference_family(r["family"]) == "relu":
            points[r["condition"]] = (r["k"], x, y)

    def beaten(p: tuple) -> bool:
        return any(q[0] == p[0] and q != p and q[1] >= p[1] and q[2] >= p[2] for q in points.values())

    return sorted(name for name, p in points.items() if not beaten(p))


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def contrasts(banks: list[Bank]) -> list[dict]:
    """Change of each figure for each step of each axis with several values; for architectures, of each pair.

    Both sides have the same seeds and the same other settings. The change is averaged over these settings, then
    over seeds, and on benchmarks over data sets too. Settings whose L0 differs by more than 10 % are left out,
    unless the axis is k.

    Returns:
        [{"axis", "from", "to", "settings": number of averaged settings, figure: estimate, "stability": result of
        `contrast.gain`}, or "reason" instead of figures]
    """
    rows = [
        row | {"bank": bank, "section": section}
        for bank in banks
        for row, section in zip(bank.conditions, bank.sections, strict=True)
    ]
    entries = []
    for axis in AXES:
        values = sorted({r[axis] for r in rows if r[axis] is not None})
        for low, high in combinations(values, 2) if axis == "family" else pairwise(values):
            pairs = _matched(rows, axis, low, high)
            entry = {"axis": axis, "from": low, "to": high}
            comparable = [(a, b) for a, b in pairs if axis == "k" or _same_l0(a, b)]
            if not comparable:
                why = "L0 differs by more than 10 %" if pairs else "no setting has both with the same seeds"
                entries.append(entry | {"settings": 0, "reason": why})
                continue
            entry |= {"settings": len(comparable), "reason": None}
            for name in FIGURES:
                steps = [np.array(b[name]["of_seeds"]) - np.array(a[name]["of_seeds"]) for a, b in comparable]
                entry[name] = mean_over_seeds(np.mean(steps, axis=0)).to_json()
            for name, clusters in BENCHMARKS.items():
                entry[name] = deltas.none("not run")
                if all(getattr(r["bank"], name) is not None for pair in comparable for r in pair):
                    steps = [_figures(b, name) - _figures(a, name) for a, b in comparable]
                    names_of_clusters = getattr(getattr(comparable[0][0]["bank"], name), clusters)
                    entry[name] = mean_over_seeds_and_sets(np.mean(steps, axis=0), names_of_clusters).to_json()
            before, after = ([pair[side]["section"] for pair in comparable] for side in (0, 1))
            entry["stability"] = contrast.gain(after, before).to_json()
            entries.append(entry)
    return entries


def _same_l0(a: dict, b: dict) -> bool:
    return references.same_l0(a["l0"]["estimate"], b["l0"]["estimate"])


def _figures(row: dict, name: str) -> np.ndarray:
    """Figures of a condition on a benchmark, `[seeds, data sets or pairs]`."""
    records = {r.checkpoint_sha256: r for r in getattr(row["bank"], name).saes}
    records_of_condition = [records[sha] for sha in row["checkpoints"].values()]
    return np.array(
        [r.test_auc[deltas.K] if name == "saebench" else r.normalised_of_pairs for r in records_of_condition]
    )


def _matched(rows: list[dict], axis: str, low, high) -> list[tuple[dict, dict]]:
    """Pairs of conditions that have the same seeds and differ in one axis alone."""
    at = {tuple(r[a] for a in AXES): r for r in rows}
    pairs = []
    for r in rows:
        partner = at.get(tuple(high if a == axis else r[a] for a in AXES))
        if r[axis] == low and partner is not None and partner["seeds"] == r["seeds"]:
            pairs.append((r, partner))
    return pairs


def power_laws(rows: list[dict]) -> list[dict]:
    """Power laws of 1 − explained variance in the budget and in the width, for settings with at least POINTS values.

    The exponent is the slope of each seed's least-squares line in logarithms, averaged over seeds.

    Returns:
        [{"axis", "figure", "values", "setting", "exponent": estimate, "largest_residual": largest residual of the
        seeds' mean, in natural logarithms, "epochs": largest number of epochs}]
    """
    laws = []
    for axis in ("budget", "d_sae"):
        settings: dict[tuple, list[dict]] = {}
        for r in rows:
            settings.setdefault(tuple((a, r[a]) for a in AXES if a != axis), []).append(r)
        for setting, conditions_of_setting in settings.items():
            conditions_of_setting = sorted(conditions_of_setting, key=lambda r: r[axis])
            if len(conditions_of_setting) < POINTS or len({tuple(r["seeds"]) for r in conditions_of_setting}) > 1:
                continue
            x = np.log([r[axis] for r in conditions_of_setting])
            # [values, seeds]
            y = np.log([1 - np.array(r["explained_variance"]["of_seeds"]) for r in conditions_of_setting])
            slope, level = np.polyfit(x, y, 1)
            residual = float(np.abs((y - np.outer(x, slope) - level).mean(1)).max())
            law: dict[str, Any] = {"axis": axis, "figure": "1 - explained_variance"}
            law |= {"values": [r[axis] for r in conditions_of_setting], "setting": dict(setting)}
            law |= {"exponent": mean_over_seeds(slope).to_json()}
            laws.append(law | {"largest_residual": residual, "epochs": max(r["epochs"] for r in conditions_of_setting)})
    return laws
