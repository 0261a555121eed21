"""What a GradientNoiseMonitor measures, declared."""

from __future__ import annotations

from lightning_dynamics.recording.quantity import ErrorKind, Quantity, QuantityTable

_SQUARE = "loss²/θ²"
_SCALE = "McCandlish et al., arXiv 1812.06162"
_PLAIN = "For plain SGD."


def noise_table(directions: int, name: str | None = None) -> QuantityTable:
    """The quantities of a :class:`GradientNoiseMonitor`.

    Args:
        directions: Eigenvectors at either end along which noise is measured.
        name: What tells it apart from others of its kind.
    """
    quantities = [
        _logged(
            "trace", "tr Cov g_B", _SQUARE, "E‖g_B - g‖², the variance of a mini-batch's gradient.", "own", "Noise"
        ),
        _logged("squared_gradient_norm", "‖g‖²", _SQUARE, "‖g‖² without the bias that noise adds.", "own", "Noise"),
        _logged(
            "signal_to_noise",
            "‖g‖²/tr Cov g_B",
            "1",
            "‖g‖² over the variance of a mini-batch's gradient, both without bias.",
            "own",
            "Signal-to-noise ratio",
        ),
        _logged(
            "noise_scale",
            "tr Σ/‖g‖²",
            "samples",
            "Batch size at which noise and gradient are of one size: the two-size estimator, sizes b and all draws.",
            _SCALE,
            "Noise scale",
        ),
        _record("sample_trace", "tr Σ", _SQUARE, "(1/N)Σ‖gᵢ - g‖² over single samples.", "own", "Noise of samples"),
        _record(
            "fisher_trace",
            "tr F",
            _SQUARE,
            "(1/N)Σ‖gᵢ‖² = tr Σ + ‖g‖², trace of the empirical Fisher matrix.",
            "own",
            "Noise of samples",
        ),
        _record(
            "true_fisher_trace",
            "tr F",
            "1/θ²",
            "Trace of the Fisher matrix with labels from the model, on all drawn mini-batches together.",
            "own, by Hutchinson's estimator",
            "Noise of samples",
        ),
        _record(
            "modified_loss_gd",
            "(η/4)‖g‖²",
            "loss",
            f"What gradient descent adds to the loss that it follows, to first order in η. {_PLAIN}",
            "form after Smith et al., arXiv 2101.12176",
            "Implicit regularization",
        ),
        _record(
            "modified_loss_sgd",
            "(η/4k)Σ‖g_j‖²",
            "loss",
            "The same for SGD without replacement with k batches in an epoch: (η/4)(‖g‖² + tr Cov g_B). " + _PLAIN,
            "form after Smith et al., arXiv 2101.12176",
            "Implicit regularization",
        ),
        _record(
            "tail_index",
            "α",
            "1",
            "Tail index of ‖gᵢ - g‖ over samples by Hill's estimator, on the largest tenth.",
            "Hill (1975)",
            "Tail index of the noise",
        ),
    ]
    if directions:
        quantities += [
            _record(
                "weighted_trace",
                "Σw(ηkλᵢ)cᵢ",
                _SQUARE,
                "Noise of a mini-batch's gradient along eigenvectors, weighted by w(x) = (e⁻ˣ - 1 + x)/x², the rest by "
                "½: what an epoch without replacement regularizes. Flat and negative directions count most. " + _PLAIN,
                "own, on a question of Beneventano, arXiv 2312.16143",
                "Implicit regularization",
            ),
            _record(
                "share_in_directions",
                "Σcᵢ/tr Cov g_B",
                "1",
                f"Share of the noise along the {directions} top and {directions} bottom eigenvectors.",
                "own",
                "Share of the noise in eigenvectors",
            ),
            *(
                _record(
                    f"variance_{end}_{i}",
                    f"c{'₋' if end == 'bottom' else ''}{i}",
                    _SQUARE,
                    f"Variance of a mini-batch's gradient along Hessian eigenvector number {i} from the {end}.",
                    "own",
                    "Noise along eigenvectors",
                )
                for end in ("top", "bottom")
                for i in range(1, directions + 1)
            ),
            *(
                _record(
                    f"curvature_{end}_{i}",
                    f"λ{'₋' if end == 'bottom' else ''}{i}",
                    "loss/θ²",
                    f"Eigenvalue number {i} from the {end} of the Hessian of all drawn mini-batches together.",
                    "own",
                    "Curvature of the directions",
                    "bound",
                )
                for end in ("top", "bottom")
                for i in range(1, directions + 1)
            ),
            _record(
                "autocorrelation",
                "ρ(1)",
                "1",
                "Autocorrelation at lag 1 of the training's own gradients along the leading eigenvector, frozen at the "
                "last measurement in detail; with SAM, of those at w + e. More lags stand in the record.",
                "own; error by Bartlett's formula",
                "Autocorrelation of gradients",
            ),
        ]
    return QuantityTable(
        "noise" if name is None else f"noise_{name}",
        "Gradient noise" if name is None else f"Gradient noise ({name})",
        tuple(quantities),
        headline=("signal_to_noise",),
        log_panels=("Noise", "Signal-to-noise ratio", "Noise scale", "Noise of samples", "Noise along eigenvectors"),
    )


def _logged(key: str, symbol: str, unit: str, text: str, source: str, panel: str) -> Quantity:
    return Quantity(key, symbol, unit, text, source, "standard error", panel)


def _record(
    key: str, symbol: str, unit: str, text: str, source: str, panel: str, error: ErrorKind = "standard error"
) -> Quantity:
    """What stands in the record, and in the loggers on request."""
    return Quantity(key, symbol, unit, text, source, error, panel, on_by_default=False)
