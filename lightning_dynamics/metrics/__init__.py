"""Numbers from features, weights, trajectories and optimizers. Pure functions; never imports lightning."""

from lightning_dynamics.metrics.class_sums import ClassCenters, ClassSums, ScatterSums
from lightning_dynamics.metrics.collapse import (
    Classifier,
    CollapseMeasures,
    SeparationLaw,
    collapse_measures,
    separation_law,
)
from lightning_dynamics.metrics.diffusion import (
    AgingExponent,
    DriftDiffusion,
    NullComparison,
    PowerLaw,
    TwoTime,
    UndefinedExponentError,
    aging_exponent,
    compare,
    drift_diffusion,
    effective_dimension,
    local_exponents,
    power_law,
    two_time,
)
from lightning_dynamics.metrics.displacement import Displacement
from lightning_dynamics.metrics.langevin import HeavyBall, ornstein_uhlenbeck_displacement
from lightning_dynamics.metrics.neural_collapse import NeuralCollapse
from lightning_dynamics.metrics.noise_floor import UnknownFloorError, noise_floor
from lightning_dynamics.metrics.phase_space import ModeDynamics, PhaseSpace, phase_space
from lightning_dynamics.metrics.projection import Projection, Shard
from lightning_dynamics.metrics.settling import Settling, Trend
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
from lightning_dynamics.metrics.symmetries import (
    Symmetry,
    SymmetryFinder,
    breaking,
    charge_scale,
    conserved,
    effective_learning_rate,
    imbalance,
    radial_share,
)
from lightning_dynamics.metrics.trail import Trail

__all__ = [
    "AgingExponent",
    "ClassCenters",
    "ClassSums",
    "Classifier",
    "CollapseMeasures",
    "Displacement",
    "DriftDiffusion",
    "HeavyBall",
    "ModeDynamics",
    "NeuralCollapse",
    "NullComparison",
    "PhaseSpace",
    "PowerLaw",
    "Projection",
    "ScatterSums",
    "SeparationLaw",
    "Settling",
    "Shard",
    "StabilityRule",
    "Symmetry",
    "SymmetryFinder",
    "Trail",
    "Trend",
    "TwoTime",
    "UndefinedExponentError",
    "UnknownFloorError",
    "aging_exponent",
    "breaking",
    "charge_scale",
    "collapse_measures",
    "compare",
    "conserved",
    "drift_diffusion",
    "effective_dimension",
    "effective_learning_rate",
    "effective_parameters",
    "imbalance",
    "local_exponents",
    "median_ratio",
    "negative_mass",
    "noise_floor",
    "ornstein_uhlenbeck_displacement",
    "overlap_error",
    "phase_space",
    "power_law",
    "principal_cosines",
    "radial_share",
    "separation_law",
    "spectral_sparsity",
    "stability_rule",
    "subspace_overlap",
    "two_time",
]
