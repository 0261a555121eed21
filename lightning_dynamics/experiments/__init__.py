"""What one runs instead of attaching it: a test of causes, a sweep. Each leaves the caller's state as it was."""

from lightning_dynamics.experiments.forking import Branch, EdgeTest, Run, edge_test
from lightning_dynamics.experiments.sweeping import BatchSizeSweep, batch_size_sweep

__all__ = ["BatchSizeSweep", "Branch", "EdgeTest", "Run", "batch_size_sweep", "edge_test"]
