"""The numbers of a report, embedded for whoever wants to draw them anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_dynamics.recording.figures.panels import kept_points
from lightning_dynamics.recording.html.markup import json_block, text
from lightning_dynamics.recording.reading import Run, Series

BLOCK = "lightning-dynamics-data"
_FORMAT = 1
_MOST = 2000  # points of a curve
_DIGITS = 9
_FACTS = ("run", "time", "module", "versions", "trainer", "hyperparameters", "monitors")
_SNIPPET = f"""\
import json, pathlib, re
page = pathlib.Path("report.html").read_text(encoding="utf-8")
data = json.loads(re.search(r'id="{BLOCK}">(.*?)</script>', page, re.DOTALL)[1])
"""


def data_section(runs: Sequence[Run]) -> str:
    """The data of all curves, and how to read it back."""
    return (
        '<section id="data"><h2>Data</h2>\n'
        "<p>This page holds the numbers of all its curves. Three lines of Python read them back:</p>\n"
        f'<pre tabindex="0"><code id="read-back">{text(_SNIPPET)}</code></pre>\n'
        '<p>Then <code>data["runs"][0]["series"]["hessian/top_1"]</code> has <code>steps</code>, <code>values</code> '
        "and, where there are any, <code>errors</code>; what is not finite is <code>None</code>. A curve of more than "
        f"{_MOST} points is thinned to the smallest and the largest value of each stretch of steps; "
        "<code>thinned_from</code> then says how many there were. The records themselves, with spectra and notes, are "
        "read by <code>lightning_dynamics.load_runs</code>.</p>\n"
        f"</section>\n{json_block(report_data(runs), BLOCK)}"
    )


def report_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What a report embeds: facts and series of each run, and what the keys mean."""
    declared = {key: quantity for run in runs for key in run.keys if (quantity := run.quantity(key)) is not None}
    return {
        "format": _FORMAT,
        "runs": [
            {
                "name": run.name,
                "finished": run.is_finished,
                "header": {fact: run.header[fact] for fact in _FACTS if fact in run.header},
                "series": {key: _embedded(run.series(key)) for key in run.keys},
            }
            for run in runs
        ],
        "quantities": {
            key: {
                "symbol": quantity.symbol,
                "unit": quantity.unit,
                "definition": quantity.definition,
                "error": quantity.error,
                "source": quantity.source,
            }
            for key, quantity in declared.items()
        },
    }


def _embedded(series: Series) -> dict[str, Any]:
    kept = kept_points(series.values, _MOST)
    errors = [_short(series.errors[i]) for i in kept]
    return {
        "steps": [series.steps[i] for i in kept],
        "values": [_short(series.values[i]) for i in kept],
        **({"errors": errors} if any(error is not None for error in errors) else {}),
        **({"thinned_from": len(series)} if len(kept) < len(series) else {}),
    }


def _short(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
