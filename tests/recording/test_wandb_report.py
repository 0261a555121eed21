"""W&B reports and workspaces: offline as specifications, and saved to a server on loopback."""

import json
import sys

import pytest
from helpers.graphql import TOKEN, GraphQLServer

from lightning_dynamics.callbacks.collapse_table import collapse_table
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.ledger import COST
from lightning_dynamics.cli import main
from lightning_dynamics.cli.wandb import built_in_tables
from lightning_dynamics.recording.reading import load_runs
from lightning_dynamics.recording.record import Cost, Record, RecordFile
from lightning_dynamics.recording.wandb_content import (
    Chart,
    Media,
    declared_content,
    definitions,
    escaped,
    introduction,
    measured_content,
)
from lightning_dynamics.recording.wandb_report import report_spec, save_report, workspace_spec

pytest.importorskip("wandb_workspaces", reason="the extra [wandb] is not installed")
pytestmark = pytest.mark.clients

KEY = "0123456789abcdef" * 3
PLACE = ("--entity", "ent", "--project", "proj")
REPORT = ("wandb-report", *PLACE, "--families", "hessian")
WORKSPACE = ("wandb-workspace", *PLACE, "--families", "hessian")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A server, and a wandb that knows no other one."""
    import wandb

    place = tmp_path_factory.mktemp("wandb")
    with GraphQLServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_BASE_URL": server.url,
            "WANDB_APP_URL": server.url,
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(place / "config"),
            "WANDB_CACHE_DIR": str(place / "cache"),
            "NETRC": str(place / "netrc"),
        }.items():
            patch.setenv(name, value)
        patch.delenv("WANDB_API_KEY", raising=False)
        wandb.teardown()
        yield server
        wandb.teardown()


@pytest.fixture
def server(service, monkeypatch):
    """The server, with an account at it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    service.operations.clear()
    service.bodies.clear()
    service.refuses = False
    return service


def write_run(directory, tables, scalars, monitors=(), arrays=None, notes=None, **header):
    """A run of one record."""
    file = RecordFile(directory)
    said = {
        "time": 1.0,
        "families": {table.family: table.title for table in tables},
        "quantities": {key: each for table in tables for key, each in table.describe().items()},
        "monitors": dict(monitors),
        **header,
    }
    file.begin(str(directory), str(directory), None, said)
    file.append(Record(step=0, monitor="M", scalars=scalars, arrays=arrays or {}, notes=notes or {}))
    file.append_cost(Cost(0, 1.0, 0.1, 0, {"M": 1.0}))
    return directory


def panels(spec):
    """Settings of all panels of a report by title, and of those of a workspace."""
    if "blocks" in spec["spec"]:
        grids = [block["metadata"] for block in spec["spec"]["blocks"] if block["type"] == "panel-grid"]
        groups = [grid["panelBankSectionConfig"]["panels"] for grid in grids]
    else:
        groups = [section["panels"] for section in spec["spec"]["section"]["panelBankConfig"]["sections"]]
    return {panel["config"].get("chartTitle"): panel["config"] for group in groups for panel in group}


def text(spec):
    return "\n".join(block["content"] for block in spec["spec"]["blocks"] if block["type"] == "markdown-block")


def headings(spec):
    return [block["children"][0]["text"] for block in spec["spec"]["blocks"] if block["type"] == "heading"]


def runsets(spec):
    grids = [block["metadata"] for block in spec["spec"]["blocks"] if block["type"] == "panel-grid"]
    return [runset for grid in grids for runset in grid["runSets"]]


# What there is to show


def test_by_default_each_family_shows_what_its_monitor_logs_by_default():
    content = declared_content(built_in_tables())
    families = ["hessian", "collapse", "displacement", "sharpness", "noise", "sam", "dynamics"]
    assert [section.table.family for section in content.sections] == families
    for section, table in zip(content.sections, built_in_tables(), strict=True):
        keys = {key for panel in section.panels if isinstance(panel, Chart) for key in panel.keys}
        scalars = {f"{table.family}/{q.key}" for q in table.quantities if q.on_by_default and q.form == "scalar"}
        assert keys == scalars
        assert section.panels[0].title == next(q.panel for q in table.quantities if q.name in table.headline)


