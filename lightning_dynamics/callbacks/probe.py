"""On which data: a probe of the training set that stays the same for the whole run, read without touching anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_dynamics.callbacks.cadence import check_positive_integer
from lightning_dynamics.callbacks.map_style import MapStyleSource, ProbeItem, share_batches
from lightning_dynamics.callbacks.probe_state import restore_batches
from lightning_dynamics.callbacks.progress import Progress
from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import fork_rng
from lightning_dynamics.objective.replay import batch_length

_BATCHES = ("batch", "batches")


@dataclass(frozen=True)
class Probe:
    """The data that a measurement is taken on.

    By default, for a map-style data set: a fixed random subset of the training *set*, stratified by label where labels
    are plain, read once at the start of ``fit`` in a process of its own, so that the data set's counters, generators
    and file handles stay as they are. Where that cannot be (iterable data, several loaders, a sampler that changes the
    distribution) the first batches of training are copied as they pass, and a point that was due before they were
    complete is taken from a copy of the weights.

    The largest eigenvalue on n samples is biased upwards against that on the training set (Jensen's inequality): about
    1.4-fold at n = 32, 1.15-fold at 64 to 128, 1.07-fold at 256 in one experiment. n and n/N stand with every curve.

    Attributes:
        size: Number of samples, rounded up to whole batches.
        split: ``"training"``, or ``"validation"``: the same of the Trainer's validation set, which has to be map-style
            and in one loader.
        whole: The whole training set: the only choice that is called full-batch. It is held in memory.
        first_batches: Copy that many first batches of training instead.
        current_batch: The batch of the step at hand, a new one each time.
        dataloader: A loader of your own; its batches are read once, at the start of ``fit``.
        draws: That many mini-batches instead, an even number, each drawn at random from the whole training set by
            itself: what quantities of single mini-batches are averaged over. They have the size of training's own,
            accumulation and all ranks together, and are run in pieces of the loader's batch size. A sample may come in
            several. Where samples cannot be chosen, the batches that pass first.
        batch_size: Samples per probe batch; the training loader's by default, so that losses and layers that couple the
            samples of a batch (batch norm, contrastive losses) are those that are trained. With ``draws`` the size of a
            drawn batch.
        seed: Seed of the choice of samples, of their augmentation, and of the noise during measurements.
    """

    size: int = 512
    split: Literal["training", "validation"] = "training"
    whole: bool = False
    first_batches: int | None = None
    current_batch: bool = False
    dataloader: Any = None
    draws: int | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_integer("size", self.size)
        check_positive_integer("first_batches", self.first_batches, optional=True)
        check_positive_integer("batch_size", self.batch_size, optional=True)
        check_positive_integer("seed", self.seed, least=0)
        check_positive_integer("draws", self.draws, optional=True, least=4)
        if self.draws is not None and self.draws % 2:
            raise MisconfigurationException(f"`draws` must be an even number, got {self.draws}.")
        given = [
            name
            for name, is_given in (
                ("whole=True", self.whole),
                (f"first_batches={self.first_batches}", self.first_batches is not None),
                ("current_batch=True", self.current_batch),
                ("dataloader=…", self.dataloader is not None),
                (f"draws={self.draws}", self.draws is not None),
            )
            if is_given
        ]
        if len(given) > 1:
            raise MisconfigurationException(f"A probe takes its data from one place, got {' and '.join(given)}.")
        if self.split not in ("training", "validation"):
            raise MisconfigurationException(f"`split` must be 'training' or 'validation', got {self.split!r}.")
        if self.split == "validation" and given and not self.whole:
            raise MisconfigurationException(f"`split='validation'` does not go with `{given[0]}`: that is other data.")

    @property
    def words(self) -> str:
        """What was asked for, where it is not the default; a loader of the user's by its type."""
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {name: value for name, value in asked.items() if value != getattr(Probe, name, None)}
        if self.dataloader is not None:
            shown["dataloader"] = type(self.dataloader).__name__
        return f"Probe({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two probes the same data."""
        return (
            self.size,
            self.split,
            self.whole,
            self.first_batches,
            self.current_batch,
            id(self.dataloader) if self.dataloader is not None else None,
            self.draws,
            self.batch_size,
            self.seed,
        )


@dataclass
class ProbeData:
    """A probe with its data, as far as this rank holds it.

    Attributes:
        kind: Where the data is from, in words.
        items: This rank's batches; every rank has equally many.
        size: Samples over all ranks.
        population: Samples in the training set, None where it has no length.
        wanted: How many batches are still to be copied as they pass; 0 once the probe is complete.
        awaits_loader: Whether the loader that it comes from is not there yet.
        pieces: Consecutive batches that make one drawn mini-batch, None where nothing is drawn.
        draws: Number of drawn mini-batches, over all ranks.
        batch_size: Samples of each, None if that is not known.
        replaces: Whether a sample may come twice in one, as in training.
        kept: What a checkpoint needs to have the same data again.
    """

    kind: str
    items: list[ProbeItem] = field(default_factory=list)
    size: int = 0
    population: int | None = None
    wanted: int = 0
    awaits_loader: bool = False
    pieces: int | None = None
    draws: int | None = None
    batch_size: int | None = None
    replaces: bool = False
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return self.wanted == 0 and not self.awaits_loader

    @property
    def fraction(self) -> float | None:
        """n/N."""
        return None if not self.population else self.size / self.population

    def describe(self) -> dict[str, Any]:
        """The facts that stand with every curve."""
        drawn = {} if self.draws is None else {"draws": self.draws, "batch_size": self.batch_size}
        return {"kind": self.kind, "n": self.size, "N": self.population, "fraction": self.fraction, **drawn}

    def to_checkpoint(self) -> dict[str, Any]:
        """What :func:`read_probe` needs to have the same data again; empty while the probe is incomplete."""
        if not self.is_complete:
            return {}
        drawn = {"pieces": self.pieces, "draws": self.draws, "batch_size": self.batch_size}
        return {**self.kept, "kind": self.kind, "size": self.size, **({} if self.draws is None else drawn)}

    def copy_passing(self, batch: Any, rank: int, world_size: int) -> None:
        """Take a batch that passes by, as long as some are wanted.

        Raises:
            MisconfigurationException: If the first batch cannot be copied.
        """
        index = len(self.items) * world_size + rank
        try:
            item = ProbeItem(private_copy(batch), index, is_ready=True, weight=batch_length(batch))
        except Exception as error:
            if not self.items:
                raise MisconfigurationException(
                    f"The probe cannot copy a batch of type {type(batch).__name__}: {error}. Pass a `dataloader=` with "
                    "batches that can be copied, or give their class a `__deepcopy__`."
                ) from error
            # the ranks keep step with a repetition that does not count
            item = ProbeItem(self.items[0].batch, index, is_ready=True, weight=0.0)
        self.items.append(item)
        self.wanted -= 1


def read_probe(
    probe: Probe,
    loaders: Sequence[Any],
    num_batches: float,
    rank: int,
    world_size: int,
    notify: Callable[[str], None],
    kept: Mapping[str, Any] | None = None,
    accumulated: int = 1,
    progress: Progress | None = None,
) -> ProbeData:
    """Read a probe's data, or say how many passing batches are to be copied.

    Args:
        probe: What is wanted.
        loaders: The training loaders.
        num_batches: Batches per epoch on each rank: without shuffling, what lies beyond them is never trained on.
        rank: This process's number.
        world_size: Number of processes; each reads its own share.
        notify: Told once where the default could not be had, and why.
        kept: What a checkpoint kept of the same probe.
        accumulated: Batches of each rank that make one step of training.
        progress: Told if reading takes long.

    Raises:
        MisconfigurationException: If the whole set or a loader of the user's was asked for and cannot be read, or is
            empty.
    """
    progress = Progress() if progress is None else progress
    if probe.current_batch:
        return ProbeData("the current batch")
    if probe.dataloader is not None:
        with progress.during("reading the loader of the probe", units=_BATCHES, otherwise=notify):
            return _read_loader(probe, rank, world_size, progress.beat)
    if kept and ("batches" in kept or "files" in kept):
        pieces = kept.get("pieces")
        items = restore_batches(kept, rank, world_size, pieces)
        if items is not None:
            drawn: dict[str, Any] = {name: kept.get(name) for name in ("pieces", "draws", "batch_size")}
            return ProbeData(kept["kind"], items, size=kept["size"], **drawn, kept=dict(kept))
        notify("The batches of the probe are not where the checkpoint left them: the curves go on with others.")
    if probe.split == "validation" and not loaders:
        # with `check_val_every_n_epoch` Lightning asks for them later; to ask earlier could draw other random numbers
        return ProbeData("the validation set, once there are loaders", awaits_loader=True)
    if probe.first_batches is not None:
        return ProbeData(f"the first {probe.first_batches} batches of training", wanted=probe.first_batches)
    own_size = None if probe.draws is not None else probe.batch_size
    source = MapStyleSource.of(loaders, own_size, num_batches * world_size, probe.split)
    if probe.draws is not None:
        return _read_draws(
            probe, probe.draws, source, num_batches, rank, world_size, notify, kept, accumulated, progress
        )
    data = f"{probe.split} set"
    if isinstance(source, str):
        reason = source
    else:
        chosen = kept.get("samples") if kept else None
        if chosen is None:
            chosen = source.everyone if probe.whole else source.choose(probe.size, probe.seed)
        if not chosen:
            raise MisconfigurationException(f"The {data} is empty: there is nothing to probe.")
        try:
            with progress.during(_reading(len(chosen)), units=_BATCHES, otherwise=notify):
                items = source.read(chosen, probe.seed, rank, world_size, progress.beat)
        except Exception as error:
            reason = f"reading the {data} in a process of its own failed ({error!r})"
        else:
            return ProbeData(
                _whole(data, len(chosen), source) if probe.whole else f"a random subset of the {data}",
                items,
                size=len(chosen),
                population=len(source.members),
                kept={} if probe.whole else {"samples": list(chosen)},
            )
    if probe.whole or probe.split == "validation":
        wanted = "`whole=True`" if probe.whole else "`split='validation'`"
        raise MisconfigurationException(
            f"{wanted} needs a map-style {data} in one loader, but {reason}. Pass a `dataloader=` instead."
        )
    batch_size = _batch_size_of(loaders)
    count = max(1, math.ceil(probe.size / (batch_size * world_size))) if batch_size else 8
    notify(f"The probe is the first {count} training batches, not a random subset of the training set: {reason}.")
    return ProbeData(f"the first {count} batches of training", wanted=count)


def _read_draws(
    probe: Probe,
    draws: int,
    source: MapStyleSource | str,
    num_batches: float,
    rank: int,
    world_size: int,
    notify: Callable[[str], None],
    kept: Mapping[str, Any] | None,
    accumulated: int,
    progress: Progress,
) -> ProbeData:
    """Mini-batches drawn independently of each other; where that cannot be, those that pass first."""
    if isinstance(source, str):
        reason = source
    else:
        population = len(source.members)
        batches = min(accumulated, num_batches) * world_size
        batch_size = probe.batch_size or source.size_of_step(int(batches))
        asked = {"draws": draws, "batch_size": batch_size, "seed": probe.seed}
        before = kept.get("asked") if kept else None
        if before is not None and kept is not None and before != asked:
            notify(f"Other mini-batches are drawn than before the resume: {before} has become {asked}.")
        if kept is not None and before == asked:
            drawn = list(kept["samples"])
        elif batch_size > population and not source.replaces:
            raise MisconfigurationException(
                f"A mini-batch of {batch_size} samples cannot be drawn from {population}. Ask for a smaller one."
            )
        else:
            drawn = source.draw(draws, batch_size, probe.seed)
        try:
            with progress.during(_reading(len(drawn)), units=_BATCHES, otherwise=notify):
                items = source.read_draws(drawn, batch_size, probe.seed, rank, world_size, progress.beat)
        except Exception as error:
            reason = f"reading the training set in a process of its own failed ({error!r})"
        else:
            return ProbeData(
                f"{draws} mini-batches of {batch_size}, each drawn from the {probe.split} set by itself",
                items,
                size=len(set(drawn)),
                population=population,
                pieces=source.pieces(batch_size),
                draws=draws,
                batch_size=batch_size,
                replaces=source.replaces,
                kept={"samples": list(drawn), "asked": asked},
            )
    if probe.split == "validation" or probe.batch_size is not None:
        wanted = "`split='validation'`" if probe.split == "validation" else f"`batch_size={probe.batch_size}`"
        raise MisconfigurationException(
            f"{wanted} with `draws` needs a map-style {probe.split} set in one loader, but {reason}."
        )
    pieces = accumulated * world_size
    made_of = "" if pieces == 1 else f" ({pieces} batches of the loaders each)"
    notify(f"The mini-batches are the first of training{made_of}, not drawn from the training set: {reason}.")
    kind = f"the first {draws} mini-batches of training"
    return ProbeData(kind, wanted=draws * accumulated, pieces=pieces, draws=draws)


def _reading(samples: int) -> str:
    return f"reading {samples} samples for the probe"


def _read_loader(probe: Probe, rank: int, world_size: int, beat: Callable[[], None]) -> ProbeData:
    batches = []
    with fork_rng():
        for batch in probe.dataloader:
            batches.append((private_copy(batch), batch_length(batch)))
            beat()
    if not batches:
        raise MisconfigurationException("The probe's `dataloader` is empty: it yielded no batch.")
    items = [
        ProbeItem(batches[index][0], index, is_ready=False, weight=batches[index][1] if counts else 0.0)
        for index, counts in share_batches(len(batches), rank, world_size)
    ]
    return ProbeData("a loader of the user's", items, size=int(sum(length for _, length in batches)))


def _whole(data: str, count: int, source: MapStyleSource) -> str:
    complete = count == len(source.members)
    return f"the whole {data}" + ("" if complete else " less the incomplete batch that the loader drops")


def _batch_size_of(loaders: Sequence[Any]) -> int | None:
    sizes = [getattr(loader, "batch_size", None) for loader in loaders]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None
