"""``wandb-report`` and ``wandb-workspace``: what was logged to W&B, seen at its best and shared."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lightning_dynamics.recording import wandb_report
from lightning_dynamics.recording.quantity import QuantityTable
from lightning_dynamics.recording.reading import load_runs
from lightning_dynamics.recording.wandb_content import Content, declared_content, measured_content

_SHARED = (
    "--share-link: anyone who has this link reads the report and the data of its runs, those of a private project too, "
    "without an account. To revoke it, open the report, Share, and remove the link, or call disable_share_link() of "
    "wandb_workspaces.reports.v2.Report.from_url(URL)."
)


def add_parser(subparsers: Any) -> None:
    """Add the two commands."""
    report = subparsers.add_parser(
        "wandb-report",
        help="save a W&B report of runs that a WandbLogger logged",
        description="Save a W&B report: charts and figures of each monitor, definitions, a table of the runs. Prints "
        "its URL.",
    )
    _add_common(report)
    report.add_argument(
        "--runs", default="", metavar="ID,ID", help="ids of the runs, the last part of their URLs (default: all runs)"
    )
    report.add_argument("--title", default=wandb_report.TITLE, help="title of the report (default: %(default)s)")
    report.add_argument("--draft", action="store_true", help="save a draft, which only you see")
    report.add_argument(
        "--share-link",
        action="store_true",
        help="also make a link with which anyone reads it, even if the project is private; asked for by this flag only",
    )
    report.set_defaults(run=_report)
    workspace = subparsers.add_parser(
        "wandb-workspace",
        help="save a view of a W&B project's workspace",
        description="Save a view of a W&B project's workspace with the same charts, beside those that W&B makes of "
        "your own metrics. Prints its URL.",
    )
    _add_common(workspace)
    workspace.add_argument("--name", help=f"name of the view (default: {wandb_report.TITLE})")
    workspace.add_argument("--update", metavar="URL", help="overwrite this view instead of making a new one")
    workspace.set_defaults(run=_workspace)


def built_in_tables() -> list[QuantityTable]:
    """The tables of all monitors with their default options."""
    # here, since the monitors take seconds to import
    from lightning_dynamics.callbacks.collapse_table import collapse_table
    from lightning_dynamics.callbacks.displacement_table import displacement_table
    from lightning_dynamics.callbacks.hessian_table import hessian_table
    from lightning_dynamics.callbacks.ledger import COST
    from lightning_dynamics.callbacks.noise_table import noise_table
    from lightning_dynamics.callbacks.sam_table import sam_table
    from lightning_dynamics.callbacks.sharpness_table import sharpness_table

    return [
        hessian_table(3, 1),
        collapse_table(None, False),
        displacement_table(None, True, True, ["top_1"]),
        sharpness_table(),
        noise_table(1),
        sam_table(),
        COST,
    ]


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entity", required=True, help="user or team at W&B")
    parser.add_argument("--project", required=True, help="project at W&B")
    parser.add_argument(
        "--from",
        dest="run_dirs",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="show what the dynamics.jsonl in these directories says was measured (default: what the monitors log by "
        "default)",
    )
    parser.add_argument("--families", default="", metavar="F,F", help="only these: hessian,collapse and so on")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent as JSON, and send nothing")


def _report(args: argparse.Namespace) -> int:
    content, runs = _content(args), _listed(args.runs)
    place = args.entity, args.project
    if args.dry_run:
        _print(wandb_report.report_spec(content, *place, runs, args.title, draft=args.draft))
        return 0
    if args.share_link:
        print(f"lightning-dynamics: {_SHARED}", file=sys.stderr)
    saved = wandb_report.save_report(content, *place, runs, args.title, draft=args.draft, share_link=args.share_link)
    print(saved.url)
    if saved.share_url is not None:
        print(saved.share_url)
    return 0


def _workspace(args: argparse.Namespace) -> int:
    content = _content(args)
    place = args.entity, args.project
    if args.dry_run:
        _print(wandb_report.workspace_spec(content, *place, args.name or wandb_report.TITLE))
        return 0
    url = wandb_report.save_workspace(content, *place, args.name or None, update=args.update)
    print(url)
    print(
        "lightning-dynamics: keep this URL: `--update URL` overwrites the view, without it a new one is made.",
        file=sys.stderr,
    )
    return 0


def _content(args: argparse.Namespace) -> Content:
    families = _listed(args.families)
    if args.run_dirs:
        return measured_content(load_runs(*args.run_dirs), families)
    return declared_content(built_in_tables(), families)


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _print(spec: dict[str, Any]) -> None:
    print(json.dumps(spec, indent=2))
