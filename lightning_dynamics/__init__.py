"""See how training moves: monitors for a Lightning Trainer that leave the run as it was, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dynamics._names import register

if TYPE_CHECKING:
    from lightning_dynamics.callbacks import (
        Dashboard,
        DisplacementMonitor,
        GradientNoiseMonitor,
        HessianMonitor,
        NeuralCollapseMonitor,
        Probe,
        Reference,
        SAMMonitor,
        Spectrum,
        StochasticSharpnessMonitor,
    )
    from lightning_dynamics.experiments import Branch, batch_size_sweep, edge_test
    from lightning_dynamics.recording import Record, RecordTable, Run, figures, load_records, load_runs, read_records
    from lightning_dynamics.recording.html import report
    from lightning_dynamics.strategies import (
        DDPNoisyDescentStrategy,
        DDPSamplingOrderStrategy,
        DDPSAMStrategy,
        NoisyDescentStrategy,
        RhoByLearningRate,
        SamplingOrderStrategy,
        SAMStrategy,
        compose_strategy,
    )

__version__ = "0.1.0.dev0"

# loaded on first use, so that `linalg`, `objective` and `metrics` work where Lightning is not
_PUBLIC = {
    "Branch": "lightning_dynamics.experiments",
    "DDPNoisyDescentStrategy": "lightning_dynamics.strategies",
    "DDPSAMStrategy": "lightning_dynamics.strategies",
    "DDPSamplingOrderStrategy": "lightning_dynamics.strategies",
    "Dashboard": "lightning_dynamics.callbacks",
    "DisplacementMonitor": "lightning_dynamics.callbacks",
    "GradientNoiseMonitor": "lightning_dynamics.callbacks",
    "HessianMonitor": "lightning_dynamics.callbacks",
    "NeuralCollapseMonitor": "lightning_dynamics.callbacks",
    "NoisyDescentStrategy": "lightning_dynamics.strategies",
    "Probe": "lightning_dynamics.callbacks",
    "Record": "lightning_dynamics.recording",
    "RecordTable": "lightning_dynamics.recording",
    "Reference": "lightning_dynamics.callbacks",
    "RhoByLearningRate": "lightning_dynamics.strategies",
    "Run": "lightning_dynamics.recording",
    "SAMMonitor": "lightning_dynamics.callbacks",
    "SAMStrategy": "lightning_dynamics.strategies",
    "SamplingOrderStrategy": "lightning_dynamics.strategies",
    "Spectrum": "lightning_dynamics.callbacks",
    "StochasticSharpnessMonitor": "lightning_dynamics.callbacks",
    "batch_size_sweep": "lightning_dynamics.experiments",
    "compose_strategy": "lightning_dynamics.strategies",
    "edge_test": "lightning_dynamics.experiments",
    "figures": "lightning_dynamics.recording",
    "load_records": "lightning_dynamics.recording",
    "load_runs": "lightning_dynamics.recording",
    "read_records": "lightning_dynamics.recording",
    "report": "lightning_dynamics.recording.html",
}

__all__ = [
    "Branch",
    "DDPNoisyDescentStrategy",
    "DDPSAMStrategy",
    "DDPSamplingOrderStrategy",
    "Dashboard",
    "DisplacementMonitor",
    "GradientNoiseMonitor",
    "HessianMonitor",
    "NeuralCollapseMonitor",
    "NoisyDescentStrategy",
    "Probe",
    "Record",
    "RecordTable",
    "Reference",
    "RhoByLearningRate",
    "Run",
    "SAMMonitor",
    "SAMStrategy",
    "SamplingOrderStrategy",
    "Spectrum",
    "StochasticSharpnessMonitor",
    "batch_size_sweep",
    "compose_strategy",
    "edge_test",
    "figures",
    "load_records",
    "load_runs",
    "read_records",
    "report",
]


register()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
