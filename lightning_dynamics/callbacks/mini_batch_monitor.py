"""What monitors of mini-batches have in common: drawn batches, one survey of them for all that measure at a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.curvature import CurvatureMonitor
from lightning_dynamics.callbacks.lightning_objective import ObjectiveOptions
from lightning_dynamics.callbacks.measured import Measured, Member, Point
from lightning_dynamics.callbacks.probe import Probe
from lightning_dynamics.callbacks.survey import Survey, Wanted
from lightning_dynamics.linalg import ExtremalEigenpairs, eigenpairs
from lightning_dynamics.metrics import Estimate, UnresolvedGradientError
from lightning_dynamics.objective import HessianOperator, Layout, MiniBatch

_SURVEY = "survey"


class MiniBatchMonitor(CurvatureMonitor):
    """A monitor of what single mini-batches say, at the size that training has."""

    options: ObjectiveOptions

    @abstractmethod
    def wants(self, point: Point[HessianOperator], in_detail: bool) -> Wanted:
        """What it wants to know of each mini-batch. Asked also while another monitor measures on the same."""

    def survey(self, point: Point[HessianOperator]) -> Survey:
        """The table of all mini-batches, read once for all monitors that measure on them at this step.

        Raises:
            FloatingPointError: If fewer than two pairs of mini-batches could be read.
        """
        if _SURVEY not in point.found:
            wanted = Wanted(seed=self.options.probe.seed)
            for member in point.together or [Member(self, point.in_detail, point.memory)]:
                if isinstance(member.monitor, MiniBatchMonitor):
                    wanted |= member.monitor.wants(replace(point, memory=member.memory), member.in_detail)
            point.found[_SURVEY] = self.read(point, wanted)
        found: Survey = point.found[_SURVEY]
        return found

    def read(self, point: Point[HessianOperator], wanted: Wanted) -> Survey:
        """Read all mini-batches.

        Raises:
            FloatingPointError: If fewer than two pairs of mini-batches could be read.
        """
        data = point.data
        assert data is not None
        assert data.draws is not None
        # training takes a step for each mini-batch, whatever it weighs
        differ = self.options.weight_fn is not None or data.population is None
        mean = mean_gradient(point.subject) if differ else point.subject.gradient
        survey = Survey(wanted, mean, data.draws, data.batch_size)
        point.subject.survey(survey)
        if len(survey) != data.draws and not differ:  # some were skipped by the step
            survey = Survey(wanted, mean_gradient(point.subject), data.draws, data.batch_size)
            point.subject.survey(survey)
        if len(survey) < 4:
            raise FloatingPointError(f"only {len(survey)} of the drawn mini-batches gave a loss")
        return survey

    def leading(
        self, point: Point[HessianOperator], top: int, bottom: int, tolerance: float = 1e-3
    ) -> ExtremalEigenpairs:
        """Extreme eigenpairs of the Hessian of all mini-batches together, found once for all monitors at this step."""
        known = point.found.get("eigenpairs")
        if known is not None and len(known.top.values) >= top and len(known.bottom.values) >= bottom:
            return known  # type: ignore[no-any-return]
        others = [m.monitor.ends for m in point.together if m.in_detail and isinstance(m.monitor, MiniBatchMonitor)]
        start = point.memory.get("subspace")
        found = eigenpairs(
            point.subject,
            max([top, *(ends[0] for ends in others)]),
            max([bottom, *(ends[1] for ends in others)]),
            tolerance=tolerance,
            start=start if start is not None and start.shape[-1] == point.subject.size else None,
            generator=point.generator,
        )
        point.memory["subspace"] = found.subspace
        point.found["eigenpairs"] = found
        return found

    @property
    def ends(self) -> tuple[int, int]:
        """How many top and bottom eigenpairs a measurement in detail needs."""
        return 0, 0

    def measured_on(self, point: Point[HessianOperator]) -> dict[str, Any]:
        """What a reader of the record should know of the mini-batches."""
        survey: Survey = point.found[_SURVEY]
        return {"mini_batches": len(survey), "mini_batch_products": survey.products}

    def _key(self, name: str) -> str:
        return f"{self.table.family}/{name}"

    def _enter(self, into: Measured, name: str, value: Estimate | Callable[[], Estimate]) -> Estimate | None:
        """A value with its error; left out, with the reason, where it cannot be told from noise."""
        try:
            found = value if isinstance(value, Estimate) else value()
        except UnresolvedGradientError as error:
            into.notes.setdefault("unresolved", {})[name] = str(error)
            return None
        if not math.isfinite(found.value):
            into.notes.setdefault("unresolved", {})[name] = "too large a number"
            return None
        into.scalars[self._key(name)] = found.value
        if found.error is not None:
            into.errors[self._key(name)] = found.error
        return found


class _Sum:
    """Sums the gradients of mini-batches."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like)
        self.count = 0

    def update(self, first: MiniBatch, second: MiniBatch) -> None:
        self.total += first.gradient
        self.total += second.gradient
        self.count += 2


def mean_gradient(subject: HessianOperator) -> Tensor:
    """Mean of the mini-batches' gradients, each counting once, shape ``(size,)``."""
    found = _Sum(subject.gradient)
    subject.survey(found)
    mean: Tensor = found.total / max(1, found.count)
    return mean


def check_draws(probe: Probe) -> None:
    """Refuse data that are no independently drawn mini-batches."""
    if isinstance(probe, Probe) and probe.draws is None:
        raise MisconfigurationException(
            "Quantities of single mini-batches need mini-batches that are drawn independently of each other: "
            f"`Probe(draws=32)`, got {probe!r}."
        )


def flat_weights(layout: Layout, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """θ, shape ``(size,)``."""
    return layout.flatten([weights[name].detach().to(like.device) for name in layout.names], like)
