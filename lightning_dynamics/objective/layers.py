"""Where in a network its layers are: found by running it once and watching how values flow."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = tuple(getattr(nn, name) for name in ("LayerNorm", "GroupNorm", "RMSNorm") if hasattr(nn, name))


@dataclass(frozen=True)
class Tap:
    """A place in a network: what a submodule returns, or what it is given.

    Args:
        module: The submodule's name, as in ``named_modules()``.
        side: Which of the two.
    """

    module: str
    side: Literal["output", "input"] = "output"

    @property
    def name(self) -> str:
        """``"net.fc2"`` for an output, ``"net.fc2:input"`` for an input."""
        return self.module if self.side == "output" else f"{self.module}:input"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """The tap of a name, such as ``"net.fc2"``, ``"net.fc2:output"`` or ``"net.fc2:input"``."""
        module, colon, side = text.rpartition(":")
        if not colon:
            return cls(text)
        if side == "input":
            return cls(module, "input")
        if side == "output":
            return cls(module)
        raise ValueError(f"{text!r}: after the colon stands `input` or `output`, not {side!r}.")

    def __str__(self) -> str:
        return self.name

    def pick(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        """The tensor at this place, from what a forward hook is told (``register_forward_hook(with_kwargs=True)``).

        An input is the first tensor among positional arguments, then among those by keyword. An output is the tensor
        itself, or the only tensor in a tuple, list or dictionary.

        Raises:
            ValueError: If there is none, or more than one in the output.
        """
        picked = _given(args, kwargs) if self.side == "input" else _returned(output)
        if isinstance(picked, str):
            raise ValueError(f"`{self.name}` {picked}.")
        return picked


@dataclass(frozen=True)
class Anatomy:
    """What the parts of a network are to each other, in one forward pass.

    Args:
        head: Name of the classifier, the last linear layer; None if there is none, see ``problem``.
        hidden: The hidden blocks, in order of execution. The head's own input is not among them.
        left_out: Blocks that cannot be measured, by name, and why.
        problem: Why there is no head, as a sentence; empty if there is one.
        order: The input and the output of every submodule that ran, in order of execution.
        calls: How often each submodule ran. Only those that ran once have one value to measure, the head too.
        idle: Submodules that did not run.
    """

    head: str | None
    hidden: tuple[Tap, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    order: tuple[Tap, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @property
    def features(self) -> Tap | None:
        """The features of the last layer: the head's input."""
        return None if self.head is None else Tap(self.head, "input")


def discover(module: nn.Module, run: Callable[[], Any], num_outputs: int | None = None) -> Anatomy:
    """Run a network once and see what its parts are.

    The head is the linear layer (``nn.Linear`` or a subclass) whose output ``run`` returns; of several the first,
    vectors before sequences, ends before what has weights behind it. If the result is no such output (a loss,
    log-probabilities), it is the last linear layer to run that leads to the result, is given a batch of vectors, shape
    ``(n, d)``, and has no weights behind it; trained ones before frozen ones.
    ``num_outputs`` admits only linear layers with that many outputs, or with one if it is two, and there may be layers
    behind it. A linear layer that is applied to sequences, shape ``(n, t, d)``, classifies no samples: then there is
    no head, and ``problem`` says so.

    The hidden blocks are the parts that lead to the head's input. A part is opened into its own parts if it is an
    ``nn.Sequential``, or occurs once and is a chain of layers, or holds a chain of blocks in a container; but never if
    values go around it (a residual branch). What remains closed is one block, measured at its output. A layer with a
    weight matrix or filter is one block together with the norms, activations, pooling, … that follow, and is measured
    behind these. If they are functions and not modules, the block is measured at the input of the next one; likewise
    where modules that run several times are in the way, and behind a block whose output is changed element by element
    (an activation, a residual sum). What stands under several names in the network has its first one.

    Until the run ends all its activations are held in memory.

    Args:
        module: The network, or a module that holds it.
        run: Executes one forward pass through ``module``; it may return anything.
        num_outputs: Number of classes, if it is known.

    Returns:
        The parts. Hidden blocks whose value is no floating-point tensor with the samples along its first dimension
        are in ``left_out``.
    """
    gradients = torch.is_grad_enabled()
    # tensors that are made in inference mode do not count how often they were written to
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), _Recorder(module) as record:
        record.finish(run())
    return _Anatomist(module, record, num_outputs).anatomy()


