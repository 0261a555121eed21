"""A module's loss and features as functions of its weights. Imports torch and ``linalg``, never lightning."""

from lightning_dynamics.objective.curvature import HessianOperator, curvature_matrix, hessian, symmetry_defect
from lightning_dynamics.objective.features import (
    FeatureBatch,
    FeatureFn,
    FeaturePlan,
    FeatureReader,
    Features,
    Feeding,
    Reduction,
)
from lightning_dynamics.objective.layers import Anatomy, Tap, discover, resolve
from lightning_dynamics.objective.linearization import Linearization, Part, Sum
from lightning_dynamics.objective.loss import Engine, LossFunction, Objective
from lightning_dynamics.objective.mini_batch import LocalPieces, MiniBatch, MiniBatchReader
from lightning_dynamics.objective.outputs import Kind, OutputFn
from lightning_dynamics.objective.parameters import Layout, ParameterFilter, select_parameters
from lightning_dynamics.objective.samples import CoupledSamplesError
from lightning_dynamics.objective.sandbox import Sandbox

__all__ = [
    "Anatomy",
    "CoupledSamplesError",
    "Engine",
    "FeatureBatch",
    "FeatureFn",
    "FeaturePlan",
    "FeatureReader",
    "Features",
    "Feeding",
    "HessianOperator",
    "Kind",
    "Layout",
    "Linearization",
    "LocalPieces",
    "LossFunction",
    "MiniBatch",
    "MiniBatchReader",
    "Objective",
    "OutputFn",
    "ParameterFilter",
    "Part",
    "Reduction",
    "Sandbox",
    "Sum",
    "Tap",
    "curvature_matrix",
    "discover",
    "hessian",
    "resolve",
    "select_parameters",
    "symmetry_defect",
]
