"""Planted features: rows, recovery and the positive control, against what is known because it was planted."""

import json
import runpy
from argparse import Namespace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from husai.activations.planted import planted_rows
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.evidence import planted, rules
from husai.evidence.estimates import mean_over_seeds
from husai.evidence.names import ALIVE, GATED_NULLS, OTHERS
from husai.evidence.rules import FAIL, MISSING, PASS
from husai.evidence.schemas import Phase4a, PlantedRows, PlantedSection
from husai.kernels.workers import one_torch_thread
from husai.release import recompute
from husai.release.gate import GATES, Bundle, Thresholds, decide
from husai.runs.cells import Cells
from husai.runs.files import REPOSITORY, digest
from husai.stability import compare, nulls
from husai.stability.compare import Dictionary
from husai.stability.recovery import recovery
from husai.subjects.planted import NOISE, generate
from husai.subjects.sources import TextSource
from husai.testing import simulate

PHASE4A = "scripts/experiments/run_phase4a_reproduction.py"
SMALL = PlantedRows(structure="independent", features=24, d_in=16, active=3, rows=3000, seed=4)


def rows_of(**changes) -> PlantedRows:
    return PlantedRows.model_validate(SMALL.to_json() | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@given(st.integers(2, 20), st.integers(2, 12), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_rows_are_made_of_sparse_features_and_noise(features, d_in, seed):
    made = generate(rows_of(features=features, d_in=d_in, active=1, rows=2000, seed=seed))
    assert made.features.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    left = made.rows.double().numpy() - made.activations.double().numpy() @ made.features.double().numpy()
    assert left.std() == pytest.approx(NOISE, rel=0.1)
    assert abs(left.mean()) < 5 * NOISE / np.sqrt(left.size)
    assert (made.activations >= 0).all()
    fired = (made.activations > 0).double().mean(0).numpy()
    assert fired == pytest.approx(1 / features, abs=5 * np.sqrt(1 / features / 2000))
    strengths = made.activations[made.activations > 0]
    assert strengths.mean() == pytest.approx(1.0, abs=0.05)
    assert strengths.std() == pytest.approx(0.25, abs=0.05)


def test_rows_are_a_function_of_their_setting_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = generate(SMALL), generate(SMALL), generate(rows_of(seed=5))
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state stays as it is"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_structures_are_what_they_are_called():
    def together(structure: str) -> np.ndarray:
        fired = (generate(rows_of(structure=structure, rows=20_000)).activations > 0).double().numpy()
        return np.corrcoef(fired.T)[np.triu_indices(SMALL.features, 1)]

    independent, correlated = together("independent"), together("correlated")
    assert abs(independent).max() < 5 / np.sqrt(20_000)
    assert abs(correlated).max() > 0.05
    active = generate(rows_of(structure="hierarchical")).activations > 0
    parents, children = active.chunk(2, dim=1)
    assert children.any(0).all()
    assert not (children & ~parents).any(), "a child is active only with its parent"
    assert active.double().sum(1).mean() == pytest.approx(SMALL.active, rel=0.1)
    with pytest.raises(ValueError, match="features"):
        rows_of(structure="hierarchical", features=7)


def test_the_store_holds_these_rows_and_is_found_again(tmp_path):
    folder, made = planted_rows(SMALL, tmp_path)
    store = ActivationStore.open(folder)
    assert torch.equal(store.read(0, SMALL.rows), made.rows)
    mean, covariance = store.stats()
    assert mean.numpy() == pytest.approx(made.rows.double().mean(0).numpy())
    assert covariance.numpy() == pytest.approx(np.cov(made.rows.double().numpy().T))
    about = store.manifest
    assert (about.subject_digest, about.hook_name, about.control) == (SMALL.digest, rules.PLANTED_HOOK, None)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert planted_rows(SMALL, tmp_path)[0] == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    other, _ = planted_rows(rows_of(seed=5), tmp_path)
    assert other != folder
    assert ActivationStore.open(other).manifest.subject_digest != SMALL.digest


# ---------------------------------------------------------------------------------------------------------------------
# Recovery


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_recovery_is_the_best_assignment_by_brute_force(seed, n, m):
    g = torch.Generator().manual_seed(seed)
    W, features = torch.randn(n, 5, generator=g), torch.randn(m, 5, generator=g)
    a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (W, features))
    worth = np.maximum(a @ b.T, 0)
    worth = worth if n >= m else worth.T
    best = max(sum(worth[i, j] for j, i in enumerate(p)) for p in permutations(range(max(n, m)), min(n, m)))
    assert recovery(W, features) == pytest.approx(best / m, abs=1e-6)


def test_recovery_of_the_planted_dictionary_itself():
    features = generate(SMALL).features
    g = torch.Generator().manual_seed(0)
    shuffled = features[torch.randperm(len(features), generator=g)] * (torch.rand(len(features), 1, generator=g) + 0.1)
    assert recovery(shuffled, features) == pytest.approx(1, abs=1e-5)
    assert recovery(features[:12], features) == pytest.approx(0.5, abs=1e-5), "features without a partner count 0"
    assert recovery(-features, features) < 0.8, "a feature and its negative are two"


# ---------------------------------------------------------------------------------------------------------------------
# The rule, on evidence at the registered setting


@pytest.fixture(scope="module")
def good() -> Bundle:
    """Simulated evidence that passes."""
    noise = simulate.measured(REPOSITORY / "docs")
    effects = {g: simulate.shifted(g, 10 * simulate.standard_error(g, noise[g])) for g in GATES}
    return simulate.bundle(effects, noise, np.random.default_rng(0))


@pytest.fixture
def control(good) -> dict:
    """The planted section of passing evidence, to be changed."""
    return json.loads(json.dumps(good.given("phase4a").results["planted"]))


def judged(control: dict) -> tuple[str, str]:
    """(outcome of the positive control, figure or reason)."""
    found = rules.verdict(lambda: rules.positive_control(PlantedSection.model_validate(control)))
    return found["outcome"], found["reason"]


def test_passing_evidence_passes_by_the_degree_that_decides(control):
    assert judged(control)[0] == PASS
    control["degrees"][0]["recovery"] = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert judged(control)[0] == PASS, "only the last degree decides"


def test_a_recovery_that_is_too_low_fails(control):
    control["degrees"][-1]["recovery"] = [0.5, 0.78, 0.79, 0.95, 0.99]
    outcome, reason = judged(control)
    assert outcome == FAIL
    assert "recovery" in reason
    assert mean_over_seeds(control["degrees"][-1]["recovery"]).estimate > 0.8, "the lower end counts"


def copied(study: dict, other: dict) -> None:
    study["members"][0]["checkpoint_sha256"] = other["members"][0]["checkpoint_sha256"]


def of_members(**changes):
    return lambda c: [m.update(changes) for m in c["degrees"][-1]["study"]["members"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["data"].update(seed=8),
        lambda c: c["data"].update(features=64),
        lambda c: c.update(batch_size=512),
        lambda c: c["degrees"].pop(0),
        lambda c: c["degrees"].reverse(),
        lambda c: c["degrees"][-1].update(tokens=100_000),
        lambda c: copied(c["degrees"][1]["study"], c["degrees"][-1]["study"]),
        lambda c: c["degrees"][0]["study"].update(store_digest=digest("another")),
        lambda c: c["degrees"][0]["study"].update(subject_digest=digest("another")),
        lambda c: c["degrees"][0]["study"].update(rows=10_000),
        of_members(d_sae=256),
        of_members(k=16),
        of_members(family="relu"),
        of_members(learning_rate=0.006),
        of_members(assignment_weight=0.1),
        lambda c: [p.pop("spectral") for p in c["degrees"][0]["study"]["pairs"]],
    ],
)
def test_another_setting_than_the_registered_one_is_no_evidence(control, change):
    change(control)
    outcome, reason = judged(control)
    assert outcome == MISSING, reason


def test_phase_4a_without_planted_features_is_no_evidence(good):
    file = good.given("phase4a")
    results = {name: value for name, value in file.results.items() if name != "planted"}
    assert recompute.results_problems(results) == [], "modular addition alone is whole evidence of phase 4a"
    files = good.files | {"phase4a": type(file)(file.path, file.sha256, results)}
    gates = {g["gate"]: g for g in decide(Bundle(files, good.on_disk), Thresholds(), {})["gates"]}
    assert gates["positive_control"]["status"] == MISSING
    assert "default subject" in gates["positive_control"]["reason"]
    assert {g["status"] for name, g in gates.items() if name != "positive_control"} == {PASS}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["degrees"][0]["recovery"].__setitem__(0, 0.5),
        lambda c: c["degrees"][-1]["recovery"].__setitem__(4, 0.99),
        lambda c: c["sensitivity"][0].update(passes=False),
        lambda c: c["sensitivity"][1]["recovery"].update(estimate=0.9015),
        lambda c: c["sensitivity"].pop(),
        lambda c: c["degrees"][1]["study"]["pairs"][0]["observed"].update(mcc_alive=0.9),
    ],
)
def test_the_audit_makes_the_sensitivity_again(good, control, change):
    results = good.given("phase4a").results
    assert recompute.results_problems(results) == []
    change(control)
    assert recompute.results_problems(results | {"planted": control})


