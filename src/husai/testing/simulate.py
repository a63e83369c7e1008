"""Simulated evidence with known true effects, for measuring the gate's error rates and for its fuzzer.

Raw figures of a bundle are drawn with given true effects and noise. The functions of a real run compute all derived
figures, therefore `recompute.results_problems` reports no problem. No file here describes a real SAE.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from husai.evidence import (
    coding,
    conditions,
    data_sets,
    deltas,
    drop,
    levels,
    planted,
    random_model,
    references,
    rules,
    transcoder,
)
from husai.evidence.data_sets import DATA_SETS
from husai.evidence.estimates import Estimate, noise
from husai.evidence.names import ALIVE, GAP, GATED_NULLS, OTHERS, PRIMARY_SCORE, STRATA
from husai.evidence.rules import SPECTRAL_DRAWS
from husai.evidence.schemas import (
    CODE_FIGURES,
    Alike,
    Bank,
    Code,
    Comparison,
    Contrastive,
    Control,
    Evaluated,
    Facts,
    LedgerEntry,
    OODStress,
    OwnSection,
    Phase4a,
    PlantedSection,
    Probing,
    RandomModelStress,
    Retrained,
    ScoredRecord,
    Section,
    SeedGroup,
    Selected,
    Strict,
    TranscoderStress,
)
from husai.evidence.stability import summarise
from husai.release import selection
from husai.release.gate import GATES, MAKES, Bundle, File, Thresholds
from husai.runs.files import digest, read_json

OF_SEEDS = ("code", "fit")
"""Gates that read one figure for each seed."""
OF_PAIRS = ("positive_control", "stability", "random_model", "transcoder")
"""Gates that read pairs of seeds. Gates neither here nor in OF_SEEDS read seeds and data sets."""
STUDY_SEEDS = (42, 123, 456, 789, 1011)
SETS, SHIFTED = DATA_SETS.split(","), [n.removesuffix("_OOD") for n in data_sets.FAMILIES["ood"]["shifted"]]
CLUSTERS = [f"story_family{i // 12:02}" for i in range(192)] + ["story_family00"] * 48
"""Clusters of the pairs. One cluster, which selection leaves to the gate, has more pairs than the gate counts."""
D_IN, D_SAE, K, TOKENS, ROWS, HOOK = 256, 512, 16, 600_000, 200_000, "blocks.1.hook_resid_pre"
LLM = 0.8
"""AUC of the model's own probe."""
PROTOTYPES = {"rows": 0.1, "centroids": 0.0, "token means": 0.2}
"""Kind of prototypes -> distance of its figures below the best kind."""
VERSIONS = {"sae-bench": "0.6.0", "sae-probes": "0.4.2"}


@dataclass(frozen=True)
class NoiseSpread:
    """Standard deviations of the independent parts of a gated figure."""

    seed: float
    """Spread of a seed's effect on each of its pairs, or on each data set."""
    cell: float
    """Spread of the independent noise of each pair of seeds, or of each seed on a data set."""
    family: float = 0.0
    """Spread of the common effect of a family's data sets."""
    data_set: float = 0.0
    other: float = 0.0
    """Spread of the other arm (null, control, reference, the model itself) as a multiple; it varies independently."""

    def scaled(self, **factors: float) -> NoiseSpread:
        return replace(self, **{name: factor * getattr(self, name) for name, factor in factors.items()})


Noise = dict[str, NoiseSpread]
"""Gate -> noise of its figure."""


def neutral() -> dict[str, float]:
    """Gate -> its threshold, the true value without an effect."""
    t = Thresholds()
    at = dict.fromkeys(("positive_control", "stability"), t.min_stability_excess)
    at |= {"code": rules.CODE.threshold, "transcoder": t.min_transcoder_delta, "ood": t.max_ood_drop}
    return dict.fromkeys(GATES, 0.0) | at | {"saebench": t.min_saebench_delta, "cebench": t.min_cebench_delta}


def shifted(gate: str, by: float) -> float:
    """True value at a distance `by` from the threshold, on the passing side."""
    return neutral()[gate] + (-by if gate == "ood" else by)


# ---------------------------------------------------------------------------------------------------------------------
# Measured noise


def measured(docs: Path) -> Noise:
    """Noise of each gate's figure from the file that `benchmarks/gate_calibration.py` wrote (`measure`).

    Args:
        docs: folder of the documents.
    """
    spreads = read_json(docs / "benchmarks" / "gate_noise.json", "noise")
    return {gate: NoiseSpread(**spreads[gate]) for gate in GATES}


