"""Pairs of dictionaries against their nulls, and what may be said over all seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from husai.runs.errors import BadInput
from husai.runs.seeds import generator
from husai.stability import nulls
from husai.stability.inference import Estimate, jackknife, tost
from husai.stability.matching import match, unit_rows
from husai.stability.scores import GAP, SCORES, max_cosines, score

PRIMARY_SCORE = "mcc_alive"
GATED_NULLS = ("isotropic", "untrained", "spectral")
REPORTED_NULLS = ("covariance_matched", "shuffled")
ASKED_FOR_NULLS = ("random_model",)
"""Reported where they were computed, and not missed where they were not."""
MINIMUM_SEEDS = 5
EQUIVALENCE_MARGIN = 0.01
SAME_DIRECTION = 1 - 1e-5  # of a |cos|, bfloat16 copies included
ONE_TRAINING = 0.5  # median |cos|; of random directions in 8 dimensions it is 0.25
FEW_DIMENSIONS = 8  # below, directions may coincide by chance
BINS = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Dictionary:
    """What the comparison needs of one SAE."""

    W_dec: Tensor  # [d_sae, d_in]
    alive: Tensor  # bool [d_sae]
    untrained: Tensor | None = None  # [d_sae, d_in], the same initialisation

    def digest(self) -> str:
        """sha256 of all that a comparison reads of it."""
        sha = hashlib.sha256()
        for tensor in (self.W_dec, self.alive, self.untrained):
            sha.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return sha.hexdigest()


def refuse_shared(labels: Sequence[str], dictionaries: Sequence[Dictionary]) -> None:
    """Raise BadInput where two dictionaries share their decoder or their initialisation: that is not stability."""
    if len(dictionaries) < 2:
        raise BadInput(f"{len(dictionaries)} SAE given: stability needs at least 2, and 5 for a verdict")
    for (name_a, a), (name_b, b) in combinations(zip(labels, dictionaries, strict=True), 2):
        if a.W_dec.shape[1] != b.W_dec.shape[1]:
            raise BadInput(f"{name_a} and {name_b} have d_in {a.W_dec.shape[1]} and {b.W_dec.shape[1]}: one expected")
        # Trained directions may come to agree; initial ones never do.
        parts = (("decoder", a.W_dec, b.W_dec, 0.99), ("initialisation", a.untrained, b.untrained, 0.5))
        for what, x, y, share in parts:
            if x is not None and y is not None and shared(x, y, share):
                raise BadInput(f"{name_a} and {name_b} share their {what}: independently trained SAEs expected")


def refuse_one_training(labels: Sequence[str], decoders: Sequence[Tensor]) -> None:
    """Raise BadInput for two decoders `[d_sae, d_in]` of one training, at two of its steps: feature by feature they
    point the same way, which independent seeds do not, for nothing puts their features into one order."""
    for (name_a, a), (name_b, b) in combinations(zip(labels, decoders, strict=True), 2):
        if a.shape == b.shape and a.shape[1] >= FEW_DIMENSIONS:
            alike = (unit_rows(a.float()) * unit_rows(b.float())).sum(1).abs().median().item()
            if alike > ONE_TRAINING:
                raise BadInput(
                    f"{name_a} and {name_b} seem to be of one training: the median |cos| of features of one number is "
                    f"{alike:.2f}; the last checkpoint of each of several trainings expected"
                )


def shared(x: Tensor, y: Tensor, share: float) -> bool:
    """Whether at least this share of the smaller dictionary's directions stands in the other, in whatever order, sign
    and scale; rows of zeros do not count."""
    if x.shape == y.shape and torch.equal(x, y):
        return True
    x, y = (w[w.norm(dim=1) > 0].float() for w in (x, y))
    if x.shape[1] < FEW_DIMENSIONS or min(len(x), len(y)) == 0:
        return False
    same = max_cosines(x, y)[0 if len(x) <= len(y) else 1] > SAME_DIRECTION
    return bool(same.double().mean() >= share)


def pair(
    a: Dictionary,
    b: Dictionary,
    spectrum: nulls.Spectrum,
    draws: int,
    threads: int,
    scores: tuple[str, ...] = SCORES,
) -> dict:
    """Scores of one pair, observed and under the nulls; to be called inside `one_torch_thread`.

    Args:
        draws: of the spectral null; the two Gaussian nulls, whose means vary far less, get a fifth of it.
        scores: SCORES, or ALIVE alone, which is faster.

    Returns:
        {"observed" | null: {"mean": {score: value}, "draws": {score: [values]} or None, "histogram": counts of the
        matched |cos| of alive features in BINS}}; a null that cannot be computed is None.
    """

    contents = a.digest(), b.digest()  # seed the draws: where a checkpoint lies and what it is called change nothing

    def drawn(name: str, draw: Callable, n: int) -> dict:
        def one(i: int) -> tuple[dict[str, float], np.ndarray]:
            x, y = draw(a.W_dec, b.W_dec, g=generator("null", *contents, name, i))
            return score(x, y, a.alive, b.alive, scores), histogram(x, y, a, b) if i == 0 else np.zeros(0)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found, histograms = zip(*pool.map(one, range(n)), strict=True)
        values = {s: [x[s] for x in found] for s in scores}
        means = {s: float(np.mean(v)) for s, v in values.items()}
        means[GAP] = max(x[GAP] for x in found)
        return {"mean": means, "draws": values, "histogram": histograms[0].tolist()}

    def given(x: Tensor, y: Tensor) -> dict:
        return {
            "mean": score(x, y, a.alive, b.alive, scores),
            "draws": None,
            "histogram": histogram(x, y, a, b).tolist(),
        }

    few = max(1, draws // 5)
    return {
        "observed": given(a.W_dec, b.W_dec),
        "isotropic": drawn("isotropic", nulls.isotropic, few),
        "untrained": None if a.untrained is None or b.untrained is None else given(a.untrained, b.untrained),
        "spectral": drawn("spectral", partial(nulls.spectral, spectrum=spectrum), draws),
        "covariance_matched": drawn("covariance_matched", partial(nulls.covariance_matched, spectrum=spectrum), few),
    }


def computed(pairs: dict[tuple[int, int], dict], missing: dict[str, str]) -> list[str]:
    """The nulls that stand in these pairs, in the order in which they are reported."""
    asked_for = [n for n in ASKED_FOR_NULLS if all(n in value for value in pairs.values())]
    return [n for n in (*GATED_NULLS, *REPORTED_NULLS, *asked_for) if n not in missing]


def histogram(x: Tensor, y: Tensor, a: Dictionary, b: Dictionary) -> np.ndarray:
    """Counts in BINS of the matched |cos| of the rows of `x` and `y` that are alive in `a` and `b`."""
    x, y = x[a.alive], y[b.alive]
    matched = match(x, y).cosines if len(x) and len(y) else np.zeros(0)
    return np.histogram(matched.clip(0, 1), BINS)[0]


def summarise(labels: Sequence[str], pairs: dict[tuple[int, int], dict], missing: dict[str, str]) -> dict:
    """Estimates over all seeds: the observed scores, each null, and the excess over each null, with intervals.

    Args:
        labels: one a dictionary. pairs: the outcome of `pair` for each i < j; "shuffled" and "random_model" may
            stand among the nulls.
        missing: null -> why it is not there.
    """
    seeds = len(labels)

    def matrix(name: str, s: str) -> np.ndarray:
        m = np.zeros((seeds, seeds))
        for (i, j), value in pairs.items():
            m[i, j] = m[j, i] = value[name]["mean"][s]
        return m

    present = computed(pairs, missing)
    scored = [s for s in SCORES if all(s in value["observed"]["mean"] for value in pairs.values())]
    observed = {s: matrix("observed", s) for s in scored}
    scores = {}
    for s in scored:
        entry = {"observed": jackknife(observed[s]).to_json(), "nulls": {}, "excess": {}}
        for name in present:
            null = matrix(name, s)
            entry["nulls"][name] = {"mean": jackknife(null).estimate, **_spread(pairs, name, s)}
            entry["excess"][name] = jackknife(observed[s] - null).to_json()
        scores[s] = entry
    primary = scores[PRIMARY_SCORE]
    gated = [n for n in GATED_NULLS if n in present]
    highest = max(gated, key=lambda n: primary["nulls"][n]["mean"])
    return {
        "labels": list(labels),
        "scores": scores,
        GAP: max(value[name]["mean"][GAP] for value in pairs.values() for name in ("observed", *present)),
        "missing_nulls": missing,
        "verdict": _verdict(seeds, primary, highest, missing),
    }


def _spread(pairs: dict, name: str, s: str) -> dict:
    """How the null's own mean over the pairs varies from draw to draw."""
    values = [value[name]["draws"] for value in pairs.values()]
    if values[0] is None:
        return {"draws": 0, "q95_of_mean": None}
    return {"draws": len(values[0][s]), "q95_of_mean": float(np.quantile(np.mean([v[s] for v in values], 0), 0.95))}


