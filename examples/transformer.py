"""Why the sharpness says nothing about Adam, and the edge ratio does: a small transformer at two learning rates.

The transformer learns the Zen of Python, which comes with Python itself, character by character, by full-batch AdamW
with decay on matrices only. Adam has no threshold for the sharpness, since each coordinate has an effective step of its
own, which changes all the time. ``hessian/edge_ratio`` is the largest curvature in units of these steps, over all
parameter groups: 1 is the edge.

    python examples/transformer.py           # TensorBoard events, a CSV, dynamics.jsonl and a picture
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_dynamics import HessianMonitor, Probe, Record

with contextlib.redirect_stdout(io.StringIO()):
    import this  # prints its text when imported

CONTEXT = 32


class CharacterModel(pl.LightningModule):
    """A causal transformer of 21,000 parameters; its loss is the cross-entropy of each next character."""

    def __init__(self, learning_rate: float, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch, batch_idx):
        (text,) = batch
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=self.device)
        features = self.blocks(self.characters(text[:, :-1]) + self.places, mask=mask, is_causal=True)
        loss = F.cross_entropy(self.head(self.norm(features)).flatten(0, 1), text[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.hparams.learning_rate)


def zen_of_python() -> tuple[Tensor, int]:
    """Pieces of the text that overlap by half, as numbers, shape ``(52, 33)``, and how many characters it uses."""
    text = codecs.decode(this.s, "rot13")
    characters = sorted(set(text))
    numbers = torch.tensor([characters.index(character) for character in text])
    return numbers.unfold(0, CONTEXT + 1, CONTEXT // 2).contiguous(), len(characters)


def full_batches(pieces: Tensor) -> DataLoader:
    """All of the data in each batch; an epoch is 25 of them, since Lightning does a lot at the end of an epoch."""
    data = TensorDataset(pieces)
    return DataLoader(data, batch_size=len(data), sampler=RandomSampler(data, num_samples=25 * len(data)))


def train(learning_rate: float, steps: int, every: int, folder: Path) -> HessianMonitor:
    """Train with one learning rate; return the monitor with its measurements."""
    pl.seed_everything(0)
    pieces, vocabulary = zen_of_python()
    name = f"transformer_{learning_rate:g}"

    monitor = HessianMonitor(top_k=1, bottom_k=0, spectrum=False, every_n_train_steps=every, probe=Probe(whole=True))

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=[TensorBoardLogger(folder, name=name), CSVLogger(folder, name=f"{name}_csv")],
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(CharacterModel(learning_rate, vocabulary), full_batches(pieces))
    return monitor


def values(history: list[Record], key: str) -> list[float]:
    return [record.scalars[f"hessian/{key}"] for record in history]


def with_ratio(history: list[Record]) -> list[Record]:
    """All points but the first: Adam has no effective step before it has taken one."""
    return [record for record in history if "hessian/edge_ratio" in record.scalars]


def print_findings(learning_rate: float, history: list[Record]) -> None:
    print(f"\nAdamW with learning rate {learning_rate:g}")
    print(f"{'step':>6} {'loss':>9} {'top eigenvalue':>15} {'edge ratio':>11}")
    for record in history:
        loss, top = (record.scalars[f"hessian/{key}"] for key in ("probe_loss", "top_1"))
        ratio = record.scalars.get("hessian/edge_ratio")
        print(f"{record.step:6d} {loss:9.4f} {top:15.2f} {'-' if ratio is None else format(ratio, '.3f'):>11}")
    late = [record for record in with_ratio(history) if record.step >= 2 * history[-1].step / 3]
    tops, ratios = values(late, "top_1"), values(late, "edge_ratio")
    print(
        f"In the last third the top eigenvalue lies between {min(tops):.0f} and {max(tops):.0f}, the edge ratio "
        f"between {min(ratios):.2f} and {max(ratios):.2f}: its mean is {sum(ratios) / len(ratios):.3f}."
    )


def draw(histories: dict[float, list[Record]], file: Path) -> None:
    """Top eigenvalues and edge ratios over the steps of training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (sharpness, ratio) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (rate, history), colour in zip(histories.items(), ("#0072B2", "#D55E00"), strict=True):
        label = f"learning rate {rate:g}"
        steps = [record.step for record in history]
        sharpness.plot(steps, values(history, "top_1"), ".-", color=colour, ms=5, label=label)
        known = with_ratio(history)
        ratio.plot([r.step for r in known], values(known, "edge_ratio"), ".-", color=colour, ms=5, label=label)
    ratio.axhline(1, color="0.4", ls="--", lw=1)
    ratio.text(0, 1.03, "edge", color="0.4", fontsize=9)
    sharpness.set(xlabel="step", ylabel="top Hessian eigenvalue λ₁", yscale="log", title="Sharpness: no common value")
    sharpness.set_yticks([1, 10, 100], ["1", "10", "100"])
    ratio.set(
        xlabel="step", ylabel="edge ratio", xlim=sharpness.get_xlim(), ylim=(0, None), title="Edge ratio: both near 1"
    )
    sharpness.legend(frameon=False)
    for axes in (sharpness, ratio):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[float, list[Record]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help="steps of each run")
    parser.add_argument("--every", type=int, default=24, help="steps between measurements")
    parser.add_argument("--learning-rates", type=float, nargs=2, default=(1e-3, 3e-3), help="of the two runs")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    monitors = {rate: train(rate, options.steps, options.every, options.folder) for rate in options.learning_rates}
    histories = {rate: monitor.history for rate, monitor in monitors.items()}
    for rate, history in histories.items():
        print_findings(rate, history)

    picture = options.folder / "transformer.png"
    draw(histories, picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}")
    for rate, monitor in monitors.items():
        print(f"Records     {monitor.record_path}    (learning rate {rate:g})")
    print(f"Tables      {options.folder}/transformer_*_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    return histories


if __name__ == "__main__":
    main()
