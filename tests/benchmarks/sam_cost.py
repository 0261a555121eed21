"""The step of SAM in units of the step of its base optimizer, side by side.

python tests/benchmarks/sam_cost.py [--batch 250] [--rounds 9]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from workloads import workloads

from lightning_dynamics import SAMStrategy

STEPS = 4
"""Steps in a block; blocks of the strategies take turns."""


class Net(pl.LightningModule):
    """A module whose blocks of steps are timed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Times(pl.Callback):
    """When each batch began and ended."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self._start)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name, module and shape of a sample."""
    return {
        name.partition(", batch")[0]: (net, tuple(batch[0].shape[1:]))
        for name, (net, batch) in workloads().items()
        if batch[0].is_floating_point()
    }


def block(net: nn.Module, shape: tuple[int, ...], batch: int, strategy: Any, steps: int) -> list[float]:
    """Seconds of each step after the first."""
    times = Times()
    data = TensorDataset(torch.randn(batch, *shape), torch.randint(0, 10, (batch,)))
    trainer = pl.Trainer(
        max_steps=steps + 1, strategy=strategy, callbacks=[times], logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Net(net), DataLoader(data, batch))
    return times.steps[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    variants: dict[str, dict[str, Any]] = {
        "SAM": {},
        "ASAM": {"variant": "asam"},
        "GSAM": {"variant": "gsam"},
        "m-SAM, 5 parts": {"m": options.batch // 5},
        "every 5th step": {"every_k": 5},
    }
    for name, (net, shape) in networks().items():
        print(f"{name}, batch {options.batch}: in steps of SGD, median of {options.rounds} paired blocks")
        ratios: dict[str, list[float]] = {variant: [] for variant in variants}
        steps = STEPS + 1  # five, of which every_k=5 has one with a second gradient
        block(net, shape, options.batch, "auto", 2)
        for _ in range(options.rounds):
            base = statistics.mean(block(net, shape, options.batch, "auto", steps))
            for variant, chosen in variants.items():
                sharp = statistics.mean(block(net, shape, options.batch, SAMStrategy(**chosen), steps))
                ratios[variant].append(sharp / base)
        for variant, found in ratios.items():
            low, high = min(found), max(found)
            print(f"  {variant:16} {statistics.median(found):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
