"""Evidence as it would be if the truth were known: what the gate's error rates and its fuzzer are measured on.

A bundle's raw figures are drawn with stated true effects and noise; all that rests on them is made by the functions
that make it in a run, so that `recompute.results_problems` finds nothing. Nothing here is about any real SAE.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from husai.evidence import (
    conditions,
    data_sets,
    deltas,
    drop,
    levels,
    prototypes,
    random_model,
    references,
    rules,
    transcoder,
)
from husai.evidence.data_sets import DATA_SETS
from husai.evidence.estimates import Estimate, noise
from husai.evidence.names import ALIVE, GAP, GATED_NULLS
from husai.evidence.rules import POSITIVE_CONTROL, SPECTRAL_DRAWS
from husai.evidence.schemas import (
    Bank,
    Code,
    Contrastive,
    Control,
    Evaluated,
    Facts,
    OODStress,
    OwnSection,
    Phase4a,
    Probing,
    ScoredRecord,
    SeedGroup,
    Strict,
    TranscoderStress,
)
from husai.evidence.stability import summarise
from husai.release import selection
from husai.release.gate import GATES, MAKES, Bundle, File, Thresholds
from husai.runs.files import digest, read_json

OF_SEEDS = ("code", "fit")
"""Gates on one figure a seed."""
OF_PAIRS = ("positive_control", "stability", "random_model", "transcoder")
"""Gates on pairs of seeds; the others but those of OF_SEEDS are on seeds and data sets."""
STUDY_SEEDS = (42, 123, 456, 789, 1011)
SETS, SHIFTED = DATA_SETS.split(","), [n.removesuffix("_OOD") for n in data_sets.FAMILIES["ood"]["shifted"]]
CLUSTERS = [f"story_family{i // 12:02}" for i in range(192)]
D_IN, D_SAE, K, TOKENS, ROWS, HOOK = 256, 512, 16, 600_000, 200_000, "blocks.1.hook_resid_pre"
LLM = 0.8
"""AUC of the model's own probe."""
PROTOTYPES = {"rows": 0.1, "centroids": 0.0, "token means": 0.2}
"""Kind of prototypes -> how far it lies below the best."""
VERSIONS = {"sae-bench": "0.6.0", "sae-probes": "0.4.2"}


@dataclass(frozen=True)
class NoiseSpread:
    """Standard deviations of a gated figure's parts, each drawn on its own."""

    seed: float
    """Of a seed's effect: on each of its pairs, or on each data set."""
    cell: float
    """Of what a pair of seeds, or a seed on a data set, has of its own."""
    family: float = 0.0
    """Of what the data sets of a family share."""
    data_set: float = 0.0
    other: float = 0.0
    """The other arm (null, control arm, reference, the model itself) varies by itself, this many times as much."""

    def scaled(self, **factors: float) -> NoiseSpread:
        return replace(self, **{name: factor * getattr(self, name) for name, factor in factors.items()})


Noise = dict[str, NoiseSpread]
"""Gate -> its noise."""


def neutral() -> dict[str, float]:
    """Gate -> the true value of its figure at which it must not pass: its threshold."""
    t = Thresholds()
    at = {"transcoder": t.min_transcoder_delta, "ood": t.max_ood_drop}
    return dict.fromkeys(GATES, 0.0) | at | {"saebench": t.min_saebench_delta, "cebench": t.min_cebench_delta}


def shifted(gate: str, by: float) -> float:
    """The true value that lies this far on the passing side of the threshold."""
    return neutral()[gate] + (-by if gate == "ood" else by)


# ---------------------------------------------------------------------------------------------------------------------
# Noise as it was measured


