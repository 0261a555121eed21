"""A loss as a function of a network's outputs, L = φ ∘ f, and the matrices Jᵀ ∇²φ J that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

Kind = Literal["hessian", "gauss_newton", "residual", "fisher", "empirical_fisher"]
"""A curvature matrix of a loss:

- ``"hessian"``: H = ∇²L.
- ``"gauss_newton"``: G = Jᵀ ∇²φ J, with the outputs' Jacobian J, for L = φ ∘ f. (Schraudolph 2002.)
- ``"residual"``: H - G, what the network's own curvature adds.
- ``"fisher"``: F = Jᵀ F_f J, the true Fisher information: the expectation over labels drawn from the model. Computed
  without drawing any, as Jᵀ ∇² KL(p ‖ p_f) J at p = p_f. (Martens 2020.)
- ``"empirical_fisher"``: (1/n) Σᵢ ∇ℓᵢ ∇ℓᵢᵀ over the samples with their own labels: another matrix than the Fisher.
"""

Head = Callable[[Tensor], Tensor | Distribution]

# the function first: configuration files try the types in their order, and take anything for a string
OutputFn = Callable[[nn.Module, Any], tuple[Tensor, Head]] | str
"""Where a network's outputs f are. Either the name of the submodule that returns them in the training step: then φ is
the rest of the step, and nothing is restated; enough for ``"gauss_newton"`` and ``"residual"``; a term of the loss that
does not come by way of the outputs, such as a penalty on weights, belongs to the residual. Or a function of module
and batch that returns f and a function of f alone with, by what is asked for,

- the batch's loss, a scalar, or its samples' losses, shape ``(n,)``, of which it is the mean: ``"gauss_newton"``;
- its samples' losses, shape ``(n,)``: ``"empirical_fisher"``;
- a ``torch.distributions.Distribution`` over labels whose batch shape counts the independent observations that the
  loss averages: ``"fisher"``.
"""

_SAME = 1e-3  # relative difference of two losses that rounding may explain


class Composition:
    """One batch's φ ∘ f at fixed weights, ready for products with Jᵀ ∇²φ J.

    Args:
        outputs: f, any shape, with its graph.
        value: φ(f), a scalar whose graph leads to ``outputs``.
        leaves: The parameters.
    """

    def __init__(self, outputs: Tensor, value: Tensor, leaves: Sequence[Tensor]) -> None:
        self._outputs = outputs
        self._leaves = leaves
        self._slope = _derivative(value, outputs, None, create_graph=True)
        # z ↦ Jᵀz is linear, so the derivative of it along v is Jv: two reverse passes make a forward one
        self._dummy = torch.zeros_like(outputs, requires_grad=True)
        self._pulled = torch.autograd.grad(outputs, leaves, self._dummy, create_graph=True, allow_unused=True)
        reached = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        if any(part is not None and pulled is None for part, pulled in zip(reached, self._pulled, strict=True)):
            raise ValueError(
                "Some of the measured parameters act on the loss and not on the outputs of `output_fn`, so that Jᵀ∇²φJ "
                "would leave them out. Name the last module, or leave them out with `parameters=`."
            )

    def product(self, directions: Sequence[Tensor]) -> list[Tensor | None]:
        """Jᵀ ∇²φ J v, in the parameters' shapes; None stands for zero."""
        nothing: list[Tensor | None] = [None] * len(self._leaves)
        pairs = [
            (pulled, v.to(pulled.dtype))
            for pulled, v in zip(self._pulled, directions, strict=True)
            if pulled is not None and pulled.requires_grad
        ]
        # where φ is piecewise linear its slope is constant
        if not pairs or self._slope is None or not self._slope.requires_grad:
            return nothing
        pulled, vectors = zip(*pairs, strict=True)
        pushed = _derivative(pulled, self._dummy, vectors)
        bent = None if pushed is None else _derivative(self._slope, self._outputs, pushed)
        if bent is None:
            return nothing
        return list(torch.autograd.grad(self._outputs, self._leaves, bent, retain_graph=True, allow_unused=True))


