"""The features of a LightningModule: its own forward pass on a probe, tapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_dynamics.callbacks.lightning_replay import Circumstances, ModuleRun, ReplayOptions
from lightning_dynamics.callbacks.map_style import ProbeItem
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.objective import FeatureFn, Features, Feeding

# the function first, and without its return type: configuration files take anything else for a string
ForwardFn = Callable[[LightningModule, Any], Any] | str
"""How to run the network on a batch: a function of module and batch, or the name of a method that takes a batch."""

TargetFn = Callable[[Any], Any]
"""The labels of a batch, shape ``(n,)``, integers from 0 on; -100 for rows that do not count."""

TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True)
class FeatureOptions(ReplayOptions):
    """Which features, on which data.

    Attributes:
        validation: Data to measure besides; None for none.
        forward_fn: See :data:`ForwardFn`; by default ``module(x)`` with the first member of the batch.
        target_fn: See :data:`TargetFn`; by default the second member of the batch.
        subclass_fn: Labels of a finer partition, like those of ``target_fn``; None where there is none.
        feature_fn: See :data:`FeatureFn`.
    """

    validation: Probe | None = None
    forward_fn: ForwardFn | None = None
    target_fn: TargetFn | None = None
    subclass_fn: TargetFn | None = None
    feature_fn: FeatureFn | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("forward_fn", "target_fn", "subclass_fn", "feature_fn"):
            value = getattr(self, name)
            if not (value is None or callable(value) or (name == "forward_fn" and isinstance(value, str))):
                method = " or the name of a method" if name == "forward_fn" else ""
                raise MisconfigurationException(f"`{name}` must be a function{method}, got {value!r}.")

    @property
    def probes(self) -> list[Probe]:
        return [self.probe] if self.validation is None else [self.probe, self.validation]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*super().key, self.forward_fn, self.target_fn, self.subclass_fn, self.feature_fn)


def lightning_features(
    trainer: Trainer,
    module: LightningModule,
    options: FeatureOptions,
    items: Sequence[Sequence[ProbeItem]],
    circumstances: Circumstances,
) -> Features:
    """This rank's part of the features.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        options: What to measure.
        items: This rank's batches of each of the probes.
        circumstances: What else there is to know.
    """
    run = ModuleRun(trainer, module, options, circumstances)
    feeding = Feeding(
        forward=_forward_of(module, options.forward_fn),
        target=options.target_fn if options.target_fn is not None else _second,
        prepare=lambda item: run.ready(item[:3], item[3] == VALIDATION),
        subclass=options.subclass_fn,
        feature_fn=options.feature_fn,
    )
    parts = {
        name: [(item.batch, item.index, item.is_ready, name) for item in each]
        for name, each in zip((TRAINING, VALIDATION), items, strict=False)
    }
    features = Features(module, feeding, parts, **run.arguments([item for each in items for item in each]))
    run.leaf_of = features.leaf_of
    return features


def _forward_of(module: LightningModule, forward_fn: ForwardFn | None) -> Callable[[nn.Module, Any], Any]:
    if isinstance(forward_fn, str):
        return partial(_method, forward_fn)
    if forward_fn is not None:
        return forward_fn  # type: ignore[return-value]
    if type(module).forward is LightningModule.forward and "forward" not in vars(module):
        raise ValueError(
            f"{type(module).__name__} has no `forward`, so that it is not known how to run its network on a batch. Say "
            "it with `forward_fn=`, for example `lambda module, batch: module.net(batch[0])`."
        )
    return _first_member


def _method(name: str, module: nn.Module, batch: Any) -> Any:
    return getattr(module, name)(batch)


def _first_member(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        return module(batch[0])
    if isinstance(batch, Tensor):
        return module(batch)
    raise ValueError(
        f"The batch is a {type(batch).__name__}, not `(x, y)`. Say with `forward_fn=` how the network is run on it, "
        "for example `lambda module, batch: module(batch['image'])`."
    )


def _second(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    example = "batch['label']" if isinstance(batch, Mapping) else "batch.y"
    raise ValueError(
        f"The batch is a {type(batch).__name__}, not `(x, y)`: its labels are not known. Say what they are with "
        f"`target_fn=`, for example `lambda batch: {example}`."
    )
