"""A real TensorBoard on two small runs, looked at as a user does."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest
from helpers.dashboards import STEPS, write_run

from lightning_dynamics.recording.reading import load_runs
from lightning_dynamics.recording.tensorboard import custom_scalars_link, headline_tags, pinned_link

WITHOUT_WEBGL = """
const context = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.startsWith("webgl") ? null : context.call(this, kind, ...rest);
};
"""
"""TensorBoard then draws its lines as SVG, where they can be counted."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "a")
    write_run(folder, "b", 2.0)
    return folder


@pytest.fixture(scope="module")
def address(runs):
    """Where TensorBoard answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1"]
    # one process that has read everything before it answers
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast=false", "--reload_interval=0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_for(address, process):
    opener = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "TensorBoard ended"
        try:
            with opener.open(f"{address}/data/runs", timeout=10) as answer:
                if b'"b"' in answer.read():
                    return
        except URLError:
            pass
        time.sleep(0.1)
    pytest.fail("TensorBoard does not answer")


def points(path):
    """Number of points of an SVG path."""
    d = path.get_attribute("d") or ""
    return d.count("M") + d.count("L")


def test_the_link_pins_the_headline_and_sets_smoothing_to_0(page, problems, address, runs):
    tags = headline_tags(load_runs(runs))
    assert tags == ["hessian/edge_ratio", "hessian/top_1"]
    page.add_init_script(WITHOUT_WEBGL)
    page.goto(pinned_link(address, tags))
    lines = page.locator("metrics-pinned-view line-chart .series-view path")
    lines.nth(3).wait_for(state="attached")
    cards = page.locator("metrics-pinned-view scalar-card")
    names = [card.locator("tb-truncated-path").get_attribute("title") for card in cards.all()]
    assert names == tags
    # one line for each run: smoothing would draw a second, paler one
    assert [card.locator("line-chart .series-view path").count() for card in cards.all()] == [2, 2]
    assert {points(line) for line in lines.all()} == {len(STEPS)}
    assert page.locator(".scalars-smoothing input[type=number]").first.input_value() == "0"
    assert problems == []


def test_custom_scalars_draws_the_charts_of_both_runs(page, problems, address):
    page.goto(custom_scalars_link(address))
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    lines = charts.locator("path.line")
    lines.nth(7).wait_for(state="attached")
    # two runs each of the edge ratio, of sharpness and threshold, of the tail; and of what has no points
    assert [chart.locator("path.line").count() for chart in charts.all()] == [2, 4, 2, 0]
    assert {points(line) for line in lines.all()} == {len(STEPS)}
    assert page.locator("tf-smoothing-input").evaluate("input => input.weight") == 0
    assert problems == []


def test_the_spectra_of_a_run_are_a_ridge(page, problems, address):
    page.goto(f"{address}/#histograms")
    ridges = page.locator("vz-histogram-timeseries")
    ridges.locator("path.outline").nth(2 * len(STEPS) - 1).wait_for(state="attached")
    assert ridges.count() == 2
    for ridge in ridges.all():
        boxes = [outline.bounding_box() for outline in ridge.locator("path.outline").all()]
        assert len(boxes) == len(STEPS)
        feet = [box["y"] + box["height"] for box in boxes]
        assert feet == sorted(set(feet))  # one below the other
        heights = [box["height"] for box in boxes]
        assert min(heights) > 0.6 * max(heights)  # the bulk does not sink as the largest eigenvalue goes away
    assert problems == []
