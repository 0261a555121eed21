"""When to measure: a pure function of the step, never of time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

_PER_DECADE = 10  # points per factor of ten in a log-spaced schedule


@dataclass(frozen=True)
class Cadence:
    """A schedule of steps.

    Attributes:
        every_n_train_steps: Every that many steps, from step 0 on.
        every_n_epochs: At the first step of every that many epochs, from epoch 0 on.
        log_spaced: Ten points per decade from step 0 on; with ``every_n_train_steps`` only until the spacing has grown
            to that, then evenly.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    log_spaced: bool = False

    def __post_init__(self) -> None:
        check_flag("log_spaced", self.log_spaced)
        for name in ("every_n_train_steps", "every_n_epochs"):
            check_positive_integer(name, getattr(self, name), optional=True)
        if self.every_n_train_steps is not None and self.every_n_epochs is not None:
            raise MisconfigurationException(
                f"`every_n_train_steps` ({self.every_n_train_steps}) and `every_n_epochs` ({self.every_n_epochs}) "
                "exclude each other: give one of them."
            )
        if self.log_spaced and self.every_n_epochs is not None:
            raise MisconfigurationException("`log_spaced=True` counts steps: it does not go with `every_n_epochs`.")

    @property
    def is_open(self) -> bool:
        """Whether nothing was asked for, so that a default has to be found."""
        return self.every_n_train_steps is None and self.every_n_epochs is None and not self.log_spaced

    def __str__(self) -> str:
        if self.every_n_epochs is not None:
            return f"every {self.every_n_epochs} epochs"
        steps = "" if self.every_n_train_steps is None else f"every {self.every_n_train_steps} steps"
        return (
            f"{_PER_DECADE} per decade of steps, then {steps}"
            if self.log_spaced and steps
            else (f"{_PER_DECADE} per decade of steps" if self.log_spaced else steps)
        )

    def due(self, step: int, epoch: int, starts_epoch: bool) -> bool:
        """Whether to measure at this step, the first of its epoch or not."""
        if self.every_n_epochs is not None:
            return starts_epoch and epoch % self.every_n_epochs == 0
        every = self.every_n_train_steps
        if not self.log_spaced:
            return every is not None and step % every == 0
        if every is not None and step >= every / (10 ** (1 / _PER_DECADE) - 1):
            return step % every == 0
        return step in _log_spaced_around(step)


def check_positive_integer(name: str, value: Any, *, optional: bool = False, least: int = 1) -> None:
    """Refuse anything but an integer of at least ``least`` (or None, where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        remedy = " or None" if optional else ""
        raise MisconfigurationException(f"`{name}` must be an integer of at least {least}{remedy}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise MisconfigurationException(f"`{name}` must be True or False, got {value!r}.")


def check_number(name: str, value: Any, *, above: float = 0.0, below: float = math.inf, optional: bool = False) -> None:
    """Refuse anything but a number strictly between two bounds (or None, where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        bounds = f"above {above:g}" if below == math.inf else f"between {above:g} and {below:g}"
        raise MisconfigurationException(
            f"`{name}` must be a number {bounds}{' or None' if optional else ''}, got {value!r}."
        )


def _log_spaced_around(step: int) -> set[int]:
    """The members of the log-spaced schedule (0, 1, 2, 3, 4, 5, 6, 8, 10, 13, …) near ``step``."""
    if step == 0:
        return {0}
    nearest = round(_PER_DECADE * math.log10(step))
    return {round(10 ** (j / _PER_DECADE)) for j in range(max(0, nearest - 2), nearest + 3)}
