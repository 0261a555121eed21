"""SAM against SGD: what does an uphill step before each gradient change?

A ReLU network learns digits by plain SGD, and by SAM with perturbations of several lengths ρ. ``HessianMonitor``
measures the sharpness of the whole training set at w, ``SAMMonitor`` what SAM sees of it: how much the loss of a batch
rises over the perturbation. At the end the last hidden layer's features are counted: the number of principal components
that hold 99 % of their variance.

    python examples/sam.py                 # TensorBoard events, dynamics.jsonl, a table, a picture
    python examples/sam.py --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import HessianMonitor, Probe, SAMMonitor, SAMStrategy
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, PALE, PURPLE, VERMILION

TRAINED_ON, LR, BATCH = 1_000, 0.1, 32
COLOURS = [GREY, BLUE, GREEN, VERMILION, PURPLE]


class Network(pl.LightningModule):
    """Half the squared distance to the one-hot label, summed over classes; plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
        self.net = nn.Sequential(hidden, nn.Linear(100, 10))

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        loss = (self.net(pixels) - F.one_hot(labels, 10)).square().sum(1).mean() / 2
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


class Run(NamedTuple):
    """What was trained, and what became of it."""

    rho: float
    seed: int
    loss: float
    error: float  # on samples that were not trained on
    variances: Tensor  # of the principal components of the last hidden layer, shares of their sum, descending
    hessian: HessianMonitor
    sam: SAMMonitor | None

    @property
    def sharpness(self) -> float:
        return self.hessian.history[-1].scalars["hessian/top_1"]

    @property
    def rank(self) -> int:
        """Principal components that hold 99 % of the variance."""
        return int((self.variances.cumsum(0) < 0.99).sum()) + 1

    @property
    def gap(self) -> float:
        """Mean rise of a batch's loss over the last quarter of the steps."""
        if self.sam is None:
            return float("nan")
        values = [record.scalars["sam/sharpness_gap"] for record in self.sam.history]
        return statistics.mean(values[-len(values) // 4 :])


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Samples to train on, and others."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32) / 16
    pixels = (pixels - pixels.mean(0)) / pixels.std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    here, there = order[:TRAINED_ON], order[TRAINED_ON:]
    return (pixels[here], torch.tensor(labels)[here]), (pixels[there], torch.tensor(labels)[there])


def train(rho: float, seed: int, epochs: int, folder: Path) -> Run:
    """Train with SAM, or without it for ρ = 0."""
    pl.seed_everything(seed, verbose=False)
    trained, others = digits()
    hessian = HessianMonitor(
        1, 0, every_n_epochs=max(1, epochs // 10), spectrum=False, probe=Probe(whole=True, batch_size=TRAINED_ON)
    )
    sam = SAMMonitor(every_n_train_steps=20) if rho else None
    module = Network()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        strategy=SAMStrategy(rho=rho) if rho else "auto",
        callbacks=[hessian] if sam is None else [hessian, sam],
        logger=TensorBoardLogger(folder, name=f"rho{rho:g}_seed{seed}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*trained), BATCH, shuffle=True))
    with torch.no_grad():
        features = module.net[0](trained[0])
        variances = torch.linalg.svdvals(features - features.mean(0)).square()
        wrong = (module.net(others[0]).argmax(1) != others[1]).float().mean()
    loss = float(trainer.callback_metrics["train_loss"])
    return Run(rho, seed, loss, float(wrong), variances / variances.sum(), hessian, sam)


def print_table(runs: Sequence[Run]) -> None:
    print(f"{'ρ':>5}{'seed':>6}{'λmax':>8}{'L(w+e) - L(w)':>15}{'rank':>6}{'loss':>9}{'test error':>12}")
    for run in runs:
        gap = "–" if run.sam is None else f"{run.gap:.4f}"
        numbers = f"{run.sharpness:>8.2f}{gap:>15}{run.rank:>6}{run.loss:>9.4f}{run.error:>12.2%}"
        print(f"{run.rho:>5g}{run.seed:>6}{numbers}")


def draw(runs: Sequence[Run], file: Path) -> None:
    """Sharpness and gap over the steps, and how many dimensions the features fill."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    sharpness, gap, rank = figure.subplots(1, 3)
    for run, colour in zip(runs, COLOURS, strict=False):
        label = f"ρ = {run.rho:g}" if run.rho else "SGD"
        points = [(r.step, r.scalars["hessian/top_1"]) for r in run.hessian.history]
        sharpness.plot(*zip(*points, strict=True), ".-", color=colour, lw=1.2, ms=5, label=label)
        if run.sam is not None:
            points = [(r.step, r.scalars["sam/sharpness_gap"]) for r in run.sam.history]
            gap.plot(*zip(*points, strict=True), color=colour, lw=0.8, label=label)
        rank.plot(range(1, 1 + len(run.variances)), 1 - run.variances.cumsum(0), color=colour, lw=1.5, label=label)
    sharpness.set(xlabel="step", ylabel="λmax", title=f"Sharpness of the training set at w; 2/η = {2 / LR:g}")
    sharpness.set_ylim(bottom=0)
    gap.set(xlabel="step", ylabel="L(w + e) - L(w)", yscale="log", title="What SAM sees: the rise over its step")
    gap.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
    gap.minorticks_off()
    rank.axhline(0.01, color=PALE, ls="--", lw=1)
    rank.text(1, 0.011, "1 %", color=GREY, ha="right", transform=rank.get_yaxis_transform())
    rank.set(xlabel="principal components", ylabel="variance left", yscale="log", ylim=(1e-4, 1))
    rank.set(title="Features of the last hidden layer")
    for axes in (sharpness, gap, rank):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rho", type=float, nargs="*", default=[0.0, 0.1, 0.4], help="0 for SGD")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    folder = options.folder / "sam"
    folder.mkdir(parents=True, exist_ok=True)

    runs = [train(rho, seed, options.epochs, folder) for seed in range(options.seeds) for rho in options.rho]
    print_table(runs)
    picture = folder / "sam.png"
    draw(runs[: len(options.rho)], picture)
    print(f"\nCurves      tensorboard --logdir {folder}    (open 'Custom Scalars', then 'Time Series')")
    for run in runs:
        print(f"Records     {run.hessian.record_path}    (ρ = {run.rho:g}, seed {run.seed})")
    print(f"Picture     {picture}")
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    main()
