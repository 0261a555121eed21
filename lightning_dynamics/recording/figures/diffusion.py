"""Squared distances over time: the power of time that fits them, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_dynamics.recording.figures.style import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    PURPLE,
    VERMILION,
    house_style,
    is_drawn,
    log_limits,
    number,
    plain,
    plus_minus,
    remark_lines,
)
from lightning_dynamics.recording.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND_LINE = 0.062  # of the height of the left panel
_GUIDES = 0.27  # of this height too, and of its width
_LOCAL = (-0.5, 2.5)  # exponents that are always shown
_LOCAL_LIMITS = (-2.0, 4.0)
_WIDTH = 150  # letters of a remark in a line


@dataclass(frozen=True)
class DiffusionView:
    """How far the weights have come, ready to be drawn.

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
        """Squared distances with their fit and what imitates it, sliding exponent, and squared step length."""
        from matplotlib.figure import Figure

        exponents = [pair for pair in self._pairs("local_lags", "local_exponents") if math.isfinite(pair[1])]
        remarks = remark_lines(self._remarks(), _WIDTH)
        figure = Figure(figsize=(8.4, 3.9), dpi=120)
        grid = figure.add_gridspec(
            1 + bool(exponents),
            2,
            width_ratios=(1.3, 1),
            left=0.08,
            right=0.985,
            bottom=0.135 + 0.035 * len(remarks),
            top=0.91,
            wspace=0.24,
            hspace=0.14,
        )
        distances = figure.add_subplot(grid[:, 0])
        steps = figure.add_subplot(grid[-1, 1])
        panels = [distances, steps]
        if exponents:
            panels.append(figure.add_subplot(grid[0, 1]))
        window = self._window()
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.set_autoscale_on(False)
            axes.set_xscale("log")
            log_limits(axes, "x", [lag for name, *_ in self._curves() for lag in self._array(f"{name}_lags")], 0.02)
            if window is not None:
                axes.axvspan(*window, color=GREY, alpha=0.1, linewidth=0)
        since = "start or reference" if self._has_reference else "the start"
        for axes in panels[:2]:
            axes.set_yscale("log")
            axes.set_xlabel(f"steps t since {since}", fontsize=9)
        self._draw_distances(distances)
        self._draw_steps(steps)
        if exponents:
            panels[2].tick_params("x", labelbottom=False)
            self._draw_exponents(panels[2], exponents)
        title = self.title if self._has_reference else f"{self.title} from the start"
        figure.suptitle(plain(title if step is None else f"{title}, up to step {step}"), fontsize=10, y=0.97)
        for i, line in enumerate(reversed(remarks)):
            figure.text(0.012, 0.015 + 0.035 * i, plain(line), fontsize=7, color=GREY)
        return figure

    def _draw_distances(self, axes: Axes) -> None:
        for name, colour, label in self._curves():
            style = "-" if name == "from_init" else "o-"
            pairs = self._pairs(f"{name}_lags", f"{name}_squares")
            axes.plot(*_drawable(pairs), style, color=colour, linewidth=1.2, markersize=2.5, label=label)
        lags = self._array("diffusion_lags")
        drift, bowl = self._law.get("drift"), self._pairs("diffusion_lags", "ou_squares")
        if drift:
            diffusion, speed = number(drift.get("diffusion")), number(drift.get("drift"))
            label = _null("D t + v² t²", self._scalar("exponent_drift"), drift)
            pairs = [(lag, diffusion * lag + speed * lag * lag) for lag in lags]
            axes.plot(*_drawable(pairs), "--", color=GREEN, linewidth=1.2, label=label)
        if bowl:
            label = _null("Ornstein–Uhlenbeck", self._scalar("exponent_ou"), self._law.get("ou") or {})
            axes.plot(*_drawable(bowl), ":", color=PURPLE, linewidth=1.6, label=label)
        window, exponent, prefactor = self._window(), self._scalar("exponent"), number(self._law.get("prefactor"))
        if window is not None and math.isfinite(exponent) and is_drawn(prefactor):
            fitted = [(lag, 10.0 ** _within(math.log10(prefactor) + exponent * math.log10(lag))) for lag in window]
            label = f"a tᶜ, c = {plus_minus(exponent, self.record.errors.get(f'{self._family}/exponent'))}"
            axes.plot(*_drawable(fitted), color=VERMILION, linewidth=1.8, label=label)
        above = max(_GUIDES, _LEGEND_LINE * (len(axes.get_legend_handles_labels()[0]) + 0.5))
        measured = [square for name, *_ in self._curves() for square in self._array(f"{name}_squares")]
        log_limits(axes, "y", measured, 0.04, above)
        _draw_guides(axes, _GUIDES)
        axes.set_ylabel("squared distance ‖Δₜ‖² [θ²]", fontsize=9)
        axes.legend(loc="upper left", fontsize=7.5, frameon=False, borderaxespad=0.2, labelspacing=0.25)

    def _draw_exponents(self, axes: Axes, exponents: Sequence[tuple[float, float]]) -> None:
        for level in (0, 1, 2):
            axes.axhline(level, color=PALE, linewidth=0.8)
        lags, values = zip(*exponents, strict=True)
        axes.plot(lags, values, color=BLUE, linewidth=1.2)
        window, exponent = self._window(), self._scalar("exponent")
        if window is not None and math.isfinite(exponent):
            ends = [number(end) for end in self._law.get("interval") or ()]
            if len(ends) == 2 and all(map(math.isfinite, ends)):
                label = "its 95 % interval"
                axes.fill_between(window, ends[0], ends[1], color=VERMILION, alpha=0.18, linewidth=0, label=label)
            axes.plot(window, [exponent, exponent], color=VERMILION, linewidth=1.8, label="c")
            # beside the title: within, it would hide what it explains
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1, 1),
                fontsize=7.5,
                frameon=False,
                ncols=2,
                borderaxespad=0,
                reverse=True,
            )
        low, high = min(*_LOCAL, *values), max(*_LOCAL, *values)
        axes.set_ylim(max(low, _LOCAL_LIMITS[0]), min(high, _LOCAL_LIMITS[1]))
        axes.set_yticks([0, 1, 2])
        axes.set_ylabel("local exponent", fontsize=9)

    def _draw_steps(self, axes: Axes) -> None:
        for name, colour, _ in self._curves():
            axes.plot(*_drawable(self._pairs(f"{name}_lags", f"{name}_steps")), color=colour, linewidth=1.2)
        log_limits(axes, "y", [step for name, *_ in self._curves() for step in self._array(f"{name}_steps")], 0.06)
        axes.set_ylabel("squared step [θ²]", fontsize=9)

    def _curves(self) -> list[tuple[str, str, str]]:
        """What was measured: name of the arrays, colour and label."""
        curves = [("from_init", GREY, "from the start")]
        if self._has_reference:
            where = (self.record.notes.get("reference") or {}).get("step")
            curves.append(("diffusion", BLUE, "from the reference" + ("" if where is None else f", step {where}")))
        return curves

    def _remarks(self) -> list[str]:
        notes = self.record.notes
        remarks = [*notes.get("remarks", ()), *self._law.get("remarks", ())]
        if not self._has_reference:
            return [*remarks, "no exponent: there is no reference yet"]
        return [*remarks, f"no exponent: {notes['no_exponent']}"] if "no_exponent" in notes else remarks

    @property
    def _has_reference(self) -> bool:
        return bool(self._array("diffusion_lags"))

    @property
    def _family(self) -> str:
        return self.key.rpartition("/")[0]

    @property
    def _law(self) -> dict[str, Any]:
        return self.record.notes.get("exponent") or {}

    def _window(self) -> tuple[float, float] | None:
        ends = [number(end) for end in self._law.get("window") or ()]
        return (ends[0], ends[1]) if len(ends) == 2 and ends[0] < ends[1] and all(map(is_drawn, ends)) else None

    def _pairs(self, lags: str, values: str) -> list[tuple[float, float]]:
        """Positive lags with their values."""
        return [pair for pair in zip(self._array(lags), self._array(values), strict=False) if is_drawn(pair[0])]

    def _array(self, name: str) -> list[float]:
        return self.record.arrays.get(f"{self._family}/{name}", [])

    def _scalar(self, name: str) -> float:
        return self.record.scalars.get(f"{self._family}/{name}", math.nan)


