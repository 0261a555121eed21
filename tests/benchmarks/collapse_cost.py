"""What neural collapse of every layer of a small ResNet costs, against bare forward passes over the same data.

    OMP_NUM_THREADS=1 python tests/benchmarks/collapse_cost.py

Both side by side, in turns, several times; medians of the ratios. The features are flattened, those of all blocks at
once. With more than 256 MiB of features there are two passes; with fewer the second one reads what the first has kept.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from lightning_dynamics.callbacks.neural_collapse import _Scatter, _Sums
from lightning_dynamics.metrics import Classifier
from lightning_dynamics.objective import FeaturePlan, Features, Feeding, Tap

LAST = "last"


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and before == width
        self.short = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.second(self.relu(self.first(x))) + self.short(x))


def resnet(width: int = 16, blocks: int = 3, classes: int = 10) -> nn.Sequential:
    """A ResNet-20 for 32 × 32 images, as on CIFAR-10."""
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    ]
    for stage in range(3):
        for block in range(blocks):
            before = width * 2 ** (stage - 1 if stage and not block else stage)
            layers.append(Block(before, width * 2**stage, 2 if stage and not block else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def bare(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for x, _ in batches:
            net(x)


def collapse(features: Features, plan: FeaturePlan) -> None:
    with features.open() as reader:
        sums = _Sums(plan, 0)
        for batch in reader.read(plan, "training"):
            sums.update(batch)
        scatter = _Scatter(*sums.centers())
        for batch in reader.read(plan, "training"):
            scatter.update(batch)
        scatter.measures(Classifier(*reader.classifier(plan.head)))


def seconds(action, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    net = resnet(classes=options.classes).eval().to(options.device)
    batches = [
        (
            torch.randn(options.batch, 3, 32, 32, device=options.device),
            torch.randint(0, options.classes, (options.batch,), device=options.device),
        )
        for _ in range(options.samples // options.batch)
    ]
    feeding = Feeding(forward=lambda module, batch: module(batch[0]), target=lambda batch: batch[1])
    features = Features(net, feeding, {"training": batches}, training=False)
    with features.open() as reader:
        anatomy = reader.anatomy()
    taps = {tap.name: tap for tap in anatomy.hidden} | {LAST: Tap(anatomy.head, "input")}
    plan = FeaturePlan(taps, dict.fromkeys(taps, "flatten"), anatomy.head, options.classes)
    ratios = []
    for _ in range(options.rounds):
        ratios.append(seconds(collapse, features, plan) / seconds(bare, net, batches))
    with features.open() as reader:
        size = next(iter(reader.read(plan, "training"))).bytes * len(batches)
    passes = 2 if size > 1 << 28 else 1
    print(f"{len(taps)} layers, {options.classes} classes, {size / 2**20:.0f} MiB of features, {passes} pass(es)")
    ratio = statistics.median(ratios)
    print(f"all of it / one bare forward pass: {ratio:.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"per forward pass: {ratio / passes:.2f}")


if __name__ == "__main__":
    main()