def study_of(section: dict, dictionaries: list[torch.Tensor], rows: torch.Tensor) -> None:
    """Replace a section's pairs by what these dictionaries score on these rows."""
    everything = torch.ones(len(dictionaries[0]))
    whole = [Dictionary(W, everything, nearest=-everything) for W in dictionaries]
    with one_torch_thread():
        spectrum = nulls.Spectrum.of(torch.cov(rows.T.double()), len(rows), rows.double().mean(0))
        for p, (i, j) in zip(section["pairs"], combinations(range(5), 2), strict=True):
            value = compare.pair(whole[i], whole[j], spectrum, 10, 1, (*ALIVE, *OTHERS))
            for name in ("observed", *GATED_NULLS):  # SAEs of Gaussian rows: as the spectral null
                p[name] = value.get(name, value["spectral"])["mean"]
    simulate.summarise_again(section)


def test_a_planted_dictionary_passes_and_shuffled_features_do_not(control):
    made, g = generate(SMALL), torch.Generator().manual_seed(3)
    features, last = made.features, control["degrees"][-1]
    near = [features + 0.05 * torch.randn(features.shape, generator=g) for _ in range(5)]
    near = [W[torch.randperm(len(W), generator=g)] for W in near]
    study_of(last["study"], near, made.rows)
    last["recovery"] = [recovery(W, features) for W in near]
    assert judged(control)[0] == PASS

    order = lambda W: torch.rand(W.shape, generator=g).argsort(dim=1)  # noqa: E731
    shuffled = [W.gather(1, order(W)) for W in near]
    study_of(last["study"], shuffled, made.rows)
    assert judged(control)[0] == FAIL, "not alike, whatever the recovery"
    last["recovery"] = [recovery(W, features) for W in shuffled]
    outcome, reason = judged(control)
    assert outcome == FAIL
    assert "recovery" in reason


