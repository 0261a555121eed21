"""How far the curvature of mini-batches lies above that of the whole set, by batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_dynamics import _compat
from lightning_dynamics.linalg import SymmetricOperator, eigenpairs
from lightning_dynamics.metrics.estimates import Estimate
from lightning_dynamics.metrics.stochastic_sharpness import gap_exponent
from lightning_dynamics.objective import LossFunction, Objective, ParameterFilter, hessian
from lightning_dynamics.objective.randomness import fork_rng, seed_everything, stream_seed
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, VERMILION, plus_minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BatchFunction = Callable[[list[int]], Any]
"""Makes a batch of the samples with these numbers."""


@dataclass(frozen=True)
class BatchSizeSweep:
    """Outcome of :func:`batch_size_sweep`.

    Attributes:
        batch_sizes: b, ascending.
        num_samples: N, all samples.
        draws: Batches drawn of each size (one where b = N: there is only one).
        sharpness: λmax of the Hessian on all samples.
        minibatch_sharpness: For each b: MiniBS = E λmax(H_B), with its standard error over draws.
        batch_sharpness: For each b: E[g_BᵀH_Bg_B/‖g_B‖²], the same; None where no batch has a gradient.
        gaps: For each b: MiniBS - ``sharpness``.
        exponent: c of gap ∝ b^c over ``fitted``; None where it cannot be fitted.
        fitted: The batch sizes it is fitted over.
        no_exponent: Why there is none.
    """

    batch_sizes: Sequence[int]
    num_samples: int
    draws: int
    sharpness: float
    minibatch_sharpness: Sequence[Estimate]
    batch_sharpness: Sequence[Estimate | None]
    gaps: Sequence[Estimate]
    exponent: Estimate | None
    fitted: Sequence[int]
    no_exponent: str | None = None

    def __str__(self) -> str:
        rows = [("b", "MiniBS", "gap", "Batch Sharpness")]
        for b, top, gap, own in zip(
            self.batch_sizes, self.minibatch_sharpness, self.gaps, self.batch_sharpness, strict=True
        ):
            rows.append((str(b), _shown(top), _shown(gap), "" if own is None else _shown(own)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        last = (
            f"No exponent: {self.no_exponent}"
            if self.exponent is None
            else f"gap ∝ b^c with c = {_shown(self.exponent)}, over b = {', '.join(map(str, self.fitted))}"
        )
        first = f"Sharpness of all {self.num_samples} samples: {self.sharpness:.5g}; {self.draws} draws of each size"
        return "\n".join([first, *table, last])

    def figure(self) -> Figure:
        """Left the sharpnesses by batch size, right the gap on logarithmic axes with the fitted power."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 3.5), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, colour, found in (
            ("MiniBS", BLUE, self.minibatch_sharpness),
            ("Batch Sharpness", VERMILION, self.batch_sharpness),
        ):
            points = [(b, e.value, e.error or 0.0) for b, e in zip(self.batch_sizes, found, strict=True) if e]
            if points:
                b, values, errors = zip(*points, strict=True)
                left.errorbar(b, values, errors, fmt="o-", color=colour, markersize=3.5, linewidth=1.3, label=name)
        left.axhline(self.sharpness, color=GREY, linestyle="--", linewidth=1.3, label="all samples")
        left.set_xscale("log", base=2)
        left.set_xlabel("batch size b")
        left.set_ylabel("curvature")
        left.legend(fontsize=8, frameon=False)
        points = [(b, g.value, g.error or 0.0) for b, g in zip(self.batch_sizes, self.gaps, strict=True) if g.value > 0]
        if points:
            b, values, errors = zip(*points, strict=True)
            right.errorbar(b, values, errors, fmt="o", color=BLUE, markersize=3.5, linewidth=1.3)
            right.set_xscale("log", base=2)
            right.set_yscale("log")
            right.set_ylim(min(values) / 2, 2 * max(values))
        if self.exponent is not None and points:
            used = [(b, v, e) for b, v, e in points if b in self.fitted]
            weights = [(v / e) ** 2 if e else 1.0 for _, v, e in used]
            level = sum(
                w * (math.log(v) - self.exponent.value * math.log(b))
                for w, (b, v, _) in zip(weights, used, strict=True)
            ) / sum(weights)
            line = [(b, math.exp(level + self.exponent.value * math.log(b))) for b in (used[0][0], used[-1][0])]
            label = f"bᶜ, c = {_shown(self.exponent)}"
            right.plot(*zip(*line, strict=True), color=GREEN, linewidth=1.3, label=label)
            right.legend(fontsize=8, frameon=False)
        right.set_xlabel("batch size b")
        right.set_ylabel("gap")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def _shown(estimate: Estimate) -> str:
    return plus_minus(estimate.value, estimate.error)


