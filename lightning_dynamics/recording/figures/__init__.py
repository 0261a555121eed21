"""Figures of runs in one house style: what a report shows, one function each.

Each takes what was measured, as it is at hand: the path of a run, of a directory above several, or of a record file;
a :class:`Run` or a monitor; a list of records; or a list of these. Several runs share axes, told apart by colour. Each
returns a ``matplotlib.figure.Figure``: no state of ``pyplot`` is touched, ``figure.savefig(path)`` writes it,
a notebook shows it. Records alone do not say what their quantities mean: from a path or a monitor more is drawn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, Union

from lightning_dynamics.recording.figures.panels import Panel, draw
from lightning_dynamics.recording.figures.standard import cost_panels, panels_of, section, sections
from lightning_dynamics.recording.reading import Run, load_runs
from lightning_dynamics.recording.record import Record
from lightning_dynamics.recording.table import RecordTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HasRun(Protocol):
    """A monitor."""

    @property
    def run(self) -> Run: ...


Source = Union[str, "os.PathLike[str]", Run, HasRun, Iterable["Source"], Iterable[Record]]
"""What was measured."""


def sharpness(source: Source, *, family: str = "hessian") -> Figure:
    """Sharpness against the edge of stability, with the first point at the edge marked; edge ratio; loss.

    Args:
        source: What was measured.
        family: First part of the keys, ``"hessian_head"`` for a monitor with ``name="head"``.

    Raises:
        ValueError: If nothing of it was measured.
        FileNotFoundError: If a path has no record file.
    """
    keys = ("top_1", "stability_threshold", "edge_ratio", "probe_loss")
    return _of_keys(source, family, keys, "Sharpness and the edge of stability")


def spectrum(source: Source, *, family: str = "hessian") -> Figure:
    """The density of the spectrum at several steps, side by side; arguments and errors as :func:`sharpness`."""
    return _standard(source, family, "spectrum")


def spectrum_over_time(source: Source, *, family: str = "hessian") -> Figure:
    """The spectrum over the steps as a heat-map; arguments and errors as :func:`sharpness`."""
    return _standard(source, family, "spectrum-over-time")


def overlap(source: Source, *, family: str = "hessian") -> Figure:
    """How far leading eigenvectors turned into each other, as matrices; arguments and errors as :func:`sharpness`."""
    return _standard(source, family, "overlap")


def collapse(source: Source, *, family: str = "collapse") -> Figure:
    """nc1 with its floor, nc2, nc3, nc4 and accuracy of the last layer; arguments and errors as :func:`sharpness`."""
    return _overview(source, family)


def depth(source: Source, *, family: str = "collapse") -> Figure:
    """nc1 and CDNV through the layers, over time, of one run; arguments and errors as :func:`sharpness`."""
    return _standard(_only(source), family, "depth-0")


def displacement(source: Source, *, family: str = "displacement") -> Figure:
    """Distance from the start, step and path length; arguments and errors as :func:`sharpness`."""
    return _overview(source, family)


def diffusion(source: Source, *, family: str = "displacement") -> Figure:
    """Squared displacement over time with the fitted power, of one run; arguments and errors as :func:`sharpness`."""
    return _standard(_only(source), family, "diffusion-0")


def phase(source: Source, *, family: str = "displacement") -> Figure:
    """Trajectories in the planes of position and velocity, of one run; arguments and errors as :func:`sharpness`."""
    return _standard(_only(source), family, "phase-0")


def stochastic_sharpness(source: Source, *, family: str = "sharpness") -> Figure:
    """Batch Sharpness against its level, and what the steps gained; arguments and errors as :func:`sharpness`."""
    return _overview(source, family)


def noise(source: Source, *, family: str = "noise") -> Figure:
    """Variance of the gradient, signal-to-noise ratio, noise scale; arguments and errors as :func:`sharpness`."""
    return _overview(source, family)


def sam(source: Source, *, family: str = "sam") -> Figure:
    """What SAM's perturbation found; arguments and errors as :func:`sharpness`."""
    return _overview(source, family)


def cost(source: Source) -> Figure:
    """Share of the wall-clock time that measuring took, and of which monitor; errors as :func:`sharpness`."""
    runs = as_runs(source)
    return draw(_some(cost_panels(runs), "cost", runs), title="Cost of the monitors")


