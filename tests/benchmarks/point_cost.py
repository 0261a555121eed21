"""What points cost in products: the table of docs/howto/cadence.md.

    python tests/benchmarks/point_cost.py

Counts the products of whole fits (a 64-48-48-10 network with tanh on 1,000 digits, full-batch gradient descent at 0.2,
200 steps), and prints medians and ranges over the points after the first.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import HessianMonitor, Probe, Spectrum

WHOLE = Probe(whole=True)
NEVER: dict[str, Any] = {"probe": WHOLE, "spectrum": False}
ROWS: dict[str, dict[str, Any]] = {
    "`HessianMonitor()`": NEVER,
    "`pair=False`": {**NEVER, "pair": False},
    "`top_k=1, bottom_k=0`": {**NEVER, "top_k": 1, "bottom_k": 0},
    "`top_k=10`": {**NEVER, "top_k": 10},
    "`sharpening_rate=True`": {**NEVER, "sharpening_rate": True},
    '`operator="gauss_newton"`': {**NEVER, "operator": "gauss_newton", "output_fn": "net"},
    "a point with its whole spectrum": {"probe": WHOLE, "spectrum": Spectrum(20)},
}
"""What is varied, as the table calls it."""


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.2)


def products(samples: int = 1000, steps: int = 200, every: int = 20, **options: Any) -> list[int]:
    """Products of each point of a fit, the first and the last one included."""
    digits = load_digits()
    x = torch.tensor(digits.data[:samples], dtype=torch.float32) / 16
    data = TensorDataset(x, torch.tensor(digits.target[:samples]))
    monitor = HessianMonitor(every_n_train_steps=every, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Digits(), DataLoader(data, samples))
    return [record.notes["products"] for record in monitor.history]


def main() -> None:
    print("| setting | first point | later points, median | least | most |")
    print("|---|---|---|---|---|")
    for name, options in ROWS.items():
        first, *later = products(**options)
        later = later[:-1]  # the last one stands alone, without the second step of its pair
        print(f"| {name} | {first} | {median(later):g} | {min(later)} | {max(later)} |")


if __name__ == "__main__":
    main()
