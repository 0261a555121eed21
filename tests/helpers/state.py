"""The whole state of a module, and where two such states differ."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def module_state(module: nn.Module) -> dict[str, Any]:
    """A detached copy of everything mutable on a module."""
    hidden = [v for v in vars(module).get("hidden", []) if isinstance(v, nn.Module)]
    attributes, generators = {}, {}
    for name, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if key in ("_parameters", "_buffers", "_modules", "hidden") or key.endswith("hooks"):
                continue
            if isinstance(value, torch.Generator):
                generators[f"{name}.{key}"] = value.get_state().clone()
            elif isinstance(value, np.random.RandomState):
                generators[f"{name}.{key}"] = value.get_state()[1].copy()
            else:
                attributes[f"{name}.{key}"] = _frozen(value)
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "buffers": {n: b.detach().clone() for n, b in module.named_buffers()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "flags": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "attributes": attributes,
        "generators": generators,
        "hidden": [{k: v.clone() for k, v in h.state_dict().items()} for h in hidden],
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of the parts in which two states differ."""
    return [key for key in first if not equal(first[key], second.get(key))]


def equal(first: Any, second: Any) -> bool:
    """Equality down to the bits of tensors, NaN equal to NaN."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(
                torch.nan_to_num(first.double(), nan=1.5e300), torch.nan_to_num(second.double(), nan=1.5e300)
            )
        )
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and np.array_equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple, collections.deque)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, float) and first != first:
        return isinstance(second, float) and second != second
    return bool(first == second)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [_frozen(v) for v in value]
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return repr(type(value))
