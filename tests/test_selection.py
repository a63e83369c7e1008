"""Selection of the release candidate: what changes the choice, and what must not; the earlier study's, reproduced."""

import copy
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from husai.evidence.data_sets import gated, third
from husai.evidence.names import STRATA
from husai.release.selection import Rules, Study, cleaned, select
from husai.runs.files import REPOSITORY, write_json

RULES = Rules({"saebench": 0.5, "cebench": 0.5, "stability": 0.5, "train_ev": 0.1})
PUBLISHED = Path(os.environ.get("HUSAI_PUBLISHED_CYCLE3", REPOSITORY.parent / "shared" / "published_cycle3"))
MANY = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def frontier() -> dict:
    """A frontier of four families and three seeds, from docs/evidence, in today's form."""
    path = REPOSITORY / "docs" / "evidence" / "earlier_rules" / "architecture_frontier" / "results.json"
    results = json.loads(path.read_text())
    stratum = {"figure": "firing_rate", "features": 0.0, "mcc": None, "share70": None}
    strata = [stratum | {"low": low, "high": high} for low, high in pairwise(STRATA["firing_rate"])]
    for section in (section for bank in results["banks"] for section in bank["sections"]):
        section |= {"gaussian": None, "others": None, "strata": strata}
        section["stability"]["verdict"] |= {"outcome": "MISSING", "sentence": ""}
        for value in (v for pair in section["pairs"] for v in pair.values() if isinstance(v, dict)):
            value["mcc_alive_abs"] = value["mcc_alive"]
    recipe = {"rows": 300_000, "batch_size": 512, "learning_rate": 0.003, "null_draws": 100, "heldout_rows": 50_000}
    recipe |= {"probe_ks": [1, 5, 16], "noise_seeds": [43, 44], "max_pairs": 200}
    for bank in results["banks"]:
        bank.setdefault("recipe", recipe)  # not in evidence that is older than selection
    return results


def chosen(*studies: dict, rules: Rules = RULES) -> dict:
    return select([Study(f"study {i}", f"{i:064}", r) for i, r in enumerate(studies, 1)], rules)


def scores(found: dict) -> dict[str, float]:
    return {c["condition"]: c["score"] for c in found["candidates"]}


def reasons(found: dict) -> dict[str, str]:
    return {e["condition"]: e["reason"] for e in found["excluded"]}


def trained_longer(results: dict) -> dict:
    """The same study of another token budget, with the same figures: other conditions, other SAEs."""
    facts = results["banks"][0]["saes"][0]["facts"]
    text = json.dumps(results).replace(f'"tokens": {facts["tokens"]}', f'"tokens": {2 * facts["tokens"]}')
    text = text.replace(f'"budget": {facts["tokens"]}', f'"budget": {2 * facts["tokens"]}')
    other = json.loads(text)
    for record in other["banks"][0]["saes"]:
        for name in ("checkpoint_sha256", "identity"):
            text = text.replace(record[name], record[name][::-1])
        text = text.replace(record["condition"], record["condition"].replace("(", "(2 "))
    return json.loads(text)


def without(results: dict, family: str) -> dict:
    """The study as it would be without the conditions of a family."""
    results = copy.deepcopy(results)
    for bank in results["banks"]:
        for part in (bank, bank["saebench"], bank["cebench"]):
            keep = [r["facts"]["family"] != family for r in part["saes"]]
            for name in ("saes", "untrained"):
                if name in part:
                    part[name] = [r for r, k in zip(part[name], keep, strict=True) if k]
            part["conditions"] = [c for c in part["conditions"] if c["facts"]["family"] != family]
        bank["sections"] = [s for s in bank["sections"] if s["family"] != family]
    return results


