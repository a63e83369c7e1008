"""Every command of the documents' shell blocks: its files, targets, flags and values exist; and one chain is run."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

import processes
from conftest import ROOT
from husai.runs.cli import Parser

PAGES = [path.relative_to(ROOT) for pattern in ("*.md", "docs/*.md", "assets/**/*.md") for path in ROOT.glob(pattern)]

CANNOT_RUN = {
    # What makes or enters an environment: with a network, and outside of this one.
    "conda env create": "conda is not part of the environment",
    "conda activate": "as above",
    "source .venv/bin/activate": "the tests' own interpreter stands for it",
    "pip install": "downloads; test_repository.py checks what the requirement files pin",
    "pre-commit install": "changes the checkout's git hooks",
    "pytest": "this suite",
    # A cluster: test_executor.py and test_kill_studies.py run on a Ray of this machine alone.
    "export": "a setting of the shell that Ray is started from",
    "ray get-auth-token": "writes to the home folder",
    "ray start": "opens ports to other machines",
    "ray status": "asks a running cluster",
    "ray stop": "ends every Ray of this user",
    "head=$(scontrol": "Slurm",
    "srun ray symmetric-run": "Slurm; the command after -- is checked like the others",
}
"""How a command begins -> why it is not run; what it names is checked all the same."""

PLACEHOLDERS = {
    "STORE": "a folder that extract_activations.py printed",
    "RANDOM_STORE": "as above",
    "RESID_MID_STORE": "as above",
    "MLP_OUT_STORE": "as above",
    "MY_SAES": "the reader's checkpoints",
    "MY_SAES_BEFORE": "the same before training",
    "MY_SAE": "the reader's checkpoint",
    "CKPT": "as above",
    "RELEASE": "a name of SAELens' catalogue",
    "SAE_ID": "as above",
    "MODEL": "a model's name",
    "HOOK": "a place in it",
    "PATH": "the reader's checkout of CE-Bench",
    "LOCAL_HF_FOLDER": "the reader's model",
    "TEXT_FOLDER": "the reader's text; a folder with one file stands for it",
    "HEAD": "a machine's name",
}
"""Words in capitals that stand for something of the reader's."""

SMALL = {
    "scripts/analysis/extract_activations.py": "--rows 3000",
    "scripts/experiments/train_husai_sae_on_cached_activations.py": "--architecture topk,relu --seeds 1,2 --d-sae 64 "
    "--k 8 --tokens 2000 --batch-size 128",
    "scripts/experiments/run_husai_saebench_custom_eval.py": "--dataset-names 36_sciq_tf --noise-seeds 43 --rows 1000",
    "scripts/experiments/run_husai_cebench_custom_eval.py": "--max-rows 16 --noise-seeds 43 --rows 1000",
}
"""Script -> what makes it take seconds; it is run here. Of a flag that is given twice the last one counts."""


def commands(name: str | Path, section: str = "") -> list[list[str]]:
    """The words of each command in the shell blocks of a document, or of one section, without comments. In a block
    that is indented, of the lines that begin with `python`."""
    text = (ROOT / name).read_text()
    if section:
        (text,) = [part for part in re.split(r"^#{2,3} ", text, flags=re.M) if part.startswith(f"{section}\n")]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    blocks += [line + "\n" for line in re.findall(r"^    (python .*)$", text, re.M)]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_settings(words: list[str]) -> list[str]:
    """`PROFILE=b200 bash x.sh` -> `bash x.sh`."""
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def inline(name: Path) -> list[list[str]]:
    """The words of each `python …` in a document's text."""
    spans = re.findall(r"`(python (?:scripts|benchmarks)/[^`…]+)`", (ROOT / name).read_text())
    return [shlex.split(span) for span in spans]


EVERY = {" ".join(words): words for name in PAGES for words in commands(name)}
INLINE = {" ".join(words): words for name in PAGES for words in inline(name)}


