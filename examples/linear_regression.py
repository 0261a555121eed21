"""Linear regression, solved, and still moving: every number that theory predicts for SGD beside the one measured.

Training starts where the loss is least, so that nothing but the noise of the mini-batches moves the weights.
``DisplacementMonitor`` follows them along the eigenvectors of the Hessian, with batches drawn with replacement and with
batches reshuffled every epoch; and in a wider regression, with momentum and without, it shows by which power of time
they move away from where they are.

    python examples/linear_regression.py     # TensorBoard events, a CSV, dynamics.jsonl and two pictures
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_dynamics import DisplacementMonitor, HessianMonitor, Probe, Record, Reference, Spectrum
from lightning_dynamics.metrics import HeavyBall, local_exponents
from lightning_dynamics.recording.figures.diffusion import DiffusionView
from lightning_dynamics.recording.figures.phase import PhaseView

SAMPLES, BATCH = 4_000, 500
FEW = {"top_1": 6.0, "top_2": 2.0, "bottom_2": 0.5, "bottom_1": 0.16}
MANY = torch.logspace(math.log10(0.02), -2, 400).tolist()
MOMENTUM = {"lr": 0.04, "momentum": 0.8}
NO_MOMENTUM = {"lr": 0.2, "momentum": 0.0}  # the same η/(1 - β)
ORDERS = {"with_replacement": "Drawn with replacement", "reshuffled": "Reshuffled every epoch"}


class Regression(Dataset):
    """Noisy linear data: half the mean squared residual has a Hessian with exactly these eigenvalues."""

    def __init__(self, eigenvalues: Sequence[float]) -> None:
        draw = torch.Generator().manual_seed(0)
        size = len(eigenvalues)
        self.eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
        even = torch.linalg.qr(torch.randn(SAMPLES, size, generator=draw, dtype=torch.float64)).Q
        self.vectors = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q
        self.along = SAMPLES**0.5 * even * self.eigenvalues.sqrt()
        noise = 2.0 * torch.randint(2, (SAMPLES,), generator=draw, dtype=torch.float64) - 1
        self.noise = noise - even @ (even.T @ noise)  # then the loss is least where all weights are one
        inputs = self.along @ self.vectors.T
        self.inputs, self.targets = inputs.float(), (inputs.sum(1) + self.noise).float()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.targets[row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[rows], self.targets[rows]  # a batch at once

    def gradient_noise(self, positions: Tensor | None = None) -> Tensor:
        """Variance of a sample's gradient along each eigenvector, at the minimum or averaged over positions."""
        places = torch.zeros(1, len(self.vectors), dtype=torch.float64) if positions is None else positions
        residuals = places @ self.along.T - self.noise
        return torch.stack([(each[:, None] * self.along).var(0, correction=0) for each in residuals]).mean(0)


class Linear(pl.LightningModule):
    """A linear function whose weights start where the loss is least."""

    def __init__(self, size: int, lr: float, momentum: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(size, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.net(inputs).squeeze(1) - targets).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=self.hparams.momentum)


class Copies(pl.Callback):
    """The weights at the start of every step: what positions and velocities are without the monitor."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(pl_module.net.weight.detach()[0].double())


class Run(NamedTuple):
    """What was trained from the reference on, and what the monitor measured."""

    data: Regression
    dynamics: HeavyBall
    positions: Tensor  # along the eigenvectors, from the minimum; shape (steps, size)
    monitor: DisplacementMonitor

    @property
    def record(self) -> Record:
        return self.monitor.history[-1]

    @property
    def noise(self) -> Tensor:
        """R₀, the variance of a batch's gradient along each eigenvector at the minimum."""
        left = (SAMPLES - BATCH) / (SAMPLES - 1) if self.dynamics.order == "reshuffled" else 1.0
        return left * self.data.gradient_noise() / BATCH


