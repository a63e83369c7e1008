"""Claims: statements of the documents whose figures are checked against artefacts.

A figure holds if the artefact's value, printed with equally many digits, equals the figure. `docs/claims.yaml` lists
the claims. `unclaimed` finds figures of a document without a claim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from husai.release import decisions
from husai.release.recompute import resolve
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_text

LOG = "EXPERIMENT_LOG.md"
DOCUMENTS = ("README.md", "START_HERE.md", LOG, "docs/methods.md")
"""Documents in which every bold number needs a claim. LOG also needs one for each decimal or percentage."""

INTERNAL_PHASES = ("4a", "core_ablations", "adaptive_l0_calibration", "assignment_consistency_v2", "language_model")
"""Claims on evidence of these phases, on docs/benchmarks and on assets may be internal; all others are external."""


def _inside(path: str) -> str:
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("a path below the root of the repository expected")
    return path


def _distinct(claims: list[Claim]) -> list[Claim]:
    ids = [c.id for c in claims]
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    if repeated:
        raise ValueError(f"the id {repeated[0]} occurs twice")
    return claims


RepositoryPath = Annotated[str, AfterValidator(_inside)]
Pointer = Annotated[str, Field(pattern=r"^(/([^~/]|~[01])*)*$")]  # RFC 6901
Text = Annotated[str, Field(pattern=r"\S")]


class Figure(BaseModel):
    """A printed figure of a statement, and the place of its value in the claim's artefact."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    """`0.9975`, `+0.033 [+0.022, +0.044]` (the pointer leads to an estimate with low and high), `42 to 47 %` (with
    `range_of`), or a word (`above chance`). For a %, the artefact holds the fraction."""
    pointer: Pointer
    range_of: Pointer | None = None
    """Pointer inside each item of the list or object at `pointer`. The figure is the lowest and highest value."""
    tolerance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Tolerance in printed units, for a figure that is no rounded value. It is at most one unit of the last digit of
    each number in `text` (0.01 for `0.25`, 1 for `40 %`)."""

    @model_validator(mode="after")
    def _tolerance_is_small(self) -> Figure:
        if self.tolerance is not None and any(self.tolerance > unit(n) for n in NUMBER.findall(self.text)):
            raise ValueError("a tolerance of at most one unit of the last printed digit expected")
        return self


class Claim(BaseModel):
    """A statement and one artefact. If its figures come from two artefacts, two claims share the statement."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    document: RepositoryPath
    statement: Text
    """Text of the statement in the document. Line breaks do not matter."""
    tier: Literal["internal", "external"]
    """`may_be_internal` decides by the artefact whether `internal` is allowed."""
    gate: RepositoryPath | None = None
    """Result of the release gate for an external claim. It must name the sha256 of the artefact."""
    artefact: RepositoryPath
    figures: list[Figure] = Field(min_length=1)
    """Figures in the order of the statement."""

    def files(self) -> list[str]:
        return [self.artefact] + ([self.gate] if self.gate else [])


class Claims(BaseModel):
    """`docs/claims.yaml`."""

    model_config = ConfigDict(extra="forbid")

    artefacts: dict[RepositoryPath, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]  # path -> sha256
    claims: Annotated[list[Claim], AfterValidator(_distinct)]

    def files(self) -> list[str]:
        return sorted({path for claim in self.claims for path in claim.files()})


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses equal keys. Plain YAML keeps the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path) -> Claims:
    """Read a claims file.

    Raises:
        BadInput: the file is missing, is no YAML, or is no list of claims.
    """
    try:
        return Claims.model_validate(yaml.load(path.read_text(), _Loader))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadInput(f"claims: {path}: {place}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"claims: {path} is not readable as YAML ({error})") from None


def write_digests(path: Path, root: Path) -> list[str]:
    """Update `artefacts` of a claims file from the files that its claims name; returns the changes.

    Raises:
        BadInput: an artefact is missing, or the list has not one indented line for each artefact.
    """
    claims = read(path)
    for name in claims.files():
        if not (root / name).is_file():
            raise BadInput(f"claims: {name} does not exist")
    now = {name: sha256_file(root / name) for name in claims.files()}
    lines = ["artefacts:", *(f"  {name}: {sha}" for name, sha in now.items())] if now else ["artefacts: {}"]
    text = re.sub(r"^artefacts:.*\n(?:[ \t]+\S.*\n)*", "\n".join(lines) + "\n", path.read_text(), count=1, flags=re.M)
    if yaml.load(text, _Loader).get("artefacts") != now:
        raise BadInput(f"claims: {path}: artefacts: one indented line an artefact expected, `path: sha256`")
    write_text(path, text)
    before = claims.artefacts
    return [
        f"{name}: {before.get(name, 'none')[:12]} -> {now.get(name, 'none')[:12]}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A figure and its value

NUMBER = re.compile(
    r"(?<![^\W_])(?<!\.)[+−-]?"
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:[.,][0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+−-]?[0-9]+)?(?!\.?[0-9])"
)
"""A printed number without its unit (`2.5` of `2.5x`). Digits after a letter or in a version number do not match."""

PERCENT = re.compile(r"\s*(?:%|per\s?cent)", re.I)


def plain(printed: str) -> str:
    """A number in Python's spelling: `1,024` -> `1024`, `0,597` (a decimal comma) -> `0.597`, `−3E-5` -> `-3e-5`."""
    grouped = re.match(r"\D?[1-9][0-9]{0,2}(,[0-9]{3})+(?![0-9])", printed)
    return printed.replace("−", "-").lower().replace(",", "" if grouped else ".")


