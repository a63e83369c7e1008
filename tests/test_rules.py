"""Rules: one inequality each, asked by the page, the gate and the audit alike."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from husai.evidence import levels, random_model, rules, transcoder
from husai.evidence.estimates import Estimate
from husai.evidence.names import GAP, GATED_NULLS, PAIRED
from husai.evidence.schemas import RandomModelStress, Shifted, TranscoderStress
from husai.release import gate
from husai.release.gate import GATES, Bundle, Thresholds, decide
from husai.report import text
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY
from husai.testing import simulate

NOISE = simulate.measured(REPOSITORY / "docs")


def bundle(seeds: int = 5, **sizes: float) -> Bundle:
    """A bundle whose gates have these true effects, in standard errors; 10 where none is named."""
    effects = {g: simulate.shifted(g, sizes.get(g, 10.0) * simulate.standard_error(g, NOISE[g])) for g in GATES}
    return simulate.bundle(effects, NOISE, np.random.default_rng(0), seeds)


def results(label: str, change=lambda r: None, **how) -> dict:
    found = copy.deepcopy(bundle(**how).files[label].results)
    change(found)
    return found


def page(label: str, found: dict) -> str:
    """The outcome on the page of a stress test."""
    if label == "random_model":
        stress = RandomModelStress.model_validate(found)
        return random_model.verdict(stress.section, stress.random_models)["outcome"]
    if label == "transcoder":
        stress = TranscoderStress.model_validate(found)
        arms = stress.section, stress.transcoder, stress.across
        return rules.verdict(lambda: rules.transcoder(stress.setting, *arms))["outcome"]
    return rules.verdict(lambda: rules.ood(Shifted.model_validate(found["shifted"]), found["skipped"]))["outcome"]


def status(label: str, found: dict) -> str:
    """The gate's status, all other evidence passing."""
    good = bundle()
    changed = Bundle(good.files | {label: replace(good.files[label], results=found)}, good.on_disk)
    return next(g["status"] for g in decide(changed, Thresholds(), {})["gates"] if g["gate"] == label)


@pytest.mark.parametrize("label", ["random_model", "transcoder", "ood"])
def test_page_and_gate_say_the_same_of_an_effect(label):
    for size, outcome in ((10.0, rules.PASS), (-10.0, rules.FAIL)):
        found = results(label, **{label: size})
        assert page(label, found) == outcome
        assert status(label, found) == outcome
    assert page(label, results(label, seeds=4)) == rules.MISSING


def test_pages_give_strata_of_every_arm():
    meaningless = RandomModelStress.model_validate(results("random_model"))
    arms = {"own": meaningless.section} | {f"draw {i}": c for i, c in enumerate(meaningless.random_models)}
    arms["empty"] = meaningless.section.model_copy(update={"strata": []})
    _, _, header, _, *rows = text.strata(arms)
    assert header.count("|") == rows[0].count("|")
    expected = [[name, f"{s.low:g} to {s.high:g}", f"{s.mcc:.4f}"] for name, arm in arms.items() for s in arm.strata]
    assert [[row.split(" | ")[i].strip("| ") for i in (0, 2, 4)] for row in rows] == expected
    assert text.strata({"empty": arms["empty"]}) == []


