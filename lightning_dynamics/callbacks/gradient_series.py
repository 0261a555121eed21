"""The training's own gradients, step by step, along a few fixed directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_dynamics.callbacks.following import Follower
from lightning_dynamics.callbacks.measured import When
from lightning_dynamics.callbacks.ranks import Ranks

_MOST_READ = 32  # readings that wait to be measured
_SMALL = 1 << 26  # bytes of directions that go into a checkpoint


class GradientSeries(Follower):
    """Components of each optimizer step's gradient, before clipping, along unit vectors that rank zero has frozen.

    Gradients are the same on all ranks by then, so that rank zero alone follows them. Of an optimizer that evaluates or
    steps more than once in a batch the first gradient counts; those of several optimizers are added. With SAM it is the
    gradient that the step is made with, that at w + e.

    Args:
        window: Steps that are kept.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self.readings: dict[int, Tensor] = {}
        """Rows of shape ``(n, q)``, float64, by the step of the point, until they are measured."""
        self._forget()

    def _forget(self) -> None:
        self._directions: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []
        self._current: Tensor | None = None
        self._seen: set[int] = set()

    @property
    def has_directions(self) -> bool:
        return bool(self._directions)

    def freeze(self, directions: Tensor, shapes: Mapping[str, torch.Size]) -> None:
        """Follow these unit vectors, shape ``(q, size)``, from now on.

        Args:
            directions: The vectors.
            shapes: Shape of each parameter by name, in the order in which they make up the vectors.
        """
        self._forget()
        parts = torch.split(directions.detach(), [shape.numel() for shape in shapes.values()], dim=1)
        self._directions = {name: part.clone() for name, part in zip(shapes, parts, strict=True)}

    def start(
        self,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        goes_on: bool,
        restored: Mapping[str, Any] | None,
        notify: Callable[[str], None],
    ) -> None:
        self._module = module
        self.readings.clear()
        if restored is not None or not goes_on:
            self._forget()
        if restored and ranks.leads:
            self._directions = dict(restored["directions"])
            self._rows = list(restored["rows"])

    def demands(self, when: When) -> bool:
        return False

    def observe(self, when: When) -> None:
        if self._current is not None:
            self._rows.append(self._current)
            self._current = None
        self._seen.clear()
        if len(self._rows) > 2 * self._window:
            del self._rows[: -self._window]

    def proposal(self) -> None:
        return None

    def tell(self, when: When, agreed: Any) -> bool:
        if self._rows:
            rows = _stacked(self._rows[-self._window :])
            lost = (~rows.isfinite().all(1)).nonzero()  # a gap would shift the lags
            self.readings[when.step] = rows[int(lost[-1]) + 1 :] if len(lost) else rows
        if len(self.readings) > _MOST_READ:
            del self.readings[min(self.readings)]
        return False

    def batch_ends(self, outputs: Any) -> None:
        pass

    def optimizer_steps(self, optimizer: Optimizer, is_due_next: bool) -> None:
        if not self._directions or id(optimizer) in self._seen:  # a closure that is evaluated again, elsewhere
            return
        self._seen.add(id(optimizer))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in self._module.named_parameters():
            direction = self._directions.get(name)
            if direction is None or parameter.grad is None or id(parameter) not in held:
                continue
            gradient = parameter.grad.detach()
            flat = torch.view_as_real(gradient).reshape(-1) if gradient.is_complex() else gradient.reshape(-1)
            if direction.device != flat.device:
                direction = self._directions[name] = direction.to(flat.device)
            along = direction @ flat.to(direction.dtype)
            along = (along.cpu() if along.device.type == "mps" else along).double()
            self._current = along if self._current is None else self._current + along

    def stop(self) -> None:
        vars(self).pop("_module", None)

    def state_dict(self) -> dict[str, Any]:
        size = sum(part.numel() * part.element_size() for part in self._directions.values())
        if size > _SMALL:
            return {}
        current = [] if self._current is None else [self._current]  # between the step and the next one's start
        rows = [*self._rows, *current][-self._window :]
        return {
            "directions": {name: part.cpu() for name, part in self._directions.items()},
            "rows": _stacked(rows) if rows else [],
        }


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows on the CPU; those of a checkpoint were there before. One transfer per device."""
    return torch.cat([torch.stack(list(group)).cpu() for _, group in groupby(rows, key=lambda row: row.device)])
