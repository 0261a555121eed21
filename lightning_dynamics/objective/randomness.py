"""Random numbers that leave the run's own where they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def fork_rng() -> Iterator[None]:
    """Give the random number generators back their state: Python, NumPy, PyTorch on the CPU and on devices in use."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())] if _cuda_in_use() else []
    mps = torch.mps.get_rng_state() if _mps_in_use() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for index, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, index)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch; only ever called under :func:`fork_rng`.

    Devices that are not in use yet are left alone: ``torch.manual_seed`` would leave them a seed for when they are.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if _mps_in_use():
        torch.mps.manual_seed(seed)


def stream_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all of the parts, well mixed: neighbouring parts give unrelated streams."""
    digest = hashlib.blake2b(",".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _mps_in_use() -> bool:
    return torch.backends.mps.is_available()
