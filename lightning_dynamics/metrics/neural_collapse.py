"""Neural collapse as a metric, for a validation loop or a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_dynamics.metrics.class_sums import ClassCenters, ClassSums, ScatterSums
from lightning_dynamics.metrics.collapse import Classifier, collapse_measures


class NeuralCollapse(Metric):
    """Neural collapse as a metric, for a validation loop or a notebook: :func:`collapse_measures` of what it was shown.

    By default all features are kept until ``compute``, which makes two passes over them: memory N·d. With ``centers``
    only sums around these are kept, memory O(K·d): so are validation data measured against the class means of the
    training data, or anything in two passes (:class:`ClassSums` first).

    Over processes, ``compute`` gives the measures of all samples. By default every process must have called ``update``
    at least once, with an empty batch if it has no samples: torchmetrics gathers what was kept, and waits for a process
    that kept nothing.

    ``forward`` gives the measures of its batch alone, which is a small sample: ``nc1`` and ``cdnv`` of few samples per
    class are too small, since the means adapt to them. Read ``compute``.

    Example:
        >>> metric = NeuralCollapse(num_classes=2)
        >>> features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]))
        >>> round(float(metric.compute()["cdnv"]), 6)
        0.0025
        >>> metric.undefined["nc3"]
        'no classifier given'

    Args:
        num_classes: K. Labels are 0..K-1.
        classifier: The layer that the features enter. A layer is read anew each time, and never becomes part of the
            metric: no parameters, nothing in ``state_dict``. Where no predictions are given they are those of this
            layer, at ``compute`` (at ``update`` with ``centers``).
        centers: Class means to measure against; those of the features shown by default.
        kwargs: Of :class:`torchmetrics.Metric`.

    Attributes:
        undefined: After ``compute``, why measures are missing, by name.
        errors: After ``compute``, standard errors of the measures that are estimated, by name.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    features: list[Tensor]
    labels: list[Tensor]
    predictions: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        classifier: nn.Linear | Classifier | None = None,
        *,
        centers: ClassCenters | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ClassSums(num_classes)
        if centers is not None and centers.num_classes != num_classes:
            raise ValueError(f"`centers` are of {centers.num_classes} classes, `num_classes` is {num_classes}.")
        self.num_classes = num_classes
        self.undefined: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._given = centers
        self._classifier = _Reference(classifier)
        self._around = None if centers is None else ScatterSums(centers)
        if self._around is None:
            for name in ("features", "labels", "predictions"):
                self.add_state(name, default=[], dist_reduce_fx="cat")
        else:
            for name, value in self._around.state().items():
                self.add_state(name, default=value, dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, predictions: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: Shape ``(n, d)``, of any floating type.
            labels: Shape ``(n,)``, integers in 0..K-1.
            predictions: Classes that the network chooses, shape ``(n,)``.
        """
        if self._around is not None:
            if predictions is None and (classifier := self._weights()) is not None:
                predictions = classifier.predict(features)
            self._around.load({name: getattr(self, name) for name in self._around.state()})
            self._around.update(features, labels, predictions)
            for name, value in self._around.state().items():
                setattr(self, name, value.to(self.device))
            return
        ClassSums(self.num_classes).update(features, labels)
        if predictions is None:
            predictions = torch.full_like(labels, -1)
        self.features.append(features.detach())
        self.labels.append(labels.detach())
        self.predictions.append(predictions.detach())

    def compute(self) -> dict[str, Tensor]:
        """The defined measures by name, each a scalar in float64; :attr:`undefined` has reasons for the others."""
        classifier = self._weights()
        scatter = self._scatter(classifier)
        measures = collapse_measures(scatter, classifier)
        self.undefined, self.errors = measures.undefined, measures.errors
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=self.device) for name, value in measures.values.items()}

    def reset(self) -> None:
        """Forget what was shown."""
        super().reset()
        self.undefined, self.errors = {}, {}

    @property
    def centers(self) -> ClassCenters:
        """Class means of the features shown so far, or those that were given."""
        if self._given is not None:
            return self._given
        sums = ClassSums(self.num_classes)
        for features, labels, _ in self._batches():
            sums.update(features, labels)
        return sums.centers()

    def _scatter(self, classifier: Classifier | None) -> ScatterSums:
        scatter = ScatterSums(self.centers)
        if self._given is not None:
            scatter.load({name: getattr(self, name) for name in scatter.state()})
            return scatter
        for features, labels, predictions in self._batches():
            if classifier is not None and bool((predictions < 0).any()):
                predictions = torch.where(predictions < 0, classifier.predict(features), predictions)
            scatter.update(features, labels, predictions)
        return scatter

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # after a synchronization the states are single tensors
        states = (self.features, self.labels, self.predictions)
        lists = [state if isinstance(state, list) else [state] for state in states]
        yield from zip(*lists, strict=True)

    def _weights(self) -> Classifier | None:
        held = self._classifier.held
        return Classifier.of(held) if isinstance(held, nn.Linear) else held


class _Reference:
    """Holds a layer without registering it; copies of the holder share it."""

    def __init__(self, held: nn.Linear | Classifier | None) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self
