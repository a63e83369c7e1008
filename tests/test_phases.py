"""The internal phases as a user runs them, at tiny sizes: what they compute, repeats, interruptions, bad input."""

import json
import re
import shutil
import sys
import time
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

import processes
from conftest import ROOT, call_script, run_without_torch
from husai.evidence import contrast
from husai.evidence.schemas import AdaptiveL0
from husai.release import recompute

ABLATIONS = "scripts/experiments/run_core_ablations.py"
ADAPTIVE = "scripts/experiments/run_adaptive_l0_calibration.py"
ASSIGNMENT = "scripts/experiments/run_assignment_consistency_v2.py"
TINY = ["--tokens", "4000", "--batch-size", "128", "--null-draws", "5", "--threads", "1", "--seeds", "1,2,3"]
FRESH = ["--confirmation-seeds", "11,12,13"]
OWN = {
    ABLATIONS: ["--d-sae", "24", "--k", "3", "--ks", "3,6", "--d-saes", "8,24"],
    ADAPTIVE: ["--d-sae", "24", "--k-candidates", "2,3", "--control-k", "6", "--ev-floor", "0.01", *FRESH],
    ASSIGNMENT: [
        *("--d-sae", "24", "--k", "3", "--lambdas", "0,0.1", "--reference-seeds", "21,22,23", *FRESH),
        *("--confirmation-reference-seeds", "31,32,33", "--shared-references", "2", "--max-ev-drop", "0.9"),
    ],
}


@pytest.fixture(scope="module")
def finished(small_subject, tmp_path_factory):
    """`finished(script)` -> (command, its finished output folder), run once."""
    root, subject = small_subject
    done = {}

    def run(script):
        if script not in done:
            out = tmp_path_factory.mktemp("phase")
            command = [sys.executable, script, "--subject", subject, "--artifact-root", root, *TINY, *OWN[script]]
            command = [str(c) for c in command]
            assert call_script(*command[1:], "--output-dir", out) == 0
            done[script] = command, out
        return done[script]

    return run


def matched(a, b):
    """mcc by scipy on the whole matrix."""
    unit = [w / np.linalg.norm(w, axis=1, keepdims=True) for w in (a, b)]
    cosines = np.maximum(unit[0] @ unit[1].T, 0)
    return cosines[linear_sum_assignment(-cosines)].mean()


@pytest.mark.slow
@pytest.mark.parametrize("script", OWN)
def test_a_repeat_gives_the_same_bytes_without_torch(finished, script):
    command, out = finished(script)
    before = (out / "results.json").read_bytes()
    run_without_torch(*command[1:], "--output-dir", out)
    assert (out / "results.json").read_bytes() == before
    assert str(ROOT) not in before.decode(), "no path of this machine"
    assert list((out / "figures").glob("*.png"))
    assert json.loads((out / "manifest.json").read_text())["inputs"] == json.loads(before)["inputs"]


def more(results, *path, by=1e-6):
    """Add to the number at a path."""
    *way, last = path
    for step in way:
        results = results[step]
    results[last] += by


