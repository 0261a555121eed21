"""Is training at the edge of its stability? Raise the learning rate, or lower the batch size, and see what happens.

A tanh network learns scikit-learn's digits by gradient descent. From one checkpoint well before the edge, and from one
at it, ``edge_test`` goes on: unchanged, at a higher learning rate, in smaller batches. Then ``batch_size_sweep`` shows
how much more curvature smaller batches feel at the edge.

    python examples/edge_test.py     # two tables, two pictures
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import HessianMonitor, Probe
from lightning_dynamics.experiments import BatchSizeSweep, Branch, EdgeTest, batch_size_sweep, edge_test

SAMPLES, LR = 1_024, 0.4
BRANCHES = {
    "η × 1.5": Branch(lr=1.5),
    "η × 2": Branch(lr=2.0),
    "b / 16": Branch(batch_size=1 / 16),
    "b / 128": Branch(batch_size=1 / 128),
}


def digits() -> TensorDataset:
    """Pixels centred one by one, and divided by the standard deviation of all."""
    data = load_digits()
    pixels = torch.tensor(data.data[:SAMPLES], dtype=torch.float64) / 16
    pixels = pixels - pixels.mean(0)
    return TensorDataset((pixels / pixels.std()).float(), torch.tensor(data.target[:SAMPLES]))


class Network(pl.LightningModule):
    """Half the squared distance to the one-hot label, summed over classes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 48, 48, 10)
        first, second, last = (nn.Linear(*shape) for shape in itertools.pairwise(sizes))
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        return (self.net(pixels) - F.one_hot(labels, 10)).square().sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR)


def loader() -> DataLoader:
    return DataLoader(DATA, SAMPLES)


def train(folder: Path, steps: int, checkpoint: Path | None = None) -> tuple[Path, float]:
    """Train up to a step; where its checkpoint lies, and how far from the edge it is."""
    pl.seed_everything(0, verbose=False)
    monitor = HessianMonitor(1, every_n_train_steps=10**6, probe=Probe(whole=True))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        callbacks=[monitor],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Network(), loader(), ckpt_path=None if checkpoint is None else str(checkpoint))
    path = folder / f"step_{steps}.ckpt"
    trainer.save_checkpoint(path)
    return path, monitor.history[-1].scalars["hessian/edge_ratio"]


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, EdgeTest], BatchSizeSweep]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=int, default=20, help="step of the checkpoint before the edge")
    parser.add_argument("--at", type=int, default=600, help="step of the checkpoint at the edge")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run")
    parser.add_argument("--draws", type=int, default=12, help="batches drawn of each size")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    folder = options.folder / "edge_test"
    folder.mkdir(parents=True, exist_ok=True)

    outcomes, checkpoint = {}, None
    for name, at in (("before", options.before), ("at", options.at)):
        checkpoint, ratio = train(folder, at, checkpoint)
        found = edge_test(
            Network, loader, checkpoint, BRANCHES, steps=options.steps, watch_every_n_steps=1, accelerator="cpu"
        )
        print(f"\nAfter {at} steps λmax is {ratio:.2f} of 2/η.\n{found}")
        found.figure().savefig(folder / f"{name}.png")
        outcomes[name] = found

    network = Network.load_from_checkpoint(checkpoint)
    sweep = batch_size_sweep(network, DATA, [2**i for i in range(2, 11)], draws=options.draws)
    print(f"\nCurvature by batch size, in the same place:\n{sweep}")
    sweep.figure().savefig(folder / "batch_size.png")
    print(f"\nPictures    {folder}")
    return outcomes, sweep


DATA = digits()

if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # more only wait for each other on so small a problem
    main()
