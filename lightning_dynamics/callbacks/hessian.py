"""The Hessian of the training loss, tracked: sharpness against the edge of stability."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_dynamics.callbacks.cadence import Cadence, check_flag, check_number, check_positive_integer
from lightning_dynamics.callbacks.curvature import CurvatureMonitor
from lightning_dynamics.callbacks.hessian_findings import Findings, enlarged, measure_sharpening_rate, rounding_of
from lightning_dynamics.callbacks.hessian_spectrum import (
    DETAIL,
    Spectrum,
    measure_layers,
    measure_overlap,
    measure_spectrum,
)
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn
from lightning_dynamics.callbacks.measured import Measured, Point
from lightning_dynamics.callbacks.perturbation import Perturbation
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.linalg import (
    CongruentOperator,
    ExtremalEigenpairs,
    SymmetricOperator,
    eigenpairs,
    most_rows,
)
from lightning_dynamics.metrics import StabilityRule, sam_oscillation
from lightning_dynamics.objective import Engine, HessianOperator, Kind, Layout, OutputFn, ParameterFilter, Part
from lightning_dynamics.objective.memory import double_precision
from lightning_dynamics.recording.quantity import QuantityTable, layer_keys

_CHECK_EVERY = 10  # measurements between checks that no eigenvalue is missed
_BIAS_EVERY = 10  # measurements between estimates of the probe's bias
_AUDIT_SLOWLY = 100  # measurements between comparisons with double precision on devices that are slow at it
_AUDITED = 4  # top eigenvectors that are multiplied in double precision
_VECTORS = 1e-4  # tolerance of eigenvalues at which their vectors are good enough to be compared
_SAME_LOSS = 0.05  # relative difference that rounding to bfloat16 makes in a loss; a fiftieth of it to float32
_LOSS_ROUNDING = 1e-6  # absolute difference: losses of networks that are certain of everything

_CLIPPING = ("clip_factor", "clipped_share")  # logged where there is clipping
_OSCILLATION = ("sam_oscillation",)  # logged where there is SAM

Matrix = Literal["hessian", "preconditioned", "gauss_newton", "residual", "fisher", "empirical_fisher"]
"""The matrices that a :class:`HessianMonitor` can measure: those of :data:`Kind`, and the preconditioned Hessian."""


class HessianMonitor(CurvatureMonitor):
    """Tracks the extreme eigenvalues of the loss Hessian, and now and then measures its whole spectrum.

    The loss is the one that ``training_step`` returns, as it is trained, on a fixed :class:`Probe` of the training set
    with fixed noise, at the weights θ_t of each measured step. Nothing of the run changes: weights, optimizer, random
    numbers and logged values stay bit for bit what they would have been.

    Args:
        top_k: Number of largest eigenvalues, at least 1.
        bottom_k: Number of smallest eigenvalues.
        every_n_train_steps: Steps between points. By default as often as costs at most 10 % of training (15 % where no
            whole spectrum is measured by itself), counted in gradients; the number chosen is printed.
        every_n_epochs: Epochs between points, instead of steps.
        log_spaced: Ten points per decade of steps; with ``every_n_train_steps`` only until the spacing has grown to it.
        pair: Measure two consecutive steps for each point and log their mean. At the edge sharpness alternates from
            step to step, so that an even cadence would show one of its phases for ever.
        spectrum: When and how to measure the whole spectrum, see :class:`Spectrum`; False for never.
        operator: Which matrix: ``"hessian"``; ``"preconditioned"``, C^½(H + W)C^½ with the optimizers' effective steps
            C and coupled weight decay W, half of whose largest eigenvalue is the edge ratio; ``"gauss_newton"``;
            ``"residual"``, the Hessian minus Gauss-Newton; ``"fisher"``; ``"empirical_fisher"``. See :data:`Kind`. Its
            name is the first part of the keys. Several of these in one Trainer share their evaluations if they agree
            in all options that say what is measured on what, ``output_fn`` included.
        output_fn: Where the network's outputs are, for Gauss-Newton and Fisher matrices: the name of the submodule that
            returns them, or a function of module and batch, see :data:`OutputFn`.
        sharpening_rate: Also measure the rate -∇λ₁·∇L at which gradient flow changes the sharpness, by third
            derivatives: three more passes for each point, at about two products each.
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
            keeps them if they and the solver's vectors fit into half of the free memory.
        also_log: Which of the numbers that stand in the record go to the loggers as well: regular expressions for whole
            keys without their first part, such as ``"spectral_sparsity"`` or ``"block_.*"``; ``".*"`` for all.
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
        - With the whole spectrum: ``hessian/density`` (histogram and figure), ``hessian/trace``,
          ``hessian/effective_parameters``, and ``hessian/overlap_previous`` and ``overlap_first``, how far the span of
          the top eigenvectors has stayed where it was (Hessian inertia), where it is certified.
        - Where the strategy is SAM: ``hessian/sam_oscillation``, λ₁(1 + ρλ₁/G)/λ* with the stability threshold λ* of
          the base optimizer, where it is one number, and the norm G of the gradient that perturbed the step before: 1
          where training has settled into SAM's oscillation along the leading eigenvector. That is so at any λ₁ < λ*,
          so it is no edge; and ``hessian/edge_ratio`` remains that of the base optimizer.
        - With gradient clipping: ``hessian/clip_factor`` and ``hessian/clipped_share`` since the last point; the
          effective step is that much smaller, and the ratio that much too large.

        Each record also holds ``top_1_swing`` (half of the difference within a pair), ``gradient_in_top_k``, now and
        then ``probe_bias`` (mean top eigenvalue of the two halves of the probe minus that of the whole), errors or
        bounds, how far out a missed eigenvalue could lie, and what else a :class:`Spectrum` asks for.

    Cost:
        With the defaults a measurement takes 20 to 30 Hessian products at first, 8 to 22 later, and about 7 at the
        second step of a pair, at 1.4 to 2.8 gradients on the probe each; and 3 gradients to build the graph. A whole
        spectrum takes 150 to 190 products. Gauss-Newton and Fisher products cost 1.3 to 2.8 gradients, those of the
        residual as much as both. Memory: that graph (3 to 4 training steps on the probe, once more for each further
        matrix), up to 64 vectors of the size of the parameters during a measurement, 8 between, and with spectra
        ``2·top_k`` more; where errors are compared with double precision, one graph in that.

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
        spectrum: bool | Spectrum = True,
        operator: Matrix = "hessian",
        output_fn: OutputFn | None = None,
        sharpening_rate: bool = False,
        probe: Probe | None = None,
        parameters: ParameterFilter | None = None,
        loss_fn: LossFn | None = None,
        weight_fn: WeightFn | None = None,
        mode: Literal["train", "eval"] = "train",
        precision: Literal["float32", "same"] = "float32",
        noise_draws: int = 1,
        tolerance: float = 1e-3,
        engine: Engine = "auto",
        also_log: str | Sequence[str] = (),
        monitor: bool = False,
        name: str | None = None,
    ) -> None:
        check_positive_integer("top_k", top_k)
        check_positive_integer("bottom_k", bottom_k, least=0)
        check_number("tolerance", tolerance, below=1.0)
        check_flag("sharpening_rate", sharpening_rate)
        if not isinstance(spectrum, (bool, Spectrum)):
            raise MisconfigurationException(f"`spectrum` must be True, False or a Spectrum, got {spectrum!r}.")
        _check_operator(operator, output_fn)
        self.top_k = top_k
        self.bottom_k = bottom_k
        self.tolerance = tolerance
        self.operator = operator
        self.sharpening_rate = sharpening_rate
        self.spectrum = (Spectrum() if spectrum else None) if isinstance(spectrum, bool) else spectrum
        self._table = hessian_table(top_k, bottom_k, operator, name)
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
                output_fn=output_fn,
            ),
            pair=pair,
            detail=None if self.spectrum is None else self.spectrum.cadence,
            also_log=also_log,
            monitor=monitor,
            name=name,
        )

    @property
    def table(self) -> QuantityTable:
        return self._table

    @property
    def kinds(self) -> frozenset[Kind]:
        wanted: set[Kind] = {"hessian"} if self._is_hessian or self.operator == "preconditioned" else {self.operator}
        return frozenset(wanted)

    @property
    def products_per_point(self) -> float:
        # points that far apart find the vectors turned; within a pair they have hardly moved
        pairs = self.top_k + self.bottom_k
        first, second = 4 + 4 * pairs, 3 + pairs
        check, graph = 8 / _CHECK_EVERY, 1.3
        audit = 2 * (1.3 + min(self.top_k, _AUDITED) + min(self.bottom_k, 1)) / _CHECK_EVERY
        rate = 6 if self.sharpening_rate else 0  # three third derivatives
        once = first + graph + check + audit + rate
        return self._dearness * (once + (second + graph + rate if self.pair else 0))

    def products_in_detail(self, layout: Layout) -> float:
        if self.spectrum is None:
            return 0.0
        whole = self.spectrum.products + 24 + 8 * (self.top_k + self.bottom_k)
        sizes = [stop - start for start, stop in layout.blocks().values()]
        layers = (self.spectrum.products + 20) * len(sizes) if self.spectrum.per_layer else 0
        return self._dearness * (whole + layers + sum(min(self.spectrum.diagonal, size) for size in sizes))

    @property
    def _dearness(self) -> int:
        """Products that one with the matrix takes."""
        return 2 if self.operator == "residual" else 1

    @property
    def vectors_held(self) -> int:
        # the solver's basis, its results, what is kept from one measurement to the next
        return most_rows(self.top_k + 1, self.bottom_k) + 4 * (self.top_k + self.bottom_k)

    @property
    def variant(self) -> str | None:
        return self.name if self._is_hessian else self.table.family

    detail_name = "the whole spectrum"
    detail_option = "`spectrum=Spectrum(every_n_train_steps=…)`"

    @property
    def _is_hessian(self) -> bool:
        return self.operator == "hessian"

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "operator": self.operator,
            "top_k": self.top_k,
            "bottom_k": self.bottom_k,
            "tolerance": self.tolerance,
            "engine": self.options.engine,
            "spectrum": None if self.spectrum is None else asdict(self.spectrum),
        }

    def check(self, subject: HessianOperator) -> None:
        if self.top_k + self.bottom_k > subject.size:
            raise ValueError(
                f"`top_k` ({self.top_k}) and `bottom_k` ({self.bottom_k}) ask for more eigenvalues than there are "
                f"measured parameters ({subject.size})."
            )
        if self.spectrum is not None and (self.spectrum.per_layer or self.spectrum.diagonal):
            layer_keys(subject.layout.blocks())

    def measure(self, point: Point[HessianOperator]) -> Measured:
        hessian = point.subject
        _forget_if_changed(point.memory, hessian.layout)
        into = Findings()
        into.enter("probe_loss", hessian.loss)
        into.enter("gradient_norm", float(hessian.gradient.norm()))
        into.notes["engine"] = "kept" if hessian.is_kept else "rebuilt"
        into.notes["dtype"] = str(hessian.dtype).removeprefix("torch.")
        into.notes["double_precision"] = double_precision(hessian.device)
        if point.clipping is not None and point.clipping.steps:
            into.enter("clip_factor", point.clipping.mean_factor)
            into.enter("clipped_share", point.clipping.clipped_share)
            into.notes["clipping"] = "the ratio assumes the unclipped step"
        operator = self._matrix(hessian, point.rule)
        if operator is None:
            into.notes["no_spectrum"] = point.rule.unavailable
            return self._keyed(into)
        found = self._track(operator, point)
        into.products += found.products
        self._enter_eigenvalues(found, into)
        if self.operator != "preconditioned":
            self._enter_gradient_share(found, hessian, into)
        if self._is_hessian:
            self._compare_with_the_edge(point, found, into)
            _compare_with_the_cycle(point, found, into)
            if self.sharpening_rate:
                measure_sharpening_rate(hessian, found.top, into)
            if point.has_halves and point.count % _BIAS_EVERY == 0:
                into.values["probe_bias"] = self._probe_bias(point, found, into)
        if point.in_detail and self.spectrum is not None:
            decays = set(point.rule.shifts.values())
            # what is preconditioned contains the decay, and has another unit
            decay = decays.pop() if len(decays) == 1 and self.operator != "preconditioned" else 0.0
            measure_spectrum(operator, found, self.spectrum, decay, point.generator, into)
            if self.spectrum.per_layer or self.spectrum.diagonal:
                blocks = hessian.layout.blocks()
                keys = layer_keys(blocks)
                ranges = {keys[layer]: place for layer, place in blocks.items()}
                measure_layers(operator, ranges, self.spectrum, self.tolerance, point.generator, into)
            measure_overlap(found, self.top_k, point.step, point.memory, into)
        measured = self._keyed(into)
        if not self.audits(point.count, measured):
            return enlarged(measured, self.table.family, point.memory.get("rounding"))
        ends = [(found.top, min(self.top_k, _AUDITED)), (found.bottom, min(self.bottom_k, 1))]
        point.memory["leading"] = [
            (end.vectors[i].clone(), float(end.values[i]), float(end.residuals[i]))
            for end, count in ends
            for i in range(count)
        ]
        return measured

    def audits(self, count: int, measured: Measured) -> bool:
        notes = measured.notes
        if "converged" not in notes or notes["dtype"] == "float64" or notes["double_precision"] == "missing":
            return False
        every = _CHECK_EVERY if notes["double_precision"] == "fast" else _AUDIT_SLOWLY
        return count % every == 0 or "overlap" in notes

    def audit(
        self, measured: Measured, rule: StabilityRule, memory: dict[str, Any], subject: HessianOperator
    ) -> Measured:
        """What rounding does to the matrix: ‖(A₆₄ - A)v‖ for the outermost eigenvectors, relative to ‖A‖."""
        leading = memory.pop("leading")
        loss = measured.scalars[f"{self.table.family}/probe_loss"]
        same = _SAME_LOSS if self.options.precision == "same" else _SAME_LOSS / 50
        if not abs(subject.loss - loss) <= same * max(abs(loss), abs(subject.loss)) + _LOSS_ROUNDING:
            raise ValueError("the step draws other noise in double precision")
        operator = self._matrix(subject, rule)
        assert operator is not None, "there was one in single precision"
        memory["rounding"] = rounding_of(operator, leading) / max(measured.notes["norm"], 1e-300)
        measured.notes["products"] += len(leading)
        return enlarged(measured, self.table.family, memory["rounding"])

    def unaudited(self, measured: Measured, memory: dict[str, Any], reason: str) -> Measured:
        memory.pop("leading", None)
        older = enlarged(measured, self.table.family, memory.get("rounding"))
        return replace(older, notes={**older.notes, "rounding": f"not known: {reason}"})

    def combine(self, first: Measured, second: Measured) -> Measured:
        # what is measured in detail belongs to the first step, whatever is due at the second
        brief = {k: v for k, v in second.scalars.items() if not k.startswith(tuple(self._in_detail))}
        joined = super().combine(first, replace(second, scalars=brief))
        top = f"{self.table.family}/top_1"
        if top in first.scalars and top in second.scalars:
            swing = (first.scalars[top] - second.scalars[top]) / 2
            joined.scalars[f"{self.table.family}/top_1_swing"] = abs(swing)
        joined.notes["products"] = first.notes["products"] + second.notes["products"]
        return joined

    def shown(self, clips: bool, sharpens: bool = False) -> list[str]:
        more = [*(_CLIPPING if clips else ()), *(_OSCILLATION if sharpens and self._is_hessian else ())]
        return super().shown(clips, sharpens) + more

    @property
    def _in_detail(self) -> list[str]:
        return [f"{self.table.family}/{key}" for key in DETAIL]

    def logged(self, measured: Measured) -> dict[str, float]:
        present = {f"{self.table.family}/{key}" for key in (*_CLIPPING, *_OSCILLATION)}
        return super().logged(measured) | {k: v for k, v in measured.scalars.items() if k in present}

    def _matrix(self, hessian: HessianOperator, rule: StabilityRule) -> SymmetricOperator | None:
        """The matrix whose spectrum is measured; None where there is none yet."""
        if self._is_hessian:
            return hessian
        if self.operator != "preconditioned":
            return hessian.operator(self.operator)
        if rule.unavailable is not None:
            return None
        scale, shifts = rule.diagonals(hessian.layout.shapes, like=hessian.gradient)
        return CongruentOperator(hessian, scale, shifts)

    def _track(self, operator: SymmetricOperator, point: Point[HessianOperator]) -> ExtremalEigenpairs:
        """Eigenvalues from the old vectors; afresh in detail; from time to time with a check that none was missed."""
        start = None if point.in_detail else point.memory.get("subspace")
        checks = start is None or point.count % _CHECK_EVERY == 0
        # in detail one more, for the gap below the last: the vectors have to be good as well
        more = 1 if point.in_detail and self.top_k + self.bottom_k < operator.size else 0
        found = eigenpairs(
            operator,
            self.top_k + more,
            self.bottom_k,
            tolerance=min(self.tolerance, _VECTORS) if point.in_detail else self.tolerance,
            start=start,
            confidence=0.99 if checks else None,
            generator=point.generator,
        )
        point.memory["subspace"] = found.subspace
        return found

    def _enter_eigenvalues(self, found: ExtremalEigenpairs, into: Findings) -> None:
        for end, kind, count in ((found.top, "top", self.top_k), (found.bottom, "bottom", self.bottom_k)):
            for i in range(count):
                into.enter(f"{kind}_{i + 1}", float(end.values[i]), float(end.bounds[i]))
        into.notes["converged"], into.notes["norm"] = found.converged, found.norm
        if found.top.limits is not None:
            into.notes["completeness"] = {
                "confidence": found.top.confidence,
                "top_at_most": found.top.limits.tolist(),
                "bottom_at_least": [] if found.bottom.limits is None else found.bottom.limits.tolist(),
            }

    def _enter_gradient_share(self, found: ExtremalEigenpairs, hessian: HessianOperator, into: Findings) -> None:
        gradient = hessian.gradient
        along = found.top.vectors[: self.top_k] @ gradient
        norm = float(gradient.norm())
        if norm > 0:
            share = min(1.0, (float(along.norm()) / norm) ** 2)
            # two subspaces at an angle differ in any vector's share by at most its sine, if none was missed
            checked = found.top.limits is not None
            into.enter("gradient_in_top_k", share, min(1.0, found.top.subspace_error(self.top_k)) if checked else None)

    def _compare_with_the_edge(self, point: Point[HessianOperator], found: ExtremalEigenpairs, into: Findings) -> None:
        if point.rule.unavailable is not None:
            if point.rule.is_unknown:
                into.notes["no_threshold"] = point.rule.unavailable
            return
        scalar = point.rule.scalar
        if scalar is not None:
            step, shift = scalar
            into.enter("stability_threshold", 2 / step - shift)
            into.enter(
                "edge_ratio", step * (float(found.top.values[0]) + shift) / 2, step * float(found.top.bounds[0]) / 2
            )
            return
        hessian = point.subject
        scale, shifts = point.rule.diagonals(hessian.layout.shapes, like=hessian.gradient)
        edge = self._leading(CongruentOperator(hessian, scale, shifts), point, "edge")
        into.products += edge.products
        into.enter("edge_ratio", float(edge.top.values[0]) / 2, float(edge.top.bounds[0]) / 2)

    def _probe_bias(self, point: Point[HessianOperator], found: ExtremalEigenpairs, into: Findings) -> float:
        """Mean top eigenvalue of the probe's halves minus that of the whole: what half as many samples add."""
        tops = []
        parts: tuple[Part, ...] = ("even", "odd")
        for part in parts:
            half = eigenpairs(
                point.subject.operator("hessian", part),
                1,
                tolerance=self.tolerance,
                start=found.top.vectors,
                confidence=None,
                generator=point.generator,
            )
            into.products += half.products
            tops.append(half.top.values[0])
        return float(sum(tops) / 2 - found.top.values[0])

    def _leading(self, operator: SymmetricOperator, point: Point[HessianOperator], key: str) -> ExtremalEigenpairs:
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

    def _keyed(self, into: Findings) -> Measured:
        def full(numbers: dict[str, Any]) -> dict[str, Any]:
            return {f"{self.table.family}/{key}": value for key, value in numbers.items()}

        notes = {"products": into.products, **into.notes}
        return Measured(full(into.values), full(into.errors), full(into.arrays), notes)


