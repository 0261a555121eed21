"""Text from records as HTML: escaped, and without what no page may hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from lightning_dynamics.recording.html.colours import GRADED, VARIABLES, css_colour

_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_ARXIV = re.compile(r"arXiv[:\s]\s*((?:\d{4}\.\d{4,5}|[a-z-]+/\d{7})(?:v\d+)?)", re.IGNORECASE)
_BETWEEN = re.compile(r"([/_])(?![^<]*>)")  # outside of tags
_DEEPEST = 20
_LONG = 90  # letters of a value that are shown at once


def clean(value: object) -> str:
    """A text without control characters and halves of surrogate pairs."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))


def text(value: object) -> str:
    """A text escaped for content and attributes."""
    return escape(clean(value))


def name(value: object, colour: str | None = None) -> str:
    """A name by itself, so that its direction of writing does not change that of its neighbours.

    Args:
        value: The name.
        colour: Of the swatch before it, if there is one.
    """
    swatch = ""
    if colour is not None:
        css = "swatch" if colour.lower() in VARIABLES else f"swatch {GRADED}"
        swatch = f'<span class="{css}" style="background:{css_colour(clean(colour))}"></span>'
    return f"{swatch}<bdi>{text(value)}</bdi>"


def key_name(key: object) -> str:
    """A key that may be broken between its words."""
    return _BETWEEN.sub(r"\1<wbr>", name(key))


def linked(value: object) -> str:
    """A text in which the numbers of arXiv lead there."""
    parts, end, whole = [], 0, clean(value)
    for match in _ARXIV.finditer(whole):
        parts.append(escape(whole[end : match.start()]))
        parts.append(f'<a href="https://arxiv.org/abs/{match[1]}" rel="noopener noreferrer">{escape(match[0])}</a>')
        end = match.end()
    return "".join(parts) + escape(whole[end:])


def folded(value: str) -> str:
    """A text that is shown at a click where it is long."""
    if len(value) <= _LONG:
        return name(value)
    return f"<details><summary>{name(value[:_LONG])}…</summary>{name(value)}</details>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, css: str = "") -> str:
    """A table in a box of its own; its cells are HTML, the first of each row names it."""
    headings = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for row in rows:
        first, *others = row
        body.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>\n")
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead><tr>{headings}</tr></thead>\n'
        f"<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of what holds; the terms are text, what holds is HTML."""
    return (
        '<dl class="facts">' + "".join(f"<div><dt>{text(term)}</dt><dd>{what}</dd></div>" for term, what in pairs)
    ) + "</dl>\n"


def plain(value: Any, depth: int = 0) -> Any:
    """The same as JSON has it: None for what is not finite, and no deeper than anybody reads."""
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, Mapping):
        return {str(key): plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, depth + 1) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def json_block(value: Any, anchor: str = "") -> str:
    """Data in a page: nothing in it can end the block, or is run.

    Args:
        value: The data.
        anchor: The ``id`` of the block, if it has one.
    """
    content = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    content = content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    own = f' id="{anchor}"' if anchor else ""
    return f'<script type="application/json"{own}>{content}</script>\n'


def said(value: Any) -> str:
    """A value of a header in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)
