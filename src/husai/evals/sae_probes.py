"""SAEBench's `sparse_probing_sae_probes`, by its official code or by `sae_probes_exact`. Each SAE has its own folder.

The official code reuses any file at the place where it would write, even if another SAE made the file. Therefore the
name of a folder is a digest of the SAE, the subject, the data sets, the settings and the versions of packages. Only the
requested data sets are read. The official code runs in several processes:
`python -m husai.evals.sae_probes TASKS.json`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from husai.evidence.data_sets import FAMILIES
from husai.runs.code import code_version
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import digest, locked, read_json, write_json
from husai.runs.progress import progress
from husai.subjects import text

OFFICIAL: Final = "sae_probes"
EXACT: Final = "sae_probes_exact"
PROBINGS = OFFICIAL, EXACT
"""Names of the probe implementations: sae-probes' official code, and the same probes solved to their optimum
(`sae_probes_exact`). Selection and gate never compare figures of two implementations."""
PACKAGES = ("sae-bench", "sae-probes", "sae-lens", "scikit-learn", "torch", "numpy")
METRICS = ("test_auc", "test_acc", "test_f1", "val_auc")
INSTALL = "sae-bench is not installed: make setup (or pip install --no-deps -r requirements-nodeps.txt)"


def versions(probing: str = OFFICIAL) -> dict[str, str]:
    """Versions of the packages that compute the figures.

    Raises:
        BadInput: a package is missing.
    """
    try:
        return {p: importlib.metadata.version(p) for p in (*PACKAGES, *(["scipy"] if probing == EXACT else []))}
    except importlib.metadata.PackageNotFoundError as error:
        raise BadInput(INSTALL if error.name == "sae-bench" else f"{error.name} is not installed: make setup") from None


@dataclass(frozen=True)
class Settings:
    """Settings that a probing figure depends on, besides the SAE and the seed."""

    subject_digest: str
    model_name: str
    hook_name: str
    data_sets: tuple[str, ...]
    ks: tuple[int, ...]
    reg_type: str = "l1"
    binarize: bool = False
    probing: str = OFFICIAL


@dataclass(frozen=True)
class ProbeTask:
    """One SAE, other encoder, or the model itself, at one seed of the benchmark."""

    label: str
    kind: str
    """`sae`: folder in the SAELens layout. `encoder`: safetensors file of `W` and `mean`. `llm`: the model itself."""
    path: str | None
    identity: str
    """Digest of the probed SAE, encoder or model."""
    seed: int
    settings: Settings
    cache: str
    """Folder that holds `model_activations_<model_name>/<data set>_<hook>.pt`."""
    root: str
    device: str

    @property
    def encoder(self) -> str:
        """Path of an SAE or other encoder. The model itself has none."""
        assert self.path is not None
        return self.path

    @cached_property
    def key(self) -> dict:
        """Everything that the figures depend on."""
        from husai.activations.language_model import harvest_prompts
        from husai.dictionaries import checkpoints
        from husai.evals import sae_probes_exact

        key = {"kind": self.kind, "identity": self.identity, "seed": self.seed, "device": self.device}
        exact = [sae_probes_exact.run] if self.settings.probing == EXACT else []
        key["code"] = code_version(harvest_prompts, checkpoints.save, *exact)
        settings = asdict(self.settings)
        if exact:  # one file for each data set: studies with different lists share the files
            del settings["data_sets"]
        return json.loads(json.dumps(key | {"settings": settings, "versions": versions(self.settings.probing)}))

    @cached_property
    def folder(self) -> Path:
        return Path(self.root) / f"{self.label}-seed{self.seed}-{digest(self.key)[:16]}"

    def drop_torn(self) -> None:
        """Remove files that an interruption cut off, because the official code would read them as whole."""
        for name in self.settings.data_sets:
            if self.file(name).exists() and _read(self, name) is None:
                self.file(name).unlink()

    def locked(self):
        """A lock on the folder, because several studies share it. Only the holder of the lock writes there."""
        return locked(self.folder.with_name(f".{self.folder.name}.lock"))

    def file(self, data_set: str) -> Path:
        """File of a data set's figures."""
        s = self.settings
        if s.probing == EXACT:
            return self.folder / f"{data_set}.json"
        if self.kind == "llm":
            return self.folder / f"baseline_results_{s.model_name}/normal_setting/{data_set}_{s.hook_name}_logreg.json"
        name = f"{data_set}_{s.hook_name}_{s.reg_type}{'_binarized' if s.binarize else ''}.json"
        return self.folder / f"sae_custom_sae/sae_probes_{s.model_name}/normal_setting/{name}"


