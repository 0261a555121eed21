"""Weights of which every process holds a part, projected as if they were whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dynamics.metrics import Projection, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter is distributed over processes."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def project_shards(projection: Projection, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projections of whole parameters, the same on every process: each projects what it holds, one all-reduce adds.

    Args:
        projection: The projection.
        parameters: The parameters of a sharded module by name.
    """
    tensors, shards = {}, {}
    for name, parameter in parameters.items():
        tensors[name], shards[name] = _part(parameter.detach())
    own = projection(tensors, shards)
    flat = torch.cat(list(own.values()))
    dist.all_reduce(flat)
    return dict(zip(own, torch.split(flat, [len(each) for each in own.values()]), strict=True))


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of the squared norms of whole tensors, the same on every process."""
    total = torch.zeros(1, dtype=torch.float64)
    device = None
    for tensor in tensors:
        local, shard = _part(tensor.detach())
        device = local.device
        total += float(torch.linalg.vector_norm(local.float())) ** 2 / shard.replicas
    total = total.to(device)
    dist.all_reduce(total)
    return float(total)


def _part(tensor: Any) -> tuple[Tensor, Shard]:
    """This process's part of a parameter. Split in another way than by rows, it is gathered."""
    world = dist.get_world_size()
    real = 2 if tensor.is_complex() else 1
    if not is_sharded(tensor):
        return tensor, Shard(real * tensor.numel(), 0, world)
    split = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not split:
        return tensor.to_local(), Shard(real * tensor.numel(), 0, world)
    placement = tensor.placements[split[0]]
    if len(split) > 1 or type(placement).__name__ != "Shard" or placement.dim != 0:
        return tensor.full_tensor(), Shard(real * tensor.numel(), 0, world)
    parts = tensor.device_mesh.size(split[0])
    rows = tensor.shape[0]
    per_part = -(-rows // parts)
    first = min(rows, per_part * tensor.device_mesh.get_local_rank(split[0]))
    local = tensor.to_local()
    return local, Shard(real * tensor.numel(), real * first * (tensor.numel() // max(1, rows)), world // parts)
