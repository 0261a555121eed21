"""The Hessian of the training loss, tracked: sharpness against the edge of stability."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.cadence import Cadence, check_positive_integer
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.linalg import CongruentOperator, ExtremalEigenpairs, SymmetricOperator, eigenpairs
from lightning_dynamics.objective import Engine, HessianOperator, Layout, ParameterFilter
from lightning_dynamics.recording.quantity import QuantityTable

_CHECK_EVERY = 10  # measurements between checks that no eigenvalue is missed
_BIAS_EVERY = 10  # measurements between estimates of the probe's bias


class HessianMonitor(DynamicsMonitor):
    """Tracks the extreme eigenvalues of the loss Hessian and compares the largest with the edge of stability.

    The loss is the one that ``training_step`` returns, as it is trained, on a fixed :class:`Probe` of the training set
    with fixed noise, at the weights θ_t of each measured step. Nothing of the run changes: weights, optimizer, random
    numbers and logged values stay bit for bit what they would have been.

    Args:
        top_k: Number of largest eigenvalues, at least 1.
        bottom_k: Number of smallest eigenvalues.
        every_n_train_steps: Steps between points. By default as often as costs at most 15 % of training, counted in
            gradients; the number chosen is printed.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        pair: Measure two consecutive steps for each point and log their mean. At the edge sharpness alternates from
            step to step, so that an even cadence would show one of its phases for ever.
        probe: The data, see :class:`Probe`. ``Probe(whole=True)`` is the training set.
        parameters: The parameters: a regular expression for whole names, a list of them, or a predicate of name and
            parameter. All that require a gradient by default.
        loss_fn: What to measure where ``training_step`` has no one loss: a function of module and batch, or the name of
            a method that takes a batch.
        weight_fn: Weight of a batch in the mean over probe batches, a function of the batch: the number of terms that
            its loss averages. By default its number of samples.
        mode: ``"train"`` measures with the training flags that the module trains with, ``"eval"`` in evaluation mode.
        precision: ``"float32"`` computes in at least that; ``"same"`` in the run's own precision.
        noise_draws: Draws of the noise (dropout) that the loss is averaged over; cost grows with it.
        tolerance: Allowed error of the top eigenvalues, relative.
        engine: ``"kept"`` keeps gradient graphs for all products, ``"rebuilt"`` builds them anew for each, ``"auto"``
            keeps them if they fit into half of the free memory.
        monitor: Let ``EarlyStopping`` and ``ModelCheckpoint`` monitor the logged keys.
        name: Tells apart two of these in one Trainer; keys then begin with ``hessian_<name>/``.

    Logs:
        - ``hessian/edge_ratio``: λmax(C^½(H + W)C^½)/2, the *deterministic* edge (see :class:`StabilityRule`); 1 is the
          edge. The headline where the batch is the data set; in mini-batch training it stays below 1.
        - ``hessian/top_1`` … ``top_k``: largest eigenvalues, loss/θ².
        - ``hessian/bottom_1`` … : smallest eigenvalues, loss/θ².
        - ``hessian/stability_threshold``: the largest stable eigenvalue, loss/θ², where it is one number (2/η for
          gradient descent). None for unknown optimizers, and subclasses count as such.
        - ``hessian/probe_loss``, ``hessian/gradient_norm``: of the probe, loss and loss/θ.
        - With gradient clipping: ``hessian/clip_factor`` and ``hessian/clipped_share`` since the last point; the
          effective step is that much smaller, and the ratio that much too large.

        Each record also holds ``top_1_swing`` (half of the difference within a pair), now and then ``probe_bias`` (mean
        top eigenvalue of the two halves of the probe minus that of the whole), bounds on all eigenvalues, and how far
        out a missed one could lie.

    Cost:
        With the defaults a measurement takes 20 to 30 Hessian products at first, 8 to 22 later, and about 7 at the
        second step of a pair, at 1.4 to 2.8 gradients on the probe each; and 3 gradients to build the graph. Memory:
        that graph (3 to 4 training steps on the probe), up to 64 vectors of the size of the parameters during a
        measurement, 8 between.

    Example:
        >>> from lightning_dynamics import HessianMonitor, Probe
        >>> monitor = HessianMonitor(every_n_train_steps=100, probe=Probe(size=1024))
    """

    def __init__(
        self,
        top_k: int = 3,
        bottom_k: int = 1,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        log_spaced: bool = False,
        pair: bool = True,
        probe: Probe | None = None,
        parameters: ParameterFilter | None = None,
        loss_fn: LossFn | None = None,
        weight_fn: WeightFn | None = None,
        mode: Literal["train", "eval"] = "train",
        precision: Literal["float32", "same"] = "float32",
        noise_draws: int = 1,
        tolerance: float = 1e-3,
        engine: Engine = "auto",
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        check_positive_integer("top_k", top_k)
        check_positive_integer("bottom_k", bottom_k, least=0)
        if not 0 < tolerance < 1:
            raise MisconfigurationException(f"`tolerance` must lie between 0 and 1, got {tolerance!r}.")
        self.top_k = top_k
        self.bottom_k = bottom_k
        self.tolerance = tolerance
        super().__init__(
            Cadence(every_n_train_steps, every_n_epochs, log_spaced),
            ObjectiveOptions(
                probe=probe if probe is not None else Probe(),
                parameters=parameters,
                loss_fn=loss_fn,
                weight_fn=weight_fn,
                mode=mode,
                precision=precision,
                noise_draws=noise_draws,
                engine=engine,
            ),
            pair=pair,
            monitor=monitor,
            name=name,
        )
        self._table = hessian_table(top_k, bottom_k, "hessian" if name is None else f"hessian_{name}")

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def products_per_point(self) -> float:
        # points that far apart find the vectors turned; within a pair they have hardly moved
        pairs = self.top_k + self.bottom_k
        first, second = 4 + 4 * pairs, 3 + pairs
        check, graph = 8 / _CHECK_EVERY, 1.3
        return first + graph + check + (second + graph if self.pair else 0)

    def describe(self) -> dict[str, Any]:
        return {
            "top_k": self.top_k,
            "bottom_k": self.bottom_k,
            "tolerance": self.tolerance,
            "engine": self.options.engine,
        }

    def check(self, size: int) -> None:
        if self.top_k + self.bottom_k > size:
            raise ValueError(
                f"`top_k` ({self.top_k}) and `bottom_k` ({self.bottom_k}) ask for more eigenvalues than there are "
                f"measured parameters ({size})."
            )

    def measure(self, point: Point) -> Measured:
        hessian = point.hessian
        _forget_if_changed(point.memory, hessian.layout)
        found = self._track(point)
        values = {"probe_loss": hessian.loss, "gradient_norm": float(hessian.gradient.norm())}
        errors: dict[str, float] = {}
        for end, kind in ((found.top, "top"), (found.bottom, "bottom")):
            for i in range(len(end)):
                values[f"{kind}_{i + 1}"] = float(end.values[i])
                errors[f"{kind}_{i + 1}"] = float(end.bounds[i])
        notes: dict[str, Any] = {
            "products": found.products,
            "converged": found.converged,
            "engine": "kept" if hessian.is_kept else "rebuilt",
        }
        if found.top.limits is not None:
            notes["completeness"] = {
                "confidence": found.top.confidence,
                "top_at_most": found.top.limits.tolist(),
                "bottom_at_least": [] if found.bottom.limits is None else found.bottom.limits.tolist(),
            }
        if point.rule.unavailable is None:
            self._compare_with_the_edge(point, found, values, errors)
        elif point.rule.is_unknown:
            notes["no_threshold"] = point.rule.unavailable
        if point.has_halves and point.count % _BIAS_EVERY == 0:
            values["probe_bias"] = self._probe_bias(point, found)
        if point.clipping is not None and point.clipping.steps:
            values["clip_factor"] = point.clipping.mean_factor
            values["clipped_share"] = point.clipping.clipped_share
            notes["clipping"] = "the ratio assumes the unclipped step"
        return Measured(self._keyed(values), self._keyed(errors), notes=notes)

    def combine(self, first: Measured, second: Measured) -> Measured:
        joined = super().combine(first, second)
        top = f"{self.table.family}/top_1"
        swing = (first.scalars[top] - second.scalars[top]) / 2
        joined.scalars[f"{self.table.family}/top_1_swing"] = abs(swing)
        joined.notes["products"] = first.notes["products"] + second.notes["products"]
        return joined

    def logged(self, measured: Measured) -> dict[str, float]:
        clipping = {f"{self.table.family}/{key}" for key in ("clip_factor", "clipped_share")}
        return super().logged(measured) | {k: v for k, v in measured.scalars.items() if k in clipping}

    def _track(self, point: Point) -> ExtremalEigenpairs:
        """Eigenvalues from the old vectors; from time to time with a check that none was missed."""
        start = point.memory.get("subspace")
        checks = start is None or point.count % _CHECK_EVERY == 0
        found = eigenpairs(
            point.hessian,
            self.top_k,
            self.bottom_k,
            tolerance=self.tolerance,
            start=start,
            confidence=0.99 if checks else None,
            generator=point.generator,
        )
        point.memory["subspace"] = found.subspace
        return found

    def _compare_with_the_edge(
        self, point: Point, found: ExtremalEigenpairs, values: dict[str, float], errors: dict[str, float]
    ) -> None:
        scalar = point.rule.scalar
        if scalar is not None:
            step, shift = scalar
            values["stability_threshold"] = 2 / step - shift
            values["edge_ratio"] = step * (float(found.top.values[0]) + shift) / 2
            errors["edge_ratio"] = step * float(found.top.bounds[0]) / 2
            return
        hessian = point.hessian
        scale, shifts = point.rule.diagonals(hessian.layout.shapes, like=hessian.gradient)
        edge = self._leading(CongruentOperator(hessian, scale, shifts), point, "edge")
        values["edge_ratio"] = float(edge.top.values[0]) / 2
        errors["edge_ratio"] = float(edge.top.bounds[0]) / 2

    def _probe_bias(self, point: Point, found: ExtremalEigenpairs) -> float:
        """Mean top eigenvalue of the probe's halves minus that of the whole: what half as many samples add."""
        tops = []
        for half in ("even", "odd"):
            part = _Half(point.hessian, half)
            start = found.top.vectors
            tops.append(
                eigenpairs(
                    part, 1, tolerance=self.tolerance, start=start, confidence=None, generator=point.generator
                ).top.values[0]
            )
        return float(sum(tops) / 2 - found.top.values[0])

    def _leading(self, operator: SymmetricOperator, point: Point, key: str) -> ExtremalEigenpairs:
        found = eigenpairs(
            operator,
            1,
            tolerance=self.tolerance,
            start=point.memory.get(key),
            confidence=None,
            generator=point.generator,
        )
        point.memory[key] = found.subspace
        return found

    def _keyed(self, values: dict[str, float]) -> dict[str, float]:
        return {f"{self.table.family}/{key}": value for key, value in values.items()}


class _Half:
    """The Hessian of the mean loss over half of the probe's batches."""

    def __init__(self, hessian: HessianOperator, part: Literal["even", "odd"]) -> None:
        self._hessian = hessian
        self._part = part

    @property
    def size(self) -> int:
        return self._hessian.size

    @property
    def dtype(self) -> Any:
        return self._hessian.dtype

    @property
    def device(self) -> Any:
        return self._hessian.device

    def __call__(self, vector: Tensor) -> Tensor:
        return self._hessian.product(vector, self._part)


def _forget_if_changed(memory: dict[str, Any], layout: Layout) -> None:
    """Old vectors are of no use once the set of measured parameters has changed."""
    names = ",".join(f"{name}:{tuple(shape)}" for name, shape in layout.shapes.items())
    digest = hashlib.sha256(names.encode()).hexdigest()
    if memory.get("layout") != digest:
        memory.clear()
        memory["layout"] = digest
