"""TensorBoard's Custom Scalars, built from the quantities' declarations and what users lay out themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from lightning_dynamics.recording.quantity import QuantityTable

Layout: TypeAlias = Mapping[str, Mapping[str, Sequence[Any]]]
"""Charts by title, by category: what ``SummaryWriter.add_custom_scalars`` takes."""


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
    return {title: charts for title, charts in layout.items() if charts}


def merged_layouts(*layouts: Layout) -> dict[str, dict[str, list[Any]]]:
    """All categories, and all charts of those that share a title; of charts that share one, the first."""
    merged: dict[str, dict[str, list[Any]]] = {}
    for layout in layouts:
        for title, charts in layout.items():
            category = merged.setdefault(title, {})
            for name, (kind, tags) in charts.items():
                category.setdefault(name, [kind, list(tags)])
    return merged


def check_layout(layout: Any, name: str = "layout") -> None:
    """Refuse what ``SummaryWriter.add_custom_scalars`` would stumble over, or TensorBoard show as an empty chart.

    Args:
        layout: Whatever was given.
        name: What it was given as.

    Raises:
        ValueError: If it is not a layout.
    """
    for title, charts in _items(layout, f"`{name}`", "charts by category"):
        for chart, content in _items(charts, f"`{name}[{title!r}]`", "charts by title"):
            _check_chart(content, f"`{name}[{title!r}][{chart!r}]`")


def _items(mapping: Any, where: str, what: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(mapping, Mapping) or not all(isinstance(key, str) for key in mapping):
        raise ValueError(f"{where} must be a dictionary of {what}, got {mapping!r}.")
    return mapping.items()


def _check_chart(content: Any, where: str) -> None:
    if not _is_chart(content):
        raise ValueError(
            f"{where} must be ['Multiline', [pattern, ...]] or ['Margin', [value, lower, upper]], got {content!r}."
        )
    kind, tags = content
    for pattern in tags if kind == "Multiline" else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}.") from None


def _is_chart(content: Any) -> bool:
    if not _is_list(content) or len(content) != 2:
        return False
    kind, tags = content
    if not _is_list(tags) or not all(isinstance(tag, str) for tag in tags):
        return False
    return (kind == "Multiline" and len(tags) > 0) or (kind == "Margin" and len(tags) == 3)


def _is_list(thing: Any) -> bool:
    return isinstance(thing, Sequence) and not isinstance(thing, (str, bytes))
