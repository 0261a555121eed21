"""Which weights count, and how a flat vector maps onto them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

ParameterFilter = Callable[[str, nn.Parameter], bool] | str | Sequence[str]
"""Which parameters a measurement is about: a regular expression that the whole name must match, a list of them (any may
match), or a predicate of name and parameter. Only parameters that require a gradient are ever considered."""


def select_parameters(module: nn.Module, where: ParameterFilter | None = None) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in the order of ``module.named_parameters()``, tied ones once.

    Args:
        module: The module.
        where: See :data:`ParameterFilter`; None takes all that require a gradient.

    Raises:
        ValueError: If nothing is left, with the names that there are; or if a pattern is no regular expression.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"{type(module).__name__} has no parameter that requires a gradient, so there is no curvature to measure. "
            "Unfreeze some, or remove the monitor."
        )
    if where is None:
        return trainable
    chosen = {name: p for name, p in trainable.items() if _predicate(where)(name, p)}
    if not chosen:
        names = list(trainable)
        shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
        raise ValueError(
            f"`parameters={where!r}` matches no trainable parameter. A pattern must match the whole name; there are: "
            f"{shown}."
        )
    return chosen


def _predicate(where: ParameterFilter) -> Callable[[str, nn.Parameter], bool]:
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"`parameters={where!r}` is not a regular expression: {error}.") from error
    return lambda name, _: any(pattern.fullmatch(name) for pattern in compiled)


class Layout:
    """The bijection between a flat vector and tensors of named shapes, in a fixed order.

    A complex number counts as two coordinates, its real and imaginary part: as ``torch.view_as_real`` shows it.

    Args:
        shapes: Shape of each parameter by name, in real coordinates.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Layout:
        return cls({name: torch.Size((*p.shape, 2)) if p.is_complex() else p.shape for name, p in parameters.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.shapes.items()) == list(other.shapes.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def flatten(self, tensors: Iterable[Tensor | None], like: Tensor) -> Tensor:
        """One vector of shape ``(size,)`` in the type and on the device of ``like``; None stands for zeros."""
        vector = torch.empty(self.size, dtype=like.dtype, device=like.device)
        for part, tensor in zip(self._split(vector), tensors, strict=True):
            if tensor is None:
                part.zero_()
            elif tensor.layout is not torch.strided:
                raise ValueError(
                    "A gradient is sparse, and has no second derivative in PyTorch. Build the embedding with "
                    "`sparse=False`, or leave its weight out with `parameters=`."
                )
            else:
                part.copy_(_coordinates(tensor.detach()).reshape(-1))
        return vector

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector``, shape ``(size,)``, in the parameters' shapes, in real coordinates."""
        return [part.view(shape) for part, shape in zip(self._split(vector), self.shapes.values(), strict=True)]

    def directions(self, vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """``vector``, shape ``(size,)``, in the parameters' shapes, complex where they are."""
        return [
            torch.complex(*part.to(p.real.dtype).unbind(-1)) if p.is_complex() else part
            for part, p in zip(self.unflatten(vector), parameters, strict=True)
        ]

    def blocks(self) -> dict[str, tuple[int, int]]:
        """Ranges of coordinates, first and one after last, by the module that owns the parameters there.

        Parameters of one module that do not lie side by side (a shared weight, say) make several blocks, numbered.
        """
        ranges: dict[str, tuple[int, int]] = {}
        start, current = 0, ""
        for name, size in zip(self.shapes, self.sizes, strict=True):
            owner = name.rpartition(".")[0] or name
            if current.partition("#")[0] == owner and ranges:
                ranges[current] = (ranges[current][0], start + size)
            else:
                again = sum(1 for other in ranges if other.partition("#")[0] == owner)
                current = owner if not again else f"{owner}#{again + 1}"
                ranges[current] = (start, start + size)
            start += size
        return ranges

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return torch.split(vector, self.sizes)


def _coordinates(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
