"""Anomalous diffusion: by which power of time a trajectory leaves a point, and what only looks like such a power."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PER_DECADE = 20
_MOST_POINTS = 61  # that a fit is made on, however long its window
_FEWEST_SNAPSHOTS = 17
_DRAWS = 600  # simulated trajectories behind an error
_DIRECTIONS = 24  # that are simulated; more of them only scale the fluctuations down
_ROUNDING = 1e-6  # of an exponent or a logarithm
_STEADY = 1e-8  # relative squared change of increments that may be rounding
_SATURATED = 0.2  # local exponent below which a curve counts as flat

Curve = Callable[[Tensor], Tensor]
"""Squared displacement at given lags, elementwise: shape ``(k,)`` to shape ``(k,)``, float64."""


class UndefinedExponentError(ValueError):
    """The data do not determine an exponent; the message says why."""


@dataclass(frozen=True)
class PowerLaw:
    """The line ‖Δ_t‖² ≈ a·tᶜ through log ‖Δ‖² over log t, see :func:`power_law`.

    Attributes:
        exponent: c: 2 for a straight line at constant speed, 1 for a random walk, 0 where the displacement stays.
        error: Half the distance from c to the farther end of ``interval``, so that ± 2 errors contain it; NaN where
            there is no interval.
        interval: 95 % confidence interval (low, high) of c; 0 and 2 are the ends of what motions with stationary
            increments can have.
        r_squared: Share of the variance of log ‖Δ‖² that the line explains; NaN where ‖Δ‖² is constant.
        prefactor: a.
        start: First lag of the window, in steps.
        stop: Last lag.
        residual: Root mean square of the residuals of ln ‖Δ‖².
        residual_limit: What it exceeds by chance once in 20 times; the largest for any motion behind the interval.
        dimension: Effective dimension of the increments, (tr C)²/tr C² of their covariance C.
        remarks: What should be known before the exponent is believed.
    """

    exponent: float
    error: float
    interval: tuple[float, float]
    r_squared: float
    prefactor: float
    start: float
    stop: float
    residual: float
    residual_limit: float
    dimension: float
    remarks: tuple[str, ...]

    def curve(self, lags: Tensor) -> Tensor:
        """a·tᶜ."""
        return self.prefactor * lags.double() ** self.exponent


@dataclass(frozen=True)
class DriftDiffusion:
    """The curve ‖Δ_t‖² ≈ D t + v² t², see :func:`drift_diffusion`.

    Attributes:
        diffusion: D ≥ 0, squared length per step.
        drift: v² ≥ 0, squared length per squared step.
        exponent: Its apparent exponent over the window.
        r_squared: Share of the variance of log ‖Δ‖² that it explains, on the points of :func:`power_law`.
    """

    diffusion: float
    drift: float
    exponent: float
    r_squared: float

    def curve(self, lags: Tensor) -> Tensor:
        """D t + v² t²."""
        t = lags.double()
        return self.diffusion * t + self.drift * t**2


@dataclass(frozen=True)
class NullComparison:
    """A power law beside another curve for the same data, see :func:`compare`.

    Attributes:
        exponent: Apparent exponent of the curve.
        amplitude: Measured over predicted squared displacement, their geometric mean over the window.
        r_squared: Share of the variance of log ‖Δ‖² that the curve explains as it is; negative where the mean would
            explain more.
        deviation: Measured minus apparent exponent, in errors of the measured one.
        residual: Root mean square of ln ‖Δ‖² against the curve, apart from amplitude and exponent: by how much its
            *shape* is wrong.
        power_law_residual: The same for the power law.
        residual_limit: What either may be by chance, see :class:`PowerLaw`.
    """

    exponent: float
    amplitude: float
    r_squared: float
    deviation: float
    residual: float
    power_law_residual: float
    residual_limit: float

    @property
    def null_is_excluded(self) -> bool:
        """Whether the exponent is off by more than two errors, or the shape by more than chance."""
        return abs(self.deviation) > 2 or self.residual > self.residual_limit

    @property
    def power_law_is_excluded(self) -> bool:
        """Whether the power law's shape is off by more than chance."""
        return self.power_law_residual > self.residual_limit


