"""Class means and the scatter around them, streamed: sums that batches and processes add to, O(K·d) memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_BLOCK = {"cpu": 2**17, "cuda": 2**25}  # features handled at once: what fits into a cache, or fills a device
_WELL_CONDITIONED = 1e-4  # s_r/s_1 of class means from which their Gram matrix tells singular values to 1e-8
_COLUMNS = 2**13  # features whose products are summed in their own type
_SEGMENTS = 128  # classes in a batch up to which residuals are taken class by class
_SKETCH_ROWS = 16  # at least; and _SPARE_ROWS more than the class means have independent differences
_SKETCH_SIZE = 2**18  # entries of a sketch, as long as that makes no more rows than
_MOST_ROWS = 40
_SPARE_ROWS = 4
_HAS_SWITCHES = hasattr(torch.backends.mkldnn, "matmul")  # of precision, one for each backend: torch ≥ 2.9


class ClassSums:
    """First pass: number of samples and sum of features of each class, in float64.

    Example:
        >>> sums = ClassSums(2)
        >>> sums.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
        >>> sums.centers().means.tolist()
        [[2.0, 0.0], [0.0, 5.0]]

    Args:
        num_classes: K. Labels are 0..K-1.
        num_features: d; known from the first batch otherwise. Needed where a process may see no batch at all and its
            state is to be added to that of others.
    """

    def __init__(self, num_classes: int, num_features: int | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
        self.num_classes = num_classes
        self._counts = torch.zeros(num_classes, dtype=torch.float64)
        self._sums = torch.zeros(num_classes, num_features or 0, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: Shape ``(n, d)``, of any floating type, on any device; n may be 0.
            labels: Shape ``(n,)``, integers in 0..K-1.

        Raises:
            ValueError: If shapes, types or labels do not fit.
            FloatingPointError: If features are not finite. Nothing is added then.
        """
        features, labels = _checked(features, labels, self.num_classes, self._sums.shape[1] or None)
        place = _double_place(features.device)
        if not self._sums.shape[1]:
            self._sums = torch.zeros(self.num_classes, features.shape[1], dtype=torch.float64)
        self._counts, self._sums = self._counts.to(place), self._sums.to(place)
        with _full_precision(features.device):
            labels = labels.to(place)
            # whether all are finite shows in their sum, wherever that is smaller than they are
            is_small = self.num_classes <= len(features)
            if not is_small:
                _refuse_non_finite(features)
            sums = torch.zeros_like(self._sums) if is_small else self._sums
            for block in _blocks(len(features), features.shape[1], place):
                sums.index_add_(0, labels[block], features[block].to(place).double())
            if is_small:
                if not bool(torch.isfinite(sums.sum())):
                    _refuse_non_finite(features)
                self._sums += sums
            self._counts += torch.bincount(labels, minlength=self.num_classes)

    def state(self) -> dict[str, Tensor]:
        """``counts`` (K,) and ``sums`` (K, d), float64, each to be summed over processes."""
        return {"counts": self._counts.clone(), "sums": self._sums.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of a :meth:`state`."""
        counts, sums = state["counts"].detach().double(), state["sums"].detach().double()
        if counts.shape != (self.num_classes,) or sums.dim() != 2 or len(sums) != self.num_classes:
            raise ValueError(
                f"This state is not of {self.num_classes} classes: `counts` has shape {tuple(counts.shape)} and "
                f"`sums` {tuple(sums.shape)}."
            )
        self._counts, self._sums = counts.clone(), sums.clone()

    def centers(self) -> ClassCenters:
        """The class means as they are now."""
        counts, sums = self._counts.cpu(), self._sums.cpu()
        return ClassCenters(counts.clone(), sums / counts.clamp(min=1.0)[:, None])


@dataclass(frozen=True)
class ClassCenters:
    """Class means, and the space that they span around their centre.

    The global mean μ_G is the *unweighted* mean of the class means, over the classes that have samples: K' of K.

    Attributes:
        counts: Samples of each class, shape ``(K,)``, float64, on the CPU.
        means: μ_c, shape ``(K, d)``, float64, on the CPU; zero for classes without samples.
    """

    counts: Tensor
    means: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def num_features(self) -> int:
        return self.means.shape[1]

    @cached_property
    def present(self) -> Tensor:
        """Which classes have samples, shape ``(K,)``, bool."""
        return self.counts > 0

    @cached_property
    def global_mean(self) -> Tensor:
        """μ_G = Σ_c μ_c / K' over the present classes, shape ``(d,)``; zero if there are none."""
        return self.means[self.present].sum(0) / self.present.sum().clamp(min=1)

    @cached_property
    def centred(self) -> Tensor:
        """M̃, rows μ_c - μ_G of the present classes, shape ``(K', d)``."""
        return self.means[self.present] - self.global_mean

    @cached_property
    def decomposition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin singular value decomposition M̃ = U diag(s) V: ``(K', r)``, ``(r,)`` decreasing, ``(r, d)``.

        Kept are the singular values above max(K', d)·eps·s₁ and above what rounding of the means alone can cause, at
        most K' - 1 of them: r is the effective rank of the class means.
        """
        size, num_features = self.centred.shape
        if not size or not num_features:
            empty = self.centred.new_zeros
            return empty(size, 0), empty(0), empty(0, num_features)
        quick = self._quick_decomposition()
        if quick is not None:
            return quick
        left, values, right = torch.linalg.svd(self.centred, full_matrices=False)
        rounding = 8 * _EPS * torch.linalg.vector_norm(self.means)
        cutoff = torch.maximum(max(size, num_features) * _EPS * values[0], rounding)
        rank = min(int((values > cutoff).sum()), size - 1)
        return left[:, :rank], values[:rank], right[:rank]

    def _quick_decomposition(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """By the eigenvalues of the Gram matrix, several times as fast; None where it would lose digits that count."""
        rank = len(self.centred) - 1
        if rank < 1 or self.num_features < rank:
            return None
        values, vectors = torch.linalg.eigh(self.centred @ self.centred.mT)
        # squaring squares the condition number: at most half of the digits may go
        if not float(values[1]) > _WELL_CONDITIONED**2 * float(values[-1]):
            return None
        if not float(values[1].sqrt()) > 1e6 * _EPS * float(torch.linalg.vector_norm(self.means)):
            return None
        left, singular = vectors[:, 1:].flip(1), values[1:].flip(0).sqrt()
        return left, singular, (left / singular).mT @ self.centred

    @property
    def effective_rank(self) -> int:
        """r, dimension of the space spanned by the centred class means."""
        return len(self.decomposition[1])

    @cached_property
    def coordinates(self) -> Tensor:
        """M̃ in the basis V of :attr:`decomposition`, shape ``(K', r)``."""
        return self.centred @ self.decomposition[2].mT

    @cached_property
    def squared_distances(self) -> Tensor:
        """‖μ_a - μ_b‖² of the present classes, shape ``(K', K')``."""
        # differences, not a product: close means would cancel
        at = self.coordinates
        return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist").square()

    def __getstate__(self) -> dict[str, Any]:
        return {"counts": self.counts, "means": self.means}


class ScatterSums:
    """Second pass: how samples lie around given class centres.

    Residuals r = h - μ_y are taken against centres held as two float32 numbers each (or one float64 where features are
    float64), so that they are as exact as the features themselves when the class has collapsed to the resolution of its
    type. One matrix product per batch gives their coordinates in the space of the class means, from which follow the
    energy along each direction and the nearest class centre, and a fixed random sketch that estimates tr Σ_W².
    Everything is summed in float64 and does not depend on how samples are split into batches and processes.

    Cost: one read of the features, a few operations each, and a product with r + 16 rows. Memory: the centres.

    Args:
        centers: Centres, of these data or of others.
        seed: Of the sketch. The same on every process.
    """

    def __init__(self, centers: ClassCenters, *, seed: int = 0) -> None:
        self._centers = centers
        self._seed = seed
        K, r, d = centers.num_classes, centers.effective_rank, centers.num_features
        least = max(_SKETCH_ROWS, int(centers.present.sum()) - 1 + _SPARE_ROWS)
        # where features are few, more rows cost next to nothing, and the error falls with their number
        freedom = int(centers.counts.sum()) - int(centers.present.sum())
        self._sketch_rows = min(max(least, min(_SKETCH_SIZE // max(1, d), _MOST_ROWS, freedom // 2)), d)
        shapes = {
            "counts": (K,),
            "squares": (K,),
            "energies": (r,),
            "sketch": (self._sketch_rows, self._sketch_rows),
            "drift": (r + self._sketch_rows,),
            "nearest_is_label": (K,),
            "predicted": (K,),
            "nearest_is_predicted": (K,),
            "predicted_is_label": (K,),
            "left_out": (),
        }
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self._tables: _Tables | None = None

    @property
    def centers(self) -> ClassCenters:
        return self._centers

    @property
    def is_exact_sketch(self) -> bool:
        """Whether the sketch is the whole scatter matrix, which it is for few features."""
        return self._sketch_rows == self._centers.num_features

    @property
    def is_of_centers(self) -> bool:
        """Whether the samples are those that the centres are means of, so that their residuals cancel."""
        energy = self["energies"].sum() + self["sketch"].trace()
        return bool(self["drift"].square().sum() <= 1e-3 * energy) and torch.equal(self["counts"], self._centers.counts)

    def __getitem__(self, name: str) -> Tensor:
        """One of the sums, on the CPU."""
        return self._sums[name].cpu()

    def update(self, features: Tensor, labels: Tensor, predictions: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: Shape ``(n, d)``, of any floating type, on any device; n may be 0.
            labels: Shape ``(n,)``, integers in 0..K-1. Samples of classes without a centre are left out, and counted.
            predictions: The class that the network chooses, shape ``(n,)``; -1 where that is not known, K and more for
                outputs that are no class.

        Raises:
            ValueError: If shapes, types or labels do not fit.
            FloatingPointError: If features are not finite. Nothing is added then.
        """
        centers = self._centers
        features, labels = _checked(features, labels, centers.num_classes, centers.num_features)
        if predictions is not None:
            predictions = _checked_integers(predictions, len(features), -1, None, "predictions")
            predictions = predictions.to(features.device)
        place = _double_place(features.device)
        self._sums = {name: value.to(place) for name, value in self._sums.items()}
        if not len(features):
            return
        tables = self._tables_for(features)
        rows = tables.row_of_class[labels]
        if bool((rows < 0).any()):
            _refuse_non_finite(features)
            kept = rows >= 0
            self._sums["left_out"] += (~kept).sum()
            features, labels, rows = features[kept], labels[kept], rows[kept]
            predictions = None if predictions is None else predictions[kept]
            if not len(features):
                return
        order = rows.argsort(stable=True)
        labels, rows = labels[order], rows[order]
        predictions = None if predictions is None else predictions[order]
        with _full_precision(features.device):
            squares, projections = self._project(features[order], rows, tables, place)
        if not bool(torch.isfinite(squares).all()):
            _refuse_non_finite(features)
            raise FloatingPointError("The features are so large that their squares overflow; scale them down.")
        self._add(squares, projections, labels.to(place), rows.to(place), tables, predictions)

    def state(self) -> dict[str, Tensor]:
        """All sums, float64, each to be summed over processes that have the same centres."""
        return {name: value.clone() for name, value in self._sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of a :meth:`state`."""
        loaded = {name: state[name].detach().double().clone() for name in self._sums}
        for name, value in loaded.items():
            if value.shape != self._sums[name].shape:
                raise ValueError(
                    f"This state belongs to other centres: `{name}` has shape {tuple(value.shape)} instead of "
                    f"{tuple(self._sums[name].shape)}."
                )
        self._sums = loaded

    def _tables_for(self, features: Tensor) -> _Tables:
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        if self._tables is None or (self._tables.device, self._tables.dtype) != (features.device, dtype):
            self._tables = _Tables(self._centers, self._sketch_rows, self._seed, features.device, dtype)
        return self._tables

    def _project(self, features: Tensor, rows: Tensor, tables: _Tables, place: torch.device) -> tuple[Tensor, Tensor]:
        """‖r‖² of each sample, shape ``(n,)``, and [V; Ω] r, shape ``(n, r + m)``; float64. The rows ascend."""
        residuals = tables.residuals(features, rows)
        if tables.scale != 1:
            residuals *= tables.scale
        squares = torch.zeros(len(features), dtype=torch.float64, device=place)
        projections = torch.zeros(len(features), len(tables.directions), dtype=torch.float64, device=place)
        for start in range(0, features.shape[1], _COLUMNS):
            part = residuals[:, start : start + _COLUMNS]
            squares += torch.linalg.vector_norm(part, dim=1).to(place).double().square()
            projections += (part @ tables.directions[:, start : start + _COLUMNS].mT).to(place)
        return squares / tables.scale**2, projections / tables.scale

    def _add(
        self,
        squares: Tensor,
        projections: Tensor,
        labels: Tensor,
        rows: Tensor,
        tables: _Tables,
        predictions: Tensor | None,
    ) -> None:
        sums, K = self._sums, self._centers.num_classes
        rank = self._centers.effective_rank
        inside, sketch = projections[:, :rank], projections[:, rank:]
        sums["counts"] += torch.bincount(labels, minlength=K)
        sums["squares"].index_add_(0, labels, squares)
        sums["energies"] += inside.square().sum(0)
        sums["sketch"] += sketch.mT @ sketch
        sums["drift"] += projections.sum(0)
        nearest = tables.nearest(inside, rows)

        def count(hits: Tensor) -> Tensor:
            return torch.bincount(labels[hits], minlength=K)

        sums["nearest_is_label"] += count(nearest == labels)
        if predictions is not None:
            predictions = predictions.to(labels.device)
            sums["predicted"] += count(predictions >= 0)
            sums["nearest_is_predicted"] += count(predictions == nearest)
            sums["predicted_is_label"] += count(predictions == labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None}


class _Tables:
    """What a batch is multiplied with, on its device and in its type."""

    def __init__(
        self, centers: ClassCenters, sketch_rows: int, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        place = _double_place(device)
        present = centers.present
        means = centers.means[present]
        high = means.to(dtype)
        self.high = high.to(device)
        self.low = None if dtype == torch.float64 else (means - high.double()).to(dtype).to(device)
        # squares of very large or very small residuals must stay within float32
        largest = float(means.abs().max()) if means.numel() else 0.0
        exponent = -round(_log2(largest)) if largest else 0
        self.scale = 2.0**exponent if abs(exponent) > 20 else 1.0
        if sketch_rows == centers.num_features:
            sketch = torch.eye(sketch_rows)
        else:
            generator = torch.Generator().manual_seed(seed)
            sketch = torch.randn(sketch_rows, centers.num_features, generator=generator)
        self.directions = torch.cat([centers.decomposition[2].to(dtype), sketch.to(dtype)]).to(device)
        row_of_class = torch.where(present, present.cumsum(0) - 1, -1)
        self.row_of_class = row_of_class.to(device)
        distances = centers.squared_distances
        self._coordinates = centers.coordinates.to(place)
        self._distances = distances.to(place)
        # a sample between coincident centres belongs to the first of them
        tiny = (8 * _EPS) ** 2 * centers.means.square().sum()
        first = (distances <= tiny).to(torch.uint8).argmax(1) if len(distances) else row_of_class.new_zeros(0)
        self._class_of_row = present.nonzero()[:, 0][first].to(place)

    def residuals(self, features: Tensor, rows: Tensor) -> Tensor:
        """Residuals of samples whose rows ascend, in this type. The features, which are a copy, may be written to."""
        residuals = features.to(self.dtype)
        present, counts = torch.unique_consecutive(rows, return_counts=True)
        if residuals.device.type != "cpu" or len(present) > _SEGMENTS:
            residuals = residuals.sub_(self.high[rows])
            return residuals if self.low is None else residuals.sub_(self.low[rows])
        # class by class no table of centres is written and read again
        start = 0
        for row, count in zip(present.tolist(), counts.tolist(), strict=True):
            segment = residuals[start : start + count].sub_(self.high[row])
            if self.low is not None:
                segment.sub_(self.low[row])
            start += count
        return residuals

    def nearest(self, inside: Tensor, rows: Tensor) -> Tensor:
        """Class of the nearest centre, from the residual in the space of the class means, shape ``(n,)``."""
        # ‖h - μ_c‖² - ‖h - μ_y‖² = ‖μ_y - μ_c‖² + 2 r·(μ_y - μ_c)
        at = self._coordinates
        along = inside @ at.mT
        excess = self._distances[rows] + 2 * (along.gather(1, rows[:, None]) - along)
        return self._class_of_row[excess.argmin(1)]


def _log2(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).log2().item()


def _checked(features: Tensor, labels: Tensor, num_classes: int, num_features: int | None) -> tuple[Tensor, Tensor]:
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"Features must be floating-point and of shape (n, d), got {features.dtype} of shape "
            f"{tuple(features.shape)}. Flatten or pool the others first, for example by `features.flatten(1)`."
        )
    if num_features is not None and features.shape[1] != num_features:
        raise ValueError(f"Features have {features.shape[1]} dimensions, those before had {num_features}.")
    labels = _checked_integers(labels, len(features), 0, num_classes - 1, "labels")
    return features.detach(), labels.to(features.device)


def _checked_integers(values: Tensor, length: int, least: int, most: int | None, name: str) -> Tensor:
    """One integer per sample within bounds, as int64."""
    if values.is_floating_point() or values.is_complex():
        cure = "use `.argmax(1)` on one-hot or class scores, `.long()` on whole numbers"
        raise ValueError(f"`{name}` must be integers, got {values.dtype}; {cure}.")
    if values.dim() != 1:
        cure = (
            "use `.argmax(1)` on one-hot labels, `.squeeze(1)` on a column; several labels per sample have no classes"
        )
        raise ValueError(f"`{name}` must have shape (n,), got {tuple(values.shape)}; {cure}.")
    if len(values) != length:
        raise ValueError(f"{length} samples came with {len(values)} {name}.")
    values = values.detach().long()
    if length and (int(values.min()) < least or (most is not None and int(values.max()) > most)):
        raise ValueError(
            f"`{name}` must lie in {least}..{'' if most is None else most}, got {int(values.min())}.."
            f"{int(values.max())}. Drop samples without a label, and give as many classes as there are."
        )
    return values


def _refuse_non_finite(features: Tensor) -> None:
    # the sum tells in one read; it may overflow by itself
    if not bool(torch.isfinite(features.sum(dtype=torch.promote_types(features.dtype, torch.float32)))):
        bad = int((~torch.isfinite(features)).sum())
        if bad:
            samples = int((~torch.isfinite(features)).any(1).sum())
            raise FloatingPointError(
                f"{bad} of {features.numel()} features are not finite, in {samples} of {len(features)} samples."
            )


def _double_place(device: torch.device) -> torch.device:
    """Where float64 is added up: the device itself if it has that type."""
    return torch.device("cpu") if device.type == "mps" else device


def _blocks(num_samples: int, num_features: int, device: torch.device) -> Iterator[slice]:
    """Blocks of samples, small enough for what is made of them to stay in a cache."""
    size = max(1, _BLOCK.get(device.type, _BLOCK["cuda"]) // max(1, num_features))
    for start in range(0, num_samples, size):
        yield slice(start, min(start + size, num_samples))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in the precision of their type, whatever the program has set."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _without_rounding(device):
        yield


@contextmanager
def _without_rounding(device: torch.device) -> Iterator[None]:
    """No TF32 and no bfloat16 inside of float32 products."""
    backends: Any = torch.backends
    if _HAS_SWITCHES:
        # the switch of the one backend: the common one would leave the others changed
        switch = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
        before = switch.fp32_precision
        switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            switch.fp32_precision = before
        return
    common = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(common)
