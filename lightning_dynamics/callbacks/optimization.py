"""How a Trainer optimizes, as far as there is a theory of it: its optimizer, and the order of its batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import SGD
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler

from lightning_dynamics import _compat
from lightning_dynamics.metrics import HeavyBall
from lightning_dynamics.strategies import SAMMixin
from lightning_dynamics.strategies.noisy_descent import NoisyDescentMixin
from lightning_dynamics.strategies.order import OrderSampler

Order = Literal["with_replacement", "reshuffled"]
"""How the batches of optimizer steps are drawn."""


@dataclass(frozen=True)
class Sgd:
    """SGD with one set of options for all parameters, without dampening.

    Attributes:
        lr: Learning rate η > 0.
        momentum: β.
        nesterov: Whether it is Nesterov's.
        weight_decay: Coupled weight decay.
    """

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float


@dataclass(frozen=True)
class Optimization:
    """How a Trainer optimizes at a step.

    Attributes:
        sgd: Its optimizer, or why it is none that there is a theory of.
        order: How its batches are drawn, None if that is not known.
        batches: Optimizer steps in an epoch, None if that is not known.
        rates: The learning rates of all parameter groups of all optimizers, each once.
    """

    sgd: Sgd | str
    order: Order | None
    batches: int | None
    rates: tuple[float, ...] = ()


def optimization(trainer: Trainer) -> Optimization:
    """How a Trainer optimizes now."""
    optimizers, _ = _compat.optimizer_lists(trainer)
    rates = {float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups}
    return Optimization(sgd(trainer), *sampling_order(trainer), tuple(sorted(rates)))


def sgd(trainer: Trainer) -> Sgd | str:
    """The training's optimizer if it is SGD, or why it is not."""
    if isinstance(trainer.strategy, SAMMixin):
        return "no theory of SAM"
    optimizers, _ = _compat.optimizer_lists(trainer)
    if len(optimizers) != 1 or type(optimizers[0]) is not SGD:
        return f"no theory of {' and '.join(type(o).__name__ for o in optimizers) or 'no optimizer'}"
    groups = optimizers[0].param_groups
    options = {
        (float(group["lr"]), float(group["momentum"]), bool(group["nesterov"]), float(group["weight_decay"]))
        for group in groups
    }
    if len(options) > 1:
        return "parameter groups differ"
    rule = Sgd(*options.pop())
    if any((group["momentum"] and group["dampening"]) or group["maximize"] for group in groups):
        return "no theory of dampening or maximization"
    module = trainer.lightning_module
    if trainer.gradient_clip_val or _compat.is_overridden("configure_gradient_clipping", module):
        return "gradients are clipped"
    if not module.automatic_optimization:
        return "the module optimizes by hand"
    return rule if rule.lr > 0 else "the learning rate is 0"


def heavy_ball(trainer: Trainer) -> tuple[HeavyBall | str, float]:
    """The training's optimizer as the theory of its fluctuations knows it, or why not; and the coupled weight decay."""
    rule = sgd(trainer)
    if isinstance(rule, str):
        return rule, 0.0
    if rule.nesterov:
        return "no theory of Nesterov momentum", rule.weight_decay
    if isinstance(trainer.strategy, NoisyDescentMixin):
        return f"{trainer.strategy.noise} noise is injected into the gradient of all batches", rule.weight_decay
    order, batches = sampling_order(trainer)
    if order is None:
        reason = "the order of the batches is neither random reshuffling nor drawing with replacement"
        return reason, rule.weight_decay
    return HeavyBall(rule.lr, rule.momentum, order, batches if order == "reshuffled" else None), rule.weight_decay


def sampling_order(trainer: Trainer) -> tuple[Order | None, int | None]:
    """How the batches of an optimizer step are drawn, and how many there are in an epoch; None if it is not known."""
    loaders = _compat.training_loaders(trainer)
    if len(loaders) != 1 or not trainer.num_training_batches < math.inf:
        return None, None
    sampler = getattr(loaders[0], "sampler", None)
    batches = -(-int(trainer.num_training_batches) // accumulated_batches(trainer))
    if isinstance(trainer.strategy, NoisyDescentMixin):
        return None, batches
    if isinstance(sampler, OrderSampler) and sampler.order in ("with_replacement", "independent_batches"):
        return "with_replacement", batches  # from step to step the noise is white
    if trainer.num_training_batches < len(loaders[0]):  # each epoch is another part of the data
        return None, batches
    if isinstance(sampler, OrderSampler):
        return ("reshuffled", batches) if sampler.order == "random_reshuffling" and batches > 1 else (None, batches)
    if isinstance(sampler, DistributedSampler):
        return ("reshuffled", batches) if sampler.shuffle and batches > 1 else (None, batches)
    if type(sampler) is SubsetRandomSampler:
        return ("reshuffled", batches) if batches > 1 else (None, batches)
    if type(sampler) is not RandomSampler:
        return None, batches
    if sampler.replacement:
        return "with_replacement", batches
    if sampler.num_samples != len(sampler.data_source):
        return None, batches
    return ("reshuffled", batches) if batches > 1 else (None, batches)


def accumulated_batches(trainer: Trainer) -> int:
    """Batches of each rank that make one step, as training begins."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    if isinstance(trainer.strategy, NoisyDescentMixin) and trainer.num_training_batches < math.inf:
        return int(trainer.num_training_batches)
    for callback in _compat.callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler):  # it acts when an epoch starts
            return int(callback.get_accumulate_grad_batches(trainer.current_epoch))
    return trainer.accumulate_grad_batches