def measured(evidence: Path) -> Noise:
    """Noise of each gate's figure, from the evidence folders: moments of every section, or matched pair of conditions,
    with five seeds or more; means of their variances."""
    tiny, control = (_results(evidence / name, Phase4a).husai for name in ("phase4a_husai_tiny", "phase4a"))
    found = {
        "positive_control": _pooled([_of_matrix(control.scores("spectral"))]),
        "stability": _pooled([_of_matrix(tiny.scores("spectral"))]),
        "random_model": _pooled([_of_matrix(tiny.scores("random_model"))]),
        "saebench": _pooled(_differences(_results(evidence / "saebench_husai_tiny", Probing))),
        "cebench": _pooled(_differences(_results(evidence / "phase4e_cebench_matched200", Contrastive))),
    }
    probed = _results(evidence / "saebench_husai_tiny", Probing).saes
    for gate, value in (("code", lambda r: r.core.ce_loss_score), ("fit", lambda r: r.heldout.explained_variance)):
        groups = deltas.by_condition(probed).values()
        of_seeds = [{"seed": float(np.var([value(r) for r in g], ddof=1)), "cell": 0.0} for g in groups if len(g) >= 5]
        found[gate] = _pooled(of_seeds)
    arms = _results(evidence / "transcoder_stress", TranscoderStress)
    gain = arms.transcoder.scores("spectral") - arms.sae.scores("spectral")
    shift = _results(evidence / "ood_stress", OODStress).shifted
    found["transcoder"] = _pooled([_of_matrix(gain)])
    found["ood"] = _pooled([_of_sets(drop.drops(shift, shift.k), shift.families)])
    return {gate: found[gate] for gate in GATES}


T = TypeVar("T", bound=Strict)


def _results(folder: Path, schema: type[T]) -> T:
    return schema.model_validate(read_json(folder / "results.json", "evidence"))


def _of_matrix(x: np.ndarray) -> dict[str, float]:
    """Variances of seeds and of pairs, from the effects of a half-diallel table (Griffing 1956, method 4)."""
    s, sums = len(x), x.sum(1)
    of_seed = sums / (s - 2)  # up to a constant
    squares = (x**2).sum() / 2 - (sums**2).sum() / (s - 2) + 2 * (x.sum() / 2) ** 2 / ((s - 1) * (s - 2))
    cell = max(0.0, float(squares) / (s * (s - 3) / 2))
    return {"seed": max(0.0, float(of_seed.var(ddof=1)) - cell / (s - 2)), "cell": cell}


def _differences(results: Probing | Contrastive):
    """Variances of each condition's difference to its reference."""
    probed = isinstance(results, Probing)
    families = results.families if isinstance(results, Probing) else results.clusters

    def figures(records) -> np.ndarray:
        return np.array([r.test_auc[deltas.K] if probed else r.normalised_of_pairs for r in records])

    for group in deltas.by_condition(results.saes).values():
        match = references.matched(group, results.saes)
        if len(match.records) == len(group) >= 5:
            yield _of_sets(figures(group) - figures(match.records), families)


def _of_sets(x: np.ndarray, families: list[str]) -> dict[str, float]:
    """Variances of `[S, D]` by moments: seeds, families, data sets, the rest."""
    (s, d), clusters = x.shape, np.array(families)
    left = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
    cell = float((left**2).sum()) / ((s - 1) * (d - 1))
    of_set = x.mean(0)
    groups = [of_set[clusters == name] for name in dict.fromkeys(families)]
    within = float(sum(((g - g.mean()) ** 2).sum() for g in groups)) / max(1, d - len(groups))
    between = float(np.var([g.mean() for g in groups], ddof=1))
    return {
        "seed": max(0.0, float(x.mean(1).var(ddof=1)) - cell / d),
        "cell": cell,
        "family": max(0.0, between - within * float(np.mean([1 / len(g) for g in groups]))),
        "data_set": max(0.0, within - cell / s),
    }


def _pooled(variances) -> NoiseSpread:
    rows = list(variances)
    return NoiseSpread(**{name: float(np.sqrt(np.mean([r[name] for r in rows]))) for name in rows[0]})


