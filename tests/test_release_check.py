"""SAEs that a user brings, from the command line to the page: what is judged, what is refused, what goes on.

The subject is a miniature; all parts but the gate run in this process, where the corpus is a small one."""

import json
import re
import runpy
import shutil
import sys
from argparse import Namespace
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import imitations
from conftest import ROOT
from husai.activations import source
from husai.dictionaries import checkpoints
from husai.dictionaries.sae import SAE
from husai.evals import loaded, supplied
from husai.evals.inputs import by_named_checkpoint
from husai.evals.loaded import read_facts
from husai.evidence import data_sets
from husai.evidence.schemas import OODStress, RandomModelStress, Supplied, TranscoderStress
from husai.release import gate, recompute
from husai.report.card import SUPPLIED
from husai.runs.cells import Cells
from husai.runs.checkpoints import write_place
from husai.runs.errors import BadInput
from husai.runs.files import sha256_file
from husai.runs.folder import Run
from husai.subjects.sources import TextSource
from husai.training.grid import SNAPSHOTS, members, train_or_find
from husai.training.trainer import TrainingConfig
from miniature import few_documents, save_miniature

CHECK = "scripts/experiments/run_release_check.py"
TRAIN = "scripts/experiments/train_husai_sae_on_cached_activations.py"
CONFIRMATION = "scripts/experiments/run_candidate_confirmation.py"
HOOK, HOOK_0, CPU = "blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre", torch.device("cpu")
PHASE4A = ROOT / "docs" / "evidence" / "embedded_queue" / "phase4a_trained_vs_random" / "results.json"
SIZES = ["--rows", 1000, "--null-draws", 100, "--max-rows", 24, "--contexts", 4, "--threads", 1]
SIZES += ["--dataset-names", "87_glue_cola", "--phase4a-results", PHASE4A]


@pytest.fixture(scope="module", autouse=True)
def few():
    with few_documents() as corpus, pytest.MonkeyPatch.context() as patch:
        patch.setitem(data_sets.FAMILIES["ood"], "shifted", ["66_living-room_OOD"])
        patch.setattr(supplied, "NOISE_SEEDS", (43,))
        patch.setattr(supplied, "KS", [5])
        yield corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def subject(root, few):
    return save_miniature(root / "miniature", few.train)


@pytest.fixture(scope="module")
def trained(root, subject):
    """`trained(name, seeds, d_sae, random_seed)` -> folders of TopK SAEs."""

    def train(name, seeds=(1, 2, 3, 4, 5), d_sae=24, random_seed=None):
        store = source.open_store(root, CPU, 1, subject=subject, hook_name=HOOK, rows=3000, random_seed=random_seed)
        grid, recipe = members([*seeds], [d_sae], [3], [3e-3]), TrainingConfig(tokens=4000, batch_size=128)
        saes = train_or_find(Cells(root / name / "cells"), store, grid, recipe, CPU, 1).members
        return [root / name / m.checkpoint for m in saes]

    return train


@pytest.fixture(scope="module")
def saes(trained):
    return trained("saes")


@pytest.fixture(scope="module")
def controls(trained):
    return trained("control", random_seed=0)


@pytest.fixture(scope="module")
def foreign(saes, root):
    """The same weights as dictionary_learning writes them: nothing says how they were trained, or by which seed."""
    folders = []
    for i, folder in enumerate(saes):
        sae = checkpoints.load(folder)
        folders.append(save_foreign(sae, root / "foreign" / f"sae{i}"))
    return folders


def save_foreign(sae, folder):
    w = {"encoder.weight": sae.weights["W_enc"].T, "encoder.bias": sae.weights["b_enc"], "decoder.weight": sae.W_dec.T}
    folder.mkdir(parents=True)
    torch.save(w | {"b_dec": sae.weights["b_dec"], "k": torch.tensor(3)}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "lm_name": "miniature", "submodule_name": HOOK, "k": 3}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.fixture
