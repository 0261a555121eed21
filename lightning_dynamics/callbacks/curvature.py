"""What monitors of the training loss and its curvature have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.joint_linearization import LinearizationPart
from lightning_dynamics.callbacks.lightning_objective import ObjectiveOptions, lightning_objective
from lightning_dynamics.callbacks.lightning_replay import Circumstances
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.measured import Point
from lightning_dynamics.callbacks.measuring import AsymmetryError
from lightning_dynamics.callbacks.probe import ProbeData
from lightning_dynamics.linalg import SymmetricOperator
from lightning_dynamics.metrics import StabilityRule
from lightning_dynamics.objective import (
    HessianOperator,
    Kind,
    Layout,
    Objective,
    select_parameters,
    symmetry_defect,
)

_PRODUCT = 2.3  # gradients per Hessian product, for the default cadence
_SYMMETRIC = {torch.float64: 1e-6, torch.float32: 1e-3}  # defects that rounding explains
_SYMMETRIC_NARROW = 0.1  # under autocast


class CurvatureMonitor(DynamicsMonitor[HessianOperator]):
    """A monitor of the loss that ``training_step`` returns: its values, gradients, Hessian products."""

    options: ObjectiveOptions
    part = LinearizationPart

    @property
    def kinds(self) -> frozenset[Kind]:
        """The curvature matrices whose products are taken: each is tested before the first step."""
        return frozenset({"hessian"})

    @property
    def products_per_point(self) -> float:
        """Hessian products that one point costs, pair and graphs included, when points are far apart."""
        raise NotImplementedError

    def products_in_detail(self, layout: Layout) -> float:
        """Products that a measurement in detail costs beyond a point, with parameters laid out like this."""
        return 0.0

    def gradients_per_point(self, module: LightningModule) -> float:
        return self.products_per_point * self.options.noise_draws * _PRODUCT

    def gradients_in_detail(self, module: LightningModule) -> float:
        layout = Layout.of(self.measured_parameters(module))
        return self.products_in_detail(layout) * self.options.noise_draws * _PRODUCT

    def measured_parameters(self, module: LightningModule) -> dict[str, nn.Parameter]:
        try:
            chosen = select_parameters(module, self.options.parameters)
        except ValueError:  # the preflight says what is wrong
            return {}
        return {name: parameter for name, parameter in chosen.items() if not is_lazy(parameter)}

    def replay(
        self,
        trainer: Trainer,
        module: LightningModule,
        items: Sequence[Sequence[ProbeItem]],
        circumstances: Circumstances,
        sharing: Sequence[DynamicsMonitor[Any]],
    ) -> Objective:
        matrices = len(_kinds(sharing) | {"hessian"})
        return lightning_objective(trainer, module, self.options, items[0], circumstances, matrices)

    def point_of(self, subject: HessianOperator, **facts: Any) -> Point[HessianOperator]:
        if not math.isfinite(subject.loss):
            raise FloatingPointError(f"the probe loss is {subject.loss}")
        has_halves = subject.has_halves and not self.options.probe.whole
        return Point(subject=subject, has_halves=has_halves, **facts)

    def describe(self) -> dict[str, Any]:
        return {
            "noise_draws": self.options.noise_draws,
            "parameters": _named(self.options.parameters),
        }

    def introduce(
        self, rule: StabilityRule, data: ProbeData, every: int | None, every_detail: int | None = None
    ) -> dict[str, Any]:
        return {**super().introduce(rule, data, every, every_detail), "threshold_rule": _rule_in_words(rule)}

    def preflight(self, sharing: Sequence[DynamicsMonitor[Any]], subject: HessianOperator) -> None:
        """The monitors' own conditions; then loss, gradient, two products, the symmetry test.

        Raises:
            AsymmetryError: If the symmetry test fails. In single precision that may be rounding, where the second
                derivative is a small difference of large terms (a network that is nearly certain of everything).
        """
        super().preflight(sharing, subject)
        if not math.isfinite(subject.loss) or not bool(subject.gradient.isfinite().all()):
            raise FloatingPointError(
                f"the loss on the first probe batch is {subject.loss}, or its gradient is not finite"
            )
        allowed = _SYMMETRIC_NARROW if self.options.precision == "same" else _SYMMETRIC[subject.dtype]
        for kind in sorted(_kinds(sharing)):
            _check_symmetry(subject.operator(kind), kind, allowed)


def _kinds(sharing: Sequence[DynamicsMonitor[Any]]) -> set[Kind]:
    return {kind for monitor in sharing if isinstance(monitor, CurvatureMonitor) for kind in monitor.kinds}


def _check_symmetry(operator: SymmetricOperator, kind: Kind, allowed: float) -> None:
    defect = symmetry_defect(operator, torch.Generator().manual_seed(0))
    if not math.isfinite(defect):
        raise FloatingPointError(f"a product with the {kind} matrix on the first probe batch is not finite")
    if defect > allowed:
        raise AsymmetryError(
            f"the second derivative that PyTorch computes is not symmetric (defect {defect:.2g}, rounding explains "
            f"{allowed:.0e}). Either the loss is not the same function at every evaluation, or an operation of the "
            "step has a wrong double backward."
        )


def _named(parameters: Any) -> Any:
    """The choice of parameters as a record can hold it: a function by its name."""
    if parameters is None or isinstance(parameters, str):
        return parameters
    if isinstance(parameters, (list, tuple)):
        return [str(each) for each in parameters]
    return getattr(parameters, "__qualname__", type(parameters).__name__)


def _rule_in_words(rule: StabilityRule) -> str:
    """The edge of stability at the first step."""
    if rule.threshold is not None:
        return f"λ* = {rule.threshold:.6g} at the start, {rule.description}"
    if rule.unavailable is not None:
        return f"none, {rule.unavailable}: {rule.description}"
    return f"the edge ratio, since no single λ* holds: {rule.description}"
