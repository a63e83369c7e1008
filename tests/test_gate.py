"""The strict release gate: right figures, no pass without all of it, and none on damaged evidence."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from husai.dictionaries import checkpoints, foreign
from husai.dictionaries.sae import SAE
from husai.evals import loaded
from husai.evals.loaded import identity
from husai.evidence import rules
from husai.evidence.levels import FRESH_SEEDS
from husai.evidence.names import GATED_NULLS
from husai.evidence.schemas import Alike, ScoredRecord, SeedGroup
from husai.release import bundle as reading
from husai.release import decisions, recompute
from husai.release.gate import GATES, Bundle, Thresholds, decide
from husai.runs.files import REPOSITORY, digest, sha256_file, write_json, write_text
from husai.testing import damage, simulate

NOISE = simulate.measured(REPOSITORY / "docs")
EXCESSES = [
    *((f"mcc_{part}", null) for part in ("alive", "others") for null in GATED_NULLS),
    *((f"mcc_{part}_abs", "spectral") for part in ("alive", "others")),
    *((f"share70_{part}", null) for part in ("alive", "others") for null in ("spectral", "gaussian")),
]
"""What the rule of stability asks: scores, and the controls that they must exceed."""
SIZE = 10.0  # standard errors beyond the threshold


def made(seeds: int = 5, seed: int = 0, derived: bool = True, attempt: int = 1, **sizes: float) -> Bundle:
    """A bundle whose gates have these true effects, in standard errors; SIZE where none is named."""
    effects = {g: simulate.shifted(g, sizes.get(g, SIZE) * simulate.standard_error(g, NOISE[g])) for g in GATES}
    return simulate.bundle(effects, NOISE, np.random.default_rng(seed), seeds, derived, attempt)


@pytest.fixture(scope="module")
def good() -> Bundle:
    return made()


def judged(bundle: Bundle, thresholds: Thresholds | None = None, **waived: str) -> tuple[dict, dict[str, dict]]:
    decision = decide(bundle, thresholds or Thresholds(), waived)
    return decision, {g["gate"]: g for g in decision["gates"]}


def with_results(bundle: Bundle, label: str, change) -> Bundle:
    """The bundle with results of one file changed, and made again where `change` says so."""
    results = json.loads(json.dumps(bundle.files[label].results))
    change(results)
    return Bundle(bundle.files | {label: replace(bundle.files[label], results=results)}, bundle.on_disk)


# ---------------------------------------------------------------------------------------------------------------------
# Simulated evidence


@pytest.mark.parametrize("seeds", [5, 6])
def test_simulated_evidence_follows_from_its_figures_and_passes(seeds):
    bundle = made(seeds)
    for file in bundle.files.values():
        assert recompute.results_problems(file.results) == []
    decision, gates = judged(bundle)
    assert decision["pass_all"]
    assert decision["outcome"] == "passed"
    assert not decision["provisional"]
    assert {g["status"] for g in gates.values()} == {"PASS"}
    fast = made(seeds, derived=False)
    assert [g["low"] for g in decide(fast, Thresholds(), {})["gates"]] == [g["low"] for g in gates.values()]


def test_noise_is_known_of_every_gate():
    for noise in (NOISE, simulate.measure(REPOSITORY / "docs" / "evidence")):
        assert set(noise) == set(GATES)
        assert all(s.seed >= 0 and (s.seed if g in simulate.OF_SEEDS else s.cell) > 0 for g, s in noise.items())


def test_moments_give_the_noise_that_was_drawn():
    rng, spread = np.random.default_rng(0), simulate.NoiseSpread(0.3, 0.2, 0.4, 0.1)
    drawn = [simulate.of_pairs(rng, 5, spread) * (1 - np.eye(5)) for _ in range(400)]
    found = simulate._pooled(map(simulate._of_matrix, drawn))
    assert (found.seed, found.cell) == pytest.approx((0.3, 0.2), rel=0.1)
    families = [f for f in "abcdefgh" for _ in range(4)]
    found = simulate._pooled(
        simulate._of_sets(simulate.of_sets(rng, 5, families, spread), families) for _ in range(400)
    )
    assert vars(found) == pytest.approx(vars(spread), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Each gate: the right figure, the right side


@dataclass(frozen=True)
class Oracle:
    """A figure's estimate, by numpy and scipy.stats."""

    mean: float
    half: float
    """Half of the interval."""
    error: float
    freedom: int
    rest: list[float]
    """Means without one seed."""