def test_sharpness_and_its_threshold_share_a_chart_and_figures_have_their_keys():
    (section,) = declared_content([hessian_table(3, 1)]).sections
    assert section.panels[1] == Chart(
        "Sharpness and threshold",
        ("hessian/top_1", "hessian/stability_threshold"),
        references=("hessian/stability_threshold",),
        unit="loss/θ²",
    )
    media = [panel.key for panel in section.panels if isinstance(panel, Media)]
    assert media == ["hessian/density_figure", "hessian/density"]
    (section,) = declared_content([collapse_table(None, False)]).sections
    first = section.panels[0]
    assert (first.keys, first.references, first.is_log) == (
        ("collapse/nc1", "collapse/nc1_floor"),
        ("collapse/nc1_floor",),
        True,
    )


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no family 'hesian'; there are hessian, dynamics"):
        declared_content([hessian_table(3, 1), COST], ["hesian"])


def test_records_say_what_was_measured_named_monitors_and_layers_included(tmp_path):
    head, collapse = hessian_table(2, 0, name="head"), collapse_table(None, False)
    declared = {key: each for table in (head, collapse, COST) for key, each in table.describe().items()}
    declared["collapse/cdnv/<layer>"]["logged"] = True  # what `also_log` asks for
    place = write_run(
        tmp_path / "run",
        (head, collapse, COST),
        {"hessian_head/top_1": 1.0, "hessian_head/top_1_swing": 1.0, "collapse/cdnv/fc1": 1.0, "collapse/cdnv": 2.0},
        quantities=declared,
        hyperparameters={"lr": 0.1, "sizes": [1, 2]},
    )
    content = measured_content(load_runs(place))
    charts = {panel.title: panel.keys for section in content.sections for panel in section.panels}
    assert charts == {
        "Sharpness and threshold": ("hessian_head/top_1",),
        "CDNV, by layer": ("collapse/cdnv/fc1",),
        "Overhead": ("dynamics/overhead",),
        "Skipped points": ("dynamics/skipped",),
    }
    assert content.hyperparameters == ("lr",)
    assert [q.name for q in content.sections[0].table.quantities] == ["top_1"]
    with pytest.raises(ValueError, match=r"no family 'noise'; there are hessian_head, collapse, dynamics"):
        measured_content(load_runs(place), ["noise"])


def test_figures_are_shown_where_a_run_has_them(tmp_path):
    arrays = {"hessian/density_nodes": [0.0, 1.0], "hessian/density_weights": [0.5, 0.5]}
    notes = {"spectrum": {"size": 2, "certified": [], "num_vectors": 1}}
    table = hessian_table(3, 1)
    with_figure = write_run(tmp_path / "a", [table], {"hessian/top_1": 1.0}, arrays=arrays, notes=notes)
    damaged = write_run(tmp_path / "b", [table], {"hessian/top_1": 1.0}, arrays=arrays)

    def shown(*places):
        sections = measured_content(load_runs(*places)).sections
        return [panel.key for section in sections for panel in section.panels if isinstance(panel, Media)]

    assert shown(with_figure, damaged) == ["hessian/density_figure", "hessian/density"]
    assert shown(damaged) == []


def test_runs_that_measured_differently_are_joined(tmp_path):
    few, many = hessian_table(1, 0), hessian_table(4, 0)
    first = write_run(tmp_path / "a", [few], {"hessian/top_1": 1.0})
    second = write_run(tmp_path / "b", [many], {"hessian/top_1": 1.0, "hessian/top_4": 0.5})
    (section,) = measured_content(load_runs(first, second)).sections
    assert [panel.keys for panel in section.panels] == [("hessian/top_1",), ("hessian/top_4",)]


def test_runs_without_a_logged_value_are_refused(tmp_path):
    place = write_run(tmp_path / "run", [hessian_table(1, 0)], {"hessian/top_1_swing": 1.0})
    with pytest.raises(ValueError, match="None of these runs"):
        measured_content(load_runs(place))


def test_a_section_says_what_held_in_which_run(tmp_path):
    def monitor(rule):
        probe = {"kind": "the whole training set", "n": 24, "N": 48}
        return {"M": {"family": "hessian", "probe": probe, "threshold_rule": rule, "cadence": "every 2 steps"}}

    places = [
        write_run(tmp_path / name, [hessian_table(1, 0)], {"hessian/top_1": 1.0}, monitor(rule))
        for name, rule in (("a", "SGD(lr=0.1)"), ("b", "SGD(lr=0.3)"), ("c", "SGD(lr=0.1)"))
    ]
    (section,) = measured_content(load_runs(*places)).sections
    lines = introduction(section).splitlines()
    assert lines[0].startswith("- `hessian/top_1`, λ₁: Eigenvalue number 1")
    said = "the whole training set, 24 samples of 48; threshold of SGD(lr=0.1); every 2 steps"
    assert lines[1:] == [f"- `a`, `c`: {said}", f"- `b`: {said.replace('0.1', '0.3')}"]


