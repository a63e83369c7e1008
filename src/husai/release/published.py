"""Rules of the earlier study: points without intervals, and seeds ranked as candidates.

They show the verdicts of that study on its files, and how the strict rules differ. They release nothing.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

from husai.runs.errors import BadInput

WEIGHTS = {"saebench": 0.5, "cebench": 0.5, "train_ev": 0.1}
GATES = ("random_model", "transcoder", "ood", "external")


ABOUT = {
    "d_sae": "saebench.sae_meta.d_sae",
    "cebench_baseline": "cebench.matched_baseline_metrics.interpretability_score_mean_max",
    "n_data_sets": "saebench.config.dataset_count",
    "ks": "saebench.config.ks",
}
"""Fact of a row -> its place in a record."""


def _figure_places(record: dict) -> dict[str, str]:
    """Figure -> its place in a record of the frontier or scaling study."""
    training = "train_metrics" if "architecture" in record else "train_summary.final_metrics"
    return {
        "saebench": "saebench.summary.best_minus_llm_auc",
        "cebench": "cebench.delta_vs_matched_baseline.interpretability_score_mean_max",
        "train_ev": f"{training}.explained_variance",
    }


class _Absent(Exception):
    """Raised if a record has no value at a place."""


def _at(record: dict, place: str) -> Any:
    value: Any = record
    for key in place.split("."):
        if value is None or (isinstance(value, dict) and value.get(key) is None):
            raise _Absent(f"it has no {place}")
        value = value[key]
    return value


def seeds(results: Any, file: str, study: str) -> tuple[list[dict], list[dict]]:
    """The trained SAEs of a published frontier or scaling file.

    A record without one of the values that the rule reads is left out, because a benchmark may have failed for one SAE.

    Args:
        file: name of the file, for messages. study: name of the study in the results.

    Returns:
        (one row for each SAE: condition, checkpoint and three figures; {"study", "condition", "reason"} for each
        record that is left out)

    Raises:
        BadInput: the file has another form, or a figure is no finite number.
    """
    try:
        rows, excluded = [], []
        for r in results["records"]:
            name = f"{r['architecture']}_seed{r['seed']}" if "architecture" in r else r["condition_id"]
            try:
                figures = {figure: _at(r, place) for figure, place in _figure_places(r).items()}
                facts = {fact: _at(r, place) for fact, place in ABOUT.items()}
            except _Absent as absent:
                excluded.append({"study": study, "condition": name, "reason": str(absent)})
                continue
            if any(isinstance(v, bool) or not isinstance(v, int | float) or not isfinite(v) for v in figures.values()):
                raise TypeError(f"{name}: a figure is no finite number")
            rows.append({"condition": name, "checkpoint": r["checkpoint"], "figures": figures, **facts})
        return rows, excluded
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file}: no published frontier or scaling results ({type(error).__name__}: {error})") from None


def select(rows: list[dict], excluded: list[dict], weights: dict[str, float] = WEIGHTS) -> dict:
    """Select the best row of the Pareto front of both benchmarks, by a weighted sum of min-max normalised figures.

    Args:
        excluded: records that were left out (`seeds`). Without any row, nothing is selected.

    Raises:
        BadInput: there is neither a row nor an excluded record.
    """
    if not rows and not excluded:
        raise BadInput("no candidate in the published results")
    low, high = ({n: f((r["figures"][n] for r in rows), default=0.0) for n in weights} for f in (min, max))
    scored = []
    for r in rows:
        norm = {n: (r["figures"][n] - low[n]) / ((high[n] - low[n]) or 1.0) for n in weights}
        scored.append(r | {"norm": norm, "score": sum(w * norm[n] for n, w in weights.items())})

    def beaten(a: dict) -> bool:
        pairs = [(b["figures"][n], a["figures"][n]) for b in rows for n in ("saebench", "cebench")]
        each = zip(pairs[::2], pairs[1::2], strict=True)
        return any(x >= p and y >= q and (x > p or y > q) for (x, p), (y, q) in each)

    front = sorted((r for r in scored if not beaten(r)), key=lambda r: (-r["score"], r["condition"]))
    chosen = front[0] if front else None
    ranked = {"weights": weights, "n": len(rows), "front": front, "selected": chosen, "candidates": scored}
    return ranked | {"excluded": excluded}


def gate(
    phase4a: dict, transcoder: dict, ood: dict, selected: dict, minima: dict[str, float], max_ood_drop: float
) -> dict:
    """Verdicts of the earlier study: {"metrics", "gates"}, from points and thresholds.

    Args:
        phase4a: `comparison_difference` and `trained_ci_low_minus_random_ci_high`, the only published figures.
        minima: minimum of `saebench` and of `cebench`.

    Raises:
        BadInput: a figure is missing.
    """
    try:
        metrics = {
            "trained_random_delta": phase4a["comparison_difference"],
            "trained_random_delta_lcb": phase4a["trained_ci_low_minus_random_ci_high"],
            "transcoder_delta": transcoder["transcoder_delta"],
            "ood_drop": ood["ood_drop"],
            "saebench_delta": selected["figures"]["saebench"],
            "cebench_interp_delta_vs_baseline": selected["figures"]["cebench"],
        }
    except (KeyError, TypeError) as error:
        raise BadInput(f"published evidence: {error} is missing") from None
    gates = {
        "random_model": metrics["trained_random_delta"] >= 0 and metrics["trained_random_delta_lcb"] >= 0,
        "transcoder": metrics["transcoder_delta"] >= 0,
        "ood": metrics["ood_drop"] <= max_ood_drop,
        "external_saebench": metrics["saebench_delta"] >= minima["saebench"],
        "external_cebench": metrics["cebench_interp_delta_vs_baseline"] >= minima["cebench"],
    }
    gates["external"] = gates["external_saebench"] and gates["external_cebench"]
    return {"metrics": metrics, "gates": gates | {"pass_all": all(gates[name] for name in GATES)}}


def beside_strict(transcoder: dict, ood: dict, selected: dict, verdict: dict) -> list[dict]:
    """Each gate of the earlier study, with the strict gate's status on the same evidence, and the reason.

    Returns:
        [{"gate", "published": bool, "figure": its point, "status": status of the strict gate, "reason"}]
    """
    metrics, gates = verdict["metrics"], verdict["gates"]
    try:
        seeds = len(transcoder["per_seed"])
        pairs = len(transcoder["transcoder"]["pairwise_pwmcc_values"])
        inside, outside = (int(ood["config"][f"{side}_dataset_count"]) for side in ("id", "ood"))
        checkpoint = ood["config"]["checkpoint"]
        width, baseline, probed, ks = (selected[n] for n in ("d_sae", "cebench_baseline", "n_data_sets", "ks"))
    except (KeyError, TypeError) as error:
        raise BadInput(f"published evidence: {error} is missing") from None
    largest = (width - 1) / width**0.5
    why = {
        "random_model": (
            "trained_random_delta",
            "two headline figures without the pairs behind them: no interval over seeds can be made again; they are "
            "about modular addition, not about the candidate",
        ),
        "transcoder": (
            "transcoder_delta",
            f"{seeds} seeds, whose {pairs} pairs were taken for independent; five are needed; not about the candidate",
        ),
        "ood": (
            "ood_drop",
            f"one SAE ({checkpoint.split('/')[-2]}), not the candidate; the model's own probe was pooled over other "
            f"data sets ({inside} in distribution, {outside} out of it)",
        ),
        "external_saebench": (
            "saebench_delta",
            f"one seed, the best of k = {', '.join(map(str, ks))} on test data of {probed} data sets, against the "
            "model's own probe and not a matched reference",
        ),
        "external_cebench": (
            "cebench_interp_delta_vs_baseline",
            f"the baseline of {baseline:.2f} is of another width: {width} features cannot score above {largest:.2f}, "
            "so that the threshold could not be reached",
        ),
    }
    return [
        {"gate": name, "published": gates[name], "figure": metrics[metric], "status": "MISSING", "reason": reason}
        for name, (metric, reason) in why.items()
    ]