def test_where_the_verdict_turns(control):
    section = PlantedSection.model_validate(control)

    def series(*points: tuple[float, bool]):
        made = section.sensitivity[0]
        at = lambda r: made.recovery.model_copy(update={"estimate": r})  # noqa: E731
        return planted.turns_at([made.model_copy(update={"recovery": at(r), "passes": p}) for r, p in points])

    assert series((0.3, False), (0.5, False), (0.7, True), (0.9, True)) == (0.5, 0.7)
    assert series((0.9, True), (0.3, False), (0.5, True), (0.7, False)) == (0.7, 0.9), "all from there on pass"
    assert series((0.3, True), (0.9, True)) is None
    assert series((0.3, True), (0.9, False)) is None


def test_few_seeds_have_no_verdict(control):
    last = control["degrees"][-1]
    section = last["study"]
    labels = [m["label"] for m in section["members"][:4]]
    section["members"], last["recovery"] = section["members"][:4], last["recovery"][:4]
    section["pairs"] = [p for p in section["pairs"] if {p["a"], p["b"]} <= set(labels)]
    section["convergence"]["moved"]["n_seeds"] = 4
    section["others"] = section["others"][:4]
    simulate.summarise_again(section)
    assert judged(control) == (MISSING, f"4 seeds; a verdict needs {rules.MINIMUM_SEEDS}")
    found = planted.sensitivity(PlantedSection.model_validate(control).degrees)[-1]
    assert not found.passes
    assert found.excess is None
    assert "4 seeds" in found.reason