def standard_error(gate: str, spread: NoiseSpread, seeds: int = 5) -> float:
    """Of a gate's figure in a bundle with this noise: the unit in which effects are stated."""
    arms = 1 + spread.other**2
    if gate in OF_PAIRS:
        return float(np.sqrt(arms * (4 * spread.seed**2 / seeds + spread.cell**2 / (seeds * (seeds - 1) / 2))))
    if gate in OF_SEEDS:
        itself = spread.other**2 if gate == "code" else 0.0  # a fit has no other arm
        return float(np.sqrt((1 + itself) * (spread.seed**2 + spread.cell**2) / seeds))
    files = json.loads(_frame(seeds))
    bank, shift = files["confirmation"]["bank"], files["ood"]["shifted"]
    of = {"saebench": bank["saebench"]["families"], "cebench": bank["cebench"]["clusters"], "ood": shift["families"]}
    families = of[gate]
    counts, d = np.array([families.count(f) for f in dict.fromkeys(families)]), len(families)
    of_sets = spread.family**2 * (counts**2).sum() / d**2 + spread.data_set**2 / d
    of_seeds = spread.seed**2 / seeds + spread.cell**2 / (seeds * d)
    if gate == "ood":  # the model itself has no seeds
        itself = spread.other**2 * (of_sets + spread.seed**2 + spread.cell**2 / d)
        return float(np.sqrt(of_sets + of_seeds + itself))
    return float(np.sqrt(arms * (of_sets + of_seeds)))


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def of_pairs(rng: np.random.Generator, seeds: int, spread: NoiseSpread) -> np.ndarray:
    """Noise `[S, S]` of pairs of seeds: additive effects of both, and the pair's own; symmetric."""
    a, e = rng.normal(0, 1, seeds) * spread.seed, np.triu(rng.normal(0, 1, (seeds, seeds)), 1) * spread.cell
    return a[:, None] + a[None, :] + e + e.T


def of_sets(rng: np.random.Generator, seeds: int, families: list[str], spread: NoiseSpread) -> np.ndarray:
    """Noise `[S, D]` of seeds on data sets; one family's sets share a part."""
    names = list(dict.fromkeys(families))
    shared = (rng.normal(0, 1, len(names)) * spread.family)[[names.index(f) for f in families]]
    own = rng.normal(0, 1, len(families)) * spread.data_set
    cells = rng.normal(0, 1, (seeds, len(families))) * spread.cell
    return rng.normal(0, 1, (seeds, 1)) * spread.seed + shared + own + cells


def bundle(
    effects: dict[str, float], noise: Noise, rng: np.random.Generator, seeds: int = 5, derived: bool = True
) -> Bundle:
    """All that the gate reads of a candidate with `seeds` fresh seeds.

    Args:
        effects: gate -> the true value of its figure. derived: False leaves estimates as they were before the
            draw: the gate, which reads raw figures alone, decides alike, and sooner.
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
        """The candidate's figures and the other arm's, `[S, D]` each, without their common level."""
        spread = noise[gate]
        own, other = (of_sets(rng, seeds, families, spread) for _ in range(2))
        return effects[gate] + own, other * spread.other

    for gate, section in (
        ("positive_control", files["phase4a"]["husai"]),
        ("stability", bank["sections"][0]),
    ):
        pairs(gate, section, section, GATED_NULLS)
    pairs("random_model", files["random_model"]["section"], files["random_model"]["section"], ("random_model",))
    pairs("transcoder", files["transcoder"]["transcoder"], files["transcoder"]["sae"], ("observed",))
    _draw_seeds(bank, effects, noise, rng)
    drawn = np.concatenate(sets("saebench", bank["saebench"]["families"]))
    for record, values in zip(bank["saebench"]["saes"], _shares(0.5 + drawn), strict=True):
        record["test_auc"][deltas.K] = values
    drawn = np.concatenate(sets("cebench", bank["cebench"]["clusters"]))
    for record, values in zip(bank["cebench"]["saes"], _shares(0.5 + drawn), strict=True):
        record["normalised_of_pairs"] = values
    lost, itself = sets("ood", shift["families"])
    shift["llm"]["ood"] = _shares(LLM - 0.05 - itself[0])
    for sae, values in zip(shift["saes"], _shares(LLM - 0.05 - lost), strict=True):
        sae["test_auc"][deltas.K]["ood"] = values
    _means(bank)
    if derived:
        _derive(files)
    sha256 = {label: digest(files[label] if derived else label) for label in MAKES}
    sha256["selection"] = files["confirmation"]["selection"]["sha256"]
    on_disk = dict(files["confirmation"]["candidate"]["identities"])
    return Bundle({label: File(f"{label}.json", sha256[label], files[label]) for label in MAKES}, on_disk)


def _draw_seeds(bank: dict, effects: dict[str, float], noise: Noise, rng: np.random.Generator) -> None:
    """Figures of the candidate's SAEs and of prototypes, one a seed."""

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
    for figure, own in coded["saes"].items():
        gain = effects["code"] + drawn("code", len(seeds)) + drawn("code", len(seeds)) * noise["code"].other
        for kind, below in PROTOTYPES.items():
            values = zip(seeds, gain, strict=True)
            coded["prototypes"][kind][figure] = {seed: float(own[seed] - g - below) for seed, g in values}


