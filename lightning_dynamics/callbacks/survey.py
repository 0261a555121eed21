"""What is read off drawn mini-batches, one pair after the other: a table of numbers, never their gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_dynamics.linalg import OnSpaceOf, eigenpairs
from lightning_dynamics.linalg.basis import inner
from lightning_dynamics.objective import MiniBatch
from lightning_dynamics.objective.randomness import stream_seed


@dataclass(frozen=True)
class Metric:
    """The geometry that a diagonal preconditioner gives: effective steps C, coupled weight decay W, and Wθ.

    Attributes:
        steps: Diagonal of C, shape ``(size,)``.
        decay: Diagonal of W, shape ``(size,)``.
        pull: Wθ, shape ``(size,)``.
    """

    steps: Tensor
    decay: Tensor
    pull: Tensor


@dataclass(frozen=True)
class Wanted:
    """What a survey reads of each mini-batch m, besides ‖gₘ‖², ‖gₘ - ḡ‖² and gₘ·ḡ.

    Attributes:
        curvature: gₘᵀHₘgₘ.
        partners: gₚᵀHₘgₚ with the gradient of the other one of its pair.
        image: H̄ḡ, for gₘ·H̄ḡ, ḡᵀHₘḡ and gₘᵀHₘḡ.
        metric: For (Cg̃)ᵀ(Hₘ + W)(Cg̃) and g̃ᵀCg̃ with g̃ = gₘ + Wθ.
        update: Δ, for gₘ·Δ, ΔᵀHₘΔ and Lₘ(θ + Δ).
        top: The top eigenvector of H̄, for λmax(Hₘ) and vᵀHₘv.
        solved: For how many of the mini-batches.
        directions: Unit vectors vᵢ, shape ``(q, size)``, for vᵢ·gₘ.
        samples: Gradients gᵢ of single samples, for the sums over a mini-batch of ‖gᵢ‖² and ‖gᵢ - ḡ‖², and for all of
            ‖gᵢ - ḡ‖.
        tolerance: Of λmax(Hₘ), relative.
        seed: Of the solver's random vectors.
    """

    curvature: bool = False
    partners: bool = False
    image: Tensor | None = None
    metric: Metric | None = None
    update: Tensor | None = None
    top: Tensor | None = None
    solved: int = 0
    directions: Tensor | None = None
    samples: bool = False
    tolerance: float = 1e-4
    seed: int = 0

    def __or__(self, other: Wanted) -> Wanted:
        """What either of two wants."""
        return replace(
            self,
            curvature=self.curvature or other.curvature,
            partners=self.partners or other.partners,
            image=self.image if self.image is not None else other.image,
            metric=self.metric or other.metric,
            update=self.update if self.update is not None else other.update,
            top=self.top if self.top is not None else other.top,
            solved=max(self.solved, other.solved),
            directions=self.directions if self.directions is not None else other.directions,
            samples=self.samples or other.samples,
        )


class Survey:
    """Numbers of M mini-batches at one θ, shape ``(M,)`` each, float64. On rank zero.

    Args:
        wanted: What to read.
        mean: ḡ, the gradient of all of them together.
        draws: M.
        batch_size: Samples of each, for their norms; None if that is not known.
    """

    def __init__(self, wanted: Wanted, mean: Tensor, draws: int, batch_size: int | None) -> None:
        self.wanted = wanted
        self.mean = mean
        self._draws = draws
        self._batch_size = batch_size
        names = ["read", "loss", "squared_norms", "squared_deviations", "dots_mean", "products"]
        names += ["along_own"] * wanted.curvature + ["along_partner"] * wanted.partners
        names += ["along_mean", "along_cross", "dots_image"] * (wanted.image is not None)
        names += ["step_along", "step_norms"] * (wanted.metric is not None)
        names += ["slopes", "bends", "after"] * (wanted.update is not None)
        names += ["tops", "top_bounds", "along_top"] * (wanted.top is not None)
        names += ["sample_norms", "sample_deviations", "sampled"] * wanted.samples
        self._columns = {name: torch.zeros(draws, dtype=torch.float64) for name in names}
        if wanted.directions is not None:
            self._columns["along"] = torch.zeros(draws, len(wanted.directions), dtype=torch.float64)
        if wanted.samples and batch_size is not None:
            self._columns["sample_distances"] = torch.zeros(draws, batch_size, dtype=torch.float64)
        self.coupled: str | None = None
        """Why there are no gradients of single samples."""

    def __getitem__(self, name: str) -> Tensor:
        """A column, of the mini-batches that were read: whole pairs."""
        return self._columns[name][self._columns["read"] > 0]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __len__(self) -> int:
        return int(self._columns["read"].sum())

    @property
    def products(self) -> float:
        """Hessian products, each with one mini-batch."""
        return float(self._columns["products"].sum())

    @property
    def has_samples(self) -> bool:
        """Whether single samples were read in every mini-batch."""
        return self.wanted.samples and len(self) > 0 and bool((self["sampled"] > 0).all())

    def update(self, first: MiniBatch, second: MiniBatch) -> None:
        """Read a pair of mini-batches."""
        for own, other in ((first, second), (second, first)):
            for name, value in self._read(own, other).items():
                self._columns[name][own.number] = value

    def _read(self, own: MiniBatch, other: MiniBatch) -> dict[str, float | Tensor]:
        wanted, gradient, mean = self.wanted, own.gradient, self.mean
        counted = _Counted(own, mean)
        values: dict[str, float | Tensor] = {
            "read": 1.0,
            "loss": own.loss,
            "squared_norms": inner(gradient, gradient),
            "squared_deviations": _square(gradient - mean),
            "dots_mean": inner(gradient, mean),
        }
        if wanted.curvature:
            values["along_own"] = inner(gradient, counted(gradient))
        if wanted.partners:
            values["along_partner"] = inner(other.gradient, counted(other.gradient))
        if wanted.image is not None:
            image = counted(mean)
            values["along_mean"] = inner(mean, image)
            values["along_cross"] = inner(gradient, image)
            values["dots_image"] = inner(gradient, wanted.image)
        if wanted.metric is not None:
            metric = wanted.metric
            pulled = gradient + metric.pull
            step = metric.steps * pulled
            values["step_along"] = inner(step, counted(step) + metric.decay * step)
            values["step_norms"] = inner(pulled, step)
        if wanted.update is not None:
            values["slopes"] = inner(gradient, wanted.update)
            values["bends"] = inner(wanted.update, counted(wanted.update))
            values["after"] = own.loss_after(wanted.update)
        if wanted.top is not None and own.number < wanted.solved:
            values |= self._solved(counted, own, wanted.top)
        if wanted.directions is not None:
            values["along"] = (wanted.directions @ gradient).double()
        if wanted.samples:
            values |= self._sampled(own)
        return {**values, "products": float(counted.count)}

    def _solved(self, operator: _Counted, own: MiniBatch, top: Tensor) -> dict[str, float | Tensor]:
        """λmax(Hₘ), more exactly than it is needed: in clusters, which few samples have, Lanczos stops too early."""
        generator = torch.Generator().manual_seed(stream_seed(self.wanted.seed, own.number))
        found = eigenpairs(operator, 1, tolerance=self.wanted.tolerance, confidence=None, generator=generator)
        return {
            "tops": float(found.top.values[0]),
            "top_bounds": float(found.top.bounds[0]),
            "along_top": inner(top, operator(top)),
        }

    def _sampled(self, own: MiniBatch) -> dict[str, float | Tensor]:
        if self.coupled is not None:
            return {}
        try:
            norms, squares = own.sample_squares(self.mean)
        except ValueError as error:  # samples that are coupled, or batches that cannot be split
            self.coupled = str(error).partition(" Give `samples_of=`")[0]  # a monitor has no such option
            return {}
        values: dict[str, float | Tensor] = {
            "sample_norms": float(norms.sum()),
            "sample_deviations": float(squares.sum()),
            "sampled": 1.0,
        }
        if "sample_distances" in self._columns and len(squares) == self._batch_size:
            values["sample_distances"] = squares.sqrt()
        return values


class _Counted(OnSpaceOf):
    """The Hessian of one mini-batch, and how many products were taken with it."""

    def __init__(self, batch: MiniBatch, like: Tensor) -> None:
        super().__init__(_SpaceOf(like))
        self.count = 0
        self._batch = batch

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self._batch.product(vector)


class _SpaceOf:
    """The space that a vector lies in."""

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector

    @property
    def size(self) -> int:
        return len(self._vector)

    @property
    def dtype(self) -> torch.dtype:
        return self._vector.dtype

    @property
    def device(self) -> torch.device:
        return self._vector.device


def _square(vector: Tensor) -> float:
    return inner(vector, vector)
