"""``lightning-dynamics report``: runs as one file of HTML."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_dynamics.recording import load_runs
from lightning_dynamics.recording.html import GENERATOR, report

_NAME = "report.html"
_DAMAGED = 5  # lines that are told of one by one
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
    if "" in args.runs:
        raise ValueError("An empty path was given.")
    runs = load_runs(*args.runs)
    for run in runs:
        for line in run.damage[:_DAMAGED]:
            print(line, file=sys.stderr)
        if len(run.damage) > _DAMAGED:
            print(f"… and {len(run.damage) - _DAMAGED} more damaged lines of {run.name}", file=sys.stderr)
    if not runs:
        raise ValueError(f"There is no run in {', '.join(args.runs)}: no record file has a header that can be read.")
    file = _place(args.output)
    _write(file, report(runs, title=args.title, interactive=args.interactive))
    print(f"{file} ({_size(file.stat().st_size)}, {len(runs)} {'run' if len(runs) == 1 else 'runs'})")
    return 0


def _place(output: str) -> Path:
    """The file to write: nothing but an earlier report is replaced."""
    is_directory = Path(output).is_dir() or output.endswith(("/", os.sep))
    file = Path(output, _NAME) if is_directory else Path(output)
    if output == "-" or (file.exists() and not file.is_file()):
        raise ValueError(f"{output} is no file: give the name of one with -o.")
    if file.exists():
        with file.open(encoding="utf-8", errors="replace") as stream:
            if GENERATOR not in stream.read(_HEAD):
                raise ValueError(f"{file} exists and is no report: give another name with -o, or remove it.")
    return file


def _write(file: Path, page: str) -> None:
    """Whole or not at all."""
    file = file.resolve()  # a link stays one
    unfinished = file.with_name(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(page, encoding="utf-8", newline="\n")
        unfinished.replace(file)
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.0f} kB"