def test_texts_are_no_markdown():
    assert escaped("a|b*c\n<img>[x](http://y) `z` $1$") == (r"a\|b\*c \<img\>\[x\](http\://y) \`z\` \$1\$")


def test_definitions_are_a_table_with_one_row_for_each_quantity():
    for table in built_in_tables():
        lines = definitions(table).splitlines()
        assert len(lines) == 2 + len(table.quantities)
        assert {line.replace("\\|", "").count("|") for line in lines} == {6}
        for q, line in zip(table.quantities, lines[2:], strict=True):
            assert line.startswith(f"| `{table.family}/{q.name}` | ")
    rows = definitions(collapse_table(None, False))
    assert "Noise alone gives `nc1_floor`." in rows
    assert r"| tr(Σ\_W Σ\_B⁺)/K |" in rows


# The specifications


def test_a_report_has_its_panels_on_the_loggers_axis_and_unsmoothed():
    spec = report_spec(declared_content(built_in_tables()), "ent", "proj", ["r1", "r2"], "My title")
    assert {key: spec[key] for key in ("entityName", "projectName", "type", "displayName")} == {
        "entityName": "ent",
        "projectName": "proj",
        "type": "runs",
        "displayName": "My title",
    }
    curves = {title: panel for title, panel in panels(spec).items() if title is not None and "metrics" in panel}
    for panel in curves.values():
        assert panel["xAxis"] == "trainer/global_step"
        assert (panel["smoothingWeight"], panel["smoothingType"], panel["ignoreOutliers"]) == (0, "none", False)
    chart = curves["Sharpness and threshold"]
    assert chart["metrics"] == ["hessian/top_1", "hessian/stability_threshold"]
    assert chart["overrideMarks"] == {f"{run}:hessian/stability_threshold": "dashed" for run in ("r1", "r2")}
    assert chart["yAxisTitle"] == "loss/θ²"
    log = {title for title, panel in curves.items() if panel.get("yLogScale")}
    assert log == {title for table in built_in_tables() for title in table.log_panels} & set(curves)
    assert "NC1: variability" in log
    assert "Edge ratio" not in log
    assert panels(spec)["Diffusion"]["mediaKeys"] == ["displacement/diffusion"]
    assert panels(spec)["Phase planes"]["mediaKeys"] == ["displacement/phase"]


def test_a_report_has_sections_definitions_and_a_table_of_runs(tmp_path):
    table = hessian_table(1, 0)
    place = write_run(tmp_path / "run", [table, COST], {"hessian/top_1": 1.0}, hyperparameters={"lr": 0.1})
    spec = report_spec(measured_content(load_runs(place)), "ent", "proj", ["r1"])
    titles = ["Hessian", "Cost of the monitors"]
    assert headings(spec) == [*titles, "Runs", "Definitions", *titles]
    assert "| `hessian/top_1` | λ₁ | loss/θ² |" in text(spec)
    for runset in runsets(spec):
        (selected,) = runset["filters"]["filters"]
        assert (selected["key"], selected["op"], selected["value"]) == (
            {"section": "run", "name": "name"},
            "IN",
            ["r1"],
        )
    columns = runsets(spec)[-1]["runFeed"]["columnOrder"]
    assert columns == ["run:displayName", "config:lr.value", "summary:hessian/top_1", "summary:dynamics/overhead"]