def measure(evidence: Path) -> Noise:
    """Noise of each gate's figure in the runs on husai-tiny, estimated by moments.

    Variances of a gate's figures are averaged. Stability, code, fit and the stress tests come from the demo's
    candidate. Benchmarks come from the larger studies of data sets and pairs, each condition against its matched
    reference.

    Args:
        evidence: folder of the evidence.
    """
    demo = evidence / "embedded_queue"
    control = _results(demo / "phase4a_trained_vs_random", Phase4a).planted
    confirmation = _results(demo / "candidate_confirmation", Retrained)
    meaningless = _results(demo / "random_model_stress", RandomModelStress)
    across = _results(demo / "transcoder_stress", TranscoderStress).across
    shift = _results(demo / "ood_stress", OODStress).shifted
    assert control is not None  # the demo plants features
    assert confirmation.bank.code is not None  # every confirmation has a code section

    def excesses(section: Section) -> list[np.ndarray]:
        return [section.scores(null, score) for score, null in rules.STABLE.values()]

    gains = [
        meaningless.section.scores(null) - random_arm.scores(null)
        for random_arm in meaningless.random_models
        for null in (None, *GATED_NULLS)
    ]
    coded, heldout = confirmation.bank.code, [r.heldout for r in confirmation.bank.saes if r.candidate]
    kinds = {str(kind): of_kind for kind, of_kind in coded.prototypes.items()}
    best = {figure: getattr(kinds[coded.best(figure)], figure) for figure in CODE_FIGURES}
    gained = [[v - best[f][seed] for seed, v in getattr(coded.saes, f).items()] for f in CODE_FIGURES]
    variances = {
        "positive_control": map(_of_matrix, excesses(control.degrees[-1].study)),
        "stability": map(_of_matrix, excesses(confirmation.section)),
        "code": map(_of_seeds, gained),
        "fit": [_of_seeds([h.explained_variance for h in heldout])],
        "random_model": map(_of_matrix, gains),
        "transcoder": [_of_matrix(across.scores(null, score)) for score, null in rules.CHANCE.values()],
        "ood": [_of_sets(drop.drops(shift, shift.k), shift.families)],
        "saebench": _differences(_results(evidence / "saebench_husai_tiny", Probing)),
        "cebench": _differences(_results(evidence / "phase4e_cebench_matched200", Contrastive)),
    }
    return {gate: _pooled(variances[gate]) for gate in GATES}


T = TypeVar("T", bound=Strict)


def _results(folder: Path, schema: type[T]) -> T:
    return schema.model_validate(read_json(folder / "results.json", "evidence"))


def _of_seeds(values: list[float]) -> dict[str, float]:
    return {"seed": float(np.var(values, ddof=1)), "cell": 0.0}


def _of_matrix(x: np.ndarray) -> dict[str, float]:
    """Variances of seeds and pairs from the effects of a half-diallel table (Griffing 1956, method 4).

    Args:
        x: symmetric matrix `[S, S]` with diagonal 0.
    """
    s, sums = len(x), x.sum(1)
    of_seed = sums / (s - 2)  # up to a constant
    squares = (x**2).sum() / 2 - (sums**2).sum() / (s - 2) + 2 * (x.sum() / 2) ** 2 / ((s - 1) * (s - 2))
    cell = max(0.0, float(squares) / (s * (s - 3) / 2))
    return {"seed": max(0.0, float(of_seed.var(ddof=1)) - cell / (s - 2)), "cell": cell}


def _differences(results: Probing | Contrastive) -> Iterator[dict[str, float]]:
    """Variances of the difference between each condition and its reference."""
    probed = isinstance(results, Probing)
    groups = results.families if isinstance(results, Probing) else results.clusters

    def figures(records: Sequence) -> np.ndarray:
        return np.array([r.test_auc[deltas.K] if probed else r.normalised_of_pairs for r in records])

    for group in deltas.by_condition(results.saes).values():
        match = references.matched(group, results.saes)
        if len(match.records) == len(group) >= 5:
            yield _of_sets(figures(group) - figures(match.records), groups)


def _of_sets(x: np.ndarray, groups: list[str]) -> dict[str, float]:
    """Variances of a matrix `[S, D]` by moments: of seeds, families, data sets and cells."""
    (s, d), names = x.shape, np.array(groups)
    residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    cell = float((residual**2).sum()) / ((s - 1) * (d - 1))
    of_set = x.mean(0)
    each = [of_set[names == name] for name in dict.fromkeys(groups)]
    within = float(sum(((g - g.mean()) ** 2).sum() for g in each)) / max(1, d - len(each))
    between = float(np.var([g.mean() for g in each], ddof=1))
    return {
        "seed": max(0.0, float(x.mean(1).var(ddof=1)) - cell / d),
        "cell": cell,
        "family": max(0.0, between - within * float(np.mean([1 / len(g) for g in each]))),
        "data_set": max(0.0, within - cell / s),
    }


def _pooled(variances: Iterable[dict[str, float]]) -> NoiseSpread:
    rows = list(variances)
    return NoiseSpread(**{name: float(np.sqrt(np.mean([r[name] for r in rows]))) for name in rows[0]})


def standard_error(gate: str, spread: NoiseSpread, seeds: int = 5) -> float:
    """Standard error of a gate's figure in a bundle with this noise. Effects are stated in this unit."""
    arms = 1 + spread.other**2
    if gate in OF_PAIRS:
        return float(np.sqrt(arms * (4 * spread.seed**2 / seeds + spread.cell**2 / (seeds * (seeds - 1) / 2))))
    if gate in OF_SEEDS:
        itself = spread.other**2 if gate == "code" else 0.0  # a fit has no other arm
        return float(np.sqrt((1 + itself) * (spread.seed**2 + spread.cell**2) / seeds))
    files = json.loads(_frame(seeds))
    if gate == "ood":  # sets and the model itself are fixed
        return float(
            np.sqrt(spread.seed**2 / seeds + spread.cell**2 / (seeds * len(files["ood"]["shifted"]["data_sets"])))
        )
    families = _gated_groups(files["confirmation"]["bank"], gate)
    counts, d = np.array([families.count(f) for f in dict.fromkeys(families)]), len(families)
    of_sets = spread.family**2 * (counts**2).sum() / d**2 + spread.data_set**2 / d
    of_seeds = spread.seed**2 / seeds + spread.cell**2 / (seeds * d)
    return float(np.sqrt(arms * (of_sets + of_seeds)))


