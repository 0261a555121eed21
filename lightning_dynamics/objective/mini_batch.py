"""One mini-batch of an objective: its loss, its gradient, its own Hessian, while it is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_dynamics.objective.linearization import Graph, Linearization


class Pieces(Protocol):
    """The pieces of one mini-batch, held by this process or by several: sums over them.

    Attributes:
        weight: Σ w; 0 if the step skipped them all.
        loss: Σ wℓ.
        gradient: Σ w∇ℓ, shape ``(size,)``.
    """

    weight: float
    loss: float
    gradient: Tensor

    def product(self, vector: Tensor) -> Tensor: ...

    def loss_after(self, step: Tensor) -> float: ...

    def sample_squares(self, center: Tensor) -> tuple[Tensor, Tensor]: ...

    def close(self) -> None: ...


class LocalPieces:
    """The pieces of one mini-batch that this process holds.

    A single piece keeps its graph as long as it is at hand, which is no more than any evaluation holds; the graphs of
    several are built anew for each product, unless the objective keeps those of all batches.

    Args:
        at: The objective, opened.
        positions: Which of its batches.
    """

    def __init__(self, at: Linearization, positions: Sequence[int]) -> None:
        self.gradient = at.zeros()
        self.loss = 0.0
        self.weight = 0.0
        self._at = at
        self._positions = list(positions)
        graphs = at.graphs_of(positions)
        keeps = graphs is None and len(self._positions) * at.noise_draws == 1
        self._graphs: list[Graph] | None = graphs if graphs is not None else [] if keeps else None
        for graph, loss in at.built(positions, graph=keeps) if graphs is None else at.losses_of(graphs):
            self.gradient.add_(at.layout.flatten(graph.gradient, self.gradient), alpha=graph.weight)
            self.loss += graph.weight * loss
            self.weight += graph.weight
            if keeps and self._graphs is not None:
                self._graphs.append(graph)

    def product(self, vector: Tensor) -> Tensor:
        return self._at.summed_images(vector, self._graphs, self._positions)

    def loss_after(self, step: Tensor) -> float:
        return self._at.loss_after(step, self._positions)

    def sample_squares(self, center: Tensor) -> tuple[Tensor, Tensor]:
        norms, distances = [], []
        for block in self._at.sample_gradients(self._graphs, self._positions):
            norms.append(torch.linalg.vector_norm(block, dim=1).double().square().cpu())
            distances.append(torch.linalg.vector_norm(block.sub_(center), dim=1).double().square().cpu())
        nothing = torch.zeros(0, dtype=torch.float64)
        return torch.cat([nothing, *norms]), torch.cat([nothing, *distances])

    def close(self) -> None:
        self._graphs = None


class MiniBatch:
    """L_B(θ), the mean over the pieces of one mini-batch, at the weights that the objective was opened at.

    Attributes:
        number: Its number among all mini-batches.
        loss: L_B.
        gradient: ∇L_B, shape ``(size,)``.
        weight: Of all its pieces; 0 if the step skipped them, and then the others are 0 too.
    """

    def __init__(self, number: int, pieces: Pieces) -> None:
        self.number = number
        self.weight = pieces.weight
        self.loss = pieces.loss / pieces.weight if pieces.weight else 0.0
        self.gradient = pieces.gradient / pieces.weight if pieces.weight else pieces.gradient
        self._pieces = pieces

    def product(self, vector: Tensor) -> Tensor:
        """∇²L_B · v for v of shape ``(size,)``."""
        return self._pieces.product(vector).div_(self.weight)

    def loss_after(self, step: Tensor) -> float:
        """L_B(θ + Δ) for Δ of shape ``(size,)``, with the noise of L_B(θ)."""
        return self._pieces.loss_after(step) / self.weight

    def sample_squares(self, center: Tensor) -> tuple[Tensor, Tensor]:
        """‖gᵢ‖² and ‖gᵢ - c‖² of its samples' gradients, shape ``(n,)`` each, float64; of one draw of the noise.

        Args:
            center: c, shape ``(size,)``.

        Raises:
            CoupledSamplesError: If the loss of a piece is not the mean of those of its samples.
            ValueError: If a batch cannot be split.
        """
        return self._pieces.sample_squares(center)

    def close(self) -> None:
        """Let go of its graph."""
        self._pieces.close()


class MiniBatchReader(Protocol):
    """What reads mini-batches, two at a time."""

    def update(self, first: MiniBatch, second: MiniBatch) -> None: ...
