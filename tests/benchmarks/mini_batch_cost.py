"""What points of StochasticSharpnessMonitor and GradientNoiseMonitor cost, in gradients on all drawn mini-batches.

    OMP_NUM_THREADS=1 python tests/benchmarks/mini_batch_cost.py [--network conv]

One gradient is one forward and backward pass over all of them, in pieces of training's size, as training does it. Both
side by side, in turns, several times; medians of the ratios. Sandbox and bookkeeping are part of a point.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from lightning_dynamics.callbacks.survey import Survey, Wanted
from lightning_dynamics.linalg import eigenpairs
from lightning_dynamics.objective import Objective, hessian

DRAWS, BATCH = 16, 64


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def gradient(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for batch in batches:
        net.zero_grad()
        loss(net, batch).backward()


def point(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], kind: str) -> None:
    if kind == "sharpness":  # the step is judged after it, by itself
        point(net, batches, "sharpness without the step")
    with hessian(Objective(net, loss, batches, engine="rebuilt")) as operator:
        step = 1e-3 * operator.gradient
        wanted = {
            "sharpness": Wanted(update=step),
            "sharpness without the step": Wanted(curvature=True),
            "noise": Wanted(),
            "noise with samples": Wanted(samples=True),
        }.get(kind)
        if kind == "sharpness in detail":
            top = eigenpairs(operator, 1, tolerance=1e-4).top.vectors[0]
            wanted = Wanted(curvature=True, partners=True, top=top, solved=8)
        if kind == "noise in detail":
            found = eigenpairs(operator, 3, 3)
            vectors = torch.cat([end.vectors[:3] for end in (found.top, found.bottom)])
            wanted = Wanted(directions=vectors, samples=True)
        assert wanted is not None
        operator.survey(Survey(wanted, operator.gradient, len(batches), BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=["perceptron", "conv"], default="perceptron")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = perceptron() if options.network == "perceptron" else convolutional()
    teacher = torch.randn(768, 10)
    images = [torch.randn(BATCH, 3, 16, 16) for _ in range(DRAWS)]
    batches = [(x, (x.flatten(1) @ teacher).argmax(1)) for x in images]
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(20):
        for batch in batches:
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
    kinds = [
        "sharpness without the step",
        "sharpness",
        "sharpness in detail",
        "noise",
        "noise with samples",
        "noise in detail",
    ]
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            started = time.perf_counter()
            gradient(net, batches)
            bare = time.perf_counter() - started
            started = time.perf_counter()
            point(net, batches, kind)
            ratios[kind].append((time.perf_counter() - started) / bare)
    print(f"{options.network}, {sum(p.numel() for p in net.parameters())} weights, {DRAWS} mini-batches of {BATCH}")
    for kind, values in ratios.items():
        print(f"{kind:28} {statistics.median(values):6.1f} gradients ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
