"""How a Trainer's strategy perturbs the weights, as far as there is a theory of it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_dynamics.strategies import SAMMixin
from lightning_dynamics.strategies.noisy_descent import NoisyDescentMixin


@dataclass(frozen=True)
class Perturbation:
    """Sharpness-aware minimization with one perturbation of each step, by the gradient of all of its samples.

    Attributes:
        rho: ρ at the step that comes.
        gradient_norm: Norm of the gradient that perturbed the last step; None for unnormalized SAM, which does not
            divide by it.
    """

    rho: float
    gradient_norm: float | None

    @property
    def reach(self) -> float:
        """Length of the perturbation over that of the gradient."""
        return self.rho if self.gradient_norm is None else self.rho / self.gradient_norm


def perturbation(trainer: Trainer) -> Perturbation | str | None:
    """How a Trainer perturbs now, or why there is no theory of it; None where its strategy is not SAM."""
    strategy = trainer.strategy
    if not isinstance(strategy, SAMMixin):
        return None
    if isinstance(strategy, NoisyDescentMixin):
        return "the gradient that perturbs is noisy"
    if strategy.variant not in ("sam", "usam"):
        return f"no theory of {strategy.variant.upper()}"
    if strategy.m is not None or (trainer.world_size > 1 and strategy.perturbation == "per_rank"):
        return "parts of a batch are perturbed by themselves"
    if strategy.every_k > 1:
        return "there is not a second gradient in every step"
    if len(strategy.optimizers) != 1:
        return "several optimizers perturb one after the other"
    norm = None
    if strategy.variant == "sam":
        norm = strategy.gradient_norm
        if not norm:
            return "no gradient has perturbed yet" if norm is None else "the gradient that perturbed last is zero"
    rho = strategy.rho
    if callable(rho):
        rho = rho(trainer.global_step, float(strategy.optimizers[0].param_groups[0]["lr"]))
    return Perturbation(rho, norm)
