"""A module's loss as a deterministic function of its weights: value, gradient, Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from lightning_dynamics.objective.double_backward import refuse_hidden_derivatives, twice_differentiable
from lightning_dynamics.objective.linearization import Linearization, Term
from lightning_dynamics.objective.outputs import Kind, OutputFn, check_outputs, only_one, outer_value, tapped
from lightning_dynamics.objective.parameters import ParameterFilter, select_parameters
from lightning_dynamics.objective.repairs import Repaired
from lightning_dynamics.objective.replay import Replay

LossFunction = Callable[[nn.Module, Any], Tensor | None]
"""A batch's loss, a scalar tensor, or None for a batch that is to be skipped."""

Engine = Literal["auto", "kept", "rebuilt"]
"""How products are computed: from gradient graphs that are kept for all of them (fast: 1.4 to 2.8 gradients each), or
rebuilt for each (a third to a half more, but only one batch's graph is ever held)."""


class Objective(Replay):
    """L(θ) = Σ_b w_b ℓ_b(θ) / Σ_b w_b over fixed batches b, with fixed noise, at the module's current weights.

    Every evaluation starts from the same state (buffers, attributes, random numbers), so that L is a function in the
    strict sense: the same weights give the same bits. Nothing that an evaluation does stays in the module; see
    :class:`Sandbox` for how, and for what is beyond it.

    Args:
        module: The module whose parameters are θ.
        loss: Computes one batch's loss, ``loss(module, batch)``.
        batches: The batches; each is copied before it is used.
        parameters: Which parameters make up θ, see :data:`ParameterFilter`; all that require a gradient by default.
        output_fn: Where the network's outputs are, see :data:`OutputFn`; for Gauss-Newton and Fisher matrices.
        matrices: How many matrices products will be taken of, the Hessian included: the memory of graphs grows with it.
        pieces: So many consecutive batches, by their numbers, make one mini-batch, see :class:`MiniBatch`.
        samples_of: Splits a batch into batches of one sample each, see :class:`SampleGradients`.
        noise_draws: R ≥ 1; the loss is averaged over R draws of the noise, at R times the cost. A single fixed draw
            biases the largest eigenvalue upwards.
        engine: See :data:`Engine`; ``"auto"`` keeps the graphs if they fit into half of the memory that is free.
        how: How the module is run, see :class:`Replay`. Its ``weights`` are the w_b; the default is right for losses
            that are means over samples.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Sequence[Any],
        *,
        parameters: ParameterFilter | None = None,
        output_fn: OutputFn | None = None,
        matrices: int = 1,
        pieces: int = 1,
        samples_of: Callable[[Any], Sequence[Any]] | None = None,
        noise_draws: int = 1,
        engine: Engine = "auto",
        **how: Any,
    ) -> None:
        if not len(batches):
            raise ValueError("`batches` is empty: a loss needs at least one batch.")
        if noise_draws < 1:
            raise ValueError(f"`noise_draws` must be at least 1, got {noise_draws}.")
        super().__init__(module, batches, **how)
        self.engine = engine
        self.noise_draws = noise_draws
        self.output_fn = output_fn
        self.matrices = matrices
        self.pieces = pieces
        self.samples_of = samples_of
        self.graph_bytes: int | None = None  # what the gradient graphs of all batches take, once it is known
        self._loss = loss
        self._where = parameters
        self._is_settled = False
        self._is_inspected = False

    @property
    def num_terms(self) -> int:
        """Number of losses that one evaluation computes."""
        return len(self._batches) * self.noise_draws

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
        with self._sandboxed(twice_differentiable(self.module)):
            evaluation = Linearization(self, self.sandbox.leaves(parameters))
            try:
                yield evaluation
            finally:
                evaluation.close()

    def number_of(self, position: int) -> int:
        """The number of a batch among those of all processes."""
        return self._indices[position]

    def batch_of(self, number: int, positions: Iterable[int]) -> Any:
        """The batch of this number, among those at some positions."""
        return next(self._batches[position] for position in positions if self._indices[position] == number)

    def mini_batches(self) -> dict[int, list[int]]:
        """Positions of the batches by the mini-batch that they are pieces of."""
        found: dict[int, list[int]] = {}
        for position, index in enumerate(self._indices):
            found.setdefault(index // self.pieces, []).append(position)
        return found

    def _terms(self, kind: Kind = "hessian", positions: Iterable[int] | None = None) -> Iterator[Term]:
        """Each batch's loss, once per noise draw, each from the same state. Only inside the sandbox.

        Args:
            kind: For another matrix than the Hessian, with the outputs and the function of them that it needs.
            positions: Which batches; all by default.
        """
        for position in range(len(self._batches)) if positions is None else positions:
            index, batch, weight = self._indices[position], self._batches[position], self._weights[position]
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
        private = self._begin(index, batch, draw)
        self._is_settled = False
        with Repaired():
            result = function(self.module, private)
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
