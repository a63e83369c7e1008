"""The report card: what it says, what it must never say, and that it is a page for everyone."""

import json
import re
import shlex
import shutil
from collections import defaultdict
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import CHROMIUM, browse, with_script
from conftest import ROOT, run_without_torch
from husai.evidence.quality import Quality
from husai.report import card, glossary, markup, verdict
from husai.report.evidence import read_phase
from husai.report.forest import Forest
from husai.report.markup import Scale
from husai.report.steps import ReportReader, Step, next_step
from husai.runs.errors import BadInput
from husai.runs.files import sha256_file, write_json
from test_feature_page import results as feature_results
from test_feature_page import table as feature_table

REPORT = "scripts/analysis/build_report.py"
TEMPLATES = ROOT / "src" / "husai" / "report" / "templates"
VOID = {"meta", "link", "img", "input", "br", "hr", "line", "rect", "circle"}


class Page(HTMLParser):
    """Start tags in order, the visible text, and whether every element is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.inside = defaultdict(str)
        """Id or class of an element -> its visible text."""
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"{tag} closed out of turn"

    def handle_data(self, data):
        if not {"style", "script"} & {tag for tag, _ in self.open}:
            self.text += data
            names = [f"{attrs.get('id', '')} {attrs.get('class', '')}".split() for _, attrs in self.open]
            for name in {name for both in names for name in both}:
                self.inside[name] += data

    def all(self, tag) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def says(self, words: str) -> bool:
        return words in " ".join(self.text.split())

    def states(self, name: str) -> set[str]:
        """The classes of the element with an id."""
        (attrs,) = (attrs for _, attrs in self.tags if attrs.get("id") == name)
        return set(attrs["class"].split())

    @property
    def verdict(self) -> str:
        """pass, fail, waived or none; nothing but a pass lets anything be claimed."""
        (state,) = self.states("verdict") - {"verdict"}
        forbids = verdict.NOTHING.lower() in self.inside["verdict"].lower()
        assert forbids == (state != "pass"), self.inside["verdict"]
        return state


QUEUE = ROOT / "docs" / "evidence" / "embedded_queue"
POSITIVE, TINY = "phase4a_trained_vs_random", "phase4a_language_model"
LEFT_OUT = ("release_gate", "*_stress")
STABILITY = json.loads((QUEUE / POSITIVE / "results.json").read_text())["husai"]["stability"]
CLAIM = [STABILITY["verdict"]["claimable_excess"][end] for end in ("estimate", "low", "high")]
"""Decisions, and what is missing, are each test's own."""


@pytest.fixture
def everything(tmp_path):
    """The evidence of the demo, as it lies there."""
    return shutil.copytree(QUEUE, tmp_path / "results", ignore=shutil.ignore_patterns(*LEFT_OUT))


@pytest.fixture
def root(tmp_path):
    """Three of its phases without figures: a page in a fraction of the time."""
    for name in (POSITIVE, TINY, "core_ablations"):
        shutil.copytree(QUEUE / name, tmp_path / "results" / name, ignore=shutil.ignore_patterns("*.png"))
    return tmp_path / "results"