def _gated_groups(bank: dict, gate: str) -> list[str]:
    """Group of each data set, or pair, that the gate counts."""
    names, groups = {
        "saebench": (bank["saebench"]["data_sets"], bank["saebench"]["families"]),
        "cebench": (data_sets.pair_names(bank["cebench"]["clusters"]), bank["cebench"]["clusters"]),
    }[gate]
    return [groups[i] for i in data_sets.gated(names, groups)]


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def of_pairs(rng: np.random.Generator, seeds: int, spread: NoiseSpread) -> np.ndarray:
    """Symmetric noise `[S, S]` of pairs of seeds: additive effects of both seeds, and noise of the pair."""
    a, e = rng.normal(0, 1, seeds) * spread.seed, np.triu(rng.normal(0, 1, (seeds, seeds)), 1) * spread.cell
    return a[:, None] + a[None, :] + e + e.T


def of_sets(rng: np.random.Generator, seeds: int, families: list[str], spread: NoiseSpread) -> np.ndarray:
    """Noise `[S, D]` of seeds on data sets. Data sets of a family share an effect."""
    names = list(dict.fromkeys(families))
    shared = (rng.normal(0, 1, len(names)) * spread.family)[[names.index(f) for f in families]]
    set_effects = rng.normal(0, 1, len(families)) * spread.data_set
    cells = rng.normal(0, 1, (seeds, len(families))) * spread.cell
    return rng.normal(0, 1, (seeds, 1)) * spread.seed + shared + set_effects + cells