def _derivative(of: Any, along: Tensor, weights: Any, create_graph: bool = False) -> Tensor | None:
    """A vector-Jacobian product with one input; None if ``of`` does not depend on it."""
    return torch.autograd.grad(of, along, weights, retain_graph=True, create_graph=create_graph, allow_unused=True)[0]


def outer_value(kind: Kind, outputs: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The outputs f and the scalar φ(f) with which Jᵀ ∇²φ J is the matrix of this kind.

    Raises:
        ValueError: If ``head`` returns something else than this kind needs.
    """
    if kind == "fisher":
        model, fixed = head(outputs), head(outputs.detach())
        if not isinstance(model, Distribution) or not isinstance(fixed, Distribution):
            raise ValueError(
                "The Fisher information needs a likelihood: the function that `output_fn` returns must return a "
                f"`torch.distributions.Distribution`, got {type(model).__name__}."
            )
        return outputs, kl_divergence(fixed, model).mean()
    value = head(outputs)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`{kind}` needs losses: the function that `output_fn` returns must return a tensor, got "
            f"{type(value).__name__}."
        )
    if kind == "empirical_fisher":
        if value.dim() != 1:
            raise ValueError(
                "The empirical Fisher matrix needs the loss of each sample: the function that `output_fn` returns must "
                f"return a tensor of shape (n,), got {tuple(value.shape)}. Use `reduction='none'`."
            )
        return value, value.square().mean() / 2
    if value.dim() > 1:
        raise ValueError(
            "The function that `output_fn` returns must return a scalar loss or one loss per sample, got shape "
            f"{tuple(value.shape)}."
        )
    return outputs, value.mean()


def check_outputs(result: Any) -> tuple[Tensor, Head]:
    """What a function for the outputs returned, or a ValueError that says what it should have."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and callable(result[1])):
        raise ValueError(
            "`output_fn` must return two things, the outputs and a function of them, got "
            f"{type(result).__name__}. For example: `return logits, lambda z: F.cross_entropy(z, y)`."
        )
    return result


def check_agreement(loss: float, value: float) -> None:
    """Refuse a φ that is not the loss that is trained: G would belong to another function than H.

    Raises:
        ValueError: If the two differ by more than rounding.
    """
    if math.isfinite(loss) and math.isfinite(value) and abs(loss - value) > _SAME * max(abs(loss), abs(value)):
        raise ValueError(
            f"`output_fn` gives a loss of {value:.6g} where the training step gives {loss:.6g}, so that the "
            "Gauss-Newton matrix would be that of another function. If the step adds terms of its own (regularization) "
            "or draws other noise, name the module that returns the outputs (`output_fn='name'`), or measure the same "
            "loss with `loss_fn=`."
        )


def tapped(loss: Callable[[nn.Module, Any], Any], name: str, caught: list[Tensor]) -> Callable[[nn.Module, Any], Any]:
    """The same loss; what a submodule returns on the way to it is appended to ``caught``.

    Raises:
        ValueError: When it is called, if there is no such submodule, or if it returns something else than a tensor.
    """

    def evaluate(module: nn.Module, batch: Any) -> Any:
        try:
            submodule = module.get_submodule(name)
        except AttributeError:
            names = [other for other, _ in module.named_modules() if other]
            raise ValueError(f"`output_fn={name!r}` names no submodule; there are: {', '.join(names[:12])}.") from None
        handle = submodule.register_forward_hook(catch)
        try:
            return loss(module, batch)
        finally:
            handle.remove()

    def catch(_: nn.Module, __: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"`output_fn={name!r}`: that module returns {type(output).__name__}, not a tensor. Pass a function."
            )
        caught.append(output)
        return output.clone()  # the step may go on to write to it

    return evaluate


def only_one(caught: Sequence[Tensor], name: str) -> Tensor:
    """The one output that was caught.

    Raises:
        ValueError: If it was none, or several.
    """
    if len(caught) != 1:
        raise ValueError(
            f"`output_fn={name!r}`: that module ran {len(caught)} times in one step, so its output is not that of the "
            "network. Name a module that runs once, or pass a function."
        )
    if not caught[0].requires_grad:
        raise ValueError(f"`output_fn={name!r}`: that module's output does not depend on any parameter.")
    return caught[0]
