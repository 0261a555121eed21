"""The noise of mini-batch gradients: how large, against what signal, and along which directions of curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.cadence import Cadence, check_positive_integer
from lightning_dynamics.callbacks.gradient_series import GradientSeries
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.mini_batch_monitor import MiniBatchMonitor, check_draws
from lightning_dynamics.callbacks.noise_table import noise_table
from lightning_dynamics.callbacks.optimization import Sgd
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.survey import Survey, Wanted
from lightning_dynamics.linalg.basis import inner
from lightning_dynamics.linalg.krylov import random_vector
from lightning_dynamics.metrics import (
    DrawnGradients,
    SampleMoments,
    autocorrelation,
    directional_variances,
    fisher_trace,
    modified_loss_terms,
    noise_scale,
    noise_share,
    noise_trace,
    sample_noise_trace,
    signal_to_noise,
    squared_gradient_norm,
    tail_index,
    trace_from_samples,
    weighted_noise_trace,
)
from lightning_dynamics.metrics.estimates import mean_estimate
from lightning_dynamics.objective import Engine, HessianOperator, Kind, OutputFn, ParameterFilter
from lightning_dynamics.recording.quantity import QuantityTable

_PRODUCT = 2.3  # gradients
_SOLVER = 45  # products for the eigenvectors
_SAMPLES = 4.0  # gradients that those of all samples cost, where they can be computed together
_PROBES = 8  # random vectors for the trace of the Fisher matrix
_MOST_SHOWN = 1 << 10  # mini-batches that a preflight may be shown
_LEAST_STEPS = 100  # of the training's own gradients, for an autocorrelation
_OVERLAP = 0.25  # share of the data set that a tail is fitted to: samples in several mini-batches count once each
_LAGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80, 100)


class GradientNoiseMonitor(MiniBatchMonitor):
    """Measures the noise of mini-batch gradients: its size, its ratio to the signal, its shape in the loss landscape.

    Mini-batches are drawn for the purpose, at the size that training has, independently of each other and of training:
    see ``draws`` of :class:`Probe`. Their gradients are never held together: each leaves its numbers and is gone.

    Args:
        every_n_train_steps: Steps between points. By default as often as costs at most 10 % of training (shared with
            other monitors without a cadence); the number chosen is printed.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        samples: Also measure gradients of single samples, now and then: by ``torch.func.vmap`` where the step permits
            it, one after the other else. ``"auto"`` leaves them out, with the reason in the record, where samples are
            coupled (batch norm in training mode, contrastive losses) or cannot be told apart; True makes that an error.
        directions: Number of top and of bottom Hessian eigenvectors along which the noise is measured, now and then; 0
            for none.
        detail_every_n_train_steps: Steps between measurements of samples and directions; by default as often as costs
            at most 5 % of training.
        series: Follow the training's own gradients along the leading eigenvector, at every step, over that many steps;
            0 to leave that out.
        probe: The mini-batches: ``Probe(draws=32)`` by default, of training's size.
        output_fn: Where the network's outputs are, a function of module and batch, see :data:`OutputFn`: for the trace
            of the true Fisher matrix, which a loss alone does not give.
        parameters: The parameters: a regular expression for whole names, a list of them, or a predicate of name and
            parameter. All that require a gradient by default.
        loss_fn: See :class:`HessianMonitor`, as all options of what is measured.
        weight_fn: Weight of a batch in the mean over the pieces that a mini-batch is run in.
        mode: ``"train"`` or ``"eval"``.
        precision: ``"float32"`` or ``"same"``.
        noise_draws: Draws of the noise (dropout) that the loss is averaged over.
        engine: See :class:`StochasticSharpnessMonitor`, with which it shares its evaluations if all options agree.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"variance_.*"``; ``".*"`` for all.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``noise_<name>/``.

    Logs:
        - ``noise/trace``: E‖g_B - g‖², and ``noise/squared_gradient_norm``: ‖g‖² without bias, in loss²/θ².
        - ``noise/signal_to_noise``: their ratio; ``noise/noise_scale``: tr Σ/‖g‖², in samples.

        Each record also holds tr Σ of single samples, the traces of the empirical and, with ``output_fn``, of the true
        Fisher matrix, variances along eigenvectors, the weighted trace that SGD without replacement regularizes, the
        terms of the modified loss, a tail index, and the autocorrelation of the training's own gradients. Standard
        errors are read with Student's t for M - 1 degrees of freedom.

    Cost:
        A point takes two gradients of each of M mini-batches; in detail their single samples (about four more where
        they can be computed together, one evaluation each else) and 40 to 55 products for the eigenvectors. At each
        step two reads of the gradient. Memory: one graph of a mini-batch, the solver's vectors, 64 MiB of single
        gradients; between points one copy of the parameters for the leading eigenvector.

    Example:
        >>> from lightning_dynamics import GradientNoiseMonitor
        >>> monitor = GradientNoiseMonitor(every_n_train_steps=200, also_log="weighted_trace")
    """

    follower: GradientSeries | None

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        samples: bool | Literal["auto"] = "auto",
        directions: int = 3,
        detail_every_n_train_steps: int | None = None,
        series: int = 2000,
        probe: Probe | None = None,
        output_fn: OutputFn | None = None,
        parameters: ParameterFilter | None = None,
        loss_fn: LossFn | None = None,
        weight_fn: WeightFn | None = None,
        mode: Literal["train", "eval"] = "train",
        precision: Literal["float32", "same"] = "float32",
        noise_draws: int = 1,
        engine: Engine = "rebuilt",
        also_log: str | Sequence[str] = (),
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        if not isinstance(samples, (bool, str)) or samples not in (True, False, "auto"):
            raise MisconfigurationException(f"`samples` must be True, False or 'auto', got {samples!r}.")
        check_positive_integer("directions", directions, least=0)
        check_positive_integer("series", series, least=0)
        if 0 < series < _LEAST_STEPS:
            raise MisconfigurationException(
                f"`series={series}` steps are too few for an autocorrelation: at least {_LEAST_STEPS}, or 0 for none."
            )
        check_positive_integer("detail_every_n_train_steps", detail_every_n_train_steps, optional=True)
        if isinstance(output_fn, str):
            raise MisconfigurationException("`output_fn` must be a function here: a module's name gives no likelihood.")
        probe = probe if probe is not None else Probe(draws=32)
        check_draws(probe)
        self.samples = samples
        self.directions = directions
        self._table = noise_table(directions, name)
        self.follower = GradientSeries(series) if series and directions else None
        rare = bool(samples) or directions > 0 or output_fn is not None
        super().__init__(
            Cadence(every_n_train_steps, every_n_epochs, log_spaced),
            ObjectiveOptions(
                probe=probe,
                parameters=parameters,
                loss_fn=loss_fn,
                weight_fn=weight_fn,
                mode=mode,
                precision=precision,
                noise_draws=noise_draws,
                engine=engine,
                output_fn=output_fn,
            ),
            pair=False,
            detail=Cadence(detail_every_n_train_steps) if rare else None,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )

    detail_name = "samples and directions"
    detail_option = "`detail_every_n_train_steps`"

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def kinds(self) -> frozenset[Kind]:
        products: set[Kind] = {"hessian"} if self.directions else set()
        return frozenset(products | ({"fisher"} if self.options.output_fn is not None else set()))

    @property
    def ends(self) -> tuple[int, int]:
        return self.directions, self.directions

    def gradients_per_point(self, module: Any) -> float:
        return 2.0 * self.options.noise_draws

    def gradients_in_detail(self, module: Any) -> float:
        products = _SOLVER * (self.directions > 0) + _PROBES * (self.options.output_fn is not None)
        return self.options.noise_draws * (_PRODUCT * products + (_SAMPLES if self.samples else 0.0))

    @property
    def vectors_held(self) -> int:
        return 64 + 8 if self.directions else 4

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "samples": self.samples,
            "directions": self.directions,
            "engine": self.options.engine,
        }

    def check(self, subject: HessianOperator) -> None:
        if 2 * self.directions > subject.size:
            raise ValueError(
                f"`directions={self.directions}` asks for {2 * self.directions} eigenvectors of {subject.size} "
                "parameters."
            )
        if self.samples is True:
            draws = max(self.options.probe.draws or 0, _MOST_SHOWN)
            survey = Survey(Wanted(samples=True), subject.gradient, draws, None)
            subject.survey(survey)
            if not survey.has_samples and (survey.coupled or len(survey)):  # there may be no pair to ask yet
                raise ValueError(f"Gradients of single samples (`samples=True`) cannot be had. {survey.coupled}")

    def wants(self, point: Point[HessianOperator], in_detail: bool) -> Wanted:
        if not in_detail:
            return Wanted()
        directions = None
        if self.directions:
            found = self.leading(point, self.directions, self.directions)
            ends = (found.top, found.bottom)
            directions = torch.cat([end.vectors for end in ends])  # another monitor may want more of them
        samples = bool(self.samples) and "no_samples" not in point.memory
        return Wanted(directions=directions, samples=samples)

    def measure(self, point: Point[HessianOperator]) -> Measured:
        survey = self.survey(point)
        into = Measured({}, notes=self.measured_on(point))
        data = point.data
        assert data is not None
        drawn = DrawnGradients(
            survey["squared_norms"],
            survey["squared_deviations"],
            survey["dots_mean"],
            inner(survey.mean, survey.mean),
            data.batch_size or 1,
            None if data.replaces else data.population,
            self._along(survey, point) if point.in_detail and self.directions else None,
        )
        self._enter(into, "trace", lambda: noise_trace(drawn))
        self._enter(into, "squared_gradient_norm", lambda: squared_gradient_norm(drawn))
        if data.batch_size is not None:
            self._enter(into, "noise_scale", lambda: noise_scale(drawn))
        self._enter(into, "signal_to_noise", lambda: signal_to_noise(drawn))
        rule, unordered = _plain_sgd(point)
        if isinstance(rule, Sgd):
            descent, stochastic = modified_loss_terms(drawn, rule.lr)
            self._enter(into, "modified_loss_gd", descent)
            if unordered is None:
                self._enter(into, "modified_loss_sgd", stochastic)
            else:
                into.notes["no_modified_loss_sgd"] = unordered
        else:
            into.notes["no_modified_loss"] = rule
        if drawn.along is not None:
            self._enter_directions(drawn, point, into)
        if point.in_detail or self.detail is None:  # without samples it comes from the batches, and costs nothing
            self._enter_samples(survey, drawn, point, into)
        if point.in_detail and self.options.output_fn is not None:
            self._enter_true_fisher(point, into)
        self._enter_autocorrelation(point, into)
        return into

    def _along(self, survey: Survey, point: Point[HessianOperator]) -> Tensor:
        """Components along this monitor's own eigenvectors, shape ``(M, 2 · directions)``."""
        found = self.leading(point, self.directions, self.directions)
        bottom = len(found.top.vectors)
        along, n = survey["along"], self.directions
        return torch.cat([along[:, :n], along[:, bottom : bottom + n]], dim=1)

    def _enter_directions(self, drawn: DrawnGradients, point: Point[HessianOperator], into: Measured) -> None:
        found = self.leading(point, self.directions, self.directions)
        values = []
        for end, kind in ((found.top, "top"), (found.bottom, "bottom")):
            for i in range(self.directions):
                values.append(float(end.values[i]))
                into.scalars[self._key(f"curvature_{kind}_{i + 1}")] = float(end.values[i])
                into.errors[self._key(f"curvature_{kind}_{i + 1}")] = float(end.bounds[i])
        names = [f"variance_{kind}_{i + 1}" for kind in ("top", "bottom") for i in range(self.directions)]
        for name, estimate in zip(names, directional_variances(drawn), strict=True):
            self._enter(into, name, estimate)
        self._enter(into, "share_in_directions", lambda: noise_share(drawn))
        into.notes["converged"] = found.converged
        rule, unordered = _plain_sgd(point)
        batches = point.optimization.batches if point.optimization is not None else None
        if isinstance(rule, Sgd) and unordered is None and batches:
            lr, epoch, curvatures = rule.lr, batches, torch.tensor(values, dtype=torch.float64)
            self._enter(into, "weighted_trace", lambda: weighted_noise_trace(drawn, curvatures, lr, epoch))
        else:
            into.notes["no_weighted_trace"] = rule if isinstance(rule, str) else unordered
        if self.follower is not None:
            self.follower.freeze(found.top.vectors[:1], point.subject.layout.shapes)

    def _enter_samples(
        self, survey: Survey, drawn: DrawnGradients, point: Point[HessianOperator], into: Measured
    ) -> None:
        data = point.data
        if data is None or data.batch_size is None:
            return
        if not survey.has_samples:
            if survey.wanted.samples:
                point.memory["no_samples"] = survey.coupled or "samples were not counted"
            if "no_samples" in point.memory:
                into.notes["no_samples"] = point.memory["no_samples"]
            self._enter(into, "sample_trace", lambda: sample_noise_trace(drawn))
            return
        moments = SampleMoments(drawn, survey["sample_norms"], survey["sample_deviations"])
        self._enter(into, "sample_trace", lambda: trace_from_samples(moments))
        self._enter(into, "fisher_trace", lambda: fisher_trace(moments))
        distances = survey["sample_distances"]
        if data.population is not None:
            distances = distances[: max(1, int(_OVERLAP * data.population / data.batch_size))]
        values = distances.flatten()
        values = values[values > 0]
        try:
            self._enter(into, "tail_index", lambda: tail_index(values))
        except ValueError as error:
            into.notes["no_tail_index"] = str(error)

    def _enter_true_fisher(self, point: Point[HessianOperator], into: Measured) -> None:
        fisher = point.subject.operator("fisher")
        squares = []
        for _ in range(_PROBES):
            vector = random_vector(fisher, point.generator)
            squares.append(inner(vector, fisher(vector)) * fisher.size / inner(vector, vector))
        self._enter(into, "true_fisher_trace", mean_estimate(torch.tensor(squares, dtype=torch.float64)))

    def _enter_autocorrelation(self, point: Point[HessianOperator], into: Measured) -> None:
        if self.follower is None:
            return
        rows: Tensor | None = self.follower.readings.pop(point.step, None)
        if rows is None or len(rows) < _LEAST_STEPS:
            steps = 0 if rows is None else len(rows)
            into.notes["no_autocorrelation"] = (
                f"{steps} steps since the direction was frozen; {_LEAST_STEPS} are needed"
            )
            return
        lags = [lag for lag in _LAGS if lag <= len(rows) // 10]
        try:
            found = autocorrelation(rows[:, 0], lags)
        except ValueError as error:
            into.notes["no_autocorrelation"] = str(error)
            return
        self._enter(into, "autocorrelation", found[0])
        into.arrays[self._key("autocorrelation_lags")] = [float(lag) for lag in lags]
        into.arrays[self._key("autocorrelation_values")] = [each.value for each in found]
        into.arrays[self._key("autocorrelation_errors")] = [each.error or math.nan for each in found]
        into.notes["autocorrelation_steps"] = len(rows)


def _plain_sgd(point: Point[HessianOperator]) -> tuple[Sgd | str, str | None]:
    """Plain SGD, or why training is none; and why its batches are not those of random reshuffling, if they are not."""
    how = point.optimization
    if how is None:
        return "how training optimizes is not known", None
    rule: Sgd | str = how.sgd
    if isinstance(rule, Sgd) and (rule.momentum or rule.weight_decay):
        rule = f"no theory of {'momentum' if rule.momentum else 'weight decay'}"
    return rule, None if how.order == "reshuffled" else "batches are not reshuffled at random in every epoch"