@pytest.mark.parametrize(
    ("script", "change", "place"),
    [
        (ABLATIONS, lambda r: more(r, "methods", 1, "gain", "spectral", "low"), "/methods/1/gain/spectral/low "),
        (ABLATIONS, lambda r: more(r, "rows", 0, "explained_variance", "estimate"), "/rows/0/explained_variance"),
        (ABLATIONS, lambda r: more(r, "rows", 0, "members", 0, "heldout", "l0"), "/rows/0/l0/estimate "),
        (ABLATIONS, lambda r: r["rows"][0]["convergence"].update(converged=None), "/rows/0/convergence/converged "),
        (ABLATIONS, lambda r: r["rows"][0]["convergence"].update(converged="yes"), "the phase's results are not what"),
        (ADAPTIVE, lambda r: r.update(chosen_k=6), "the phase's results are not what"),
        (ADAPTIVE, lambda r: r.update(outcome="better"), "/outcome "),
        (ADAPTIVE, lambda r: more(r, "selection", 0, "lower_bound"), "/selection/0/lower_bound "),
        (ADAPTIVE, lambda r: more(r, "ev_drop", "high"), "/ev_drop/high "),
        (ASSIGNMENT, lambda r: r["acceptance"].update(accepted=True), "/acceptance/accepted "),
        (ASSIGNMENT, lambda r: more(r, "own", 0, "gain", "observed", "estimate"), "/own/0/gain/observed/estimate "),
        (ASSIGNMENT, lambda r: r["shared"][0].update(leave_one_reference_out=[]), "/shared/0/leave_one_reference_out"),
        (ASSIGNMENT, lambda r: more(r, "confirmation", 1, "ev_drop", "estimate"), "/confirmation/1/ev_drop/estimate"),
    ],
)
def test_what_a_phase_decided_is_decided_again_by_the_audit(finished, script, change, place):
    results = json.loads((finished(script)[1] / "results.json").read_text())
    assert recompute.phase_problems(results) == []
    assert [p for at, s in recompute.studies(results) for p in recompute.study_problems(s)] == []
    change(results)
    assert any(p.startswith(place) for p in recompute.phase_problems(results)), recompute.phase_problems(results)


