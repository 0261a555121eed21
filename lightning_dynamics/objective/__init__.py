"""A module's loss as a function of its weights. Imports torch and ``linalg``, never lightning."""

from lightning_dynamics.objective.curvature import HessianOperator, curvature_matrix, hessian, symmetry_defect
from lightning_dynamics.objective.linearization import Linearization, Part, Sum
from lightning_dynamics.objective.loss import Engine, LossFunction, Objective
from lightning_dynamics.objective.outputs import Kind, OutputFn
from lightning_dynamics.objective.parameters import Layout, ParameterFilter, select_parameters
from lightning_dynamics.objective.sandbox import Sandbox

__all__ = [
    "Engine",
    "HessianOperator",
    "Kind",
    "Layout",
    "Linearization",
    "LossFunction",
    "Objective",
    "OutputFn",
    "ParameterFilter",
    "Part",
    "Sandbox",
    "Sum",
    "curvature_matrix",
    "hessian",
    "select_parameters",
    "symmetry_defect",
]
