"""The frontier and the scaling study: banks, contrasts, power laws."""

import json
import re

import numpy as np
import pytest

from conftest import ROOT
from husai.evals import bank
from husai.evidence import conditions, names
from husai.evidence.schemas import Bank, ConditionSection, Contrastive, PairRecord, Stability
from husai.release import recompute
from husai.runs.errors import BadInput
from husai.subjects import text
from miniature import few_texts, save_miniature

FRONTIER = "scripts/experiments/run_architecture_frontier_external.py"
SCALING = "scripts/experiments/run_external_metric_scaling_study.py"


SEEDS = [1, 2, 3]


def banks_of(function, budgets=(1, 2, 4, 8), widths=(32, 64), l0=lambda d: 4.0) -> list[Bank]:
    """A bank whose figures of a seed are `function(budget, d_sae, seed)`, of a data set that and its number."""
    conditions_of, sections, saes = [], [], []
    labels = ["seed1", "seed2", "seed3"]
    nulls = {n: {"mcc_alive": 0.0} for n in names.GATED_NULLS}
    for b in budgets:
        for d in widths:
            values = [float(function(b, d, s)) for s in SEEDS]
            own = {str(s): f"{b}/{d}/{s}" for s in SEEDS}
            saes += [
                PairRecord.model_construct(checkpoint_sha256=own[str(s)], normalised_of_pairs=[v, v + 1, v + 2])
                for s, v in zip(SEEDS, values, strict=True)
            ]
            row = {"budget": b, "layer": 1, "d_sae": d, "k": 4, "family": "topk", "seeds": SEEDS, "checkpoints": own}
            row |= {name: {"of_seeds": values} for name in ("explained_variance", "ce_loss_score")}
            row |= {"l0": {"estimate": l0(d), "of_seeds": [l0(d)] * 3}, "epochs": b / 2}
            conditions_of.append(row)
            pairs = [
                {"a": labels[i], "b": labels[j], "observed": {"mcc_alive": b / 10}} | nulls
                for i, j in ((0, 1), (0, 2), (1, 2))
            ]
            sections.append(
                ConditionSection.model_construct(stability=Stability.model_construct(labels=labels), pairs=pairs)
            )
    contrastive = Contrastive.model_construct(saes=saes, clusters=["a", "b", "b"])
    about = {"conditions": conditions_of, "sections": sections, "saebench": None, "cebench": contrastive}
    return [Bank.model_construct(**about)]


def test_contrasts_are_paired_by_seed_setting_and_data_set():
    """A seed's own level and a data set's are large and cancel; what the axis does is left."""
    found = conditions.contrasts(banks_of(lambda b, d, s: 100 * s + b + d / 32 + 0.01 * s * b))
    budget = {(c["from"], c["to"]): c for c in found if c["axis"] == "budget"}
    assert list(budget) == [(1, 2), (2, 4), (4, 8)]
    assert budget[1, 2]["settings"] == 2
    for name in ("explained_variance", "cebench"):
        assert budget[4, 8][name]["estimate"] == pytest.approx(4 + 0.01 * 2 * 4)
        assert budget[4, 8][name]["standard_error"] < 0.1
    assert {"3", "2"} <= set(budget[4, 8]["cebench"]["method"].split())
    assert budget[2, 4]["stability"]["observed"]["estimate"] == pytest.approx(0.2)
    assert [budget[1, 2]["saebench"][end] for end in ("estimate", "low", "high")] == [None] * 3
    (width,) = (c for c in found if c["axis"] == "d_sae")
    assert (width["from"], width["to"], width["settings"]) == (32, 64, 4)
    assert width["explained_variance"]["estimate"] == pytest.approx(1)
    assert {c["axis"] for c in found} == {"budget", "d_sae"}


def test_settings_that_do_not_match_are_not_compared():
    (bank_,) = banks_of(lambda b, d, s: b, budgets=(1, 2), widths=(32,))
    bank_.conditions[1]["seeds"] = [7, 8, 9]
    (entry,) = conditions.contrasts([bank_])
    assert (entry["settings"], "seeds" in entry["reason"]) == (0, True)
    (entry,) = (c for c in conditions.contrasts(banks_of(lambda b, d, s: b, (1,), l0=lambda d: d / 8)))
    assert (entry["axis"], entry["settings"], "L0" in entry["reason"]) == ("d_sae", 0, True)


