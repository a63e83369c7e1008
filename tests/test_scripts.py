"""The scripts as a user runs them: results, repeats, interruptions, and bad input."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import processes
from conftest import ROOT, call_script, run_without_torch
from husai.evals.flags import EvalParser
from husai.release.recompute import folder_problems
from husai.runs.folder import Run

PHASE4A = "scripts/experiments/run_phase4a_reproduction.py"
TRAIN = "scripts/experiments/train_husai_sae_on_cached_activations.py"
EXTRACT = "scripts/analysis/extract_activations.py"
SUBJECT = "scripts/training/train_modular_addition.py"
MIRROR = "scripts/analysis/mirror_evidence.py"
TINY = ["--d-sae", "24", "--k", "3", "--tokens", "6000", "--batch-size", "128", "--null-draws", "10", "--threads", "1"]


@pytest.mark.parametrize("script", sorted(p.relative_to(ROOT) for p in ROOT.glob("scripts/**/*.py")), ids=str)
def test_help_is_instant(script):
    """Half a second is the promise; what is tested is its cause, that nothing heavy is imported."""
    code = f"""
import runpy, sys
sys.argv = [{str(script)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
heavy = {{"torch", "numpy", "pandas", "matplotlib", "transformer_lens", "sae_lens", "pydantic"}} & set(sys.modules)
assert not heavy, heavy
"""
    shown = processes.run([sys.executable, "-c", code]).stdout
    sentence = ast.get_docstring(ast.parse((ROOT / script).read_text())).splitlines()[0]
    assert f"python {script}" in shown, "the docstring shows how to launch it"
    if script.name == "warm.py":  # runs without site-packages, and has argparse's own parser
        return
    assert shown.startswith(sentence)
    about, _, flags = shown.partition("usage: ")
    assert f"python {script}" in about
    titles = re.findall(r"^(\w[\w ]+):$", flags, re.M)
    *first, last = EvalParser.groups
    assert titles == [title for title in (*first, "this script", last) if title in titles]


@pytest.mark.parametrize("script", ["run_feature_reliability.py", "run_release_check.py"])
def test_input_that_is_not_there_is_refused_at_once(script, tmp_path):
    """In one line, before torch is imported."""
    notes, nowhere = tmp_path / "notes.txt", str(tmp_path / "nowhere")
    notes.write_text("hello")
    sae = str(ROOT / "assets/husai-tiny-saes/seed42")
    named = {
        "--checkpoint": [["--checkpoint", str(notes)], ["--checkpoint", sae, nowhere]],
        "--text": [["--checkpoint", sae, "--text", nowhere]],
        "--model-name": [["--checkpoint", sae, "--model-name", nowhere]],
    }
    code = f"""
import runpy, sys
for words in {[words for cases in named.values() for words in cases]!r}:
    sys.argv = ["scripts/experiments/{script}", *words, "--output-dir", {str(tmp_path / "out")!r}]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 2
assert "torch" not in sys.modules
"""
    lines = processes.run([sys.executable, "-c", code]).stderr.splitlines()
    flags = [flag for flag, cases in named.items() for _ in cases]
    assert len(lines) == len(flags)
    for line, flag in zip(lines, flags, strict=True):
        assert line.startswith(f"error: {flag}")
        assert str(tmp_path) in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def phase4a(small_subject, small_activations, tmp_path_factory):
    """(command, finished output folder): a tiny phase 4a."""
    root, subject = small_subject
    out = tmp_path_factory.mktemp("phase4a")
    command = [sys.executable, PHASE4A, "--subject", subject, "--artifact-root", root, *TINY]
    assert call_script(*command[1:], "--output-dir", out) == 0
    return command, out


def test_phase4a_results(phase4a):
    _, out = phase4a
    results = json.loads((out / "results.json").read_text())
    section = results["husai"]
    assert len(section["pairs"]) == 10
    assert section["stability"]["verdict"]["outcome"] in ("PASS", "FAIL")
    assert set(section["histograms"]) == {"observed", "isotropic", "spectral", "gaussian", "untrained"}
    assert len(section["others"]) == 5
    noise = section["gaussian"]
    assert {f"gaussian: checkpoint {i}": m["checkpoint_sha256"] for i, m in enumerate(noise["members"], 1)}.items() <= (
        results["inputs"].items()
    )
    mcc = section["stability"]["scores"]["mcc"]
    assert mcc["observed"]["estimate"] == pytest.approx(np.mean([p["observed"]["mcc"] for p in section["pairs"]]))
    excess = mcc["observed"]["estimate"] - mcc["nulls"]["spectral"]["mean"]
    assert mcc["excess"]["spectral"]["estimate"] == pytest.approx(excess)
    first, last = section["over_training"][0], section["over_training"][-1]
    assert last["mcc"]["estimate"] == pytest.approx(mcc["observed"]["estimate"], abs=1e-6)
    assert first["mcc"]["estimate"] == pytest.approx(mcc["nulls"]["untrained"]["mean"], abs=1e-6)
    for m in section["members"]:
        assert m["heldout"]["l0"] <= 3
        assert results["inputs"][f"checkpoint {m['label']}"] == m["checkpoint_sha256"]
    assert str(ROOT) not in (out / "results.json").read_text(), "no path of this machine"
    assert len((out / "pairs.csv").read_text().splitlines()) == 1 + 10 * 5
    for name in ("matches", "over_training", "loss_curves"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert section["stability"]["verdict"]["outcome"] in (out / "summary.md").read_text()


def test_repeat_returns_the_same_bytes_without_torch(phase4a):
    command, out = phase4a
    before = (out / "results.json").read_bytes()
    run_without_torch(*command[1:], "--output-dir", out)
    assert (out / "results.json").read_bytes() == before
    assert len(list(out.glob("run_*"))) >= 2


@pytest.mark.nightly  # the chaos tests kill this phase in the queue
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(phase4a, tmp_path):
    command, reference = phase4a
    # A root of its own, so that the control's activations are made again too.
    shutil.copytree(command[command.index("--artifact-root") + 1] / "subjects", tmp_path / "root" / "subjects")
    command = [*command, "--artifact-root", tmp_path / "root", "--output-dir", tmp_path / "out"]
    killed = 0
    for seconds in (1.5, 2.5, 3.5, 4.5):
        process = processes.start(command)
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            processes.kill(process)
            killed += 1
            assert not (tmp_path / "out" / "results.json").exists()
    processes.run(command)
    assert killed
    assert (tmp_path / "out" / "results.json").read_bytes() == (reference / "results.json").read_bytes()


def test_interrupt_exits_130_and_says_so_in_the_manifest(phase4a, tmp_path):
    command, _ = phase4a
    command = [*command, "--tokens", "100000000", "--output-dir", tmp_path]
    process = processes.start(command)
    deadline = time.monotonic() + processes.LIMIT
    while not list(tmp_path.glob("run_*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = processes.end(process, 60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
    (manifest,) = tmp_path.glob("run_*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "interrupted"


@pytest.mark.nightly  # the protocol decides nothing
def test_published_protocol_puts_its_figures_beside_ours(phase4a, run_script, tmp_path):
    command, _ = phase4a
    arguments = [
        *command[2:],
        "--protocol",
        "published",
        "--seeds",
        "1,2,3",
        "--output-dir",
        tmp_path,
        "--null-draws",
        "5",
    ]
    code, out, err = run_script(PHASE4A, *arguments)
    assert code == 0, err
    published = json.loads((tmp_path / "results.json").read_text())["published"]
    assert published["hook_name"] == "blocks.1.hook_resid_post"
    assert {m["d_sae"] for m in published["members"]} == {1024}
    assert set(published["stability"]["missing_nulls"]) == {"gaussian"}
    pwmcc = published["stability"]["scores"]["pwmcc"]
    assert pwmcc["nulls"]["isotropic"]["mean"] == pytest.approx(0.2988, abs=5e-4)
    assert "| random (pwmcc) | 0.2988 |" in out


def test_brought_checkpoints_are_scored(phase4a, small_activations, run_script, refused, tmp_path):
    _, out = phase4a
    saes = next(iter((out / "checkpoints").iterdir()))
    arguments = ["--activation-cache-dir", small_activations, "--null-draws", 5, "--threads", 1, "--output-dir"]
    own = json.loads((out / "results.json").read_text())["husai"]
    folders = {m["checkpoint"] for m in own["members"]}
    root = tmp_path / "saes"
    for folder in folders:
        shutil.copytree(out / folder, root / folder.rsplit("/")[-1])
    code, text, err = run_script(PHASE4A, "--sae-root", root, *arguments, tmp_path / "out")
    assert code == 0, err
    section = json.loads((tmp_path / "out" / "results.json").read_text())["husai"]
    assert saes.exists()
    for name in ("mcc", "pwmcc_alive"):
        assert section["stability"]["scores"][name]["observed"]["estimate"] == pytest.approx(
            own["stability"]["scores"][name]["observed"]["estimate"], abs=1e-9
        )
    assert section["stability"]["verdict"]["outcome"] in ("MISSING", "FAIL"), "no Gaussian control is trained"
    assert "run_release_check.py" in text

    # Another untrained state is another null, not the one that was computed before.
    verdicts = []
    for scale in (1.0, 2.0):
        untrained = tmp_path / f"untrained{scale}"
        for i, folder in enumerate(sorted(root.iterdir())):
            shutil.copytree(folder, untrained / folder.name)
            weights = load_file(folder / "sae_weights.safetensors")
            g = torch.Generator().manual_seed(int(10 * scale) + i)
            weights["W_dec"] = torch.randn(24, 16, generator=g)
            save_file(weights, untrained / folder.name / "sae_weights.safetensors")
        code, _, err = run_script(
            PHASE4A, "--sae-root", root, "--untrained-root", untrained, *arguments, tmp_path / "out"
        )
        assert code == 0, err
        section = json.loads((tmp_path / "out" / "results.json").read_text())["husai"]
        verdicts.append(section["stability"]["scores"]["mcc"]["nulls"]["untrained"]["mean"])
    assert verdicts[0] != verdicts[1]

    shutil.copytree(next(root.iterdir()), root / "twin")
    refused(["twin", "decoder"], PHASE4A, "--sae-root", root, *arguments, tmp_path / "out")
    later = load_file(root / "twin" / "sae_weights.safetensors")
    later["W_dec"] += 0.1 * torch.randn(24, 16, generator=g)
    save_file(later, root / "twin" / "sae_weights.safetensors")
    refused(["twin", "|cos|"], PHASE4A, "--sae-root", root, *arguments, tmp_path / "out")

    shutil.rmtree(root / "twin")
    for flag, value in (("--k", 5), ("--d-sae", 512)):  # the SAEs say another
        refused(f"{flag} {value}: ", PHASE4A, "--sae-root", root, *arguments, tmp_path / "out", flag, value)
    sweep, model = sorted(root.iterdir())[-1] / "cfg.json", sorted(root.iterdir())[0] / "cfg.json"
    config = json.loads(sweep.read_text())
    config["metadata"]["husai"]["learning_rate"] = 0.5
    sweep.write_text(json.dumps(config))
    refused(["learning_rate", "0.5"], PHASE4A, "--sae-root", root, *arguments, tmp_path / "out")
    config = json.loads(model.read_text())
    config["metadata"] = {"model_name": "gpt2"}
    model.write_text(json.dumps(config))
    refused(["--sae-root: ", "gpt2"], PHASE4A, "--sae-root", root, *arguments, tmp_path / "out")


def test_transformer_and_activations_scripts(run_script, small_subject, tmp_path):
    _, subject = small_subject
    code, out, err = run_script(EXTRACT, "--artifact-root", tmp_path, "--subject", subject, "--threads", 1)
    assert code == 0, err
    assert re.search(r"\b529 x 16\b.*\bblocks\.0\.hook_resid_post\b.*\b2$", out, re.M)
    code, _, err = run_script(SUBJECT, "--artifact-root", tmp_path, "--modulus", 11, "--epochs", 1, "--threads", 1)
    assert code == 1
    assert re.match(r"error: .*\b1 epochs\b.*\b0\.999\b", err.splitlines()[-1])


def test_grid_script(run_script, small_activations, tmp_path):
    arguments = ["--activation-cache-dir", small_activations, "--output-dir", tmp_path, "--seeds", "1,2"]
    arguments += ["--d-sae", "12,20", "--k", "2,3", "--epochs", 3, "--batch-size", 64, "--threads", 1]
    code, _, err = run_script(TRAIN, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(m["d_sae"], m["k"], m["seed"]) for m in results["members"]} == {
        (d, k, s) for d in (12, 20) for k in (2, 3) for s in (1, 2)
    }
    from sae_lens import SAE

    for m in results["members"]:
        assert SAE.load_from_disk(tmp_path / m["checkpoint"]).cfg.k == m["k"]


@pytest.mark.nightly
def test_arithmetic_in_float64_from_the_shell(run_script, small_activations, tmp_path):
    """Nearly the same SAEs, and the same kind of checkpoints."""
    found = {}
    for dtype in ("float32", "float64"):
        arguments = ["--activation-cache-dir", small_activations, "--output-dir", tmp_path / dtype, "--seeds", "1,2"]
        arguments += ["--d-sae", "16", "--k", "3", "--tokens", 2000, "--threads", 1, "--arithmetic", dtype]
        code, _, err = run_script(TRAIN, *arguments)
        assert code == 0, err
        (member, _) = json.loads((tmp_path / dtype / "results.json").read_text())["members"]
        found[dtype] = load_file(tmp_path / dtype / member["checkpoint"] / "sae_weights.safetensors")
    for name, weight in found["float32"].items():
        assert found["float64"][name].dtype == torch.float32
        torch.testing.assert_close(found["float64"][name], weight, rtol=0.05, atol=0.02)
    assert not all(torch.equal(found["float64"][name], weight) for name, weight in found["float32"].items())


def test_every_family_from_the_shell(run_script, small_activations, tmp_path):
    """All families in one pass: sae_lens opens each, a missed L0 is said, and phase 4a scores them."""
    from sae_lens import SAE

    arguments = ["--activation-cache-dir", small_activations, "--output-dir", tmp_path, "--seeds", "1,2"]
    families = "topk,batchtopk,matryoshka,relu,jumprelu,gated"
    arguments += ["--architecture", families, "--d-sae", "16", "--k", "3", "--tokens", 3000, "--threads", 1]
    code, _, err = run_script(TRAIN, *arguments)
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    summary = (tmp_path / "summary.md").read_text()
    assert [m["family"] for m in results["members"]] == [f for f in families.split(",") for _ in (1, 2)]
    for m in results["members"]:
        theirs = SAE.load_from_disk(tmp_path / m["checkpoint"])
        assert theirs.W_dec.shape == (16, 16)
        assert m["l0_miss"] == pytest.approx(m["heldout"]["l0"] / 3 - 1)
        assert (f"{m['heldout']['l0']:.2f} (" in summary) == (abs(m["l0_miss"]) > 0.1)


def test_transcoders_from_the_shell(run_script, refused, small_subject, small_activations, tmp_path):
    from husai.activations.harvest import harvest_modular_addition

    root, subject = small_subject
    stores = [harvest_modular_addition(subject, root / "activations", f"blocks.0.{h}") for h in HOOKS]
    arguments = ["--activation-cache-dir", stores[0], "--seeds", "1,2", "--d-sae", "32", "--k", "4", "--threads", 1]
    arguments += ["--output-dir", tmp_path, "--tokens", 60_000, "--learning-rate", "3e-3"]
    arguments += ["--architecture", "transcoder,skip_transcoder"]
    code, _, err = run_script(TRAIN, *arguments, "--target-activation-cache-dir", stores[1])
    assert code == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [m["family"] for m in results["members"]] == ["transcoder"] * 2 + ["skip_transcoder"] * 2
    assert all(m["heldout"]["explained_variance"] > 0 for m in results["members"])
    refused("transcoders", TRAIN, *arguments)


HOOKS = ("hook_resid_mid", "hook_mlp_out")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "42"], ["--seeds 42: ", "5"]),
        (["--seeds", "42,42"], ["--seeds: ", "'42,42'"]),
        (["--seeds", "a,b"], ["--seeds: ", "'a,b'"]),
        (["--seeds", "1,-2"], ["--seeds: ", "'1,-2'"]),
        (["--k", "300"], ["--k 300: ", "--d-sae 256"]),
        (["--k", "0"], ["--k: ", "'0'"]),
        (["--tokens", "many"], ["--tokens: ", "'many'"]),
        (["--learning-rate", "nan"], ["--learning-rate: ", "'nan'"]),
        (["--learning-rate", "0"], ["--learning-rate: ", "'0'"]),
        (["--sead", "1"], "--sead"),
        (["--untrained-root", "x"], ["--untrained-root", "--sae-root"]),
        (["--protocol", "published", "--sae-root", "x"], ["--protocol published", "--sae-root"]),
        (["--rows", "9"], ["--rows 9: ", "--model-name"]),
        (["--rows", "9", "--subject", "husai-tiny", "--activation-cache-dir", "tests"], ["--rows 9: ", "--model-name"]),
        (
            ["--layer", "1", "--hook-name", "blocks.1.hook_resid_pre"],
            ["--layer 1", "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"],
        ),
        (["--sae-root", "nowhere"], "--sae-root: nowhere "),
        (["--sae-root", "x", "--seeds", "1,2,3"], ["--seeds: ", "--sae-root"]),
        (["--same-model"], ["--same-model", "--sae-root"]),
        (["--subject", "nowhere"], ["nowhere: ", "TransformerLens"]),
        (["--activation-cache-dir", "nowhere"], "--activation-cache-dir: nowhere "),
    ],
)
def test_bad_arguments(refused, arguments, named, tmp_path):
    refused(named, PHASE4A, "--output-dir", tmp_path, *arguments)
    assert not (tmp_path / "results.json").exists()


def test_bad_inputs_of_phase4a(refused, small_subject, small_activations, phase4a, tmp_path):
    root, subject = small_subject
    common = ["--artifact-root", root, "--output-dir", tmp_path / "out", *TINY]
    refused(
        "blocks.9.hook_resid_post: ", PHASE4A, *common, "--subject", subject, "--hook-name", "blocks.9.hook_resid_post"
    )
    refused("blocks.9.hook_resid_post: ", PHASE4A, *common, "--subject", subject, "--layer", "9")
    refused("--device cuda:77: ", PHASE4A, *common, "--device", "cuda:77")
    (tmp_path / "file").write_text("")
    refused(f"--output-dir: {tmp_path}/file/out ", PHASE4A, *common, "--output-dir", tmp_path / "file" / "out")

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    refused([foreign, "*.safetensors"], PHASE4A, *common, "--subject", foreign)

    store = tmp_path / "store"
    shutil.copytree(small_activations, store)
    shard = store / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(shard, PHASE4A, *common, "--activation-cache-dir", store)
    given = ["--activation-cache-dir", small_activations]
    hooks = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"
    refused([small_activations, *hooks], PHASE4A, *common, *given, "--hook-name", hooks[1])

    saes = tmp_path / "saes"
    made = json.loads((phase4a[1] / "results.json").read_text())["husai"]["members"]
    for i, m in enumerate(made[:2]):
        shutil.copytree(phase4a[1] / m["checkpoint"], saes / str(i))
    scored = ["--sae-root", saes, "--activation-cache-dir", small_activations, "--output-dir", tmp_path / "out"]
    scored += ["--threads", "1"]
    weights = saes / "1" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    refused(weights, PHASE4A, *scored)
    weights.write_bytes(whole)
    (saes / "1" / "cfg.json").write_text(json.dumps({"architecture": "gpt2"}))
    refused([saes / "1" / "cfg.json", "'gpt2'"], PHASE4A, *scored)
    shutil.rmtree(saes / "1")
    refused(["1 SAE ", "2", "5"], PHASE4A, *scored)
    refused("--tokens: ", PHASE4A, *common, *scored)


def test_nan_activations_are_refused(refused, small_activations, tmp_path):
    """A store whose digests fit and whose numbers do not."""
    from husai.runs.files import sha256_file

    store = tmp_path / "store"
    shutil.copytree(small_activations, store)
    shard = store / "shard-00000.safetensors"
    x = torch.ones(529, 16)
    x[200, 3] = float("nan")
    save_file({"activations": x}, shard)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": sha256_file(shard), "bytes": os.path.getsize(shard)}
    (store / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--activation-cache-dir", store, "--output-dir", tmp_path / "o", "--threads", 1]
    refused([store, "NaN"], TRAIN, *arguments)
    assert not (tmp_path / "o" / "results.json").exists()


def test_bad_inputs_of_the_other_scripts(refused, small_activations, tmp_path):
    grid = ["--activation-cache-dir", small_activations, "--output-dir", tmp_path, "--threads", 1]
    refused(["k 9", "d_sae 8"], TRAIN, *grid, "--d-sae", "8", "--k", "9")
    refused(["--d-sae: ", "'8,8'"], TRAIN, *grid, "--d-sae", "8,8")
    refused(["'vq'", "topk"], TRAIN, *grid, "--architecture", "topk,vq")
    refused("transcoders", TRAIN, *grid, "--target-activation-cache-dir", small_activations)
    refused("--activation-cache-dir", TRAIN)
    absent = tmp_path / "none"
    refused(absent, TRAIN, "--activation-cache-dir", absent, "--output-dir", tmp_path)
    refused(["--modulus 10: ", "11"], SUBJECT, "--modulus", "10")
    refused(["--train-fraction: ", "'1.5'"], SUBJECT, "--train-fraction", "1.5")
    refused(
        [f"{tmp_path} ", "config.json", "subject.json"], EXTRACT, "--subject", tmp_path, "--artifact-root", tmp_path
    )


@pytest.fixture
def run_folder(tmp_path):
    """What a complete run left: results, summary, a figure, a table, checkpoints."""
    root = tmp_path / "results"
    with Run(root / "phase", {"seed": 1}, "cpu", 1) as run:
        (root / "phase/figures").mkdir()
        (root / "phase/figures/drawn.png").write_bytes(b"png")
        (root / "phase/pairs.csv").write_text("a,b\n")
        (root / "phase/checkpoints").mkdir()
        (root / "phase/checkpoints/sae.safetensors").write_bytes(b"weights")
        run.write({"phase": "tried", "inputs": run.inputs}, "# Tried\n")
    return root


def test_the_mirror_of_a_run_is_what_the_audit_takes(run_script, run_folder, tmp_path):
    code, out, err = run_script(MIRROR, "--results-root", run_folder, "--output", tmp_path / "kept")
    assert code == 0, err
    assert out.startswith("1 runs")
    kept = tmp_path / "kept" / "phase"
    assert {p.name for p in kept.iterdir()} == {"drawn.png", "manifest.json", "results.json", "summary.md"}
    assert folder_problems(kept) == []


def test_what_is_not_as_its_manifest_says_is_not_copied(refused, run_folder, tmp_path):
    given = (MIRROR, "--results-root", run_folder, "--output", tmp_path / "kept")
    (run_folder / "phase/figures/drawn.png").write_bytes(b"another")
    refused("phase/figures/drawn.png", *given)
    (run_folder / "phase/manifest.json").write_text("{}")
    refused("phase/manifest.json", *given)
    refused(
        f"--results-root: {tmp_path}/nothing ",
        MIRROR,
        "--results-root",
        tmp_path / "nothing",
        "--output",
        tmp_path / "kept",
    )
    assert not (tmp_path / "kept").exists()