def records(results: dict, family: str) -> list[dict]:
    """Of a family's first SAE: its records in the bank and both benchmarks."""
    bank = results["banks"][0]
    parts = bank, bank["saebench"], bank["cebench"]
    return [next(r for r in part["saes"] if r["facts"]["family"] == family) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# What must not change the choice


@MANY
@given(random=st.randoms(use_true_random=False))
def test_the_order_of_studies_and_rows_changes_nothing(frontier, random):
    expected = chosen(frontier, trained_longer(frontier))
    shuffled = [copy.deepcopy(s) for s in (frontier, trained_longer(frontier))]
    for results in shuffled:
        (bank,) = results["banks"]
        pairs = list(zip(bank["cebench"]["saes"], bank["cebench"]["untrained"], strict=True))
        random.shuffle(pairs)
        bank["cebench"] |= {"saes": [a for a, _ in pairs], "untrained": [b for _, b in pairs]}
        for rows in (bank["saes"], bank["saebench"]["saes"], bank["sections"], bank["conditions"]):
            random.shuffle(rows)
    random.shuffle(shuffled)
    found = chosen(*shuffled)
    assert scores(found) == pytest.approx(scores(expected))
    assert len(found["candidates"]) == len(expected["candidates"]) > 3
    assert found["selected"]["id"] == expected["selected"]["id"]
    assert found["split"]["selection_families"] == expected["split"]["selection_families"]


def test_ties_are_broken_by_the_digest_of_the_configuration(frontier):
    """The same figures twice: sparser first, then the smaller digest, whichever study comes first."""
    longer = trained_longer(frontier)
    both = [chosen(frontier, longer)["selected"], chosen(longer, frontier)["selected"]]
    assert both[0]["id"] == both[1]["id"]
    found = chosen(frontier, longer)["candidates"]
    assert found[0]["score"] == found[1]["score"]
    assert found[0]["id"] < found[1]["id"]


@pytest.mark.parametrize("family", ["jumprelu", "batchtopk"])
def test_who_else_is_a_candidate_changes_no_score(frontier, family):
    every, fewer = scores(chosen(frontier)), scores(chosen(without(frontier, family)))
    assert fewer == {name: score for name, score in every.items() if not name.startswith(family)}
    assert len(every) > len(fewer) > 0


@MANY
@given(value=st.sampled_from([None, True, "0.5", float("nan"), float("inf"), [0.5]]), part=st.integers(0, 2))
def test_an_excluded_candidate_changes_no_score(frontier, value, part):
    """A record that is not what it should be leaves with its condition, for a reason, and moves no other."""
    damaged = copy.deepcopy(frontier)
    record = records(damaged, "batchtopk")[part]
    record["heldout"]["explained_variance"] = value
    found = chosen(damaged)
    assert reasons(found)[record["condition"]].startswith(record["label"])
    every = scores(chosen(frontier))
    assert scores(found) == {name: s for name, s in every.items() if name != record["condition"]}


# ---------------------------------------------------------------------------------------------------------------------
# What is left out, and why


def test_a_duplicate_is_left_out(frontier):
    found = chosen(frontier, frontier)
    assert scores(found) == scores(chosen(frontier))
    assert all("duplicate" in e["reason"] for e in found["excluded"] if "study 2" in e["study"])
    assert {e["condition"] for e in found["excluded"] if e["study"] == "study 2"} >= set(scores(found))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: b["inputs"].update(subject="0" * 64), "subject"),
        (lambda b: b["saebench"]["versions"].update(torch="0.1"), "versions"),
        (lambda b: b["saebench"].update(probing="sae_probes_exact"), "probes"),
        (lambda b: b["saebench"]["data_sets"].reverse(), "data sets"),
        (lambda b: b["cebench"].update(pairs_digest="0" * 64), "pairs"),
        (lambda b: b["cebench"].update(benchmark="cebench"), "benchmark"),
    ],
)
def test_what_cannot_be_compared_is_left_out(frontier, change, named):
    other = trained_longer(frontier)
    change(other["banks"][0])
    found = chosen(frontier, other)
    assert scores(found) == scores(chosen(frontier))
    left = [e for e in found["excluded"] if e["study"] == "study 2"]
    assert left
    assert all(named in e["reason"] for e in left)


def test_too_few_seeds_and_no_study(frontier):
    found = chosen(frontier, {"phase": "4a"}, rules=Rules(RULES.weights, min_seeds=4))
    assert found["selected"] is None
    assert found["candidates"] == []
    assert sum(re.search(r"\b3 seeds\b.*\b4\b", e["reason"]) is not None for e in found["excluded"]) == 4
    assert "study" in found["excluded"][0]["reason"]
    assert chosen()["selected"] is None


