"""What a SAMMonitor measures, declared."""

from __future__ import annotations

from lightning_dynamics.recording.quantity import Quantity, QuantityTable

_FORET = "Foret, Kleiner, Mobahi and Neyshabur, arXiv 2010.01412"


def sam_table(name: str | None = None) -> QuantityTable:
    """The quantities of a :class:`SAMMonitor`.

    Args:
        name: What tells it apart from others of its kind.
    """
    return QuantityTable(
        "sam" if name is None else f"sam_{name}",
        "Sharpness-aware minimization" if name is None else f"Sharpness-aware minimization ({name})",
        (
            _quantity(
                "sharpness_gap",
                "L(w+e) - L(w)",
                "loss",
                "What the perturbation e adds to the loss of the step's own batches: the sharpness that SAM minimizes "
                "beside the loss.",
                _FORET,
                "Sharpness gap",
            ),
            _quantity(
                "gradient_cosine",
                "cos(g, g_e)",
                "1",
                "Cosine of the angle between the gradients at w and at w + e: 1 where SAM is its base optimizer.",
                "own",
                "Gradient cosine",
            ),
            _quantity(
                "perturbation_norm",
                "‖e‖",
                "θ",
                "Length of the perturbation: ρ for SAM, ρ‖g‖ for unnormalized SAM.",
                _FORET,
                "Perturbation",
            ),
            _quantity("rho", "ρ", "θ; for unnormalized SAM θ²/loss", "ρ at the step.", _FORET, "Perturbation", False),
            _quantity(
                "gradient_norm",
                "‖g‖",
                "loss/θ",
                "Norm of the gradient that perturbs: that of the step's own batches.",
                _FORET,
                "Gradient that perturbs",
                False,
            ),
        ),
        headline=("sharpness_gap",),
    )


def _quantity(key: str, symbol: str, unit: str, text: str, source: str, panel: str, shown: bool = True) -> Quantity:
    return Quantity(key, symbol, unit, text, source, "exact", panel, on_by_default=shown)
