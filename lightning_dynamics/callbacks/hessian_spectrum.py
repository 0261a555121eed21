"""The rare half of a HessianMonitor: the whole spectrum from fresh random vectors, and how far eigenvectors turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dynamics.callbacks.cadence import Cadence, check_flag, check_number, check_positive_integer
from lightning_dynamics.callbacks.hessian_findings import Findings
from lightning_dynamics.linalg import (
    BlockOperator,
    ExtremalEigenpairs,
    SpectralDensity,
    SymmetricOperator,
    diagonal_entries,
    eigenpairs,
    spectral_density,
)
from lightning_dynamics.metrics import (
    effective_parameters,
    median_ratio,
    negative_mass,
    overlap_error,
    principal_cosines,
    spectral_sparsity,
)

_RELATIVE = 1e-2  # α and τ in units of the largest eigenvalue, where nothing else is known
DETAIL = ("trace", "effective_", "spectral_", "negative_", "overlap_", "block_", "median_ratio")
"""How the keys begin that are measured in detail only."""

_CERTIFIED = 0.1  # ‖sin Θ‖ up to which a subspace is compared with others


@dataclass(frozen=True)
class Spectrum:
    """When and how a :class:`HessianMonitor` measures the whole spectrum.

    Each measurement starts afresh: cold eigenpairs with a check that none was missed, then ``num_vectors`` independent
    random vectors on the complement of their eigenvectors (stochastic Lanczos quadrature). That gives the trace, the
    density and other spectral sums with errors, and eigenvectors good enough to be compared with earlier ones.

    Args:
        every_n_train_steps: Steps between measurements. By default as often as costs 5 % of training, and not at all
            where training is too short to pay for two; what was decided is printed.
        every_n_epochs: Epochs between measurements, instead of steps.
        log_spaced: Ten measurements per decade of steps.
        num_vectors: Random vectors, at least 2. Errors fall with the root of their number.
        num_steps: Products for each: the number of nodes of the density.
        alpha: α of ``effective_parameters``. By default the optimizer's coupled weight decay where it is one number
            above zero, else 1 % of the largest eigenvalue.
        small: τ of ``spectral_sparsity``, in units of the largest eigenvalue.
        per_layer: Also the largest eigenvalue and the trace of the diagonal block of each layer (the parameters of one
            module), at the price of another spectrum for each.
        diagonal: Also R_med, the largest over the median diagonal entry, from that many random coordinates of each
            layer, at one product for each.
    """

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    log_spaced: bool = False
    num_vectors: int = 8
    num_steps: int = 16
    alpha: float | None = None
    small: float = _RELATIVE
    per_layer: bool = False
    diagonal: int = 0

    def __post_init__(self) -> None:
        _ = self.cadence  # refuses what does not go together
        check_positive_integer("num_vectors", self.num_vectors, least=2)
        check_positive_integer("num_steps", self.num_steps)
        check_positive_integer("diagonal", self.diagonal, least=0)
        check_number("alpha", self.alpha, optional=True)
        check_number("small", self.small, below=1.0)
        check_flag("per_layer", self.per_layer)

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.every_n_train_steps, self.every_n_epochs, self.log_spaced)

    @property
    def products(self) -> int:
        """Products of the quadrature."""
        return self.num_vectors * self.num_steps


def measure_spectrum(
    operator: SymmetricOperator,
    known: ExtremalEigenpairs,
    options: Spectrum,
    decay: float,
    generator: torch.Generator,
    into: Findings,
) -> None:
    """Trace, density, and sums over the spectrum.

    Args:
        operator: A.
        known: Its certified eigenpairs, taken out before anything is estimated.
        options: How.
        decay: Coupled weight decay, 0 where there is none or not one.
        generator: Of the random vectors.
        into: Where the numbers go.
    """
    values = torch.cat([known.top.values, known.bottom.values])
    vectors = torch.cat([known.top.vectors, known.bottom.vectors])
    density = spectral_density(
        operator,
        known=values,
        vectors=vectors,
        num_vectors=options.num_vectors,
        num_steps=options.num_steps,
        generator=generator,
    )
    into.products += density.products
    trace = density.trace
    into.enter("trace", trace.value, trace.error)
    into.enter("trace_stderr", trace.error)
    scale = float(known.top.values[0])
    into.enter("negative_mass", negative_mass(density))
    if scale > 0:
        _enter_counts(density, options, decay, scale, into)
    nodes, weights = density.points()
    into.notes["spectrum"] = {
        "size": operator.size,
        "certified": values.tolist(),
        "num_vectors": options.num_vectors,
        "num_steps": options.num_steps,
    }
    into.arrays["density_nodes"], into.arrays["density_weights"] = nodes.tolist(), weights.tolist()


def _enter_counts(density: SpectralDensity, options: Spectrum, decay: float, scale: float, into: Findings) -> None:
    alpha, origin = options.alpha, "given"
    if alpha is None:
        alpha, origin = (decay, "weight decay") if decay > 0 else (_RELATIVE * scale, "1 % of the largest eigenvalue")
    count, relative = effective_parameters(density, alpha), effective_parameters(density, _RELATIVE * scale)
    sparse = spectral_sparsity(density, options.small * scale)
    into.enter("effective_parameters", count.value, count.error)
    into.enter("effective_parameters_relative", relative.value, relative.error)
    into.enter("spectral_sparsity", sparse.value, sparse.error)
    certain = density.known.clamp(min=0.0)
    into.notes["effective_parameters"] = {
        "alpha": alpha,
        "alpha_is": origin,
        "at_least": float((certain / (certain + alpha)).sum()),
    }


def measure_overlap(known: ExtremalEigenpairs, k: int, step: int, memory: dict[str, Any], into: Findings) -> None:
    """Overlap of the leading eigenvectors with those of the previous and of the first measurement.

    Only subspaces that are certified by their residual and gap are compared, or kept for later.

    Args:
        known: Eigenpairs, at the top at least one more than k.
        k: Dimension.
        step: x of the curves.
        memory: Where the earlier subspaces are kept, with their steps and errors.
        into: Where the numbers go.
    """
    vectors, error = known.top.vectors[:k], known.top.subspace_error(k)
    notes: dict[str, Any] = {"k": k, "null": k / vectors.shape[1], "subspace_error": error}
    into.notes["overlap"] = notes
    if not error <= _CERTIFIED:
        notes["not_certified"] = f"the gap below eigenvalue {k} is too small for its residuals"
        return
    for which in ("previous", "first"):
        other: Tensor | None = memory.get(f"{which}_vectors")
        if other is not None and other.shape == vectors.shape:
            cosines = principal_cosines(other, vectors)
            margin = overlap_error(float(memory[f"{which}_error"]), error, k)
            into.enter(f"overlap_{which}", float(cosines.square().mean()), margin)
            into.arrays[f"overlap_{which}_cosines"] = cosines.tolist()
            into.arrays[f"overlap_{which}_matrix"] = _squared_cosines(other, vectors).flatten().tolist()
            notes[f"lag_{which}"] = step - int(memory[f"{which}_step"])
        if which == "previous" or other is None:
            memory.update({f"{which}_vectors": vectors.clone(), f"{which}_error": error, f"{which}_step": step})


def _squared_cosines(earlier: Tensor, now: Tensor) -> Tensor:
    """|⟨v_i, w_j⟩|² of the rows of both, shape ``(k, k)``, float64, one row for each earlier vector."""
    products: Tensor = earlier @ now.to(earlier.device, earlier.dtype).mT
    return products.cpu().double().square().clamp(max=1.0)


def measure_layers(
    operator: SymmetricOperator,
    blocks: dict[str, tuple[int, int]],
    options: Spectrum,
    tolerance: float,
    generator: torch.Generator,
    into: Findings,
) -> None:
    """Per layer: largest eigenvalue and trace of the diagonal block, and R_med.

    Args:
        operator: A.
        blocks: Range of coordinates by the layer's key.
        options: How.
        tolerance: Of the eigenvalues, relative.
        generator: Of the random vectors and coordinates.
        into: Where the numbers go.
    """
    drawn: list[tuple[Tensor, float]] = []
    for layer, (start, stop) in blocks.items():
        if options.per_layer:
            block = BlockOperator(operator, start, stop)
            found = eigenpairs(block, 1, tolerance=tolerance, generator=generator)
            density = spectral_density(
                block,
                known=found.top.values,
                vectors=found.top.vectors,
                num_vectors=options.num_vectors,
                num_steps=options.num_steps,
                generator=generator,
            )
            into.products += found.products + density.products
            value, limits = float(found.top.values[0]), found.top.limits
            beyond = 0.0 if limits is None else float(limits[0]) - value
            into.enter(f"block_top_1/{layer}", value, max(float(found.top.bounds[0]), beyond))
            into.enter(f"block_trace/{layer}", density.trace.value, density.trace.error)
            nodes, shares = density.points()
            into.arrays[f"block_density_nodes/{layer}"] = nodes.tolist()
            into.arrays[f"block_density_weights/{layer}"] = shares.tolist()
        if options.diagonal:
            order = torch.randperm(stop - start, generator=generator)[: options.diagonal]
            entries = diagonal_entries(operator, start + order)
            into.products += len(entries)
            into.enter(f"median_ratio/{layer}", median_ratio(entries))
            into.notes.setdefault("diagonal", {})[layer] = {
                "entries": len(entries),
                "of": stop - start,
                "zeros": float((entries == 0).double().mean()),
            }
            drawn.append((entries, (stop - start) / len(entries)))
    if drawn:
        stands_for = [torch.full_like(entries, share) for entries, share in drawn]
        into.enter("median_ratio", median_ratio(torch.cat([entries for entries, _ in drawn]), torch.cat(stands_for)))