def unit(printed: str) -> float:
    """One unit of the last digit of a printed number."""
    mantissa, _, exponent = plain(printed).partition("e")
    return float(f"1e{int(exponent or 0) - len(mantissa.partition('.')[2])}")


def prints_as(printed: str, value: float, percent: bool = False, tolerance: float | None = None) -> bool:
    """True if `value`, printed with the same number of digits, equals `printed`."""
    printed = plain(printed)
    value = value * 100 if percent else value
    if tolerance is not None:
        return abs(value - float(printed)) <= tolerance
    mantissa, _, exponent = printed.partition("e")
    digits = len(mantissa.partition(".")[2])
    expected = f"{value:.{digits}{'e' if exponent else 'f'}}"
    signed = printed[0] in "+-"  # a printed sign must be that of the value, even for zero
    return Decimal(expected) == Decimal(printed) and (not signed or (printed[0] == "-") == (expected[0] == "-"))


def values(figure: Figure, artefact: Any) -> list[float] | str:
    """Value of a figure in the artefact: a word, a number, [estimate, low, high], or [lowest, highest].

    Raises:
        LookupError: the artefact lacks the value.
    """
    value = resolve(artefact, figure.pointer)
    if isinstance(value, str) and figure.range_of is None:
        return value
    if figure.range_of is not None:
        items = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(items, list) or not items:
            raise LookupError(f"a list or an object expected at {figure.pointer}")
        numbers = [resolve(item, figure.range_of) for item in items]
    elif isinstance(value, dict) and {"estimate", "low", "high"} <= value.keys():
        numbers = [value[name] for name in ("estimate", "low", "high") if value[name] is not None]
    else:
        numbers = [value]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise LookupError(f"no number, interval or word at {figure.pointer}{figure.range_of or ''}")
    return numbers if figure.range_of is None else [min(numbers), max(numbers)]


def figure_problem(figure: Figure, artefact: Any) -> str | None:
    """Reason why a figure does not follow from its artefact; None if it does."""
    try:
        recorded = values(figure, artefact)
    except LookupError as error:
        return f"{figure.text!r}: {error.args[0]}"
    if isinstance(recorded, str):
        holds = " ".join(figure.text.split()).casefold() == recorded.casefold()
    else:
        printed, percent = NUMBER.findall(figure.text), PERCENT.search(figure.text) is not None
        try:
            holds = len(printed) == len(recorded) and all(
                prints_as(p, v, percent, figure.tolerance) for p, v in zip(printed, recorded, strict=True)
            )
        except ArithmeticError:
            return f"{figure.text!r}: the number printed, or that at {figure.pointer}, is too large"
    if holds:
        return None
    shown = recorded if isinstance(recorded, str) else ", ".join(map(str, recorded))
    return f"{figure.text!r} printed, {shown} at {figure.pointer}"


# ---------------------------------------------------------------------------------------------------------------------
# A statement and its document


@cache
def number_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the numbers in a text. They are cached, because all figures are searched in the same document."""
    return [m.span() for m in NUMBER.finditer(text)]


def places(text: str, within: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Spans of `text` in `within[start:end]`. Any white space separates words, and numbers match as a whole."""
    numbers = number_spans(within)
    expected = len(NUMBER.findall(text))
    words = r"\s+".join(map(re.escape, text.split())) + (r"(?![^\W_])" if text[-1:].isdigit() else "")
    for m in re.compile(words).finditer(within, start, end or len(within)):
        if sum(m.start() <= s and e <= m.end() for s, e in numbers) == expected:
            yield m.span()


def figure_places(claim: Claim, within: str, start: int = 0, end: int | None = None) -> list[tuple[int, int] | None]:
    """Span of each figure of a claim, after the span of the previous figure; None for an absent figure."""
    spans = []
    for figure in claim.figures:
        place = next(places(figure.text, within, start, end), None)
        start = place[1] if place else start
        spans.append(place)
    return spans


def claim_problems(claim: Claim, document: str, artefact: Any) -> list[str]:
    """Problems of a claim, in its words and its figures.

    Args:
        document: text of the document. artefact: content of the artefact; None if it cannot be read.
    """
    problems = []
    if not any(places(claim.statement, document)):
        problems.append(f"{claim.document} does not say {' '.join(claim.statement.split())!r}")
    for figure, place in zip(claim.figures, figure_places(claim, claim.statement), strict=True):
        if place is None:
            problems.append(f"{figure.text!r} does not stand in the statement, after the figure before it")
        elif artefact is not None and (problem := figure_problem(figure, artefact)):
            problems.append(problem)
    return problems