def check(run_script, monkeypatch, root, subject):
    """`check(name, saes, *arguments, failing)` -> (exit code, results, what was said), in `root/name`."""
    alone, started = Run.command, []

    def command(run, name, words, title=None):
        started.append(name)
        if name in check.failing:
            return alone(run, name, [sys.executable, "-c", "print('error: no room'); raise SystemExit(1)"])
        if name == "release_gate":
            return alone(run, name, words)
        log = run.folder / "logs" / f"{name}.log"
        monkeypatch.setattr(sys, "argv", words[1:])
        with (
            open(log, "w") as output,
            redirect_stdout(output),
            redirect_stderr(output),
            pytest.raises(SystemExit) as stopped,
        ):
            runpy.run_path(words[1], run_name="__main__")
        run.commands.append({"command": name, "return_code": stopped.value.code or 0, "seconds": 1.0})
        run.commands[-1]["log"] = str(log.relative_to(run.folder))
        return stopped.value.code or 0

    monkeypatch.setattr(Run, "command", command)

    def check(name, saes, *arguments, failing=()):
        check.failing = failing
        started.clear()
        where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", root, "--output-dir", root / name]
        code, out, err = run_script(CHECK, "--checkpoint", *saes, *where, *SIZES, *arguments)
        results = root / name / "results.json"
        return code, json.loads(results.read_text()) if results.is_file() else None, out + err

    check.started = started
    return check


def part(root, name, phase):
    return json.loads((root / name / "parts" / phase / "results.json").read_text())


def of(results, name):
    return next(p for p in results["parts"] if p["name"] == name)


def gates(results):
    return {g["gate"]: g for g in results["decision"]["gates"]}


def all_saes(root):
    """Trained SAEs below a folder, without copies for benchmarks."""
    return set(root.rglob("checkpoints/*/*/sae_weights.safetensors"))


def counted(said):
    return int(re.search(r"^(\d+) SAEs, about", said, re.M)[1])


def test_a_dry_run_trains_nothing(check, refused, root, saes, foreign):
    before = all_saes(root)
    code, results, said = check("dry", saes[:3], "--dry-run")
    assert (code, results, check.started) == (0, None, []), said
    assert all_saes(root) == before
    gaussian, random_weights, transcoders = 2 + 3, 3, 2
    assert counted(said) == 3 * (gaussian + random_weights + transcoders)
    assert re.search(r"^MISSING: .*\b3 SAEs\b", said, re.M)
    code, _, said = check("dry", foreign, "--dry-run")
    assert (code, counted(said)) == (0, 5), "HUSAI does not know how to train more alike"
    assert re.search(r"^MISSING: transcoder: ", said, re.M)
    code, _, said = check("dry", saes, "--dry-run", "--reference", *saes)
    assert re.search(r"^MISSING: saebench, cebench: .*--reference", said, re.M), said
    refused(f"--checkpoint: {saes[0]} is named twice", CHECK, "--checkpoint", saes[0], saes[0], saes[1])