def of_pairs(x: np.ndarray, level: float) -> Oracle:
    """Mean over pairs, with the jackknife interval."""
    s = len(x)
    off = ~np.eye(s, dtype=bool)
    rest = [x[np.ix_(keep, keep)][off[:-1, :-1]].mean() for keep in (np.delete(np.arange(s), i) for i in range(s))]
    error = np.sqrt((s - 1) * np.var(rest))
    return Oracle(x[off].mean(), stats.t.ppf((1 + level) / 2, s - 1) * error, error, s - 1, rest)


def of_sets(x: np.ndarray, families: list[str], level: float) -> Oracle:
    """The same over seeds and clustered data sets, `x [S, D]`."""
    s, d = x.shape
    sums = [sum(x[:, i].mean() - x.mean() for i in range(d) if families[i] == f) for f in sorted(set(families))]
    f = len(sums)
    error = np.sqrt(f / (f - 1) * sum(v * v for v in sums) / d**2 + x.mean(1).var(ddof=1) / s)
    rest = [np.delete(x, i, axis=0).mean() for i in range(s)]
    freedom = min(s, f) - 1
    return Oracle(x.mean(), stats.t.ppf((1 + level) / 2, freedom) * error, error, freedom, rest)


def of_seeds(x: np.ndarray, level: float) -> Oracle:
    error, rest = x.std(ddof=1) / np.sqrt(len(x)), [np.delete(x, i).mean() for i in range(len(x))]
    return Oracle(x.mean(), stats.t.ppf((1 + level) / 2, len(x) - 1) * error, error, len(x) - 1, rest)


def level_of(gate: str, attempt: int = 1) -> float:
    return 0.95 if gate == "positive_control" else 1 - 0.05 / 2**attempt


def oracle(bundle: Bundle, gate: str) -> Oracle:
    level = level_of(gate, bundle.files["confirmation"].results["attempt"])
    files = {label: f.results for label, f in bundle.files.items()}
    bank = files["confirmation"]["bank"]

    def matrix(section: dict, null: str | None, score: str = "mcc_alive") -> np.ndarray:
        seeds = section["stability"]["labels"]
        x = np.zeros((len(seeds), len(seeds)))
        for p in section["pairs"]:
            i, j = seeds.index(p["a"]), seeds.index(p["b"])
            x[i, j] = x[j, i] = p["observed"][score] - (p[null][score] if null else 0)
        return x

    if gate == "transcoder":
        asked = [*(("mcc_alive", null) for null in GATED_NULLS), ("mcc_alive_abs", "spectral")]
        found = [of_pairs(matrix(files[gate]["across"], null, score), level) for score, null in asked]
        return min(found, key=lambda e: e.mean - e.half)
    if gate == "random_model":
        section, controls = files[gate]["section"], files[gate]["random_models"]
        gains = [matrix(section, null) - matrix(c, null) for c in controls for null in (None, *GATED_NULLS)]
        return min((of_pairs(gain, level) for gain in gains), key=lambda e: e.mean - e.half)
    if gate in simulate.OF_PAIRS:
        section = {
            "positive_control": files["phase4a"]["planted"]["degrees"][-1]["study"],
            "stability": bank["sections"][0],
        }[gate]
        found = [of_pairs(matrix(section, null, score), level) for score, null in EXCESSES]
        return min(found, key=lambda e: e.mean - e.half)
    if gate == "ood":
        shifted = files["ood"]["shifted"]
        sides = [shifted["llm"], *(s["test_auc"]["5"] for s in shifted["saes"])]
        llm, *saes = (np.array(s["id"]) - np.array(s["ood"]) for s in sides)
        return of_seeds((np.array(saes) - llm)[:, np.array(shifted["llm"]["ood_low"]) > 0.5].mean(1), level)
    own = [r for r in bank["saes"] if r["candidate"]]
    variance = np.array([r["heldout"]["explained_variance"] for r in own])
    spliced = np.array([r["core"]["ce_loss_score"] for r in own])
    if gate == "fit":
        dead = np.array([r["heldout"]["dead_share"] for r in own])
        found = [of_seeds(x, level) for x in (variance - 0.5, spliced - 0.5, 0.25 - dead)]
        return min(found, key=lambda e: e.mean - e.half)
    if gate == "code":
        found = []
        for figure, values in (("explained_variance", variance), ("ce_recovered", spliced)):
            kinds = [np.array([*kind[figure].values()]) for kind in bank[gate]["prototypes"].values()]
            found.append(of_seeds(values - max(kinds, key=np.mean), level))
        return min(found, key=lambda e: e.mean - e.half)
    part = bank[gate]
    of = (lambda r: r["test_auc"]["5"]) if gate == "saebench" else (lambda r: r["normalised_of_pairs"])
    own, reference = (np.array([of(r) for r in part["saes"] if r["candidate"] == c]) for c in (True, False))
    groups = part["families" if gate == "saebench" else "clusters"]
    keep = counted(part["data_sets"] if gate == "saebench" else numbered(groups), groups)
    return of_sets((own - reference)[:, keep], [groups[i] for i in keep], level)


