"""Run a module's own code a second time from the state that it had, and keep nothing of it but gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dynamics.objective.attributes import all_modules, private_attribute
from lightning_dynamics.objective.copies import PrivateTensors, clone, equal

_LARGE = 1 << 20  # bytes from which a tensor attribute is copied again only when it was written to

_Cached = dict[int, tuple["weakref.ref[Tensor]", int, Tensor, int]]


class Rerun:
    """What a module's code may change, kept from before a run for another run of the same code.

    :meth:`mark` copies buffers and all other attributes of the module and its submodules. Inside :meth:`again` the
    module has these copies and so the state of then, with its parameters as they are now; on leaving it gets back what
    it had. Unlike in a :class:`Sandbox` the parameters are the module's own: a run leaves gradients in them.

    Parameters that are not trained are put back too where a run writes into them (a momentum encoder). Which these are
    is found out by comparing values after the first run, and by their version counters later: one that is first
    written to after that, and through ``.data``, is written to by the second run as well.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._marked: list[tuple[object, dict[str, Any]]] = []
        self._frozen: list[tuple[nn.Parameter, int, Tensor | None]] = []
        self._moving: set[int] | None = None
        self._clones: _Cached = {}

    @property
    def is_marked(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._marked)

    def mark(self, trained: Iterable[Tensor], keep: Iterable[object]) -> None:
        """Keep the state that the module is in.

        Args:
            trained: The parameters that an optimizer trains.
            keep: Objects that are not copied where they are met (a trainer, optimizers, loggers, …).
        """
        modules = all_modules(self.module)
        memo: dict[int, Any] = {id(kept): kept for kept in keep}
        trained_ids = {id(parameter) for parameter in trained}
        frozen: dict[int, nn.Parameter] = {}
        for _, module in modules:
            memo[id(module)] = module
            for parameter in module._parameters.values():
                if parameter is not None:
                    memo[id(parameter)] = parameter
                    if id(parameter) not in trained_ids:
                        frozen[id(parameter)] = parameter
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = buffer.detach().clone()
        marked: list[tuple[object, dict[str, Any]]] = []
        shared: set[str] = set()
        with PrivateTensors(self._copy_tensor):
            for _, module in modules:
                state = vars(module)
                private = {key: private_attribute(key, key, value, memo, shared) for key, value in state.items()}
                private["_parameters"] = state["_parameters"].copy()
                private["_buffers"] = {k: None if t is None else memo[id(t)] for k, t in state["_buffers"].items()}
                marked.append((module, private))
        self._marked = marked
        self._frozen = [(parameter, parameter._version, self._kept(parameter)) for parameter in frozen.values()]

    @contextmanager
    def again(self) -> Iterator[None]:
        """With the module in the marked state, which is used up."""
        marked, frozen = self._marked, self._frozen
        self.forget()
        now = [(owner, dict(vars(owner))) for owner, _ in marked]
        values = self._step_back(frozen)
        try:
            for owner, state in marked:
                _set_attributes(owner, state)
            yield
        finally:
            for owner, state in now:
                _set_attributes(owner, state)
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)

    def forget(self) -> None:
        """Let the marked state go."""
        self._marked, self._frozen = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    def _kept(self, parameter: nn.Parameter) -> Tensor | None:
        """The value of a parameter that is not trained, if it may be needed."""
        if hasattr(parameter, "full_tensor"):  # sharded
            return None
        if self._moving is None:  # on the host: it may be a whole network, and is needed once
            return parameter.detach().to("cpu", copy=True)
        return parameter.detach().clone() if id(parameter) in self._moving else None

    def _step_back(self, frozen: list[tuple[nn.Parameter, int, Tensor | None]]) -> list[tuple[nn.Parameter, Tensor]]:
        """Give parameters that are not trained their marked values; return those that they had."""
        moving = set() if self._moving is None else self._moving
        values = []
        for parameter, version, value in frozen:
            if parameter._version != version or (
                self._moving is None and value is not None and not equal(parameter.detach().cpu(), value)
            ):
                moving.add(id(parameter))
            if id(parameter) in moving:
                values.append((parameter, parameter.detach().clone()))
                if value is not None:
                    with torch.no_grad():
                        parameter.copy_(value)
        self._moving = moving
        return values

    def _copy_tensor(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if tensor.numel() * tensor.element_size() < _LARGE or tensor.is_inference():
            return clone(tensor, memo)
        known = self._clones.get(id(tensor))
        if known and known[0]() is tensor and known[1] == tensor._version and known[3] == known[2]._version:
            private = memo[id(tensor)] = known[2]
            return private
        private = clone(tensor, memo)
        self._clones[id(tensor)] = (weakref.ref(tensor), tensor._version, private, private._version)
        return private


def _set_attributes(owner: object, state: dict[str, Any]) -> None:
    attributes = vars(owner)
    attributes.clear()
    attributes.update(state)
