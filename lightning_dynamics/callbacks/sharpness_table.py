"""What a StochasticSharpnessMonitor measures, declared."""

from __future__ import annotations

from lightning_dynamics.recording.quantity import ErrorKind, Quantity, QuantityTable

_EDGE = "Andreyev and Beneventano, arXiv 2412.20553"
_CURVATURE = "loss/θ²"
_SHARPNESS, _RATIOS, _STEP = "Sharpness of mini-batches", "Edge of stochastic stability", "The step really made"


def sharpness_table(name: str | None = None) -> QuantityTable:
    """The quantities of a :class:`StochasticSharpnessMonitor`.

    Args:
        name: What tells it apart from others of its kind.
    """
    return QuantityTable(
        "sharpness" if name is None else f"sharpness_{name}",
        "Stochastic sharpness" if name is None else f"Stochastic sharpness ({name})",
        (
            _curvature(
                "batch_sharpness",
                "BS",
                "Batch Sharpness E_B[g_BᵀH_Bg_B/‖g_B‖²]: the curvature that a mini-batch has along its own gradient. "
                "In mini-batch training it is observed to level off at 2/η.",
                _EDGE,
            ),
            _curvature(
                "minibatch_top_1",
                "MiniBS",
                "E_B[λmax(H_B)], the mean sharpness of single mini-batches; at least the sharpness.",
                f"{_EDGE}, version 1",
            ),
            _curvature(
                "top_1",
                "λ₁",
                "Largest eigenvalue of the Hessian of all drawn mini-batches together.",
                "Cohen et al., arXiv 2103.00065",
                error="bound",
            ),
            _curvature(
                "stability_threshold",
                "λ*",
                "Deterministic edge of the optimizer where it is one number: 2/η, with momentum 2(1 + β)/η. The level "
                "that Batch Sharpness is observed at for large batches.",
                f"{_EDGE}; arXiv 2604.14108 for momentum",
                error="exact",
            ),
            _curvature(
                "small_batch_level",
                "2(1-β)/η",
                "With momentum, the level that Batch Sharpness is observed at for small batches.",
                "abstract of arXiv 2604.14108",
                error="exact",
            ),
            _ratio(
                "edge_ratio",
                "½E_B[sᵀ(H_B + W)s/(g̃ᵀs)] with s = Cg̃, g̃ = g_B + Wθ, effective steps C and coupled weight decay W of "
                "the optimizer: Batch Sharpness over its deterministic edge, for plain SGD BS·η/2. Observed to level "
                "off at 1, not proved.",
                f"{_EDGE}; C and W derived",
            ),
            _ratio(
                "edge_ratio_small_batch",
                "With momentum, Batch Sharpness over the level 2(1 - β)/η of small batches. Observed, not proved.",
                "abstract of arXiv 2604.14108",
            ),
            Quantity(
                "balance_ratio",
                "",
                "1",
                "GNI over its prediction 2(1 - β)/η + 2β/(1 + β)·gᵀHg/‖g‖², numerator and denominator summed over the "
                "last points: 1 in any stationary regime, and no edge.",
                "own; exact on quadratics under white noise",
                "standard error",
                "Balance of noise and descent",
            ),
            Quantity(
                "update_edge",
                "r",
                "1",
                "-½ΔᵀHΔ/(gᵀΔ) for the step Δ that was really made, whatever the optimizer: 1 where it gains nothing to "
                "second order, on average over steps in any stationary regime.",
                "own",
                "standard error",
                _STEP,
            ),
            _beside("batch_sharpness_of_means", "", _CURVATURE, "E_B[g_BᵀH_Bg_B]/E_B‖g_B‖².", _EDGE, _SHARPNESS),
            _beside(
                "gni",
                "GNI",
                _CURVATURE,
                "Gradient-noise interaction E_B[g_BᵀHg_B]/‖g‖², numerator and denominator without bias.",
                _EDGE,
                "Gradient-noise interaction",
            ),
            _beside(
                "gni_predicted",
                "",
                _CURVATURE,
                "What GNI is in a stationary regime: 2(1 - β)/η + 2β/(1 + β)·gᵀHg/‖g‖², at this point alone.",
                "own",
                "Gradient-noise interaction",
            ),
            _beside(
                "ias",
                "IAS",
                _CURVATURE,
                "Interaction-aware sharpness E_B[g_BᵀHg_B]/E_B‖g_B‖². It has no threshold.",
                "Lee and Jang, ICLR 2023",
                _SHARPNESS,
            ),
            _beside(
                "gradient_sharpness",
                "",
                _CURVATURE,
                "gᵀHg/‖g‖², the curvature along the full gradient, without bias. With momentum only.",
                "own",
                _SHARPNESS,
            ),
            _beside(
                "gap",
                "",
                _CURVATURE,
                "Mean of λmax(H_B) - v₁ᵀH_Bv₁ with the top eigenvector v₁ of all draws together: MiniBS less the "
                "sharpness of as many draws.",
                "own",
                "Gap between MiniBS and sharpness",
            ),
            _beside("loss", "L", "loss", "Mean loss of the drawn mini-batches.", "own", "Loss of the draws"),
            _beside(
                "predicted_change",
                "",
                "loss",
                "gᵀΔ + ½ΔᵀHΔ, the change of the loss by the step really made, to second order.",
                "own",
                "Change of the loss by a step",
            ),
            _beside(
                "realized_change",
                "",
                "loss",
                "L(θ + Δ) - L(θ) for the step really made, on the drawn mini-batches.",
                "own",
                "Change of the loss by a step",
            ),
            _beside(
                "step_sharpness",
                "",
                _CURVATURE,
                "gᵀHg/‖g‖² of the very batch that the step was made of.",
                _EDGE,
                _SHARPNESS,
                "exact",
            ),
            _beside(
                "step_edge",
                "",
                "1",
                "-½ΔᵀH_BΔ/(g_BᵀΔ) on the very batch that the step was made of: for plain SGD η/2 times its step "
                "sharpness.",
                "own",
                _STEP,
                "exact",
            ),
            _beside(
                "step_sharpness_momentum",
                "",
                _CURVATURE,
                "sᵀH_Bs/(sᵀg_B) along the step direction s = -Δ/η, momentum included, on the very batch that the step "
                "was made of; where there is one learning rate.",
                "reference implementation of arXiv 2412.20553",
                _SHARPNESS,
                "exact",
            ),
        ),
        headline=("edge_ratio",),
        references=("stability_threshold", "small_batch_level", "gni_predicted"),
        levels=tuple((key, 1.0) for key in ("edge_ratio", "edge_ratio_small_batch", "update_edge", "balance_ratio")),
    )


def _curvature(key: str, symbol: str, text: str, source: str, error: ErrorKind = "standard error") -> Quantity:
    return Quantity(key, symbol, _CURVATURE, text, source, error, _SHARPNESS)


def _ratio(key: str, text: str, source: str) -> Quantity:
    return Quantity(key, "ρ", "1", text, source, "standard error", _RATIOS)


def _beside(
    key: str, symbol: str, unit: str, text: str, source: str, panel: str, error: ErrorKind = "standard error"
) -> Quantity:
    """What stands in the record, and in the loggers on request."""
    return Quantity(key, symbol, unit, text, source, error, panel, on_by_default=False)