def numbered(clusters: list[str]) -> list[str]:
    return [f"{c}, pair {clusters[: i + 1].count(c)}" for i, c in enumerate(clusters)]


def counted(names: list[str], groups: list[str]) -> list[int]:
    """Sets are taken out of the largest group, last hash first, until it holds a quarter at most."""
    kept = list(range(len(names)))
    while True:
        sizes = {g: [i for i in kept if groups[i] == g] for g in {groups[i] for i in kept}}
        largest = max(map(len, sizes.values()))
        if 4 * largest <= len(kept):
            return kept
        for members in sizes.values():
            if len(members) == largest:
                kept.remove(max(members, key=lambda i: digest(names[i])))


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_against_numpy(gate, good):
    """PASS far beyond the threshold, FAIL at it and beyond on the wrong side, MISSING without the file."""
    for size, status in ((SIZE, "PASS"), (0.0, "FAIL"), (-SIZE, "FAIL")):
        bundle = made(derived=False, **{gate: size})
        decision, gates = judged(bundle)
        found = gates[gate]
        expected = oracle(bundle, gate)
        assert found["status"] == status
        assert found["estimate"] == pytest.approx(expected.mean, abs=1e-12)
        assert found["low"] == pytest.approx(expected.mean - expected.half, abs=1e-12)
        assert found["high"] == pytest.approx(expected.mean + expected.half, abs=1e-12)
        assert (found["n"], found["level"]) == (5, pytest.approx(level_of(gate), abs=1e-12))
        assert found["without_one_seed"] == pytest.approx([min(expected.rest), max(expected.rest)], abs=1e-12)
        assert decision["pass_all"] == (status == "PASS")
        assert {g["status"] for n, g in gates.items() if n != gate} == {"PASS"}
        assert (found["to_pass"] is None) == (status == "PASS")
    label = next(n for n, of in reversed(damage.OF_FILE.items()) if gate in of)
    decision, gates = judged(Bundle(good.files | {label: None}, good.on_disk))
    assert gates[gate]["status"] == "MISSING"
    assert not decision["pass_all"]


def test_what_stands_beside_a_figure_and_what_does_not_count(good):
    """The reference's explained variance, paired by seed; pairs of the one large cluster, by name; the drop on all."""
    results = good.files["confirmation"].results["bank"]
    variance = {c: [r["heldout"]["explained_variance"] for r in results["saes"] if r["candidate"] == c] for c in (1, 0)}
    lost = np.array(variance[1]) - variance[0] + np.arange(5) / 100

    def change(found):
        parts = found["bank"], found["bank"]["saebench"], found["bank"]["cebench"]
        for saes in (part["saes"] for part in parts):
            for record, more in zip([r for r in saes if r["candidate"]], np.arange(5) / 100, strict=True):
                record["heldout"]["explained_variance"] += float(more)

    _, gates = judged(with_results(good, "confirmation", change))
    half = stats.t.ppf((1 + level_of("saebench")) / 2, 4) * lost.std(ddof=1) / np.sqrt(5)
    for gate in ("saebench", "cebench"):
        (beside,) = gates[gate]["beside"].values()
        assert list(beside.values()) == pytest.approx([lost.mean(), lost.mean() - half, lost.mean() + half])
        assert gates[gate]["status"] == "PASS"
    clusters = results["cebench"]["clusters"]
    names = numbered(clusters)
    out = {names[i] for i in range(len(names))} - {names[i] for i in counted(names, clusters)}
    assert set(gates["cebench"]["left_out"]) == out
    assert {name.split(",")[0] for name in out} == {"story_family00"}
    assert gates["saebench"]["left_out"] == []
    (every,) = gates["ood"]["beside"].values()
    assert every["high"] - every["low"] > gates["ood"]["high"] - gates["ood"]["low"]
    assert all(f"{name}_OOD" in gates["ood"]["figure"] for name in good.files["ood"].results["shifted"]["data_sets"])


