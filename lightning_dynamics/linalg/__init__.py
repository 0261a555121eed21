"""Mathematics of a symmetric operator on a vector space. Imports torch only."""

from lightning_dynamics.linalg.completeness import ComplementBounds, bound_complement
from lightning_dynamics.linalg.eigenpairs import eigenpairs
from lightning_dynamics.linalg.krylov import KrylovSpace, RitzPairs
from lightning_dynamics.linalg.operator import CongruentOperator, MatrixOperator, SymmetricOperator
from lightning_dynamics.linalg.results import Eigenpairs, ExtremalEigenpairs

__all__ = [
    "ComplementBounds",
    "CongruentOperator",
    "Eigenpairs",
    "ExtremalEigenpairs",
    "KrylovSpace",
    "MatrixOperator",
    "RitzPairs",
    "SymmetricOperator",
    "bound_complement",
    "eigenpairs",
]
