"""Out-of-distribution stress: figures of own test rows are the official ones, and the drop is what it is said to be."""

import json
import re

import numpy as np
import pytest
import torch

from husai.activations import language_model as lm
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import loaded, ood, shift
from husai.evidence import data_sets, drop, rules
from husai.evidence.schemas import OODStress, Shifted
from husai.release.recompute import decisions, phase_problems
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.subjects import pretrained, text
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig
from miniature import few_texts, save_miniature

SCRIPT = "scripts/experiments/run_ood_stress_eval.py"
HOOK = "blocks.1.hook_resid_pre"
SETS = ["5_hist_fig_ismale", "66_living-room"]
SHIFTED = [f"{name}_OOD" for name in SETS]


@pytest.fixture(scope="module")
def few():
    return few_texts()


@pytest.fixture(autouse=True)
def _few_documents(monkeypatch, few):
    monkeypatch.setattr(text, "corpus", lambda: few)


@pytest.fixture(scope="module")
def folder(few, tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("subjects") / "miniature", few.train)


@pytest.fixture(scope="module")
def subject(folder):
    return pretrained.load(str(folder))


@pytest.fixture(scope="module")
def trained(subject, few, tmp_path_factory):
    """A folder of TopK checkpoints with two seeds, and one of another recipe."""
    root = tmp_path_factory.mktemp("saes")
    store = ActivationStore.open(lm.harvest_tokens(subject, [HOOK], few.train, root / "activations", 4000)[HOOK])
    found = {}
    for name, d_sae, seeds in (("own", 24, [1, 2]), ("other", 32, [3])):
        recipe = TrainingConfig(tokens=4000, batch_size=128)
        grid = members(seeds, [d_sae], [3], [3e-3])
        saes = train_or_find(Cells(root / name / "cells"), store, grid, recipe, torch.device("cpu"), 1).members
        found[name] = (root / name / saes[0].checkpoint).parent
    return found


@pytest.fixture(scope="module")
def artifacts(subject, tmp_path_factory):
    """An artifact root that holds the activations of prompts."""
    root = tmp_path_factory.mktemp("artifacts")
    lm.harvest_prompts(subject, [HOOK], [*SETS, *SHIFTED], places(root).probe_activations(subject))
    return root


def places(root):
    return loaded.Places(root, root, "cpu", 1)


@pytest.fixture(scope="module")
def prompts(subject, artifacts):
    return ood.Prompts(subject.name, HOOK, str(places(artifacts).probe_activations(subject)))


# ---------------------------------------------------------------------------------------------------------------------
# Probes


class Planted:
    """The activations themselves, or, broken, what only the original's prompts have."""

    def __init__(self, known: torch.Tensor | None = None):
        self.known = None if known is None else {row.numpy().tobytes() for row in known}

    def encode(self, x):
        if self.known is None:
            return x
        return x * torch.tensor([float(row.numpy().tobytes() in self.known) for row in x])[:, None]


def test_the_identity_loses_what_the_model_loses_and_a_broken_encoder_more(prompts):
    """All 16 coordinates as features are the model's activations; the broken one says nothing of shifted prompts."""
    name = SETS[0]
    own = torch.load(f"{prompts.cache}/model_activations_{prompts.model_name}/{name}_{HOOK}.pt", weights_only=True)
    llm = ood.of_llm(name, prompts)
    drops = []
    for encoder in (Planted(), Planted(own)):
        found = ood.of_sae(encoder, name, prompts, ks=(16,))["16"]
        assert found["id"] == pytest.approx(llm["id"], abs=0.03)
        drops.append(found["id"] - llm["id"] - (found["ood"] - llm["ood"]))
    assert found["ood"] == 0.5
    assert abs(drops[0]) < 0.03
    assert drops[1] == pytest.approx(llm["ood"] - 0.5 + found["id"] - llm["id"])


def test_classes_are_those_of_the_original(monkeypatch):
    for name in data_sets.FAMILIES["ood"]["shifted"][:7]:
        shifted, plain = text.table(name), text.table(ood.original(name))
        label = np.unique(plain["target"])
        assert (label[ood.classes(name)].astype(str) == shifted["target"].astype(str)).all()
    with pytest.raises(BadInput, match=r"^90_glue_qnli_OOD: .*\b1\b.*\bnot_entailment\b"):
        ood.classes("90_glue_qnli_OOD")
    assert ood.unseen("67_social-security_OOD").sum() == 299, "one prompt of the original is among them"


