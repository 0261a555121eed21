"""What hangs on a module, and private copies of it."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_dynamics.objective.copies import IMMUTABLE

# Copied shallowly: containers that the module machinery reads, whose contents (hooks, names) are shared.
REGISTRIES = frozenset(
    {
        "_modules",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    }
)
REBUILT = frozenset({"_parameters", "_buffers", "_hparams_initial"})
_DATA = (Dataset, DataLoader, Sampler)
CONTAINERS = (list, tuple, dict, deque)
_PLAIN = frozenset({list, tuple, dict, set})
_PLAIN_MEMBERS = frozenset({int, float, bool, str, bytes, complex, type(None)})


def private_attribute(path: str, key: str, value: Any, memo: dict[int, Any], shared: set[str]) -> Any:
    """A private copy of a module's attribute, to be called under :class:`PrivateTensors`.

    Args:
        path: What it is called in messages.
        key: Its name on the module.
        value: Its value.
        memo: What stands for objects met while copying, as in ``copy.deepcopy``; what is copied is added.
        shared: Where the paths of attributes are noted that had to be shared instead.
    """
    if isinstance(value, IMMUTABLE):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if key in REGISTRIES:
        return value.copy()
    if key in REBUILT or type(value).__module__.startswith("torch._dynamo"):
        return value
    if isinstance(value, torch.Generator):
        memo[id(value)] = private = torch.Generator(value.device)
        private.set_state(value.get_state())
        return private
    if isinstance(value, _DATA):
        shared.add(path)
        memo[id(value)] = value
        return value
    if type(value) in _PLAIN and _PLAIN_MEMBERS.issuperset(map(type, _members(value))):
        # nothing in it can be written to: no need to look at each member
        memo[id(value)] = flat = value if type(value) is tuple else value.copy()
        return flat
    if isinstance(value, CONTAINERS):
        _keep_data(value, memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        if isinstance(value, Iterator):
            return _Untouchable(path)
        shared.add(path)
        return value


def _keep_data(container: Any, memo: dict[int, Any]) -> None:
    """Share the data sets, loaders and samplers in a container instead of copying them."""
    for member in container.values() if isinstance(container, dict) else container:
        if isinstance(member, _DATA):
            memo[id(member)] = member
        elif isinstance(member, CONTAINERS) and id(member) not in memo:
            _keep_data(member, memo)


def all_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The module, its submodules, and those that hide in plain containers (``self.teachers = [net]``), each once."""
    found: OrderedDict[int, tuple[str, nn.Module]] = OrderedDict()

    def visit(name: str, module: nn.Module) -> None:
        for inner, submodule in module.named_modules(prefix=name):
            if id(submodule) in found:
                continue
            found[id(submodule)] = (inner, submodule)
            for key, value in vars(submodule).items():
                if isinstance(value, CONTAINERS) and key not in REGISTRIES and key not in ("_parameters", "_buffers"):
                    search(f"{inner}.{key}" if inner else key, value, 0)
                elif isinstance(value, nn.Module) and id(value) not in found:
                    visit(f"{inner}.{key}" if inner else key, value)

    def search(name: str, container: Any, depth: int) -> None:
        if len(container) > 1024:
            return
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, nn.Module):
                if id(value) not in found:
                    visit(f"{name}.{key}", value)
            elif isinstance(value, CONTAINERS) and depth < 2:
                search(f"{name}.{key}", value, depth + 1)

    visit("", root)
    return list(found.values())


def _members(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


class _Untouchable:
    """Stands for an iterator that cannot be copied: drawing from it would take items away from the run."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> _Untouchable:
        return self

    def __next__(self) -> Any:
        raise TypeError(
            f"The step draws from the iterator `{self._path}`, which cannot be copied: running the step again would "
            "take items away from the run. Let the Trainer load what it draws. (A monitor can also measure another "
            "loss, with `loss_fn=`.)"
        )
