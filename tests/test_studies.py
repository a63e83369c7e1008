"""The frontier and the scaling study: banks, contrasts, power laws."""

import json

import numpy as np
import pytest

from conftest import ROOT
from husai.benchmarks import bank, scaling
from husai.runs.errors import BadInput
from husai.subjects import text, tiny_lm
from husai.subjects.tiny_lm import TinyLMConfig

FRONTIER = "scripts/experiments/run_architecture_frontier_external.py"
SCALING = "scripts/experiments/run_external_metric_scaling_study.py"


def rows_of(function, budgets=(1, 2, 4, 8), widths=(32, 64), seeds=(1, 2, 3)) -> list[dict]:
    """Conditions whose figures of a seed are `function(budget, d_sae, seed)`."""
    return [
        {"budget": b, "layer": 1, "d_sae": d, "k": 4, "family": "topk", "seeds": list(seeds), "saebench": None}
        | {
            "explained_variance": {"of_seeds": [function(b, d, s) for s in seeds]},
            "ce_loss_score": None,
            "cebench": None,
        }
        for b in budgets
        for d in widths
    ]


def sections_of(rows: list[dict]) -> list[dict]:
    """Stability studies whose scores are the budget's."""
    labels = ["seed1", "seed2", "seed3"]
    nulls = {n: {"mcc_alive": 0.0} for n in ("isotropic", "untrained", "spectral")}
    pairs = [(0, 1), (0, 2), (1, 2)]
    return [
        {
            "stability": {"labels": labels},
            "pairs": [
                {"a": labels[i], "b": labels[j], "observed": {"mcc_alive": r["budget"] / 10}} | nulls for i, j in pairs
            ],
        }
        for r in rows
    ]


def test_contrasts_are_paired_by_seed_and_setting():
    """A seed's own level is large and cancels; what the axis does is left."""
    rows = rows_of(lambda b, d, s: 100 * s + b + d / 32 + 0.01 * s * b)
    found = scaling.contrasts(rows, sections_of(rows))
    budget = {(c["from"], c["to"]): c for c in found if c["axis"] == "budget"}
    assert list(budget) == [(1, 2), (2, 4), (4, 8)]
    assert budget[1, 2]["settings"] == 2
    assert budget[4, 8]["explained_variance"]["estimate"] == pytest.approx(4 + 0.01 * 2 * 4)
    assert budget[4, 8]["explained_variance"]["standard_error"] < 0.1
    assert budget[2, 4]["stability"]["observed"]["estimate"] == pytest.approx(0.2)
    assert budget[1, 2]["saebench"] == {"estimate": None, "low": None, "high": None, "reason": "not run"}
    (width,) = (c for c in found if c["axis"] == "d_sae")
    assert (width["from"], width["to"], width["settings"]) == (32, 64, 4)
    assert width["explained_variance"]["estimate"] == pytest.approx(1)
    assert {c["axis"] for c in found} == {"budget", "d_sae"}


def test_settings_with_other_seeds_are_not_compared():
    rows = rows_of(lambda b, d, s: b, budgets=(1, 2), widths=(32,))
    rows[1]["seeds"] = [7, 8, 9]
    assert scaling.contrasts(rows, sections_of(rows)) == []


def test_power_laws_are_recovered_and_need_four_values():
    rows = rows_of(lambda b, d, s: 1 - 0.5 * s * b**-0.3 * d**-0.1)
    (law,) = scaling.power_laws(rows)
    assert (law["axis"], law["settings"], law["values"]) == ("budget", 2, [1, 2, 4, 8])
    assert law["exponent"]["estimate"] == pytest.approx(-0.3)
    assert law["exponent"]["high"] - law["exponent"]["low"] < 1e-6
    assert scaling.power_laws(rows_of(lambda b, d, s: 1 - b**-0.3, budgets=(1, 2, 4))) == []
    rows.pop()  # one width lacks a budget: the other is still fitted
    assert scaling.power_laws(rows)[0]["settings"] == 1


def test_the_pareto_front():
    def row(name, x, y):
        return {"condition": name, "saebench_delta": {"estimate": x}, "cebench_delta": {"estimate": y}}

    rows = [row("a", 1, 0), row("b", 0, 1), row("c", 0.5, 0.5), row("d", 0.4, 0.5), row("e", None, 9)]
    assert bank.pareto(rows) == ["a", "b", "c"]
    assert bank.pareto([]) == []


