"""Gradient clipping and the edge of stability: an LSTM on sequences of different lengths, with and without clipping.

The LSTM repeats what it read three steps ago. Both runs take the same large step size. Two options matter here:

- ``weight_fn=``: the loss is a mean over tokens, and padded batches hold different numbers of them. The monitor weights
  the batches of its probe by samples unless it is told otherwise.
- ``gradient_clip_val=`` of the Trainer: the edge ratio is that of the unclipped step. The monitor writes beside it the
  mean factor by which gradients were shortened.

    python examples/lstm.py                  # TensorBoard events, a CSV, dynamics.jsonl and a picture
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler

from lightning_dynamics import HessianMonitor, Probe, Record

SYMBOLS, DELAY, NOTHING = 4, 3, -100


class Echo(pl.LightningModule):
    """An LSTM whose loss is the mean cross-entropy over all tokens of a batch at which something is wanted."""

    def __init__(self, learning_rate: float, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(SYMBOLS, width, batch_first=True)
        self.head = nn.Linear(width, SYMBOLS)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        read, wanted = batch
        features, _ = self.lstm(F.one_hot(read, SYMBOLS).float())
        return F.cross_entropy(self.head(features).flatten(0, 1), wanted.flatten(), ignore_index=NOTHING)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)


def sequences(count: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Random symbols, sorted by length (6 to 30), each sequence with what was read three steps before."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for length in torch.randint(6, 31, (count,), generator=generator).sort().values.tolist():
        read = torch.randint(SYMBOLS, (length,), generator=generator)
        pairs.append((read, torch.cat([torch.full((DELAY,), NOTHING), read[:-DELAY]])))
    return pairs


def pad(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    read, wanted = zip(*pairs, strict=True)
    return pad_sequence(read, batch_first=True), pad_sequence(wanted, batch_first=True, padding_value=NOTHING)


def tokens(batch: tuple[Tensor, Tensor]) -> float:
    """The number of terms that the loss of a batch averages."""
    return float((batch[1] != NOTHING).sum())


def train(
    clip: float | None, learning_rate: float, steps: int, every: int, folder: Path
) -> tuple[HessianMonitor, dict[str, float]]:
    """Train with or without clipping; return the monitor, and the last loss in two means computed by hand."""
    pl.seed_everything(0)
    data = sequences()
    name = "lstm_clipped" if clip else "lstm_not_clipped"

    monitor = HessianMonitor(
        top_k=1, bottom_k=0, spectrum=False, every_n_train_steps=every, probe=Probe(whole=True), weight_fn=tokens
    )

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=clip,
        callbacks=[monitor],
        logger=[TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = Echo(learning_rate)
    trainer.fit(
        module,
        DataLoader(data, 64, sampler=RandomSampler(data, num_samples=25 * len(data)), collate_fn=pad),
    )
    batches = [pad(data[:64]), pad(data[64:])]
    with torch.no_grad():
        losses = [float(module.loss(batch)) for batch in batches]
    counts = [tokens(batch) for batch in batches]
    by_token = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return monitor, {"over tokens": by_token, "over batches": sum(losses) / len(losses)}


def print_findings(name: str, history: list[Record], by_hand: dict[str, float]) -> None:
    print(f"\n{name}")
    print(f"{'step':>6} {'loss':>9} {'top eigenvalue':>15} {'edge ratio':>11} {'clip factor':>12}")
    for record in [*history[: -1 : -(-len(history) // 12)], history[-1]]:
        loss, top, ratio = (record.scalars[f"hessian/{key}"] for key in ("probe_loss", "top_1", "edge_ratio"))
        print(f"{record.step:6d} {loss:9.4f} {top:15.3f} {ratio:11.3f} {clip_factor(record):12.3f}")
    highest = max(history, key=lambda record: record.scalars["hessian/edge_ratio"])
    ratio = highest.scalars["hessian/edge_ratio"]
    print(
        f"The highest edge ratio is {ratio:.2f}, at step {highest.step}; times the clip factor of the steps before it, "
        f"{ratio * clip_factor(highest):.2f}."
    )
    solved = next((record.step for record in history if record.scalars["hessian/probe_loss"] < 0.1), None)
    print("The loss stays above 0.1." if solved is None else f"The loss is below 0.1 from step {solved}.")
    last = history[-1].scalars["hessian/probe_loss"]
    means = ", ".join(f"{value:.4g} {of}" for of, value in by_hand.items())
    print(f"The last loss is {last:.4g} to the monitor; as a mean by hand {means}.")


def clip_factor(record: Record) -> float:
    """Mean factor by which clipping shortened the gradients since the point before."""
    return record.scalars.get("hessian/clip_factor", 1.0)


def draw(histories: dict[str, list[Record]], file: Path) -> None:
    """Edge ratios, as they are and times the clip factor, and losses over the steps of training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (edge, loss) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, history), colour in zip(histories.items(), ("#0072B2", "#D55E00"), strict=True):
        steps = [record.step for record in history]
        ratios = [record.scalars["hessian/edge_ratio"] for record in history]
        edge.plot(steps, ratios, ".-", color=colour, ms=5, label=name)
        if any(clip_factor(record) < 1 for record in history):
            scaled = [ratio * clip_factor(record) for ratio, record in zip(ratios, history, strict=True)]
            edge.plot(steps, scaled, ":", color=colour, lw=1.5, label="… times clip factor")
        losses = [record.scalars["hessian/probe_loss"] for record in history]
        loss.plot(steps, losses, ".-", color=colour, ms=5, label=name)
    edge.axhline(1, color="0.4", ls="--", lw=1)
    edge.text(steps[-1], 1.03, "edge", color="0.4", fontsize=9, ha="right")
    edge.set(xlabel="step", ylabel="edge ratio", ylim=(0, None), title="Above the edge of the unclipped step")
    loss.set(xlabel="step", ylabel="loss per token", yscale="log", title="Loss")
    edge.legend(frameon=False)
    for axes in (edge, loss):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[list[Record], dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=192, help="steps of each run")
    parser.add_argument("--every", type=int, default=12, help="steps between measurements")
    parser.add_argument("--step-size", type=float, default=2.0, help="step size of both runs")
    parser.add_argument("--clip", type=float, default=0.1, help="largest norm of the gradient in the clipped run")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    runs = {
        name: train(clip, options.step_size, options.steps, options.every, options.folder)
        for name, clip in ((f"clipped at {options.clip:g}", options.clip), ("not clipped", None))
    }
    found = {name: (monitor.history, by_hand) for name, (monitor, by_hand) in runs.items()}
    for name, (history, by_hand) in found.items():
        print_findings(f"SGD with momentum, step size {options.step_size:g}, {name}", history, by_hand)

    picture = options.folder / "lstm.png"
    draw({name: history for name, (history, _) in found.items()}, picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}")
    for name, (monitor, _) in runs.items():
        print(f"Records     {monitor.record_path}    ({name})")
    print(f"Tables      {options.folder}/lstm_*_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    return found


if __name__ == "__main__":
    main()