@pytest.mark.nightly  # five SAEs of another library take the same way in CI
def test_three_saes_from_the_command_line_to_the_page(check, root, saes):
    saes = saes[:3]
    to_train, there = counted(check("own", saes, "--dry-run")[2]), all_saes(root)
    code, results, said = check("own", saes)
    assert code == 0, said
    assert len(all_saes(root) - there) == to_train
    assert [p["name"] for p in results["parts"]] == check.started
    assert check.started[:4] == ["candidate_confirmation", "random_model_stress", "transcoder_stress", "ood_stress"]
    assert {p["reason"] for p in results["parts"]} == {None}
    assert str(root / "own" / "report.html") in said
    page = (root / "own" / "report.html").read_text()
    assert SUPPLIED[0] in page
    assert "cannot see how you selected these SAEs" in page

    confirmed = part(root, "own", "candidate_confirmation")
    Supplied.model_validate(confirmed)
    assert recompute.results_problems(confirmed) == []
    assert list(confirmed["candidate"]["checkpoints"]) == ["1", "2", "3"]
    assert set(confirmed["untrained"]) == {"1", "2", "3"}
    assert not set(confirmed["section"]["stability"]["missing_nulls"]) & {"untrained", "spectral", "isotropic"}
    for seed, path in confirmed["paths"].items():
        weights = root / "own" / "parts" / "candidate_confirmation" / path / "sae_weights.safetensors"
        assert sha256_file(weights) == confirmed["candidate"]["checkpoints"][seed]
    for phase, model in zip(check.started[1:4], (RandomModelStress, TranscoderStress, OODStress), strict=True):
        stress = part(root, "own", phase)
        model.model_validate(stress)
        assert stress["candidate"] == confirmed["candidate"]
    assert str(root) not in json.dumps({**confirmed, "subject": None, "bank": confirmed["bank"] | {"cebench": None}})

    decision = part(root, "own", "release_gate")
    assert (decision["pass_all"], decision["provisional"], decision["outcome"]) == (False, True, "not passed")
    assert gates(results)["positive_control"]["status"] == "PASS"
    assert re.search(r"\b3 seeds\b.*\b5\b", gates(results)["stability"]["reason"])
    policy = (root / "own" / "parts" / "release_gate" / "release_policy.md").read_text()
    assert gate.UNCONFIRMED in policy

    # The same again: every part reads what is finished. Then one that fails, while the others go on.
    before = {p["name"]: p["sha256"] for p in results["parts"] if p["name"] not in ("release_gate", "report")}
    cells = {path: path.stat().st_mtime_ns for path in (root / "own").rglob("cells/*.json")}
    code, results, said = check("own", saes, "--fail-on-gate-fail", failing=("transcoder_stress",))
    assert code == 1
    assert re.search(r"^error: 1 of 7 .*: transcoder_stress \(.*\b1\b", said, re.M)
    assert {path: path.stat().st_mtime_ns for path in (root / "own").rglob("cells/*.json")} == cells
    assert re.fullmatch(r".*\b1: no room", of(results, "transcoder_stress")["reason"])
    assert before.items() >= {n: p["sha256"] for n in before if (p := of(results, n))["reason"] is None}.items()
    assert not (root / "own" / "parts" / "transcoder_stress" / "results.json").exists()
    assert of(results, "release_gate")["return_code"] == 0


@pytest.mark.slow
def test_saes_of_a_stream_get_an_answer_from_every_stress_test(check, run_script, root, subject):
    """No store holds what they were trained on: their controls are of the same text."""
    sizes = ["--tokens", 4000, "--seeds", "1,2,3,4,5", "--d-sae", 24, "--k", 3, "--batch-size", 128, "--threads", 1]
    sizes += ["--buffer-rows", 1024, "--heldout-rows", 500, "--learning-rate", 3e-3]
    where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", root, "--output-dir", root / "stream"]
    code, _, err = run_script(TRAIN, *where, *sizes)
    assert code == 0, err
    code, results, said = check("streamed", sorted((root / "stream").glob("checkpoints/*/topk_*")))
    assert code == 0, said
    for name in ("stability", "code", "random_model", "transcoder"):
        assert gates(results)[name]["status"] in ("PASS", "FAIL"), gates(results)[name]["reason"]


