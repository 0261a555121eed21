"""SGD with momentum on a quadratic, exactly: what the underdamped Langevin equation says for steps of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeavyBall:
    """Heavy-ball SGD in one eigenmode of a quadratic loss, driven by the noise of its mini-batches.

    With curvature h (the eigenvalue, plus coupled weight decay), learning rate η, momentum β and gradient noise ξ,

        p ← β·p - h·q - ξ,    q ← q + η·p.

    q is the position along the eigenvector, from the minimum, and p = (qₜ - qₜ₋₁)/η the velocity per unit of time ηt.
    PyTorch's buffer is -p. Dampening and Nesterov momentum are other updates.

    Every method takes a tensor of curvatures and gives float64 on the CPU, in the variance R₀ of ξ of a single step as
    unit. What is stationary exists for 0 < ηh < 2(1 + β); outside of this range it is NaN, at h = 0 its limit.

    Everything follows from one sequence, the step response Uₙ = Σ_{j<n} uⱼ, where uₙ = (1 + β - ηh)·uₙ₋₁ - β·uₙ₋₂ and
    u₀ = 1, u₋₁ = 0. With D = 2(1 + β) - ηh the mean-square displacement of q under white noise is

        M(t) = 2η²R₀/((1 - β)D) · (Uₜ + β·Uₜ₋₁),

    and Var q = M(∞)/2, Var p = M(1)/η², Cov(q, p) = M(1)/2η, ⟨qₜpₜ₊₁ - pₜqₜ₊₁⟩ = -M(2)/2η.

    Random reshuffling draws each of the k batches of an epoch once. Averaged over the position in the epoch, its noise
    has the autocorrelation ρ(j) = -(1 - j/k)/(k - 1) at lags 1 ≤ j < k, and 1 + 2·Σρ = 0. That replaces M(t) by
    Mᵣ(t) = 2·(Cᵣ(0) - Cᵣ(t)) with Cᵣ(t) = -½·(M(t) + Σⱼ ρ(j)·(M(t + j) + M(t - j))), in which only second sums of M
    occur. The four relations hold for Mᵣ as well; the first is Var q = Cᵣ(0) = Σⱼ (1 - j/k)·M(j)/(k - 1).

    Source: Kunin et al., arXiv 2107.09133, for the Langevin equation, the limit η → 0 of white noise, and for sign and
    unit of the velocity. The rest is derived, and checked by simulation in the tests.

    Attributes:
        lr: η > 0.
        momentum: β, 0 ≤ β < 1.
        order: How batches are drawn: ``"with_replacement"`` (noise that is white; also batches that are drawn
            independently of each other) or ``"reshuffled"`` (a new permutation every epoch).
        batches: k ≥ 2, batches of equal size in an epoch; needed if ``order`` is ``"reshuffled"``.

    Raises:
        ValueError: If one of them is out of range.
    """

    lr: float
    momentum: float = 0.0
    order: Literal["with_replacement", "reshuffled"] = "with_replacement"
    batches: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, got {self.lr!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {self.momentum!r}.")
        if self.order not in ("with_replacement", "reshuffled"):
            raise ValueError(f"`order` must be 'with_replacement' or 'reshuffled', got {self.order!r}.")
        if self.order == "reshuffled" and (self.batches is None or self.batches < 2):
            raise ValueError(f"`order='reshuffled'` needs at least two `batches` in an epoch, got {self.batches!r}.")

    @property
    def edge(self) -> float:
        """2(1 + β)/η, the curvature beyond which the mode is unstable."""
        return 2 * (1 + self.momentum) / self.lr

    def is_stable(self, h: Tensor | float) -> Tensor:
        """Whether 0 ≤ h < 2(1 + β)/η."""
        x = self._step(h)
        return (x >= 0) & (x < 2 * (1 + self.momentum))

    def is_underdamped(self, h: Tensor | float) -> Tensor:
        """Whether the mode oscillates: (1 - √β)² < ηh < (1 + √β)²."""
        return rotation(self._step(h), self.momentum)[2] < 0

    def frequency(self, h: Tensor | float) -> Tensor:
        """Angle φ by which the mode turns in a step, in radians: cos φ = (1 + β - ηh)/(2√β).

        0 where it is overdamped, π where it changes sign at every step (ηh > (1 + √β)²). φ/η is the frequency per unit
        of time, which :meth:`langevin_frequency` approximates.
        """
        return rotation(self._step(h), self.momentum)[0]

    def radius(self, h: Tensor | float) -> Tensor:
        """Factor by which the slowest part of a displacement shrinks in a step: √β where it oscillates."""
        return rotation(self._step(h), self.momentum)[1]

    def langevin_frequency(self, h: Tensor | float) -> Tensor:
        """√(ω² - γ²), radians per unit of time ηt, with ω² = 2h/(η(1 + β)) and γ = (1 - β)/(η(1 + β)); 0 if overdamped.

        The limit η → 0 of φ/η.
        """
        scale = self.lr * (1 + self.momentum)
        square = 2 * _tensor(h) / scale - ((1 - self.momentum) / scale) ** 2
        return square.clamp(min=0).sqrt()

    def msd(self, h: Tensor | float, lags: Tensor | Sequence[int]) -> Tensor:
        """Mean-square displacement E(qₛ₊ₜ - qₛ)² of a stationary mode, averaged over s.

        h = 0 is a free direction. Under white noise it diffuses, M(t) → η²R₀t/(1 - β)², after it has moved
        ballistically for 1/(1 - β) steps. Under reshuffling it stays bounded.

        Relative errors grow in proportion to the lag, to some 1e-10 at t = 10⁶, and under reshuffling with k, to 1e-9
        at k = 10⁵ (1e-7 with β = 0.999).

        Args:
            h: Curvatures, of any shape. NaN for h < 0 and beyond the edge.
            lags: Steps t ≥ 0, integers, shape ``(m,)``.

        Returns:
            Shape ``(*h.shape, m)``.

        Raises:
            ValueError: If a lag is negative.
            TypeError: If lags are not integers.
        """
        t = torch.as_tensor(lags)
        if t.numel() and (t.is_floating_point() or t.is_complex()):
            raise TypeError(f"`lags` must be integers, got {t.dtype}.")
        t = t.reshape(-1).to("cpu", torch.int64)
        if bool((t < 0).any()):
            raise ValueError("`lags` must not be negative.")
        x = self._step(h)
        scale = torch.where(self.is_stable(h), self._scale(x), math.nan)
        found = self._white(x, t) if self.order == "with_replacement" else self._reshuffled(x, t)
        return scale[..., None] * found

    def covariance(self, h: Tensor | float) -> Tensor:
        """Covariance of (q, p), shape ``(*h.shape, 2, 2)``.

        White noise gives Var q = ηR₀(1 + β)/(h(1 - β)D), infinite at h = 0, and Var p = 2R₀/((1 - β)D). Under
        reshuffling directions of low curvature vary less: Var q → η²R₀(k + 1)/(6(1 - β)²) for kηh, 1/k ≪ 1 - β.
        """
        step = self.msd(h, [1])[..., 0]
        cross = step / (2 * self.lr)
        rows = [torch.stack([self._variance(h), cross], dim=-1), torch.stack([cross, step / self.lr**2], dim=-1)]
        return torch.stack(rows, dim=-2)

    def equipartition(self, h: Tensor | float) -> Tensor:
        """Var p/Var q: 2h/(η(1 + β)) = ω² at any η under white noise, more under reshuffling."""
        return self.msd(h, [1])[..., 0] / (self.lr**2 * self._variance(h))

    def current(self, h: Tensor | float) -> Tensor:
        """Probability current ⟨qₜpₜ₊₁ - pₜqₜ₊₁⟩: -ηR₀/(1 - β) at any h under white noise.

        It is -M(2)/2η and thus negative for whatever q: the plane of q and p turns clockwise since p is the change of
        q. Only its size tells something.
        """
        return -self.msd(h, [2])[..., 0] / (2 * self.lr)

    def relative_current(self, h: Tensor | float) -> Tensor:
        """The current divided by √(Var q · Var p): about -2φ where damping is weak."""
        return self.current(h) / (self._variance(h) * self.msd(h, [1])[..., 0]).sqrt() * self.lr

    def regression(self, h: Tensor | float) -> Tensor:
        """Coefficients (h', β') of the best linear prediction pₜ₊₁ ≈ β'·pₜ - h'·qₜ, shape ``(*h.shape, 2)``.

        They are h and β under white noise. Noise of reshuffling remembers, and a fit takes a part of it for dynamics.
        """
        first, second = self.msd(h, [1, 2]).unbind(-1)
        position = self._variance(h)
        velocity, cross = first / self.lr**2, first / (2 * self.lr)
        with_q, with_p = -cross, (second / 2 - first) / self.lr**2
        # divided by Var q, which may be infinite
        determinant = velocity - cross * (cross / position)
        curvature = (with_p * (cross / position) - with_q * (velocity / position)) / determinant
        momentum = (with_p - with_q * (cross / position)) / determinant
        return torch.stack([curvature, momentum], dim=-1)

    def spectral_density(self, h: Tensor | float, angles: Tensor) -> Tensor:
        """Spectral density Σₜ C(t)·e^{iωt} of q at ω in (0, π] radians per step, shape ``(*h.shape, m)``."""
        x, omega = self._step(h)[..., None], angles.detach().to("cpu", torch.float64)
        turn = torch.exp(-1j * omega)
        response = (1 - turn) * (1 - self.momentum * turn) + x * turn
        noise = torch.ones_like(omega)
        if self.order == "reshuffled":
            k = self._batches
            noise = (k - ((k * omega / 2).sin() / (omega / 2).sin()).square() / k) / (k - 1)
        return torch.where(self.is_stable(h)[..., None], self.lr**2 * noise / response.abs().square(), math.nan)

    @property
    def _batches(self) -> int:
        assert self.batches is not None
        return self.batches

    def _step(self, h: Tensor | float) -> Tensor:
        return self.lr * _tensor(h)

    def _scale(self, x: Tensor) -> Tensor:
        return 2 * self.lr**2 / ((1 - self.momentum) * (2 * (1 + self.momentum) - x))

    def _variance(self, h: Tensor | float) -> Tensor:
        """Var q."""
        x = self._step(h)
        if self.order == "with_replacement":
            found = (1 + self.momentum) / (2 * x.clamp(min=0))
        else:
            k = self._batches
            found = _sums(x, self.momentum, torch.tensor([k]))[..., 0, 4] / (k * (k - 1))
        return torch.where(self.is_stable(h), self._scale(x) * found, math.nan)

    def _white(self, x: Tensor, t: Tensor) -> Tensor:
        """M(t), in units of :meth:`_scale`."""
        u, d, response = _sums(x, self.momentum, t)[..., :3].unbind(-1)
        return response + self.momentum * (response - u + d)

    def _reshuffled(self, x: Tensor, t: Tensor) -> Tensor:
        """Mᵣ(t), in units of :meth:`_scale`.

        With S the second sum of M, Σ_{|j|<k} (k - |j|)·M(t + j) = S(t + k) - 2·S(t) + S(t - k). From lag k on the noise
        no longer reaches across, and Cᵣ obeys the recurrence of u.
        """
        k, beta = self._batches, self.momentum
        within = torch.cat([torch.tensor([k, k - 2, k - 1]), t.clamp(max=k - 1)])
        after, before, here = (_sums(x, beta, n)[..., 4] for n in (k + within, k - within, within))
        whole = here[..., :1]
        found = (k * self._white(x, within) + (2 * whole + 2 * here - after - before) / k) / (k - 1)
        variance = whole / (k * (k - 1))
        last = variance - found[..., 1:3] / 2
        u, d = _sums(x, beta, (t - k + 1).clamp(min=0))[..., :2].unbind(-1)
        beyond = 2 * (variance - u * last[..., 1:] + beta * (u - d) * last[..., :1])
        return torch.where(t < k, found[..., 3:], beyond)


def rotation(step: Tensor, momentum: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """What the roots of z² - (1 + β - ηh)·z + β say, with ``step`` ηh: angle, modulus of the largest, discriminant."""
    beta = torch.as_tensor(momentum, dtype=torch.float64)
    trace, discriminant = 1 + beta - step, (1 - beta - step).square() - 4 * beta * step
    angle = torch.atan2((-discriminant).clamp(min=0).sqrt(), trace)
    real = (trace.abs() + discriminant.clamp(min=0).sqrt()) / 2
    return angle, torch.where(discriminant < 0, beta.clamp(min=0).sqrt(), real), discriminant


def ornstein_uhlenbeck_displacement(
    dynamics: HeavyBall,
    eigenvalues: Tensor,
    weights: Tensor,
    squared_step: float,
    lags: Tensor | Sequence[int],
    weight_decay: float = 0.0,
) -> Tensor:
    """Squared displacement ‖Δₜ‖² of weights that move in a quadratic bowl with the measured Hessian, and nothing else.

    A null for anomalous diffusion. The gradient noise is assumed to be proportional to the Hessian, its variance to the
    modulus of λ along each eigenvector, and every mode to be stationary; a direction of λ + wd < 0 counts as free, h =
    0. The measured mean squared step, which is the curve at lag 1, fixes the amplitude: no parameter is left to fit.

    Source: own; noise proportional to the Hessian after Kunin et al., arXiv 2107.09133.

    Args:
        dynamics: The optimizer.
        eigenvalues: Eigenvalues λ, or nodes of a spectral density, shape ``(n,)``.
        weights: How many eigenvalues, or what share of them, each stands for, shape ``(n,)``; their scale cancels.
        squared_step: Mean of ‖θₜ₊₁ - θₜ‖² per step.
        lags: Steps t ≥ 0, shape ``(m,)``.
        weight_decay: Coupled weight decay wd.

    Returns:
        E‖θₛ₊ₜ - θₛ‖², shape ``(m,)``, averaged over s. Under reshuffling, displacements from the start of an epoch
        differ from this mean.

    Raises:
        ValueError: If an eigenvalue is unstable, λ + wd ≥ 2(1 + β)/η, or no direction has noise.
    """
    values, shares = _tensor(eigenvalues), _tensor(weights)
    noise = shares * values.abs()
    kept = noise != 0
    if not bool(noise.isfinite().all()):
        raise ValueError("Every eigenvalue and weight must be finite.")
    if not bool(kept.any()):
        raise ValueError("No eigenvalue differs from zero: there is no noise to move the weights.")
    h = (values[kept] + weight_decay).clamp(min=0)
    if not bool(dynamics.is_stable(h).all()):
        raise ValueError(
            f"An eigenvalue of {float(h.max()):.4g} lies beyond the edge of stability, {dynamics.edge:.4g}: "
            "such a mode is not stationary."
        )
    curve = noise[kept] @ dynamics.msd(h, lags)
    return squared_step * curve / (noise[kept] @ dynamics.msd(h, [1]))


def _tensor(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach().cpu()


def _sums(x: Tensor, momentum: float, n: Tensor) -> Tensor:
    """(uₙ, uₙ - uₙ₋₁, Uₙ, Σ_{j<n} mⱼ, Σ_{j<n} (n - j)·mⱼ) with mⱼ = Uⱼ + β·Uⱼ₋₁, shape ``(*x.shape, *n.shape, 5)``.

    By repeated squaring of the matrix that makes one step: no division by ηh, which may vanish, and none by the
    difference of the eigenvalues, which does where the mode is critically damped.
    """
    step = torch.zeros(*x.shape, 5, 5, dtype=torch.float64)
    step[..., 0, 0], step[..., 0, 1] = 1 - x, momentum
    step[..., 1, 0], step[..., 1, 1] = -x, momentum
    step[..., 2, 0] = step[..., 2, 2] = 1
    increment = torch.tensor([-momentum, momentum, 1 + momentum, 0, 0], dtype=torch.float64)
    step[..., 3, :], step[..., 4, :] = increment, increment
    step[..., 3, 3] = step[..., 4, 3] = step[..., 4, 4] = 1
    state = torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64).expand(*x.shape, *n.shape, 5)
    for bit in range(int(n.max()).bit_length() if n.numel() else 0):
        moved = state @ step.mT
        state = torch.where((n >> bit & 1).bool()[:, None], moved, state)
        step = step @ step
    return state
