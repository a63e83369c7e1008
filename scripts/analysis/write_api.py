"""Write docs/api.md from the docstrings of the Python surface.

    python scripts/analysis/write_api.py
    python scripts/analysis/write_api.py --output api.md

The page has the signature, the docstring, the fields and the public methods of each object in `PUBLIC`. A test compares
the file with this script's output, and runs the examples. Exit 0 done, 2 bad input.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from husai.runs.cli import Parser, run_main

RECURRENCE, ESTIMATES, DECODERS = (
    "husai.stability.recurrence",
    "husai.evidence.estimates",
    "husai.dictionaries.decoders",
)
PUBLIC: dict[str, tuple[str, ...]] = {
    "One SAE": ("husai:feature_reliability", "husai.evals.reliability:Reliability"),
    "Compare decoders": (
        "husai:compare",
        *(f"{RECURRENCE}:{name}" for name in ("DecoderComparison", "Partners", "Chance")),
    ),
    "Open SAEs": (
        *(f"{DECODERS}:{name}" for name in ("read_decoder", "read_moments")),
        *(f"husai.dictionaries.foreign:{name}" for name in ("open_checkpoint", "find_all")),
        "husai.dictionaries.sae:SAE",
    ),
    "Single features": tuple(f"{RECURRENCE}:{name}" for name in ("partners", "chance", "rebuilt", "neighbours")),
    "Scores of a pair": tuple(f"husai.stability.scores:{name}" for name in ("mcc", "pwmcc", "score")),
    "Intervals": tuple(f"{ESTIMATES}:{name}" for name in ("Estimate", "jackknife", "clopper_pearson_low")),
    "Activations": ("husai.activations.store:ActivationStore",),
    "Errors": ("husai.runs.errors:BadInput",),
}
"""Title -> objects, as module:name."""
HEAD = """# Python

`make api` writes this page from docstrings. Shapes stand in backticks. A row of a decoder is a feature. A test executes
every example.
"""


def parse():
    p = Parser(__doc__)
    p.add_argument("--output", type=Path, default=Path("docs/api.md"), help="default: %(default)s")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.runs.files import write_text

    write_text(args.output, page())
    print(f"page     {args.output}")


def page() -> str:
    import husai
    from husai.evidence.features import dictionary

    parts = [HEAD, markdown(inspect.getdoc(husai) or "")]
    for title, names in PUBLIC.items():
        parts.append(f"## {title}")
        parts += [described(name) for name in names]
    parts += ["## Columns of the feature table", dictionary().strip()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# One object


def public(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def described(name: str) -> str:
    thing, path = public(name), name.replace(":", ".")
    parts = [f"### {path}", markdown(inspect.getdoc(thing) or "")]
    if not inspect.isclass(thing):
        return "\n\n".join([parts[0], signature(path.rpartition(".")[2], thing), *parts[1:]])
    parts.append("\n".join(f"- `{field}`: {text}" for field, text in fields(thing)))
    for method, function in vars(thing).items():
        if not method.startswith("_") and (text := inspect.getdoc(function)) and callable_of(function):
            computed = isinstance(function, property | cached_property)
            shown = f"`{method}`" if computed else signature(method, callable_of(function))
            parts += [f"#### {path.rpartition('.')[2]}.{method}", shown, markdown(text)]
    return "\n\n".join(part for part in parts if part)


def callable_of(member: Any) -> Any:
    """The function behind a method, a class method or a property; None for other objects."""
    if isinstance(member, property):
        return member.fget
    member = getattr(member, "__func__", getattr(member, "func", member))  # of a class method, a cached property
    return member if inspect.isfunction(member) else None


def signature(name: str, function: Any) -> str:
    """Signature of a function, with annotations as in the source."""
    shown = re.sub(r"((?:: |-> ))'([^']*)'", r"\1\2", f"{name}{inspect.signature(function)}")
    return f"```python\n{shown}\n```"


def fields(cls: type) -> Iterator[tuple[str, str]]:
    """(field, its description): the string below the field, or the comment behind it."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text_of_field = f"`{ast.unparse(statement.annotation)}`"
        comment = lines[statement.lineno - 1].partition("  # ")[2]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            comment = " ".join(str(following.value.value).split())
        yield statement.target.id, f"{text_of_field}. {comment}" if comment else text_of_field


# ---------------------------------------------------------------------------------------------------------------------
# A docstring


def markdown(text: str) -> str:
    """A docstring as Markdown: examples are fenced, and sections on arguments and errors are lists."""
    parts = []
    for block in re.split(r"\n\s*\n", text):
        heading = re.match(r"(Args|Raises|Returns):\n", block)
        if block.startswith(">>>"):
            parts.append(f"```python\n{block}\n```")
        elif heading:
            titles = {"Args": "Arguments", "Raises": "Raises", "Returns": "Returns"}
            items = re.split(r"\n(?=    \S)", block.removeprefix(heading[0].rstrip("\n")))
            listed = "\n".join(f"- {' '.join(item.split())}" for item in items if item.strip())
            parts.append(f"*{titles[heading[1]]}*\n\n{listed}")
        elif all(line.startswith("    ") for line in block.splitlines()):
            parts.append(block)  # no fence, because the formatter would rewrite the docstring
        else:
            parts.append(" ".join(block.split()))
    return "\n\n".join(parts)


if __name__ == "__main__":
    run_main(main)
