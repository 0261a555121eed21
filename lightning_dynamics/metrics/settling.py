"""Whether a noisy series has settled: the training loss, whose descent must be over before dynamics are limiting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST = 256  # means that are kept; with one more, neighbours are joined
_LEAST = 200  # values without which nothing is said
_SETTLED = 0.01  # of the whole descent, between the last two quarters
_UNREAD = 256


@dataclass(frozen=True)
class Trend:
    """How a series goes on.

    Attributes:
        level: Its mean over the last quarter.
        change: That minus the mean over the quarter before.
        error: Standard error of the change, from the scatter of eight means in each quarter.
        descent: How far it has come down: its mean over the first 64th minus the level.
        settled: Whether it fell by less than 1 % of the descent between these quarters, one error included; not where
            there was no descent.
    """

    level: float
    change: float
    error: float
    descent: float
    settled: bool


class Settling:
    """Means of a long series over 128 to 256 stretches of equal length."""

    def __init__(self) -> None:
        self.stretch = 1
        self.count = 0
        self._means: list[float] = []
        self._open = 0.0
        self._waiting: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Add a value: a tensor of one number, which is not read at once. Values that are not finite do not count."""
        self._waiting.append(value.detach().reshape(()).clone())
        if len(self._waiting) >= _UNREAD:
            self._settle()

    def trend(self) -> Trend | None:
        """How the series goes on; None where it is too short."""
        self._settle()
        means = torch.tensor(self._means, dtype=torch.float64)
        if self.count < _LEAST:
            return None
        quarter = len(means) // 4
        before, last = means[-2 * quarter : -quarter], means[-quarter:]
        change = float(last.mean() - before.mean())
        variance = sum(float(part.var()) / 8 for part in map(_eighths, (before, last)))
        error = math.sqrt(variance)
        level = float(last.mean())
        descent = float(means[: max(1, len(means) // 64)].mean()) - level
        return Trend(level, change, error, descent, descent > 0 and error - change < _SETTLED * descent)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"stretch": self.stretch, "count": self.count, "means": list(self._means), "open": self._open}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stretch, self.count = state["stretch"], state["count"]
        self._means, self._open, self._waiting = list(state["means"]), state["open"], []

    def _settle(self) -> None:
        if not self._waiting:
            return
        values = [float(value) for value in self._waiting]
        self._waiting.clear()
        for value in values:
            if not math.isfinite(value):  # a skipped step
                continue
            self._open += value
            self.count += 1
            if self.count % self.stretch:
                continue
            self._means.append(self._open / self.stretch)
            self._open = 0.0
            if len(self._means) >= _MOST:
                pairs = zip(self._means[::2], self._means[1::2], strict=True)
                self._means = [(one + other) / 2 for one, other in pairs]
                self.stretch *= 2


def _eighths(values: Tensor) -> Tensor:
    return torch.stack([part.mean() for part in torch.tensor_split(values, 8)])
