"""Published evidence against the schemas of its phases: what is read is written again."""

import json

import pytest
from pydantic import ValidationError

from conftest import ROOT
from husai.evidence.schemas import Bank, Phase4aSupplied, Selection, read_evaluation, refusal
from husai.release.recompute import EARLIER_RULES, PHASES

EVIDENCE = ROOT / "docs" / "evidence"
QUEUE = EVIDENCE / "embedded_queue"
TODAY = sorted(p for p in EVIDENCE.rglob("results.json") if EARLIER_RULES not in p.parts)
STUDIES = ("architecture_frontier", "external_metric_scaling")
OTHER_ORDER = EVIDENCE / "phase4e_cebench_matched200"
"""Published before `noise` had the order of its fields."""


def written_again(results: dict) -> dict | None:
    """JSON of the schema that these results make; None: their phase has none."""
    phase = results["phase"]
    if phase in PHASES:
        return PHASES[phase][0].model_validate(results).to_json()
    if phase == "candidate_confirmation":
        return read_evaluation(results).to_json()
    if phase == "candidate_selection":
        return Selection.model_validate(results).to_json()
    if phase in STUDIES:
        return results | {"banks": [Bank.model_validate(bank).to_json() for bank in results["banks"]]}
    return None


@pytest.mark.parametrize("path", TODAY, ids=lambda p: str(p.parent.name))
def test_published_results_keep_their_bytes(path):
    text = path.read_text()
    results = json.loads(text)
    again = written_again(results)
    assert again in (None, results)
    assert again is None or path.parent == OTHER_ORDER or json.dumps(again, indent=2) + "\n" == text


def test_every_phase_with_a_schema_is_published():
    published = {json.loads(path.read_text())["phase"] for path in TODAY}
    assert PHASES.keys() <= published


def results_of(name: str) -> dict:
    return json.loads((QUEUE / name / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("core_ablations", lambda r: r["rows"][0].update(histograms={})),
        ("core_ablations", lambda r: r["methods"][0]["members"][0].update(label="seed1")),
        ("core_ablations", lambda r: r["methods"][0].update(gain=r["methods"][1]["gain"])),
        ("core_ablations", lambda r: r["methods"][0].update(ev_drop=r["methods"][1]["ev_drop"])),
        ("core_ablations", lambda r: r["methods"][1].pop("gain")),
        ("adaptive_l0_calibration", lambda r: r["confirmation"].pop()),
        ("adaptive_l0_calibration", lambda r: r["confirmation"].reverse()),
        ("adaptive_l0_calibration", lambda r: r.update(chosen_k=r["control_k"], confirmation=r["confirmation"][1:])),
        ("adaptive_l0_calibration", lambda r: r.update(chosen_k=None, confirmation=[])),
        ("adaptive_l0_calibration", lambda r: r.update(gain=None)),
        ("adaptive_l0_calibration", lambda r: r["gain"].update(least="untrained")),
        ("adaptive_l0_calibration", lambda r: r["selection"][0]["stability"]["verdict"].pop("claimable_excess")),
        ("assignment_consistency_v2", lambda r: r["own"][0].pop("lambda")),
        ("assignment_consistency_v2", lambda r: r["own"][0].update(weight=r["own"][0].pop("lambda"))),
        ("random_model_stress", lambda r: r["section"]["members"][0].pop("seed")),
        ("assignment_consistency_v2", lambda r: r["confirmation"].pop()),
        ("assignment_consistency_v2", lambda r: r["own"][0]["ev_drop"].update(low=1.0)),
        ("phase4a_trained_vs_random", lambda r: r["husai"]["members"][0].pop("curve")),
        ("phase4a_language_model", lambda r: r["husai"]["cross_entropy"].update(model="3.5")),
    ],
)
def test_what_no_phase_writes_is_refused(name, change):
    results = results_of(name)
    change(results)
    with pytest.raises(ValidationError):
        written_again(results)


def test_damage_is_named_where_it_lies():
    results = results_of("assignment_consistency_v2")
    results["confirmation"][1]["ev_drop"]["low"] = 1.0
    with pytest.raises(ValidationError) as refused:
        PHASES[results["phase"]][0].model_validate(results)
    assert refusal(refused.value).startswith("confirmation.1.pulled.ev_drop: ")


def test_a_field_that_would_not_be_written_is_refused():
    with pytest.raises(TypeError, match="more"):
        type("More", (Phase4aSupplied,), {"__annotations__": {"more": int}})
