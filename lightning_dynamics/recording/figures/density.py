"""The density of a spectrum: a figure, and the histogram that goes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dynamics.recording.figures.style import BLUE, VERMILION, house_style, log_limits, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 64
_GRID = 400


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

    @house_style
    def figure(self, step: int | None = None) -> Figure:
        """Number of eigenvalues per unit of λ on a logarithmic axis, certified ones marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 3.4), dpi=120, layout="constrained")
        self.draw(figure.add_subplot(), *self.extent)
        axes = figure.axes[0]
        axes.set_xlabel(plain(f"eigenvalue λ [{self.unit}]"))
        axes.set_ylabel("eigenvalues per unit of λ")
        axes.set_title(plain(self.title if step is None else f"{self.title}, step {step}"), fontsize=10)
        return figure

    @property
    def extent(self) -> tuple[float, float]:
        """Ends of an axis that shows the spectrum, and the threshold where it is not far beyond."""
        low, high = float(self.nodes[0]), float(self.nodes[-1])
        near = self.threshold is not None and self.threshold <= 3 * abs(high)
        right = max(high, self.threshold) if near and self.threshold is not None else high
        margin = max(right - low, 1e-12) / 24
        return low - margin, right + margin

    def draw(self, axes: Axes, left: float, right: float, most: float | None = None) -> None:
        """Draw it into axes that go from ``left`` to ``right``, and up to ``most`` eigenvalues per unit of λ."""
        grid = torch.linspace(left, right, _GRID, dtype=torch.float64)
        counts = self.counts(grid)
        highest = float(counts.max()) if most is None else most
        floor = max(highest, 1e-12) * 1e-7
        curve = counts.clamp(min=floor).tolist()
        axes.fill_between(grid.tolist(), floor, curve, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(grid.tolist(), curve, color=BLUE, linewidth=1.5)
        axes.plot(
            self.certain, [0.02] * len(self.certain), "|", color=BLUE, ms=10, transform=axes.get_xaxis_transform()
        )
        if self.threshold is not None and left < self.threshold <= right:
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
        log_limits(axes, "y", [floor, highest], 0, 0.04)
        axes.set_xlim(left, right)
        axes.spines[["top", "right"]].set_visible(False)

    def counts(self, grid: Tensor) -> Tensor:
        """Eigenvalues per unit of λ at evenly spaced places, shape as ``grid``, float64; no peak falls between them."""
        return self.size * self._smoothed(grid, float(grid[-1] - grid[0]) / 120)

    def in_bins(self, edges: Tensor) -> Tensor:
        """Number of eigenvalues in evenly spaced bins that cover the spectrum: together all of them.

        Args:
            edges: Their edges, one more, ascending, float64.
        """
        width = float(edges[1] - edges[0])
        nodes, weights, widths = self._peaks(width / 2)
        # nothing beyond the outermost nodes
        ends = torch.tensor([float(nodes[0]) - width / 2, float(nodes[-1]) + width / 2], dtype=torch.float64)
        inside = torch.special.ndtr((edges.clamp(ends[0], ends[1])[:, None] - nodes) / widths)
        whole = torch.special.ndtr((ends[:, None] - nodes) / widths)
        shares = (inside[1:] - inside[:-1]) / (whole[1] - whole[0])
        counts: Tensor = self.size * (shares * weights).sum(dim=1)
        return counts

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
