"""Neural collapse: features gather at their class means, the more so the deeper the layer and the longer the training.

A network of five hidden layers learns 1,500 digits and is trained on for many times as long as it takes to get them all
right. The only line that has to do with lightning_dynamics is the one with the ``NeuralCollapseMonitor``. The same for
five seeds; and a random layer beside it, which nc1 takes for collapsed and CDNV does not.

    python examples/neural_collapse.py       # TensorBoard events, a CSV, dynamics.jsonl and a picture
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import NeuralCollapseMonitor, Probe, Record
from lightning_dynamics.metrics import ClassSums, ScatterSums, collapse_measures

CLASSES, PER_CLASS = 10, 150
MEASURES = ("nc1", "cdnv", "nc2_equinorm", "nc2_equiangular", "nc3", "nc4")


class Classifier(pl.LightningModule):
    """Five hidden layers with batch norm, trained with SGD whose step size falls tenfold at each third of the time."""

    def __init__(self, epochs: int, weight_decay: float, width: int = 128) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = [64] + 5 * [width]
        blocks = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
        self.net = nn.Sequential(*blocks, nn.Linear(width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=self.hparams.weight_decay)
        epochs = self.hparams.epochs
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 3, 2 * epochs // 3], gamma=0.1)
        return [optimizer], [schedule]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits that come with scikit-learn: the first 150 of each for training, the other 297 for validation."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    images = images - images.mean()
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        chosen[(labels == digit).nonzero()[:PER_CLASS, 0]] = True
    return TensorDataset(images[chosen], labels[chosen]), TensorDataset(images[~chosen], labels[~chosen])


def train(seed: int, epochs: int, every: int, weight_decay: float, folder: Path) -> NeuralCollapseMonitor:
    """Train with one seed; return the monitor with its measurements."""
    pl.seed_everything(seed)
    training, validation = digits()
    name = f"collapse_seed_{seed}"

    monitor = NeuralCollapseMonitor(
        every_n_epochs=every,
        probe=Probe(whole=True, batch_size=500),
        validation=Probe(split="validation", whole=True, batch_size=500),
    )

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[monitor],
        logger=[TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")],
        log_every_n_steps=15,
        check_val_every_n_epoch=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        Classifier(epochs, weight_decay),
        DataLoader(training, batch_size=100, shuffle=True),
        DataLoader(validation, batch_size=500),
    )
    return monitor


def start_of_terminal_phase(history: Sequence[Record]) -> Record | None:
    """The first measurement at which the network gets every sample of the training set right."""
    return next((record for record in history if record.scalars["collapse/accuracy"] == 1), None)


def order_of_depth(record: Record) -> float:
    """Spearman's rank correlation of CDNV with the number of the layer: -1 if each layer has less than that before."""
    values = list(record.through_depth("collapse/cdnv").values())
    return float(spearmanr(range(len(values)), values).statistic)


def print_run(history: Sequence[Record]) -> None:
    """The measures of the last layer at three times, and those of all layers at the end."""
    start = start_of_terminal_phase(history)
    times = {f"epoch {history[0].epoch}": history[0]}
    if start is not None:
        times[f"epoch {start.epoch}, 0 errors"] = start
    times["the end"] = history[-1]
    print(f"{'last layer':<20}" + "".join(f"{name:>22}" for name in times))
    for key in (*MEASURES, "nc4_validation", "accuracy", "accuracy_validation"):
        print(f"{key:<20}" + "".join(f"{record.scalars[f'collapse/{key}']:22.4g}" for record in times.values()))
    for name, record in times.items():
        size = len(record.notes["layers"])
        print(f"\n{name + ', by layer':<28}" + "".join(f"{i + 1:>10}" for i in range(size)))
        rows = {key: record.through_depth(f"collapse/{key}") for key in ("nc1", "nc1_floor", "cdnv", "ncc_accuracy")}
        rows["± of nc1_floor"] = record.through_depth("collapse/nc1_floor", errors=True)
        for key in ("nc1", "nc1_floor", "± of nc1_floor", "cdnv", "ncc_accuracy"):
            print(f"{key:<28}" + "".join(f"{value:10.3g}" for value in rows[key].values()))


def print_seeds(histories: dict[int, list[Record]]) -> None:
    """From the start of the terminal phase to the end, and CDNV through depth, for each seed."""
    for seed, history in histories.items():
        start, end = start_of_terminal_phase(history), history[-1]
        by_layer = " ".join(f"{value:.2g}" for value in end.through_depth("collapse/cdnv").values())
        print(f"\nSeed {seed}: CDNV by layer {by_layer}; rank correlation with depth {order_of_depth(end):.2f}")
        if start is None:
            print("There are errors on the training set to the end.")
            continue
        print(f"From epoch {start.epoch}, the first without errors, to the end:")
        before, after = ({key: record.scalars[f"collapse/{key}"] for key in MEASURES} for record in (start, end))
        for keys in (("nc1", "nc3", "nc4"), ("nc2_equinorm", "nc2_equiangular")):
            print("    " + "   ".join(f"{key} {before[key]:.2g} → {after[key]:.2g}" for key in keys))


