"""Gradient descent on all batches at once with injected noise, as a part of a Lightning strategy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_dynamics import _compat
from lightning_dynamics.strategies.seeds import generator_of, shared_seed

Noise = Literal["anisotropic", "diagonal", "isotropic"]
"""The covariance of the injected noise: that of a batch's gradient, its diagonal, or its trace spread evenly."""

NOISES: tuple[Noise, ...] = ("anisotropic", "diagonal", "isotropic")

_WHOLE_EPOCH = 2**30  # batches, more than any epoch has: the step comes with the last one


def noise_scale(samples: int, batches: int) -> float:
    """c, such that c Σₐ zₐ (gₐ - ḡ) with standard normal zₐ has the covariance Σ/b in the mean over partitions.

    A random partition of N = k·b samples into k batches has E Σₐ (gₐ - ḡ)(gₐ - ḡ)ᵀ = k (k-1) Σ/(N-1), with the
    covariance Σ of the samples' gradients, divided by N. So c² = (N-1)/(b k (k-1)) = (N-1)/(N (k-1)). Source: derived,
    from the covariance Σ (N-b)/(b (N-1)) of a uniform subset's mean.

    Args:
        samples: N.
        batches: k ≥ 2.

    Returns:
        c, without a unit.
    """
    return math.sqrt((samples - 1) / (samples * (batches - 1)))


def batch_weights(samples: int, batches: int, seed: int, step: int) -> Tensor:
    """Weights 1 + k c (zₐ - z̄) of the batches' losses, whose mean is the loss with anisotropic noise in its gradient.

    Args:
        samples: N.
        batches: k ≥ 2.
        seed: Seed of the noise.
        step: Number of the optimizer step.

    Returns:
        Weights in float64, ``(k,)``, with mean 1.
    """
    z = torch.randn(batches, generator=generator_of("noise", seed, step), dtype=torch.float64)
    return 1 + batches * noise_scale(samples, batches) * (z - z.mean())


class NoisyDescentMixin(Strategy):
    """Makes any strategy descend along the gradient of all batches plus noise (see :class:`NoisyDescentStrategy`).

    The Trainer accumulates all batches of an epoch to one step. With gradients gₐ of k batches and their mean ḡ, the
    step is made with ḡ + c Σₐ zₐ (gₐ - ḡ), zₐ standard normal (``"anisotropic"``), with ḡ plus noise that is
    independent in each coordinate and has the variances of that (``"diagonal"``), or the same total variance spread
    evenly (``"isotropic"``); c is :func:`noise_scale`. Losses are taken for means over a batch, and batches count
    equally, a short last one too. What follows (unscaling, clipping, the step) is Lightning's own.

    Anisotropic noise weights the losses and costs nothing. The others cost two copies of the trained parameters, and on
    several ranks the communication of each batch's gradient.

    Args:
        args: Of the strategy.
        noise: The kind of noise.
        noise_seed: Seed of the noise; None for that of ``seed_everything``, 0 without one.
        kwargs: Of the strategy.

    Raises:
        MisconfigurationException: For options that make no sense, and where a step is not one of all batches.
    """

    def __init__(self, *args: Any, noise: Noise = "anisotropic", noise_seed: int | None = None, **kwargs: Any) -> None:
        if noise not in NOISES:
            raise MisconfigurationException(f"`noise` must be one of {', '.join(NOISES)}, got {noise!r}.")
        if noise_seed is not None and (isinstance(noise_seed, bool) or not isinstance(noise_seed, int)):
            raise MisconfigurationException(f"`noise_seed` must be an int or None, got {noise_seed!r}.")
        super().__init__(*args, **kwargs)
        self._noise: Noise = noise
        self._noise_seed = noise_seed
        self._shared_seed: int | None = None
        self._accumulates_for: Trainer | None = None
        self._samples = 0
        self._batches = 0
        self._weights: tuple[int, Tensor] | None = None
        self._moments: _Moments | None = None

    @property
    def noise(self) -> Noise:
        """The kind of noise."""
        return self._noise

    @property
    def noise_seed(self) -> int:
        """Seed of the noise: the one given, else that of ``seed_everything``, else 0; rank zero's in a fit."""
        if self._shared_seed is not None:
            return self._shared_seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._noise_seed is None else self._noise_seed

    def setup_environment(self) -> None:
        """Let the Trainer accumulate; refuse what does not go together with that."""
        super().setup_environment()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            self._shared_seed = shared_seed(self, self._noise_seed)
            self._check(trainer)
            # before anything asks for the number of steps
            trainer.accumulate_grad_batches = _WHOLE_EPOCH
            self._accumulates_for = trainer

    def setup(self, trainer: Trainer) -> None:
        """Refuse optimizers that evaluate a step several times."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and any(isinstance(o, LBFGS) for o in self.optimizers):
            raise MisconfigurationException(
                "LBFGS evaluates the gradient of a step several times, and here it is that of an epoch: use an "
                "optimizer that takes it once."
            )

    def on_train_start(self) -> None:
        """Count the batches of a step; begin the epoch anew where a resumed run stopped within a step."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches = trainer.num_training_batches
        if not 2 <= batches < math.inf:
            raise MisconfigurationException(
                f"A step takes all batches of an epoch, at least 2 and finitely many, and there are {batches}: use "
                "smaller batches, or `limit_train_batches` where the length is not known."
            )
        self._batches = int(batches)
        self._samples = _samples(_compat.training_loaders(trainer), self._batches, trainer.world_size)
        trainer.accumulate_grad_batches = self._batches
        self._weights = self._moments = None
        _compat.repair_progress(trainer)
        # within a step a part of its gradient is lost, and the weights have not changed
        rewinds = 0 < _compat.place(trainer)[1] < self._batches
        if rewinds:
            _compat.rewind_epoch(trainer)
        super().on_train_start()
        if rewinds:
            _compat.reopen_loaders(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Take a batch's gradient, weighted or for the variances."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        number = _compat.batch_number(trainer)
        if self.noise == "anisotropic":
            if self._weights is None or self._weights[0] != trainer.global_step:
                weights = batch_weights(self._samples, self._batches, self.noise_seed, trainer.global_step)
                self._weights = trainer.global_step, weights
            return super().backward(closure_loss * float(self._weights[1][number]), optimizer, *args, **kwargs)
        if number == 0 or self._moments is None:
            self._moments = _Moments()
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if trainer.world_size > 1:
            self._average(self.lightning_module)
        self._moments.take(self.lightning_module)
        return loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Add the noise after the last batch, before unscaling and clipping."""
        if self.noise == "anisotropic":
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        module = self.lightning_module
        assert module is not None

        def noisy() -> Any:
            result = closure()
            if self._moments is not None:
                generator = generator_of("noise", self.noise_seed, module.trainer.global_step)
                scale = self._batches * noise_scale(self._samples, self._batches)
                self._moments.give(scale, generator, evenly=self.noise == "isotropic")
                self._moments = None
            return result

        return super().optimizer_step(optimizer, noisy, model, **kwargs)

    def teardown(self) -> None:
        """Give the Trainer its own accumulation back."""
        if self._accumulates_for is not None:
            self._accumulates_for.accumulate_grad_batches = 1
            self._accumulates_for = None
        super().teardown()

    def _average(self, module: nn.Module) -> None:
        """Make ``.grad`` that of the batches of all ranks; a parameter may have none on some of them."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        present = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.root_device)
        present = self.reduce(present, reduce_op="sum")
        for parameter in (p for p, count in zip(parameters, present.tolist(), strict=True) if count):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(self.reduce(parameter.grad, reduce_op="mean"))

    def _check(self, trainer: Trainer) -> None:
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                "A module that optimizes by hand makes its own steps, and here all batches of an epoch make one: set "
                "`automatic_optimization = True`."
            )
        if trainer.accumulate_grad_batches != 1 or any(
            isinstance(callback, GradientAccumulationScheduler) for callback in _compat.callbacks(trainer)
        ):
            raise MisconfigurationException(
                "All batches of an epoch make one step: leave `accumulate_grad_batches` at 1 and the "
                "`GradientAccumulationScheduler` out. With `limit_train_batches` fewer batches make one."
            )
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "The number of batches of a step is that of the first epoch: leave `reload_dataloaders_every_n_epochs` "
                "out."
            )
        if (order := getattr(self, "order", None)) in ("with_replacement", "independent_batches"):
            raise MisconfigurationException(
                f"The batches of an epoch make the whole gradient where each sample comes once, and `{order}` repeats "
                "samples: use `random_reshuffling`, `single_shuffle` or `incremental` with noise."
            )
        if self.handles_gradient_accumulation:
            raise MisconfigurationException(f"{type(self).__name__} accumulates gradients by itself: use 'ddp'.")
        if self.noise != "anisotropic" and trainer.world_size > 1 and not isinstance(self, DDPStrategy):
            raise MisconfigurationException(
                f"`{self.noise}` noise needs the gradient of each batch on every rank, and {type(self).__name__} does "
                "not have it: use 'ddp' or `noise='anisotropic'`."
            )