def add_run(root, name: str, results: dict, summary: str = "# A run\n", **changed):
    """A whole run of these results."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    write_json(folder / "results.json", results)
    (folder / "summary.md").write_text(summary)
    manifest = json.loads((QUEUE / POSITIVE / "manifest.json").read_text())
    manifest["outputs"] = {n: sha256_file(folder / n) for n in ("results.json", "summary.md")}
    write_json(folder / "manifest.json", manifest | {"run_id": "run_20261125T000000Z_00000000"} | changed)
    return folder


GATES = len(verdict.GATES) - 1
"""Gates about the SAEs: the control on the method is not counted."""


def decision(**changed) -> dict:
    """A gate's decision: all passed, every lower end 0.01 above 0."""
    gates = [
        {
            "gate": name,
            "question": "",
            "status": "PASS",
            "figure": "excess",
            "estimate": 0.02,
            "low": 0.01,
            "high": 0.03,
        }
        | {"bound": "low", "relation": ">", "threshold": 0.0, "n": 5, "reason": "", "to_pass": "", "waived": None}
        for name in verdict.GATES
    ]
    whole = {"phase": "release_gate", "inputs": {}, "policy": "strict", "pass_all": True, "provisional": False}
    candidate = {
        "condition": "topk d512 k16",
        "subject": "husai-tiny",
        "hook_name": "blocks.1",
        "seeds": [1, 2],
        "x": 0,
    }
    sha256 = sha256_file(QUEUE / POSITIVE / "results.json")
    read = {"phase4a": {"path": f"results/{POSITIVE}/results.json", "sha256": sha256}}
    return whole | {"candidate": candidate, "gates": gates, "read": read, "more": 1} | changed


def change(found: dict, gate: str, **changed) -> dict:
    next(g for g in found["gates"] if g["gate"] == gate).update(changed)
    return found


FAILS = {"low": -0.01, "status": "FAIL", "reason": "not shown to be above", "to_pass": "more seeds"}


def reliability(**changed) -> dict:
    return feature_results(feature_table(20), **changed)


def render(root, gate=None) -> Page:
    return Page(card.render(root, gate, root.parent / "report.html"))


# ---------------------------------------------------------------------------------------------------------------------
# The evidence of the documents


def test_a_page_of_the_evidence(everything):
    write_json(everything.parent / "other.json", {})  # not a folder: no phase
    html = card.render(everything, None, everything.parent / "report.html")
    page = Page(html)
    assert len(page.all("h1")) == 1
    assert page.verdict == "none"
    assert len(html.encode()) < 3e6
    for tag, attrs in page.tags:  # no request leaves the page
        assert not attrs.get("src", "data:").startswith(("http", "//", "/")), (tag, attrs)
        assert not {a for a in attrs if a.startswith("on")}, "no inline handler"
        if tag == "link":
            assert attrs["href"] == "data:,"
    assert not re.search(r"url\(|@import", html)
    images = page.all("img")
    assert len(images) >= 14
    assert all(i["alt"] and i["src"].startswith("data:image/png;base64,") for i in images)
    for attrs in page.all("a"):
        if not attrs["href"].startswith("#"):
            assert (everything.parent / attrs["href"]).is_file(), "links to the evidence are relative, and lead there"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for a in page.all("a") if a["href"].startswith("#"))
    for folder in everything.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert page.says(manifest["command"])
        assert page.says(manifest["git_commit"][:12])
    assert page.says("{:+.4f} [{:+.4f}, {:+.4f}]".format(*CLAIM)), "in a line of intervals"
    assert page.says("{:.4f} [{:.4f}, {:.4f}]".format(*CLAIM)), "in a table"
    assert "Transcoder stress" in page.inside["absent"]
    assert page.inside["note"] == "", "nothing is damaged or incomplete"


def test_the_same_folder_gives_the_same_page(root):
    assert card.render(root, None, root / "a.html") == card.render(root, None, root / "a.html")


