import re

from lightning_dynamics.recording.charts import custom_scalars_layout
from lightning_dynamics.recording.quantity import Quantity, QuantityTable, about_text

TABLE = QuantityTable(
    "hessian",
    "Hessian",
    (
        Quantity("top_1", "λ₁", "loss/θ²", "The largest.", "a paper", "bound", "Sharpness"),
        Quantity("threshold", "λ*", "loss/θ²", "The edge | of it.", "a paper", "exact", "Sharpness"),
        Quantity("top_10", "λ₁₀", "loss/θ²", "The tenth.", "a paper", "bound", "More", on_by_default=False),
    ),
)
OTHER = QuantityTable("collapse", "Collapse", (Quantity("nc1", "NC1", "1", "…", "a paper", "none", "NC1"),))


def test_keys_carry_the_family():
    assert TABLE.keys() == ["hessian/top_1", "hessian/threshold", "hessian/top_10"]
    assert TABLE.keys(default_only=True) == ["hessian/top_1", "hessian/threshold"]


def test_quantities_of_one_panel_share_a_chart():
    layout = custom_scalars_layout([TABLE, OTHER])
    assert list(layout) == ["Hessian", "Collapse"]
    kind, patterns = layout["Hessian"]["Sharpness"]
    assert kind == "Multiline"
    assert len(patterns) == 2


def test_patterns_match_their_own_key_alone():
    """TensorBoard uses `re.match`: an open pattern for top_1 would draw top_10 too."""
    layout = custom_scalars_layout([TABLE])
    patterns = [p for charts in layout.values() for _, ps in charts.values() for p in ps]
    keys = TABLE.keys()
    assert [sum(bool(re.match(p, key)) for p in patterns) for key in keys] == [1, 1, 1]
    assert not any(re.match(p, "hessian/top_1/extra") for p in patterns)
    assert not any(re.match(p, "hessianXtop_1") for p in patterns)


def test_the_text_explains_every_key_and_states_the_facts():
    text = about_text([TABLE, OTHER], [("threshold rule", "2/η"), ("data", "512 samples")])
    for key in [*TABLE.keys(), *OTHER.keys()]:
        assert f"`{key}`" in text
    assert "**threshold rule**: 2/η" in text
    assert "- `hessian/threshold`, λ\\* in loss/θ²: The edge | of it. Error: exact. Source: a paper." in text
    assert "- `collapse/nc1`, NC1: … Source: a paper." in text
    assert "In the record only" not in text


def test_the_text_tells_what_is_logged_first():
    text = about_text([TABLE, OTHER], [], [TABLE.only(["top_1"])])
    logged, rest = text.split("In the record only", 1)
    assert "`hessian/top_1`" in logged
    assert "`hessian/threshold`" in rest
    assert "`collapse/nc1`" in rest.split("In the record only", 1)[1]


def test_declarations_stand_in_the_header():
    described = TABLE.describe()
    assert list(described) == TABLE.keys()
    assert described["hessian/top_1"]["error"] == "bound"
