"""W&B reports and workspaces of what monitors logged, made with ``wandb-workspaces``, which is optional.

Everything that needs no account can be had as a specification; only :func:`save_report` and :func:`save_workspace` talk
to W&B. What is sent is made of declarations and names, never of keys or settings of the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit, urlunsplit

from lightning_dynamics.recording.wandb_content import Chart, Content, Media, Section, definitions, introduction

STEP = "trainer/global_step"
"""The key that Lightning's ``WandbLogger`` has x under."""
TITLE = "Training dynamics"

_GRID = 24  # columns of a report
_HEIGHT = 8
_LONGEST_TITLE = 128
_RUN_ID = re.compile(r"""[^:;,#?/'"\\=<>!]+""")
_FORBIDDEN = re.compile(r"[/\\#?%:]")
_COLUMNS = 3  # of a section of a workspace
_UNREACHED = re.compile(r"did not respond|Failed to execute API request|[Cc]onnection")
_LOGIN = "Run `wandb login` first; a dry run needs no account."
_EXTRA = 'Reports and workspaces of W&B need wandb-workspaces: pip install "lightning-dynamics[wandb]".'


@dataclass(frozen=True)
class Published:
    """A report that has been saved.

    Attributes:
        url: Where those who may read the project see it.
        share_url: Where anyone sees it; None unless that was asked for.
    """

    url: str
    share_url: str | None = None


