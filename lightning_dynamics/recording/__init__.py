"""How numbers reach people: declared quantities, records, loggers, charts."""

from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.record import Record, read_records

__all__ = ["Quantity", "QuantityTable", "Record", "read_records"]
