"""Stress tests as a user runs them, on miniatures whose answer is known."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from conftest import run_without_torch
from husai.activations import source
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import random_model
from husai.evidence import levels, rules, transcoder
from husai.evidence.names import PAIRED, STRATA
from husai.evidence.schemas import (
    Control,
    Facts,
    OwnMember,
    OwnSection,
    RandomModelStress,
    SeedGroup,
    Setting,
)
from husai.release import recompute
from husai.runs.cells import Cells
from husai.stability import controls, study
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig
from miniature import few_documents, save_miniature, save_structured

RANDOM_MODEL = "scripts/experiments/run_random_model_stress_eval.py"
TRANSCODER = "scripts/experiments/run_transcoder_stress_eval.py"
HOOK, ROWS, SEEDS, CPU = "blocks.1.hook_resid_pre", 3000, [1, 2, 3, 4, 5], torch.device("cpu")
DRAWS = ["--null-draws", 100]
KEPT = ("seed", "checkpoint_sha256", "heldout")


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_documents() as corpus:
        yield corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stress")


@pytest.fixture(scope="module")
def structured(few, root):
    return save_structured(root / "structured", few.train)


@pytest.fixture(scope="module")
def meaningless(few, root):
    """A subject that has learned nothing."""
    return save_miniature(root / "meaningless", few.train)


@pytest.fixture(scope="module")
def train(root):
    """`train(subject, name, seeds, random_seed)` -> folder of five TopK SAEs, trained by HUSAI."""

    def run(subject, name, seeds=SEEDS, random_seed=None, tokens=20_000):
        where = {"subject": subject, "hook_name": HOOK, "rows": ROWS}
        store = source.open_store(root, CPU, 1, **where, random_seed=random_seed)
        recipe = TrainingConfig(tokens=tokens, batch_size=128)
        grid = members(seeds, [64], [1], [3e-3])
        saes = train_or_find(Cells(root / name / "cells"), store, grid, recipe, CPU, 1).members
        return (root / name / saes[0].checkpoint).parent

    return run


@pytest.fixture(scope="module")
def saes(train, structured):
    return train(structured, "saes")


@pytest.fixture
def stress(run_script, root, tmp_path):
    """`stress(script, subject, saes, *arguments)` -> its results; the output folder is `tmp_path / "out"`."""

    def run(script, subject, saes, *arguments):
        code, _, err = run_script(script, *common(subject, saes, root, tmp_path), *arguments)
        assert code == 0, err
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def common(subject, saes, root, tmp_path):
    arguments = ["--checkpoint", saes] if saes else []
    arguments += ["--model-name", subject] if subject else []
    where = ["--artifact-root", root, "--output-dir", tmp_path / "out", "--threads", 1]
    return [*arguments, "--rows", 1000, "--null-draws", 3, *where]


def problems(results):
    studies = [p for _, s in recompute.studies(results) for p in recompute.study_problems(s)]
    return studies + recompute.phase_problems(results)


# ---------------------------------------------------------------------------------------------------------------------
# A meaningless subject


@pytest.mark.slow
def test_what_a_structured_subject_teaches_exceeds_its_random_control(stress, structured, saes, root, tmp_path):
    results = stress(RANDOM_MODEL, structured, saes, *DRAWS)
    assert results["verdict"]["outcome"] == rules.PASS, results["gains"]
    assert results["candidate"]["facts"]["store_digest"] == results["section"]["store_digest"]
    section, randoms = results["section"], results["random_models"]
    subject = section["subject_digest"]
    assert [r["subject_digest"] for r in randoms] == [levels.random_subject(subject, draw) for draw in (0, 1, 2)]
    assert [m["seed"] for m in section["members"]] == SEEDS
    assert [m["checkpoint_sha256"] for m in section["members"]] == list(results["candidate"]["checkpoints"].values())
    assert section["gaussian"]["subject_digest"] == subject
    arms = [section, section["gaussian"], *randoms, *(r["gaussian"] for r in randoms)]
    assert [[m["seed"] for m in arm["members"]] for arm in arms] == [SEEDS] * 8
    shas = {m["checkpoint_sha256"] for arm in arms for m in arm["members"]}
    assert len(shas) == 40
    assert shas | {arm["store_digest"] for arm in arms} <= set(results["inputs"].values())
    assert str(tmp_path) not in json.dumps(results)
    assert (tmp_path / "out" / "summary.md").read_text().split("\n")[2].startswith("**PASS**")

    found = RandomModelStress.model_validate(results)  # what the gate reads
    scores = [p["observed"]["mcc_alive"] - p["gaussian"]["mcc_alive"] for p in section["pairs"]]
    below = [p["observed"]["mcc_alive"] - p["gaussian"]["mcc_alive"] for p in randoms[2]["pairs"]]
    assert found.gains[2].gaussian.estimate == pytest.approx(np.mean(scores) - np.mean(below))
    assert problems(results) == []
    for change, reason in (
        (lambda r: r["verdict"].update(outcome=rules.FAIL), "/verdict/outcome "),
        (lambda r: r["gains"][1]["spectral"].update(low=-1.0), "/gains/1/spectral/low "),
        (lambda r: r["section"]["members"][0].update(checkpoint_sha256="0" * 64), "/candidate/checkpoints/1 "),
        (lambda r: r["random_models"][2]["pairs"][0]["gaussian"].update(mcc_alive=0.0), "excess/gaussian"),
    ):
        changed = copy.deepcopy(results)
        change(changed)
        assert any(reason in p for p in problems(changed)), problems(changed)

    # What is finished is found: without the phase's own cell, nothing is trained or scored again.
    def parts():
        folders = (tmp_path / "out" / "cells", root / "controls" / "cells")
        found = [p for folder in folders for p in folder.glob("*.json")]
        return {p.name: p.stat().st_mtime_ns for p in found if not p.name.startswith("random_model_stress")}

    before = parts()
    assert len([name for name in before if name.startswith("pair-")]) >= 40
    next((tmp_path / "out" / "cells").glob("random_model_stress-*.json")).unlink()
    assert stress(RANDOM_MODEL, structured, saes, *DRAWS) == results
    assert parts() == before


@pytest.mark.slow
def test_a_subject_that_has_learned_nothing_does_not_exceed_it(stress, train, meaningless):
    results = stress(RANDOM_MODEL, meaningless, train(meaningless, "of_nothing"), *DRAWS)
    assert results["verdict"]["outcome"] == rules.FAIL, results["gains"]
    assert all(abs(gain["observed"]["estimate"]) < 0.05 for gain in results["gains"])


@pytest.mark.slow
def test_gaussian_rows_exceed_no_control(make_store, tmp_path):
    """A subject without features whose moments give a higher score than its controls' moments do: the score itself
    lies above them all, and the excess over SAEs of Gaussian rows does not."""
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -1.5, 16)
    own_rows = make_store(torch.randn(4000, 16, generator=g) * spread, name="own")
    others = [make_store(torch.randn(4000, 16, generator=g), name=f"round{i}") for i in range(3)]
    grid, recipe = members(SEEDS, [32], [2], [3e-3]), TrainingConfig(tokens=12_000, batch_size=128)

    def studied(store):
        own, gaussian = (f(tmp_path, store, grid, recipe, CPU, 1) for f in (controls.trained, controls.gaussian))
        labels = [f"seed{seed}" for seed in SEEDS]
        arguments = store, labels, own.dictionaries, 100, 1, {}, gaussian
        compared, _ = study.compare_all(Cells(tmp_path / "cells"), *arguments, scores=PAIRED)
        return compared, own.alike, gaussian.alike

    compared, own, _ = studied(own_rows)
    named = [OwnMember(label=f"seed{m.seed}", **{n: getattr(m, n) for n in KEPT}) for m in own.members]
    section = OwnSection(members=named, **dict(compared))
    drawn = []
    for draw, store in enumerate(others):
        scored, alike, gaussian = studied(store)
        subject = {"subject_digest": levels.random_subject(section.subject_digest, draw)}
        control, noise = dict(alike) | subject, gaussian.model_copy(update=subject)
        scores = {n: getattr(scored, n) for n in ("stability", "pairs", "strata")}
        drawn.append(Control(**control, **scores, gaussian=noise))
    shown = rules.random_model(section, drawn)
    assert {"draw 0, over gaussian", "draw 1, over gaussian", "draw 2, over gaussian"} <= set(shown.failing())
    assert shown.estimates["draw 0, the score itself"].low > 0.01, "the score alone would have passed"


@pytest.mark.parametrize("family", ["relu", *(pytest.param(f, marks=pytest.mark.slow) for f in ("jumprelu", "gated"))])
def test_controls_of_an_unknown_recipe_reach_the_l0(make_store, tmp_path, family):
    """Of few rows too, where a penalty has few steps to grow."""
    g, wanted = torch.Generator().manual_seed(0), 6.0
    store = make_store(torch.randn(5000, 32, generator=g) * torch.logspace(0, -1, 32) + 1)
    recipe = random_model.own_recipe(random_model.PASSES * store.rows)
    grid = members(SEEDS[:3], [64], [round(wanted)], [random_model.LEARNING_RATE], (family,))
    arm = random_model.gaussian_at_l0(tmp_path, store, grid, recipe, [wanted] * 3, CPU, 1)
    assert [m.heldout.l0 for m in arm.alike.members] == pytest.approx([wanted] * 3, rel=0.1)


def of_draws(train, structured, name, seeds=SEEDS, tokens=20_000):
    return [train(structured, f"{name}{draw}", seeds, draw, tokens) for draw in levels.RANDOM_DRAWS]


@pytest.mark.slow
def test_supplied_controls_must_have_been_trained_alike(stress, refused, train, structured, saes, root, tmp_path):
    here = [RANDOM_MODEL, *common(structured, saes, root, tmp_path), "--random-model-checkpoint"]
    refused(["--random-model-checkpoint: ", "tokens"], *here, train(structured, "shorter", random_seed=0, tokens=2000))
    refused(["--random-model-checkpoint: ", "seed6", "seed "], *here, train(structured, "others", [1, 2, 3, 4, 6], 0))
    refused(["--random-model-checkpoint: 3 ", "5"], *here, train(structured, "fewer", SEEDS[:3], 0))
    refused(["--random-model-checkpoint: ", ": none;"], *here, saes)
    alike = of_draws(train, structured, "alike")
    results = stress(RANDOM_MODEL, structured, saes, *DRAWS, "--random-model-checkpoint", *alike)
    assert results["verdict"]["outcome"] == rules.PASS
    trained = stress(RANDOM_MODEL, structured, saes, *DRAWS)
    assert results["gains"] == trained["gains"], "the controls that HUSAI trains are the same"
    two = stress(RANDOM_MODEL, structured, saes, *DRAWS, "--random-model-checkpoint", alike[2], alike[0])
    assert two["verdict"]["outcome"] == rules.MISSING
    assert re.search(r"draw 1\b.*--random-model-checkpoint", two["verdict"]["reason"])
    assert two["gains"] == [trained["gains"][0], trained["gains"][2]]


@pytest.mark.slow
def test_saes_trained_elsewhere_need_supplied_controls(stress, refused, train, structured, saes, root, tmp_path):
    foreign = tmp_path / "foreign"
    for i, folder in enumerate(sorted(saes.iterdir())):
        sae = checkpoints.load(folder)
        metadata = {"model_name": "structured", "hook_name": HOOK}
        checkpoints.save(SAE(sae.weights, sae.architecture, sae.k, sae.subtract_b_dec, metadata), foreign / str(i))
    here = common(structured, foreign, root, tmp_path)
    refused(["checkpoint: ", "--random-model-checkpoint"], RANDOM_MODEL, *here)
    refused(f"checkpoint: {foreign}", TRANSCODER, *here)
    alike = of_draws(train, structured, "alike")
    results = stress(RANDOM_MODEL, structured, foreign, *DRAWS, "--random-model-checkpoint", *alike)
    assert results["verdict"]["outcome"] == rules.PASS, results["gains"]
    assert results["section"]["stability"]["missing_nulls"] == {}
    assert problems(results) == []


def test_the_activations_must_be_those_that_the_candidate_saw(refused, structured, saes, root, tmp_path):
    store = source.open_store(root, CPU, 1, subject=structured, hook_name=HOOK, rows=ROWS).digest
    other = source.open_store(root, CPU, 1, subject=structured, hook_name=HOOK, rows=2000).digest
    refused(
        ["--train-rows 2000: ", other[:12], store[:12]],
        RANDOM_MODEL,
        *common(structured, saes, root, tmp_path),
        "--train-rows",
        2000,
    )
    elsewhere = common(structured, saes, tmp_path / "elsewhere", tmp_path)
    refused([store[:12], tmp_path / "elsewhere", "--train-rows"], RANDOM_MODEL, *elsewhere)


# ---------------------------------------------------------------------------------------------------------------------
# Another objective


@pytest.mark.slow
def test_transcoders_find_what_the_candidate_found(stress, structured, saes, root, tmp_path):
    results = stress(TRANSCODER, structured, saes, *DRAWS)
    assert results["verdict"]["outcome"] == rules.PASS, results["across"]["stability"]["scores"]["mcc_alive"]["excess"]
    s, own = results["setting"], results["section"]
    assert s["preregistered"]
    assert (s["hook_in"], s["hook_out"]) == ("blocks.0.hook_resid_pre", HOOK)
    assert (s["d_sae"], s["k"], s["tokens"], s["batch_size"], s["seeds"]) == (64, 1, 20_000, 128, SEEDS)
    assert {m["family"] for m in results["transcoder"]["members"]} == {"transcoder"}
    for figure in STRATA:  # at most all features of an SAE
        assert 0 < sum(s["features"] for s in results["across"]["strata"] if s["figure"] == figure) <= 64
    for name in ("section", "transcoder", "across"):
        assert (results[name]["hook_name"], results[name]["rows"]) == (HOOK, ROWS)
        assert results[name]["store_digest"] == results["candidate"]["facts"]["store_digest"]
    noise = results["transcoder"]["gaussian"]
    assert noise["store_digest"] == own["gaussian"]["store_digest"]
    shas = {m["checkpoint_sha256"] for arm in (own, results["transcoder"]) for m in arm["members"]}
    shas |= {m["checkpoint_sha256"] for arm in (own, results["transcoder"]) for m in arm["gaussian"]["members"]}
    assert len(shas) == 20
    assert shas <= set(results["inputs"].values())

    # What was observed: the SAE of one seed against the transcoder of the other, and the other way round.
    trained = [tmp_path / "out" / m["checkpoint"] for m in results["transcoder"]["members"]]
    sides = [[study.own_dictionary(folder) for folder in side] for side in (sorted(saes.iterdir()), trained)]
    first, second = results["across"]["pairs"][0], results["across"]["pairs"][-1]
    for pair, (i, j) in ((first, (0, 1)), (second, (3, 4))):
        for score, worth in (("mcc_alive", lambda c: np.maximum(c, 0)), ("mcc_alive_abs", np.abs)):
            both = [matched_mean(sides[0][a], sides[1][b], worth) for a, b in ((i, j), (j, i))]
            assert pair["observed"][score] == pytest.approx(np.mean(both), abs=1e-5)

    assert problems(results) == []
    for change, reason in (
        (lambda r: r["gain"]["spectral"].update(low=-1.0), "/gain/spectral/low "),
        (lambda r: r["explained_variance"]["candidate"].update(low=-1.0), "/explained_variance/candidate/low "),
        (lambda r: r["setting"].update(k=3), "/setting/k "),
        (lambda r: r["setting"].update(tokens=9), "/setting/preregistered "),
        (lambda r: r["verdict"].update(outcome="?"), "/verdict/outcome "),
        (lambda r: r["across"]["pairs"][0]["gaussian"].update(mcc_alive=0.0), "excess/gaussian"),
        (lambda r: r["section"]["members"][0].update(checkpoint_sha256="0" * 64), "/candidate/checkpoints/1 "),
    ):
        changed = copy.deepcopy(results)
        change(changed)
        assert any(reason in p for p in problems(changed)), problems(changed)

    # As a confirmed candidate, with a sparsity of one's own.
    paths = {
        m: str(folder) for m, folder in zip(results["candidate"]["checkpoints"], sorted(saes.iterdir()), strict=True)
    }
    bank = {"saebench": None, "cebench": None, "hook_name": HOOK, "inputs": {}, "saes": []}
    confirmed = {"phase": "candidate_confirmation", "origin": "supplied", "inputs": {}, "subject": str(structured)}
    confirmed |= {"candidate": results["candidate"], "paths": paths, "untrained": None}
    confirmed |= {"section": own, "bank": bank}
    (tmp_path / "confirmed.json").write_text(json.dumps(confirmed))
    other = stress(TRANSCODER, None, None, "--candidate", tmp_path / "confirmed.json", "--k", 3)
    assert other["candidate"] == results["candidate"]
    assert other["setting"]["k"] == 3
    assert not other["setting"]["preregistered"]
    assert (other["verdict"]["outcome"], "setting" in other["verdict"]["reason"]) == (rules.MISSING, True)
    assert problems(other) == []

    # A repeat reads what is finished.
    before = (tmp_path / "out" / "results.json").read_bytes()
    sizes = ["--candidate", tmp_path / "confirmed.json", "--k", 3]
    run_without_torch(TRANSCODER, *common(None, None, root, tmp_path), *sizes)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def matched_mean(a, b, worth_of) -> float:
    """Mean worth of the best assignment of the alive features of two dictionaries."""
    x, y = (torch.nn.functional.normalize(d.W_dec[d.alive].double(), dim=1).numpy() for d in (a, b))
    worth = worth_of(x @ y.T)
    return worth[linear_sum_assignment(worth, maximize=True)].mean()


def test_only_the_setting_fixed_in_advance_is_judged():
    sha = {"a": "a" * 64, "b": "b" * 64}
    made = {"subject_digest": sha["a"], "d_sae": 256, "k": 8, "learning_rate": 3e-3, "tokens": 9}
    unknown = {"source": "husai", "family": "topk", "d_in": 8, "store_digest": None, "training": None, "control": None}
    names = {seed: f"{int(seed):064x}" for seed in "12345"}
    facts = Facts(**made, **unknown, hook_name=HOOK)
    candidate = SeedGroup(condition="c", facts=facts, checkpoints=names, identities=names)
    hooks = {"hook_in": "blocks.0.hook_resid_pre", "hook_out": HOOK}
    own = Setting(**made, **hooks, batch_size=128, seeds=SEEDS, preregistered=False)
    assert transcoder.preregistered(own, candidate)
    for change in (
        *({"k": 16}, {"d_sae": 512}, {"tokens": 1}, {"learning_rate": 1e-3}, {"subject_digest": sha["b"]}),
        *({"seeds": [1, 2, 3, 4, 6]}, {"seeds": [1, 2, 3, 4]}, {"hook_in": "blocks.0.mlp.hook_in"}),
        {"hook_out": "blocks.1.hook_mlp_out"},
    ):
        assert not transcoder.preregistered(own.model_copy(update=change), candidate), change


def test_bad_input(refused, structured, root, tmp_path):
    here = ["--artifact-root", root, "--output-dir", tmp_path / "out"]
    refused(
        ["--checkpoint: ", tmp_path / "none"],
        RANDOM_MODEL,
        "--checkpoint",
        tmp_path / "none",
        "--model-name",
        structured,
        *here,
    )
