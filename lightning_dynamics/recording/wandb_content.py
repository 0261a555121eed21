"""What a W&B report shows of monitors: charts, figures and texts, from the quantities' declarations alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from lightning_dynamics.recording.figures.views import views_of
from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.reading import Run, mapping

_COST = "dynamics"  # this family stands in the lines of costs
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$&@]|:(?=//))")


@dataclass(frozen=True)
class Chart:
    """Curves over the steps on one pair of axes.

    Attributes:
        title: What is shown.
        keys: Full keys of the curves.
        patterns: Anchored expressions for further keys, those of layers whose names are not known.
        references: Those of the keys that others are compared with: thresholds, and what noise alone would give.
        unit: Unit of the values, empty where they have none or several.
        is_log: Whether it is read on a logarithmic axis.
    """

    title: str
    keys: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    unit: str = ""
    is_log: bool = False


@dataclass(frozen=True)
class Media:
    """A histogram or a picture that a monitor logs.

    Attributes:
        title: What is shown.
        key: Its full key.
    """

    title: str
    key: str


@dataclass(frozen=True)
class Section:
    """One family.

    Attributes:
        table: What of it is shown.
        panels: Its charts and figures; what one looks at first comes first.
        facts: What held in the runs, each with the names of the runs.
    """

    table: QuantityTable
    panels: tuple[Chart | Media, ...]
    facts: Mapping[str, tuple[str, ...]]

    @property
    def firsts(self) -> list[Quantity]:
        """What one looks at first."""
        return [q for name in self.table.headline for q in self.table.quantities if q.name == name]


@dataclass(frozen=True)
class Content:
    """What there is to show.

    Attributes:
        sections: One for each family.
        hyperparameters: Names of the hyper-parameters that are single values.
    """

    sections: tuple[Section, ...]
    hyperparameters: tuple[str, ...] = ()


def declared_content(tables: Iterable[QuantityTable], families: Sequence[str] = ()) -> Content:
    """What these tables say that loggers get by default.

    Args:
        tables: Tables of monitors.
        families: Families to show, all if none is given.

    Raises:
        ValueError: If there is no such family.
    """
    sections = []
    for table in _chosen(list(tables), families):
        shown = table.only(q.name for q in table.quantities if q.on_by_default)
        keys = [f"{table.family}/{q.key}" for q in shown.quantities if not q.per_layer and q.form == "scalar"]
        figures = {f"{table.family}/{q.key}" for q in shown.quantities if q.form != "scalar"}
        panels = tuple(_panels(shown, keys, figures, layers_are_known=False))
        sections.append(Section(shown, panels, {}))
    return Content(tuple(sections))


def measured_content(runs: Sequence[Run], families: Sequence[str] = ()) -> Content:
    """What these runs measured and gave to their loggers, named monitors included.

    Args:
        runs: The runs.
        families: Families to show, all that were measured if none is given.

    Raises:
        ValueError: If one of the families was not measured, or none was.
    """
    figures = _figures(runs)
    measured = dict.fromkeys(key for run in runs for key in _keys(run))
    found: dict[str, tuple[QuantityTable, list[str]]] = {}
    for table in _merged(runs):
        logged = table.only(q.name for q in table.quantities if q.on_by_default)
        keys = [key for key in measured if logged.find(key) is not None]
        drawn = [key for key in figures if logged.find(key) is not None]
        names = {q.name for key in (*keys, *drawn) if (q := logged.find(key)) is not None}
        if names:
            found[table.family] = logged.only(names), keys
    if not found:
        raise ValueError("None of these runs has measured anything that comes to a logger.")
    sections = []
    for shown in _chosen([table for table, _ in found.values()], families):
        keys = found[shown.family][1]
        sections.append(Section(shown, tuple(_panels(shown, keys, figures)), _facts(runs, shown)))
    return Content(tuple(sections), _hyperparameters(runs))


def introduction(section: Section) -> str:
    """What one looks at first in a section, and what held in the runs, as Markdown."""
    lines = [f"- {_code(f'{section.table.family}/{q.name}')}{_in_words(q)}" for q in section.firsts]
    for fact, names in section.facts.items():
        lines.append(f"- {', '.join(_code(name) for name in names)}: {escaped(fact)}")
    return "\n".join(lines)


def definitions(table: QuantityTable) -> str:
    """The quantities of a table as a table in Markdown."""
    lines = ["| key | symbol | unit | what it is | source |", "|---|---|---|---|---|"]
    for q in table.quantities:
        cells = (
            _code(f"{table.family}/{q.name}"),
            escaped(q.symbol),
            escaped(q.unit),
            _with_code(q.definition),
            escaped(q.source),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A text in one line in which nothing is Markdown, HTML, a formula or a link."""
    return _SPECIAL.sub(r"\\\1", re.sub(r"\s+", " ", _printable(text)))


def _printable(text: str) -> str:
    """Without halves of letters, which no encoding takes."""
    return text.encode("utf-8", "replace").decode()


