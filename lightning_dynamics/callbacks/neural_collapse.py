"""Neural collapse through training and through depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.cadence import Cadence, check_flag
from lightning_dynamics.callbacks.collapse_table import OF_VALIDATION, collapse_table, of_layers
from lightning_dynamics.callbacks.feature_monitor import FeatureMonitor
from lightning_dynamics.callbacks.joint_features import JointFeatures
from lightning_dynamics.callbacks.lightning_features import (
    TRAINING,
    VALIDATION,
    FeatureOptions,
    ForwardFn,
    TargetFn,
)
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.metrics import (
    ClassCenters,
    Classifier,
    ClassSums,
    CollapseMeasures,
    ScatterSums,
    collapse_measures,
    separation_law,
)
from lightning_dynamics.objective import FeatureBatch, FeatureFn, FeaturePlan, FeatureReader
from lightning_dynamics.recording.quantity import LAST_LAYER, QuantityTable, of_layer

_AS_EXPECTED = ("given", "all classes have the same number of samples")  # reasons that are no news
_SAMPLES = 1024  # of the default probe: a hundred per class for ten classes


class NeuralCollapseMonitor(FeatureMonitor):
    """Shows how the features of a classifier collapse, at the last layer and at every hidden block.

    The features are those of ``module(x)`` in evaluation mode on a fixed :class:`Probe` of the training set, the same
    samples all run long, at the weights θ_t of each measured step. Nothing of the run changes.

    Conventions, the same for every layer: K classes with n_c samples; class means μ_c; global mean μ_G, the
    *unweighted* mean of the class means; Σ_W = (1/N) Σ (h - μ_c)(h - μ_c)ᵀ over all samples,
    Σ_B = (1/K) Σ_c (μ_c - μ_G)(μ_c - μ_G)ᵀ; standard deviations with ddof = 0; the classifier's rows centred over
    classes in all that compares them with class means. A hidden block is measured behind its activation, flattened.

    Args:
        layers: Hidden layers: ``"auto"`` for every block of the network; names of submodules (their outputs), with
            ``:input`` behind a name for what the submodule is given; regular expressions for whole names; or an empty
            list for none.
        every_n_train_steps: Steps between points. By default as often as costs at most 15 % of training, together with
            the other monitors; the number chosen is printed.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        head: The classifier: ``"auto"`` for the last linear layer, the name of a submodule with a weight of shape
            ``(K, d)``, or None for a network without one; the last of ``layers`` is then the last layer.
        reduce: What becomes of an output of shape ``(n, channels, …)``: ``"flatten"`` takes all of it, ``"pool"`` its
            mean over all but the first two dimensions, ``"auto"`` flattens where the class means of a layer fit into
            32 MiB. The record says which. For channels that come last give a ``feature_fn``.
        num_classes: K; by default the classifier's number of outputs (two if it has one), else what the labels say.
        probe: The data, see :class:`Probe`; 1,024 samples by default. ``Probe(whole=True)`` is the training set.
        validation: Also measure nc1, CDNV, nc4 and accuracies of validation data, around the class means of the
            training data: True for 1,024 samples of the Trainer's validation set, or a :class:`Probe`. Values begin
            when the Trainer has its validation loaders.
        forward_fn: How the network is run on a batch: a function of module and batch, or the name of a method that
            takes a batch. By default ``module(x)`` for batches ``(x, y)``.
        target_fn: The labels of a batch, integers of shape ``(n,)``: a function of the batch. By default y.
            Rows with label -100 do not count.
        subclass_fn: Labels of a finer partition, as ``target_fn``, for class collapse.
        feature_fn: What to take for a layer's features: a function of the layer's output and name that returns a matrix
            with one row per label. For networks that classify tokens or pixels, or read off one token. It is given the
            classifier's scores too, where these are not one row per label.
        per_class: Also record each class's number of samples, variance and distance from the global mean.
        mode: ``"eval"`` measures in evaluation mode, ``"train"`` with the training flags that the module trains with.
        precision: ``"float32"`` computes in at least that; ``"same"`` in the run's own precision.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"cdnv/.*"`` for a curve per layer; ``".*"`` for all.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``collapse_<name>/``.

    Logs:
        - ``collapse/nc1``: tr(Σ_W Σ_B⁺)/K, variability within classes; ``collapse/nc1_floor``, what noise alone would
          make of it.
        - ``collapse/nc2_equinorm``, ``collapse/nc2_equiangular``: how far the class means are from equal lengths, and
          from the largest equal angles.
        - ``collapse/nc3``: how far the classifier is from being dual to the class means.
        - ``collapse/nc4``: share of samples that the nearest class centre puts elsewhere than the network does.
        - ``collapse/accuracy``: of the network on these samples; the terminal phase begins where it reaches 1.
        - ``collapse/depth``: a figure of nc1 and CDNV through depth, one line for each measurement.

        Each record also holds variants of these, CDNV, accuracies, the effective rank of the class means, all of them
        for each hidden layer (``cdnv/<layer>``), and the slope of log nc1 through depth. What is not defined (two
        classes have no angles) is absent, with its reason in the notes. See :func:`collapse_measures`.

    Cost:
        A point takes two forward passes over the probe (one where all features fit into 256 MiB), and 0.4 to 0.5 of
        one more for each where all blocks of a small ResNet are measured; with ``validation`` one more over that.
        Memory: class means of each layer of d features, 8·K·d bytes, ten times over while it measures; features that
        are kept; and the activations of one batch.

    Example:
        >>> from lightning_dynamics import NeuralCollapseMonitor
        >>> monitor = NeuralCollapseMonitor(every_n_epochs=1, also_log="cdnv/.*")
    """

    def __init__(
        self,
        layers: str | Sequence[str] = "auto",
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        head: str | None = "auto",
        reduce: Literal["auto", "flatten", "pool"] = "auto",
        num_classes: int | None = None,
        probe: Probe | None = None,
        validation: bool | Probe = False,
        forward_fn: ForwardFn | None = None,
        target_fn: TargetFn | None = None,
        subclass_fn: TargetFn | None = None,
        feature_fn: FeatureFn | None = None,
        per_class: bool = False,
        mode: Literal["train", "eval"] = "eval",
        precision: Literal["float32", "same"] = "float32",
        also_log: str | Sequence[str] = (),
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        check_flag("per_class", per_class)
        if not isinstance(validation, (bool, Probe)):
            raise MisconfigurationException(f"`validation` must be True, False or a Probe, got {validation!r}.")
        beside = Probe(size=_SAMPLES, split="validation") if validation is True else validation or None
        if beside is not None and (beside.current_batch or beside.first_batches is not None):
            raise MisconfigurationException("`validation` takes other data than training: a Probe(dataloader=…)?")
        if beside is not None and beside.dataloader is None:
            beside = replace(beside, split="validation")
        self.per_class = per_class
        self._table = collapse_table(name, beside is not None)
        super().__init__(
            Cadence(every_n_train_steps, every_n_epochs, log_spaced),
            FeatureOptions(
                probe=probe if probe is not None else Probe(size=_SAMPLES),
                mode=mode,
                precision=precision,
                validation=beside,
                forward_fn=forward_fn,
                target_fn=target_fn,
                subclass_fn=subclass_fn,
                feature_fn=feature_fn,
            ),
            layers=layers,
            head=head,
            reduce=reduce,
            num_classes=num_classes,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )

    def check(self, subject: JointFeatures) -> None:
        plan, _ = self.plan(subject, {})
        self._measures(subject, plan)

    @property
    def table(self) -> QuantityTable:
        return self._table

    def measure(self, point: Point[JointFeatures]) -> Measured:
        subject = point.subject
        plan, left_out = self.plan(subject, point.memory)
        found, widths = self._measures(subject, plan)
        into = Measured({}, notes={"layers": _described(plan, widths), "num_classes": plan.num_classes})
        if left_out:
            into.notes["left_out"] = left_out
        for layer in plan.taps:
            self._enter(into, layer, found[TRAINING][layer])
        for layer, beside in found.get(VALIDATION, {}).items():
            values = {k: v for k, v in beside.values.items() if k in OF_VALIDATION}
            values = values if layer == LAST_LAYER else {k: v for k, v in values.items() if k in of_layers()}
            into.scalars.update({self._key(f"{k}_validation", layer): v for k, v in values.items()})
        self._enter_law(into, list(plan.taps))
        return into

    def _measures(
        self, subject: JointFeatures, plan: FeaturePlan
    ) -> tuple[dict[str, dict[str, CollapseMeasures]], dict[str, int]]:
        """The measures of each layer, of the training data and around its class means of the validation data.

        Also the layers' numbers of features.
        """
        subclasses = 0
        if self.options.subclass_fn is not None:
            subclasses = 1 + max(subject.ask(partial(FeatureReader.largest_label, of_subclasses=True)))
        sums = subject.accumulate(_Sums(plan, subclasses), plan, TRAINING)
        weights = None if plan.head is None else Classifier(*subject.local.classifier(plan.head))
        found, widths = {}, {}
        sums.check()
        centers, inner = sums.centers()
        for part in subject.local.parts:
            scatter = subject.accumulate(_Scatter(centers, inner if part == TRAINING else {}), plan, part)
            found[part] = scatter.measures(weights)
            widths = {key: each.centers.num_features for key, each in scatter.classes.items()}
        return found, widths

    def _key(self, name: str, layer: str = LAST_LAYER) -> str:
        return of_layer(f"{self.table.family}/{name}", layer)

    def _enter(self, into: Measured, layer: str, measures: CollapseMeasures) -> None:
        """The measures of one layer, and what there is to say of them."""
        declared = set(measures.values) if layer == LAST_LAYER else of_layers()
        into.scalars.update({self._key(k, layer): v for k, v in measures.values.items() if k in declared})
        into.errors.update({self._key(k, layer): v for k, v in measures.errors.items() if k in declared})
        if self.per_class:
            into.arrays.update({self._key(f"class_{k}", layer): v for k, v in measures.arrays.items()})
        missing = {k: v for k, v in measures.undefined.items() if not v.endswith(_AS_EXPECTED)}
        for note, said in (("undefined", missing), ("remarks", list(measures.notes))):
            if said:
                into.notes.setdefault(note, {})[layer] = said

    def _enter_law(self, into: Measured, layers: Sequence[str]) -> None:
        """The straight line through log nc1 over depth, the last layer included."""
        values = [into.scalars.get(self._key("nc1", layer), 0.0) for layer in layers]
        if len(values) < 3 or min(values) <= 0:
            return
        law = separation_law(values)
        into.scalars[self._key("depth_slope")] = law.slope
        if law.error is not None:
            into.errors[self._key("depth_slope")] = law.error
        if law.r_squared is not None:
            into.scalars[self._key("depth_r2")] = law.r_squared


class _Sums:
    """First pass: class means of every layer, and means of subclasses."""

    def __init__(self, plan: FeaturePlan, subclasses: int) -> None:
        self.classes = {key: ClassSums(plan.num_classes) for key in plan.taps}
        self.subclasses = {key: ClassSums(subclasses) for key in plan.taps} if subclasses else {}
        self.members = torch.zeros(plan.num_classes, subclasses, dtype=torch.float64)

    def update(self, batch: FeatureBatch) -> None:
        if batch.subclasses is not None:
            both = batch.labels.cpu() * self.members.shape[1] + batch.subclasses.cpu()
            self.members += torch.bincount(both, minlength=self.members.numel()).view_as(self.members)
        for key, features in batch.features.items():
            self.classes[key].update(features, batch.labels.to(features.device))
            if self.subclasses:
                assert batch.subclasses is not None
                self.subclasses[key].update(features, batch.subclasses.to(features.device))

    def check(self) -> None:
        """Refuse data that say nothing of classes, or subclasses that are none.

        Raises:
            ValueError: If no row has a label, or a subclass occurs in several classes.
        """
        if not any(float(each.state()["counts"].sum()) for each in self.classes.values()):
            raise ValueError("No row has a label: there is nothing to measure.")
        shared = ((self.members > 0).sum(0) > 1).nonzero()[:, 0].tolist()
        if shared:
            classes = (self.members[:, shared[0]] > 0).nonzero()[:, 0].tolist()
            raise ValueError(
                f"The subclass {shared[0]} occurs in the classes {classes[0]} and {classes[1]}. Number "
                "subclasses over all classes: let `subclass_fn` return, for example, `y * number_of_subclasses + s`."
            )

    def centers(self) -> tuple[dict[str, ClassCenters], dict[str, ClassCenters]]:
        """Class means, and means of subclasses, of every layer."""
        classes, inner = self.classes.items(), self.subclasses.items()
        return {key: each.centers() for key, each in classes}, {key: each.centers() for key, each in inner}

    def state(self) -> dict[str, Tensor]:
        return {**_joined({"classes": self.classes, "subclasses": self.subclasses}), "members": self.members}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.members = state["members"]
        _distribute(state, {"classes": self.classes, "subclasses": self.subclasses})


class _Scatter:
    """Second pass: how samples lie around these means.

    Args:
        centers: Class means of every layer.
        inner: Means of subclasses; empty where there are none.
    """

    def __init__(self, centers: Mapping[str, ClassCenters], inner: Mapping[str, ClassCenters]) -> None:
        self.classes = {key: ScatterSums(each) for key, each in centers.items()}
        self.subclasses = {key: ScatterSums(each) for key, each in inner.items()}

    def update(self, batch: FeatureBatch) -> None:
        for key, features in batch.features.items():
            labels = batch.labels.to(features.device)
            predictions = None if batch.predictions is None else batch.predictions.to(features.device)
            self.classes[key].update(features, labels, predictions)
            if self.subclasses:
                assert batch.subclasses is not None
                self.subclasses[key].update(features, batch.subclasses.to(features.device))

    def state(self) -> dict[str, Tensor]:
        return _joined({"classes": self.classes, "subclasses": self.subclasses})

    def load(self, state: Mapping[str, Tensor]) -> None:
        _distribute(state, {"classes": self.classes, "subclasses": self.subclasses})

    def measures(self, classifier: Classifier | None) -> dict[str, CollapseMeasures]:
        """What comes of it, by layer; the classifier is that of the last one."""
        return {
            key: collapse_measures(each, classifier if key == LAST_LAYER else None, self.subclasses.get(key))
            for key, each in self.classes.items()
        }


def _joined(sums: Mapping[str, Mapping[str, ClassSums | ScatterSums]]) -> dict[str, Tensor]:
    return {
        f"{group}|{key}|{name}": tensor
        for group, layers in sums.items()
        for key, each in layers.items()
        for name, tensor in each.state().items()
    }


def _distribute(state: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, ClassSums | ScatterSums]]) -> None:
    for group, layers in sums.items():
        for key, each in layers.items():
            start = f"{group}|{key}|"
            each.load({name.removeprefix(start): value for name, value in state.items() if name.startswith(start)})


def _described(plan: FeaturePlan, widths: Mapping[str, int]) -> dict[str, Any]:
    """What each layer is, in order of depth."""
    return {
        key: {"tap": tap.name, "reduce": plan.reductions.get(key), "features": widths[key]}
        for key, tap in plan.taps.items()
    }
