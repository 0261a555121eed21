"""What TensorBoard has of a run; its own answers; the links."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import webbrowser
from dataclasses import replace
from urllib.error import URLError
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest
from helpers.dashboards import STEPS, TABLE, write_run
from torch.utils.tensorboard import SummaryWriter

from lightning_dynamics.cli import main
from lightning_dynamics.recording.reading import load_runs
from lightning_dynamics.recording.tensorboard import (
    custom_scalars_link,
    event_files,
    found_layout,
    headline_tags,
    pinned_link,
)

LAYOUT = {"Mine": {"Loss": ["Multiline", ["^loss$"]], "Band": ["Margin", ["value", "lower", "upper"]]}}
OTHER = {"Other": {"Loss": ["Multiline", ["^loss$"]]}}


def wrote(folder, *layouts, before=()):
    with SummaryWriter(folder) as writer:
        for step, value in enumerate(before):
            writer.add_scalar("x", value, step)
        for layout in layouts:
            writer.add_custom_scalars(layout)
    return folder


# A layout that a run has


def test_the_layout_that_was_written_last_is_found(tmp_path):
    assert found_layout(wrote(tmp_path, OTHER, LAYOUT, before=range(5))) == LAYOUT


def test_of_several_files_the_last_one_with_a_layout_counts(tmp_path):
    for name, layouts in (("1", [OTHER]), ("2", [LAYOUT]), ("3", [])):
        (file,) = event_files(wrote(tmp_path / name, *layouts))
        shutil.copy(file, tmp_path / f"events.out.tfevents.{name}.host")
    assert found_layout(tmp_path) == LAYOUT


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert found_layout(wrote(tmp_path, before=[1.0])) == {}
    assert found_layout(tmp_path / "nowhere") == {}
    assert found_layout("s3://bucket/run") == {}


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "unreadable"])
def test_what_cannot_be_read_is_passed_over(tmp_path, damage):
    wrote(tmp_path, LAYOUT)
    later = tmp_path / "events.out.tfevents.9999999999.host"
    content = event_files(wrote(tmp_path / "other", OTHER))[0].read_bytes()
    match damage:
        case "cut":
            later.write_bytes(content[:-3])
        case "noise":
            later.write_bytes(b"\xff" * 1000)
        case "empty":
            later.touch()
        case "unreadable":
            later.mkdir()
    assert found_layout(tmp_path) == LAYOUT


def test_a_damaged_event_costs_what_is_behind_it(tmp_path):
    (file,) = event_files(wrote(tmp_path, LAYOUT))
    event = b"\xff custom_scalars__config__"  # says that it is one, and is none
    with file.open("ab") as stream:
        stream.write(struct.pack("<QI", len(event), 0) + event + bytes(4))
    assert found_layout(tmp_path) == LAYOUT


def test_of_a_long_file_only_the_beginning_is_read(tmp_path):
    assert found_layout(wrote(tmp_path / "near", LAYOUT, before=range(900))) == LAYOUT
    assert found_layout(wrote(tmp_path / "far", LAYOUT, before=range(1100))) == {}


def test_events_too_long_for_a_layout_are_skipped_unread(tmp_path):
    (file,) = event_files(wrote(tmp_path, LAYOUT))
    content = file.read_bytes()
    first = 12 + struct.unpack("<Q", content[:8])[0] + 4
    length = 2**40  # sparse: were it read, it would not fit into memory
    (place,) = {tmp_path / "sparse"}
    place.mkdir()
    with (place / file.name).open("wb") as stream:
        stream.write(content[:first] + struct.pack("<QI", length, 0))
        stream.seek(length + 4, 1)
        stream.write(content[first:])
    assert found_layout(place) == LAYOUT


def test_a_chart_of_several_margins_becomes_several(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2

    series = layout_pb2.MarginChartContent.Series
    margin = layout_pb2.MarginChartContent(
        series=[series(value="a", lower="b", upper="c"), series(value="d", lower="e", upper="f")]
    )
    layout = layout_pb2.Layout(
        category=[layout_pb2.Category(title="T", chart=[layout_pb2.Chart(title="Bands", margin=margin)])]
    )
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
    value = Summary.Value(tag="custom_scalars__config__", tensor=tensor)
    event = Event(summary=Summary(value=[value])).SerializeToString()
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(struct.pack("<QI", len(event), 0) + event + bytes(4))
    assert found_layout(tmp_path) == {
        "T": {"Bands": ["Margin", ["a", "b", "c"]], "Bands (2)": ["Margin", ["d", "e", "f"]]}
    }


# Links


def pinned(link):
    """The state that a link gives to TensorBoard: cards, smoothing, tab."""
    address = urlsplit(link)
    state = {key: value for key, (value,) in parse_qs(address.query, strict_parsing=True).items()}
    return json.loads(state.pop("pinnedCards")), state, address.fragment


def test_a_link_says_which_cards_to_pin_and_not_to_smooth():
    tags = ["hessian/edge_ratio", "a b&c#d/ü"]
    link = pinned_link("http://localhost:6006", tags)
    assert pinned(link) == ([{"plugin": "scalars", "tag": tag} for tag in tags], {"smoothing": "0"}, "timeseries")
    assert re.fullmatch(r"[!-~]+", link)  # a terminal sees one link
    assert not set(link) & set("\"'<>{}[]|\\^`")
    assert custom_scalars_link("http://[::1]:7") == "http://[::1]:7/#custom_scalars&_smoothingWeight=0"


def test_the_headline_is_what_was_measured_and_logged_of_any_run(tmp_path):
    write_run(tmp_path, "a")
    other = replace(TABLE, family="hessian_head", headline=("top_1",))
    write_run(tmp_path, "b", tables=(TABLE, other))
    assert headline_tags(load_runs(tmp_path / "a")) == ["hessian/edge_ratio", "hessian/top_1"]
    assert headline_tags(load_runs(tmp_path)) == ["hessian/edge_ratio", "hessian/top_1", "hessian_head/top_1"]


def test_no_more_cards_are_pinned_than_tensorboard_allows(tmp_path):
    many = [replace(TABLE, family=f"hessian_{i}", headline=("top_1",)) for i in range(12)]
    write_run(tmp_path, "a", tables=many)
    assert headline_tags(load_runs(tmp_path)) == [f"hessian_{i}/top_1" for i in range(10)]


# The command


def test_the_command_prints_how_to_start_and_where_to_look(tmp_path, capsys):
    folder = tmp_path / "two words"
    write_run(folder, "a")
    assert main(["tensorboard", str(folder), "--port", "7001", "--host", "0.0.0.0"]) == 0
    out = capsys.readouterr().out
    assert f"  tensorboard --logdir '{folder}' --port 7001 --host 0.0.0.0\n" in out
    links = re.findall(r"^  (http://\S+)$", out, re.MULTILINE)
    cards, state, tab = pinned(links[0])
    assert [card["tag"] for card in cards] == ["hessian/edge_ratio", "hessian/top_1"]
    assert (state, tab) == ({"smoothing": "0"}, "timeseries")
    assert links[1:] == ["http://localhost:7001/#custom_scalars&_smoothingWeight=0"]


def test_no_records_and_no_event_files_are_said(tmp_path, capsys):
    assert main(["tensorboard", str(tmp_path)]) == 2
    assert "No record file in" in capsys.readouterr().err
    for file in event_files(write_run(tmp_path, "a")):
        file.unlink()
    assert main(["tensorboard", str(tmp_path)]) == 2
    assert "No event files of TensorBoard in" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_anything_is_started(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, "a")
    monkeypatch.setattr(subprocess, "Popen", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["tensorboard", str(tmp_path), "--open", "--port", port, "--host", "127.0.0.1"]) == 2
    captured = capsys.readouterr()
    assert f"Port {port} is in use: choose another `--port`" in captured.err
    assert captured.out == ""


def test_impossible_ports_are_refused(tmp_path, capsys):
    for port in ("0", "65536", "http"):
        with pytest.raises(SystemExit):
            main(["tensorboard", str(tmp_path), "--port", port])
        assert f"a number from 1 to 65535, got '{port}'" in capsys.readouterr().err


def test_a_missing_tensorboard_is_said(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, "a")
    monkeypatch.setattr("lightning_dynamics.cli.tensorboard.find_spec", lambda name: None)
    assert main(["tensorboard", str(tmp_path), "--open"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_a_tensorboard_that_ends_at_once_is_said(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, "a")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert main(["tensorboard", str(tmp_path), "--open", "--port", str(free_port())]) == 2
    assert "TensorBoard ended with status 1 before it answered" in capsys.readouterr().err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def asked(address):
    with build_opener(ProxyHandler({})).open(address, timeout=20) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """TensorBoard as ``--open`` starts it on two runs: what it answers until the user interrupts."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "a", figures=True)
    write_run(folder, "b", 2.0)
    answers = {}

    def look(link):
        address = link.partition("/?")[0]
        data = f"{address}/data/plugin/custom_scalars"
        answers["link"] = link
        answers["plugins"] = asked(f"{address}/data/plugins_listing")
        answers["layout"] = asked(f"{data}/layout")
        for run in ("a", "b"):
            answers[run] = {
                tag: asked(f"{data}/scalars?{urlencode({'run': run, 'tag': tag})}")
                for category in answers["layout"]["category"]
                for chart in category["chart"]
                for tag in chart["multiline"]["tag"]
            }
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webbrowser, "open", look)
        arguments = ["tensorboard", str(folder), "--open", "--host", "127.0.0.1", "--port", str(free_port())]
        answers["status"] = main(arguments)
    return answers