def test_a_missing_reference_is_named():
    row = {"condition": "c", "saebench": {"estimate": 1}, "saebench_delta": {"estimate": None, "reason": "why"}}
    assert bank.unmatched([row | {"cebench": None, "cebench_delta": None}]) == "c: saebench: why"
    row["saebench_delta"]["estimate"] = 0.0
    assert bank.unmatched([row | {"cebench": None, "cebench_delta": None}]) is None


# ---------------------------------------------------------------------------------------------------------------------
# From the shell


@pytest.fixture(scope="module")
def few():
    short = text.documents("86_social_iqa")
    return text.Corpus(train=short[:600], heldout=short[600:800], heldout_families=["a"] * 200, dropped=0)


@pytest.fixture
def common(monkeypatch, few, tmp_path, tmp_path_factory):
    """Arguments for a miniature language model and sizes that take seconds."""
    monkeypatch.setattr(text, "corpus", lambda: few)
    config = TinyLMConfig(vocabulary=400, n_layers=3, d_model=16, n_heads=2, d_mlp=32, n_ctx=32)
    folder = tmp_path / "miniature"
    folder.mkdir()
    tiny_lm.save_folder(tiny_lm.build_model(config), tiny_lm.train_tokenizer(few.train, 400), config, folder)
    sizes = ["--rows", 3000, "--batch-size", 128, "--null-draws", 3, "--heldout-rows", 1000, "--max-rows", 8]
    where = ["--artifact-root", tmp_path, "--output-dir", tmp_path / "out", "--threads", 1]
    return ["--subject", folder, *sizes, *where, "--seeds", "1,2,3"]


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
    assert row["cebench"]["of_seeds"] == [r["normalised"] for r in records]
    assert row["cebench"]["estimate"] == pytest.approx(np.mean(row["cebench"]["of_seeds"]))
    assert row["explained_variance"]["estimate"] == pytest.approx(
        np.mean([r["heldout"]["explained_variance"] for r in records])
    )
    assert row["saebench_delta"]["reason"] == "not run"
    assert "not run" in out
    assert (tmp_path / "out" / "figures" / "frontier.png").exists()
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run_script(FRONTIER, *arguments)[0] == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    code, _, err = run_script(FRONTIER, *arguments, "--require-matched")
    assert code == 2
    assert "--require-matched: topk d24 k3" in err.splitlines()[-1]


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
    assert [law["axis"] for law in results["power_laws"]] == ["budget"]
    assert "falls with budget to the power" in out
    assert (tmp_path / "out" / "figures" / "scaling.png").exists()


def test_bad_input(refused, common, tmp_path):
    nowhere = tmp_path / "map.json"
    nowhere.write_text('{"default": "nowhere.json"}')
    for script, arguments, message in (
        (FRONTIER, ["--architectures", "topk,magic"], "--architectures magic"),
        (FRONTIER, ["--ks", 600], "an L0 that --d-sae 512 cannot reach"),
        (FRONTIER, ["--seeds", 1], "one seed says nothing about stability"),
        (FRONTIER, ["--hook-name", "blocks.9.hook_resid_pre", "--d-sae", 24, "--ks", 3], "no such hook point"),
        (FRONTIER, ["--run-saebench", "--dataset-names", "nothing"], "data set 'nothing'"),
        (FRONTIER, ["--run-cebench", "--cebench-matched-baseline-map", nowhere], "names nowhere.json"),
        (FRONTIER, ["--cebench-repo", tmp_path], "a checkout of Yusen-Peng/CE-Bench expected"),
        (SCALING, ["--k", 600], "an L0 that 512 features cannot reach"),
        (SCALING, ["--token-budgets", ""], "is not a whole number of at least 1"),
    ):
        refused(message, script, *common, *arguments)


def test_an_empty_product_is_refused():
    settings = dict.fromkeys(bank.Bank.__dataclass_fields__)
    with pytest.raises(BadInput, match="the product of families, seeds, widths, sparsities and budgets is empty"):
        bank.check(bank.Bank(**settings | {"families": [], "seeds": [1], "d_saes": [8], "ks": [2], "budgets": [10]}))


def test_the_scaling_page_is_what_the_benchmarks_say(run_script, tmp_path):
    code, _, err = run_script("scripts/analysis/plan_scale.py", "--output", tmp_path / "scaling.md")
    assert code == 0, err
    assert (tmp_path / "scaling.md").read_text() == (ROOT / "docs" / "scaling.md").read_text()