def _null(name: str, exponent: float, found: dict[str, Any]) -> str:
    """Label of a curve that imitates a power law."""
    value = f", c = {round(exponent, 2) + 0:.2f}" if math.isfinite(exponent) else ""
    return name + value + (" (excluded)" if found.get("excluded") else "")


def _drawable(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """What logarithmic axes can show, with gaps."""
    return [x for x, _ in pairs], [y if is_drawn(y) else math.nan for _, y in pairs]


def _within(power: float) -> float:
    """A power of ten that a float can hold."""
    return min(max(power, -300.0), 300.0)


def _draw_guides(axes: Axes, size: float) -> None:
    """Short lines of slope 1 and 2 in the upper right corner, where nothing is."""
    (left, right), (low, high) = (tuple(map(math.log10, ends)) for ends in (axes.get_xlim(), axes.get_ylim()))
    width, height = right - left, high - low
    length = min(0.5 * size * width, 0.35 * size * height)
    x, y = right - 0.06 * width - length, high - 0.8 * size * height
    for slope, name, down in ((1, "t", 5), (2, "t²", 0)):
        end = 10 ** (x + length), 10 ** (y + slope * length)
        axes.plot([10**x, end[0]], [10**y, end[1]], color=GREY, linewidth=0.8)
        axes.annotate(name, end, (3, -down), textcoords="offset points", fontsize=7, color=GREY)
