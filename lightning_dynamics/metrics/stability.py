"""Where gradient descent loses its footing: the deterministic edge of stability of the usual optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop


@dataclass(frozen=True)
class StabilityRule:
    """The edge of stability of an update rule, for any mixture of optimizers and parameter groups.

    Give every coordinate of θ an entry of a diagonal C (its effective step) and of a diagonal W (its coupled weight
    decay). On a quadratic loss with Hessian H the update with frozen preconditioner is stable as long as

        edge ratio = λmax(C^½ (H + W) C^½) / 2 < 1,

    for momenta below 1 and H + W ⪰ 0. With learning rate η, per coordinate:

    ============================================  ==========================================  =======
    optimizer                                     C                                           W
    ============================================  ==========================================  =======
    SGD                                           η                                           wd
    SGD, heavy ball β, dampening d                η(1 - d) / (1 + β)                          wd
    SGD, Nesterov β                               η(1 + 2β) / (1 + β)                         wd
    RMSprop, momentum μ                           η / (P(1 + μ))                              wd
    Adam, AMSGrad                                 η(1 - β₁) / (P(1 + β₁))                     wd
    AdamW (decoupled decay)                       η(1 - β₁) / (P(1 + β₁)(1 - η·wd/2))         0
    in no optimizer, or never given a gradient    0                                           0
    ============================================  ==========================================  =======

    with P = √v + ε for RMSprop (√(v - ḡ²) + ε centred) and P = (1 - β₁ᵗ)(√v̂ + ε) for Adam, as PyTorch computes them,
    after the last step taken: one step older than the update they are compared with.

    Where C and W are multiples of the identity the rule is the familiar threshold λmax(H) < 2/c - w: 2/η for gradient
    descent, (2 + 2β)/η with heavy ball.

    Source: Cohen et al., arXiv 2103.00065 (gradient descent, momentum) and arXiv 2207.14484 (adaptive methods). The
    common form for mixed groups is derived, and checked in the tests against the spectral radius of the update.

    Attributes:
        scales: C for each parameter by name: a number, or a tensor in the parameter's shape, with a last dimension of
            two for complex ones.
        shifts: W for each parameter by name.
        description: The rule in words.
        unavailable: Why there is no ratio, None if there is one.
        is_unknown: Whether there will be none later either: the optimizer or one of its options is not in the table.
    """

    scales: Mapping[str, float | Tensor]
    shifts: Mapping[str, float]
    description: str
    unavailable: str | None = None
    is_unknown: bool = False

    @property
    def scalar(self) -> tuple[float, float] | None:
        """(c, w) if C = c·I and W = w·I, else None."""
        pairs = {(c if isinstance(c, float) else None, self.shifts[name]) for name, c in self.scales.items()}
        if self.unavailable is not None or len(pairs) != 1:
            return None
        ((c, w),) = pairs
        return None if c is None else (c, w)

    @property
    def threshold(self) -> float | None:
        """The largest stable λmax(H), 2/c - w; None where it is not one number."""
        return None if self.scalar is None else 2 / self.scalar[0] - self.scalar[1]

    def diagonals(self, shapes: Mapping[str, torch.Size], like: Tensor) -> tuple[Tensor, Tensor]:
        """Diagonals of C^½ and of W, each of shape ``(size,)``, in the order of ``shapes`` and the type of ``like``."""
        place = torch.device("cpu") if like.device.type == "mps" else like.device

        def whole(parts: Mapping[str, float | Tensor]) -> Tensor:
            each = [
                torch.as_tensor(parts[name], device=place).double().expand(s).reshape(-1) for name, s in shapes.items()
            ]
            return torch.cat(each)

        return whole(self.scales).sqrt().to(like.device, like.dtype), whole(self.shifts).to(like.device, like.dtype)


def sam_oscillation(curvature: float, threshold: float, reach: float, bound: float = 0.0) -> tuple[float, float]:
    """λ(1 + aλ)/T: what sharpness-aware minimization (SAM) makes of a curvature, over its base optimizer's threshold.

    SAM takes the gradient at w + e with e = ρ·g/‖g‖. On a quadratic loss that is H(1 + aH)w with a = ρ/‖g‖: along an
    eigenvector SAM acts like its base optimizer on the curvature λ(1 + aλ). Near the minimum ‖g‖ falls and a grows,
    until λ(1 + aλ) = T, where the weights flip between two points; with gradient descent these are at a distance
    ηλρ/(2 - ηλ) from the minimum. So training ends at 1 for *any* 0 < λ < T: the number certifies that it oscillates,
    and says nothing about stability. Unnormalized SAM, e = ρ·g, has a = ρ at all distances; there alone 1 is an edge.

    Source: derived.

    Args:
        curvature: λ ≥ 0, in units of loss/θ².
        threshold: T > 0, the :attr:`StabilityRule.threshold` of the base optimizer.
        reach: a = ‖e‖/‖g‖ ≥ 0, in units of θ²/loss.
        bound: On the error of λ.

    Returns:
        The value, and the bound on its error.
    """
    error = bound * (1 + 2 * reach * curvature + reach * bound) / threshold
    return curvature * (1 + reach * curvature) / threshold, error


class _NotYetError(Exception):
    """The optimizer has not taken a step with this parameter."""


def stability_rule(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> StabilityRule:
    """Read the :class:`StabilityRule` off optimizers as they are now.

    Only the optimizers of the table are known, and only themselves: a subclass may do anything, so it counts as
    unknown.

    Args:
        optimizers: The optimizers that train the module (unwrapped).
        parameters: The measured parameters by name.

    Returns:
        The rule; its ``unavailable`` says why there is no ratio: an unknown optimizer or option, all learning rates
        zero, an adaptive optimizer before its first step, a parameter in two optimizers.
    """
    scales: dict[str, float | Tensor] = dict.fromkeys(parameters, 0.0)
    shifts = dict.fromkeys(parameters, 0.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    seen: set[str] = set()
    words: list[str] = []
    waiting, moving = 0, 0
    for optimizer in optimizers:
        terms = _RULES.get(type(optimizer))
        for group in optimizer.param_groups:
            members = [(names[id(p)], p) for p in group["params"] if id(p) in names]
            if not members:
                continue
            if terms is None:
                reason = f"{type(optimizer).__name__} is not an optimizer whose edge is known"
                return _unavailable(scales, shifts, reason, unknown=True)
            if group.get("maximize"):
                return _unavailable(scales, shifts, "the optimizer maximizes", unknown=True)
            words.append(_describe(type(optimizer).__name__, group))
            for name, parameter in members:
                if name in seen:
                    return _unavailable(scales, shifts, f"{name} belongs to two optimizers", unknown=True)
                seen.add(name)
                moving += 1
                try:
                    scales[name], shifts[name] = terms(group, optimizer.state.get(parameter, {}))
                except _NotYetError:
                    shifts[name] = 0.0 if _is_decoupled(optimizer, group) else float(group["weight_decay"])
                    waiting += 1
                except ValueError as error:
                    return _unavailable(scales, shifts, str(error))
    description = "; ".join(dict.fromkeys(words)) or "no optimizer"
    if not moving:
        return _unavailable(scales, shifts, "no measured parameter belongs to an optimizer")
    if waiting == moving:
        return _unavailable(scales, shifts, "the optimizer has not taken a step yet")
    if all(isinstance(c, float) and c == 0.0 for c in scales.values()):
        return _unavailable(scales, shifts, "the learning rate is 0")
    return StabilityRule(scales, shifts, description)


def _unavailable(
    scales: Mapping[str, float | Tensor], shifts: Mapping[str, float], reason: str, unknown: bool = False
) -> StabilityRule:
    return StabilityRule(scales, shifts, f"none: {reason}", reason, unknown)


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, float]:
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if momentum == 0.0:
        scale = lr  # PyTorch applies dampening to the momentum buffer alone
    elif group["nesterov"]:
        scale = lr * (1 + 2 * momentum) / (1 + momentum)
    else:
        scale = lr * (1 - float(group["dampening"])) / (1 + momentum)
    return scale, float(group["weight_decay"])


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, float]:
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if lr == 0.0:
        return 0.0, float(group["weight_decay"])
    second = _moment(state, "square_avg")
    if group["centered"]:
        second = second - _moment(state, "grad_avg").square()
    preconditioner = second.sqrt() + group["eps"]
    return lr / (preconditioner * (1 + momentum)), float(group["weight_decay"])


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, float]:
    return _adam_scale(group, state), float(group["weight_decay"])


def _adamw(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, float]:
    shrink = 1 - float(group["lr"]) * float(group["weight_decay"]) / 2
    if shrink <= 0:
        raise ValueError("decoupled weight decay alone is unstable: lr·weight_decay ≥ 2")
    return _adam_scale(group, state) / shrink, 0.0


def _adam_any(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float | Tensor, float]:
    return _adamw(group, state) if group.get("decoupled_weight_decay") else _adam(group, state)


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))


def _adam_scale(group: Mapping[str, Any], state: Mapping[str, Any]) -> float | Tensor:
    lr, (beta1, beta2) = float(group["lr"]), (float(beta) for beta in group["betas"])
    if lr == 0.0:
        return 0.0
    second = _moment(state, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    step = float(state["step"])
    if step == 0:
        raise _NotYetError
    corrected = (second / (1 - beta2**step)).sqrt() + float(group["eps"])
    scale: Tensor = lr * (1 - beta1) / ((1 - beta1**step) * corrected * (1 + beta1))
    return scale


def _moment(state: Mapping[str, Any], key: str) -> Tensor:
    moment = state.get(key)
    if moment is None:
        raise _NotYetError
    tensor = torch.as_tensor(moment).detach()
    return _double(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def _double(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _describe(name: str, group: Mapping[str, Any]) -> str:
    shown = {"lr": group["lr"]}
    for key in ("momentum", "dampening", "nesterov", "betas", "weight_decay", "centered", "amsgrad"):
        value = group.get(key)
        if value:
            shown[key] = value
    return f"{name}({', '.join(f'{key}={_number(value)}' for key, value in shown.items())})"


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_number(v) for v in value)})"
    return str(value) if isinstance(value, bool) else f"{float(value):.6g}"


_RULES: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float | Tensor, float]]] = {
    SGD: _sgd,
    RMSprop: _rmsprop,
    Adam: _adam_any,
    AdamW: _adamw,
}
