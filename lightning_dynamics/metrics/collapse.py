"""The measures of neural collapse: how features gather at class means, and how these means stand to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_dynamics.metrics.class_sums import ScatterSums
from lightning_dynamics.metrics.noise_floor import UnknownFloorError, noise_floor

_TILE = 2**22  # entries of a tile of pairs, or of a block of features in float64


@dataclass(frozen=True)
class Classifier:
    """The last linear layer: scores W h + b.

    A single row (one logit for two classes) stands for the rows -w/2 and +w/2, and its bias likewise: the same
    probabilities, with rows that are centred already.

    Attributes:
        weight: W, shape ``(K, d)``; ``(2, d)`` if one row was given. Float64, on the CPU.
        bias: b, shape ``(K,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        weight = self.weight.detach().cpu().double()
        bias = None if self.bias is None else self.bias.detach().cpu().double()
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shape = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"A classifier needs a weight of shape (K, d) and a bias of shape (K,), got {tuple(weight.shape)} "
                f"and {shape}."
            )
        if len(weight) == 1:
            halves = torch.tensor([-0.5, 0.5], dtype=torch.float64)
            weight = halves[:, None] * weight
            bias = None if bias is None else halves * bias
        object.__setattr__(self, "weight", weight.clone())
        object.__setattr__(self, "bias", None if bias is None else bias.clone())

    @classmethod
    def of(cls, layer: nn.Linear) -> Classifier:
        """A copy of a layer's weights as they are now."""
        return cls(layer.weight, layer.bias)

    def predict(self, features: Tensor) -> Tensor:
        """argmax_c (W h + b)_c in float64, the lowest index among equals; shape ``(n,)``, on the features' device."""
        place = torch.device("cpu") if features.device.type == "mps" else features.device
        weight = self.weight.to(place)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            rows = max(1, _TILE // max(1, weight.shape[1]))
            starts = range(0, len(features), rows)
            scores = [features[start : start + rows].to(place).double() @ weight.mT for start in starts]
            joined = torch.cat(scores) if scores else torch.zeros(0, len(weight), dtype=torch.float64, device=place)
            if self.bias is not None:
                joined = joined + self.bias.to(place)
            return joined.argmax(1).to(features.device)


@dataclass(frozen=True)
class CollapseMeasures:
    """What :func:`collapse_measures` found.

    Attributes:
        values: The measures by name; only those that are defined.
        errors: Standard errors of those that are estimated.
        undefined: Why the others are not there, by name.
        notes: What to know when reading the values.
        arrays: Per class with samples: ``classes`` (its label), ``counts``, ``variances`` (V_c), ``norms``
            (‖μ_c - μ_G‖).
    """

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    arrays: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SeparationLaw:
    """Least-squares line through ln nc1 over the index of the layer.

    Attributes:
        slope: Change of the natural logarithm per layer; negative where layers separate the classes.
        r_squared: Share of the variance that the line explains; None if all values are equal.
        error: Standard error of the slope, for independent errors of equal variance; None for two layers.
    """

    slope: float
    r_squared: float | None
    error: float | None


def collapse_measures(
    scatter: ScatterSums, classifier: Classifier | None = None, subclasses: ScatterSums | None = None
) -> CollapseMeasures:
    """All measures of neural collapse of one set of features.

    Notation: h features, y labels, K classes *that have samples*, n_c samples of a class, N all samples; μ_c class
    means, μ_G = Σ_c μ_c/K their *unweighted* mean, M̃ the matrix of rows μ_c - μ_G; W, b the classifier, W̃ its rows
    less their mean (softmax cross-entropy conserves their sum, so that it says nothing). Scatter within classes is an
    average over all *samples*, Σ_W = (1/N) Σ_i (h_i - μ_y)(h_i - μ_y)ᵀ: large classes weigh more. Scatter between
    classes is an average over *classes*, Σ_B = M̃ᵀM̃/K. All variances and standard deviations divide by the number of
    terms (ddof 0).

    ============================  =====================================================================================
    name                          value
    ============================  =====================================================================================
    ``nc1``                       tr(Σ_W Σ_B⁺)/K, with the pseudoinverse on the directions of the class means
    ``nc1_raw``                   the same without 1/K
    ``nc1_trace_ratio``           tr Σ_W / tr Σ_B
    ``nc1_floor``                 what ``nc1`` would be if the classes had equal means: :func:`noise_floor`
    ``cdnv``                      (V_a + V_b)/(2‖μ_a - μ_b‖²), V_c = Σ_{i in c}‖h_i - μ_c‖²/n_c: mean over pairs of
                                  classes, each pair with equal weight
    ``nc2_equinorm``              standard deviation of ‖μ_c - μ_G‖ over classes, divided by their mean
    ``nc2_equiangular``           mean of abs(cos(μ_a - μ_G, μ_b - μ_G) + 1/(K - 1)) over pairs
    ``nc2_cosine_std``            standard deviation of these cosines
    ``nc2_etf_distance``          ‖G/‖G‖ - (I - 11ᵀ/K)/√(K - 1)‖ for G = M̃M̃ᵀ
    ``nc2_orthogonal_frame``      ‖G/‖G‖ - I/√K‖ for G of the means as they are, *not* centred: centring an orthogonal
                                  frame gives a simplex ETF
    ``nc2_uniformity``            mean of ln(1/‖u_a - u_b‖) over pairs of normalized rows of M̃; least when they are
                                  spread over the sphere, at -ln(2K/(K - 1))/2 for a simplex ETF
    ``nc2_uniformity_variance``   variance of the same over pairs
    ``nc2_…_weights``             equinorm, equiangular, etf_distance of W̃ in the place of M̃
    ``nc3``                       ‖W̃/‖W̃‖ - M̃/‖M̃‖‖², between 0 and 4
    ``nc3_distance``              its square root
    ``nc3_product``               ‖P/‖P‖ - (I - 11ᵀ/K)/√(K - 1)‖ for P = W̃M̃ᵀ
    ``nc3_cosine``                mean of 1 - cos(w̃_c, μ_c - μ_G) over classes
    ``nc3_uniformity``            variance of cos(w̃_c, μ_c - μ_G) over classes
    ``nc3_bias``                  ‖Wμ_G + b‖, with W as it is
    ``nc4``                       share of samples whose nearest class mean is not the class that the network predicts
    ``ncc_accuracy``              share of samples whose nearest class mean is their own
    ``accuracy``                  share of samples that the network predicts rightly
    ``effective_rank``            number of singular values of M̃ above max(K, d)·eps times the largest
    ``class_imbalance``           largest n_c over smallest
    ``minority_cosine``           mean cosine between rows of M̃, over pairs of the smaller half of the classes; only
                                  where classes are unequal
    ``subclass_variance_ratio``   share of the variance within classes that lies between the means of given subclasses,
                                  less what few samples imitate: 0 if these means are equal, 1 if subclasses are points
    ``subclass_ncc_accuracy``     share of samples whose nearest subclass mean is their own
    ============================  =====================================================================================

    All norms of matrices are Frobenius norms. What is not defined for the data is missing, with a reason: nothing is
    NaN.

    Sources: Papyan, Han and Donoho, arXiv 2008.08186, and the authors' notebook (nc1 to nc4; the notebook plots
    ``nc1_raw``); Galanti et al., arXiv 2112.15121 (cdnv); Zhu et al. and Kothapalli (ETF distance, product); Kini et
    al., arXiv 2306.07960 (orthogonal frame); Liu et al., arXiv 2303.06484 (uniformity). Centring W,
    ``minority_cosine`` and the estimate of ``subclass_variance_ratio`` are choices of ours.

    Example:
        >>> import torch
        >>> from lightning_dynamics.metrics import ClassSums
        >>> eye, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> features = torch.cat([eye + 0.1, eye - 0.1])
        >>> sums = ClassSums(3)
        >>> sums.update(features, labels.repeat(2))
        >>> scatter = ScatterSums(sums.centers())
        >>> scatter.update(features, labels.repeat(2))
        >>> round(collapse_measures(scatter).values["nc1_trace_ratio"], 6)
        0.045

    Args:
        scatter: Sums around the class means: of the samples that the means are of, or of others (validation data around
            the means of the training data; geometry is then that of the training data).
        classifier: The layer that the features enter, for ``nc3`` and what else needs W.
        subclasses: Sums of the same samples with subclasses in the place of classes, around the means of subclasses,
            each of which belongs to one class.

    Raises:
        ValueError: If the classifier or the subclasses do not fit.
    """
    return _Measures(scatter, classifier, subclasses).result()


class _Measures:
    """One evaluation: every group of measures adds what it can and says what it cannot."""

    def __init__(self, scatter: ScatterSums, classifier: Classifier | None, subclasses: ScatterSums | None) -> None:
        self.scatter = scatter
        self.centers = scatter.centers
        self.classifier = classifier
        self.subclasses = subclasses
        self.size = int(self.centers.present.sum())
        self.values: dict[str, float] = {}
        self.errors: dict[str, float] = {}
        self.undefined: dict[str, str] = {}
        self.notes: list[str] = []
        self.norms = torch.linalg.vector_norm(self.centers.centred, dim=1)

    def result(self) -> CollapseMeasures:
        self._note()
        self._variability()
        self._geometry("", self.centers.centred)
        self._frame()
        self._uniformity()
        self._imbalance()
        self._self_duality()
        self._decisions()
        self._subclasses()
        return CollapseMeasures(self.values, self.errors, self.undefined, tuple(self.notes), self._arrays())

    def _give(self, **values: float) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self.values[name] = value
            else:
                self.undefined[name] = "the value overflows"

    def _refuse(self, reason: str, *names: str) -> None:
        self.undefined.update(dict.fromkeys(names, reason))

    def _note(self) -> None:
        centers, present = self.centers, self.centers.present
        absent = (~present).nonzero()[:, 0].tolist()
        if absent:
            self.notes.append(f"left out, no samples: classes {_listed(absent)}")
        left_out = int(self.scatter["left_out"])
        if left_out:
            self.notes.append(f"left out, no centre of their class: {left_out} samples")
        single = (centers.counts == 1).nonzero()[:, 0].tolist()
        if single and len(single) < self.size:
            self.notes.append(f"variance 0, one sample: classes {_listed(single)}")
        rank, possible = centers.effective_rank, min(self.size - 1, centers.num_features)
        if self.size > 1 and rank < possible:
            self.notes.append(
                f"the class means span {rank} of {possible} directions: some coincide or are linearly dependent"
            )
        if self.size - 1 > centers.num_features:
            self.notes.append(
                f"{self.size} classes in {centers.num_features} dimensions: no simplex ETF exists, read nc2_uniformity"
            )

    # --- variability -------------------------------------------------------------------------------------------------

    def _variability(self) -> None:
        names = ("nc1", "nc1_raw", "nc1_trace_ratio", "nc1_floor", "cdnv")
        scatter, centers = self.scatter, self.centers
        total = float(scatter["counts"].sum())
        self._give(effective_rank=float(centers.effective_rank))
        if self.size < 2:
            return self._refuse(_few(self.size), *names)
        if total == 0:
            return self._refuse("no samples", *names)
        if float(centers.counts.max()) == 1:
            return self._refuse("one sample per class: it is its own mean", *names)
        within = scatter["squares"].sum() / total
        _, singular, _ = centers.decomposition
        if not len(singular):
            self._refuse("all class means are equal", "nc1", "nc1_raw", "nc1_trace_ratio", "cdnv")
        else:
            raw = float((scatter["energies"] / total * self.size / singular.square()).sum())
            between = float(self.norms.square().mean())
            self._give(nc1=raw / self.size, nc1_raw=raw, nc1_trace_ratio=float(within) / between)
            self._cdnv()
        self._floor()
        return None

    def _cdnv(self) -> None:
        present = self.centers.present
        counts = self.scatter["counts"][present]
        seen = counts > 0
        if int(seen.sum()) < 2:
            return self._refuse("fewer than two classes have samples", "cdnv")
        variances = (self.scatter["squares"][present] / counts.clamp(min=1))[seen]
        distances = self.centers.squared_distances[seen][:, seen]
        pairs = torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)
        if bool((distances[pairs] <= 0).any()):
            return self._refuse("two class means coincide", "cdnv")
        ratio = (variances[:, None] + variances) / (2 * distances)
        self._give(cdnv=float(ratio[pairs].mean()))
        return None

    def _floor(self) -> None:
        try:
            self.values["nc1_floor"], self.errors["nc1_floor"] = noise_floor(self.scatter)
        except UnknownFloorError as error:
            self._refuse(str(error), "nc1_floor")

    # --- geometry ----------------------------------------------------------------------------------------------------

    def _geometry(self, suffix: str, rows: Tensor) -> None:
        """Simplex ETF, of class means or of the classifier's rows; both centred."""
        names = [f"nc2_equinorm{suffix}", f"nc2_equiangular{suffix}", f"nc2_etf_distance{suffix}"]
        names += [] if suffix else ["nc2_cosine_std"]
        if self.size < 2:
            return self._refuse(_few(self.size), *names)
        if self.size == 2:
            return self._refuse("two classes: always a simplex ETF, the centred rows are opposite", *names)
        norms = torch.linalg.vector_norm(rows, dim=1)
        if self._is_zero(suffix, norms):
            reason = "the centred classifier is zero" if suffix else "all class means are equal"
            return self._refuse(reason, *names)
        self._give(**{f"nc2_equinorm{suffix}": _std(norms) / float(norms.mean())})
        gram = rows @ rows.mT
        self._give(**{f"nc2_etf_distance{suffix}": _relative_distance(gram, _simplex(self.size))})
        if bool((norms <= 0).any()):
            reason = "a centred row of the classifier is zero" if suffix else "a class mean lies at the global mean"
            return self._refuse(reason, *(n for n in names if "equinorm" not in n and "etf" not in n))
        cosines = _off_diagonal(gram / norms / norms[:, None])
        self._give(**{f"nc2_equiangular{suffix}": float((cosines + 1 / (self.size - 1)).abs().mean())})
        if not suffix:
            self._give(nc2_cosine_std=_std(cosines))
        return None

    def _is_zero(self, suffix: str, norms: Tensor) -> bool:
        return not bool(norms.any()) if suffix else self.centers.effective_rank == 0

    def _frame(self) -> None:
        name = "nc2_orthogonal_frame"
        if self.size < 2:
            return self._refuse(_few(self.size), name)
        means = self.centers.means[self.centers.present]
        if not bool(means.any()):
            return self._refuse("all class means are zero", name)
        identity = torch.eye(self.size, dtype=torch.float64) / self.size**0.5
        self._give(nc2_orthogonal_frame=_relative_distance(means @ means.mT, identity))
        return None

    def _uniformity(self) -> None:
        names = ("nc2_uniformity", "nc2_uniformity_variance")
        if self.size < 3:
            return self._refuse(_few(self.size) if self.size < 2 else "two classes: always opposite", *names)
        if self.centers.effective_rank == 0:
            return self._refuse("all class means are equal", *names)
        if bool((self.norms <= 0).any()):
            return self._refuse("a class mean lies at the global mean", *names)
        at = self.centers.coordinates
        units = at / torch.linalg.vector_norm(at, dim=1, keepdim=True)
        distances = torch.pdist(units)
        if bool((distances <= 0).any()):
            return self._refuse("two class means have the same direction", *names)
        energies = -distances.log()
        self._give(nc2_uniformity=float(energies.mean()), nc2_uniformity_variance=float(energies.var(correction=0)))
        return None

    def _imbalance(self) -> None:
        counts = self.centers.counts[self.centers.present]
        if not self.size:
            return self._refuse(_few(0), "class_imbalance", "minority_cosine")
        imbalance = float(counts.max() / counts.min())
        self._give(class_imbalance=imbalance)
        if imbalance == 1:
            return self._refuse("all classes have the same number of samples", "minority_cosine")
        if self.size < 4:
            return self._refuse("fewer than four classes: the smaller half has no pair", "minority_cosine")
        smaller = counts.argsort(stable=True)[: self.size // 2]
        rows, norms = self.centers.centred[smaller], self.norms[smaller]
        if self.centers.effective_rank == 0 or bool((norms <= 0).any()):
            return self._refuse("a class mean lies at the global mean", "minority_cosine")
        cosines = _off_diagonal(rows @ rows.mT / norms / norms[:, None])
        self._give(minority_cosine=float(cosines.mean()))
        return None

    # --- the classifier ----------------------------------------------------------------------------------------------

    def _self_duality(self) -> None:
        dual = ("nc3", "nc3_distance", "nc3_product", "nc3_cosine", "nc3_uniformity")
        weights = ("nc2_equinorm_weights", "nc2_equiangular_weights", "nc2_etf_distance_weights")
        every = (*dual, *weights, "nc3_bias")
        classifier, centers = self.classifier, self.centers
        if classifier is None:
            return self._refuse("no classifier given", *every)
        expected = (centers.num_classes, centers.num_features)
        if tuple(classifier.weight.shape) != expected:
            raise ValueError(
                f"The classifier's weight has shape {tuple(classifier.weight.shape)}, class means have {expected}. "
                "Give the layer that these features enter."
            )
        if self.size < 2:
            return self._refuse(_few(self.size), *every)
        if not bool(torch.isfinite(classifier.weight).all()):
            return self._refuse("the classifier is not finite", *every)
        at_mean = classifier.weight @ centers.global_mean
        self._give(
            nc3_bias=float(torch.linalg.vector_norm(at_mean + (0 if classifier.bias is None else classifier.bias)))
        )
        rows = classifier.weight[centers.present]
        rows = rows - rows.mean(0)
        # what centring leaves of equal rows is rounding
        scale = torch.linalg.vector_norm(classifier.weight)
        if float(torch.linalg.vector_norm(rows)) <= 8 * torch.finfo(torch.float64).eps * float(scale):
            return self._refuse("the centred classifier is zero", *dual, *weights)
        self._geometry("_weights", rows)
        if centers.effective_rank == 0:
            return self._refuse("all class means are equal", *dual)
        means = centers.centred
        squared = float(
            (rows / torch.linalg.vector_norm(rows) - means / torch.linalg.vector_norm(means)).square().sum()
        )
        self._give(nc3=squared, nc3_distance=squared**0.5)
        product = rows @ means.mT
        if bool(product.any()):
            self._give(nc3_product=_relative_distance(product, _simplex(self.size)))
        else:
            self._refuse("the classifier is orthogonal to all class means", "nc3_product")
        norms = torch.linalg.vector_norm(rows, dim=1)
        if bool((norms <= 0).any()) or bool((self.norms <= 0).any()):
            return self._refuse(
                "a centred row of the classifier or of the means is zero", "nc3_cosine", "nc3_uniformity"
            )
        cosines = product.diagonal() / (norms * self.norms)
        # 1 - cos = ‖ŵ - m̂‖²/2, which does not cancel
        gaps = (rows / norms[:, None] - means / self.norms[:, None]).square().sum(1) / 2
        self._give(nc3_cosine=float(gaps.mean()))
        if self.size == 2:
            self._refuse("two classes: both cosines are the same", "nc3_uniformity")
        else:
            self._give(nc3_uniformity=float(cosines.var(correction=0)))
        return None

    def _decisions(self) -> None:
        scatter = self.scatter
        total, predicted = float(scatter["counts"].sum()), float(scatter["predicted"].sum())
        if self.size < 2:
            return self._refuse(_few(self.size), "ncc_accuracy", "nc4", "accuracy")
        if total == 0:
            return self._refuse("no samples", "ncc_accuracy", "nc4", "accuracy")
        self._give(ncc_accuracy=float(scatter["nearest_is_label"].sum()) / total)
        if predicted == 0:
            return self._refuse("the network's predictions are not known", "nc4", "accuracy")
        self._give(
            nc4=1 - float(scatter["nearest_is_predicted"].sum()) / predicted,
            accuracy=float(scatter["predicted_is_label"].sum()) / predicted,
        )
        return None

    def _subclasses(self) -> None:
        names = ("subclass_variance_ratio", "subclass_ncc_accuracy")
        if self.subclasses is None:
            return self._refuse("no subclasses given", *names)
        inner = self.subclasses
        total = float(inner["counts"].sum())
        if total != float(self.scatter["counts"].sum()):
            raise ValueError("Classes and subclasses must be sums over the same samples.")
        if total == 0:
            return self._refuse("no samples", *names)
        self._give(subclass_ncc_accuracy=float(inner["nearest_is_label"].sum()) / total)
        within, inside = float(self.scatter["squares"].sum()), float(inner["squares"].sum())
        spare = total - int(inner.centers.present.sum())
        if within <= 0:
            return self._refuse("the classes have no variance", names[0])
        if spare <= 0:
            return self._refuse("one sample per subclass", names[0])
        groups = int(inner.centers.present.sum()) - self.size
        self._give(subclass_variance_ratio=(within - inside - groups * inside / spare) / within)
        return None

    def _arrays(self) -> dict[str, list[float]]:
        present = self.centers.present
        counts = self.scatter["counts"][present]
        variances = self.scatter["squares"][present] / counts.clamp(min=1)
        return {
            "classes": present.nonzero()[:, 0].double().tolist(),
            "counts": counts.tolist(),
            "variances": variances.tolist(),
            "norms": self.norms.tolist(),
        }


def separation_law(nc1_by_depth: Sequence[float]) -> SeparationLaw:
    """Slope and fit of ln nc1 (natural logarithm) over the index of the layer, by least squares.

    Example:
        >>> round(separation_law([8.0, 4.0, 2.0]).slope, 6)  # each layer halves it: -ln 2
        -0.693147

    Args:
        nc1_by_depth: nc1 of each layer from the input to the output; of one kind, at one number of samples per class.

    Raises:
        ValueError: With fewer than two layers, or a value that is not positive and finite.
    """
    values = [float(value) for value in nc1_by_depth]
    if len(values) < 2:
        raise ValueError(f"A slope needs at least two layers, got {len(values)}.")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"nc1 must be positive and finite for its logarithm, got {values}.")
    logs = [math.log(value) for value in values]
    size, middle, mean = len(logs), (len(logs) - 1) / 2, math.fsum(logs) / len(logs)
    spread = math.fsum((i - middle) ** 2 for i in range(size))
    slope = math.fsum((i - middle) * (y - mean) for i, y in enumerate(logs)) / spread
    total = math.fsum((y - mean) ** 2 for y in logs)
    residual = math.fsum((y - mean - slope * (i - middle)) ** 2 for i, y in enumerate(logs))
    error = math.sqrt(residual / (size - 2) / spread) if size > 2 else None
    return SeparationLaw(slope, 1 - residual / total if total > 0 else None, error)


def _few(size: int) -> str:
    return "no class has samples" if size == 0 else "only one class has samples"


def _listed(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:10]))
    return shown if len(classes) <= 10 else f"{shown}, … ({len(classes)} in all)"


def _std(values: Tensor) -> float:
    return float(values.std(correction=0))


def _simplex(size: int) -> Tensor:
    """Gram matrix of a simplex ETF, of Frobenius norm 1, shape ``(K, K)``."""
    gram: Tensor = (torch.eye(size, dtype=torch.float64) - 1 / size) / (size - 1) ** 0.5
    return gram


def _relative_distance(matrix: Tensor, target: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix / torch.linalg.vector_norm(matrix) - target))


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Entries beside the diagonal, shape ``(K(K-1),)``."""
    beside: Tensor = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    return beside
