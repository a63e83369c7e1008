"""The wording of each kind of message, once: a better sentence changes one line here.

All other tests assert the kind (an exception's class, an exit code, a status), and the flag, the place or the value
that a message names.
"""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import processes
from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import baselines, sae_probes
from husai.evidence import rules
from husai.evidence.estimates import Estimate
from husai.evidence.schemas import Gain, Interval, PulledSection
from husai.release import claims, recompute
from husai.release.gate import Bundle, Thresholds, decide
from husai.report.verdict import Gate
from husai.runs import cli
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.runs.executor import run
from husai.runs.files import locked, read_json
from husai.runs.folder import Run
from husai.stability.compare import Dictionary
from husai.stability.independence import refuse_shared
from husai.subjects import pretrained


def refusal(function, *arguments, **options) -> str:
    with pytest.raises((BadInput, rules.Missing)) as refused:
        function(*arguments, **options)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_flags(capsys):
    parser = cli.Parser("")
    parser.prog = "run.py"
    parser.add_argument("--k", type=cli.positive_int)
    parser.add_argument("--seeds", type=cli.seed_list)
    for arguments, sentence in (
        (["--k", "0"], "argument --k: '0' is not a whole number of at least 1"),
        (["--seeds", "8,8"], "argument --seeds: '8,8' names 8 twice; each must be given once"),
        (["--sead", "1"], "unrecognized arguments: --sead 1"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert capsys.readouterr().err == f"error: {sentence} (see run.py --help)\n"


def test_an_interruption(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        cli.run_main(main)
    assert capsys.readouterr().err == "interrupted: the same command resumes\n"


def test_the_queue(tmp_path):
    command = ["env", "SEEDS=1,2", f"OUTPUT={tmp_path}", "bash", "scripts/experiments/run_b200_high_impact_queue.sh"]
    done = processes.run(command, check=False)
    assert done.stderr == "error: SEEDS=1,2: three different whole numbers or more expected, as 1,2,3\n"


def test_what_the_machine_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal(run, [], "ray") == "--executor ray: Ray is missing; pip install -r requirements-cluster.txt"

    def empty(*_, **__):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(torch, "empty", empty)
    assert refusal(cli.prepare, "cuda:7", 1) == "--device cuda:7: not available here (no such device)"


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders


def test_files(tmp_path):
    path = tmp_path / "x.json"
    assert refusal(read_json, path, "map") == f"map: {path} does not exist"
    path.write_text('{"a": NaN}')
    assert refusal(read_json, path, "map") == f"map: {path} is not readable as strict JSON (NaN is not strict JSON)"
    with locked(tmp_path / ".lock"):
        sentence = f"{tmp_path} is in use by another run (lock .lock); wait for it to end"
        assert refusal(locked(tmp_path / ".lock", wait=False).__enter__) == sentence
    sentence = f"--output-dir: {path}/out cannot be written (Not a directory)"
    assert refusal(Run(path / "out", {}, "cpu", 1).__enter__) == sentence


def test_cells(tmp_path, caplog):
    cells, artefact = Cells(tmp_path / "cells"), tmp_path / "weights"

    def compute():
        artefact.write_text("weights")
        return {}, [artefact]

    cells.get("cell", {}, compute)
    artefact.write_text("other")
    cells.get("cell", {}, compute)
    (path,) = (tmp_path / "cells").glob("*.json")
    why = "its artefact weights was changed after it was written; computing it again"
    assert caplog.messages == [f"cell {path.name}: {why}"]


def test_stores(make_store):
    folder = make_store(torch.randn(20, 4)).folder
    opened = f"activation store: {folder}"
    sentence = f"{opened} was harvested from hook hook; other expected"
    assert refusal(ActivationStore.open, folder, hook_name="other") == sentence
    shard = folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    sentence = f"activation store: {shard} is missing or truncated; {len(whole)} bytes expected"
    assert refusal(ActivationStore.open, folder) == sentence
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = "is not the file that the manifest names (sha256 differs); delete the folder to have it made again"
    assert refusal(ActivationStore.open, folder) == f"activation store: {shard} {found}"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"d_in": "wide"}))
    why = "d_in: Input should be a valid integer, unable to parse string as an integer"
    assert refusal(ActivationStore.open, folder) == f"{opened}/manifest.json: {why}"