@pytest.mark.nightly  # the chaos tests kill these phases in the queue
@pytest.mark.parametrize("script", OWN)
def test_killed_midway_it_resumes_to_the_same_bytes(finished, script, tmp_path):
    command, reference = finished(script)
    for seconds in (5, 7):
        process = processes.start([*command, "--output-dir", str(tmp_path)])
        time.sleep(seconds)
        processes.kill(process)
    processes.run([*command, "--output-dir", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == (reference / "results.json").read_bytes()


def test_ablations_score_rows_of_the_decoder_whatever_its_shape(finished):
    """d_sae 8 below d_in 16: scored by rows. By columns, as the earlier study did, the figure is another."""
    _, out = finished(ABLATIONS)
    results = json.loads((out / "results.json").read_text())
    assert results["d_in"] == 16
    assert 1 <= results["effective_rank"] <= 16
    (narrow,) = [r for r in results["rows"] if r["d_sae"] == 8]
    decoders = []
    for m in narrow["members"]:
        W_dec = load_file(out / m["checkpoint"] / "sae_weights.safetensors")["W_dec"].numpy().astype(float)
        assert W_dec.shape == (8, 16)
        decoders.append(W_dec[load_file(out / m["checkpoint"] / "sparsity.safetensors")["sparsity"].numpy() > -9])
    by_rows, by_columns = (
        np.mean([matched(a, b) for a, b in combinations(ws, 2)]) for ws in (decoders, [w.T for w in decoders])
    )
    found = narrow["stability"]["scores"]["mcc_alive"]["observed"]["estimate"]
    assert found == pytest.approx(by_rows, abs=1e-6)
    assert abs(found - by_columns) > 0.05


def test_ablations_hold_axes_methods_and_refused_controls(finished):
    _, out = finished(ABLATIONS)
    results = json.loads((out / "results.json").read_text())
    assert [(r["d_sae"], r["k"], r["axes"]) for r in results["rows"]] == [
        (24, 3, ["k", "d_sae"]),
        (24, 6, ["k"]),
        (8, 3, ["d_sae"]),
    ]
    assert [c["refused"] is not None for c in results["controls"]] == [True, True]
    assert "initialisation" in results["controls"][0]["refused"]
    assert "decoder" in results["controls"][1]["refused"]
    base, untied = results["methods"][:2]
    assert "gain" not in base
    for null in ("isotropic", "spectral"):
        by_hand = [
            np.mean([p["observed"]["mcc_alive"] - p[null]["mcc_alive"] for p in s["pairs"]]) for s in (untied, base)
        ]
        assert untied["gain"][null]["estimate"] == pytest.approx(by_hand[0] - by_hand[1])
    seen = {m["checkpoint_sha256"] for r in [*results["rows"], *results["methods"]] for m in r["members"]}
    assert seen <= set(results["inputs"].values())
    for r in results["rows"]:
        moved = r["convergence"]
        assert moved["converged"] == (moved["moved"]["low"] >= -0.02 and moved["moved"]["high"] <= 0.02)


def test_a_frozen_decoder_stays_and_untied_encoders_start_apart(make_store, planted, tmp_path):
    from dataclasses import replace

    from husai.training.grid import members
    from husai.training.trainer import TrainingConfig, train

    store, config = make_store(planted[0]), TrainingConfig(tokens=2000, batch_size=100, snapshots=3)
    grid = members([1, 2], [24], [3], [3e-3])
    frozen, _ = train(store, grid, replace(config, freeze_decoder=True), torch.device("cpu"), tmp_path / "s")
    for t in frozen:
        torch.testing.assert_close(t.decoders[0], t.decoders[-1])
        assert not torch.allclose(t.sae.W_enc.T, t.sae.W_dec, atol=0.01), "its encoder has learned"
    still = replace(config, tokens=1, batch_size=1, warmup_fraction=0, snapshots=2)
    for tied in (True, False):
        grid = members([1, 2], [24], [3], [1e-9])
        (first, _), _ = train(store, grid, replace(still, tied_init=tied), torch.device("cpu"), tmp_path / "s")
        cosines = torch.nn.functional.cosine_similarity(first.sae.W_enc.T, first.sae.W_dec)
        assert (cosines.min() > 0.999) == tied
        torch.testing.assert_close(first.sae.W_enc.norm(dim=0), torch.ones(24), rtol=1e-4, atol=1e-4)


def test_adaptive_chooses_the_surest_and_confirms_on_fresh_seeds(finished):
    _, out = finished(ADAPTIVE)
    results = json.loads((out / "results.json").read_text())
    found = AdaptiveL0.model_validate(results)
    ends = {s.k: contrast.lower_bound(s) for s in found.selection}
    assert results["chosen_k"] == max(ends, key=lambda k: (ends[k], -k))
    assert [s["k"] for s in results["confirmation"]] == [results["chosen_k"], 6]
    for s in results["confirmation"]:
        assert s["stability"]["labels"] == ["seed11", "seed12", "seed13"]
    assert results["outcome"] == "MISSING", "three seeds are never enough"
    assert found.gain == contrast.gain(*([s] for s in found.confirmation))


def test_adaptive_without_a_candidate_above_the_floor_says_so_and_exits_1(finished, run_script, tmp_path):
    command, _ = finished(ADAPTIVE)
    code, _, err = run_script(*command[1:], "--ev-floor", "0.9999", "--output-dir", tmp_path)
    assert code == 1
    assert "0.9999" in err.splitlines()[-1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chosen_k"] is None
    assert results["confirmation"] == []
    assert json.loads((tmp_path / "manifest.json").read_text())["return_code"] == 1


def test_adaptive_runs_the_control_alone(finished, run_script, tmp_path):
    command, _ = finished(ADAPTIVE)
    assert run_script(*command[1:], "--k-candidates", "6", "--output-dir", tmp_path)[0] == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["chosen_k"], results["gain"]) == (6, None)
    assert len(results["confirmation"]) == 1
    assert "control" in results["outcome"]


def test_assignment_never_scores_a_reference(finished):
    _, out = finished(ASSIGNMENT)
    results = json.loads((out / "results.json").read_text())
    references = {v for k, v in results["inputs"].items() if k.startswith("reference ")}
    assert len(references) == 6
    sections = [results["control"], *results["own"], *results["confirmation"]]
    sections += [r for a in results["shared"] for r in a["references"]]
    for s in sections:
        assert not {m["checkpoint_sha256"] for m in s["members"]} & references
    own, fresh = results["own"][0]["members"], results["confirmation"][1]["members"]
    assert len({m["reference"] for m in own}) == len({m["reference"] for m in fresh}) == 3
    assert not {m["reference"] for m in own} & {m["reference"] for m in fresh}
    for r in results["shared"][0]["references"]:
        assert {m["reference"] for m in r["members"]} == {r["sha256"]}
    assert len(results["shared"][0]["leave_one_reference_out"]) == 2
    assert not results["acceptance"]["accepted"], "three seeds are never enough"
    assert re.search(r"\b3 seeds\b.*\b5\b", results["acceptance"]["reason"])


def test_assignment_fails_on_request(finished, run_script):
    command, out = finished(ASSIGNMENT)
    code, _, err = run_script(*command[1:], "--output-dir", out, "--fail-on-acceptance-fail")
    assert code == 1
    assert re.search(r"^error: .*\b3 seeds\b.*\b5\b", err, re.M)


def test_assignment_takes_a_reference_and_refuses_a_misfit(finished, refused, run_script, make_store, tmp_path):
    command, out = finished(ASSIGNMENT)
    results = json.loads((out / "results.json").read_text())
    checkpoint = out / results["control"]["members"][0]["checkpoint"]
    own = command[2:]
    refused(
        [checkpoint, "24", "20"],
        ASSIGNMENT,
        *own,
        "--d-sae",
        "20",
        "--reference",
        checkpoint,
        "--output-dir",
        tmp_path,
    )
    other = make_store(torch.randn(600, 16), hook_name="blocks.0.hook_resid_post")
    arguments = [c for i, c in enumerate(own) if "--subject" not in (c, own[i - 1])]
    arguments += ["--activation-cache-dir", other.folder, "--reference", checkpoint, "--output-dir", tmp_path]
    refused([checkpoint, "subject"], ASSIGNMENT, *arguments)
    refused([checkpoint, "seed 1"], ASSIGNMENT, *own, "--reference", checkpoint, "--output-dir", tmp_path)
    copy = tmp_path / "copy"
    trained = next(out.glob("checkpoints/*/*_seed21"))
    shutil.copytree(trained, copy)
    assert run_script(*command[1:], "--reference", copy, "--output-dir", tmp_path / "out")[0] == 0
    shared = json.loads((tmp_path / "out" / "results.json").read_text())["shared"][0]
    assert len(shared["references"]) == 1
    assert shared["leave_one_reference_out"] == []


def test_a_pull_towards_a_reference_pulls(make_store, planted, tmp_path):
    """By the formula: the loss's gradient is that of λ (1 − mean |cos|), and members end nearer to their reference."""
    from dataclasses import replace

    from husai.stability.matching import partners
    from husai.stability.scores import mcc
    from husai.training.consistency import Consistency, References
    from husai.training.grid import members
    from husai.training.trainer import TrainingConfig, train

    g = torch.Generator().manual_seed(0)
    reference = torch.randn(24, 16, generator=g)
    W = torch.randn(1, 24, 16, generator=g, dtype=torch.float64, requires_grad=True)
    references = References({"r": reference}, partners, every=5)
    pull = Consistency(["r"], [0.3], references, W.detach())
    pull.assign(W.detach())
    cosines = np.abs(
        torch.nn.functional.normalize(W[0].detach(), dim=1).numpy()
        @ torch.nn.functional.normalize(reference, dim=1).double().numpy().T
    )
    rows, columns = linear_sum_assignment(-cosines)
    assert pull.loss(W).item() == pytest.approx(0.3 * (1 - cosines[rows, columns].mean()), abs=1e-6)
    partner = torch.nn.functional.normalize(reference[torch.from_numpy(columns)].double(), dim=1)
    by_hand = W.detach().clone().requires_grad_()
    (0.3 * (1 - torch.nn.functional.cosine_similarity(by_hand[0], partner).abs().mean())).backward()
    pull.loss(W).sum().backward()
    torch.testing.assert_close(W.grad, by_hand.grad, rtol=1e-5, atol=1e-8)

    store, config = make_store(planted[0]), TrainingConfig(tokens=20_000, batch_size=100)
    plain = members([1], [24], [3], [3e-3])
    grid = plain + [replace(plain[0], assignment_weight=w, reference="r") for w in (0.05, 0.5)]
    trained, _ = train(store, grid, config, torch.device("cpu"), tmp_path / "s", references=references)
    near = [mcc(t.sae.W_dec, reference) for t in trained]
    assert near[0] < near[1] < near[2]


def test_an_interrupted_pull_resumes_bit_identically(make_store, planted, tmp_path, monkeypatch):
    from dataclasses import replace

    import husai.training.trainer as trainer
    from husai.stability.matching import partners
    from husai.training.consistency import References
    from husai.training.grid import members
    from husai.training.trainer import TrainingConfig, train

    references = References({"r": torch.randn(24, 16, generator=torch.Generator().manual_seed(0))}, partners, every=7)
    grid = [replace(m, assignment_weight=0.1, reference="r") for m in members([1, 2], [24], [3], [3e-3])]
    store, config = make_store(planted[0]), TrainingConfig(tokens=3000, batch_size=100)

    def run():
        return train(store, grid, config, torch.device("cpu"), tmp_path / "s", 0.0, references=references)[0]

    whole, save = run(), trainer._save

    def interrupt(*arguments):
        """After the first step, whose partners hold until the eighth."""
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(trainer, "_save", save)
    resumed = run()
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.sae.W_dec, b.sae.W_dec)
        assert torch.equal(a.sae.W_enc, b.sae.W_enc)


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        (ABLATIONS, ["--ks", "300"], ["k 300", "256"]),
        (ABLATIONS, ["--d-saes", "4"], ["k 8", "d_sae 4"]),
        (ABLATIONS, ["--d-saes", "0"], ["--d-saes: ", "'0'"]),
        (ABLATIONS, ["--ks", ""], ["--ks: ", "''"]),
        (ABLATIONS, ["--architectures", "vq"], ["'vq'", "topk"]),
        (ABLATIONS, ["--seeds", "1"], ["--seeds 1: ", "5"]),
        (ADAPTIVE, ["--k-candidates", "8,512"], ["k 512", "--d-sae 256"]),
        (ADAPTIVE, ["--confirmation-seeds", "42,2,3"], ["--seeds", "--confirmation-seeds", "42"]),
        (ADAPTIVE, ["--ev-floor", "1.5"], ["--ev-floor: ", "'1.5'"]),
        (ADAPTIVE, ["--seeds", "1,2"], ["--seeds: ", "3"]),
        (ABLATIONS, ["--k", "9", "--d-sae", "16", "--ks", "8", "--d-saes", "16"], ["--d-sae", "--no-methods"]),
        (ABLATIONS, ["--architectures", "transcoder"], ["--architectures: ", "transcoders"]),
        (ASSIGNMENT, ["--lambdas", "0.1,0.2"], ["--lambdas: 0,"]),
        (ASSIGNMENT, ["--lambdas", "0,-1"], ["--lambdas: ", "'-1'"]),
        (ASSIGNMENT, ["--reference-seeds", "1,2,3"], ["--reference-seeds: ", "--seeds"]),
        (ASSIGNMENT, ["--reference-seeds", "42,1,2,3,4"], ["--seeds", "--reference-seeds", "42"]),
        (ASSIGNMENT, ["--shared-references", "9"], ["--shared-references 9: ", "5"]),
    ],
)
def test_bad_arguments(refused, script, arguments, named, tmp_path):
    refused(named, script, *arguments, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize("script", OWN)
def test_stores_that_do_not_fit_are_refused(refused, script, small_activations, tmp_path):
    out = ["--output-dir", tmp_path / "out"]
    refused(tmp_path / "none", script, "--activation-cache-dir", tmp_path / "none", *out)
    hook = ["--hook-name", "blocks.0.hook_mlp_out"]
    refused(
        [small_activations, "blocks.0.hook_resid_post", hook[1]],
        script,
        "--activation-cache-dir",
        small_activations,
        *hook,
        *out,
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(small_activations, damaged)
    shard = next(damaged.glob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    refused(shard, script, "--activation-cache-dir", damaged, *out)
