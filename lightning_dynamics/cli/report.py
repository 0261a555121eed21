"""``lightning-dynamics report``: runs as one file of HTML."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from lightning_dynamics.recording import load_runs
from lightning_dynamics.recording.html import GENERATOR, report

_NAME = "report.html"
_HEAD = 500  # letters within which a report says that it is one


def add_parser(subparsers: Any) -> None:
    """Add the command to those of ``lightning-dynamics``."""
    parser = subparsers.add_parser(
        "report",
        help="write runs as one HTML file",
        description="Write one or several runs as one HTML file that needs nothing else: no account, no network, no "
        "script. It is made from the record files dynamics.jsonl alone, whatever the logger was.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="directory of a run, or one above several (lightning_logs), or a record file",
    )
    parser.add_argument(
        "-o", "--output", default=_NAME, help=f"where to; an earlier report is replaced (default: {_NAME})"
    )
    parser.add_argument("--title", help="what the page is called")
    parser.add_argument("--interactive", action="store_true", help="curves that can be zoomed; 5 MB more, needs plotly")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    runs = load_runs(*args.runs)
    for run in runs:
        for line in run.damage:
            print(line, file=sys.stderr)
    if not runs:
        raise ValueError(f"There is no run in {', '.join(args.runs)}: no record file has a header that can be read.")
    file = _place(Path(args.output))
    _write(file, report(runs, title=args.title, interactive=args.interactive))
    print(f"{file} ({_size(file.stat().st_size)}, {len(runs)} {'run' if len(runs) == 1 else 'runs'})")
    return 0


def _place(output: Path) -> Path:
    """The file to write: nothing but an earlier report is replaced."""
    file = output / _NAME if output.is_dir() else output
    if file.exists():
        with file.open(encoding="utf-8", errors="replace") as stream:
            if GENERATOR not in stream.read(_HEAD):
                raise ValueError(f"{file} exists and is no report: give another name with -o, or remove it.")
    return file


def _write(file: Path, page: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8", newline="\n")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"
