"""The way of the weights through a fit: read at every step, told at the points that a monitor measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.following import Follower
from lightning_dynamics.callbacks.measured import When
from lightning_dynamics.callbacks.optimization import heavy_ball
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.callbacks.reference import Reference, weights_in
from lightning_dynamics.callbacks.sharded import is_sharded, project_shards, squared_norm
from lightning_dynamics.metrics import (
    Displacement,
    HeavyBall,
    Projection,
    Settling,
    Symmetry,
    SymmetryFinder,
    Trail,
    Trend,
    breaking,
    charge_scale,
    conserved,
    effective_learning_rate,
    imbalance,
    radial_share,
)
from lightning_dynamics.metrics.displacement import REFERENCE, START, layer_of
from lightning_dynamics.objective import ParameterFilter, select_parameters
from lightning_dynamics.recording.quantity import layer_keys

_MOST_READ = 32  # readings that wait to be measured
_UNREAD = 256  # rows of positions that wait on the device
_SAME = 1e-8  # relative squared distance of weights that count as the same

Memory = Literal["projection", "device", "host"]
"""Where the start, the last weights and the last step are kept, and how."""


@dataclass(frozen=True)
class Way:
    """What is followed, and how.

    Attributes:
        parameters: Which, see :data:`ParameterFilter`.
        memory: See :data:`Memory`.
        dimensions: Of the projection of each parameter.
        reference: Where diffusion is measured from.
        layers: Whether each layer is told of.
        window: Steps of positions along eigenvectors that are kept.
        symmetries: Whether conserved quantities are looked for.
        directions: Number of eigenvectors that positions are followed along.
        seed: Of the projections.
    """

    parameters: ParameterFilter | None = None
    memory: Memory = "projection"
    dimensions: int = 65_521
    reference: Reference = field(default_factory=Reference)
    layers: bool = True
    window: int = 4096
    symmetries: bool = True
    directions: int = 0
    seed: int = 0

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """Which options say something else than :meth:`to_state` did."""
        return [name for name, value in self.to_state().items() if kept.get(name) != value]

    def to_state(self) -> dict[str, Any]:
        """What the numbers of a resumed run depend on."""
        return {
            "parameters": str(self.parameters),
            "memory": "projection" if self.memory == "projection" else "copies",
            "dimensions": self.dimensions if self.memory == "projection" else None,
            "reference": str(self.reference),
            "directions": self.directions,
        }


@dataclass(frozen=True)
class Charge:
    """A conserved quantity at a step.

    Attributes:
        kind: Of its symmetry.
        layer: What it belongs to.
        change: Its change since the symmetry was found, over its size then.
        imbalance: ‖W_{l+1}‖² - ‖W_l‖² - ‖b_l‖², for two layers.
        rate: Mean effective learning rate, for weights whose scale does not matter.
        cosine: Between weight and gradient, for these.
    """

    kind: str
    layer: str
    change: float
    imbalance: float | None = None
    rate: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Phase:
    """Positions along frozen eigenvectors.

    Attributes:
        positions: Shape ``(n, k)``, float64, one row per step.
        rates: Learning rates of the steps that led to them, shape ``(n,)``.
        since: Step at which the eigenvectors were frozen.
    """

    positions: Tensor
    rates: Tensor
    since: int


@dataclass(frozen=True)
class Reading:
    """What is known at a step of the way there.

    Attributes:
        moved: Displacements by layer, ``""`` for all; see :meth:`Displacement.read`.
        error: Relative standard error of lengths, from their projection; 0 where nothing is projected.
        steps: Steps since the start.
        start: Squared displacement from the start.
        trail: That from the reference, None before there is one.
        since: Step of the reference.
        is_limiting: Whether the reference lies, as far as is known, in the limiting regime.
        trend: How the training loss goes on.
        gradient_norm: Of the last step's gradient.
        charges: Conserved quantities.
        symmetries: What they follow from, in words.
        phase: Positions along eigenvectors.
        dynamics: The optimizer, as far as there is a theory of it; else why there is none.
        weight_decay: Coupled weight decay.
        rate_changes: First and last step of each stretch over which a learning rate changed.
        remarks: What else to know.
    """

    moved: dict[str, dict[str, float]]
    error: float
    steps: int
    start: Trail
    trail: Trail | None
    since: int | None
    is_limiting: bool
    trend: Trend | None
    gradient_norm: float | None
    charges: list[Charge]
    symmetries: list[str]
    phase: Phase | None
    dynamics: HeavyBall | str
    weight_decay: float
    rate_changes: list[tuple[int, int]]
    remarks: list[str]


class Trajectory(Follower):
    """Follows the weights of a module.

    Args:
        way: What to follow.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self.readings: dict[int, Reading] = {}
        """By step, until they are measured."""
        self._begin()

    def _begin(self) -> None:
        way = self._way
        self._project = Projection(way.dimensions if way.memory == "projection" else None, way.seed)
        self._names: set[str] = set()
        self._considered: set[str] = set()
        self._displacement = Displacement(on_host=way.memory == "host")
        self._start = Trail(0)
        self._start_energy = 0.0
        self._trail: Trail | None = None
        self._trail_energy = 0.0
        self._since: tuple[int, int] | None = None  # x and number of steps at the reference
        self._is_limiting = False
        self._settling = Settling()
        self._finder = SymmetryFinder()
        self._searches = 0
        self._charges: dict[str, tuple[Tensor, float]] = {}
        self._cosines: dict[str, float] = {}
        self._gradients: dict[int, float] = {}  # squared norm of the last gradient, by optimizer
        self._rates: tuple[float, ...] | None = None
        self._rate_changes: list[tuple[int, int]] = []
        self._phase = _PhaseSeries(way.window)
        self._remarks: list[str] = []
        self._lost_because = "nothing was kept of the steps before"
        self._seen: int | None = None

    def start(
        self,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        goes_on: bool,
        restored: Mapping[str, Any] | None,
        notify: Callable[[str], None],
    ) -> None:
        self._trainer, self._module, self._notify = trainer, module, notify
        self._is_sharded = any(is_sharded(p) for p in module.parameters())
        if self._is_sharded and self._way.memory != "projection":
            raise MisconfigurationException(
                f"`memory={self._way.memory!r}` keeps whole copies, but {type(trainer.strategy).__name__} shards the "
                "weights. Use `memory='projection'`."
            )
        self.readings.clear()
        if restored or not goes_on:
            self._begin()
        if restored:
            self._resume(restored)
        if any(p.requires_grad for p in module.parameters()) and not any(is_lazy(p) for p in module.parameters()):
            try:
                self._names.update(select_parameters(module, self._way.parameters))
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
        if self._way.layers:
            try:
                layer_keys(dict.fromkeys(map(layer_of, self._names)))
            except ValueError as error:
                raise MisconfigurationException(f"{error} Or leave layers out, with `layers=False`.") from error
        file = self._way.reference.checkpoint
        if file is not None and self._since is None:
            if self._is_sharded:
                raise MisconfigurationException("A reference from a checkpoint needs weights that are not sharded.")
            weights_in(file, dict(self._parameters()))

    def demands(self, when: When) -> bool:
        if when.final or when.weights is not None or when.step == self._seen:
            return False
        reference, every = self._way.reference, self._way.reference.every_n_train_steps
        if self._since is not None:
            return every is not None and when.step - self._since[0] >= every
        if reference.step is not None:
            return when.step >= reference.step
        if reference.epoch is not None:
            return when.epoch >= reference.epoch
        return reference.checkpoint is not None

    def observe(self, when: When) -> None:
        parameters = self._parameters()
        if not parameters:
            return
        weights = project_shards(self._project, parameters) if self._is_sharded else self._project(parameters)
        is_step = self._seen is not None and when.step > self._seen and when.weights is None
        again = self._displacement.update(weights, is_step)
        if again is not None:
            self._begin_anew()
            self._say(f"step {when.step}: {again}")
        if self._seen is None and when.step > 0:
            self._say(f"displacements count from step {when.step}: {self._lost_because}")
        made = self._rates
        self._note_rates(when.step)
        if self.demands(when):
            self._anchor(when, parameters)
        if (self._seen is None or when.step > self._seen) and when.weights is None:
            self._keep(parameters, made)
        self._seen = max(when.step, self._seen or 0)

    def proposal(self) -> bool:
        """Whether the loss is found to have settled, so that the reference lies here."""
        if self._since is not None or not self._way.reference.is_detected:
            return False
        trend = self._settling.trend()
        return trend is not None and trend.settled

    def tell(self, when: When, agreed: bool) -> bool:
        parameters = self._parameters()
        if agreed and not when.final and when.weights is None:
            self._anchor(when, parameters)
            self._keep_from_reference()
        if parameters:
            self.readings[when.step] = self._read(parameters)
        if len(self.readings) > _MOST_READ:  # on ranks that measure nothing
            del self.readings[min(self.readings)]
        self._gradients.clear()
        return self._since is not None and self._since[0] == when.step

    def stop(self) -> None:
        for name in ("_trainer", "_module", "_notify"):
            vars(self).pop(name, None)

    def batch_ends(self, outputs: Any) -> None:
        if isinstance(outputs, Mapping):
            outputs = outputs.get("loss")
        if isinstance(outputs, Tensor) and outputs.numel() == 1 and not outputs.is_complex():
            # Lightning divides the loss by the number of batches that are accumulated
            batches = self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1
            self._settling.add(outputs.detach() * batches)

    def optimizer_steps(self, optimizer: Optimizer, is_due_next: bool) -> None:
        if not is_due_next:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: p for name, p in self._parameters().items() if id(p) in held and p.grad is not None}
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
        if not gradients:
            return
        square = squared_norm(gradients.values()) if self._is_sharded else sum(map(_squared, gradients.values()))
        self._gradients[id(optimizer)] = square
        if self._is_sharded or not self._way.symmetries:
            return
        if self._searches & (self._searches + 1) == 0:  # at the first, second, fourth, eighth … point
            plain = {name: weight.detach() for name, weight in weights.items()}
            self._finder.update(plain, gradients)
        self._searches += 1
        for symmetry in self._finder.found():
            name = symmetry.sides[0].weight
            if symmetry.kind == "scale" and name in gradients:
                self._cosines[_place_of(symmetry)] = radial_share(weights[name].detach(), gradients[name])

    def freeze(self, directions: Tensor, shapes: Mapping[str, torch.Size], step: int) -> None:
        """Follow the positions along these directions from now on; on rank zero.

        Args:
            directions: Orthonormal rows, shape ``(k, size)``.
            shapes: Of the parameters that the columns belong to, in order.
            step: At which step.
        """
        self._phase.freeze(directions, shapes, step)

    def directions(self, shapes: Mapping[str, torch.Size]) -> Tensor | None:
        """The directions again, on their device; None if there are none, or of other parameters."""
        return self._phase.directions(shapes)

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": sorted(self._names),
            "displacement": self._displacement.state_dict(),
            "start": {**self._start.state_dict(), "energy": self._start_energy},
            "trail": None if self._trail is None else {**self._trail.state_dict(), "energy": self._trail_energy},
            "since": None if self._since is None else list(self._since),
            "is_limiting": self._is_limiting,
            "settling": self._settling.state_dict(),
            "finder": self._finder.state_dict(),
            "searches": self._searches,
            "charges": {name: [start, scale] for name, (start, scale) in self._charges.items()},
            "cosines": dict(self._cosines),
            "gradient": sum(self._gradients.values()) if self._gradients else None,
            "way": self._way.to_state(),
            "rates": None if self._rates is None else list(self._rates),
            "rate_changes": [list(stretch) for stretch in self._rate_changes],
            "phase": self._phase.state_dict(),
            "remarks": list(self._remarks),
            "seen": self._seen,
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, as far as the options are those that it was made with."""
        changed = self._way.differences(state["way"])
        if {"parameters", "memory", "dimensions"} & set(changed):
            self._lost_because = f"`{changed[0]}` is not what it was before"
            return
        self._load(state)
        if "reference" in changed:
            self._trail, self._since, self._is_limiting = None, None, False
            self._phase.clear()
            self._say("the reference is another than before the resume")
        if "directions" in changed:
            self._phase.clear()
            self._say("`phase_space` is not what it was before the resume")

    def _say(self, remark: str) -> None:
        self._remarks.append(remark)
        self._notify(f"DisplacementMonitor, {remark}.")

    def _load(self, state: Mapping[str, Any]) -> None:
        devices = {name: p.device for name, p in self._module.named_parameters()}
        self._names = set(state["names"])
        self._displacement.load_state_dict(state["displacement"], devices)
        self._start.load_state_dict(state["start"])
        self._start_energy = state["start"]["energy"]
        self._trail = None
        if state["trail"] is not None:
            self._trail = Trail(seed=self._way.seed)
            self._trail.load_state_dict(state["trail"])
            self._trail_energy = state["trail"]["energy"]
        self._since = None if state["since"] is None else (state["since"][0], state["since"][1])
        self._is_limiting = state["is_limiting"]
        self._settling.load_state_dict(state["settling"])
        self._finder.load_state_dict(state["finder"])
        self._searches = state["searches"]
        self._charges = {name: (start, scale) for name, (start, scale) in state["charges"].items()}
        self._cosines = dict(state["cosines"])
        self._gradients = {} if state["gradient"] is None else {0: state["gradient"]}
        self._rates = None if state["rates"] is None else tuple(state["rates"])
        self._rate_changes = [(first, last) for first, last in state["rate_changes"]]
        self._phase.load_state_dict(state["phase"], devices)
        self._remarks = list(state["remarks"])
        self._seen = state["seen"]

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, or were: what is frozen again has stopped where it is."""
        named = {name: p for name, p in self._module.named_parameters() if not is_lazy(p)}
        trainable = {name for name, p in named.items() if p.requires_grad}
        if not trainable <= self._considered:
            self._considered |= trainable
            with suppress(ValueError):  # none of those that were asked for
                chosen = select_parameters(self._module, self._way.parameters)
                self._names.update(name for name in chosen if name in named)
        self._names &= named.keys()
        return {name: p for name, p in named.items() if name in self._names}

    def _begin_anew(self) -> None:
        """The weights are others: nothing of before can be compared with them."""
        self._start, self._start_energy = Trail(0), 0.0
        self._trail, self._since, self._is_limiting = None, None, False
        self._charges.clear()
        self._phase.clear()

    def _anchor(self, when: When, parameters: Mapping[str, Tensor]) -> None:
        file = self._way.reference.checkpoint
        self._is_limiting = True
        if file is None:
            self._displacement.anchor()
        else:
            there = {n: t.to(parameters[n].device) for n, t in weights_in(file, dict(parameters)).items()}
            self._displacement.anchor(self._project(there))
            norm = sum(map(_squared, there.values()))
            self._is_limiting = self._displacement.squared() <= _SAME * norm
        self._since = (when.step, self._displacement.steps)
        self._trail = Trail(seed=self._way.seed)
        self._trail_energy = self._displacement.energy

    def _keep(self, parameters: Mapping[str, Tensor], made: tuple[float, ...] | None) -> None:
        """Add the weights at hand to what is kept of the way."""
        moved = self._displacement
        if self._start.wants_square(moved.steps):
            self._start_energy = _extend(self._start, moved.steps, moved, START, self._start_energy)
        self._keep_from_reference()
        self._phase.add(parameters, made[0] if made is not None and len(set(made)) == 1 else math.nan)

    def _keep_from_reference(self) -> None:
        moved = self._displacement
        if self._trail is None or self._since is None:
            return
        lag = moved.steps - self._since[1]
        if self._trail.wants_snapshot(lag):
            self._trail.add_snapshot(lag, moved.current)
        if self._trail.wants_square(lag):
            self._trail_energy = _extend(self._trail, lag, moved, REFERENCE, self._trail_energy)

    def _note_rates(self, step: int) -> None:
        optimizers, _ = _compat.optimizer_lists(self._trainer)
        rates = tuple(float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups)
        if self._rates is not None and not _same(self._rates, rates):
            if self._rate_changes and step - self._rate_changes[-1][1] <= 1:
                self._rate_changes[-1] = (self._rate_changes[-1][0], step)
            else:
                self._rate_changes.append((step, step))
        self._rates = rates

    def _read(self, parameters: Mapping[str, Tensor]) -> Reading:
        moved = self._displacement.read()
        since = None if self._since is None else self._since[0]
        dynamics, weight_decay = heavy_ball(self._trainer)
        found = [] if self._is_sharded else self._finder.found()
        return Reading(
            moved=moved if self._way.layers else {"": moved[""]},
            error=self._project.relative_error / 2 if self._is_projected(parameters) else 0.0,
            steps=self._displacement.steps,
            start=self._start.copy(),
            trail=None if self._trail is None else self._trail.copy(),
            since=since,
            is_limiting=self._is_limiting,
            trend=self._settling.trend(),
            gradient_norm=math.sqrt(sum(self._gradients.values())) if self._gradients else None,
            charges=self._charged(found, parameters),
            symmetries=[f"{s.kind}: {', '.join(s.parameters)}" for s in found],
            phase=self._phase.read(),
            dynamics=dynamics,
            weight_decay=weight_decay,
            rate_changes=list(self._rate_changes),
            remarks=list(self._remarks),
        )

    def _is_projected(self, parameters: Mapping[str, Tensor]) -> bool:
        return any(self._project.reduces(p.numel() * (2 if p.is_complex() else 1)) for p in parameters.values())

    def _charged(self, symmetries: Sequence[Symmetry], parameters: Mapping[str, Tensor]) -> list[Charge]:
        weights = {name: p.detach() for name, p in parameters.items()}
        rates = self._rates or ()
        charges: list[Charge] = []
        seen: dict[tuple[str, str], int] = {}
        for symmetry in symmetries:
            if any(name not in weights for name in symmetry.parameters):
                continue
            key, layer = _place_of(symmetry), _layer_of(symmetry)
            seen[symmetry.kind, layer] = number = seen.get((symmetry.kind, layer), 0) + 1
            layer = f"{layer}_{number}" if number > 1 else layer
            charge = conserved(symmetry, weights)
            start, scale = self._charges.setdefault(key, (charge, charge_scale(symmetry, weights)))
            change = breaking(charge, start, scale)
            if symmetry.kind == "scale" and len(set(rates)) == 1:
                optimizers, _ = _compat.optimizer_lists(self._trainer)
                adaptive = not isinstance(optimizers[0], SGD)
                effective = float(effective_learning_rate(rates[0], charge, adaptive=adaptive).mean())
                charges.append(Charge(symmetry.kind, layer, change, rate=effective, cosine=self._cosines.get(key)))
            elif symmetry.kind == "rescale":
                charges.append(Charge(symmetry.kind, layer, change, imbalance(symmetry, weights)))
            else:
                charges.append(Charge(symmetry.kind, layer, change))
        return charges


