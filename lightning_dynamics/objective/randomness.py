"""Random numbers that leave the run's own where they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """Where the random number generators stand: Python, NumPy, PyTorch on the CPU and on devices in use."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())] if _cuda_in_use() else []
        self._mps = torch.mps.get_rng_state() if _mps_in_use() else None

    def restore(self) -> None:
        """Set the generators back to it."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for index, state in enumerate(self._cuda):
            torch.cuda.set_rng_state(state, index)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Give the random number generators back their state."""
    before = RandomState()
    try:
        yield
    finally:
        before.restore()


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
    return bool(torch.cuda.is_initialized() and torch.cuda.is_available())  # type: ignore[no-untyped-call]


def _mps_in_use() -> bool:
    return torch.backends.mps.is_available()
