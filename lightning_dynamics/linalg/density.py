"""The whole spectrum at once: density, trace and other spectral sums, estimated from random vectors, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dynamics.linalg.krylov import KrylovSpace
from lightning_dynamics.linalg.operator import SymmetricOperator


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error.

    Attributes:
        value: The number.
        error: Standard error of exactly this estimator, from the spread over the random vectors; 0 where nothing was
            estimated, NaN with a single vector.
    """

    value: float
    error: float


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of the spectral measure of a symmetric operator, (1/n) Σᵢ δ(λ - λᵢ).

    Known eigenvalues enter exactly. The rest of the spectrum, on their complement of dimension d, is represented by one
    Gauss quadrature for each random vector.

    Attributes:
        known: Known eigenvalues, shape ``(g,)``, float64.
        nodes: Quadrature nodes, shape ``(m, s)`` for m random vectors; rows that ended early are padded.
        weights: Their weights, same shape, each row summing to 1; 0 where padded.
        size: n.
        products: Products spent.
        rough: The same from half as many steps: what the quadrature's own error is judged by. None in itself.
    """

    known: Tensor
    nodes: Tensor
    weights: Tensor
    size: int
    products: int
    rough: SpectralDensity | None = None

    @property
    def dimension(self) -> int:
        """Of the unknown part, d = n - g."""
        return self.size - len(self.known)

    def sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Σᵢ f(λᵢ) over all n eigenvalues: exact on the known ones, estimated on the rest.

        Unbiased for polynomials of degree up to 2s - 1; for other functions the quadrature has an error of its own,
        small for smooth f. The standard error does not contain it; :meth:`sum_beyond_polynomials` adds an estimate.

        Args:
            function: f, applied elementwise to float64 tensors. λ ↦ λ gives the trace, λ ↦ λ/(λ + α) the number of
                effective parameters, an indicator the number of eigenvalues in a set.
        """
        known = float(function(self.known).sum()) if len(self.known) else 0.0
        if self.dimension == 0:
            return Estimate(known, 0.0)
        each = self.dimension * (self.weights * function(self.nodes)).sum(dim=1)
        error = float(each.std(correction=1)) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return Estimate(known + float(each.mean()), error)

    def sum_beyond_polynomials(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The same, its error with what a quadrature of half as many nodes gives otherwise, added in quadrature."""
        fine = self.sum(function)
        if self.rough is None:
            return fine
        return Estimate(fine.value, math.hypot(fine.error, fine.value - self.rough.sum(function).value))

    @property
    def trace(self) -> Estimate:
        """Tr A."""
        return self.sum(lambda values: values)

    def points(self) -> tuple[Tensor, Tensor]:
        """All nodes, known eigenvalues included, with their shares of the spectrum, which sum to 1; sorted."""
        shares = self.weights * (self.dimension / (self.size * max(1, len(self.nodes))))
        kept = shares > 0
        nodes = torch.cat([self.known, self.nodes[kept]])
        weights = torch.cat([torch.full_like(self.known, 1 / self.size), shares[kept]])
        order = nodes.argsort()
        return nodes[order], weights[order]

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """The density convolved with a Gaussian of standard deviation ``width``, at ``grid``, shape ``(k,)``."""
        if not width > 0:
            raise ValueError(f"`width` must be positive, got {width!r}.")
        nodes, weights = self.points()
        distances = (grid.double()[:, None] - nodes[None, :]) / width
        return (weights * torch.exp(-(distances**2) / 2)).sum(dim=1) / (width * math.sqrt(2 * math.pi))


def spectral_density(
    operator: SymmetricOperator,
    *,
    known: Tensor | None = None,
    vectors: Tensor | None = None,
    num_vectors: int = 8,
    num_steps: int = 20,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate the spectral measure by stochastic Lanczos quadrature on the complement of known eigenvectors.

    Each random vector q, uniform on the unit sphere of the complement, gives by Lanczos a Gauss quadrature of the
    measure Σᵢ (uᵢᵀq)² δ(λ - λᵢ), whose expectation is the mean over the complement's eigenvalues. Taking the known
    eigenvectors out removes the variance that outliers would bring. The vectors are independent of each other and of
    the known ones: warm starts would bias the result.

    Source: Golub and Meurant (2010), Matrices, Moments and Quadrature; Ubaru, Chen and Saad (2017); for networks
    Ghorbani, Krishnan and Xiao, arXiv 1901.10159.

    Args:
        operator: A, of size n.
        known: Eigenvalues, shape ``(g,)``.
        vectors: Their orthonormal eigenvectors as rows, shape ``(g, n)``. Both or neither.
        num_vectors: Random vectors; the errors are known from their spread, from two on.
        num_steps: Products for each, at most.
        generator: CPU generator of the random vectors, a fresh one of seed 0 by default.

    Returns:
        The estimate. An error in the known eigenvectors mixes known and unknown parts: hand over certified ones.

    Raises:
        ValueError: If only one of ``known`` and ``vectors`` is given, or they do not fit each other or the operator.
    """
    if (known is None) != (vectors is None):
        raise ValueError("Give both `known` eigenvalues and their `vectors`, or neither.")
    for name, count in (("num_vectors", num_vectors), ("num_steps", num_steps)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    values = torch.empty(0, dtype=torch.float64) if known is None else known.detach().double().cpu()
    if vectors is not None and tuple(vectors.shape) != (len(values), operator.size):
        raise ValueError(
            f"`vectors` must have one row of length {operator.size} for each of the {len(values)} known eigenvalues, "
            f"got shape {tuple(vectors.shape)}."
        )
    source = torch.Generator().manual_seed(0) if generator is None else generator
    steps = min(num_steps, operator.size - len(values))
    nodes = torch.zeros(num_vectors if steps else 0, steps, dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    half = (steps + 1) // 2
    rough_nodes, rough_weights = nodes[:, :half].clone(), weights[:, :half].clone()
    products = 0
    for row in range(len(nodes)):
        space = KrylovSpace(operator, source, vectors)
        space.append_random()
        while space.dimension < steps and not space.is_exhausted:
            space.expand()
        pairs = space.ritz()
        nodes[row, : space.dimension] = pairs.values
        weights[row, : space.dimension] = pairs.coefficients[0] ** 2
        diagonal, below = (part[:half] for part in space.tridiagonal())
        off = below[: len(diagonal) - 1]
        fewer, vectors_of = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        rough_nodes[row, : len(fewer)] = fewer
        rough_weights[row, : len(fewer)] = vectors_of[0] ** 2
        products += space.products
    rough = SpectralDensity(values, rough_nodes, rough_weights, operator.size, 0)
    return SpectralDensity(values, nodes, weights, operator.size, products, rough)