def _panels(
    table: QuantityTable, keys: Sequence[str], figures: set[str], *, layers_are_known: bool = True
) -> Iterator[Chart | Media]:
    """Charts and figures, in the order of the declarations; first those of what one looks at first."""
    panels: dict[str, list[Chart | Media]] = {}
    patterns = table.panels()
    firsts = {q.panel for q in table.quantities if q.name in table.headline}
    for q in sorted(table.quantities, key=lambda q: q.panel not in firsts):
        key = f"{table.family}/{q.key}"
        if q.form == "density" and key in figures:
            panels[q.panel] = [Media(q.panel, f"{key}_figure"), Media(f"{q.panel}, histogram", key)]
        elif q.form == "scalar" and q.panel not in panels:
            own = tuple(k for k in keys if any(re.match(pattern, k) for pattern in patterns[q.panel]))
            inside = [each for each in table.quantities if each.panel == q.panel and each.form == "scalar"]
            units = {each.unit for each in inside}
            further = () if layers_are_known else tuple(p for p in patterns[q.panel] if p.endswith("/.+$"))
            dashed = tuple(k for k in own if (each := table.find(k)) is not None and each.name in table.references)
            unit = "".join(units - {"1"}) if len(units) == 1 else ""
            panels[q.panel] = [Chart(q.panel, own, further, dashed, unit, q.panel in table.log_panels)]
        elif q.form != "scalar" and key in figures:
            panels[q.panel] = [Media(q.panel, key)]
    for group in panels.values():
        yield from (panel for panel in group if isinstance(panel, Media) or panel.keys or panel.patterns)


def _chosen(tables: Sequence[QuantityTable], families: Sequence[str]) -> list[QuantityTable]:
    known = [table.family for table in tables]
    for family in families:
        if family not in known:
            raise ValueError(f"There is no family {family!r}; there are {', '.join(known)}.")
    return [table for table in tables if not families or table.family in families]


def _merged(runs: Iterable[Run]) -> list[QuantityTable]:
    """The tables of all runs; of a quantity that several declare, what the first one that logs it says."""
    tables: dict[str, QuantityTable] = {}
    for run in runs:
        for table in run.tables:
            known = tables.get(table.family)
            if known is None:
                tables[table.family] = table
                continue
            quantities = {q.name: q for q in known.quantities}
            for q in table.quantities:
                if q.name not in quantities or (q.on_by_default and not quantities[q.name].on_by_default):
                    quantities[q.name] = q
            tables[table.family] = replace(
                known,
                quantities=tuple(quantities.values()),
                headline=tuple(dict.fromkeys((*known.headline, *table.headline))),
                log_panels=tuple(dict.fromkeys((*known.log_panels, *table.log_panels))),
                references=tuple(dict.fromkeys((*known.references, *table.references))),
            )
    # what measuring cost comes last
    return sorted(tables.values(), key=lambda table: table.family == _COST)


def _figures(runs: Iterable[Run]) -> set[str]:
    """Full keys of what loggers were given pictures of."""
    keys: set[str] = set()
    for run in runs:
        for record in run.records:
            try:
                keys.update(view.key for view in views_of(record, [], run.tables))
            except (KeyError, TypeError, AttributeError):  # its notes are not what they should be
                continue
    return keys


def _keys(run: Run) -> list[str]:
    """Full keys of the scalars of a run, its costs included."""
    costs = (table.keys() for table in run.tables if table.family == _COST and run.costs)
    return [*run.keys, *chain.from_iterable(costs)]


def _facts(runs: Iterable[Run], table: QuantityTable) -> dict[str, tuple[str, ...]]:
    has_threshold = "stability_threshold" in table.references
    facts: dict[str, tuple[str, ...]] = {}
    for run in runs:
        for monitor in map(mapping, mapping(run.header.get("monitors")).values()):
            if isinstance(monitor, Mapping) and monitor.get("family") == table.family:
                fact = "; ".join(_facts_of(monitor, has_threshold))
                facts[fact] = (*facts.get(fact, ()), run.name)
    return facts


def _facts_of(monitor: Mapping[str, Any], has_threshold: bool) -> Iterator[str]:
    """The data, the threshold and the cadence of a monitor, as far as the file tells them."""
    probe = monitor.get("probe")
    if isinstance(probe, Mapping) and "kind" in probe:
        of = f" of {probe['N']}" if probe.get("N") else ""
        yield f"{probe['kind']}" + (f", {probe['n']} samples{of}" if probe.get("n") else "")
    if has_threshold and "threshold_rule" in monitor:
        yield f"threshold of {monitor['threshold_rule']}"
    if "cadence" in monitor:
        yield str(monitor["cadence"])


def _hyperparameters(runs: Iterable[Run]) -> tuple[str, ...]:
    names = dict.fromkeys(
        _printable(str(name))
        for run in runs
        for name, value in mapping(run.header.get("hyperparameters")).items()
        if isinstance(value, (bool, int, float, str))
    )
    return tuple(names)


def _in_words(q: Quantity) -> str:
    symbol = f", {escaped(q.symbol)}" if q.symbol else ""
    return f"{symbol}: {_with_code(q.definition)}"


def _with_code(text: str) -> str:
    """A definition, in which names of keys stand between backticks."""
    parts = re.split(r"`([^`]*)`", text)
    return "".join(_code(part) if i % 2 else escaped(part) for i, part in enumerate(parts))


def _code(text: str) -> str:
    """A text in one line as code, which may stand in a table."""
    return f"`{' '.join(_printable(text).replace('`', chr(39)).split())}`".replace("|", "\\|")
