"""The edge of stochastic stability: what hovers at 2/η in mini-batch training is not the sharpness of the whole loss.

A tanh network learns 1,024 digits by plain SGD, with several batch sizes and step sizes. ``HessianMonitor`` measures
the sharpness of the whole training set, ``StochasticSharpnessMonitor`` what single mini-batches feel, and
``GradientNoiseMonitor`` how large their noise is. With large steps Batch Sharpness comes near 2/η, and the sharpness
stays below; with small steps training is done before. The largest step diverges with most seeds: those are counted, and
the next seed is taken.

    python examples/stochastic_sharpness.py                        # TensorBoard events, CSVs, dynamics.jsonl, a picture
    python examples/stochastic_sharpness.py --seeds 2 --smaller    # and more runs
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dynamics import GradientNoiseMonitor, HessianMonitor, Probe, StochasticSharpnessMonitor
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, VERMILION

SAMPLES = 1_024
LARGE = [(32, 0.5), (8, 0.8)]  # batch size and step size
SMALLER = [(8, 0.5), (8, 0.3), (8, 0.1), (32, 0.2)]
DIVERGED = 1e3  # loss
LINE = {"fmt": ".-", "lw": 1.2, "ms": 5}
COLUMNS = {
    "λmax, all": "hessian/edge_ratio",
    "λmax, draws": "sharpness/top_1",
    "Batch Sharp.": "sharpness/batch_sharpness",
    "of means": "sharpness/batch_sharpness_of_means",
    "MiniBS": "sharpness/minibatch_top_1",
    "balance": "sharpness/balance_ratio",
    "update edge": "sharpness/update_edge",
    "signal/noise": "noise/signal_to_noise",
}
IN_UNITS_OF_THE_EDGE = {f"sharpness/{key}" for key in ("top_1", "batch_sharpness", "batch_sharpness_of_means", "gap")}
IN_UNITS_OF_THE_EDGE.add("sharpness/minibatch_top_1")


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


class Network(pl.LightningModule):
    """Half the squared distance to the one-hot label, summed over classes; plain SGD."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        first, second, last = (nn.Linear(*shape) for shape in pairwise((64, 48, 48, 10)))
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        loss = (self.net(pixels) - F.one_hot(labels, 10)).square().sum(1).mean() / 2
        self.log("train_loss", loss)
        if not loss < DIVERGED:
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class Run(NamedTuple):
    """What was trained, and what the monitors measured."""

    batch_size: int
    lr: float
    seed: int
    steps: int  # fewer than asked for where it diverged
    monitors: tuple[HessianMonitor, StochasticSharpnessMonitor, GradientNoiseMonitor]

    @property
    def name(self) -> str:
        return f"b = {self.batch_size}, η = {self.lr:g}"

    def points(self, key: str) -> list[tuple[int, float, float]]:
        """Step, value and error at all points that have the quantity; curvatures in units of 2/η."""
        unit = 2 / self.lr if key in IN_UNITS_OF_THE_EDGE else 1.0
        (monitor,) = (each for each in self.monitors if each.table.family == key.partition("/")[0])
        return [
            (record.step, record.scalars[key] / unit, record.errors.get(key, 0.0) / unit)
            for record in monitor.history
            if key in record.scalars
        ]

    def late(self, key: str) -> tuple[float, float] | None:
        """Mean over the last quarter, and the mean error: the draws are the same, so that errors do not average out."""
        found = [(value, error) for step, value, error in self.points(key) if 0.75 * self.steps < step]
        if key == "sharpness/balance_ratio":
            found = found[-1:]  # it is an average over time itself
        if not found:
            return None
        value, error = (statistics.mean(each) for each in zip(*found, strict=True))
        return value, error