def may_be_internal(artefact: str, root: Path) -> bool:
    """True for a benchmark, a shipped asset, or evidence of an internal phase."""
    path = PurePosixPath(artefact)
    if path.parts[:2] != ("docs", "evidence"):
        return path.parts[:2] == ("docs", "benchmarks") or path.parts[0] == "assets"
    try:
        results = read_json(root / path.parent / "results.json", "evidence")
    except BadInput:
        return False
    return isinstance(results, dict) and results.get("phase") in INTERNAL_PHASES


def gate_problem(claim: Claim, gate: Any, sha256: str | None, root: Path) -> str | None:
    """Reason why an external claim does not pass its gate; None if it passes.

    Args:
        gate: content of the gate's results; None if they cannot be read. sha256: digest of the claim's artefact.
    """
    passed = gate.get("pass_all") if isinstance(gate, dict) else None
    if claim.gate is None:
        return "external, and names no gate"
    if passed is not True:
        return f"external, and pass_all in {claim.gate} is {passed!r}, not true"
    if sha256 not in decisions.read_digests(gate):
        return f"external, and {claim.gate} does not name the sha256 of {claim.artefact}"
    if why := decisions.problem(root / claim.gate, gate, root):
        return f"external, and {claim.gate}: {why}"
    return None


def unclaimed(name: str, text: str, claims: list[Claim]) -> list[str]:
    """Problems of a document: numbers that need a claim and are no figure of one."""
    backed = [
        place
        for claim in claims
        if claim.document == name
        for start, end in places(claim.statement, text)
        for place in figure_places(claim, text, start, end)
        if place
    ]
    code = r"^```.*?^```|(`+)((?!\n\s*\n).)+?\1(?!`)|\]\([^)\s]*\)"  # and the targets of links
    prose = re.sub(code, lambda m: re.sub(r"[^\n]", "·", m[0]), text, flags=re.M | re.S).replace("__", "**")
    bold = [m.span() for m in re.finditer(r"\*\*(?=\S)((?!\n\s*\n).)+?\*\*", prose, re.S)]
    problems = []
    for number in NUMBER.finditer(prose):
        start, end = number.span()
        needs = any(s < start and end < e for s, e in bold)
        needs |= name == LOG and ("." in plain(number[0]) or PERCENT.match(prose, end) is not None)
        if needs and not any(s <= start and end <= e for s, e in backed):
            problems.append(f"line {text.count(chr(10), 0, start) + 1}: {number[0]} is no figure of a claim")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The audit of a repository: name -> problems


def audit_claims(claims: Claims, root: Path) -> dict[str, list[str]]:
    """Id of each claim -> problems with its document and its artefacts."""
    opened = {path: _open(root / path, path, claims.artefacts.get(path)) for path in claims.files()}
    internal = {path: may_be_internal(path, root) for path in {claim.artefact for claim in claims.claims}}
    findings = {}
    for claim in claims.claims:
        document, problem = _text(root / claim.document, claim.document)
        problems = [problem] if problem else []
        problems += [fault for path in claim.files() if (fault := opened[path][1])]
        problems += claim_problems(claim, document, opened[claim.artefact][0])
        if claim.tier == "external":
            gate = opened[claim.gate][0] if claim.gate else None
            problem = gate_problem(claim, gate, claims.artefacts.get(claim.artefact), root)
            problems += [problem] if problem else []
        elif not internal[claim.artefact]:
            problems.append(f"internal, and {claim.artefact} is neither a benchmark nor evidence of an internal phase")
        findings[claim.id] = problems
    unused = sorted(claims.artefacts.keys() - opened.keys())
    return findings | ({"artefacts": [f"{path} is named by no claim" for path in unused]} if unused else {})


def audit_documents(claims: Claims, root: Path) -> dict[str, list[str]]:
    """Name of each of DOCUMENTS -> figures that lack a claim."""
    findings = {}
    for name in DOCUMENTS:
        text, problem = _text(root / name, name)
        findings[name] = [problem] if problem else unclaimed(name, text, claims.claims)
    return findings


def _open(path: Path, name: str, expected: str | None) -> tuple[Any, str | None]:
    """(content or None, problem of the file or None)."""
    if not path.is_file():
        return None, f"{name} is missing"
    problem: str | None
    if expected is None:
        problem = f"{name} has no sha256 among the artefacts"
    else:
        problem = None if sha256_file(path) == expected else f"{name} was changed: its sha256 is another"
    try:
        return read_json(path, "artefact"), problem
    except BadInput:
        return None, f"{name} is not strict JSON"


def _text(path: Path, name: str) -> tuple[str, str | None]:
    try:
        return (path.read_text(), None) if path.is_file() else ("", f"{name} is missing")
    except UnicodeDecodeError:
        return "", f"{name} is not UTF-8"