class _Moments:
    """Sum and squared deviations of the gradients of the batches so far, taken out of ``.grad``."""

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[nn.Parameter, Tensor] = {}
        self._taken = 0

    def take(self, module: nn.Module) -> None:
        """Move the gradient of a batch out of ``.grad``: one step of Welford's recursion."""
        self._taken += 1
        for parameter in module.parameters():
            if (g := parameter.grad) is None:
                continue
            if g.is_sparse:
                g = parameter.grad = g.to_dense()
            if parameter not in self._sums:
                dtype = torch.promote_types(g.dtype, torch.float32)
                self._sums[parameter], self._squares[parameter] = (torch.zeros_like(g, dtype=dtype) for _ in range(2))
            total = self._sums[parameter]
            if self._taken > 1:
                away = g - total / (self._taken - 1)
                self._squares[parameter].addcmul_(away, away, value=(self._taken - 1) / self._taken)
            total += g
            g.zero_()

    def give(self, scale: float, generator: torch.Generator, *, evenly: bool) -> None:
        """Put the sums into ``.grad``, with noise of ``scale`` times the root of the squared deviations."""
        mean = 0.0
        if evenly:
            every = self._squares.values()
            mean = sum(float(squares.sum(dtype=torch.float64)) for squares in every) / sum(s.numel() for s in every)
        for parameter, total in self._sums.items():
            z = torch.randn(parameter.shape, generator=generator).to(total)
            deviation = math.sqrt(mean) if evenly else self._squares[parameter].sqrt()
            noisy = total + scale * deviation * z
            if parameter.grad is None:
                parameter.grad = noisy.to(parameter)
            else:
                parameter.grad.copy_(noisy)


def _samples(loaders: list[Any], batches: int, world_size: int) -> int:
    """Samples that all ranks together see in so many batches."""
    loader = loaders[0]
    if len(loaders) != 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            "The size of the noise depends on the number of samples: use one DataLoader over a map-style data set."
        )
    sampler: Any = loader.sampler if loader.batch_size else getattr(loader.batch_sampler, "sampler", loader.sampler)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return min(len(sampler), batches * int(size)) * world_size
