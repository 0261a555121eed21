"""The probes of a session: read once, shared by the monitors that ask for the same data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_dynamics import _compat
from lightning_dynamics.callbacks.base import DynamicsMonitor
from lightning_dynamics.callbacks.optimization import accumulated_batches
from lightning_dynamics.callbacks.probe import ProbeData, read_probe
from lightning_dynamics.callbacks.probe_state import keep_batches
from lightning_dynamics.callbacks.progress import Progress
from lightning_dynamics.callbacks.ranks import Ranks

_NONE = ProbeData(kind="no data: weights alone")
_STEP = ProbeData(kind="the batches of the step")


class Probes:
    """Probe data by what was asked for."""

    def __init__(self) -> None:
        self._data: dict[tuple[Any, ...], ProbeData] = {}
        self._datasets: list[Any] = []
        self._unreadable: set[tuple[Any, ...]] = set()
        self._ranks = Ranks(0, 1, torch.device("cpu"))

    def of(self, monitor: DynamicsMonitor[Any]) -> ProbeData:
        """The data that a monitor measures on."""
        return next(iter(self.all_of(monitor)), _STEP if monitor.is_of_step else _NONE)

    def all_of(self, monitor: DynamicsMonitor[Any]) -> list[ProbeData]:
        """The data that a monitor measures on, and what else it needs."""
        return [self._data[probe.key] for probe in monitor.probes]

    def to_checkpoint(self, monitor: DynamicsMonitor[Any]) -> list[dict[str, Any]]:
        """What :meth:`read` needs to have a monitor's data again."""
        return [data.to_checkpoint() for data in self.all_of(monitor)]

    def read(
        self,
        trainer: Trainer,
        monitors: Sequence[DynamicsMonitor[Any]],
        ranks: Ranks,
        notify: Callable[[str], None],
        progress: Progress,
    ) -> None:
        """Read what the monitors ask for, or what a checkpoint kept of it.

        A probe that is there from an earlier fit stays if the training data is the same.
        """
        self._ranks = ranks
        loaders = _compat.training_loaders(trainer)
        validates = any(probe.split == "validation" for monitor in monitors for probe in monitor.probes)
        others = _compat.validation_loaders(trainer) if validates else []
        datasets = [getattr(loader, "dataset", loader) for loader in (*loaders, *others)]
        if len(datasets) != len(self._datasets) or any(
            one is not other for one, other in zip(datasets, self._datasets, strict=True)
        ):
            self._data.clear()
            self._unreadable.clear()
        self._datasets = datasets
        for monitor in monitors:
            for number, probe in enumerate(monitor.probes):
                known = self._data.get(probe.key)
                if known is None or not known.is_complete or monitor._restored:
                    self._data[probe.key] = _read(trainer, monitor, number, ranks, notify, progress)

    def show(self, batch: Any, directory: Path | None) -> bool:
        """Copy a passing batch where one is wanted; return whether a probe has become complete.

        Args:
            batch: The batch.
            directory: Where batches may be kept for a resume, on rank zero.
        """
        completed = False
        for data in self._data.values():
            if data.wanted:
                data.copy_passing(batch, self._ranks.rank, self._ranks.world_size)
                if data.is_complete:
                    self._agree(data, directory)
                    completed = True
        return completed

    def look_again(
        self,
        trainer: Trainer,
        monitors: Sequence[DynamicsMonitor[Any]],
        notify: Callable[[str], None],
        progress: Progress,
    ) -> bool:
        """Read what had no loader when training began; return whether there is any now.

        Training has begun: what cannot be read is said once, and goes on missing.
        """
        found = False
        for monitor in monitors:
            for number, probe in enumerate(monitor.probes):
                awaited = self._data[probe.key].awaits_loader and probe.key not in self._unreadable
                if not awaited or not _compat.validation_loaders(trainer):
                    continue
                data, reason = None, None
                try:
                    data = _read(trainer, monitor, number, self._ranks, notify, progress)
                except Exception as error:
                    reason = str(error)
                reasons = [other for other in self._ranks.gather(reason) if other is not None]
                if reasons or data is None:
                    self._unreadable.add(probe.key)
                    notify(f"{monitor.label}: {reasons[0]} Its values are missing.")
                else:
                    self._data[probe.key] = data
                    found = True
        return found

    def finish(self, directory: Path | None) -> None:
        """Training was shorter than a probe: what was copied is the probe."""
        for data in self._data.values():
            if data.wanted and data.items:
                data.wanted = 0
                self._agree(data, directory)

    def _agree(self, data: ProbeData, directory: Path | None) -> None:
        """All ranks have copied their batches: agree on what there is."""
        data.size = int(sum(self._ranks.gather(sum(item.weight for item in data.items))))
        if data.pieces is not None:  # training may have ended before all had passed
            data.draws = len(data.items) * self._ranks.world_size // data.pieces
            data.batch_size = round(data.size / data.draws) if data.draws else None
        data.kept = keep_batches(data.items, self._ranks, directory)


def _read(
    trainer: Trainer,
    monitor: DynamicsMonitor[Any],
    number: int,
    ranks: Ranks,
    notify: Callable[[str], None],
    progress: Progress,
) -> ProbeData:
    """One of a monitor's probes."""
    probe = monitor.probes[number]
    validates = probe.split == "validation"
    return read_probe(
        probe,
        _compat.validation_loaders(trainer) if validates else _compat.training_loaders(trainer),
        sum(trainer.num_val_batches) if validates else trainer.num_training_batches,
        ranks.rank,
        ranks.world_size,
        lambda text: notify(f"{monitor.label}: {text}"),
        kept=_kept(monitor, number),
        accumulated=accumulated_batches(trainer),
        progress=progress,
    )


def _kept(monitor: DynamicsMonitor[Any], number: int) -> dict[str, Any] | None:
    """What a checkpoint kept of one of a monitor's probes."""
    restored = monitor._restored or {}
    # one probe alone was kept before there were several
    kept = restored.get("probes", [restored["probe"]] if "probe" in restored else [])
    return kept[number] if number < len(kept) else None