def check_data_sets(names: list[str]) -> list[str]:
    """Binary probing sets that a list of names and sides means. Neither husai-tiny nor any SAE saw their texts.

    Raises:
        BadInput: a name is unknown, a set is not binary, or its texts are training text.
    """
    binary, trained = set(text.binary_sets()), set(text.names("train"))
    names_of_sets = [n for name in names for n in text.expand([name]) if name not in FAMILIES or n in binary]
    for name in names_of_sets:
        if name in trained:
            raise BadInput(f"--dataset-names: {name} is text that language model and SAEs are trained on")
        if name not in binary:
            raise BadInput(f"--dataset-names: {name} is not one of sae-probes' {len(binary)} binary data sets")
    if repeated := sorted({n for n in names_of_sets if names_of_sets.count(n) > 1}):
        raise BadInput(f"--dataset-names: {repeated[0]} is named twice")
    seen = text.corpus().trained_on
    for name in names_of_sets:
        if shared := sum(text.document_id(t) in seen for t in text.documents(name)):
            raise BadInput(f"--dataset-names: {name} shares {shared} documents with the training text")
    return names_of_sets


def run(tasks: list[ProbeTask], workers: int, work: Path, force: bool = False) -> list[dict]:
    """Run the unfinished tasks, then read all; returns `figures` of each task.

    Args:
        workers: number of processes for the official code. Exact probes use one.
        work: folder for lists of tasks and output of the official code, `sae_probes_<worker>.{json,log}`.

    Raises:
        CheckFailed: the official code failed, or its results are incomplete.
    """
    waiting = []
    for task in tasks:
        with task.locked():
            if force:
                shutil.rmtree(task.folder, ignore_errors=True)
            key = task.folder / "key.json"
            if key.exists() and read_json(key, "probing results") != task.key:
                raise BadInput(f"--results-path: {task.folder} holds other results than its name says; delete it")
            task.drop_torn()
            if not all(task.file(name).exists() for name in task.settings.data_sets):
                write_json(key, task.key)
                waiting.append(task)
    official = [task for task in waiting if task.settings.probing == OFFICIAL]
    exact = [task for task in waiting if task.settings.probing == EXACT]
    if official:
        _run_workers(official, min(workers, len(official)), work)
    if exact:
        from husai.evals import sae_probes_exact

        with progress(f"exact probes on {len(exact)} encoders (data sets)", _missing(exact)) as advance:
            sae_probes_exact.run(exact, advance)
    figures_of_tasks = []
    for task in tasks:
        with task.locked():
            figures_of_tasks.append(figures(task))
    return figures_of_tasks


def _missing(tasks: list[ProbeTask]) -> int:
    """Number of missing result files of the tasks, one file for each data set."""
    return sum(not t.file(name).exists() for t in tasks for name in t.settings.data_sets)


