"""Mathematics of a symmetric operator on a vector space. Imports torch only."""

from lightning_dynamics.linalg.completeness import ComplementBounds, bound_complement
from lightning_dynamics.linalg.density import Estimate, SpectralDensity, spectral_density
from lightning_dynamics.linalg.eigenpairs import eigenpairs
from lightning_dynamics.linalg.krylov import KrylovSpace, RitzPairs
from lightning_dynamics.linalg.operator import CongruentOperator, MatrixOperator, SymmetricOperator
from lightning_dynamics.linalg.results import Eigenpairs, ExtremalEigenpairs

__all__ = [
    "ComplementBounds",
    "CongruentOperator",
    "Eigenpairs",
    "Estimate",
    "ExtremalEigenpairs",
    "KrylovSpace",
    "MatrixOperator",
    "RitzPairs",
    "SpectralDensity",
    "SymmetricOperator",
    "bound_complement",
    "eigenpairs",
    "spectral_density",
]
