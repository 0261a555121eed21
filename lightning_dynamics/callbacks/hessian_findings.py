"""What a HessianMonitor finds at a point: numbers as they come together, and what rounding adds to their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_dynamics.callbacks.measured import Measured
from lightning_dynamics.callbacks.ranks import Interrupted
from lightning_dynamics.linalg import Eigenpairs, SymmetricOperator
from lightning_dynamics.linalg.basis import inner
from lightning_dynamics.objective import HessianOperator

_RATE_ROUNDING = 1e-5  # relative rounding of a third derivative
_SAME_RATE = 0.05  # relative difference of two third derivatives that rounding may explain


@dataclass
class Findings:
    """Numbers by key without the family, as they come together."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    products: int = 0

    def enter(self, key: str, value: float, error: float | None = None) -> None:
        self.values[key] = value
        if error is not None:
            self.errors[key] = error


def measure_sharpening_rate(hessian: HessianOperator, top: Eigenpairs, into: Findings) -> None:
    """-∇λ₁·∇L: how fast gradient flow sharpens. Twice, by a third derivative and by polarization of another."""
    vector = top.vectors[0]
    gradient, norm = hessian.gradient, float(hessian.gradient.norm())
    if norm == 0:
        into.enter("sharpening_rate", 0.0, 0.0)
        return
    unit = gradient / norm
    try:
        rate = -inner(hessian.slope(vector), unit) * norm
        difference = hessian.slope(vector + unit) - hessian.slope(vector - unit)
    except Interrupted:
        raise
    except RuntimeError as error:  # batch norm has no third derivative in PyTorch: the point stands without it
        into.notes["no_sharpening_rate"] = str(error).partition("\n")[0]
        return
    other = -inner(difference, vector) / 4 * norm
    into.products += 3
    if abs(rate - other) > _SAME_RATE * max(abs(rate), abs(other)):
        into.notes["no_sharpening_rate"] = f"the third derivative is not symmetric ({rate:.4g} against {other:.4g})"
        return
    # T(v, v, g) changes by 2 T(δv, v, g) with the vector, and T(v, g, ·) is at hand
    turned = float(difference.norm()) / 4 * norm
    angle = min(1.0, top.subspace_error(1))
    into.enter("sharpening_rate", rate, abs(rate - other) + (2 * angle + _RATE_ROUNDING) * turned)


def rounding_of(operator: SymmetricOperator, leading: Sequence[tuple[Tensor, float, float]]) -> float:
    """What rounding does to a matrix: the largest ‖(A₆₄ - A)v‖ over some of its eigenvectors.

    Args:
        operator: A₆₄, the matrix in double precision.
        leading: Eigenvectors of A, with their values and residuals.
    """
    worst = 0.0
    for vector, value, residual in leading:
        exact = vector.to(operator.dtype)
        exact /= exact.norm()
        image = operator(exact)
        # what was left of the residual in single precision is not rounding
        worst = max(worst, float((image - value * exact).norm()) - residual, abs(float(exact.dot(image)) - value))
    return worst


def enlarged(measured: Measured, family: str, rounding: float | None) -> Measured:
    """The same with errors that contain the rounding of the matrix, where it is known.

    Args:
        measured: A measurement with eigenvalues; another is returned as it is.
        family: First part of its keys.
        rounding: Of the matrix, relative to its norm.
    """
    top = f"{family}/top_1"
    if top not in measured.scalars or measured.notes["dtype"] == "float64":
        return measured
    if rounding is None:
        return replace(measured, notes={**measured.notes, "rounding": "not known"})
    margin = rounding * measured.notes["norm"]
    errors = dict(measured.errors)
    for key in errors:
        if key.startswith((f"{family}/top_", f"{family}/bottom_", f"{family}/block_top_")):
            errors[key] += margin
    ratio = f"{family}/edge_ratio"
    if ratio in errors:
        errors[ratio] += margin * abs(measured.scalars[ratio]) / max(abs(measured.scalars[top]), 1e-300)
    cycle = f"{family}/sam_oscillation"
    if cycle in errors:  # its relative error is at most twice as large, to first order
        errors[cycle] += 2 * margin * measured.scalars[cycle] / measured.scalars[top]
    notes = {**measured.notes, "rounding": rounding}
    if "completeness" in notes:
        limits = notes["completeness"]
        notes["completeness"] = {
            **limits,
            "top_at_most": [limit + margin for limit in limits["top_at_most"]],
            "bottom_at_least": [limit - margin for limit in limits["bottom_at_least"]],
        }
    return replace(measured, errors=errors, notes=notes)
