"""Gradients of the single samples of a batch, of the loss that a module's own step returns."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from lightning_dynamics.objective.copies import IMMUTABLE
from lightning_dynamics.objective.parameters import Layout
from lightning_dynamics.objective.randomness import seed_everything, stream_seed

if TYPE_CHECKING:
    from lightning_dynamics.objective.loss import Objective

SamplesOf = Callable[[Any], Sequence[Any]]
"""Splits a batch, as the loss receives it, into batches of one sample each, in order."""

_SCALARS = (*IMMUTABLE, Enum, np.generic)
_WIDEST_GAP = 0.1  # relative difference that narrow types may explain


class CoupledSamplesError(ValueError):
    """The loss of a batch is not the mean of losses of its samples, so that single samples have no gradient."""


class SampleGradients:
    """Gradients of single samples: ℓ_i is the loss of the batch that holds sample i alone.

    Works only inside the open sandbox of its objective. By ``torch.func.vmap`` where the module's code allows it, by a
    loop over samples otherwise; which of them works is found out on the first batch, where two samples are computed
    both ways.

    That the rows' mean is the gradient of the batch, and the mean of the ℓ_i its loss, is verified on every batch,
    since nothing else shows that samples are not coupled. Where a step draws random numbers each sample draws its own,
    and both hold for the expectation only. What is verified then is the same loss without dropout: gradients on the
    first batch, losses on every one. Differences below about 10⁻³ of a row's norm (in float32; 10⁻¹² in float64) count
    as rounding.

    Args:
        objective: The objective. Its ``samples_of`` splits its batches, see :data:`SamplesOf`; :func:`slices` by
            default.
        leaves: The private leaves of the measured parameters.
        layout: How they make up a vector.
        most_bytes: Size of the largest block of rows; at least one row is always held.

    Attributes:
        is_mapped: Whether samples are computed by ``vmap``; None as long as that is not known.
        is_noisy: Whether the step draws random numbers; None as long as that is not known.
    """

    def __init__(self, objective: Objective, leaves: list[Tensor], layout: Layout, most_bytes: int = 1 << 26) -> None:
        self.is_mapped: bool | None = None
        self.is_noisy: bool | None = None
        self._objective = objective
        self._samples_of: SamplesOf = objective.samples_of or slices
        self._leaves = leaves
        self._layout = layout
        self._most_bytes = most_bytes

    def of_batch(self, index: int, batch: Any, draw: int, gradient: Tensor, loss: float) -> Iterator[Tensor]:
        """Gradients of a batch's samples in order, as blocks of shape ``(c, size)`` in the type of ``gradient``.

        What was made of the rows counts only once the iterator has come to its end, where coupling shows.

        Args:
            index: The batch's number.
            batch: The batch, as the objective holds it.
            draw: Number of the draw of noise.
            gradient: Gradient of the whole batch, shape ``(size,)``, float32 or wider.
            loss: Loss of the whole batch.

        Raises:
            CoupledSamplesError: If the loss of the batch is not the mean of the losses of its samples, or if that
                could not be found out.
            ValueError: If the batch cannot be split, or the step cannot be run on a single sample.
        """
        case = _Case(index, batch, draw)
        parts = self._parts(case)
        if len(parts) == 1:
            yield gradient.clone().unsqueeze(0)
            return
        if self.is_noisy is None:
            self.is_noisy = self._draws(case, parts[0])
            if self.is_noisy:
                self._rule_out_coupling(case, gradient, by_gradient=True)
        elif self.is_noisy:
            self._rule_out_coupling(case, gradient, by_gradient=False)
        sums = _Sums()
        for rows, losses in self._blocks(case, parts, gradient):
            assert rows is not None
            if not self.is_noisy:
                sums.add(rows, losses)
            yield rows
        if not self.is_noisy and not self._agree(case, sums, loss, gradient):
            self._rule_out_coupling(case, gradient, by_gradient=True)
            self.is_noisy = True  # dropout made the difference, though the first sample did not show it

    def _rule_out_coupling(self, case: _Case, like: Tensor, by_gradient: bool) -> None:
        """Compare the whole batch with its samples, the noise of dropout switched off.

        Raises:
            CoupledSamplesError: If they do not agree.
        """
        case = dataclasses.replace(case, is_quiet=True)
        parts = self._parts(case)
        if self._draws(case, parts[0]):
            raise CoupledSamplesError(_STILL_NOISY)
        loss, gradient = self._whole(case, like, by_gradient)
        sums = _Sums()
        for rows, losses in self._blocks(case, parts, like, by_gradient):
            sums.add(rows, losses)
        if not self._agree(case, sums, loss, gradient):
            raise CoupledSamplesError(_explanation(sums, loss))

    def _agree(self, case: _Case, sums: _Sums, loss: float, gradient: Tensor | None) -> bool:
        """Whether the means over samples are the values of the batch, to rounding."""
        if not math.isfinite(loss) or (gradient is not None and not bool(gradient.isfinite().all())):
            return True  # there is nothing to compare with, and no number that could be taken for a result
        eps = self._eps()
        if sums.agree(loss, gradient, eps):
            return True
        loss_floor, gradient_floor = self._rounding(case, eps, gradient)
        return sums.agree(loss, gradient, eps, loss_floor, gradient_floor)

    def _rounding(self, case: _Case, eps: float, like: Tensor | None) -> tuple[float, float]:
        """How far the loss, and the gradient in norm, go when weights are off by a few rounding errors.

        Where a fit is close the residuals are themselves rounding errors.
        """
        generator = torch.Generator().manual_seed(0)
        like = torch.empty(0) if like is None else like

        def value(change: float) -> tuple[float, Tensor]:
            signs = [torch.randint(2, leaf.shape, generator=generator).to(leaf.device) * 2 - 1 for leaf in self._leaves]
            near = [leaf.detach() * (1 + change * sign) for leaf, sign in zip(self._leaves, signs, strict=True)]
            stand_ins = [other.to(leaf.dtype) for other, leaf in zip(near, self._leaves, strict=True)]
            loss, gradient = self._whole(case, like, True, stand_ins)
            assert gradient is not None
            return loss, gradient

        (loss, gradient), others = value(0.0), [value(4 * eps) for _ in range(3)]
        return (
            max(abs(loss - other) for other, _ in others),
            max(float((gradient - other).norm()) for _, other in others),
        )

    def _eps(self) -> float:
        """Rounding unit of the narrowest type that the loss is computed in."""
        types = {leaf.dtype for leaf in self._leaves}
        device = self._leaves[0].device.type
        if torch.is_autocast_enabled(device):
            types.add(torch.get_autocast_dtype(device))
        return max(torch.finfo(dtype).eps for dtype in types)

    def _parts(self, case: _Case) -> list[Any]:
        """The batch's samples, transferred and augmented as the whole batch is."""

        def split(module: nn.Module, item: Any) -> list[Any]:
            with case.watch(module):
                return list(self._samples_of(item))

        parts: list[Any] = self._run(split, case, case.batch)
        if not parts:
            raise ValueError("The batch was split into no samples.")
        return parts

    def _whole(
        self, case: _Case, like: Tensor, by_gradient: bool, stand_ins: list[Tensor] | None = None
    ) -> tuple[float, Tensor | None]:
        """Loss and gradient of the whole batch."""

        def value(module: nn.Module, item: Any) -> tuple[float, Tensor | None]:
            leaves = self._leaves
            if stand_ins is None:
                loss = case.loss(self._objective, module, item)
            else:
                leaves = [stand_in.requires_grad_() for stand_in in stand_ins]
                with self._standing(leaves):
                    loss = case.loss(self._objective, module, item)
            if not by_gradient:
                return float(loss.detach()), None
            parts = torch.autograd.grad(loss, leaves, allow_unused=True)
            return float(loss.detach()), self._layout.flatten(parts, like)

        return self._run(value, case, case.batch)  # type: ignore[no-any-return]

    def _draws(self, case: _Case, part: Any) -> bool:
        """Whether the step draws random numbers, other than from generators of its own."""
        devices = {torch.device("cpu"), self._leaves[0].device}

        def numbers() -> list[float]:
            return [random.random(), np.random.random(), *(torch.rand((), device=d).item() for d in devices)]

        self._single(case, 0, part)
        now = numbers()
        seed_everything(case.seed(self._objective, 0))
        return now != numbers()

    def _blocks(
        self, case: _Case, parts: list[Any], like: Tensor, by_gradient: bool = True
    ) -> Iterator[tuple[Tensor | None, list[float]]]:
        """Gradients, if asked for, and losses of samples, in blocks."""
        most = max(1, self._most_bytes // (self._layout.size * like.element_size()))
        for start in range(0, len(parts), most):
            block = parts[start : start + most]
            mapped = None
            may_map = by_gradient if self.is_mapped is None else self.is_mapped
            if may_map and len(block) > 1:
                mapped = self._tried(case, start, block, like, by_gradient)
            if mapped is not None:
                yield mapped
            else:
                yield self._looped(case, start, block, like, by_gradient)

    def _tried(
        self, case: _Case, start: int, block: list[Any], like: Tensor, by_gradient: bool
    ) -> tuple[Tensor | None, list[float]] | None:
        """The block by ``vmap``; None, for good, where that fails or gives something else than the loop."""
        try:
            rows, losses = self._mapped(case, start, block, like, by_gradient)
        except CoupledSamplesError:
            raise
        except Exception:
            self.is_mapped = False
            return None
        if self.is_mapped is None and rows is not None:
            gap = min(_WIDEST_GAP, 1024 * self._eps())
            for row in (0, len(block) - 1):
                gradients, (loss,) = self._looped(case, start + row, [block[row]], like, True)
                assert gradients is not None
                (gradient,) = gradients
                is_same = bool((rows[row] - gradient).norm() <= gap * gradient.norm())
                if not is_same or not abs(losses[row] - loss) <= gap * abs(loss):
                    self.is_mapped = False
                    return None
            self.is_mapped = True
        return rows, losses

    def _mapped(
        self, case: _Case, start: int, block: list[Any], like: Tensor, by_gradient: bool
    ) -> tuple[Tensor | None, list[float]]:
        tensors: list[Tensor] = []
        shared: list[Any] = []
        build = _stacked(block, tensors, shared)
        leaves = [leaf.detach() for leaf in self._leaves]

        def run(module: nn.Module, given: tuple[list[Tensor], list[Any]]) -> tuple[Tensor | None, list[float]]:
            tensors, shared = given
            seed = case.seed(self._objective, start)
            seed_everything(seed)

            def value(leaves: list[Tensor], tensors: list[Tensor]) -> Tensor:
                # within a transform only what was made there can be written to: a counter in a buffer
                with self._standing(leaves, copies_buffers=True):
                    return case.loss(self._objective, module, build(tensors, shared))

            function = torch.func.grad_and_value(value) if by_gradient else value
            result: Any = torch.func.vmap(function, (None, 0), randomness="different")(leaves, tensors)
            if _draws_shared_numbers(seed):
                raise ValueError("Samples that are computed together would share random numbers that are not torch's.")
            if not by_gradient:
                return None, result.tolist()
            gradients, losses = result
            rows = like.new_empty(len(block), self._layout.size)
            for columns, gradient in zip(torch.split(rows, self._layout.sizes, dim=1), gradients, strict=True):
                columns.copy_(_real(gradient.detach()).reshape(len(block), -1))
            return rows, losses.tolist()

        # without gradients, beyond those of `grad`, no graph over the parameters that are not measured is built
        with torch.no_grad(), _no_autocast_cache(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return self._run(run, case, (tensors, shared))  # type: ignore[no-any-return]

    def _looped(
        self, case: _Case, start: int, block: list[Any], like: Tensor, by_gradient: bool
    ) -> tuple[Tensor | None, list[float]]:
        rows = like.new_empty(len(block), self._layout.size) if by_gradient else None
        losses = []
        for number, part in enumerate(block):
            loss = self._single(case, start + number, part)
            losses.append(float(loss.detach()))
            if rows is not None:
                gradient = torch.autograd.grad(loss, self._leaves, allow_unused=True)
                rows[number] = self._layout.flatten(gradient, like)
        return rows, losses

    def _single(self, case: _Case, number: int, part: Any) -> Tensor:
        """The loss of one sample, with its graph."""

        def value(module: nn.Module, item: Any) -> Tensor:
            seed_everything(case.seed(self._objective, number))
            return case.loss(self._objective, module, item)

        try:
            loss = self._objective._evaluate(case.index, part, case.draw, value)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._objective.sandbox.mend()
            if isinstance(error, CoupledSamplesError):
                raise
            raise ValueError(
                f"The step fails on sample {number} alone: {error} Gradients of single samples need a step that runs "
                "on a batch of one."
            ) from error
        assert loss is not None
        return loss

    def _run(self, function: Callable[[nn.Module, Any], Any], case: _Case, batch: Any) -> Any:
        try:
            return self._objective._run(function, case.index, batch, case.draw)
        except BaseException:
            self._objective.sandbox.mend()  # others may go on in the same sandbox
            raise

    @contextmanager
    def _standing(self, stand_ins: Sequence[Tensor], copies_buffers: bool = False) -> Iterator[None]:
        """With other tensors in the place of the leaves, wherever the module holds these."""
        owners = self._objective.sandbox._owners()
        other = {id(leaf): stand_in for leaf, stand_in in zip(self._leaves, stand_ins, strict=True)}
        if copies_buffers:
            buffers = {id(b): b for owner in owners for b in vars(owner).get("_buffers", {}).values() if b is not None}
            other.update({key: buffer.clone() for key, buffer in buffers.items()})
        undo: list[tuple[Any, Any, Tensor]] = []
        try:
            for owner in owners:
                # the registry of parameters, and lists such as the flat weights of recurrent layers
                own = vars(owner)
                for holder in [own, *(value for value in own.values() if isinstance(value, (dict, list)))]:
                    for key, held in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                        if id(held) in other:
                            undo.append((holder, key, held))
                            holder[key] = other[id(held)]
            yield
        finally:
            for holder, key, held in undo:
                holder[key] = held


@dataclasses.dataclass(frozen=True)
class _Case:
    """A batch and its draw of noise; ``is_quiet`` where dropout shall do nothing."""

    index: int
    batch: Any
    draw: int
    is_quiet: bool = False

    def seed(self, objective: Objective, number: int) -> int:
        return stream_seed(objective.seed, self.index, self.draw, number)

    def watch(self, module: nn.Module) -> _Watch:
        """The mode to run in, with the module in its private state prepared for it."""
        if self.is_quiet:
            for submodule in module.modules():
                name = type(submodule).__name__.lower()
                if "drop" in name or "stochasticdepth" in name:
                    submodule.training = False
                if isinstance(submodule, nn.RNNBase):
                    submodule.dropout = 0.0
        return _Watch(self.is_quiet)

    def loss(self, objective: Objective, module: nn.Module, item: Any) -> Tensor:
        with self.watch(module):
            loss = objective._loss(module, item)
        if loss is None:
            raise CoupledSamplesError("The step skips batches of a single sample, so a sample has no loss of its own.")
        if not isinstance(loss, Tensor):
            raise ValueError(f"The loss must be a scalar tensor, got {type(loss).__name__}.")
        return loss.reshape(())


class _Sums:
    """Running sums over samples, for the means that are compared with the batch."""

    def __init__(self) -> None:
        self.count = 0
        self.loss = 0.0
        self._squared_losses = 0.0
        self._squared_norms = 0.0
        self._gradient: Tensor | None = None

    @property
    def mean_loss(self) -> float:
        return self.loss / self.count

    def add(self, rows: Tensor | None, losses: list[float]) -> None:
        self.count += len(losses)
        self.loss += sum(losses)
        self._squared_losses += sum(loss * loss for loss in losses)
        if rows is not None:
            self._squared_norms += float(torch.linalg.vector_norm(rows)) ** 2
            total = rows.sum(0)
            self._gradient = total if self._gradient is None else self._gradient.add_(total)

    def agree(
        self,
        loss: float,
        gradient: Tensor | None,
        eps: float,
        loss_floor: float = 0.0,
        gradient_floor: float = 0.0,
    ) -> bool:
        """Whether the means differ from the batch's values by less than rounding can explain.

        Errors of single samples average out: their mean is smaller by the root of the number of samples.
        """
        share = min(_WIDEST_GAP, 8192 * eps) / self.count
        slack = share * math.sqrt(self._squared_losses) + 8 * eps * abs(loss) + loss_floor
        if not abs(self.mean_loss - loss) <= slack:
            return False
        if gradient is None:
            return True
        assert self._gradient is not None
        slack = share * math.sqrt(self._squared_norms) + 8 * eps * float(gradient.norm()) + gradient_floor
        return float((self._gradient / self.count - gradient).norm()) <= slack


class _Watch(TorchFunctionMode):
    """While active, normalization by the statistics of a batch is refused; and, if asked for, dropout does nothing."""

    def __init__(self, is_quiet: bool) -> None:
        super().__init__()
        self._is_quiet = is_quiet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS and _argument(args, kwargs, 5, "training"):
            raise CoupledSamplesError(
                "Batch norm in training mode couples the samples of a batch: none has a loss of its own. Measure with "
                '`mode="eval"`, where running statistics are used, use another norm (group norm, layer norm), or '
                "measure what needs whole batches only."
            )
        if self._is_quiet:
            if func in _DROPOUTS:
                return _argument(args, kwargs, 0, "input")
            if func in _NOISY:
                place, name, without = _NOISY[func]
                if len(args) > place:
                    args = (*args[:place], without, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, name: without}
        return func(*args, **kwargs)


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, False)


def _place(function: Callable[..., Any], name: str) -> int:
    return list(inspect.signature(function).parameters).index(name)


_NORMS = frozenset({F.batch_norm, torch.batch_norm})
_DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
        torch.dropout_,
        torch.alpha_dropout,
        torch.alpha_dropout_,
        torch.feature_dropout,
        torch.feature_dropout_,
        torch.feature_alpha_dropout,
        torch.feature_alpha_dropout_,
    }
)
_NOISY: dict[Any, tuple[int, str, Any]] = {
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.multi_head_attention_forward: (_place(F.multi_head_attention_forward, "dropout_p"), "dropout_p", 0.0),
    F.rrelu: (_place(F.rrelu, "training"), "training", False),
}