def test_headings_never_skip_a_level(root):
    add_run(root, "release_gate", change(decision(pass_all=False), "ood", **FAILS))
    add_run(root, "feature_reliability", reliability())
    levels = [int(tag[1]) for tag, _ in render(root).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_the_nulls_of_phase_4a_stand_on_one_scale(root):
    forest = Forest.of(json.loads((root / TINY / "results.json").read_text()))
    firm = {r.name for r in forest.rows if r.firm}
    assert firm == {"isotropic", "spectral", "spectral, absolute", "Gaussian rows"}
    assert {r.name for r in forest.rows} > {"Gaussian rows", "random-weights model"}
    for row in forest.rows:
        assert 0 < row.strip.low < row.strip.estimate < row.strip.high < 100
        assert row.strip.estimate == forest.scale.at(row.estimate)
    positive = Forest.of(json.loads((root / POSITIVE / "results.json").read_text()))
    assert "mcc_alive {:+.4f} [{:+.4f}, {:+.4f}]".format(*CLAIM) in positive.claim
    results = json.loads((root / "core_ablations/results.json").read_text())
    ablations, n = Forest.of(results), len(results["rows"]) + len(results["methods"])
    assert (len(ablations.rows), ablations.claim) == (n, None)
    assert ablations.outcomes == f"{n} of {n} MISSING", "three seeds, and no control of Gaussian rows"
    for broken in ({"husai": {"stability": {"verdict": {}}}}, {"a": {"stability": {"verdict": 3}}}, {}):
        assert Forest.of(broken) is None


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


def test_a_pass_is_a_pass(root):
    add_run(root, "release_gate", decision())
    page = render(root)
    assert page.verdict == "pass"
    assert f"{GATES} of {GATES}" in page.inside["verdict"]
    assert page.inside["margin"].count("by 0.0100.") == GATES + 1
    assert page.says("topk d512 k16")


def test_what_failed_by_how_much_and_what_it_would_take(root):
    found = change(decision(pass_all=False), "saebench", **FAILS)
    change(found, "cebench", status="MISSING", estimate=None, low=None, high=None, to_pass="its own stories")
    add_run(root, "release_gate", found, return_code=1)
    page = render(root)
    assert page.verdict == "fail"
    assert f"{GATES - 2} of {GATES}" in page.inside["verdict"]
    assert page.states("gate-saebench") == {"gate", "fail"}
    assert "0.0100" in page.inside["gate-saebench"]
    assert page.states("gate-cebench") == {"gate", "missing"}
    assert "--stories" in page.inside["gate-cebench"]
    assert "CE-Bench" in page.inside["failed"]
    assert "CE-Bench" not in page.inside["trust"]
    assert page.inside["note"] == "", "return code 1 is a decision and no note"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gates": decision()["gates"][:-1]}, ": CE-Bench"),
        ({"gates": decision()["gates"] * 2}, "gate ood"),
        (change(decision(), "ood", **FAILS), ": Shifted data (ood)"),
        (change(decision(), "ood", low=-0.01), "Shifted data (ood): "),
        (change(decision(), "ood", low=0.0), "Shifted data (ood): "),
        (change(decision(), "ood", bound="high", relation="<=", threshold=0.02), "Shifted data (ood): "),
        ({"read": {}}, " read"),
        ({"read": {"ood": {"path": "x/elsewhere/results.json", "sha256": "0" * 64}}}, "ood: "),
        (
            {"read": {"stability": {"path": f"x/{POSITIVE}/results.json", "sha256": "0" * 64}}},
            f"stability: {POSITIVE}/results.json",
        ),
    ],
)
def test_a_pass_that_does_not_follow_from_its_own_figures_is_none(root, changed, named):
    add_run(root, "release_gate", decision() | changed)
    page = render(root)
    assert page.verdict == "none"
    assert named in page.inside["alarm"]


@pytest.mark.parametrize("damage", ["results", "manifest", "unfinished", "json", "pass_all", "gates"])
def test_a_damaged_decision_is_no_pass(root, damage):
    changed = {"pass_all": {"pass_all": 1}, "gates": {"gates": [{"gate": "ood", "status": "YES"}]}}.get(damage, {})
    state = {"status": "failed", "return_code": 2} if damage == "unfinished" else {}
    folder = add_run(root, "release_gate", decision() | changed, **state)
    if damage == "results":
        write_json(folder / "results.json", decision(inputs={"more": "0"}))
    elif damage == "json":
        (folder / "results.json").write_text('{"pass_all": true, "x": NaN}')
    elif damage == "manifest":
        (folder / "manifest.json").unlink()
    for page in (render(root), render(root, folder / "results.json")):
        assert page.verdict == "none"
        assert page.inside["alarm"]
        assert page.says("Phase 4a")


