"""Run a module's own code a second time from the state that it had, and keep nothing of it but gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dynamics.objective.attributes import REGISTRIES, all_modules, private_attribute
from lightning_dynamics.objective.copies import PrivateTensors, clone, equal

_LARGE = 1 << 20  # bytes from which a tensor attribute is copied again only when it was written to
_MANY = 64  # members from which that holds for all tensors in a list

_Cached = dict[int, tuple["weakref.ref[Tensor]", int, Tensor, int]]


@dataclass
class _Frozen:
    """A parameter that is not trained, as it was.

    Attributes:
        name: Its name.
        parameter: The parameter.
        version: What it counted of writes.
        place: Where its numbers lay.
        value: Its value, where it may be needed.
    """

    name: str
    parameter: nn.Parameter
    version: int
    place: int
    value: Tensor | None

    @property
    def has_moved(self) -> bool:
        """Whether it is known to have been written to."""
        return self.parameter._version != self.version or self.parameter.data_ptr() != self.place


class Rerun:
    """What a module's code may change, kept from before a run for another run of the same code.

    :meth:`mark` copies buffers and all other attributes of the module and its submodules. Inside :meth:`again` the
    module has these copies and so the state of then, with its parameters as they are now; on leaving it gets back what
    it had. Unlike in a :class:`Sandbox` the parameters are the module's own: a run leaves gradients in them. What hooks
    of the module are bound to, or close over, is shared by both runs, and has its attributes put back after the second.

    Parameters that are not trained are put back too where a run writes into them (a momentum encoder). Which these are
    is found out by comparing values after the first run, for all parameters of a child at once, and later by their
    version counters and addresses: one that is first written to after that, and in place through ``.data``, is written
    to by the second run as well.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shared: set[str] = set()
        """Attributes that cannot be copied, and are shared by both runs."""
        self._marked: list[tuple[object, dict[str, Any]]] = []
        self._beside: list[Any] = []
        self._frozen: list[_Frozen] = []
        self._moving: set[str] | None = None
        self._clones: _Cached = {}
        self._used: set[int] = set()

    @property
    def is_marked(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._marked)

    def mark(self, trained: Iterable[Tensor], keep: Iterable[object]) -> None:
        """Keep the state that the module is in.

        Args:
            trained: The tensors that an optimizer trains.
            keep: Objects that are not copied where they are met (a trainer, optimizers, loggers, …).
        """
        modules = all_modules(self.module)
        trained = list(trained)
        memo: dict[int, Any] = {id(kept): kept for kept in keep}
        memo.update({id(tensor): tensor for tensor in trained})
        frozen: dict[int, tuple[str, nn.Parameter]] = {}
        for name, module in modules:
            memo[id(module)] = module
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in memo:
                    frozen[id(parameter)] = (f"{name}.{key}", parameter)
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = buffer.detach().clone()
        memo.update({key: parameter for key, (_, parameter) in frozen.items()})
        self._beside = [owner for owner in _reached_by_hooks(modules) if id(owner) not in memo]
        memo.update({id(owner): owner for owner in self._beside})
        self._used = set()
        with PrivateTensors(self._copy_tensor):
            self._marked = [(module, self._private(name, vars(module), memo)) for name, module in modules]
        self._clones = {key: known for key, known in self._clones.items() if key in self._used}
        self._frozen = [self._kept(*named) for named in frozen.values()]

    @contextmanager
    def again(self) -> Iterator[None]:
        """With the module in the marked state, which is used up."""
        marked, frozen, beside = self._marked, self._frozen, self._beside
        self.forget()
        now = [(owner, dict(vars(owner))) for owner, _ in marked]
        contents = [_contents(owner) for owner in beside]
        values = self._step_back(frozen)
        try:
            for owner, state in marked:
                _set_attributes(owner, state)
            yield
        finally:
            for owner, state in now:
                _set_attributes(owner, state)
            for owner, content in zip(beside, contents, strict=True):
                _put_back(owner, content)
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)

    def forget(self) -> None:
        """Let the marked state go."""
        self._marked, self._frozen, self._beside = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    def _private(self, name: str, state: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
        """Copies of a module's attributes."""
        prefix = f"{name}." if name else ""
        private: dict[str, Any] = {}
        for key, value in state.items():
            if type(value) is list and len(value) > _MANY and id(value) not in memo and _holds_tensors(value):
                memo[id(value)] = private[key] = [self._copied_once(tensor, memo) for tensor in value]
            else:
                private[key] = private_attribute(prefix + key, key, value, memo, self.shared)
        private["_parameters"] = state["_parameters"].copy()
        private["_buffers"] = {k: None if t is None else memo[id(t)] for k, t in state["_buffers"].items()}
        return private

    def _kept(self, name: str, parameter: nn.Parameter) -> _Frozen:
        """A parameter that is not trained, with its value if that may be needed."""
        value = None
        if not hasattr(parameter, "full_tensor"):  # not sharded
            if self._moving is None:  # on the host: it may be a whole network, and is needed once
                value = parameter.detach().to("cpu", copy=True)
            elif _child(name) in self._moving:
                value = parameter.detach().clone()
        return _Frozen(name, parameter, parameter._version, parameter.data_ptr(), value)

    def _step_back(self, frozen: list[_Frozen]) -> list[tuple[nn.Parameter, Tensor]]:
        """Give parameters that are not trained their marked values; return those that they had."""
        moving = set() if self._moving is None else self._moving
        for each in frozen:
            is_new = self._moving is None and each.value is not None
            if each.has_moved or (is_new and not equal(each.parameter.detach().cpu(), each.value)):  # type: ignore[arg-type]
                moving.add(_child(each.name))
        self._moving = moving
        values = []
        for each in frozen:
            if _child(each.name) in moving:
                values.append((each.parameter, each.parameter.detach().clone()))
                if each.value is not None:
                    with torch.no_grad():
                        each.parameter.copy_(each.value)
        return values

    def _copy_tensor(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if tensor.numel() * tensor.element_size() < _LARGE:
            return clone(tensor, memo)
        return self._copied_once(tensor, memo)

    def _copied_once(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """A copy, which is that of last time if neither has been written to."""
        if id(tensor) in memo:
            private: Tensor = memo[id(tensor)]
            return private
        if tensor.is_inference():  # counts no writes
            return clone(tensor, memo)
        self._used.add(id(tensor))
        known = self._clones.get(id(tensor))
        if known and known[0]() is tensor and known[1] == tensor._version and known[3] == known[2]._version:
            private = memo[id(tensor)] = known[2]
            return private
        private = clone(tensor, memo)
        self._clones[id(tensor)] = (weakref.ref(tensor), tensor._version, private, private._version)
        return private


def _child(name: str) -> str:
    """The child of the module that a parameter belongs to."""
    return name.lstrip(".").partition(".")[0]


def _holds_tensors(values: list[Any]) -> bool:
    return all(type(value) is Tensor for value in values)


def _reached_by_hooks(modules: Iterable[tuple[str, nn.Module]]) -> list[Any]:
    """Objects of the user's that hooks of the modules may write to: what they are, are bound to, and close over."""
    found: dict[int, Any] = {}

    def look(thing: Any, depth: int = 0) -> None:
        if isinstance(thing, partial):
            for each in (thing.func, *thing.args, *thing.keywords.values()):
                look(each, depth)
        elif isinstance(thing, MethodType):
            look(thing.__self__, depth)
        elif isinstance(thing, FunctionType):
            for cell in thing.__closure__ or ():
                if depth < 2 and not _is_empty(cell):
                    look(cell.cell_contents, depth + 1)
        elif isinstance(thing, (list, dict, set)) or (
            hasattr(thing, "__dict__")
            and not isinstance(thing, (type, ModuleType, Tensor, nn.Module))
            and not type(thing).__module__.startswith("torch.")
        ):
            found[id(thing)] = thing

    for _, module in modules:
        for registry in REGISTRIES:
            if registry.endswith("hooks") and (hooks := vars(module).get(registry)):
                for hook in hooks.values():
                    look(hook)
    return list(found.values())


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _contents(owner: Any) -> Any:
    return owner.copy() if isinstance(owner, (list, dict, set)) else dict(vars(owner))


def _put_back(owner: Any, contents: Any) -> None:
    if isinstance(owner, list):
        owner[:] = contents
    elif isinstance(owner, (dict, set)):
        owner.clear()
        owner.update(contents)
    else:
        _set_attributes(owner, contents)


def _set_attributes(owner: object, state: dict[str, Any]) -> None:
    attributes = vars(owner)
    attributes.clear()
    attributes.update(state)