def supplied(of: Bundle) -> Bundle:
    """The same figures and the same SAEs, supplied by a user: no selection is known."""
    files = json.loads(json.dumps({label: of.given(label).results for label in of.files}))
    confirmed = files["confirmation"]
    own, heldout = confirmed["candidate"], confirmed["bank"]["inputs"]["held-out activations"]
    clusters = confirmed["bank"]["cebench"]["clusters"]
    level = lambda r, name: float(np.mean(r[name]))  # noqa: E731
    bank = _bank([*map(int, own["checkpoints"])], SETS, clusters)
    bank["cebench"], bank["code"] = confirmed["bank"]["cebench"], confirmed["bank"]["code"]
    reached = {r["identity"]: r["heldout"] for r in confirmed["bank"]["saes"]}
    for record in [*bank["saes"], *bank["saebench"]["saes"]]:
        record["heldout"] = reached[record["identity"]]
    for record, drawn in zip(bank["saebench"]["saes"], confirmed["bank"]["saebench"]["saes"], strict=True):
        record["test_auc"][deltas.K] = [level(drawn["test_auc"], deltas.K)] * len(SETS)
    section = {n: v for n, v in confirmed["bank"]["sections"][0].items() if n in OwnSection.model_fields}
    kept = ("label", "seed", "checkpoint_sha256", "heldout")
    section |= {"store_digest": heldout, "members": [{n: m[n] for n in kept} for m in section["members"]]}
    _summarise(section)
    _means(bank)
    _derive_benchmarks(bank)
    untrained = {seed: _sha("untrained", seed) for seed in own["checkpoints"]}
    files["confirmation"] = {
        "phase": "candidate_confirmation",
        "origin": "supplied",
        "inputs": bank["inputs"] | {f"untrained {seed}": sha for seed, sha in untrained.items()},
        "subject": confirmed["subject"],
        "candidate": own,
        "paths": confirmed["paths"],
        "untrained": untrained,
        "section": section,
        "bank": {n: v for n, v in bank.items() if n in Evaluated.model_fields},
    }
    there = replace(of.given("confirmation"), results=files["confirmation"], sha256=digest(files["confirmation"]))
    return Bundle(of.files | {"confirmation": there, "selection": None}, of.on_disk)


def _scores(value: float) -> dict[str, float]:
    return dict.fromkeys(ALIVE, float(value)) | {GAP: 0.0}


def _shares(values: np.ndarray) -> list:
    return np.clip(values, 0.0, 1.0).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What stands around the figures


def _sha(*of) -> str:
    return digest(["simulated", *of])


def _facts(family: str) -> dict:
    facts = {"source": "husai", "subject_digest": _sha("subject"), "hook_name": HOOK, "family": family, "d_in": D_IN}
    facts |= {"d_sae": D_SAE, "k": K, "learning_rate": 0.003, "tokens": TOKENS, "store_digest": _sha("store")}
    return facts | {"training": _sha("training"), "control": None}