def resolve(anatomy: Anatomy | nn.Module, wanted: str | Sequence[str]) -> tuple[Tap, ...]:
    """Names and patterns to taps, each once, in order of execution (of registration if a module is given).

    Args:
        anatomy: What :func:`discover` returned; or a module, without regard to what runs.
        wanted: One or more of: the name of a submodule; a regular expression that the whole name must match; either
            with ``:input`` behind it; ``"auto"`` for the hidden blocks.

    Raises:
        ValueError: If one of them matches nothing that runs, with the names that there are, the closest first.
    """
    if isinstance(anatomy, Anatomy):
        order, idle = anatomy.order, anatomy.idle
    else:
        names = [name for name, _ in anatomy.named_modules()]
        order, idle = tuple(tap for name in names for tap in (Tap(name, "input"), Tap(name))), ()
    found: set[Tap] = set()
    for text in [wanted] if isinstance(wanted, str) else wanted:
        if not isinstance(text, str):
            raise ValueError(f"Layers are given by name, got {type(text).__name__} {text!r}.")
        if text == "auto":
            if not isinstance(anatomy, Anatomy):
                raise ValueError("`'auto'` needs the order of execution: pass what `discover` returned.")
            found.update(anatomy.hidden)
            continue
        found.update(_matching(text, order, idle))
    return tuple(tap for tap in order if tap in found)


def _matching(text: str, order: Sequence[Tap], idle: Sequence[str]) -> list[Tap]:
    body, side = text, "output"
    for suffix in ("input", "output"):
        if text.endswith(f":{suffix}"):
            body, side = text[: -len(suffix) - 1], suffix
    taps = [tap for tap in order if tap.side == side]
    exact = [tap for tap in taps if tap.module == body]
    if exact:
        return exact
    taps = [tap for tap in taps if tap.module]  # no pattern means the root
    try:
        pattern = re.compile(body)
    except re.error as error:
        raise ValueError(f"`{text}` is neither the name of a submodule nor a regular expression: {error}.") from error
    matches = [tap for tap in taps if pattern.fullmatch(tap.module)]
    if matches:
        return matches
    if any(name == body or pattern.fullmatch(name) for name in idle):
        raise ValueError(f"`{text}` does not run in the forward pass that is measured.")
    names = [tap.module for tap in taps]
    close = difflib.get_close_matches(body, names, n=6, cutoff=0.5)
    shown = [*close, *(name for name in names if name not in close)]
    listed = ", ".join(shown[:12]) + (f", … ({len(shown)} in all)" if len(shown) > 12 else "")
    raise ValueError(f"`{text}` matches no submodule. A pattern must match the whole name; there are: {listed}.")


# Watching.

Node = tuple[int, int]
"""A state of a storage: its identity and its version."""


@dataclass(frozen=True)
class _Value:
    """What is needed of a tensor once it is gone. Equal ones are views of the same numbers."""

    node: Node
    offset: int
    numel: int
    shape: tuple[int, ...] = field(compare=False)
    floating: bool = field(compare=False)


@dataclass
class _Call:
    """One execution of a submodule, from ``start`` to ``end`` on the clock of all executions."""

    name: str
    start: int
    given: _Value | str  # why there is no value, otherwise
    inputs: frozenset[Node]
    end: int = -1
    returned: _Value | str = ""
    outputs: frozenset[Node] = frozenset()

    @property
    def sources(self) -> frozenset[Node]:
        return frozenset() if isinstance(self.given, str) else frozenset({self.given.node})


