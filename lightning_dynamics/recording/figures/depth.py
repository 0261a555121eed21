"""Quantities of every layer through depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_dynamics.recording.figures.style import GREY, house_style, log_limits, plain, time_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = 24  # through depth, in one figure
_TICKS = 14  # layers that are named
_LETTERS = 16  # of a name


@dataclass(frozen=True)
class DepthLine:
    """One measurement of a quantity through depth.

    Attributes:
        step: x of the measurement.
        epoch: Its epoch.
        values: By name of the panel, one value per layer; NaN where there is none.
    """

    step: int
    epoch: int
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class DepthView:
    """Quantities of every layer through depth, one line for each measurement.

    Attributes:
        key: Full key of the quantity.
        layers: What the layers are called, from the input on.
        panels: What is drawn side by side: pairs of a quantity and of what noise alone makes of it, or None.
        lines: Gives the measurements, oldest first, when the figure is drawn.
        title: What is shown.
    """

    key: str
    layers: Sequence[str]
    panels: Sequence[tuple[str, str | None]]
    lines: Callable[[], Sequence[DepthLine]]
    title: str

    def histogram(self) -> None:
        """There is none."""

    @house_style
    def figure(self, step: int | None = None) -> Figure:
        """One panel for each quantity, logarithmic, lines coloured by time."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        lines = _thinned(self.lines())
        by_epoch = lines[-1].epoch > lines[0].epoch
        times = [float(line.epoch if by_epoch else line.step) for line in lines]
        norm = Normalize(times[0], max(times[-1], times[0] + 1))
        colours = time_colours()
        places, labels = range(len(self.layers)), [plain(name) for name in _short(self.layers)]
        # the last layer is always named
        ticks = range(len(labels) - 1, -1, -(1 + (len(labels) - 1) // _TICKS))
        size = 3 if len(labels) <= _TICKS else 0
        figure = Figure(figsize=(3.6 * len(self.panels) + 0.8, 3.6), dpi=120)
        for i, (name, floor) in enumerate(self.panels):
            axes = figure.add_subplot(1, len(self.panels), i + 1)
            for line, time in zip(lines, times, strict=True):
                values = _positive(line.values[name])
                axes.plot(places, values, "o-", color=colours(norm(time)), linewidth=1.3, markersize=size)
            if floor is not None:
                values = _positive(lines[-1].values[floor])
                axes.plot(places, values, ":", color=GREY, linewidth=1.5, label="noise alone, last line")
                axes.legend(fontsize=7, frameon=False)
            axes.set_yscale("log")
            drawn = [value for line in lines for value in line.values[name]]
            log_limits(axes, "y", [*drawn, *(lines[-1].values[floor] if floor is not None else ())], 0.05)
            axes.set_ylabel(plain(name.upper()))
            axes.set_xticks(list(ticks), [labels[tick] for tick in ticks], fontsize=7)
            if len(labels) > 3:
                axes.tick_params("x", rotation=60)
                for text in axes.get_xticklabels():
                    text.set(ha="right", rotation_mode="anchor")
            axes.set_xlabel("layer, from the input to the classifier")
            axes.spines[["top", "right"]].set_visible(False)
        # by hand: an automatic layout draws everything three times
        width = figure.get_figwidth()
        bottom = 0.17 + 0.012 * max(map(len, labels)) * (len(labels) > 3)
        figure.subplots_adjust(left=0.75 / width, right=1 - 1.05 / width, bottom=bottom, top=0.9, wspace=0.32)
        place = figure.add_axes((1 - 0.8 / width, bottom, 0.12 / width, 0.9 - bottom))
        bar = figure.colorbar(ScalarMappable(norm, colours), cax=place, label="epoch" if by_epoch else "step")
        bar.outline.set_visible(False)
        figure.suptitle(plain(self.title if step is None else f"{self.title}, up to step {step}"), fontsize=10)
        return figure


def _short(names: Sequence[str]) -> list[str]:
    """Where there are long ones: names without what all but the last begin with, cut off."""
    if max(map(len, names)) <= _LETTERS:
        return list(names)
    parts = [name.split("_") for name in names[:-1]]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    short = ["_".join(p[common:]) for p in parts] + list(names[-1:])
    return [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…" for name in short]


def _thinned(lines: Sequence[DepthLine]) -> Sequence[DepthLine]:
    """At most 24 of them, the first and the last included, spread over time."""
    if len(lines) <= _LINES:
        return lines
    first, last = lines[0].step, lines[-1].step
    wanted = [first + (last - first) * i / (_LINES - 1) for i in range(_LINES)]
    chosen = {min(range(len(lines)), key=lambda i: abs(lines[i].step - place)) for place in wanted}
    return [lines[i] for i in sorted(chosen)]


def _positive(values: Sequence[float]) -> list[float]:
    """What a logarithmic axis can show."""
    return [value if value > 0 else math.nan for value in values]