def test_what_is_chosen(monkeypatch):
    chosen = ood.choose(None, [], 42)
    assert len(chosen.shifted) == 7
    assert [(name, "not_entailment" in why) for name, why in chosen.skipped.items()] == [("90_glue_qnli_OOD", True)]
    assert (chosen.probe, chosen.heldout) == ([], [])
    both = ood.choose(SHIFTED, ["95_toxic_is"], 42)
    assert (both.shifted, both.probe, len(both.heldout)) == (SETS, ["95_toxic_is"], 9)
    for shifted, probe, message in (
        (["66_living-room_translations"], [], "--shifted 66_living-room_translations: .*5_hist_fig_ismale_OOD"),
        (["90_glue_qnli_OOD"], [], "--shifted 90_glue_qnli_OOD: .*not_entailment"),
        (None, ["100_news_fake"], "--dataset-names: 100_news_fake "),
        (None, ["161_agnews_0"], "--dataset-names: 161_agnews_0 "),
    ):
        with pytest.raises(BadInput, match=message):
            ood.choose(shifted, probe, 42)
    seen = text.Corpus(train=text.documents(SETS[1])[:7], heldout=[], heldout_families=[], dropped=0)
    monkeypatch.setattr(text, "corpus", lambda: seen)
    ((name, why),) = ood.unusable(SHIFTED).items()
    assert (name, {"66_living-room", "12"} <= set(why.split())) == (SHIFTED[1], True)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates and the rule


def a_shifted_section(seeds=5, loss=0.0):
    rng = np.random.default_rng(0)
    names = [name.removesuffix("_OOD") for name in data_sets.FAMILIES["ood"]["shifted"]][:7]
    sides = {"id": rng.uniform(0.7, 0.9, 7), "ood": rng.uniform(0.5, 0.7, 7)}
    llm = {side: x.tolist() for side, x in sides.items()} | {"ood_low": [0.6] * 3 + [0.4] * 3 + [0.51]}
    saes = []
    for seed in range(seeds):
        noise = rng.normal(0, 0.005, (2, 7))
        own = {"id": sides["id"] - 0.1 + noise[0], "ood": sides["ood"] - 0.1 - loss + noise[1]}
        saes.append(
            {"identity": f"{seed:064x}", "seed": seed, "test_auc": {"5": {s: x.tolist() for s, x in own.items()}}}
        )
    about = {
        "data_sets": names,
        "families": data_sets.families(names),
        "k": "5",
        "prompts": [200] * 7,
        "random_seed": 42,
    }
    return about | {"llm": llm, "saes": saes, "drop": {}, "drop_where_kept": {}}


def test_the_drop_against_its_formula():
    section = a_shifted_section(loss=0.07)
    values = np.array(
        [
            [(i - a) - (o - b) for i, a, o, b in zip(own["id"], llm["id"], own["ood"], llm["ood"], strict=True)]
            for llm in [section["llm"]]
            for own in (sae["test_auc"]["5"] for sae in section["saes"])
        ]
    )
    residual = values.mean(0) - values.mean()
    sums = [residual[:3].sum(), residual[3:6].sum(), residual[6]]  # historical figures, phrases, CoLA
    error = np.sqrt(values.mean(1).var(ddof=1) / 5 + 3 / 2 * np.square(sums).sum() / 49)
    found = drop.drop(Shifted.model_validate(section))["5"]
    assert found["estimate"] == pytest.approx(values.mean())
    assert found["estimate"] == pytest.approx(0.07, abs=0.01)
    assert found["high"] == pytest.approx(values.mean() + 4.302653 * error, rel=1e-5)  # t(2)
    kept = drop.drop_where_kept(Shifted.model_validate(section))["5"]
    of_seeds = values[:, [0, 1, 2, 6]].mean(1)
    assert kept["estimate"] == pytest.approx(of_seeds.mean())
    half = 2.776445 * of_seeds.std(ddof=1) / np.sqrt(5)  # t(4)
    assert [kept["low"], kept["high"]] == pytest.approx([of_seeds.mean() - half, of_seeds.mean() + half], rel=1e-5)
    section["llm"]["ood_low"] = [0.5] * 7
    nowhere = drop.drop_where_kept(Shifted.model_validate(section))["5"]
    assert nowhere["estimate"] is None
    assert nowhere["reason"]


