"""The strict release gate: right figures, no pass without all of it, and none on damaged evidence."""

import json
import re
from dataclasses import replace

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
from husai.evidence.levels import FRESH_SEEDS
from husai.evidence.names import GATED_NULLS
from husai.evidence.schemas import ScoredRecord, SeedGroup
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


def made(seeds: int = 5, seed: int = 0, derived: bool = True, **sizes: float) -> Bundle:
    """A bundle whose gates have these true effects, in standard errors; SIZE where none is named."""
    effects = {g: simulate.shifted(g, sizes.get(g, SIZE) * simulate.standard_error(g, NOISE[g])) for g in GATES}
    return simulate.bundle(effects, NOISE, np.random.default_rng(seed), seeds, derived)


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
    assert set(NOISE) == set(GATES)
    assert all(s.seed >= 0 and s.cell > 0 for s in NOISE.values())


# ---------------------------------------------------------------------------------------------------------------------
# Each gate: the right figure, the right side


def of_pairs(x: np.ndarray) -> tuple[float, float]:
    """(mean over pairs, half of the 95 % jackknife interval)."""
    s = len(x)
    off = ~np.eye(s, dtype=bool)
    rest = [x[np.ix_(keep, keep)][off[:-1, :-1]].mean() for keep in (np.delete(np.arange(s), i) for i in range(s))]
    error = np.sqrt((s - 1) * np.var(rest))
    return x[off].mean(), stats.t.ppf(0.975, s - 1) * error


def of_sets(x: np.ndarray, families: list[str]) -> tuple[float, float]:
    """The same over seeds and clustered data sets, `x [S, D]`."""
    s, d = x.shape
    sums = [sum(x[:, i].mean() - x.mean() for i in range(d) if families[i] == f) for f in sorted(set(families))]
    f = len(sums)
    variance = f / (f - 1) * sum(v * v for v in sums) / d**2 + x.mean(1).var(ddof=1) / s
    return x.mean(), stats.t.ppf(0.975, min(s, f) - 1) * np.sqrt(variance)


def oracle(bundle: Bundle, gate: str) -> tuple[float, float]:
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
        return min((of_pairs(matrix(files[gate]["across"], null)) for null in GATED_NULLS), key=lambda e: e[0] - e[1])
    if gate == "random_model":
        section, controls = files[gate]["section"], files[gate]["random_models"]
        gains = [matrix(section, null) - matrix(c, null) for c in controls for null in (None, *GATED_NULLS)]
        return min(map(of_pairs, gains), key=lambda e: e[0] - e[1])
    if gate in simulate.OF_PAIRS:
        section = {"positive_control": files["phase4a"]["husai"], "stability": bank["sections"][0]}[gate]
        return min((of_pairs(matrix(section, null, score)) for score, null in EXCESSES), key=lambda e: e[0] - e[1])
    if gate == "ood":
        shifted = files["ood"]["shifted"]
        sides = [shifted["llm"], *(s["test_auc"]["5"] for s in shifted["saes"])]
        llm, *saes = (np.array(s["id"]) - np.array(s["ood"]) for s in sides)
        return of_sets(np.array(saes) - llm, shifted["families"])
    part = bank[gate]
    of = (lambda r: r["test_auc"]["5"]) if gate == "saebench" else (lambda r: r["normalised_of_pairs"])
    own, reference = (np.array([of(r) for r in part["saes"] if r["candidate"] == c]) for c in (True, False))
    return of_sets(own - reference, part["families" if gate == "saebench" else "clusters"])


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_against_numpy(gate, good):
    """PASS far beyond the threshold, FAIL at it and beyond on the wrong side, MISSING without the file."""
    for size, status in ((SIZE, "PASS"), (0.0, "FAIL"), (-SIZE, "FAIL")):
        bundle = made(derived=False, **{gate: size})
        decision, gates = judged(bundle)
        found = gates[gate]
        estimate, half = oracle(bundle, gate)
        assert found["status"] == status
        assert found["estimate"] == pytest.approx(estimate, abs=1e-12)
        assert found["low"] == pytest.approx(estimate - half, abs=1e-12)
        assert found["high"] == pytest.approx(estimate + half, abs=1e-12)
        assert found["n"] == 5
        assert decision["pass_all"] == (status == "PASS")
        assert {g["status"] for n, g in gates.items() if n != gate} == {"PASS"}
        assert (found["to_pass"] is None) == (status == "PASS")
    label = next(n for n, of in reversed(damage.OF_FILE.items()) if gate in of)
    decision, gates = judged(Bundle(good.files | {label: None}, good.on_disk))
    assert gates[gate]["status"] == "MISSING"
    assert not decision["pass_all"]


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


def test_no_damage_of_supplied_evidence_gets_through(supplied):
    rng = np.random.default_rng(0)
    files = {"confirmation": supplied.files["confirmation"]}
    cases = [c for c in damage.of_values(replace(supplied, files=files), rng) if rng.random() < 0.03]
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


def test_no_damage_of_a_place_gets_through(good):
    """A sample; benchmarks/gate_calibration.py tries more than ten thousand."""
    rng = np.random.default_rng(0)
    cases = [c for c in damage.of_values(good, rng) if rng.random() < 0.02]
    assert len(cases) > 300
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