def _record(family: str, seed: int, candidate: bool) -> dict:
    facts, label = _facts(family), f"{family}_seed{seed}"
    heldout = {"explained_variance": 0.75 + seed % 7 / 1000, "mse": 0.65, "l0": 16.0, "dead_share": 0.0}
    core = {"ce_loss_score": 0.95, "ce_loss_with_sae": 3.75, "ce_loss_without_sae": 3.5, "ce_loss_with_ablation": 8.5}
    core |= {"kl_div_score": 0.95, "kl_div_with_sae": 0.25, "kl_div_with_ablation": 5.0, "tokens": 30_000}
    about = {"candidate": candidate, "label": label, "condition": f"{family} d{D_SAE} k{K} ({digest(facts)[:6]})"}
    about |= {"checkpoint_sha256": _sha(label), "identity": _sha("identity", label)}
    return about | {"facts": facts | {"l0": 16.0, "seed": seed}, "heldout": heldout, "core": core}


def _inputs(records: list[dict]) -> dict[str, str]:
    found = {"subject": _sha("subject"), "held-out activations": _sha("held-out")}
    return found | {f"checkpoint {r['label']}": r["checkpoint_sha256"] for r in records}


def _member(sha256: str, seed: int, heldout: dict, family: str = "topk") -> dict:
    made = {"seed": seed, "d_sae": D_SAE, "k": K, "learning_rate": 0.003, "order_seed": seed, "family": family}
    made |= {"assignment_weight": 0.0, "reference": None, "checkpoint": f"checkpoints/{family}_seed{seed}"}
    return made | {"checkpoint_sha256": sha256, "heldout": heldout, "l0_miss": 0.0, "label": f"seed{seed}"}


def _section(members: list[dict], subject: str, hook_name: str, store: str, nulls: tuple[str, ...] = ()) -> dict:
    present = (*GATED_NULLS, "covariance_matched", *nulls)
    about = {"subject_digest": subject, "hook_name": hook_name, "store_digest": store, "rows": ROWS, "d_in": D_IN}
    about |= {"members": members, "effective_rank": 40.0, "over_training": []}
    moved = Estimate(0.0, -0.001, 0.001, 0.0004, len(members), "simulated").to_json()
    about["convergence"] = {"from_step": 400, "to_step": 1200, "moved": moved, "converged": True}
    below = {name: _scores(0.2) for name in present}
    labels = [m["label"] for m in members]
    return about | {"pairs": [{"a": a, "b": b, "observed": _scores(0.4)} | below for a, b in combinations(labels, 2)]}


