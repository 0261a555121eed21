"""The figures of a report, each as a drawing in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from lightning_dynamics.recording.figures.panels import Panel, draw, runs_of
from lightning_dynamics.recording.figures.standard import Section, Shown
from lightning_dynamics.recording.html.markup import json_block, name, text
from lightning_dynamics.recording.html.svg import inline_svg
from lightning_dynamics.recording.interactive import plotted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LETTERS = 400  # of what a drawing says to those who do not see it


class Drawing:
    """Draws the figures of one page, whose ids are its own.

    Args:
        interactive: Whether panels are drawn by a script as well.
    """

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._numbers = count(1)

    def section(self, section: Section, anchor: str) -> str:
        """A family of keys: its figures, and what else was recorded."""
        more = ""
        if section.more:
            more = (
                '<details class="more"><summary>Everything else that was recorded</summary>\n'
                f"{''.join(self._figure(shown, section.title) for shown in section.more)}</details>\n"
            )
        figures = "".join(self._figure(shown, section.title) for shown in section.figures)
        return f'<section id="{anchor}"><h2>{name(section.title)}</h2>\n{figures}{more}</section>\n'

    def _figure(self, shown: Shown, above: str) -> str:
        title = f"<h3>{name(shown.title)}</h3>" if shown.title != above else ""
        caption = f"<p>{text(shown.caption)}</p>" if shown.caption else ""
        body = self._panels(shown.panels) if shown.panels else self._whole(shown)
        return f"<figure><figcaption>{title}{caption}</figcaption>\n{_legend(runs_of(shown.panels))}{body}</figure>\n"

    def _whole(self, shown: Shown) -> str:
        label = _cut(". ".join(part.rstrip(".") for part in (shown.title, shown.caption) if part))
        return f'<div class="scroll whole" tabindex="0">{self._drawn(shown.draw, shown.title, label)}</div>\n'

    def _panels(self, panels: Sequence[Panel]) -> str:
        return f'<div class="panels">{"".join(map(self._panel, panels))}</div>\n'

    def _panel(self, panel: Panel) -> str:
        still = self._drawn(partial(draw, [panel], with_runs=False), panel.title, _described(panel))
        if not self._interactive:
            return f'<div class="panel">{still}</div>\n'
        return (
            f'<div class="panel plotted"><div class="still">{still}</div><div class="live"></div>'
            f"{json_block(plotted(panel))}</div>\n"
        )

    def _drawn(self, drawing: Callable[[], Figure], title: str, label: str) -> str:
        """An ``svg`` element; where it fails, a line that says so."""
        try:
            return inline_svg(drawing, f"f{next(self._numbers)}-", label)
        except Exception as error:
            return f'<p class="failed">{name(title)} could not be drawn: {name(repr(error))}</p>'


def colours_of(sections: Sequence[Section]) -> Mapping[str, str]:
    """What the runs are drawn in, by name."""
    shown = [each for section in sections for each in (*section.figures, *section.more)]
    return {run: colour for each in reversed(shown) for run, colour in runs_of(each.panels).items()}


def _legend(runs: Mapping[str, str]) -> str:
    if not runs:
        return ""
    return f'<p class="legend">{" ".join(f"<span>{name(run, colour)}</span>" for run, colour in runs.items())}</p>\n'


def _described(panel: Panel) -> str:
    return _cut(". ".join(_sentences(panel)))


def _sentences(panel: Panel) -> Iterator[str]:
    axis = "logarithmic " if panel.is_log else ""
    unit = f" in {panel.y_label}" if panel.y_label else ""
    yield f"{panel.title}{unit} over {panel.x_label}, {axis}curves of " + ", ".join(
        dict.fromkeys(f"{curve.label}{f' ({curve.run})' if curve.run else ''}" for curve in panel.curves)
    )
    if panel.levels:
        yield "Levels: " + ", ".join(f"{label} {level:.4g}".strip() for level, label in panel.levels)
    if panel.marks:
        yield "Marked: " + ", ".join(f"{label} at step {step:g}".strip() for step, label, _ in panel.marks)


def _cut(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
