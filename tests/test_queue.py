"""The queue: every stage in its order, what is refused, what it leaves behind. The stages have tests of their own."""

import fcntl
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUEUE = "scripts/experiments/run_b200_high_impact_queue.sh"


def queue(*arguments, **variables):
    environment = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"} | variables
    command = ["bash", QUEUE, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def stages(done):
    return re.findall(r"^== (\w+)$", done.stdout, re.M)


def commands(done):
    """stage -> its command line."""
    return dict(re.findall(r"^== (\w+)\n(.+)$", done.stdout, re.M))


@pytest.mark.parametrize("profile", ["embedded", "b200"])
def test_a_dry_run_prints_every_command_and_runs_none(tmp_path, profile):
    done = queue("--dry-run", OUTPUT=str(tmp_path / "out"), PROFILE=profile)
    assert (done.returncode, done.stderr) == (0, "")
    order = ("phase4a", "frontier", "scaling", "selection", "confirmation", "transcoder", "ood", "gate", "report")
    found = stages(done)
    assert [s for s in found if s in order] == list(order)
    assert not (tmp_path / "out").exists()
    for line in commands(done).values():
        script = re.search(r"scripts/\S+\.py", line)[0]
        assert (ROOT / script).is_file()
    device = {"embedded": "'cpu'", "b200": "'cuda'"}[profile]
    assert all(device in line for line in commands(done).values() if "--device" in line)


def test_paths_go_from_stage_to_stage(tmp_path):
    out = tmp_path / "out"
    found = commands(queue("--dry-run", OUTPUT=str(out)))
    for earlier, later in (
        ("frontier", "selection"),
        ("scaling", "selection"),
        ("selection", "confirmation"),
        ("selection", "gate"),
        ("confirmation", "gate"),
        ("confirmation", "ood"),
        ("phase4a", "gate"),
        ("random_model", "gate"),
        ("transcoder", "gate"),
        ("ood", "gate"),
    ):
        folder = re.search(r"'--output-dir' '([^']+)'", found[earlier])[1]
        assert f"'{folder}/results.json'" in found[later], (earlier, later)


def test_variables_reach_the_stages(tmp_path):
    found = commands(
        queue(
            "--dry-run",
            OUTPUT=str(tmp_path),
            SEEDS="1,2,3,4,5",
            MIN_SAEBENCH_DELTA="0.01",
            CEBENCH_BASELINE_MAP="map.json",
            CEBENCH_REPO="repo",
            SAEBENCH_DATASETS="92_glue_sst2",
            EXECUTOR="ray",
        )
    )
    assert "'1,2,3,4,5'" in found["phase4a"]
    assert "'--min-saebench-delta' '0.01'" in found["gate"]
    for stage in ("frontier", "scaling", "confirmation"):
        assert "'map.json'" in found[stage]
        assert "'repo'" in found[stage]
    assert "'92_glue_sst2'" in found["frontier"]
    assert "'ray'" in found["scaling"]


def test_from_and_only():
    assert stages(queue("--dry-run", "--from", "gate"))[0] == "gate"
    assert stages(queue("--dry-run", "--only", "ood")) == ["ood"]


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--only", "nothing"], {}, "--only nothing: one of"),
        (["--from"], {}, "--from : one of"),
        (["--fast"], {}, "--fast: --dry-run"),
        ([], {"PROFILE": "huge"}, "PROFILE=huge: embedded or b200 expected"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, arguments, variables, said):
    done = queue(*arguments, OUTPUT=str(tmp_path), **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stage_is_noted_and_a_failed_one_named(tmp_path):
    done = queue("--only", "environment", OUTPUT=str(tmp_path))
    assert "torch" in done.stdout
    failed = queue("--only", "selection", OUTPUT=str(tmp_path))
    assert failed.returncode == 2
    assert "failed: selection (exit 2)" in failed.stdout
    noted = {s["stage"]: s for s in json.loads((tmp_path / "queue/manifest.json").read_text())["stages"]}
    assert {name: s["return_code"] for name, s in noted.items()} == {"environment": 0, "selection": 2}
    assert "select_release_candidate.py" in noted["selection"]["command"]
    assert noted["selection"]["results_sha256"] is None


def test_results_of_a_failed_stage_are_set_aside(tmp_path):
    folder = tmp_path / "experiments/candidate_selection"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    queue("--only", "selection", OUTPUT=str(tmp_path))
    assert not (folder / "results.json").exists()
    assert (folder / "results.json.stale").exists()


def test_the_gate_without_evidence_fails_closed(tmp_path):
    done = queue("--only", "gate", OUTPUT=str(tmp_path))
    assert done.returncode == 1
    assert "the gate is not passed" in done.stdout
    decision = json.loads((tmp_path / "experiments/release_gate/release_policy.json").read_text())
    assert decision["pass_all"] is False
    assert {g["status"] for g in decision["gates"]} == {"MISSING"}


def test_a_second_queue_on_one_output_is_refused(tmp_path):
    (tmp_path / "queue").mkdir()
    with open(tmp_path / "queue/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = queue("--only", "environment", OUTPUT=str(tmp_path))
    assert done.returncode == 2
    assert "another queue works there" in done.stderr
