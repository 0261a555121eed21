"""How much memory a graph holds, and how much there is: decided before building, not by running out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")  # where a container says what it may use


class SavedBytes:
    """Counts the bytes that autograd saves for backward while :meth:`counting` is active, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        # not the tensor itself: an output that its own node saves would keep the graph alive for ever
        return tensor.detach()


def double_precision(device: torch.device) -> Literal["fast", "slow", "missing"]:
    """How a device takes to float64: at half the speed of float32 or so, at a small part of it, or not at all."""
    if device.type == "cuda" and torch.version.hip is None:
        # data centre parts have the minor number 0; the others do 1/32 or 1/64
        major, minor = torch.cuda.get_device_capability(device)
        return "fast" if minor == 0 and major in (6, 7, 8, 9, 10) else "slow"
    return "missing" if device.type == "mps" else "fast"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [_meminfo_available(), _cgroup_available()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_available() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