def test_a_candidate_that_is_no_better_than_its_reference_is_not_shown_to_be_better(good):
    def change(found):
        for part, name in (("saebench", "test_auc"), ("cebench", "normalised_of_pairs")):
            saes = found["bank"][part]["saes"]
            own, references = ([r for r in saes if r["candidate"] == c] for c in (True, False))
            for record, other in zip(own, references, strict=True):
                record[name] = other[name]
                for mean in ("means", "normalised", "corrected"):
                    if mean in record:
                        record[mean] = other[mean]
            noise = found["bank"][part]["noise"]
            first = own[0]["normalised"] if part == "cebench" else own[0]["means"]
            for repeats, mean in (
                [(noise, first)] if part == "cebench" else [(noise["auc"][k], first[k]["test_auc"]) for k in first]
            ):
                repeats |= simulate._repeats(mean)

    _, gates = judged(with_results(good, "confirmation", change))
    for gate in ("saebench", "cebench"):
        assert (gates[gate]["status"], gates[gate]["estimate"], gates[gate]["low"]) == ("FAIL", 0.0, 0.0)
        assert "better" in gates[gate]["question"]


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_says_its_own_power(gate, good):
    """By scipy.stats' noncentral t, from the standard error of the estimate that is the hardest to pass."""
    found, expected = judged(good)[1][gate], oracle(good, gate)
    quantile = stats.t.ppf((1 + level_of(gate)) / 2, expected.freedom)
    sign = -1 if gate == "ood" else 1

    def passes(truth: float) -> float:
        far = sign * (truth - found["threshold"]) / expected.error
        return stats.nct.sf(quantile, expected.freedom, far) if far else stats.t.sf(quantile, expected.freedom)

    assert found["passes_at_no_effect"] == pytest.approx(passes(0.0), abs=1e-4)
    assert passes(found["effect_for_80"]) == pytest.approx(0.8, abs=0.002)
    if found["threshold"] == 0:
        assert found["passes_at_no_effect"] == pytest.approx((1 - level_of(gate)) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["members"][0]["heldout"].update(l0=g["members"][0]["heldout"]["l0"] * 1.2),
        lambda g: g["members"].pop(),
        lambda g: g["members"][0].update(seed=7),
        lambda g: g["members"][1].update(checkpoint_sha256=g["members"][0]["checkpoint_sha256"]),
        lambda g: g.update(subject_digest="0" * 64),
    ],
    ids=["l0", "number", "seed", "twice", "subject"],
)
def test_the_gaussian_control_must_have_been_trained_alike(good, change):
    def changed(results):
        section = results["bank"]["sections"][0]
        change(section["gaussian"])
        inputs = {k: v for k, v in results["inputs"].items() if not k.startswith("gaussian")}
        results["inputs"] = inputs | Alike.model_validate(section["gaussian"]).inputs("gaussian")

    assert judged(with_results(good, "confirmation", changed))[1]["stability"]["status"] == "MISSING"


def test_the_decision_says_what_is_licensed(good):
    decision, _ = judged(good)
    whole = rules.LICENCES[-1][2]
    assert decision["licensed"] == whole
    assert judged(made(stability=0.0, derived=False))[0]["licensed"] == rules.LICENCES[0][2]

    for known in (False, None):

        def moving(results, known=known):
            results["bank"]["sections"][0]["convergence"]["converged"] = known

        licensed = judged(with_results(good, "confirmation", moving))[0]["licensed"]
        assert licensed.startswith(whole[:-1])
        assert f"{simulate.TOKENS:,} tokens" in licensed
        nothing = with_results(made(stability=0.0, derived=False), "confirmation", moving)
        assert judged(nothing)[0]["licensed"] == rules.LICENCES[0][2]
    no_section = with_results(good, "confirmation", lambda r: r["bank"].update(sections=[]))
    assert judged(no_section)[0]["licensed"] is None


@pytest.mark.parametrize("gate", ["random_model", "transcoder"])
def test_a_stress_test_scores_the_candidates_own_pairs_as_the_confirmation_does(good, gate):
    """An account of its own is no evidence where SAEs, store and draws are the same; another one's cannot be equal."""

    def status(name: str, by: float, **more) -> str:
        def change(results):
            section = results["section"]
            section["pairs"][3][name]["mcc_alive"] += by
            section["stability"]["scores"]["mcc_alive"]["nulls"]["spectral"] |= more

        return judged(with_results(good, gate, change))[1][gate]["status"]

    for name in ("observed", *GATED_NULLS):
        assert status(name, 2e-5) == "MISSING"
        assert status(name, 1e-7) == "PASS", "rounding"
    assert status("spectral", 0.0, draws=200) == "MISSING", "nothing else binds draws of another number"

    def other_noise(results):
        for member in results["section"]["gaussian"]["members"]:
            member["checkpoint_sha256"] = digest(member["checkpoint_sha256"])
        kept = {k: v for k, v in results["inputs"].items() if not k.startswith("gaussian")}
        results["inputs"] = kept | Alike.model_validate(results["section"]["gaussian"]).inputs("gaussian")
        results["section"]["pairs"][3]["gaussian"]["mcc_alive"] += 2e-5

    assert judged(with_results(good, gate, other_noise))[1][gate]["status"] == "PASS"


