"""A module's loss as a function of its weights. Imports torch and ``linalg``, never lightning."""

from lightning_dynamics.objective.curvature import HessianOperator, hessian, symmetry_defect
from lightning_dynamics.objective.loss import Engine, Linearization, LossFunction, Objective
from lightning_dynamics.objective.parameters import Layout, ParameterFilter, select_parameters
from lightning_dynamics.objective.sandbox import Sandbox

__all__ = [
    "Engine",
    "HessianOperator",
    "Layout",
    "Linearization",
    "LossFunction",
    "Objective",
    "ParameterFilter",
    "Sandbox",
    "hessian",
    "select_parameters",
    "symmetry_defect",
]