def test_the_rule():
    def outcome(skipped=("90_glue_qnli_OOD",), only=range(7), alive=(0.9,) * 7, worse=(0.0,) * 7, **changed):
        section = a_shifted_section(**changed)
        section |= {name: [section[name][i] for i in only] for name in ("data_sets", "families", "prompts")}
        for auc in (section["llm"], *(sae["test_auc"]["5"] for sae in section["saes"])):
            auc |= {side: [auc[side][i] for i in only] for side in ("id", "ood")}
        section["llm"]["ood_low"] = list(alive) if len(alive) == len(only) else [0.9] * len(only)
        for sae in section["saes"]:
            sae["test_auc"]["5"]["ood"] = [v - w for v, w in zip(sae["test_auc"]["5"]["ood"], worse, strict=False)]
        verdict = rules.verdict(lambda: rules.ood(Shifted.model_validate(section), skipped))
        return verdict["outcome"], verdict["reason"]

    assert outcome(loss=0.05)[0] == rules.PASS
    assert outcome(loss=0.12)[0] == rules.FAIL
    # One set on which the model's probe survives answers, and nothing that happens on the others does.
    last, rest = (0.5,) * 6 + (0.51,), (0.3,) * 6 + (0.0,)
    found, why = outcome(loss=0.05, alive=last, worse=rest)
    assert found == rules.PASS
    assert re.search(r"\b87_glue_cola_OOD is\b", why)
    assert not re.search(r"hist_fig|living-room", why)
    assert outcome(loss=0.05, worse=rest)[0] == rules.FAIL
    for changed, named in (
        ({"loss": 0.05, "alive": (0.5,) * 7}, r"^not answerable on this subject\b.*\bprobe\b"),
        ({"seeds": 4}, r"\b4\b.*\b5\b.* seeds"),
        ({"skipped": ()}, r"\b90_glue_qnli_OOD\b"),
        ({"only": [0, 1, 2]}, r"\b66_living-room_OOD\b"),
    ):
        found, why = outcome(**changed)
        assert found == rules.MISSING
        assert re.search(named, why), why