def random_layer(width: int = 20_000) -> dict[str, float]:
    """Cosines of random directions, so steep that no two digits are alike: they know the classes of nothing new."""
    generator = torch.Generator().manual_seed(0)
    directions = 10 * torch.randn(64, width, generator=generator)
    phases = 2 * math.pi * torch.rand(width, generator=generator)
    training, validation = digits()

    def features(images: Tensor) -> Tensor:
        return torch.cos(images @ directions + phases)

    sums = ClassSums(CLASSES)
    sums.update(features(training.tensors[0]), training.tensors[1])
    found = {}
    for data in (training, validation):
        scatter = ScatterSums(sums.centers())
        scatter.update(features(data.tensors[0]), data.tensors[1])
        found[data] = collapse_measures(scatter)
    return {
        **found[training].values,
        "nc1_floor_error": found[training].errors["nc1_floor"],
        "ncc_accuracy_validation": found[validation].values["ncc_accuracy"],
    }


def draw(histories: dict[int, list[Record]], random: dict[str, float], file: Path) -> None:
    """The measures of the last layer over epochs, and CDNV and nc1 through depth for each seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time, depth, noise) = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    first = next(iter(histories.values()))
    start = start_of_terminal_phase(first)
    curves = {"nc1": "#0072B2", "nc2_equinorm": "#D55E00", "nc2_equiangular": "#E69F00", "nc3": "#009E73"}
    batches = first[-1].step / (first[-1].epoch + 1)
    for key, colour in curves.items():
        values = [record.scalars[f"collapse/{key}"] for record in first]
        time.plot([record.step / batches for record in first], values, color=colour, lw=1.5, label=key)
    if start is not None:
        time.axvline(start.epoch, color="0.4", ls="--", lw=1)
        time.text(start.epoch, 0.03, " no errors", color="0.4", fontsize=9, transform=time.get_xaxis_transform())
    time.set(xlabel="epoch", yscale="log", title="Last layer")
    time.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.95))
    for axes, key in ((depth, "cdnv"), (noise, "nc1")):
        for history in histories.values():
            for record, colour in ((history[0], "#999999"), (history[-1], "#0072B2")):
                values = list(record.through_depth(f"collapse/{key}").values())
                axes.plot(range(1, len(values) + 1), values, ".-", color=colour, lw=1, ms=6)
        axes.axhline(random[key], color="#D55E00", ls=":", lw=1.5)
        axes.set(xlabel="layer", ylabel=key, yscale="log", xticks=range(1, len(values) + 1))
    handles = [
        plt.Line2D([], [], color=colour, ls=style)
        for colour, style in (("#999999", "-"), ("#0072B2", "-"), ("#D55E00", ":"))
    ]
    depth.legend(handles, ["before training", "at the end", "random layer"], frameon=False, fontsize=9)
    depth.set(title=f"CDNV through depth, {len(histories)} seeds")
    noise.set(title="nc1 through depth")
    for axes in (time, depth, noise):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> tuple[dict[int, list[Record]], dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each run")
    parser.add_argument("--every", type=int, default=2, help="epochs between measurements")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs, with seeds that follow one another")
    parser.add_argument("--weight-decay", type=float, default=5e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    monitors = {
        seed: train(seed, options.epochs, options.every, options.weight_decay, options.folder)
        for seed in range(options.seed, options.seed + options.seeds)
    }
    histories = {seed: monitor.history for seed, monitor in monitors.items()}
    print()
    print_run(histories[options.seed])
    print_seeds(histories)
    random = random_layer()
    right, right_of_new = random["ncc_accuracy"], random["ncc_accuracy_validation"]
    print(
        f"\nA random layer: nc1 {random['nc1']:.3g} (noise alone: {random['nc1_floor']:.1g} ± "
        f"{random['nc1_floor_error']:.1g}), CDNV {random['cdnv']:.3g}\n"
        f"The nearest centre is right for {right:.0%} of the training set and for {right_of_new:.0%} of other digits."
    )

    picture = options.folder / "neural_collapse.png"
    draw(histories, random, picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}    (open 'Custom Scalars', then 'Time Series')")
    for seed, monitor in monitors.items():
        print(f"Records     {monitor.record_path}    (seed {seed})")
    print(f"Tables      {options.folder}/collapse_seed_*_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    return histories, random


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    main()
