"""SAM, a sampling order and noise on top of any registered strategy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from lightning_dynamics import _compat
from lightning_dynamics.strategies.noisy_descent import Noise, NoisyDescentMixin
from lightning_dynamics.strategies.order import Order
from lightning_dynamics.strategies.sam import SAMMixin
from lightning_dynamics.strategies.sampling import SamplingOrderMixin


class OneDeviceStrategy(SingleDeviceStrategy):
    """A strategy for one device, which the Trainer chooses."""

    strategy_name = "one_device"

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """None, so that the Trainer gives its own."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            raise MisconfigurationException(
                f"This strategy is for one device, and the Trainer has {len(devices)}: use its name with `ddp_` before "
                "it, or `compose_strategy('ddp', ...)`; or `Trainer(devices=1)`."
            )
        if devices:
            _compat.set_root_device(self, devices[0])


def compose_strategy(
    base: str | type[Strategy] = "auto",
    *,
    sam: bool | float | Mapping[str, Any] | None = None,
    order: Order | Mapping[str, Any] | None = None,
    noise: Noise | Mapping[str, Any] | None = None,
    **options: Any,
) -> Strategy:
    """A strategy that trains differently on request: with SAM, another sampling order, noise in the gradient.

    Args:
        base: Name of a registered strategy, or a class of strategies; ``"auto"`` for one device.
        sam: Sharpness-aware minimization: True, ρ, or options of :class:`~lightning_dynamics.SAMStrategy`.
        order: The sampling order, or options of :class:`~lightning_dynamics.SamplingOrderStrategy`.
        noise: The kind of noise, or options of :class:`~lightning_dynamics.NoisyDescentStrategy`.
        options: Of the base strategy.

    Raises:
        MisconfigurationException: Where they do not go together.
    """
    base_class, registered = _resolve(base)
    mixins: list[type[Strategy]] = []
    for mixin, chosen, main in (
        (SAMMixin, sam, "rho"),
        (SamplingOrderMixin, order, "order"),
        (NoisyDescentMixin, noise, "noise"),
    ):
        if chosen is None or chosen is False:
            continue
        if issubclass(base_class, mixin):
            raise MisconfigurationException(f"`{base}` is a {base_class.__name__}, which does that already.")
        mixins.append(mixin)
        if isinstance(chosen, Mapping):
            options |= chosen
        elif chosen is not True:
            options[main] = chosen
    if SAMMixin in mixins and issubclass(base_class, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{base_class.__name__} hides the gradient from the strategy, so there is no SAM on top of it: use 'ddp', "
            "or `ModelParallelStrategy` for weights that are sharded."
        )
    if SAMMixin in mixins and options.get("noise", "anisotropic") != "anisotropic":
        raise MisconfigurationException(
            "SAM perturbs by the gradient of a step, and here the noise is added after it: use `noise='anisotropic'`."
        )
    strategy: Strategy = _composed(tuple(mixins), base_class)(**{**registered, **options})
    return strategy


def _resolve(base: str | type[Strategy]) -> tuple[type[Strategy], dict[str, Any]]:
    """The class behind a strategy's name, and the options that it is registered with."""
    if isinstance(base, str):
        name = base.lower()
        if name in ("auto", "single_device"):
            return OneDeviceStrategy, {}
        if name not in StrategyRegistry:
            known = ", ".join(sorted(StrategyRegistry))
            raise MisconfigurationException(f"No strategy is called {base!r}; there are: auto, {known}.")
        entry = StrategyRegistry[name]
        made_by = entry["strategy"]
        return getattr(made_by, "strategy_class", made_by), dict(entry["init_params"])
    if isinstance(base, type) and issubclass(base, Strategy):
        return (OneDeviceStrategy if base is SingleDeviceStrategy else base), {}
    raise MisconfigurationException(
        f"`base` must be the name or the class of a strategy, got {base!r}. Options go to `compose_strategy` itself."
    )


class _Composed(Strategy):
    """Knows how to be pickled although its class has no name in a module."""

    parts: tuple[tuple[type[Strategy], ...], type[Strategy]]

    def __reduce__(self) -> Any:
        return _new, self.parts, self.__dict__


@cache
def _composed(mixins: tuple[type[Strategy], ...], base: type[Strategy]) -> type[Strategy]:
    name = "".join(cls.__name__.removesuffix("Mixin").removesuffix("Strategy") for cls in (*mixins, base))
    return type(f"{name}Strategy", (*mixins, _Composed, base), {"parts": (mixins, base)})


def _new(mixins: tuple[type[Strategy], ...], base: type[Strategy]) -> Strategy:
    cls = _composed(mixins, base)
    strategy: Strategy = cls.__new__(cls)
    return strategy