_STILL_NOISY = (
    "That samples are coupled could not be ruled out: the step draws random numbers besides dropout, of which each "
    'sample draws its own. Measure with `mode="eval"`, or a loss without that noise with `loss_fn=`.'
)


def _explanation(sums: _Sums, loss: float) -> str:
    found = f"The loss of the batch is {loss:.6g}, and the mean of the losses of its {sums.count} samples "
    found += f"{sums.mean_loss:.6g}. "
    if abs(sums.loss - loss) <= 1e-3 * abs(loss):
        return (
            f"{found}It is the sum of these, so that the gradient depends on how many samples there are. Divide it by "
            "their number (`reduction='mean'`), or measure such a loss with `loss_fn=`."
        )
    return (
        f"{found}The samples are coupled, or these numbers and their gradients would be equal: a mean over tokens of "
        "samples of different lengths, class weights, contrastive losses, statistics of the batch, noise from a "
        "generator of the step's own. Average each sample first and then over samples, measure such a loss with "
        "`loss_fn=`, or measure what needs whole batches only."
    )


def _draws_shared_numbers(seed: int) -> bool:
    """Whether numbers were drawn from Python's or NumPy's generator since they were seeded."""
    now = random.random(), np.random.random()
    seed_everything(seed)
    return now != (random.random(), np.random.random())


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Without the cache that would keep what autocast makes of tensors that do not outlive a transform."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def slices(batch: Any, size: int = 1) -> list[Any]:
    """A batch's samples, each a batch of one, or consecutive parts of several samples.

    n is the length of the first tensor. Tensors and arrays of length n are sliced along their first dimension, lists
    and tuples of length n without such tensors too; other lists and tuples, mappings and dataclasses are entered;
    numbers, strings and tensors without dimensions go to every sample.

    Args:
        batch: The batch. Samples must lie along the first dimension.
        size: Samples in a part; the last one may have fewer.

    Raises:
        ValueError: If there is anything else, which would have to be shared or split in a way that is not known.
    """
    length = next(_lengths(batch), None)
    if not length:
        raise ValueError(f"The batch has no samples to split into: its first tensor has length {length}.")
    return _split(batch, length, size, "batch")


