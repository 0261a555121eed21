"""What a session remembers of one monitor, and what of it a checkpoint keeps."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.measured import Clipping, Measured, When

_SCHEMA = 2
_SMALL = 1 << 26  # bytes of a monitor's memory that go into a checkpoint
_LASTING = "first_"  # how the names of memories begin that later measurements are compared with for good


@dataclass
class MonitorState:
    """What the session keeps for one monitor; all of it but :attr:`second_at` goes into checkpoints."""

    every: int | None = None  # the default cadence, decided once
    every_detail: int | None = None  # that of measurements in detail; 0 for never
    memory: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    pending: tuple[When, Measured, float] | None = None  # the first half of a pair, and what it cost
    second_at: int | None = None  # where its second half is due
    seconds: float = 0.0
    exposed: dict[str, float] = field(default_factory=dict)
    clipping: Clipping = field(default_factory=Clipping)

    def to_checkpoint(self, directory: Path | None = None) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint that is loaded with ``weights_only=True``.

        Args:
            directory: Where a memory that is too large for a checkpoint, and has to last, may be written.
        """
        # lists hold what is handed from one half of a measurement to the other
        memory = {key: value for key, value in self.memory.items() if not isinstance(value, list)}
        tensors = [value for value in memory.values() if isinstance(value, Tensor)]
        small = sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= _SMALL
        pending = None
        if self.pending is not None:
            when, measured, seconds = self.pending
            pending = {
                "when": [when.step, when.global_step, when.epoch],
                "measured": measured.to_state(),
                "seconds": seconds,
            }
        return {
            "schema": _SCHEMA,
            "every": self.every,
            "every_detail": self.every_detail,
            "memory": memory if small else {k: v for k, v in memory.items() if not isinstance(v, Tensor)},
            "lasting": None if small else self._written(directory),
            "count": self.count,
            "pending": pending,
            "seconds": self.seconds,
            "exposed": dict(self.exposed),
            "clipping": [self.clipping.steps, float(self.clipping.clipped), float(self.clipping.factors)],
        }

    def _written(self, directory: Path | None) -> str | None:
        """The file with what has to last, written once; None if there is nothing, or it cannot be written."""
        lasting = {key: value for key, value in self.memory.items() if key.startswith(_LASTING) or key == "layout"}
        if directory is None or len(lasting) < 2:
            return None
        digest = hashlib.sha256(repr(sorted((k, v) for k, v in lasting.items() if not isinstance(v, Tensor))).encode())
        file = directory / f"dynamics-memory-{digest.hexdigest()[:12]}.pt"
        try:
            if not file.exists():
                directory.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                torch.save(lasting, part)
                part.replace(file)
        except Exception as error:
            warnings.warn(f"What later points are compared with cannot be kept for a resume: {error!r}.", stacklevel=2)
            return None
        return str(file)

    @classmethod
    def from_checkpoint(cls, kept: Mapping[str, Any]) -> MonitorState:
        """The state that :meth:`to_checkpoint` kept.

        Raises:
            MisconfigurationException: If a newer version of this package kept it.
        """
        if kept["schema"] > _SCHEMA:
            raise MisconfigurationException(
                "The checkpoint's state of a monitor was written by a newer lightning_dynamics. Install that."
            )
        lasting = kept.get("lasting")
        if lasting is not None and Path(lasting).exists():
            try:
                more = torch.load(lasting, map_location="cpu", weights_only=True)
                kept = {**kept, "memory": {**kept["memory"], **more}}
            except Exception as error:
                warnings.warn(f"What later points are compared with cannot be read: {error!r}.", stacklevel=2)
        state = cls(
            every=kept["every"],
            every_detail=kept.get("every_detail"),
            memory=dict(kept["memory"]),
            count=kept["count"],
            seconds=kept["seconds"],
            exposed=dict(kept["exposed"]),
            clipping=Clipping(*kept["clipping"]),
        )
        if kept["pending"] is not None:
            half = kept["pending"]
            state.pending = (When(*half["when"]), Measured.from_state(half["measured"]), half["seconds"])
            state.second_at = state.pending[0].step + 1
        return state