def of_members(arm: str, name: str, value):
    def change(found: dict) -> None:
        for member in found[arm]["members"]:
            member[name] = value

    return change


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("random_model", lambda r: r["random_models"][1]["members"][0]["heldout"].update(l0=30.0)),
        ("random_model", lambda r: r["random_models"][2]["gaussian"]["members"][0]["heldout"].update(l0=30.0)),
        ("random_model", lambda r: r["random_models"][0].update(subject_digest=r["section"]["subject_digest"])),
        ("random_model", lambda r: r["random_models"].pop()),
        ("random_model", lambda r: r["random_models"].append(r["random_models"][0])),
        ("random_model", lambda r: r["random_models"].reverse()),
        ("random_model", lambda r: r["random_models"][2].update(members=r["random_models"][0]["members"])),
        ("transcoder", of_members("transcoder", "learning_rate", 0.1)),
        ("transcoder", of_members("transcoder", "family", "skip_transcoder")),
        ("transcoder", lambda r: r["transcoder"]["gaussian"].update(store_digest="f" * 64)),
        ("transcoder", lambda r: r["across"].update(store_digest="f" * 64)),
        ("transcoder", lambda r: r["setting"].update(preregistered=False)),
        ("ood", lambda r: r["skipped"].update({"66_living-room_OOD": "I would rather not"})),
        ("ood", lambda r: r["shifted"]["llm"].update(ood_low=[0.4] * len(r["shifted"]["data_sets"]))),
        ("ood", lambda r: r["skipped"].clear()),
        ("ood", lambda r: r["shifted"]["data_sets"].__setitem__(0, "unknown")),
    ],
    ids=[
        "L0",
        "L0 of Gaussian rows",
        "own subject",
        "two draws",
        "four draws",
        "another order",
        "twice",
        "learning rate",
        "family",
        "other Gaussian rows",
        "another space",
        "setting",
        "left out",
        "nothing kept",
        "unfit",
        "name",
    ],
)
def test_page_and_gate_refuse_the_same_evidence(label, change):
    found = results(label, change)
    assert page(label, found) == rules.MISSING
    assert status(label, found) == rules.MISSING


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["candidate"]["checkpoints"].update(abc=r["candidate"]["checkpoints"].popitem()[1]),
        lambda r: [record.update(candidate=False) for record in r["bank"]["saes"]],
        lambda r: r["bank"]["saebench"]["data_sets"].__setitem__(0, "unknown"),
        lambda r: r["candidate"]["facts"].update(hook_name=None),
    ],
    ids=["a seed that is no number", "no candidate", "an unknown data set", "no hook"],
)
def test_a_damaged_confirmation_is_missing_evidence_and_no_fault(change):
    good = bundle()
    found = copy.deepcopy(good.files["confirmation"].results)
    change(found)
    changed = Bundle(good.files | {"confirmation": replace(good.files["confirmation"], results=found)}, good.on_disk)
    decision = decide(changed, Thresholds(), {})
    assert not decision["pass_all"]
    assert rules.MISSING in {g["status"] for g in decision["gates"]}


@pytest.mark.parametrize(
    ("hook", "before"),
    [
        ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out"),
        ("blocks.11.attn.hook_z", "blocks.10.attn.hook_z"),
        ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"),
    ],
)
def test_transcoders_read_the_hook_before(hook, before):
    assert transcoder.hook_before(hook) == before


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "hook_embed", "ln_final.hook_normalized", ""])
def test_where_nothing_comes_before_there_are_no_transcoders(hook):
    with pytest.raises(BadInput, match=f"--hook-name {hook}: "):
        transcoder.hook_before(hook)


def test_transcoders_of_another_hook_are_missing_evidence():
    def change(found: dict) -> None:
        found["setting"] |= {"hook_in": "blocks.10.hook_resid_pre", "hook_out": "blocks.11.hook_resid_pre"}
        for arm in ("section", "transcoder", "across"):
            found[arm]["hook_name"] = "blocks.11.hook_resid_pre"

    assert status("transcoder", results("transcoder", change)) == rules.MISSING
    other = results("transcoder", lambda r: r["setting"].update(hook_in="blocks.0.hook_mlp_out"))
    assert status("transcoder", other) == rules.MISSING


def test_a_caller_may_ask_for_more():
    stress = TranscoderStress.model_validate(results("transcoder"))
    arms = stress.setting, stress.section, stress.transcoder, stress.across
    assert rules.transcoder(*arms).failing() == []
    assert rules.transcoder(*arms, minimum=10.0).failing() == [*rules.CHANCE]


@pytest.mark.parametrize(("name", "score", "null"), [(n, *of) for n, of in rules.CHANCE.items()])
def test_transcoders_must_exceed_each_control_of_stability_by_its_minimum(name, score, null):
    """Page and gate, with one excess brought to either side of the registered minimum."""
    for excess, outcome in ((0.015, rules.FAIL), (levels.MIN_STABILITY_EXCESS + 0.005, rules.PASS)):
        found = results("transcoder")
        for pair in found["across"]["pairs"]:
            spread = pair["observed"]["mcc_alive"] - 0.4  # of seeds and pairs
            pair[null] = pair[null] | {score: pair["observed"][score] - excess - spread / 100}
        stress = TranscoderStress.model_validate(found)
        arms = stress.setting, stress.section, stress.transcoder, stress.across
        assert rules.transcoder(*arms).failing() == ([name] if outcome == rules.FAIL else [])
        assert page("transcoder", found) == status("transcoder", found) == outcome