def bundle(
    effects: dict[str, float],
    noise: Noise,
    rng: np.random.Generator,
    seeds: int = 5,
    derived: bool = True,
    attempt: int = 1,
) -> Bundle:
    """Bundle of all files that the gate reads, for a candidate with `seeds` fresh seeds.

    Args:
        effects: gate -> true value of its figure. derived: False leaves estimates as they were before the draw, which
            is faster. The decision is the same, because the gate reads raw figures alone. attempt: number of
            confirmations of the configuration, with this one.
    """
    files = json.loads(_frame(seeds))
    bank, shift = files["confirmation"]["bank"], files["ood"]["shifted"]

    def pairs(gate: str, section: dict, below: dict, names: tuple[str, ...]) -> None:
        spread = noise[gate]
        arms = 0.4 + effects[gate] + of_pairs(rng, seeds, spread), 0.4 + of_pairs(rng, seeds, spread) * spread.other
        for (i, j), p, q in zip(combinations(range(seeds), 2), section["pairs"], below["pairs"], strict=True):
            p["observed"] = _scores(arms[0][i, j])
            q |= {name: _scores(arms[1][i, j]) for name in names}

    def sets(gate: str, families: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Figures of the candidate and of the other arm, `[S, D]` each, without their common level."""
        spread = noise[gate]
        candidate_noise, other_noise = (of_sets(rng, seeds, families, spread) for _ in range(2))
        return effects[gate] + candidate_noise, other_noise * spread.other

    for gate, section in (
        ("positive_control", files["phase4a"]["planted"]["degrees"][-1]["study"]),
        ("stability", bank["sections"][0]),
    ):
        pairs(gate, section, section, GATED_NULLS)
    candidate_section, across = bank["sections"][0], files["transcoder"]["across"]
    for stress in (files["random_model"], files["transcoder"]):  # both stress tests repeat the candidate's pairs
        stress["section"]["pairs"] = copy.deepcopy(candidate_section["pairs"])
    spread = noise["random_model"]
    itself = effects["random_model"] + of_pairs(rng, seeds, spread)
    for control in files["random_model"]["random_models"]:
        gain = itself - of_pairs(rng, seeds, spread) * spread.other
        for (i, j), p, q in zip(
            combinations(range(seeds), 2), candidate_section["pairs"], control["pairs"], strict=True
        ):
            q |= {null: dict(p[null]) for null in GATED_NULLS}
            q["observed"] = _scores(p["observed"][PRIMARY_SCORE] - gain[i, j])
    pairs("transcoder", across, across, GATED_NULLS)
    _draw_seeds(bank, effects, noise, rng)
    drawn = np.concatenate(sets("saebench", bank["saebench"]["families"]))
    for record, values in zip(bank["saebench"]["saes"], _shares(0.5 + drawn), strict=True):
        record["test_auc"][deltas.K] = values
    drawn = np.concatenate(sets("cebench", bank["cebench"]["clusters"]))
    for record, values in zip(bank["cebench"]["saes"], _shares(0.5 + drawn), strict=True):
        record["normalised_of_pairs"] = values
    spread = noise["ood"]
    itself, of_each = (of_sets(rng, 1, shift["families"], spread.scaled(seed=0, cell=0))[0] for _ in range(2))
    of_seeds = of_sets(rng, seeds, shift["families"], spread.scaled(family=0, data_set=0))
    losses = effects["ood"] + of_each - of_each.mean() + of_seeds  # sets and the model itself are fixed
    shift["llm"]["ood"] = _shares(LLM - 0.05 - itself)
    for sae, values in zip(shift["saes"], _shares(LLM - 0.05 - itself - losses), strict=True):
        sae["test_auc"][deltas.K]["ood"] = values
    _means(bank)
    if derived:
        _derive(files)
    _attempted(files["confirmation"], attempt)
    sha256 = {label: digest(files[label] if derived else label) for label in MAKES}
    sha256["selection"] = files["confirmation"]["selection"]["sha256"]
    on_disk = dict(files["confirmation"]["candidate"]["identities"])
    return Bundle({label: File(f"{label}.json", sha256[label], files[label]) for label in MAKES}, on_disk)


def _attempted(confirmation: dict, attempt: int) -> None:
    """Add earlier confirmations of the configuration, by other SAEs, to the ledger."""
    (own_entry,) = confirmation["ledger"]
    earlier = [own_entry | {"saes": _sha("an earlier attempt", i)} for i in range(attempt - 1)]
    confirmation |= {"attempt": attempt, "ledger": [*earlier, own_entry]}


def _draw_seeds(bank: dict, effects: dict[str, float], noise: Noise, rng: np.random.Generator) -> None:
    """Draw the figures of the candidate's SAEs and of prototypes, one for each seed."""

    def drawn(gate: str, n: int) -> np.ndarray:
        return rng.normal(0, 1, n) * np.hypot(noise[gate].seed, noise[gate].cell)

    coded = bank["code"]
    seeds = list(coded["k"])
    reached = dict(zip(seeds, levels.MIN_EXPLAINED_VARIANCE + effects["fit"] + drawn("fit", len(seeds)), strict=True))
    coded["saes"]["explained_variance"] = {seed: float(value) for seed, value in reached.items()}
    for owner in (bank, bank["saebench"], bank["cebench"]):
        for record in [r for r in owner["saes"] if r["candidate"]]:
            seed = str(record["facts"]["seed"])
            record["heldout"] = record["heldout"] | {"explained_variance": float(reached[seed])}
    for figure, own_values in coded["saes"].items():
        gain = effects["code"] + drawn("code", len(seeds)) + drawn("code", len(seeds)) * noise["code"].other
        for kind, below in PROTOTYPES.items():
            values = zip(seeds, gain, strict=True)
            coded["prototypes"][kind][figure] = {seed: float(own_values[seed] - g - below) for seed, g in values}


def supplied(original: Bundle) -> Bundle:
    """Bundle with the same figures and SAEs, but supplied by a user, thus without a selection."""
    files = json.loads(json.dumps({label: original.given(label).results for label in original.files}))
    confirmed = files["confirmation"]
    candidate, heldout = confirmed["candidate"], confirmed["bank"]["inputs"]["held-out activations"]
    clusters = confirmed["bank"]["cebench"]["clusters"]
    level = lambda r, name: float(np.mean(r[name]))  # noqa: E731
    bank = _bank([*map(int, candidate["checkpoints"])], SETS, clusters)
    bank["cebench"], bank["code"] = confirmed["bank"]["cebench"], confirmed["bank"]["code"]
    reached = {r["identity"]: r["heldout"] for r in confirmed["bank"]["saes"]}
    for record in [*bank["saes"], *bank["saebench"]["saes"]]:
        record["heldout"] = reached[record["identity"]]
    for record, drawn_record in zip(bank["saebench"]["saes"], confirmed["bank"]["saebench"]["saes"], strict=True):
        record["test_auc"][deltas.K] = [level(drawn_record["test_auc"], deltas.K)] * len(SETS)
    section = {n: v for n, v in confirmed["bank"]["sections"][0].items() if n in OwnSection.model_fields}
    kept = ("label", "seed", "checkpoint_sha256", "heldout")
    section |= {"store_digest": heldout, "members": [{n: m[n] for n in kept} for m in section["members"]]}
    section["pairs"] = [p | {"untrained": p["isotropic"]} for p in section["pairs"]]
    summarise_again(section)
    _means(bank)
    _derive_benchmarks(bank)
    untrained = {seed: _sha("untrained", seed) for seed in candidate["checkpoints"]}
    files["confirmation"] = {
        "phase": "candidate_confirmation",
        "origin": "supplied",
        "inputs": bank["inputs"]
        | _noise_inputs(section)
        | {f"untrained {seed}": sha for seed, sha in untrained.items()},
        "subject": confirmed["subject"],
        "candidate": candidate,
        "paths": confirmed["paths"],
        "untrained": untrained,
        "section": section,
        "bank": {n: v for n, v in bank.items() if n in Evaluated.model_fields},
    }
    confirmation_file = replace(
        original.given("confirmation"), results=files["confirmation"], sha256=digest(files["confirmation"])
    )
    return Bundle(original.files | {"confirmation": confirmation_file, "selection": None}, original.on_disk)


def _scores(value: float) -> dict[str, float]:
    return dict.fromkeys((*ALIVE, *OTHERS), float(value)) | {GAP: 0.0}


def _shares(values: np.ndarray) -> list:
    return np.clip(values, 0.0, 1.0).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Files around the figures


def _sha(*parts) -> str:
    return digest(["simulated", *parts])


def _facts(family: str) -> dict:
    facts = {"source": "husai", "subject_digest": _sha("subject"), "hook_name": HOOK, "family": family, "d_in": D_IN}
    facts |= {"d_sae": D_SAE, "k": K, "learning_rate": 0.003, "tokens": TOKENS, "store_digest": _sha("store")}
    return facts | {"training": _sha("training"), "control": None}


def _record(family: str, seed: int, candidate: bool) -> dict:
    facts, label = _facts(family), f"{family}_seed{seed}"
    heldout = {"explained_variance": 0.75 + seed % 7 / 1000, "mse": 0.65, "l0": 16.0, "dead_share": 0.0}
    core = {"ce_loss_score": 0.95, "ce_loss_with_sae": 3.75, "ce_loss_without_sae": 3.5, "ce_loss_with_ablation": 8.5}
    core |= {"kl_div_score": 0.95, "kl_div_with_sae": 0.25, "kl_div_with_ablation": 5.0, "tokens": 30_000}
    metadata = {"candidate": candidate, "label": label, "condition": f"{family} d{D_SAE} k{K} ({digest(facts)[:6]})"}
    metadata |= {"checkpoint_sha256": _sha(label), "identity": _sha("identity", label)}
    return metadata | {"facts": facts | {"l0": 16.0, "seed": seed}, "heldout": heldout, "core": core}


def _inputs(records: list[dict]) -> dict[str, str]:
    digests = {"subject": _sha("subject"), "held-out activations": _sha("held-out")}
    return digests | {f"checkpoint {r['label']}": r["checkpoint_sha256"] for r in records}


def _member(sha256: str, seed: int, heldout: dict, family: str = "topk") -> dict:
    fields = {"seed": seed, "d_sae": D_SAE, "k": K, "learning_rate": 0.003, "order_seed": seed, "family": family}
    fields |= {"assignment_weight": 0.0, "reference": None, "checkpoint": f"checkpoints/{family}_seed{seed}"}
    return fields | {"checkpoint_sha256": sha256, "heldout": heldout, "l0_miss": 0.0, "label": f"seed{seed}"}


def _section(members: list[dict], subject: str, hook_name: str, store: str, nulls: tuple[str, ...] = ()) -> dict:
    present = (*GATED_NULLS, *nulls)
    fields = {"subject_digest": subject, "hook_name": hook_name, "store_digest": store, "rows": ROWS, "d_in": D_IN}
    fields |= {"members": members, "effective_rank": 40.0, "over_training": []}
    moved = Estimate(0.0, -0.001, 0.001, 0.0004, len(members), "simulated").to_json()
    seeds = [
        {"seed": m["seed"], "checkpoint": None, "checkpoint_sha256": _sha("noise", m["checkpoint_sha256"])}
        for m in members
    ]
    gaussian = {"subject_digest": subject, "store_digest": _sha("noise", store)}
    fields["gaussian"] = gaussian | {
        "members": [s | {"heldout": m["heldout"]} for s, m in zip(seeds, members, strict=True)]
    }
    fields["others"] = [D_SAE // 2] * len(members)
    fields["strata"] = [
        {"figure": figure, "low": low, "high": high, "features": D_SAE / 4, "mcc": 0.4, "share70": 0.1}
        for figure, edges in STRATA.items()
        for low, high in pairwise(edges)
    ]
    fields["convergence"] = {"from_step": 400, "to_step": 1200, "moved": moved, "converged": True}
    below = {name: _scores(0.2) for name in present}
    labels = [m["label"] for m in members]
    return fields | {"pairs": [{"a": a, "b": b, "observed": _scores(0.4)} | below for a, b in combinations(labels, 2)]}


def _noise_inputs(section: dict) -> dict[str, str]:
    return Alike.model_validate(section["gaussian"]).inputs("gaussian")


def _bank(seeds: Sequence[int], sets: list[str], clusters: list[str]) -> dict:
    candidate_records, reference_records = ([_record(f, s, f == "topk") for s in seeds] for f in ("topk", "relu"))
    saes, n = candidate_records + reference_records, len(sets)
    draws = 0.5 + np.random.default_rng(0).normal(0, 0.01, (2, 2 * len(seeds), 1))

    def probed(value: float, ks=("1", deltas.K, "16")) -> dict:
        means = {k: dict.fromkeys(("test_auc", "test_acc", "test_f1", "val_auc"), value) for k in ks}
        return {"means": means, "test_auc": {k: [value] * n for k in ks}}

    inputs = _inputs(saes)
    place = {"inputs": inputs, "subject": "simulated", "subject_digest": _sha("subject"), "hook_name": HOOK}
    names = [
        "llm",
        references.pca_name(Facts(**candidate_records[0]["facts"])),
        *dict.fromkeys(references.untrained_name(Facts(**r["facts"])) for r in saes),
    ]
    probing: dict[str, Any] = {"phase": "saebench_custom", **place}
    probing |= {"data_sets": sets, "families": data_sets.families(sets), "random_seed": 42}
    probing |= {"probing": "sae_probes_exact", "versions": VERSIONS, "controls": []}
    probing["saes"] = [
        r | probed(float(v)) | {"auc_by_validation": 0.5} for r, v in zip(saes, draws[0, :, 0], strict=True)
    ]
    probing["baselines"] = {n: probed(0.4) | {"auc_by_validation": 0.4} for n in names[1:]} | {
        "llm": probed(0.4, ("llm",))
    }
    repeats = {k: _repeats(0.5) for k in ("1", deltas.K, "16")}
    probing["noise"] = {"label": candidate_records[0]["label"], "seeds": [42, 43, 44], "auc": repeats}

    def story_scores(value: float) -> dict:
        bound = (D_SAE - 1) / D_SAE**0.5
        means = dict.fromkeys(("contrastive", "independence", "interpretability"), value * bound)
        given = {"published": means, "corrected": means, "bound": bound, "normalised": value}
        return given | {"normalised_of_pairs": [value] * len(clusters)}

    stories: dict[str, Any] = {"phase": "cebench_custom", **place}
    stories |= {"benchmark": "cebench", "source": "simulated stories"}
    stories |= {"inputs": inputs | {"pairs": _sha("pairs")}, "pairs_digest": _sha("pairs")}
    stories |= {"n_pairs": len(clusters), "stories_cut": 0, "clusters": clusters, "controls": [], "references": []}
    core = [{k: v for k, v in r.items() if k != "core"} for r in saes]
    stories["saes"] = [
        r | story_scores(float(v)) | {"checkout": None} for r, v in zip(core, draws[1, :, 0], strict=True)
    ]
    stories |= {"untrained": [story_scores(0.3)] * len(saes), "summary_refused": None, "no_reference": None}
    stories["noise"] = {"label": candidate_records[0]["label"], "seeds": [None, 43, 44], "reason": None} | _repeats(0.5)
    section = _section(
        [_member(r["checkpoint_sha256"], r["facts"]["seed"], r["heldout"]) for r in candidate_records],
        _sha("subject"),
        HOOK,
        _sha("store"),
    )
    section = {"family": "topk", "d_sae": D_SAE, "k": K, "budget": TOKENS} | section
    recipe: dict[str, Any] = {
        "rows": ROWS,
        "batch_size": 512,
        "learning_rate": 0.003,
        "null_draws": 100,
        "heldout_rows": 50_000,
    }
    recipe |= {"probe_ks": [1, 5, 16], "noise_seeds": [43, 44], "max_pairs": 200}
    recipe |= {"probing": "sae_probes_exact", "core_texts": 50}  # not the default, so that a missing key is noticed
    fields = {"hook_name": HOOK, "store_digest": _sha("store"), "rows": ROWS, "train_rows": ROWS * 4 // 5}
    fields |= {"saebench": probing, "cebench": stories, "inputs": inputs, "saes": saes, "sections": [section]}
    return json.loads(json.dumps(fields | {"recipe": recipe}))  # copies every list, so that none is shared


@cache
def _frame(seeds: int) -> str:
    """JSON of all files with constant figures. The real rules make the selection from a study."""
    bank = _bank(STUDY_SEEDS, SETS, CLUSTERS)
    _derive_bank(bank)
    study = {"phase": selection.STUDIES[0], "subject": "simulated", "banks": [bank]}
    weights = {"saebench": 0.5, "cebench": 0.5, "stability": 0.5, "train_ev": 0.1}
    ranking = selection.Rules(weights, require_both_external=True, confirmation_seeds=seeds)
    chosen = selection.select([selection.Study("frontier 1", _sha("study"), study)], ranking)
    groups_left = set(chosen["split"]["gate_families"])
    fresh = levels.fresh_seeds(STUDY_SEEDS, seeds)
    sets = [n for n, family in zip(SETS, data_sets.families(SETS), strict=True) if family in groups_left]
    bank = _bank(fresh, sets, [c for c in CLUSTERS if c in groups_left])
    bank["code"] = _code([r for r in bank["saes"] if r["candidate"]])
    picked = {"phase": "candidate_selection", "inputs": {"frontier 1": _sha("study")}, "policy": "strict", **chosen}
    candidate_records = [r for r in bank["saes"] if r["candidate"]]
    named, subject = SeedGroup.of([ScoredRecord(**r) for r in candidate_records]).to_json(), "simulated"
    confirmation = {"phase": "candidate_confirmation", "subject": subject, "candidate": named, "bank": bank}
    confirmation |= {"inputs": bank["inputs"] | _noise_inputs(bank["sections"][0]) | {"selection": digest(picked)}}
    confirmation |= {"paths": {str(s): f"checkpoints/topk_seed{s}" for s in fresh}}
    of_selection = Selected(sha256=digest(picked), id=chosen["selected"]["id"])
    entry = LedgerEntry.of(of_selection, SeedGroup.model_validate(named))
    attempt_fields: dict[str, Any] = {"selection": of_selection.to_json(), "attempt": 1, "ledger": [entry.to_json()]}
    confirmation |= attempt_fields

    phase4a = _phase4a((*STUDY_SEEDS, *fresh)[:seeds], candidate_records[0]["heldout"])

    files = {"phase4a": phase4a, "selection": picked, "confirmation": confirmation}
    files |= _stress(candidate_records, named, bank["sections"][0]["members"])
    _derive(files)
    return json.dumps(files)


def _phase4a(seeds: Sequence[int], heldout: dict) -> dict:
    """Results of phase 4a: modular addition, and planted features, which decide."""
    extra = {"curve": [0.5, 0.1], "aux_steps": 0}
    reported = [_member(_sha("modular addition", s), s, heldout) | extra for s in seeds]
    husai = _section(reported, _sha("modular addition"), "blocks.0.hook_resid_post", _sha("modular addition store"))
    husai |= {"curve_steps": [0, 1200], "snapshot_steps": [0, 400, 1200], "spectral_groups": [1] * D_IN}
    husai |= {"histogram_bins": [0.0, 1.0], "histograms": {"observed": [1]}}
    summarise_again(husai)

    data, degrees = rules.PLANTED, []
    recipe = {"d_sae": data.features, "k": data.active, "learning_rate": rules.PLANTED_RATE}
    for tokens in rules.PLANTED_TOKENS:
        members = [_member(_sha("planted", tokens, s), s, heldout) | recipe for s in seeds]
        study = _section(members, data.digest, rules.PLANTED_HOOK, _sha("planted rows"))
        study |= {"rows": data.rows, "d_in": data.d_in}
        summarise_again(study)
        recovery = [rules.RECOVERY.threshold + 0.1 + i / 1000 for i in range(len(seeds))]
        degrees.append({"tokens": tokens, "recovery": recovery, "study": study})
    control = {"data": data.to_json(), "batch_size": rules.PLANTED_BATCH, "degrees": degrees, "sensitivity": []}
    fields = {"phase": "4a", "inputs": {}, "husai": husai, "published_figures": {}, "planted": control}
    typed = Phase4a.model_validate(fields)
    return fields | {"inputs": planted.inputs(typed.husai, typed.planted)}


def _stress(records: list[dict], named: dict, members: list[dict]) -> dict[str, dict]:
    """Results of the three stress tests of the given SAEs."""
    seeds = [m["seed"] for m in members]
    tested, candidate_fields = _inputs(records), {"subject": "simulated", "candidate": named}
    heldout, of_subject = records[0]["heldout"], (_sha("subject"), HOOK, _sha("store"))

    member_fields = [{n: m[n] for n in ("label", "seed", "checkpoint_sha256", "heldout")} for m in members]
    section = _section(member_fields, *of_subject)
    section = {k: v for k, v in section.items() if k not in ("over_training", "convergence")}
    controls = [_random_model(draw, seeds, heldout) for draw in levels.RANDOM_DRAWS]
    meaningless: dict[str, Any] = {"phase": "random_model_stress", "inputs": tested, **candidate_fields}
    meaningless |= {"section": section, "random_models": controls}

    hooks = {"hook_in": transcoder.hook_before(HOOK), "hook_out": HOOK}
    setting: dict[str, Any] = hooks | {"seeds": seeds, "preregistered": True, "d_sae": D_SAE, "k": K}
    setting |= {"tokens": TOKENS, "batch_size": 512, "learning_rate": 0.003, "subject_digest": of_subject[0]}
    trained = [_member(_sha("transcoder", s), s, heldout, "transcoder") for s in seeds]
    transcoders = _section(trained, *of_subject)
    across = {n: v for n, v in _section(member_fields, *of_subject).items() if n in Comparison.model_fields}
    transcoder_results: dict[str, Any] = {"phase": "transcoder_stress", **candidate_fields, "setting": setting}
    transcoder_results["inputs"] = tested | {"transcoder input": _sha("transcoder input")}
    transcoder_results |= {"section": section, "transcoder": transcoders, "across": across | {"gaussian": None}}

    skipped = {"90_glue_qnli_OOD": "its labels are others"}
    names = [n for n in SHIFTED if f"{n}_OOD" not in skipped]
    level = [LLM] * len(names)
    shift = {"data_sets": names, "families": data_sets.families(names), "k": deltas.K, "random_seed": 42}
    shift |= {"prompts": [200] * len(names), "llm": {"id": level, "ood": level, "ood_low": [0.7] * len(names)}}
    auc = {k: {"id": level, "ood": level} for k in ("1", deltas.K)}
    identities = [{"identity": r["identity"], "seed": r["facts"]["seed"]} for r in records]
    shift["saes"] = [sae | {"test_auc": auc} for sae in identities]
    sides = {side: dict.fromkeys(drop.ACTIVATION_FIGURES, 0.5) for side in ("id", "ood")}
    rows = {
        "rows": 50_000,
        "shifted_rows": 20_000,
        "compared_rows": 20_000,
        "saes": [s | {"rank": 50} | sides for s in identities],
    }
    ood: dict[str, Any] = {
        "phase": "ood_stress",
        "inputs": tested | {"shifted activations": _sha("shift"), "probed texts": _sha("texts")},
    }
    ood |= candidate_fields | {
        "rule": {"max_drop": rules.OOD.threshold},
        "shifted": shift,
        "families": None,
        "activations": rows,
    }
    ood |= {"probing": "sae_probes_exact", "versions": VERSIONS, "skipped": skipped}
    return {"random_model": meaningless, "transcoder": transcoder_results, "ood": ood}


def _code(records: list[dict]) -> dict:
    """Code section: the candidate's SAEs and dictionaries of prototypes."""
    seeds = [str(r["facts"]["seed"]) for r in records]
    figures = {
        "explained_variance": {
            seed: r["heldout"]["explained_variance"] for seed, r in zip(seeds, records, strict=True)
        },
        "ce_recovered": {seed: r["core"]["ce_loss_score"] for seed, r in zip(seeds, records, strict=True)},
    }
    fields = {"store_digest": _sha("store"), "heldout_digest": _sha("held-out"), "d_sae": D_SAE}
    fields |= {"k": dict.fromkeys(seeds, K), "tokens": records[0]["core"]["tokens"], "saes": figures, "gain": {}}
    return json.loads(json.dumps(fields | {"prototypes": dict.fromkeys(PROTOTYPES, figures)}))


def _random_model(draw: int, seeds: list[int], heldout: dict) -> dict:
    """SAEs of one draw of the random weights, and SAEs of Gaussian rows."""
    subject, store = levels.random_subject(_sha("subject"), draw), _sha("random store", draw)
    members = [_member(_sha("random", draw, s), s, heldout) for s in seeds]
    member_fields = {"seed", "checkpoint", "checkpoint_sha256", "heldout"}
    section = _section(members, subject, HOOK, store)
    fields = {n: section[n] for n in ("subject_digest", "store_digest", "pairs", "gaussian", "strata")}
    return fields | {"members": [{n: v for n, v in m.items() if n in member_fields} for m in members]}


def _derive(files: dict) -> None:
    """Compute all derived figures again from the raw figures."""
    _derive_bank(files["confirmation"]["bank"])
    meaningless, transcoder_results, ood = (files[label] for label in ("random_model", "transcoder", "ood"))
    control = files["phase4a"]["planted"]
    for degree in control["degrees"]:
        summarise_again(degree["study"])
    typed_control = PlantedSection.model_validate(control | {"sensitivity": []})
    control["sensitivity"] = [s.to_json() for s in planted.sensitivity(typed_control.degrees)]
    random_models = meaningless["random_models"]
    for section in (files["phase4a"]["husai"], meaningless["section"], *random_models):
        summarise_again(section)
    for section in (transcoder_results["section"], transcoder_results["transcoder"], transcoder_results["across"]):
        summarise_again(section)
    own_section = OwnSection.model_validate(meaningless["section"])
    controls = [*map(Control.model_validate, random_models)]
    meaningless |= {"gains": [gain.to_json() for gain in random_model.gains(own_section, controls)]}
    meaningless |= {"verdict": random_model.verdict(own_section, controls)}
    meaningless["inputs"] |= random_model.inputs(own_section, controls)
    open_ones: dict[str, Any] = {"gain": None, "explained_variance": {}, "verdict": {}}
    concluded = transcoder.concluded(TranscoderStress.model_validate(transcoder_results | open_ones)).to_json()
    transcoder_results["inputs"] |= transcoder.inputs(TranscoderStress.model_validate(transcoder_results | open_ones))
    transcoder_results |= {name: concluded[name] for name in ("setting", *open_ones)}
    ood["activations"]["change"] = drop.change(ood["activations"]["saes"])
    shifted = ood["shifted"]
    shifted |= {"drop": {}, "drop_where_kept": {}}
    typed = OODStress.model_validate(ood).shifted
    shifted |= {"drop": drop.drop(typed), "drop_where_kept": drop.drop_where_kept(typed)}


def _derive_bank(bank: dict) -> None:
    for section in bank["sections"]:
        summarise_again(section)
    _means(bank)
    _derive_benchmarks(bank)
    if "code" in bank:
        bank["code"]["gain"] = coding.concluded(Code.model_validate(bank["code"])).to_json()["gain"]
    bank["conditions"] = conditions.conditions(Bank.model_validate(bank | {"conditions": []}))


def _derive_benchmarks(bank: dict) -> None:
    probing, pairs = bank["saebench"], bank["cebench"]
    probing["conditions"] = deltas.saebench(Probing.model_validate(probing | {"conditions": []}))
    pairs["conditions"] = deltas.contrastive(Contrastive.model_validate(pairs | {"conditions": []}))


def _means(bank: dict) -> None:
    """Compute the means of each record again from its figures."""
    for record in [*bank["saebench"]["saes"], *bank["saebench"]["baselines"].values()]:
        for k, values in record["test_auc"].items():
            record["means"][k]["test_auc"] = float(np.mean(values))
    for record in bank["cebench"]["saes"]:
        record["normalised"] = float(np.mean(record["normalised_of_pairs"]))
        record["corrected"]["interpretability"] = record["normalised"] * record["bound"]
    probing, stories = bank["saebench"], bank["cebench"]
    for k, repeats in probing["noise"]["auc"].items():
        repeats |= _repeats(probing["saes"][0]["means"][k]["test_auc"])
    stories["noise"] |= _repeats(stories["saes"][0]["normalised"])


def _repeats(value: float) -> dict:
    return noise([value, value + 0.01, value - 0.01])


def summarise_again(section: dict) -> None:
    """Compute the summary of a section again from its pairs."""
    labels = list(dict.fromkeys(p[side] for side in ("a", "b") for p in section["pairs"]))
    scored = {
        (labels.index(p["a"]), labels.index(p["b"])): {
            name: {"mean": value, "draws": None} for name, value in p.items() if name not in ("a", "b")
        }
        for p in section["pairs"]
    }
    section["stability"] = summarise(labels, scored, {}).to_json()
    for score in section["stability"]["scores"].values():
        score["nulls"]["spectral"]["draws"] = SPECTRAL_DRAWS
