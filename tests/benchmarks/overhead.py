"""What the default monitors cost the quickstart, and what a monitor costs a step at which nothing is due.

python tests/benchmarks/overhead.py
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from quickstart import DigitNet, digits, full_batches

from lightning_dynamics import HessianMonitor

STEPS = 2000


def fit(monitors: list[pl.Callback], steps: int) -> float:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=monitors, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    data = full_batches(digits())
    start = time.perf_counter()
    trainer.fit(DigitNet(0.2), data)
    return time.perf_counter() - start


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    fit([], 100)
    shares = []
    for _ in range(3):
        without = fit([], STEPS)
        monitor = HessianMonitor()
        with_monitor = fit([monitor], STEPS)
        measuring = sum(record.seconds for record in monitor.history)
        shares.append((with_monitor / without - 1, measuring / without, len(monitor.history)))
    print(f"quickstart, {STEPS} steps, HessianMonitor(): ", end="")
    print(f"{statistics.median(s[0] for s in shares):+.1%} of the time without it; ", end="")
    print(f"{statistics.median(s[1] for s in shares):.1%} in measurements, {shares[0][2]} points")
    idle = []
    for _ in range(5):
        without, with_monitor = fit([], 500), HessianMonitor(1, 0, every_n_train_steps=10**6, pair=False)
        total = fit([with_monitor], 500) - sum(record.seconds for record in with_monitor.history)
        idle.append((total - without) / 500)
    print(f"a step at which nothing is due: {1e6 * statistics.median(idle):+.0f} µs (noise is of that size)")


if __name__ == "__main__":
    main()