def test_power_laws_are_recovered_and_need_four_values():
    rows = banks_of(lambda b, d, s: 1 - 0.5 * s * b**-0.3 * d**-0.1)[0].conditions
    laws = conditions.power_laws(rows)
    assert [(law["axis"], law["setting"]["d_sae"], law["values"]) for law in laws] == [
        ("budget", d, [1, 2, 4, 8]) for d in (32, 64)
    ]
    for law in laws:
        assert law["exponent"]["estimate"] == pytest.approx(-0.3)
        assert law["largest_residual"] < 1e-9
        assert law["epochs"] == 4
    assert conditions.power_laws(banks_of(lambda b, d, s: 1 - b**-0.3, budgets=(1, 2, 4))[0].conditions) == []
    rows.pop()  # one width lacks a budget: the other is still fitted
    assert [law["setting"]["d_sae"] for law in conditions.power_laws(rows)] == [32]
    bent = banks_of(lambda b, d, s: 1 - 0.5 * b ** (-0.1 * b))[0].conditions
    assert conditions.power_laws(bent)[0]["largest_residual"] > 0.1


def test_the_pareto_front():
    def row(name, x, y, family="topk", k=8):
        figures = {"saebench_delta": {"estimate": x}, "cebench_delta": {"estimate": y}}
        return {"condition": name, "family": family, "k": k} | figures

    rows = [row("a", 1, 0), row("b", 0, 1), row("c", 0.5, 0.5), row("d", 0.4, 0.5), row("e", None, 9)]
    rows += [row("relu", 9, 9, "relu"), row("other k", 0.1, 0.1, k=16)]
    assert conditions.pareto(rows) == ["a", "b", "c", "other k"], "a difference to TopK is not one to ReLU"
    assert conditions.pareto([]) == []


def test_a_missing_reference_is_named():
    row = {"condition": "c", "saebench": {"estimate": 1}, "saebench_delta": {"estimate": None, "reason": "why"}}
    assert conditions.unmatched([row | {"cebench": None, "cebench_delta": None}]) == "c: saebench: why"
    row["saebench_delta"]["estimate"] = 0.0
    assert conditions.unmatched([row | {"cebench": None, "cebench_delta": None}]) is None


# ---------------------------------------------------------------------------------------------------------------------
# From the shell


@pytest.fixture(scope="module")
def few():
    return few_texts()


@pytest.fixture
def common(monkeypatch, few, tmp_path, tmp_path_factory):
    """Arguments for a miniature language model and sizes that take seconds."""
    monkeypatch.setattr(text, "corpus", lambda: few)
    folder = save_miniature(tmp_path / "miniature", few.train, n_layers=3)
    sizes = ["--rows", 3000, "--batch-size", 128, "--null-draws", 3, "--heldout-rows", 1000, "--max-rows", 8]
    where = ["--artifact-root", tmp_path, "--output-dir", tmp_path / "out", "--threads", 1]
    return ["--subject", folder, *sizes, *where, "--seeds", "1,2,3"]