class _Recorder(TorchFunctionMode):
    """Which submodules run in which order, and which values come of which."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._alive: dict[int, Any] = {}  # so that no address is given twice
        self._constants: set[int] = set()
        self._stack: list[tuple[nn.Module, _Call]] = []
        self._clock = 0
        self.calls: list[_Call] = []
        self.parents: dict[Node, set[Node]] = {}
        self.weighted: list[frozenset[Node]] = []  # what functions with a weight matrix are given
        self.result: list[_Value] = []

    def __enter__(self) -> _Recorder:
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            if not is_lazy(tensor):
                self._constants.add(self._storage(tensor))
        try:
            for name, submodule in self._module.named_modules():
                self._handles.append(submodule.register_forward_pre_hook(self._before(name), with_kwargs=True))
                self._handles.append(submodule.register_forward_hook(self._after, with_kwargs=True))
            super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        finally:
            self._close()

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._alive.clear()

    def finish(self, result: Any) -> None:
        self.result = [self._value(tensor) for tensor in _tensors(result)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        before = self._nodes(given)
        out = func(*args, **kwargs)
        after = self._nodes([*given, *_tensors(out)])
        for node in after - before:
            self.parents.setdefault(node, set()).update(before)
        if after - before and any(t.dim() > 1 and self._storage(t) in self._constants for t in given):
            self.weighted.append(before)
        return out

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = _given(args, kwargs)
            value = given if isinstance(given, str) else self._value(given)
            self._stack.append((module, _Call(name, self._tick(), value, self._nodes(_tensors((args, kwargs))))))

        return hook

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not any(entered is module for entered, _ in self._stack):
            return
        while True:  # what a forward pass has caught an exception from has not returned
            entered, call = self._stack.pop()
            if entered is module:
                break
        returned = _returned(output)
        call.returned = returned if isinstance(returned, str) else self._value(returned)
        call.outputs = self._nodes(_tensors(output))
        call.end = self._tick()
        if call.inputs and not self._reaches(call.outputs, call.inputs):  # computed out of sight (scripted code)
            for node in call.outputs:
                self.parents.setdefault(node, set()).update(call.inputs)
        self.calls.append(call)

    def _reaches(self, nodes: Iterable[Node], sources: frozenset[Node]) -> bool:
        """Whether any of these was computed from one of the sources; what is near is looked at first."""
        seen: set[Node] = set()
        waiting = deque(nodes)
        while waiting:
            node = waiting.popleft()
            if node in sources:
                return True
            if node not in seen:
                seen.add(node)
                waiting.extend(self.parents.get(node, ()))
        return False

    def ancestors(self, nodes: Iterable[Node], without: frozenset[Node] = frozenset()) -> set[Node]:
        """These nodes and all that they were computed from, by ways that avoid others."""
        seen: set[Node] = set()
        waiting = [node for node in nodes if node not in without]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(p for p in self.parents.get(node, ()) if p not in seen and p not in without)
        return seen

    def descendants(self, nodes: Iterable[Node]) -> set[Node]:
        """These nodes and all that was computed from them."""
        children: dict[Node, list[Node]] = {}
        for child, parents in self.parents.items():
            for parent in parents:
                children.setdefault(parent, []).append(child)
        seen: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(children.get(node, ()))
        return seen

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _nodes(self, tensors: Iterable[Tensor]) -> frozenset[Node]:
        return frozenset(node for node in map(self._node, tensors) if node[0] not in self._constants)

    def _node(self, tensor: Tensor) -> Node:
        return self._storage(tensor), 0 if tensor.is_inference() else tensor._version

    def _storage(self, tensor: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            try:
                storage: Any = tensor.untyped_storage()
                key: int = storage._cdata
            except (RuntimeError, NotImplementedError):  # sparse, nested, …
                storage, key = tensor, id(tensor)
        self._alive[key] = storage
        return key

    def _value(self, tensor: Tensor) -> _Value:
        try:
            offset = int(tensor.storage_offset())
        except (RuntimeError, NotImplementedError):
            offset = 0
        try:
            shape = tuple(int(size) for size in tensor.shape)
        except RuntimeError:  # nested
            shape = ()
        return _Value(self._node(tensor), offset, tensor.numel(), shape, tensor.is_floating_point())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and dataclasses, in order."""
    if isinstance(tree, Tensor):
        if not is_lazy(tree):
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list, set, frozenset)):
        for value in tree:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for part in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, part.name, None))


