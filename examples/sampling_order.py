"""Drawing with replacement against reshuffling: the same network, the same start, another order of the samples.

A tanh network learns 512 digits by plain SGD at a constant step size, from each start twice in both orders, so that the
distance between the two kinds of runs can be told from that between runs of one kind. The loss of all samples is taken
after every epoch, its sharpness at the end.

    python examples/sampling_order.py              # two tables and a picture
    python examples/sampling_order.py --seeds 16   # smaller errors
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dynamics import HessianMonitor, Probe, SamplingOrderStrategy
from lightning_dynamics.recording.figures.style import BLUE, GREY, VERMILION

SAMPLES, BATCH, LR = 512, 8, 0.2
ORDERS = {"with_replacement": BLUE, "random_reshuffling": VERMILION}
LABELS = {"with_replacement": "with replacement", "random_reshuffling": "reshuffled"}


class Digits(Dataset):
    """Pixels centred one by one and divided by the standard deviation of all, with their labels."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images[:SAMPLES], dtype=torch.float64) / 16
        pixels = pixels - pixels.mean(0)
        self.pixels, self.labels = (pixels / pixels.std()).float(), torch.tensor(labels[:SAMPLES])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.pixels[row], self.labels[row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.pixels[rows], self.labels[rows]  # a batch at once


def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


class Network(pl.LightningModule):
    """Half the squared distance to the one-hot label, summed over classes; plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return (self.net(pixels) - F.one_hot(labels, 10)).square().sum(1).mean() / 2

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LR)


class AfterEpochs(pl.Callback):
    """Loss of all samples, and the weights."""

    def __init__(self, data: Digits) -> None:
        self.data, self.losses, self.weights = data, [], []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(pl_module.loss(self.data.pixels, self.data.labels)))
        self.weights.append(torch.cat([p.detach().double().flatten() for p in pl_module.parameters()]))


class Run(NamedTuple):
    """One training."""

    losses: list[float]  # after each epoch
    weights: Tensor  # after each epoch, shape (epochs, parameters)
    sharpness: float  # at the end

    @property
    def late_loss(self) -> float:
        """Mean over the last quarter of the epochs."""
        return statistics.mean(self.losses[-max(1, len(self.losses) // 4) :])


def train(order: str, seed: int, again: int, epochs: int) -> Run:
    """Train from the start of this seed; ``again`` is another draw of the order."""
    data = Digits()
    torch.manual_seed(seed)
    network, after = Network(), AfterEpochs(data)
    whole = Probe(whole=True, batch_size=SAMPLES)
    monitor = HessianMonitor(1, 0, every_n_epochs=epochs, spectrum=False, pair=False, probe=whole)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=SamplingOrderStrategy(order=order, order_seed=2 * seed + again),
        max_epochs=epochs,
        callbacks=[after, monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, DataLoader(data, BATCH, collate_fn=collate))
    return Run(after.losses, torch.stack(after.weights), monitor.history[-1].scalars["hessian/top_1"])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def distances(runs: dict[str, list[Run]]) -> dict[str, Tensor]:
    """Squared distances between runs of one start after each epoch, and that of the orders' means, without bias."""
    (a, b), (c, d) = ([run.weights for run in runs[order]] for order in ORDERS)
    within = {order: (x - y).square().sum(1) for order, (x, y) in zip(ORDERS, ((a, b), (c, d)), strict=True)}
    across = torch.stack([(x - y).square().sum(1) for x in (a, b) for y in (c, d)]).mean(0)
    # E‖x - y‖² is the squared distance of the means plus both variances, and within an order twice its variance
    return {**within, "across": across, "means": across - sum(within.values()) / 2}


def picture(starts: list[dict[str, list[Run]]], apart: list[dict[str, Tensor]]) -> Figure:
    figure = Figure(figsize=(8.6, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(starts[0]["with_replacement"][0].losses) + 1)
    for order, colour in ORDERS.items():
        losses = torch.tensor([[run.losses for run in start[order]] for start in starts]).mean(1)
        band(left, epochs, losses, colour, LABELS[order])
        band(right, epochs, torch.stack([one[order] for one in apart]), colour, f"two runs, {LABELS[order]}")
    band(right, epochs, torch.stack([one["means"] for one in apart]), GREY, "means of the two orders")
    left.set_ylabel("loss of all samples")
    right.set_ylabel("squared distance of the weights")
    right.axhline(0, color="black", linewidth=0.6)
    for axes in (left, right):
        axes.set_xlabel("epochs")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure


def band(axes, epochs: Sequence[int], values: Tensor, colour: str, label: str) -> None:
    """Mean over the starts, and two standard errors to each side."""
    mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
    axes.plot(epochs, mean, color=colour, linewidth=1.4, label=label)
    axes.fill_between(epochs, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, linewidth=0)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="starts, at least 2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    starts = [
        {order: [train(order, seed, again, options.epochs) for again in range(2)] for order in ORDERS}
        for seed in range(options.seeds)
    ]
    found: dict[str, tuple[float, float]] = {}
    print(
        f"{options.seeds} starts, each twice in both orders, {options.epochs} epochs; mean ± standard error of starts"
    )
    print(f"{'':34}{'with replacement':>20}{'reshuffled':>20}{'difference':>20}")
    rows = {"loss of all, last quarter": "late_loss", "sharpness of all, at the end": "sharpness"}
    for title, attribute in rows.items():
        each = {
            order: [statistics.mean(getattr(run, attribute) for run in start[order]) for start in starts]
            for order in ORDERS
        }
        values = [mean_and_error(one) for one in each.values()]
        difference = [b - a for a, b in zip(*each.values(), strict=True)]
        found[attribute] = mean_and_error(difference)
        print(f"{title:34}" + "".join(f"{f'{m:.4f} ± {e:.4f}':>20}" for m, e in (*values, found[attribute])))

    apart = [distances(start) for start in starts]
    print("\nSquared distance of the weights from one start")
    print(
        f"{'after':>8}" + "".join(f"{title:>24}" for title in ("two with replacement", "two reshuffled", "the means"))
    )
    for epoch in sorted({0, options.epochs // 4, options.epochs - 1}):
        row = {key: mean_and_error([float(one[key][epoch]) for one in apart]) for key in (*ORDERS, "means")}
        found[f"means after {epoch + 1}"] = row["means"]
        print(f"{epoch + 1:>8}" + "".join(f"{f'{m:.4f} ± {e:.4f}':>24}" for m, e in row.values()))

    path = options.folder / "sampling_order.png"
    picture(starts, apart).savefig(path)
    print(f"\nPicture     {path}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a problem
    main()