def test_checkpoints(tmp_path):
    tensors = {"W_enc": torch.eye(4), "b_enc": torch.zeros(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)}
    checkpoints.save(SAE(tensors, "standard"), tmp_path)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    save_file(tensors | {"b_dec": torch.full((4,), torch.nan)}, weights)
    assert refusal(checkpoints.load, tmp_path) == f"checkpoint: {weights} holds NaN or infinite weights"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"whitening": 0.1}))
    sentence = f"checkpoint: {config}: whitening (0.1) is not known; it may change what the SAE computes or how its "
    sentence += "activations were made; remove it from the file if it changes neither"
    assert refusal(checkpoints.load, tmp_path) == sentence


# ---------------------------------------------------------------------------------------------------------------------
# Names and numbers that do not fit


def test_names(tmp_path, monkeypatch):
    assert refusal(sae_probes.check_data_sets, ["95_toxic_is"] * 2) == "--dataset-names: 95_toxic_is is named twice"
    path = tmp_path / "map.json"
    path.write_text('{"default": "none.json"}')
    sentence = f"baseline map: {path}: 'default' names none.json, which does not exist"
    assert refusal(baselines.lookup, path, "blocks.1.hook_resid_pre") == sentence
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    sentence = (
        "subject gpt2: gpt2 could not be downloaded (LocalEntryNotFoundError); husai-tiny, which the repository ships, "
        "or a local Hugging Face folder work without a network"
    )
    assert refusal(pretrained.load, "gpt2") == sentence


def test_saes_that_are_not_independent():
    alive = torch.ones(5, dtype=torch.bool)
    dictionary = Dictionary(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)), alive)
    sentence = "a and b share their decoder: independently trained SAEs expected"
    assert refusal(refuse_shared, ["a", "b"], [dictionary, dictionary]) == sentence
    sentence = "1 SAE given: stability needs at least 2, and 5 for a verdict"
    assert refusal(refuse_shared, ["a"], [dictionary]) == sentence


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts, the audit, the report


def test_rules():
    assert refusal(rules.enough_seeds, 4) == "4 seeds; a verdict needs 5"
    delta = {"estimate": 0.1, "low": -0.01, "n_seeds": 5, "reference_mean": 0.5, "reason": None}
    assert rules.cebench_delta("cebench", delta, 0.0) == "lower bound -0.0100; above 0 expected"
    sentence = "MISSING: refused: no SAE can reach 0.6 above a reference of 0.500 of 1"
    assert rules.cebench_delta("cebench", delta, 0.6) == sentence
    each = Interval.of(Estimate(0.5, 0.0, 1.0, 0.1, 4, ""))
    gain = Gain(observed=each, isotropic=each, spectral=each, gaussian=each, least="spectral")
    kept = Interval.of(Estimate(0.0, 0.0, 0.0, 0.0, 4, ""))
    arm = PulledSection.model_construct(weight=0.1, gain=gain, ev_drop=kept)
    found = rules.acceptance([arm], gain, each, 4, 0.1)
    sentence = "4 seeds; 5 needed; the gain is not shown to be above 0; the explained variance is not shown to be kept"
    assert found.reason == sentence


def test_the_gate_without_evidence():
    decision = decide(Bundle(dict.fromkeys(("phase4a",)), {}), Thresholds(), {})
    reasons = {g["gate"]: g["reason"] for g in decision["gates"]}
    assert reasons["positive_control"] == "no results of run_phase4a_reproduction.py were given"


def test_the_audit():
    assert list(recompute.differences({"low": 0.1}, {"low": 0.2}, "/gain")) == ["/gain/low is 0.1, computed again 0.2"]
    assert claims.unclaimed(claims.LOG, "It is 0.5.", []) == ["line 1: 0.5 is no figure of a claim"]
    figure = claims.Figure(text="0.5", pointer="/a")
    assert claims.figure_problem(figure, {"a": 0.7}) == "'0.5' printed, 0.7 at /a"


def test_the_report():
    gate = {"gate": "ood", "status": "FAIL", "low": -0.01, "bound": "low", "relation": ">", "threshold": 0.0}
    assert (
        Gate(**gate).by_how_much
        == "The lower end of the interval is −0.0100. It must be above 0, and misses the bound by 0.0100."
    )
    assert (
        Gate(**gate | {"low": 0.01}).by_how_much
        == "The lower end of the interval is 0.0100. It must be above 0, and clears the bound by 0.0100."
    )
    assert Gate(**gate).power is None
    known = gate | {"passes_at_no_effect": 0.0125, "effect_for_80": 0.05, "without_one_seed": [-0.02, 0.03]}
    sentence = (
        "If there were no effect, 1.25 % of such studies would pass. If the true figure were 0.0500, 80 % would. "
        "Without one of the SAEs the figure is −0.0200 to 0.0300."
    )
    assert Gate(**known).power == sentence