def _verdict(seeds: int, primary: dict, highest: str, missing: dict[str, str]) -> dict:
    """Above chance: with at least MINIMUM_SEEDS seeds, the interval of the excess of PRIMARY_SCORE lies above 0 for
    every one of GATED_NULLS. What may be claimed is the excess over the highest of them. Where that is not shown, an
    equivalence test says whether the excess is shown to be within EQUIVALENCE_MARGIN of 0, or whether nothing is."""
    absent = [n for n in GATED_NULLS if n in missing]
    failed = [n for n in GATED_NULLS if n not in missing and not (primary["excess"][n]["low"] or 0) > 0]
    if absent:
        outcome, reason = "inconclusive", "a required null is missing: " + ", ".join(absent)
    elif seeds < MINIMUM_SEEDS:
        outcome, reason = "inconclusive", f"{seeds} seeds; a verdict needs {MINIMUM_SEEDS}"
    elif failed:
        outcome, reason = "not above chance", "the excess is not shown to be above 0 over: " + ", ".join(failed)
    else:
        outcome, reason = "above chance", "the interval of the excess lies above 0 for every required null"
    excess = Estimate(**primary["excess"][highest])
    equivalence = None
    if outcome == "not above chance":
        equivalence = asdict(tost(excess, EQUIVALENCE_MARGIN))
        reason += (
            f"; within ±{EQUIVALENCE_MARGIN} of the highest null (TOST, p = {equivalence['p_value']:.3g})"
            if equivalence["equivalent"]
            else f"; nor is it shown to lie within ±{EQUIVALENCE_MARGIN} of it (TOST, p = {equivalence['p_value']:.3g})"
        )
    return {
        "score": PRIMARY_SCORE,
        "outcome": outcome,
        "reason": reason,
        "highest_null": highest,
        "claimable_excess": excess.to_json(),
        "equivalence": equivalence,
    }