def test_opening_shows_the_pinned_link_and_ends_with_the_user(opened):
    assert opened["status"] == 0
    cards, _, _ = pinned(opened["link"])
    assert [card["tag"] for card in cards] == ["hessian/edge_ratio", "hessian/top_1"]
    with pytest.raises(URLError):
        asked(opened["link"])


def test_tensorboard_offers_each_tab(opened):
    active = {name for name, plugin in opened["plugins"].items() if plugin["enabled"]}
    assert {"timeseries", "scalars", "custom_scalars", "histograms", "images", "text"} <= active


def test_the_layout_of_two_runs_is_that_of_one(opened):
    (category,) = opened["layout"]["category"]
    assert category["title"] == "Hessian"
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert list(charts) == ["Edge ratio", "Sharpness and threshold", "Tail", "Never"]
    assert charts["Sharpness and threshold"] == ["^hessian/top_1$", "^hessian/stability_threshold$"]


def test_tensorboard_draws_in_each_chart_what_belongs_there(opened):
    for run, level in (("a", 1.0), ("b", 2.0)):
        for pattern, answer in opened[run].items():
            tag = pattern.strip("^$")
            assert answer["regex_valid"]
            assert list(answer["tag_to_events"]) == ([] if tag == "hessian/never" else [tag])
        points = opened[run]["^hessian/top_1$"]["tag_to_events"]["hessian/top_1"]
        assert [(step, value) for _, step, value in points] == [(step, level * (1 + step)) for step in STEPS]