@dataclass(frozen=True)
class TwoTime:
    """Δ(t_w, t_w + t) = ‖x(t_w + t) - x(t_w)‖², see :func:`two_time`.

    Attributes:
        waits: Waiting times t_w at which there is a snapshot, shape ``(K,)``, float64, increasing.
        lags: Lags t, shape ``(L,)``, int64.
        squares: Δ, the sum over coordinates, shape ``(K, L)``; NaN where no snapshots enclose the time. Divide by the
            number of coordinates for their mean.
    """

    waits: Tensor
    lags: Tensor
    squares: Tensor


@dataclass(frozen=True)
class AgingExponent:
    """μ of the collapse Δ(t_w, t_w + t) = f(t/t_w^μ), see :func:`aging_exponent`.

    Attributes:
        exponent: μ: 0 where nothing depends on the waiting time, 1 for full aging.
        error: Its standard error; NaN without a dimension.
        residual: Root mean square of ln Δ around the common curve.
        remarks: What should be known before μ is believed.
    """

    exponent: float
    error: float
    residual: float
    remarks: tuple[str, ...]


def log_spaced(start: int, stop: int, per_decade: int = _PER_DECADE) -> Tensor:
    """Increasing integers from ``start`` to ``stop``, both among them, about as many in every decade; int64.

    Raises:
        ValueError: Unless 1 ≤ start ≤ stop and ``per_decade`` ≥ 1.
    """
    if not 1 <= start <= stop or per_decade < 1:
        raise ValueError(f"1 ≤ start ≤ stop and per_decade ≥ 1 are needed, got {start}, {stop} and {per_decade}.")
    count = math.ceil(per_decade * math.log10(stop / start)) + 1
    steps = torch.logspace(math.log10(start), math.log10(stop), count, dtype=torch.float64).round().long()
    distinct: Tensor = torch.unique(steps)
    return distinct


