"""When to measure and what to name it: the monitors, and what they share."""

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.curvature import CurvatureMonitor
from lightning_dynamics.callbacks.dashboard import Dashboard
from lightning_dynamics.callbacks.displacement import DisplacementMonitor
from lightning_dynamics.callbacks.feature_monitor import FeatureMonitor
from lightning_dynamics.callbacks.gradient_noise import GradientNoiseMonitor
from lightning_dynamics.callbacks.hessian import HessianMonitor
from lightning_dynamics.callbacks.hessian_spectrum import Spectrum
from lightning_dynamics.callbacks.neural_collapse import NeuralCollapseMonitor
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.reference import Reference
from lightning_dynamics.callbacks.sam import SAMMonitor
from lightning_dynamics.callbacks.stochastic_sharpness import StochasticSharpnessMonitor

__all__ = [
    "CurvatureMonitor",
    "Dashboard",
    "DisplacementMonitor",
    "DynamicsMonitor",
    "FeatureMonitor",
    "GradientNoiseMonitor",
    "HessianMonitor",
    "NeuralCollapseMonitor",
    "Probe",
    "Reference",
    "SAMMonitor",
    "Spectrum",
    "StochasticSharpnessMonitor",
]
