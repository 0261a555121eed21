"""The quantities of neural collapse, declared."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dynamics.recording.quantity import ErrorKind, Quantity, QuantityTable

_PAPYAN = "Papyan, Han and Donoho, arXiv 2008.08186"
_ZHU = "as in Zhu et al., arXiv 2105.02375"
_GALANTI = "Galanti, György and Hutter, arXiv 2112.15121"
_LIU = "Liu et al., arXiv 2303.06484"
_KINI = "Kini et al., arXiv 2306.07960"

_LOGARITHMIC = ("NC1: variability", "CDNV", "NC2: geometry of class means", "NC3: self-duality")

_FEATURES: tuple[tuple[str, str, str, str, ErrorKind, str], ...] = (
    (
        "nc1",
        "tr(Σ_W Σ_B⁺)/K",
        "Variability within classes, measured against the distances of class means: 0 is collapse. Noise alone gives "
        "`nc1_floor`.",
        _PAPYAN,
        "exact",
        "NC1: variability",
    ),
    (
        "nc1_floor",
        "E nc1 | μ_c equal",
        "What nc1 would be on average if the true class means coincided, so that the measured ones were noise of this "
        "within-class covariance: nc1 says nothing where it is near.",
        "own",
        "standard error",
        "NC1: variability",
    ),
    (
        "nc1_raw",
        "tr(Σ_W Σ_B⁺)",
        "nc1 without the factor 1/K.",
        "the authors' notebook of arXiv 2008.08186; He and Su, arXiv 2210.17020, for equal classes",
        "exact",
        "NC1: variants",
    ),
    (
        "nc1_trace_ratio",
        "trΣ_W/trΣ_B",
        "Variance within classes over variance between class means.",
        "as in Tirer, Huang and Niles-Weed (2023)",
        "exact",
        "NC1: variants",
    ),
    (
        "cdnv",
        "(V_c+V_c′)/(2‖μ_c-μ_c′‖²)",
        "Class-distance normalized variance, mean over pairs of classes: comparable between layers of any width.",
        _GALANTI,
        "exact",
        "CDNV",
    ),
    (
        "nc2_equinorm",
        "CoV ‖μ_c-μ_G‖",
        "Coefficient of variation of the norms of the centred class means: 0 if they are equally long.",
        _PAPYAN,
        "exact",
        "NC2: geometry of class means",
    ),
    (
        "nc2_equiangular",
        "⟨|cos+1/(K-1)|⟩",
        "Mean deviation of the cosines of pairs of centred class means from -1/(K-1): 0 if they stand at the largest "
        "equal angle.",
        _PAPYAN,
        "exact",
        "NC2: geometry of class means",
    ),
    (
        "nc2_cosine_std",
        "std cos",
        "Standard deviation of the cosines of pairs of centred class means: 0 if all angles are equal.",
        _PAPYAN,
        "exact",
        "NC2: variants",
    ),
    (
        "nc2_etf_distance",
        "‖GGᵀ/‖GGᵀ‖-E‖",
        "Distance of the normalized Gram matrix of the centred class means from that of a simplex ETF.",
        _ZHU,
        "exact",
        "NC2: variants",
    ),
    (
        "nc2_orthogonal_frame",
        "‖MMᵀ/‖MMᵀ‖-I/√K‖",
        "Distance of the normalized Gram matrix of the class means, not centred, from that of an orthogonal frame.",
        _KINI,
        "exact",
        "NC2: variants",
    ),
    (
        "nc2_uniformity",
        "⟨-log‖û_c-û_c′‖⟩",
        "Hyperspherical uniformity: mean logarithmic energy of pairs of normalized centred class means; the measure "
        "where there are more classes than dimensions.",
        _LIU,
        "exact",
        "NC2: variants",
    ),
    (
        "nc2_uniformity_variance",
        "var(-log‖û_c-û_c′‖)",
        "Variance of the logarithmic energies over pairs of classes.",
        _LIU,
        "exact",
        "NC2: variants",
    ),
    (
        "nc4",
        "1-⟨ŷ=ŷ_NCC⟩",
        "Share of samples for which the nearest class centre is not the network's prediction, bias included.",
        _PAPYAN,
        "exact",
        "NC4: nearest class centre",
    ),
    (
        "ncc_accuracy",
        "⟨y=ŷ_NCC⟩",
        "Accuracy of the nearest class centre.",
        _PAPYAN,
        "exact",
        "Accuracy",
    ),
    (
        "effective_rank",
        "r_eff",
        "Number of dimensions that the centred class means span: K - 1, unless some coincide or lie in a plane.",
        "own",
        "exact",
        "Effective rank",
    ),
    (
        "subclass_variance_ratio",
        "tr Σ_sub/tr Σ_W",
        "Share of the variance within classes that lies between the means of given subclasses, less what few samples "
        "make of it: 0 is class collapse.",
        "own",
        "exact",
        "Subclasses",
    ),
    (
        "subclass_ncc_accuracy",
        "⟨s=ŝ_NCC⟩",
        "Accuracy of the nearest subclass centre.",
        "own",
        "exact",
        "Subclasses",
    ),
)
"""Of the features of any layer: key, symbol, definition, source, error, chart."""

_LAST: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "nc3",
        "‖W/‖W‖-M/‖M‖‖²",
        "Squared distance of the normalized classifier, centred over classes, from the normalized centred class means: "
        "0 if they are dual.",
        _PAPYAN,
        "NC3: self-duality",
    ),
    ("nc3_distance", "‖W/‖W‖-M/‖M‖‖", "The root of nc3.", _PAPYAN, "NC3: variants"),
    (
        "nc3_product",
        "‖WMᵀ/‖WMᵀ‖-E‖",
        "Distance of the normalized product of classifier and class means from the Gram matrix of a simplex ETF.",
        _ZHU,
        "NC3: variants",
    ),
    (
        "nc3_cosine",
        "⟨1-cos(w_c,μ_c-μ_G)⟩",
        "Mean cosine distance of class means and their weights.",
        "own",
        "NC3: variants",
    ),
    (
        "nc3_uniformity",
        "var cos(w_c,μ_c-μ_G)",
        "Uniform duality: variance over classes of the cosine of class means and their weights.",
        "as in Wu and Papyan, arXiv 2405.17767",
        "NC3: variants",
    ),
    ("nc3_bias", "‖Wμ_G+b‖", "Norm of the classifier's outputs at the global mean.", _ZHU, "NC3: bias"),
    (
        "nc2_equinorm_weights",
        "CoV ‖w_c‖",
        "Coefficient of variation of the norms of the centred classifier's rows.",
        _PAPYAN,
        "NC2: geometry of the classifier",
    ),
    (
        "nc2_equiangular_weights",
        "⟨|cos+1/(K-1)|⟩",
        "Mean deviation of the cosines of the centred classifier's rows from -1/(K-1).",
        _PAPYAN,
        "NC2: geometry of the classifier",
    ),
    (
        "nc2_etf_distance_weights",
        "‖WWᵀ/‖WWᵀ‖-E‖",
        "Distance of the normalized Gram matrix of the centred classifier from that of a simplex ETF.",
        _ZHU,
        "NC2: variants",
    ),
    ("accuracy", "⟨y=ŷ⟩", "Accuracy of the network on the probe.", "own", "Accuracy"),
    (
        "class_imbalance",
        "max n_c/min n_c",
        "Samples of the largest class over those of the smallest, of classes that have any.",
        "own",
        "Imbalance",
    ),
    (
        "minority_cosine",
        "⟨cos⟩ of small classes",
        "Mean cosine of pairs among the smaller half of the classes: 1 is minority collapse. Where classes differ in "
        "size.",
        "after Fang et al., arXiv 2101.12699",
        "Imbalance",
    ),
)
"""Of the last layer and its classifier."""

HEADLINE = ("nc1", "nc1_floor", "nc2_equinorm", "nc2_equiangular", "nc3", "nc4", "accuracy")
OF_VALIDATION = ("nc1", "nc1_trace_ratio", "cdnv", "nc4", "ncc_accuracy", "accuracy")
"""What is measured of validation data, around the class means of the training data."""


def of_layers() -> set[str]:
    """What is measured of the features of any layer."""
    return {key for key, *_ in _FEATURES}


def collapse_table(name: str | None, has_validation: bool) -> QuantityTable:
    """The quantities of a :class:`NeuralCollapseMonitor`.

    Args:
        name: The monitor's name, None if it has none.
        has_validation: Whether validation data are measured too.
    """
    family = "collapse" if name is None else f"collapse_{name}"
    title = "Neural collapse" if name is None else f"Neural collapse ({name})"
    return QuantityTable(
        family,
        title,
        tuple(_quantities(has_validation)),
        headline=("nc1",),
        references=("nc1_floor",),
        log_panels=_LOGARITHMIC,
    )


def _quantities(has_validation: bool) -> Iterator[Quantity]:
    for key, symbol, text, source, error, panel in _FEATURES:
        yield Quantity(key, symbol, "1", text, source, error, panel, on_by_default=key in HEADLINE)
    for key, symbol, text, source, panel in _LAST:
        yield Quantity(key, symbol, "1", text, source, "exact", panel, on_by_default=key in HEADLINE)
    if has_validation:
        for key, symbol, text, _, panel in (*((f[0], f[1], f[2], f[3], f[5]) for f in _FEATURES), *_LAST):
            if key in OF_VALIDATION:
                yield Quantity(
                    f"{key}_validation",
                    symbol,
                    "1",
                    f"{text} Of validation data, around the class means of the training data.",
                    "own",
                    "exact",
                    panel,
                    on_by_default=key in ("nc1", "nc4"),
                )
                yield Quantity(
                    f"{key}_validation",
                    symbol,
                    "1",
                    f"{text} Of validation data at a hidden layer, around the class means of the training data.",
                    "own",
                    "exact",
                    f"{panel}, by layer",
                    on_by_default=False,
                    per_layer=True,
                )
    for key, symbol, text, source, error, panel in _FEATURES:
        yield Quantity(
            key,
            symbol,
            "1",
            f"{text} At a hidden layer.",
            source,
            error,
            f"{panel}, by layer",
            on_by_default=False,
            per_layer=True,
        )
    yield Quantity(
        "depth",
        "nc1, CDNV by layer",
        "1",
        "nc1 with its noise floor, and CDNV, through depth, one line for each measurement.",
        "after Parker et al., arXiv 2308.02760",
        "none",
        "Collapse through depth",
        form="depth",
        shows=(("nc1", "nc1_floor"), ("cdnv", None)),
    )
    for key, symbol, text, error in (
        (
            "depth_slope",
            "d log nc1/d layer",
            "Slope of log nc1 over the layer's number (natural logarithm).",
            "standard error",
        ),
        ("depth_r2", "R²", "Share of the variance of log nc1 that a straight line over depth explains.", "exact"),
    ):
        yield Quantity(
            key,
            symbol,
            "1",
            f"{text} The law of data separation is a straight line down.",
            "after He and Su, arXiv 2210.17020",
            error,
            "Law of data separation",
            on_by_default=False,
        )
