"""Sharpness-aware minimization written by hand, for comparison, and a module to train with it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

RHO = 0.2
N, D, CLASSES, BATCH = 48, 8, 3, 8


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def loader(batch=BATCH, n=N, **options):
    return DataLoader(TensorDataset(*data(n)), batch, **options)


def network(norm=True, dropout=0.0):
    torch.manual_seed(5)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(D, 16), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def optimizer_of(net, kind="sgd"):
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": [*net[1].parameters(), *net[4].parameters()]}]
    if kind == "sgd":
        return torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=0.01)
    return {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[kind](groups, 0.01)


class Sharp(pl.LightningModule):
    """Counts, logs and keeps metrics; with one optimizer of two groups and a schedule."""

    def __init__(self, kind="sgd", norm=True, dropout=0.0, schedule=True):
        super().__init__()
        self.net = network(norm, dropout)
        self.kind, self.schedule = kind, schedule
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.calls, self.seen, self.logged = 0, [], []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen.append(batch_idx)
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy)
        return loss

    def configure_optimizers(self):
        optimizer = optimizer_of(self.net, self.kind)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def total(tensors):
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])))


def inner(first, second):
    return float(torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum())


def perturb(net, gradients, variant, rho):
    named = list(net.named_parameters())
    with torch.no_grad():
        if variant == "usam":
            for (_, p), g in zip(named, gradients, strict=True):
                p.add_(g, alpha=rho)
        elif variant == "asam":
            scale = [p.abs() + 0.01 if "weight" in name else torch.ones_like(p) for name, p in named]
            length = total([t * g for t, g in zip(scale, gradients, strict=True)])
            for (_, p), t, g in zip(named, scale, gradients, strict=True):
                p.add_(g * t.square(), alpha=rho / length)
        else:
            length = total(gradients)
            for (_, p), g in zip(named, gradients, strict=True):
                p.add_(g, alpha=rho / length)


def by_hand(
    kind="sgd",
    norm=True,
    dropout=0.0,
    schedule=True,
    variant="sam",
    rho=RHO,
    accumulate=1,
    clip=None,
    clip_value=None,
    autocast=None,
    scale=1.0,
    epochs=2,
    m=None,
    every_k=1,
    alpha=0.7,
    gsam_alpha=0.4,
    same_noise=True,
    batch=BATCH,
    drops=False,
):
    """The same training without Lightning; the network."""
    net = network(norm, dropout)
    torch.manual_seed(1)
    optimizer = optimizer_of(net, kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    parameters = list(net.parameters())
    orthogonal, step = None, 0

    def gradients_of(x, y, share):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            loss = F.cross_entropy(net(x), y)
        (loss * share * scale if share != 1 / accumulate else loss / accumulate * scale).backward()
        return float(loss.detach()) * share

    for _ in range(epochs):
        _ = torch.empty((), dtype=torch.int64).random_()  # the seed that a loader draws when it is opened
        batches = list(zip(*(t.split(batch) for t in data()), strict=True))
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            optimizer.zero_grad()
            states = []
            buffers = [b.clone() for b in net.buffers()]
            for x, y in window:
                states.append(torch.get_rng_state())
                gradients_of(x, y, 1 / accumulate)
            after = torch.get_rng_state()
            new_buffers = [b.clone() for b in net.buffers()]
            first = [p.grad.clone() for p in parameters]
            before = [p.detach().clone() for p in parameters]

            def put_back(values, new):
                with torch.no_grad():
                    for tensor, value in zip(values, new, strict=True):
                        tensor.copy_(value)

            if rho and (step % every_k == 0 or orthogonal is None):
                if m is None:
                    perturb(net, [g / scale for g in first] if variant == "usam" else first, variant, rho)
                    optimizer.zero_grad()
                    put_back(net.buffers(), buffers)
                    for (x, y), state in zip(window, states, strict=True):
                        if same_noise:
                            torch.set_rng_state(state)
                        gradients_of(x, y, 1 / accumulate)
                    put_back(parameters, before)
                else:
                    mean = [torch.zeros_like(p) for p in parameters]
                    for x, y in window:
                        for part in zip(x.split(m), y.split(m), strict=True):
                            share = len(part[0]) / len(x) / accumulate
                            optimizer.zero_grad()
                            gradients_of(*part, share)
                            perturb(net, [p.grad for p in parameters], variant, rho)
                            optimizer.zero_grad()
                            gradients_of(*part, share)
                            put_back(parameters, before)
                            for total_gradient, p in zip(mean, parameters, strict=True):
                                total_gradient += p.grad
                    for p, g in zip(parameters, mean, strict=True):
                        p.grad = g
                put_back(net.buffers(), new_buffers)
                if same_noise:
                    torch.set_rng_state(after)
                second = [p.grad.clone() for p in parameters]
                if variant == "gsam":
                    share = inner(first, second) / inner(second, second)
                    for p, g, s in zip(parameters, first, second, strict=True):
                        p.grad = s - gsam_alpha * (g - share * s)
                if every_k > 1:
                    share = inner(second, first) / inner(first, first)
                    orthogonal = [s - share * g for g, s in zip(first, second, strict=True)]
            elif every_k > 1:
                factor = alpha * total(first) / total(orthogonal)
                for p, v in zip(parameters, orthogonal, strict=True):
                    p.grad = p.grad + factor * v
            step += 1
            if scale != 1:
                for p in parameters:
                    p.grad.div_(scale)
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            if clip_value is not None:
                nn.utils.clip_grad_value_(parameters, clip_value)
            optimizer.step()
            if schedule:
                scheduler.step()
    return net


def differences(net, other):
    """Largest difference of weights and buffers."""
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def same(net, other):
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