@pytest.mark.slow
def test_five_saes_of_another_library(check, root, foreign, saes, controls, trained):
    """What can be known of them is judged; what cannot is not run, and said."""
    before = root / "before"
    for i, folder in enumerate(saes):  # what HUSAI began with
        sae, start = checkpoints.load(folder), load_file(folder / SNAPSHOTS)["W_dec"][0]
        save_foreign(replace(sae, weights=sae.weights | {"W_dec": start, "W_enc": start.T}), before / f"sae{i}")
    others = [folder for draw in (1, 2) for folder in trained(f"control{draw}", random_seed=draw)]
    more = ["--untrained", before, "--random-model-checkpoint", *controls, *others]
    code, results, said = check("foreign", [foreign[0].parent], *more, failing=("ood_stress",))
    assert code == 1, said
    parts = [
        "candidate_confirmation",
        "random_model_stress",
        "ood_stress",
        "feature_reliability",
        "release_gate",
        "report",
    ]
    assert check.started == parts
    assert of(results, "transcoder_stress")["reason"]
    confirmed = part(root, "foreign", "candidate_confirmation")
    Supplied.model_validate(confirmed)
    assert recompute.results_problems(confirmed) == []
    own = confirmed["candidate"]
    assert own["facts"]["training"] is None
    assert list(own["checkpoints"]) == [*"01234"] == list(confirmed["untrained"])
    assert {r["condition"] for r in confirmed["bank"]["saebench"]["saes"]} == {own["condition"]}
    assert [len(c["seeds"]) for c in confirmed["bank"]["saebench"]["conditions"]] == [5]
    stress = part(root, "foreign", "random_model_stress")
    assert stress["candidate"] == own
    states = {f"untrained {seed}": sha256 for seed, sha256 in confirmed["untrained"].items()}
    assert states.items() <= stress["inputs"].items()
    assert all("untrained" in pair for pair in stress["section"]["pairs"]), "--untrained reaches this part too"

    found = gates(results)
    assert part(root, "foreign", "release_gate")["candidate"] == own
    assert found["stability"]["status"] in ("PASS", "FAIL"), found["stability"]["reason"]
    assert found["random_model"]["status"] in ("PASS", "FAIL"), found["random_model"]["reason"]
    for name, why in {
        "transcoder": "transcoders",
        "ood": "run_ood_stress_eval.py",
        "saebench": "--dataset-names",
        "cebench": "--stories",
    }.items():
        assert found[name]["status"] == "MISSING"
        assert why in found[name]["reason"], found[name]["reason"]
    assert "run_candidate_confirmation.py" in found["saebench"]["to_pass"]


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    refused, trained, saes, foreign, controls, subject, tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "command", lambda *_: pytest.fail("a part was started"))
    where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", tmp_path, "--output-dir", tmp_path / "x"]

    def no(named, *arguments, where=where):
        refused(named, CHECK, *SIZES, *where, *arguments)

    no("--checkpoint: 2 SAEs", "--checkpoint", *saes[:2])
    wider = trained("wider", (6,), 32)
    no([*wider, "d_sae"], "--checkpoint", *saes, *wider)
    no([foreign[2], "source"], "--checkpoint", *saes[:2], foreign[2])
    copy = tmp_path / "copy"
    shutil.copytree(saes[0], copy)
    no([copy, "decoder"], "--checkpoint", *saes, copy)
    no([saes[0], copy, "the same decoder"], "--checkpoint", saes[0], copy)
    no(tmp_path / "none", "--checkpoint", tmp_path / "none")
    no([controls[0], "subject"], "--checkpoint", *controls)
    no([saes[0], HOOK, HOOK_0], "--checkpoint", *saes, where=[HOOK_0 if w == HOOK else w for w in where])
    no([foreign[0], "miniature", "husai-tiny"], "--checkpoint", *foreign, where=["--hook-name", HOOK])
    no(["--untrained: 1 ", "5"], "--checkpoint", *foreign, "--untrained", saes[0])
    no(["--untrained: ", "--checkpoint"], "--checkpoint", *saes, "--untrained", *saes)
    no(
        ["--random-model-checkpoint: 2 ", "5 of --checkpoint"],
        "--checkpoint",
        *saes,
        "--random-model-checkpoint",
        *controls[:2],
    )
    no(["--phase4a-results: ", tmp_path / "none"], "--checkpoint", *saes, "--phase4a-results", tmp_path / "none")
    no(["--phase4a-results: ", saes[0] / "cfg.json"], "--checkpoint", *saes, "--phase4a-results", saes[0] / "cfg.json")
    no(["--hook-layer 0", f"--hook-name {HOOK}"], "--checkpoint", *saes, "--hook-layer", 0)
    beyond = ["blocks.7.hook_x" if w == HOOK else w for w in where]
    no("--hook-name blocks.7.hook_x: ", "--checkpoint", *foreign, where=beyond)
    for others in (foreign, saes):
        no(["--random-model-checkpoint: ", ": none;"], "--checkpoint", *saes, "--random-model-checkpoint", *others)
    no("--stories nobody/stories: ", "--checkpoint", *saes, "--stories", "nobody/stories")
    no(f"--artifact-root: {saes[0] / 'cfg.json'} ", "--checkpoint", *saes, "--artifact-root", saes[0] / "cfg.json")
    damaged = tmp_path / "damaged"
    shutil.copytree(saes[0], damaged)
    (damaged / "sae_weights.safetensors").write_bytes((saes[0] / "sae_weights.safetensors").read_bytes()[:-5])
    no(damaged / "sae_weights.safetensors", "--checkpoint", *saes, "--reference", damaged)
    assert not (tmp_path / "activations").exists()
    assert not (tmp_path / "x").exists()
    refused("--checkpoint: 2 SAEs", CONFIRMATION, "--checkpoint", *saes[:2], *where)


