"""What the quantities of a report are, in the words of the runs that measured them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_dynamics.recording.html.markup import key_name, linked, name, table, text
from lightning_dynamics.recording.quantity import Quantity
from lightning_dynamics.recording.reading import Run

_ERRORS = {
    "exact": "exact up to rounding",
    "bound": "a bound on the error",
    "standard error": "a standard error",
    "none": "not stated",
}


def definitions_section(runs: Sequence[Run]) -> str:
    """Every quantity that occurs; where runs declare one differently, once for each declaration."""
    parts = ['<section id="definitions"><h2>Definitions</h2>\n']
    declared: dict[str, dict[str, dict[Quantity, list[str]]]] = {}
    for run in runs:
        for key, quantity in _occurring(run):
            by_key = declared.setdefault(key.partition("/")[0], {})
            by_key.setdefault(key, {}).setdefault(quantity, []).append(run.name)
    titles = {each.family: each.title for run in runs for each in run.tables}
    for family, by_key in declared.items():
        parts.append(f"<h3>{name(titles[family])}</h3>\n")
        rows = (row for key, quantities in by_key.items() for row in _rows(key, quantities))
        parts.append(table(("key", "symbol", "unit", "what it is", "source"), rows, css="definitions"))
    unknown = dict.fromkeys(key for run in runs for key in run.keys if run.quantity(key) is None)
    if unknown:
        keys = ", ".join(f"<code>{key_name(key)}</code>" for key in unknown)
        parts.append(f"<p>Recorded without a definition: {keys}.</p>\n")
    if not declared and not unknown:
        parts.append("<p>Nothing was measured.</p>\n")
    return "".join(parts) + "</section>\n"


def _rows(key: str, quantities: Mapping[Quantity, Sequence[str]]) -> Iterator[tuple[str, ...]]:
    for quantity, runs in quantities.items():
        declaring = f" In {', '.join(map(name, runs))}." if len(quantities) > 1 else ""
        error = text(_ERRORS.get(str(quantity.error), quantity.error))
        yield (
            f"<code>{key_name(key)}</code>",
            name(quantity.symbol),
            name(quantity.unit),
            f'{linked(quantity.definition)} <span class="aside">Error: {error}.{declaring}</span>',
            linked(quantity.source),
        )


def _occurring(run: Run) -> Iterator[tuple[str, Quantity]]:
    """Declarations by full name, in the order in which the run declares them."""
    measured = {id(run.quantity(key)) for key in run.keys}
    arrays = {name for record in run.records for name in record.arrays}
    for each in run.tables:
        for quantity in each.quantities:
            key = f"{each.family}/{quantity.name}"
            if id(quantity) in measured or (quantity.form == "density" and f"{key}_nodes" in arrays):
                yield key, quantity
