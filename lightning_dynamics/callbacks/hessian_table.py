"""What a HessianMonitor measures, declared."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dynamics.recording.quantity import ErrorKind, Quantity, QuantityTable

_COHEN = "Cohen et al., arXiv 2103.00065"
_CURVATURE = "loss/θ²"

_MATRICES = {
    "hessian": ("loss Hessian", "Hessian"),
    "preconditioned": ("preconditioned Hessian C^½(H + W)C^½", "Preconditioned Hessian"),
    "gauss_newton": ("Gauss-Newton matrix G = Jᵀ∇²φJ", "Gauss-Newton matrix"),
    "residual": ("residual H - G of the Gauss-Newton matrix", "Residual of Gauss-Newton"),
    "fisher": ("Fisher information", "Fisher information"),
    "empirical_fisher": ("empirical Fisher matrix (1/n)Σ∇ℓᵢ∇ℓᵢᵀ", "Empirical Fisher matrix"),
}


def hessian_table(top_k: int, bottom_k: int, operator: str = "hessian", name: str | None = None) -> QuantityTable:
    """The quantities of a :class:`HessianMonitor`.

    Args:
        top_k: Its number of largest eigenvalues.
        bottom_k: Its number of smallest eigenvalues.
        operator: The matrix that it measures, first part of its keys.
        name: What tells it apart from others of its kind.
    """
    matrix, title = _MATRICES[operator]
    # an effective step times a curvature has no unit
    unit = "1" if operator == "preconditioned" else _CURVATURE
    quantities = [
        *(_edge() if operator == "hessian" else ()),
        *_eigenvalues(top_k, bottom_k, matrix, unit, operator == "hessian"),
        Quantity("probe_loss", "L", "loss", "Loss on the probe.", "own", "exact", "Probe loss"),
        Quantity(
            "gradient_norm", "‖∇L‖", "loss/θ", "Norm of the gradient on the probe.", "own", "exact", "Gradient norm"
        ),
        *_spectrum(matrix, unit, top_k),
        *_beside(matrix, unit, top_k, operator),
    ]
    return QuantityTable(
        operator if name is None else f"{operator}_{name}",
        title if name is None else f"{title} ({name})",
        tuple(quantities),
        headline=("edge_ratio", "top_1") if operator == "hessian" else ("top_1",),
        log_panels=("Probe loss", "Gradient norm"),
        references=("stability_threshold",),
        levels=(("edge_ratio", 1.0), ("sam_oscillation", 1.0)),
    )


def _edge() -> Iterator[Quantity]:
    yield Quantity(
        "edge_ratio",
        "ρ",
        "1",
        "λmax(C^½(H + W)C^½)/2 with the optimizers' effective steps C and coupled weight decay W: 1 is the "
        "deterministic edge of stability. In mini-batch training it stays below.",
        f"{_COHEN}; arXiv 2207.14484; mixed groups derived",
        "bound",
        "Edge ratio",
    )


def _eigenvalues(top_k: int, bottom_k: int, matrix: str, unit: str, has_edge: bool) -> Iterator[Quantity]:
    for i in range(1, top_k + 1):
        yield Quantity(
            f"top_{i}",
            f"λ{_sub(i)}",
            unit,
            f"Eigenvalue number {i} of the {matrix} on the probe, from the top"
            + (" (the sharpness)." if i == 1 and has_edge else "."),
            _COHEN if has_edge else "own",
            "bound",
            ("Sharpness and threshold" if has_edge else "Largest eigenvalue") if i == 1 else "Top eigenvalues",
        )
        if i == 1 and has_edge:
            yield Quantity(
                "stability_threshold",
                "λ*",
                _CURVATURE,
                "Largest stable eigenvalue of a quadratic loss under this optimizer, where it is one number: 2/η for "
                "gradient descent.",
                f"{_COHEN}; arXiv 2207.14484",
                "exact",
                "Sharpness and threshold",
            )
    for i in range(1, bottom_k + 1):
        yield Quantity(
            f"bottom_{i}",
            f"λ₋{_sub(i)}",
            unit,
            f"Eigenvalue number {i} of the {matrix} on the probe, from the bottom.",
            "own",
            "bound",
            "Bottom eigenvalues",
            on_by_default=i == 1,
        )


def _spectrum(matrix: str, unit: str, k: int) -> Iterator[Quantity]:
    """What is measured in detail and logged."""
    yield Quantity(
        "density",
        "ρ(λ)",
        f"1/({unit})",
        f"Spectral density of the {matrix} by stochastic Lanczos quadrature, certified eigenvalues exact. The "
        "histogram shows log₁₀(1 + number of eigenvalues).",
        "Ghorbani, Krishnan and Xiao, arXiv 1901.10159",
        "none",
        "Spectral density",
        form="density",
    )
    yield Quantity("trace", "tr", unit, f"Trace of the {matrix}.", "Hutchinson (1989)", "standard error", "Trace")
    yield Quantity(
        "effective_parameters",
        "Σλ/(λ+α)",
        "1",
        "Number of directions that the loss determines against a prior of width α, which stands in the record.",
        "MacKay (1992); Maddox et al., arXiv 2003.02139",
        "standard error",
        "Effective parameters",
    )
    for which, since in (("previous", "the previous measurement"), ("first", "the first measurement")):
        yield Quantity(
            f"overlap_{which}",
            "‖VᵀW‖²/k",
            "1",
            f"Overlap of the span of the top {k} eigenvectors with that of {since}, where both are certified: 1 is the "
            "same, k/p a random one. The lag stands in the record.",
            "own; the idea is Hessian inertia (Bao et al., HiLD 2023)",
            "bound",
            "Hessian inertia",
        )


def _beside(matrix: str, unit: str, k: int, operator: str) -> Iterator[Quantity]:
    """What stands in the record, and in the loggers on request."""

    def record(
        key: str, symbol: str, of: str, text: str, source: str, error: ErrorKind, panel: str, per_layer: bool = False
    ) -> Quantity:
        return Quantity(key, symbol, of, text, source, error, panel, on_by_default=False, per_layer=per_layer)

    yield record(
        "top_1_swing",
        "|Δλ₁|/2",
        unit,
        "Half of the difference of λ₁ between two consecutive steps: what it swings by at the edge.",
        "own",
        "bound",
        "Swing of the largest eigenvalue",
    )
    if operator != "preconditioned":
        yield record(
            "gradient_in_top_k",
            "‖Vᵀ∇L‖²/‖∇L‖²",
            "1",
            f"Share of the squared gradient in the span of the top {k} eigenvectors. The bound stands where "
            "completeness was checked, at both steps of a pair.",
            "Gur-Ari, Roberts and Dyer, arXiv 1812.04754",
            "bound",
            "Gradient in the top subspace",
        )
    yield record(
        "trace_stderr",
        "",
        unit,
        "Standard error of the trace, from the spread over the random vectors.",
        "own",
        "none",
        "Trace",
    )
    yield record(
        "effective_parameters_relative",
        "Σλ/(λ+λ₁/100)",
        "1",
        "The same with α = λ₁/100: it does not change with the scale of the loss.",
        "own; the idea is that of Wang and Roberts, arXiv 2305.18490",
        "standard error",
        "Effective parameters",
    )
    yield record(
        "spectral_sparsity",
        "",
        "1",
        "Share of the eigenvalues whose modulus is below τ, 1 % of λ₁ by default.",
        "own",
        "standard error",
        "Spectral sparsity",
    )
    yield record(
        "negative_mass",
        "Σ|λ₋|/Σ|λ|",
        "1",
        "Sum of the negative eigenvalues' moduli as a share of that of all.",
        "own",
        "none",
        "Negative mass",
    )
    yield record(
        "block_top_1",
        "λ₁(H_ll)",
        unit,
        f"Largest eigenvalue of a layer's diagonal block of the {matrix}.",
        "own",
        "bound",
        "Largest eigenvalue by layer",
        per_layer=True,
    )
    yield record(
        "block_trace",
        "tr H_ll",
        unit,
        f"Trace of a layer's diagonal block of the {matrix}.",
        "own",
        "standard error",
        "Trace by layer",
        per_layer=True,
    )
    for per_layer in (False, True):
        yield record(
            "median_ratio",
            "R_med",
            "1",
            "Largest over median modulus of the diagonal entries at random coordinates"
            + (" of a layer." if per_layer else "."),
            "Jiang, Malik and Li, arXiv 2211.02254",
            "none",
            "R_med by layer" if per_layer else "R_med",
            per_layer=per_layer,
        )
    if operator == "hessian":
        yield record(
            "sam_oscillation",
            "λ₁(1+ρλ₁/G)/λ*",
            "1",
            "With SAM: λ₁(1 + ρλ₁/G) over the stability threshold λ* of the base optimizer, G being the norm of the "
            "gradient that perturbed the step before. On a quadratic loss it is 1 where training has settled into "
            "SAM's oscillation along the leading eigenvector, whatever λ₁ < λ* is: it certifies oscillation, not "
            "instability. With unnormalized SAM λ₁(1 + ρλ₁)/λ*.",
            "derived",
            "bound",
            "Oscillation of SAM",
        )
        yield record(
            "sharpening_rate",
            "-∇λ₁·∇L",
            "loss²/θ⁴",
            "Rate at which gradient flow changes the largest eigenvalue: progressive sharpening where it is positive.",
            "derived",
            "bound",
            "Progressive sharpening",
        )
        yield record(
            "probe_bias",
            "",
            unit,
            "Mean λ₁ of the two halves of the probe minus λ₁ of the whole: an estimate of how far λ₁ on the probe "
            "lies above λ₁ on the training set.",
            "own (Jensen's inequality)",
            "none",
            "Bias of the probe",
        )
    yield record(
        "clip_factor",
        "",
        "1",
        "Mean factor by which clipping shortened gradients since the last point.",
        "own",
        "exact",
        "Clipping",
    )
    yield record(
        "clipped_share",
        "",
        "1",
        "Share of optimizer steps since the last point whose gradient was clipped.",
        "own",
        "exact",
        "Clipping",
    )


def _sub(number: int) -> str:
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(number))
