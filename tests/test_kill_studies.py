"""A whole study, killed or interrupted midway on either executor: the same command loses no finished cell."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import processes
from miniature import few_texts, save_miniature

SCALING = "scripts/experiments/run_external_metric_scaling_study.py"
SIZES = ["--seeds", "1,2", "--token-budgets", "1000,2000", "--d-sae-values", 24, "--k", 3, "--batch-size", 128]
SIZES += ["--rows", 3000, "--heldout-rows", 1000, "--null-draws", 3, "--run-cebench", "--max-rows", 8]
pytestmark = pytest.mark.nightly  # the chaos tests kill this study in the queue, test_executor.py interrupts one


class Study:
    """The study's command, with an output folder of its own, and activations that all of them share."""

    def __init__(self, root: Path, name: str, *arguments):
        self.out = root / name
        places = ["--artifact-root", root, "--output-dir", self.out]
        command = [sys.executable, SCALING, "--subject", root / "miniature", "--hook-layers", "1,2", *SIZES]
        self.command = [str(c) for c in (*command, "--threads", 1, *places, *arguments)]

    def start(self) -> subprocess.Popen:
        """In a session of its own, as from another terminal."""
        return processes.start(self.command)

    def finish(self) -> bytes:
        """Run it to its end; the results."""
        process = self.start()
        _, err = processes.end(process)
        assert process.returncode == 0, err
        return (self.out / "results.json").read_bytes()

    def stop_midway(self, sent: signal.Signals, cells: int) -> tuple[dict, str]:
        """Send a signal once there are so many cells; the finished cells as they then lie there, and stderr."""
        process = self.start()
        deadline = time.monotonic() + processes.LIMIT
        while len(self.cells()) < cells and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        below = psutil.Process(process.pid).children(recursive=True)
        if sent == signal.SIGKILL:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)  # to the study alone: it has to end what it started
        _, err = processes.end(process)
        assert process.returncode == (-sent if sent == signal.SIGKILL else 130), err
        alive = psutil.wait_procs(below, timeout=60)[1]
        assert alive == [], "something goes on without the study"
        assert not (self.out / "results.json").exists(), "it was to be stopped before its end"
        return self.cells(), err

    def cells(self) -> dict[str, tuple]:
        """Every finished cell: its inode, time and bytes; a cell that is written again has another inode."""
        found = {}
        for path in self.out.glob("**/cells/[!.]*.json"):
            state = path.stat()
            found[str(path.relative_to(self.out))] = state.st_ino, state.st_mtime_ns, path.read_bytes()
        return found

    def assert_kept(self, before: dict) -> None:
        assert before
        now = self.cells()
        assert {name: now.get(name) for name in before} == before, "a finished cell was computed again"
        assert len(now) > len(before), "nothing was left to do"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the studies lie, and a miniature of their subject."""
    folder = tmp_path_factory.mktemp("studies")
    save_miniature(folder / "miniature", few_texts().train, n_layers=3)
    return folder


@pytest.fixture(scope="module")
def undisturbed(root) -> bytes:
    """Results of the study that ran through, locally."""
    return Study(root, "undisturbed").finish()


def test_the_study_holds_what_it_should(undisturbed):
    """So that the comparisons below are not of nothing."""
    banks = json.loads(undisturbed)["banks"]
    assert [b["hook_name"] for b in banks] == [f"blocks.{layer}.hook_resid_pre" for layer in (1, 2)]
    for found in banks:
        assert len(found["saes"]) == 2 * 2 * 2, "budgets, seeds, and TopK with its reference"
        assert all(row["cebench"]["estimate"] is not None for row in found["conditions"])


def test_killed_and_interrupted_midway_the_same_command_finishes_it(root, undisturbed):
    """SIGKILL in the first bank, SIGINT in the second, and then to the end."""
    study = Study(root, "local")
    killed, _ = study.stop_midway(signal.SIGKILL, cells=1)
    interrupted, err = study.stop_midway(signal.SIGINT, cells=9)  # a bank has eight
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in err
    assert {name: interrupted[name] for name in killed} == killed
    assert study.finish() == undisturbed
    study.assert_kept(interrupted)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (requirements-cluster.txt)")
def test_killed_on_ray_the_same_command_finishes_it(root, undisturbed):
    study = Study(root, "ray", "--executor", "ray")
    killed, _ = study.stop_midway(signal.SIGKILL, cells=1)
    assert study.finish() == undisturbed
    study.assert_kept(killed)
