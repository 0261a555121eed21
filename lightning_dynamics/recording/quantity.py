"""What is measured, declared once: charts, texts, records, documentation and tests all read it here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

LAST_LAYER = "last"
"""The layer whose quantities have no layer in their keys."""

_LAYER = "<layer>"

ErrorKind = Literal["exact", "bound", "standard error", "none"]
"""Exact up to rounding; a bound on the error; a standard error; or no statement."""


@dataclass(frozen=True)
class Quantity:
    """One logged number.

    Attributes:
        key: Name within its family, as in ``hessian/<key>``.
        symbol: How a paper would write it.
        unit: Its unit in terms of the loss and the parameters; ``1`` if it has none.
        definition: What it is, in one or two sentences.
        source: Where the definition is from.
        error: What kind of error stands with it in the record.
        panel: Title of the chart that it is drawn in; quantities of one panel share a chart.
        on_by_default: Whether it is logged unless asked otherwise.
        per_layer: Whether there is one for each layer, under ``<key>/<layer>``.
        form: ``"scalar"``; ``"density"`` for a spectrum: the record then holds the arrays ``<key>_nodes`` and
            ``<key>_weights`` instead of a scalar, and loggers draw them; ``"depth"`` for a figure of quantities by
            layer, drawn from the scalars of all records so far; ``"diffusion"`` and ``"phase"`` for figures of a
            record's arrays.
        shows: What a figure through depth shows: pairs of the key of a quantity and of what noise alone makes of it, or
            None.
    """

    key: str
    symbol: str
    unit: str
    definition: str
    source: str
    error: ErrorKind
    panel: str
    on_by_default: bool = True
    per_layer: bool = False
    form: Literal["scalar", "density", "depth", "diffusion", "phase"] = "scalar"
    shows: tuple[tuple[str, str | None], ...] = ()

    @property
    def name(self) -> str:
        """The key as it is shown: with a place for the layer where there is one for each."""
        return f"{self.key}/{_LAYER}" if self.per_layer else self.key


@dataclass(frozen=True)
class QuantityTable:
    """The quantities of one monitor under the family that their keys begin with.

    Attributes:
        family: First part of every key, ``hessian`` in ``hessian/top_1``.
        title: What the family is called in charts and texts.
        quantities: The quantities, in the order in which they are shown.
        headline: Names, without the family, of those that one looks at first.
        log_panels: Titles of the charts that are read on a logarithmic axis.
        references: Names of what others are compared with, such as a threshold.
        levels: Names with the value that they are compared with, such as 1 for a ratio to a threshold.
    """

    family: str
    title: str
    quantities: tuple[Quantity, ...]
    headline: tuple[str, ...] = ()
    log_panels: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    levels: tuple[tuple[str, float], ...] = ()

    def keys(self, *, default_only: bool = False) -> list[str]:
        """Full keys, family included."""
        return [f"{self.family}/{q.name}" for q in self.quantities if q.on_by_default or not default_only]

    def is_on_by_default(self, key: str) -> bool:
        """Whether a full key, that of a layer included, is logged unless asked otherwise."""
        bare = key.removeprefix(f"{self.family}/")
        return any(
            q.on_by_default and (bare == q.key or (q.per_layer and bare.startswith(f"{q.key}/")))
            for q in self.quantities
        )

    def only(self, names: Iterable[str]) -> QuantityTable:
        """The same with the quantities of these names, given without the family."""
        wanted = set(names)
        return replace(self, quantities=tuple(q for q in self.quantities if q.name in wanted))

    def of_form(self, form: str) -> list[tuple[Quantity, str]]:
        """The quantities of this form, with their full keys."""
        return [(q, f"{self.family}/{q.key}") for q in self.quantities if q.form == form]

    def panels(self) -> dict[str, list[str]]:
        """Regular expressions for the full keys of curves, anchored at both ends, by the title of their chart."""
        panels: dict[str, list[str]] = {}
        for q in self.quantities:
            if q.form == "scalar":
                layer = "/.+" if q.per_layer else ""
                panels.setdefault(q.panel, []).append(f"^{re.escape(f'{self.family}/{q.key}')}{layer}$")
        return panels

    def describe(self) -> dict[str, dict[str, Any]]:
        """The declarations by full key, as they stand in a record file's header."""
        levels = dict(self.levels)
        return {
            f"{self.family}/{q.name}": {
                "symbol": q.symbol,
                "unit": q.unit,
                "definition": q.definition,
                "source": q.source,
                "error": q.error,
                "panel": q.panel,
                **({"logged": True} if q.on_by_default else {}),
                **({"headline": True} if q.name in self.headline else {}),
                **({"log": True} if q.panel in self.log_panels else {}),
                **({"reference": True} if q.name in self.references else {}),
                **({"level": levels[q.name]} if q.name in levels else {}),
                **({"form": q.form} if q.form != "scalar" else {}),
                **({"shows": [list(pair) for pair in q.shows]} if q.shows else {}),
            }
            for q in self.quantities
        }

    @classmethod
    def described(cls, family: str, title: str, quantities: Mapping[str, Mapping[str, Any]]) -> QuantityTable:
        """The table of a family as a record file's header declares it, whatever version wrote it.

        Args:
            family: The family.
            title: What it is called.
            quantities: Declarations by full key, those of other families among them.
        """
        own = {key.removeprefix(f"{family}/"): each for key, each in quantities.items() if key.startswith(f"{family}/")}
        return cls(
            family,
            title,
            tuple(_described(name, each) for name, each in own.items()),
            tuple(name for name, each in own.items() if each.get("headline")),
            tuple(dict.fromkeys(str(each.get("panel", name)) for name, each in own.items() if each.get("log"))),
            tuple(name for name, each in own.items() if each.get("reference")),
            tuple((name, float(each["level"])) for name, each in own.items() if isinstance(each.get("level"), float)),
        )

    def find(self, key: str) -> Quantity | None:
        """The quantity that a full key is of, that of a layer included; None where it is not of this table."""
        bare = key.removeprefix(f"{self.family}/")
        if bare == key:
            return None
        whole = next((q for q in self.quantities if not q.per_layer and q.key == bare), None)
        layered = (q for q in self.quantities if q.per_layer and bare.startswith(f"{q.key}/"))
        return whole or next(layered, None)


