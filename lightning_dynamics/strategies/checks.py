"""What sharpness-aware minimization cannot be done with, refused before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS

from lightning_dynamics import _compat
from lightning_dynamics.strategies.perturbation import DEFAULT_RHO, VARIANTS
from lightning_dynamics.strategies.schedules import Rho


def check_options(
    rho: float | Rho | None,
    variant: Any,
    perturbation: Any,
    m: Any,
    every_k: Any,
    look_alpha: Any,
    gsam_alpha: Any,
    same_noise: Any,
) -> float | Rho:
    """Refuse options that make no sense; return ρ, the usual one where none is given."""
    check_choice("variant", variant, VARIANTS)
    check_choice("perturbation", perturbation, ("per_rank", "global"))
    if not callable(rho):
        if rho is None and variant not in DEFAULT_RHO:
            raise MisconfigurationException("Unnormalized SAM has no usual `rho`, give one: e = rho · g.")
        rho = DEFAULT_RHO[variant] if rho is None else rho
        check_number("rho", rho)
    check_number("look_alpha", look_alpha)
    check_number("gsam_alpha", gsam_alpha)
    for name, count in (("m", 1 if m is None else m), ("every_k", every_k)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise MisconfigurationException(f"`{name}` must be a positive int, got {count!r}.")
    if not isinstance(same_noise, bool):
        raise MisconfigurationException(f"`same_noise` must be True or False, got {same_noise!r}.")
    if m is not None and (every_k > 1 or variant == "gsam" or perturbation == "global"):
        raise MisconfigurationException(
            "`m` perturbs parts of each rank's batch by themselves, which goes with neither `every_k`, "
            "`variant='gsam'` nor `perturbation='global'`."
        )
    if variant == "gsam" and every_k > 1:
        raise MisconfigurationException("`every_k` and `variant='gsam'` decompose the same two gradients: use one.")
    return rho


def check_run(strategy: Any, trainer: Trainer) -> None:
    """Refuse what SAM cannot be done with, before training starts.

    Args:
        strategy: The strategy with SAM.
        trainer: Its Trainer.
    """
    for optimizer in strategy.optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates its closure several times in a step, which SAM does not support: use a first-order"
                " optimizer (SGD, AdamW, ...)."
            )
        if name.upper().endswith("SAM"):
            raise MisconfigurationException(
                f"`configure_optimizers` returns a {name}, and the strategy does SAM already: return its base "
                "optimizer."
            )
    module = trainer.lightning_module
    unsized = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if is_lazy(tensor)]
    if unsized:
        raise MisconfigurationException(
            f"`{unsized[0]}` belongs to a lazy layer and has no size yet. Run the module once on a batch before "
            "training starts, for example at the end of `configure_model`."
        )
    if strategy.m is not None and not module.automatic_optimization:
        raise MisconfigurationException(
            "`m` splits the batch that Lightning hands to `training_step`, and this module optimizes by hand: "
            "split it there."
        )
    if module.automatic_optimization and _compat.is_param_in_hook_signature(
        module.training_step, "dataloader_iter", explicit=True
    ):
        raise MisconfigurationException(
            "SAM evaluates a batch twice, and a `training_step` with `dataloader_iter` draws its own: let it take "
            "`batch`."
        )
    if strategy.perturbation == "per_rank" and isinstance(strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "Gradients of sharded weights are averaged as they are computed: use `perturbation='global'`."
        )
    if strategy.perturbation == "per_rank" and getattr(strategy.model, "static_graph", False):
        raise MisconfigurationException(
            "A gradient of each rank by itself is not possible with `static_graph=True`: leave it out, or use "
            "`perturbation='global'`."
        )
    if strategy.every_k > 1 and isinstance(strategy, ModelParallelStrategy):
        raise MisconfigurationException("`every_k` keeps a gradient, which is not supported for sharded weights.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise MisconfigurationException(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise MisconfigurationException(f"`{name}` must be a finite number, not negative, got {value!r}.")
