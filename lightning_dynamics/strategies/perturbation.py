"""The formulas of sharpness-aware minimization, on lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Variant = Literal["sam", "asam", "usam", "gsam"]
"""How the weights are perturbed, and what becomes of the two gradients."""

VARIANTS: tuple[Variant, ...] = ("sam", "asam", "usam", "gsam")

DEFAULT_RHO: dict[Variant, float] = {"sam": 0.05, "asam": 0.5, "gsam": 0.05}
"""ρ where none is given: those of the papers' experiments. That of ``"usam"`` has another unit, and no default."""


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all tensors together, accumulated in at least float32; of sharded ones, of all shards."""
    lengths = _on_one_device([_whole(_wide_norm(tensor)) for tensor in tensors])
    return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0


def dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """The inner product of two lists of tensors; what is None counts as zero."""
    products = [_whole((_wide(a) * _wide(b)).sum()) for a, b in _both(first, second)]
    return float(torch.stack(_on_one_device(products)).sum()) if products else 0.0


def cosine_of(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """The cosine of the angle between two vectors, NaN where one of them is 0."""
    lengths = [norm([v for v in vectors if v is not None]) for vectors in (first, second)]
    return dot(first, second) / math.prod(lengths) if math.prod(lengths) > 0 else math.nan


@torch.no_grad()
def climb(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, length: float, scales: Sequence[bool] | None
) -> None:
    """Add to the weights ρ·T²g/‖Tg‖.

    T is the identity for SAM, see :func:`adaptive_norm` for ASAM; for unnormalized SAM pass a length of 1.

    Args:
        weights: They are changed in place.
        gradients: Of the same shapes; their own factor cancels where they are normalized by ``length``.
        rho: ρ.
        length: ‖Tg‖.
        scales: For ASAM, which of the weights are scaled by T = |w| + η; None for T = 1 throughout.
    """
    factor = rho / length
    if scales is None:
        _add(weights, gradients, factor)
        return
    for weight, gradient, scale in zip(weights, gradients, scales, strict=True):
        step = _dense(gradient) * (weight.abs() + ASAM_OFFSET).square() if scale else gradient
        weight.add_(step, alpha=factor)


ASAM_OFFSET = 0.01
"""η of ASAM's T = |w| + η."""


def adaptive_norm(weights: Sequence[Tensor], gradients: Sequence[Tensor], scales: Sequence[bool]) -> float:
    """‖Tg‖ with T = |w| + η where a weight is scaled, else 1."""
    return norm(
        [
            _dense(gradient) * (weight.detach().abs() + ASAM_OFFSET) if scale else gradient
            for weight, gradient, scale in zip(weights, gradients, scales, strict=True)
        ]
    )


def across(vectors: Sequence[Tensor | None], direction: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The part of a vector that is orthogonal to a direction: v - (v·d/‖d‖²)·d; v itself where the direction is 0."""
    squared = dot(direction, direction)
    share = dot(vectors, direction) / squared if squared > 0 else 0.0
    return [
        None if v is None and d is None else combine((v, 1.0), (d, -share))
        for v, d in zip(vectors, direction, strict=True)
    ]


def combine(*terms: tuple[Tensor | None, float]) -> Tensor | None:
    """A weighted sum of tensors of one shape; what is None counts as zero."""
    total: Tensor | None = None
    for tensor, weight in terms:
        if tensor is not None:
            scaled = _dense(tensor) if weight == 1 else _dense(tensor) * weight
            total = scaled if total is None else total + scaled
    return total


def _both(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]


def _add(weights: Sequence[Tensor], steps: Sequence[Tensor], factor: float) -> None:
    if all(step.layout is torch.strided for step in steps):
        torch._foreach_add_(list(weights), list(steps), alpha=factor)
    else:
        for weight, step in zip(weights, steps, strict=True):
            weight.add_(step, alpha=factor)


def _wide_norm(tensor: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(_wide(tensor.coalesce().values() if tensor.is_sparse else tensor))
    return length


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, dense and real: real and imaginary parts are coordinates like others."""
    tensor = _dense(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _on_one_device(scalars: list[Tensor]) -> list[Tensor]:
    return [scalar.to(scalars[0].device) for scalar in scalars]


def _whole(tensor: Any) -> Tensor:
    """A tensor that may be the sum of what processes hold, complete."""
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result