def batch_size_sweep(
    module: nn.Module,
    data: Any,
    batch_sizes: Sequence[int],
    *,
    loss: LossFunction | None = None,
    num_samples: int | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    draws: int = 32,
    seed: int = 0,
    fit_up_to: float = 0.25,
    parameters: ParameterFilter | None = None,
    mode: Literal["train", "eval"] = "train",
    chunk: int = 1024,
    tolerance: float = 1e-4,
) -> BatchSizeSweep:
    """Curvature that batches of several sizes feel, at the module's present weights.

    For each b the batches are uniform subsets without repetition, independent of each other and of those of other
    sizes. Of each batch λmax(H_B) and g_BᵀH_Bg_B/‖g_B‖² are taken, and of all samples together λmax(H). The gap
    E λmax(H_B) - λmax(H) is never negative, falls with b, and is zero at b = N (λmax is convex); by which power of b is
    fitted and not assumed: perturbation of a simple eigenvalue gives -1 at large b, the general bound -½ (derived).

    The gap is the mean of λmax(H_B) - v₁ᵀH_Bv₁ ≥ 0 over the draws, v₁ being the top eigenvector of H: since v₁ᵀH_Bv₁
    has the mean λmax(H) whatever b, this is without bias, and what moves all eigenvalues alike is not in the error
    (own). MiniBS is that gap above the sharpness. Where the loss draws noise (dropout), every batch draws its own.

    The module is left as it was, and so are all random number generators. Costs per size ``draws`` gradients of b
    samples and about as many dozen Hessian-vector products.

    Args:
        module: The module; its weights are not changed.
        data: A map-style data set, or a function that makes a batch of samples with given numbers (with
            ``num_samples``). Samples that draw noise draw the same at every reading.
        batch_sizes: b, each between 1 and N.
        loss: Computes one batch's loss, a mean over its samples, ``loss(module, batch)``; for a LightningModule by
            default that of its ``training_step``, which then has to do without a Trainer.
        num_samples: N, for a function.
        collate_fn: Makes a batch of a list of samples.
        draws: Batches of each size, at least 2.
        seed: Seed of the draws, of the samples' noise and of the loss's.
        fit_up_to: The exponent is fitted over b up to this share of N, since the gap must vanish at N.
        parameters: Which parameters make up θ, see :data:`ParameterFilter`.
        mode: ``"train"`` keeps the module's training flags, ``"eval"`` sets all to evaluation: another function.
        chunk: Samples that are run at once where all of them are.
        tolerance: Relative error of the eigenvalues; it has to be small against the gaps.

    Raises:
        ValueError: If an argument makes no sense; if batch norm is in training mode, which makes the loss of all
            samples depend on how they are batched.
    """
    if loss is None:
        if not isinstance(module, LightningModule):
            raise ValueError("`loss` is needed: only a LightningModule has a `training_step` that says what it is.")
        loss = _training_step
    total = _count(data, num_samples)
    sizes = sorted(set(batch_sizes))
    if not sizes or not all(isinstance(b, int) and 1 <= b <= total for b in sizes):
        raise ValueError(f"`batch_sizes` must be integers between 1 and the {total} samples, got {list(batch_sizes)}.")
    for name, value, least in (("draws", draws, 2), ("chunk", chunk, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    if not 0 < fit_up_to <= 1:
        raise ValueError(f"`fit_up_to` is a share of the samples, got {fit_up_to}.")
    if mode not in ("train", "eval"):
        raise ValueError(f"`mode` must be 'train' or 'eval', got {mode!r}.")
    if mode == "train":
        _refuse_batch_norm(module)
    sampled = _Samples(data, collate_fn, seed)
    curvature = _Curvature(module, loss, parameters, None if mode == "train" else False, seed, tolerance)

    chunks = [list(range(start, min(start + chunk, total))) for start in range(0, total, chunk)]
    full = curvature([sampled(indices) for indices in chunks], list(map(float, map(len, chunks))), 0)
    gaps, ratios = [], []
    for b in sizes:
        if b == total:
            gaps.append(Estimate(0.0, 0.0))
            ratios.append(None if full.along_gradient is None else Estimate(full.along_gradient, 0.0))
            continue
        found = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(stream_seed(seed, b, draw))
            chosen = torch.randperm(total, generator=generator)[:b].tolist()
            found.append(curvature([sampled(chosen)], [float(b)], draw, full.vector))
        gaps.append(_mean([each.top - each.along_reference for each in found]))
        known = [each.along_gradient for each in found if each.along_gradient is not None]
        ratios.append(_mean(known) if known else None)
    tops = [Estimate(full.top + gap.value, gap.error) for gap in gaps]
    exponent, fitted, reason = _exponent(sizes, gaps, fit_up_to * total)
    return BatchSizeSweep(sizes, total, draws, full.top, tops, ratios, gaps, exponent, fitted, reason)


def _exponent(
    sizes: Sequence[int], gaps: Sequence[Estimate], most: float
) -> tuple[Estimate | None, list[int], str | None]:
    used = [(b, gap.value, gap.error) for b, gap in zip(sizes, gaps, strict=True) if b <= most]
    fitted = [b for b, *_ in used]
    if len(used) < 3:
        return None, fitted, f"it needs three batch sizes up to {most:g}, there are {len(used)}"
    small = [b for b, value, error in used if not (error and value > 2 * error)]
    if small:
        return None, fitted, f"the gap cannot be told from zero, or has no error, at b = {', '.join(map(str, small))}"
    values, errors = [value for _, value, _ in used], [error or math.nan for *_, error in used]
    return gap_exponent(fitted, values, errors), fitted, None


def _mean(values: Sequence[float]) -> Estimate:
    """Mean of independent draws with its standard error; None for a single one."""
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else None)


def _count(data: Any, num_samples: int | None) -> int:
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if num_samples not in (None, len(data)):
            raise ValueError(f"`num_samples` is {num_samples}, and the data set has {len(data)}.")
        return len(data)
    if not callable(data):
        raise ValueError(f"`data` must be a map-style data set or a function, got a {type(data).__name__}.")
    if num_samples is None or num_samples < 1:
        raise ValueError("A function that makes batches needs `num_samples`: how many samples there are.")
    return num_samples


def _refuse_batch_norm(module: nn.Module) -> None:
    coupled = [
        name for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    if coupled:
        raise ValueError(
            f"Batch norm in training mode ({', '.join(coupled[:4])}) couples the samples of a batch: the loss of all "
            "samples depends on how they are batched, so that there is no gap to speak of. `mode='eval'` measures with "
            "running statistics, another function."
        )


class _Samples:
    """Batches of chosen samples, whose noise depends on the seed and the sample only."""

    def __init__(self, data: Any, collate_fn: Callable[[list[Any]], Any], seed: int) -> None:
        self._data = data
        self._collate = collate_fn
        self._seed = seed

    def __call__(self, indices: list[int]) -> Any:
        with fork_rng():
            if not hasattr(self._data, "__getitem__"):
                seed_everything(stream_seed(self._seed, indices[0]))
                return self._data(indices)
            if hasattr(self._data, "__getitems__"):
                seed_everything(stream_seed(self._seed, indices[0]))
                return self._collate(self._data.__getitems__(indices))
            return self._collate([self._sample(index) for index in indices])

    def _sample(self, index: int) -> Any:
        seed_everything(stream_seed(self._seed, index))
        return self._data[index]


@dataclass(frozen=True)
class _Found:
    """λmax, its eigenvector, the curvature along a reference vector and along the gradient, None where that is zero."""

    top: float
    vector: Tensor
    along_reference: float
    along_gradient: float | None


@dataclass(frozen=True)
class _Curvature:
    """Curvature of a mean over batches."""

    module: nn.Module
    loss: LossFunction
    parameters: ParameterFilter | None
    training: bool | None
    seed: int
    tolerance: float

    def __call__(self, batches: list[Any], weights: list[float], draw: int, reference: Tensor | None = None) -> _Found:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        objective = Objective(
            self.module,
            self.loss,
            [move_data_to_device(batch, device) for batch in batches],
            parameters=self.parameters,
            weights=weights,
            indices=range(draw, draw + len(batches)),
            training=self.training,
            seed=self.seed,
            overrides=_silent(self.module),
        )
        with hessian(objective) as h:
            pairs = eigenpairs(h, tolerance=self.tolerance)
            if not pairs.converged:
                raise ValueError(
                    f"The largest eigenvalue did not reach a relative error of {self.tolerance:g}; raise `tolerance`."
                )
            top, vector = float(pairs.top.values[0]), pairs.top.vectors[0]
            norm = h.gradient.norm()
            return _Found(
                top,
                vector,
                top if reference is None else _along(h, reference),
                _along(h, h.gradient / norm) if norm > 0 else None,
            )


def _along(operator: SymmetricOperator, direction: Tensor) -> float:
    """vᵀAv in float64."""
    return float(torch.dot(direction.double(), operator(direction).double()))


def _silent(module: nn.Module) -> list[tuple[object, str, Any]]:
    """What a step would tell a Trainer, told to nobody."""
    inner = [each for each in module.modules() if isinstance(each, LightningModule)]
    return [(each, name, _nothing) for each in inner for name in ("log", "log_dict", "print")]


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _training_step(module: nn.Module, batch: Any) -> Tensor | None:
    assert isinstance(module, LightningModule)
    if not module.automatic_optimization:
        raise ValueError("Under manual optimization `training_step` has no one loss. Say which with `loss=`.")
    step = module.training_step
    has_index = _compat.is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output: Any = step(batch, 0) if has_index else step(batch)
    loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    return loss
