"""The runs of a report: what they were, what they cost, what they came to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from lightning_dynamics.recording.figures.style import plus_minus
from lightning_dynamics.recording.html.markup import facts, folded, key_name, name, plain, said, table, text
from lightning_dynamics.recording.reading import Run, mapping

_PARAMETER = "hyper-parameter "
_SURE = 5e-4  # error that is not shown, as a share of the value
_FEW_LINES = 5  # of damage, that are shown at once
_TRAINER = {
    "strategy": "strategy",
    "precision": "precision",
    "world_size": "ranks",
    "accumulate_grad_batches": "accumulated batches",
    "gradient_clip_val": "clipped at",
    "batches_per_epoch": "batches per epoch",
    "max_epochs": "epochs at most",
    "max_steps": "steps at most",
}
_UNLIMITED = ("", "none", "-1")


def summary_section(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """The runs, side by side where there are several.

    Args:
        runs: The runs.
        colours: What they are drawn in, by name, where figures tell them apart by colour.
    """
    parts = [f'<section id="runs"><h2>{"Runs" if len(runs) > 1 else "Run"}</h2>\n']
    if len(runs) > 1:
        parts += _side_by_side(runs, colours)
    else:
        parts += [*map(_facts_of, runs), *map(_damage, runs), _last_values(runs, colours)]
    return "".join(parts) + "</section>\n"


def _side_by_side(runs: Sequence[Run], colours: Mapping[str, str]) -> Iterator[str]:
    settings = [_settings(run) for run in runs]
    terms = dict.fromkeys(term for each in settings for term in each)
    differing = [term for term in terms if len({each.get(term) for each in settings}) > 1]
    # those that somebody chose stand first
    differing.sort(key=lambda term: not _is_parameter(term))
    course = [_course(run) for run in runs]
    head = [
        "run",
        *(f"<mark>{text(term.removeprefix(_PARAMETER))}</mark>" for term in differing),
        *(text(term) for term in course[0]),
    ]
    rows = [
        [
            name(run.name, colours.get(run.name)),
            *(_differing(own.get(term)) for term in differing),
            *(text(value) for value in passed.values()),
        ]
        for run, own, passed in zip(runs, settings, course, strict=True)
    ]
    yield table(head, rows, css="runs")
    yield from map(_damage, runs)
    yield _last_values(runs, colours)
    shared = [(term.removeprefix(_PARAMETER), folded(settings[0][term])) for term in terms if term not in differing]
    if shared:
        yield f"<h3>In common</h3>\n{facts(shared)}"
    for run in runs:
        whole = f"<summary>{name(run.name, colours.get(run.name))} in full</summary>\n{_facts_of(run)}"
        yield f"<details>{whole}</details>\n"


def _differing(value: str | None) -> str:
    return "–" if value is None else f"<mark>{folded(value)}</mark>"


def _facts_of(run: Run) -> str:
    settings = _settings(run)
    chosen = [(term.removeprefix(_PARAMETER), folded(settings[term])) for term in settings if _is_parameter(term)]
    others = [(term, folded(value)) for term, value in settings.items() if not _is_parameter(term)]
    passed = [(term, text(value)) for term, value in _course(run).items()]
    parts = [facts([("run", name(run.name)), *passed, *others])]
    if chosen:
        parts.append(f"<h3>Hyper-parameters</h3>\n{facts(chosen)}")
    rows = list(_monitors(run))
    if rows:
        head = ("monitor", "when", "data", "threshold rule", "seconds")
        parts.append(f"<h3>Monitors</h3>\n{table(head, rows, css='monitors')}")
    return "".join(parts)


def _is_parameter(term: str) -> bool:
    return term.startswith(_PARAMETER)


def _course(run: Run) -> dict[str, str]:
    """How far it came, and what measuring cost."""
    last = run.records[-1] if run.records else None
    lives = len(run.segments)
    resumed = f", resumed {'once' if lives == 2 else f'{lives - 1} times'}" if lives > 1 else ""
    skipped = run.costs[-1].skipped if run.costs else 0
    return {
        "begun": _date(run),
        "status": ("finished" if run.is_finished else "interrupted or still running") + resumed,
        "steps": "–" if last is None else f"{max(record.step for record in run.records)}",
        "epochs": "–" if last is None else f"{max(record.epoch for record in run.records) + 1}",
        "measurements": f"{len(run.records)}",
        "cost share": f"{100 * run.overhead:.2g} %" if math.isfinite(run.overhead) else "not told",
        "skipped points": f"{skipped}",
    }


def _date(run: Run) -> str:
    seconds = run.segments[0].time if run.segments else 0.0
    try:
        begun = datetime.fromtimestamp(seconds, timezone.utc) if seconds else None
    except (OverflowError, OSError, ValueError):
        begun = None
    return "not told" if begun is None else f"{begun:%Y-%m-%d %H:%M} UTC"


def _settings(run: Run) -> dict[str, str]:
    """What it was run with, in words, by what it is called; hyper-parameters first."""
    header = run.header
    found = {f"{_PARAMETER}{key}": said(value) for key, value in _leaves(mapping(header.get("hyperparameters")))}
    if "module" in header:
        found["module"] = said(header["module"])
    rules = {
        label: said(monitor["threshold_rule"])
        for label, monitor in mapping(header.get("monitors")).items()
        if "threshold_rule" in mapping(monitor)
    }
    if rules:
        one = len(set(rules.values())) == 1
        found["threshold rule"] = (
            next(iter(rules.values())) if one else "; ".join(f"{k}: {v}" for k, v in rules.items())
        )
    trainer = mapping(header.get("trainer"))
    told = {term: said(trainer[key]) for key, term in _TRAINER.items() if key in trainer}
    found |= {term: value for term, value in told.items() if value not in _UNLIMITED}
    versions = mapping(header.get("versions"))
    if versions:
        found["versions"] = ", ".join(f"{key} {said(value)}" for key, value in versions.items())
    return found


def _monitors(run: Run) -> Iterator[tuple[str, ...]]:
    """What measured, how often, on which data, against which edge, and what that took."""
    seconds = run.costs[-1].seconds if run.costs else {}
    monitors = mapping(run.header.get("monitors"))
    for label in dict.fromkeys([*monitors, *seconds]):
        told = mapping(monitors.get(label))
        probe = mapping(told.get("probe"))
        data = said(probe["kind"]) if "kind" in probe else "–"
        if probe.get("n"):
            of = "" if probe.get("N") is None else f" of {said(probe['N'])}"
            data += f", {said(probe['n'])}{of} samples"
        yield (
            name(label),
            text(said(told.get("cadence", "–"))),
            name(data),
            name(said(told.get("threshold_rule", "–"))),
            f"{seconds[label]:.3g}" if label in seconds else "–",
        )


def _last_values(runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """Where the quantities that one looks at first have come to."""
    symbols = {
        f"{each.family}/{headline}": quantity.symbol
        for run in runs
        for each in run.tables
        for headline in each.headline
        if (quantity := run.quantity(f"{each.family}/{headline}")) is not None
    }
    keys = [key for key in symbols if any(key in run.keys for run in runs)]
    if not keys:
        return ""

    def label(key: str) -> str:
        return f"<code>{key_name(key)}</code> {name(symbols[key])}"

    if len(runs) > 1:
        rows = [[name(run.name, colours.get(run.name)), *(_last(run, key) for key in keys)] for run in runs]
        return "<h3>Last values</h3>\n" + table(["run", *map(label, keys)], rows, css="runs")
    return "<h3>Last values</h3>\n" + table(
        ["quantity", "value"], [[label(key), _last(run, key)] for run in runs for key in keys], css="numbers"
    )


def _last(run: Run, key: str) -> str:
    series = run.series(key)
    known = [i for i, value in enumerate(series.values) if math.isfinite(value)]
    if not known:
        return "–"
    place = known[-1]
    value, error = series.values[place], series.errors[place]
    # of an eigenvalue that is certified to ten digits nobody reads ten
    shown = f"{value:.4g}" if error < _SURE * abs(value) else plus_minus(value, error)
    of = max(record.step for record in run.records)
    at = "" if series.steps[place] == of else f' <span class="aside">at step {series.steps[place]}</span>'
    return f"{text(shown)}{at}"


def _damage(run: Run) -> str:
    """Which lines were skipped; where the file stands is nobody's business."""
    if not run.damage:
        return ""
    files = {str(segment.file): f"{run.name}/{segment.file.name}" for segment in run.segments}
    lines = []
    for line in run.damage:
        whole = next((file for file in files if line.startswith(file)), None)
        lines.append(line if whole is None else files[whole] + line.removeprefix(whole))
    items = "<ul>" + "".join(f"<li>{name(line)}</li>" for line in lines) + "</ul>"
    many = f"{len(lines)} damaged lines were skipped"
    if len(lines) > _FEW_LINES:
        return f'<details class="damage"><summary>{many}</summary>{items}</details>\n'
    return f'<div class="damage">{items}</div>\n'


def _leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What a mapping of mappings says, by names with dots."""
    for key, value in plain(values).items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