@MANY
@given(names=st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=12), data=st.data())
def test_selection_reads_a_third_of_the_groups_by_name_alone(names, data):
    order = data.draw(st.permutations(sorted(names)))
    assert third(order) == third(sorted(names) * 2)
    assert len(third(names)) == min(len(names), max(3, -(-len(names) // 3)))
    assert set(third(names)) <= names
    read, left = (data.draw(st.sets(st.sampled_from(sorted(names)))) for _ in range(2))
    left -= read
    found = set(third(order, read, left))
    assert read <= found
    assert not found & left
    assert found == read or len(found) <= max(3, -(-len(names) // 3))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), data=st.data())
def test_no_group_holds_more_than_a_quarter_of_the_gated_sets(sizes, data):
    """Of three groups or fewer, none holds more than another. No larger number a group would do, and the choice is one
    of names alone: neither their order nor a second look changes it."""
    sets = [(f"set {i} of {g}", f"group {g}") for g, n in enumerate(sizes) for i in range(n)]
    names, groups = map(list, zip(*sets, strict=True))
    keep = gated(names, groups)
    counts = [sum(groups[i] == f"group {g}" for i in keep) for g in range(len(sizes))]
    assert max(counts) * min(4, len(sizes)) <= sum(counts)
    most = max(counts)
    assert counts == [min(n, most) for n in sizes]
    more = [min(n, most + 1) for n in sizes]
    assert more == counts or max(more) * min(4, len(sizes)) > sum(more)
    shuffled = data.draw(st.permutations(sets))
    again = gated(*map(list, zip(*shuffled, strict=True)))
    assert {shuffled[i][0] for i in again} == {names[i] for i in keep}
    left = [names[i] for i in keep], [groups[i] for i in keep]
    assert gated(*left) == list(range(len(keep)))


def test_no_sets_no_gated_sets():
    assert gated([], []) == []


def test_each_benchmark_keeps_groups_for_the_gate(frontier):
    """SAEBench's families and the clusters of pairs are split apart; a group that is both lies on one side."""
    study = copy.deepcopy(frontier)
    split = chosen(study)["split"]
    read, left = set(split["selection_families"]), set(split["gate_families"])
    (bank,) = study["banks"]
    for groups in ({*bank["saebench"]["families"]}, {*bank["cebench"]["clusters"]}):
        assert len(groups & read) >= 3
        assert groups <= read | left
    assert not read & left
    families = {*bank["saebench"]["families"]}
    assert read & families == {*third(families)}
    of_families = dict(zip(bank["saebench"]["data_sets"], bank["saebench"]["families"], strict=True))
    assert split["gate_data_sets"] == [n for n, family in of_families.items() if family not in read]


@pytest.mark.parametrize("bank", [None, [], {}, {"saebench": None, "cebench": None, "saes": 3}])
def test_what_is_no_bank(bank):
    assert cleaned(bank)[0] is None


# ---------------------------------------------------------------------------------------------------------------------
# The earlier study's files


@pytest.fixture
def cycle3():
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published files of cycle 3 are not at hand ({PUBLISHED}; HUSAI_PUBLISHED_CYCLE3 names them)")
    return json.loads((PUBLISHED / "expected.json").read_text())


def test_the_published_policy_is_reproduced(cycle3, run_script, tmp_path):
    given_, expected = cycle3["selector"]["inputs"], cycle3["selector"]["expected"]
    arguments = [f"--{name}-results={PUBLISHED / given_[name]}" for name in ("frontier", "scaling")]
    selected = tmp_path / "selection"
    script = "scripts/experiments/select_release_candidate.py"
    code, _, err = run_script(script, "--policy", "published", *arguments, "--output-dir", selected)
    assert code == 0, err
    found = json.loads((selected / "results.json").read_text())
    assert found["n"] == len(found["candidates"]) == expected["counts"]["total_candidates"]
    assert found["selected"]["condition"] == expected["selected"]
    assert {r["condition"] for r in found["front"]} == set(expected["pareto"])
    for row, published in zip(found["front"], expected["top3"], strict=False):
        assert row["condition"] == published["condition_id"]
        assert row["score"] == pytest.approx(published["joint_score"], abs=1e-12)
        for name, theirs in (("saebench", "saebench_delta"), ("cebench", "cebench_delta"), ("train_ev", "train_ev")):
            assert row["figures"][name] == published[theirs]

    gate = cycle3["gate"]
    phase4a = tmp_path / "phase4a.json"
    write_json(phase4a, gate["phase4a"])
    arguments = [f"--phase4a-results={phase4a}", f"--external-candidate-json={selected / 'results.json'}"]
    arguments += [f"--{name}-results={PUBLISHED / gate[name]}" for name in ("transcoder", "ood")]
    script = "scripts/experiments/run_stress_gated_release_policy.py"
    where = "--output-dir", tmp_path / "gate"
    code, _, err = run_script(script, "--policy", "published", *arguments, *where, "--fail-on-gate-fail")
    assert code == 1, err
    found = json.loads((tmp_path / "gate" / "release_policy.json").read_text())
    verdict = found["published"]["gates"] | found["published"]["metrics"]
    for name, value in gate["expected"].items():
        assert verdict[name] == (value if isinstance(value, bool) else pytest.approx(value, abs=1e-12)), name
    assert found["pass_all"] is False
    assert {g["status"] for g in found["gates"]} == {"MISSING"}


PUBLISHED_RECORD: dict = {
    "architecture": "topk",
    "seed": 1,
    "checkpoint": "topk_seed1/sae_final.pt",
    "train_metrics": {"explained_variance": 0.5},
    "saebench": {
        "summary": {"best_minus_llm_auc": -0.1},
        "sae_meta": {"d_sae": 8},
        "config": {"dataset_count": 2, "ks": [1, 5]},
    },
    "cebench": {
        "delta_vs_matched_baseline": {"interpretability_score_mean_max": -1.0},
        "matched_baseline_metrics": {"interpretability_score_mean_max": 2.0},
    },
}


def published_record(seed, **parts):
    return copy.deepcopy(PUBLISHED_RECORD) | {"seed": seed} | parts


WITHOUT_VALUE = {
    "saebench": {"saebench": None},
    "cebench.delta_vs_matched_baseline": {"cebench": {"delta_vs_matched_baseline": None}},
    "saebench.summary.best_minus_llm_auc": {"saebench": {"summary": {"best_minus_llm_auc": None}}},
    "train_metrics": {"train_metrics": {}},
}


@pytest.mark.parametrize("place", WITHOUT_VALUE)
def test_a_published_record_without_a_value_is_left_out_with_the_reason(place, run_script, tmp_path):
    file, out = tmp_path / "frontier.json", tmp_path / "out"
    arguments = ["--policy", "published", "--frontier-results", file, "--output-dir", out]
    script = "scripts/experiments/select_release_candidate.py"

    write_json(file, {"records": [published_record(1), published_record(2, **WITHOUT_VALUE[place])]})
    code, printed, err = run_script(script, *arguments)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert results["n"] == 1
    assert results["selected"]["condition"] == "topk_seed1"
    (excluded,) = results["excluded"]
    assert (excluded["study"], excluded["condition"]) == ("frontier 1", "topk_seed2")
    assert place in excluded["reason"]
    assert excluded["reason"] in printed

    write_json(file, {"records": [published_record(2, **WITHOUT_VALUE[place])]})
    code, printed, err = run_script(script, *arguments)
    assert code == 1, err
    assert json.loads((out / "results.json").read_text())["selected"] is None
    assert place in printed


def test_a_published_figure_that_is_no_number_is_refused(run_script, tmp_path, refused):
    file = tmp_path / "frontier.json"
    write_json(file, {"records": [published_record(1, train_metrics={"explained_variance": "0.5"})]})
    script = "scripts/experiments/select_release_candidate.py"
    refused([file, "topk_seed1"], script, "--policy", "published", "--frontier-results", file)
