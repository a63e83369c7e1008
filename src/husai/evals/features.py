"""Makes a calibrated statement about each feature of an SAE from its siblings: the feature table and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from husai.activations.language_model import Inputs
from husai.activations.store import ActivationStore
from husai.dictionaries.sae import SAE
from husai.evals.contexts import strongest_contexts
from husai.evals.loaded import LoadedSAEs
from husai.evals.siblings import Group
from husai.evidence import rules
from husai.evidence.estimates import clopper_pearson_low, mean_over_seeds
from husai.evidence.features import COLUMNS, AboveChance, Bars, Decile, FeatureReliability, Sibling
from husai.evidence.names import NEAR
from husai.evidence.schemas import Interval
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.stability import prototypes
from husai.stability.matching import match, unit_rows
from husai.stability.recurrence import NONE, Chance, Partners, chance, partners, rebuilt

NUMBERS = 2**25
"""Largest number of activations (features × rows) of one SAE in memory at a time."""
DECILES = 10


# ---------------------------------------------------------------------------------------------------------------------
# Activations of partners


@dataclass(frozen=True)
class Coactivation:
    """Activations of features and of their partners on held-out rows."""

    correlations: np.ndarray  # float64 [siblings, d_sae]; 0 without a partner or without variance
    mean_activation: np.ndarray  # float64 [d_sae], over rows on which the feature fires; NaN if dead


@torch.no_grad()
def coactivation(
    sae: SAE, siblings: Sequence[SAE], partner: np.ndarray, store: ActivationStore, device: torch.device
) -> Coactivation:
    """Pearson correlation of each feature with its partner in each sibling, over all rows of a store.

    Rows are read in blocks, therefore memory does not grow with their number.

    Args:
        partner: number of each feature's partner, int `[siblings, d_sae]`; NONE without a partner.
    """
    rows = max(1, NUMBERS // max(s.d_sae for s in (sae, *siblings)))
    judged_sae, others = sae.to(device), [s.to(device) for s in siblings]
    columns = torch.from_numpy(np.where(partner == NONE, 0, partner)).to(device)
    shape = len(siblings), sae.d_sae
    sums, squares, fired = (torch.zeros(sae.d_sae, dtype=torch.float64, device=device) for _ in range(3))
    partner_sums, partner_squares, products = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))

    with progress("held-out activations of partners", store.rows) as advance:
        for start in range(0, store.rows, rows):
            x = store.read(start, min(start + rows, store.rows)).to(device)
            f = judged_sae.encode(x)
            sums += f.sum(0, dtype=torch.float64)
            squares += f.square().sum(0, dtype=torch.float64)
            fired += (f > 0).sum(0)
            for i, other in enumerate(others):
                g = other.encode(x)[:, columns[i]]
                partner_sums[i] += g.sum(0, dtype=torch.float64)
                partner_squares[i] += g.square().sum(0, dtype=torch.float64)
                products[i] += (f * g).sum(0, dtype=torch.float64)
            advance(len(x))

    n = store.rows
    covariance = products - sums * partner_sums / n
    variances = (squares - sums.square() / n).clamp_min(0) * (partner_squares - partner_sums.square() / n).clamp_min(0)
    correlations = torch.where(variances > 0, covariance / variances.sqrt(), 0.0).clamp(-1, 1).cpu().numpy()
    correlations[partner == NONE] = 0
    return Coactivation(correlations, (sums / fired).cpu().numpy())


def encoder_cosines(sae: SAE, siblings: Sequence[SAE], partner: np.ndarray) -> np.ndarray:
    """Cosine between the encoder directions of features and partners, `[siblings, d_sae]`; NaN without a partner."""
    directions = unit_rows(sae.W_enc.T.float())
    cosines = np.full(partner.shape, np.nan)
    for i, sibling in enumerate(siblings):
        has_partner = partner[i] != NONE
        partner_directions = unit_rows(sibling.W_enc.T.float())[partner[i][has_partner]]
        cosines[i, has_partner] = (directions[torch.from_numpy(has_partner)] * partner_directions).sum(1).numpy()
    return cosines


# ---------------------------------------------------------------------------------------------------------------------
# Prototypes


@dataclass(frozen=True)
class Nearest:
    """Nearest prototype of each feature."""

    cosine: np.ndarray  # [d_sae]
    name: list[str | None]  # the token, or `centroid`; None if the cosine is below NEAR


def nearest_prototypes(W_dec: Tensor, user_saes: LoadedSAEs, artifact_root: Path) -> Nearest:
    """Nearest prototype of each feature: a token mean or a centroid of held-out documents.

    No sibling was trained on these documents. A token mean counts twice: as it is, and less the mean of all rows
    (`prototypes.prototypes`).
    """
    all_prototypes = prototypes.of_store(user_saes.store, artifact_root, len(W_dec))
    cosine = prototypes.nearest(W_dec, all_prototypes).double().numpy()
    tokens, means = prototypes.token_means(user_saes.store, True)
    if not len(tokens):  # too few rows: no token occurs often enough
        return Nearest(cosine, [None if value < NEAR else "centroid" for value in cosine])
    token_prototypes = torch.cat([means, means - user_saes.store.stats()[0].float()])
    U, P = unit_rows(W_dec.float()), unit_rows(token_prototypes)
    products = [(part @ P.T).max(1) for part in U.split(1024)]
    largest, at = (torch.cat([getattr(p, name) for p in products]) for name in ("values", "indices"))
    names: list[str | None] = []
    for value, of_token, index in zip(cosine, largest.tolist(), at.tolist(), strict=True):
        if value < NEAR:
            names.append(None)
        elif of_token < value - 1e-5:
            names.append("centroid")
        else:
            names.append(user_saes.subject.tokenizer.decode([int(tokens[index % len(tokens)])]))
    return Nearest(cosine, names)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Judged:
    """Feature table of an SAE, and the figures that it rests on."""

    table: pd.DataFrame
    """One row for each feature; columns as in `evidence.features.COLUMNS`."""
    partners: Partners
    recurs: np.ndarray
    """Whether each feature recurs in each sibling, bool `[siblings, d_sae]`."""
    chance: Chance | None


def judge(
    user_saes: LoadedSAEs,
    group: Group,
    bars: Bars,
    artifact_root: Path,
    device: torch.device,
    rotations: int | None,
    certifiable: bool,
) -> Judged:
    """Statement about each feature of the first SAE.

    Args:
        rotations: number of rotations of all siblings by the spectral null (`recurrence.rotations_for`).
        certifiable: whether the siblings are fresh trainings. Relatives are not.
    """
    judged_sae, others = user_saes.saes[0], group.others
    W, decoders = judged_sae.sae.W_dec.float().cpu(), [o.W_dec for o in others]
    saes = [o.sae for o in others if o.sae is not None]
    whole = len(saes) == len(others)  # relatives have no encoder
    certifiable &= whole
    alive = judged_sae.firing_rate.numpy() > 0

    # Recurrence: a partner in each sibling, by decoder and by activations.
    matched = partners(W, decoders)
    fired = coactivation(
        judged_sae.sae, saes, matched.features if whole else matched.features[:0], user_saes.store, device
    )
    correlations = fired.correlations if whole else None
    recurrent = rules.recurs(matched.cosines, correlations, bars.cosine, bars.correlation)
    k, n = recurrent.sum(0), len(others)
    low = clopper_pearson_low(k, n, rules.CERTIFIED_LEVEL)

    # Chance: rotated siblings, and SAEs of Gaussian rows.
    tested = None
    if group.spectrum is not None and certifiable:
        tested = chance(W, decoders, group.spectrum, group.gaussian, rotations, stream=("features",), device=device)

    # Other explanations: the feature is a prototype, or a sibling splits it or merges it with others.
    near = nearest_prototypes(W, user_saes, artifact_root)
    q = None if tested is None else tested.q_values(alive, near.cosine >= NEAR)
    marked = np.zeros(len(W), bool) if q is None else rules.above_chance(q)
    split = rebuilt_in(W, decoders, ~recurrent & alive)
    withheld = group.withheld is not None
    certified_at = bars.certified_at if certifiable else None
    statements = rules.statements(k, low, marked, near.cosine >= NEAR, split, ~alive, n, certified_at, withheld)

    best = matched.best
    partner, cosine = (values[best, np.arange(len(W))] for values in (matched.features, matched.cosines))
    rate = judged_sae.firing_rate.double().numpy()
    columns: dict[str, Any] = {
        "feature": np.arange(len(W)),
        "statement": statements,
        "recurs": k,
        "siblings": np.full(len(W), n),
        "low": low if certifiable else None,
        "certified": rules.certified(low, bars.certified_at) if certifiable else None,
        "above_chance": None if q is None else marked,
        "q_value": q,
        "p_rotation": tested and tested.p_rotation,
        "p_permutation": tested and tested.p_permutation,
        "similarity": tested.similarity if tested else similarity(W, decoders),
        "similarity_mutual": tested and tested.mutual,
        "similarity_rotated": tested and tested.rotated,
        "similarity_gaussian": tested and tested.gaussian,
        "partner_cosine": matched.cosines.mean(0),
        "partner_correlation": None if correlations is None else correlations.mean(0),
        "encoder_cosine": _mean_of_known(encoder_cosines(judged_sae.sae, saes, matched.features)) if whole else None,
        "nearest_sibling": [None if p == NONE else others[i].label for i, p in zip(best, partner, strict=True)],
        "nearest_partner": np.where(partner == NONE, np.nan, partner),
        "nearest_cosine": np.where(partner == NONE, np.nan, cosine),
        "prototype_cosine": near.cosine,
        "prototype": near.name,
        "rebuilt": split,
        "firing_rate": rate,
        "mean_activation": fired.mean_activation,
        "dead": ~alive,
        "dense": rate > rules.DENSE,
        "encoder_decoder_cosine": _aligned(judged_sae.sae),
    }
    table = pd.DataFrame(
        {name: pd.Series(columns[name], index=range(len(W)), dtype=c.dtype) for name, c in COLUMNS.items()}
    )
    return Judged(table, matched, recurrent, tested)


def rebuilt_in(W_dec: Tensor, siblings: Sequence[Tensor], missing: np.ndarray) -> np.ndarray:
    """Number of siblings that lack a feature but rebuild it from a few features, int `[d_sae]`.

    Args:
        missing: bool `[siblings, d_sae]`.
    """
    counts = np.zeros(len(W_dec), int)
    with progress("features that a few others rebuild (siblings)", len(siblings)) as advance:
        for sibling, numbers in zip(siblings, map(np.flatnonzero, missing), strict=True):
            if len(numbers):
                cosines, _ = rebuilt(W_dec[torch.from_numpy(numbers)], sibling)
                counts[numbers] += (cosines >= rules.REBUILT_COSINE).numpy()
            advance(1)
    return counts


def _aligned(sae: SAE) -> np.ndarray:
    """Cosine between the encoder and the decoder direction of each feature, `[d_sae]`."""
    encoder, decoder = (unit_rows(W.float().cpu()) for W in (sae.W_enc.T, sae.W_dec))
    return (encoder * decoder).sum(1).double().numpy()


def similarity(W_dec: Tensor, siblings: Sequence[Tensor]) -> np.ndarray:
    """Mean over siblings of each feature's largest cosine with a feature of the sibling, `[d_sae]`."""
    return np.mean([prototypes.nearest(W_dec, unit_rows(s)).double().numpy() for s in siblings], axis=0)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are not NaN; NaN if all are."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def sum_up(
    user_saes: LoadedSAEs, group: Group, judged: Judged, bars: Bars, limits: list[str], notes: list[str]
) -> FeatureReliability:
    """Summary of the feature table.

    Args:
        limits: reasons why nothing can be certified. notes: notes on the SAEs. Both are sentences.
    """
    t, n = judged.table, len(group.others)
    alive = ~t["dead"].to_numpy(bool)
    apart = alive & (t["prototype_cosine"].to_numpy(float) < NEAR)
    k = t["recurs"].to_numpy()[alive]
    every, some = by_number_of_siblings(k, n)
    siblings = [o for o in group.others if o.origin != "relative"]
    among = among_siblings([o.W_dec for o in siblings], bars.cosine)
    partner_shares = (judged.partners.cosines >= bars.cosine).mean(1)
    trained = [o.heldout.explained_variance for o in group.others if o.heldout is not None and o.origin == "trained"]
    lost = user_saes.saes[0].record.heldout.explained_variance - float(np.mean(trained)) if trained else 0.0
    if lost > rules.UNUSUAL_EV:
        notes = [*notes, f"The siblings explain less variance, by {lost:.3f}, therefore fewer features may recur."]
    if group.withheld is not None:
        limits = [*limits, f'No feature is called "not found", because {group.withheld}.']
    return FeatureReliability(
        phase="feature_reliability",
        inputs=group.inputs,
        subject=user_saes.subject.name,
        hook_name=user_saes.hook_name,
        text=user_saes.source.record().get("text"),
        sae=user_saes.saes[0].record,
        siblings=[
            Sibling(
                label=o.label,
                origin=o.origin,
                checkpoint_sha256=o.sha256,
                d_sae=len(o.W_dec),
                heldout=o.heldout,
                partners=float(share),
            )
            for o, share in zip(group.others, partner_shares, strict=True)
        ],
        training=group.training,
        bars=bars,
        heldout_tokens=user_saes.store.rows,
        rotations=None if judged.chance is None else judged.chance.rotations,
        gaussian=len(group.gaussian),
        statements={name: int((t["statement"] == name).sum()) for name in rules.STATEMENTS},
        alive=int(alive.sum()),
        recur=share_over_siblings(judged.recurs, alive),
        recur_others=share_over_siblings(judged.recurs, apart) if apart.any() else None,
        certified=None if t["certified"].isna().all() else float(t["certified"][alive].mean()),
        above_chance=above_chance(t),
        deciles=deciles(t["firing_rate"].to_numpy(), judged.recurs),
        in_every=every,
        in_some=some,
        differs=rules.differs_from_siblings(partner_shares.tolist(), among) if siblings else None,
        among_siblings=among,
        limits=limits,
        notes=notes,
        table_sha256=sha256(t.to_csv(index=False).encode()).hexdigest(),
    )