def test_waivers_and_provisional_marks_are_loud(root):
    waived = "transcoders are not part of the claim"
    add_run(root, "release_gate", change(decision(), "transcoder", **FAILS, waived=waived))
    page = render(root)
    assert page.verdict == "none"
    assert page.states("gate-transcoder") == {"gate", "waived"}
    assert f"Transcoder: {waived}" in page.inside["alarm"]
    for changed in ({"provisional": True}, {"policy": "lenient"}):
        add_run(root, "release_gate", decision(**changed))
        assert render(root).verdict == "none"
        assert render(root).inside["alarm"]


def test_what_stands_beside_a_figure_is_shown_and_what_does_not_count_is_named(root):
    beside = {"explained variance less the reference's": {"estimate": -0.0123, "low": -0.02, "high": -0.0046}}
    left_out = [f"set {i}" for i in range(8)]
    add_run(root, "release_gate", change(decision(), "saebench", beside=beside, left_out=left_out))
    page = render(root)
    assert page.says("explained variance less the reference's: −0.0123 [−0.0200, −0.0046]")
    assert page.says("set 0, set 1, set 2, set 3, set 4, set 5 and 2 more.")
    assert page.verdict == "pass"


def test_what_the_gate_itself_writes_can_be_read(root, run_script):
    """The strict gate on the evidence at hand: phase 4a alone."""
    files = ("external-candidate-json", "confirmation-results", "random-model-results", "transcoder-results")
    arguments = ["--phase4a-results", root / POSITIVE / "results.json"]
    for name in (*files, "ood-results"):
        arguments += [f"--{name}", root / "none" / "results.json"]
    gate = "scripts/experiments/run_stress_gated_release_policy.py"
    assert run_script(gate, *arguments, "--output-dir", root / "release_gate")[0] == 0
    page = render(root)
    assert page.verdict == "fail"
    assert f"0 of {GATES}" in page.inside["verdict"], "the control on modular addition is no pass of theirs"
    assert len(page.inside["candidate"].splitlines()) == 1, "there is none"
    (control, *_) = json.loads((root / "release_gate" / "results.json").read_text())["gates"]
    assert f"{control['low'] - control['threshold']:.4f}" in page.inside["gate-positive_control"]
    assert page.says("not there")
    waive = [a for g in verdict.GATES if g != "positive_control" for a in ("--waive", g, "--reason", "not claimed")]
    assert run_script(gate, *arguments, *waive, "--output-dir", root / "release_gate")[0] == 0
    page = render(root)
    assert page.verdict == "waived"
    assert f"0 of {GATES}" in page.inside["verdict"]
    assert page.inside["alarm"].count("not claimed") == GATES


def test_a_candidate_is_named_as_the_gate_names_it(root):
    facts = {"hook_name": "blocks.1.hook_resid_pre", "subject_digest": "d" * 64}
    named = {"condition": "topk d512", "facts": facts, "checkpoints": {"7": "a", "8": "b"}}
    add_run(root, "release_gate", decision(candidate=named))
    page = render(root)
    for words in ("topk d512", "blocks.1.hook_resid_pre", "7, 8", "d" * 64):
        assert page.says(words)


def test_the_earlier_studys_policy_decides_nothing(root):
    gates = [{"gate": "ood", "published": True, "figure": 0.1, "status": "MISSING", "reason": "a point"}]
    published = decision(policy="published", pass_all=False, candidate=None, gates=gates)
    folder = add_run(root, "earlier", published)
    assert render(root).verdict == "none"
    page = render(root, folder / "results.json")
    assert (page.verdict, f"0 of {GATES}" in page.inside["verdict"]) == ("fail", True)
    add_run(root, "release_gate", decision())
    assert render(root).verdict == "pass"