def _split(thing: Any, n: int, size: int, path: str) -> list[Any]:
    parts = -(-n // size)
    if isinstance(thing, (Tensor, np.ndarray)):
        if isinstance(thing, Tensor) and thing.layout is not torch.strided:
            raise ValueError(_refusal(path, f"is a tensor of layout {thing.layout}"))
        if thing.ndim == 0:
            return [thing] * parts
        if len(thing) != n:
            raise ValueError(_refusal(path, f"has length {len(thing)} where there are {n} samples"))
        return list(torch.split(thing, size)) if isinstance(thing, Tensor) else _cut(thing, size)
    if isinstance(thing, _SCALARS):
        return [thing] * parts
    if type(thing) in (list, tuple) and len(thing) == n and next(_lengths(thing), None) is None:
        return _cut(thing, size)
    opened = _opened(thing)
    if opened is None:
        raise ValueError(_refusal(path, f"is a {type(thing).__name__}"))
    names, members, build = opened
    if not members:
        return [thing] * parts
    columns = [_split(member, n, size, f"{path}[{name!r}]") for name, member in zip(names, members, strict=True)]
    return [build(list(row)) for row in zip(*columns, strict=True)]


def _cut(sequence: Any, size: int) -> list[Any]:
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


def _refusal(path: str, reason: str) -> str:
    return (
        f"The batch cannot be split into samples: `{path}` {reason}. Give `samples_of=`, a function that makes a list "
        "of batches of one sample each out of a batch."
    )


def _lengths(thing: Any) -> Iterator[int]:
    """Lengths of the tensors and arrays in a batch that have a dimension."""
    if isinstance(thing, (Tensor, np.ndarray)):
        if thing.ndim:
            yield len(thing)
        return
    if not isinstance(thing, _SCALARS):
        for member in (_opened(thing) or ((), (), None))[1]:
            yield from _lengths(member)


_Opened = tuple[list[Any], list[Any], Callable[[list[Any]], Any]]


def _opened(thing: Any) -> _Opened | None:
    """Names and members of a container, and what builds another one like it from other members; None if it is none."""
    if isinstance(thing, PackedSequence):
        return None
    if type(thing) in (list, tuple):
        return list(range(len(thing))), list(thing), type(thing)
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return list(thing._fields), list(thing), lambda members: type(thing)(*members)
    if isinstance(thing, Mapping):
        keys = list(thing)

        def like_mapping(members: list[Any]) -> Any:
            pairs = zip(keys, members, strict=True)
            if type(thing) is dict or not isinstance(thing, MutableMapping):
                return type(thing)(pairs)  # type: ignore[call-arg]
            other = copy(thing)
            other.update(pairs)
            return other

        return keys, list(thing.values()), like_mapping
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = [field.name for field in dataclasses.fields(thing)]

        def like_dataclass(members: list[Any]) -> Any:
            other = copy(thing)
            for name, member in zip(fields, members, strict=True):
                object.__setattr__(other, name, member)
            return other

        return fields, [getattr(thing, name) for name in fields], like_dataclass
    return None


def _stacked(
    parts: Sequence[Any], tensors: list[Tensor], shared: list[Any]
) -> Callable[[Sequence[Tensor], Sequence[Any]], Any]:
    """What samples have in common goes to ``shared``, tensors in which they differ to ``tensors``, stacked.

    Returns:
        What builds one sample from its tensors and from ``shared``.

    Raises:
        ValueError: If samples differ in more than the values of tensors.
    """
    first = parts[0]
    is_one = all(part is first for part in parts[1:])
    if is_one or (isinstance(first, _SCALARS) and all(type(p) is type(first) and p == first for p in parts[1:])):
        place = len(shared)
        shared.append(first)
        return lambda _, shared: shared[place]
    if any(type(part) is not type(first) for part in parts[1:]):
        raise ValueError("Samples are of different types.")
    if isinstance(first, Tensor):
        place = len(tensors)
        tensors.append(torch.stack(tuple(parts)))
        return lambda tensors, _: tensors[place]
    opened = [_opened(part) for part in parts]
    if opened[0] is None or any(other is None or other[0] != opened[0][0] for other in opened):
        raise ValueError(f"A {type(first).__name__} cannot be stacked.")
    build = opened[0][2]
    members = zip(*(other[1] for other in opened if other is not None), strict=True)
    recipes = [_stacked(column, tensors, shared) for column in members]
    return lambda tensors, shared: build([recipe(tensors, shared) for recipe in recipes])
