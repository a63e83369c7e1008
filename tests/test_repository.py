"""The files that must stay in step, and the map that must stay true."""

import ast
import re

import pytest
import yaml

import processes
from conftest import ROOT

STEPS = [
    "subjects",
    "activations",
    "kernels",
    "dictionaries",
    "training",
    "stability",
    "benchmarks",
    "stress",
    "release",
    "report",
]


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_conda_and_pip_install_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "husai"
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert conda == ["python=3.11", "pip"], "nothing but the interpreter comes from conda"
    assert pip == ["-r requirements-dev.txt"]
    assert "requirements-nodeps.txt" in (ROOT / "environment.yml").read_text()


def test_requirements_are_pinned_and_within_the_constraints():
    pins = [r for r in requirements("requirements-dev.txt") if not r.startswith("-")]
    assert pins
    constraints = dict(r.split("==") for r in requirements("constraints.txt"))
    assert requirements("requirements-cluster.txt")[0] == "-c constraints.txt"
    for pin in [*pins, *requirements("requirements-nodeps.txt"), *requirements("requirements-cluster.txt")[1:]]:
        name, version = pin.split("==")
        assert constraints.get(name, version) == version, name
    assert {"-c constraints.txt", "-e ."} <= set(requirements("requirements-dev.txt"))
    assert "torchvision" not in constraints
    names = "requirements-dev.txt", "constraints.txt", "requirements-nodeps.txt", "requirements-cluster.txt"
    text = "".join((ROOT / n).read_text() for n in names)
    assert "://" not in text, "no index or host is named"


def test_the_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    for pin in [r for r in requirements("requirements-dev.txt") if not r.startswith("-")]:
        name, expected = pin.split("==")
        assert version(name).split("+")[0] == expected


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


@pytest.mark.parametrize("step", STEPS)
def test_imports_follow_the_flow(step):
    order = {name: i for i, name in enumerate(STEPS)}
    for path in (ROOT / "src" / "husai" / step).glob("*.py"):
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "husai" and parts[1] in order:
                assert order[parts[1]] <= order[step], f"{path.name} imports {module}"


def test_runs_imports_no_step():
    for path in (ROOT / "src" / "husai" / "runs").glob("*.py"):
        assert not any(m.startswith("husai.") and m.split(".")[1] != "runs" for m in imports(path)), path


def test_no_script_imports_another_and_nothing_unpickles():
    for path in ROOT.glob("scripts/**/*.py"):
        assert not any(m.startswith("scripts") for m in imports(path))
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        assert not {"pickle", "joblib", "dill"} & set(imports(path))
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_the_map_names_every_file_that_matters_and_nothing_else():
    text = (ROOT / "REPO_NAVIGATION.md").read_text()
    named = {n for n in re.findall(r"`([\w./-]+)`", text) if "/" in n or "." in n}
    for name in named:
        assert (ROOT / name).exists() or name.startswith("results/"), f"REPO_NAVIGATION.md names {name}"
    tracked = processes.run(["git", "ls-files"]).stdout.split()
    for path in tracked:
        if re.match(r"(src/husai/\w+/(?!__init__)\w+\.py|scripts/.*\.(py|sh)|benchmarks/.*\.py)$", path):
            assert path in named, f"{path} is missing from REPO_NAVIGATION.md"


def documents():
    return [ROOT / n for n in ("README.md", "START_HERE.md", "REPO_NAVIGATION.md", "RUNBOOK.md", "EXPERIMENT_LOG.md")]


@pytest.mark.parametrize("path", [*documents(), *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in documents():
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.M):
            assert target in targets, f"{path.name} names make {target}"
