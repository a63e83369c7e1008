"""The whole queue at its smoke sizes, in processes of its own, on a miniature of a language model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path

import psutil

import processes

ROOT = Path(__file__).resolve().parents[2]
QUEUE = "scripts/experiments/run_b200_high_impact_queue.sh"
PATIENCE = 600  # seconds for what takes one minute on an idle machine
PASSING = ("queue", "logs", "workers")  # folders of what says when and how it ran
server = 0
"""Process that the stages are children of."""
TIMED = ("experiments/*/manifest.json", "report.html", "*/sae_custom_sae_eval_results.json")  # files that do


class Queue:
    """The queue on one output folder; what it prints is kept in a file beside it (`printed`)."""

    def __init__(self, out: Path, subject: Path, printed: Path | None = None):
        self.out, self.subject, self.printed = out, subject, printed or out.with_suffix(".log")
        self.places = [out]  # all that this folder has been called

    def start(self, *arguments: str) -> subprocess.Popen:
        """In a session of its own, so that all of it can be killed at once."""
        variables = {"PROFILE": "smoke", "OUTPUT": str(self.out), "SUBJECT": str(self.subject)}
        environment = os.environ | variables | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
        with open(self.printed, "w") as printed:
            return processes.start(
                ["bash", QUEUE, *arguments], env=environment, stdout=printed, stderr=subprocess.STDOUT
            )

    def run(self, *arguments: str) -> tuple[int, str]:
        """To its end; (exit code, all that was printed)."""
        process = self.start(*arguments)
        try:
            processes.end(process, PATIENCE)
        finally:
            kill(process)
        return process.returncode, self.said()

    def said(self) -> str:
        return self.printed.read_text()

    def wait_for(self, process: subprocess.Popen, stage: str) -> bool:
        """Until a stage is entered or stands (true), or the process has ended (false)."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(rf"^== {stage}( stands)?$", self.said(), re.M):
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def files(self) -> dict[str, str]:
        """sha256 of all that must be the same however it came about: times, logs, locks and single runs aside. The
        gate's decision names the places of what it read."""
        found = {}
        for path in self.out.rglob("*"):
            relative = path.relative_to(self.out)
            parts = relative.parts
            aside = any(p in PASSING or p.startswith((".", "run_")) for p in parts) or any(map(relative.match, TIMED))
            if path.is_file() and not aside:
                content = path.read_bytes()
                for place in self.places:
                    content = content.replace(str(place).encode(), b"OUT")
                found["/".join(parts)] = sha256(content).hexdigest()
        return found

    def unlike(self, other: Queue) -> list[str]:
        """The files that only one of both has, or that differ."""
        ours, theirs = self.files(), other.files()
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))

    def finished(self) -> dict[str, tuple]:
        """Every finished cell, subject and store, and the checkpoints of finished trainings: what is written again has
        another inode."""
        wholes = ("**/cells/[!.]*.json", "subjects/*/subject.json", "activations/*/manifest.json")
        found = [path for whole in wholes for path in self.out.glob(whole)]
        for cell in self.out.glob("**/cells/training-*.json"):
            found += [cell.parents[1] / name for name in json.loads(cell.read_text())["artefacts"]]
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}

    def stages(self) -> list[str]:
        """The stages that were entered, in order."""
        lines = [line.split() for line in self.said().splitlines() if line.startswith("== ")]
        return [name for _, name, *stands in lines if not stands]

    def copied_to(self, out: Path, printed: Path | None = None) -> Queue:
        """A copy of all that it left, which stands as it stood."""
        shutil.copytree(self.out, out)
        manifest = out / "queue/manifest.json"
        manifest.write_text(manifest.read_text().replace(str(self.out), str(out)))  # commands name their places
        copy = Queue(out, self.subject, printed)
        copy.places += self.places
        return copy


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the queue and to everything that it has started; returns when all of them are gone."""
    below = []
    for parent in (process.pid, server):  # the server's children are stages: one queue runs at a time
        with contextlib.suppress(psutil.NoSuchProcess):
            below += psutil.Process(parent).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stage in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            stage.kill()
    process.wait()
    alive = psutil.wait_procs(below, timeout=60)[1]
    assert alive == [], "something goes on without the queue"
