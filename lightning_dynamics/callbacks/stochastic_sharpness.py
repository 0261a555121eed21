"""The curvature that mini-batches feel: is SGD at its own edge of stability?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_dynamics.callbacks.cadence import Cadence, check_flag, check_positive_integer
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.mini_batch_monitor import MiniBatchMonitor, check_draws, flat_weights
from lightning_dynamics.callbacks.optimization import Sgd
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.sharpness_table import sharpness_table
from lightning_dynamics.callbacks.survey import Metric, Survey, Wanted
from lightning_dynamics.linalg.basis import inner
from lightning_dynamics.metrics import (
    DrawnCurvature,
    Estimate,
    balance_ratio,
    batch_sharpness,
    batch_sharpness_ratio_of_means,
    gni,
    gradient_sharpness,
    ias,
    minibatch_sharpness,
    plateaus,
    predicted_change,
    predicted_gni,
    sharpness_gap,
    update_edge,
)
from lightning_dynamics.metrics.estimates import mean_estimate
from lightning_dynamics.objective import Engine, HessianOperator, ParameterFilter
from lightning_dynamics.recording.quantity import QuantityTable

_PRODUCT = 2.3  # gradients
_SOLVER = 15  # products for the largest eigenvalue of a mini-batch, or of all together
_TOLERANCE = 1e-4  # of the sharpness of all together, whose eigenvector is needed
_COLUMNS = (
    "squared_norms",
    "along_own",
    "along_partner",
    "dots_mean",
    "along_mean",
    "along_cross",
    "dots_image",
)  # what is kept of a point for averages over time


class StochasticSharpnessMonitor(MiniBatchMonitor):
    """Shows whether SGD is at its own edge of stability: the curvature that mini-batches feel, against 2/η.

    In mini-batch training the sharpness of the whole loss settles below 2/η, the lower the smaller the batch. What is
    observed to hover there is Batch Sharpness, the curvature of a mini-batch's loss along its own gradient, averaged
    over mini-batches. That is an observation, not a theorem: on a quadratic loss it does not decide over stability.

    Mini-batches are drawn for the purpose, at the size that training has, independently of each other and of training:
    see ``draws`` of :class:`Probe`. Each point is measured at the weights θ_t that a step starts from; once the step
    has been taken, the step really made is judged as well, from these weights.

    Args:
        every_n_train_steps: Steps between points. By default as often as costs at most 10 % of training (shared with
            other monitors without a cadence); the number chosen is printed.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        eigenvalues: Now and then also measure what is dear: the sharpness of all draws together, MiniBS, their gap,
            gradient-noise interaction and the balance.
        eigenvalues_every_n_train_steps: Steps between these; by default as often as costs at most 5 % of training.
        solved: Number of mini-batches whose largest eigenvalue is computed.
        step: Also judge the step really made. A copy of the weights is then held during the step.
        window: Number of measurements in detail that the balance is averaged over.
        probe: The mini-batches: ``Probe(draws=32)`` by default, of training's size; ``Probe(draws=64, batch_size=256)``
            to ask for another.
        parameters: The parameters: a regular expression for whole names, a list of them, or a predicate of name and
            parameter. All that require a gradient by default.
        loss_fn: See :class:`HessianMonitor`, as all options of what is measured.
        weight_fn: Weight of a batch in the mean over the pieces that a mini-batch is run in.
        mode: ``"train"`` or ``"eval"``.
        precision: ``"float32"`` or ``"same"``.
        noise_draws: Draws of the noise (dropout) that the loss is averaged over.
        engine: ``"rebuilt"`` holds the graphs of two mini-batches at a time; ``"kept"`` those of all, with all their
            gradients, which makes measurements in detail a third cheaper; ``"auto"`` as memory permits.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"gni.*"`` or ``"gap"``; ``".*"`` for all.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``sharpness_<name>/``.

    Logs:
        - ``sharpness/batch_sharpness``: E_B[g_BᵀH_Bg_B/‖g_B‖²], in units of loss/θ².
        - ``sharpness/edge_ratio``: over the optimizer's edge; for Adam and its like in the geometry of their
          preconditioner. With momentum also ``sharpness/edge_ratio_small_batch``: Batch Sharpness is observed between
          the two levels ``sharpness/small_batch_level`` 2(1 - β)/η and ``sharpness/stability_threshold`` 2(1 + β)/η.
        - ``sharpness/update_edge``: r = -½ΔᵀHΔ/(gᵀΔ) of the step really made, for any optimizer.
        - In detail: ``sharpness/minibatch_top_1`` (MiniBS), ``sharpness/top_1``, ``sharpness/balance_ratio``.

        Each record also holds the ratio of means, GNI with its prediction, IAS, the gap, the sharpness of the step's
        own batch with and without momentum, and the predicted and the realized change of the loss. Standard errors are
        of the estimator that is returned, at a fixed number of draws; with M draws read them with Student's t for M - 1
        degrees of freedom (M/2 - 1 for GNI, IAS and the balance).

    Cost:
        A point takes one gradient, one graph and one product of each of M mini-batches, twice with ``step``: about 10
        gradients of them all; in detail about 20 more products of them all together. Memory: the graphs of two
        mini-batches and eight vectors of the size of the parameters; with ``step`` one copy of the weights besides.

    Example:
        >>> from lightning_dynamics import Probe, StochasticSharpnessMonitor
        >>> monitor = StochasticSharpnessMonitor(every_n_train_steps=500, probe=Probe(draws=32), also_log="gni.*")
    """

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        eigenvalues: bool = True,
        eigenvalues_every_n_train_steps: int | None = None,
        solved: int = 8,
        step: bool = True,
        window: int = 10,
        probe: Probe | None = None,
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
        check_flag("eigenvalues", eigenvalues)
        check_flag("step", step)
        check_positive_integer("eigenvalues_every_n_train_steps", eigenvalues_every_n_train_steps, optional=True)
        check_positive_integer("solved", solved, least=2)
        check_positive_integer("window", window)
        probe = probe if probe is not None else Probe(draws=32)
        check_draws(probe)
        self.solved = solved
        self.window = window
        self.awaits_step = step
        self._table = sharpness_table(name)
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
            ),
            pair=False,
            detail=Cadence(eigenvalues_every_n_train_steps) if eigenvalues else None,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )

    detail_name = "eigenvalues of mini-batches"
    detail_option = "`eigenvalues_every_n_train_steps`"

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def ends(self) -> tuple[int, int]:
        return 1, 0

    def shown(self, clips: bool, sharpens: bool = False) -> list[str]:
        absent = set() if self.detail is not None else {"minibatch_top_1", "top_1", "balance_ratio"}
        absent |= set() if self.awaits_step else {"update_edge"}
        return [name for name in super().shown(clips, sharpens) if name not in absent]

    def gradients_per_point(self, module: Any) -> float:
        step = 1 + 1.3 + _PRODUCT + 0.4 if self.awaits_step else 0.0
        return self.options.noise_draws * (1 + 1.3 + _PRODUCT + step)

    def gradients_in_detail(self, module: Any) -> float:
        draws = self.options.probe.draws or 1
        solved = min(1.0, self.solved / draws)
        return self.options.noise_draws * _PRODUCT * (3 + _SOLVER + solved * _SOLVER)

    @property
    def vectors_held(self) -> int:
        return 64 + 8

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "solved": self.solved,
            "step": self.awaits_step,
            "window": self.window,
            "engine": self.options.engine,
        }

    def wants(self, point: Point[HessianOperator], in_detail: bool) -> Wanted:
        hessian = point.subject
        wanted = Wanted(curvature=True, metric=_metric(point), seed=self.options.probe.seed)
        if not in_detail:
            return wanted
        found = self.leading(point, 1, 0, _TOLERANCE)
        momentum = _momentum(point)
        image = hessian.product(hessian.gradient) if momentum else None
        return wanted | Wanted(partners=True, image=image, top=found.top.vectors[0], solved=self.solved)

    def measure(self, point: Point[HessianOperator]) -> Measured:
        survey = self.survey(point)
        into = Measured({}, notes=self.measured_on(point))
        self._enter(into, "loss", lambda: mean_estimate(survey["loss"]))
        self._enter_batch_sharpness(survey, point, into)
        if point.in_detail:
            self._enter_eigenvalues(survey, point, into)
            self._enter_interaction(survey, point, into)
        return into

    def measure_update(self, point: Point[HessianOperator]) -> Measured:
        """How the mini-batches' losses change along the step: to second order, and really."""
        survey, into = self.read(point, Wanted(update=_update(point))), Measured({})
        slopes, bends = survey["slopes"], survey["bends"]
        if bool((slopes == 0).all()):
            into.notes["no_update"] = "the step left the weights where they were"
        else:
            self._enter(into, "update_edge", lambda: update_edge(slopes, bends))
        self._enter(into, "predicted_change", lambda: predicted_change(slopes, bends))
        self._enter(into, "realized_change", lambda: mean_estimate(survey["after"] - survey["loss"]))
        return into

    def measure_step(self, point: Point[HessianOperator]) -> Measured:
        """On the batch that the step was made of: its curvature along its gradient, and along the step."""
        batch, into = point.subject, Measured({})
        gradient = batch.gradient
        square = inner(gradient, gradient)
        if square > 0:
            into.scalars[self._key("step_sharpness")] = inner(gradient, batch.product(gradient)) / square
        update = _update(point)
        slope = 0.0 if update is None else inner(gradient, update)
        if update is not None and slope:
            edge = -inner(update, batch.product(update)) / (2 * slope)
            into.scalars[self._key("step_edge")] = edge
            rates = point.optimization.rates if point.optimization is not None else ()
            if len(rates) == 1 and rates[0] > 0:
                into.scalars[self._key("step_sharpness_momentum")] = 2 * edge / rates[0]
        return into

    def _enter_batch_sharpness(self, survey: Survey, point: Point[HessianOperator], into: Measured) -> None:
        along, norms = survey["along_own"], survey["squared_norms"]
        # only these two columns are needed
        drawn = DrawnCurvature(norms, along, along, survey["dots_mean"], 0.0)
        value = self._enter(into, "batch_sharpness", lambda: batch_sharpness(drawn))
        self._enter(into, "batch_sharpness_of_means", lambda: batch_sharpness_ratio_of_means(drawn))
        if value is None:
            return
        scalar = point.rule.scalar
        if point.rule.unavailable is not None:
            if point.rule.is_unknown:
                into.notes["no_threshold"] = point.rule.unavailable
        elif "step_norms" in survey:
            steps = survey["step_norms"]
            if bool((steps > 0).all()):
                self._enter(into, "edge_ratio", lambda: mean_estimate(survey["step_along"] / steps / 2))
        elif scalar is not None:
            self._enter(into, "edge_ratio", value.scaled(scalar[0] / 2))
        if point.rule.threshold is not None:
            into.scalars[self._key("stability_threshold")] = point.rule.threshold
        if point.clipping is not None and point.clipping.steps and point.clipping.clipped_share > 0:
            into.notes["clipping"] = "the ratio assumes the unclipped step"
        rule = point.optimization.sgd if point.optimization is not None else "unknown"
        if isinstance(rule, Sgd) and rule.momentum and not rule.weight_decay:
            low, _ = plateaus(rule.lr, rule.momentum, rule.nesterov)
            into.scalars[self._key("small_batch_level")] = low
            self._enter(into, "edge_ratio_small_batch", value.scaled(1 / low))

    def _enter_eigenvalues(self, survey: Survey, point: Point[HessianOperator], into: Measured) -> None:
        found = self.leading(point, 1, 0, _TOLERANCE)
        into.scalars[self._key("top_1")] = float(found.top.values[0])
        into.errors[self._key("top_1")] = float(found.top.bounds[0])
        into.notes["converged"] = found.converged
        solved = survey["tops"] != 0
        tops, along = survey["tops"][solved], survey["along_top"][solved]
        if len(tops) > 1:
            self._enter(into, "minibatch_top_1", lambda: minibatch_sharpness(tops))
            self._enter(into, "gap", lambda: sharpness_gap(tops, along))
            into.notes["solved"] = {"mini_batches": len(tops), "bound": float(survey["top_bounds"].max())}

    def _enter_interaction(self, survey: Survey, point: Point[HessianOperator], into: Measured) -> None:
        drawn = _drawn(survey, inner(survey.mean, survey.mean))
        value = self._enter(into, "gni", lambda: gni(drawn))
        self._enter(into, "ias", lambda: ias(drawn))
        rule = point.optimization.sgd if point.optimization is not None else "unknown"
        if not isinstance(rule, Sgd) or rule.nesterov or rule.weight_decay:
            point.memory.pop("balance", None)
            reason = rule if isinstance(rule, str) else "no theory of Nesterov momentum or weight decay"
            into.notes["no_balance"] = reason
            return
        curvature: Estimate | None = Estimate(0.0, 0.0)
        if rule.momentum:
            curvature = self._enter(into, "gradient_sharpness", lambda: gradient_sharpness(drawn))
        if value is not None and curvature is not None:
            level = predicted_gni(rule.lr, rule.momentum, curvature.value)
            share = 2 * rule.momentum / (1 + rule.momentum)
            self._enter(into, "gni_predicted", Estimate(level, share * (curvature.error or 0.0)))
        points, rates = _remember(point.memory, drawn, rule, self.window)
        self._enter(into, "balance_ratio", lambda: balance_ratio(points, rates, rule.momentum))
        into.notes["balance_points"] = len(points)


