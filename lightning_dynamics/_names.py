"""The names by which ``Trainer(strategy=...)`` knows this package's strategies.

They stand in Lightning's registry from the moment on that both packages are imported, in whichever order, and without
either being loaded for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ORDERS = ("random_reshuffling", "single_shuffle", "incremental", "with_replacement", "independent_batches")

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": ("SAMStrategy", {}),
    "ddp_sam": ("DDPSAMStrategy", {}),
    "noisy_descent": ("NoisyDescentStrategy", {}),
    "ddp_noisy_descent": ("DDPNoisyDescentStrategy", {}),
    **{order: ("SamplingOrderStrategy", {"order": order}) for order in ORDERS},
    **{f"ddp_{order}": ("DDPSamplingOrderStrategy", {"order": order}) for order in ORDERS},
}
"""Name, class, options."""

_REGISTRY = "lightning.pytorch.strategies"


@dataclass(frozen=True)
class _Maker:
    """Makes a strategy, whose class is loaded when it is asked for."""

    name: str

    @property
    def strategy_class(self) -> Any:
        return getattr(import_module("lightning_dynamics.strategies"), self.name)

    def __call__(self, **options: Any) -> Any:
        return self.strategy_class(**options)


class _Announced(MetaPathFinder, Loader):
    """Registers the names once Lightning's registry has been loaded."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


def register() -> None:
    """Register the names, now or when Lightning is imported."""
    if (loaded := sys.modules.get(_REGISTRY)) is not None and hasattr(loaded, "StrategyRegistry"):
        _register(loaded)
    elif not any(isinstance(finder, _Announced) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Announced())


def _register(module: Any) -> None:
    for name, (strategy, options) in NAMES.items():
        if name not in module.StrategyRegistry:
            module.StrategyRegistry.register(name, _Maker(strategy), description=strategy, **options)
