"""Short fits on the CPU."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

from helpers.modules import Regression, regression_data


def fit(monitors: Any, module: Any = None, data: Any = None, *, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """Fit a module (a linear regression in one batch by default) with these monitors, silently and without files."""
    module = Regression() if module is None else module
    data = full_batch() if data is None else data
    callbacks = monitors if isinstance(monitors, list) else [monitors]
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **options,
        }
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def full_batch(n: int = 24, **arguments: Any) -> DataLoader:
    return DataLoader(TensorDataset(*regression_data(n)), batch_size=n, **arguments)


def mini_batches(n: int = 24, batch_size: int = 8, **arguments: Any) -> DataLoader:
    return DataLoader(TensorDataset(*regression_data(n)), batch_size=batch_size, **arguments)