def _check_operator(operator: str, output_fn: OutputFn | None) -> None:
    choices = get_args(Matrix)
    if operator not in choices:
        raise MisconfigurationException(f"`operator` must be one of {', '.join(map(repr, choices))}, got {operator!r}.")
    if operator in ("hessian", "preconditioned"):
        return
    if output_fn is None:
        raise MisconfigurationException(
            f"`operator={operator!r}` needs `output_fn=`: the name of the submodule that returns the network's "
            "outputs, or a function of module and batch."
        )
    if isinstance(output_fn, str) and operator in ("fisher", "empirical_fisher"):
        raise MisconfigurationException(
            f"`operator={operator!r}` needs a function as `output_fn=`, since a module's name gives no "
            f"{'likelihood' if operator == 'fisher' else 'losses of single samples'}."
        )


def _compare_with_the_cycle(point: Point[HessianOperator], found: ExtremalEigenpairs, into: Findings) -> None:
    """How near training is to the oscillation that SAM ends in."""
    how, threshold = point.perturbation, point.rule.threshold
    if how is None:
        return
    if isinstance(how, Perturbation) and threshold is None:
        how = point.rule.unavailable or "the edge of the base optimizer is not one number"
    if isinstance(how, str) or threshold is None:
        into.notes["no_sam_oscillation"] = how
        return
    top, bound = float(found.top.values[0]), float(found.top.bounds[0])
    if top > 0 and threshold > 0:
        into.enter("sam_oscillation", *sam_oscillation(top, threshold, how.reach, bound))


def _forget_if_changed(memory: dict[str, Any], layout: Layout) -> None:
    """Old vectors are of no use once the set of measured parameters has changed."""
    names = ",".join(f"{name}:{tuple(shape)}" for name, shape in layout.shapes.items())
    digest = hashlib.sha256(names.encode()).hexdigest()
    if memory.get("layout") != digest:
        memory.clear()
        memory["layout"] = digest
