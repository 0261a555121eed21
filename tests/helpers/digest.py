"""A fit, and everything about it that a user could notice afterwards."""

from __future__ import annotations

import csv
import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from helpers.state import module_state

OURS = (
    "hessian",
    "preconditioned",
    "gauss_newton",
    "residual",
    "fisher",
    "empirical_fisher",
    "collapse",
    "displacement",
    "noise",
    "sharpness",
    "sam/",
    "sam_",
    "dynamics/",
)


def digest(trainer: Trainer, module: Any, folder: Path, dataset: Any = None) -> dict[str, Any]:
    """Weights, buffers, gradients, attributes, optimizer, generators, logged values, metrics, progress, data order."""
    optimizers = io.BytesIO()
    torch.save([optimizer.state_dict() for optimizer in trainer.optimizers], optimizers)
    return {
        **module_state(module),
        "optimizers": hashlib.sha1(optimizers.getvalue()).hexdigest(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "torch": torch.get_rng_state(),
        "logged": user_rows(folder / "metrics.csv"),
        "callback_metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(OURS)},
        "progress": str(trainer.fit_loop.state_dict()),
        "global_step": trainer.global_step,
        "trainer": vars(trainer).get("seen_by_user"),
        "stopped": trainer.should_stop,
        "order": list(getattr(module, "order", [])),
        "last": None
        if getattr(module, "last", None) is None
        else (float(module.last.detach()), module.last.requires_grad),
        "checkpoints": sorted(path.name for path in folder.glob("*.ckpt")),
        "reads": None if dataset is None else (dataset.reads, dataset.generator.get_state()),
    }


def user_rows(path: Path) -> list[dict[str, str]]:
    """What the user's own code logged, without our columns and the rows that hold nothing else."""
    if not path.exists():
        return []
    with path.open() as stream:
        rows = [{k: v for k, v in row.items() if not k.startswith(OURS)} for row in csv.DictReader(stream)]
    return [row for row in rows if any(v for k, v in row.items() if k not in ("step", "epoch"))]