def test_a_gate_given_by_path_is_taken_in_place_of_the_one_below_the_root(root, tmp_path):
    add_run(root, "release_gate", decision())
    other = add_run(tmp_path, "other", change(decision(pass_all=False), "ood", **FAILS))
    assert render(root, other / "results.json").verdict == "fail"
    for bad in (tmp_path / "none.json", other / "summary.md"):
        with pytest.raises(BadInput, match="--gate"):
            render(root, bad)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged runs


def test_damage_is_named_and_the_rest_is_shown(everything):
    (everything / POSITIVE / "results.json").write_text("{")
    with open(everything / "adaptive_l0_calibration" / "results.json", "a") as f:
        f.write("\n")
    (everything / "core_ablations" / "manifest.json").write_text("[]")
    (everything / "assignment_consistency_v2" / "assignment_v2.png").write_bytes(b"\x89PNG")
    (everything / "external_metric_scaling" / "summary.md").write_text("# other\n")
    failed = everything / "ood_stress" / "run_20261125T000000Z_00000000"
    failed.mkdir(parents=True)
    manifest = json.loads((everything / TINY / "manifest.json").read_text())
    write_json(failed / "manifest.json", manifest | {"status": "failed", "return_code": 2})
    (everything / "cut" / "run_20261125T000001Z_00000000").mkdir(parents=True)
    later = everything / "architecture_frontier" / "run_20991125T000000Z_00000000"
    later.mkdir()
    page = render(everything)
    for phase, named in {
        POSITIVE: r"results\.json .*sha256",
        "adaptive_l0_calibration": r"results\.json .*sha256",
        "core_ablations": r"manifest\.json ",
        "assignment_consistency_v2": r"assignment_v2\.png ",
        "external_metric_scaling": r"summary\.md .*sha256",
        "ood_stress": r"run_20261125T000000Z_00000000: failed\b.* 2\b",
        "cut": "run_20261125T000001Z_00000000: (?!failed)",
        "architecture_frontier": "run_20991125T000000Z_00000000: (?!failed).* run_",
    }.items():
        problems = read_phase(everything / phase).problems
        assert any(re.search(named, problem) for problem in problems), problems
        for words in (phase, *problems):
            assert words in page.inside["note"]
    assert page.says("{:.4f} [{:.4f}, {:.4f}]".format(*CLAIM)), "the whole runs are shown"
    assert read_phase(everything / POSITIVE).results == {}


def test_a_file_that_is_no_image_is_not_embedded(root):
    name = "adaptive_l0_calibration"
    shutil.copytree(QUEUE / name, root / name)
    path = root / name / "adaptive_l0.png"
    path.write_bytes(b"no image")
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["outputs"]["figures/adaptive_l0.png"] = sha256_file(path)
    write_json(path.parent / "manifest.json", manifest)
    assert "adaptive_l0.png " in render(root).inside["note"]