def report_spec(
    content: Content, entity: str, project: str, run_ids: Sequence[str] = (), title: str = TITLE, *, draft: bool = False
) -> dict[str, Any]:
    """What :func:`save_report` would send, without W&B: no account, no network.

    W&B's internal number of the project, which each set of runs names when it is saved, is missing.

    Args:
        content: What to show.
        entity: User or team.
        project: Project.
        run_ids: Ids of the runs, the last part of their URLs; all runs of the project if none is given.
        title: Title of the report.
        draft: Whether it is a draft.

    Raises:
        ImportError: If ``wandb-workspaces`` is missing.
        ValueError: If a name is not one that W&B takes.
    """
    report = _report(content, entity, project, run_ids, title, is_offline=True)
    return {
        "entityName": entity,
        "projectName": project,
        "type": "runs/draft" if draft else "runs",
        "displayName": report.title,
        "description": report.description,
        "spec": json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def save_report(
    content: Content,
    entity: str,
    project: str,
    run_ids: Sequence[str] = (),
    title: str = TITLE,
    *,
    draft: bool = False,
    share_link: bool = False,
) -> Published:
    """Save a report at W&B.

    Args:
        content: What to show.
        entity: User or team.
        project: Project.
        run_ids: Ids of the runs, the last part of their URLs; all runs of the project if none is given.
        title: Title of the report.
        draft: Whether to save a draft, which W&B shows to its author only.
        share_link: Whether to make a link with which *anyone* reads the report and the data of its runs, those of a
            private project too, until the link is disabled.

    Raises:
        ImportError: If ``wandb-workspaces`` is missing.
        ValueError: If a name is not one that W&B takes.
        PermissionError: If there is no W&B account.
        ConnectionError: If W&B cannot be reached, or refuses.
    """
    report = _report(content, entity, project, run_ids, title, is_offline=False)
    with _account():
        report.save(draft=draft)
        url = _url(report)
    if not share_link:
        return Published(url)
    with _account(f"The report is saved at {url}, but has no share link. "):
        token = report.enable_share_link().rpartition("accessToken=")[2]
    return Published(url, f"{url}?accessToken={token}")


def workspace_spec(content: Content, entity: str, project: str, name: str = TITLE) -> dict[str, Any]:
    """What :func:`save_workspace` would send for a new view, without W&B: no account, no network.

    Args:
        content: What to show.
        entity: User or team.
        project: Project.
        name: Name of the view.

    Raises:
        ImportError: If ``wandb-workspaces`` is missing.
        ValueError: If a name is not one that W&B takes.
    """
    view = _workspace(content, entity, project, name)._to_model()
    return {
        "entityName": entity,
        "projectName": project,
        "type": "project-view",
        "displayName": name,
        "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def save_workspace(
    content: Content, entity: str, project: str, name: str | None = None, *, update: str | None = None
) -> str:
    """Save a view of a project's workspace at W&B, or overwrite one, and return its URL.

    Args:
        content: What to show.
        entity: User or team.
        project: Project.
        name: Name of the view; for a new one ``"Training dynamics"`` by default, for one that is updated its own.
        update: URL of a view that this function saved before. Its sections of the same names are replaced, others and
            the selection of runs stay.

    Raises:
        ImportError: If ``wandb-workspaces`` is missing.
        ValueError: If a name is not one that W&B takes, or the URL is not that of a view of this project.
        PermissionError: If there is no W&B account.
        ConnectionError: If W&B cannot be reached, or refuses.
    """
    view = _workspace(content, entity, project, TITLE if name is None else name)
    address = None if update is None else _address(update, entity, project)
    with _account():
        if address is not None:
            known = _packages()[1].Workspace.from_url(address)
            own = {section.name for section in view.sections}
            known.sections = [*view.sections, *(section for section in known.sections if section.name not in own)]
            known.settings = view.settings
            known.name = known.name if name is None else name
            view = known
        return str(view.save().url)


def _report(
    content: Content, entity: str, project: str, run_ids: Sequence[str], title: str, *, is_offline: bool
) -> Any:
    wr, _ = _packages()
    _check_place(entity, project)
    if not 0 < len(title) <= _LONGEST_TITLE:
        raise ValueError(f"W&B takes titles of 1 to {_LONGEST_TITLE} characters, not of {len(title)}.")
    filters = _filter(run_ids)
    where = {} if is_offline else {"entity": entity, "project": project}  # the latter asks W&B for the project's id
    blocks = [wr.MarkdownBlock(_preface(content, run_ids)), wr.TableOfContents()]
    for section in content.sections:
        blocks.append(wr.H2(section.table.title))
        if text := introduction(section):
            blocks.append(wr.MarkdownBlock(text))
        runset = wr.Runset(**where, name="Runs", filters=filters)
        blocks.append(wr.PanelGrid(runsets=[runset], panels=_laid_out(section, run_ids)))
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(w=_GRID, h=_HEIGHT))
    table = wr.Runset(**where, name="Runs", filters=filters, pinned_columns=_run_columns(content))
    blocks += [wr.H2("Runs"), wr.PanelGrid(runsets=[table], panels=[comparer]), wr.H2("Definitions")]
    for section in content.sections:
        blocks += [wr.H3(section.table.title), wr.MarkdownBlock(definitions(section.table))]
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks, width="fluid")


def _workspace(content: Content, entity: str, project: str, name: str) -> Any:
    _, ws = _packages()
    _check_place(entity, project)
    sections = [
        ws.Section(
            name=section.table.title,
            panels=[_panel(panel) for panel in section.panels],
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=_COLUMNS, rows=-(-len(section.panels) // _COLUMNS)),
            panel_settings=ws.SectionPanelSettings(x_axis=STEP, smoothing_type="none", smoothing_weight=0),
        )
        for section in content.sections
    ]
    settings = ws.WorkspaceSettings(
        x_axis=STEP, smoothing_type="none", smoothing_weight=0, ignore_outliers=False, group_by_prefix="first"
    )
    try:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=name,
            sections=sections,
            settings=settings,
            auto_generate_panels=True,
        )
    except ValueError:
        raise ValueError(f"W&B takes no view of the name {name!r}: letters, digits and -_. are safe.") from None


