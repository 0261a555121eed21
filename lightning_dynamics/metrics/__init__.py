"""Numbers from features, weights, trajectories and optimizers. Pure functions; never imports lightning."""

from lightning_dynamics.metrics.spectrum import (
    effective_parameters,
    median_ratio,
    negative_mass,
    overlap_error,
    principal_cosines,
    spectral_sparsity,
    subspace_overlap,
)
from lightning_dynamics.metrics.stability import StabilityRule, stability_rule

__all__ = [
    "StabilityRule",
    "effective_parameters",
    "median_ratio",
    "negative_mass",
    "overlap_error",
    "principal_cosines",
    "spectral_sparsity",
    "stability_rule",
    "subspace_overlap",
]