def _given(args: Any, kwargs: Any) -> Tensor | str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return "is given no tensor"


def _returned(output: Any) -> Tensor | str:
    if isinstance(output, Tensor):
        return output
    tensors = list(_tensors(output))
    if len(tensors) == 1:
        return tensors[0]
    return f"returns {type(output).__name__} with {len(tensors)} tensors" if tensors else "returns no tensor"


# Understanding.

_Kind = Literal["layer", "block", "tail"]
"""A layer with a weight, a composition with weights, or something without."""


class _Anatomist:
    """Reads a record."""

    def __init__(self, module: nn.Module, record: _Recorder, num_outputs: int | None) -> None:
        self._record = record
        hidden = [name for name, m in module.named_modules() if isinstance(m, ParametrizationList)]
        self._modules = {
            name: m
            for name, m in module.named_modules()
            if not any(name == other or name.startswith(f"{other}.") for other in hidden)
        }
        self._names = {id(m): name for name, m in self._modules.items()}
        self._runs: dict[str, list[_Call]] = {}
        for call in sorted(record.calls, key=lambda call: call.start):
            if call.name in self._modules:
                self._runs.setdefault(call.name, []).append(call)
        self._active = {
            ".".join(parts[:i]) for name in self._runs for parts in [name.split(".")] for i in range(len(parts) + 1)
        }
        self._end, self._head, self._problem = self._find_head(num_outputs)
        if self._end is not None:
            self._goal = self._end.sources
        else:
            self._goal = frozenset(value.node for value in record.result)
        self._upstream = record.ancestors(self._goal)
        self._repeated: dict[type, bool] = {}  # whether modules of a type that occurs more than once are opened
        self._kinds = Counter(
            self._type(name)
            for name, runs in self._runs.items()
            if self._wrapped(name) is None and any(map(self._leads, runs)) and not self._holds_head(name)
        )

    def anatomy(self) -> Anatomy:
        hidden, left_out = self._hidden()
        moments = [
            moment
            for name, runs in self._runs.items()
            for moment in ((runs[0].start, Tap(name, "input")), (runs[0].end, Tap(name)))
        ]
        return Anatomy(
            head=self._head,
            hidden=tuple(hidden),
            left_out=left_out,
            problem=self._problem,
            order=tuple(tap for _, tap in sorted(moments, key=lambda moment: moment[0])),
            calls={name: len(runs) for name, runs in self._runs.items()},
            idle=tuple(name for name in self._modules if name and name not in self._runs),
        )

    def _find_head(self, num_outputs: int | None) -> tuple[_Call | None, str | None, str]:
        """The call before which hidden blocks end, the head's name, and why it is None."""
        linear = [
            call for name, runs in self._runs.items() if isinstance(self._modules[name], nn.Linear) for call in runs
        ]
        linear.sort(key=lambda call: call.start)
        if not linear:
            return None, None, "No linear layer (`nn.Linear`) runs in the forward pass."
        if num_outputs is not None:
            sizes = {num_outputs, 1} if num_outputs == 2 else {num_outputs}
            linear = [call for call in linear if self._modules[call.name].out_features in sizes]
            if not linear:
                return None, None, f"No linear layer with {num_outputs} outputs runs in the forward pass."
        returned = [call for value in self._record.result for call in reversed(linear) if call.returned == value]
        if returned:
            return self._judged(min(returned, key=lambda call: (not _is_vectors(call.given), self._is_inner(call))))
        leading = self._leading(linear)
        last = [call for call in leading if not self._is_inner(call)]
        if num_outputs is not None and not any(_is_vectors(call.given) for call in last):
            last = leading
        if not last:
            return None, None, f"Weights stand behind the last linear layer, `{leading[-1].name}`: it is no classifier."
        return self._judged(max(last, key=lambda call: (_is_vectors(call.given), self._is_trained(call), call.start)))

    def _leading(self, linear: list[_Call]) -> list[_Call]:
        """Those that lead to the result, if it is known how it came about."""
        reached = self._record.ancestors(value.node for value in self._record.result)
        return [call for call in linear if call.outputs & reached] or linear

    def _judged(self, call: _Call) -> tuple[_Call, str | None, str]:
        if _is_vectors(call.given):
            return call, call.name, ""
        shape = call.given if isinstance(call.given, str) else f"is given shape {call.given.shape}"
        return call, None, f"The last linear layer, `{call.name}`, {shape}, not one vector for each sample."

    def _is_inner(self, call: _Call) -> bool:
        """Whether weights act on what comes of it."""
        behind = self._record.descendants(call.outputs)
        if any(given & behind for given in self._record.weighted):
            return True
        return any(
            other.start > call.end and other.inputs & behind and self._is_layer(name)
            for name, runs in self._runs.items()
            for other in runs
        )

    def _is_trained(self, call: _Call) -> bool:
        return any(p.requires_grad for p in self._modules[call.name].parameters())

    # The tree of modules.

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        children = ((prefix + key, child) for key, child in self._modules[name].named_children())
        return [path for path, child in children if self._names.get(id(child)) == path and path in self._active]

    def _is_layer(self, name: str) -> bool:
        """Whether it has a weight, and no parts that run."""
        module = self._modules[name]
        if not isinstance(module, nn.Linear) and self._children(name):
            return False
        return not isinstance(module, _NORMS) and any(p.dim() > 1 for p in module.parameters())

    def _wrapped(self, name: str) -> str | None:
        """The module that another does nothing but hold."""
        children = self._children(name)
        if len(children) != 1 or any(True for _ in self._modules[name].parameters(recurse=False)):
            return None
        is_composition = bool(self._children(children[0])) and not isinstance(self._modules[children[0]], _CONTAINERS)
        return children[0] if is_composition else None

    def _type(self, name: str) -> type:
        """The type of a module, or of what it wraps."""
        wrapped = self._wrapped(name)
        return type(self._modules[name]) if wrapped is None else self._type(wrapped)

    def _holds_head(self, name: str) -> bool:
        if self._end is not None:
            return not name or self._end.name == name or self._end.name.startswith(f"{name}.")
        return not name or any(call.outputs & self._goal for call in self._runs.get(name, ()))

    def _units(self, name: str) -> list[tuple[str, _Kind]]:
        children = self._children(name)
        if self._is_layer(name) or not children:
            return [(name, "layer" if self._is_layer(name) else "tail")] if name in self._runs else []
        inner = [unit for child in children for unit in self._units(child)]
        if name not in self._runs or self._opens(name, inner):
            return inner
        return [(name, "block" if any(kind != "tail" for _, kind in inner) else "tail")]

    def _opens(self, name: str, inner: list[tuple[str, _Kind]]) -> bool:
        """Whether the parts of a module count, rather than the whole."""
        if self._holds_head(name):
            return True
        call = self._runs[name][0]
        if call.sources & self._record.ancestors(self._goal, without=call.outputs) - call.outputs:
            return False  # values go around it
        module = self._modules[name]
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            return True
        kind = self._type(name)
        if self._kinds[kind] > 1:
            if kind not in self._repeated:
                self._repeated[kind] = False  # where one such module holds another
                self._repeated[kind] = all(
                    self._is_chain_of_blocks(other)
                    for other in self._runs
                    if self._type(other) is kind and not self._holds_head(other)
                )
            return self._repeated[kind]
        layers = [path for path, kind in inner if kind != "tail" and self._leads(self._runs[path][0])]
        between = [path for path in layers if not self._runs[path][0].outputs & call.outputs]
        cuts = [path for path in between if self._cuts(call, self._runs[path][0])]
        return 2 * len(cuts) > len(between)

    def _is_chain_of_blocks(self, name: str) -> bool:
        call = self._runs[name][0]
        members = [
            path
            for child in self._children(name)
            for path, kind in self._units(child)
            if kind == "block" and isinstance(self._modules[path.rpartition(".")[0]], _CONTAINERS)
        ]
        return bool(members) and all(self._cuts(call, self._runs[path][0]) for path in members)

    def _cuts(self, whole: _Call, part: _Call) -> bool:
        """Whether all that a module's output has of its input passes through a part's output."""
        return not self._record.ancestors(whole.outputs, without=part.outputs) & whole.sources

    def _leads(self, call: _Call) -> bool:
        return not self._goal or bool(call.outputs & self._upstream)

    # The blocks.

    def _hidden(self) -> tuple[list[Tap], dict[str, str]]:
        events = sorted(
            ((call, kind) for name, kind in self._units("") for call in self._runs[name]),
            key=lambda event: event[0].start,
        )
        if self._end is not None:
            end = self._end
            events = [(call, kind) for call, kind in events if call.end < end.start]
        inside = -1
        chain: list[tuple[_Call, _Kind]] = []
        for call, kind in events:
            if call.start > inside and self._leads(call):
                inside = call.end
                chain.append((call, kind))

        hidden: list[Tap] = []
        left_out: dict[str, str] = {}
        listed = {self._end.given} if self._end is not None else set(self._record.result)
        for index, (call, kind) in enumerate(chain):
            if kind == "tail":
                continue
            others = frozenset().union(call.inputs, *(other.outputs for other, _ in chain if other is not call))
            found = self._tap(call, kind, chain[index + 1 :], others)
            if found is None:
                continue
            tap, value = found
            if not isinstance(value, str):
                if value in listed:
                    continue
                if not self._usable(tap):
                    value = f"`{tap.module}` runs {len(self._runs[tap.module])} times in one forward pass"
                elif not value.floating:
                    value = f"`{tap.name}` is not of floating point"
                elif not value.shape or value.shape[0] != self._samples():
                    value = f"`{tap.name}` has shape {value.shape}, whose first dimension is not that of the samples"
            else:
                value = f"`{tap.name}` {value}"
            if isinstance(value, str):
                left_out[call.name] = value
            else:
                listed.add(value)
                hidden.append(tap)
        return hidden, left_out

    def _tap(
        self, call: _Call, kind: _Kind, later: list[tuple[_Call, _Kind]], others: frozenset[Node]
    ) -> tuple[Tap, _Value | str] | None:
        """Where a block is measured, and what is there; None if it is a layer that returns the network's output.

        Args:
            call: The block.
            kind: What it is.
            later: What runs after it.
            others: Values that do not come of it alone.
        """
        behind = self._record.descendants(call.outputs)
        last, skipped, following = call, False, self._end
        for other, its_kind in later:
            if not other.inputs & behind:
                continue
            if its_kind != "tail":
                following = other
                break
            if other.returned == last.returned:  # a dropout that does nothing, a reshaping
                continue
            if kind == "layer" or (not skipped and self._is_elementwise(last, other)):
                last = other
            else:
                skipped = True
        here = (Tap(last.name), last.returned)
        if following is None:
            return None if kind == "layer" else here
        if isinstance(following.given, str) or following.given.node not in behind:
            return here
        there = (Tap(following.name, "input"), following.given)
        if last.returned == following.given:
            return here if self._usable(here[0]) else there
        if not self._usable(here[0]):
            return there
        if kind == "layer":
            mixed = others & self._record.ancestors([following.given.node], without=last.outputs) - last.outputs
            return here if mixed and last is not call else there
        same_size = not isinstance(last.returned, str) and last.returned.numel == following.given.numel
        return there if same_size and not skipped and self._usable(there[0]) else here

    def _is_elementwise(self, before: _Call, tail: _Call) -> bool:
        module = self._modules[tail.name]
        return (
            tail.given == before.returned
            and not isinstance(tail.given, str)
            and not isinstance(tail.returned, str)
            and tail.given.numel == tail.returned.numel
            and not any(True for _ in module.parameters())
        )

    def _usable(self, tap: Tap) -> bool:
        return len(self._runs[tap.module]) == 1

    def _samples(self) -> int:
        candidates: list[_Value | str] = [self._end.given] if self._end is not None else list(self._record.result)
        candidates += [runs[0].given for runs in self._runs.values()]
        return next((value.shape[0] for value in candidates if not isinstance(value, str) and value.shape), -1)


def _is_vectors(value: _Value | str) -> bool:
    return not isinstance(value, str) and len(value.shape) == 2
