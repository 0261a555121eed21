"""From where diffusion is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_dynamics.callbacks.cadence import check_positive_integer


@dataclass(frozen=True)
class Reference:
    """The point from which displacement is measured besides the start of training.

    Anomalous diffusion is a statement about the limiting regime, long after the loss has settled: an exponent from a
    reference before it says how training converged. Without an option the reference is where the training loss is found
    to have settled: at the first point where it fell, between the last two quarters of the run so far, by less than 1 %
    of the way that it had come down.

    Attributes:
        step: The weights at this step, x of the curves; 0 for the start of the run, if training starts from a trained
            network.
        epoch: Those at the first step of this epoch.
        checkpoint: Those in a checkpoint file: Lightning's, or a plain ``state_dict``. Loaded with
            ``weights_only=True``. Where training starts from the same weights, it is their displacement that diffuses.
        every_n_train_steps: A new reference every that many steps, from the settling of the loss on.
    """

    step: int | None = None
    epoch: int | None = None
    checkpoint: str | Path | None = None
    every_n_train_steps: int | None = None

    def __post_init__(self) -> None:
        check_positive_integer("step", self.step, optional=True, least=0)
        check_positive_integer("epoch", self.epoch, optional=True, least=0)
        check_positive_integer("every_n_train_steps", self.every_n_train_steps, optional=True)
        if not (self.checkpoint is None or isinstance(self.checkpoint, (str, Path))):
            raise MisconfigurationException(f"`checkpoint` must be a path, got {self.checkpoint!r}.")
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise MisconfigurationException(f"A reference is one point, got {' and '.join(given)}.")

    @property
    def is_detected(self) -> bool:
        """Whether it has to be found."""
        return self.step is None and self.epoch is None and self.checkpoint is None

    def __str__(self) -> str:
        if self.step is not None:
            return f"step {self.step}"
        if self.epoch is not None:
            return f"first step of epoch {self.epoch}"
        if self.checkpoint is not None:
            return f"checkpoint {Path(self.checkpoint).name}"
        again = "" if self.every_n_train_steps is None else f", anew every {self.every_n_train_steps} steps"
        return f"where the training loss has settled{again}"


def weights_in(file: str | Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters out of a checkpoint file.

    Args:
        file: Lightning's checkpoint, or a ``state_dict``.
        wanted: Parameters of the same names and shapes.

    Raises:
        MisconfigurationException: If the file cannot be read, or is of another architecture; it names what differs.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MisconfigurationException(f"The reference `{file}` cannot be read: {error}.") from error
    kept = content.get("state_dict", content) if isinstance(content, dict) else {}
    kept = kept if isinstance(kept, dict) else {}
    if any(name not in kept for name in wanted):  # of a compiled or wrapped network
        kept = {str(name).removeprefix("module.").replace("_orig_mod.", ""): each for name, each in kept.items()}
    missing = [name for name in wanted if not isinstance(kept.get(name), Tensor)]
    others = [
        f"`{n}` {tuple(kept[n].shape)} instead of {tuple(p.shape)}"
        for n, p in wanted.items()
        if n not in missing and kept[n].shape != p.shape
    ]
    if missing or others:
        said = ([f"it has no {_listed([f'`{name}`' for name in missing])}"] if missing else []) + (
            [f"it has {_listed(others)}"] if others else []
        )
        raise MisconfigurationException(f"The reference `{file}` is of another network: {'; '.join(said)}.")
    return {name: kept[name] for name in wanted}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