@pytest.mark.slow
def test_frontier_from_the_shell(run_script, common, tmp_path):
    arguments = [
        *common,
        "--architectures",
        "topk,batchtopk",
        "--d-sae",
        24,
        "--ks",
        "3,4",
        "--tokens",
        4000,
        "--run-cebench",
    ]
    code, out, err = run_script(FRONTIER, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (found,) = results["banks"]
    assert [(c["family"], c["k"]) for c in found["conditions"]] == [
        (f, k) for f in ("topk", "batchtopk") for k in (3, 4)
    ]
    references = [r for r in found["cebench"]["saes"] if not r["candidate"]]
    assert {r["facts"]["family"] for r in references} == {"relu"}, "trained for the comparison, and not a candidate"
    row = found["conditions"][0]
    records = [r for r in found["cebench"]["saes"] if r["condition"] == row["condition"]]
    assert row["cebench"]["estimate"] == pytest.approx(np.mean([r["normalised"] for r in records]))
    assert row["explained_variance"]["estimate"] == pytest.approx(
        np.mean([r["heldout"]["explained_variance"] for r in records])
    )
    assert row["saebench_delta"]["estimate"] is None
    assert row["saebench_delta"]["reason"] in out
    assert (tmp_path / "out" / "figures" / "frontier.png").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run_script(FRONTIER, *arguments)[0] == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    # Another line-up of the same SAEs, and another baseline, are other results.
    code, out, err = run_script(FRONTIER, *arguments, "--architectures", "topk,batchtopk,relu")
    assert code == 0, err
    (again,) = json.loads((tmp_path / "out" / "results.json").read_text())["banks"]
    assert len(again["cebench"]["conditions"]) == 6
    assert all(row["cebench"] is not None for row in again["conditions"])
    (tmp_path / "map.json").write_text('{"default": null}')
    code, out, err = run_script(FRONTIER, *arguments, "--cebench-matched-baseline-map", tmp_path / "map.json")
    assert code == 0, err
    assert re.search(r"\bnone: map\.json .*\bblocks\.1\.hook_resid_pre\b", out)
    code, _, err = run_script(FRONTIER, *arguments, "--require-matched")
    assert code == 2
    assert "--require-matched: topk d24 k3" in err.splitlines()[-1]


@pytest.mark.nightly  # smoke and the chaos tests run the study
def test_scaling_from_the_shell(run_script, common, tmp_path):
    arguments = [
        *common,
        "--token-budgets",
        "1000,1500,2000,3000",
        "--hook-layers",
        "1,2",
        "--d-sae-values",
        "24",
        "--k",
        3,
    ]
    code, out, err = run_script(SCALING, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = [row for found in results["banks"] for row in found["conditions"]]
    assert [(r["layer"], r["budget"]) for r in rows] == [
        (layer, b) for layer in (1, 2) for b in (1000, 1500, 2000, 3000)
    ]
    assert rows[0]["epochs"] == pytest.approx(1000 / 2400, rel=0.1)
    assert {(c["axis"], c["from"]) for c in results["contrasts"]} == {("budget", b) for b in (1000, 1500, 2000)} | {
        ("layer", 1)
    }
    assert [law["axis"] for law in results["power_laws"]] == ["budget"] * 2
    assert f"{results['power_laws'][0]['exponent']['estimate']:.4f}" in out
    assert recompute.phase_problems(results) == []
    results["banks"][0]["conditions"][0]["excess"]["estimate"] += 0.01
    assert recompute.phase_problems(results) != []
    assert (tmp_path / "out" / "figures" / "scaling.png").exists()


def test_bad_input(refused, common, tmp_path):
    nowhere = tmp_path / "map.json"
    nowhere.write_text('{"default": "nowhere.json"}')
    for script, arguments, named in (
        (FRONTIER, ["--architectures", "topk,magic"], "--architectures magic: "),
        (FRONTIER, ["--ks", 600], ["--ks 600: ", "--d-sae 512"]),
        (FRONTIER, ["--seeds", 1], "--seeds 1: "),
        (FRONTIER, ["--hook-name", "blocks.9.hook_resid_pre", "--d-sae", 24, "--ks", 3], "blocks.9.hook_resid_pre: "),
        (FRONTIER, ["--run-saebench", "--dataset-names", "nothing"], "'nothing'"),
        (
            FRONTIER,
            ["--run-cebench", "--cebench-matched-baseline-map", nowhere],
            [f"{nowhere}: 'default'", "nowhere.json"],
        ),
        (FRONTIER, ["--cebench-repo", tmp_path], tmp_path / "ce_bench" / "CE_Bench.py"),
        (SCALING, ["--k", 600], ["--k 600: ", "512"]),
        (SCALING, ["--architectures", "magic"], "'magic'"),
        (SCALING, ["--device", "cuda:9"], "--device cuda:9: "),
        (SCALING, ["--device", "cuda:1", "--executor", "ray"], ["--device cuda:1: ", "Ray"]),
        (SCALING, ["--run-cebench", "--max-rows", 3], ["--max-rows 3: ", "8"]),
        (SCALING, ["--run-cebench", "--stories", tmp_path / "nowhere"], f"--stories {tmp_path}/nowhere: "),
        (SCALING, ["--token-budgets", ""], ["--token-budgets: ", "''"]),
    ):
        refused(named, script, *common, *arguments)


def test_an_empty_product_is_refused():
    settings = dict.fromkeys(bank.BankPlan.__dataclass_fields__)
    with pytest.raises(BadInput, match="is empty"):
        bank.check(
            bank.BankPlan(**settings | {"families": [], "seeds": [1], "d_saes": [8], "ks": [2], "budgets": [10]})
        )


def test_the_scaling_page_is_what_the_benchmarks_say(run_script, tmp_path):
    code, _, err = run_script("scripts/analysis/plan_scale.py", "--output", tmp_path / "scaling.md")
    assert code == 0, err
    assert (tmp_path / "scaling.md").read_text() == (ROOT / "docs" / "scaling.md").read_text()