def _bank(seeds: Sequence[int], sets: list[str], clusters: list[str]) -> dict:
    own, others = ([_record(f, s, f == "topk") for s in seeds] for f in ("topk", "relu"))
    saes, n, draws = own + others, len(sets), 0.5 + np.random.default_rng(0).normal(0, 0.01, (2, 2 * len(seeds), 1))

    def probed(value: float, ks=("1", deltas.K, "16")) -> dict:
        means = {k: dict.fromkeys(("test_auc", "test_acc", "test_f1", "val_auc"), value) for k in ks}
        return {"means": means, "test_auc": {k: [value] * n for k in ks}}

    inputs = _inputs(saes)
    about = {"inputs": inputs, "subject": "simulated", "subject_digest": _sha("subject"), "hook_name": HOOK}
    names = [
        "llm",
        references.pca_name(Facts(**own[0]["facts"])),
        *dict.fromkeys(references.untrained_name(Facts(**r["facts"])) for r in saes),
    ]
    probing: dict[str, Any] = {"phase": "saebench_custom", **about}
    probing |= {"data_sets": sets, "families": data_sets.families(sets), "random_seed": 42}
    probing |= {"probing": "sae_probes_exact", "versions": VERSIONS, "controls": []}
    probing["saes"] = [
        r | probed(float(v)) | {"auc_by_validation": 0.5} for r, v in zip(saes, draws[0, :, 0], strict=True)
    ]
    probing["baselines"] = {n: probed(0.4) | {"auc_by_validation": 0.4} for n in names[1:]} | {
        "llm": probed(0.4, ("llm",))
    }
    repeats = {k: _repeats(0.5) for k in ("1", deltas.K, "16")}
    probing["noise"] = {"label": own[0]["label"], "seeds": [42, 43, 44], "auc": repeats}

    def told(value: float) -> dict:
        bound = (D_SAE - 1) / D_SAE**0.5
        means = dict.fromkeys(("contrastive", "independence", "interpretability"), value * bound)
        given = {"published": means, "corrected": means, "bound": bound, "normalised": value}
        return given | {"normalised_of_pairs": [value] * len(clusters)}

    stories: dict[str, Any] = {"phase": "cebench_custom", **about}
    stories |= {"benchmark": "cebench", "source": "simulated stories"}
    stories |= {"inputs": inputs | {"pairs": _sha("pairs")}, "pairs_digest": _sha("pairs")}
    stories |= {"n_pairs": len(clusters), "stories_cut": 0, "clusters": clusters, "controls": [], "references": []}
    core = [{k: v for k, v in r.items() if k != "core"} for r in saes]
    stories["saes"] = [r | told(float(v)) | {"checkout": None} for r, v in zip(core, draws[1, :, 0], strict=True)]
    stories |= {"untrained": [told(0.3)] * len(saes), "summary_refused": None, "no_reference": None}
    stories["noise"] = {"label": own[0]["label"], "seeds": [None, 43, 44], "reason": None} | _repeats(0.5)
    section = _section(
        [_member(r["checkpoint_sha256"], r["facts"]["seed"], r["heldout"]) for r in own],
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
    recipe |= {"probing": "sae_probes_exact", "core_texts": 50}  # not the default, so that a missing key is seen
    found = {"hook_name": HOOK, "store_digest": _sha("store"), "rows": ROWS, "train_rows": ROWS * 4 // 5}
    found |= {"saebench": probing, "cebench": stories, "inputs": inputs, "saes": saes, "sections": [section]}
    return json.loads(json.dumps(found | {"recipe": recipe}))  # no list stands twice


@cache
def _frame(seeds: int) -> str:
    """JSON of every file with constant figures; the selection is made of a study, by the real rules."""
    bank = _bank(STUDY_SEEDS, SETS, CLUSTERS)
    _derive_bank(bank)
    study = {"phase": selection.STUDIES[0], "subject": "simulated", "banks": [bank]}
    weights = {"saebench": 0.5, "cebench": 0.5, "stability": 0.5, "train_ev": 0.1}
    ranking = selection.Rules(weights, require_both_external=True)
    chosen = selection.select([selection.Study("frontier 1", _sha("study"), study)], ranking)
    left = set(chosen["split"]["gate_families"])
    fresh = levels.fresh_seeds(STUDY_SEEDS, seeds)
    sets = [n for n, family in zip(SETS, data_sets.families(SETS), strict=True) if family in left]
    bank = _bank(fresh, sets, [c for c in CLUSTERS if c in left])
    bank["code"] = _code([r for r in bank["saes"] if r["candidate"]])
    picked = {"phase": "candidate_selection", "inputs": {"frontier 1": _sha("study")}, "policy": "strict", **chosen}
    own = [r for r in bank["saes"] if r["candidate"]]
    named, subject = SeedGroup.of([ScoredRecord(**r) for r in own]).to_json(), "simulated"
    confirmation = {"phase": "candidate_confirmation", "subject": subject, "candidate": named, "bank": bank}
    confirmation |= {"inputs": bank["inputs"] | {"selection": digest(picked)}}
    confirmation |= {"paths": {str(s): f"checkpoints/topk_seed{s}" for s in fresh}}
    confirmation |= {"selection": {"sha256": digest(picked), "id": chosen["selected"]["id"]}}

    extra = {"curve": [0.5, 0.1], "aux_steps": 0}
    hook_name, family, d_sae, k = POSITIVE_CONTROL
    extra |= {"d_sae": d_sae, "k": k}
    members = [_member(_sha("control", s), s, own[0]["heldout"], family) for s in (*STUDY_SEEDS, *fresh)[:seeds]]
    control = [m | extra for m in members]
    section = _section(control, _sha("modular addition"), hook_name, _sha("control store"))
    section |= {"curve_steps": [0, 1200], "snapshot_steps": [0, 400, 1200], "spectral_groups": [1] * D_IN}
    section |= {"histogram_bins": [0.0, 1.0], "histograms": {"observed": [1]}, "control": []}
    inputs = {"subject": section["subject_digest"], "activation store": section["store_digest"]}
    inputs |= {f"checkpoint {m['label']}": m["checkpoint_sha256"] for m in control}
    phase4a = {"phase": "4a", "inputs": inputs, "husai": section, "published_figures": {}}

    files = {"phase4a": phase4a, "selection": picked, "confirmation": confirmation}
    files |= _stress(own, named, bank["sections"][0]["members"])
    _derive(files)
    return json.dumps(files)


def _stress(own: list[dict], named: dict, members: list[dict]) -> dict[str, dict]:
    """Results of the three stress tests of these SAEs."""
    seeds = [m["seed"] for m in members]
    tested, about = _inputs(own), {"subject": "simulated", "candidate": named}
    heldout, of_subject = own[0]["heldout"], (_sha("subject"), HOOK, _sha("store"))

    kept = [{n: m[n] for n in ("label", "seed", "checkpoint_sha256", "heldout")} for m in members]
    section = _section(kept, *of_subject, ("random_model",))
    section = {k: v for k, v in section.items() if k not in ("over_training", "convergence")}
    made = [{"seed": s, "checkpoint": f"random{s}", "checkpoint_sha256": _sha("random", s)} for s in seeds]
    control: dict[str, Any] = {"subject_digest": _sha("random weights"), "store_digest": _sha("random store")}
    control |= {"members": [m | {"heldout": heldout} for m in made], "pairs": _section(kept, *of_subject)["pairs"]}
    inputs = {"activation store": of_subject[2], "random_model: subject": control["subject_digest"]}
    inputs |= {"random_model: activations": control["store_digest"]}
    inputs |= {f"random_model: checkpoint {i}": m["checkpoint_sha256"] for i, m in enumerate(made, 1)}
    meaningless: dict[str, Any] = {"phase": "random_model_stress", "inputs": tested | inputs, **about}
    meaningless |= {"random_model": control, "shuffled": None, "section": section}

    setting: dict[str, Any] = dict(zip(("hook_in", "hook_out"), transcoder.mlp_hooks(1), strict=True))
    setting |= {"layer": 1, "seeds": seeds}
    setting |= {"preregistered": True, "d_sae": D_SAE, "k": K, "tokens": TOKENS, "batch_size": 512}
    setting |= {"learning_rate": 0.003, "subject_digest": of_subject[0], "own_subject": True}
    other: dict[str, Any] = {"phase": "transcoder_stress", "inputs": tested, **about, "setting": setting}
    other["inputs"] = tested | {"MLP input": _sha("MLP input"), "MLP output": _sha("MLP output")}
    for arm, family in rules.ARMS.items():
        trained = [_member(_sha(arm, s), s, heldout, family) for s in seeds]
        other[arm] = _section(trained, of_subject[0], setting["hook_out"], _sha("MLP output"))
        other["inputs"] = other["inputs"] | {f"{arm} {m['label']}": m["checkpoint_sha256"] for m in trained}

    skipped = {"90_glue_qnli_OOD": "its labels are others"}
    names = [n for n in SHIFTED if f"{n}_OOD" not in skipped]
    level = [LLM] * len(names)
    shift = {"data_sets": names, "families": data_sets.families(names), "k": deltas.K, "random_seed": 42}
    shift |= {"prompts": [200] * len(names), "llm": {"id": level, "ood": level, "ood_low": [0.7] * len(names)}}
    auc = {k: {"id": level, "ood": level} for k in ("1", deltas.K)}
    each = [{"identity": r["identity"], "seed": r["facts"]["seed"]} for r in own]
    shift["saes"] = [sae | {"test_auc": auc} for sae in each]
    sides = {side: dict.fromkeys(drop.ACTIVATION_FIGURES, 0.5) for side in ("id", "ood")}
    rows = {
        "rows": 50_000,
        "shifted_rows": 20_000,
        "compared_rows": 20_000,
        "saes": [s | {"rank": 50} | sides for s in each],
    }
    ood: dict[str, Any] = {
        "phase": "ood_stress",
        "inputs": tested | {"shifted activations": _sha("shift"), "probed texts": _sha("texts")},
    }
    ood |= about | {"rule": {"max_drop": rules.OOD.threshold}, "shifted": shift, "families": None, "activations": rows}
    ood |= {"probing": "sae_probes_exact", "versions": VERSIONS, "skipped": skipped}
    return {"random_model": meaningless, "transcoder": other, "ood": ood}


def _code(own: list[dict]) -> dict:
    """The candidate's SAEs beside dictionaries of prototypes."""
    seeds = [str(r["facts"]["seed"]) for r in own]
    figures = {
        "explained_variance": {seed: r["heldout"]["explained_variance"] for seed, r in zip(seeds, own, strict=True)},
        "ce_recovered": {seed: r["core"]["ce_loss_score"] for seed, r in zip(seeds, own, strict=True)},
    }
    found = {"store_digest": _sha("store"), "heldout_digest": _sha("held-out"), "d_sae": D_SAE}
    found |= {"k": dict.fromkeys(seeds, K), "tokens": own[0]["core"]["tokens"], "saes": figures, "gain": {}}
    return json.loads(json.dumps(found | {"prototypes": dict.fromkeys(PROTOTYPES, figures)}))


def _derive(files: dict) -> None:
    """Make all again that rests on raw figures."""
    _derive_bank(files["confirmation"]["bank"])
    meaningless, other, ood = (files[label] for label in ("random_model", "transcoder", "ood"))
    sections = (meaningless["section"], meaningless["random_model"], other["transcoder"], other["sae"])
    for section in (files["phase4a"]["husai"], *sections):
        _summarise(section)
    own, control = OwnSection.model_validate(sections[0]), Control.model_validate(sections[1])
    gain = random_model.gain(own, control)
    meaningless |= {"gain": gain and gain.to_json(), "verdict": random_model.verdict(own, control)}
    open_ones: dict[str, Any] = {"gain": None, "explained_variance": {}, "verdict": {}}
    made = transcoder.concluded(TranscoderStress.model_validate(other | open_ones)).to_json()
    other |= {name: made[name] for name in ("setting", *open_ones)}
    ood["activations"]["change"] = drop.change(ood["activations"]["saes"])
    shifted = ood["shifted"]
    shifted |= {"drop": {}, "drop_where_kept": {}}
    typed = OODStress.model_validate(ood).shifted
    shifted |= {"drop": drop.drop(typed), "drop_where_kept": drop.drop_where_kept(typed)}


def _derive_bank(bank: dict) -> None:
    for section in bank["sections"]:
        _summarise(section)
    _means(bank)
    _derive_benchmarks(bank)
    if "code" in bank:
        bank["code"]["gain"] = prototypes.concluded(Code.model_validate(bank["code"])).to_json()["gain"]
    bank["conditions"] = conditions.conditions(Bank.model_validate(bank | {"conditions": []}))


def _derive_benchmarks(bank: dict) -> None:
    probing, pairs = bank["saebench"], bank["cebench"]
    probing["conditions"] = deltas.saebench(Probing.model_validate(probing | {"conditions": []}))
    pairs["conditions"] = deltas.contrastive(Contrastive.model_validate(pairs | {"conditions": []}))


def _means(bank: dict) -> None:
    """What a record says of its own figures."""
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


def _repeats(own: float) -> dict:
    return noise([own, own + 0.01, own - 0.01])


def _summarise(section: dict) -> None:
    labels = [m.get("label", f"seed{m['seed']}") for m in section["members"]]
    scored = {
        (labels.index(p["a"]), labels.index(p["b"])): {
            name: {"mean": value, "draws": None} for name, value in p.items() if name not in ("a", "b")
        }
        for p in section["pairs"]
    }
    section["stability"] = summarise(labels, scored, {"shuffled": "not part of this study"}).to_json()
    for score in section["stability"]["scores"].values():
        score["nulls"]["spectral"]["draws"] = SPECTRAL_DRAWS
