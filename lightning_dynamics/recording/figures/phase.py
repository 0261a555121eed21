"""Trajectories in the planes of position and velocity along eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dynamics.recording.figures.style import (
    BLUE,
    GREY,
    PALE,
    VERMILION,
    house_style,
    number,
    plain,
    plus_minus,
    power_of_ten,
    remark_lines,
    time_colours,
)
from lightning_dynamics.recording.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

_OF_AN_END = 3  # planes: at most six
_REACH = 2.5  # how far a plane goes for an ellipse, in extents of the trajectory
_COLOURS = 64  # of a trajectory, or a few more
_LARGEST = 1e100  # whose square is finite
# inches: a plane, and what stands around it
_PLANE = (2.45, 2.2)
_LEFT, _RIGHT, _ABOVE, _BELOW, _SAID = 0.7, 0.15, 0.6, 0.5, 0.42
_LETTERS = 48  # of a remark beside a plane's width


@dataclass(frozen=True)
class PhaseView:
    """Positions and velocities along eigenvectors, ready to be drawn.

    Attributes:
        key: Full key of the quantity; its first part is that of the arrays' names.
        record: The measurement.
        title: What is shown.
    """

    key: str
    record: Record
    title: str

    def histogram(self) -> None:
        """There is none."""

    @house_style
    def figure(self, step: int | None = None) -> Figure:
        """One plane for each of at most six modes: the trajectory coloured by time, measured and predicted width."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        modes = self._modes()
        rows = 1 if len(modes) < 3 else 2
        columns = max(1, -(-len(modes) // rows))
        remarks = remark_lines(self._remarks(), _LETTERS * columns + 20)
        below = _BELOW + _SAID * any(self._facts(mode) for mode in modes)
        wide, high = _LEFT + _PLANE[0] + _RIGHT, _ABOVE + _PLANE[1] + below
        foot = 0.3 + 0.14 * len(remarks)
        width, height = columns * wide + 0.9, rows * high + foot + 0.3
        norm = Normalize(1 - max([2, *(len(self._path(mode)) for mode in modes)]), 0)
        colours = time_colours()
        figure = Figure(figsize=(width, height), dpi=120)
        for i, mode in enumerate(modes):
            left, bottom = _LEFT + i % columns * wide, foot + (rows - 1 - i // columns) * high + below
            place = (left / width, bottom / height, _PLANE[0] / width, _PLANE[1] / height)
            self._draw(figure.add_axes(place), mode, norm, colours)
        tall = rows * high - _ABOVE - below
        scale = figure.add_axes((1 - 0.8 / width, (foot + below) / height, 0.12 / width, tall / height))
        bar = figure.colorbar(ScalarMappable(norm, colours), cax=scale)
        bar.set_label("steps, counted back from the last", fontsize=8)
        scale.tick_params(labelsize=7)
        bar.outline.set_visible(False)
        figure.legend(
            handles=[
                Line2D([], [], color=BLUE, linewidth=1.3, label="one standard deviation, measured"),
                Line2D([], [], color=VERMILION, linewidth=1.3, linestyle="--", label="theory, with Var q as measured"),
            ],
            loc="lower left",
            bbox_to_anchor=(_LEFT / width, (foot - 0.25) / height),
            ncols=2,
            fontsize=7.5,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
        )
        for i, line in enumerate(reversed(remarks)):
            figure.text(_LEFT / width, (0.05 + 0.14 * i) / height, plain(line), fontsize=7, color=GREY)
        figure.suptitle(
            plain(self.title if step is None else f"{self.title}, step {step}"), fontsize=10, y=1 - 0.1 / height
        )
        return figure

    def _draw(self, axes: Axes, mode: str, norm: Normalize, colours: Colormap) -> None:
        from matplotlib.collections import LineCollection
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        path = self._path(mode)
        mean, drift, variance = self._moments(mode, path)
        path = path - torch.tensor([mean, 0.0], dtype=torch.float64)
        axes.set_autoscale_on(False)
        axes.axhline(0, color=PALE, linewidth=0.8)
        axes.axvline(0, color=PALE, linewidth=0.8)
        pieces = range(0, len(path) - 1, max(1, len(path) // _COLOURS))
        ends = [min(start + pieces.step, len(path) - 1) for start in pieces]
        lines = [path[start : end + 1].numpy() for start, end in zip(pieces, ends, strict=True)]
        trajectory = LineCollection(lines, cmap=colours, norm=norm, linewidths=0.7)
        trajectory.set_array([end - len(path) + 1 for end in ends])
        axes.add_collection(trajectory, autolim=False)
        ellipses = []
        for name, colour, style, centre in (
            ("equipartition", BLUE, "-", drift),
            ("equipartition_predicted", VERMILION, "--", 0.0),
        ):
            ellipse = _ellipse(variance, self._scalar(name, mode), _rate(path))
            if ellipse is not None:
                ellipses.append(ellipse + torch.tensor([0.0, centre], dtype=torch.float64))
                axes.plot(*ellipses[-1].T.tolist(), style, color=colour, linewidth=1.3)
        extents = [_extent(path[:, i], [ellipse[:, i] for ellipse in ellipses]) for i in range(2)]
        axes.set_xlim(-extents[0], extents[0])
        axes.set_ylim(-extents[1], extents[1])
        named = ((axes.xaxis, "q - ⟨q⟩", "θ"), (axes.yaxis, "p", "θ per unit of time ηt"))
        for extent, (axis, name, unit) in zip(extents, named, strict=True):
            power = math.floor(math.log10(extent))
            power = 0 if -1 <= power < 3 else power
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(partial(_tick, power)))
            axis.set_label_text(f"{name} [{power_of_ten(power)}{unit}]", fontsize=8)
        # where they are known, nothing has to be measured for them
        axes.xaxis.set_label_coords(0.5, -0.1)
        axes.yaxis.set_label_coords(-0.14, 0.5)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        heading = [
            mode.replace("_", " "),
            self._compared("frequency", "φ", " rad/step", mode),
            self._compared("equipartition", "Var p/Var q", "", mode),
        ]
        axes.set_title(plain("\n".join(heading)), fontsize=7.5, loc="left", y=1.0)
        for i, line in enumerate(remark_lines(self._facts(mode), _LETTERS, 3)):
            axes.annotate(
                plain(line),
                (0, 0),
                (0, -34 - 8 * i),
                xycoords="axes fraction",
                textcoords="offset points",
                va="top",
                fontsize=6.5,
                color=GREY,
            )

    def _modes(self) -> list[str]:
        """Of those in the record the first three from either end of the spectrum."""
        start = f"{self._family}/q_"
        names = [name.removeprefix(start) for name in self.record.arrays if name.startswith(start)]
        return [name for name in names if int(name.rpartition("_")[2]) <= _OF_AN_END]

    def _path(self, mode: str) -> Tensor:
        """Positions and velocities, shape ``(n, 2)``, float64; NaN where there are none."""
        q, p = (self.record.arrays.get(f"{self._family}/{name}_{mode}", []) for name in "qp")
        path = torch.tensor(list(zip(q, p, strict=False)), dtype=torch.float64).view(-1, 2)
        return torch.where(path.abs() < _LARGEST, path, math.nan)

    def _moments(self, mode: str, path: Tensor) -> tuple[float, float, float]:
        """⟨q⟩, ⟨p⟩ and Var q: in the whole window where they are known, in what is shown otherwise."""
        known = [number(value) for value in (self._notes.get("moments") or {}).get(mode) or ()]
        if len(known) == 3 and all(abs(value) < _LARGEST for value in known):
            return known[0], known[1], known[2]
        shown = path[path.isfinite().all(dim=1)]
        if not len(shown):
            return 0.0, 0.0, 0.0
        return float(shown[:, 0].mean()), float(shown[:, 1].mean()), float(shown[:, 0].var(correction=0))

    def _compared(self, name: str, symbol: str, unit: str, mode: str) -> str:
        """A measured number with its error, and what is predicted."""
        value, predicted = self._scalar(name, mode), self._scalar(f"{name}_predicted", mode)
        error = self.record.errors.get(f"{self._family}/{name}_{mode}")
        text = f"{symbol} = {plus_minus(value, error)}{unit}"
        return text if math.isnan(predicted) else f"{text} (theory {plus_minus(predicted)})"

    def _facts(self, mode: str) -> list[str]:
        """Remarks on a mode without what follows from them."""
        return [remark.partition(":")[0] for remark in (self._notes.get("modes") or {}).get(mode, ())]

    def _remarks(self) -> list[str]:
        reason = self._notes.get("no_prediction")
        return [*self._notes.get("remarks", ()), *([f"no prediction: {reason}"] if reason else [])]

    def _scalar(self, name: str, mode: str) -> float:
        return self.record.scalars.get(f"{self._family}/{name}_{mode}", math.nan)

    @property
    def _family(self) -> str:
        return self.key.rpartition("/")[0]

    @property
    def _notes(self) -> dict[str, Any]:
        return self.record.notes.get("phase") or {}


def _tick(power: int, value: float, _: int | None) -> str:
    return f"{value / 10.0**power:.4g}"


def _rate(path: Tensor) -> float:
    """η: p is the change of q over it."""
    rates = path[:, 0].diff() / path[1:, 1]
    rates = rates[rates.isfinite() & (rates > 0)]
    return float(rates.median()) if len(rates) else 0.0


def _ellipse(variance: float, ratio: float, rate: float) -> Tensor | None:
    """One standard deviation of (q, p) with these Var q and Var p/Var q; shape ``(k, 2)``.

    In any stationary motion Cov(q, p) = η·Var p/2, since q has the same variance before a step and after it.
    """
    if not (0 < variance < math.inf and 0 < ratio < math.inf):
        return None
    angle = torch.linspace(0, 2 * math.pi, 121, dtype=torch.float64)
    correlation = min(rate * math.sqrt(ratio) / 2, 1.0)
    q = math.sqrt(variance) * angle.cos()
    p = math.sqrt(variance * ratio) * (correlation * angle.cos() + math.sqrt(1 - correlation**2) * angle.sin())
    return torch.stack([q, p], dim=1)


def _extent(values: Tensor, ellipses: Sequence[Tensor]) -> float:
    """Half the length of an axis."""
    own = float(values[values.isfinite()].abs().max()) if bool(values.isfinite().any()) else 0.0
    others = max([0.0, *(float(ellipse.abs().max()) for ellipse in ellipses)])
    extent = 1.08 * max(own, min(others, _REACH * own))
    return extent if extent > 1e-300 else 1.0
