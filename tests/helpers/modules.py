"""LightningModules for whole fits: a deliberately nasty one, a convolutional one, and plain ones."""

from __future__ import annotations

import collections
import random

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset


class NoisySamples(Dataset):
    """Map-style data that counts its reads and draws augmentation from every generator of its process."""

    def __init__(self, n=48, d=8):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, d, generator=draw)
        self.y = torch.randint(0, 3, (n,), generator=draw)
        self.reads = 0
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        noise = 0.1 * torch.randn(len(self.x[i])) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        own = 0.1 * torch.randn(len(self.x[i]), generator=self.generator)
        return self.x[i] + noise + own, self.y[i], i


class NoisyStream(IterableDataset):
    """The same as a stream."""

    def __init__(self, n=48):
        self.samples = NoisySamples(n)

    def __iter__(self):
        return iter(self.samples[i] for i in torch.randperm(len(self.samples)).tolist())


class Chain(nn.Sequential):
    """A Sequential of one's own: dynamo skips torch's."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class NastyModule(pl.LightningModule):
    """Does in its step whatever a step can do: logs, counts, draws, writes in place, keeps graphs, fires hooks."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        shared = nn.Linear(16, 16)
        self.net = Chain(
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            shared,
            nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
            shared,
        )
        self.head = nn.Linear(16, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.target = nn.Linear(8, 16).requires_grad_(False)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.losses = torchmetrics.CatMetric()
        self.register_buffer("ema", torch.zeros(3))
        self.counter = 0
        self.history = []
        self.recent = collections.deque(maxlen=5)
        self.last = None
        self.order = []
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.RandomState(4)
        self.table = {"a": torch.zeros(2)}
        self.features = []
        self.net[0].register_forward_hook(lambda module, args, out: self.features.append(float(out.detach().sum())))
        self.hooked = 0

        def count(gradient):
            self.hooked += 1
            return gradient

        self.head.weight.register_hook(count)

    def training_step(self, batch, batch_idx):
        x, y, i = batch
        x.add_(0.01 * torch.randn_like(x)).add_(0.01 * torch.randn(8, generator=self.generator))
        x.mul_(1 + 0.01 * float(self.numpy.rand()))
        out = self.frozen(self.head(self.net(x) + self.target(x)))
        loss = F.cross_entropy(out, y) * (1 + 0.001 * self.counter)
        self.counter += 1
        self.history.append(float(loss.detach()))
        self.recent.append(loss.detach())
        self.last = loss
        with torch.no_grad():
            self.ema.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
            for slow, fast in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
        self.table["a"] += 1
        self.order.append(i.tolist())
        self.accuracy(out, y)
        self.losses.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("acc", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"count": float(self.counter)}, on_step=False, on_epoch=True)
        if self.logger:
            self.logger.log_metrics({"direct": float(self.counter)}, step=self.global_step)
        self.trainer.seen_by_user = self.counter
        if self.automatic_optimization:
            return {"loss": loss, "extra": out.detach()}
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        assert self.head.weight.grad is not None
        if (batch_idx + 1) % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return None

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", F.cross_entropy(self.frozen(self.head(self.net(x))), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ConvModule(pl.LightningModule):
    """A small convolutional network with batch norm, trained by SGD with momentum."""

    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Unflatten(1, (2, 2, 2)),
            nn.Conv2d(2, 4, 2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        self.order = []

    def training_step(self, batch):
        x, y, i = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        self.order.append(i.tolist())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


class Regression(pl.LightningModule):
    """Half squared error of a linear map, or of whatever network is given: everything about it is known."""

    def __init__(self, net=None, lr=0.1, optimizer=None):
        super().__init__()
        self.net = net if net is not None else nn.Linear(4, 1, bias=False)
        self.lr = lr
        self.make_optimizer = optimizer

    def loss(self, batch):
        x, y = batch
        return (self.net(x) - y).square().sum(1).mean() / 2

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        if self.make_optimizer is not None:
            return self.make_optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), self.lr)


def regression_data(n=24, d=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw) * torch.arange(1.0, d + 1)
    return x, x @ torch.randn(d, 1, generator=draw) + 0.1 * torch.randn(n, 1, generator=draw)


def loader(dataset=None, batch_size=12, **arguments):
    return DataLoader(NoisySamples() if dataset is None else dataset, batch_size, **arguments)


class Classification(pl.LightningModule):
    """Cross-entropy of whatever network is given; a small perceptron with batch norm by default."""

    def __init__(self, net=None, lr=0.1):
        super().__init__()
        self.net = perceptron() if net is None else net
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.cross_entropy(out, batch[1]) if out.shape[-1] > 1 else F.softplus(out).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def perceptron(width=8, classes=3, seed=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes),
    )


def class_data(n=60, d=6, classes=3, seed=0):
    """Overlapping Gaussian classes of nearly equal sizes, in random order."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n)[torch.randperm(n, generator=draw)] % classes
    return torch.randn(n, d, generator=draw) + 2 * torch.randn(classes, d, generator=draw)[y], y