def test_each_check_has_a_folder_named_by_its_saes_and_all_share_one_control(tmp_path):
    script = runpy.run_path(str(ROOT / CHECK))
    names = [script["folder_of"]([Path(p)], shas) for p in ("my saes", "hf:a/b@c/d") for shas in ("ab", "ac", "ba")]
    assert len(set(names)) == 4, "two groups by two names, in whatever order"
    assert all(re.fullmatch(r"(my-saes|d)-[0-9a-f]{8}", name) for name in names)
    args = Namespace(phase4a_results=None, artifact_root=tmp_path, force=False)
    assert script["positive_control"](args) is None
    shared = script["shared_control"](args)
    shared.parent.mkdir(parents=True)
    shared.write_text('{"planted": null}')
    assert script["positive_control"](args) is None, "of another subject"
    shutil.copy(PHASE4A, shared)
    assert script["positive_control"](args) is None, "cut off before its manifest was written"
    shutil.copytree(PHASE4A.parent, shared.parent, dirs_exist_ok=True)
    assert script["positive_control"](args) == shared
    args.force = True
    assert script["positive_control"](args) is None


def test_a_second_group_does_not_overwrite_the_first(run_script, monkeypatch, saes, trained, root, subject, tmp_path):
    def command(run, name, words, title=None):
        log = run.folder / "logs" / f"{name}.log"
        log.write_text("error: no room")
        run.commands.append(
            {"command": name, "return_code": 1, "seconds": 0.0, "log": str(log.relative_to(run.folder))}
        )
        return 1

    monkeypatch.setattr(Run, "command", command)
    monkeypatch.chdir(tmp_path)
    where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", root, *SIZES]
    groups = {"first": saes[:3], "second": trained("second", (7, 8, 9))}
    for group in groups.values():
        assert run_script(ROOT / CHECK, "--checkpoint", *group, *where)[0] == 1
    folders = sorted((tmp_path / "results" / "experiments" / "release_check").iterdir())
    kept = [json.loads((folder / "results.json").read_text())["candidate"]["checkpoints"] for folder in folders]
    assert sorted(tuple(c) for c in kept) == [("1", "2", "3"), ("7", "8", "9")]
    reasons = [json.loads((folder / "parts" / "parts.json").read_text()) for folder in folders]
    assert all("no room" in found["candidate_confirmation"] for found in reasons)


def test_a_supplied_sae_is_opened_and_hashed_once(saes, controls, root, subject, monkeypatch):
    read = Counter()

    def counted(function):
        def call(path):
            read[function.__name__, path] += 1
            return function(path)

        return call

    monkeypatch.setattr(loaded.foreign, "open_checkpoint", counted(loaded.foreign.open_checkpoint))
    monkeypatch.setattr(loaded.foreign, "sha256_file", counted(sha256_file))
    about = {"subject": str(subject), "hook_name": HOOK, "artifact_root": root, "rows": 1000, "device": "cpu"}
    about |= {"checkpoint": saes[:3], "reference": saes[3:], "random_model_checkpoint": controls[:3]}
    about |= {"same_model": False}
    args = Namespace(**about, threads=1, untrained=[], stories=None, text=TextSource())
    opener = loaded.Opener()
    group = supplied.look_over(args, opener)
    assert loaded.load(args, CPU, opener).group.checkpoints == group.checkpoints
    assert len(read) == 2 * 8
    assert set(read.values()) == {1}


