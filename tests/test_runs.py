"""Atomic files, cells, run folders, exit codes."""

import errno
import hashlib
import json
import logging
import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest

import husai
import processes
from conftest import ROOT
from husai.runs import cli, code, progress
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import CRASHED, BadInput, CheckFailed
from husai.runs.files import (
    canonical_json,
    digest,
    locked,
    publish_directory,
    read_json,
    sha256_file,
    tree_digest,
    write_bytes,
    write_json,
)
from husai.runs.folder import Manifest, Run
from husai.runs.seeds import derive_seed


def test_json_is_strict(tmp_path):
    for value in (math.nan, math.inf, {"a": [-math.inf]}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "x.json", value)
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "x.json").write_text('{"a": NaN}')
    with pytest.raises(BadInput, match=rf"{tmp_path}/x\.json .*NaN"):
        read_json(tmp_path / "x.json")
    with pytest.raises(BadInput, match=rf"{tmp_path}/y\.json "):
        read_json(tmp_path / "y.json")


def test_digest_does_not_depend_on_key_order():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert canonical_json({"b": 1, "a": 2}) == '{"a":2,"b":1}'
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_publish_directory_shows_only_whole_folders(tmp_path):
    final = tmp_path / "folder"

    def half(partial):
        (partial / "a").write_text("1")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        publish_directory(final, half)
    assert not final.exists()
    publish_directory(final, lambda p: (p / "b").write_text("2"))
    assert [p.name for p in final.iterdir()] == ["b"], "what the killed build left is gone"
    publish_directory(final, lambda p: pytest.fail("it exists: nothing is to be built"))
    publish_directory(final, lambda p: (p / "c").write_text("3"), replace=True)
    assert [p.name for p in final.iterdir()] == ["c"]


def test_lock_is_refused_while_held_and_freed_by_death(tmp_path):
    lock = tmp_path / ".lock"
    holder = processes.start(
        [
            sys.executable,
            "-c",
            f"""
import pathlib, time
from husai.runs.files import locked
with locked(pathlib.Path({str(lock)!r})):
    print("held", flush=True)
    time.sleep(60)
""",
        ],
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=rf"{tmp_path} .*\.lock"), locked(lock, wait=False):
        pass
    processes.kill(holder)
    with locked(lock, wait=False):
        pass


def test_tree_digest_names_and_contents_count(tmp_path):
    (tmp_path / "a").write_text("1")
    first = tree_digest(tmp_path, "--x")
    (tmp_path / ".lock").write_text("ignored")
    assert tree_digest(tmp_path, "--x") == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert tree_digest(tmp_path, "--x") != first
    with pytest.raises(BadInput, match=f"--x: {tmp_path / 'none'} "):
        tree_digest(tmp_path / "none", "--x")


@pytest.fixture
def cell(tmp_path):
    """(get, calls, cell file, artefact): `get()` asks for one cell and counts how often it was computed."""
    cells, calls, artefact = Cells(tmp_path / "cells"), [], tmp_path / "artefact"

    def compute():
        calls.append(1)
        artefact.write_text("weights")
        return {"x": 1.25}, [artefact]

    def get(force=False):
        cells.force = force
        return cells.get("cell", {"k": 8}, compute)

    assert get() == {"x": 1.25}
    (path,) = (tmp_path / "cells").iterdir()
    return get, calls, path, artefact


def test_finished_cell_is_read(cell):
    get, calls, _, _ = cell
    assert get() == {"x": 1.25}
    assert len(calls) == 1
    get(force=True)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, artefact: path.write_text(path.read_text().replace("1.25", "1.35")),
        lambda path, artefact: path.write_text(path.read_text()[:-20]),
        lambda path, artefact: path.write_text("[]"),
        lambda path, artefact: path.write_text("{}"),
        lambda path, artefact: path.write_text(path.read_text().replace('"key": "', '"key": "0')),
        lambda path, artefact: artefact.write_text("Weights"),
        lambda path, artefact: artefact.unlink(),
    ],
    ids=["digit", "truncated", "other type", "no fields", "other key", "artefact changed", "artefact missing"],
)
def test_damaged_cell_is_named_and_computed_again(cell, damage, caplog):
    get, calls, path, artefact = cell
    damage(path, artefact)
    assert get() == {"x": 1.25}
    assert len(calls) == 2
    assert path.name in caplog.text
    assert get() == {"x": 1.25}
    assert len(calls) == 2


