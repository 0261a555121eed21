"""Copies that may be written to, whatever the original hangs on."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

IMMUTABLE = (
    int,
    float,
    bool,
    str,
    bytes,
    complex,
    type(None),
    type,
    range,
    frozenset,
    torch.dtype,
    torch.device,
    torch.Size,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)


def private_copy(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a batch that may be written to, with floating and complex tensors narrower than ``dtype`` raised.

    Other objects than the usual containers are deep-copied, with the tensors in them treated in the same way. What is
    one object in several places of the batch is one in the copy.
    """
    return _private(batch, dtype, {})


def _private(batch: Any, dtype: torch.dtype | None, memo: dict[int, Any]) -> Any:
    if isinstance(batch, Tensor):
        if id(batch) not in memo:
            memo[id(batch)] = _raised(batch, dtype)
        return memo[id(batch)]
    if isinstance(batch, IMMUTABLE):
        return batch
    if type(batch) in (list, tuple):
        return type(batch)(_private(member, dtype, memo) for member in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_private(member, dtype, memo) for member in batch))
    if type(batch) in (dict, OrderedDict):
        return type(batch)((key, _private(member, dtype, memo)) for key, member in batch.items())

    def copy_tensor(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        private = memo[id(tensor)] = _raised(tensor, dtype)
        return private

    with PrivateTensors(copy_tensor):
        return copy.deepcopy(batch, memo)


def _raised(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wide = wider(tensor, dtype)
    private = tensor.detach().clone() if wide is None else tensor.detach().to(wide)
    return private.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def wider(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The type to raise a tensor to so that its numbers, or their parts, are at least as wide as ``dtype``.

    None where nothing is to be raised.
    """
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()) or not narrower(tensor.dtype, dtype):
        return None
    return dtype.to_complex() if tensor.is_complex() else dtype


class PrivateTensors(TorchFunctionMode):
    """Lets ``deepcopy`` copy any tensor, however deep it lies: one that is attached to a graph is refused otherwise."""

    def __init__(self, copy_tensor: Callable[[Tensor, dict[int, Any]], Tensor] | None = None) -> None:
        super().__init__()
        self._copy_tensor = copy_tensor if copy_tensor is not None else clone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo[id(tensor)] if id(tensor) in memo else self._copy_tensor(tensor, memo)
        return func(*args, **(kwargs or {}))


def clone(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    private = memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)
    return private


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN counting as equal to itself."""
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout is not torch.strided or torch.equal(one, other):
        return one.layout is torch.strided
    return bool(one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num()))


def narrower(have: torch.dtype, want: torch.dtype) -> bool:
    return torch.finfo(have).bits < torch.finfo(want).bits