def above_chance(table: pd.DataFrame) -> AboveChance | None:
    """Number of marked features, prototype-like ones apart. None if chance is not tested."""
    if table["above_chance"].isna().all():
        return None
    marked, alive = table["above_chance"].to_numpy(bool), ~table["dead"].to_numpy(bool)
    near = table["prototype_cosine"].to_numpy(float) >= NEAR
    return AboveChance(
        marked=int((marked & alive & ~near).sum()),
        features=int((alive & ~near).sum()),
        prototypes_marked=int((marked & alive & near).sum()),
        prototypes=int((alive & near).sum()),
    )


def share_over_siblings(recurrent: np.ndarray, chosen: np.ndarray) -> Interval:
    """Share of the chosen features that recur in a sibling: the mean over siblings, with its interval.

    The interval is that of t over siblings, cut at 0 and 1. If all siblings give the same share, their spread is no
    estimate of the variation between trainings, therefore there is no interval.

    Args:
        recurrent: bool `[siblings, d_sae]`. chosen: bool `[d_sae]`, at least one of them true.
    """
    shares = [float(v) for v in recurrent[:, chosen].mean(1)]
    mean = mean_over_seeds(shares)
    if mean.low is None or mean.high is None:
        return Interval.of(mean)
    if len(set(shares)) == 1:
        reason = "all siblings give the same share, which is no estimate of the variation between trainings"
        return Interval.of(replace(mean, low=None, high=None, standard_error=None, reason=reason))
    low, high = max(0.0, mean.low), min(1.0, mean.high)
    return Interval.of(replace(mean, low=low, high=high, method=f"{mean.method}, cut at 0 and 1"))


