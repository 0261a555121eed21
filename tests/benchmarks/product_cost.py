"""What a product costs in gradients: with the Hessian, also against the bare double backward, and with Gauss-Newton.

python tests/benchmarks/product_cost.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import loss, workloads

from lightning_dynamics.objective import Objective, hessian

ROUNDS = 15


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    titles = f"{'product/gradient':>17} {'product/bare product':>21} {'Gauss-Newton/gradient':>22}"
    print(f"{'':42} {'parameters':>10} {titles}")
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

        def outputs(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
            return module(batch[0]), lambda z: F.cross_entropy(z, batch[1])

        with hessian(Objective(module, loss, [batch], engine="kept", output_fn=outputs)) as operator:
            gauss_newton, rounds = operator.operator("gauss_newton"), []
            for _ in range(ROUNDS):
                works = (gradient, bare_product, lambda: operator(vector), lambda: gauss_newton(vector))  # noqa: B023
                rounds.append([timed(work) for work in works])
        rounds = rounds[2:]
        to_gradient = statistics.median(ours / first for first, _, ours, _ in rounds)
        to_bare = statistics.median(ours / theirs for _, theirs, ours, _ in rounds)
        other = statistics.median(ours / first for first, _, _, ours in rounds)
        print(f"{name:42} {vector.numel():10d} {to_gradient:17.2f} {to_bare:21.2f} {other:22.2f}")


if __name__ == "__main__":
    main()
