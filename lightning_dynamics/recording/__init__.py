"""How numbers reach people: declared quantities, records, loggers, charts, figures, reports."""

from lightning_dynamics.recording import figures
from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.reading import Run, Series, load_runs, read_records
from lightning_dynamics.recording.record import Cost, Record
from lightning_dynamics.recording.table import RecordTable, load_records

__all__ = [
    "Cost",
    "Quantity",
    "QuantityTable",
    "Record",
    "RecordTable",
    "Run",
    "Series",
    "figures",
    "load_records",
    "load_runs",
    "read_records",
]
