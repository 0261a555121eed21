"""How PyTorch is to compute while something is measured, whatever it does in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def in_full_precision(cudnn: bool = True) -> Iterator[None]:
    """Run eagerly, in full float32, and the same way every time.

    - Compiled code runs eagerly: hooks fire, and the compiled training graph is left as it was.
    - float32 matrix products in full precision (no TF32, no bfloat16 passes).
    - cuDNN deterministic, without autotuning.
    - Attention module by module: a fused path would go around the submodules, and their hooks.

    Args:
        cudnn: Whether cuDNN may be used where it is.
    """
    with ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):  # torch ≥ 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(
            torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled and cudnn,
                benchmark=False,
                deterministic=True,
                allow_tf32=False,
            )
        )
        stack.enter_context(_full_matmul_precision())
        stack.enter_context(_without_fused_layers())
        yield


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
