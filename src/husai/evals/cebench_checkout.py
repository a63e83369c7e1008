"""Runs the user's own checkout of CE-Bench, unmodified and offline, in a separate process.

The checkout's `ce_bench/CE_Bench.py::run_eval_once` scores one SAE on pairs of stories. It would download its subject;
here it gets a subject that HUSAI opened. Imports that the score does not need are replaced by stand-ins. The scores are
those of the checkout's code. They are informational, and cannot be compared between widths.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import read_json, sha256_file, write_json
from husai.runs.subjects import SubjectName, folder_of

SCRIPT = Path("ce_bench") / "CE_Bench.py"
OUTPUT = "interpretability_eval"  # where CE-Bench writes, below the current directory
PAIRS, STAND_INS, LOG = "pairs.json", "stand_ins.json", "cebench.log"
SCORES = ("contrastive_score_mean", "independent_score_mean", "interpretability_score_mean")
IMPORTS = {
    "openai": "OpenAI",
    "stw": "Stopwatch",
    "tabulate": "tabulate",
    "sae_lens.toolkit.pretrained_saes_directory": "get_pretrained_saes_directory",  # gone since SAELens 6
}
"""Imports of CE_Bench.py that the score does not depend on: module -> name."""


def run(
    repo: Path,
    subject: str,
    random_seed: int | None,
    checkpoint: Path,
    pairs: list[dict[str, str]],
    work: Path,
    device: str,
) -> dict:
    """Score an SAE with a checkout of CE-Bench. Stories longer than the subject's context are cut at the end.

    Args:
        repo: the checkout.
        subject, random_seed: arguments of `pretrained.load`.
        checkpoint: folder in SAELens' layout, with model_name and hook_name in its metadata.
        pairs: story pairs with the keys story1, story2 and subject. The two stories differ in the subject.
        work: folder for inputs, log and output. An earlier output is deleted.
        device: cpu, cuda, …

    Returns:
        The three `*_score_mean` (mean over pairs of the largest z-score among features) and total_rows. Provenance:
        commit, modified (whether tracked files differ from the commit; both None without git) and the sha256 of
        CE_Bench.py. stand_ins: modules that were replaced. return_code.

    Raises:
        BadInput: `repo` holds no CE-Bench.
        CheckFailed: CE-Bench stopped with an error, or its scores are missing, not finite, or of other pairs.
    """
    sha256 = code_digest(repo)
    repo, work = repo.resolve(), work.resolve()
    provenance = {**revision(repo), "sha256": sha256}
    shutil.rmtree(work / OUTPUT, ignore_errors=True)
    write_json(work / PAIRS, pairs)
    folder = folder_of(subject)
    command = [sys.executable, "-m", "husai.evals.cebench_checkout", "--repo", str(repo)]
    command += [
        "--subject",
        str(replace(SubjectName.parse(subject), name=str(folder.absolute()))) if folder else subject,
    ]
    command += [] if random_seed is None else ["--random-seed", str(random_seed)]
    command += ["--checkpoint", str(checkpoint.resolve()), "--pairs", str(work / PAIRS), "--device", device]
    source = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # nothing in `work` is taken for a package
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
    with open(work / LOG, "wb") as log:
        code = subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        lines = (work / LOG).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        raise CheckFailed(f"CE-Bench: exit code {code} ({last[:200]}); log: {work / LOG}")
    scores = read_scores(work, len(pairs))
    return scores | provenance | {"stand_ins": read_json(work / STAND_INS), "return_code": code}


def code_digest(repo: Path) -> str:
    """sha256 of the checkout's CE_Bench.py.

    Raises:
        BadInput: `repo` holds no CE-Bench.
    """
    if not (repo / SCRIPT).is_file():
        raise BadInput(f"CE-Bench: {repo / SCRIPT} does not exist; a checkout of Yusen-Peng/CE-Bench expected")
    return sha256_file(repo / SCRIPT)


def read_scores(work: Path, rows: int) -> dict:
    """The three scores and total_rows, from the only results.json below `work`.

    Later versions of CE-Bench write a dict for each score. Its `max` is the score of earlier versions.

    Raises:
        CheckFailed: there is not exactly one result, a score is missing or not finite, or there are not `rows` pairs.
    """
    files = list((work / OUTPUT).glob("**/results.json"))
    if len(files) != 1:
        raise CheckFailed(f"CE-Bench: {len(files)} results.json in {work / OUTPUT}; 1 expected; log: {work / LOG}")
    try:
        result = json.loads(files[0].read_text())
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("total_rows") != rows:
        raise CheckFailed(f"CE-Bench: {files[0]} is not a result of {rows} pairs; log: {work / LOG}")
    scores = {}
    for name in SCORES:
        value: Any = result.get(name)
        value = value.get("max") if isinstance(value, dict) else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise CheckFailed(f"CE-Bench: {name} is {value!r} in {files[0]}; log: {work / LOG}")
        scores[name] = value
    return scores | {"total_rows": rows}


def revision(repo: Path) -> dict:
    """Commit of a checkout, and whether its files were modified; both None if it is no git repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(repo), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != repo:  # unpacked files may lie inside another repository
        return {"commit": None, "modified": None}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if changes is None else changes != ""}


def add_stand_ins() -> list[str]:
    """Add a stand-in for each module of IMPORTS that cannot be imported; returns the names of these modules.

    A stand-in can be called and returns an object without a value. A score computed from it would raise an error.
    """
    missing = []
    for name, attribute in IMPORTS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            setattr(module, attribute, mock.Mock(name=f"stand-in for {name}.{attribute}"))
            sys.modules[name] = module
            missing.append(name)
    return missing


def main() -> None:
    """Entry point of the separate process: call CE_Bench.py's run_eval_once in the current directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--repo", "--checkpoint", "--pairs"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--subject", required=True)
    parser.add_argument("--random-seed", type=int)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    # The checkout has an old sae_lens at its root. Installed packages must be found before it.
    repo = args.repo.resolve()
    checkout = [repo, repo / SCRIPT.parent]
    sys.path = [p for p in sys.path if Path(p).resolve() not in checkout] + [*map(str, checkout)]

    write_json(Path(STAND_INS), add_stand_ins())
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, repo / SCRIPT)
    assert spec is not None
    assert spec.loader is not None  # Python knows how to load a .py file
    ce_bench = sys.modules[SCRIPT.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ce_bench)

    from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
    from sae_lens import SAE
    from transformer_lens import HookedTransformer

    from husai.subjects import pretrained

    subject = pretrained.load(args.subject, args.random_seed, args.device)
    tokenizer = type(subject.tokenizer)
    subject.tokenizer.truncation_side = "right"
    truncated = functools.partialmethod(tokenizer.__call__, truncation=True, max_length=subject.n_ctx)
    with (
        mock.patch.object(HookedTransformer, "from_pretrained_no_processing", return_value=subject.model),
        mock.patch.object(tokenizer, "__call__", truncated),
    ):
        ce_bench.run_eval_once(
            dataset=read_json(args.pairs),
            device=args.device,
            sae_release="husai",
            sae_id=SAE.load_from_disk(args.checkpoint, device=args.device),
            config=AutoInterpEvalConfig(model_name=subject.name, llm_dtype=subject.dtype),
        )


if __name__ == "__main__":
    main()
