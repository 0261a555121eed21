"""What is checked and decided before the first step, and what is read off a Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.probe import ProbeData

_READABLE = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


def default_cadence(trainer: Trainer, data: Sequence[ProbeData], gradients: float, budget: float) -> int:
    """Steps between points at which they cost ``budget`` of training, rounded up to a number that is easy to read.

    A step costs one gradient on a batch, a point ``gradients`` of them on the probes.
    """
    batches = sum(len(each.items) + each.wanted for each in data)
    per_batch = trainer.accumulate_grad_batches
    least = gradients * max(1, batches) / per_batch / budget
    power = 10 ** math.floor(math.log10(least)) if least >= 10 else 1
    return next(math.ceil(m * power) for m in _READABLE if m * power >= least)


def check_strategy(trainer: Trainer, monitors: Sequence[DynamicsMonitor[Any]]) -> None:
    strategy = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{strategy} takes the weights apart in a way of its own. Monitors run on a single device and with DDP, "
            "those of weights alone also with ModelParallelStrategy."
        )
    unable = next((monitor for monitor in monitors if not monitor.is_for_shards), None)
    if isinstance(trainer.strategy, ModelParallelStrategy) and unable is not None:
        raise MisconfigurationException(
            f"{strategy} shards the weights, and PyTorch has no second derivatives there: {unable.label} runs on a "
            "single device and with DDP. A DisplacementMonitor without data or eigenvectors runs with shards."
        )


def check_batches(monitors: Sequence[DynamicsMonitor[Any]]) -> None:
    """Refuse what cannot be with a step that pulls its batches from an iterator."""
    for monitor in monitors:
        if any(probe.current_batch for probe in monitor.probes):
            raise MisconfigurationException(
                f"{monitor.label} is to measure on the current batch, but `training_step` takes an iterator, so that "
                "no batch is known before the step. Use `first_batches` or another probe."
            )


def check_families(monitors: Sequence[DynamicsMonitor[Any]]) -> None:
    families = [monitor.table.family for monitor in monitors]
    for family in families:
        if families.count(family) > 1:
            raise MisconfigurationException(
                f"{families.count(family)} monitors log under '{family}/'. Give all but one of them a `name=`."
            )


def takes_iterator(module: LightningModule) -> bool:
    return bool(_compat.is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True))


def clip_factor(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """What the Trainer's clipping is about to multiply the gradient by; None where it does not clip."""
    limit = trainer.gradient_clip_val
    if not limit:
        return None
    gradients = [p.grad.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None
    norm = _norm(gradients)
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        factor = _norm([gradient.clamp(-limit, limit) for gradient in gradients]) / norm.clamp(min=1e-30)
    else:
        factor = limit / (norm + 1e-6)
    return factor.clamp(max=1.0)


def _norm(tensors: list[Tensor]) -> Tensor:
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    norms: list[Tensor] = [norm.to(dense[0].device) for norm in torch._foreach_norm(dense)]
    return torch.stack(norms).norm()  # type: ignore[no-any-return]


def averaged_by(trainer: Trainer) -> str | None:
    """Name of a callback that swaps averaged weights in at the end of training, before the monitors see them."""
    swapped = _compat.only_collects_statistics(trainer)
    for callback in _compat.callbacks(trainer):
        if isinstance(callback, DynamicsMonitor) and not swapped:
            return None
        if "Averaging" in type(callback).__name__:
            return f"averaged by {type(callback).__name__}"
    return None