def _metric(point: Point[HessianOperator]) -> Metric | None:
    """The optimizer's geometry, where it is another than that of θ, up to a factor."""
    rule = point.rule
    if rule.unavailable is not None or (rule.scalar is not None and rule.scalar[1] == 0):
        return None
    hessian = point.subject
    scale, decay = rule.diagonals(hessian.layout.shapes, like=hessian.gradient)
    weights = flat_weights(hessian.layout, point.weights, hessian.gradient)
    return Metric(scale.square(), decay, decay * weights)


def _update(point: Point[HessianOperator]) -> Tensor | None:
    """Δ = θ_{t+1} - θ_t, shape ``(size,)``."""
    if point.after is None:
        return None
    layout, like = point.subject.layout, point.subject.gradient
    return flat_weights(layout, point.after, like) - flat_weights(layout, point.weights, like)


def _momentum(point: Point[HessianOperator]) -> bool:
    rule = point.optimization.sgd if point.optimization is not None else "unknown"
    return isinstance(rule, Sgd) and rule.momentum > 0


def _drawn(survey: Survey, mean_squared_norm: float) -> DrawnCurvature:
    optional = {name: survey[name] for name in ("along_mean", "along_cross", "dots_image") if name in survey}
    return DrawnCurvature(
        survey["squared_norms"],
        survey["along_own"],
        survey["along_partner"],
        survey["dots_mean"],
        mean_squared_norm,
        **optional,
    )