def train(batch_size: int, lr: float, seed: int, steps: int, draws: int, folder: Path) -> Run:
    """Train, and measure 24 times; what is dear each second time."""
    pl.seed_everything(seed, verbose=False)
    name = f"b{batch_size}_lr{lr:g}_seed{seed}"
    every = max(1, steps // 24) | 1  # odd: at the edge the sharpness alternates

    drawn = {"every_n_train_steps": every, "probe": Probe(draws=draws), "engine": "kept"}
    monitors = (
        HessianMonitor(1, 0, every_n_train_steps=every, spectrum=False, probe=Probe(whole=True, batch_size=SAMPLES)),
        StochasticSharpnessMonitor(eigenvalues_every_n_train_steps=2 * every, solved=draws // 4, window=3, **drawn),
        GradientNoiseMonitor(samples=False, directions=0, **drawn),
    )

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        callbacks=list(monitors),
        logger=[TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")],
        log_every_n_steps=100,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Network(lr), DataLoader(Digits(), batch_size, shuffle=True, collate_fn=as_it_is))
    return Run(batch_size, lr, seed, trainer.global_step, monitors)


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def train_several(batch_size: int, lr: float, seeds: int, tries: int, steps: int, **options) -> list[Run]:
    """One run after the other, seed by seed, until so many did not diverge."""
    runs: list[Run] = []
    diverged: dict[int, int] = {}
    for seed in range(tries):
        run = train(batch_size, lr, seed, steps, **options)
        if run.steps < steps:
            diverged[seed] = run.steps
        else:
            runs.append(run)
        if len(runs) == seeds:
            break
    if diverged:
        where = ", ".join(f"{seed} after {at}" for seed, at in diverged.items())
        print(f"b = {batch_size}, η = {lr:g}: {len(diverged)} of {seed + 1} seeds diverged, in steps: {where}")
    return runs


def print_table(runs: Sequence[Run]) -> None:
    print("\nMean over the last quarter ± standard error; curvatures in units of 2/η")
    print(f"{'':>15}{'seed':>5}" + "".join(f"{name:>13}" for name in COLUMNS))
    for run in runs:
        cells = "".join(f"{cell(run.late(key)):>13}" for key in COLUMNS.values())
        print(f"{run.name:>15}{run.seed:>5}{cells}")
    print("Lowest and highest Batch Sharpness of a point in the last quarter")
    for run in runs:
        values = [value for step, value, _ in run.points("sharpness/batch_sharpness") if 0.75 * run.steps < step]
        print(f"{run.name:>15}{run.seed:>5}{min(values):>13.2f}{max(values):>13.2f}")


def cell(late: tuple[float, float] | None) -> str:
    if late is None:
        return "–"
    value, error = late
    return f"{value:.2f} ± {error:.2f}" if error >= 0.005 else f"{value:.2f}"


def draw(runs: Sequence[Run], file: Path) -> None:
    """What hovers where, for each of the runs, and the noise of all of them."""
    figure = Figure(figsize=(12.5, 3.8), layout="constrained")
    *edges, noise = figure.subplots(1, len(runs) + 1)
    curves = {
        "MiniBS": ("sharpness/minibatch_top_1", GREEN),
        "Batch Sharpness": ("sharpness/batch_sharpness", VERMILION),
        "λmax of all": ("hessian/edge_ratio", BLUE),
    }
    for run, axes in zip(runs, edges, strict=True):
        for label, (key, colour) in curves.items():
            steps, values, errors = zip(*run.points(key), strict=True)
            axes.errorbar(
                steps, values, [2 * each for each in errors], fmt=".-", color=colour, lw=1.2, ms=5, label=label
            )
        axes.axhline(1, color=GREY, ls="--", lw=1)
        axes.text(1, 1.04, "2/η", color=GREY, ha="right", transform=axes.get_yaxis_transform())
        axes.set(xlabel="step", title=run.name)
    highest = max(axes.get_ylim()[1] for axes in edges)
    for axes in edges:
        axes.set_ylim(0, highest)
    edges[0].set_ylabel("curvature in units of 2/η")
    edges[-1].legend(frameon=False, fontsize=9)
    for run, colour in zip(runs, (BLUE, VERMILION), strict=False):
        steps, values, errors = zip(*run.points("noise/signal_to_noise"), strict=True)
        noise.errorbar(
            steps, values, [2 * each for each in errors], fmt=".-", color=colour, lw=1.2, ms=5, label=run.name
        )
    noise.set(xlabel="step", ylabel="‖g‖²/tr Cov g_B", yscale="log", title="Signal and noise of a mini-batch")
    noise.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    noise.legend(frameon=False, fontsize=9)
    for axes in (*edges, noise):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12_000, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=1, help="how many runs with large steps that do not diverge")
    parser.add_argument("--tries", type=int, default=30, help="seeds tried for these at most")
    parser.add_argument("--draws", type=int, default=64, help="mini-batches that everything is averaged over")
    parser.add_argument("--smaller", action="store_true", help="also train with smaller steps")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    folder = options.folder / "stochastic_sharpness"
    folder.mkdir(parents=True, exist_ok=True)

    same = {"steps": options.steps, "draws": options.draws, "folder": folder}
    large = [train_several(*each, options.seeds, options.tries, **same) for each in LARGE]
    smaller = [train(*each, 0, **same) for each in SMALLER] if options.smaller else []
    runs = [run for some in large for run in some] + smaller
    if not runs:
        print("All of them diverged.")
        return runs
    print_table(runs)

    picture = folder / "stochastic_sharpness.png"
    draw([some[0] for some in large if some], picture)
    print(f"\nCurves      tensorboard --logdir {folder}    (open 'Custom Scalars', then 'Time Series')")
    for run in runs:
        print(f"Records     {run.monitors[0].record_path}    ({run.name}, seed {run.seed})")
    print(f"Picture     {picture}")
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    main()
