"""From a study to a verdict, through the scripts: selection, confirmation on fresh seeds, the gate; what they refuse.

The subject is a miniature that has learned nothing: what is tested is that each step takes what the one before it left.
The study has no probing, which takes most of the time."""

import json
import multiprocessing
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from husai.evals import retrained
from husai.evidence import data_sets, names, rules
from husai.evidence.schemas import LedgerEntry
from husai.runs.errors import BadInput
from husai.runs.files import digest, sha256_file
from husai.subjects import text
from miniature import few_texts, save_miniature

FRONTIER = "scripts/experiments/run_architecture_frontier_external.py"
SELECT = "scripts/experiments/select_release_candidate.py"
CONFIRM = "scripts/experiments/run_candidate_confirmation.py"
GATE = "scripts/experiments/run_stress_gated_release_policy.py"
SETS = "41_truthqa_tf,87_glue_cola,91_glue_qqp"
SIZES = ["--d-sae", 24, "--ks", 11, "--tokens", 20000, "--batch-size", 128, "--rows", 3000, "--heldout-rows", 1000]
SIZES += ["--null-draws", 100, "--max-rows", 24, "--threads", 1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def few():
    return few_texts()


@pytest.fixture
def run(run_script, monkeypatch, few, work):
    """`run(script, name, *arguments)` -> (exit code, results, stderr), in `work/name`."""
    monkeypatch.setattr(text, "corpus", lambda: few)
    monkeypatch.chdir(work)  # the gate's default paths must not find results of the repository

    def call(script, name, *arguments):
        places = ["--output-dir", work / name]
        if script != GATE:
            places += ["--artifact-root", work / "artifacts"]
        code, out, err = run_script(script, *arguments, *places)
        results = work / name / "results.json"
        return code, json.loads(results.read_text()) if results.exists() else None, out + err

    return call


@pytest.fixture
def subject(work, few):
    folder = work / "miniature"
    return folder if folder.exists() else save_miniature(folder, few.train)


@pytest.fixture
def flow(run, work, subject):
    """Paths of the study, the selection and the confirmation, made once."""
    paths = {name: work / name / "results.json" for name in ("study", "selected", "confirmed")}
    if not paths["confirmed"].exists():
        given = ["--subject", subject, "--seeds", "1,2,3", "--architectures", "topk", *SIZES]
        given += ["--probing", "sae_probes_exact"]  # the official code is tested in test_benchmarks.py
        code, _, said = run(FRONTIER, "study", *given, "--run-cebench")
        assert code == 0, said
        code, _, said = run(SELECT, "selected", "--frontier-results", paths["study"])
        assert code == 0, said
        sets = ["--dataset-names", SETS, "--threads", 1]
        code, _, said = run(CONFIRM, "confirmed", "--candidate", paths["selected"], *sets)
        assert code == 0, said
    return paths


def gate(run, name, flow, *arguments):
    named = ["--external-candidate-json", flow["selected"], "--confirmation-results", flow["confirmed"]]
    named += ["--study-results", flow["study"]]
    return run(GATE, name, *named, *arguments)


def by_name(decision):
    return {g["gate"]: g for g in decision["gates"]}


def test_the_candidate_is_trained_again_and_judged_on_what_was_not_read(flow):
    selected, confirmed = (json.loads(flow[name].read_text()) for name in ("selected", "confirmed"))
    chosen = selected["selected"]
    assert chosen["facts"] == confirmed["candidate"]["facts"]
    assert chosen["facts"]["family"] == "topk"
    assert not set(map(int, confirmed["candidate"]["checkpoints"])) & set(selected["seeds_used"])
    assert {*names.SCORES, *names.OTHERS} == confirmed["bank"]["sections"][0]["stability"]["scores"].keys()
    read = set(selected["split"]["selection_families"])
    probing, pairs = confirmed["bank"]["saebench"], confirmed["bank"]["cebench"]
    assert probing["data_sets"] == SETS.split(",")
    assert read
    assert not read & {*probing["families"], *pairs["clusters"]}
    for seed, path in confirmed["paths"].items():
        weights = flow["confirmed"].parent / path / "sae_weights.safetensors"
        assert sha256_file(weights) == confirmed["candidate"]["checkpoints"][seed]


def test_the_gate_judges_what_is_there_and_says_what_is_not(run, flow, work):
    code, decision, said = gate(run, "gate", flow, "--fail-on-gate-fail")
    gates = by_name(decision)
    assert code == 1
    assert re.search(r"^error: .*\bpositive_control\b", said, re.M)
    assert decision["pass_all"] is False
    assert decision["candidate"]["checkpoints"]
    bank = json.loads(flow["confirmed"].read_text())["bank"]
    half = stats.t.ppf(0.9875, 4)  # of a first attempt

    def at_level(e: dict) -> dict:
        return {"low": e["estimate"] - half * e["standard_error"], "estimate": e["estimate"]}

    scores = bank["sections"][0]["stability"]["scores"]
    excesses = [at_level(scores[score]["excess"][null]) for score, null in rules.STABLE.values()]
    least = min(excesses, key=lambda e: e["low"])
    assert (decision["attempt"], gates["stability"]["level"]) == (1, 0.975)
    assert {n: gates["stability"][n] for n in least} == pytest.approx(least, abs=1e-12)
    assert gates["stability"]["status"] == ("PASS" if least["low"] > 0.02 else "FAIL")
    gains = []
    for figure in ("explained_variance", "ce_recovered"):
        means = {kind: sum(of[figure].values()) for kind, of in bank["code"]["prototypes"].items()}
        assert len(means) == 3
        gains.append(at_level(bank["code"]["gain"][max(means, key=means.get)][figure]))
    worst = min(gains, key=lambda e: e["low"])
    assert gates["code"]["status"] == ("PASS" if worst["low"] > 0 else "FAIL")
    assert {n: gates["code"][n] for n in worst} == pytest.approx(worst, abs=1e-12)
    assert gates["fit"]["status"] in ("PASS", "FAIL")
    page = (work / "gate" / "release_policy.md").read_text()
    assert "Attempt 1 " in page
    shown = f"| stability | {100 * gates['stability']['passes_at_no_effect']:.2f} % "
    assert f"{shown}| {gates['stability']['effect_for_80']:+.4f} " in page
    assert gates["saebench"]["status"] == "MISSING"
    assert "probing" in gates["saebench"]["reason"], "the study was made without"
    assert (gates["cebench"]["status"], gates["ood"]["status"]) == ("MISSING", "MISSING")
    assert "contrastive_local" in gates["cebench"]["reason"]
    assert "run_ood_stress_eval.py" in gates["ood"]["reason"]
    assert decision["read"]["confirmation"]["sha256"] == sha256_file(flow["confirmed"])


@pytest.mark.nightly  # the ledger is tested without training in the fast tests
def test_another_number_of_seeds_is_another_attempt(run, flow, work):
    """The same selection again is the same attempt, from its cells or with --force."""
    first = json.loads(flow["confirmed"].read_text())
    given = ["--dataset-names", SETS, "--threads", 1]
    code, again, said = run(CONFIRM, "confirmed", "--candidate", flow["selected"], *given, "--force")
    assert code == 0, said
    assert (again["attempt"], again["ledger"]) == (1, first["ledger"])
    code, _, said = run(SELECT, "selected_6", "--frontier-results", flow["study"], "--confirmation-seeds", 6)
    assert code == 0, said
    code, second, said = run(CONFIRM, "confirmed_6", "--candidate", work / "selected_6" / "results.json", *given)
    assert code == 0, said
    assert (second["attempt"], second["ledger"][:1]) == (2, first["ledger"])
    assert len(second["candidate"]["checkpoints"]) == 6
    assert "attempt 2 " in (work / "confirmed_6" / "summary.md").read_text()
    assert json.loads((work / "artifacts" / retrained.LEDGER).read_text()) == second["ledger"]
    paths = flow | {name: work / f"{name}_6" / "results.json" for name in ("selected", "confirmed")}
    _, decision, _ = gate(run, "gate_6", paths)
    assert (decision["attempt"], by_name(decision)["stability"]["level"]) == (2, 0.9875)
    assert (
        by_name(gate(run, "gate_5_of_6", paths | {"confirmed": flow["confirmed"]})[1])["stability"]["status"]
        == "MISSING"
    )


def test_another_checkpoint_on_the_disk(run, flow, work, tmp_path):
    """The folder as it is, but for one weights file: nothing about the candidate counts any more."""
    copy = tmp_path / "confirmed"
    shutil.copytree(flow["confirmed"].parent, copy)
    (seed, first), (_, second), *_ = json.loads((copy / "results.json").read_text())["paths"].items()
    shutil.copy(copy / second / "sae_weights.safetensors", copy / first / "sae_weights.safetensors")
    _, decision, _ = gate(run, "gate_other", flow | {"confirmed": copy / "results.json"})
    assert decision["candidate"] is None
    assert all(g["status"] == "MISSING" for g in decision["gates"])
    assert re.search(rf"\bseed {seed}\b.* disk\b", by_name(decision)["stability"]["reason"])


def test_a_selection_that_does_not_follow_from_its_study(run, flow, tmp_path):
    """Families moved to the side that the gate reads, and all digests made to fit."""
    copies = {name: tmp_path / name / "results.json" for name in ("selected", "confirmed")}
    for name, copy in copies.items():
        shutil.copytree(flow[name].parent, copy.parent)
    sign(copies["selected"], lambda r: r["split"]["selection_families"].pop())
    sha256 = sha256_file(copies["selected"])

    def rebind(results):
        results["selection"]["sha256"] = results["inputs"]["selection"] = sha256
        results["ledger"][-1]["selection"] = sha256

    sign(copies["confirmed"], rebind)
    _, decision, _ = gate(run, "gate_forged", flow | copies)
    assert decision["candidate"] is None
    assert "selection/split/selection_families" in by_name(decision)["stability"]["reason"]
    _, decision, _ = run(GATE, "gate_alone", "--external-candidate-json", flow["selected"])
    assert "frontier 1" in by_name(decision)["stability"]["reason"]


def sign(path, change):
    """Change results, and the manifest with them."""
    results, manifest = (json.loads((path.parent / n).read_text()) for n in ("results.json", "manifest.json"))
    change(results)
    path.write_text(json.dumps(results))
    manifest["outputs"]["results.json"] = sha256_file(path)
    manifest["inputs"] = results["inputs"]
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def test_an_edited_result(run, flow, tmp_path):
    copy = tmp_path / "confirmed"
    shutil.copytree(flow["confirmed"].parent, copy)
    edited = (copy / "results.json").read_text().replace('"condition": "topk', '"condition":  "topk', 1)
    (copy / "results.json").write_text(edited)
    _, decision, _ = gate(run, "gate_edited", flow | {"confirmed": copy / "results.json"})
    assert re.search(r"results\.json .*sha256", by_name(decision)["stability"]["reason"])


def test_a_waiver_and_a_loose_threshold_are_no_pass(run, flow):
    waived = [a for g in ("positive_control", "random_model") for a in ("--waive", g, "--reason", f"no {g} here")]
    code, decision, said = gate(run, "gate_waived", flow, *waived, "--min-saebench-delta", -1)
    assert code == 0, "without --fail-on-gate-fail"
    assert (decision["pass_all"], decision["provisional"]) == (False, True)
    assert decision["looser_than_registered"] == ["min_saebench_delta"]
    assert "Waived: random_model** (no random_model here)" in said


def test_refusals(refused, flow, work, tmp_path):
    places = ["--output-dir", tmp_path, "--artifact-root", work / "artifacts"]
    refused(["--frontier-results", tmp_path / "no.json"], SELECT, "--frontier-results", tmp_path / "no.json", *places)
    refused(["--frontier-results", "--scaling-results"], SELECT, *places)
    absent = tmp_path / "no.json"
    refused([f"--candidate: {absent} ", "select_release_candidate.py"], CONFIRM, "--candidate", absent, *places)
    refused(f"--candidate: {flow['study']} ", CONFIRM, "--candidate", flow["study"], *places)
    refused("--seeds 2: ", CONFIRM, "--candidate", flow["selected"], "--seeds", "2,7,8,9,10", *places)
    refused(["--seeds: 5 ", "found 4"], CONFIRM, "--candidate", flow["selected"], "--seeds", "7,8,9,10", *places)
    (tmp_path / retrained.LEDGER).write_text('[{"seeds": [1]}]')
    elsewhere = ["--output-dir", tmp_path, "--artifact-root", tmp_path]
    refused(["--artifact-root: ", retrained.LEDGER], CONFIRM, "--candidate", flow["selected"], *elsewhere)
    for n in (4, 18):
        given = ["--frontier-results", flow["study"], "--confirmation-seeds", n]
        refused(["--confirmation-seeds: 5 to 17 ", f"found {n}"], SELECT, *given, *places)
    refused(
        "--dataset-names: ",
        CONFIRM,
        "--candidate",
        flow["selected"],
        "--dataset-names",
        _read_set(flow),
        *places,
    )
    gate_places = ["--output-dir", tmp_path]
    refused(["--waive nothing: ", "positive_control"], GATE, "--waive", "nothing", "--reason", "x", *gate_places)
    refused(["--waive ood: ", "--reason"], GATE, "--waive", "ood", *gate_places)
    refused(["--min-cebench-delta: ", "'nan'"], GATE, "--min-cebench-delta", "nan", *gate_places)


def _read_set(flow) -> str:
    """A data set whose family selection has read."""
    read = json.loads(flow["selected"].read_text())["split"]["selection_families"]
    return data_sets.FAMILIES["probe"][read[0]][0]


def test_selection_refuses_a_study_that_was_edited(refused, flow, work, tmp_path):
    study = json.loads(flow["study"].read_text())
    study["banks"][0]["sections"][0]["budget"] += 1
    (tmp_path / "results.json").write_text(json.dumps(study))
    shutil.copy(flow["study"].with_name("manifest.json"), tmp_path / "manifest.json")
    places = ["--output-dir", tmp_path / "out", "--artifact-root", work / "artifacts"]
    refused(["results.json", "sha256"], SELECT, "--frontier-results", tmp_path / "results.json", *places)


def test_no_candidate_is_exit_code_1(run, flow):
    code, results, said = run(SELECT, "none", "--frontier-results", flow["study"], "--min-seeds-per-group", 4)
    assert code == 1
    assert results["selected"] is None
    assert re.search(r"^error: .*\bcandidate\b", said, re.M)
    assert all(re.search(r"\b3 seeds\b.*\b4\b", e["reason"]) for e in results["excluded"])


# ---------------------------------------------------------------------------------------------------------------------
# The ledger of confirmations


def test_an_attempt_that_is_broken_off_counts(run, flow, work, monkeypatch):
    """It stands in the ledger before anything of it is scored; resumed, it is the same attempt."""
    ledger = work / "artifacts" / retrained.LEDGER
    first, reached = ledger.read_text(), []

    def broken_off(made):
        reached.append(json.loads(ledger.read_text()))
        assert not list((work / "broken_off").glob("cells/pair-*.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr(retrained.bank, "scored", broken_off)
    given = ["--candidate", flow["selected"], "--dataset-names", SETS, "--threads", 1, "--seeds", "7,8,9,10,11"]
    try:
        for _ in range(2):
            code, results, said = run(CONFIRM, "broken_off", *given)
            assert (code, results) == (130, None), said
        once, again = reached
    finally:
        ledger.write_text(first)
    assert once == again
    assert once[:-1] == json.loads(first)
    assert once[-1]["seeds"] == [7, 8, 9, 10, 11]
    assert once[-1]["candidate"] == once[0]["candidate"]


def note_ten(root, first: int) -> None:
    for i in range(first, first + 10):
        own = retrained.noted(root, entry(0, i))
        assert own[-1] == entry(0, i)


def test_confirmations_at_once_lose_no_entry(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=note_ten, args=(tmp_path, first)) for first in range(0, 40, 10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    found = retrained.confirmations(tmp_path)
    assert sorted(e.saes for e in found) == sorted(entry(0, i).saes for i in range(40))


def entry(configuration: int, saes: int, selection: int = 0) -> LedgerEntry:
    return LedgerEntry(
        selection=digest(["selection", selection]),
        candidate=digest(["configuration", configuration]),
        seeds=[2027, 2039],
        saes=digest(["SAEs", saes]),
    )


@given(tried=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=12))
def test_attempts_are_the_distinct_confirmations_of_a_configuration(tried, tmp_path_factory):
    root = tmp_path_factory.mktemp("ledger")
    first: dict[tuple, int] = {}
    for about in tried:
        found = retrained.noted(root, entry(*about))
        attempt = first.setdefault(about, 1 + sum(other[0] == about[0] for other in first))
        assert (len(found), found[-1]) == (attempt, entry(*about))
        assert all(e.candidate == entry(*about).candidate for e in found)
    assert retrained.confirmations(root) == [entry(*about) for about in first]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "NaN", '[{"seeds": [1]}]', None])
def test_a_damaged_ledger_is_refused(content, tmp_path):
    twice = json.dumps([entry(0, 0).to_json()] * 2)
    (tmp_path / retrained.LEDGER).write_text(twice if content is None else content)
    with pytest.raises(BadInput, match=retrained.LEDGER):
        retrained.noted(tmp_path, entry(0, 0))
