"""An objective opened at fixed weights: sums over its batches of losses, gradients and products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from lightning_dynamics.objective.memory import SavedBytes, available_memory
from lightning_dynamics.objective.mini_batch import LocalPieces
from lightning_dynamics.objective.outputs import Composition, Kind, check_agreement
from lightning_dynamics.objective.parameters import Layout
from lightning_dynamics.objective.samples import SampleGradients
from lightning_dynamics.objective.sandbox import State

if TYPE_CHECKING:
    from lightning_dynamics.objective.loss import Objective

Part = Literal["all", "even", "odd"]
"""All batches of an objective, or the half of them with even or odd numbers."""


Sum = Kind | Literal["slope"]
"""What :meth:`Linearization.product` can sum over batches: products with a matrix, or the slope of a curvature."""


@dataclass(frozen=True)
class Term:
    """One summand of the objective: batch number, noise draw, weight, loss with its graph, outputs where needed."""

    index: int
    draw: int
    weight: float
    loss: Tensor
    outputs: Tensor | None


@dataclass(frozen=True)
class Graph:
    """One summand's gradient, with the graph that a product differentiates; draw of its noise."""

    index: int
    draw: int
    weight: float
    gradient: list[Tensor | None]
    state: State


@dataclass(frozen=True)
class _Composed:
    """One summand's outputs and the function of them, ready for products."""

    index: int
    weight: float
    composition: Composition
    state: State


_Kept = TypeVar("_Kept", Graph, _Composed)


