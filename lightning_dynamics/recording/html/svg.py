"""A matplotlib figure as part of a page: small, in the page's fonts and colours, without ids that others have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lightning_dynamics.recording.figures.style import house_style
from lightning_dynamics.recording.html.colours import GRADED, VARIABLES, css_colour
from lightning_dynamics.recording.html.markup import clean, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBER = re.compile(r"-?\d+\.\d+")
_COMMAND = re.compile(r"\s*([A-Za-z])\s*")
_LOCAL = re.compile(r"url\(#([^)]+)\)")
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_SIZE = re.compile(r"^([\d.]+)pt$")
_DROPPED = {"metadata", "style", "title", "script", "foreignObject"}
_DRAWN_IN = {"d", "x", "y", "width", "height", "transform", "points", "cx", "cy", "r", "viewBox", "offset"}
_POINT = 4 / 3  # in pixels of a style sheet


@house_style
def inline_svg(draw: Callable[[], Figure], prefix: str, label: str) -> str:
    """A figure as an ``svg`` element for a page of HTML.

    Args:
        draw: Draws it.
        prefix: What its ids begin with.
        label: What it shows, for those who do not see it.
    """
    import matplotlib

    stream = StringIO()
    with warnings.catch_warnings():
        # the reader's fonts have letters that those of matplotlib lack
        warnings.filterwarnings("ignore", "(?s).*[Gg]lyph", UserWarning)
        warnings.filterwarnings("ignore", "(?s)Matplotlib currently does not support", UserWarning)
        figure = draw()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "lightning_dynamics"
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _written(ElementTree.fromstring(clean(stream.getvalue().replace("\r", " "))), prefix, label)


def _written(root: ElementTree.Element, prefix: str, label: str) -> str:
    referred = {name for element in root.iter() for name in _references(element)}
    used = {hue for element in root.iter() for value in element.attrib.values() for hue in _HEX.findall(value)}
    # what has the colours of a scale, lines or maps, is turned over as a whole
    is_graded = not used <= set(VARIABLES) or any(_local(element.tag) == "image" for element in root.iter())
    body = "".join(_Writer(prefix, referred).written(root))
    width, height = (_pixels(root.get(side, "")) for side in ("width", "height"))
    return (
        f'<svg class="{GRADED if is_graded else "plain"}" viewBox="{_rounded(root.get("viewBox", ""))}" '
        f'width="{width}" height="{height}" fill="currentColor" role="img" aria-label="{text(label)}">'
        f"{body[body.index('>') + 1 :]}"
    )


@dataclass(frozen=True)
class _Writer:
    """Writes elements as HTML has them: without namespaces, groups that say nothing, and ids that nobody refers to."""

    prefix: str
    referred: set[str]

    def written(self, element: ElementTree.Element) -> Iterator[str]:
        tag = _local(element.tag)
        if tag in _DROPPED:
            return
        attributes = "".join(f' {key}="{escape(value)}"' for key, value in self._attributes(element))
        is_bare = tag == "g" and not attributes
        is_text = tag in ("text", "tspan")
        if not is_bare:
            yield f"<{tag}{attributes}>"
        if is_text and element.text and (tag == "tspan" or element.text.strip()):
            yield escape(element.text, quote=False)
        for child in element:
            yield from self.written(child)
            if is_text and child.tail and child.tail.strip():
                yield escape(child.tail, quote=False)
        if not is_bare:
            yield f"</{tag}>"

    def _attributes(self, element: ElementTree.Element) -> Iterator[tuple[str, str]]:
        for full, value in element.attrib.items():
            key = _local(full)
            if key == "id":
                if value in self.referred:
                    yield key, self.prefix + value
            elif key == "href":
                if value.startswith("#"):
                    yield key, f"#{self.prefix}{value[1:]}"
                elif value.startswith("data:image/png;base64,"):
                    yield key, re.sub(r"\s", "", value)
            elif key == "style":
                if rules := self._rules(value):
                    yield key, rules
            elif key == "transform" and value.startswith("rotate(-0 "):
                continue
            elif key in _DRAWN_IN:
                yield key, _COMMAND.sub(r"\1", _rounded(value)) if key == "d" else _rounded(value)
            elif not key.startswith("on"):
                yield key, self._coloured(_LOCAL.sub(rf"url(#{self.prefix}\1)", value))

    def _rules(self, style: str) -> str:
        """The style sheet gives the fonts."""
        pairs = [tuple(part.strip() for part in rule.split(":", 1)) for rule in style.split(";") if ":" in rule]
        kept = [f"{key}:{self._coloured(_rounded(value))}" for key, value in pairs if key != "font-family"]
        return ";".join(_LOCAL.sub(rf"url(#{self.prefix}\1)", rule) for rule in kept)

    @staticmethod
    def _coloured(value: str) -> str:
        return _HEX.sub(lambda match: css_colour(match[0]), value)


def _references(element: ElementTree.Element) -> Iterator[str]:
    for full, value in element.attrib.items():
        if _local(full) == "href" and value.startswith("#"):
            yield value[1:]
        yield from _LOCAL.findall(value)


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _rounded(value: str) -> str:
    return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)


def _pixels(size: str) -> str:
    match = _SIZE.match(size)
    return size if match is None else f"{float(match[1]) * _POINT:.0f}"