def test_saes_of_the_hub_are_judged_as_local_ones(foreign, root, subject, tmp_path, monkeypatch):
    """A folder of a repository stands for its five SAEs; results name the commit, and are read again offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {f"saes/{p.parent.name}/{p.name}": p.read_bytes() for folder in foreign for p in folder.iterdir()}
    imitations.put(tmp_path / "hub", "some/saes", files)
    about = {"subject": str(subject), "hook_name": HOOK, "artifact_root": root, "rows": 1000, "device": "cpu"}
    about |= {"reference": [], "random_model_checkpoint": [], "threads": 1, "untrained": [], "stories": None}
    about |= {"same_model": False}
    of_hub = Namespace(**about, text=TextSource(), checkpoint=[Path("hf:some/saes/saes")])
    local = Namespace(**about, text=TextSource(), checkpoint=foreign)
    shas = [list(supplied.look_over(args).checkpoints.values()) for args in (of_hub, local)]
    assert shas[0] == shas[1]
    opened = loaded.load(of_hub, CPU)
    places = [write_place(c.folder, tmp_path) for c in opened.saes]
    assert sorted(places) == [f"hf:some/saes@{imitations.COMMIT}/saes/sae{i}" for i in range(5)]
    paths = dict(enumerate(places))
    identities = {i: c.identity for i, c in enumerate(opened.saes)}
    assert loaded.on_disk(tmp_path / "results.json", {"paths": paths}) == identities
    assert by_named_checkpoint(of_hub.checkpoint, "--checkpoint")[0][1:] == [
        sha256_file(folder / "ae.pt") for folder in foreign
    ]


def test_a_name_that_is_nowhere_is_refused(refused, root, subject, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", root, "--output-dir", tmp_path / "x"]
    three = [f"sae-lens:gpt2-small-res-jb/blocks.{i}.hook_resid_pre" for i in (6, 7, 8)]
    for script in (CHECK, CONFIRMATION):
        refused([three[0], tmp_path / "hub"], script, "--checkpoint", *three, *where)
        refused(["--checkpoint: hf:some/saes/x ", tmp_path / "hub"], script, "--checkpoint", "hf:some/saes/x", *where)


def test_saes_that_are_none_are_refused(refused, foreign, saes, subject, tmp_path, monkeypatch):
    """Of another library, whose files say little: width, zeros, two steps of one training."""
    monkeypatch.setattr(Run, "command", lambda *_: pytest.fail("a part was started"))
    where = ["--model-name", subject, "--hook-name", HOOK, "--artifact-root", tmp_path, "--output-dir", tmp_path / "x"]
    g = torch.Generator().manual_seed(0)
    sae = checkpoints.load(saes[0])

    def no(name, changed, *named):
        folder = save_foreign(changed, tmp_path / name)
        refused([folder, *named], CHECK, *SIZES, *where, "--checkpoint", *foreign[1:], folder)

    w = sae.weights
    no("silent", replace(sae, weights=w | {"W_dec": torch.zeros_like(w["W_dec"])}), "zeros")
    step = checkpoints.load(saes[1])
    later = step.W_dec + 0.1 * torch.randn(step.W_dec.shape, generator=g)
    no("later", replace(step, weights=step.weights | {"W_dec": later}), foreign[1], "|cos|")
    other = save_foreign(sae, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["trainer"]["lr"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    refused([other, "lr", "0.5"], CHECK, *SIZES, *where, "--checkpoint", *foreign[1:], other)
    narrow = w | {"W_enc": w["W_enc"][:8], "W_dec": w["W_dec"][:, :8], "b_dec": w["b_dec"][:8]}
    no("narrow", replace(sae, weights=narrow), "d_in 8", "16")


def test_flags_of_the_confirmation_go_with_what_it_evaluates(monkeypatch, capsys, tmp_path):
    parse = runpy.run_path(str(ROOT / CONFIRMATION))["parse"]
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def parsed(*arguments: str):
        monkeypatch.setattr(sys, "argv", [CONFIRMATION, *arguments])
        return parse()

    chosen, own = parsed(), parsed("--checkpoint", "a", "b", "--hook-layer", "0")
    assert chosen.dataset_names is None, "the selection says which it left"
    assert (own.dataset_names, own.candidate) == (data_sets.DATA_SETS.split(","), None)
    assert own.hook_name == "blocks.0.hook_resid_pre"
    assert own.output_dir != chosen.output_dir, "a confirmed candidate is not replaced"
    for arguments in (
        ["--checkpoint", "a", "--seeds", "1,2"],
        ["--checkpoint", "a", "--candidate", "b.json"],
        ["--model-name", "gpt2"],
        ["--hook-name", "blocks.0.hook_resid_pre"],
        ["--untrained", "a"],
    ):
        with pytest.raises(SystemExit) as refused:
            parsed(*arguments)
        assert refused.value.code == 2
        assert arguments[-2] in capsys.readouterr().err


def test_metadata_that_husai_did_not_write_is_refused():
    weights = {"W_enc": torch.ones(2, 4), "b_enc": torch.zeros(4), "W_dec": torch.ones(4, 2), "b_dec": torch.zeros(2)}
    for made in ({"training": {"tokens": 1000.5}}, {"source": 5}, {"seed": "1"}, {"training": {}}, [1]):
        with pytest.raises(BadInput):
            read_facts(SAE(weights, "topk", 2, metadata={"husai": made}), 2.0)


@pytest.mark.nightly
def test_saes_of_activations_made_otherwise(check, root, subject):
    """SAEs that are exact on their own activations read an explained variance of 1, from the command line to the page,
    and every part makes activations as the SAEs' files say."""
    way = {"prepend_bos": False, "context_size": 12, "seqpos_slice": [2, None], "exclude_special_tokens": True}
    way |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folders = []
    for seed in range(5):
        turn = torch.randn(15, 15, generator=torch.Generator().manual_seed(seed))
        centred = torch.linalg.eigh(torch.eye(16) - 1 / 16).eigenvectors[:, 1:]  # the mean of a row has no direction
        half = (centred @ torch.linalg.qr(turn).Q).T
        both = torch.cat([half, -half])
        weights = {"W_enc": both.T, "b_enc": torch.zeros(30), "W_dec": both, "b_dec": torch.zeros(16)}
        about = {"model_name": "miniature", "hook_name": HOOK} | way
        folders.append(root / "exact" / f"s{seed}")
        checkpoints.save(SAE(weights, "standard", None, False, about), folders[-1])
    code, results, said = check("otherwise", folders)
    assert code == 0, said
    confirmed = part(root, "otherwise", "candidate_confirmation")
    for record in confirmed["bank"]["saebench"]["saes"]:
        assert record["heldout"]["explained_variance"] == pytest.approx(1, abs=1e-5)
        assert record["core"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    reached = [m["heldout"]["l0"] for m in confirmed["section"]["gaussian"]["members"]]
    assert reached == pytest.approx([15] * 5, rel=0.1)
    assert len(list((root / "controls").glob("checkpoints/*/relu_*"))) == 5, "as the SAEs are ReLU SAEs"
    applied = confirmed["harvesting"]
    assert applied["center_writing_weights"] is True
    assert (applied["context_size"], applied["prepend_bos"], applied["autocast_lm"]) == (12, False, "unknown")
    assert results["harvesting"]["seqpos_slice"] == [2, None]
    for text_of in (said, (root / "otherwise" / "report.html").read_text()):
        assert "context_size 12" in text_of
        assert "seqpos_slice" in text_of
    assert {p["name"] for p in results["parts"] if p["return_code"]} == set()
