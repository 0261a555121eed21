"""Operations whose second derivative PyTorch lacks or gets wrong, composed of operations that have a right one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_AT_ONCE = 1 << 24  # coordinate differences that may be held at once; beyond, Euclidean distances are multiplied out


class Repaired(TorchFunctionMode):
    """While active, these operations have the value and the gradient that they always have, and a second derivative.

    =============================================  ====================================================================
    operation                                      without
    =============================================  ====================================================================
    ``weight_norm``, both kinds                    wrong: not symmetric
    ``EmbeddingBag``                               missing
    ``cdist``, ``pdist``                           missing in older releases
    ``hardsigmoid``                                missing
    attention, within a user's ``sdpa_kernel`` too missing in the fused kernels
    ``scale_grad_by_freq=True`` of embeddings      what it makes is no gradient of the loss; here it is ignored
    =============================================  ====================================================================

    Distances at coincident points, where they have kinks, have the derivative zero, as in PyTorch's gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPAIRS.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, False, sparse)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.dim() == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")  # PyTorch's own words
        rows, counted = _bags(offsets, len(input), include_last_offset)
        if not rows.numel():
            return weight[:0].sum(0).expand(len(rows), -1)
        input = input[rows]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[rows]
    else:
        counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        padding_idx = padding_idx % len(weight)
        counted = counted & (input != padding_idx)
    members = _embedding(input, weight, padding_idx, max_norm, norm_type, sparse=sparse)
    if per_sample_weights is not None:
        members = members * per_sample_weights.unsqueeze(-1)
    counted = counted.unsqueeze(-1)
    if mode == "max":
        largest = members.masked_fill(~counted, -torch.inf).max(1).values
        return torch.where(counted.any(1), largest, 0)
    total = torch.where(counted, members, 0).sum(1)
    return total if mode == "sum" else total / counted.sum(1).clamp(min=1)


def _bags(offsets: Tensor, count: int, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """Positions of the members of each bag, shape ``(bags, length of the longest)``, and which of them are members."""
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([count])])
    starts = offsets[:-1] if include_last_offset else offsets
    longest = int((ends - starts).max()) if len(starts) else 0
    rows = starts.unsqueeze(1) + torch.arange(longest, device=offsets.device)
    return rows.clamp(max=max(0, count - 1)), rows < ends.unsqueeze(1)


def distances(x1: Tensor, x2: Tensor, p: float = 2.0) -> Tensor:
    """p-norm distances between rows, shapes ``(…, P, M)`` and ``(…, R, M)`` to ``(…, P, R)``, twice differentiable."""
    x1, x2 = _wide(x1), _wide(x2)
    if p == 2 and x1.shape[-2] * x2.numel() > _AT_ONCE:
        lengths = x1.square().sum(-1).unsqueeze(-1) + x2.square().sum(-1).unsqueeze(-2)
        return _root(lengths - 2 * x1 @ x2.mT, p)
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 2:
        return _root(difference.square().sum(-1), p)
    if p == 0:
        return (difference != 0).to(difference.dtype).sum(-1) + 0 * difference.sum(-1)
    if p == 1:
        return difference.abs().sum(-1)
    if p == torch.inf:
        return difference.abs().amax(-1)
    is_zero = difference == 0  # the powers' derivatives are infinite there, for p < 2
    powers = torch.where(is_zero, 1, difference).abs().pow(p)
    return _root(torch.where(is_zero, 0, powers).sum(-1), p)


def _root(sum_of_powers: Tensor, p: float) -> Tensor:
    is_apart = sum_of_powers > 0
    safe = torch.where(is_apart, sum_of_powers, 1)
    return torch.where(is_apart, safe.sqrt() if p == 2 else safe.pow(1 / p), 0)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in which autocast computes distances."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    if _cdist_is_differentiable_twice() or not (x1.requires_grad or x2.requires_grad):
        return torch.cdist(x1, x2, p) if compute_mode is None else torch.cdist(x1, x2, p, compute_mode)
    return distances(x1, x2, p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    if _cdist_is_differentiable_twice() or not input.requires_grad:
        return torch.pdist(input, p)
    row, column = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return distances(input, input, p)[row, column]


@cache
def _cdist_is_differentiable_twice() -> bool:
    points = torch.tensor([[0.0], [1.0]], requires_grad=True)
    try:
        for distance in (torch.cdist(points, points), torch.pdist(points)):
            (gradient,) = torch.autograd.grad(distance.square().sum(), points, create_graph=True)
            torch.autograd.grad(gradient.sum(), points)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    value = F.relu6(input + 3) / 6
    return input.copy_(value) if inplace else value


def _exact_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(attention)
    def run(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*args, **kwargs)

    return run


_REPAIRS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.hardsigmoid: _hardsigmoid,
    F.scaled_dot_product_attention: _exact_attention(F.scaled_dot_product_attention),
    F.multi_head_attention_forward: _exact_attention(F.multi_head_attention_forward),
}
