"""What must be switched so that a loss can be differentiated twice, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Run forward passes so that they have a second derivative, in full float32, and the same one every time.

    - Gradients on, inference mode off (validation hooks run without them).
    - Compiled code runs eagerly: compiled graphs have no double backward. The compiled training graph is left as it
      was.
    - Attention uses the math kernel: the fused ones have no second derivative.
    - float32 matrix products in full precision (no TF32, no bfloat16 passes).
    - cuDNN without autotuning, and without recurrent networks (their second derivative does not exist there).
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if hasattr(torch.compiler, "set_stance"):  # torch ≥ 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(
            torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled and not recurrent,
                benchmark=False,
                deterministic=True,
                allow_tf32=False,
            )
        )
        stack.enter_context(_full_matmul_precision())
        yield


@contextmanager
def _full_matmul_precision() -> Iterator[None]:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend (torch ≥ 2.9), which the one switch refuses to read
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        values = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, values, strict=True):
                backend.fp32_precision = value
    else:
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def refuse_reentrant_checkpointing(loss: Tensor) -> None:
    """Refuse a loss that was computed with reentrant activation checkpointing.

    ``torch.autograd.grad`` does not see the parameters within such a segment, and takes their gradient for zero.

    Raises:
        ValueError: If there is such a segment in the loss's graph.
    """
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "The step uses activation checkpointing of the reentrant kind, which hides parameters from "
                "differentiation. Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint`."
            )
        waiting.extend(parent for parent, _ in node.next_functions)