@pytest.mark.parametrize("attempt", [1, 2, 3, 60])
def test_the_gate_is_stricter_at_each_attempt(attempt):
    """The same figures; what has no finite interval any more is no evidence."""
    decision, gates = judged(made(attempt=attempt, derived=False))
    assert decision["attempt"] == attempt
    assert gates["positive_control"]["level"] == 0.95
    of_candidate = [g for name, g in gates.items() if name != "positive_control"]
    if attempt == 60:
        assert {g["status"] for g in of_candidate} == {"MISSING"}
        return
    assert [g["level"] for g in of_candidate] == pytest.approx([1 - 0.05 / 2**attempt] * (len(GATES) - 1), abs=1e-12)
    for name, g in gates.items():
        expected = oracle(made(attempt=attempt, derived=False), name)
        assert g["high"] - g["low"] == pytest.approx(2 * expected.half, abs=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_a_waiver_never_passes(good, gate):
    decision, gates = judged(good, **{gate: "not needed here"})
    assert gates[gate] | {"waived": "not needed here"} == gates[gate]
    assert not decision["pass_all"]
    assert decision["provisional"]
    assert decision["outcome"] == "provisional"
    decision, _ = judged(made(derived=False, **{gate: -SIZE}), **{gate: "not needed here"})
    assert (decision["pass_all"], decision["outcome"]) == (False, "provisional")


@pytest.mark.parametrize("name", list(vars(Thresholds())))
def test_a_looser_threshold_never_passes_and_a_stricter_one_may(good, name):
    value = getattr(Thresholds(), name)
    looser, stricter = (value + sign * 0.001 * (1 if name.startswith("min") else -1) for sign in (-1, 1))
    decision, _ = judged(good, Thresholds(**{name: looser}))
    assert decision["looser_than_registered"] == [name]
    assert decision["provisional"]
    assert not decision["pass_all"]
    decision, _ = judged(good, Thresholds(**{name: stricter}))
    assert decision["looser_than_registered"] == []
    assert decision["pass_all"]


def test_a_minimum_that_no_sae_can_reach_is_refused(good):
    _, gates = judged(good, Thresholds(min_cebench_delta=0.6))
    assert gates["cebench"]["status"] == "MISSING"
    assert re.search(r"\b0\.6 ", gates["cebench"]["reason"])
    _, gates = judged(good, Thresholds(min_cebench_delta=0.45))
    assert gates["cebench"]["status"] == "FAIL"


@pytest.mark.parametrize("benchmark", ["contrastive_local", "cebench_local_copy"])
def test_other_stories_never_count_as_cebench(good, benchmark):
    changed = with_results(good, "confirmation", lambda r: r["bank"]["cebench"].update(benchmark=benchmark))
    decision, gates = judged(changed)
    assert gates["cebench"]["status"] == "MISSING"
    assert benchmark in gates["cebench"]["reason"]
    assert not decision["pass_all"]
    assert {g["status"] for n, g in gates.items() if n != "cebench"} == {"PASS"}


def test_fewer_than_five_seeds_are_no_evidence():
    decision, gates = judged(made(4))
    assert {g["status"] for g in gates.values()} == {"MISSING"}
    assert re.search(r"\b4 seeds\b.*\b5\b", gates["stability"]["reason"])
    assert re.search(r"\b4 seeds\b.*\b5\b", gates["positive_control"]["reason"])
    assert not decision["pass_all"]


def test_a_study_used_the_seeds(good):
    used = with_results(good, "selection", lambda r: r["seeds_used"].append(FRESH_SEEDS[0]))
    _, gates = judged(used)
    assert re.search(r"\bseeds\b.*\bfresh\b", gates["stability"]["reason"])
    assert gates["positive_control"]["status"] == "PASS"


# ---------------------------------------------------------------------------------------------------------------------
# SAEs that a user supplies


@pytest.fixture(scope="module")
def supplied(good) -> Bundle:
    return simulate.supplied(good)


def test_stress_tests_of_a_stream_take_the_documents_of_the_prototypes(supplied):
    """Files of streamed SAEs name a stream, which is no store. Stores of all other SAEs are named by their files."""
    own = supplied.files["confirmation"].results["candidate"]["facts"]["store_digest"]

    def with_facts(value, **facts):
        if isinstance(value, list):
            return [with_facts(v, **facts) for v in value]
        if not isinstance(value, dict):
            return value
        changed = {name: with_facts(v, **facts) for name, v in value.items()}
        return changed | facts if value.get("store_digest") == own and "training" in value else changed

    def decided(documents=own, **facts):
        files = {label: f and replace(f, results=with_facts(f.results, **facts)) for label, f in supplied.files.items()}
        files["confirmation"].results["bank"]["code"]["store_digest"] = documents
        return judged(Bundle(files, supplied.on_disk))

    decision, gates = decided(store_digest="e" * 64, streamed=True)
    assert decision["outcome"] == "provisional", {n: g["reason"] for n, g in gates.items() if g["status"] != "PASS"}
    other_documents = decided("d" * 64, store_digest="e" * 64, streamed=True)
    no_stream = decided(store_digest="e" * 64)
    for _, gates in (other_documents, no_stream):
        for name in ("random_model", "transcoder"):
            assert gates[name]["status"] == "MISSING"
            assert "store_digest" in gates[name]["reason"]


def test_supplied_saes_never_get_more_than_provisional(good, supplied):
    """All gates are judged, on the same bounds; nobody knows what the SAEs were chosen from."""
    assert recompute.results_problems(supplied.files["confirmation"].results) == []
    decision, gates = judged(supplied)
    assert {n: g["status"] for n, g in gates.items()} == dict.fromkeys(GATES, "PASS")
    assert (decision["pass_all"], decision["provisional"], decision["outcome"]) == (False, True, "provisional")
    assert (judged(good)[0]["unconfirmed"], bool(decision["unconfirmed"])) == (None, True)
    _, confirmed = judged(good)
    for name in set(GATES) - {"saebench"}:
        assert [gates[name][end] for end in ("low", "high")] == [confirmed[name][end] for end in ("low", "high")]
    assert decision["licensed"] == rules.with_budget(rules.LICENCES[-1][2], simulate.TOKENS, None)
    decision, gates = judged(simulate.supplied(made(derived=False, ood=-SIZE)))
    assert (gates["ood"]["status"], decision["outcome"]) == ("FAIL", "not passed")
    assert judged(supplied, ood="not needed here")[0]["outcome"] == "provisional"
    assert judged(simulate.supplied(made(4)))[0]["outcome"] == "not passed"


def facts_unknown(results):
    """As SAEs from elsewhere: no training, no seed, no subject."""
    records = [*results["bank"]["saes"], *results["bank"]["saebench"]["saes"], *results["bank"]["cebench"]["saes"]]
    own = sorted((r for r in results["bank"]["saes"] if r["candidate"]), key=lambda r: r["identity"])
    unknown = dict.fromkeys(("subject_digest", "learning_rate", "tokens", "store_digest", "training", "seed"))
    own_now = [ScoredRecord(**r | {"facts": r["facts"] | unknown | {"source": "sparsify"}}) for r in own]
    results["candidate"] = SeedGroup.of(own_now).to_json()
    for r in records:
        if r["candidate"]:
            r["facts"] |= unknown | {"source": "sparsify"}
            r["condition"] = results["candidate"]["condition"]
    place = {r["checkpoint_sha256"]: i for i, r in enumerate(own)}
    results["bank"]["saes"].sort(key=lambda r: place.get(r["checkpoint_sha256"], 99))
    section = results["section"]
    order = sorted(section["members"], key=lambda m: place[m["checkpoint_sha256"]])
    section["members"] = [m | {"seed": None} for m in order]
    section["stability"]["labels"] = [m["label"] for m in order]
    for name in ("paths", "untrained"):
        results[name] = {str(i): v for i, v in enumerate(results[name].values())}
    kept = {k: v for k, v in results["inputs"].items() if not k.startswith("untrained")}
    results["inputs"] = kept | {f"untrained {s}": v for s, v in results["untrained"].items()}


def test_what_is_not_known_of_supplied_saes_is_missing_and_says_which_flag_would_say_it(supplied):
    foreign_saes = with_results(supplied, "confirmation", facts_unknown)
    own = foreign_saes.files["confirmation"].results["candidate"]

    def of_them(results):
        place = [*own["identities"].values()].index
        results["shifted"]["saes"].sort(key=lambda s: place(s["identity"]))
        results["candidate"] = own
        for sae in results["shifted"]["saes"]:
            sae["seed"] = None

    foreign_saes = with_results(foreign_saes, "ood", of_them)
    files = foreign_saes.files | dict.fromkeys(("random_model", "transcoder"))
    foreign_saes = Bundle(files, own["identities"])
    decision, gates = judged(foreign_saes)
    assert gates["stability"]["status"] == "PASS", gates["stability"]["reason"]
    assert gates["ood"]["status"] == "PASS", gates["ood"]["reason"]
    assert set(decision["candidate"]["checkpoints"]) == set("01234")
    for name, words in {
        "random_model": "--random-model-checkpoint",
        "transcoder": "transcoders",
        "saebench": "--reference",
        "cebench": "--reference",
    }.items():
        assert gates[name]["status"] == "MISSING"
        assert words in gates[name]["reason"], gates[name]["reason"]

    def change(results):
        for pair in results["section"]["pairs"]:
            del pair["untrained"]
        results["inputs"] = {k: v for k, v in results["inputs"].items() if not k.startswith("untrained")}
        results["untrained"] = None

    _, gates = judged(with_results(supplied, "confirmation", change))
    assert gates["stability"]["status"] == "PASS", "untrained states are no condition"
    fewer = with_results(supplied, "confirmation", lambda r: r["bank"]["saebench"]["data_sets"].__setitem__(0, "x"))
    assert "--dataset-names" in judged(fewer)[1]["saebench"]["reason"]
    local = with_results(supplied, "confirmation", lambda r: r["bank"]["cebench"].update(benchmark="contrastive_local"))
    assert "--stories" in judged(local)[1]["cebench"]["reason"]


@pytest.mark.slow
def test_no_damage_of_supplied_evidence_gets_through(supplied):
    rng = np.random.default_rng(0)
    files = {"confirmation": supplied.files["confirmation"]}
    cases = [c for c in damage.of_values(replace(supplied, files=files), rng) if rng.random() < 0.03]
    # Nothing was selected, therefore no selection says which versions are expected.
    cases = [c for c in cases if "/versions/" not in c.place]
    cases = [replace(c, bundle=Bundle(supplied.files | c.bundle.files, supplied.on_disk)) for c in cases]
    assert len(cases) > 60
    assert [f"{c.kind} at {c.place}" for c in cases if not c.caught()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Files


def run_folder(root, label, results):
    """A finished run as it lies on the disk; returns its results file."""
    folder = root / label
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)
    write_text(folder / "summary.md", "simulated\n")
    manifest = {
        "run_id": "run_20261125T000000Z_00000000",
        "status": "complete",
        "return_code": 0,
        "command": "simulated",
    }
    manifest |= {"started_utc": "2026-11-25T00:00:00+00:00", "wall_seconds": 1.0, "git_commit": None, "git_dirty": None}
    manifest |= {"git_reason": "simulated", "python": "3.11", "platform": "simulated", "packages": {}, "device": "cpu"}
    manifest |= {"threads": 1, "inputs": results["inputs"], "commands": []}
    manifest["outputs"] = {n: sha256_file(folder / n) for n in ("results.json", "summary.md")}
    write_json(folder / "manifest.json", manifest)
    return folder / "results.json"


@pytest.fixture(scope="module")
def written(good, tmp_path_factory):
    """The good bundle as run folders, signed anew where its files name each other."""
    root = tmp_path_factory.mktemp("runs")
    files = {label: json.loads(json.dumps(f.results)) for label, f in good.files.items()}
    paths = {"selection": run_folder(root, "selection", files["selection"])}
    sha256 = sha256_file(paths["selection"])
    files["confirmation"]["selection"]["sha256"] = files["confirmation"]["inputs"]["selection"] = sha256
    files["confirmation"]["ledger"][-1]["selection"] = sha256
    return paths | {label: run_folder(root, label, r) for label, r in files.items() if label != "selection"}


def test_run_folders_pass_as_they_are(good, written):
    files = {label: reading.read(path) for label, path in written.items()}
    assert [f.problems for f in files.values()] == [[]] * 6
    assert decide(Bundle(files, good.on_disk), Thresholds(), {})["pass_all"]


def test_any_changed_byte_of_a_file_is_seen(written):
    """Digest, or what is no JSON any more: at random places of every file, without the manifest signed again."""
    rng = np.random.default_rng(0)
    for label, path in written.items():
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 60):
            other = bytes([(whole[at] + rng.integers(1, 256)) % 256])
            path.write_bytes(whole[:at] + other + whole[at + 1 :])
            assert reading.read(path).problems, f"{label}: byte {at}"
        path.write_bytes(whole)
        manifest = path.with_name("manifest.json").read_text()
        for old, new in (("complete", "failed"), ('"return_code": 0', '"return_code": 2'), ('"inputs"', '"imputs"')):
            path.with_name("manifest.json").write_text(manifest.replace(old, new))
            assert reading.read(path).problems
        path.with_name("manifest.json").write_text(manifest)
        assert reading.read(path).problems == []
    assert reading.read(path.with_name("absent.json")) is None