def test_no_panels_lie_on_each_other():
    spec = report_spec(declared_content(built_in_tables()), "ent", "proj")
    for block in spec["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            taken = set()
            for panel in block["metadata"]["panelBankSectionConfig"]["panels"]:
                place = panel["layout"]
                cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
                assert not cells & taken
                assert place["x"] + place["w"] <= 24
                taken |= cells


def test_without_ids_all_runs_are_shown_and_nothing_is_dashed():
    spec = report_spec(declared_content([hessian_table(3, 1)]), "ent", "proj")
    assert all(runset["filters"]["filters"] == [] for runset in runsets(spec))
    assert "overrideMarks" not in panels(spec)["Sharpness and threshold"]


def test_layers_whose_names_are_not_known_are_matched_by_an_expression():
    declared = {"m/x/<layer>": {"panel": "X", "logged": True}}
    table = hessian_table(1, 0).described("m", "M", declared)
    assert panels(report_spec(declared_content([table]), "ent", "proj"))["X"]["metricRegex"] == "^m/x/.+$"


@pytest.mark.parametrize("run_id", ["ent/proj/runs/abc", "x'] or ID in ['y", "lr=0.1", " abc", ""])
def test_what_is_no_run_id_is_refused(run_id):
    with pytest.raises(ValueError, match="last part of the run's URL"):
        report_spec(declared_content([COST]), "ent", "proj", [run_id])


@pytest.mark.parametrize(("entity", "project"), [("", "proj"), ("ent", "a/b"), ("ent", "?")])
def test_what_is_no_place_at_wandb_is_refused(entity, project):
    for spec in (report_spec, workspace_spec):
        with pytest.raises(ValueError, match="is not the name of a W&B"):
            spec(declared_content([COST]), entity, project)


def test_a_workspace_shows_the_same_and_hides_nothing():
    content = declared_content(built_in_tables())
    spec = workspace_spec(content, "ent", "proj", "Mine")
    settings = spec["spec"]["section"]["settings"]
    assert settings["shouldAutoGeneratePanels"] is True
    assert (settings["xAxis"], settings["smoothingWeight"]) == ("trainer/global_step", 0)
    assert (settings["smoothingType"], settings["ignoreOutliers"]) == ("none", False)
    bank = spec["spec"]["section"]["panelBankConfig"]
    assert bank["settings"]["autoOrganizePrefix"] == 1  # by the first part of a key
    assert [section["name"] for section in bank["sections"]] == [section.table.title for section in content.sections]
    for section in bank["sections"]:
        flow = section["flowConfig"]
        assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"])
        assert section["localPanelSettings"]["xAxis"] == "trainer/global_step"
    assert set(panels(spec)) == {panel.title for section in content.sections for panel in section.panels}
    assert (spec["type"], spec["displayName"]) == ("project-view", "Mine")


def test_names_are_data_in_a_specification(tmp_path):
    hostile = "x|y `z` <script>alert(1)<／script> [a](b)"
    quantity = {"symbol": "|", "definition": hostile, "source": hostile, "panel": hostile, "logged": True, "unit": "`"}
    place = write_run(
        tmp_path / hostile,
        [],
        {"evil/a|`b`": 1.0},
        {"M": {"family": "evil", "probe": {"kind": hostile}, "cadence": "# heading"}},
        quantities={"evil/a|`b`": quantity},
        families={"evil": hostile},
        hyperparameters={hostile: 1},
    )
    spec = report_spec(measured_content(load_runs(place)), "ent", "proj", title=hostile)
    assert headings(spec)[0] == hostile
    assert panels(spec)[hostile]["metrics"] == ["evil/a|`b`"]
    row = next(line for line in text(spec).splitlines() if line.startswith("| `evil/"))
    assert row.replace("\\|", "").count("|") == 6
    assert "<" not in text(spec).replace("\\<", "").replace("`x\\|y 'z' <script>alert(1)<／script> [a](b)`", "")
    assert headings(json.loads(json.dumps(spec))) == headings(spec)


# The commands


def test_a_dry_run_needs_no_account_and_sends_nothing(service, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    service.operations.clear()
    assert main([*REPORT, "--runs", "r1, r2", "--title", "T", "--draft", "--share-link", "--dry-run"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert (spec["displayName"], spec["type"], headings(spec)[0]) == ("T", "runs/draft", "Hessian")
    assert runsets(spec)[0]["filters"]["filters"][0]["value"] == ["r1", "r2"]
    assert main([*WORKSPACE, "--name", "V", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["displayName"] == "V"
    assert service.operations == []


def test_a_report_is_saved_and_not_shared(server, capsys):
    assert main([*REPORT, "--runs", "r1"]) == 0
    out, err = capsys.readouterr()
    (saved,) = server.sent("upsertView")
    (url,) = out.split()
    assert url.startswith(f"{server.url}/ent/proj/reports/Training-dynamics--view")
    assert (saved["entityName"], saved["projectName"], saved["type"]) == ("ent", "proj", "runs")
    sent = {"spec": json.loads(saved["spec"])}
    assert "Sharpness and threshold" in panels(sent)
    assert {runset["project"]["name"] for runset in runsets(sent)} == {"proj"}
    assert {runset["filters"]["filters"][0]["value"][0] for runset in runsets(sent)} == {"r1"}
    assert server.sent("createAccessToken") == []
    assert "anyone" not in err
    assert KEY not in out + err + "".join(server.bodies)


def test_a_saved_report_is_the_one_of_the_dry_run(server, capsys):
    def without_names(thing):
        if isinstance(thing, dict):
            return {k: without_names(v) for k, v in thing.items() if k not in ("id", "__id__", "project")}
        return [without_names(each) for each in thing] if isinstance(thing, list) else thing

    assert main([*REPORT, "--runs", "r1", "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert main([*REPORT, "--runs", "r1"]) == 0
    (saved,) = server.sent("upsertView")
    assert without_names(json.loads(saved["spec"])) == without_names(dry["spec"])


def test_a_link_for_anyone_is_made_only_on_request_and_with_a_warning(server, capsys):
    assert main([*REPORT, "--share-link", "--draft", "--title", "What? A/B #1"]) == 0
    out, err = capsys.readouterr()
    url, shared = out.split()
    assert url.startswith(f"{server.url}/ent/proj/reports/What-A-B-1--view")
    assert shared == f"{url}?accessToken={TOKEN}"
    (asked,) = server.sent("createAccessToken")
    assert asked["projects"] == [{"entityName": "ent", "projectName": "proj"}]
    assert server.sent("upsertView")[0]["type"] == "runs/draft"
    for word in ("anyone", "private", "revoke", "disable_share_link"):
        assert word in err


def test_a_refusal_is_one_line(server, capsys):
    server.refuses = True
    assert main([*REPORT]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip() == "lightning-dynamics: W&B refused, or could not be reached: input: permission denied"


def test_a_report_that_could_not_be_shared_is_not_lost(server, monkeypatch):
    import wandb_workspaces.reports.v2 as reports

    def refuse(self):
        raise RuntimeError("sharing is off")

    monkeypatch.setattr(reports.Report, "enable_share_link", refuse)
    with pytest.raises(ConnectionError, match=r"saved at http://127\.0\.0\.1.*--view\d+, but has no.*sharing is off"):
        save_report(declared_content([COST]), "ent", "proj", share_link=True)


def test_a_workspace_is_saved_and_overwritten_without_losing_others_sections(server, capsys):
    assert main([*WORKSPACE, "--name", "V"]) == 0
    out, err = capsys.readouterr()
    (url,) = out.split()
    assert url.startswith(f"{server.url}/ent/proj?nw=")
    assert "keep this URL" in err
    (saved,) = server.sent("UpsertView2")
    assert (saved["type"], saved["displayName"]) == ("project-view", "V")
    assert KEY not in out + err + "".join(server.bodies)

    (view,) = [view for view in server.views.values() if view["name"] == saved["name"]]
    spec = json.loads(view["spec"])
    bank = spec["section"]["panelBankConfig"]
    bank["sections"] = [{**bank["sections"][0], "panels": []}, {**bank["sections"][0], "name": "mine", "panels": []}]
    view["spec"] = json.dumps(spec)
    opened = url.replace("/proj?", "/proj/workspace?")
    assert main(["wandb-workspace", *PLACE, "--families", "hessian,noise", "--update", opened]) == 0
    again = server.sent("UpsertView2")[1]
    assert capsys.readouterr().out.split() == [url]
    assert (again["id"], again["name"], again["displayName"]) == (view["id"], view["name"], "V")
    section = json.loads(again["spec"])["section"]
    sections = {each["name"]: len(each["panels"]) for each in section["panelBankConfig"]["sections"]}
    assert list(sections) == ["Hessian", "Gradient noise", "mine"]
    assert sections["Hessian"] > 5
    assert section["settings"]["shouldAutoGeneratePanels"] is True


@pytest.mark.parametrize(
    "url", ["view", "http://h/ent/other?nw=a", "http://h/ent/proj", "http://h/ent/proj/runs/a?nw=a"]
)
def test_what_is_not_the_url_of_a_view_is_refused(server, capsys, url):
    assert main([*WORKSPACE, "--update", url]) == 2
    assert "is not the URL of a saved view of ent/proj" in capsys.readouterr().err
    assert server.operations == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*WORKSPACE, "--name", "a+b"], "W&B takes no view of the name 'a+b'"),
        ([*REPORT, "--title", "x" * 129], "titles of 1 to 128 characters, not of 129"),
        ([*REPORT[:-1], "hesian"], "no family 'hesian'"),
        ([*REPORT, "--from", "nowhere"], "No record file in nowhere"),
    ],
)
def test_a_mistake_is_said_in_one_line_before_anything_is_sent(server, capsys, command, message):
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert server.operations == []


@pytest.mark.parametrize("key", [None, "short"])
def test_without_a_key_the_cure_is_said_in_one_line(service, monkeypatch, capsys, key):
    import wandb

    wandb.teardown()  # it keeps the key that it has found
    service.operations.clear()
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)
    for command in (REPORT, WORKSPACE):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1
        assert "does not let you in" in err
        assert "wandb login" in err
    assert service.operations == []


@pytest.mark.parametrize("command", [[*REPORT, "--dry-run"], [*WORKSPACE, "--dry-run"], REPORT])
def test_without_the_extra_it_is_said_how_to_install_it(monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert main(command) == 2
    assert 'pip install "lightning-dynamics[wandb]"' in capsys.readouterr().err
