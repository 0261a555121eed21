"""TensorBoard's Custom Scalars, built from the quantities' declarations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_dynamics.recording.quantity import QuantityTable


def custom_scalars_layout(tables: Iterable[QuantityTable]) -> dict[str, dict[str, list[Any]]]:
    """One category per family, one chart per panel, for ``SummaryWriter.add_custom_scalars``.

    TensorBoard matches tags with ``re.match``, so patterns have to be anchored: ``hessian/top_1`` would else draw
    ``hessian/top_10`` too.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for table in tables:
        charts = layout.setdefault(table.title, {})
        for panel, patterns in table.panels().items():
            charts[panel] = ["Multiline", patterns]
    return layout
