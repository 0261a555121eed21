"""Figures in one house style, and the histograms that go with them. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers, and in print
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"
PALE = "#bbbbbb"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DIGITS = 6  # behind the point
_BINS = 64
_GRID = 400
_LINES = 24  # through depth, in one figure
_TICKS = 14  # layers that are named
_LETTERS = 16  # of a name


class View(Protocol):
    """Something that is drawn, under the full key of a quantity."""

    @property
    def key(self) -> str: ...

    def histogram(self) -> tuple[Tensor, Tensor] | None:
        """Values of bins and their edges, one more; None for what has no histogram."""

    def figure(self, step: int | None = None) -> Figure:
        """The figure, at x = ``step``."""


@dataclass(frozen=True)
class DensityView:
    """A spectral density, ready to be drawn.

    Attributes:
        key: Full key of the quantity.
        nodes: Quadrature nodes and certified eigenvalues, shape ``(m,)``, ascending.
        weights: Their shares of the spectrum, which sum to 1.
        size: Number of eigenvalues.
        certain: The certified eigenvalues among the nodes.
        num_vectors: Number of quadratures that the other nodes come from.
        threshold: The edge of stability, None where there is none.
        title: What it is the spectrum of.
        unit: Unit of the eigenvalues.
    """

    key: str
    nodes: Sequence[float]
    weights: Sequence[float]
    size: int
    certain: Sequence[float]
    num_vectors: int
    threshold: float | None
    title: str
    unit: str

    def histogram(self) -> tuple[Tensor, Tensor]:
        """log₁₀(1 + number of eigenvalues) in 64 bins between the outermost nodes, and the bins' 65 edges.

        Of a spectrum with nearly all of its values in one place nothing else would be seen but that place.
        """
        low, high = float(self.nodes[0]), float(self.nodes[-1])
        if not high > low:
            low, high = low - 0.5, high + 0.5
        edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
        nodes, weights, widths = self._peaks(float(edges[1] - edges[0]))
        # what a peak would lose beyond the ends stays within
        reach = torch.special.ndtr((edges[:, None] - nodes[None, :]) / widths)
        shares = (reach[1:] - reach[:-1]) / (reach[-1] - reach[0])
        return torch.log10(1 + self.size * (shares * weights).sum(dim=1)), edges

    def figure(self, step: int | None = None) -> Figure:
        """Number of eigenvalues per unit of λ on a logarithmic axis, certified ones marked."""
        from matplotlib.figure import Figure

        low, high = float(self.nodes[0]), float(self.nodes[-1])
        right = high if self.threshold is None or self.threshold > 3 * abs(high) else max(high, self.threshold)
        narrowest = max(high - low, 1e-12) / 120
        margin = 5 * narrowest
        grid = torch.linspace(low - margin, right + margin, _GRID, dtype=torch.float64)
        counts = self.size * self._smoothed(grid, narrowest)
        figure = Figure(figsize=(5.6, 3.4), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        floor = max(float(counts.max()), 1e-12) * 1e-7
        axes.fill_between(grid.tolist(), floor, counts.clamp(min=floor).tolist(), color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(grid.tolist(), counts.clamp(min=floor).tolist(), color=BLUE, linewidth=1.5)
        axes.plot(
            self.certain, [0.02] * len(self.certain), "|", color=BLUE, ms=10, transform=axes.get_xaxis_transform()
        )
        if self.threshold is not None and low < self.threshold <= right:
            axes.axvline(self.threshold, color=VERMILION, linestyle="--", linewidth=1.5)
            axes.annotate(
                "edge of stability",
                (self.threshold, 0.97),
                (-4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                color=VERMILION,
                fontsize=8,
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        axes.set_xlabel(f"eigenvalue λ [{self.unit}]")
        axes.set_ylabel("eigenvalues per unit of λ")
        axes.set_title(self.title if step is None else f"{self.title}, step {step}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def _smoothed(self, grid: Tensor, narrowest: float) -> Tensor:
        """The density at ``grid``."""
        nodes, weights, widths = self._peaks(narrowest)
        distances = (grid[:, None] - nodes[None, :]) / widths
        return (weights * torch.exp(-(distances**2) / 2) / (widths * math.sqrt(2 * math.pi))).sum(dim=1)

    def _peaks(self, narrowest: float) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes, weights, and the standard deviations of the Gaussian peaks that they are drawn as.

        Certified eigenvalues are as narrow as allowed. A node of a quadrature stands for the spectrum half way to its
        neighbours in the same quadrature; as many nodes of the others lie between them as there are others.
        """
        nodes, weights = (torch.tensor(list(v), dtype=torch.float64) for v in (self.nodes, self.weights))
        certain = torch.tensor(list(self.certain), dtype=torch.float64)
        widths = torch.full_like(nodes, narrowest)
        unsure = (~torch.isin(nodes, certain)).nonzero().flatten()
        if len(unsure):
            place = torch.arange(len(unsure))
            left, right = (place - self.num_vectors).clamp(min=0), (place + self.num_vectors).clamp(max=len(unsure) - 1)
            span, count = nodes[unsure[right]] - nodes[unsure[left]], right - left
            widths[unsure] = (span * self.num_vectors / (2 * count.clamp(min=1))).clamp(min=narrowest)
        return nodes, weights, widths


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
        places, labels = range(len(self.layers)), _short(self.layers)
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
            axes.minorticks_off()
            axes.set_ylabel(name.upper())
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
        figure.suptitle(self.title if step is None else f"{self.title}, up to step {step}", fontsize=10)
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


def time_colours() -> ListedColormap:
    """Viridis, later darker, without its end, which is too pale for white paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis_r"](torch.linspace(0.08, 1, 256).numpy()))


def number(value: Any) -> float:
    """A number out of a record's notes, where one that is not finite is None."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def plus_minus(value: float, error: float | None = None) -> str:
    """A value with its standard error, as many digits as the error allows; three where there is none."""
    if not math.isfinite(value):
        return "?"
    if error is None or not 0 < error < math.inf:
        return _scaled(value, 2 - _power(value))
    return _scaled(value, 1 - _power(error), error)


def _power(value: float) -> int:
    """Of ten."""
    return max(math.floor(math.log10(abs(value))), -300) if value else 0


def _scaled(value: float, digits: int, error: float | None = None) -> str:
    """Rounded to ``digits`` behind the point; very large or small numbers as multiples of a power of ten."""
    if not value and error is None:
        return "0"
    power = _power(max(abs(value), error or 0.0))
    power = 0 if -3 <= power < 4 else power
    shown = min(max(0, digits + power), _DIGITS)
    text = " ± ".join(f"{each / 10.0**power:.{shown}f}" for each in (value, error) if each is not None)
    if not power:
        return text
    return f"{text if error is None else f'({text})'} · {power_of_ten(power).strip()}"


def power_of_ten(power: int) -> str:
    """The factor 10ⁿ with a space behind it, nothing for n = 0."""
    return f"10{str(power).translate(_RAISED)} " if power else ""


def remark_lines(remarks: Sequence[str], width: int, most: int = 2) -> list[str]:
    """Remarks in lines of at most ``width`` letters; what does not fit is cut off."""
    return textwrap.wrap("; ".join(remarks), width, max_lines=most, placeholder=" …")


def rendered(figure: Figure) -> Tensor:
    """A figure's pixels, shape ``(height, width, 3)``, uint8; no state of matplotlib's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(height, width, 4)[:, :, :3].clone()
