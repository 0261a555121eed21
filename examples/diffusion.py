"""Digits, learned, and weights that go on moving: by which power of time, and whether that is anything unusual.

A small network is trained on long after it has learned 1,792 digits, with mini-batches, momentum and weight decay. The
only lines that have to do with lightning_dynamics are those of three monitors. One finds out where the loss has settled
and gives the exponent of the displacement from there on, beside two motions that are no anomalous diffusion and may
look like one; another does so from a later reference; a ``HessianMonitor`` measures the bowl of the second null.

    python examples/diffusion.py             # TensorBoard events, a CSV, dynamics.jsonl and a picture
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dynamics import DisplacementMonitor, HessianMonitor, Probe, Record, Reference, Spectrum
from lightning_dynamics.recording.figures.diffusion import DiffusionView

SIZE, BATCH = 1_792, 32


class Digits(Dataset):
    """The first 1,792 digits that come with scikit-learn: 64 pixels between 0 and 1, less their mean."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images, dtype=torch.float32)[:SIZE] / 16, torch.tensor(labels)[:SIZE]
        self.images -= self.images.mean()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.images[row], self.labels[row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.labels[rows]  # a batch at once


class Classifier(pl.LightningModule):
    """Two hidden layers, the first with batch norm, trained by SGD with momentum and weight decay."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def train(steps: int, seed: int, folder: Path) -> tuple[DisplacementMonitor, DisplacementMonitor]:
    """Train; return the monitor that finds its reference, and the one whose reference lies in the middle."""
    pl.seed_everything(seed)
    whole = Probe(whole=True, batch_size=256)

    detected = DisplacementMonitor(probe=whole, probe_every_n_train_steps=max(1, steps // 16))
    late = DisplacementMonitor(name="late", reference=Reference(step=steps // 2), layers=False, conserved=False)
    every = max(1, steps // 8)
    hessian = HessianMonitor(
        every_n_train_steps=every,
        pair=False,
        spectrum=Spectrum(every_n_train_steps=every, num_vectors=4),
        probe=Probe(size=512, batch_size=256),
    )

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[detected, late, hessian],
        logger=[TensorBoardLogger(folder, name="digits"), CSVLogger(folder, name="digits_csv")],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), DataLoader(Digits(), BATCH, shuffle=True, collate_fn=as_it_is))
    return detected, late


def fitted(monitor: DisplacementMonitor) -> list[Record]:
    """The measurements with an exponent."""
    key = f"{monitor.table.family}/exponent"
    return [record for record in monitor.history if key in record.scalars]


def print_settled(history: Sequence[Record]) -> None:
    """Where the reference was found, and what the loss did from there on."""
    start = next(record for record in history if "reference" in record.notes)
    last = history[-1]
    before, after = (record.scalars["displacement/training_loss"] for record in (start, last))
    change, error = last.scalars["displacement/loss_change"], last.errors["displacement/loss_change"]
    print(f"The loss has settled, and the reference lies, at step {start.notes['reference']['step']} of {last.step}.")
    print(f"Mean training loss of the quarter before: there {before:.4f}, at the end {after:.4f},")
    print(f"which is {change:+.4f} ± {error:.4f} against the quarter before that.")


def print_exponents(monitor: DisplacementMonitor, rows: int = 5) -> None:
    """Exponents over the last decade of lags, as the lag grows, beside the two nulls."""
    family = monitor.table.family
    records = fitted(monitor)
    records = [each for each in records if each.notes["reference"]["lag"] > records[-1].notes["reference"]["lag"] / 8]
    verdict = {True: "excluded", False: "possible"}
    print(f"{'lags':>12}{'exponent':>16}{'R²':>8}{'drift and diffusion':>24}{'bowl':>12}{'measured/bowl':>19}")
    for record in [*records[: -1 : -(-len(records) // rows)], records[-1]]:
        values, notes = record.scalars, record.notes["exponent"]
        exponent = f"{values[f'{family}/exponent']:.2f} ± {record.errors.get(f'{family}/exponent', math.nan):.2f}"
        drift = f"{values[f'{family}/exponent_drift']:.2f} {verdict[notes['drift']['excluded']]}"
        bowl = f"{values[f'{family}/exponent_ou']:.2f} {verdict[notes['ou']['excluded']]}"
        lags = "–".join(f"{lag:.0f}" for lag in notes["window"])
        print(f"{lags:>12}{exponent:>16}{values[f'{family}/exponent_r2']:>8.3f}{drift:>24}{bowl:>18}", end="")
        print(f"{notes['ou']['amplitude']:>13.1f}")
    last = records[-1]
    said = [f"In {last.notes['exponent']['dimension']:.0f} effective dimensions", *last.notes["exponent"]["remarks"]]
    print("; ".join(said))
    lags, local = (last.arrays[f"{family}/local_{name}"] for name in ("lags", "exponents"))
    wanted = [lag for lag in (2, 10, 50, 200, 1_000, 4_000) if lag < 1.2 * lags[-1]]
    shown = [min(range(len(lags)), key=lambda i: abs(math.log(lags[i] / lag))) for lag in wanted]
    print("Local exponents: " + ", ".join(f"{local[i]:.2f} at {lags[i]:.0f}" for i in shown))
    if f"{family}/aging" in last.scalars:
        aging, error = last.scalars[f"{family}/aging"], last.errors.get(f"{family}/aging", math.nan)
        print("; ".join([f"Aging exponent {aging:.2f} ± {error:.2f}", *last.notes.get("aging", ())]))


def print_balance(history: Sequence[Record]) -> None:
    """Losses and gradient norms: weights do not stop where the loss does."""
    columns = {
        "training_loss": "mean loss",
        "probe_loss": "loss of all",
        "gradient_norm": "‖∇L‖ of all",
        "batch_gradient_norm": "‖g‖ of a batch",
        "step": "step length",
    }
    print("\n" + f"{'step':>6}" + "".join(f"{title:>16}" for title in columns.values()))
    for record in history:
        values = [record.scalars.get(f"displacement/{key}", math.nan) for key in columns]
        if record.step and not math.isnan(values[2]):
            print(f"{record.step:>6}" + "".join(f"{value:>16.4f}" for value in values))


def print_symmetries(last: Record) -> None:
    """What gradient flow would conserve, and by how much it has changed since it was found."""
    print("\nSymmetries that were found in the gradients, and changes of what they conserve:")
    for symmetry in last.notes["symmetries"]:
        print(f"    {symmetry}")
    for name, value in last.scalars.items():
        family, _, layer = name.partition("/")[2].partition("/")
        if family in ("scale_change", "shift_change", "rescale_change", "effective_learning_rate", "radial_cosine"):
            print(f"    {family:<26}{layer:<14}{value:>10.3g}")


def main(arguments: Sequence[str] | None = None) -> tuple[DisplacementMonitor, DisplacementMonitor]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8_000, help="steps of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    detected, late = train(options.steps, options.seed, options.folder)
    print()
    print_settled(detected.history)
    print("\nFrom there on")
    print_exponents(detected)
    print(f"\nFrom step {late.reference.step} on")
    print_exponents(late)
    print_balance(detected.history)
    print_symmetries(detected.history[-1])

    picture = options.folder / "diffusion.png"
    view = DiffusionView("displacement/diffusion", fitted(detected)[-1], "Displacement of a digits network")
    view.figure().savefig(picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}    (open 'Custom Scalars', then 'Time Series')")
    print(f"Records     {detected.record_path}")
    print(f"Table       {options.folder}/digits_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    return detected, late


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a network
    main()
