"""What must be switched so that a loss can be differentiated twice, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import _functions
from torch.utils import checkpoint

from lightning_dynamics.objective.numerics import in_full_precision
from lightning_dynamics.objective.repairs import Repaired


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Run forward passes so that they have a second derivative, in full float32, and the same one every time.

    - Gradients on, inference mode off (validation hooks run without them).
    - Compiled code runs eagerly: compiled graphs have no double backward.
    - Attention uses the math kernel: the fused ones have no second derivative.
    - Activation checkpointing of the reentrant kind becomes that of the other kind: the same function, open to
      ``torch.autograd.grad``.
    - Batch norm that is about to synchronize with other processes raises a ``ValueError``: the loss of one process is
      then not a function of its own data, and has no second derivative in PyTorch.
    - Arithmetic in full precision, see :func:`in_full_precision`; no recurrent networks of cuDNN's (their second
      derivative does not exist there).
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_replaced(checkpoint.CheckpointFunction, "apply", staticmethod(_checkpoint)))
        stack.enter_context(_replaced(checkpoint, "_CheckpointFrame", _RepairedFrame))
        stack.enter_context(_replaced(_functions.SyncBatchNorm, "apply", staticmethod(_refuse_to_synchronize)))
        stack.enter_context(in_full_precision(cudnn=not recurrent))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class or of a module of PyTorch's, whoever holds references to these."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class _RepairedFrame(checkpoint._CheckpointFrame):
    """A checkpointed segment that runs again as it ran: repaired, which the engine would not know."""

    def __init__(self, recompute_fn: Callable[..., Any], *args: Any) -> None:
        def recompute(*inputs: Any) -> Any:
            with Repaired():
                return recompute_fn(*inputs)

        super().__init__(recompute, *args)


def _checkpoint(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """What reentrant checkpointing computes, without reentering."""
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args) and torch.is_grad_enabled():
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    with torch.no_grad():  # the reentrant kind gives parameters no gradient then
        return function(*args)


def _refuse_to_synchronize(*_: Any) -> Any:
    raise ValueError(
        "The module has SyncBatchNorm, which couples the losses of all processes and has no second derivative in "
        'PyTorch. Measure with `mode="eval"`, where the running statistics are used, train on one process, or use '
        "batch norm that is not synchronized."
    )


def refuse_hidden_derivatives(loss: Tensor) -> None:
    """Refuse a loss with operations whose derivatives would be taken for zero, or fail without a name.

    - Reentrant activation checkpointing other than PyTorch's own: ``torch.autograd.grad`` does not see the parameters
      within such a segment.
    - Custom functions whose backward is marked ``@once_differentiable``: their second derivative is missing, and where
      the loss is linear in them it counts as zero without an error.

    Raises:
        ValueError: If there is one in the loss's graph, with its name and the cure.
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "The step uses activation checkpointing of a reentrant kind that is not PyTorch's own, which hides "
                "parameters from differentiation. Use `torch.utils.checkpoint.checkpoint`."
            )
        function = getattr(node, "_forward_cls", None)
        if function is not None and _is_once_differentiable(function):
            raise ValueError(
                f"`{function.__name__}` is a custom autograd function marked `@once_differentiable`: it has no second "
                "derivative. Write its `backward` of differentiable operations and drop the mark, or measure another "
                "loss with `loss_fn=`."
            )
        waiting.extend(parent for parent, _ in node.next_functions)


def _is_once_differentiable(function: Any) -> bool:
    return getattr(function.backward, "__code__", None) is _ONCE


_ONCE = once_differentiable(lambda ctx: None).__code__  # the decorator leaves no other mark