def resample(lags: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """A positive curve at other points, by straight lines in log-log; exact for powers. NaN outside of ``lags``.

    Args:
        lags: Increasing, shape ``(n,)`` with n ≥ 2.
        values: Shape ``(n,)``.
        points: Shape ``(k,)``.

    Returns:
        Shape ``(k,)``, float64; zero or NaN beside values that are not positive.
    """
    x, y, at = lags.double().log(), values.double().log(), points.double().log()
    right = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    inside = (share > -1e-9) & (share < 1 + 1e-9)  # the ends survive rounding
    return torch.where(inside, torch.lerp(y[right - 1], y[right], share), math.nan).exp()


def power_law(
    lags: Tensor,
    squares: Tensor,
    start: float,
    stop: float,
    *,
    positions: Tensor | None = None,
    projected_from: int | None = None,
    generator: torch.Generator | None = None,
) -> PowerLaw:
    """Fit ‖Δ_t‖² = a·tᶜ over the window [start, stop], by least squares in log-log on log-spaced points.

    One trajectory is one realization: its points are strongly correlated, and their spread around the line says little
    about c. The error is that of random motions of as many effective dimensions as the increments of ``positions``
    have: fractional Brownian motions, whose ‖Δ‖² obeys a power law, and drift with diffusion. The interval spans the
    (apparent) exponents of those for which the exponent found lies within the central 95 % of simulated fits.

    Coverage of ± 2 errors over one decade with 257 snapshots, from 100 to 200 simulations each: 0.92 to 0.99 for
    Brownian motion in 1, 2, 10 and 1000 dimensions and of spectrum 1/i, for fractional Brownian motion of c = 0.5 and
    1.5, for drift of any strength, and in a bowl (stationary Ornstein-Uhlenbeck, against the exponent of the expected
    curve) from diffusion to saturation, also of relaxation rates over four decades. ``interval`` covers as often except
    near c = 0 (0.87). In one or two dimensions it is most of [0, 2]: one trajectory determines nothing. Where steps
    grow along the window, the error is too small or there is none.

    Source: definition F2; the interval is derived.

    Args:
        lags: Steps since the reference, increasing, at least 1, shape ``(n,)``.
        squares: ‖Δ‖² at these, shape ``(n,)``.
        start: First lag of the window, within ``lags``.
        stop: Last lag.
        positions: At evenly spaced times from the reference on to about ``stop``, shape ``(k, m)``. Without them, there
            is no error.
        projected_from: See :func:`effective_dimension`.
        generator: CPU generator of the simulation, a fresh one of seed 0 by default.

    Raises:
        UndefinedExponentError: If the window reaches beyond the lags or has fewer than three, or the displacement is
            zero or not finite in it.
        ValueError: If ``lags``, ``squares`` or the window are malformed.
    """
    x, y = _window(lags, squares, start, stop)
    slope_of = _slope_weights(x)
    exponent = float(slope_of @ y)
    intercept = float(y.mean()) - exponent * float(x.mean())
    residuals = y - intercept - exponent * x
    residual = float(residuals.square().mean().sqrt())
    remarks = []
    third = -(-len(x) // 3)
    late = float(_slope_weights(x[-third:]) @ y[-third:])
    if late < _SATURATED:
        remarks.append(f"saturated: the local exponent is {late:.2f} at the end of the window")
    if stop / start < 10 * (1 - 1e-9):
        remarks.append(f"the window spans {math.log10(stop / start):.2f} decades only")
    interval, limit, dimension = (math.nan, math.nan), math.nan, math.nan
    if positions is None or len(positions) < _FEWEST_SNAPSHOTS:
        remarks.append(f"no error: fewer than {_FEWEST_SNAPSHOTS} snapshots")
    else:
        dimension = effective_dimension(positions, projected_from)
        interval, limit = _interval(x, exponent, dimension, generator)
        if math.isnan(interval[0]):
            remarks.append("no error: above 2, steps grow along the window, which no stationary random motion does")
        elif interval[1] - interval[0] > 1:
            remarks.append(f"motion in {dimension:.1f} effective dimensions: one trajectory says little")
        if residual > limit:
            remarks.append("not a power law: the curve bends by more than chance")
    error = max(interval[1] - exponent, exponent - interval[0]) / 2
    return PowerLaw(
        exponent,
        error,
        interval,
        _r_squared(y, residuals),
        math.exp(intercept),
        start,
        stop,
        residual,
        limit,
        dimension,
        tuple(remarks),
    )


def effective_dimension(positions: Tensor, projected_from: int | None = None) -> float:
    """(tr C)²/tr C² of the covariance C of increments: in how many directions a trajectory fluctuates evenly.

    From products of different increments, whose squares have the mean tr C²; unlike the sample covariance's own
    spectrum they need not outnumber the dimensions. Neighbouring increments are subtracted from each other, which
    removes drift and correlation in time. Taken at strides 1, 2, 4 and 8, as long as 32 increments remain; the smallest
    counts. A random projection from p to m dimensions adds 1/m - 1/p to 1/dimension, as far as the motion is spread
    evenly over the p, which is taken off.

    Source: derived.

    Args:
        positions: At evenly spaced times, shape ``(n, m)``, n ≥ 17.
        projected_from: p, if they are projected at random; then at most about 8 m dimensions can be told. None if they
            are not.

    Returns:
        The dimension, at least 1; infinite where all increments are equal.

    Raises:
        ValueError: If there are too few positions.
    """
    if positions.dim() != 2 or len(positions) < _FEWEST_SNAPSHOTS:
        raise ValueError(
            f"`positions` must have shape (n, m) with n ≥ {_FEWEST_SNAPSHOTS}, got {tuple(positions.shape)}."
        )
    found = []
    m = positions.shape[1]
    for stride in (1, 2, 4, 8):
        increments = positions[::stride].cpu().double().diff(dim=0)
        size = len(increments)
        if stride > 1 and size < 32:
            break
        changes = increments.diff(dim=0)
        gram = changes @ changes.mT
        apart = torch.ones_like(gram, dtype=torch.bool).triu(3)
        norms = gram.diagonal()
        products = float((norms[:, None] * norms)[apart].mean())
        if products <= (_STEADY * float(increments.square().sum()) / size) ** 2:
            return math.inf
        inverse = float(gram[apart].square().mean()) / products
        if projected_from is not None and projected_from > m:
            added = 1 / m - 1 / projected_from
            inverse = (inverse - added) / (1 + added - 2 * added * inverse)
            inverse = max(inverse, 4 / (m * size), 1 / projected_from)
        found.append(max(1.0, 1 / inverse))
    return min(found)


def local_exponents(lags: Tensor, squares: Tensor, width: float = 0.5) -> tuple[Tensor, Tensor]:
    """The sliding exponent d log ‖Δ‖²/d log t, by least squares over ``width`` decades around each lag.

    Returns:
        Lags (geometric middles of the windows) and exponents, both of shape ``(k,)``, float64; NaN where the
        displacement is zero nearby, empty where the lags span less than the width.

    Raises:
        ValueError: If ``lags`` and ``squares`` are malformed, or the width not positive.
    """
    _check(lags, squares)
    if not 0 < width < math.inf:
        raise ValueError(f"`width` must be positive, got {width!r}.")
    first, last = math.log(lags[0]), math.log(lags[-1])
    count = max(2, round(_PER_DECADE * width))
    step = width * math.log(10) / count
    x = first + step * torch.arange(int((last - first) / step + 1e-9) + 1, dtype=torch.float64)
    if len(x) <= count:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    y = resample(lags, squares, x.exp()).log()
    y = torch.where(y.isfinite(), y, math.nan)
    return x.unfold(0, count + 1, 1).mean(1).exp(), y.unfold(0, count + 1, 1) @ _slope_weights(x[: count + 1])


def drift_diffusion(lags: Tensor, squares: Tensor, start: float, stop: float) -> DriftDiffusion:
    """Fit ‖Δ_t‖² = D t + v² t² with D, v² ≥ 0: constant drift and a random walk, which imitate any 1 ≤ c ≤ 2.

    By least squares of log ‖Δ‖² on the points of :func:`power_law`, with as many constants. Over one decade that ends
    where v² t = D, its apparent exponent is 1.25, and a power law explains R² = .998 of it.

    Raises:
        UndefinedExponentError: As :func:`power_law`.
        ValueError: As :func:`power_law`.
    """
    x, y = _window(lags, squares, start, stop)
    u = torch.linspace(-25, 25, 501, dtype=torch.float64)  # logit of the drift's share in the middle of the window
    u[0], u[-1] = -math.inf, math.inf
    while True:
        linear, square = (torch.sigmoid(-u)[:, None], torch.sigmoid(u)[:, None] * (-x.mean()).exp())
        shapes = x + (linear + square * x.exp()).log()
        distances = (y - shapes).var(dim=1, correction=0)
        best = int(distances.argmin())
        if not 0 < best < len(u) - 1 or float(u[best + 1] - u[best - 1]) < 1e-9:
            break
        low, high = u[[best - 1, best + 1]].clamp(-25, 25).tolist()
        u = torch.linspace(low, high, 101, dtype=torch.float64)
    scale = math.exp(float((y - shapes[best]).mean()))
    diffusion, drift = scale * float(linear[best]), scale * float(square[best])
    return DriftDiffusion(
        diffusion, drift, float(_slope_weights(x) @ shapes[best]), _r_squared(y, y - shapes[best] - math.log(scale))
    )


def apparent_exponent(curve: Curve, start: float, stop: float) -> float:
    """The exponent that :func:`power_law` gives for a predicted curve.

    Raises:
        UndefinedExponentError: If the curve is not positive and finite in the window.
        ValueError: If the window is malformed.
    """
    x = _points(start, stop)
    return float(_slope_weights(x) @ _logs(curve(x.exp())))


def compare(law: PowerLaw, curve: Curve | Tensor, lags: Tensor, squares: Tensor) -> NullComparison:
    """Whether data that a power law was fitted to could come from a curve predicted by something else.

    ln ‖Δ‖² minus the curve's logarithm is split into amplitude, difference in exponent, and the rest, the difference
    in shape; each is set against what chance would do. A true null is called excluded in 1 to 11 % of the simulations
    that :func:`power_law` names, in 16 % with relaxation rates over four decades.

    Args:
        law: The power law that was fitted.
        curve: What the null predicts, such as :meth:`DriftDiffusion.curve`; or its values at ``lags``, shape ``(n,)``.
        lags: As for :func:`power_law`.
        squares: As for :func:`power_law`.

    Raises:
        UndefinedExponentError: If the curve is not positive and finite in the window.
    """
    x, y = _window(lags, squares, law.start, law.stop)
    predicted = _logs(resample(lags, curve, x.exp()) if isinstance(curve, Tensor) else curve(x.exp()))
    difference = y - predicted
    slope_of = _slope_weights(x)
    slope, mean = float(slope_of @ difference), float(difference.mean())
    rest = difference - mean - slope * (x - x.mean())
    return NullComparison(
        exponent=float(slope_of @ predicted),
        amplitude=math.exp(mean),
        r_squared=_r_squared(y, difference),
        deviation=slope / max(law.error, _ROUNDING),
        residual=float(rest.square().mean().sqrt()),
        power_law_residual=law.residual,
        residual_limit=law.residual_limit,
    )


def two_time(times: Tensor, positions: Tensor, waits: Tensor, per_decade: int = 10) -> TwoTime:
    """Squared displacement after waiting times, from snapshots at arbitrary times.

    Source: definition G6.

    Args:
        times: Steps since the event that ages are counted from, increasing integers, shape ``(n,)``.
        positions: Shape ``(n, m)``.
        waits: Waiting times, shape ``(K,)``; each is moved to the nearest snapshot, those that meet count once.
        per_decade: Lags per decade. Between snapshots the curve is interpolated in log-log.

    Raises:
        ValueError: If fewer than three snapshots are given, or a waiting time lies outside of them.
    """
    t, x = times.double().cpu(), positions.double().cpu()
    if len(t) < 3 or t.shape != x.shape[:1] or bool((t.diff() <= 0).any()):
        raise ValueError(f"At least three snapshots at increasing times are needed, got shape {tuple(x.shape)}.")
    wanted = torch.as_tensor(waits).double().cpu()
    if not len(wanted) or bool(((wanted < t[0]) | (wanted > t[-1])).any()):
        raise ValueError(f"`waits` must lie between {float(t[0]):g} and {float(t[-1]):g}, got {wanted.tolist()}.")
    rows = torch.unique((wanted[:, None] - t).abs().argmin(dim=1))
    lags = log_spaced(max(1, math.ceil(float(t.diff().min()))), int(t[-1] - t[0]), per_decade)
    squares = torch.full((len(rows), len(lags)), math.nan, dtype=torch.float64)
    for k, row in enumerate(rows.tolist()):
        if row + 2 < len(t):
            squares[k] = resample(t[row + 1 :] - t[row], (x[row + 1 :] - x[row]).square().sum(1), lags)
    return TwoTime(t[rows], lags, squares)


def aging_exponent(
    curves: TwoTime, dimension: float = math.nan, generator: torch.Generator | None = None
) -> AgingExponent:
    """μ ∈ [-1, 2] for which the curves Δ(t_w, t_w + t) collapse best as a function of t/t_w^μ.

    ln Δ is fitted, by least squares over all waiting times and lags, by a parabola in ln t - μ ln t_w. Any dependence
    on t_w is taken for a shift in time: for a power law, an amplitude that decays as t_w^(-cμ), as it does where the
    learning rate decays, looks the same as aging.

    The error is the spread of μ over simulated fractional Brownian motions of the fitted exponent in ``dimension``
    directions whose clock slows down as t^(-μ). Coverage of ± 2 errors, from 50 simulations each: 0.90 to 1 for c = 1
    and 1.5, clocks t, √t and log t, and 1, 2, 10 and 1000 dimensions. The parabola finds 0.99 where μ is 1.

    Source: definition G6; estimator and error are derived.

    Args:
        curves: At two positive waiting times or more.
        dimension: Effective dimension of the motion, :func:`effective_dimension`.
        generator: CPU generator of the simulation, a fresh one of seed 0 by default.

    Raises:
        UndefinedExponentError: With fewer than two waiting times that have five positive values each.
    """
    usable = (curves.squares > 0) & (curves.waits > 0)[:, None]
    usable &= (usable.sum(1) >= 5)[:, None]
    if int(usable.any(1).sum()) < 2:
        raise UndefinedExponentError("Fewer than two positive waiting times have five values.")
    wait = curves.waits[:, None].expand_as(curves.squares)[usable]
    lag = curves.lags.double().expand_as(curves.squares)[usable]
    found, residual, slope = _collapse(wait.log(), lag.log(), curves.squares[usable].log()[None])
    exponent = float(found)
    remarks = []
    if slope < _SATURATED:
        remarks.append(f"saturated: Δ grows as t^{slope:.2f}, so that a shift in time cannot be told")
    if not -1 < exponent < 2:
        remarks.append("no collapse between -1 and 2")
    error = math.nan
    if not math.isnan(dimension):
        mu = min(max(exponent, 0.0), 1.0)
        moments, inverse = torch.unique(torch.cat([wait, wait + lag]), return_inverse=True)
        ticks = moments.log() if mu > 0.999 else moments ** (1 - mu) / (1 - mu)
        root = _root(_kernel(ticks - ticks[0], min(max(slope, 0.02), 2.0)))
        weights, shrink = _directions(dimension)
        normal = torch.randn(len(root), _DRAWS // 4 * len(weights), generator=_seeded(generator), dtype=torch.float64)
        begin, end = (root @ normal).view(len(root), -1, len(weights))[inverse.view(2, -1)]
        logs = ((end - begin).square() @ weights).log().mT
        error = shrink * float(_collapse(wait.log(), lag.log(), logs)[0].std())
    return AgingExponent(exponent, error, residual, tuple(remarks))


def _collapse(wait: Tensor, lag: Tensor, logs: Tensor) -> tuple[Tensor, float, float]:
    """Best μ for each row of ``logs``, and residual and mean slope of the last one."""
    grid = torch.linspace(-1, 2, 121, dtype=torch.float64)
    squares = []
    for mu in grid:
        shifted = lag - mu * wait
        base = torch.linalg.qr(torch.stack([shifted**k for k in range(3)], dim=1)).Q
        squares.append((logs - logs @ base @ base.mT).square().sum(1))
    rows = torch.stack(squares)
    best = rows.argmin(dim=0).clamp(1, len(grid) - 2)
    below, middle, above = (rows.gather(0, (best + k)[None])[0] for k in (-1, 0, 1))
    bend = below - 2 * middle + above
    step = torch.where(bend > 0, (below - above) / (2 * bend), 0.0).clamp(-1, 1)
    exponents = grid[best] + step * (grid[1] - grid[0])
    shifted = lag - exponents[-1] * wait
    return (exponents, float((rows.min(dim=0).values[-1] / len(lag)).sqrt()), float(_slope_weights(shifted) @ logs[-1]))


def _interval(
    x: Tensor, exponent: float, dimension: float, generator: torch.Generator | None
) -> tuple[tuple[float, float], float]:
    """95 % interval, and what the residual exceeds by chance once in 20 times: the largest for any motion in it."""
    if math.isinf(dimension):
        return (exponent, exponent), _ROUNDING
    weights, shrink = _directions(dimension)
    normal = torch.randn(len(x), _DRAWS * len(weights), generator=_seeded(generator), dtype=torch.float64)
    t = (x - x[-1]).exp()
    exponents = torch.linspace(0, 2, 17, dtype=torch.float64).tolist()
    speeds = [0.0, *torch.logspace(-1, 3, 16, dtype=torch.float64).tolist()]
    walk = _root(_kernel(t, 1.0)) @ normal
    families = (
        ((_root(_kernel(t, max(c, 1e-9))) @ normal, t**c) for c in exponents),
        ((walk + speed * t[:, None], t + (speed * t) ** 2) for speed in speeds),
    )
    compatible: list[Tensor] = []
    for family in families:
        table = torch.stack([_fluctuation(x, motion, curve, weights) for motion, curve in family])
        table = torch.cat([table[:, :1], shrink * table[:, 1:]], dim=1)
        if exponent < 0 and not compatible:  # the displacement falls: as wide as for one that stays
            table = torch.cat([table[:1], table])
            table[0, 0] = exponent - 2
        place = torch.linspace(0, len(table) - 1, 20_001, dtype=torch.float64)
        left = place.long().clamp(max=len(table) - 2)
        fine = torch.lerp(table[left], table[left + 1], (place - left)[:, None])
        deviation = exponent - fine[:, 0]
        compatible.append(fine[(fine[:, 1] - _ROUNDING <= deviation) & (deviation <= fine[:, 2] + _ROUNDING)])
    found = torch.cat(compatible)
    if not len(found):
        return (math.nan, math.nan), math.nan
    low, high = float(found[:, 0].min()), float(found[:, 0].max())
    return (min(low, exponent), max(high, exponent)), float(found[:, 3].max())


def _fluctuation(x: Tensor, motion: Tensor, curve: Tensor, weights: Tensor) -> Tensor:
    """Apparent exponent, 2.5 and 97.5 % of what a fit deviates from it by, 95 % of the residual; shape ``(4,)``."""
    logs = (motion.view(len(x), _DRAWS, len(weights)).square() @ weights / curve[:, None]).log()
    slope_of = _slope_weights(x)
    slopes = slope_of @ logs
    rest = logs - logs.mean(0) - slopes * (x - x.mean())[:, None]
    deviations = slopes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    limit = rest.square().mean(0).sqrt().quantile(0.95)
    return torch.cat([slope_of[None] @ curve.log(), deviations, limit[None]])


def _directions(dimension: float) -> tuple[Tensor, float]:
    """Weights w with (Σw)²/Σw² = dimension; beyond the cap, and by what factor fluctuations are smaller."""
    if dimension >= _DIRECTIONS:
        return torch.ones(_DIRECTIONS, dtype=torch.float64), math.sqrt(_DIRECTIONS / dimension)
    whole = math.floor(dimension)
    weights = torch.ones(whole, dtype=torch.float64)
    if dimension == whole:
        return weights, 1.0
    part = whole - math.sqrt(whole**2 - (dimension - 1) * whole * (dimension - whole))
    return torch.cat([weights, torch.tensor([part / (dimension - 1)], dtype=torch.float64)]), 1.0


def _kernel(times: Tensor, c: float) -> Tensor:
    """Covariance of fractional Brownian motion with E x(t)² = tᶜ."""
    between = (times[:, None] - times).abs() ** c
    return (times[:, None] ** c + times**c - between) / 2


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _slope_weights(x: Tensor) -> Tensor:
    """Weights whose product with y is the least-squares slope of y over x."""
    centred = x - x.mean()
    weights: Tensor = centred / centred.square().sum()
    return weights


def _r_squared(y: Tensor, residuals: Tensor) -> float:
    total = float(y.var(correction=0))
    return 1 - float(residuals.square().mean()) / total if total > 1e-24 else math.nan


def _check(lags: Tensor, squares: Tensor) -> None:
    if lags.dim() != 1 or lags.shape != squares.shape or len(lags) < 2:
        raise ValueError(f"Two lags or more are needed, got shapes {tuple(lags.shape)} and {tuple(squares.shape)}.")
    if not (lags[0] > 0 and bool((lags.diff() > 0).all())):
        raise ValueError("`lags` must be positive and increase.")


def _points(start: float, stop: float) -> Tensor:
    """Logarithms of the points that fits are made on."""
    if not 0 < start < stop < math.inf:
        raise ValueError(f"A window needs 0 < start < stop, got [{start}, {stop}].")
    count = min(max(round(_PER_DECADE * math.log10(stop / start)) + 1, 9), _MOST_POINTS)
    return torch.linspace(math.log(start), math.log(stop), count, dtype=torch.float64)


def _logs(squares: Tensor) -> Tensor:
    logs = squares.double().cpu().log()
    if not bool(logs.isfinite().all()):
        raise UndefinedExponentError("The displacement is zero or not finite in the window: it has no logarithm.")
    return logs


def _window(lags: Tensor, squares: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor]:
    """Logarithms of points and squared displacements there."""
    lags, squares = lags.double().cpu(), squares.double().cpu()
    _check(lags, squares)
    x = _points(start, stop)
    if start < lags[0] or stop > lags[-1]:
        raise UndefinedExponentError(
            f"The window [{start:g}, {stop:g}] reaches beyond the lags, {float(lags[0]):g} to {float(lags[-1]):g}."
        )
    inside = int(((lags >= start) & (lags <= stop)).sum())
    if inside < 3:
        raise UndefinedExponentError(f"The window [{start:g}, {stop:g}] has {inside} lags; three are needed.")
    return x, _logs(resample(lags, squares, x.exp()))
