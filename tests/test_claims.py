"""The audit of the claims: it passes on this repository, and on a copy it fails for the reason that was put there."""

import json
import re
import shutil
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from husai.evidence import names, stability
from husai.release import claims, decisions, recompute
from husai.release.claims import (
    DOCUMENTS,
    NUMBER,
    Claims,
    Figure,
    audit_claims,
    figure_problem,
    places,
    prints_as,
    read,
    resolve,
    unclaimed,
    values,
)
from husai.release.recompute import studies, study_problems
from husai.runs.files import read_json, sha256_file
from husai.stability import compare

AUDIT = "scripts/analysis/verify_experiment_consistency.py"
LOG, CLAIMS = "EXPERIMENT_LOG.md", "docs/claims.yaml"
QUEUE = "docs/evidence/embedded_queue"
EVIDENCE = f"{QUEUE}/phase4a_trained_vs_random"
DECISION = f"{QUEUE}/release_gate"  # rests on EVIDENCE, among others
RESULTS, MANIFEST = f"{EVIDENCE}/results.json", f"{EVIDENCE}/manifest.json"


@pytest.fixture
def copy(tmp_path):
    """A copy of what the audit reads."""
    for name in DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for path in [
        ROOT / CLAIMS,
        *ROOT.glob("docs/**/*.json"),
        *ROOT.glob("docs/evidence/**/*.*"),
        *ROOT.glob("assets/*/*.json"),
    ]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return tmp_path


@pytest.fixture(scope="module")
def memory():
    """Results of functions on unchanged files, for all tests here: each test changes one file or two of many."""
    return {}


@pytest.fixture
def audit(run_script, copy, memory, monkeypatch):
    """`audit(*flags)` -> (exit code, {name: line of what fails}, stderr) on the copy.

    Each file is read once, and each folder and decision is computed again once, unless its size or time differs.
    """

    def stamp(path):
        if not path.is_file():
            return path.relative_to(copy)
        return path.relative_to(copy), path.stat().st_size, path.stat().st_mtime_ns

    def remember(function, files):
        """The function, called once for the same files (`files(path)`)."""

        def call(path, *rest):
            key = function.__name__, str(path.relative_to(copy)), frozenset(map(stamp, files(path)))
            if key not in memory:
                memory[key] = function(path, *rest)
            return memory[key]

        return call

    def parse(text, loader):
        if text not in memory:
            memory[text] = load(text, loader)
        return memory[text]

    for module in (claims, recompute, decisions):
        monkeypatch.setattr(module, "read_json", remember(read_json, lambda path: [path]))
        monkeypatch.setattr(module, "sha256_file", remember(sha256_file, lambda path: [path]))
    folder_problems = remember(recompute.folder_problems, lambda path: path.iterdir())
    monkeypatch.setattr(recompute, "folder_problems", folder_problems)
    every = remember(decisions.problem, lambda path: [path, *(copy / "docs/evidence").rglob("*")])
    monkeypatch.setattr(decisions, "problem", every)
    load = claims.yaml.load
    monkeypatch.setattr(claims.yaml, "load", parse)

    def run(*flags):
        code, out, err = run_script(AUDIT, "--root", copy, *flags)
        return code, dict(re.findall(r"^FAIL  ([^:\n]+): (.*)", out, re.M)), err

    return run


def swap(path, old, new):
    """Replace the one place where `old` stands."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    path.write_text(text.replace(old, new))


@cache
def listed():
    """The claims of this repository."""
    return read(ROOT / CLAIMS).claims


def printed(claim, figure):
    """The text of a claim's figure, as it stands in the documents of this repository."""
    return next(c for c in listed() if c.id == claim).figures[figure].text


def misprinted(text, at=0):
    """The text with the last digit of its number `at` changed."""
    number = list(NUMBER.finditer(text))[at]
    digit = str((int(text[number.end() - 1]) + 1) % 10)
    return text[: number.end() - 1] + digit + text[number.end() :]


