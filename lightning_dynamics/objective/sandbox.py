"""Run a module's own code and leave no trace.

The idea is to swap, not to restore. While the sandbox is open every piece of mutable state that hangs on the module is
replaced by a private copy; the originals are never touched, so putting the references back is exact to the bit. The
module keeps its identity, so that hooks and closures over it find the private state too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dynamics.objective.attributes import all_modules, private_attribute
from lightning_dynamics.objective.copies import PrivateTensors, clone, equal, wider

_LARGE = 1 << 20  # bytes from which a tensor attribute is copied once and not at every evaluation

Clones = dict[int, tuple["weakref.ref[Tensor]", Tensor]]
"""Private copies of large tensors: the original and its copy."""

State = list[dict[str, Any]]
"""Attributes of everything whose state is private, by reference."""


class Sandbox:
    """Private copies of everything mutable on a module, for as long as the context is open.

    What is replaced: parameters by the leaves that :meth:`leaves` returns (private storage, no hooks, no ``.grad``),
    buffers by clones, every other attribute of every submodule by a deep copy in which modules, parameters and buffers
    map onto their private counterparts, iterators that cannot be copied by stand-ins that refuse to be drawn from.
    :meth:`renew` starts over from the originals, so that each evaluation of a loss sees the same state. Submodules that
    hide in lists and dicts are treated like registered ones.

    What is shared, and so could carry a trace out: data sets, loaders and samplers; objects that cannot be copied;
    module globals, class attributes, files, and whatever a hook closes over beyond the module. :attr:`shared` names the
    attributes concerned.

    Args:
        module: The module.
        beside: Objects whose attributes are replaced like the module's (a data module with a transform of its own).
        dtype: Floating type to raise narrower parameters and buffers to; None keeps each as it is.
        keep: Objects that are not copied where they are met (a trainer, loggers, …).
        replace: Pairs of an object and what stands for it inside (an optimizer and its stand-in).
        overrides: Attributes to set while the sandbox is open, as triples of object, name and value.
        training: Training flag for all submodules; None keeps each one's own.
        values: Values for parameters and buffers by name, instead of those that they have (weights saved earlier).
        clones: Private copies of large tensors, shared between sandboxes of one module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        beside: Iterable[object] = (),
        dtype: torch.dtype | None = None,
        keep: Iterable[object] = (),
        replace: Iterable[tuple[object, object]] = (),
        overrides: Iterable[tuple[object, str, Any]] = (),
        training: bool | None = None,
        values: Mapping[str, Tensor] | None = None,
        clones: Clones | None = None,
    ) -> None:
        self.module = module
        self.shared: set[str] = set()
        self._beside = list(beside)
        self._dtype = dtype
        self._keep = list(keep)
        self._replace = list(replace)
        self._overrides = list(overrides)
        self._training = training
        self._undo: list[Callable[[], None]] = []
        self._originals: list[tuple[str, object, dict[str, Any]]] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._leaves: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._clones: Clones = {} if clones is None else clones
        self._named_values = values
        self._values: dict[int, Tensor] = {}

    def __enter__(self) -> Sandbox:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def leaves(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The private leaf that stands for each of these parameters while the sandbox is open."""
        return {name: self._leaves[id(parameter)] for name, parameter in parameters.items()}

    def leaf_of(self, parameter: Tensor) -> Tensor:
        """The private leaf of one parameter; a tensor that is none of the module's parameters stands for itself."""
        return self._leaves.get(id(parameter), parameter)

    @contextmanager
    def displaced(self, leaves: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
        """Leaves moved by these steps while the context is open; what autograd has saved of them does not notice."""
        owners = {id(leaf): owner for owner, leaf in self._leaves.items()}
        values = dict(self._values)
        before = [leaf.detach().clone() for leaf in leaves]
        try:
            for leaf, step in zip(leaves, steps, strict=True):
                leaf.data.add_(step.to(leaf.dtype))
                self._values[owners[id(leaf)]] = leaf.detach().clone()
            yield
        finally:
            self._values = values
            for leaf, value in zip(leaves, before, strict=True):
                leaf.data.copy_(value)

    def renew(self) -> None:
        """Throw the private state away and copy the originals anew; leaves keep their identity and values."""
        memo: dict[int, Any] = {id(kept): kept for kept in self._keep}
        memo.update({id(original): stand_in for original, stand_in in self._replace})
        for _, owner, _ in self._originals:
            memo[id(owner)] = owner
        memo.update(self._leaves)
        for _, _, original in self._originals:
            for buffer in original.get("_buffers", {}).values():
                if buffer is not None and id(buffer) not in memo:
                    memo[id(buffer)] = self._private(buffer)
        with PrivateTensors(self._copy_tensor):
            for name, parameter in self._parameters.items():
                for key, value in vars(parameter).items():
                    setattr(
                        self._leaves[id(parameter)],
                        key,
                        private_attribute(f"{name}.{key}", key, value, memo, self.shared),
                    )
        for name, owner, original in self._originals:
            prefix = f"{name}." if name else ""
            with PrivateTensors(self._copy_tensor):
                private = {
                    key: private_attribute(prefix + key, key, value, memo, self.shared)
                    for key, value in original.items()
                }
            for registry in ("_parameters", "_buffers"):
                if registry in original:
                    private[registry] = {k: None if t is None else memo[id(t)] for k, t in original[registry].items()}
            if self._training is not None and isinstance(owner, nn.Module):
                private["training"] = self._training
            state = vars(owner)
            state.clear()
            state.update(private)
        for target, attribute, value in self._overrides:
            vars(target)[attribute] = value

    def state(self) -> State:
        """The private state as it is now, by reference, for :meth:`resume`."""
        return [dict(vars(owner)) for owner in self._owners()]

    def resume(self, state: State) -> None:
        """Go back to a private state that was there before a :meth:`renew`.

        To be called before a graph from then is differentiated: where activations are checkpointed that runs parts of
        the module again, which may read what the step has noted on it.
        """
        for owner, then in zip(self._owners(), state, strict=True):
            now = vars(owner)
            now.clear()
            now.update(then)

    def _owners(self) -> list[Any]:
        return [*(owner for _, owner, _ in self._originals), *self._leaves.values()]

    def mend(self) -> list[str]:
        """Give the leaves the values of the parameters again, past autograd's bookkeeping.

        To be called after every evaluation: a step that writes into weights (a momentum encoder, a constraint) wrote
        into the leaves, and into what graphs built from them have saved.

        Returns:
            Names of the leaves that require a gradient and had another value than they were given.
        """
        written = []
        for name, parameter in self._parameters.items():
            leaf, value = self._leaves[id(parameter)], self._private(parameter)
            if leaf.shape != value.shape:
                leaf.data = value
            elif not equal(leaf.data, value):
                leaf.data.copy_(value)
                if leaf.requires_grad:
                    written.append(name)
            _set_version(leaf, self._versions[id(parameter)])
        return written

    def _open(self) -> None:
        modules = all_modules(self.module)
        if self._named_values is not None:
            named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
            self._values = {id(named[name]): value for name, value in self._named_values.items() if name in named}
        for name, module in modules:
            self._originals.append((name, module, self._remember(vars(module))))
        for owner in self._beside:
            self._originals.append((type(owner).__name__, owner, self._remember(vars(owner))))
        inside = {id(owner) for _, owner, _ in self._originals}
        for target in {id(t): t for t, _, _ in self._overrides if id(t) not in inside}.values():
            self._remember(vars(target))
        for name, _, original in self._originals:
            for key, tensor in [*original.get("_parameters", {}).items(), *original.get("_buffers", {}).items()]:
                if is_lazy(tensor):
                    raise ValueError(
                        f"`{f'{name}.{key}' if name else key}` belongs to a lazy layer and has no size yet. Run the "
                        "module once on a batch before training starts, for example at the end of `configure_model`."
                    )
            for key, parameter in original.get("_parameters", {}).items():
                if parameter is not None and id(parameter) not in self._leaves:
                    self._parameters[f"{name}.{key}" if name else key] = parameter
                    private = self._private(parameter)
                    leaf = nn.Parameter(private, requires_grad=parameter.requires_grad)
                    self._leaves[id(parameter)] = leaf
                    self._versions[id(parameter)] = leaf._version
        self.renew()

    def _remember(self, state: dict[str, Any]) -> dict[str, Any]:
        """Note what an object's attributes are, to be put back reference by reference."""
        original = dict(state)

        def put_back() -> None:
            state.clear()
            state.update(original)

        self._undo.append(put_back)
        return original

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._originals.clear()
        self._parameters.clear()
        self._leaves.clear()
        self._versions.clear()
        self._values.clear()

    def _private(self, tensor: Tensor) -> Tensor:
        value = self._value(tensor)
        wide = wider(value, self._dtype)
        return value.clone() if wide is None else value.to(wide)

    def _value(self, tensor: Tensor) -> Tensor:
        return self._values.get(id(tensor), tensor).detach().to(tensor.device)

    def _copy_tensor(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """A private tensor. A large one is copied once, and again only when it or its copy was written to."""
        if tensor.numel() * tensor.element_size() < _LARGE:
            return clone(tensor, memo)
        known = self._clones.get(id(tensor))
        # by value: writes through `.data` and to inference tensors are counted in no version
        if known and known[0]() is tensor and equal(known[1].detach(), tensor.detach()):
            private = memo[id(tensor)] = known[1]
            return private
        private = clone(tensor, memo)
        self._clones[id(tensor)] = (weakref.ref(tensor), private)
        return private


def _set_version(leaf: Tensor, version: int) -> None:
    """Set a leaf's version back once it has its value again, or its graphs would count as overwritten."""
    if leaf._version != version:
        try:
            torch._C._autograd._unsafe_set_version_counter((leaf,), (version,))
        except TypeError:  # the signature of older releases
            torch._C._autograd._unsafe_set_version_counter(leaf, version)  # type: ignore[arg-type]
