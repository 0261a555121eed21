"""See how training moves: monitors for a Lightning Trainer that leave the run as it was, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dynamics.callbacks import (
        DisplacementMonitor,
        GradientNoiseMonitor,
        HessianMonitor,
        NeuralCollapseMonitor,
        Probe,
        Reference,
        Spectrum,
        StochasticSharpnessMonitor,
    )
    from lightning_dynamics.experiments import Branch, batch_size_sweep, edge_test
    from lightning_dynamics.recording import Record, read_records

__version__ = "0.1.0.dev0"

# loaded on first use, so that `linalg`, `objective` and `metrics` work where Lightning is not
_PUBLIC = {
    "Branch": "lightning_dynamics.experiments",
    "DisplacementMonitor": "lightning_dynamics.callbacks",
    "GradientNoiseMonitor": "lightning_dynamics.callbacks",
    "HessianMonitor": "lightning_dynamics.callbacks",
    "NeuralCollapseMonitor": "lightning_dynamics.callbacks",
    "Probe": "lightning_dynamics.callbacks",
    "Record": "lightning_dynamics.recording",
    "Reference": "lightning_dynamics.callbacks",
    "Spectrum": "lightning_dynamics.callbacks",
    "StochasticSharpnessMonitor": "lightning_dynamics.callbacks",
    "batch_size_sweep": "lightning_dynamics.experiments",
    "edge_test": "lightning_dynamics.experiments",
    "read_records": "lightning_dynamics.recording",
}

__all__ = [
    "Branch",
    "DisplacementMonitor",
    "GradientNoiseMonitor",
    "HessianMonitor",
    "NeuralCollapseMonitor",
    "Probe",
    "Record",
    "Reference",
    "Spectrum",
    "StochasticSharpnessMonitor",
    "batch_size_sweep",
    "edge_test",
    "read_records",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
