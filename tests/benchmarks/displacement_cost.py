"""What following the weights at every step costs, as a share of a training step.

A fully connected network of 10 million parameters with SGD, at batch sizes 512 and 32. Steps and readings alternate, so
that whatever else the machine does hits both; medians over five rounds.

    python tests/benchmarks/displacement_cost.py
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import nn

from lightning_dynamics.metrics import Displacement, Projection

ROUNDS, STEPS = 5, 12


def network() -> nn.Sequential:
    widths = [1024, 2048, 2048, 1792, 10]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    torch.manual_seed(0)
    net = network()
    parameters = dict(net.named_parameters())
    print(f"{sum(p.numel() for p in parameters.values()):,} parameters, {torch.get_num_threads()} threads")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for batch in (512, 32):
        x, y = torch.randn(batch, 1024), torch.randint(0, 10, (batch,))
        for name, size, host in (("projection", 65_521, False), ("device", None, False)):
            project, moved = Projection(size), Displacement(on_host=host)
            shares = []
            for _ in range(ROUNDS):
                trained, followed = [], []
                for _ in range(STEPS):
                    start = time.perf_counter()
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net(x), y).backward()
                    optimizer.step()
                    between = time.perf_counter()
                    moved.update(project(parameters))
                    trained.append(between - start)
                    followed.append(time.perf_counter() - between)
                shares.append(statistics.median(followed[2:]) / statistics.median(trained[2:]))
            low, middle, high = min(shares), statistics.median(shares), max(shares)
            print(f"batch {batch:3d}, memory={name!r:13}: {middle:6.1%} of a step ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
