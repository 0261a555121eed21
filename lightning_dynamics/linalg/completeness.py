"""How far beyond what was found can an eigenvalue still hide? A bound that holds with stated probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dynamics.linalg.krylov import KrylovSpace
from lightning_dynamics.linalg.operator import SymmetricOperator


@dataclass(frozen=True)
class ComplementBounds:
    """Where the spectrum of an operator ends on the complement of some vectors.

    Attributes:
        upper: No eigenvalue on the complement lies above, with probability at least ``confidence``.
        lower: None lies below, likewise (each side has half of the failure probability).
        seen_top: Largest Ritz value met on the complement: an eigenvalue there is at least as large.
        seen_bottom: Smallest one met.
        witnesses: Ritz vectors of the values that passed ``stop_above`` or ``stop_below``, shape ``(r, n)``.
        products: Products spent.
    """

    upper: float
    lower: float
    seen_top: float
    seen_bottom: float
    witnesses: Tensor
    products: int


def bound_complement(
    operator: SymmetricOperator,
    locked: Tensor,
    generator: torch.Generator,
    *,
    confidence: float = 0.99,
    stop_above: float = math.inf,
    stop_below: float = -math.inf,
    max_products: int = 30,
) -> ComplementBounds:
    """Bound the spectrum of A on the complement of ``locked`` by a Lanczos run from one fresh random vector.

    Let q be uniform on the unit sphere of the complement (dimension d), independent of ``locked``, and p₀, p₁, … the
    orthonormal polynomials of its Lanczos run. If μ is an eigenvalue there, with unit eigenvector u, then the component
    of u along the l-th Lanczos vector is p_l(μ)·uᵀq, so that (uᵀq)² ≤ 1 / Σ_l p_l(μ)² (the Christoffel function).
    Beyond the Ritz values that bound falls exponentially, while P((uᵀq)² ≤ ω) ≤ √(2dω/π). So no eigenvalue lies where
    the bound is below ω = πδ²/(2d), except with probability δ. Multiplicity plays no part: one vector of the eigenspace
    is enough.

    The a-priori form of this statement is Kuczynski and Wozniakowski (1992), Theorem 4.1; the a-posteriori one, which
    knows how the Ritz values lie, is derived as above and checked by simulation in the tests.

    Args:
        operator: A, of size n.
        locked: Orthonormal rows, shape ``(g, n)``, chosen without knowledge of ``generator``'s coming draws.
        generator: CPU generator for q.
        confidence: 1 - δ, both sides together.
        stop_above: What counts as missed: the run stops at once when a Ritz value exceeds this, and with success when
            ``upper`` has come down to it. Infinite where the upper side is not asked for.
        stop_below: Likewise for the lower side.
        max_products: Stop after this many products at the latest.

    Returns:
        The bounds reached; they hold whatever made the run stop, since stopping adds no randomness of its own to q.
    """
    dimension = operator.size - len(locked)
    empty = torch.empty(0, operator.size, dtype=operator.dtype, device=operator.device)
    if dimension <= 0:
        return ComplementBounds(-math.inf, math.inf, -math.inf, math.inf, empty, 0)
    weight = math.pi * ((1.0 - confidence) / 2) ** 2 / (2 * dimension)
    space = KrylovSpace(operator, generator, locked)
    space.append_random()
    upper, lower = math.inf, -math.inf
    wants_upper, wants_lower = math.isfinite(stop_above), math.isfinite(stop_below)
    while True:
        space.expand()
        pairs = space.ritz()
        top, bottom = float(pairs.values[0]), float(pairs.values[-1])
        if space.is_exhausted:
            upper, lower = top, bottom
        else:
            diagonal, below = space.tridiagonal()
            if wants_upper:
                upper = _edge(diagonal, below, top, weight)
            if wants_lower:
                lower = -_edge(-diagonal, below, -bottom, weight)
        missed = (pairs.values > stop_above) | (pairs.values < stop_below)
        if bool(missed.any()):
            return ComplementBounds(
                upper, lower, top, bottom, space.vectors(pairs.coefficients[:, missed].mT), space.products
            )
        met = (not wants_upper or upper <= stop_above) and (not wants_lower or lower >= stop_below)
        if met or space.is_exhausted or space.products >= max_products:
            return ComplementBounds(upper, lower, top, bottom, empty, space.products)


def _edge(diagonal: Tensor, below: Tensor, top: float, weight: float) -> float:
    """Smallest μ above the largest Ritz value at which the Christoffel function has fallen to ``weight``."""
    reach = max(float(below.max()), 1e-300)
    high = top + reach
    while _christoffel(diagonal, below, high) > weight:
        reach *= 2
        high = top + reach
    low = top
    for _ in range(40):
        middle = (low + high) / 2
        if _christoffel(diagonal, below, middle) > weight:
            low = middle
        else:
            high = middle
    return high


def _christoffel(diagonal: Tensor, below: Tensor, point: float) -> float:
    """1 / Σ_{l ≤ j} p_l(point)² by the three-term recurrence, j the number of products."""
    alphas, betas = diagonal.tolist(), below.tolist()
    previous, current, total = 0.0, 1.0, 1.0
    for step, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
        carried = betas[step - 1] * previous if step else 0.0
        if beta == 0.0:
            return 0.0
        previous, current = current, ((point - alpha) * current - carried) / beta
        total += current * current
        if total > 1e200:
            return 0.0
    return 1.0 / total
