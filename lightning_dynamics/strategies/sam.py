"""Sharpness-aware minimization (SAM) as a part of a Lightning strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.objective.randomness import RandomState
from lightning_dynamics.objective.replay import batch_length
from lightning_dynamics.objective.samples import slices
from lightning_dynamics.strategies.checks import check_number, check_options, check_run
from lightning_dynamics.strategies.perturbation import (
    Variant,
    across,
    adaptive_norm,
    climb,
    combine,
    cosine_of,
    norm,
)
from lightning_dynamics.strategies.schedules import Rho
from lightning_dynamics.strategies.window import Batch, Window, parameters_of

CHECKPOINT_KEY = "lightning_dynamics.sam"
"""Where a checkpoint holds what SAM needs to go on. A run without SAM does not look there."""


@dataclass(frozen=True)
class SAMStep:
    """What SAM did in an optimizer step.

    Attributes:
        step: The Trainer's global step before it.
        rho: ρ.
        loss: L(w), the mean over the batches of the step; no dimensions. This rank's.
        perturbed_loss: L(w + e) on the same batches.
        gradient_norm: Norm of the gradient that perturbs. This rank's, where each rank perturbs by itself.
        perturbation_norm: ‖e‖; None for ASAM where :attr:`SAMMixin.observed` is False.
        gradient_cosine: Cosine of the gradients at w and at w + e; None where :attr:`SAMMixin.observed` is False.
    """

    step: int
    rho: float
    loss: Tensor
    perturbed_loss: Tensor
    gradient_norm: float
    perturbation_norm: float | None
    gradient_cosine: float | None

    @property
    def sharpness_gap(self) -> float:
        """L(w + e) - L(w)."""
        return float(self.perturbed_loss - self.loss)


_NEEDS_CLOSURE = (
    "SAM evaluates the loss of a step twice, so it needs to know how: call `optimizer.step(closure)` with a closure "
    "that calls `optimizer.zero_grad()`, computes the loss and calls `self.manual_backward(loss)` (in an overridden "
    "`optimizer_step`, the closure that it is given)."
)


class SAMMixin(Strategy):
    """Makes any strategy minimize the loss at weights that were moved uphill (see :class:`SAMStrategy`).

    The closure that Lightning passes to the optimizer evaluates loss and gradient at w; this replaces it by one that
    then climbs to w + e, evaluates the same batches again, all of those that make the step, and puts w back. What
    follows (unscaling, clipping, the step, schedulers, counters) is Lightning's own.

    Args:
        args: Of the strategy.
        rho: ρ, the length of the perturbation, or a function of (global step, learning rate). By default .05, for ASAM
            .5. Unnormalized SAM has no default, since its ρ has the unit of a learning rate.
        variant: ``"sam"``, e = ρ·g/‖g‖; ``"asam"``, e = ρ·T²g/‖Tg‖ with ``T = |w| + .01`` for parameters whose name
            contains "weight", else 1; ``"usam"``, e = ρ·g; ``"gsam"``, SAM's perturbation, and the step is made with
            g_e - α·(part of g orthogonal to g_e), g_e being the gradient at w + e.
        perturbation: On several processes, ``"per_rank"`` perturbs each by the gradient of its own batch, ``"global"``
            all by the mean gradient. Both update by the mean of the gradients at the perturbed weights.
        m: Perturb m samples at a time, each by their own gradient, and average (m-SAM). Must divide the batch size; a
            short last batch has a smaller last part. The loss must be a mean over samples. None for the whole batch of
            a step.
        every_k: Compute a second gradient every k-th step only (LookSAM); steps between use
            g + look_alpha·(‖g‖/‖v‖)·v, v being the part of the last second gradient that was orthogonal to g.
        look_alpha: α of LookSAM.
        gsam_alpha: α of GSAM.
        same_noise: Whether the second evaluation draws the random numbers of the first again (dropout masks,
            augmentation), so that both are of one function. Otherwise it draws new ones from the run's generators.
        kwargs: Of the strategy.

    Raises:
        MisconfigurationException: For options that make no sense.
    """

    _window: Window | None
    _losses: list[Tensor]
    _rho_now: float
    _looks: bool
    _replays: bool
    _counts: dict[int, int]
    _orthogonal: dict[int, dict[Tensor, Tensor]]
    _is_open: bool
    _in_step: bool
    _last: SAMStep | None
    _gradient_norm: float | None

    def __init__(
        self,
        *args: Any,
        rho: float | Rho | None = None,
        variant: Variant = "sam",
        perturbation: Literal["per_rank", "global"] = "per_rank",
        m: int | None = None,
        every_k: int = 1,
        look_alpha: float = 0.7,
        gsam_alpha: float = 0.4,
        same_noise: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rho = check_options(rho, variant, perturbation, m, every_k, look_alpha, gsam_alpha, same_noise)
        self.variant = variant
        self.perturbation = perturbation
        self.m = m
        self.every_k = every_k
        self.look_alpha = look_alpha
        self.gsam_alpha = gsam_alpha
        self.same_noise = same_noise
        self.observed = False
        """Whether the next steps also compute what costs more: the cosine, and the perturbation's norm for ASAM."""
        self._restored: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._forget()

    @property
    def last_step(self) -> SAMStep | None:
        """The last optimizer step in which the weights were perturbed, None before there is one."""
        return self._last

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient that perturbed last, known after a resume too."""
        return self._gradient_norm

    # Lightning's hooks

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            check_run(self, trainer)

    def on_train_start(self) -> None:
        super().on_train_start()
        restored, self._restored = self._restored, None
        self._forget()
        self._window = Window(*self._trained, self.same_noise)
        if restored is not None:
            self._counts = {int(index): int(count) for index, count in restored["steps"].items()}
            self._gradient_norm = restored["gradient_norm"]
            for index, vectors in restored["orthogonal"].items() if self.every_k > 1 else ():
                parameters = parameters_of(self.optimizers[int(index)])
                self._orthogonal[int(index)] = {
                    p: v.to(p) for p, v in zip(parameters, vectors, strict=True) if v is not None
                }
        for optimizer in self.optimizers:
            if isinstance(optimizer, Optimizer):
                self._handles.append(optimizer.register_step_pre_hook(self._refuse_bare_step))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        trainer, module = self._trained
        if self._replays or not module.automatic_optimization or _compat.only_collects_statistics(trainer):
            return super().training_step(*args, **kwargs)
        if self._begins_window or not self._is_open:  # a run that was resumed within a step has lost its beginning
            self._open_window(self.optimizers[0])
        if not self._rho_now:
            return super().training_step(*args, **kwargs)
        assert self._window is not None
        arguments = (*args, *kwargs.values())
        if self.m is not None and self._last is None:
            self._check_parts(arguments[0])
        return self._window.run(super().training_step, arguments)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_open:
            self._losses.append(closure_loss.detach().clone())
        if self.m is not None and self._rho_now and not self._replays:  # parts of the batch are differentiated
            return closure_loss
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        trainer, module = self._trained
        if module.automatic_optimization and _compat.only_collects_statistics(trainer):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if closure is _compat.do_nothing_closure:
            raise MisconfigurationException(_NEEDS_CLOSURE)
        calls = iter([closure])
        self._in_step = True
        try:
            return super().optimizer_step(optimizer, partial(self._sharpen, optimizer, calls), model, **kwargs)
        finally:
            self._in_step = False

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "optimizer_states" in checkpoint:  # not of weights alone
            checkpoint[CHECKPOINT_KEY] = {
                "steps": dict(self._counts),
                "gradient_norm": self._gradient_norm,
                "orthogonal": {
                    index: [vectors.get(parameter) for parameter in parameters_of(self.optimizers[index])]
                    for index, vectors in self._orthogonal.items()
                },
            }
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        if self._trained[0].state.fn == TrainerFn.FITTING:
            self._restored = checkpoint.get(CHECKPOINT_KEY)
        return checkpoint

    def teardown(self) -> None:
        super().teardown()
        self._close_window()
        self._window = self._restored = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The two evaluations

    def _sharpen(self, optimizer: Optimizer, calls: Iterator[Callable[[], Any]]) -> Any:
        """What the optimizer gets as its closure: the gradient of SAM at w, and the result of the user's closure."""
        closure = next(calls, None)
        if closure is None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} evaluates its closure several times in a step, which SAM does not support."
            )
        _, module = self._trained
        by_hand = not module.automatic_optimization
        if by_hand or self._begins_window or not self._is_open:
            self._open_window(optimizer)
        assert self._window is not None
        if by_hand and self._rho_now:
            self._window.begin()
        rho = self._rho_now
        with self._unsynchronized(bool(rho) and self.perturbation == "per_rank"):
            result = closure()
        window, losses = self._window.batches, self._losses
        self._losses = []
        self._counts[self._index(optimizer)] = self._counts.get(self._index(optimizer), 0) + 1
        skips = not by_hand and result is None and self._scaler is not None  # Lightning then makes no step
        if losses and not skips:
            again = partial(self._call, closure) if by_hand else partial(self._replay, optimizer, window)
            if self._looks:
                self._look(optimizer)
            elif rho and self.m is not None:
                self._step_in_parts(optimizer, window, rho)
            elif rho:
                self._step_at_once(optimizer, torch.stack(losses).sum(), again, rho)
        self._close_window()
        return result

    def _step_at_once(self, optimizer: Optimizer, loss: Tensor, again: Callable[[], Tensor], rho: float) -> None:
        """Replace the gradient at w, in ``.grad``, by that of SAM."""
        parameters = parameters_of(optimizer)
        gradients = [parameter.grad for parameter in parameters]
        scale = self._loss_scale
        length = norm([g for g in gradients if g is not None])
        if not self._everywhere(math.isfinite(length)):
            self._spoil(parameters)
            return
        decomposes = self.variant == "gsam" or self.every_k > 1
        with self._rerunning(optimizer), self._perturbed(parameters, gradients, rho, length, scale) as moved:
            kept = self._set_aside(gradients) if decomposes or self.observed else []
            perturbed_loss = again()
        if kept and self.perturbation == "per_rank":
            kept = self._averaged(kept, parameters)
        second = [parameter.grad for parameter in parameters]
        cosine = cosine_of(kept, second) if self.observed else None
        if self.variant == "gsam":
            rest = across(kept, second)
            _set_gradients(
                parameters, [combine((s, 1), (r, -self.gsam_alpha)) for s, r in zip(second, rest, strict=True)]
            )
        elif self.every_k > 1:
            rest = across(second, kept)
            self._orthogonal[self._index(optimizer)] = {
                p: r for p, r in zip(parameters, rest, strict=True) if r is not None
            }
        assert self._window is not None
        self._note(rho, loss, perturbed_loss, length / scale, moved, cosine, len(self._window.batches))

    def _step_in_parts(self, optimizer: Optimizer, window: Sequence[Batch], rho: float) -> None:
        """m-SAM: each part of each batch is perturbed by its own gradient."""
        parameters = parameters_of(optimizer)
        total: list[Tensor | None] = [None] * len(parameters)
        first: list[Tensor | None] = [None] * len(parameters)
        shares, lengths, moves, losses, perturbed_losses = [], [], [], [], []
        is_finite = True
        with self._rerunning(optimizer), self._unsynchronized(True):
            for batch, part, share in self._parts(window):
                before = RandomState() if self.same_noise else None
                _clear(parameters)
                losses.append(self._evaluate(optimizer, part, share, batch.number))
                gradients = [parameter.grad for parameter in parameters]
                length = norm([g for g in gradients if g is not None])
                is_finite &= math.isfinite(length)
                scale = self._loss_scale * share
                with self._perturbed(parameters, gradients, rho, length, scale) as moved:
                    if before is not None:
                        before.restore()
                    first = (
                        [combine((t, 1), (g, 1)) for t, g in zip(first, gradients, strict=True)]
                        if self.observed
                        else first
                    )
                    perturbed_losses.append(self._evaluate(optimizer, part, share, batch.number))
                total = [combine((t, 1), (p.grad, 1)) for t, p in zip(total, parameters, strict=True)]
                shares.append(share)
                lengths.append(length / scale)
                moves.append(moved)
        if not self._everywhere(is_finite):
            self._spoil(parameters)
            return
        total = self._averaged(total, parameters)
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        self._note(
            rho,
            torch.stack(losses).sum(),
            torch.stack(perturbed_losses).sum(),
            _mean(lengths, shares),
            None if None in moves else _mean(moves, shares),
            cosine_of(self._averaged(first, parameters), total) if self.observed else None,
            len(window),
        )

    def _parts(self, window: Sequence[Batch]) -> Iterator[tuple[Batch, tuple[Any, ...], float]]:
        """All parts of the batches as arguments of ``training_step``, with their shares of the step's loss."""
        accumulated = self._trained[0].accumulate_grad_batches
        for batch in window:
            if batch.random is not None:
                batch.random.restore()
            samples, *others = batch.arguments
            for part in slices(samples, self.m or 1):
                yield batch, (part, *others), batch_length(part) / batch_length(samples) / accumulated

    def _replay(self, optimizer: Optimizer, window: Sequence[Batch]) -> Tensor:
        """Evaluate the batches of a step again; their loss."""
        share = 1 / self._trained[0].accumulate_grad_batches
        losses = []
        for batch in window:
            if batch.random is not None:
                batch.random.restore()
            with self._unsynchronized(batch is not window[-1]):
                losses.append(self._evaluate(optimizer, batch.arguments, share, batch.number))
        return torch.stack(losses).sum()

    def _evaluate(self, optimizer: Optimizer, arguments: tuple[Any, ...], share: float, number: int) -> Tensor:
        """Loss of a batch, of which the gradient is added to ``.grad``, times its share."""
        with torch.enable_grad(), _compat.at_batch(self._trained[0], number):
            output = self.training_step(*arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                return torch.zeros((), device=self.root_device)
            # as Lightning does it: divided by a number of batches
            self.backward(loss / round(1 / share) if self.m is None else loss * share, optimizer)
        return self._losses.pop()

    def _call(self, closure: Callable[[], Any]) -> Tensor:
        """Call the closure of a module that optimizes by hand again; the sum of the losses that it differentiated."""
        assert self._window is not None
        for batch in self._window.batches:
            if batch.random is not None:
                batch.random.restore()
        with torch.enable_grad():
            closure()
        losses, self._losses = self._losses, []
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.root_device)

    @contextmanager
    def _rerunning(self, optimizer: Optimizer) -> Iterator[None]:
        """For a second evaluation, see :class:`Window`."""
        assert self._window is not None
        with self._window.rerunning(optimizer, self.model):
            self._replays = True
            try:
                yield
            finally:
                self._replays = False

    @contextmanager
    def _perturbed(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float, length: float, scale: float
    ) -> Iterator[float | None]:
        """With the weights at w + e and without gradients; afterwards at w, copied back.

        Args:
            parameters: The parameters.
            gradients: Those that perturb, or None.
            rho: ρ.
            length: Their norm.
            scale: What their loss was multiplied by.

        Yields:
            ‖e‖, where it is known.
        """
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        weights, steps = [p for p, _ in pairs], [g for _, g in pairs]
        before = [weight.detach().clone() for weight in weights]
        scales = self._scaled(weights) if self.variant == "asam" else None
        divisor = (
            scale if self.variant == "usam" else length if scales is None else adaptive_norm(weights, steps, scales)
        )
        moved: float | None = 0.0
        try:
            if divisor > 0 and 0 < length < math.inf:
                climb(weights, steps, rho, divisor, scales)
                moved = rho * length / divisor
                if scales is not None:
                    differences = [w.detach() - b for w, b in zip(weights, before, strict=True)]
                    moved = norm(differences) if self.observed else None
            _clear(parameters)
            yield moved
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)

    def _look(self, optimizer: Optimizer) -> None:
        """LookSAM between two steps with a second gradient."""
        parameters = parameters_of(optimizer)
        gradients = [parameter.grad for parameter in parameters]
        orthogonal = [self._orthogonal[self._index(optimizer)].get(parameter) for parameter in parameters]
        length = norm([v for v in orthogonal if v is not None])
        if length > 0:
            factor = self.look_alpha * norm([g for g in gradients if g is not None]) / length
            _set_gradients(
                parameters, [combine((g, 1), (v, factor)) for g, v in zip(gradients, orthogonal, strict=True)]
            )

    def _refuse_bare_step(self, optimizer: Optimizer, *_: Any) -> None:
        """An optimizer makes a step that has not come through the strategy."""
        if not self._in_step and not _compat.only_collects_statistics(self._trained[0]):
            raise MisconfigurationException(
                f"{_NEEDS_CLOSURE} This {type(optimizer).__name__} stepped by itself: use the one that "
                "`self.optimizers()` returns."
            )

    # The window of batches that make a step

    def _open_window(self, optimizer: Optimizer) -> None:
        self._close_window()
        self._is_open = True
        if not parameters_of(optimizer):
            return
        rho = self.rho
        if callable(rho):
            rho = rho(self._trained[0].global_step, float(optimizer.param_groups[0]["lr"]))
            check_number("rho", rho)
        index = self._index(optimizer)
        if not rho:
            self._orthogonal.pop(index, None)
        self._looks = self._counts.get(index, 0) % self.every_k != 0 and index in self._orthogonal
        self._rho_now = 0.0 if self._looks else rho

    def _close_window(self) -> None:
        self._losses, self._rho_now, self._looks, self._is_open = [], 0.0, False, False
        if self._window is not None:
            self._window.close()

    def _forget(self) -> None:
        """Start over."""
        self._window = None
        self._losses = []
        self._rho_now = 0.0
        self._looks = False
        self._is_open = False
        self._in_step = False
        self._replays = False
        self._counts = {}
        self._orthogonal = {}
        self._last = None
        self._gradient_norm = None

    # Facts

    @property
    def _trained(self) -> tuple[Trainer, LightningModule]:
        assert self.lightning_module is not None
        return self.lightning_module.trainer, self.lightning_module

    @property
    def _begins_window(self) -> bool:
        """Whether the running batch is the first of those that make a step, where Lightning zeroes the gradient."""
        trainer, _ = self._trained
        return _compat.batch_number(trainer) % trainer.accumulate_grad_batches == 0

    @property
    def _scaler(self) -> Any:
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def _loss_scale(self) -> float:
        """What the precision plugin multiplies losses by."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _index(self, optimizer: Optimizer) -> int:
        return next(index for index, other in enumerate(self.optimizers) if other is optimizer)

    def _scaled(self, weights: Sequence[Tensor]) -> list[bool]:
        """Which parameters ASAM scales by their size."""
        names = {id(parameter): name for name, parameter in self._trained[1].named_parameters()}
        return ["weight" in names.get(id(weight), "") for weight in weights]

    def _unsynchronized(self, block: bool) -> Any:
        """Without communication in backward passes, where there is any."""
        return self.block_backward_sync() if block and isinstance(self, ParallelStrategy) else nullcontext()

    def _averaged(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean over ranks, as DDP forms it: a gradient that a rank does not have counts as zero."""
        if not isinstance(self, ParallelStrategy):
            return list(gradients)
        present = torch.tensor([gradient is not None for gradient in gradients], device=self.root_device).float()
        everywhere = self.reduce(present, reduce_op="sum").tolist()
        averaged: list[Tensor | None] = []
        for gradient, parameter, count in zip(gradients, parameters, everywhere, strict=True):
            if count:
                own = torch.zeros_like(parameter) if gradient is None else gradient
                averaged.append(self.reduce(own.to_dense() if own.is_sparse else own, reduce_op="mean"))
            else:
                averaged.append(None)
        return averaged

    def _everywhere(self, decision: bool) -> bool:
        """Whether it holds on all ranks, where they differ."""
        if self.perturbation == "global" or not isinstance(self, ParallelStrategy):
            return decision
        return bool(self.reduce_boolean_decision(decision))

    def _spoil(self, parameters: Sequence[Tensor]) -> None:
        """A gradient that is not finite on one rank is on none, as where gradients are averaged at once."""
        if self.m is None and not isinstance(self, ParallelStrategy):
            return
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, math.nan)

    def _set_aside(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients that outlive the next backward pass."""
        if getattr(self.model, "gradient_as_bucket_view", False):
            return [None if gradient is None else gradient.clone() for gradient in gradients]
        return list(gradients)

    def _note(
        self,
        rho: float,
        loss: Tensor,
        perturbed_loss: Tensor,
        length: float,
        moved: float | None,
        cosine: float | None,
        batches: int,
    ) -> None:
        trainer, module = self._trained
        # Lightning divides by the number of batches that it accumulates, also where an epoch ends with fewer
        share = trainer.accumulate_grad_batches / batches if module.automatic_optimization else 1.0
        losses = loss * share, perturbed_loss * share
        self._last = SAMStep(trainer.global_step, rho, *losses, length, moved, cosine)
        self._gradient_norm = length

    def _check_parts(self, batch: Any) -> None:
        size = batch_length(batch)
        if size % (self.m or 1):
            raise MisconfigurationException(f"`m={self.m}` does not divide the batch size, {size:g}.")


def _clear(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None or gradient is None or parameter.grad.is_sparse:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def _mean(values: Sequence[Any], shares: Sequence[float]) -> float:
    return float(sum(value * share for value, share in zip(values, shares, strict=True)) / sum(shares))