def deciles(rate: np.ndarray, recurrent: np.ndarray) -> list[Decile]:
    """Recurrence of alive features by decile of their firing rate."""
    order = np.argsort(rate, kind="stable")
    groups = [g for g in np.array_split(order[rate[order] > 0], DECILES) if len(g)]
    rows = []
    for group in groups:
        chosen = np.zeros(len(rate), bool)
        chosen[group] = True
        share = share_over_siblings(recurrent, chosen)
        rows.append(
            Decile(low=float(rate[group].min()), high=float(rate[group].max()), features=len(group), recur=share)
        )
    return rows


def by_number_of_siblings(k: np.ndarray, n: int) -> tuple[list[float], list[float]]:
    """Expected shares of features that recur in (every one, at least one) of j siblings drawn from n, j = 1 … n."""
    every = [float(np.mean([comb(int(hits), j) / comb(n, j) for hits in k])) for j in range(1, n + 1)]
    some = [float(np.mean([1 - comb(n - int(hits), j) / comb(n, j) for hits in k])) for j in range(1, n + 1)]
    return every, some


def among_siblings(decoders: Sequence[Tensor], cosine: float) -> list[float]:
    """Share of each sibling's features with a partner at or above the cosine: the mean over the other siblings."""
    n = len(decoders)
    shares = np.full((n, n), np.nan)
    with progress("siblings with each other (pairs)", n * (n - 1) // 2) as advance:
        for i in range(n):
            for j in range(i + 1, n):
                hits = (match(decoders[i], decoders[j], signed=True).cosines >= cosine).sum()
                shares[i, j], shares[j, i] = hits / len(decoders[i]), hits / len(decoders[j])
                advance(1)
    return [float(v) for v in np.nanmean(shares, 1)] if n > 1 else []


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def shown(table: pd.DataFrame, n: int) -> list[int]:
    """Sample of up to n alive features, sorted. Statements take turns, so that rare ones are represented."""
    queues = []
    for number, (_, group) in enumerate(table[~table["dead"]].groupby("statement", sort=True)):
        order = torch.randperm(len(group), generator=generator("features", "shown", number)).numpy()
        queues.append([int(f) for f in group["feature"].to_numpy()[order]])
    chosen: list[int] = []
    while queues and len(chosen) < n:
        queues = [q for q in queues if q]
        chosen += [q.pop() for q in queues][: n - len(chosen)]
    return sorted(chosen)


def contexts(user_saes: LoadedSAEs, group: Group, judged: Judged, features: list[int]) -> dict[str, dict]:
    """Feature -> its strongest held-out contexts and those of its nearest partner.

    Returns:
        {"<feature>": {"contexts": [{"text": [piece, …], "values": [activation, …]}], "partner": None or {"sibling",
        "feature", "cosine", "contexts"}}}
    """
    best, partner, others = judged.partners.best, judged.partners.features, group.others
    partners_shown = [
        [f for f in features if best[f] == i and partner[i, f] != NONE and o.sae is not None]
        for i, o in enumerate(others)
    ]
    requests = [(user_saes.saes[0].sae, features)]
    requests += [(o.sae, partner[i, partners_shown[i]].tolist()) for i, o in enumerate(others) if o.sae is not None]
    documents = user_saes.source.heldout()
    inputs = Inputs.of(user_saes.subject, documents, user_saes.store.rows, 0, user_saes.store.folder.parent)
    strongest = iter(strongest_contexts(user_saes.subject, user_saes.hook_name, [w for w in requests if w[1]], inputs))

    rows: dict[str, dict] = {str(f): {"contexts": next(strongest), "partner": None} for f in features}
    for i, of_sibling in enumerate(partners_shown):
        for f in of_sibling:
            description = {"sibling": others[i].label, "feature": int(partner[i, f])}
            description["cosine"] = round(float(judged.partners.cosines[i, f]), 4)
            rows[str(f)]["partner"] = description | {"contexts": next(strongest)}
    return rows
