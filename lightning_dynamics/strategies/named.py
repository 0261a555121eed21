"""The strategies that have a class and a name of their own."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_dynamics.strategies.compose import OneDeviceStrategy
from lightning_dynamics.strategies.noisy_descent import NoisyDescentMixin
from lightning_dynamics.strategies.sam import SAMMixin
from lightning_dynamics.strategies.sampling import SamplingOrderMixin


class SAMStrategy(SAMMixin, OneDeviceStrategy):
    """Sharpness-aware minimization on one device: ``Trainer(strategy="sam")``.

    Each step takes the gradient at w + e instead of w, e being the uphill step of length ρ (Foret, Kleiner, Mobahi,
    Neyshabur, arXiv 2010.01412), for the same batches: all that are accumulated to the step. Everything else about
    the step is Lightning's own: any first-order optimizer, clipping, mixed precision, schedulers, ``global_step``. What
    the second evaluation would leave besides the gradient (batch norm statistics, logged values, metrics, counters on
    the module) is thrown away, and w comes back by copying.

    With manual optimization the module passes a closure to ``optimizer.step``. Hooks around ``backward`` run in both
    evaluations, since they may change the gradient.

    Costs two gradients a step, a copy of the trained weights and of the step's batches.

    Args:
        rho: ρ, the length of the perturbation, or a function of (global step, learning rate). By default .05, for ASAM
            .5. Unnormalized SAM has no default, since its ρ has the unit of a learning rate.
        variant: ``"sam"``; ``"asam"`` scales the perturbation by the weights (arXiv 2102.11600); ``"usam"`` does not
            normalize it; ``"gsam"`` also descends along the part of the gradient at w that does not change L(w + e)
            (arXiv 2203.08065).
        perturbation: On several processes, whether each perturbs by the gradient of its own batch, or all by the mean.
        m: Perturb m samples at a time, each by their own gradient, and average (m-SAM), where the loss is a mean over
            samples. Costs about 2.3 gradients.
        every_k: Compute a second gradient every k-th step only (LookSAM, arXiv 2203.02714).
        look_alpha: α of LookSAM.
        gsam_alpha: α of GSAM.
        same_noise: Whether both evaluations draw the same random numbers.
        device: The device, where the strategy is not given to a Trainer that chooses one.
    """

    strategy_name = "sam"


class DDPSAMStrategy(SAMMixin, DDPStrategy):
    """Sharpness-aware minimization on several processes: ``Trainer(strategy="ddp_sam")``.

    By default every process perturbs by the gradient of its own batch, and the gradients at the perturbed weights are
    averaged: then what is minimized depends on the batch *per process*. ``perturbation="global"`` perturbs all by the
    mean gradient: then N processes with batches of b train as one with N·b does. See :class:`SAMStrategy` for the
    options, besides those of ``DDPStrategy``.
    """

    strategy_name = "ddp_sam"


class SamplingOrderStrategy(SamplingOrderMixin, OneDeviceStrategy):
    """Draw training batches in another order, on one device: ``Trainer(strategy="with_replacement")``.

    Args:
        order: ``"random_reshuffling"``, ``"single_shuffle"``, ``"incremental"``, ``"with_replacement"`` or
            ``"independent_batches"``.
        order_seed: Seed of the order; None for that of ``seed_everything``, 0 without one.
        device: The device, where the strategy is not given to a Trainer that chooses one.
    """

    strategy_name = "sampling_order"


class DDPSamplingOrderStrategy(SamplingOrderMixin, DDPStrategy):
    """Draw training batches in another order, on several processes: ``Trainer(strategy="ddp_with_replacement")``.

    The processes share one order, the same as on one process. See :class:`SamplingOrderStrategy` for the options,
    besides those of ``DDPStrategy``.
    """

    strategy_name = "ddp_sampling_order"


class NoisyDescentStrategy(NoisyDescentMixin, OneDeviceStrategy):
    """Gradient descent on all batches at once, with noise like that of SGD: ``Trainer(strategy="noisy_descent")``.

    Args:
        noise: ``"anisotropic"`` noise has the covariance of the batch gradients, ``"diagonal"`` its diagonal,
            ``"isotropic"`` its trace.
        noise_seed: Seed of the noise; None for that of ``seed_everything``, 0 without one.
        device: The device, where the strategy is not given to a Trainer that chooses one.
    """

    strategy_name = "noisy_descent"


class DDPNoisyDescentStrategy(NoisyDescentMixin, DDPStrategy):
    """The same on several processes: ``Trainer(strategy="ddp_noisy_descent")``; see :class:`NoisyDescentStrategy`."""

    strategy_name = "ddp_noisy_descent"
