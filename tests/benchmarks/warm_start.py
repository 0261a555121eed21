"""How many products a measurement takes, cold and from the vectors of the last one, against how far the weights moved.

python tests/benchmarks/warm_start.py
"""

from __future__ import annotations

import statistics

import torch
from torch import nn
from torch.nn import functional as F

from lightning_dynamics.linalg import eigenpairs
from lightning_dynamics.objective import Objective, hessian


def main() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1000], dtype=torch.float32) / 16
    batch = (x - x.mean(), torch.tensor(labels[:1000]))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    optimizer = torch.optim.SGD(net.parameters(), 0.3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()

    def flat() -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    train(300)
    objective = Objective(net, loss, [batch])
    print(f"{'top':>4} {'relative move':>14} {'cold':>6} {'warm':>6}    (medians of 5; without the completeness check)")
    for top in (1, 3, 10):
        for steps in (1, 10, 100):
            moves, cold, warm = [], [], []
            with hessian(objective) as h:
                subspace = eigenpairs(h, top, confidence=None).subspace
            for _ in range(5):
                before = flat()
                train(steps)
                moves.append(float((flat() - before).norm() / before.norm()))
                with hessian(objective) as h:
                    cold.append(eigenpairs(h, top, confidence=None).products)
                    found = eigenpairs(h, top, start=subspace, confidence=None)
                warm.append(found.products)
                subspace = found.subspace
            print(
                f"{top:4d} {statistics.median(moves):14.1e} {statistics.median(cold):6g} {statistics.median(warm):6g}"
            )


if __name__ == "__main__":
    main()
