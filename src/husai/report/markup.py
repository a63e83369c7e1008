"""Parts of an HTML page: a summary from Markdown, a figure as a data URI, an interval as a line."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from itertools import pairwise
from math import floor, log10
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"
HEADINGS = 2
"""Number of levels by which headings of a summary are lowered on the page. The title is left out."""
COLOURS = 96
"""Number of colours of a figure. Lines and text need no more, and the page stays small."""


def environment() -> Environment:
    """The templates of the pages."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["flags"] = flags
    return templates


def html(markdown: str) -> Markup:
    """A summary as HTML. Raw HTML is escaped. Links and images stay text, because they could lead out of the page.

    Cells of a table carry the name of their column, which narrow screens show instead of the header.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    tokens = parser.parse(markdown)
    if tokens and tokens[0].tag == "h1":
        del tokens[:3]  # open, text, close
    _label_cells(tokens)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + HEADINGS)}"
    text = parser.renderer.render(tokens, parser.options, {})
    return Markup(re.sub(r"(?<=\d) (\[[^\[\]<>]*\d\])", r' <span class="interval">\1</span>', text))


WIDE = 7
"""Number of columns from which a table needs a wide screen."""


def _label_cells(tokens: list[Token]) -> None:
    """Name the column of each cell, and mark wide tables."""
    table: Token | None = None
    names: list[str] = []
    column = 0
    for token, following in pairwise([*tokens, Token("", "", 0)]):
        if token.type == "table_open":
            table, names = token, []
        elif token.type == "th_open":
            names.append(following.content.replace("`", ""))
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open":
            token.attrSet("data-label", names[column] if column < len(names) else "")
            column += 1
        elif token.type == "thead_close" and table is not None:
            table.attrSet("class", "wide" if len(names) >= WIDE else "narrow")


def flags(command: str) -> list[str]:
    """Pieces of a command line: the program, then each flag with its values. Joined by spaces they give the line."""
    return re.split(r" (?=--?[a-zA-Z])", command)


def title(markdown: str) -> str | None:
    """The first heading of a summary."""
    match = re.search(r"^# (.+)$", markdown, re.M)
    return match[1] if match else None


def outcome(markdown: str) -> str | None:
    """The first bold words of a summary before its first table; None without them."""
    match = re.search(r"\*\*(.+?)\*\*", markdown.partition("\n|")[0], re.S)
    return " ".join(match[1].split()) if match else None


@dataclass(frozen=True)
class Picture:
    """A figure, ready for `<img>`."""

    uri: str
    width: int
    height: int


def few_colours(image: Image.Image) -> bytes:
    """A small PNG of an image."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def picture(path: Path) -> Picture | None:
    """A PNG as a data URI with few colours; None if the file is no intact image."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            small = data if image.mode == "P" else few_colours(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Picture(f"data:image/png;base64,{base64.b64encode(small).decode()}", *image.size)


def number(x: float, sign: bool = False) -> str:
    """A number with four decimals and a typographic minus."""
    return f"{x:{'+' if sign else ''}.4f}".replace("-", "−")


def interval(estimate: float | None, low: float | None, high: float | None, sign: bool = True) -> str:
    """`+0.2191 [+0.2124, +0.2259]`."""
    if estimate is None:
        return "no figure"
    ends = "" if low is None or high is None else f" [{number(low, sign)}, {number(high, sign)}]"
    return number(estimate, sign) + ends


@dataclass(frozen=True)
class Scale:
    """Linear map from numbers to per cent of a strip's width."""

    low: float
    high: float

    @classmethod
    def over(cls, values: list[float]) -> Scale:
        """A scale slightly wider than the values."""
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or 1.0
        return cls(low - room, high + room)

    def at(self, x: float) -> float:
        return round(100 * (x - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Two to five round numbers, (place, label) each."""
        span = self.high - self.low
        power = 10.0 ** floor(log10(span))
        step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (s * power) < 5)
        first, last = floor(self.low / step) + 1, floor(self.high / step)
        return [(self.at(i * step), f"{i * step:.10g}".replace("-", "−")) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Strip:
    """An estimate and its interval on a scale, in per cent of the width."""

    estimate: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, scale: Scale, estimate: float, low: float | None, high: float | None) -> Strip:
        return cls(scale.at(estimate), *(None if x is None else scale.at(x) for x in (low, high)))
