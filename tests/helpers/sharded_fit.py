"""A fit whose weights are sharded over two processes, or not: a script, since Lightning starts it once per process."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.fit import fit, full_batch
from helpers.modules import Regression
from lightning_dynamics import DisplacementMonitor, Reference


class Sharded(Regression):
    """Layers whose rows do not divide by two, one of them projected."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Linear(4, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1)),
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.5),
        )

    def configure_model(self):
        mesh = getattr(self, "device_mesh", None)
        if mesh is None:
            return
        from torch.distributed._composable.fsdp import fully_shard

        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])


def main(folder, processes, monitor, resume):
    options = {}
    if processes == "2":
        options = {"devices": 2, "strategy": ModelParallelStrategy(2, 1, timeout=timedelta(seconds=60))}
    made = {
        "projection": lambda: DisplacementMonitor(
            every_n_train_steps=1, dimensions=31, reference=Reference(step=2), conserved=False
        ),
        "device": lambda: DisplacementMonitor(memory="device"),
    }[monitor]()
    keep = ModelCheckpoint(folder, filename=f"{processes}-{{step}}", save_top_k=-1, every_n_train_steps=1)
    ckpt_path = None if resume == "no" else resume
    trainer = fit(
        [made, keep],
        Sharded(),
        full_batch(24),
        max_epochs=6,
        default_root_dir=folder,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
        **options,
    )
    if trainer.is_global_zero:
        name = f"{processes}{'' if ckpt_path is None else '-resumed'}.json"
        Path(folder, name).write_text(json.dumps([[r.step, dict(r.scalars)] for r in made.history]))


if __name__ == "__main__":
    main(*sys.argv[1:])
