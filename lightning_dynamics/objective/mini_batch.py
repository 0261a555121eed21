"""One mini-batch of an objective: its loss, its gradient, its own Hessian, while it is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lightning_dynamics.objective.linearization import Graph, Linearization


class MiniBatch:
    """L_B(θ), the mean over the pieces of one mini-batch, at the weights that the objective was opened at.

    Attributes:
        number: Its number among all mini-batches, over all processes.
        loss: L_B.
        gradient: ∇L_B, shape ``(size,)``.
        weight: Of all its pieces; 0 if the step skipped them, and then there is nothing else.
    """

    def __init__(self, at: Linearization, number: int, positions: Sequence[int]) -> None:
        self.number = number
        self.gradient = at.zeros()
        self.loss = 0.0
        self.weight = 0.0
        self._at = at
        self._positions = list(positions)
        # the graph of one piece is no more than any evaluation holds
        graphs = at.graphs_of(positions)
        keeps = graphs is None and len(self._positions) * at.noise_draws == 1
        self._graphs: list[Graph] | None = graphs if graphs is not None else [] if keeps else None
        for graph, loss in at.built(positions, graph=keeps) if graphs is None else at.losses_of(graphs):
            self.gradient.add_(at.layout.flatten(graph.gradient, self.gradient), alpha=graph.weight)
            self.loss += graph.weight * loss
            self.weight += graph.weight
            if keeps and self._graphs is not None:
                self._graphs.append(graph)
        if self.weight:
            self.gradient /= self.weight
            self.loss /= self.weight

    def product(self, vector: Tensor) -> Tensor:
        """∇²L_B · v for v of shape ``(size,)``."""
        return self._at.summed_images(vector, self._graphs, self._positions).div_(self.weight)

    def loss_after(self, step: Tensor) -> float:
        """L_B(θ + Δ) for Δ of shape ``(size,)``, with the noise of L_B(θ)."""
        return self._at.loss_after(step, self._positions)

    def sample_gradients(self) -> Iterator[Tensor]:
        """Gradients of the single samples' losses, in blocks of rows of shape ``(size,)``.

        Raises:
            CoupledSamplesError: If the loss of the batch is not the mean of theirs.
            ValueError: If the batch cannot be split.
        """
        return self._at.sample_gradients(self._graphs, self._positions)

    def close(self) -> None:
        """Let go of its graph."""
        self._graphs = None


class MiniBatchSums(Protocol):
    """Something that grows with every pair of mini-batches, and is the sum of what grows elsewhere. Can be pickled."""

    def update(self, first: MiniBatch, second: MiniBatch) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...
