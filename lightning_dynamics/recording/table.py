"""The measurements of runs as a tidy table: one row for each value."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dynamics.recording.reading import Run, load_runs

if TYPE_CHECKING:
    from pandas import DataFrame


class Row(NamedTuple):
    """One value.

    Attributes:
        run: Name of the run.
        monitor: Name of the monitor.
        step: x of the curves: batches that stepped.
        global_step: Lightning's ``global_step`` (optimizer steps).
        epoch: Epoch.
        time: Seconds since the epoch of Unix.
        key: Full key without the layer, ``"collapse/cdnv"``.
        layer: The layer; None for what is of the whole network, or of the last layer.
        value: The value; NaN or ±inf where it is not finite.
        error: Its error, of the kind that the quantity declares; NaN where there is none.
        final: Whether it was taken on the weights that the fit ended with.
    """

    run: str
    monitor: str
    step: int
    global_step: int
    epoch: int
    time: float
    key: str
    layer: str | None
    value: float
    error: float
    final: bool


@dataclass(frozen=True)
class RecordTable:
    """A tidy table of measurements: one row for each value of each record.

    Iterating gives :class:`Row`, indexing by a column's name gives that column.

    Attributes:
        rows: The rows, run by run, oldest first.
    """

    rows: Sequence[Row]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The columns by name: what ``pandas.DataFrame`` and its like take."""
        return {name: self[name] for name in Row._fields}

    def where(self, **values: Any) -> RecordTable:
        """The rows in which these columns have these values, ``where(key="hessian/top_1", run="version_0")``.

        Raises:
            KeyError: If there is no such column.
        """
        places = [(_place(name), value) for name, value in values.items()]
        return RecordTable([row for row in self.rows if all(row[place] == value for place, value in places)])

    def to_pandas(self) -> DataFrame:
        """A data frame; needs pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("A data frame needs pandas: pip install pandas.") from error
        return pandas.DataFrame(self.columns)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file; what is missing is left empty."""
        with Path(path).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(Row._fields)
            writer.writerows(["" if _is_missing(cell) else cell for cell in row] for row in self.rows)

    def __repr__(self) -> str:
        runs = len({row.run for row in self.rows})
        return f"<RecordTable: {len(self.rows)} values of {runs} {'run' if runs == 1 else 'runs'}>"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        place = _place(column)
        return [row[place] for row in self.rows]


def load_records(*paths: str | os.PathLike[str]) -> RecordTable:
    """The measurements of one or several runs as a tidy table, each run as if it had never been interrupted.

    Args:
        paths: Directories of runs, directories above them (``lightning_logs``), or record files.

    Raises:
        FileNotFoundError: If there is no record file in one of them.
        ValueError: If a file was written by a newer version of this package.
    """
    return RecordTable([row for run in load_runs(*paths) for row in _rows(run)])


def _rows(run: Run) -> Iterator[Row]:
    quantities = {key: run.quantity(key) for key in run.keys}
    for record in run.records:
        for key, value in record.scalars.items():
            quantity = quantities[key]
            layer = None
            if quantity is not None and quantity.per_layer:
                key, layer = key.split("/", 2)[0] + f"/{quantity.key}", key.split("/", 1)[1][len(quantity.key) + 1 :]
            yield Row(
                run.name,
                record.monitor,
                record.step,
                record.global_step,
                record.epoch,
                record.time,
                key,
                layer,
                value,
                record.errors.get(key if layer is None else f"{key}/{layer}", math.nan),
                record.final,
            )


def _place(column: str) -> int:
    if column not in Row._fields:
        raise KeyError(f"There is no column {column!r}; there are {', '.join(Row._fields)}.")
    return Row._fields.index(column)


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))