class Linearization:
    """An objective opened at fixed weights θ. All sums are over this process's batches.

    Attributes:
        layout: How θ, a vector of shape ``(size,)``, maps onto the parameters.
        weights: Σ w_b over all batches that were not skipped, and over those with even and with odd numbers; known
            after :meth:`evaluate`.
    """

    def __init__(self, objective: Objective, leaves: dict[str, Tensor]) -> None:
        self.layout = Layout.of(leaves)
        self.weights: dict[Part, float] = {"all": 0.0, "even": 0.0, "odd": 0.0}
        self.reached = False
        self._objective = objective
        self._leaves = list(leaves.values())
        self._graphs: list[Graph] | None = None
        self._composed: dict[Kind, list[_Composed]] = {}
        self._losses: dict[tuple[int, int], float] = {}
        self._is_evaluated = False
        self._samples: SampleGradients | None = None

    @property
    def size(self) -> int:
        return self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        wide = {torch.float64, torch.complex128}
        return torch.float64 if any(leaf.dtype in wide for leaf in self._leaves) else torch.float32

    @property
    def device(self) -> torch.device:
        return self._leaves[0].device

    @property
    def is_kept(self) -> bool:
        """Whether gradient graphs are held for the products."""
        return self._graphs is not None

    def evaluate(self, keep: bool | None = None, reserve: int = 0) -> tuple[float, Tensor]:
        """Compute Σ w_b ℓ_b and Σ w_b ∇ℓ_b, shape ``(size,)``, and set :attr:`weights`.

        Args:
            keep: Whether to keep the graphs for :meth:`product`; None decides by the objective's engine and the free
                memory.
            reserve: Bytes that must stay free besides the graphs (the solver's vectors).
        """
        keep = self.graphs_fit(reserve) if keep is None else keep
        total, gradient, reached = 0.0, self.zeros(), False
        weights: dict[Part, float] = {"all": 0.0, "even": 0.0, "odd": 0.0}
        graphs = []
        for term in self._objective._terms():
            parts = self._gradient(term.loss, graph=keep)
            self._losses[term.index, term.draw] = value = float(term.loss.detach())
            reached = reached or any(part is not None for part in parts)
            total += term.weight * value
            weights["all"] += term.weight
            weights[_parity(term.index)] += term.weight
            gradient.add_(self.layout.flatten(parts, gradient), alpha=term.weight)
            if keep:
                graphs.append(Graph(term.index, term.draw, term.weight, parts, self._objective.sandbox.state()))
        self.weights, self.reached, self._is_evaluated = weights, reached, True
        self._graphs = graphs if keep else None
        return total, gradient

    def product(self, vector: Tensor, part: Part = "all", kind: Sum = "hessian") -> Tensor:
        """Σ w_b A_b · v, shape ``(size,)``, with the matrix of this kind of each batch; or Σ w_b ∇(vᵀ ∇²ℓ_b v).

        Args:
            vector: v, shape ``(size,)``.
            part: Over all batches, or over those with even or odd numbers.
            kind: Which matrix, or ``"slope"``.
        """
        if kind == "residual":
            return self.product(vector, part).sub_(self.product(vector, part, "gauss_newton"))
        directions = self.layout.directions(vector, self._leaves)
        like, out = torch.empty(0, dtype=self.dtype, device=self.device), None
        for weight, image in self._images(directions, part, kind):
            second = self.layout.flatten(image, like)
            out = second.mul_(weight) if out is None else out.add_(second, alpha=weight)
        return self.zeros() if out is None else out

    @property
    def mini_batches(self) -> list[int]:
        """The numbers of the mini-batches."""
        return sorted(self._objective.mini_batches())

    def pieces_of(self, number: int) -> LocalPieces:
        """One mini-batch, as far as this process holds it."""
        return LocalPieces(self, self._objective.mini_batches()[number])

    def graphs_fit(self, reserve: int = 0, sharers: int = 1) -> bool:
        """Whether the gradient graphs of all batches, and ``reserve`` bytes, fit into half of the free memory.

        Args:
            reserve: Bytes needed besides the graphs.
            sharers: Processes that ask the same of the same memory.
        """
        if self._objective.engine != "auto":
            return self._objective.engine == "kept"
        free = available_memory(self.device)
        return free is None or self._graph_bytes() + reserve <= free // (2 * sharers)

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs = None
        self._composed = {}

    # What a mini-batch asks for

    @property
    def noise_draws(self) -> int:
        """Draws of the noise that the loss is averaged over."""
        return self._objective.noise_draws

    def zeros(self) -> Tensor:
        """A vector of zeros, shape ``(size,)``."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def graphs_of(self, positions: Sequence[int]) -> list[Graph] | None:
        """The kept graphs of these batches; None if graphs are not kept."""
        if self._graphs is None:
            return None
        wanted = {self._objective.number_of(position) for position in positions}
        return [graph for graph in self._graphs if graph.index in wanted]

    def losses_of(self, graphs: Iterable[Graph]) -> Iterator[tuple[Graph, float]]:
        """Graphs with the losses that they are of."""
        for graph in graphs:
            yield graph, self._losses[graph.index, graph.draw]

    def built(self, positions: Iterable[int], graph: bool) -> Iterator[tuple[Graph, float]]:
        """Gradients of these batches, and their losses, computed now; with graphs for products, or without."""
        for term in self._objective._terms(positions=positions):
            parts = self._gradient(term.loss, graph=graph)
            state = self._objective.sandbox.state()
            self._losses[term.index, term.draw] = value = float(term.loss.detach())
            yield Graph(term.index, term.draw, term.weight, parts, state), value

    def summed_images(self, vector: Tensor, graphs: list[Graph] | None, positions: Iterable[int]) -> Tensor:
        """Σ w_b ∇²ℓ_b · v over some batches, from their graphs, or from graphs that are built anew."""
        directions, out = self.layout.directions(vector, self._leaves), self.zeros()
        for graph in self._resumed(graphs) if graphs is not None else self._rebuilt(positions):
            image = self._differentiate(graph.gradient, directions, retain=graphs is not None)
            out.add_(self.layout.flatten(image, out), alpha=graph.weight)
        return out

    def loss_after(self, step: Tensor, positions: Iterable[int]) -> float:
        """Σ w_b ℓ_b(θ + Δ) over some batches."""
        total = 0.0
        with self._objective.sandbox.displaced(self._leaves, self.layout.directions(step, self._leaves)):
            for term in self._objective._terms(positions=positions):
                total += term.weight * float(term.loss.detach())
        return total

    def sample_gradients(self, graphs: list[Graph] | None, positions: Sequence[int]) -> Iterator[Tensor]:
        """Gradients of the samples of some batches, under the first draw of the noise, as blocks of rows."""
        if self._samples is None:
            self._samples = SampleGradients(self._objective, self._leaves, self.layout)
        known = self.losses_of(graphs) if graphs is not None else self.built(positions, graph=False)
        # all of them first: the samples' own runs go through the same sandbox
        each = [(graph, self.layout.flatten(graph.gradient, self.zeros()), loss) for graph, loss in known]
        for graph, gradient, loss in each:
            if graph.draw:
                continue
            batch = self._objective.batch_of(graph.index, positions)
            for block in self._samples.of_batch(graph.index, batch, 0, gradient, loss):
                if graph.weight:  # a repetition only keeps the ranks in step
                    yield block

    def _graph_bytes(self) -> int:
        """What keeping the gradient graphs of all batches takes; found on the first batch, once."""
        if self._objective.graph_bytes is None:
            saved = SavedBytes()
            with saved.counting():
                term = next(self._objective._terms(), None)
                if term is not None:
                    self._gradient(term.loss, graph=True)
            # each matrix keeps graphs of its own
            self._objective.graph_bytes = saved.total * self._objective.num_terms * self._objective.matrices
        return self._objective.graph_bytes

    def _images(
        self, directions: list[Tensor], part: Part, kind: Sum
    ) -> Iterator[tuple[float, Sequence[Tensor | None]]]:
        """Weight and product of each batch, in the parameters' shapes."""
        if kind == "hessian" or kind == "slope":
            for graph in self._gradients():
                if part in ("all", _parity(graph.index)):
                    image = self._differentiate(graph.gradient, directions, again=kind == "slope")
                    yield graph.weight, image
            return
        for composed in self._compositions(kind):
            if part in ("all", _parity(composed.index)):
                yield composed.weight, composed.composition.product(directions)

    def _compositions(self, kind: Kind) -> Iterator[_Composed]:
        if kind in self._composed:
            yield from self._resumed(self._composed[kind])
            return
        kept = []
        for term in self._objective._terms(kind):
            assert term.outputs is not None
            if self._is_evaluated and (term.index, term.draw) not in self._losses:
                continue  # the step skipped this batch, and its weight does not count
            if kind == "gauss_newton" and (term.index, term.draw) in self._losses:
                check_agreement(self._losses[term.index, term.draw], float(term.loss.detach()))
            composition = Composition(term.outputs, term.loss, self._leaves)
            composed = _Composed(term.index, term.weight, composition, self._objective.sandbox.state())
            if self.is_kept:
                kept.append(composed)
            yield composed
        if self.is_kept:
            self._composed[kind] = kept

    def _gradients(self) -> Iterator[Graph]:
        if self._graphs is not None:
            yield from self._resumed(self._graphs)
        else:
            yield from self._rebuilt(None)

    def _rebuilt(self, positions: Iterable[int] | None) -> Iterator[Graph]:
        for term in self._objective._terms(positions=positions):
            parts = self._gradient(term.loss, graph=True)
            yield Graph(term.index, term.draw, term.weight, parts, self._objective.sandbox.state())

    def _resumed(self, kept: list[_Kept]) -> Iterator[_Kept]:
        """Kept graphs, each with the module in the state that it was built in."""
        for graph in kept:
            self._objective.sandbox.resume(graph.state)
            yield graph

    def _gradient(self, loss: Tensor, graph: bool) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self._leaves, create_graph=graph, allow_unused=True))

    def _differentiate(
        self, gradient: list[Tensor | None], directions: list[Tensor], again: bool = False, retain: bool = False
    ) -> list[Tensor | None]:
        """∇²ℓ · v; or, differentiated once more, ∇(vᵀ ∇²ℓ v)."""
        pairs = [
            (g, v.to(g.dtype))
            for g, v in zip(gradient, directions, strict=True)
            if g is not None and g.requires_grad  # a gradient that is constant has no graph
        ]
        if not pairs:
            return [None] * len(gradient)
        outputs, vectors = zip(*pairs, strict=True)
        second = torch.autograd.grad(
            outputs,
            self._leaves,
            grad_outputs=vectors,
            retain_graph=self.is_kept or again or retain,
            create_graph=again,
            allow_unused=True,
        )
        if not again:
            return list(second)
        terms = [
            (image.conj() * v).real.sum()
            for image, v in zip(second, directions, strict=True)
            if image is not None and image.requires_grad
        ]
        if not terms:
            return [None] * len(gradient)
        total = torch.stack(terms).sum()
        return list(torch.autograd.grad(total, self._leaves, retain_graph=self.is_kept, allow_unused=True))


def _parity(index: int) -> Part:
    return "odd" if index % 2 else "even"
