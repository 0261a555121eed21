"""A fit with SAM whose weights are sharded over two processes, or not: a script, started once per process."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.fit import fit, full_batch
from helpers.sharded_fit import Sharded
from lightning_dynamics import SAMStrategy, compose_strategy


class Saves(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in pl_module.parameters()]
        if trainer.is_global_zero:
            torch.save([[w.detach() for w in whole], trainer.strategy.last_step.gradient_norm], self.path)


def main(folder, processes, variant):
    sam = {"rho": 0.3, "variant": variant, "perturbation": "global"}
    options = {"strategy": SAMStrategy(**sam)}
    if processes == "2":
        strategy = compose_strategy(
            ModelParallelStrategy, sam=sam, data_parallel_size=2, tensor_parallel_size=1, timeout=timedelta(seconds=60)
        )
        options = {"devices": 2, "strategy": strategy}
    fit(
        [Saves(Path(folder, f"{processes}.pt"))],
        Sharded(),
        full_batch(24),
        max_epochs=6,
        default_root_dir=folder,
        **options,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