def _remember(
    memory: dict[str, Any], drawn: DrawnCurvature, rule: Sgd, window: int
) -> tuple[list[DrawnCurvature], list[float]]:
    """The last points' numbers, this one included, and their learning rates; those of another momentum are dropped."""
    # without momentum the last three do not count
    columns = [getattr(drawn, name) for name in _COLUMNS]
    facts = torch.tensor([rule.lr, rule.momentum, drawn.mean_squared_norm], dtype=torch.float64)
    zeros = torch.zeros(len(drawn), dtype=torch.float64)
    row = torch.stack([zeros if column is None else column for column in columns])
    before, known = memory.get("balance"), memory.get("balance_facts")
    if before is None or known is None or before.shape[1:] != row.shape or not bool((known[:, 1] == facts[1]).all()):
        before, known = row[None][:0], facts[None][:0]
    memory["balance"] = torch.cat([before, row[None]])[-window:]
    memory["balance_facts"] = torch.cat([known, facts[None]])[-window:]
    points = [
        DrawnCurvature(**dict(zip(_COLUMNS, each, strict=True)), mean_squared_norm=float(fact[2]))
        for each, fact in zip(memory["balance"], memory["balance_facts"], strict=True)
    ]
    return points, [float(rate) for rate in memory["balance_facts"][:, 0]]
