"""What can be drawn of a record: the views that loggers show, and reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.figures.depth import DepthLine, DepthView
from lightning_dynamics.recording.figures.diffusion import DiffusionView
from lightning_dynamics.recording.figures.phase import PhaseView
from lightning_dynamics.recording.figures.style import View
from lightning_dynamics.recording.quantity import QuantityTable, of_layer
from lightning_dynamics.recording.record import Record

_LAGS = 10  # half a decade


def views_of(record: Record, records: Sequence[Record], tables: Sequence[QuantityTable]) -> list[View]:
    """What is to be drawn of a record when it has been measured.

    Args:
        record: The record.
        records: All records of the run so far.
        tables: The quantities of the run's monitors.
    """
    return [
        *densities(record, tables),
        *through_depth(record, records, tables),
        *diffusions(record, records, tables),
        *phases(record, tables),
    ]


def densities(record: Record, tables: Sequence[QuantityTable]) -> Iterator[DensityView]:
    """The spectra of a record."""
    for table in tables:
        for quantity, key in table.of_form("density"):
            spectrum = record.notes.get("spectrum")
            if f"{key}_nodes" in record.arrays and isinstance(spectrum, dict):
                yield DensityView(
                    key,
                    record.arrays[f"{key}_nodes"],
                    record.arrays[f"{key}_weights"],
                    spectrum["size"],
                    spectrum["certified"],
                    spectrum["num_vectors"],
                    record.scalars.get(f"{table.family}/stability_threshold"),
                    table.title,
                    quantity.unit.removeprefix("1/(").removesuffix(")"),
                )


def through_depth(record: Record, records: Sequence[Record], tables: Sequence[QuantityTable]) -> Iterator[DepthView]:
    """The layers of a record, with those of the other records that have the same."""
    layers = list(record.notes.get("layers", ()))
    if len(layers) < 2:
        return
    for table in tables:
        for quantity, key in table.of_form("depth"):
            names = [f"{table.family}/{name}" for pair in quantity.shows for name in pair if name is not None]
            if any(name in record.scalars for name in names):
                lines = partial(_lines, records, record.monitor, layers, names, f"{table.family}/")
                yield DepthView(key, layers, quantity.shows, lines, table.title)


def _lines(records: Sequence[Record], monitor: str, layers: list[str], names: list[str], start: str) -> list[DepthLine]:
    return [
        DepthLine(
            each.step,
            each.epoch,
            {
                name.removeprefix(start): [each.scalars.get(of_layer(name, k), math.nan) for k in layers]
                for name in names
            },
        )
        for each in records
        if each.monitor == monitor and list(each.notes.get("layers", ())) == layers
    ]


def diffusions(record: Record, records: Sequence[Record], tables: Sequence[QuantityTable]) -> Iterator[DiffusionView]:
    """How the weights of a record move, where it says anything new."""
    for table in tables:
        for _, key in table.of_form("diffusion"):
            if f"{table.family}/diffusion_squares" in record.arrays or _is_further(record, records, table.family):
                yield DiffusionView(key, record, table.title)


def phases(record: Record, tables: Sequence[QuantityTable]) -> Iterator[PhaseView]:
    """The phase planes of a record."""
    for table in tables:
        for quantity, key in table.of_form("phase"):
            if any(name.startswith(f"{table.family}/q_") for name in record.arrays):
                yield PhaseView(key, record, quantity.panel)


def _is_further(record: Record, records: Sequence[Record], family: str) -> bool:
    """Whether, without a reference, the way from the start is worth a figure: at ten more lags, and at the end."""

    def tens(each: Record) -> int:
        return len(each.arrays.get(f"{family}/from_init_squares", ())) // _LAGS

    if "reference" in record.notes or not tens(record):
        return False
    if record.final:
        return True
    before = (each for each in reversed(records) if each.monitor == record.monitor and each.step < record.step)
    previous = next(before, None)  # records are in the order of their steps, but for points that waited for data
    return previous is None or tens(record) > tens(previous)
