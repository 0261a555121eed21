"""One house style: colours, numbers as text, pixels. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
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


def rendered(figure: Figure) -> Tensor:
    """A figure's pixels, shape ``(height, width, 3)``, uint8; no state of matplotlib's is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(height, width, 4)[:, :, :3].clone()
