"""One house style: colours, numbers as text, pixels. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers, and in print
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"
PALE = "#bbbbbb"
ORANGE, SKY = "#e69f00", "#56b4e9"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DIGITS = 6  # behind the point
_LARGEST = 1e100  # that a logarithmic axis shows; its reciprocal is the smallest
_TICKS = 7

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def house_style(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Draw in the house style, whatever style the process has chosen for its own figures."""

    @wraps(draw)
    def in_style(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            import matplotlib
        except ImportError as error:
            message = 'Figures need matplotlib: pip install "lightning-dynamics[figures]".'
            raise ImportError(message) from error
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **kwargs)

    return in_style


def plain(text: str) -> str:
    """A text for a figure in which no ``$`` begins a formula, and that any font can take: names may hold anything."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


class View(Protocol):
    """Something that is drawn, under the full key of a quantity."""

    @property
    def key(self) -> str: ...

    def histogram(self) -> tuple[Tensor, Tensor] | None:
        """Values of bins and their edges, one more; None for what has no histogram."""

    def figure(self, step: int | None = None) -> Figure:
        """The figure, at x = ``step``."""


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


def is_drawn(value: float) -> bool:
    """Whether a logarithmic axis can show it."""
    return 1 / _LARGEST < value < _LARGEST


def log_limits(axes: Axes, which: Literal["x", "y"], values: Sequence[float], margin: float, above: float = 0) -> None:
    """Ends and ticks of a logarithmic axis that shows the values, with room on both sides as shares of its length."""
    logs = [math.log10(value) for value in values if is_drawn(value)] or [0.0]
    low, high = min(logs), max(logs)
    if high - low < 0.5:
        low, high = low - 0.25, high + 0.25
    length = (high - low) / (1 - 2 * margin - above)
    low, high = low - margin * length, high + (margin + above) * length
    decades = range(math.ceil(low), math.floor(high) + 1)
    powers = list(decades[:: len(decades) // (_TICKS + 1) + 1])
    names = [power_of_ten(power).strip() or "10⁰" for power in powers]
    if len(powers) > 2:
        ticks = [10.0**power for power in powers]
    else:
        spread = [(m, power) for power in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
        shown = [(m, power) for m, power in spread if low <= math.log10(m) + power <= high]
        ticks = [m * 10.0**power for m, power in shown]
        names = [
            f"{m * 10.0**power:g}" if -3 < power < 3 else f"{m}·{power_of_ten(power).strip()}" for m, power in shown
        ]
        if len(ticks) < 3:  # less than a decade, between the fives
            ticks = _even_ticks(10.0**low, 10.0**high)
            names = _tick_names(ticks)
    _set_axis(axes, which, (10.0**low, 10.0**high), ticks, names)


def linear_limits(axes: Axes, which: Literal["x", "y"], values: Sequence[float], margin: float) -> None:
    """Ends and ticks of a linear axis that shows the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - (0.05 * abs(low) or 0.5), high + (0.05 * abs(high) or 0.5)
    length = high - low
    low, high = low - margin * length, high + margin * length
    ticks = _even_ticks(low, high)
    _set_axis(axes, which, (low, high), ticks, _tick_names(ticks))


def _even_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _tick_names(ticks: Sequence[float]) -> list[str]:
    """As many digits as tell them apart; thousands as k, millions as M, what is larger or smaller by powers of ten."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    spacing = min((abs(b - a) for a, b in pairwise(ticks)), default=largest)
    power = _power(largest)
    factor, unit = 1.0, ""
    if 4 <= power < 6:
        factor, unit = 1e3, "k"
    elif 6 <= power < 9:
        factor, unit = 1e6, "M"
    elif not -3 <= power < 4:
        factor, unit = 10.0**power, f"·{power_of_ten(power).strip()}"
    digits = max(0, min(_DIGITS, -math.floor(math.log10(spacing / factor * 1.0001)))) if spacing else 0
    if spacing and any(abs(round(t / factor, digits) - t / factor) > 1e-3 * spacing / factor for t in ticks):
        digits += 1  # steps of 2.5
    names = [f"{tick / factor + 0.0:.{digits}f}{unit if tick else ''}" for tick in ticks]
    if len(set(names)) < len(names) and len(ticks) > 1:  # nearly the same numbers: how far they are from the first
        return [f"{ticks[0]:.6g}", *(f"+{name}" for name in _tick_names([tick - ticks[0] for tick in ticks[1:]]))]
    return names


def _set_axis(
    axes: Axes, which: Literal["x", "y"], limits: tuple[float, float], ticks: Sequence[float], names: Sequence[str]
) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, names)
    axis.set_ticks([], minor=True)
    (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)


@house_style
def rendered(figure: Figure) -> Tensor:
    """A figure's pixels, shape ``(height, width, 3)``, uint8; no state of matplotlib's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(height, width, 4)[:, :, :3].clone()
