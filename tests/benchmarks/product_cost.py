"""What a Hessian product costs: in gradients, and against the bare double backward of PyTorch.

python tests/benchmarks/product_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import loss, workloads

from lightning_dynamics.objective import Objective, hessian

ROUNDS = 15


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    print(f"{'':42} {'parameters':>10} {'product/gradient':>17} {'product/bare product':>21}")
    for name, (module, batch) in workloads().items():
        parameters = list(module.parameters())

        def gradient(module: nn.Module = module, batch: object = batch):
            # within the sandbox these are its private leaves
            return torch.autograd.grad(loss(module, batch), list(module.parameters()))

        with sdpa_kernel(SDPBackend.MATH):
            bare = torch.autograd.grad(loss(module, batch), parameters, create_graph=True)
        directions = [torch.randn_like(p) for p in parameters]
        vector = torch.cat([d.reshape(-1) for d in directions])
        vector /= vector.norm()

        def bare_product(bare=bare, parameters=parameters, directions=directions):
            return torch.autograd.grad(bare, parameters, grad_outputs=directions, retain_graph=True)

        with hessian(Objective(module, loss, [batch], engine="kept")) as operator:
            rounds = []
            for _ in range(ROUNDS):
                rounds.append((timed(gradient), timed(bare_product), timed(lambda: operator(vector))))  # noqa: B023
        rounds = rounds[2:]
        to_gradient = statistics.median(ours / first for first, _, ours in rounds)
        to_bare = statistics.median(ours / theirs for _, theirs, ours in rounds)
        print(f"{name:42} {vector.numel():10d} {to_gradient:17.2f} {to_bare:21.2f}")


if __name__ == "__main__":
    main()
