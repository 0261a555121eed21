"""What a solver returns: values, and how far each may be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs at one end of a spectrum, outermost first.

    Attributes:
        values: Shape ``(k,)``, float64: λ₁ ≥ λ₂ ≥ … at the top, λ_n ≤ λ_{n-1} ≤ … at the bottom.
        vectors: Orthonormal rows, shape ``(k, n)``, in the operator's type and on its device.
        residuals: ‖A v - λ v‖, shape ``(k,)``. *Inclusion*: an eigenvalue of A lies within ``residuals +
            product_error`` of each value, always (Krylov-Weinstein).
        bounds: Estimated error of each value, shape ``(k,)``: min(r, r²/gap), for clusters min(‖R‖²/gap), plus the
            error of a product (see :func:`value_bounds`). Right as long as no eigenvalue was missed and clusters are
            resolved, which failed for 3 % of the top and 5.5 % of the bottom values of 1,200 hard spectra; ``limits``
            hold with a stated probability.
        limits: *Completeness*, shape ``(k,)`` or None where it was not checked: with probability ``confidence`` the
            i-th eigenvalue, counted with multiplicity, is not beyond ``limits[i]`` (above it at the top, below it at
            the bottom). It is never inside ``values[i]`` by more than the error of a product.
        confidence: The probability that goes with ``limits``.
        converged: Whether each of ``bounds`` meets the tolerance asked for.
        gap: Distance from the last value to the next one inwards, the residual of that one taken off; None where none
            was met, infinite where there is none.
        product_error: Estimated error of one product (norm, per unit vector).
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: Tensor
    limits: Tensor | None
    confidence: float | None
    converged: bool
    gap: float | None = None
    product_error: float = 0.0

    def __len__(self) -> int:
        return len(self.values)

    def subspace_error(self, k: int) -> float:
        """Bound on ‖sin Θ‖_F between the span of the first k vectors and the true invariant subspace.

        ‖R‖_F / gap with the residuals R of the k vectors, and the gap between the k-th value and the next one, the
        bound of that taken off (Davis and Kahan 1970). Right as long as no eigenvalue was missed down to the next one:
        for k below their number ``limits`` speak of that. Infinite where no gap is left.
        """
        if 0 < k < len(self):
            gap = abs(float(self.values[k - 1] - self.values[k])) - float(self.bounds[k])
        elif k == len(self) and self.gap is not None:
            gap = self.gap
        else:
            return math.inf
        return (float(self.residuals[:k].norm()) + math.sqrt(k) * self.product_error) / gap if gap > 0 else math.inf


@dataclass(frozen=True)
class ExtremalEigenpairs:
    """Both ends of a spectrum from one run.

    Attributes:
        top: The largest eigenvalues, descending.
        bottom: The smallest (most negative) eigenvalues, ascending.
        subspace: The vectors of both ends and a few beyond them, rows of shape ``(r, n)``: the ``start`` of a later run
            on a nearby operator.
        products: Products with the operator that were spent, completeness check included.
        product_error: Estimated error of one product (norm, per unit vector).
        norm: Estimate of ‖A‖, the largest Ritz value in modulus.
    """

    top: Eigenpairs
    bottom: Eigenpairs
    subspace: Tensor
    products: int
    product_error: float
    norm: float

    @property
    def converged(self) -> bool:
        return self.top.converged and self.bottom.converged