def _described(name: str, said: Mapping[str, Any]) -> Quantity:
    bare = name.removesuffix(f"/{_LAYER}")
    return Quantity(
        key=bare,
        symbol=str(said.get("symbol", "")),
        unit=str(said.get("unit", "")),
        definition=str(said.get("definition", "")),
        source=str(said.get("source", "")),
        error=said.get("error", "none"),
        panel=str(said.get("panel", name)),
        on_by_default=bool(said.get("logged")),
        per_layer=bare != name,
        form=said.get("form", "scalar"),
        shows=tuple(
            (str(pair[0]), pair[1]) for pair in said.get("shows", ()) if isinstance(pair, list) and len(pair) == 2
        ),
    )


def of_layer(key: str, layer: str) -> str:
    """The key of a quantity at a layer."""
    return key if layer == LAST_LAYER else f"{key}/{layer}"


def layer_keys(names: Iterable[str]) -> dict[str, str]:
    """What layers are called in keys: dots become ``_``, since W&B takes a dot for nesting.

    Raises:
        ValueError: If two names would become the same.
    """
    keys: dict[str, str] = {}
    for name in names:
        key = name.replace(".", "_").replace("/", "_")
        other = next((known for known, taken in keys.items() if taken == key), None)
        if other is not None:
            raise ValueError(f"The layers {other!r} and {name!r} would both be called {key!r} in the keys. Rename one.")
        keys[name] = key
    return keys


def about_text(
    tables: Sequence[QuantityTable],
    facts: Iterable[tuple[str, str]],
    shown: Sequence[QuantityTable] | None = None,
) -> str:
    """A Markdown page that explains every key in a run's own terms.

    A list and no tables: TensorBoard breaks the words of wide ones.

    Args:
        tables: The tables of the run's monitors.
        facts: Pairs of a heading and what holds in this run (which threshold rule, which data, …).
        shown: What of them comes to the loggers; all by default.
    """
    logged = {table.family: {q.name for q in table.quantities} for table in (tables if shown is None else shown)}
    lines = ["# lightning_dynamics in this run", ""]
    lines += [f"- **{name}**: {_escaped(value)}" for name, value in facts]
    lines += ["", "Set smoothing to 0: it hides the oscillation at the edge and delays every jump.", ""]
    for table in tables:
        own = logged.get(table.family, set())
        lines += [f"## {table.title}", "", *(_entry(table, q) for q in table.quantities if q.name in own)]
        rest = [_entry(table, q) for q in table.quantities if q.name not in own]
        if rest:
            lines += ["", "In the record only, unless asked for with `also_log`:", "", *rest]
        lines.append("")
    return "\n".join(lines)


def _entry(table: QuantityTable, quantity: Quantity) -> str:
    symbol = f", {_escaped(quantity.symbol)}" if quantity.symbol else ""
    unit = f" in {_escaped(quantity.unit)}" if quantity.unit != "1" else ""
    error = "" if quantity.error == "none" else f" Error: {quantity.error}."
    return (
        f"- `{table.family}/{quantity.name}`{symbol}{unit}: {_escaped(quantity.definition)}{error} "
        f"Source: {_escaped(quantity.source)}."
    )


def _escaped(text: str) -> str:
    """Without what Markdown would take for emphasis, or for the end of a line."""
    return text.replace("*", "\\*").replace("\n", " ")
