"""What is kept of a trajectory: squared displacements at log-spaced lags, and snapshots of a small projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dynamics.metrics.projection import Projection

_PER_DECADE = 20
_SNAPSHOTS_PER_DECADE = 5
_MOST = 256  # evenly spaced snapshots; with one more the spacing doubles


class Trail:
    """The way from a point, in memory that grows with the logarithm of its length.

    Squared displacements are kept at 20 lags per decade, with the mean squared step between them. Snapshots, in a
    random projection of ``dimensions`` numbers, are kept at 128 to 256 evenly spaced lags and at 5 per decade: squared
    distances between them have a relative standard error of √(2/``dimensions``).

    Args:
        dimensions: Of the snapshots; 0 for none.
        seed: Of their projection.
    """

    def __init__(self, dimensions: int = 1024, seed: int = 0) -> None:
        self.dimensions = dimensions
        self.lags: list[int] = []
        self.squares: list[float] = []
        self.steps: list[float] = []
        self.stride = 1
        self.projected_from: int | None = None
        """Numbers that were projected to make a snapshot; None where these are an isometric image of them."""
        self._seed = seed
        self._project = Projection(max(1, -(-(1 << 16) // max(1, dimensions))) * max(1, dimensions), seed)
        self._lengths: list[int] = []
        self._even: dict[int, Tensor] = {}
        self._spaced: dict[int, Tensor] = {}

    def copy(self) -> Trail:
        """The same, to which nothing more is added."""
        other = Trail(self.dimensions, self._seed)
        other.load_state_dict(self.state_dict())
        return other

    def wants_square(self, lag: int) -> bool:
        """Whether the squared displacement at this lag is kept."""
        return lag > 0 and _is_log_spaced(lag, _PER_DECADE)

    def wants_snapshot(self, lag: int) -> bool:
        """Whether a snapshot at this lag is kept."""
        if not self.dimensions:
            return False
        return lag % self.stride == 0 or _is_log_spaced(lag, _SNAPSHOTS_PER_DECADE)

    def add_square(self, lag: int, square: float, mean_squared_step: float) -> None:
        """Keep ‖Δ‖² at a lag, and the mean of ‖δ‖² over the steps since the one before."""
        self.lags.append(lag)
        self.squares.append(square)
        self.steps.append(mean_squared_step)

    def add_snapshot(self, lag: int, weights: Mapping[str, Tensor]) -> None:
        """Keep a snapshot.

        Args:
            lag: Its lag; 0 first.
            weights: Vectors by name. Where their lengths change, snapshots end, and those before are given up.
        """
        lengths = [len(each) for each in weights.values()]
        if lag and lengths != self._lengths:
            # weights that were frozen until now: snapshots of others cannot be compared with those before
            self.dimensions, self._even, self._spaced = 0, {}, {}
            return
        self._lengths = lengths
        small = self._small(weights)
        if _is_log_spaced(lag, _SNAPSHOTS_PER_DECADE):
            self._spaced[lag] = small
        if lag % self.stride == 0:
            self._even[lag] = small
            if len(self._even) > _MOST:
                self.stride *= 2
                self._even = {at: kept for at, kept in self._even.items() if at % self.stride == 0}

    def evenly(self) -> Tensor:
        """Snapshots at lags 0, ``stride``, 2 ``stride``, …, shape ``(n, dimensions)``, float64."""
        return _stacked([self._even[lag] for lag in sorted(self._even)])

    def all(self) -> tuple[Tensor, Tensor]:
        """Lags of all snapshots, shape ``(n,)``, ascending, and the snapshots, shape ``(n, dimensions)``, float64."""
        together = {**self._spaced, **self._even}
        lags = sorted(together)
        return torch.tensor(lags, dtype=torch.int64), _stacked([together[lag] for lag in lags])

    def state_dict(self) -> dict[str, Any]:
        return {
            "dimensions": self.dimensions,
            "lengths": list(self._lengths),
            "lags": list(self.lags),
            "squares": list(self.squares),
            "steps": list(self.steps),
            "stride": self.stride,
            "projected_from": self.projected_from,
            "even": dict(self._even),
            "spaced": dict(self._spaced),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lags, self.squares, self.steps = list(state["lags"]), list(state["squares"]), list(state["steps"])
        self.stride, self.projected_from = state["stride"], state["projected_from"]
        self._even, self._spaced = dict(state["even"]), dict(state["spaced"])
        self.dimensions, self._lengths = state["dimensions"], list(state["lengths"])

    def _small(self, weights: Mapping[str, Tensor]) -> Tensor:
        """All weights together in ``dimensions`` numbers, on the host."""
        if not weights:
            return torch.zeros(self.dimensions)
        device = next(iter(weights.values())).device
        together = torch.cat([each.to(device) for each in weights.values()])
        self.projected_from = together.numel() if together.numel() > self.dimensions else None
        size = self._project.size
        assert size is not None
        if not self._project.reduces(together.numel()):
            # a whole block, so that it is mixed as well
            together = torch.cat((together, together.new_zeros(size + 1 - together.numel())))
        return self._project({"": together})[""].view(-1, self.dimensions).sum(0).cpu()


def _stacked(snapshots: list[Tensor]) -> Tensor:
    return torch.stack(snapshots).double() if snapshots else torch.zeros(0, 0, dtype=torch.float64)


def _is_log_spaced(lag: int, per_decade: int) -> bool:
    if lag <= 0:
        return lag == 0
    nearest = round(per_decade * math.log10(lag))
    return any(lag == round(10 ** (j / per_decade)) for j in range(max(0, nearest - 2), nearest + 3))
