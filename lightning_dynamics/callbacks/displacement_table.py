"""The quantities of a displacement monitor."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dynamics.recording.quantity import ErrorKind, Quantity, QuantityTable

_KUNIN = "Kunin et al., arXiv 2107.09133"
_ON = ("from_init", "relative", "step", "path_length")

_MOVED: tuple[tuple[str, str, str, str, str], ...] = (
    ("from_init", "‖θ_t - θ₀‖", "θ", "Distance from the start of training.", "Distance from the start"),
    ("relative", "‖θ_t - θ₀‖/‖θ₀‖", "1", "That over the norm of the start.", "Relative distance from the start"),
    ("step", "‖δ‖", "θ", "Root mean square of ‖θ_s - θ_{s-1}‖ over the steps since the last point.", "Step length"),
    ("path_length", "Σ‖δ‖", "θ", "Sum of the lengths of all steps, each one counted.", "Path length"),
    ("from_reference", "‖θ_t - θ_ref‖", "θ", "Distance from the reference.", "Distance from the reference"),
    ("angle", "∠(θ_t, θ₀)", "rad", "Angle between the weights and their start.", "Angle to the start"),
    (
        "straightness",
        "‖θ_t - θ₀‖/Σ‖δ‖",
        "1",
        "Distance from the start over the length of the path: 1 for a straight line, about t^-½ for a random walk.",
        "Straightness",
    ),
    ("update_ratio", "‖δ‖/‖θ‖", "1", "The step over the norm of the weights.", "Update-to-weight ratio"),
    (
        "step_cosine",
        "cos(δ_s, δ_{s-1})",
        "1",
        "Mean cosine of consecutive steps since the last point: towards -1 where weights bounce.",
        "Cosines of steps",
    ),
    (
        "start_cosine",
        "cos(δ_t, θ_{t-1} - θ₀)",
        "1",
        "Cosine of the last step and the way there: 0 at random, negative where weights are pulled back.",
        "Cosines of steps",
    ),
    ("norm", "‖θ‖", "θ", "Norm of the weights.", "Norm of the weights"),
)

OF_LAYERS = tuple(key for key, *_ in _MOVED)
"""What is told of each layer as well."""


def displacement_table(name: str | None, is_projected: bool, has_probe: bool, modes: list[str]) -> QuantityTable:
    """The table.

    Args:
        name: What tells the monitor apart.
        is_projected: Whether lengths are those of projections.
        has_probe: Whether losses and gradients of a probe are measured.
        modes: Names of the eigenvectors that weights are followed along.
    """
    family = "displacement" if name is None else f"displacement_{name}"
    error: ErrorKind = "standard error" if is_projected else "exact"
    quantities = [
        *_moved(error),
        *_diffusion(),
        *_balance(has_probe),
        *_conserved(),
        *(quantity for mode in modes for quantity in _phase(mode)),
    ]
    if modes:
        quantities.append(
            Quantity(
                "phase",
                "q, p",
                "θ",
                "Positions and velocities along frozen eigenvectors of the Hessian.",
                f"after {_KUNIN}",
                "none",
                "Phase planes",
                form="phase",
            )
        )
    return QuantityTable(
        family,
        "Displacement",
        tuple(quantities),
        headline=("from_init",),
        references=tuple(q.key for q in quantities if "_predicted" in q.key),
    )


def _moved(error: ErrorKind) -> Iterator[Quantity]:
    for key, symbol, unit, text, panel in _MOVED:
        yield Quantity(key, symbol, unit, text, "own", error, panel, on_by_default=key in _ON)
    for key, symbol, unit, text, panel in _MOVED:
        of_layer = f"{text} Of a layer."
        yield Quantity(
            key, symbol, unit, of_layer, "own", error, f"{panel}, by layer", on_by_default=False, per_layer=True
        )


def _diffusion() -> Iterator[Quantity]:
    yield Quantity(
        "diffusion",
        "‖Δ_t‖², ‖δ_t‖²",
        "θ²",
        "Squared displacement from start and reference, and squared step, over time; with the fitted power.",
        f"after {_KUNIN}",
        "none",
        "Diffusion",
        form="diffusion",
    )
    for key, symbol, text, source, error, panel in (
        (
            "exponent",
            "c",
            "Power of time by which the squared distance from the reference grows, ‖Δ_t‖² ∝ t^c, over the window that "
            "stands in the record: 2 in a straight line, 1 by diffusion, 0 where weights stay.",
            _KUNIN,
            "standard error",
            "Diffusion exponent",
        ),
        ("exponent_r2", "R²", "Share of the variance of log ‖Δ‖² that the power explains.", _KUNIN, "exact", "R²"),
        (
            "exponent_drift",
            "c, D t + v² t²",
            "Apparent exponent of diffusion with a drift, fitted to the same data: what may look anomalous and is not.",
            "derived",
            "none",
            "Diffusion exponent",
        ),
        ("drift_r2", "R²", "Share of the variance of log ‖Δ‖² that drift and diffusion explain.", "own", "exact", "R²"),
        (
            "exponent_ou",
            "c, Ornstein-Uhlenbeck",
            "Apparent exponent of a stationary motion in a quadratic bowl with the measured Hessian and step length, "
            "without a parameter.",
            f"own, after {_KUNIN}",
            "none",
            "Diffusion exponent",
        ),
        ("ou_r2", "R²", "Share of the variance of log ‖Δ‖² that this curve explains as it is.", "own", "exact", "R²"),
        (
            "aging",
            "μ",
            "Exponent with which the displacement after a waiting time t_w depends on t/t_w^μ: 0 where it does not "
            "depend on t_w, 1 for full aging.",
            "derived",
            "standard error",
            "Aging exponent",
        ),
    ):
        yield Quantity(key, symbol, "1", text, source, error, panel, on_by_default=False)  # type: ignore[arg-type]


def _balance(has_probe: bool) -> Iterator[Quantity]:
    yield _record("training_loss", "⟨L_B⟩", "loss", "Mean training loss of the last quarter of the run.", "Loss")
    yield _record(
        "loss_change",
        "Δ⟨L_B⟩",
        "loss",
        "That minus the mean over the quarter before: 0 in a stationary regime.",
        "Loss",
        "standard error",
    )
    yield _record(
        "batch_gradient_norm",
        "‖g_B‖",
        "loss/θ",
        "Norm of the training's own gradient in the last step, before clipping; with SAM, of that at w + e.",
        "Gradient norms",
    )
    if has_probe:
        yield _record("probe_loss", "L", "loss", "Loss of the probe.", "Loss")
        yield _record(
            "gradient_norm",
            "‖∇L‖",
            "loss/θ",
            "Norm of the probe's gradient: weights do not stop where the loss does.",
            "Gradient norms",
        )


def _conserved() -> Iterator[Quantity]:
    for key, symbol, text in (
        ("scale_change", "‖w‖²", "Relative change of the squared norm of weights whose scale the loss does not feel"),
        ("shift_change", "Σ_c w_c", "Relative change of the sum of a softmax classifier's rows"),
        ("rescale_change", "‖wᵢ‖² - ‖vᵢ‖²", "Relative change, unit by unit, of the imbalance of two layers"),
    ):
        text += ": conserved by gradient flow, broken by steps of order η² and by weight decay."
        yield _record(key, f"Δ({symbol})", "1", text, "Conserved quantities", "exact", True)
    yield _record(
        "imbalance",
        "‖W₂‖² - ‖W₁‖² - ‖b₁‖²",
        "θ²",
        "Imbalance of two layers with a homogeneous function between.",
        "Imbalance of layers",
        "exact",
        True,
    )
    yield _record(
        "effective_learning_rate",
        "η/‖w‖²",
        "1/loss",
        "Learning rate that the direction of scale-invariant weights feels (η/‖w‖ for adaptive optimizers), mean over "
        "what is normalized by itself.",
        "Effective learning rate",
        "exact",
        True,
    )
    yield _record(
        "radial_cosine",
        "cos(w, g)",
        "1",
        "Cosine of scale-invariant weights and their gradient: 0 but for rounding and the layer's ε.",
        "Radial part of the gradient",
        "none",
        True,
    )


def _phase(mode: str) -> Iterator[Quantity]:
    for key, symbol, unit, text, panel, error in (
        ("frequency", "φ", "rad/step", "Frequency at which the position oscillates", "Frequencies", "standard error"),
        ("equipartition", "Var p/Var q", "1/(ηt)²", "Variance of the velocity over that of the position",
         "Equipartition", "standard error"),
        ("current", "⟨qp′ - pq′⟩", "1", "Probability current over √(Var q · Var p)", "Currents", "standard error"),
    ):  # fmt: skip
        yield _record(f"{key}_{mode}", symbol, unit, f"{text}, along {mode}.", panel, error)  # type: ignore[arg-type]
        yield _record(
            f"{key}_predicted_{mode}",
            symbol,
            unit,
            f"The same in a quadratic with the measured curvature, for the order of batches in use, along {mode}.",
            panel,
            source="derived",
        )
    yield _record(
        f"curvature_{mode}", "vᵀHv", "loss/θ²", f"Curvature along the frozen eigenvector {mode}.", "Curvature", "none"
    )
    yield _record(
        f"alignment_{mode}",
        "|vᵀHv|/‖Hv‖",
        "1",
        f"Whether the frozen vector {mode} still is an eigenvector: 1 if so.",
        "Alignment of the frozen eigenvectors",
        "none",
    )


def _record(
    key: str,
    symbol: str,
    unit: str,
    text: str,
    panel: str,
    error: ErrorKind = "none",
    per_layer: bool = False,
    source: str = "own",
) -> Quantity:
    return Quantity(key, symbol, unit, text, source, error, panel, on_by_default=False, per_layer=per_layer)
