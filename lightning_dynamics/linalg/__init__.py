"""Mathematics of a symmetric operator on a vector space. Imports torch only."""

from lightning_dynamics.linalg.completeness import ComplementBounds, bound_complement
from lightning_dynamics.linalg.density import Estimate, SpectralDensity, spectral_density
from lightning_dynamics.linalg.eigenpairs import eigenpairs, most_rows
from lightning_dynamics.linalg.krylov import KrylovSpace, RitzPairs
from lightning_dynamics.linalg.operator import (
    BlockOperator,
    CongruentOperator,
    MatrixOperator,
    OnSpaceOf,
    SymmetricOperator,
    diagonal_entries,
)
from lightning_dynamics.linalg.results import Eigenpairs, ExtremalEigenpairs

__all__ = [
    "BlockOperator",
    "ComplementBounds",
    "CongruentOperator",
    "Eigenpairs",
    "Estimate",
    "ExtremalEigenpairs",
    "KrylovSpace",
    "MatrixOperator",
    "OnSpaceOf",
    "RitzPairs",
    "SpectralDensity",
    "SymmetricOperator",
    "bound_complement",
    "diagonal_entries",
    "eigenpairs",
    "most_rows",
    "spectral_density",
]
