"""Run folders: configuration, logs, results, and a manifest, which is written last and makes the folder complete."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from husai.runs.cli import INTERRUPTED
from husai.runs.errors import CRASHED, BadInput, CheckFailed
from husai.runs.files import REPOSITORY, digest, locked, sha256_file, write_json, write_text
from husai.runs.progress import follow

log = logging.getLogger("husai")
RECORDED_PACKAGES = ("husai", "torch", "numpy", "scipy", "pandas", "safetensors", "transformer-lens", "sae-lens")


Status = Literal["complete", "failed", "interrupted"]


class Manifest(BaseModel):
    """Record of a run: command, code, inputs, machine and outcome."""

    model_config = ConfigDict(extra="forbid")

    run_id: str
    status: Status
    return_code: int
    command: str
    started_utc: str
    wall_seconds: float
    git_commit: str | None
    git_dirty: bool | None
    git_reason: str | None  # reason why commit and dirtiness are null
    python: str
    platform: str
    packages: dict[str, str | None]
    device: str
    threads: int
    inputs: dict[str, str]  # label -> sha256
    commands: list[dict] = []
    """Commands that the run started: {"command", "return_code", "seconds", "log": path in the run folder}."""
    # File in the run folder, or drawn beside it (`figures/<name>`, `<name>.csv`, `<name>_map.json`) -> sha256.
    outputs: dict[str, str]


def git_state() -> tuple[str | None, bool | None, str | None]:
    """(commit, whether there are changes, None), or (None, None, reason)."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain")), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, None, f"git gave no commit ({type(error).__name__})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process; whether it ended within these seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


class Run:
    """Context manager of one run. It locks the output folder against a second run.

    Args:
        output_dir: folder for `run_<UTC>_<hash>/` and for copies of `results.json`, `summary.md` and `manifest.json`.
        config: whole configuration. It is written to `config.json`, and its digest names the folder.
        device, threads: entries of the manifest.

    Raises:
        BadInput: the folder cannot be written, or another run holds it.
    """

    def __init__(self, output_dir: Path, config: dict, device: str, threads: int):
        self.output_dir, self.config, self.device, self.threads = output_dir, config, device, threads
        self.inputs: dict[str, str] = {}
        self.commands: list[dict] = []

    def __enter__(self) -> Run:
        self._started = time.monotonic()
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.output_dir / ".lock", wait=False)
            self._lock.__enter__()
            self.folder = self._new_folder()
        except OSError as error:
            raise BadInput(f"--output-dir: {self.output_dir} cannot be written ({error.strerror})") from None
        write_json(self.folder / "config.json", self.config)
        self._handler = logging.FileHandler(self.folder / "logs" / "run.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)
        log.info("run folder %s", self.folder)
        return self

    def _new_folder(self) -> Path:
        while True:  # a second run of one configuration within a second waits for a new name
            self.started = datetime.now(UTC)
            self.run_id = f"run_{self.started:%Y%m%dT%H%M%SZ}_{digest(self.config)[:8]}"
            folder = self.output_dir / self.run_id
            try:
                (folder / "logs").mkdir(parents=True)
                return folder
            except FileExistsError:
                time.sleep(0.1)

    def add_input(self, label: str, path_or_digest: Path | str) -> None:
        """Record an input by its sha256, which is given or computed from the file."""
        self.inputs[label] = sha256_file(path_or_digest) if isinstance(path_or_digest, Path) else path_or_digest

    def command(self, name: str, command: list[str], title: str | None = None) -> int:
        """Run a command, log its output in `logs/<name>.log`, record it in the manifest; returns its return code.

        The terminal shows the log's place and the command's progress. The command line, which may be long, is in
        `run.log` and in the manifest.

        Args:
            title: what the terminal calls the command. None: its name.
        """
        began, path, title = time.monotonic(), self.folder / "logs" / f"{name}.log", title or name
        self._note(logging.INFO, f"{name}: {shlex.join(command)}")
        log.info("%s: log %s", title, path)
        with open(path, "wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                follow(title, path, lambda seconds: _ended(process, seconds))
            except BaseException:  # SIGTERM lets the command stop its own children
                process.terminate()
                process.wait()
                raise
            finally:
                shown = (Path(command[0]).name, *(a.removeprefix(f"{REPOSITORY}/") for a in command[1:]))
                record = {"command": shlex.join(shown), "return_code": process.returncode}
                seconds = round(time.monotonic() - began, 3)
                self.commands.append(record | {"seconds": seconds, "log": str(path.relative_to(self.folder))})
        return process.returncode

    def _note(self, level: int, text: str, error: Any = None) -> None:
        """Write a line into `run.log` alone, with the traceback of an error."""
        self._handler.handle(log.makeRecord(log.name, level, "", 0, "%s", (text,), error))

    def write(self, results: Any, summary: str) -> None:
        """Write `results.json` (strict) and `summary.md` into the run folder."""
        write_json(self.folder / "results.json", results)
        write_text(self.folder / "summary.md", summary)

    def __exit__(self, kind, error, traceback) -> None:
        codes: dict[type[BaseException], tuple[Status, int]] = {
            BadInput: ("failed", 2),
            CheckFailed: ("failed", 1),
            KeyboardInterrupt: ("interrupted", 130),
        }
        status: Status
        status, code = ("complete", 0) if kind is None else codes.get(kind, ("failed", CRASHED))
        if kind is CheckFailed and (self.folder / "results.json").exists():
            status = "complete"  # the work was done; the return code shows the failed check
        if INTERRUPTED.is_set():
            status, code = codes[KeyboardInterrupt]
        if status == "interrupted":
            self._note(logging.INFO, "interrupted: the same command resumes")
        elif kind is not None:  # the log keeps the traceback; the terminal gets one line, from `run_main`
            self._note(logging.ERROR, str(error), (kind, error, traceback))
        try:
            self._write_manifest(status, code)
            if (self.folder / "results.json").exists() and status == "complete":
                for name in ("results.json", "summary.md", "manifest.json"):
                    write_text(self.output_dir / name, (self.folder / name).read_text())
        finally:
            log.removeHandler(self._handler)
            self._handler.close()
            self._lock.__exit__(None, None, None)

    def _write_manifest(self, status: Status, code: int) -> None:
        commit, dirty, reason = git_state()
        outputs = {p.relative_to(self.folder): p for p in self.folder.rglob("*") if p.parent.name != "logs"}
        if status == "complete":
            drawn = (p for pattern in ("figures/*.png", "*.csv", "*_map.json") for p in self.output_dir.glob(pattern))
            outputs |= {p.relative_to(self.output_dir): p for p in drawn}
        manifest = Manifest(
            run_id=self.run_id,
            status=status,
            return_code=code,
            command=shlex.join([Path(sys.executable).name, *sys.argv]),
            started_utc=self.started.isoformat(timespec="seconds"),
            wall_seconds=round(time.monotonic() - self._started, 3),
            git_commit=commit,
            git_dirty=dirty,
            git_reason=reason,
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            packages={p: _version(p) for p in RECORDED_PACKAGES},
            device=self.device,
            threads=self.threads,
            inputs=self.inputs,
            commands=self.commands,
            outputs={str(name): sha256_file(outputs[name]) for name in sorted(outputs) if outputs[name].is_file()},
        )
        write_json(self.folder / "manifest.json", manifest.model_dump())
