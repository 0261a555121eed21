"""The causal test of the edge: the same training from the same checkpoint, with one thing changed."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer import Trainer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.lightning_objective import LossFn, ObjectiveOptions, WeightFn, lightning_objective
from lightning_dynamics.callbacks.lightning_replay import Circumstances
from lightning_dynamics.callbacks.map_style import MapStyleSource, ProbeItem
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.experiments.data_order import DataSource, OrderedData
from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import fork_rng, seed_everything, stream_seed
from lightning_dynamics.objective.replay import batch_length
from lightning_dynamics.recording.figures.style import BLUE, GREEN, GREY, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL = "control"
_COLOURS = (VERMILION, BLUE, GREEN, PURPLE)
_DEFAULTS = {"devices": 1, "max_epochs": -1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
_BEYOND = 1e30  # where an infinite loss is drawn, outside of the figure
_OURS = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "default_root_dir")


@dataclass(frozen=True)
class Branch:
    """The one thing that a branch does otherwise than the control.

    Attributes:
        lr: What every learning rate is multiplied by.
        batch_size: What the batch size is multiplied by; the product is rounded.
    """

    lr: float = 1.0
    batch_size: float = 1.0

    def __post_init__(self) -> None:
        values = (self.lr, self.batch_size)
        if not all(isinstance(value, (int, float)) and 0 < value < math.inf for value in values):
            raise ValueError(f"`lr` and `batch_size` are positive factors, got lr={self.lr}, {self.batch_size=}.")
        if (self.lr != 1) == (self.batch_size != 1):
            raise ValueError(
                "A branch changes one thing, the learning rate or the batch size; "
                f"got lr={self.lr:g}, batch_size={self.batch_size:g}."
            )

    @property
    def noise(self) -> float:
        """By what η/b grows, and with it the loss of a run that is stationary under its own noise; at least 1."""
        return max(1.0, self.lr / self.batch_size)


@dataclass(frozen=True)
class Run:
    """What was seen of one run.

    Attributes:
        name: The branch.
        branch: What it changed; None for the control.
        lr: Learning rates of all parameter groups in its first step.
        batch_size: Its batch size; None where the loader has no plain one.
        steps: Steps since the checkpoint at which the watched loss was taken, from 0.
        losses: The watched loss there; the last may be infinite.
        training_losses: What the training step returned, averaged over accumulated batches, one per step; NaN where it
            returned nothing.
    """

    name: str
    branch: Branch | None
    lr: Sequence[float]
    batch_size: int | None
    steps: Sequence[int]
    losses: Sequence[float]
    training_losses: Sequence[float]

    @property
    def diverged(self) -> bool:
        """Whether the run was ended by a loss that is not finite."""
        return not all(math.isfinite(loss) for loss in self.losses)

    @property
    def peak(self) -> float:
        """Largest watched loss, infinite for a run that diverged."""
        return math.inf if self.diverged else max(self.losses)

    @property
    def peak_step(self) -> int:
        """Steps since the checkpoint at the peak."""
        return self.steps[-1] if self.diverged else self.steps[list(self.losses).index(self.peak)]


@dataclass(frozen=True)
class EdgeTest:
    """Outcome of :func:`edge_test`.

    Attributes:
        control: The run that went on unchanged.
        branches: The others, by name.
        threshold: See :func:`edge_test`.
        step: Training step of the checkpoint, optimizer steps counted.
        num_watched: Number of samples that the watched loss is of.
    """

    control: Run
    branches: Mapping[str, Run]
    threshold: float
    step: int
    num_watched: int

    def limit(self, name: str) -> float:
        """Watched loss above which this branch counts as catapulted."""
        branch = self.branches[name].branch
        assert branch is not None
        return self.threshold * branch.noise * self.control.peak

    @property
    def catapults(self) -> dict[str, bool | None]:
        """Whether each branch did: its peak is above its :meth:`limit`, or infinite. None if the control diverged."""
        if self.control.diverged:
            return dict.fromkeys(self.branches)
        return {name: run.peak > self.limit(name) for name, run in self.branches.items()}

    def __str__(self) -> str:
        rows = [("", "lr", "batch", "peak", "at step", "peak/control", "limit", "catapults")]
        verdicts = {True: "yes", False: "no", None: "unknown"}
        for run in (self.control, *self.branches.values()):
            is_control = run.branch is None
            rows.append(
                (
                    run.name,
                    ", ".join(f"{lr:.4g}" for lr in dict.fromkeys(run.lr)),
                    "?" if run.batch_size is None else str(run.batch_size),
                    f"{run.peak:.4g}",
                    str(run.peak_step),
                    "" if is_control else f"{run.peak / self.control.peak:.3g}",
                    "" if is_control else f"{self.limit(run.name):.4g}",
                    "" if is_control else verdicts[self.catapults[run.name]],
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        watched = (
            f"Loss of {self.num_watched} samples, {self.control.losses[0]:.4g} at the checkpoint (step {self.step})"
        )
        rule = f"limit: {self.threshold:g} × growth of η/b × peak of the control"
        return "\n".join([watched, *table, rule])

    def figure(self) -> Figure:
        """The watched loss of every run, and each branch's limit as a dotted line of its colour."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 3.6), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        colours = dict(zip(self.branches, itertools.cycle(_COLOURS), strict=False))
        drawn = [*self.branches.values(), self.control]
        limits = [self.limit(name) for name in self.branches]
        verdicts = self.catapults
        for run in drawn:
            colour = colours.get(run.name, GREY)
            label = run.name if run.branch is None else f"{run.name}{', catapults' if verdicts[run.name] else ''}"
            heights = [loss if math.isfinite(loss) else _BEYOND for loss in run.losses]
            axes.plot(run.steps, heights, color=colour, linewidth=1.4, label=label)
            if run.branch is not None and math.isfinite(self.limit(run.name)):
                axes.axhline(self.limit(run.name), color=colour, linestyle=":", linewidth=1.0)
        axes.set_yscale("log")
        # what explodes leaves the figure at the top; limits far above everything stay outside
        top = 30 * max([self.control.losses[0], *(limit for limit in limits if math.isfinite(limit))])
        seen = [loss for run in drawn for loss in run.losses if 0 < loss < math.inf]
        high = max([min(max(seen, default=1.0), top), min(limits)])
        if math.isfinite(high):
            axes.set_ylim(min(seen, default=high) / 1.5, 2 * high)
        axes.set_xlabel("steps since the checkpoint")
        axes.set_ylabel(f"loss of {self.num_watched} samples")
        axes.set_title(f"Edge test from step {self.step}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
        return figure


DEFAULT_BRANCHES = {"η × 2": Branch(lr=2.0), "b / 4": Branch(batch_size=0.25)}


def edge_test(
    make_module: Callable[[], LightningModule],
    data: DataSource,
    checkpoint: str | Path,
    branches: Mapping[str, Branch | Mapping[str, float]] = DEFAULT_BRANCHES,
    *,
    steps: int = 200,
    watch: int | None = 1024,
    watch_every_n_steps: int = 5,
    threshold: float = 2.0,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    weight_fn: WeightFn | None = None,
    weights_only: bool | None = None,
    **trainer: Any,
) -> EdgeTest:
    """Go on from a checkpoint unchanged, and with one thing changed, and see which run catapults.

    A run that is held at the edge of its stability leaves it, upwards, when the learning rate is raised or the batch
    size is lowered; a run far from the edge does not. So a catapult of a branch, and not of the control, is evidence
    that the edge was near (definition: Andreyev and Beneventano, arXiv 2412.20553; the rule of the verdict is ours).

    Every run is a ``Trainer.fit`` from the checkpoint, with optimizer states, momentum buffers and schedulers restored,
    the same seed, and the same samples in the same order; a lower batch size cuts the same permutations into smaller
    batches. Training begins a new pass over the data, wherever in its epoch the checkpoint was taken. Learning rates
    are multiplied while an optimizer steps, and given back afterwards: a scheduler or a step that sets them goes on
    with numbers of its own, and every step is taken at the multiple.

    A branch catapults if its peak of the watched loss exceeds ``threshold · max(1, growth of η/b) ·`` the control's, or
    is not finite (training then ends). The growth of η/b is there since a stationary run's noise, and with it the
    excess of its loss, grows in that proportion on a quadratic: that alone is no catapult.

    Leaves no trace: random number generators are given back, the checkpoint is only read, nothing is logged, printed or
    written. One process; the data set is read in this one.

    Args:
        make_module: Makes the module; called once for each run.
        data: The training data: a loader, a data module, a function that makes either (called once for each run, the
            safest where they have state of their own), or None for the module's own.
        checkpoint: A checkpoint of Lightning's with the states of the optimizers.
        branches: By name, what each changes; the control is always run. Default: twice the learning rate, and a
            quarter of the batch size.
        steps: Steps of each run; a step is what accumulated batches make together.
        watch: Number of samples whose loss is watched, a seeded subset of the training data; None for all of them.
            Loaders that are not plain give their first batches instead.
        watch_every_n_steps: How often; odd by default, since at the edge the loss alternates from step to step.
        threshold: See above.
        seed: Seed of the order of the data, of the training's random numbers and of the subset.
        loss_fn: Watched loss instead of that of ``training_step``, as for the monitors.
        weight_fn: Weight of a watched batch, its number of samples by default, as for the monitors.
        weights_only: Passed to ``Trainer.fit`` where that knows it.
        **trainer: Arguments of the Trainer, those that training had: ``accumulate_grad_batches``,
            ``gradient_clip_val``, ``precision``, … Validation is off unless ``limit_val_batches`` says otherwise.
            ``callbacks`` are copied for each run.

    Raises:
        ValueError: If a branch is unknown, or changes two things or none; if the batch size is to be changed and the
            loader has no plain one; if the checkpoint has no optimizer state; if training ends too early.
    """
    chosen = _checked(branches)
    for name, value in (("steps", steps), ("watch_every_n_steps", watch_every_n_steps), ("watch", watch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if not threshold >= 1:
        raise ValueError(f"`threshold` must be at least 1, got {threshold}.")
    if taken := [name for name in _OURS if name in trainer]:
        raise ValueError(f"The edge test sets {', '.join(f'`{name}`' for name in taken)} itself: it leaves no trace.")
    if not Path(checkpoint).is_file():
        raise ValueError(f"There is no checkpoint {str(checkpoint)!r}.")
    plan = _Plan(
        make_module,
        data,
        Path(checkpoint),
        steps,
        watch,
        watch_every_n_steps,
        seed,
        ObjectiveOptions(Probe(seed=seed), loss_fn=loss_fn, weight_fn=weight_fn, engine="rebuilt"),
        weights_only,
        trainer,
    )
    items: list[ProbeItem] = []
    control = plan.run(CONTROL, None, items)
    runs = {name: plan.run(name, branch, items) for name, branch in chosen.items()}
    num_watched = round(sum(item.weight for item in items))
    return EdgeTest(control[0], {name: run for name, (run, _) in runs.items()}, threshold, control[1], num_watched)


def _checked(branches: Mapping[str, Branch | Mapping[str, float]]) -> dict[str, Branch]:
    if not branches:
        raise ValueError("`branches` is empty: there is nothing to compare with the control.")
    options = [field.name for field in fields(Branch)]
    chosen = {}
    for name, branch in branches.items():
        if name == CONTROL:
            raise ValueError(f"{CONTROL!r} is the run that changes nothing; call the branch otherwise.")
        if isinstance(branch, Mapping):
            if unknown := [key for key in branch if key not in options]:
                raise ValueError(f"Branch {name!r} changes {unknown}; a branch can change {' or '.join(options)}.")
            branch = Branch(**branch)
        if not isinstance(branch, Branch):
            raise ValueError(f"Branch {name!r} must be a Branch, got {branch!r}.")
        chosen[name] = branch
    return chosen


@dataclass(frozen=True)
class _Plan:
    """What all runs have in common."""

    make_module: Callable[[], LightningModule]
    data: DataSource
    checkpoint: Path
    steps: int
    watch: int | None
    every: int
    seed: int
    options: ObjectiveOptions
    weights_only: bool | None
    trainer: Mapping[str, Any]

    def run(self, name: str, branch: Branch | None, items: list[ProbeItem]) -> tuple[Run, int]:
        """One run, and the step it began at. The first one fills ``items`` with the batches that are watched."""
        factors = (1.0, 1.0) if branch is None else (branch.lr, branch.batch_size)
        data = OrderedData(self.data, self.seed, factors[1])
        with fork_rng(), _quiet(), tempfile.TemporaryDirectory() as folder:
            seed_everything(stream_seed(self.seed))
            observer = _Observer(self, factors[0], data, items)
            options: dict[str, Any] = {
                "devices": 1,
                "max_epochs": -1,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
            }
            options.update(self.trainer)
            own: Any = options.pop("callbacks", None) or []
            own = copy.deepcopy(list(own) if isinstance(own, (list, tuple)) else [own])
            fit = Trainer(
                **options,
                callbacks=[*own, observer],
                logger=_compat.DummyLogger(),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            if fit.world_size != 1:
                raise ValueError(f"The edge test runs in one process; the Trainer has {fit.world_size}.")
            knows = "weights_only" in inspect.signature(fit.fit).parameters
            how: dict[str, Any] = {"weights_only": self.weights_only} if knows else {}
            try:
                module = self._checking(self.make_module())
                fit.fit(module, **data.arguments(module), ckpt_path=str(self.checkpoint), **how)
            finally:
                observer.close()
                data.close()
        if not observer.is_done:
            raise ValueError(
                f"Training of {name!r} ended after {observer.count} of {self.steps} steps: something stopped it "
                "(`max_steps`, `max_epochs`, a callback, an interrupt)."
            )
        seen = Run(
            name, branch, observer.lr, data.batch_size, observer.steps, observer.losses, observer.training_losses
        )
        return seen, observer.start

    def _checking(self, module: LightningModule) -> LightningModule:
        """The module, which refuses a checkpoint that training cannot go on from."""
        own = module.on_load_checkpoint

        def check(checkpoint: dict[str, Any]) -> None:
            if not checkpoint.get("optimizer_states"):
                raise ValueError(
                    f"{str(self.checkpoint)!r} holds no optimizer state (was it saved with `weights_only`?): without "
                    "its momentum a branch would differ from training in more than one thing."
                )
            own(checkpoint)

        module.on_load_checkpoint = check  # type: ignore[method-assign]
        return module


class _Observer(Callback):
    """Multiplies the learning rates, watches the loss, and ends the run."""

    def __init__(self, plan: _Plan, factor: float, data: OrderedData, items: list[ProbeItem]) -> None:
        self.start = 0
        self.count = 0
        self.lr: list[float] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.training_losses: list[float] = []
        self.is_done = False
        self._plan = plan
        self._data = data
        self._items = items
        self._pending: list[float] = []
        self._raised = _RaisedRates(factor)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a new pass over the data: positions within an epoch mean something else at another batch size
        trainer.fit_loop.epoch_loop.restarting = False
        self.start = trainer.global_step
        self._raised.attach(trainer.optimizers)
        if not self._items:
            self._items.extend(self._watched(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.count == 0 or (self.count % self._plan.every == 0 and self.steps[-1] != self.count):
            self._watch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            # Lightning has divided what it is about to sum
            self._pending.append(float(loss.detach()) * trainer.accumulate_grad_batches)
        if not self._raised.has_stepped():
            return
        self.lr = self.lr or self._raised.first
        self.count += 1
        self.training_losses.append(sum(self._pending) / len(self._pending) if self._pending else math.nan)
        exploded = any(not math.isfinite(each) for each in self._pending)
        self._pending.clear()
        if exploded or self.count == self._plan.steps:
            self._watch(trainer, pl_module, exploded)

    def close(self) -> None:
        self._raised.close()

    def _watch(self, trainer: Trainer, module: LightningModule, exploded: bool = False) -> None:
        if self.steps and self.steps[-1] == self.count:
            return
        loss = math.inf if exploded else self._loss(trainer, module)
        self.steps.append(self.count)
        self.losses.append(loss)
        if not math.isfinite(loss) and len(self.losses) == 1:
            raise ValueError("The watched loss is not finite at the checkpoint: there is nothing to compare.")
        if not math.isfinite(loss) or self.count >= self._plan.steps:
            self.is_done = trainer.should_stop = True

    def _loss(self, trainer: Trainer, module: LightningModule) -> float:
        objective = lightning_objective(trainer, module, self._plan.options, self._items, Circumstances())
        with objective.linearize() as at:
            total, _ = at.evaluate(keep=False)
            if not at.weights["all"]:
                raise ValueError("`training_step` skipped every watched batch: there is no loss to watch.")
            loss = total / at.weights["all"]
        return loss if math.isfinite(loss) else math.inf

    def _watched(self, trainer: Trainer) -> list[ProbeItem]:
        watch, loader = self._plan.watch, self._data.original
        source = MapStyleSource.of([loader], self._data.original_batch_size, trainer.num_training_batches)
        if isinstance(source, MapStyleSource):
            all_of_them = watch is None or watch >= len(source.members)
            chosen = source.everyone if all_of_them else source.choose(watch or 0, self._plan.seed)
            return source.read(chosen, self._plan.seed, 0, 1)
        if watch is None and not hasattr(loader, "__len__"):
            raise ValueError("The training data has no end: say with `watch=` how many samples to watch.")
        items: list[ProbeItem] = []
        with fork_rng():
            seed_everything(stream_seed(self._plan.seed, 1))
            for index, batch in enumerate(self._data.again()):
                items.append(ProbeItem(private_copy(batch), index, is_ready=False, weight=batch_length(batch)))
                if watch is not None and sum(item.weight for item in items) >= watch:
                    break
        return items


class _RaisedRates:
    """Learning rates that are multiplied while an optimizer steps, and nowhere else.

    A closure runs in between with the rates that training knows: it may set them.
    """

    def __init__(self, factor: float) -> None:
        self.first: list[float] = []
        self._factor = factor
        self._before: dict[int, tuple[dict[str, Any], Any, Any]] = {}
        self._handles: list[Any] = []
        self._stepped = False

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._on_start))
            self._handles.append(optimizer.register_step_post_hook(self._on_end))
            self.first += [float(group["lr"]) * self._factor for group in optimizer.param_groups if "lr" in group]

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped since the last call."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def _on_start(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._raise(optimizer)

        def at_own_rates(closure: Any) -> Any:
            if not callable(closure):
                return closure

            def run() -> Any:
                self._lower(optimizer)
                try:
                    return closure()
                finally:
                    self._raise(optimizer)

            return run

        return tuple(map(at_own_rates, args)), {name: at_own_rates(value) for name, value in kwargs.items()}

    def _on_end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._lower(optimizer)
        self._stepped = True

    def _raise(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if "lr" in group:
                own, raised = group["lr"], group["lr"] * self._factor
                self._before[id(group)] = (group, own, raised)
                group["lr"] = raised

    def _lower(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            _, own, raised = self._before.pop(id(group), (None, None, None))
            if raised is not None and group["lr"] is raised:
                group["lr"] = own


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on how it was started."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
