"""What it takes to enter and leave the sandbox, and to renew it for another batch.

python tests/benchmarks/sandbox_time.py
"""

from __future__ import annotations

import statistics
import time

from torch import nn

from lightning_dynamics.objective.sandbox import Sandbox


def main() -> None:
    layers: list[nn.Module] = []
    for _ in range(25):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64)]
    module = nn.Sequential(*layers)
    both, renew = [], []
    for _ in range(50):
        start = time.perf_counter()
        with Sandbox(module) as sandbox:
            inside = time.perf_counter()
            sandbox.renew()
            renewed = time.perf_counter() - inside
        both.append(time.perf_counter() - start - renewed)
        renew.append(renewed)
    count = len(list(module.modules()))
    print(f"{count} modules: enter and exit {1e3 * statistics.median(both):.1f} ms, renew ", end="")
    print(f"{1e3 * statistics.median(renew):.1f} ms")


if __name__ == "__main__":
    main()
