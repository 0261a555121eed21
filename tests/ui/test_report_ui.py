"""The report in a browser: drawn, readable on white, on black and on a phone, and silent."""

from __future__ import annotations

import pytest
from helpers.recorded import TABLES, write_run

from lightning_dynamics.recording import load_runs
from lightning_dynamics.recording.html import report

HOSTILE = "</script><img src=x onerror=alert(1)>"
DRAWN = """() => [...document.querySelectorAll("figure svg")].filter(svg => {
  if (!svg.checkVisibility()) return false;
  const marks = [...svg.querySelectorAll("path, image")].map(each => each.getBoundingClientRect());
  return marks.filter(box => box.width + box.height > 5).length > 2;
}).length"""
CONTRAST = """selector => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(selector)].map(each => {
    const style = getComputedStyle(each);
    const ink = light(style.fill !== "none" && each.tagName === "text" ? style.fill : style.color);
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  });
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Reports on one run, and on two of which one is hostile."""
    place = tmp_path_factory.mktemp("reports")
    write_run(place / "one", run="1", tables=TABLES[:3])
    hostile = {"lr": 0.1, HOSTILE: HOSTILE}
    write_run(place / "pair" / "1", run="1", tables=TABLES[:1])
    write_run(place / "pair" / "2", run="2", tables=TABLES[:1], hyperparameters=hostile, module=HOSTILE)
    (place / "one.html").write_text(report(load_runs(place / "one")), encoding="utf-8")
    (place / "two.html").write_text(report(load_runs(place / "pair"), title=HOSTILE), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def interactive(files):
    pytest.importorskip("plotly")
    place = files / "interactive.html"
    place.write_text(report(load_runs(files / "pair" / "1"), interactive=True), encoding="utf-8")
    return place


def overflow(page):
    """How many pixels of the page lie beside the screen."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_figure_is_drawn_and_nothing_is_asked_for(page, problems, files, name):
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto((files / f"{name}.html").as_uri())
    visible = page.locator("figure svg:visible").count()
    assert visible > 10
    assert page.evaluate(DRAWN) == visible
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate(DRAWN) == page.locator("figure svg").count() > visible
    assert problems == []
    assert dialogs == []


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_is_as_wide_as_the_screen(page, files, name):
    page.goto((files / f"{name}.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    for width in (1280, 720, 375):
        page.set_viewport_size({"width": width, "height": 800})
        assert overflow(page) == 0, width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_read_on_white_and_on_black(page, files, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto((files / "two.html").as_uri())
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert min(page.evaluate(CONTRAST, "p, td, th, dt, dd, h2, a, summary")) > 4.5
    assert min(page.evaluate(CONTRAST, "svg.plain text")) > 3


def test_print_is_black_on_white_and_unfolded(page, files):
    page.emulate_media(color_scheme="dark", media="print")
    page.goto((files / "one.html").as_uri())
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#ffffff"
    assert page.locator(".more svg").first.is_visible()
    assert page.pdf()[:4] == b"%PDF"


def test_curves_can_be_read_off_and_follow_the_colours_of_the_page(page, problems, interactive):
    page.emulate_media(color_scheme="light")
    page.goto(interactive.as_uri())
    first = page.locator(".plotted").first
    curve = first.locator(".scatterlayer .js-line").first
    curve.wait_for(state="attached")
    assert curve.evaluate("each => getComputedStyle(each).stroke") == "rgb(0, 114, 178)"
    assert not first.locator(".still").is_visible()
    assert first.locator(".live .main-svg").first.bounding_box()["width"] > 200
    first.scroll_into_view_if_needed()
    box = first.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    first.locator(".hoverlayer text").first.wait_for(state="attached")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "() => getComputedStyle(document.querySelector('.scatterlayer .js-line')).stroke !== 'rgb(0, 114, 178)'"
    )
    assert overflow(page) == 0
    assert problems == []


def test_where_scripts_do_not_run_the_drawings_are_shown(browser, interactive):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(interactive.as_uri())
    assert page.locator(".plotted .still svg").first.is_visible()
    context.close()


def test_curves_that_are_folded_are_drawn_when_they_are_shown(page, problems, interactive):
    page.goto(interactive.as_uri())
    hidden = page.locator(".more .plotted").first
    assert hidden.locator(".main-svg").count() == 0
    page.locator(".more > summary").first.click()
    hidden.locator(".scatterlayer .js-line").first.wait_for(state="attached")
    assert problems == []


def test_print_of_an_interactive_page_shows_its_drawings(page, interactive):
    page.emulate_media(media="print")
    page.goto(interactive.as_uri())
    first = page.locator(".plotted").first
    assert first.locator(".still svg").is_visible()
    assert not first.locator(".live").is_visible()
