"""How the weights move: how far, how fast, in what direction, and by which power of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_dynamics.callbacks.cadence import Cadence, check_flag, check_positive_integer
from lightning_dynamics.callbacks.curvature import CurvatureMonitor
from lightning_dynamics.callbacks.displacement_table import displacement_table
from lightning_dynamics.callbacks.hessian import HessianMonitor
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn
from lightning_dynamics.callbacks.lightning_replay import check_choice
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.probe import Probe, ProbeData
from lightning_dynamics.callbacks.reference import Reference
from lightning_dynamics.callbacks.trajectory import Memory, Reading, Trajectory, Way
from lightning_dynamics.linalg import eigenpairs
from lightning_dynamics.metrics import (
    HeavyBall,
    PowerLaw,
    StabilityRule,
    Trail,
    UndefinedExponentError,
    aging_exponent,
    compare,
    drift_diffusion,
    local_exponents,
    ornstein_uhlenbeck_displacement,
    phase_space,
    power_law,
    two_time,
)
from lightning_dynamics.objective import HessianOperator, Kind, ParameterFilter
from lightning_dynamics.recording.quantity import QuantityTable, layer_keys

_EVERY = 50  # steps between points: Lightning's own
_GRADIENT = 1.3  # gradients that the probe's loss and gradient cost
_LEAST_LAG = 100  # steps from the reference on, for an exponent
_GROWTH = 1.12  # of the lag, until the exponent is fitted again
_AMPLITUDE = 3.0  # factor by which a prediction without a parameter may be off
_WAITS = 6  # waiting times in a two-time displacement
_SHOWN = 512  # rows of a phase plane in a record


class DisplacementMonitor(CurvatureMonitor):
    """Shows how the weights move: how far, how fast, in what direction, and by which power of time.

    Weights are read at the start of every step, so that each step counts whatever the cadence of the points: θ_t is
    what training goes on with, after all that the module's own hooks did. They are followed in a random projection of
    each parameter to 65,521 dimensions, which preserves lengths to 0.3 % and leaves smaller parameters as they are; or
    exactly, with ``memory="device"`` or ``"host"``.

    Long after the loss has settled weights go on moving, and the squared distance from where they were grows as a power
    of time (anomalous diffusion). An exponent is given only from a :class:`Reference` on, and beside two nulls that
    imitate it.

    Args:
        every_n_train_steps: Steps between points; by default ten points per decade of steps, then every 50.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        reference: From where diffusion is measured, see :class:`Reference`; by default from where the training loss has
            settled.
        window: Lags between which the exponent is fitted, in steps since the reference; by default the last decade.
        memory: How the start, the last weights, the last step and the reference are kept: ``"projection"``, or whole
            copies on the weights' ``"device"`` or on the ``"host"``.
        dimensions: Of the projection of each parameter, a prime number.
        layers: Record displacements of each layer too.
        conserved: Look for symmetries of the loss in the training's own gradients, and record how far what gradient
            flow would conserve has changed: see :class:`~lightning_dynamics.metrics.SymmetryFinder`. The gradients of
            SAM, at w + e, have fewer symmetries than the loss: scales and rescalings are not conserved and not found.
        phase_space: Follow positions and velocities along that many top and as many bottom eigenvectors of the Hessian,
            frozen at the reference; 0 for none. They are measured on ``probe``, or on that of a ``HessianMonitor`` of
            the same Trainer, from whose vectors they then start.
        phase_window: Steps of positions that are kept.
        probe: Also measure loss and gradient norm on these data, see :class:`Probe`.
        probe_every_n_train_steps: Steps between measurements on them; by default as often as costs at most 5 % of
            training.
        parameters: The parameters: a regular expression for whole names, a list of them, or a predicate of name and
            parameter. All that require a gradient by default, and those that once did.
        loss_fn: See :class:`HessianMonitor`, as all options of what is measured on a probe.
        weight_fn: Weight of a batch in the mean over probe batches.
        mode: ``"train"`` or ``"eval"``.
        precision: ``"float32"`` or ``"same"``.
        noise_draws: Draws of the noise that the loss is averaged over.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"exponent.*"`` or ``"relative/.*"``; ``".*"`` for all.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``displacement_<name>/``.

    Logs:
        - ``displacement/from_init``: ‖θ_t - θ_0‖; ``displacement/relative``: over ‖θ_0‖.
        - ``displacement/step``: root mean square of the step length ‖θ_s - θ_{s-1}‖ since the last point.
        - ``displacement/path_length``: Σ‖θ_s - θ_{s-1}‖.
        - ``displacement/diffusion``: a figure of squared distances over time, with the fitted power.

        Each record also holds angle, straightness, update-to-weight ratio, cosines of steps, the same for each layer,
        the mean training loss and its change, the norm of the training's gradient, the exponent with its error and its
        nulls, the curve itself, two-time displacements and the exponent of aging, and what is conserved. See the
        reference for all keys.

    Cost:
        At each step one read of the weights: 4 % of a step for a fully connected network of 10 million parameters at
        batch size 512, a quarter of one at batch size 32; exact copies take two to three times as much. At points a few
        reads; a fit of the exponent (a third of a second) every 12 % of the lag and at the end; symmetries are looked
        for at the first, second, fourth, eighth … of them, in 20 to 40 reads. Memory: four vectors of at most 65,521
        numbers for each parameter, four copies of the parameters with ``"device"`` and ``"host"``, in checkpoints as
        well; with ``phase_space`` 2k copies, and 2k more reads a step.

    Example:
        >>> from lightning_dynamics import DisplacementMonitor, Reference
        >>> monitor = DisplacementMonitor(reference=Reference(epoch=50), also_log="exponent.*")
    """

    options: ObjectiveOptions | None  # type: ignore[assignment]
    follower: Trajectory

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        reference: Reference | None = None,
        window: tuple[int, int] | None = None,
        memory: Memory = "projection",
        dimensions: int = 65_521,
        layers: bool = True,
        conserved: bool = True,
        phase_space: int = 0,
        phase_window: int = 4096,
        probe: Probe | None = None,
        probe_every_n_train_steps: int | None = None,
        parameters: ParameterFilter | None = None,
        loss_fn: LossFn | None = None,
        weight_fn: WeightFn | None = None,
        mode: Literal["train", "eval"] = "train",
        precision: Literal["float32", "same"] = "float32",
        noise_draws: int = 1,
        also_log: str | Sequence[str] = (),
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        check_flag("layers", layers)
        check_flag("conserved", conserved)
        check_positive_integer("phase_space", phase_space, least=0)
        check_positive_integer("phase_window", phase_window, least=200)
        check_positive_integer("dimensions", dimensions)
        check_positive_integer("probe_every_n_train_steps", probe_every_n_train_steps, optional=True)
        check_choice("memory", memory, get_args(Memory))
        if not (reference is None or isinstance(reference, Reference)):
            raise MisconfigurationException(f"`reference` must be a Reference, got {reference!r}.")
        _check_window(window)
        self.reference = reference if reference is not None else Reference()
        self.window = None if window is None else (int(window[0]), int(window[1]))
        self.phase_space = phase_space
        self._may_adopt = probe is None
        self._modes = [f"{end}_{i + 1}" for end in ("top", "bottom") for i in range(phase_space)]
        self._table = displacement_table(
            name, memory == "projection", probe is not None or phase_space > 0, self._modes
        )
        self._way = Way(
            parameters=parameters,
            memory=memory,
            dimensions=dimensions,
            reference=self.reference,
            layers=layers,
            window=phase_window,
            symmetries=conserved,
            directions=2 * phase_space,
        )
        options = ObjectiveOptions(
            probe=probe if probe is not None else Probe(),
            parameters=parameters,
            loss_fn=loss_fn,
            weight_fn=weight_fn,
            mode=mode,
            precision=precision,
            noise_draws=noise_draws,
        )
        measures = probe is not None or phase_space > 0
        is_open = every_n_train_steps is None and every_n_epochs is None and not log_spaced
        super().__init__(
            Cadence(_EVERY, log_spaced=True) if is_open else Cadence(every_n_train_steps, every_n_epochs, log_spaced),
            options,
            pair=False,
            detail=Cadence(probe_every_n_train_steps) if measures else None,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )
        if not measures:
            self.options = None
        self._own_options = self.options
        self.follower = Trajectory(self._way)

    detail_name = "loss and gradient of the probe"
    detail_option = "`probe_every_n_train_steps`"

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({"hessian"}) if self.phase_space else frozenset()

    @property
    def is_for_shards(self) -> bool:
        return self.options is None

    def measures_on_data(self, in_detail: bool) -> bool:
        return in_detail and self.options is not None

    def gradients_per_point(self, module: LightningModule) -> float:
        return 0.0

    def gradients_in_detail(self, module: LightningModule) -> float:
        if self.options is None:
            return 0.0
        return self.options.noise_draws * (_GRADIENT + 2.3 * 2 * self.phase_space)

    def measured_parameters(self, module: LightningModule) -> dict[str, nn.Parameter]:
        return {} if self.options is None else super().measured_parameters(module)

    def adopt(self, others: Sequence[Any]) -> None:
        """Measure eigenvectors on what a Hessian monitor of the same Trainer measures on."""
        found = _hessian_among(others)
        adopts = self.phase_space and self._may_adopt and found is not None
        self.options = self._own_options
        if adopts and found is not None:
            self.options = replace(found.options, parameters=self._way.parameters)

    def check(self, subject: HessianOperator) -> None:
        if 2 * self.phase_space > subject.size:
            raise ValueError(
                f"`phase_space={self.phase_space}` asks for {2 * self.phase_space} eigenvectors of "
                f"{subject.size} parameters."
            )

    def describe(self) -> dict[str, Any]:
        return {
            "reference": str(self.reference),
            "window": list(self.window) if self.window is not None else "the last decade",
            "memory": self._way.memory,
            "dimensions": self._way.dimensions if self._way.memory == "projection" else None,
            "phase_space": self.phase_space,
            **({} if self.options is None else super().describe()),
        }

    def introduce(
        self, rule: StabilityRule, data: ProbeData, every: int | None, every_detail: int | None = None
    ) -> dict[str, Any]:
        introduced = super().introduce(rule, data, every, every_detail)
        introduced.pop("threshold_rule")
        return introduced

    def point_of(self, subject: HessianOperator | None, **facts: Any) -> Point[Any]:
        # weights are told of even where the probe's loss is not finite
        is_there = subject is not None and math.isfinite(subject.loss)
        return super().point_of(subject, **facts) if is_there and subject is not None else Point(subject=None, **facts)

    def measure(self, point: Point[HessianOperator | None]) -> Measured:  # type: ignore[override]
        if point.step not in self.follower.readings:
            raise FloatingPointError("the weights of this step could not be read")
        reading = self.follower.readings.pop(point.step)
        into = Measured({}, notes={"steps": reading.steps})
        if reading.remarks:
            into.notes["remarks"] = list(reading.remarks)
        self._enter_moved(reading, into)
        self._enter_balance(reading, into)
        self._enter_charges(reading, into)
        told = point.memory.get("told", 0)
        if point.final or reading.steps >= _GROWTH * told:
            point.memory["told"] = reading.steps
            _enter_trail(reading.start, self._key("from_init"), into)
        if point.in_detail and point.subject is None and self.options is not None:
            into.notes["no_probe"] = "the loss of the probe is not finite"
        if reading.trail is not None:
            self._enter_diffusion(reading, reading.trail, point, into)
        if point.subject is not None:
            self._enter_probe(point.subject, reading, point, into)
        if reading.phase is not None:
            self._enter_phase(reading, point, into)
        return into

    def _key(self, name: str, layer: str = "") -> str:
        return f"{self.table.family}/{name}/{layer}" if layer else f"{self.table.family}/{name}"

    def _enter(self, into: Measured, name: str, value: float | None, error: float | None = None) -> None:
        """A value, if there is one."""
        if value is None or math.isnan(value):
            return
        into.scalars[self._key(name)] = value
        if error is not None and not math.isnan(error):
            into.errors[self._key(name)] = error

    def _enter_moved(self, reading: Reading, into: Measured) -> None:
        layers = [layer for layer in reading.moved if layer]
        try:
            keys = layer_keys(layers)
        except ValueError as error:  # layers that were frozen when names were checked
            keys, layers = {}, []
            into.notes["no_layers"] = str(error)
        for layer in ("", *layers):
            values = reading.moved[layer]
            for name, value in values.items():
                key = self._key(name, keys.get(layer, ""))
                into.scalars[key] = value
                if reading.error:
                    into.errors[key] = _error_of(name, value, reading.error)

    def _enter_balance(self, reading: Reading, into: Measured) -> None:
        if reading.trend is not None:
            self._enter(into, "training_loss", reading.trend.level)
            self._enter(into, "loss_change", reading.trend.change, reading.trend.error)
        self._enter(into, "batch_gradient_norm", reading.gradient_norm)

    def _enter_charges(self, reading: Reading, into: Measured) -> None:
        for charge in reading.charges:
            self._enter(into, f"{charge.kind}_change/{charge.layer}", charge.change)
            self._enter(into, f"imbalance/{charge.layer}", charge.imbalance)
            self._enter(into, f"effective_learning_rate/{charge.layer}", charge.rate)
            self._enter(into, f"radial_cosine/{charge.layer}", charge.cosine)
        if reading.symmetries:
            into.notes["symmetries"] = reading.symmetries

    def _enter_diffusion(self, reading: Reading, trail: Trail, point: Point[Any], into: Measured) -> None:
        """The exponent beside its nulls, where the lag has grown enough since the last time."""
        assert reading.since is not None
        lag = trail.lags[-1] if trail.lags else 0
        into.notes["reference"] = {"step": reading.since, "lag": lag, "limiting": reading.is_limiting}
        fitted = point.memory.get("fitted", [reading.since, 0])
        before = float(fitted[1]) if int(fitted[0]) == reading.since else 0.0
        grown = lag > before if point.final else lag >= before * _GROWTH
        if lag < _LEAST_LAG or not grown:
            return
        _enter_trail(trail, self._key("diffusion"), into)
        if not reading.is_limiting:
            into.notes["no_exponent"] = "training does not start from the reference"
            return
        point.memory["fitted"] = torch.tensor([reading.since, lag])
        first, last = self.window if self.window is not None else (lag / 10, lag)
        start, stop = max(float(first), float(trail.lags[0])), min(float(last), float(lag))
        if self.window is not None and stop <= start:
            return
        lags = torch.tensor(trail.lags, dtype=torch.float64)
        squares = torch.tensor(trail.squares, dtype=torch.float64)
        try:
            law = power_law(
                lags,
                squares,
                start,
                stop,
                positions=trail.evenly(),
                projected_from=trail.projected_from,
                generator=point.generator,
            )
        except (UndefinedExponentError, ValueError) as error:
            into.notes["no_exponent"] = str(error)
            return
        self._enter(into, "exponent", law.exponent, law.error)
        self._enter(into, "exponent_r2", law.r_squared)
        remarks = list(law.remarks)
        begin, end = reading.since + start, reading.since + stop
        changes = [max(one, int(begin) + 1) for one, other in reading.rate_changes if one < end and other > begin]
        if changes:
            remarks.append(f"the learning rate changes in the window, first at step {changes[0]}")
        into.notes["exponent"] = {
            "window": [start, stop],
            "prefactor": law.prefactor,
            "interval": list(law.interval),
            "dimension": law.dimension,
            "remarks": remarks,
        }
        self._enter_nulls(law, lags, squares, reading, trail, into)
        self._enter_aging(law, trail, point, into)
        at, exponents = local_exponents(lags, squares)
        into.arrays[self._key("local_lags")] = at.tolist()
        into.arrays[self._key("local_exponents")] = exponents.tolist()

    def _enter_nulls(
        self, law: PowerLaw, lags: Tensor, squares: Tensor, reading: Reading, trail: Trail, into: Measured
    ) -> None:
        null = drift_diffusion(lags, squares, law.start, law.stop)
        against = compare(law, null.curve, lags, squares)
        self._enter(into, "exponent_drift", null.exponent)
        self._enter(into, "drift_r2", null.r_squared)
        into.notes["exponent"]["drift"] = {
            "diffusion": null.diffusion,
            "drift": null.drift,
            "excluded": against.null_is_excluded,
        }
        try:
            curve = self._in_a_bowl(reading, trail, law)
            against = compare(law, curve, lags, squares)
        except (ValueError, LookupError) as error:
            into.notes["exponent"]["no_ou"] = str(error.args[0])
            return
        self._enter(into, "exponent_ou", against.exponent)
        self._enter(into, "ou_r2", against.r_squared)
        # nothing was fitted: the amplitude has to be right as well
        excluded = against.null_is_excluded or not 1 / _AMPLITUDE < against.amplitude < _AMPLITUDE
        into.notes["exponent"]["ou"] = {"amplitude": against.amplitude, "excluded": excluded}
        into.arrays[self._key("ou_squares")] = curve.tolist()

    def _in_a_bowl(self, reading: Reading, trail: Trail, law: PowerLaw) -> Tensor:
        """Squared displacements of a stationary motion in a bowl with the measured Hessian, at the trail's lags."""
        if isinstance(reading.dynamics, str):
            raise LookupError(reading.dynamics)
        found = None if self._session is None else _hessian_among(self._session.monitors)
        spectrum = None if found is None else self._session.latest_spectrum(found.table.family)
        if found is None or spectrum is None:
            raise LookupError("no spectrum of the Hessian: attach a HessianMonitor, which measures it")
        if found.options.parameters != self._way.parameters:
            raise LookupError("the HessianMonitor measures other parameters")
        nodes, weights = (torch.tensor(values, dtype=torch.float64) for values in spectrum)
        dynamics = reading.dynamics
        lengths = torch.tensor(trail.lags).diff(prepend=torch.zeros(1, dtype=torch.int64)).double()
        inside = torch.tensor([law.start <= lag <= law.stop for lag in trail.lags])
        steps = torch.tensor(trail.steps, dtype=torch.float64)
        mean = float((lengths * steps)[inside].sum() / lengths[inside].sum())

        return ornstein_uhlenbeck_displacement(dynamics, nodes, weights, mean, trail.lags, reading.weight_decay)

    def _enter_aging(self, law: PowerLaw, trail: Trail, point: Point[Any], into: Measured) -> None:
        times, positions = trail.all()
        last = int(times[-1])
        waits = torch.logspace(0, math.log10(last / 2), _WAITS, dtype=torch.float64)
        try:
            curves = two_time(times, positions, waits)
            aging = aging_exponent(curves, law.dimension, point.generator)
        except (UndefinedExponentError, ValueError):
            return
        self._enter(into, "aging", aging.exponent, aging.error)
        if aging.remarks:
            into.notes["aging"] = list(aging.remarks)
        into.arrays[self._key("two_time_waits")] = curves.waits.tolist()
        into.arrays[self._key("two_time_lags")] = curves.lags.double().tolist()
        into.arrays[self._key("two_time_squares")] = curves.squares.flatten().tolist()

    def _enter_probe(self, hessian: HessianOperator, reading: Reading, point: Point[Any], into: Measured) -> None:
        self._enter(into, "probe_loss", hessian.loss)
        self._enter(into, "gradient_norm", float(hessian.gradient.norm()))
        if not self.phase_space or reading.since is None:
            return
        vectors = self.follower.directions(hessian.layout.shapes)
        if vectors is None or reading.since == point.step:
            beside = None if self._session is None else _hessian_among(self._session.monitors)
            is_same = beside is not None and beside.options.parameters == self._way.parameters
            start = self._session.memory_of(beside).get("subspace") if is_same else None
            fits = start is not None and start.shape[-1] == hessian.size
            found = eigenpairs(
                hessian,
                self.phase_space,
                self.phase_space,
                tolerance=1e-4,
                start=start if fits else None,
                generator=point.generator,
            )
            vectors = torch.cat([end.vectors[: self.phase_space] for end in (found.top, found.bottom)])
            self.follower.freeze(vectors, hessian.layout.shapes, point.step)
            into.notes["frozen"] = {"converged": found.converged, "products": found.products}
        products = torch.stack([hessian(vector) for vector in vectors.to(hessian.gradient)])
        curvatures = (vectors.to(products) * products).sum(1)
        norms = products.norm(dim=1)
        point.memory["curvatures"] = curvatures.double().cpu()
        for mode, value, norm in zip(self._modes, curvatures.tolist(), norms.tolist(), strict=True):
            self._enter(into, f"curvature_{mode}", value)
            self._enter(into, f"alignment_{mode}", abs(value) / norm if norm > 0 else None)

    def _enter_phase(self, reading: Reading, point: Point[Any], into: Measured) -> None:
        assert reading.phase is not None
        if len(point.memory.get("curvatures", ())) != len(self._modes):
            return
        rows = len(reading.phase.positions)
        lag = point.step - reading.phase.since
        fitted = point.memory.get("seen_in_phase", torch.zeros(2))
        last = float(fitted[1]) if int(fitted[0]) == reading.phase.since else 0.0
        if rows < _LEAST_LAG or not (point.final or lag >= _GROWTH * last):
            return
        point.memory["seen_in_phase"] = torch.tensor([float(reading.phase.since), float(lag)])
        dynamics = reading.dynamics if isinstance(reading.dynamics, HeavyBall) else None
        curvatures = point.memory["curvatures"] + reading.weight_decay
        if dynamics is not None and not bool(dynamics.is_stable(curvatures.clamp(min=1e-300)).all()):
            dynamics = None
        try:
            seen = phase_space(reading.phase.positions, reading.phase.rates, curvatures, dynamics)
        except ValueError as error:
            into.notes["no_phase_space"] = str(error)
            return
        for i, (mode, found) in enumerate(zip(self._modes, seen.modes, strict=True)):
            for name, each in (
                ("frequency", found.frequency),
                ("equipartition", found.equipartition),
                ("current", found.current),
            ):
                self._enter(into, f"{name}_{mode}", each.value, each.error)
                self._enter(into, f"{name}_predicted_{mode}", each.predicted)
            into.arrays[self._key(f"q_{mode}")] = seen.positions[-_SHOWN:, i].tolist()
            into.arrays[self._key(f"p_{mode}")] = seen.velocities[-_SHOWN:, i].tolist()
        into.notes["phase"] = {
            "since": reading.phase.since,
            "rows": rows,
            "remarks": list(seen.remarks),
            "modes": {mode: list(found.remarks) for mode, found in zip(self._modes, seen.modes, strict=True)},
            "moments": {
                mode: [float(q.mean()), float(p.mean()), float(q.var(correction=0))]
                for mode, q, p in zip(self._modes, seen.positions.T, seen.velocities.T, strict=True)
            },
        }
        if isinstance(reading.dynamics, str):
            into.notes["phase"]["no_prediction"] = reading.dynamics


def _enter_trail(trail: Trail, key: str, into: Measured) -> None:
    into.arrays[f"{key}_lags"] = [float(lag) for lag in trail.lags]
    into.arrays[f"{key}_squares"] = list(trail.squares)
    into.arrays[f"{key}_steps"] = list(trail.steps)


def _error_of(name: str, value: float, relative: float) -> float:
    """Standard error, at most, of what was read off projected weights whose lengths have this relative error."""
    if name.endswith("cosine"):
        return math.sqrt(2) * relative * (1 - value**2)
    return value * relative * (math.sqrt(2) if name in ("relative", "straightness", "update_ratio", "angle") else 1.0)


def _check_window(window: Any) -> None:
    if window is None:
        return
    is_pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not is_pair or not all(isinstance(lag, int) and not isinstance(lag, bool) for lag in window):
        raise MisconfigurationException(f"`window` must be two numbers of steps, got {window!r}.")
    if not 1 <= window[0] < window[1]:
        raise MisconfigurationException(f"`window` must be an increasing pair of lags from 1 on, got {window!r}.")


def _hessian_among(monitors: Sequence[Any]) -> HessianMonitor | None:
    return next((m for m in monitors if isinstance(m, HessianMonitor) and m.operator == "hessian"), None)
