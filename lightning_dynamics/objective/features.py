"""The features of a network: what its layers return for fixed batches, tapped without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dynamics.objective.layers import Anatomy, Tap, discover
from lightning_dynamics.objective.numerics import in_full_precision
from lightning_dynamics.objective.replay import Replay

Reduction = Literal["flatten", "pool"]
"""How a layer's output of shape ``(n, channels, …)`` becomes ``(n, d)``: all of it, or its mean over all positions."""

# without its return type, which configuration files would ask of the function itself
FeatureFn = Callable[[Tensor, str], Any]
"""What to take for a layer's features: a function of what was tapped and the tap's name that returns ``(rows, d)``.
The classifier's scores are given to it too, where they are not a matrix with one row per label."""

_CACHE = 1 << 28  # bytes of features that are kept from one pass over the data to the next
_IGNORED = -100  # label that PyTorch's losses leave out


@dataclass(frozen=True)
class FeaturePlan:
    """What to read of a network.

    Attributes:
        taps: Where, by the name that the features go by.
        reductions: How each is made a matrix; those that are missing are matrices already.
        head: Name of the classifier, whose output tells the network's predictions; None for what the forward pass
            returns.
        num_classes: Number of classes K.
    """

    taps: Mapping[str, Tap]
    reductions: Mapping[str, Reduction]
    head: str | None
    num_classes: int


@dataclass(frozen=True)
class FeatureBatch:
    """The features of one batch.

    Attributes:
        features: Of each tap, shape ``(n, d)``.
        labels: Shape ``(n,)``, integers from 0 to K - 1.
        predictions: The network's, shape ``(n,)``; None where they are not known.
        subclasses: Labels of a finer partition, shape ``(n,)``; None where there is none.
    """

    features: dict[str, Tensor]
    labels: Tensor
    predictions: Tensor | None = None
    subclasses: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.features.values())


@dataclass(frozen=True)
class Feeding:
    """How batches are fed to a network.

    Attributes:
        forward: Runs the network on a batch, ``forward(module, batch)``.
        target: The batch's labels.
        prepare: Makes a batch ready, on the module's device.
        subclass: Labels of a finer partition; None where there is none.
        feature_fn: See :data:`FeatureFn`.
    """

    forward: Callable[[nn.Module, Any], Any]
    target: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda batch: batch
    subclass: Callable[[Any], Any] | None = None
    feature_fn: FeatureFn | None = None


class Features(Replay):
    """A network's features on fixed batches, at its current weights.

    Args:
        module: The network.
        feeding: How batches are fed to it.
        parts: Batches by what they are part of (training set, validation set).
        how: How the module is run, see :class:`Replay`; lists are over all parts, one after the other. A batch of
            weight 0 is run but does not count.
    """

    def __init__(self, module: nn.Module, feeding: Feeding, parts: Mapping[str, Sequence[Any]], **how: Any) -> None:
        super().__init__(module, [batch for batches in parts.values() for batch in batches], **how)
        self.feeding = feeding
        self._parts = [part for part, batches in parts.items() for _ in batches]

    @contextmanager
    def open(self) -> Iterator[FeatureReader]:
        """Open the network for reading."""
        with self._sandboxed(torch.inference_mode(False), torch.no_grad(), in_full_precision()):
            reader = FeatureReader(self)
            try:
                yield reader
            finally:
                reader.close()