def test_checkpoints_on_the_disk(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(4, 8, generator=g), "b_enc": torch.zeros(8)}
    weights |= {"W_dec": torch.randn(8, 4, generator=g), "b_dec": torch.zeros(4)}
    for seed in (1, 2):
        checkpoints.save(SAE(weights | {"b_dec": torch.full((4,), float(seed))}, "topk", 2), tmp_path / f"sae{seed}")
    paths = {"1": "sae1", "2": "sae2", "3": "sae3", "4": None}
    found = loaded.on_disk(tmp_path / "results.json", {"paths": paths})
    sha = sha256_file(foreign.weights_file(tmp_path / "sae1"))
    assert found["1"] == identity(foreign.open_checkpoint(tmp_path / "sae1"), sha)
    assert found["2"] not in (None, found["1"])
    assert (found["3"], found["4"]) == (None, None)
    assert loaded.on_disk(tmp_path / "results.json", ["no", "paths"]) == {}


def test_a_decision_on_supplied_saes_is_made_again(supplied, tmp_path):
    evidence = tmp_path / "docs" / "evidence"
    paths = {label: run_folder(evidence, label, f.results) for label, f in supplied.files.items() if f}
    files = {label: paths.get(label) and reading.read(paths[label]) for label in supplied.files}
    decision = {"phase": "release_gate", "inputs": {}, "policy": "strict"}
    decision |= decide(Bundle(files, supplied.on_disk), Thresholds(), {}) | {"on_disk": supplied.on_disk}
    assert decision["outcome"] == "provisional"
    decision["read"] = {n: {"path": f"{n}.json", "sha256": f and f.sha256} for n, f in files.items()}
    problem = decisions.problem(run_folder(evidence, "gate", decision), decision, tmp_path)
    assert problem is None
    for change in ({"unconfirmed": None}, {"pass_all": True}, {"provisional": False}, {"outcome": "passed"}):
        path = run_folder(tmp_path / str(*change), "gate", decision | change)
        assert f"/{next(iter(change))} " in decisions.problem(path, decision | change, tmp_path)
    del decision["unconfirmed"]
    path = run_folder(tmp_path / "without", "gate", decision)
    assert "/unconfirmed " in decisions.problem(path, decision, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Damage: each file signed again, so that only schema, binding and recomputation can tell


def test_no_damage_of_a_bundle_gets_through(good):
    cases = list(damage.of_bundles(good, [made(4), made(6)]))
    assert len(cases) > 100
    assert [f"{c.kind} at {c.place}" for c in cases if not c.caught()] == []


@pytest.mark.slow
def test_no_damage_of_a_place_gets_through(good):
    """A sample; benchmarks/gate_calibration.py tries more than ten thousand."""
    rng = np.random.default_rng(0)
    cases = [c for c in damage.of_values(good, rng) if rng.random() < 0.01]
    assert len(cases) > 150
    assert [f"{c.kind} at {c.place}" for c in cases if not c.caught()] == []


def test_strata_are_required_of_each_draw_of_the_random_weights(good):
    alone = replace(good, files={"random_model": good.files["random_model"]})
    cases = damage.of_values(alone, np.random.default_rng(0))
    cases = [c for c in cases if re.fullmatch(r"random_model/random_models/\d/strata", c.place)]
    cases = [replace(c, bundle=Bundle(good.files | c.bundle.files, good.on_disk)) for c in cases]
    assert len(cases) > 20
    assert [f"{c.kind} at {c.place}" for c in cases if not c.caught()] == []


@pytest.mark.slow
def test_no_damage_of_a_ledger_gets_through():
    """At the second attempt, where the first one is not the last entry. What was said of an earlier attempt beside its
    configuration counts for nothing, because its number alone is read."""
    second = made(attempt=2)
    cases = [c for c in damage.of_bundles(second, []) if "attempt" in c.kind or "ledger" in c.kind]
    cases += [c for c in damage.of_values(second, np.random.default_rng(0)) if re.search("/(ledger|attempt)", c.place)]
    earlier, edits = r"confirmation/ledger/0/(selection|saes|seeds(/\d+)?)", ("edited", "shorter", "longer")
    cases = [c for c in cases if not (c.kind in edits and re.fullmatch(earlier, c.place))]
    assert len(cases) > 100
    assert [f"{c.kind} at {c.place}" for c in cases if not c.caught()] == []


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("ab01", max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), value=ANY_JSON)
def test_no_value_in_the_place_of_another_gets_through(good, data, value):
    label = data.draw(st.sampled_from(list(good.files)))
    at, results = [], good.files[label].results
    while isinstance(results, dict | list) and results and (not at or data.draw(st.integers(0, 5))):
        keys = list(results) if isinstance(results, dict) else range(len(results))
        at.append(data.draw(st.sampled_from(list(keys))))
        results = results[at[-1]]
    place = "/".join((label, *map(str, at)))
    if damage.free(place) or json.dumps(value) == json.dumps(results) or same_number(value, results):
        return
    changed = damage.changed(good.files[label].results, tuple(at), lambda parent, key: parent.__setitem__(key, value))
    file = replace(good.files[label], results=changed, sha256=digest([place]))
    case = damage.Case("another value", place, Bundle(good.files | {label: file}, good.on_disk), damage.gates_of(place))
    assert case.caught()


def same_number(a, b) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return numbers and abs(a - b) <= 1e-9
