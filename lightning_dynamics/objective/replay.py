"""A module that is run on fixed batches again and again, each time from the same state, and is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import fork_rng, seed_everything, stream_seed
from lightning_dynamics.objective.sandbox import Clones, Sandbox


class Replay:
    """Runs of a module's own code on fixed batches with fixed noise, at its current weights.

    Every run starts from the same state (buffers, attributes, random numbers), so that it is a function in the strict
    sense: the same weights give the same bits. Nothing that a run does stays in the module; see :class:`Sandbox` for
    how, and for what is beyond it.

    Args:
        module: The module.
        batches: The batches; each is copied before it is used.
        weights: One number per batch, what it counts; by default the length of the first tensor found in it.
        seed: Seed of the noise (dropout, augmentation). Batch b draws from a stream of its own.
        indices: Numbers that name the batches when their noise is drawn; 0, 1, … by default. A process that holds only
            some of the batches passes their global numbers, so that the noise does not depend on who holds what.
        training: Training flag during a run; None keeps each submodule's own.
        dtype: Narrowest floating type to compute in; parameters, buffers and batches below it are raised to it. None
            keeps every type as it is.
        beside: Objects whose state is private too, like the module's.
        keep: Objects that the sandbox does not copy.
        replace: Stand-ins for objects met while copying.
        overrides: Attributes set while the sandbox is open.
        values: Weights and buffers by name to run at, instead of the module's own.
        clones: Cache of large private tensors that outlives this object.
        context: Entered around every run (an autocast context, say).

    Attributes:
        begins: Called before each run.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        training: bool | None = None,
        dtype: torch.dtype | None = torch.float32,
        beside: Iterable[object] = (),
        keep: Iterable[object] = (),
        replace: Iterable[tuple[object, object]] = (),
        overrides: Iterable[tuple[object, str, Any]] = (),
        values: Mapping[str, Tensor] | None = None,
        clones: Clones | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.module = module
        self.seed = seed
        self._batches = batches
        self._weights = [float(w) for w in weights] if weights is not None else [batch_length(b) for b in batches]
        self._indices = list(indices) if indices is not None else list(range(len(batches)))
        for name, count in (("weights", len(self._weights)), ("indices", len(self._indices))):
            if count != len(batches):
                raise ValueError(f"`{name}` must have one entry per batch ({len(batches)}), got {count}.")
        if not all(w >= 0 for w in self._weights):
            raise ValueError(f"`weights` must not be negative, got {self._weights}.")
        self._dtype = dtype
        self._context = context
        self.begins: Callable[[], None] = lambda: None
        self.sandbox = Sandbox(
            module,
            beside=beside,
            dtype=dtype,
            keep=keep,
            replace=replace,
            overrides=overrides,
            training=training,
            values=values,
            clones=clones,
        )

    @property
    def shared(self) -> set[str]:
        """Attributes that a run shares with the module instead of copying them (see :class:`Sandbox`)."""
        return self.sandbox.shared

    def leaf_of(self, parameter: Tensor) -> Tensor:
        """The private leaf that stands for a parameter during a run; another tensor stands for itself."""
        return self.sandbox.leaf_of(parameter)

    @contextmanager
    def _sandboxed(self, *contexts: AbstractContextManager[Any]) -> Iterator[None]:
        """With the sandbox open, inside of these contexts."""
        with ExitStack() as stack:
            stack.enter_context(fork_rng())
            for context in contexts:
                stack.enter_context(context)
            stack.enter_context(_default_dtype(self._dtype))
            stack.enter_context(self._context())
            stack.enter_context(self.sandbox)
            yield

    def _begin(self, index: int, batch: Any, draw: int = 0) -> Any:
        """Go back to the state that every run starts from; return a copy of the batch."""
        self.begins()
        self.sandbox.renew()
        seed_everything(stream_seed(self.seed, index, draw))
        return private_copy(batch, self._dtype)


def batch_length(batch: Any) -> float:
    """Number of samples in a batch: the length of the first tensor found in it, 1 if there is none."""
    return next((float(len(tensor)) for tensor in _tensors_in(batch) if tensor.dim()), 1.0)


def tensor_bytes(batch: Any) -> int:
    """Bytes of the tensors in a batch."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(batch))


def _tensors_in(thing: Any, depth: int = 0) -> Iterator[Tensor]:
    """Tensors in the usual containers and, one level deep, in the attributes of other objects."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for member in thing.values():
            yield from _tensors_in(member, depth)
    elif isinstance(thing, (list, tuple)):
        for member in thing:
            yield from _tensors_in(member, depth)
    elif hasattr(thing, "__dict__") and depth == 0:
        for member in vars(thing).values():
            yield from _tensors_in(member, depth + 1)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Make new tensors at least as wide as ``dtype`` (a run in true half precision sets a narrower default)."""
    before = torch.get_default_dtype()
    if dtype is None or torch.finfo(before).bits >= torch.finfo(dtype).bits:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