class _PhaseSeries:
    """Positions along fixed directions, one row per step; the last ``window`` to ``2·window`` of them.

    Args:
        window: How many.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self.clear()

    def clear(self) -> None:
        self._directions: dict[str, Tensor] = {}
        self._origin: Tensor | None = None
        self._since = 0
        self._rows = torch.zeros(0, 0, dtype=torch.float64)
        self._rates: list[float] = []
        self._waiting: list[Tensor] = []

    def freeze(self, directions: Tensor, shapes: Mapping[str, torch.Size], step: int) -> None:
        self.clear()
        parts = torch.split(directions.detach(), [shape.numel() for shape in shapes.values()], dim=1)
        self._directions = {name: part.clone() for name, part in zip(shapes, parts, strict=True)}
        self._since = step

    def directions(self, shapes: Mapping[str, torch.Size]) -> Tensor | None:
        if not self._directions or any(
            name not in self._directions or self._directions[name].shape[1] != shape.numel()
            for name, shape in shapes.items()
        ):
            return None
        return torch.cat([self._directions[name] for name in shapes], dim=1)

    def add(self, parameters: Mapping[str, Tensor], rate: float) -> None:
        if not self._directions or any(name not in parameters for name in self._directions):
            return
        parts = []
        for name, rows in self._directions.items():
            weight = parameters[name].detach()
            flat = (torch.view_as_real(weight) if weight.is_complex() else weight).reshape(-1)
            parts.append(rows.to(flat.device) @ flat.to(rows.dtype))
        self._waiting.append(torch.stack([part.to(parts[0].device) for part in parts]))
        self._rates.append(rate)
        if len(self._waiting) >= _UNREAD:
            self._settle()

    def read(self) -> Phase | None:
        self._settle()
        if not len(self._rows):
            return None
        kept = self._rows[-self._window :]
        return Phase(kept, torch.tensor(self._rates[-len(kept) :], dtype=torch.float64), self._since)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "directions": dict(self._directions),
            "origin": self._origin,
            "since": self._since,
            "rows": self._rows,
            "rates": list(self._rates),
        }

    def load_state_dict(self, state: Mapping[str, Any], devices: Mapping[str, torch.device]) -> None:
        self.clear()
        self._directions = {name: rows.to(devices.get(name, "cpu")) for name, rows in state["directions"].items()}
        self._origin, self._since = state["origin"], state["since"]
        self._rows, self._rates = state["rows"], list(state["rates"])

    def _settle(self) -> None:
        if not self._waiting:
            return
        rows = torch.stack([row.cpu().double().sum(0) for row in self._waiting])
        self._waiting.clear()
        if self._origin is None:
            self._origin = rows[0]
        rows = rows - self._origin
        self._rows = torch.cat((self._rows, rows)) if len(self._rows) else rows
        if len(self._rows) > 2 * self._window:
            self._rows = self._rows[-self._window :].clone()
            self._rates = self._rates[-self._window :]


def _squared(gradient: Tensor) -> float:
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm = float(torch.linalg.vector_norm(dense if dense.dtype.itemsize >= 4 else dense.float()))
    return norm * norm


def _extend(trail: Trail, lag: int, moved: Displacement, point: str, energy: float) -> float:
    """Add a squared displacement to a trail; return the sum of squared steps up to here."""
    now = moved.energy
    before = trail.lags[-1] if trail.lags else 0
    trail.add_square(lag, moved.squared(point), (now - energy) / (lag - before))
    return now


def _same(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(a, b, rel_tol=1e-9) for a, b in zip(first, second, strict=True)
    )


def _layer_of(symmetry: Symmetry) -> str:
    return "-".join(layer.replace(".", "_") for layer in symmetry.layers)


def _place_of(symmetry: Symmetry) -> str:
    return f"{symmetry.kind}|{symmetry.sides!r}|{symmetry.groups}"
