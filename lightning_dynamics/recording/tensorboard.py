"""What TensorBoard has of a run, and links that open it at the right place."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from lightning_dynamics.recording.reading import Run

_LAYOUT = "custom_scalars__config__"
_EVENTS = 1000  # of a file
_LONGEST = 2**20  # bytes of an event that may be a layout
_PINNED = 10  # as many as TensorBoard lets one pin by hand


def found_layout(directory: str | os.PathLike[str]) -> dict[str, dict[str, list[Any]]]:
    """The layout that TensorBoard shows for a run's Custom Scalars: the one written last.

    Only the beginning of each event file is looked at; what cannot be read is passed over.

    Args:
        directory: The run's directory.

    Returns:
        Charts by title, by category; empty where there is none.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for file in event_files(directory):
        try:
            for event in islice(_events(file), _EVENTS):
                found = _layout_in(event) or found
        except Exception:  # half a file, or none of TensorBoard's
            continue
    return found


def event_files(directory: str | os.PathLike[str], *, below: bool = False) -> list[Path]:
    """A run's event files, oldest first.

    Args:
        directory: The run's directory.
        below: Those of all directories below as well.
    """
    place = Path(directory)
    return sorted(place.rglob("*.tfevents.*") if below else place.glob("*.tfevents.*"))


def headline_tags(runs: Iterable[Run]) -> list[str]:
    """The curves that one looks at first, of what was measured in any of these runs and is logged: ten at most."""
    tags: dict[str, None] = {}
    for run in runs:
        measured = set(run.keys)
        for table in run.tables:
            for quantity in table.quantities:
                tag = f"{table.family}/{quantity.name}"
                if quantity.name in table.headline and quantity.on_by_default and tag in measured:
                    tags[tag] = None
    return list(tags)[:_PINNED]


def pinned_link(address: str, tags: Sequence[str]) -> str:
    """Opens the Time Series tab with the cards of these tags pinned, curves as they are.

    Args:
        address: Where TensorBoard answers, ``http://localhost:6006``.
        tags: Tags of scalars.
    """
    cards = [{"plugin": "scalars", "tag": tag} for tag in tags]
    state = {"pinnedCards": json.dumps(cards, separators=(",", ":")), "smoothing": 0}
    return f"{address}/?{urlencode(state, quote_via=quote, safe='/:,')}#timeseries"


def custom_scalars_link(address: str) -> str:
    """Opens the Custom Scalars tab, curves as they are: it reads its own smoothing, behind the ``#``."""
    return f"{address}/#custom_scalars&_smoothingWeight=0"


def _events(file: Path) -> Iterator[bytes]:
    """Serialized events; empty in place of those that are too long to be layouts, such as graphs and videos."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        while len(header := stream.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])  # and a checksum
            if stream.tell() + length + 4 > size:  # being written, or damaged
                return
            if length > _LONGEST:
                stream.seek(length + 4, os.SEEK_CUR)
                yield b""
            else:
                yield stream.read(length + 4)[:-4]


def _layout_in(event: bytes) -> dict[str, dict[str, list[Any]]]:
    if _LAYOUT.encode() not in event:
        return {}
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # type: ignore[import-untyped]

    layout: dict[str, dict[str, list[Any]]] = {}
    for value in Event.FromString(event).summary.value:
        if value.tag == _LAYOUT:
            for category in Layout.FromString(value.tensor.string_val[0]).category:
                charts = layout.setdefault(category.title, {})
                for chart in category.chart:
                    charts.update(_contents(chart))
    return layout


def _contents(chart: Any) -> Iterator[tuple[str, list[Any]]]:
    """A chart as ``add_custom_scalars`` takes it: several where it has several margins."""
    if chart.HasField("multiline"):
        yield chart.title, ["Multiline", list(chart.multiline.tag)]
    for number, each in enumerate(chart.margin.series, start=1):
        title = chart.title if number == 1 else f"{chart.title} ({number})"
        yield title, ["Margin", [each.value, each.lower, each.upper]]