def curves(source: Source, keys: str | Sequence[str]) -> Figure:
    """Any quantities over the steps, those of one chart in the same axes.

    Args:
        source: What was measured.
        keys: Full keys, or patterns for them: ``"hessian/top_."``. Not those of layers.

    Raises:
        ValueError: If none of them was measured.
        FileNotFoundError: If a path has no record file.
    """
    try:
        patterns = [re.compile(key) for key in ([keys] if isinstance(keys, str) else keys)]
    except re.error as error:
        raise ValueError(f"`keys` must be keys, or regular expressions for them, got {keys!r}: {error}.") from error
    runs = as_runs(source)
    panels: list[Panel] = []
    for family in _families(runs):
        wanted = partial(_matches, patterns, family)
        panels += panels_of(runs, family, only=lambda quantity, wanted=wanted: wanted(quantity.key))  # type: ignore[misc]
    return draw(_some(panels, f"values of {keys!r}", runs))


def as_runs(source: Source) -> list[Run]:
    """The runs that something stands for, under names that tell them apart."""
    runs = list(_runs(source))
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.name or 'run'} {names[:i].count(run.name) + 1}")
        for i, run in enumerate(runs)
    ]


def _runs(source: Any) -> Iterator[Run]:
    if isinstance(source, (str, os.PathLike)):
        yield from load_runs(source)
    elif isinstance(source, Run):
        yield source
    elif isinstance(getattr(source, "run", None), Run):
        yield source.run
    elif isinstance(source, Iterable) and not isinstance(source, RecordTable):
        several = list(source)
        if several and all(isinstance(each, Record) for each in several):
            yield Run("", (), several)
            return
        for are_paths, group in groupby(several, lambda each: isinstance(each, (str, os.PathLike))):
            # together, so that names tell them apart, and a run that was resumed elsewhere is one
            for each in [load_runs(*group)] if are_paths else group:
                yield from _runs(each)
    else:
        raise TypeError(f"Runs, paths, monitors or records can be drawn, not {type(source).__name__}.")


def _only(source: Source) -> Run:
    """The one run of a figure that shows one."""
    runs = as_runs(source)
    if len(runs) != 1:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"This figure shows one run; there are {len(runs)}: {names}. Choose one of `load_runs(…)`.")
    return runs[0]


def _matches(patterns: Sequence[re.Pattern[str]], family: str, key: str) -> bool:
    return any(pattern.fullmatch(f"{family}/{key}") for pattern in patterns)


def _of_keys(source: Source, family: str, keys: Sequence[str], title: str) -> Figure:
    runs = as_runs(source)
    family = _family(runs, family)
    panels = panels_of(runs, family, only=lambda quantity: quantity.key in keys)
    return draw(_some(panels, f"values of {family}/{keys[0]}", runs), title=title)


def _overview(source: Source, family: str) -> Figure:
    return _standard(source, family, "overview")


def _standard(source: Source, family: str, name: str) -> Figure:
    runs = as_runs(source)
    family = _family(runs, family)
    found = [shown for shown in section(runs, family).figures if shown.name == name]
    if not found:
        what = "values" if name == "overview" else name.removesuffix("-0").replace("-", " ")
        raise ValueError(_nothing(f"{what} of {family}", runs))
    return found[0].draw()


def _family(runs: Sequence[Run], family: str) -> str:
    """The family itself, or the one of a named monitor where there is no other."""
    families = _families(runs)
    named = [each for each in families if each.startswith(f"{family}_")]
    return named[0] if family not in families and len(named) == 1 else family


def _families(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(table.family for run in runs for table in run.tables))


def _nothing(what: str, runs: Sequence[Run]) -> str:
    families = ", ".join(_families(runs)) or "nothing"
    return f"These records hold no {what}. They hold {families}."


def _some(panels: list[Panel], what: str, runs: Sequence[Run]) -> list[Panel]:
    if not panels:
        raise ValueError(_nothing(what, runs))
    return panels


__all__ = [
    "collapse",
    "cost",
    "curves",
    "depth",
    "diffusion",
    "displacement",
    "noise",
    "overlap",
    "phase",
    "sam",
    "sections",
    "sharpness",
    "spectrum",
    "spectrum_over_time",
    "stochastic_sharpness",
]