class FeatureReader:
    """A network that is open for reading its features on this process's batches."""

    def __init__(self, source: Features) -> None:
        self._source = source
        self._overwritten: set[str] = set()
        self._cached: dict[str, list[FeatureBatch]] = {}
        self._cached_plan: FeaturePlan | None = None

    @property
    def names(self) -> list[str]:
        """Names, types and sizes of the network's submodules."""
        return [
            f"{name} {type(module).__qualname__} {_sizes(module)}"
            for name, module in self._source.module.named_modules()
        ]

    @property
    def parts(self) -> list[str]:
        """What the batches are parts of."""
        return list(dict.fromkeys(self._source._parts))

    def close(self) -> None:
        """Let go of what is kept."""
        self._cached.clear()

    def anatomy(self, num_outputs: int | None = None) -> Anatomy:
        """The network's parts, found by running it on the first batch.

        Args:
            num_outputs: Number of the classifier's outputs, where it is known.
        """
        source = self._source
        batch = self._begin(0)
        try:
            return discover(source.module, lambda: source.feeding.forward(source.module, batch), num_outputs)
        finally:
            source.sandbox.mend()

    def shapes(self, taps: Sequence[Tap]) -> dict[str, tuple[int, ...]]:
        """Shapes of what these taps give on the first batch, by their names."""
        captured, _ = self._captured(0, self._begin(0), list(taps), None)
        return {name: tuple(tensor.shape) for name, tensor in captured.items()}

    def classifier(self, head: str) -> tuple[Tensor, Tensor | None]:
        """Weight, shape ``(K, d)``, and bias, shape ``(K,)``, of a submodule; copies in double precision on the CPU."""
        module = self._source.module.get_submodule(head)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"The head `{head}` ({type(module).__name__}) has no weight matrix. Name another `head=`.")
        return _kept(weight), None if not isinstance(bias, Tensor) else _kept(bias)

    def largest_label(self, of_subclasses: bool = False) -> int:
        """The largest label of all batches, or the largest of the finer partition; -1 if there is none."""
        feeding = self._source.feeding
        target = feeding.subclass if of_subclasses else feeding.target
        assert target is not None
        largest = -1
        for number in range(len(self._source._parts)):
            labels = self._labels(self._begin(number), target)
            largest = max([largest, *labels.max().view(-1).tolist()] if len(labels) else [largest])
        return largest

    def read(self, plan: FeaturePlan, part: str) -> Iterator[FeatureBatch]:
        """The features of each batch of a part, tap by tap. A second pass finds them kept, where they are small.

        Raises:
            ValueError: If labels or features are not what a classifier over samples has.
        """
        if plan != self._cached_plan:
            self._cached.clear()
            self._cached_plan = plan
        if part in self._cached:
            yield from self._cached[part]
            return
        numbers = [number for number, other in enumerate(self._source._parts) if other == part]
        kept: list[FeatureBatch] | None = []
        for number in numbers:
            batch = self._features(number, plan)
            if kept is not None and batch.bytes * len(numbers) * len(self.parts) <= _CACHE:
                kept.append(_alone(batch))
            else:
                kept = None
            yield batch
        if kept is not None:
            self._cached[part] = kept

    def keeps(self, part: str) -> bool:
        """Whether the next pass over a part will find its features kept."""
        return part in self._cached

    def forget(self, part: str) -> None:
        """Read a part anew in the next pass."""
        self._cached.pop(part, None)

    def _begin(self, number: int) -> Any:
        """A batch as the network receives it, the module in the state that every run starts from."""
        source = self._source
        return source.feeding.prepare(source._begin(source._indices[number], source._batches[number]))

    def _features(self, number: int, plan: FeaturePlan) -> FeatureBatch:
        source, feeding = self._source, self._source.feeding
        batch = self._begin(number)
        labels = self._labels(batch, feeding.target, plan.num_classes)
        subclasses = None if feeding.subclass is None else self._labels(batch, feeding.subclass, name="subclass_fn")
        if subclasses is not None and bool(((subclasses < 0) & (labels >= 0)).any()):
            raise ValueError("`subclass_fn` gives no subclass to rows that have a label.")
        captured, logits = self._captured(number, batch, list(plan.taps.values()), plan.head)
        features = {}
        for name, tap in plan.taps.items():
            rows = _as_matrix(captured[tap.name], plan.reductions.get(name), tap.name, feeding.feature_fn)
            if len(rows) != len(labels):
                raise ValueError(
                    f"`{tap.name}` has {len(rows)} rows of features for {len(labels)} labels. If the network "
                    "classifies parts of a sample (tokens, pixels), give a `feature_fn=` that returns one row for each "
                    "label."
                )
            features[name] = rows
        if feeding.feature_fn is not None and isinstance(logits, Tensor) and not _fits(logits, labels):
            logits = feeding.feature_fn(logits, plan.head or "output")
        counts = (labels != _IGNORED) if source._weights[number] else torch.zeros_like(labels, dtype=torch.bool)
        found = FeatureBatch(features, labels, _predictions(logits, labels, plan.num_classes), subclasses)
        return found if bool(counts.all()) else _selected(found, counts)

    def _labels(
        self,
        batch: Any,
        target: Callable[[Any], Any],
        num_classes: int | None = None,
        name: str = "target_fn",
    ) -> Tensor:
        labels = _plain_labels(target(batch), name)
        counted = labels[labels != _IGNORED]
        if len(counted) and (int(counted.min()) < 0 or (num_classes is not None and int(counted.max()) >= num_classes)):
            what = "from 0 on" if num_classes is None else f"from 0 to {num_classes - 1}, one for each class"
            raise ValueError(
                f"Labels must be integers {what}; there are some from {int(counted.min())} to {int(counted.max())}. "
                f"Say with `{name}=` what a batch's labels are, or with `num_classes=` how many classes there are."
            )
        # the forward pass may write into the batch
        return labels.clone()

    def _captured(self, number: int, batch: Any, taps: list[Tap], head: str | None) -> tuple[dict[str, Tensor], Any]:
        """What the taps give on a batch, and the classifier's output (or the network's, where there is none)."""
        source = self._source
        wanted = {tap.name: tap for tap in taps}
        if head is not None:
            wanted.setdefault(head, Tap(head))
        for _ in range(2):
            caught: dict[str, tuple[Tensor, int | None]] = {}
            with ExitStack() as stack:
                for name, tap in wanted.items():
                    stack.enter_context(_tapped(source.module, tap, name in self._overwritten, caught))
                output = source.feeding.forward(source.module, batch)
            source.sandbox.mend()
            for name in wanted:
                if name not in caught:
                    raise ValueError(f"The forward pass does not come by `{name}`. Name layers that it uses.")
            # what an operation in place has written over since is caught again, this time as a copy
            again = {name for name, (tensor, version) in caught.items() if version != _version(tensor)}
            again -= self._overwritten
            if not again:
                break
            self._overwritten |= again
            batch = self._begin(number)
        tensors = {name: tensor for name, (tensor, _) in caught.items()}
        logits = output if head is None else tensors[head]
        return {tap.name: tensors[tap.name] for tap in taps}, logits