def test_a_repeat_does_not_hide_what_the_results_took(root):
    phase = root / POSITIVE
    manifest = json.loads((phase / "manifest.json").read_text())
    for name, seconds, sha in (("a", 7000.0, manifest["outputs"]["results.json"]), ("b", 9000.0, "0" * 64)):
        run = phase / f"run_20200101T000000Z_{name}"
        run.mkdir()
        outputs = manifest["outputs"] | {"results.json": sha}
        write_json(run / "manifest.json", manifest | {"wall_seconds": seconds, "outputs": outputs})
    assert read_phase(phase).seconds == 7000.0
    assert render(root).says("1.9 h")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_text_from_runs_stays_text(root):
    add_run(root, "feature_reliability", reliability(notes=[HOSTILE]), f"# T\n\n{HOSTILE}\n")
    told = {"reason": HOSTILE, "figure": HOSTILE, "to_pass": HOSTILE, "left_out": [HOSTILE]}
    told["beside"] = {HOSTILE: {"estimate": 0.1, "low": 0.0, "high": 0.2}}
    found = change(decision(pass_all=False), "ood", **(FAILS | told))
    add_run(root, "release_gate", found | {"policy": HOSTILE, "candidate": {"condition": HOSTILE}})
    hostile = f"# {HOSTILE}\n\n**{HOSTILE}** ![x](http://example.com/x.png) [y](javascript:alert(1))\n\n{HOSTILE}\n"
    add_run(root, 'a"b<i>', {"phase": HOSTILE}, hostile, command=HOSTILE)
    html = card.render(root, None, root.parent / "report.html")
    page = Page(html)
    assert page.all("script") == []
    assert all(i["src"].startswith("data:") for i in page.all("img"))
    assert not any(a["href"].startswith(("javascript", "http")) for a in page.all("a"))
    assert page.text.count(HOSTILE) >= 8
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_markdown():
    text = markup.html("# Title\n\n## Part\n\n| a | b |\n|---|---|\n| 0.5 [0.4, 0.6] | **no** |\n\n<b>x</b>\n")
    assert "Title" not in text
    assert "<h4>Part</h4>" in text
    assert '0.5 <span class="interval">[0.4, 0.6]</span>' in text
    assert "&lt;b&gt;" in text
    assert markup.title("# Title\n") == "Title"
    assert markup.outcome("# T\n\n**yes**: so\n\n| **no** |") == "yes"
    assert markup.outcome("# T\n\n| a |\n|---|\n| **no** |") is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.0065, 0.0159), (0, 0), (2, 2), (-3e-9, 1e4), (0.2, 0.21)])
def test_scales(low, high):
    scale = Scale.over([low, high])
    assert 0 < scale.at(low) <= scale.at(high) < 100
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(0 <= place <= 100 for place, _ in ticks)


# ---------------------------------------------------------------------------------------------------------------------
# Features


def test_the_feature_table_is_a_link(root):
    """First figures stand on the page, and the table of all features is a link where it lies beside the results."""
    add_run(root, "feature_reliability", reliability(notes=["A note on the SAEs."]))
    page = render(root)
    assert page.says("A note on the SAEs.")
    link = "results/feature_reliability/report.html"
    assert link not in {a["href"] for a in page.all("a")}
    (root / "feature_reliability" / "report.html").write_text("the table")
    assert link in {a["href"] for a in render(root).all("a")}


# ---------------------------------------------------------------------------------------------------------------------
# From the shell, and in a browser


