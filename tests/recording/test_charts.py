import re

import pytest

from lightning_dynamics import (
    DisplacementMonitor,
    GradientNoiseMonitor,
    HessianMonitor,
    NeuralCollapseMonitor,
    StochasticSharpnessMonitor,
)
from lightning_dynamics.callbacks.sam_table import sam_table
from lightning_dynamics.recording.charts import check_layout, custom_scalars_layout, merged_layouts
from lightning_dynamics.recording.quantity import Quantity, QuantityTable


def quantity(key, panel, **options):
    return Quantity(key, "", "1", "One.", "own", "none", panel, **options)


def table(title="Hessian", family="hessian"):
    return QuantityTable(
        family,
        title,
        (
            quantity("top_1", "Sharpness"),
            quantity("top_10", "Tail"),
            quantity("ratio", "Ratios"),
            quantity("ratio", "Ratios of layers", per_layer=True),
            quantity("density", "Density", form="density"),
        ),
    )


TABLES = [
    HessianMonitor(4, 2).table,
    NeuralCollapseMonitor().table,
    DisplacementMonitor().table,
    StochasticSharpnessMonitor().table,
    GradientNoiseMonitor().table,
    sam_table(None),
]


def drawn(layout, tag):
    """Titles of the charts that draw a tag, as TensorBoard decides it."""
    return [
        title
        for charts in layout.values()
        for title, (_, patterns) in charts.items()
        if any(re.match(pattern, tag) for pattern in patterns)
    ]


def test_each_tag_is_drawn_in_its_own_chart_and_no_other():
    layout = custom_scalars_layout([table()])
    assert drawn(layout, "hessian/top_1") == ["Sharpness"]
    assert drawn(layout, "hessian/top_10") == ["Tail"]
    assert drawn(layout, "hessian/top_100") == []
    assert drawn(layout, "hessian/ratio") == ["Ratios"]
    assert drawn(layout, "hessian/ratio/net_0") == ["Ratios of layers"]
    assert drawn(layout, "other/hessian/top_1") == []
    assert "Density" not in layout["Hessian"]  # no curve


@pytest.mark.parametrize("one", TABLES, ids=lambda one: one.family)
def test_every_curve_of_every_monitor_has_one_chart(one):
    layout = custom_scalars_layout(TABLES)
    for each in one.quantities:
        if each.form == "scalar":
            tag = f"{one.family}/{each.name}".replace("<layer>", "net_0_weight")
            assert drawn(layout, tag) == [each.panel], tag


@pytest.mark.parametrize(
    ("monitor", "tag"),
    [
        (HessianMonitor(also_log="median_ratio/.*"), "hessian/median_ratio/net_2"),
        (HessianMonitor(also_log=["gradient_in_top_k"]), "hessian/gradient_in_top_k"),
        (NeuralCollapseMonitor(also_log="cdnv/net_2"), "collapse/cdnv/net_2"),
        (DisplacementMonitor(also_log="relative/.*"), "displacement/relative/net_0"),
    ],
    ids=["pattern of layers", "list", "one layer", "displacement"],
)
def test_what_is_logged_on_request_has_a_chart(monitor, tag):
    plain = type(monitor)()
    assert drawn(custom_scalars_layout([plain.table.only(plain.shown(False))]), tag) == []
    assert len(drawn(custom_scalars_layout([monitor.table.only(monitor.shown(False))]), tag)) == 1


def test_a_family_without_curves_has_no_category():
    assert custom_scalars_layout([table().only(["density"])]) == {}


def test_layouts_of_the_same_category_are_merged_and_the_first_chart_of_a_title_stays():
    mine = {"Hessian": {"Mine": ["Multiline", ("a",)], "Tail": ["Margin", ["v", "l", "u"]]}, "Other": {}}
    merged = merged_layouts(mine, custom_scalars_layout([table()]))
    assert list(merged) == ["Hessian", "Other"]
    assert list(merged["Hessian"]) == ["Mine", "Tail", "Sharpness", "Ratios", "Ratios of layers"]
    assert merged["Hessian"]["Tail"] == ["Margin", ["v", "l", "u"]]
    assert mine["Hessian"]["Mine"] == ["Multiline", ("a",)]  # as it was


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["Training"], r"`layout` must be a dictionary of charts by category, got \['Training'\]"),
        ({1: {}}, "`layout` must be a dictionary of charts by category"),
        ({"T": ["Loss"]}, r"`layout\['T'\]` must be a dictionary of charts by title, got \['Loss'\]"),
        ({"T": {"Loss": ["^loss$"]}}, r"`layout\['T'\]\['Loss'\]` must be \['Multiline', \[pattern, ...\]\] or \["),
        ({"T": {"Loss": "Multiline"}}, "must be"),
        ({"T": {"Loss": ["Multiline", "loss"]}}, "must be"),
        ({"T": {"Loss": ["Multiline", []]}}, "must be"),
        ({"T": {"Loss": ["Multiline", [1]]}}, "must be"),
        ({"T": {"Loss": ["Margin", ["loss", "low"]]}}, "must be"),
        ({"T": {"Loss": ["Margin", ["loss", "low", "high", "more"]]}}, "must be"),
        ({"T": {"Loss": [["Multiline"], ["loss"]]}}, "must be"),
        ({"T": {"Loss": ["Multiline", ["loss["]]}}, r"'loss\[' is not a regular expression: unterminated"),
    ],
)
def test_what_is_no_layout_is_refused_with_its_place(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout)


def test_layouts_that_tensorboard_takes_are_taken():
    check_layout({})
    check_layout({"T": {"Loss": ("Multiline", ["^loss$", "x"]), "Band": ["Margin", ("loss[", "low", "high")]}, "U": {}})
