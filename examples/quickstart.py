"""Watch the sharpness of a network climb to the edge of stability, and stay there.

A small convolutional network learns 1,000 handwritten digits by full-batch gradient descent, once with a large step
and, as a control, once with a small one. The only line that has to do with lightning_dynamics is the one with the
``HessianMonitor``. The same with your own module: leave everything as it is and add that line.

    python examples/quickstart.py            # TensorBoard events, a CSV, dynamics.jsonl and a picture
    python examples/quickstart.py --wandb    # and a W&B run, kept offline
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler

from lightning_dynamics import HessianMonitor, Probe, Record


class DigitNet(pl.LightningModule):
    """A convolutional network with half the squared error to one-hot labels as its loss."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        error = self.net(images) - F.one_hot(labels, 10)
        loss = 0.5 * error.square().sum(dim=1).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


def digits() -> list[tuple[torch.Tensor, int]]:
    """The first 1,000 digits that come with scikit-learn: 8 x 8 pixels between 0 and 1, less their mean."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:1000], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return list(zip(images - images.mean(), labels[:1000].tolist(), strict=True))


def full_batches(data: list[tuple[torch.Tensor, int]]) -> DataLoader:
    """All of the data in each batch; an epoch is 25 of them, since Lightning does a lot at the end of an epoch."""
    return DataLoader(data, batch_size=len(data), sampler=RandomSampler(data, num_samples=25 * len(data)))


def train(learning_rate: float, steps: int, every: int, folder: Path, wandb: bool) -> HessianMonitor:
    """Train with one step size; return the monitor with its measurements."""
    pl.seed_everything(0)
    name = f"step_size_{learning_rate:g}"
    loggers = [TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")]
    if wandb:
        loggers.append(WandbLogger(name, save_dir=folder, project="lightning_dynamics_quickstart", offline=True))

    monitor = HessianMonitor(every_n_train_steps=every, spectrum=False, probe=Probe(whole=True))

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=loggers,
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(learning_rate), full_batches(digits()))
    if wandb:
        loggers[-1].experiment.finish()
    return monitor


def print_table(history: list[Record], rows: int = 9) -> None:
    """Some of the measurements, the first and the last included."""
    print(f"{'step':>6} {'loss':>9} {'top eigenvalue':>15} {'threshold 2/η':>14} {'edge ratio':>11}")
    for record in [*history[: -1 : -(-len(history) // rows)], history[-1]]:
        loss, top, threshold, ratio = (
            record.scalars[f"hessian/{key}"] for key in ("probe_loss", "top_1", "stability_threshold", "edge_ratio")
        )
        print(f"{record.step:6d} {loss:9.4f} {top:15.3f} {threshold:14.1f} {ratio:11.3f}")


def draw(histories: dict[float, list[Record]], file: Path) -> None:
    """Top eigenvalues with their thresholds, and the loss, over the steps of training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (sharpness, loss) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (rate, history), colour in zip(histories.items(), ("#0072B2", "#D55E00"), strict=True):
        steps = [record.step for record in history]
        threshold = history[-1].scalars["hessian/stability_threshold"]
        tops = [record.scalars["hessian/top_1"] for record in history]
        sharpness.plot(steps, tops, ".-", color=colour, ms=5)
        sharpness.axhline(threshold, color=colour, ls="--", lw=1)
        sharpness.text(0, threshold * 1.04, f"2/η = {threshold:g} at step size {rate:g}", color=colour, fontsize=9)
        losses = [record.scalars["hessian/probe_loss"] for record in history]
        loss.plot(steps, losses, ".-", color=colour, ms=5, label=f"step size {rate:g}")
    sharpness.set(xlabel="step", ylabel="top Hessian eigenvalue λ₁", yscale="log", title="Sharpness climbs to its edge")
    sharpness.set_yticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    loss.set(xlabel="step", ylabel="loss on the training set", yscale="log", title="Loss")
    loss.set_yticks([0.1, 0.2, 0.4, 0.6], ["0.1", "0.2", "0.4", "0.6"])
    loss.legend(frameon=False)
    for axes in (sharpness, loss):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wandb", action="store_true", help="also write a W&B run, kept offline")
    parser.add_argument(
        "--steps", type=int, default=750, help="steps of gradient descent; the control takes half as many"
    )
    parser.add_argument("--step-size", type=float, default=0.2, help="step size of the run that reaches the edge")
    parser.add_argument("--control", type=float, default=0.05, help="step size of the run that does not")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    monitors = {
        options.step_size: train(options.step_size, options.steps, 30, options.folder, options.wandb),
        options.control: train(options.control, options.steps // 2, 125, options.folder, options.wandb),
    }
    histories = {rate: monitor.history for rate, monitor in monitors.items()}
    for rate, history in histories.items():
        print(f"\nGradient descent with step size {rate:g}")
        print_table(history)
        ratios = [record.scalars["hessian/edge_ratio"] for record in history]
        crossing = next((i for i, ratio in enumerate(ratios) if ratio >= 1), None)
        if crossing is None:
            print(f"Below the edge to the end: the last edge ratio is {ratios[-1]:.3f}.")
        else:
            mean = sum(ratios[crossing:]) / len(ratios[crossing:])
            print(f"At the edge from step {history[crossing].step}: the mean edge ratio from there on is {mean:.3f}.")

    picture = options.folder / "sharpness.png"
    draw(histories, picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}    (open 'Custom Scalars', then 'Time Series')")
    for rate, monitor in monitors.items():
        print(f"Records     {monitor.record_path}    (step size {rate:g})")
    print(f"Tables      {options.folder}/*_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    if options.wandb:
        print(f"W&B         wandb sync {options.folder}/wandb/offline-run-*")


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    main()