def test_from_the_shell(root, tmp_path, run_script, refused):
    code, out, _ = run_script(REPORT, "--results-root", root, "--output", tmp_path / "sub" / "r.html")
    assert code == 0
    assert "MB" in out
    page = Page((tmp_path / "sub" / "r.html").read_text())
    assert any(a["href"] == f"../results/{POSITIVE}/results.json" for a in page.all("a"))
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    refused(f"--results-root: {tmp_path}/none ", REPORT, "--results-root", tmp_path / "none")
    refused(f"--results-root: {tmp_path}/empty ", REPORT, "--results-root", tmp_path / "empty")
    run_without_torch(REPORT, "--results-root", root, "--output", tmp_path / "r.html")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_can_be_read(theme):
    """WCAG 2, level AA: a contrast of at least 4.5 for all text."""
    block = re.findall(r":root \{(.*?)\}", (TEMPLATES / "card.css").read_text(), re.S)[theme]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [(ink, ground) for ink in ("ink", "muted", "link") for ground in ("paper", "card", "sunk")]
    pairs += [("ink", f"shade{i}") for i in range(1, 5)]
    for tone in ("pass", "fail", "warn", "missing"):
        pairs += [(tone, f"{tone}-soft"), (tone, "paper"), (tone, "card"), ("ink", f"{tone}-soft")]
    for ink, ground in [*pairs, ("paper", "ink")]:
        high, low = sorted((luminance(colour[ink]), luminance(colour[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(everything, tmp_path, width):
    """No message on the console, which a blocked request or an error would give; the filter runs; nothing overflows."""
    add_run(everything, "feature_reliability", reliability())
    add_run(everything, "release_gate", change(decision(pass_all=False), "ood", **FAILS))
    html = card.render(everything, None, tmp_path / "r.html")

    dom, console = browse(html, tmp_path, width)
    assert console == []
    assert "feature_reliability" in dom
    _, console = browse(html.replace("</main>", '<img alt="" src="http://127.0.0.1:9/x.png"></main>'), tmp_path, width)
    assert console, "a request would be blocked, and seen here"
    measure = "document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`"
    dom, _ = browse(with_script(html, measure), tmp_path, width)
    wide, of = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert wide <= of


# ---------------------------------------------------------------------------------------------------------------------
# How good, and what next


CONFIRMED = QUEUE / "candidate_confirmation" / "results.json"


def quality(**changed) -> Quality:
    return replace(Quality.of(json.loads(CONFIRMED.read_text())), **changed)


def test_first_figures_are_those_of_the_evidence(root):
    results = json.loads(CONFIRMED.read_text())
    section, own = results["bank"]["sections"][0], [r for r in results["bank"]["saes"] if r["candidate"]]
    q = quality()
    assert q.explained_variance == [r["heldout"]["explained_variance"] for r in own]
    observed = section["stability"]["scores"]["share70_alive"]["observed"]["estimate"]
    assert sum(q.stable_share) / len(q.stable_share) == pytest.approx(observed)
    (of_pca,) = [b for name, b in results["bank"]["saebench"]["baselines"].items() if name.startswith("pca")]
    pca = of_pca["means"]["5"]["test_auc"]
    assert q.auc_of_pca == pca
    shutil.copytree(CONFIRMED.parent, root / CONFIRMED.parent.name)
    page = render(root)
    for value in (f"{sum(q.explained_variance) / 5:.3f}", f"{100 * observed:.1f} %", f"{pca:.3f}"):
        assert value in page.inside["good"]
    assert page.text.index("How good") < page.text.index("Phase 4a")


def test_unusual_figures_are_named():
    def starts(**changed) -> list[str]:
        return [w.partition(":")[0] for w in quality(auc=None, **changed).warnings()]

    five = [0.0] * 4
    assert starts() == []
    assert starts(dead_share=[*five, 0.199]) == []
    assert starts(dead_share=[*five, 0.2]) == ["Dead features"]
    assert starts(l0=[494.0] * 5, d_sae=512, d_in=512) == ["Not sparse"]
    assert starts(l0=[16.0] * 4 + [20.0]) == ["Unequal sparsity"]
    assert starts(explained_variance=[0.656] * 4 + [0.009]) == ["Outlier"]
    assert "seed 2069 (0.009)" in quality(explained_variance=[0.656] * 4 + [0.009]).warnings()[0]
    assert any("3 of 5" in w for w in quality(auc=[0.6, 0.6, 0.6, 0.8, 0.8], auc_of_pca=0.7).warnings())
    assert quality(auc_of_pca=0.5).warnings() == []


CHECK = "python scripts/experiments/run_release_check.py --checkpoint a b 'my c' --model-name gpt2 --rows 10"


def step(gate: str, status: str = "MISSING", reader: dict | None = None, **figures) -> Step:
    about = {"root": "out/parts", "words": shlex.split(CHECK), "supplied": True, "hook_name": "blocks.1.hook_resid_pre"}
    about |= {"subject": "gpt2", "seeds": 5, "d_sae": 256, "k": 16} | (reader or {})
    return next_step(verdict.Gate(gate=gate, status=status, **figures), ReportReader(**about))


def test_each_open_gate_ends_with_a_command_or_why_there_is_none():
    failing = {"estimate": 0.1, "low": -0.1, "high": 0.3, "bound": "low", "relation": ">", "threshold": 0.0, "n": 5}
    wrong = failing | {"estimate": -0.1, "low": -0.2, "high": 0.0}
    for gate in verdict.GATES:
        for found in (step(gate), step(gate, "FAIL", **failing), step(gate, "FAIL", **wrong)):
            assert "pass_all" not in found.text
            if found.command is None:
                assert found.text
                continue
            script = next(word for word in shlex.split(found.command) if word.endswith(".py"))
            assert (ROOT / script).is_file()
            assert re.search("gpt2|phase4a|out/parts", found.command)
    more = shlex.split(step("stability", "FAIL", **failing | {"low": -0.01}).command)
    assert more[3 : more.index("--model-name")] == ["a", "b", "my c", "SEED_6", "SEED_7"]
    assert step("stability", reader={"seeds": 3}).command == CHECK.replace("'my c'", "'my c' SEED_4 SEED_5")


def test_a_flag_with_its_value_in_one_word_is_understood(root):
    words = ReportReader.of([], None, root, f"{CHECK} --text=my.jsonl --null-draws=5").words
    assert words[-4:] == ["--text", "my.jsonl", "--null-draws", "5"]
    assert words[:-4] == shlex.split(CHECK)


def test_what_cannot_be_run_is_not_applicable():
    unknown = {"recipe_known": False}
    for gate in ("transcoder", "saebench", "cebench"):
        assert step(gate, reader=unknown).command is None
    assert "--random-model-checkpoint" in step("random_model", reader=unknown).command
    assert step("ood", reader={"survives": False}).command is None
    assert "--stories" in step("cebench").command
    assert "--reference" in step("cebench").command


def test_a_report_on_a_readers_own_saes_leaves_the_method_out(root):
    shutil.copytree(CONFIRMED.parent, root / CONFIRMED.parent.name)
    add_run(root, "release_gate", change(decision(pass_all=False), "saebench", **FAILS))
    write_json(root / "parts.json", {"candidate_confirmation": None, "ood_stress": f"return code 1: {HOSTILE}"})
    html = card.render(root, None, root.parent / "report.html", CHECK)
    page = Page(html)
    assert f"Shifted data: return code 1: {HOSTILE}" in page.inside["failed"]
    assert "modular" not in page.text
    assert "Phase 4a" not in page.text
    assert "absent" not in {a.get("id") for _, a in page.tags}
    assert page.says(CHECK.replace("'my c'", "'my c' 7_MORE_SAES"))


def test_terms_are_marked_once_a_part_and_lead_to_the_glossary(root):
    html = "<section><p>An SAE, SAEs; <b>L0</b></p><pre>SAE</pre></section><section>SAE-like my_SAE SAE</section>"
    links = Page(glossary.explain(html)).all("a")
    assert [a["href"] for a in links] == ["#term-sae", "#term-l0", "#term-sae"]
    assert all(a["title"] == glossary.TERMS[name].meaning for a, name in zip(links, ("SAE", "L0", "SAE"), strict=True))
    assert Page(glossary.explain(html)).text == Page(html).text
    page = render(root)
    assert {t.anchor for t in glossary.TERMS.values()} <= {a.get("id") for _, a in page.tags}
    assert all(len(t.meaning) < 200 for t in glossary.TERMS.values())


@given(st.text(alphabet="<>/ab SAEL0-_é", max_size=60))
def test_marking_terms_keeps_text(text):
    html = f"<section><p>{escape(text)}</p></section>"
    assert Page(glossary.explain(html)).text == Page(html).text


def test_cells_carry_their_column(root):
    html = str(markup.html("| a `b` | c |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"))
    assert [a["data-label"] for a in Page(html).all("td")] == ["a b", "c", "a b", "c"]
    wide = "|" + "x|" * 8
    assert 'class="wide"' in markup.html(f"{wide}\n{'|---' * 8}|\n{wide}\n")


@pytest.mark.parametrize("command", [CHECK, "python a.py", "A=1 bash b.sh -x --y=2 -1"])
def test_a_command_in_pieces_is_the_command(command):
    assert " ".join(markup.flags(command)) == command
