"""Small modules of every kind that people train, each with its data and with what is expected of a measurement."""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers.modules import Chain
from lightning_dynamics import Probe

SAMPLES, BATCH = 12, 6


@dataclasses.dataclass(frozen=True)
class Species:
    """One kind of module.

    Attributes:
        make: Makes the module; seeded by the caller.
        data: Makes its loader: two batches of the same size, in the same order in every epoch.
        refused: What the refusal says, where it is refused as it stands.
        options: Options of the monitor with which it is measured; None where it never is.
        probe: The data on which it is measured.
        callbacks: Makes the callbacks that it is trained with.
        freeze: Prepares the module, given a batch, for the dense Hessian that is the reference.
        changes: Whether what is measured changes during the run.
        has_current: Whether the batch of a step is known before the step.
    """

    make: Callable[[], pl.LightningModule]
    data: Callable[[], Any]
    refused: str | None = None
    options: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    probe: Probe = dataclasses.field(default_factory=lambda: Probe(whole=True))
    callbacks: Callable[[], list[pl.Callback]] = list
    freeze: Callable[[pl.LightningModule, Any], None] = lambda module, batch: None
    changes: bool = False
    has_current: bool = True


ZOO: dict[str, Species] = {}


def settle(name: str, **expected: Any) -> Callable[[type[pl.LightningModule]], type[pl.LightningModule]]:
    """Enter a class into the table."""

    def enter(kind: type[pl.LightningModule]) -> type[pl.LightningModule]:
        ZOO[name] = Species(kind, **{"data": numbers, **expected})
        return kind

    return enter


# Data


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(collate: Any = None) -> DataLoader:
    return DataLoader(TensorDataset(draw(SAMPLES, 3), draw(SAMPLES, 1, seed=1)), BATCH, collate_fn=collate)


def words() -> DataLoader:
    indices = torch.randint(0, 4, (SAMPLES, 3), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(indices, draw(SAMPLES, 1, seed=1)), BATCH)


def sequences(width: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(draw(SAMPLES, 3, width), draw(SAMPLES, 1, seed=1)), BATCH)