def edit(path, change):
    """Let `change` edit the JSON at `path`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def rebind(copy, audit):
    """Make every digest fit again, as one would who wants a wrong figure to pass."""
    edit(copy / MANIFEST, lambda m: m["outputs"].update({"results.json": sha256_file(copy / RESULTS)}))
    return audit("--write-digests")


def test_the_audit_of_this_repository_passes(run_script):
    code, out, err = run_script(AUDIT)
    assert (code, err) == (0, ""), out + err
    assert "FAIL" not in out
    counts = [int(n) for n in re.findall(r"\d+", out.splitlines()[-1])]
    assert (counts[1], min(counts) > 0) == (len(DOCUMENTS), True), "claims, documents, evidence folders, decisions"


def test_the_copy_passes_untouched(audit):
    assert audit() == (0, {}, "")


# ---------------------------------------------------------------------------------------------------------------------
# One thing is changed


def test_a_digit_of_a_document(copy, audit):
    score = printed("phase4a-excess", 2)
    swap(copy / LOG, score, misprinted(score))
    code, failed, err = audit()
    assert code == 1
    assert set(failed) == {"phase4a-excess", LOG}
    assert failed["phase4a-excess"].startswith(f"{LOG} ")
    assert re.search(rf"line \d+: {misprinted(score).split()[0]} ", failed[LOG])
    assert re.fullmatch(r"error: audit: 2 .*\n", err)


def test_a_digit_of_a_document_and_of_its_claim(copy, audit):
    excess = printed("phase4a-excess", 4)
    wrong = misprinted(excess, at=1)
    for path in (copy / LOG, copy / CLAIMS):
        path.write_text(path.read_text().replace(excess, wrong))
    code, failed, _ = audit()
    assert code == 1
    assert set(failed) == {"phase4a-excess"}
    assert re.fullmatch(rf"'{re.escape(wrong)}'[^:\d]*(0\.\d+(, )?){{3}} .*/.*", failed.popitem()[1])


def test_a_digit_of_an_artefact(copy, audit):
    edit(copy / RESULTS, lambda r: r["husai"].update(effective_rank=r["husai"]["effective_rank"] + 0.1))
    code, failed, _ = audit()
    assert code == 1
    rank = printed("phase4a-rank", 1)
    assert re.search(rf"'{rank}'[^:\d]*{re.escape(f'{float(rank) + 0.1:.1f}'[:-1])}", failed["phase4a-rank"])
    for name in ("phase4a-rank", "phase4a-dead"):
        assert re.search(rf"{RESULTS} .*sha256", failed[name])
    assert re.match(r"results\.json .*sha256", failed[EVIDENCE])
    assert not any("earlier" in name or "calibration" in name for name in failed)


def claimable(results):
    results["husai"]["stability"]["verdict"]["claimable_excess"]["low"] += 1e-6


def estimate(results):
    results["husai"]["stability"]["scores"]["pwmcc"]["observed"]["estimate"] += 1e-6


def null_mean(results):
    results["husai"]["stability"]["scores"]["mcc"]["nulls"]["spectral"]["mean"] -= 1e-6


def outcome(results):
    results["husai"]["stability"]["verdict"]["outcome"] = "PASS"


def one_pair(results):
    results["husai"]["pairs"][3]["observed"]["mcc"] += 1e-6


def lost_pair(results):
    del results["planted"]["degrees"][0]["study"]["pairs"][-1]


def nested(results):
    results["more"] = [{"deep": json.loads(json.dumps(results["husai"]))}]
    estimate({"husai": results["more"][0]["deep"]})


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (claimable, r"/husai: stability/verdict/claimable_excess/low .*0\.\d+,.* 0\.\d+"),
        (estimate, "/husai: stability/scores/pwmcc/observed/estimate "),
        (null_mean, "/husai: stability/scores/mcc/nulls/spectral/mean "),
        (outcome, "/husai: stability/verdict/outcome "),
        (one_pair, "/husai: stability/scores/mcc/observed/estimate "),
        (lost_pair, "/planted/degrees/0/study: pairs:"),
        (nested, "/more/0/deep: stability/scores/pwmcc/observed/estimate "),
    ],
)
def test_results_that_do_not_follow_from_their_pairs(copy, audit, change, place):
    edit(copy / RESULTS, change)
    code, failed, _ = rebind(copy, audit)
    assert code == 1
    assert re.search(place, failed[EVIDENCE])
    assert "sha256" not in failed[EVIDENCE]


def test_a_digest(copy, audit):
    sha = sha256_file(copy / RESULTS)
    swap(copy / CLAIMS, sha, sha[:-1] + ("0" if sha[-1] != "0" else "1"))
    code, failed, _ = audit()
    assert code == 1
    assert failed
    assert all(re.match(rf"{RESULTS} .*sha256", line) for line in failed.values())


def test_a_pointer(copy, audit):
    of_claim = "  - id: phase4a-rank\n"
    before, after = (copy / CLAIMS).read_text().split(of_claim)
    (copy / CLAIMS).write_text(before + of_claim + after.replace("/husai/effective_rank", "/husai/effective_tank", 1))
    code, failed, _ = audit()
    assert code == 1
    assert set(failed) == {"phase4a-rank"}
    figure = printed("phase4a-rank", 1)
    assert re.match(f"'{re.escape(figure)}': .*/husai/effective_tank", failed["phase4a-rank"])


@pytest.mark.parametrize("path", [RESULTS, MANIFEST, "docs/benchmarks/inference_calibration.json", "docs/methods.md"])
def test_a_missing_file(copy, audit, path):
    (copy / path).unlink()
    code, failed, _ = audit()
    assert code == 1
    assert any(path in line for line in failed.values())
    assert not any(re.search(f"{path} .*sha256", line) for line in failed.values())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_is_not_utf8(copy, audit, name):
    with open(copy / name, "ab") as f:
        f.write(b"\xff")
    code, failed, _ = audit()
    assert code == 1
    assert re.fullmatch(rf"{name} .*UTF-8", failed[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"return_code": 2}, r"\bcomplete\b.* 2\b"),
        ({"status": "failed"}, r"\bfailed\b.* 0\b"),
        ({"return_code": "0"}, r"manifest\.json: return_code:"),
        ({"extra": 1}, r"manifest\.json: extra:"),
        ({"inputs": {"subject": "0" * 64}}, r"\binputs\b"),
        ({"outputs": {}}, r"results\.json [^;]*manifest(;|$)"),
        ({"outputs": {"results.json": "0" * 64}}, r"results\.json [^;]*sha256"),
    ],
)
def test_a_manifest(copy, audit, change, named):
    edit(copy / MANIFEST, lambda m: m.update(change))
    code, failed, _ = audit("--write-digests")
    assert code == 1
    assert set(failed) == {EVIDENCE, DECISION}, "what the gate read does not count any more either"
    assert re.search(named, failed[EVIDENCE])


def test_a_run_whose_check_did_not_hold_is_evidence(copy, audit):
    edit(copy / MANIFEST, lambda m: m.update(return_code=1))
    assert audit("--write-digests") == (0, {}, "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "matches.png").write_bytes(b"drawn"), r"matches\.png .*sha256"),
        (lambda folder: (folder / "summary.md").write_text("better"), r"summary\.md .*sha256"),
        (lambda folder: (folder / "more.csv").write_text("a,b\n"), r"more\.csv .*manifest$"),
        (lambda folder: (folder / "summary.md").unlink(), r"summary\.md [^(]*$"),
        (lambda folder: (folder / "figures").mkdir(), r"figures .*manifest$"),
    ],
)
def test_a_file_of_an_evidence_folder(copy, audit, change, named):
    change(copy / EVIDENCE)
    code, failed, _ = audit()
    assert code == 1
    assert set(failed) == {EVIDENCE}
    assert re.match(named, failed[EVIDENCE])


@pytest.mark.parametrize("path", [RESULTS, MANIFEST])
def test_evidence_nested_too_deep(copy, audit, path):
    (copy / path).write_text("[" * 100_000 + "]" * 100_000)
    code, failed, _ = audit()
    assert code == 1
    assert re.search(f"{path} .*JSON.*recursion", failed[EVIDENCE])
    assert re.search(f"{path} .*JSON", failed["phase4a-excess" if path == RESULTS else "phase4a-command"])


def test_results_that_cannot_be_computed_with(copy, audit):
    edit(copy / RESULTS, lambda r: r["husai"]["pairs"][0]["observed"].update(mcc=10**400))
    code, failed, _ = rebind(copy, audit)
    assert code == 1
    assert re.match(r"results\.json .*OverflowError", failed[EVIDENCE])


# ---------------------------------------------------------------------------------------------------------------------
# External claims


def make_external(copy, *lines):
    """Let the claim phase4a-gaussian be external, with these lines after its tier."""
    before, after = (copy / CLAIMS).read_text().split("  - id: phase4a-gaussian\n")
    after = after.replace("tier: internal", "\n    ".join(["tier: external", *lines]), 1)
    (copy / CLAIMS).write_text(f"{before}  - id: phase4a-gaussian\n{after}")


def test_an_external_claim_without_a_gate(copy, audit):
    make_external(copy)
    code, failed, _ = audit()
    assert code == 1
    assert set(failed) == {"phase4a-gaussian"}
    assert re.fullmatch(r"external\b.* gate", failed["phase4a-gaussian"])


@pytest.mark.parametrize(
    ("results", "internal"),
    [
        ({"phase": "4a"}, True),
        ({"phase": "external"}, False),
        ({"phase": ["4a"]}, False),
        ({}, False),
        (["4a"], False),
        (None, False),
    ],
)
def test_an_internal_claim_needs_an_internal_artefact(tmp_path, results, internal):
    (tmp_path / LOG).write_text("a 0.5\n")
    for artefact, holds in [("docs/evidence/x/a.json", internal), ("docs/a.json", False), ("a.json", False)]:
        (tmp_path / artefact).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / artefact).write_text('{"a": 0.5}')
        if results is not None:
            (tmp_path / artefact).with_name("results.json").write_text(json.dumps(results))
        problems = internal_claim(tmp_path, artefact)
        assert [p.split(",")[0] for p in problems if artefact in p] == ([] if holds else ["internal"])
        assert len(problems) == 1 - holds
    for artefact in ("docs/benchmarks/a.json", "docs/benchmarks/b/a.json"):
        (tmp_path / artefact).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / artefact).write_text('{"a": 0.5}')
        assert internal_claim(tmp_path, artefact) == []


def internal_claim(root, artefact):
    """What the audit finds of an internal claim on an artefact below the root."""
    listed = {
        "artefacts": {artefact: sha256_file(root / artefact)},
        "claims": [claim("a 0.5", ["0.5"], artefact=artefact)],
    }
    return audit_claims(Claims.model_validate(listed), root)["a"]


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        ({"pass_all": True, "of": {"inputs": ["HERE"]}}, f"docs/gate.json .*sha256 .*{RESULTS}"),
        ({"pass_all": True}, f"docs/gate.json .*sha256 .*{RESULTS}"),
        ({"pass_all": True, "HERE": "x"}, f"docs/gate.json .*sha256 .*{RESULTS}"),
        ({"pass_all": True, "read": {"x": {"sha256": "sha256:HERE"}}}, f"docs/gate.json .*sha256 .*{RESULTS}"),
        ({"pass_all": True, "read": {"x": {"sha256": "HERE"}}}, "docs/gate.json: .*KeyError"),
        ({"pass_all": False, "of": "HERE"}, r"pass_all .*docs/gate.json .*\bFalse\b"),
        ({"pass_all": False}, r"pass_all .*docs/gate.json .*\bFalse\b"),
        ({"pass_all": "true"}, "pass_all .*docs/gate.json .*'true'"),
        ({"pass_all": 1}, r"pass_all .*docs/gate.json .*\b1\b"),
        ({}, r"pass_all .*docs/gate.json .*\bNone\b"),
        ([True], r"pass_all .*docs/gate.json .*\bNone\b"),
        (None, "^docs/gate.json "),
    ],
)
def test_an_external_claim_and_its_gate(copy, audit, gate, named):
    make_external(copy, "gate: docs/gate.json")
    flags = []
    if gate is not None:
        (copy / "docs/gate.json").write_text(json.dumps(gate).replace("HERE", sha256_file(copy / RESULTS)))
        flags = ["--write-digests"]
    code, failed, _ = audit(*flags)
    assert code == 1
    assert set(failed) == {"phase4a-gaussian"}
    assert re.search(named, failed["phase4a-gaussian"])


# ---------------------------------------------------------------------------------------------------------------------
# Figures without a claim


BOLD = ("**12 times faster**", "__a gain of\n0.5__", "**`mcc` 0.597 of old**")


@pytest.mark.parametrize(("name", "bold"), [*zip(DOCUMENTS, BOLD, strict=False), (DOCUMENTS[-1], BOLD[0])])
def test_a_bold_figure_without_a_claim(copy, audit, name, bold):
    with open(copy / name, "a") as f:
        f.write(f"\nHUSAI is {bold}.\n")
    code, failed, _ = audit()
    assert code == 1
    assert set(failed) == {name}
    assert re.match(rf"line \d+: {NUMBER.search(bold)[0]} ", failed[name])


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ("| λ | 0.25 | 17 % | 12 |", ["0.25", "17"]),
        ("Stability rose to 0.9, in 7 seeds.", ["0.9"]),
        ("With `--rate 0.25` and torch 2.13.0, see [that](docs/v0.5.md).", []),
        ("**Negative**: in layer4 nothing.", []),
        ("```\nmcc 0.5\n\n**0.7**\n```", []),
        ("By `--rate\n0.25`, ``a`0.25``, 0.5 is `mcc`.", ["0.5"]),
        ("It is .597, by +.0221, p=.05 or _0.7_.", [".597", "+.0221", ".05", "0.7"]),
        ("2.5x, 12.7k rows, 0.5s, 10.5ms, 3.5GB, 1.5E-3", ["2.5", "12.7", "0.5", "10.5", "3.5", "1.5E-3"]),
        ("Of old 0,597 and 17,25 of 2,000 and 1,234,567.5.", ["0,597", "17,25", "1,234,567.5"]),
        ("17 per cent, 18 Percent, 19\npercent, 20 per\ncent, 21%", ["17", "18", "19", "20", "21"]),
        ("torch 2.13.0, 2.13.0+cpu, v0.5, 2.13.0rc1 of phase 4a on 2026-11-24, 8 cores, 99 s.", []),
        ("**2x**, **40k** rows, **3GB**, **phase `4a`**, **layer4**, **2.13.0**", ["2", "40", "3"]),
    ],
)
def test_what_needs_a_claim_in_the_log(line, figures):
    found = unclaimed(LOG, f"# Log\n\n{line}\n", [])
    assert [re.match(r"line \d: (\S+) ", problem)[1] for problem in found] == figures
    assert unclaimed("README.md", f"# Log\n\n{line}\n", []) == (found if "**" in line else [])


def test_a_figure_backs_its_own_place_alone():
    claims = Claims.model_validate({"artefacts": {}, "claims": [claim("random 0.5, trained 0.5", ["0.5"])]}).claims
    problems = unclaimed(LOG, "random 0.5,\ntrained 0.5; and 0.5", claims)
    assert [problem.startswith("line 2: 0.5 ") for problem in problems] == [True, True]


def claim(statement, figures, **others):
    return {
        "id": "a",
        "document": LOG,
        "statement": statement,
        "tier": "internal",
        "artefact": "a.json",
        "figures": [{"text": text, "pointer": "/a"} for text in figures],
    } | others


def test_all_failures_are_listed(copy, audit):
    isotropic, covariance = printed("phase4a-isotropic", 0), f"at {printed('phase4a-rank', 0)}"
    swap(copy / LOG, isotropic, misprinted(isotropic))
    swap(copy / LOG, covariance, misprinted(covariance))
    edit(copy / MANIFEST, lambda m: m.update(return_code=3))
    code, failed, err = audit()
    assert code == 1
    assert set(failed) == {"phase4a-isotropic", "phase4a-rank", "phase4a-command", LOG, EVIDENCE, DECISION}
    assert err.startswith("error: audit: 6 ")


# ---------------------------------------------------------------------------------------------------------------------
# The claims file

GOOD = json.dumps({"artefacts": {}, "claims": [claim("a 0.5", ["0.5"])]})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("claims: [unclosed", "YAML"),
        ("- a list", "dictionary"),
        ("artefacts: {}\nartefacts: {}\nclaims: []", "YAML .*'artefacts'"),
        ("claims: []", "artefacts:"),
        (GOOD.replace('"0.5"', "0.5"), "claims.0.figures.0.text:"),
        (GOOD.replace('"tier"', '"tear"'), "claims.0.tier:"),
        (GOOD.replace('"internal"', '"public"'), "claims.0.tier: .*'internal'"),
        (GOOD.replace('"a.json"', '"../a.json"'), "claims.0.artefact:"),
        (GOOD.replace('"a.json"', '"/a.json"'), "claims.0.artefact:"),
        (GOOD.replace('"/a"', '"a"'), "claims.0.figures.0.pointer:"),
        (GOOD.replace("{}", '{"a.json": "0"}'), "artefacts.a.json:"),
        (json.dumps({"artefacts": {}, "claims": [claim("x", ["1"])] * 2}), "claims: .*\\ba\\b"),
        (json.dumps({"artefacts": {}, "claims": [claim("x", [])]}), "claims.0.figures:"),
        ("[" * 100_000 + "]" * 100_000, "YAML"),
        (None, "YAML"),
    ],
)
def test_a_malformed_claims_file(copy, audit, text, place):
    if text is None:
        (copy / CLAIMS).unlink()
    else:
        (copy / CLAIMS).write_text(text)
    code, failed, err = audit()
    assert (code, failed) == (2, {})
    assert err.count("\n") == 1
    assert re.match(f"error: claims: {copy / CLAIMS}.*{place}", err)


def test_write_digests(copy, run_script):
    before = (copy / CLAIMS).read_text()
    edit(copy / "docs/benchmarks/inference_calibration.json", lambda r: r.update(note="measured again"))
    swap(copy / CLAIMS, "artefacts:\n", f"artefacts:\n  docs/old.json: {'f' * 64}\n")
    code, out, _ = run_script(AUDIT, "--root", copy, "--write-digests")
    assert code == 0
    changed = re.findall("^sha256  (.*): [0-9a-f]{12} -> (.*)", out, re.M)
    now = sha256_file(copy / "docs/benchmarks/inference_calibration.json")
    assert changed == [("docs/benchmarks/inference_calibration.json", now[:12]), ("docs/old.json", "none")]
    after = (copy / CLAIMS).read_text()
    assert [line for line in after.splitlines() if line not in before] == [
        f"  docs/benchmarks/inference_calibration.json: {now}"
    ]
    assert len(after) == len(before)
    assert "sha256" not in run_script(AUDIT, "--root", copy, "--write-digests")[1]
    (copy / RESULTS).unlink()
    code, _, err = run_script(AUDIT, "--root", copy, "--write-digests")
    assert code == 2
    assert re.fullmatch(f"error: claims: {RESULTS} .*\n", err)
    assert (copy / CLAIMS).read_text() == after


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, pointers, places


@given(
    st.floats(-1e7, 1e7) | st.floats(-1, 1),
    st.integers(0, 8),
    st.sampled_from("fe"),
    st.booleans(),
    st.integers(1, 9),
)
def test_a_figure_is_its_value_rounded_and_nothing_else(value, digits, style, percent, other):
    """What Python prints is accepted; with another last digit, before any exponent, it is refused."""
    printed = f"{value * 100 if percent else value:,.{digits}f}" if style == "f" else f"{value:.{digits}e}"
    percent = percent and style == "f"
    mantissa, _, exponent = printed.partition("e")
    wrong = mantissa[:-1] + str((int(mantissa[-1]) + other) % 10) + printed[len(mantissa) :]
    assert NUMBER.findall(printed) == [printed]
    for sign in ("-", "−"):
        assert prints_as(printed.replace("-", sign), value, percent)
    assert prints_as(("" if printed[0] == "-" else "+") + printed, value, percent)
    if not (exponent and wrong.lstrip("-")[0] == "0"):  # 0.5e-3 is not how a number is printed
        assert not prints_as(wrong, value, percent)


@pytest.mark.parametrize(
    ("printed", "value", "percent"),
    [
        (".597", 0.5971, False),
        ("+.0221", 0.0221, False),
        ("0,597", 0.597, False),
        ("17,25", 17.25, False),
        ("17,250", 17250, False),
        ("−1.5E-3", -0.0015, False),
    ],
)
def test_spellings_of_a_number(printed, value, percent):
    assert NUMBER.findall(printed) == [printed]
    assert prints_as(printed, value, percent)
    assert not prints_as(printed, value * 1000, percent)


def test_a_per_cent_word_is_a_per_cent_sign():
    for text in ("17 %", "17 per cent", "17 percent"):
        assert figure_problem(Figure(text=text, pointer="/a"), {"a": 0.17}) is None
        assert figure_problem(Figure(text=text, pointer="/a"), {"a": 17}) is not None


@pytest.mark.parametrize(("text", "value"), [("5", 10**400), ("9" * 400, 10**400), ("1e" + "9" * 30, 1)])
def test_a_number_too_large(text, value):
    assert figure_problem(Figure(text=text, pointer="/a"), {"a": value}).startswith(f"{text!r}: ")


@pytest.mark.parametrize(
    ("text", "most"),
    [("40 %", 1), ("0.25", 0.01), ("3.1e-5", 1e-6), ("0,597", 0.001), ("1,024", 1), ("5 [4.9, 5.1]", 0.1)],
)
def test_tolerance_is_one_unit_of_the_last_digit_at_most(text, most):
    assert Figure(text=text, pointer="/a", tolerance=most).tolerance == most
    with pytest.raises(ValueError, match="tolerance"):
        Figure(text=text, pointer="/a", tolerance=most * 1.01)


def test_tolerance_is_in_printed_units():
    assert prints_as("40", 0.41, percent=True, tolerance=1.001)
    assert not prints_as("40", 0.42, percent=True, tolerance=1.001)


@pytest.mark.parametrize(("printed", "holds"), [("−0.000", True), ("0.000", True), ("+0.000", False)])
def test_a_signed_zero_keeps_its_sign(printed, holds):
    assert prints_as(printed, -0.0004) == holds
    assert prints_as("−0.000", 0.0004) is False


def test_pointers_as_in_rfc_6901():
    document = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "k l": 6, " ": 7, "m~n": 8, "~1": 9}
    expected = {"": document, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/c%d": 2, "/e^f": 3}
    expected |= {"/k l": 6, "/ ": 7, "/m~0n": 8, "/~01": 9}
    for pointer, value in expected.items():
        assert resolve(document, pointer) == value
    for pointer in ("/foo/2", "/foo/-", "/foo/00", "/foo/-1", "/bar", "/foo/0/x", "/foo/٠", "/foo/" + "9" * 5000):
        with pytest.raises(LookupError):
            resolve(document, pointer)


@pytest.mark.parametrize("held", [True, None, [], [1.0], {"estimate": 1}, {"estimate": True, "low": 1, "high": 1}])
def test_what_is_no_figure(held):
    with pytest.raises(LookupError, match="/a"):
        values(Figure(text="1", pointer="/a"), {"a": held})


def test_places_keep_numbers_whole():
    text = "is 0.5,\n  then +0.25 and\n10.5"
    assert [text[s:e] for s, e in places("0.5, then", text)] == ["0.5,\n  then"]
    assert list(places("0.25", text)) == [], "the sign belongs to it"
    assert list(places("then +0.2", text)) == []
    assert list(places("0.5", text)) == [(3, 6)]
    assert list(places("is 2.5", "is 2.5k")) == [], "the unit belongs to it"
    assert list(places("2.5", "_2.5_")) == [(1, 4)]


@pytest.mark.parametrize("seeds", [2, 4, 6])
@pytest.mark.parametrize("missing", [{}, {"gaussian": "not part"}])
def test_what_the_current_code_writes_is_computed_again(seeds, missing):
    rng = np.random.default_rng(seeds)
    nulls = [n for n in (*names.GATED_NULLS, "random_model") if n not in missing]

    def drawn(name):
        draws = {s: rng.random(4).tolist() for s in compare.SCORES}
        means = {s: float(np.mean(d)) for s, d in draws.items()} | {compare.GAP: float(rng.random())}
        return {"mean": means, "draws": draws if name == "spectral" else None}

    labels = [f"seed{i}" for i in range(seeds)]
    pairs = {ij: {n: drawn(n) for n in ("observed", *nulls)} for ij in combinations(range(seeds), 2)}
    kept = [
        {"a": labels[i], "b": labels[j]} | {n: v["mean"] for n, v in value.items()} for (i, j), value in pairs.items()
    ]
    study = {"stability": stability.summarise(labels, pairs, missing).to_json(), "pairs": kept}
    study = json.loads(json.dumps(study))
    assert study_problems(study) == []
    study["stability"][compare.GAP] /= 2
    assert len(study_problems(study)) == 1


def test_a_study_is_found_wherever_it_stands_and_one_that_cannot_be_read_is_a_failure():
    results = {"cells": [{"stability": {}, "pairs": []}, {"stability": {}}], "a": {"stability": 1, "pairs": 2}}
    found = dict(studies(results))
    assert set(found) == {"/cells/0", "/a"}
    for study in found.values():
        assert study_problems(study)[0].startswith("stability ")