# ---------------------------------------------------------------------------------------------------------------------
# The phase


def arguments(root) -> Namespace:
    """What phase 4a reads of its command line for the positive control."""
    sources = {"subject": None, "activation_cache_dir": None, "sae_root": None, "hook_name": None, "rows": None}
    sizes = {"d_sae": 256, "k": 8, "learning_rate": 0.003, "tokens": 1, "batch_size": 1, "null_draws": 100}
    where = {"artifact_root": root / "artifacts", "output_dir": root / "out", "threads": 1}
    sources["text"] = TextSource()
    return Namespace(**sources, **sizes, **where, seeds=[42, 123, 456, 789, 1011], max_norm_multiple=None)


@pytest.mark.slow
def test_the_phase_trains_scores_and_measures(good, tmp_path, monkeypatch):
    setting = rows_of(features=48, d_in=32, active=6, rows=4000)
    monkeypatch.setattr(rules, "PLANTED", setting)
    monkeypatch.setattr(rules, "PLANTED_TOKENS", (500, 16_000))
    monkeypatch.setattr(rules, "PLANTED_BATCH", 64)
    script, args = runpy.run_path(str(ROOT / PHASE4A)), arguments(tmp_path)
    assert script["is_default_subject"](args)
    assert not script["is_default_subject"](Namespace(**vars(args) | {"subject": "husai-tiny"}))
    cells = Cells(args.output_dir / "cells")
    found = script["planted"](args, cells, torch.device("cpu"))
    few, most = found.degrees
    assert (few.tokens, most.tokens) == (500, 16_000)
    features = generate(setting).features
    for degree in found.degrees:
        decoders = [checkpoints.load(args.output_dir / m.checkpoint).W_dec for m in degree.study.members]
        assert degree.recovery == [recovery(W, features) for W in decoders]
    assert max(few.recovery) < min(most.recovery)
    assert min(most.recovery) > 0.7
    assert found.sensitivity == planted.sensitivity(found.degrees)
    assert found.sensitivity[-1].passes
    assert not found.sensitivity[0].passes
    assert rules.positive_control(found).failing() == []
    page = "\n".join(script["positive_control"](found))
    assert PASS in page
    for degree in found.degrees:
        assert f"| {degree.tokens:,} | {np.mean(degree.recovery):.4f}" in page

    results = good.given("phase4a").results | {"planted": found.to_json()}
    typed = Phase4a.model_validate(results)
    results["inputs"] = planted.inputs(typed.husai, typed.planted)
    assert recompute.results_problems(results) == []
    assert str(tmp_path) not in json.dumps(results)

    monkeypatch.setattr("husai.training.grid.train", None)  # nothing is trained again
    assert script["planted"](args, cells, torch.device("cpu")) == found
    monkeypatch.undo()
    with pytest.raises(rules.Missing, match="registered"):
        rules.positive_control(found)


@pytest.mark.slow
def test_the_registered_setting_passes_at_the_last_degree_and_not_at_the_first(tmp_path):
    script, args = runpy.run_path(str(ROOT / PHASE4A)), arguments(tmp_path)
    found = script["planted"](args, Cells(args.output_dir / "cells"), torch.device("cpu"))
    control = rules.positive_control(found)
    assert control.failing() == []
    recovered = [s.recovery.estimate for s in found.sensitivity]
    assert recovered == sorted(recovered)
    assert recovered[0] < 0.5
    ends = [s.excess.low for s in found.sensitivity]
    assert ends == sorted(ends)
    assert [s.passes for s in found.sensitivity] == [False, True, True]