def test_a_cell_rests_on_what_the_cells_that_it_asks_for_rest_on(tmp_path):
    """Read or computed, elsewhere, at any depth: a change of the file is noticed by all of them."""
    control, calls = tmp_path / "controls" / "weights", []

    def get(depth):
        def compute():
            calls.append(depth)
            if depth == 0:
                control.parent.mkdir(exist_ok=True)
                control.write_text("weights")
                return "trained", [control]
            return [get(depth - 1)], []

        return Cells(tmp_path / ("phase" if depth else "controls") / "cells").get(f"cell{depth}", {}, compute)

    assert get(0) == "trained"
    assert get(2) == [["trained"]]
    assert calls == [0, 2, 1]
    assert get(2) == [["trained"]]
    assert calls == [0, 2, 1]
    control.write_text("Weights")
    assert get(2) == [["trained"]]
    assert calls == [0, 2, 1, 2, 1, 0]
    assert control.read_text() == "weights"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package({file: source})`: code_version of f in husai/a/first.py of a package that consists of these."""

    def version(files: dict[str, str]) -> str:
        root = tmp_path / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest() / "husai"
        for name, source in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(source)
        monkeypatch.setattr(code, "PACKAGE", root)
        return code_version(root / "a/first.py")

    return version


MODULES = {
    "__init__.py": "",
    "a/__init__.py": "",
    "a/first.py": "def f():\n    from husai.a import second\n    return second.x",
    "a/second.py": "import husai.b.third\nx = 1",
    "b/third.py": "import json, scipy.stats\ny = 2",
    "b/other.py": "z = 3",
}


@pytest.mark.parametrize(
    ("file", "source", "same"),
    [
        (
            "a/first.py",
            '"""Docs."""\ndef f():\n    """Why."""\n\n    from husai.a import second  # here\n    return second.x',
            True,
        ),
        ("a/first.py", "def f():\n    from husai.a import second\n    return second.x + 1", False),
        ("a/second.py", "import husai.b.third\nx: int = 1", False),
        ("a/second.py", "import husai.b.third\nx = 1\n'what it is'", True),
        ("a/__init__.py", "import os", False),
        ("b/third.py", "import json, scipy.stats\ny = 4", False),
        ("b/third.py", "import json, numpy, scipy.stats\ny = 2", False),
        ("b/other.py", "z = 4", True),
    ],
)
def test_code_version_follows_the_code_of_what_is_imported(package, file, source, same):
    assert (package(MODULES | {file: source}) == package(MODULES)) == same


def test_what_was_parsed_is_kept_by_content_and_never_trusted_blindly(package, monkeypatch):
    """The next process parses nothing; a changed file is parsed; a damaged store changes nothing."""
    version = package(MODULES)
    store = code.store_of(code.PACKAGE)
    whole = store.read_text()

    def again() -> tuple[str, int]:
        """(code version in a new process, number of files that it parses)."""
        count, parse = [], code.parse
        for function in (code.code_version, code.closure, code.parsed, code.kept):
            function.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(code, "parse", lambda source, path: (count.append(path), parse(source, path))[1])
            return code_version(code.PACKAGE / "a/first.py"), len(count)

    assert again() == (version, 0)
    for damaged in ("", "[]", "{", '{"a": 1}', whole[:-20]):
        store.write_text(damaged)
        assert again() == (version, 4), "two files are empty"
        assert store.read_text() == whole
    (code.PACKAGE / "b/third.py").write_text("import json, scipy.stats\ny = 4")
    changed, parsed = again()
    assert (changed != version, parsed) == (True, 1)


def test_code_version_follows_the_packages(package, monkeypatch):
    before = package(MODULES)
    code_version.cache_clear()
    monkeypatch.setattr(code, "installed", lambda name: "0.1" if name == "scipy" else "0")
    assert package(MODULES) != before


def test_functions_count_by_the_files_that_define_them():
    assert (
        code_version(digest)
        == code_version(partial(digest))
        == code_version(Path(husai.__file__).parent / "runs/files.py")
    )
    assert code_version(digest) != code_version(code_version)


def test_every_imported_package_has_a_version():
    _, packages = code.closure(
        frozenset(path for folder in ("src", "scripts") for path in (ROOT / folder).rglob("*.py"))
    )
    assert {"torch", "sklearn", "sae_lens"} <= packages
    assert [name for name in packages if code.installed(name) == "absent" and name not in ("triton", "ray")] == []


def test_run_folder_and_its_manifest(tmp_path):
    with Run(tmp_path / "out", {"a": 1}, "cpu", 2) as run:
        run.add_input("given", "f" * 64)
        run.write({"x": 1.0}, "summary\n")
        assert not (run.folder / "manifest.json").exists(), "the manifest comes last"
    manifest = Manifest.model_validate(json.loads((run.folder / "manifest.json").read_text()))
    assert manifest.status == "complete"
    assert manifest.return_code == 0
    assert manifest.inputs == {"given": "f" * 64}
    assert manifest.outputs["results.json"] == sha256_file(run.folder / "results.json")
    for name in ("results.json", "manifest.json", "summary.md"):
        assert (tmp_path / "out" / name).read_bytes() == (run.folder / name).read_bytes()
    assert (run.folder / "logs" / "run.log").exists()


def test_the_manifest_of_a_complete_run_binds_its_figures_and_csvs(tmp_path):
    (tmp_path / "figures").mkdir()
    drawn = {"figures/a.png": b"\x89PNG", "pairs.csv": b"a,b\n"}

    def attempt(error):
        with Run(tmp_path, {"a": 1}, "cpu", 2) as run:
            for name, data in (drawn | {"figures/a.txt": b"", "note.md": b""}).items():
                (tmp_path / name).write_bytes(data)
            run.write({"x": 1.0}, "summary\n")
            if error:
                raise error
        return run

    for error in (None, CheckFailed("x"), BadInput("x")):
        if error is None:
            attempt(None)
        else:
            with pytest.raises(type(error)):
                attempt(error)
        newest = max(tmp_path.glob("run_*/manifest.json"), key=os.path.getmtime)
        outputs = read_json(newest)["outputs"]
        bound = {} if isinstance(error, BadInput) else {name: sha256_file(tmp_path / name) for name in drawn}
        own = {name: sha256_file(newest.parent / name) for name in ("config.json", "results.json", "summary.md")}
        assert outputs == own | bound


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BadInput("x"), "failed", 2),
        (KeyboardInterrupt(), "interrupted", 130),
        (RuntimeError("x"), "failed", CRASHED),
    ],
)
def test_failed_run_says_so_and_publishes_nothing(tmp_path, error, status, code):
    def attempt():
        with Run(tmp_path, {"a": 1}, "cpu", 2) as run:
            run.write({"x": 1.0}, "half\n")
            raise error

    with pytest.raises(type(error)):
        attempt()
    (folder,) = tmp_path.glob("run_*")
    manifest = read_json(folder / "manifest.json")
    assert (manifest["status"], manifest["return_code"]) == (status, code)
    assert not (tmp_path / "results.json").exists()
    lines = (folder / "logs" / "run.log").read_text().splitlines()
    assert ("Traceback (most recent call last):" in lines) == (len(lines) > 2) == (status == "failed")


def test_the_terminal_shows_the_progress_of_a_command_and_the_place_of_its_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    logged = [progress.LINE % ("exact probes (jobs)", done, 336, 400 - done) for done in (7, 93)]
    script = "import sys, time\nfor line in sys.argv[1:]: print(line, flush=True); time.sleep(0.4)\nsys.exit(3)"
    with caplog.at_level(logging.INFO, "husai"), Run(tmp_path, {"a": 1}, "cpu", 2) as run:
        code = run.command("probes", [sys.executable, "-c", script, *logged, "a warning"], "part 2 of 5, probes")
    log = run.folder / "logs" / "probes.log"
    titled = [line for line in caplog.messages if line.startswith("part 2 of 5, probes: ")]
    assert titled == [f"part 2 of 5, probes: {text}" for text in (f"log {log}", *logged)]
    assert log.read_text().splitlines() == [*logged, "a warning"]
    assert code == run.commands[0]["return_code"] == 3
    assert not any("sys.argv" in line for line in caplog.messages), "the command line is for the files"
    assert "sys.argv" in (run.folder / "logs" / "run.log").read_text()
    assert "sys.argv" in run.commands[0]["command"]


def test_a_check_that_does_not_hold_is_a_finished_run_with_return_code_1(tmp_path):
    def attempt(finished):
        with Run(tmp_path, {"finished": finished}, "cpu", 2) as run:
            if finished:
                run.write({"x": 1.0}, "whole\n")
            raise CheckFailed("x")

    for finished, status in ((False, "failed"), (True, "complete")):
        with pytest.raises(CheckFailed):
            attempt(finished)
        (manifest,) = [m for p in tmp_path.glob("run_*/manifest.json") if (m := read_json(p))["status"] == status]
        assert manifest["return_code"] == 1
        assert (tmp_path / "results.json").exists() == finished


def test_second_run_into_the_same_folder_is_refused_while_the_first_lasts(tmp_path):
    with (
        Run(tmp_path, {"a": 1}, "cpu", 2),
        pytest.raises(BadInput, match=rf"{tmp_path} .*\.lock"),
        Run(tmp_path, {"a": 2}, "cpu", 2),
    ):
        pass


def test_unwritable_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BadInput, match=f"--output-dir: {tmp_path}/file/x "),
        Run(tmp_path / "file" / "x", {}, "cpu", 1),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("a\nb"), 2),
        (CheckFailed("a\nb"), 1),
        (KeyboardInterrupt(), 130),
        (None, 0),
        (FileExistsError(errno.EEXIST, "a\nb"), 2),
        (OSError(errno.ENOSPC, "a\nb"), 2),
        (OSError(errno.EFBIG, "a\nb"), 2),
        (OSError(errno.EIO, "a"), CRASHED),
        (ValueError("a"), CRASHED),
    ],
)
def test_exit_codes(error, code, capsys):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run_main(main)
    assert stopped.value.code == code
    if code in (1, 2):
        assert capsys.readouterr().err.endswith("a b\n")
    if code == CRASHED:
        assert capsys.readouterr().err.startswith("Traceback")


def test_seed_streams_are_separate():
    seeds = {derive_seed(s, name) for s in (42, 123) for name in ("init", "blocks")}
    assert len(seeds) == 4
    assert derive_seed(42, "init") == derive_seed(42, "init")
    assert all(0 <= s < 2**63 for s in seeds)


def test_macos_says_no_usable_cores():
    """The interpreter looks as it does there: without the call."""
    code = "import os; del os.sched_getaffinity; from husai.runs.cli import Parser; p = Parser(''); p.add_machine()"
    done = processes.run([sys.executable, "-c", f"{code}; print(p.parse_args([]).threads)"], 60)
    assert int(done.stdout) == os.cpu_count()


def test_an_unsupported_platform_is_refused_in_one_line():
    """The interpreter looks as it does on Windows: without the module."""
    code = "import sys; sys.modules['fcntl'] = None; import husai.runs.cli"
    done = processes.run([sys.executable, "-c", code], 60, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: platform: ")
