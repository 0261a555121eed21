"""What passes between the session and a monitor: the point to measure at, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_dynamics.metrics import StabilityRule

Subject = TypeVar("Subject")
"""What a measurement is made on: a Hessian, the features of a network. Covers all ranks; exists on rank zero only."""


@dataclass(frozen=True)
class Measured:
    """Numbers of one measurement, by full key. Plain enough for a checkpoint that is loaded with ``weights_only=True``.

    Attributes:
        scalars: Values.
        errors: Their errors, of the kind that the quantity declares.
        arrays: Lists of numbers.
        notes: What else is needed to read them.
    """

    scalars: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measured:
        return cls(**state)


@dataclass
class Clipping:
    """What gradient clipping did since the last measurement.

    Attributes:
        steps: Optimizer steps.
        clipped: Those whose gradient was shortened; like :attr:`factors` on the gradients' device, lest each step waits
            for it.
        factors: Sum of the factors that gradients were multiplied by.
    """

    steps: int = 0
    clipped: float | Tensor = 0.0
    factors: float | Tensor = 0.0

    def note(self, factor: Tensor) -> None:
        self.steps += 1
        self.clipped = self.clipped + (factor < 1.0)
        self.factors = self.factors + factor

    @property
    def clipped_share(self) -> float:
        return float(self.clipped) / self.steps

    @property
    def mean_factor(self) -> float:
        return float(self.factors) / self.steps


@dataclass(frozen=True)
class Point(Generic[Subject]):
    """Where and on what a monitor measures. Exists on rank zero only.

    Attributes:
        step: x of the curves.
        subject: What to measure on, at the weights of this step.
        rule: The optimizers' edge of stability at this step, for monitors of the loss.
        memory: What the monitor keeps from one measurement to the next: tensors, numbers, strings, in plain containers.
            It comes back from checkpoints where it is small.
        generator: For whatever is random in the measurement; a function of seed, step and monitor.
        count: Measurements taken before, those before a resume included.
        clipping: See :class:`Clipping`; None where gradients are not clipped.
        in_detail: Whether the monitor's rare and dear measurement is due too.
        has_halves: Whether the probe has batches in both of its halves, and is not the whole set.
        final: Whether training has ended.
    """

    step: int
    subject: Subject
    rule: StabilityRule
    memory: dict[str, Any]
    generator: torch.Generator
    count: int
    clipping: Clipping | None
    in_detail: bool = False
    has_halves: bool = False
    final: bool = False


@dataclass(frozen=True)
class When:
    """A moment of the run.

    Attributes:
        step: x of the curves.
        global_step: Lightning's ``global_step``.
        epoch: Epoch.
        final: Whether training has ended.
        weights: What became of the weights since the last step, None if nothing did.
    """

    step: int
    global_step: int
    epoch: int
    final: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class Role:
    """What a step is to a monitor: due by its cadence, the second half of a pair, or both; and whether in detail."""

    first: bool
    second: bool
    in_detail: bool = False

    @property
    def is_due(self) -> bool:
        return self.first or self.second


@dataclass(frozen=True)
class SavedWeights:
    """A step whose measurement has to wait until the probe is complete.

    Attributes:
        when: The step.
        values: Parameters and buffers as they were, by name.
        rules: The edge of stability as it was, by position of the monitor.
        roles: What the step is to each monitor that waits, by position.
    """

    when: When
    values: dict[str, Tensor]
    rules: dict[int, StabilityRule]
    roles: dict[int, Role]