class Animal(pl.LightningModule):
    """Half squared error of ``self.net``."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        if net is not None:
            self.net = net

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean() / 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=BATCH)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)


def perceptron() -> Chain:
    return Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


# Normalization


@settle("batch norm that averages over all batches")
class CumulativeBatchNorm(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 1)))


def freeze_spectral_norm(module: pl.LightningModule, batch: Any) -> None:
    """Its vectors count as constants, as in the gradient: iterate once, as training does, then not again."""
    module.loss(batch)
    module.net[0].eval()


@settle("spectral norm", freeze=freeze_spectral_norm)
class SpectralNorm(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))


@settle("spectral norm of old", freeze=freeze_spectral_norm)
class OldSpectralNorm(Animal):
    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(Chain(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))


@settle("weight norm")
class WeightNorm(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))


@settle("weight norm of old")
class OldWeightNorm(Animal):
    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(Chain(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))


# Buffers and attributes


@settle("buffers with a moving average")
class MovingAverage(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())
        self.register_buffer("average", torch.zeros(1))

    def loss(self, batch: Any) -> Tensor:
        out = self.net(batch[0])
        loss = (out - batch[1]).square().mean() / 2 + (out - self.average).square().mean()
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return loss


def freeze_momentum_encoder(module: Any, batch: Any) -> None:
    """It follows the weights, but counts as constant, as in the gradient."""
    module.follow()
    module.follow = lambda: None


@settle("a queue and a momentum encoder", freeze=freeze_momentum_encoder)
class Queue(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(BATCH, 2)))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)

    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        self.follow()
        with torch.no_grad():
            keys = F.normalize(self.slow(x + 0.1))
        queries = F.normalize(self.net(x))
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().mT], 1)
        with torch.no_grad():
            self.queue[int(self.seen) % BATCH :] = keys[int(self.seen) % BATCH :]
            self.seen += 1
        return F.cross_entropy(logits / 0.5, torch.zeros(len(x), dtype=torch.long))


@settle("a large tensor as an attribute")
class Bank(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())
        self.bank = torch.ones(1 << 18, 3)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        loss = (self.net(x + self.bank[: len(x)]) - y).square().mean()
        self.bank[: len(x)] = x.detach()
        return loss


# Operations


class Embeds(Animal):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.head = nn.Linear(2, 1)

    def loss(self, batch: Any) -> Tensor:
        rows = self.table(batch[0])
        rows = rows.mean(1) if rows.dim() == 3 else rows
        return (self.head(rows.tanh()) - batch[1]).square().mean()


@settle("embedding bag", data=words)
class Bag(Embeds):
    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(4, 2))


@settle("embedding bag with offsets", data=words)
class RaggedBag(Embeds):
    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(4, 2, mode="max", padding_idx=3))

    def loss(self, batch: Any) -> Tensor:
        rows = self.table(batch[0].flatten(), torch.tensor([0, 4, 4, 10]))
        return (self.head(rows.tanh()) - batch[1][:4]).square().mean()


@settle("sparse embedding", data=words, refused="`sparse=False`", options={"parameters": r"head\..*"})
class SparseEmbedding(Embeds):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(4, 2, sparse=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


@settle("distances")
class Distances(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.centers = nn.Parameter(torch.randn(3, 2))

    def loss(self, batch: Any) -> Tensor:
        out = self.net(batch[0])
        apart = torch.cdist(out, out).sin().mean() + F.pdist(self.centers).cos().mean()
        return torch.cdist(out, self.centers).square().mean() + apart


@settle("hard sigmoid")
class HardSigmoid(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 1)))


@settle("connectionist temporal classification", data=sequences, refused="ctc_loss.*loss_fn", options=None)
class Temporal(Animal):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3))

    def loss(self, batch: Any) -> Tensor:
        scores = self.net(batch[0]).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((BATCH,), 3)
        return F.ctc_loss(scores, torch.ones(BATCH, 1, dtype=torch.long), lengths, torch.ones_like(lengths))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@settle("custom functions", refused=r"`Once`.*@once_differentiable.*loss_fn", options=None)
class CustomFunction(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())

    def loss(self, batch: Any) -> Tensor:
        return Once.apply(self.net(batch[0]) - batch[1]).mean()


@settle("complex numbers")
class Complex(Animal):
    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        self.head = nn.Linear(4, 1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.head((x.to(self.waves.dtype) @ self.waves).abs().tanh()) - y).square().mean()


# Layers with fused kernels


class Reads(Animal):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 1)

    def read(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out[0] if isinstance(out, tuple) else out

    def loss(self, batch: Any) -> Tensor:
        return (self.head(self.read(batch[0]).mean(1)) - batch[1]).square().mean()


@settle("attention", data=sequences)
class Attention(Reads):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 12), 4)

    def read(self, x: Tensor) -> Tensor:
        parts = [part.unflatten(2, (2, 2)).transpose(1, 2) for part in self.body(x).chunk(3, 2)]
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


@settle("attention with a kernel of choice", data=sequences)
class FlashAttention(Attention):
    def read(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().read(x)


@settle("transformer", data=lambda: sequences(3))
class Transformer(Reads):
    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(3, 1, 2, 0.0, "gelu", batch_first=True), 3)


@settle("LSTM", data=sequences)
class LSTM(Reads):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(4, 2, batch_first=True), 2)


@settle("GRU", data=sequences)
class GRU(Reads):
    def __init__(self) -> None:
        super().__init__(nn.GRU(4, 2, batch_first=True), 2)


@settle("RNN", data=sequences)
class RNN(Reads):
    def __init__(self) -> None:
        super().__init__(nn.RNN(4, 2, num_layers=2, batch_first=True), 2)


# Parameter sets


@settle("adapters on a frozen base")
class Adapters(Animal):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4).requires_grad_(False))
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 1).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.head((self.net(x) + self.up(self.down(x))).tanh()) - y).square().mean()


@settle("lazy layers, sized in configure_model")
class Configured(Animal):
    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Chain(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))
            self.net(torch.zeros(1, 3))


@settle("lazy layers, sized by a dry run")
class DryRun(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1)))
        self.net(torch.zeros(1, 3))


@settle("lazy layers, not sized", refused="`net.0.weight` belongs to a lazy layer.*Run the module once", options=None)
class NotSized(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1)))


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, module: pl.LightningModule) -> None:
        self.freeze(module.net[0])

    def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)


@settle("layers that are unfrozen", callbacks=lambda: [Finetuning()], changes=True)
class Unfrozen(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())
        self.net[0].requires_grad_(False)


class Prunes(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            prune.l1_unstructured(module.net[0], "weight", 0.5)


@settle("layers that are pruned", callbacks=lambda: [Prunes()], changes=True)
class Pruned(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())


# Graphs


class Checkpointed(Animal):
    reentrant: bool

    def __init__(self) -> None:
        super().__init__(Chain(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.shift = x.mean()

        def segment(x: Tensor) -> Tensor:
            return self.net[:2](x + self.shift)

        hidden = checkpoint(segment, x.clone().requires_grad_(), use_reentrant=self.reentrant)
        return (self.net[2](hidden) - y).square().mean()


@settle("reentrant checkpointing")
class Reentrant(Checkpointed):
    reentrant = True


@settle("checkpointing")
class NotReentrant(Checkpointed):
    reentrant = False


@settle("a compiled submodule")
class CompiledSubmodule(Animal):
    def __init__(self) -> None:
        super().__init__(torch.compile(perceptron(), backend="eager"))


@settle("a module compiled in place")
class CompiledInPlace(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())
        # graphs of aot_eager have no double backward; before PyTorch 2.6 nothing can make them run eagerly
        self.net.compile(backend="aot_eager" if hasattr(torch.compiler, "set_stance") else "eager")


@settle("a compiled forward")
class CompiledForward(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())
        self.forward = torch.compile(self.forward, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()


# Losses and data


@settle(
    "two losses",
    refused="`manual_backward` on 2 losses.*loss_fn",
    options={"loss_fn": "loss", "parameters": r"net\..*"},
)
class Adversarial(Animal):
    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)))
        self.judge = Chain(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.judge(self.net(batch[0]))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        maker, judge = self.optimizers()
        self.toggle_optimizer(maker)
        loss = self.loss(batch)
        self.manual_backward(loss)
        maker.step()
        maker.zero_grad()
        self.untoggle_optimizer(maker)
        real, made = self.judge(batch[1]), self.judge(self.net(batch[0]).detach())
        self.manual_backward((F.softplus(-real) + F.softplus(made)).mean())
        judge.step()
        judge.zero_grad()
        self.log("loss", loss, batch_size=BATCH)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.net, self.judge)], []


class Replay(IterableDataset):
    """Samples of what an agent has seen so far."""

    def __init__(self, memory: collections.deque[tuple[Tensor, ...]]) -> None:
        self.memory = memory

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(SAMPLES):
            yield self.memory[int(torch.randint(len(self.memory), ()))]


@settle("reinforcement learning", data=None, probe=Probe(first_batches=2))
class Agent(Animal):
    """Learns to act from a replay buffer, which it fills as it goes, with a target network that follows."""

    def __init__(self) -> None:
        super().__init__(Chain(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.place = torch.zeros(2)
        self.memory: collections.deque[tuple[Tensor, ...]] = collections.deque(maxlen=50)
        for _ in range(BATCH):
            self.act()

    def act(self) -> None:
        with torch.no_grad():
            action = torch.randint(2, ()) if torch.rand(()) < 0.3 else self.net(self.place).argmax()
        place = 0.9 * self.place + 0.1 * torch.randn(2) + (action - 0.5) * torch.tensor([1.0, 0.0])
        self.memory.append((self.place, action, -place.abs().sum(), place))
        self.place = place

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Replay(self.memory), BATCH)

    def loss(self, batch: Any) -> Tensor:
        place, action, reward, after = batch
        value = self.net(place).gather(1, action.unsqueeze(1)).squeeze(1)
        return F.huber_loss(value, reward + 0.9 * self.target(after).max(1).values)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.act()
        if self.global_step % 2 == 0:
            self.target.load_state_dict(self.net.state_dict())
        return super().training_step(batch, batch_idx)


@dataclasses.dataclass
class Fields:
    x: Tensor
    y: Tensor


class Plain:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Moving(Plain):
    def to(self, *arguments: Any, **options: Any) -> Moving:
        return Moving(self.x.to(*arguments, **options), self.y.to(*arguments, **options))


Pair = collections.namedtuple("Pair", ["x", "y"])


class Attributes(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch.x) - batch.y).square().mean()


def as_batches_of(kind: Any) -> Callable[[], DataLoader]:
    def collate(samples: list[tuple[Tensor, ...]]) -> Any:
        return kind(*map(torch.stack, zip(*samples, strict=True)))

    return lambda: numbers(collate)


for name, kind in {
    "dataclass": Fields,
    "plain object": Plain,
    "object that moves": Moving,
    "named tuple": Pair,
}.items():
    settle(f"batches: {name}", data=as_batches_of(kind))(Attributes)


@settle("a step that takes an iterator", has_current=False)
class Iterates(Animal):
    def __init__(self) -> None:
        super().__init__(perceptron())

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, *_ = next(dataloader_iter)
        return self.loss(batch)