@contextmanager
def _tapped(root: nn.Module, tap: Tap, copies: bool, caught: dict[str, tuple[Tensor, int | None]]) -> Iterator[None]:
    """Catch what a submodule returns, or is given, during one forward pass."""
    try:
        module = root.get_submodule(tap.module)
    except AttributeError:
        raise ValueError(f"There is no submodule `{tap.module}` any more.") from None

    def catch(_: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if tap.name in caught:
            raise ValueError(
                f"`{tap.name}` is used more than once in one forward pass, so that it has no one value. Name the "
                "modules around it, or run the network once with `forward_fn=`."
            )
        tensor = tap.pick(args, kwargs, output).detach()
        if not tensor.is_floating_point() or not tensor.dim():
            raise ValueError(f"What `{tap.name}` gives is {_described(tensor)}, not one row of numbers per sample.")
        # what runs in inference mode does not count how often it is written to
        tensor = tensor.clone() if copies or tensor.is_inference() else tensor
        caught[tap.name] = (tensor, _version(tensor))

    if tap.side == "output":
        handle = module.register_forward_hook(catch, with_kwargs=True)
    else:
        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _as_matrix(tensor: Tensor, reduction: Reduction | None, name: str, feature_fn: FeatureFn | None) -> Tensor:
    if feature_fn is not None:
        rows = feature_fn(tensor, name)
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"`feature_fn` must return a matrix with one row per label for `{name}`, got {_described(rows)}."
            )
        return rows
    if reduction == "pool":
        return tensor.flatten(2).mean(2, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def _plain_labels(given: Any, name: str = "target_fn") -> Tensor:
    """Labels as integers, shape ``(n,)``.

    Raises:
        ValueError: If they are anything else than one class for each row.
    """
    cure = f"Say with `{name}=` what a batch's labels are: integers, one for each row of features."
    if isinstance(given, (list, np.ndarray)):
        with suppress(TypeError, ValueError):
            given = torch.as_tensor(given)
    if not isinstance(given, Tensor):
        raise ValueError(f"There are no labels to be found: expected a tensor, got {_described(given)}. {cure}")
    labels: Tensor = given
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() == 2:
        one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
        if not bool(one_hot):
            raise ValueError(
                f"The labels, {_described(labels)}, give a row several classes, or shares of them (several labels, "
                f"mixup). Collapse is about one class per row. {cure}"
            )
        return labels.argmax(1)
    if labels.is_floating_point() and labels.dim() == 1 and bool(((labels == 0) | (labels == 1)).all()):
        return labels.to(torch.int64)
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"The labels are {_described(labels)}: not one class per row. {cure}")
    return labels.to(torch.int64)


def _predictions(logits: Any, labels: Tensor, num_classes: int) -> Tensor | None:
    """The class that each row is taken for; one output stands for two classes."""
    if not _fits(logits, labels):
        return None
    scores: Tensor = logits
    if scores.shape[1] == 1:
        return (scores[:, 0] > 0).to(torch.int64) if num_classes == 2 else None
    return scores.argmax(1)


def _fits(logits: Any, labels: Tensor) -> bool:
    """Whether there is one row of scores for each label."""
    return isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(labels) and logits.shape[1] > 0


def _alone(batch: FeatureBatch) -> FeatureBatch:
    """The same without what much larger tensors they are views of (one token of a sequence)."""
    features = {
        name: tensor
        if tensor.untyped_storage().nbytes() <= 2 * tensor.numel() * tensor.element_size()
        else tensor.clone()
        for name, tensor in batch.features.items()
    }
    return replace(batch, features=features)


def _selected(batch: FeatureBatch, rows: Tensor) -> FeatureBatch:
    return replace(
        batch,
        features={name: tensor[rows.to(tensor.device)] for name, tensor in batch.features.items()},
        labels=batch.labels[rows],
        predictions=None if batch.predictions is None else batch.predictions[rows.to(batch.predictions.device)],
        subclasses=None if batch.subclasses is None else batch.subclasses[rows.to(batch.subclasses.device)],
    )


def _sizes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters(recurse=False) if not is_lazy(p)]


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)