def _panel(panel: Chart | Media, run_ids: Sequence[str] = (), **layout: Any) -> Any:
    wr, _ = _packages()
    if isinstance(panel, Media):
        return wr.MediaBrowser(title=panel.title, media_keys=[panel.key], num_columns=1, **layout)
    marks = {f"{run}:{key}": "dashed" for run in run_ids for key in panel.references}
    return wr.LinePlot(
        title=panel.title,
        x=STEP,
        y=list(panel.keys),
        metric_regex="|".join(panel.patterns) or None,
        title_x="step",
        title_y=panel.unit or None,
        log_y=panel.is_log,
        smoothing_type="none",
        smoothing_factor=0,
        ignore_outliers=False,
        line_marks=marks or None,
        **layout,
    )


def _laid_out(section: Section, run_ids: Sequence[str]) -> list[Any]:
    """The panels of a section, two in a row."""
    wr, _ = _packages()
    half = _GRID // 2
    places = [wr.Layout(x=half * (i % 2), y=_HEIGHT * (i // 2), w=half, h=_HEIGHT) for i in range(len(section.panels))]
    return [_panel(panel, run_ids, layout=place) for panel, place in zip(section.panels, places, strict=True)]


def _preface(content: Content, run_ids: Sequence[str]) -> str:
    lines = [
        "Measured by lightning\\_dynamics during training. x counts training batches. Nothing is smoothed, since "
        "smoothing hides the oscillation at the edge of stability and delays every jump.",
    ]
    if run_ids and any(panel.references for s in content.sections for panel in s.panels if isinstance(panel, Chart)):
        lines.append("Dashed: what a curve is compared with, such as a threshold, or what noise alone would give.")
    return "\n\n".join(lines)


def _run_columns(content: Content) -> list[str]:
    """Columns of the table of runs: hyper-parameters, then the last values of what one looks at first."""
    last = [f"summary:{section.table.family}/{q.name}" for section in content.sections for q in section.firsts]
    return ["run:displayName", *(f"config:{name}.value" for name in content.hyperparameters), *last]


def _filter(run_ids: Sequence[str]) -> str:
    for run in run_ids:
        if not _RUN_ID.fullmatch(run) or run != run.strip():
            raise ValueError(f"{run!r} is not the id of a W&B run: the id is the last part of the run's URL.")
    return f"ID in {list(run_ids)!r}" if run_ids else ""


def _url(report: Any) -> str:
    """The URL of a saved report, whatever its title: W&B goes by what follows the two dashes."""
    origin = urlsplit(report.url)
    slug = re.sub(r"\W+", "-", report.title).strip("-")
    path = quote(f"/{report.entity}/{report.project}/reports/{slug}--{report.id}", safe="/=")
    return f"{origin.scheme}://{origin.netloc}{path}"


def _address(url: str, entity: str, project: str) -> str:
    """The URL of a view as ``wandb-workspaces`` reads it."""
    parts = urlsplit(url)
    names = parse_qs(parts.query).get("nw", [])
    path = parts.path.rstrip("/").removesuffix("/workspace")
    if path != f"/{entity}/{project}" or len(names) != 1:
        raise ValueError(f"{url!r} is not the URL of a saved view of {entity}/{project}: such a URL has '?nw=' in it.")
    return urlunsplit((parts.scheme, parts.netloc, path, urlencode({"nw": names[0]}), ""))


def _check_place(entity: str, project: str) -> None:
    for what, name in (("entity", entity), ("project", project)):
        if not name.strip() or _FORBIDDEN.search(name):
            raise ValueError(f"{name!r} is not the name of a W&B {what}.")


def _packages() -> tuple[ModuleType, ModuleType]:
    """The reports and the workspaces."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ImportError(_EXTRA) from error
    return reports, workspaces


@contextmanager
def _account(before: str = "") -> Iterator[None]:
    """What W&B raises as one line of ours; whether there is an account is asked first.

    Args:
        before: What the line begins with.
    """
    import wandb

    try:
        wandb.Api()
        yield
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        if _UNREACHED.search(str(error)):
            raise ConnectionError(f"{before}W&B could not be reached: {_line(error)}") from None
        raise PermissionError(f"{before}W&B does not let you in: {_line(error)} {_LOGIN}") from None
    except Exception as error:
        raise ConnectionError(f"{before}W&B refused, or could not be reached: {_line(error)}") from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
