"""Numbers from features, weights, trajectories and optimizers. Pure functions; never imports lightning."""

from lightning_dynamics.metrics.stability import StabilityRule, stability_rule

__all__ = ["StabilityRule", "stability_rule"]
