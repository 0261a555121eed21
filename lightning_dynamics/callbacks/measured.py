"""What passes between the session and a monitor: the point to measure at, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.optimization import Optimization
from lightning_dynamics.callbacks.perturbation import Perturbation
from lightning_dynamics.callbacks.probe import ProbeData
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

    def with_more(self, more: Any) -> Measured:
        """The same with what another measurement found; or with the reason why that failed."""
        if not isinstance(more, Measured):
            return replace(self, notes={**self.notes, "no_step": more.reason})
        return Measured(
            {**self.scalars, **more.scalars},
            {**self.errors, **more.errors},
            {**self.arrays, **more.arrays},
            {
                **self.notes,
                **{
                    name: {**self.notes.get(name, {}), **note} if isinstance(note, dict) else note
                    for name, note in more.notes.items()
                },
            },
        )

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
class Taken:
    """The step that training took from the weights of a point.

    Attributes:
        after: Parameters after it, by name.
        items: This rank's batches that it was made of, None if they are not known.
    """

    after: Mapping[str, Tensor]
    items: list[ProbeItem] | None


@dataclass(frozen=True)
class Member:
    """One of the monitors that measure on the same at one step.

    Attributes:
        monitor: The monitor.
        in_detail: Whether it measures in detail.
        memory: What it keeps, see :class:`Point`.
    """

    monitor: Any
    in_detail: bool
    memory: dict[str, Any]


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
        data: The probe.
        optimization: How training optimizes at this step.
        perturbation: How SAM perturbs at this step, or why there is no theory of it; None where training is without.
        weights: Parameters θ_t by name.
        after: θ_{t+1}, after the step that training took from here; None where it is not known.
        together: Who measures on the same at this step, this monitor included.
        found: What they have found there for each other.
        seen: What each rank has seen of the step, see :meth:`DynamicsMonitor.step_ends`.
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
    data: ProbeData | None = None
    optimization: Optimization | None = None
    perturbation: Perturbation | str | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    after: Mapping[str, Tensor] | None = None
    together: Sequence[Member] = ()
    found: dict[str, Any] = field(default_factory=dict)
    seen: Sequence[Any] = ()


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
    """A step whose measurement has to wait until the probe is complete, or until the step has been taken.

    Attributes:
        when: The step.
        values: Parameters and buffers as they were, by name.
        rules: The edge of stability as it was, by position of the monitor.
        optimization: How training optimized.
        perturbation: How SAM perturbed.
        roles: What the step is to each monitor that waits, by position.
        taken: The step that was taken from there, once it has been.
        results: What was measured before the step was taken, by position, and how long that took.
    """

    when: When
    values: dict[str, Tensor]
    rules: dict[int, StabilityRule]
    optimization: Optimization
    perturbation: Perturbation | str | None
    roles: dict[int, Role]
    taken: Taken | None = None
    results: dict[int, tuple[Any, float]] = field(default_factory=dict)