def train(
    name: str,
    data: Regression,
    options: dict[str, float],
    steps: int,
    folder: Path,
    order: str = "with_replacement",
    modes: int = 0,
) -> Run:
    """Train for 300 steps, or 2.4 times the longest relaxation time, and for so many more from the reference on."""
    pl.seed_everything(0)
    dynamics = HeavyBall(**options, order=order, batches=SAMPLES // BATCH)
    reference = max(300, round(2.4 * (1 - dynamics.momentum) / (dynamics.lr * float(data.eigenvalues.min()))))
    total = reference + steps

    hessian = HessianMonitor(
        2, 2, every_n_train_steps=total, spectrum=Spectrum(every_n_train_steps=total), probe=Probe(whole=True)
    )
    monitor = DisplacementMonitor(
        every_n_train_steps=total,
        reference=Reference(step=reference),
        window=(max(1, steps // 100), steps),
        phase_space=modes,
        phase_window=max(200, steps),
        probe=Probe(whole=True),
        probe_every_n_train_steps=total,
    )

    replaces = {"sampler": RandomSampler(data, replacement=True, num_samples=100 * BATCH)}
    copies = Copies()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=total,
        callbacks=[hessian, monitor, copies],
        logger=[TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    sampled = {"shuffle": True} if order == "reshuffled" else replaces
    trainer.fit(Linear(len(data.vectors), **options), DataLoader(data, BATCH, collate_fn=as_it_is, **sampled))
    return Run(data, dynamics, (torch.stack(copies.weights[reference:]) - 1) @ data.vectors, monitor)


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


class Compared(NamedTuple):
    """A number with its standard error, what it should be, and what it would be if the noise were white."""

    name: str
    value: float
    error: float
    theory: float
    white: float

    @property
    def deviation(self) -> float:
        """From the theory, in standard errors."""
        return (self.value - self.theory) / self.error if self.error > 0 else math.nan


def phase_space(run: Run) -> dict[str, list[Compared]]:
    """By eigenvector: covariances of the copied weights; frequency, equipartition and current as recorded."""
    white = HeavyBall(run.dynamics.lr, run.dynamics.momentum)
    h = run.data.eigenvalues
    covariances = [run.noise[:, None, None] * theory.covariance(h) for theory in (run.dynamics, white)]
    q, p = run.positions[1:], run.positions.diff(dim=0) / run.dynamics.lr
    q, p = q - q.mean(0), p - p.mean(0)
    products = {"Var q": (q * q, 0, 0), "Cov(q, p)": (q * p, 0, 1), "Var p": (p * p, 1, 1)}
    recorded = {
        "Var p/Var q": ("equipartition", white.equipartition(h)),
        "frequency": ("frequency", white.frequency(h)),
        "current": ("current", white.relative_current(h)),
    }
    values, errors = run.record.scalars, run.record.errors
    found: dict[str, list[Compared]] = {}
    for i, mode in enumerate(FEW):
        found[mode] = []
        for name, (product, row, column) in products.items():
            blocks = torch.stack([block.mean() for block in product[:, i].tensor_split(20)])
            theories = (float(covariance[i, row, column]) for covariance in covariances)
            found[mode].append(Compared(name, float(blocks.mean()), float(blocks.std()) / 20**0.5, *theories))
        for name, (quantity, of_white) in recorded.items():
            key = f"displacement/{quantity}_{mode}"
            theory = values[f"displacement/{quantity}_predicted_{mode}"]
            found[mode].append(Compared(name, values[key], errors[key], theory, float(of_white[i])))
    return found


def displacement(run: Run, lags: Sequence[int]) -> list[tuple[float, Compared, float]]:
    """Local exponents of the recorded displacement: lag, exponent with the scatter of one trajectory, monitor's null.

    ‖Δₛ‖² and ‖Δₜ‖² of independent modes have the covariance 2Σ K(s, t)² with K(s, t) = (M(s) + M(t) - M(|t - s|))/2.
    """
    key = "displacement/{}".format
    arrays = run.record.arrays
    at = torch.tensor(arrays[key("diffusion_lags")]).long()
    apart = (at[:, None] - at).abs()
    theory = run.dynamics.msd(run.data.eigenvalues, torch.arange(int(at[-1]) + 1))
    means = run.noise @ theory[:, at]
    covariance = torch.zeros(len(at), len(at), dtype=torch.float64)
    for noise, curve in zip(run.noise, theory, strict=True):
        kernel = noise * (curve[at][:, None] + curve[at] - curve[apart]) / 2
        covariance += 2 * kernel.square() / (means[:, None] * means)
    values, vectors = torch.linalg.eigh(covariance)
    draws = torch.randn(300, len(at), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scattered = (draws * values.clamp(min=0).sqrt()) @ vectors.T
    middles, expected = local_exponents(at, means)
    scatter = torch.stack([local_exponents(at, means * each.exp())[1] for each in scattered]).std(0)
    measured = arrays[key("local_exponents")]
    null = local_exponents(at, torch.tensor(arrays[key("ou_squares")]))[1]
    rows = [int((middles / lag).log().abs().argmin()) for lag in lags]
    return [
        (
            float(middles[i]),
            Compared("exponent", measured[i], float(scatter[i]), float(expected[i]), math.nan),
            float(null[i]),
        )
        for i in rows
    ]


def print_phase_space(run: Run, found: dict[str, list[Compared]]) -> None:
    is_white = run.dynamics.order == "with_replacement"
    stronger = run.data.gradient_noise(run.positions[::100]) / run.data.gradient_noise() - 1
    print(f"\n{ORDERS[run.dynamics.order]}, {len(run.positions):,} steps")
    print(f"{'':<18}{'measured':>11}{'± error':>10}{'theory':>11}{'off by':>13}", end="")
    print("" if is_white else f"{'white noise':>14}{'measured/white':>16}")
    for i, (mode, rows) in enumerate(found.items()):
        curvature = run.record.scalars[f"displacement/curvature_{mode}"]
        print(f"{mode}, h = {curvature:.4g}; noise {float(stronger[i]):+.1%} against the minimum")
        for row in rows:
            print(f"    {row.name:<14}{row.value:>11.4g}{row.error:>10.1g}{row.theory:>11.4g}", end="")
            print(f"{'':>13}" if math.isnan(row.deviation) else f"{row.deviation:>+6.1f} errors", end="")
            ratio = f"{row.value / row.white:>16.2f}" if row.white else ""
            print("" if is_white else f"{row.white:>14.4g}{ratio}")


def print_summary(rows: Sequence[Compared]) -> None:
    away = [abs(row.deviation) for row in rows if row.error > 0]
    one, two, three = (sum(each <= errors for each in away) for errors in (1, 2, 3))
    print(f"\nOf {len(away)} numbers {one} lie within one error of the theory, {two} within two, {three} within three.")


def print_displacement(title: str, run: Run, rows: list[tuple[float, Compared, float]]) -> None:
    print(f"\n{title}: local exponent of the displacement")
    print(f"{'lag':>8}{'measured':>11}{'± scatter':>11}{'theory':>9}{'off by':>13}{'null of the monitor':>22}")
    for lag, row, null in rows:
        print(f"{lag:>8.0f}{row.value:>11.2f}{row.error:>11.2f}{row.theory:>9.2f}", end="")
        print(f"{row.deviation:>+6.1f} errors{null:>22.2f}")
    values, errors, notes = run.record.scalars, run.record.errors, run.record.notes["exponent"]
    print(f"One power of time from lag {notes['window'][0]:.0f} to {notes['window'][1]:.0f}: exponent ", end="")
    print(f"{values['displacement/exponent']:.2f} ± {errors['displacement/exponent']:.2f}", end="")
    print(f" ({'; '.join(notes['remarks'])})" if notes["remarks"] else "")
    for name, key in (("drift and diffusion", "drift"), ("a quadratic bowl", "ou")):
        verdict = "excluded" if notes[key]["excluded"] else "not excluded"
        print(f"    {name}: {values[f'displacement/exponent_{key}']:.2f}, {verdict}")


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6_000, help="steps of the longest of the four runs")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    steps, folder = options.steps, options.folder
    folder.mkdir(parents=True, exist_ok=True)

    few, many = Regression(list(FEW.values())), Regression(MANY)
    runs = {
        "with_replacement": train("with_replacement", few, MOMENTUM, steps, folder, modes=2),
        "reshuffled": train("reshuffled", few, MOMENTUM, steps // 2, folder, "reshuffled", modes=2),
        "momentum": train("momentum", many, MOMENTUM, steps * 3 // 7, folder),
        "no_momentum": train("no_momentum", many, NO_MOMENTUM, steps * 3 // 7, folder),
    }
    planes = {name: phase_space(runs[name]) for name in ("with_replacement", "reshuffled")}
    for name, found in planes.items():
        print_phase_space(runs[name], found)
    print_summary([row for found in planes.values() for rows in found.values() for row in rows])
    lags = [lag for lag in (2, 5, 10, 20, 50, 100, 200, 500, 1_000) if lag < steps / 4]
    ways = {name: displacement(runs[name], lags) for name in ("momentum", "no_momentum")}
    for name, rows in ways.items():
        print_displacement(name.replace("_", " ").capitalize(), runs[name], rows)

    distances, phases = folder / "linear_regression.png", folder / "linear_regression_planes.png"
    way, plane = runs["momentum"].record, runs["reshuffled"].record
    DiffusionView("displacement/diffusion", way, "Displacement, with momentum").figure().savefig(distances)
    PhaseView("displacement/phase", plane, "Phase planes, reshuffled batches").figure().savefig(phases)
    print(f"\nCurves      tensorboard --logdir {folder}    (open 'Custom Scalars', then 'Time Series')")
    for name, run in runs.items():
        print(f"Records     {run.monitor.record_path}    ({name})")
    print(f"Pictures    {distances}, {phases}")
    return planes, ways


if __name__ == "__main__":
    torch.set_num_threads(1)  # more only wait for each other on so small a problem
    main()