def test_transcoders_matched_by_signed_cosines_alone_are_missing_evidence():
    def change(found: dict) -> None:
        for pair in found["across"]["pairs"]:
            for name in ("observed", *GATED_NULLS):
                pair[name] = {n: pair[name][n] for n in (*PAIRED, GAP)}
        scores = found["across"]["stability"]["scores"]
        found["across"]["stability"]["scores"] = {n: scores[n] for n in PAIRED}
        found["across"]["others"] = None

    found = results("transcoder", change)
    assert page("transcoder", found) == status("transcoder", found) == rules.MISSING


def test_each_gain_over_each_draw_is_asked():
    stress = RandomModelStress.model_validate(results("random_model"))
    shown = rules.random_model(stress.section, stress.random_models)
    assert shown.failing() == []
    assert len(shown.estimates) == 3 * 4

    def at_par(pair: dict, name: str) -> dict:
        """What was observed, and a null that lies as far below it as before."""
        return {n: v + 0.3 if n == "mcc_alive" else v for n, v in pair[name].items()}

    for changed, failing in (
        (("observed",), ["the score itself", "over isotropic", "over spectral", "over gaussian"]),
        (("observed", "gaussian"), ["the score itself", "over isotropic", "over spectral"]),
    ):
        found = results("random_model")
        for pair in found["random_models"][1]["pairs"]:
            pair |= {name: at_par(pair, name) for name in changed}
        stress = RandomModelStress.model_validate(found)
        shown = rules.random_model(stress.section, stress.random_models)
        assert shown.failing() == [f"draw 1, {name}" for name in failing]
    found = results("random_model")
    for pair in found["section"]["pairs"]:
        pair["gaussian"] = at_par(pair, "gaussian")
    stress = RandomModelStress.model_validate(found)
    failing = rules.random_model(stress.section, stress.random_models).failing()
    assert failing == [f"draw {draw}, over gaussian" for draw in (0, 1, 2)], "the score alone does not do"


@given(end=st.one_of(st.none(), st.floats()), threshold=st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_no_finite_end_satisfies_no_rule(end, threshold):
    for rule in (rules.STABILITY, rules.TRANSCODER, rules.OOD):
        held = rule.holds(end, threshold)
        assert isinstance(held, bool)
        if end is None or not math.isfinite(end):
            assert not held
        elif end != threshold:
            assert held == ((end < threshold) if rule.relation == "<=" else (end > threshold))
        else:
            assert held == (rule.relation != ">")


def test_without_an_interval_there_is_no_outcome():
    point = Estimate(0.5, None, None, None, 2, "", "at least 3 seeds are needed")
    with pytest.raises(rules.Missing):
        rules.checked(lambda: rules.STABILITY.shown({"spectral": point}, 2))
    with pytest.raises(rules.Missing):
        rules.checked(lambda: rules.STABILITY.shown({}, 5))


def test_a_fault_of_the_gates_own_code_is_no_missing_evidence(monkeypatch):
    def broken(*_):
        raise TypeError("a fault")

    monkeypatch.setattr(gate.rules, "stability", broken)
    with pytest.raises(TypeError):
        decide(bundle(), Thresholds(), {})


@pytest.mark.parametrize(
    ("delta", "told"),
    [
        ({"low": 0.01}, None),
        ({"low": -0.01}, r"(?!MISSING).*-0\.0100\b.*\b0"),
        ({"low": None, "reason": "why"}, "MISSING: why"),
        ({"low": 0.01, "n_seeds": 4}, r"MISSING: 4 seeds\b.*\b5\b"),
        ({"estimate": None, "reason": "unmatched"}, "MISSING: unmatched"),
    ],
)
def test_a_difference_on_cebench(delta, told):
    whole = {"estimate": 0.1, "low": 0.01, "n_seeds": 5, "reference_mean": 0.5, "reason": None} | delta
    found = rules.cebench_delta("cebench", whole, 0.0)
    assert found is None if told is None else re.match(told, found)
    assert "contrastive_local" in rules.cebench_delta("contrastive_local", whole, 0.0)
    if told is None:
        assert re.match(r"MISSING: .*\b0\.6\b", rules.cebench_delta("cebench", whole, 0.6))
