"""Runs as one file of HTML that needs nothing else: tables, figures, definitions, data."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec

from lightning_dynamics.recording.figures import Source, as_runs
from lightning_dynamics.recording.figures.standard import Section, sections
from lightning_dynamics.recording.html.colours import VARIABLES
from lightning_dynamics.recording.html.data import data_section
from lightning_dynamics.recording.html.definitions import definitions_section
from lightning_dynamics.recording.html.figures import Drawing, colours_of
from lightning_dynamics.recording.html.markup import json_block, name, text
from lightning_dynamics.recording.html.summary import summary_section
from lightning_dynamics.recording.interactive import plotly_script

GENERATOR = '<meta name="generator" content="lightning_dynamics report">'
"""By which a file is known as a report."""

__all__ = ["GENERATOR", "report"]


def report(source: Source, *, title: str | None = None, interactive: bool = False) -> str:
    """A page of HTML about runs that asks nothing of any network.

    Args:
        source: What was measured: runs as :func:`~lightning_dynamics.recording.load_runs` gives them, or whatever else
            the figures of :mod:`lightning_dynamics.recording.figures` take.
        title: What it is called.
        interactive: Whether curves can be zoomed and read off under the pointer; needs plotly, takes 5 MB more, and
            holds a script. Without it there is none.

    Raises:
        ValueError: If there is no run.
        FileNotFoundError: If a path has no record file.
        ImportError: If matplotlib is missing, or plotly where it is needed.
    """
    runs = as_runs(source)
    if not runs:
        raise ValueError("There is no run to report on.")
    if find_spec("matplotlib") is None:
        raise ImportError('A report needs matplotlib: pip install "lightning-dynamics[figures]".')
    scripts = [plotly_script(), _resource("page.js")] if interactive else []
    shown = sections(runs)
    anchors = [_anchor(section, i) for i, section in enumerate(shown)]
    drawing = Drawing(interactive)
    heading = title or (f"Training dynamics of {len(runs)} runs" if len(runs) > 1 else "Training dynamics")
    subject = "" if title is None and len(runs) > 1 else f"<p>{', '.join(name(run.name) for run in runs[:20])}</p>"
    parts = [
        "<!DOCTYPE html>\n",
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        '<meta name="color-scheme" content="light dark">\n',
        f"<title>{text(heading)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n",
        f"<header><h1>{name(heading)}</h1>{subject}\n{_contents(shown, anchors)}</header>\n<main>\n",
        summary_section(runs, colours_of(shown)),
        *(drawing.section(section, anchor) for section, anchor in zip(shown, anchors, strict=True)),
        definitions_section(runs),
        data_section(runs),
        "</main>\n<footer>Made by lightning_dynamics from the records of the runs alone.</footer>\n",
        *([json_block(VARIABLES, "colours")] if interactive else []),
        *(f"<script>{script}</script>\n" for script in scripts),
        "</body>\n</html>\n",
    ]
    return "".join(parts)


def _contents(shown: Sequence[Section], anchors: Sequence[str]) -> str:
    links = [("runs", "Runs")]
    links += [(anchor, section.title) for section, anchor in zip(shown, anchors, strict=True)]
    links += [("definitions", "Definitions"), ("data", "Data")]
    return "<nav>" + " ".join(f'<a href="#{anchor}">{name(label)}</a>' for anchor, label in links) + "</nav>"


def _anchor(section: Section, number: int) -> str:
    return f"family-{section.family if re.fullmatch('[A-Za-z0-9_-]+', section.family) else number}"


def _policy(scripts: Sequence[str]) -> str:
    """Styles and pictures of the page's own, these scripts, and nothing from elsewhere."""
    digests = (b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if scripts:
        allowed.append("script-src " + " ".join(f"'sha256-{digest}'" for digest in digests))
    return "; ".join(allowed)


def _resource(file: str) -> str:
    return (files(__package__) / file).read_text(encoding="utf-8").replace("\r\n", "\n")