def _run_workers(tasks: list[ProbeTask], workers: int, work: Path) -> None:
    processes, failed = [], []
    total = _missing(tasks)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JAXTYPING_DISABLE": "1"}
    try:
        for i in range(workers):
            write_json(work / f"sae_probes_{i}.json", [asdict(t) for t in tasks[i::workers]])
            command = [sys.executable, "-m", "husai.evals.sae_probes", str(work / f"sae_probes_{i}.json")]
            with open(work / f"sae_probes_{i}.log", "w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        with progress(f"sae-probes on {len(tasks)} encoders (data sets)", total) as advance:
            done = 0
            while any(p.poll() is None for p in processes):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    next(p for p in processes if p.poll() is None).wait(1)
                now = total - _missing(tasks)
                advance(now - done)
                done = now
                if failed := [i for i, p in enumerate(processes) if p.poll()]:
                    break
    finally:
        for p in processes:
            if p.poll() is None:
                p.terminate()
                p.wait()
    for i in failed or [i for i, p in enumerate(processes) if p.returncode]:
        log = work / f"sae_probes_{i}.log"
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise CheckFailed(f"sae-probes failed with return code {processes[i].returncode}: {last} (see {log})")


def figures(task: ProbeTask) -> dict[str, dict[str, list[float]]]:
    """{k (`llm` for the model): {metric: figures of the data sets, in the order of the settings}}.

    Raises:
        CheckFailed: a data set or a k is missing, or a figure is not finite.
    """
    s = task.settings
    ks = ["llm"] if task.kind == "llm" else [str(k) for k in s.ks]
    values: dict = {k: {m: [] for m in METRICS} for k in ks}
    for name in s.data_sets:
        rows = _read(task, name)
        if rows is None or set(rows) != set(ks):
            raise CheckFailed(f"sae-probes left no whole result for {name} in {task.file(name)}")
        for k in ks:
            for m in METRICS:
                values[k][m].append(rows[k][m])
    return values


def _read(task: ProbeTask, data_set: str) -> dict[str, dict[str, float]] | None:
    """{k: {metric: figure}} of one data set; None if the file is missing, cut off or not finite."""
    try:
        rows = json.loads(task.file(data_set).read_text())
        by_k = {"llm" if task.kind == "llm" else str(r["k"]): {m: float(r[m]) for m in METRICS} for r in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return by_k if all(math.isfinite(v) for row in by_k.values() for v in row.values()) else None


# ---------------------------------------------------------------------------------------------------------------------
# A worker: one process, one thread


def _work(task: ProbeTask) -> None:
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
    from sae_bench.evals.sparse_probing_sae_probes.main import run_eval
    from sae_lens import SAE
    from sae_probes import run_baseline_evals, run_sae_evals

    s, results_path = task.settings, str(task.folder)
    shared = {"model_name": s.model_name, "model_cache_path": task.cache}
    if task.kind == "sae":
        config = SparseProbingSaeProbesEvalConfig(
            random_seed=task.seed,
            dataset_names=list(s.data_sets),
            reg_type=s.reg_type,
            ks=list(s.ks),
            binarize=s.binarize,
            results_path=results_path,
            include_llm_baseline=False,
            **shared,
        )
        with warnings.catch_warnings(action="ignore"):  # of settings of the model, which are applied already
            sae = SAE.load_from_disk(task.encoder, device=task.device)
        run_eval(config, [("sae", sae)], task.device, results_path, force_rerun=True)
        return
    common = {"hook_name": s.hook_name, "setting": "normal", "datasets": list(s.data_sets), "seed": task.seed}
    common |= shared | {"device": task.device}
    if task.kind == "llm":
        run_baseline_evals(results_path=results_path, method="logreg", **common)
    else:
        run_sae_evals(
            sae=Linear(task.encoder, task.device),
            reg_type=s.reg_type,
            ks=list(s.ks),
            binarize=s.binarize,
            results_path=task.folder / "sae_custom_sae",
            **common,
        )


class Linear:
    """A linear map that sae-probes accepts as an SAE: its features are `(x − mean) @ W`."""

    def __init__(self, path: str, device: str):
        from safetensors.torch import load_file

        weights = load_file(path, device=device)
        self.W, self.mean = weights["W"], weights["mean"]

    def encode(self, x):
        return (x - self.mean) @ self.W


def end_with_parent() -> None:
    """Stop this process when its parent ends for any reason (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _tasks(path: Path) -> Iterator[ProbeTask]:
    for t in read_json(path, "tasks"):
        s = t.pop("settings")
        settings = Settings(**{**s, "data_sets": tuple(s["data_sets"]), "ks": tuple(s["ks"])})
        yield ProbeTask(**t, settings=settings)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    end_with_parent()
    for each in _tasks(Path(sys.argv[1])):
        with each.locked():
            each.drop_torn()
            _work(each)
