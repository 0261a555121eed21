"""How training itself is changed, on request: sharpness-aware minimization, the order of samples, injected noise."""

from lightning_dynamics.strategies.compose import compose_strategy
from lightning_dynamics.strategies.named import (
    DDPNoisyDescentStrategy,
    DDPSamplingOrderStrategy,
    DDPSAMStrategy,
    NoisyDescentStrategy,
    SamplingOrderStrategy,
    SAMStrategy,
)
from lightning_dynamics.strategies.sam import SAMMixin, SAMStep
from lightning_dynamics.strategies.schedules import RhoByLearningRate

__all__ = [
    "DDPNoisyDescentStrategy",
    "DDPSAMStrategy",
    "DDPSamplingOrderStrategy",
    "NoisyDescentStrategy",
    "RhoByLearningRate",
    "SAMMixin",
    "SAMStep",
    "SAMStrategy",
    "SamplingOrderStrategy",
    "compose_strategy",
]
