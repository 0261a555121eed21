"""A random projection of a network's weights that preserves lengths and angles, at the cost of one read of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter a tensor is.

    Attributes:
        numel: Number of entries of the whole parameter.
        offset: Where the tensor begins in it, flattened.
        replicas: How many processes hold the same part.
    """

    numel: int
    offset: int = 0
    replicas: int = 1


class Projection:
    """A linear map R of each parameter to at most ``size`` dimensions, with E⟨Rx, Ry⟩ = ⟨x, y⟩.

    Entry i of a parameter is added, with a random sign, to entry i mod ``size`` of its projection; parameters of at
    most ``size`` entries stay as they are. The signs of block b are a stretch of one random sequence that begins at a
    random place, so that next to nothing is stored. The relative standard error of ‖Rx‖², over the choice of signs, is
    at most √(2/``size``) where no entries of the projection get more than their share of x: take a prime number, since
    rows of weights have lengths that divide powers of two. That of sums over parameters is smaller.

    A map depends on ``seed`` and on names and sizes of the parameters alone: parts of a parameter that several
    processes hold (:class:`Shard`) give, added up, the projection of the whole.

    Source: Charikar, Chen and Farach-Colton (2002), with buckets that are taken in turns.

    Args:
        size: Number of dimensions per parameter, by default the largest prime below 2¹⁶; None to leave all of them as
            they are.
        seed: Of the signs.

    Example:
        >>> project = Projection(size=1021, seed=1)
        >>> projected = project({"weight": torch.ones(512, 512)})
        >>> projected["weight"].shape
        torch.Size([1021])
    """

    def __init__(self, size: int | None = 65_521, seed: int = 0) -> None:
        if size is not None and size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.size = size
        self.seed = seed
        self._signs: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._sums: dict[str, _Sums] = {}

    @property
    def relative_error(self) -> float:
        """Relative standard error of a squared length, at most; 0 where nothing is projected."""
        return 0.0 if self.size is None else math.sqrt(2 / self.size)

    def reduces(self, numel: int) -> bool:
        """Whether a parameter with that many entries is projected."""
        return self.size is not None and numel > self.size

    def __call__(self, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None) -> dict[str, Tensor]:
        """Project parameters.

        Args:
            tensors: Parameters, or this process's parts of them, by name; of any shape. Half precision is computed in
                float32.
            shards: Which part each tensor is; the whole parameter where it is not named.

        Returns:
            One vector for each, on its device, in at least float32: what is projected until the next call, what is not
            as a view of the tensor where that can be. Copy what you keep.
        """
        shards = shards or {}
        flat = {name: _flat(tensor) for name, tensor in tensors.items()}
        projected: dict[str, Tensor] = {}
        large: dict[str, Tensor] = {}
        for name, tensor in flat.items():
            shard = shards.get(name)
            numel = tensor.numel() if shard is None else shard.numel
            if self.reduces(numel):
                large[name] = tensor
            elif shard is None:
                projected[name] = tensor
            else:
                projected[name] = _widened(torch.zeros(numel, device=tensor.device, dtype=_least(tensor.dtype)))
                projected[name][shard.offset : shard.offset + tensor.numel()] = tensor
        if large:
            projected.update(self._projected(large, shards))
        for name, shard in shards.items():
            if shard.replicas > 1:
                projected[name] = projected[name] / shard.replicas
        return {name: projected[name] for name in tensors}

    def _projected(self, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
        sums = {name: self._sums_of(name, t, shards.get(name, Shard(t.numel()))) for name, t in tensors.items()}
        rounds: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        for name, tensor in tensors.items():
            sums[name].total.zero_()
            values = torch.split(tensor, sums[name].lengths) if sums[name].lengths else ()
            for number, block in enumerate(zip(sums[name].parts, values, sums[name].signs, strict=True)):
                if tensor.device.type == "cpu":  # one after the other, while the sums are in the cache
                    block[0].addcmul_(block[1].to(sums[name].total.dtype), block[2])
                    continue
                # blocks of one parameter add to the same sums: each in another round
                if number == len(rounds):
                    rounds.append(([], [], []))
                rounds[number][0].append(block[0])
                rounds[number][1].append(block[1].to(sums[name].total.dtype))
                rounds[number][2].append(block[2])
        for round_ in rounds:
            torch._foreach_addcmul_(*round_)
        return {name: each.total for name, each in sums.items()}

    def _sums_of(self, name: str, tensor: Tensor, shard: Shard) -> _Sums:
        key = (tensor.device, _least(tensor.dtype), tensor.numel(), shard)
        known = self._sums.get(name)
        if known is not None and known.key == key:
            return known
        assert self.size is not None
        total = torch.zeros(self.size, device=tensor.device, dtype=_least(tensor.dtype))
        starts = self._starts(name, -(-shard.numel // self.size))
        signs = self._table(total, max(starts) + self.size)
        made = self._sums[name] = _Sums(key, total, [], [], [])
        place = 0
        while place < tensor.numel():
            block, within = divmod(shard.offset + place, self.size)
            count = min(self.size - within, tensor.numel() - place)
            made.lengths.append(count)
            made.parts.append(total[within : within + count])
            made.signs.append(signs[starts[block] + within : starts[block] + within + count])
            place += count
        return made

    def _table(self, like: Tensor, length: int) -> Tensor:
        """At least so many random signs; longer tables begin like shorter ones."""
        key = (like.device, like.dtype)
        known = self._signs.get(key)
        if known is None or len(known) < length:
            assert self.size is not None
            stretches = []
            for number in range(-(-length // self.size)):
                generator = torch.Generator().manual_seed(_seed(self.seed, number))
                stretches.append(2 * torch.randint(0, 2, (self.size,), generator=generator) - 1)
            known = self._signs[key] = torch.cat(stretches).to(*key)
        return known

    def _starts(self, name: str, blocks: int) -> list[int]:
        """Where the signs of each block of a parameter begin: so far apart that few pairs have the same distance."""
        assert self.size is not None
        generator = torch.Generator().manual_seed(_seed(self.seed, name))
        places = max(self.size, blocks * blocks // 2)
        found: list[int] = []
        while len(found) < blocks:  # all different, since blocks with the same signs would add up
            more = torch.randint(0, places, (2 * blocks,), generator=generator).tolist()
            found = list(dict.fromkeys([*found, *more]))
        return found[:blocks]


@dataclass(frozen=True)
class _Sums:
    """A parameter's projection, and how its blocks come to it.

    Attributes:
        key: What it was made for.
        total: The projection.
        lengths: Of the blocks.
        parts: Of the projection, one for each block.
        signs: One view of the table for each block.
    """

    key: tuple[torch.device, torch.dtype, int, Shard]
    total: Tensor
    lengths: list[int]
    parts: list[Tensor]
    signs: list[Tensor]


def dimensions(lengths: Sequence[int], size: int | None) -> int:
    """Numbers that the projections of parameters of these lengths hold."""
    return sum(length if size is None else min(length, size) for length in lengths)


_WIDE = (torch.float32, torch.float64)


def _seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _least(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _flat(tensor: Tensor) -> Tensor:
    """A vector of real numbers in at least float32, of the same memory where that can be."""
    tensor = tensor.detach()
    if tensor.dtype in _WIDE and tensor.is_contiguous():  # without detours, since it is done at every step
        return tensor.view(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return _widened(tensor.contiguous().view(-1))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_least(tensor.dtype))
