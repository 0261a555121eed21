"""Reinforcement learning at the edge of stability: a DQN with a Huber loss against one with a cross-entropy.

Two agents learn to catch a falling ball. The first is a DQN (Huber loss); the second predicts the distribution of its
return over 21 values and is trained with the cross-entropy to the target, spread over the two nearest of them. All else
is the same: network, replay buffer, target network, step size, momentum. How to measure where the data changes:

- ``probe=``: a sample of the replay buffer, frozen before the first update, so that all points are on the same data.
- ``loss_fn=``: the loss alone. The training step also plays the game, which a measurement should not do.
- The target network is a part of the module without gradients: the loss is measured with the targets of that step.

    python examples/dqn.py                   # TensorBoard events, a CSV, dynamics.jsonl and a picture
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_dynamics import HessianMonitor, Probe, Record

ROWS, COLUMNS, ACTIONS = 8, 5, 3
NAMES = {"huber": "Huber loss", "cross_entropy": "cross-entropy"}
Transitions = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # seen, action, reward, seen next, whether it was the end


class Catch:
    """Games played side by side: a ball falls, the paddle below moves left, stays or moves right; 1 if it catches."""

    def __init__(self, games: int) -> None:
        self.row = torch.zeros(games, dtype=torch.long)
        self.ball = torch.randint(COLUMNS, (games,))
        self.paddle = torch.full((games,), COLUMNS // 2)

    def look(self) -> Tensor:
        """Row, ball and paddle between -1 and 1, shape ``(games, 3)``."""
        places = (self.row / (ROWS - 1), self.ball / (COLUMNS - 1), self.paddle / (COLUMNS - 1))
        return 2 * torch.stack(places, dim=1) - 1

    def play(self, actions: Tensor) -> Transitions:
        """One move in each game; those at their end begin anew."""
        before = self.look()
        self.paddle = (self.paddle + actions - 1).clamp(0, COLUMNS - 1)
        self.row = self.row + 1
        after, ends = self.look(), self.row == ROWS - 1
        rewards = torch.where(ends, torch.where(self.ball == self.paddle, 1.0, -1.0), 0.0)
        self.row = torch.where(ends, 0, self.row)
        self.ball = torch.where(ends, torch.randint(COLUMNS, ends.shape), self.ball)
        self.paddle = torch.where(ends, COLUMNS // 2, self.paddle)
        return before, actions, rewards, after, ends


class Replay(IterableDataset):
    """All transitions played so far. Each batch is the whole of them: the edge is that of full-batch training."""

    def __init__(self) -> None:
        self.parts: list[Transitions] = []

    def everything(self) -> Transitions:
        if len(self.parts) > 1:
            self.parts = [tuple(torch.cat(columns) for columns in zip(*self.parts, strict=True))]
        return self.parts[0]

    def __iter__(self) -> Iterator[Transitions]:
        while True:
            yield self.everything()


class Agent(pl.LightningModule):
    """Q-learning with an ε-greedy player, a replay buffer and a target network."""

    def __init__(self, loss: str, step_size: float, momentum: float = 0.9, atoms: int = 21) -> None:
        super().__init__()
        self.save_hyperparameters()
        outputs = ACTIONS * (1 if loss == "huber" else atoms)
        self.online, self.target = network(outputs), network(outputs).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.register_buffer("returns", torch.linspace(-1.5, 1.5, atoms))
        self.game, self.replay, self.reward = Catch(games=8), Replay(), 0.0
        for _ in range(128):
            self.play(epsilon=1.0)

    def predict(self, net: nn.Module, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs for each action, and the values that they stand for, shape ``(batch, actions)``."""
        outputs = net(seen).unflatten(1, (ACTIONS, -1))
        if self.hparams.loss == "huber":
            return outputs, outputs.squeeze(2)
        return outputs, outputs.softmax(dim=2) @ self.returns

    @torch.no_grad()
    def play(self, epsilon: float) -> None:
        best = self.predict(self.online, self.game.look())[1].argmax(dim=1)
        chance = torch.randint(ACTIONS, best.shape)
        played = self.game.play(torch.where(torch.rand(best.shape) < epsilon, chance, best))
        self.replay.parts.append(played)
        if played[4].any():
            self.reward = 0.7 * self.reward + 0.3 * float(played[2][played[4]].mean())

    def td_loss(self, batch: Transitions) -> Tensor:
        """Loss of the predicted values of what was done against r + γ max Q of the target network."""
        seen, actions, rewards, after, ends = batch
        outputs = self.predict(self.online, seen)[0][torch.arange(len(seen)), actions]
        with torch.no_grad():
            best = self.predict(self.target, after)[1].amax(dim=1)
            wanted = rewards + 0.95 * torch.where(ends, 0.0, best)
            near = 1 - (wanted[:, None] - self.returns).abs() / (self.returns[1] - self.returns[0])
        if self.hparams.loss == "huber":
            return F.huber_loss(outputs.squeeze(1), wanted)
        return F.cross_entropy(outputs, near.clamp(min=0))

    def training_step(self, batch, batch_idx):
        if batch_idx % 10 == 0:
            self.play(epsilon=0.2)
        loss = self.td_loss(batch)
        self.log_dict({"train_loss": loss, "reward": self.reward}, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step % 100 == 0:
            self.target.load_state_dict(self.online.state_dict())

    def configure_optimizers(self):
        return torch.optim.SGD(self.online.parameters(), lr=self.hparams.step_size, momentum=self.hparams.momentum)

    def train_dataloader(self):
        return DataLoader(self.replay, batch_size=None)


def network(outputs: int, width: int = 64) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(3, width), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def train(loss: str, step_size: float, steps: int, every: int, folder: Path) -> tuple[HessianMonitor, float]:
    """Train with one of the losses; return the monitor with its measurements, and the mean reward of the last games."""
    pl.seed_everything(0)
    agent = Agent(loss, step_size)
    frozen = agent.replay.everything()

    monitor = HessianMonitor(
        top_k=1,
        bottom_k=0,
        spectrum=False,
        every_n_train_steps=every,
        probe=Probe(dataloader=[frozen]),
        loss_fn="td_loss",
    )

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=[TensorBoardLogger(folder, name=f"dqn_{loss}"), CSVLogger(folder, name=f"dqn_{loss}_csv")],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(agent)
    return monitor, agent.reward


def print_findings(loss: str, history: list[Record], reward: float) -> None:
    print(f"\n{NAMES[loss]}")
    print(f"{'step':>6} {'loss':>9} {'top eigenvalue':>15} {'(2 + 2β)/η':>11} {'edge ratio':>11}")
    for record in [*history[: -1 : -(-len(history) // 10)], history[-1]]:
        value, top, threshold, ratio = (
            record.scalars[f"hessian/{key}"] for key in ("probe_loss", "top_1", "stability_threshold", "edge_ratio")
        )
        print(f"{record.step:6d} {value:9.4f} {top:15.3f} {threshold:11.2f} {ratio:11.3f}")
    highest = max(history, key=lambda record: record.scalars["hessian/edge_ratio"])
    ratio = highest.scalars["hessian/edge_ratio"]
    verdict = "reaches" if ratio >= 1 else "does not reach"
    print(f"It {verdict} the threshold: the highest edge ratio is {ratio:.2f}, at step {highest.step}.")
    print(f"The last games brought a mean reward of {reward:.2f} (1 is best, with a move in five left to chance).")


def draw(histories: dict[str, list[Record]], file: Path) -> None:
    """Edge ratios and losses over the steps of training."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (edge, loss) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, history), colour in zip(histories.items(), ("#0072B2", "#D55E00"), strict=True):
        steps = [record.step for record in history]
        for axes, key in ((edge, "edge_ratio"), (loss, "probe_loss")):
            values = [record.scalars[f"hessian/{key}"] for record in history]
            axes.plot(steps, values, ".-", color=colour, ms=4, lw=1, label=NAMES[name])
    edge.axhline(1, color="0.4", ls="--", lw=1)
    edge.text(steps[-1], 1.02, "(2 + 2β)/η", color="0.4", fontsize=9, ha="right")
    edge.set(xlabel="step", ylabel="edge ratio", ylim=(0, None), title="Sharpness in units of its threshold")
    loss.set(xlabel="step", ylabel="loss on the frozen sample", yscale="log", title="Loss")
    edge.legend(frameon=False)
    for axes in (edge, loss):
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Record]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="updates of each agent")
    parser.add_argument("--every", type=int, default=25, help="steps between measurements")
    parser.add_argument("--step-size", type=float, default=0.3, help="step size of both agents")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything is written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    runs = {loss: train(loss, options.step_size, options.steps, options.every, options.folder) for loss in NAMES}
    histories = {loss: monitor.history for loss, (monitor, _) in runs.items()}
    for loss, (monitor, reward) in runs.items():
        print_findings(loss, monitor.history, reward)

    picture = options.folder / "dqn.png"
    draw(histories, picture)
    print(f"\nCurves      tensorboard --logdir {options.folder}")
    for loss, (monitor, _) in runs.items():
        print(f"Records     {monitor.record_path}    ({NAMES[loss]})")
    print(f"Tables      {options.folder}/dqn_*_csv/version_*/metrics.csv")
    print(f"Picture     {picture}")
    return histories


if __name__ == "__main__":
    main()
