"""Numbers from features, weights, trajectories and optimizers. Pure functions; never imports lightning."""

from lightning_dynamics.metrics.class_sums import ClassCenters, ClassSums, ScatterSums
from lightning_dynamics.metrics.collapse import (
    Classifier,
    CollapseMeasures,
    SeparationLaw,
    collapse_measures,
    separation_law,
)
from lightning_dynamics.metrics.neural_collapse import NeuralCollapse
from lightning_dynamics.metrics.noise_floor import UnknownFloorError, noise_floor
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
    "ClassCenters",
    "ClassSums",
    "Classifier",
    "CollapseMeasures",
    "NeuralCollapse",
    "ScatterSums",
    "SeparationLaw",
    "StabilityRule",
    "UnknownFloorError",
    "collapse_measures",
    "effective_parameters",
    "median_ratio",
    "negative_mass",
    "noise_floor",
    "overlap_error",
    "principal_cosines",
    "separation_law",
    "spectral_sparsity",
    "stability_rule",
    "subspace_overlap",
]
