"""The report: one page, whole in itself, true to the records, and proof against what stands in them."""

import base64
import hashlib
import html
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from helpers.recorded import TABLES, header, write_run
from matplotlib.figure import Figure

from lightning_dynamics.cli import main
from lightning_dynamics.recording import Quantity, QuantityTable, Run, load_runs
from lightning_dynamics.recording import html as package
from lightning_dynamics.recording.figures.panels import Curve, Panel
from lightning_dynamics.recording.figures.standard import Section, Shown
from lightning_dynamics.recording.html import report
from lightning_dynamics.recording.html.figures import Drawing
from lightning_dynamics.recording.html.svg import inline_svg
from lightning_dynamics.recording.record import Cost, Parent, Record, RecordFile

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"onmouseover="alert(1)',
    "'><img src=x onerror=alert(1)>",
    "]]>--><!--</script></style></svg>",
    "$x^$ and $\\frac{1",
    "{{ 7 * 7 }} {0} %s",
    "שלום \u202eevil\u202c",
    "🚀 \x00\x1b[31m",
]


class Page(HTMLParser):
    """What a browser would find: elements that are closed, texts, attributes, data blocks."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.scripts = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/> does not close itself in HTML")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def values(self, key):
        return [value for _, name, value in self.attributes if name == key]


def table(symbol="λ₁", definition="The largest one.", title="Small", panel="Curves", key="a"):
    quantities = [
        Quantity(key, symbol, "1", definition, "Somebody, arXiv 2103.00065", "standard error", panel),
        Quantity("b", "B", "1", "At a layer.", "own", "exact", "Layers", per_layer=True),
    ]
    return QuantityTable("small", title, tuple(quantities), headline=(key,))


def small_run(
    directory,
    *,
    own=None,
    layer="net_0",
    steps=range(0, 50, 10),
    monitor="M",
    last=True,
    segment="s",
    parent=None,
    cost=False,
    **more,
):
    """A run of two quantities, one of them of a layer."""
    file = RecordFile(directory)
    own = table() if own is None else own
    monitors = {monitor: {"family": "small", "cadence": "every 10 steps", "threshold_rule": "SGD(lr=0.2)"}}
    said = {**header([own], monitors=monitors), **more}
    file.begin(more.get("run", "run"), segment, parent, said)
    for step in steps:
        key = f"small/{own.quantities[0].key}"
        scalars = {key: 1.0 + step, f"small/b/{layer}": 2.0}
        final = last and step == steps[-1]
        file.append(Record(step, monitor, scalars, {key: 0.25}, epoch=step // 20, final=final))
        if cost:
            file.append_cost(Cost(step, 1.0, 0.05, 1, {monitor: 0.5}))
    return file.path


def small_report(directory, **more):
    small_run(directory, **more)
    return report(load_runs(directory))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    write_run(place / "one", run="1", tables=TABLES[:3])
    for name, lr in (("2", 0.1), ("3", 0.2)):
        write_run(place / "pair" / name, run=name, tables=TABLES[:1], hyperparameters={"lr": lr, "width": 32})
    return place


@pytest.fixture(scope="module")
def page(folder):
    return report(load_runs(folder / "one"))


@pytest.fixture(scope="module")
def both(folder):
    return report(load_runs(folder / "pair"))


def drawings(page):
    return re.findall(r"<svg class=.*?</svg>", page, re.DOTALL)


def embedded(page):
    return json.loads(re.search(r'id="lightning-dynamics-data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_report_is_a_whole_page_without_scripts_that_asks_for_nothing(page):
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>\n<html lang")
    assert parsed.tags.count("script") == 1
    assert ("script", "type", "application/json") in parsed.attributes
    assert "src" not in {key for _, key, _ in parsed.attributes}
    assert all(value.startswith("https://arxiv.org/abs/") or value[0] == "#" for tag, key, value in parsed.attributes
               if key == "href" and tag == "a")  # fmt: skip
    assert all(value.startswith(("#", "data:image/png;base64,")) for tag, key, value in parsed.attributes
               if key == "href" and tag != "a")  # fmt: skip
    (policy,) = [value for value in parsed.values("content") if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src" not in policy
    assert "@import" not in page
    assert "url(http" not in page


def test_every_figure_of_a_run_is_drawn_and_told_to_those_who_do_not_see(page):
    for title in ("Spectral density", "Spectrum over time", "Through depth", "Phase planes", "Displacement over time"):
        assert f"<h3><bdi>{title}</bdi></h3>" in page
    assert len(drawings(page)) > 25
    for drawing in drawings(page):
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 10
        assert any(element.tag in ("path", "use", "image") for element in root.iter())
    assert "could not be drawn" not in page
    assert '<details class="more"><summary>' in page


def test_ids_are_those_of_one_place_and_what_refers_to_them_finds_them(both):
    parsed = Page(both)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    referred = {value[1:] for value in parsed.values("href") if value.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", both))
    assert len(referred) > 20
    assert referred <= set(ids)


def test_drawings_are_small_and_take_fonts_and_colours_from_the_page(page):
    whole = "".join(drawings(page))
    for foreign in ("<?xml", "<!DOCTYPE svg", "<metadata", "<style", "<!--", "font-family", "xmlns", "DejaVu"):
        assert foreign not in whole
    assert "var(--blue)" in whole
    assert "var(--vermilion)" in whole
    assert "#000000" not in whole
    assert "#0072b2" not in whole
    style = page[page.index("<style>") : page.index("</style>")]
    for variable in set(re.findall(r"var\((--[a-z]+)\)", whole)):
        assert style.count(f"{variable}: #") >= 2, variable  # on white and on black
    assert not re.search(r"\d\.\d{3}", re.sub(r'aria-label="[^"]*"|<text.*?</text>', "", whole))


def test_drawings_in_the_colours_of_a_scale_are_marked():
    def drawn(colour="#0072b2", with_map=False):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([0, 1], color=colour)
        if with_map:
            axes.imshow([[0, 1], [1, 0]])
        return figure

    assert inline_svg(drawn, "a-", "x").startswith('<svg class="plain"')
    assert inline_svg(lambda: drawn("#440154"), "a-", "x").startswith('<svg class="graded"')
    assert "stroke:#440154" in inline_svg(lambda: drawn("#440154"), "a-", "x")
    assert inline_svg(lambda: drawn(with_map=True), "a-", "x").startswith('<svg class="graded"')
    assert "stroke:var(--paper)" in inline_svg(lambda: drawn("white"), "a-", "x")


def test_the_same_records_give_the_same_page(tmp_path):
    small_run(tmp_path)
    assert report(load_runs(tmp_path)) == report(load_runs(tmp_path))


def test_a_run_is_told_in_its_own_terms(tmp_path):
    parameters = {"lr": 0.2, "deep": {"width": 8}, "long": "word " * 60}
    page = small_report(tmp_path / "name of it", hyperparameters=parameters, cost=True)
    text = Page(page).text
    for said in (
        "name of it", "Net", "2023-11-14 22:13 UTC", "finished", "SGD(lr=0.2)", "every 10 steps", "torch 2.13.0",
        "32-true", "SingleDeviceStrategy", "deep.width", "word " * 60,
    ):  # fmt: skip
        assert said in text, said
    for term, value in (("steps", "40"), ("epochs", "3"), ("measurements", "5"), ("cost share", "5 %")):
        assert f"<dt>{term}</dt><dd>{value}</dd>" in page
    assert "<dt>skipped points</dt><dd>1</dd>" in page
    assert "<dt>long</dt><dd><details><summary>" in page
    assert "<td>0.5</td>" in page  # seconds of the monitor
    assert "<td>41.00 ± 0.25</td>" in page


def test_a_certified_value_is_shown_without_an_error_that_nobody_reads(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header([table()]))
    file.append(Record(0, "M", {"small/a": 1.23456789}, {"small/a": 1e-9}))
    assert "<td>1.235</td>" in report(load_runs(tmp_path))


def test_a_last_value_that_is_not_finite_gives_way_to_the_last_that_is(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header([table()]))
    file.append(Record(10, "M", {"small/a": 1.5}))
    file.append(Record(20, "M", {"small/a": math.nan}))
    assert '<td>1.50 <span class="aside">at step 10</span></td>' in report(load_runs(tmp_path))


def test_what_differs_between_runs_stands_beside_their_names_and_the_rest_once(both):
    start, end = both.index('<table class="runs">'), both.index("</table>")
    compared = both[start:end]
    assert "<mark>lr</mark>" in compared
    assert "<mark><bdi>0.2</bdi></mark>" in compared
    assert "<mark><bdi>0.1</bdi></mark>" in compared
    assert "width" not in compared
    assert "<h3>In common</h3>\n" in both
    assert "<dt>width</dt><dd><bdi>32</bdi></dd>" in both[end:]
    assert compared.count('class="swatch"') == 2
    assert both.count("in full</summary>") == 2


def test_hyper_parameters_that_one_run_lacks_differ(tmp_path):
    small_run(tmp_path / "a", run="a", hyperparameters={"lr": 1, "only here": 2})
    small_run(tmp_path / "b", run="b", hyperparameters={"lr": 1})
    page = report(load_runs(tmp_path))
    assert "<mark>only here</mark>" in page
    assert "<td>–</td>" in page


def test_a_family_that_one_of_three_runs_has_is_shown_and_missing_in_the_others(tmp_path):
    for name in "ab":
        small_run(tmp_path / name, run=name)
    write_run(tmp_path / "c", run="c", tables=TABLES[-1:], steps=range(0, 30, 10))
    page = report(load_runs(tmp_path))
    Page(page)
    assert 'id="family-sam"' in page
    assert 'id="family-small"' in page
    last = page[page.index("<h3>Last values</h3>") :]
    assert last[: last.index("</table>")].count("<td>–</td>") == 3


def test_a_resumed_run_says_so(tmp_path):
    small_run(tmp_path, last=False)
    parent = Parent("s", 30, str(tmp_path / "dynamics.jsonl"))
    small_run(tmp_path, segment="t", parent=parent, steps=range(30, 60, 10), time=1_700_000_100.0)
    page = report(load_runs(tmp_path))
    assert "finished, resumed once" in page
    assert embedded(page)["runs"][0]["series"]["small/a"]["steps"] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("steps", [range(0), range(1)], ids=["empty", "one record"])
def test_the_page_of_a_run_that_has_hardly_begun_is_sound(tmp_path, steps):
    page = small_report(tmp_path, steps=steps, last=False)
    parsed = Page(page)
    assert "interrupted or still running" in parsed.text
    assert len(embedded(page)["runs"][0]["series"]) == 2 * len(steps)
    assert ("Nothing was measured." in page) == (not len(steps))


def test_a_header_that_says_next_to_nothing_is_enough(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, {"time": 1e300, "hyperparameters": [1], "monitors": {"M": None}, "trainer": "x"})
    file.append(Record(0, "M", {"other/a": 1.0}))
    assert "not told" in Page(report(load_runs(tmp_path))).text


def test_records_alone_can_be_reported_on():
    records = [Record(step, "M", {"other/a": float(step)}) for step in range(3)]
    page = report([Run("mine", (), records)])
    assert "<dt>run</dt><dd><bdi>mine</bdi></dd>" in page
    assert len(drawings(page)) == 1


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="There is no run"):
        report([])


def test_damaged_lines_stand_under_the_runs_without_where_the_file_is(tmp_path):
    file = small_run(tmp_path / "a")
    with file.open("a") as stream:
        stream.write('{"type": "record", "<b>\n')
    page = report(load_runs(tmp_path / "a"))
    assert f"a/dynamics.jsonl, line {len(file.read_text().splitlines())} is damaged" in Page(page).text
    assert str(tmp_path) not in page
    with file.open("a") as stream:
        stream.write("x\n" * 20)
    assert '<details class="damage"><summary>21 damaged lines were skipped</summary>' in report(load_runs(file))


def test_a_figure_that_fails_costs_only_itself(monkeypatch):
    def fails():
        raise RuntimeError("<b>broken</b>")

    def works():
        figure = Figure()
        figure.add_subplot().plot([0, 1])
        return figure

    panels = [Panel("Whole", [Curve("a", [0, 1], [0, 1], "#0072b2")]), Panel("Torn", [Curve("a", [0], [1], "blau")])]
    figures = [
        Shown("bad", "The bad one", "", fails),
        Shown("good", "The good one", "", works),
        Shown.of_panels("panels", "Panels", "", panels),
    ]
    monkeypatch.setattr(package, "sections", lambda runs: [Section("small", "Small", figures)])
    page = report([Run("mine", (), [])])
    Page(page)
    assert "The bad one</bdi> could not be drawn: <bdi>RuntimeError(&#x27;&lt;b&gt;broken" in page
    assert "Torn</bdi> could not be drawn" in page
    assert len(drawings(page)) == 2


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_stands_in_a_record_stays_text(tmp_path, hostile):
    own = table(hostile, hostile, hostile, hostile, key=hostile.replace("/", "_"))
    (run,) = load_runs(
        small_run(
            tmp_path,
            own=own,
            layer=hostile.replace("/", "_"),
            monitor=hostile,
            hyperparameters={hostile: hostile, "nested": {hostile: [hostile]}},
            module=hostile,
            versions={hostile: hostile},
        )
    )
    runs = [Run(hostile, run.segments, run.records, run.costs, [hostile]), Run("b", run.segments, run.records)]
    page = report(runs, title=hostile)
    page.encode()
    parsed = Page(page)
    assert "could not be drawn" not in page
    assert parsed.tags.count("script") == 1
    assert not {"img", "iframe", "object", "form", "b"} & set(parsed.tags)
    assert not [key for _, key, _ in parsed.attributes if key.startswith("on") or key == "src"]
    shown = re.sub("[\x00-\x1f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", hostile)
    assert parsed.text.count(shown) > 8
    drawn = [ElementTree.fromstring(drawing) for drawing in drawings(page)]
    texts = ["".join(element.itertext()) for root in drawn for element in root.iter("text")]
    assert any(text.startswith(shown[:20]) for text in texts)
    data = embedded(page)
    assert data["runs"][0]["name"] == hostile
    assert data["runs"][0]["header"]["hyperparameters"]["nested"] == {hostile: [hostile]}


def test_half_a_surrogate_pair_costs_no_more_than_figures(tmp_path):
    small_run(tmp_path, own=table(title="\ud800"), hyperparameters={"\ud800": "\ud800"})
    page = report(load_runs(tmp_path), title="\ud800")
    page.encode()
    Page(page)
    assert embedded(page)["runs"][0]["header"]["hyperparameters"] == {"\ud800": "\ud800"}


def test_every_quantity_that_occurs_is_defined_with_its_source(page):
    definitions = page[page.index('id="definitions"') : page.index('id="data"')]
    text = Page(definitions[definitions.index("<h2") : definitions.rindex("</section>")]).text
    for said in ("hessian/top_1", "hessian/density", "norm/<layer>", "a bound on the error"):
        assert said in text
    assert "hessian/bottom_2" not in text
    assert '<a href="https://arxiv.org/abs/2103.00065" rel="noopener noreferrer">arXiv 2103.00065</a>' in definitions


def test_runs_that_mean_something_else_by_a_key_are_both_defined(tmp_path):
    small_run(tmp_path / "a", run="a")
    small_run(tmp_path / "b", run="b", own=table(definition="Another one."))
    page = report(load_runs(tmp_path))
    assert "The largest one. <span" in page
    assert "In <bdi>a</bdi>." in page
    assert "In <bdi>b</bdi>." in page


def test_what_no_header_declares_is_named(tmp_path):
    file = small_run(tmp_path)
    content = Record(90, "M", {"unheard/of": 1.0}).to_json()
    with file.open("a") as stream:
        stream.write(json.dumps(content) + "\n")
    page = report(load_runs(file))
    assert "Recorded without a definition: <code><bdi>unheard/<wbr>of</bdi></code>." in page


def test_three_lines_of_python_read_the_data_back(folder, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    code = html.unescape(re.search(r'<code id="read-back">(.*?)</code>', page, re.DOTALL)[1])
    assert len(code.splitlines()) == 3
    names = {}
    exec(code, names)
    (run,) = load_runs(folder / "one")
    (told,) = names["data"]["runs"]
    assert list(told["series"]) == run.keys
    for key, series in told["series"].items():
        original = run.series(key)
        assert series["steps"] == original.steps
        assert series["values"] == pytest.approx(original.values, rel=1e-8)
    assert told["series"]["hessian/top_1"]["errors"] == [0.01] * 20
    assert "errors" not in told["series"]["hessian/top_2"]
    assert told["header"]["hyperparameters"] == {"lr": 0.2, "width": 32}
    assert names["data"]["quantities"]["hessian/top_1"]["unit"] == "loss/θ²"


def test_what_is_not_finite_is_null(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header([table()]))
    for step, value in enumerate((1.0, math.nan, math.inf)):
        file.append(Record(step, "M", {"small/a": value}, {"small/a": math.nan}))
    assert embedded(report(load_runs(tmp_path)))["runs"][0]["series"]["small/a"] == {
        "steps": [0, 1, 2],
        "values": [1.0, None, None],
    }


def test_long_curves_are_thinned_to_their_extremes_and_the_page_stays_small():
    keys = {f"long/q{i}": i + 1 for i in range(20)}
    peak = {7321: 50.0}
    records = [
        Record(step, "M", {key: math.sin(step * i) + peak.get(step, 0.0) for key, i in keys.items()})
        for step in range(10_000)
    ]
    page = report([Run("long", (), records)])
    assert len(page.encode()) < 3e6
    (run,) = embedded(page)["runs"]
    series = run["series"]["long/q3"]
    assert series["thinned_from"] == 10_000
    assert len(series["steps"]) == len(series["values"]) <= 2000
    assert (series["steps"][0], series["steps"][-1]) == (0, 9999)
    assert max(series["values"]) == pytest.approx(50 + math.sin(7321 * 4))
    assert 7321 in series["steps"]


def test_short_curves_are_whole_and_say_nothing_of_thinning(page):
    assert "thinned_from" not in json.dumps(embedded(page)["runs"])


def test_twenty_runs_share_one_page(tmp_path):
    for i in range(20):
        small_run(tmp_path / f"run_{i}", run=str(i), hyperparameters={"lr": i}, steps=range(0, 20, 10))
    page = report(load_runs(tmp_path))
    Page(page)
    assert page.count("in full</summary>") == 20
    assert page.count('class="swatch graded"') >= 20


def test_the_house_is_not_left_in_the_style_of_the_report(page, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    small_report(tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_a_page_whose_title_is_given_has_it_escaped(tmp_path):
    small_run(tmp_path)
    page = report(load_runs(tmp_path), title="<i>mine</i>")
    assert "<title>&lt;i&gt;mine&lt;/i&gt;</title>" in page
    assert "<h1><bdi>&lt;i&gt;mine&lt;/i&gt;</bdi></h1>" in page


def test_curves_of_an_interactive_page_are_drawn_by_scripts_whose_digests_the_policy_names(tmp_path):
    pytest.importorskip("plotly")
    small_run(tmp_path)
    page = report(load_runs(tmp_path), interactive=True)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    policy = re.search(r'content="(default-src[^"]*)"', page)[1]
    allowed = re.search(r"script-src ([^;]*)", policy)[1].split()
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert allowed == [f"'sha256-{digest}'" for digest in digests]
    panels = re.findall(r'<div class="panel plotted">.*?</script>\n</div>', page, re.DOTALL)
    # where no script runs, the drawing is shown
    assert len(panels) == len(drawings(page)) == 2
    for panel in panels:
        spec = json.loads(re.search(r'json">(.*?)</script>', panel, re.DOTALL)[1])
        assert set(spec) == {"data", "layout"}


def test_an_interactive_page_without_plotly_names_the_extra(tmp_path, monkeypatch):
    small_run(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=re.escape('pip install "lightning-dynamics[interactive]"')):
        report(load_runs(tmp_path), interactive=True)


def test_drawings_say_what_is_marked():
    panel = Panel(
        "P", [Curve("λ", [0, 1], [1, 2], "#0072b2")], "m", "log", [(1.0, "")], [(1, "at the edge", "#d55e00")]
    )
    drawing = Drawing(interactive=False)._panel(panel)
    label = html.unescape(re.search(r'aria-label="([^"]*)"', drawing)[1])
    assert label == "P in m over step, logarithmic curves of λ. Levels: 1. Marked: at the edge at step 1"


def test_the_command_writes_a_report_and_says_where(tmp_path, capsys):
    file = small_run(tmp_path / "a")
    with file.open("a") as stream:
        stream.write("{\n")
    out = tmp_path / "new" / "out.html"
    assert main(["report", str(tmp_path / "a"), "-o", str(out), "--title", "Mine"]) == 0
    told = capsys.readouterr()
    assert re.fullmatch(rf"{re.escape(str(out))} \(\d+ kB, 1 run\)\n", told.out)
    assert re.search(rf"dynamics.jsonl, line {len(file.read_text().splitlines())} is damaged", told.err)
    assert "<title>Mine</title>" in out.read_text(encoding="utf-8")
    assert [each.name for each in out.parent.iterdir()] == ["out.html"]


def test_the_command_replaces_an_earlier_report_and_nothing_else(tmp_path, capsys):
    file = small_run(tmp_path / "a")
    assert main(["report", str(tmp_path)]) == 0
    assert main(["report", str(tmp_path), "-o", "report.html", "--title", "Second"]) == 0
    with open("report.html", encoding="utf-8") as stream:
        assert "Second" in stream.read()
    before = file.read_bytes()
    assert main(["report", str(tmp_path), "-o", str(file)]) == 2
    assert "exists and is no report" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_the_command_puts_a_report_into_a_directory(tmp_path):
    small_run(tmp_path / "a")
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_the_command_writes_to_files_alone(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "a", steps=range(0, 20, 10), tables=TABLES[:1])
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for output in ("-", "pipe"):
        assert main(["report", "a", "-o", output]) == 2
        assert f"{output} is no file" in capsys.readouterr().err
    assert main(["report", ""]) == 2
    assert "An empty path" in capsys.readouterr().err
    (tmp_path / "taken").write_text("x")
    assert main(["report", "a", "-o", "taken/x.html"]) == 2
    assert "x.html cannot be written" in capsys.readouterr().err
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    assert main(["report", "a", "-o", "link.html"]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").stat().st_size > 10_000
    assert main(["report", "a", "-o", "new/"]) == 0
    assert (tmp_path / "new" / "report.html").is_file()
    assert not list(tmp_path.rglob("*.part"))


def test_the_command_does_not_flood_the_terminal(tmp_path, capsys):
    path = write_run(tmp_path, steps=range(0, 20, 10), tables=TABLES[:1])
    with path.open("a") as stream:
        stream.write("x\n" * 30)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert "and 25 more damaged lines" in said[-1]


def test_the_command_needs_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "No record file" in capsys.readouterr().err
    (tmp_path / "dynamics.jsonl").write_text("x\n")
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "dynamics.jsonl, line 1 is damaged" in said
    assert "no record file has a header" in said
    assert not (tmp_path / "report.html").exists()
