"""The files that must stay in step, and the map that must stay true."""

import ast
import re
import sys

import pytest
import yaml

import processes
from conftest import ROOT
from husai.evidence import rules

STEPS = {
    "runs": {"pydantic", "rich", "ray", "torch"},
    "evidence": {"pydantic", "numpy", "scipy.special"},
    "subjects": None,
    "activations": None,
    "kernels": None,
    "dictionaries": None,
    "training": None,
    "stability": None,
    "evals": None,
    "release": {"pydantic", "numpy", "yaml"},
    "report": {"matplotlib", "jinja2", "markupsafe", "markdown_it", "numpy", "pandas", "PIL", "pydantic"},
    "testing": {"numpy", "pydantic"},
}
"""Folder of src/husai in the order of the flow -> the packages that it may import; None: any that are pinned."""
ON_EVIDENCE = {"runs", "evidence", "release", "report"}
"""Allowed imports of the folders that only read evidence."""


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
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


@pytest.mark.parametrize("step", STEPS)
def test_imports_follow_the_flow(step):
    order = list(STEPS)
    allowed = set(order[: order.index(step) + 1])
    if step in ("release", "report", "testing"):
        allowed &= ON_EVIDENCE | {step}
    for path in (ROOT / "src" / "husai" / step).glob("*.py"):
        for module in imports(path):
            top, *below = module.split(".")
            if top == "husai":
                assert not below or below[0] in allowed, f"{path.name} imports {module}"
            elif STEPS[step] is not None and top not in sys.stdlib_module_names:
                known = any(module == name or module.startswith(f"{name}.") for name in STEPS[step])
                assert known, f"{path.name} imports {module}"


@pytest.mark.parametrize("module", ["husai.release.gate", "husai.release.decisions", "husai.release.selection"])
def test_what_decides_loads_no_torch(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = processes.run([sys.executable, "-c", code]).stdout.split()
    assert module in loaded
    assert not [m for m in loaded if m.startswith(("torch", "scipy.stats", "pandas", "husai.training", "husai.evals"))]


def test_no_script_imports_another_and_nothing_unpickles():
    for path in ROOT.glob("scripts/**/*.py"):
        assert not any(m.startswith("scripts") for m in imports(path))
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        assert not {"pickle", "joblib", "dill"} & set(imports(path))
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text()):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def test_the_map_names_nothing_that_is_not_there():
    text = (ROOT / "REPO_NAVIGATION.md").read_text()
    named = {n for n in re.findall(r"`([\w./-]+)`", text) if "/" in n or "." in n}
    for name in named:
        assert (ROOT / name).exists() or name.startswith("results/"), f"REPO_NAVIGATION.md names {name}"


def test_files_that_the_methods_name_are_there():
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", (ROOT / "docs/methods.md").read_text()))
    assert len(named) > 40
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "src/husai" / name).is_file(), name


def test_every_folder_is_on_the_map():
    text = (ROOT / "REPO_NAVIGATION.md").read_text()
    for step in STEPS:
        assert re.search(rf"[├└]── {step}/ ", text), step
    for folder in (p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")):
        assert f"{folder}/" in text or folder in ("results", "build"), folder


def test_hosted_ci_does_what_ci_does():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    done = set()
    for job in workflow["jobs"].values():
        matrix = job["strategy"]["matrix"]
        assert matrix["python"] == ["3.11", "3.12"]
        for command in (step["run"] for step in job["steps"] if "run" in step):
            done |= {command.replace("${{ matrix.tier }}", tier) for tier in matrix.get("tier", [""])}
    assert {line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make")} <= done


def test_the_table_of_rules_is_the_rules():
    for printed in (rules.table(), rules.licences()):
        assert printed in (ROOT / "docs/methods.md").read_text(), "python -m husai.evidence.rules prints it"
    for statement, meaning in rules.STATEMENTS.items():
        assert f"| {statement} | {meaning} |" in (ROOT / "docs/methods.md").read_text()


def documents():
    """Every page of the repository, those below evidence included."""
    listed = processes.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def anchors(path):
    """Names of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.+)$", without_code, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        yield re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", path.read_text()):
        if not target.startswith("http"):
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name} links to {target}"
            assert not anchor or anchor in anchors(page), f"{path.name} links to {target}#{anchor}"


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "a.md").write_text("# A title: *of* `x`, 2\n\n```bash\n# no heading\n```\n")
    assert [*anchors(tmp_path / "a.md")] == ["a-title-of-x-2"]
    for link in ("[a](b.md)", "[a](a.md#none)", "[a](#none)"):
        (tmp_path / "c.md").write_text(link)
        with pytest.raises(AssertionError, match="links to"):
            test_links_lead_somewhere(tmp_path / "c.md")


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in documents():
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.M):
            assert target in targets, f"{path.name} names make {target}"
