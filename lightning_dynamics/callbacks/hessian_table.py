"""What a HessianMonitor measures, declared."""

from __future__ import annotations

from lightning_dynamics.recording.quantity import Quantity, QuantityTable

_COHEN = "Cohen et al., arXiv 2103.00065"


def hessian_table(top_k: int, bottom_k: int, family: str = "hessian") -> QuantityTable:
    """The quantities of a :class:`HessianMonitor`."""
    curvature = "loss/θ²"
    tops = [
        Quantity(
            f"top_{i}",
            f"λ{_sub(i)}",
            curvature,
            f"Eigenvalue number {i} of the loss Hessian on the probe, from the top"
            + (" (the sharpness)." if i == 1 else "."),
            _COHEN,
            "bound",
            "Sharpness and threshold" if i == 1 else "Top eigenvalues",
        )
        for i in range(1, top_k + 1)
    ]
    bottoms = [
        Quantity(
            f"bottom_{i}",
            f"λ₋{_sub(i)}",
            curvature,
            f"Eigenvalue number {i} of the loss Hessian on the probe, from the bottom.",
            "own",
            "bound",
            "Bottom eigenvalues",
            on_by_default=i == 1,
        )
        for i in range(1, bottom_k + 1)
    ]
    return QuantityTable(
        family,
        "Hessian" if family == "hessian" else f"Hessian ({family.removeprefix('hessian_')})",
        (
            Quantity(
                "edge_ratio",
                "ρ",
                "1",
                "λmax(C^½(H + W)C^½)/2 with the optimizers' effective steps C and coupled weight decay W: 1 is the "
                "deterministic edge of stability. In mini-batch training it stays below.",
                f"{_COHEN}; arXiv 2207.14484; mixed groups derived",
                "bound",
                "Edge ratio",
            ),
            tops[0],
            Quantity(
                "stability_threshold",
                "λ*",
                curvature,
                "Largest stable eigenvalue of a quadratic loss under this optimizer, where it is one number: 2/η for "
                "gradient descent.",
                f"{_COHEN}; arXiv 2207.14484",
                "exact",
                "Sharpness and threshold",
            ),
            *tops[1:],
            *bottoms,
            Quantity("probe_loss", "L", "loss", "Loss on the probe.", "own", "exact", "Probe loss"),
            Quantity(
                "gradient_norm", "‖∇L‖", "loss/θ", "Norm of the gradient on the probe.", "own", "exact", "Gradient norm"
            ),
            Quantity(
                "top_1_swing",
                "|Δλ₁|/2",
                curvature,
                "Half of the difference of λ₁ between two consecutive steps: what it swings by at the edge.",
                "own",
                "bound",
                "Swing of the sharpness",
                on_by_default=False,
            ),
            Quantity(
                "probe_bias",
                "",
                curvature,
                "Mean λ₁ of the two halves of the probe minus λ₁ of the whole: an estimate of how far λ₁ on the probe "
                "lies above λ₁ on the training set.",
                "own (Jensen's inequality)",
                "none",
                "Bias of the probe",
                on_by_default=False,
            ),
            Quantity(
                "clip_factor",
                "",
                "1",
                "Mean factor by which clipping shortened gradients since the last point.",
                "own",
                "exact",
                "Clipping",
                on_by_default=False,
            ),
            Quantity(
                "clipped_share",
                "",
                "1",
                "Share of optimizer steps since the last point whose gradient was clipped.",
                "own",
                "exact",
                "Clipping",
                on_by_default=False,
            ),
        ),
    )


def _sub(number: int) -> str:
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(number))