def test_the_gap_of_a_held_out_family_is_over_seeds():
    families = {
        "id": {"data_sets": ["a", "b"], "families": ["x", "y"]},
        "ood": {"data_sets": ["c"], "families": ["z"]},
        "llm": {"id": [0.9, 0.8], "ood": [0.7]},
        "saes": [{"test_auc": {"id": [0.8 + d, 0.7], "ood": [0.7 - d]}} for d in (0, 0.01, 0.02)],
    }
    found = drop.gap(families)
    assert found["id"]["estimate"] == pytest.approx(-0.095)
    assert found["ood"]["estimate"] == pytest.approx(-0.01)
    assert found["difference"]["estimate"] == pytest.approx(0.085)
    assert "t(S-1)" in found["ood"]["method"]


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def test_the_share_outside_the_subspace(make_store):
    """An SAE whose features lie in the first two of four coordinates, the second hardly used, and of one that it never
    fires: what varies in the others is outside."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=g) * torch.tensor([3.0, 1.0, 1.0, 0.5]) + 2
    W = torch.eye(4)
    bias = torch.tensor([10.0, 10.0, -100.0, -100.0])
    sae = SAE({"W_enc": W, "b_enc": bias, "W_dec": W, "b_dec": torch.full((4,), 2.0)}, "standard")
    store = make_store(x)
    directions = shift.subspace(sae, store)
    assert directions.shape == (4, 2)
    torch.testing.assert_close(directions[2:], torch.zeros(2, 2, dtype=torch.float64), atol=1e-6, rtol=0)
    variance = x.var(0)
    expected = (variance[2:].sum() / variance.sum()).item()
    assert shift.outside(directions, store) == pytest.approx(expected, rel=1e-3)
    other = make_store(x * torch.tensor([1.0, 1.0, 4.0, 1.0]), "other")
    assert shift.outside(directions, other) > 2 * expected
    bias[1] = -100
    assert shift.subspace(sae, store).shape == (4, 1)
    bias[0] = -100
    with pytest.raises(BadInput, match=f"{store.folder} "):
        shift.subspace(sae, store)


def test_all_tokens_give_rows(subject):
    store_rows = shift.token_rows(subject, texts := text.distinct(SHIFTED[1:]))
    assert lm.Inputs.of(subject, texts, store_rows, 0).rows.sum() == store_rows
    with pytest.raises(BadInput, match=rf"--rows {store_rows + 1}: .*\b{store_rows}\b"):
        lm.Inputs.of(subject, texts, store_rows + 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# From the shell


@pytest.fixture
def common(folder, artifacts, tmp_path):
    where = ["--artifact-root", artifacts, "--output-dir", tmp_path / "out", "--threads", 1]
    return ["--model-name", folder, "--hook-layer", 1, "--rows", 1000, *where, "--shifted", ",".join(SHIFTED)]


@pytest.mark.slow
@pytest.mark.parametrize("probing", ["sae_probes_exact", pytest.param("sae_probes", marks=pytest.mark.nightly)])
def test_from_the_shell(run_script, trained, common, tmp_path, monkeypatch, probing):
    """The probe sets are those with shifted versions, therefore the benchmark's own figures stand beside ours."""
    monkeypatch.setitem(data_sets.FAMILIES["ood"], "code_and_ag_news", ["161_agnews_0"])
    arguments = ["--checkpoint", trained["own"], *common, "--dataset-names", ",".join(SETS), "--probe-ks", "5"]
    arguments += ["--probing", probing]
    code, out, err = run_script(SCRIPT, *arguments)
    assert code == 0, err
    path = tmp_path / "out" / "results.json"
    results = json.loads(path.read_text())
    shifted = results["shifted"]
    assert (shifted["data_sets"], shifted["families"]) == (SETS, ["historical_figures", "phrases"])
    assert [sae["seed"] for sae in shifted["saes"]] == [1, 2]
    assert list(results["candidate"]["checkpoints"]) == ["1", "2"]
    assert re.search(r"^\*\*MISSING\*\*: .*\b2\b.*\b5\b", out, re.M)
    assert OODStress.model_validate(results).shifted.prompts == [299, 300], "as the gate reads it"
    official = results["families"]
    assert official["ood"]["data_sets"] == ["161_agnews_0"]
    np.testing.assert_allclose(shifted["llm"]["id"], official["llm"]["id"], atol=1e-9)
    for ours, theirs in zip(shifted["saes"], official["saes"], strict=True):
        np.testing.assert_allclose(ours["test_auc"]["5"]["id"], theirs["test_auc"]["id"], atol=1e-9)
    for sae in results["activations"]["saes"]:
        assert 1 <= sae["rank"] <= 16
        assert 0 <= sae["id"]["outside"] <= 1
    places = "shifted/drop", "shifted/drop_where_kept", "activations/change", "families/gap"
    assert decisions(results).keys() == {f"/{place}" for place in places}
    assert phase_problems(results) == []
    before = path.read_bytes()
    assert run_script(SCRIPT, *arguments)[0] == 0
    assert path.read_bytes() == before
    shifted["saes"][0]["test_auc"]["5"]["ood"][0] += 0.01
    assert any("/shifted/drop/5/estimate" in problem for problem in phase_problems(results))


@pytest.mark.slow
def test_one_sae_runs_and_is_inconclusive(run_script, trained, common, tmp_path):
    one = sorted(trained["own"].iterdir())[0]
    code, out, err = run_script(SCRIPT, "--checkpoint", one, *common, "--skip-families", "--shifted", SHIFTED[0])
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["families"] is None
    assert re.search(r"^\*\*MISSING\*\*: .*\b1\b.*\b5\b", out, re.M)
    assert phase_problems(results) == []


@pytest.mark.slow
def test_bad_input_from_the_shell(refused, trained, common, tmp_path):
    own = ["--checkpoint", trained["own"], *common]
    transcoder = {"W_enc": torch.eye(16), "b_enc": torch.zeros(16), "W_dec": torch.eye(16), "b_dec": torch.zeros(16)}
    checkpoints.save(SAE(transcoder, "transcoder", None, False), tmp_path / "other")
    for arguments, named in (
        (["--checkpoint", tmp_path / "other", *common], [tmp_path / "other", "transcoder"]),
        (["--checkpoint", trained["own"], trained["other"], *common], ["checkpoint: ", "d32", "d_sae"]),
        (["--checkpoint", tmp_path / "none", *common], ["--checkpoint: ", tmp_path / "none"]),
        (["--candidate", tmp_path / "none.json", *common], f"--candidate: {tmp_path}/none.json "),
        ([*own, "--candidate", tmp_path / "none.json"], ["--candidate", "--checkpoint"]),
        ([*own, "--shifted", "90_glue_qnli_OOD"], ["--shifted 90_glue_qnli_OOD: ", "not_entailment"]),
    ):
        refused(named, SCRIPT, *arguments)
        assert not (tmp_path / "out" / "results.json").exists()
