"""How ρ may change over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

Rho = Callable[[int, float], float]
"""ρ as a function of the global step and of the learning rate of the optimizer's first parameter group."""


@dataclass(frozen=True)
class RhoByLearningRate:
    """ρ that follows the learning rate linearly: from (lr_min, rho_min) to (lr_max, rho_max).

    The schedule that GSAM (arXiv 2203.08065) is used with.

    Attributes:
        rho_max: ρ at the highest learning rate.
        lr_max: The highest learning rate.
        rho_min: ρ at the lowest.
        lr_min: The lowest.
    """

    rho_max: float
    lr_max: float
    rho_min: float = 0.0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rho_min <= self.rho_max < math.inf or not 0 <= self.lr_min < self.lr_max < math.inf:
            raise MisconfigurationException(f"Needs 0 ≤ rho_min ≤ rho_max and 0 ≤ lr_min < lr_max, got {self}.")

    def __call__(self, step: int, lr: float) -> float:
        """ρ at a learning rate; outside of the range that of its nearer end."""
        share = (min(max(lr, self.lr_min), self.lr_max) - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + share * (self.rho_max - self.rho_min)
