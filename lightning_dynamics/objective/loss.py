"""A module's loss as a deterministic function of its weights: value, gradient, Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.double_backward import refuse_hidden_derivatives, twice_differentiable
from lightning_dynamics.objective.linearization import Linearization, Term
from lightning_dynamics.objective.outputs import Kind, OutputFn, check_outputs, only_one, outer_value, tapped
from lightning_dynamics.objective.parameters import ParameterFilter, select_parameters
from lightning_dynamics.objective.randomness import fork_rng, seed_everything, stream_seed
from lightning_dynamics.objective.repairs import Repaired
from lightning_dynamics.objective.sandbox import Clones, Sandbox

LossFunction = Callable[[nn.Module, Any], Tensor | None]
"""A batch's loss, a scalar tensor, or None for a batch that is to be skipped."""

Engine = Literal["auto", "kept", "rebuilt"]
"""How products are computed: from gradient graphs that are kept for all of them (fast: 1.4 to 2.8 gradients each), or
rebuilt for each (a third to a half more, but only one batch's graph is ever held)."""


class Objective:
    """L(θ) = Σ_b w_b ℓ_b(θ) / Σ_b w_b over fixed batches b, with fixed noise, at the module's current weights.

    Every evaluation starts from the same state (buffers, attributes, random numbers), so that L is a function in the
    strict sense: the same weights give the same bits. Nothing that an evaluation does stays in the module; see
    :class:`Sandbox` for how, and for what is beyond it.

    Args:
        module: The module whose parameters are θ.
        loss: Computes one batch's loss, ``loss(module, batch)``.
        batches: The batches; each is copied before it is used.
        weights: w_b, one number per batch; by default the length of the first tensor found in the batch, which is right
            for losses that are means over samples.
        parameters: Which parameters make up θ, see :data:`ParameterFilter`; all that require a gradient by default.
        output_fn: Where the network's outputs are, see :data:`OutputFn`; needed for all but the Hessian.
        matrices: How many matrices products will be taken of, the Hessian included: the memory of graphs grows with it.
        seed: Seed of the noise (dropout, augmentation). Batch b draws from a stream of its own.
        noise_draws: R ≥ 1; the loss is averaged over R draws of the noise, at R times the cost. A single fixed draw
            biases the largest eigenvalue upwards.
        indices: Numbers that name the batches when their noise is drawn; 0, 1, … by default. A process that holds only
            some of the batches passes their global numbers, so that the noise does not depend on who holds what.
        training: Training flag during evaluation; None keeps each submodule's own.
        dtype: Narrowest floating type to compute in; parameters, buffers and batches below it are raised to it. None
            keeps every type as it is.
        output_fn: Where the network's outputs are, see :data:`OutputFn`; for Gauss-Newton and Fisher matrices.
        engine: See :data:`Engine`; ``"auto"`` keeps the graphs if they fit into half of the memory that is free.
        beside: Objects whose state is private too, like the module's.
        keep: Objects that the sandbox does not copy.
        replace: Stand-ins for objects met while copying.
        overrides: Attributes set while the sandbox is open.
        values: Weights and buffers by name to evaluate at, instead of the module's own.
        clones: Cache of large private tensors that outlives this objective.
        context: Entered around every evaluation (an autocast context, say).
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
        parameters: ParameterFilter | None = None,
        output_fn: OutputFn | None = None,
        matrices: int = 1,
        seed: int = 0,
        noise_draws: int = 1,
        indices: Sequence[int] | None = None,
        training: bool | None = None,
        dtype: torch.dtype | None = torch.float32,
        engine: Engine = "auto",
        beside: Iterable[object] = (),
        keep: Iterable[object] = (),
        replace: Iterable[tuple[object, object]] = (),
        overrides: Iterable[tuple[object, str, Any]] = (),
        values: Mapping[str, Tensor] | None = None,
        clones: Clones | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not len(batches):
            raise ValueError("`batches` is empty: a loss needs at least one batch.")
        if noise_draws < 1:
            raise ValueError(f"`noise_draws` must be at least 1, got {noise_draws}.")
        self.module = module
        self.engine = engine
        self.seed = seed
        self.noise_draws = noise_draws
        self.output_fn = output_fn
        self.matrices = matrices
        self.graph_bytes: int | None = None  # what the gradient graphs of all batches take, once it is known
        self._loss = loss
        self._batches = batches
        self._weights = [float(w) for w in weights] if weights is not None else [batch_length(b) for b in batches]
        self._indices = list(indices) if indices is not None else list(range(len(batches)))
        for name, count in (("weights", len(self._weights)), ("indices", len(self._indices))):
            if count != len(batches):
                raise ValueError(f"`{name}` must have one entry per batch ({len(batches)}), got {count}.")
        if not all(w >= 0 for w in self._weights):
            raise ValueError(f"`weights` must not be negative, got {self._weights}.")
        self._where = parameters
        self._dtype = dtype
        self._context = context
        self._is_settled = False
        self._is_inspected = False
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
        """Attributes that an evaluation shares with the module instead of copying them (see :class:`Sandbox`)."""
        return self.sandbox.shared

    @property
    def num_terms(self) -> int:
        """Number of losses that one evaluation computes."""
        return len(self._batches) * self.noise_draws

    def leaf_of(self, parameter: Tensor) -> Tensor:
        """The private leaf that stands for a parameter during an evaluation; another tensor stands for itself."""
        return self.sandbox.leaf_of(parameter)

    def settle(self) -> None:
        """Note that the loss has been computed: what a step writes to its weights from here on changes nothing.

        Called by itself when the loss function returns; earlier by loss functions that compute the loss, differentiate
        it and then do more (a manual step that clamps its weights).

        Raises:
            ValueError: If the step has written to its weights on the way to the loss.
        """
        written = self.sandbox.mend()
        self._is_settled = True
        if written:
            raise ValueError(
                f"The step writes to its own weights ({', '.join(written[:4])}{', …' if len(written) > 4 else ''}) on "
                "the way to its loss, which is then not a function of them. Do that in a hook outside of the step, or "
                "measure another loss with `loss_fn=`."
            )

    @contextmanager
    def linearize(self) -> Iterator[Linearization]:
        """Open the objective at the current weights.

        Raises:
            ValueError: If a loss is not a scalar, depends on no parameter, or every batch was skipped.
        """
        parameters = select_parameters(self.module, self._where)
        with ExitStack() as stack:
            stack.enter_context(fork_rng())
            stack.enter_context(twice_differentiable(self.module))
            stack.enter_context(_default_dtype(self._dtype))
            stack.enter_context(self._context())
            stack.enter_context(self.sandbox)
            evaluation = Linearization(self, self.sandbox.leaves(parameters))
            stack.callback(evaluation.close)
            yield evaluation

    def _terms(self, kind: Kind = "hessian") -> Iterator[Term]:
        """Each batch's loss, once per noise draw, each from the same state. Only inside the sandbox.

        Args:
            kind: For another matrix than the Hessian, with the outputs and the function of them that it needs.
        """
        for index, batch, weight in zip(self._indices, self._batches, self._weights, strict=True):
            for draw in range(self.noise_draws):
                outputs, loss = self._composed(kind, index, batch, draw)
                if loss is not None:
                    yield Term(index, draw, weight / self.noise_draws, loss, outputs)

    def _composed(self, kind: Kind, index: int, batch: Any, draw: int) -> tuple[Tensor | None, Tensor | None]:
        if kind == "hessian":
            return None, self._evaluate(index, batch, draw)
        where = self.output_fn
        if where is None:
            raise ValueError(f"A {kind} matrix needs `output_fn=`: which are the network's outputs?")
        if isinstance(where, str):
            if kind != "gauss_newton":
                raise ValueError(f"A {kind} matrix needs a function as `output_fn=`, not a module's name.")
            caught: list[Tensor] = []
            loss = self._evaluate(index, batch, draw, tapped(self._loss, where, caught))
            return (None, None) if loss is None else (only_one(caught, where), loss)
        outputs, head = check_outputs(self._run(where, index, batch, draw))
        with Repaired():
            return outer_value(kind, outputs, head)

    def _run(self, function: Callable[[nn.Module, Any], Any], index: int, batch: Any, draw: int) -> Any:
        """A function of module and batch, from the state that every evaluation starts from."""
        self.sandbox.renew()
        self._is_settled = False
        seed_everything(stream_seed(self.seed, index, draw))
        with Repaired():
            result = function(self.module, private_copy(batch, self._dtype))
        if self._is_settled:
            self.sandbox.mend()
        else:
            self.settle()
        return result

    def _evaluate(self, index: int, batch: Any, draw: int, function: LossFunction | None = None) -> Tensor | None:
        loss = self._run(self._loss if function is None else function, index, batch, draw)
        if loss is None:
            return None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"The loss must be a scalar tensor, got {shape}. Reduce it before returning it.")
        if not loss.requires_grad:
            raise ValueError(
                "The loss does not depend on any parameter: it carries no gradient. Was it detached, turned into a "
                "number, or computed under `torch.no_grad()`?"
            )
        if not self._is_inspected:
            refuse_hidden_derivatives(loss)
            self._is_inspected = True
        return loss.reshape(())


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