class Parsed(Exception):
    """Ends a script that has read its arguments."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """`parsed(words)`: what the script at words[0] makes of the others, by its own parser and checks, and no more."""

    def stop(parser, *arguments):
        raise Parsed(argparse.ArgumentParser.parse_args(parser, *arguments))

    # The documents write MY_SAES and STORE for what a reader has.
    monkeypatch.setattr("husai.evals.flags.refuse_missing", lambda args: None)

    def parse(words):
        (tmp_path / "a.txt").write_text("a document\n")
        words = [str(tmp_path) if word == "TEXT_FOLDER" else word for word in words]
        monkeypatch.syspath_prepend(ROOT / words[0].rpartition("/")[0])  # where python looks first for a script
        script = runpy.run_path(str(ROOT / words[0]), run_name="parsed_only")
        monkeypatch.setattr(sys, "argv", words)
        if "parse" in script:
            return script["parse"]()
        with monkeypatch.context() as patched:  # these begin with it, and check nothing beyond
            patched.setattr(Parser, "parse_args", stop)
            with pytest.raises(Parsed) as stopped:
                script["main"]()
        return stopped.value.args[0]

    return parse


def test_every_document_was_read():
    assert len(EVERY) > 40
    assert len(INLINE) > 5
    assert {"python", "make", "bash"} <= {words[0].split("=")[0] for words in map(without_settings, EVERY.values())}


@pytest.mark.parametrize("command", EVERY | INLINE)
def test_what_a_command_names_exists(command, parsed, capsys):
    """Targets of make and the queue are looked up, not run: they take minutes."""
    words = without_settings((EVERY | INLINE)[command])
    known = [start for start in CANNOT_RUN if command.startswith(start)]
    if known and "python" in words:
        words = words[words.index("python") :]
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        try:
            assert vars(parsed(words[1:]))
        except SystemExit as refused:
            pytest.fail(f"{refused.code}: {capsys.readouterr().err}")
    elif words[0] == "make":
        targets = {word for word in words[1:] if "=" not in word}
        assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    elif words[0] == "bash":
        settings = dict(word.split("=", 1) for word in shlex.split(command) if re.match(r"[A-Z_]+=", word))
        assert all(f"${{{name}:-" in (ROOT / words[1]).read_text() for name in settings)
        dry = [*words, *([] if "--dry-run" in words else ["--dry-run"])]
        processes.run(dry, env=os.environ | settings)
    else:
        assert known, "neither run by a test nor listed as what cannot run here"
    for word in words:
        if re.search(r"\.(txt|yml|py|sh)$|^docs/.*\.json$", word):
            assert (ROOT / word).is_file(), word
    for word in words:
        for capitals in re.findall(r"(?<![\w$=-])[A-Z][A-Z_]{3,}(?![\w=.-])", word):
            assert capitals in PLACEHOLDERS, f"{capitals} is no known placeholder"


def test_the_networked_check_can_be_read(parsed):
    """Its commands parse, although they run only where there is a network."""
    printed = processes.run(["bash", "scripts/ci/networked_check.sh", "--dry-run"]).stdout.splitlines()
    words = [shlex.split(line) for line in printed if line.startswith("python ")]
    assert len(words) == 4
    for _, script, *arguments in words:
        if not script.startswith("scripts/ci/"):  # has no parser apart from its main
            assert vars(parsed([script, *arguments]))
        assert (ROOT / script).is_file()


def test_a_wrong_command_is_noticed(parsed, capsys):
    """The checks above can fail: an unknown flag, a value that does not parse, a check of the script's own."""
    scripts = "scripts/experiments/run_phase4a_reproduction.py", "scripts/analysis/plan_scale.py"
    for words in ([scripts[0], "--sead", "1"], [scripts[0], "--k", "300"], [scripts[1], "--gpu", "none"]):
        with pytest.raises(SystemExit, match="2"):
            parsed(words)
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.nightly  # test_benchmarks.py runs the same scripts with other arguments
def test_the_external_benchmarks_as_written(run_script, tmp_path, monkeypatch):
    """Each command finds what those before it left, on the language model that ships. Where relative paths lead, there
    is nothing at first but the documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    stores, done = {}, []
    for _, script, *arguments in commands("RUNBOOK.md", "External benchmarks"):
        if script in SMALL:
            given = [stores.get(a, a) for a in arguments]
            code, out, err = run_script(script, *given, *SMALL[script].split(), "--threads", 1)
            assert code == 0, err
            done.append(script)
            if out.startswith("store"):
                stores["RANDOM_STORE" if "--random-model" in arguments else "STORE"] = out.split()[1]
    assert set(done) == set(SMALL)
    assert len(set(stores.values())) == 2
    for name in ("saebench_custom", "cebench_custom"):
        results = json.loads((tmp_path / "results" / "experiments" / name / "results.json").read_text())
        assert {r["facts"]["family"] for r in results["saes"]} == {"topk", "relu"}
        assert results["controls"]


NOT_RUN = {f"benchmarks/{path.name}": "measures for minutes; make benchmarks" for path in ROOT.glob("benchmarks/*.py")}
NOT_RUN |= {"scripts/ci/networked_check.sh": "downloads; its commands are parsed above"}
"""Script of a command -> why no test runs it. Its arguments are parsed."""


def test_every_script_of_a_command_is_run_by_a_test():
    """With arguments of the test's own, at sizes that take seconds; the pages' arguments are parsed above."""
    places = [*ROOT.glob("tests/**/*.py"), ROOT / "scripts/experiments/run_b200_high_impact_queue.sh"]
    run = "".join(path.read_text() for path in places if path != Path(__file__))
    named = {word for words in (EVERY | INLINE).values() for word in words if re.search(r"\.(py|sh)$", word)}
    assert len(named) > 25
    for script in named:
        assert script in NOT_RUN or script.removeprefix("scripts/") in run, script


def test_the_lists_hold_nothing_that_is_gone():
    for start in CANNOT_RUN:
        assert any(command.startswith(start) for command in EVERY), start
    words = Counter(w for words in EVERY.values() for word in words for w in re.findall(r"[A-Z_]+", word))
    assert set(PLACEHOLDERS) <= set(words)
