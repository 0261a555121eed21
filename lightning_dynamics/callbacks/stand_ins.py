"""What stands for optimizers and schedulers while a step is evaluated: reads pass through, writes go nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class NullOptimizer:
    """An optimizer whose steps change nothing. A closure still runs once, since it may hold the loss.

    Args:
        real: The optimizer it stands for.
        leaf_of: Gives the private leaf of a parameter.
    """

    def __init__(self, real: Any, leaf_of: Callable[[Tensor], Tensor]) -> None:
        self._real = real
        # copies: a step may set a learning rate here
        self.param_groups = [{**group, "params": _Leaves(group["params"], leaf_of)} for group in real.param_groups]

    @property
    def optimizer(self) -> NullOptimizer:
        return self

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def zero_grad(self, *_: Any, **__: Any) -> None:
        pass

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class NullScheduler:
    """A scheduler whose steps change nothing."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Leaves:
    """A parameter group's members as their private leaves, looked up when they are asked for."""

    def __init__(self, parameters: list[Tensor], leaf_of: Callable[[Tensor], Tensor]) -> None:
        self._parameters = parameters
        self._leaf_of = leaf_of

    def __iter__(self) -> Iterator[Tensor]:
        return (self._leaf_of(parameter) for parameter in self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: int) -> Tensor:
        return self._leaf_of(self._parameters[index])
