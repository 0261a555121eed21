"""What monitors of a network's features have in common: which layers, found how, made a matrix how."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.cadence import check_positive_integer
from lightning_dynamics.callbacks.joint_features import FeaturesPart, JointFeatures
from lightning_dynamics.callbacks.lightning_features import FeatureOptions, lightning_features
from lightning_dynamics.callbacks.lightning_replay import Circumstances, check_choice
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.objective import (
    Anatomy,
    FeaturePlan,
    FeatureReader,
    Features,
    Reduction,
    Tap,
    resolve,
)
from lightning_dynamics.recording.quantity import LAST_LAYER, layer_keys

_FORWARD = 0.5  # gradients per forward pass, what is computed of its features included
_WIDEST = 1 << 25  # bytes of class means of one layer, from which its positions are averaged


class FeatureMonitor(DynamicsMonitor[JointFeatures]):
    """A monitor of a network's features.

    Args:
        cadence: When to measure.
        options: Which features, on which data.
        layers: Hidden layers: ``"auto"``, names, or patterns.
        head: Name of the classifier; ``"auto"`` to find it, None for none.
        reduce: How the output of a layer becomes one row per sample; averages are over what stands behind the second
            dimension.
        num_classes: Number of classes; None for what the classifier or the labels say.
        others: See :class:`DynamicsMonitor`.
    """

    options: FeatureOptions
    part = FeaturesPart
    passes = 2
    """How often the data is read in a measurement."""

    def __init__(
        self,
        *args: Any,
        layers: str | Sequence[str] = "auto",
        head: str | None = "auto",
        reduce: str = "auto",
        num_classes: int | None = None,
        **others: Any,
    ) -> None:
        check_choice("reduce", reduce, ("auto", "flatten", "pool"))
        if not (isinstance(layers, str) or (isinstance(layers, Sequence) and all(isinstance(n, str) for n in layers))):
            raise MisconfigurationException(f"`layers` must be a name or a list of names, got {layers!r}.")
        if not (head is None or isinstance(head, str)):
            raise MisconfigurationException(f"`head` must be the name of a submodule, 'auto' or None, got {head!r}.")
        check_positive_integer("num_classes", num_classes, optional=True, least=2)
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.head = head
        self.reduce = reduce
        self.num_classes = num_classes
        super().__init__(*args, pair=False, **others)

    def gradients_per_point(self, module: LightningModule) -> float:
        return self.passes * _FORWARD

    def replay(
        self,
        trainer: Trainer,
        module: LightningModule,
        items: Sequence[Sequence[ProbeItem]],
        circumstances: Circumstances,
        sharing: Sequence[DynamicsMonitor[Any]],
    ) -> Features:
        return lightning_features(trainer, module, self.options, items, circumstances)

    def describe(self) -> dict[str, Any]:
        validation = self.options.validation
        return {
            "layers": self.layers,
            "head": self.head,
            "reduce": self.reduce,
            "num_classes": self.num_classes,
            "validation": None if validation is None else validation.words,
        }

    def plan(self, subject: JointFeatures, memory: dict[str, Any]) -> tuple[FeaturePlan, dict[str, str]]:
        """What to read, and which layers were left out and why; found once, and again when the network's parts change.

        Args:
            subject: The features.
            memory: What the monitor keeps; the plan is kept there.
        """
        said = repr((self.layers, self.head, self.reduce, self.num_classes, self.options.feature_fn is not None))
        names = hashlib.sha256("\n".join([said, *subject.local.names]).encode()).hexdigest()
        kept = memory.get("plan")
        if kept is not None and kept["names"] == names:
            return _unpacked(kept), dict(kept["left_out"])
        plan, left_out = self._found(subject)
        memory["plan"] = _packed(plan, left_out, names)
        return plan, left_out

    def _found(self, subject: JointFeatures) -> tuple[FeaturePlan, dict[str, str]]:
        anatomy = subject.ask(partial(_anatomy, self.num_classes))[0]
        head = self._head_of(anatomy)
        wanted = anatomy.hidden if self.layers == "auto" else resolve(anatomy, self.layers)
        last = None if head is None else Tap(head, "input")
        hidden = [tap for tap in wanted if tap != last]
        if last is None:
            if not hidden:
                raise ValueError(f"There is no layer to measure. {anatomy.problem} Name some with `layers=`.")
            last = hidden.pop()
        keys = layer_keys([tap.name.replace(":", "_") for tap in hidden])
        if LAST_LAYER in keys.values():
            raise ValueError(f"A layer cannot be called {LAST_LAYER!r} in the keys.")
        taps = {**dict(zip(keys.values(), hidden, strict=True)), LAST_LAYER: last}
        outputs = None if head is None else len(subject.local.classifier(head)[0])
        num_classes = self._classes(outputs, subject)
        shapes = subject.ask(partial(_shapes, list(taps.values())))[0]
        reductions = {}
        for key, tap in taps.items():
            reduction = self._reduction(tap, shapes[tap.name], num_classes)
            if reduction is not None:
                reductions[key] = reduction
        left_out = dict(anatomy.left_out) if self.layers == "auto" else {}
        return FeaturePlan(taps, reductions, head, num_classes), left_out

    def _head_of(self, anatomy: Anatomy) -> str | None:
        if self.head is None:
            return None
        if self.head == "auto":
            if anatomy.head is None:
                raise ValueError(
                    f"{anatomy.problem} Say with `head=` which submodule classifies (None for none, which leaves out "
                    "what is about its weights), and where samples have parts (tokens, pixels) with `feature_fn=` what "
                    "the features of each label are."
                )
            return anatomy.head
        taps = resolve(anatomy, [self.head])
        if len(taps) != 1 or taps[0].side != "output":
            raise ValueError(f"`head={self.head!r}` must name one submodule.")
        return taps[0].module

    def _classes(self, outputs: int | None, subject: JointFeatures) -> int:
        """K: as given, else what the classifier has outputs for (one output stands for two), else what labels say."""
        if outputs is not None:
            outputs = max(2, outputs)
            if self.num_classes is not None and self.num_classes != outputs:
                raise ValueError(
                    f"`num_classes` is {self.num_classes}, but the classifier has {outputs} outputs. Leave it out, or "
                    "name another `head=`."
                )
            return outputs
        if self.num_classes is not None:
            return self.num_classes
        if self.options.probe.current_batch:
            raise ValueError("Each current batch may have other classes. Say with `num_classes=` how many there are.")
        return max(2, 1 + max(subject.ask(FeatureReader.largest_label)))

    def _reduction(self, tap: Tap, shape: tuple[int, ...], num_classes: int) -> Reduction | None:
        if self.options.feature_fn is not None or len(shape) <= 2:
            return None
        if self.reduce == "flatten" or (self.reduce == "auto" and 8 * num_classes * math.prod(shape[1:]) <= _WIDEST):
            return "flatten"
        if len(shape) == 3:
            raise ValueError(
                f"`{tap.name}` gives a tensor of shape {shape}, a sequence of which it is not known what to average "
                "over. Say with `feature_fn=` what the features of a sample are, or leave the layer out."
            )
        return "pool"


def _anatomy(num_outputs: int | None, reader: FeatureReader) -> Anatomy:
    return reader.anatomy(num_outputs)


def _shapes(taps: Sequence[Tap], reader: FeatureReader) -> dict[str, tuple[int, ...]]:
    return reader.shapes(taps)


def _packed(plan: FeaturePlan, left_out: Mapping[str, str], names: str) -> dict[str, Any]:
    """A plan in plain containers, for a checkpoint."""
    return {
        "names": names,
        "taps": {key: tap.name for key, tap in plan.taps.items()},
        "reductions": dict(plan.reductions),
        "head": plan.head,
        "num_classes": plan.num_classes,
        "left_out": dict(left_out),
    }


def _unpacked(kept: Mapping[str, Any]) -> FeaturePlan:
    taps = {key: Tap.parse(name) for key, name in kept["taps"].items()}
    return FeaturePlan(taps, dict(kept["reductions"]), kept["head"], kept["num_classes"])
