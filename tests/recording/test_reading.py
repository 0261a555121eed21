"""Runs read back from their files: resumed, concurrent, interrupted, empty, damaged."""

import json
import math
import warnings

import pytest

from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.ledger import COST
from lightning_dynamics.recording import Cost, Quantity, QuantityTable, Record, load_records, load_runs
from lightning_dynamics.recording.record import Parent, RecordFile
from lightning_dynamics.recording.wandb_content import measured_content

TABLE = QuantityTable(
    "m",
    "Means",
    (
        Quantity("a", "A", "loss", "The first.", "a paper", "bound", "Firsts"),
        Quantity("c", "C", "loss", "By layer.", "a paper", "none", "Layers", False, True),
        Quantity("b", "B", "1", "The second.", "own", "none", "Seconds", on_by_default=False),
    ),
    headline=("a",),
    log_panels=("Firsts",),
    references=("b",),
    levels=(("a", 1.0),),
)


def header(time=0.0, **more):
    return {
        "time": time,
        "monitors": {"M": {"family": "m"}},
        "families": {"m": "Means"},
        "quantities": TABLE.describe(),
        **more,
    }


def record(step, value=1.0, **more):
    scalars = more.pop("scalars", {"m/a": value})
    return Record(step=step, monitor="M", scalars=scalars, time=100.0 + step, **more)


def write(directory, steps, *, run="run", segment="s0", parent=None, time=0.0, value=1.0, final=False):
    file = RecordFile(directory)
    file.begin(run, segment, parent, header(time))
    for step in steps:
        file.append(record(step, value, final=final and step == steps[-1]))
        file.append_cost(Cost(step, time + step, 0.1 + step / 100, 0, {"M": step / 10}))
    return file


def test_a_declaration_survives_the_header():
    described = json.loads(json.dumps(TABLE.describe()))
    assert QuantityTable.described("m", "Means", described) == TABLE
    for table in (hessian_table(3, 1), COST):
        assert QuantityTable.described(table.family, table.title, table.describe()) == table


def test_every_run_below_a_directory_is_found_and_named(tmp_path):
    for name in ("a", "b", "deep/c"):
        write(tmp_path / name, [0, 1], run=name, segment=name, time=ord(name[-1]))
    assert [run.name for run in load_runs(tmp_path)] == ["a", "b", "c"]
    assert [run.name for run in load_runs(tmp_path / "b", tmp_path / "deep")] == ["b", "c"]


def test_names_have_as_much_of_the_path_as_tells_them_apart(tmp_path):
    for i, name in enumerate(("sgd/version_0", "sam/version_0", "sam/version_1")):
        write(tmp_path / name, [0], run=name, segment=name, time=i)
    assert [run.name for run in load_runs(tmp_path)] == ["sgd/version_0", "sam/version_0", "version_1"]


def test_a_run_that_was_resumed_elsewhere_is_one_run(tmp_path):
    first = write(tmp_path / "a", [0, 10, 20, 30])
    write(
        tmp_path / "b",
        [20, 30],
        segment="s1",
        parent=Parent("s0", 20, str(first.path)),
        time=1.0,
        value=2.0,
        final=True,
    )
    for places in ([tmp_path], [tmp_path / "a", tmp_path / "b"], [tmp_path / "b", tmp_path / "b"], [tmp_path / "b"]):
        (run,) = load_runs(*places)
        assert [(r.step, r.scalars["m/a"]) for r in run.records] == [(0, 1.0), (10, 1.0), (20, 2.0), (30, 2.0)]
        assert [cost.step for cost in run.costs] == [0, 10, 20, 30]
        assert [segment.name for segment in run.segments] == ["s0", "s1"]
        assert run.name == "b"
        assert run.is_finished
    (alone,) = load_runs(tmp_path / "a")
    assert not alone.is_finished
    assert alone.overhead == pytest.approx(0.4)


def test_a_run_that_was_killed_again_after_its_end_is_not_finished(tmp_path):
    first = write(tmp_path, [0, 10], final=True)
    write(tmp_path, [10, 20], segment="s1", parent=Parent("s0", 10, str(first.path)), time=1.0)
    (run,) = load_runs(tmp_path)
    assert not run.is_finished


def test_concurrent_runs_of_one_directory_stay_apart(tmp_path):
    """Two processes that were given the same directory."""
    write(tmp_path, [0, 1], run="first1", segment="s0", value=1.0)
    write(tmp_path, [0, 1], run="second", segment="s1", time=5.0, value=2.0)
    one, other = load_runs(tmp_path)
    assert [r.scalars["m/a"] for r in one.records] == [1.0, 1.0]
    assert [r.scalars["m/a"] for r in other.records] == [2.0, 2.0]
    assert one.name == f"{tmp_path.name} (first1)"
    assert other.name == f"{tmp_path.name} (second)"


def test_a_run_without_measurements_is_a_run(tmp_path):
    write(tmp_path, [])
    (run,) = load_runs(tmp_path)
    assert not run.records
    assert not run.keys
    assert not run.is_finished
    assert math.isnan(run.overhead)
    assert math.isnan(run.last("m/a"))
    assert run.tables == [TABLE]
    assert len(load_records(tmp_path)) == 0


def test_a_file_without_a_header_is_no_run(tmp_path):
    (tmp_path / "dynamics.jsonl").write_text("")
    assert load_runs(tmp_path) == []
    (tmp_path / "dynamics.jsonl").write_text("{\n")
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        assert load_runs(tmp_path) == []


@pytest.mark.parametrize("more", [{"parent": 3}, {"parent": {}}, {"time": "noon"}, {"time": None}])
def test_a_header_that_cannot_be_read_is_damage(tmp_path, more):
    write(tmp_path, [0])
    with (tmp_path / "dynamics.jsonl").open("a") as stream:
        stream.write(json.dumps({"type": "header", "schema": 1, "run": "run", "segment": "s9", **more}) + "\n")
    (run,) = load_runs(tmp_path)
    assert "line 4 is damaged" in run.damage[0]
    assert [segment.name for segment in run.segments] == ["s0"]


def test_damaged_lines_are_named_and_the_rest_is_read(tmp_path):
    file = write(tmp_path, [0])
    lines = ["{", "null", "[1]", '"text"', '{"type": "record"}', '{"type": "cost"}', "\0" * 50, "[" * 100_000]
    lines += [f'{{"type": "record", "step": {step}, "monitor": "M", "scalars": {{}}}}' for step in ('"x"', "1e400")]
    lines += ['{"type": "unknown"}']
    with file.path.open("a") as stream:
        stream.write("\n".join(lines) + "\n")
        stream.write(json.dumps(record(7).to_json()) + "\n")
        stream.write('{"type": "record", "step": 8, "mon')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (run,) = load_runs(tmp_path)
    assert [r.step for r in run.records] == [0, 7]
    numbers = [int(said.split(", line ")[1].split(" ")[0]) for said in run.damage]
    assert numbers == [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16]  # what a later version may add is no damage


def test_what_belongs_to_a_header_that_cannot_be_read_is_damage(tmp_path):
    """Not records of the segment before it, which it may supersede."""
    file = write(tmp_path, [0, 10])
    second = write(tmp_path / "x", [10, 20], segment="s1", parent=Parent("s0", 10, str(file.path)), time=1.0)
    with file.path.open("a") as stream:
        stream.write("x" + second.path.read_text())
    (run,) = load_runs(file.path)
    assert [r.step for r in run.records] == [0, 10]
    assert len(run.damage) == 5
    assert "header that it belongs to" in run.damage[1]
    text = file.path.read_text()
    file.path.write_text("x" + text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_runs(file.path) == []
    assert "line 1 is damaged" in str(said[0].message)


def test_a_copy_of_a_file_does_not_stand_for_it(tmp_path):
    file = write(tmp_path / "a", [0, 10, 20])
    half = "".join(file.path.read_text().splitlines(keepends=True)[:3])
    (tmp_path / "a" / "dynamics_backup.jsonl").write_text(half)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dynamics.jsonl").write_text(half)
    (run,) = load_runs(tmp_path)
    assert [r.step for r in run.records] == [0, 10, 20]


def test_runs_behind_links_are_found_once(tmp_path):
    write(tmp_path / "runs" / "a", [0])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "runs" / "a")
    (tmp_path / "links" / "again").symlink_to(tmp_path / "links")
    assert len(load_runs(tmp_path / "links")) == 1


def test_what_is_shown_of_runs_and_tables_is_short(tmp_path):
    write(tmp_path / "a", range(50), final=True)
    (run,) = load_runs(tmp_path)
    assert repr(run) == "<Run 'a': 50 records, finished>"
    assert repr(load_records(tmp_path)) == "<RecordTable: 50 values of 1 run>"


def test_of_two_lines_on_the_cost_of_a_step_the_last_counts(tmp_path):
    file = write(tmp_path, [0])
    file.append_cost(Cost(0, 1.0, 0.7, 2, {}))
    (run,) = load_runs(tmp_path)
    assert [(cost.step, cost.overhead) for cost in run.costs] == [(0, 0.7)]


@pytest.mark.parametrize("part", ["quantities", "families", "monitors", "hyperparameters", "trainer", "versions"])
@pytest.mark.parametrize("odd", [3, None, "x", [1], {"m/a": -1}, {"m/a": {"shows": [3]}}])
def test_a_header_that_says_odd_things_ends_nothing(tmp_path, part, odd):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header(**{part: odd}))
    file.append(record(0))
    for run in load_runs(tmp_path):
        assert run.series("m/a").values == [1.0]
        assert run.tables
        assert run.monitors == {"M": "m"}
        assert part == "quantities" or measured_content([run])


def test_bytes_that_are_no_text_are_damage(tmp_path):
    file = write(tmp_path, [0])
    with file.path.open("ab") as stream:
        stream.write(b"\xff\xfe{\x80\n")
    (run,) = load_runs(tmp_path)
    assert len(run.records) == 1
    assert "line 4 is damaged" in run.damage[0]


def test_separators_within_a_text_do_not_end_a_line(tmp_path):
    """JSON allows what `str.splitlines` takes for the end of a line."""
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header(module="a\u2028b\x0bc\x85d"))
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record(3, notes={"name": "a\u2028b\x85"}).to_json(), ensure_ascii=False) + "\n")
    (run,) = load_runs(tmp_path)
    assert not run.damage
    assert run.records[0].notes["name"] == "a\u2028b\x85"


def test_a_newer_schema_is_refused(tmp_path):
    write(tmp_path / "a", [0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dynamics.jsonl").write_text('{"type": "header", "schema": 2, "run": "r", "segment": "s"}\n')
    with pytest.raises(ValueError, match=r"line 1: written with schema 2, this version reads up to 1\. Install"):
        load_runs(tmp_path)


def test_places_without_records_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected dynamics\.jsonl"):
        load_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_runs(tmp_path / "nowhere")


def test_a_series_has_the_values_and_errors_of_a_key(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, header())
    file.append(record(4, scalars={"m/a": 2.0, "m/b": math.inf}, errors={"m/a": 0.5}))
    file.append(record(0, scalars={"m/a": 1.0}))
    file.append(record(8, scalars={"m/a": math.nan, "m/c/net_1": 3.0}))
    (run,) = load_runs(tmp_path)
    series = run.series("m/a")
    assert series.steps == [0, 4, 8]
    assert series.values[:2] == [1.0, 2.0]
    assert math.isnan(series.values[2])
    assert series.errors[1] == 0.5
    assert math.isnan(series.errors[0])
    assert run.last("m/b") == math.inf
    assert run.keys == ["m/a", "m/c/net_1", "m/b"]  # as declared, layers included
    assert run.quantity("m/c/net_1") == TABLE.quantities[1]
    assert run.quantity("m/c") is None
    assert run.quantity("other/a") is None
    assert run.monitors == {"M": "m"}


def test_records_of_an_older_version_are_read(tmp_path):
    """No families, no costs, and declarations that say less."""
    old = {key: {"symbol": "A", "unit": "loss", "panel": "P"} for key in ("m/a",)}
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, {"quantities": old})
    file.append(record(0))
    (run,) = load_runs(tmp_path)
    (table,) = run.tables
    assert (table.title, table.quantities[0].panel, table.quantities[0].error) == ("m", "P", "none")
    assert run.monitors == {"M": "m"}


def test_the_table_has_a_row_for_each_value(tmp_path):
    file = RecordFile(tmp_path / "x")
    file.begin("run", "s", None, header())
    file.append(record(0, scalars={"m/a": 1.5, "m/c/net_0/relu": 2.0}, errors={"m/a": 0.25, "m/c/net_0/relu": 0.5}))
    file.append(record(3, scalars={"m/a": math.nan}, epoch=1, global_step=6, final=True))
    table = load_records(tmp_path)
    assert [(r.run, r.step, r.key, r.layer) for r in table] == [
        ("x", 0, "m/a", None),
        ("x", 0, "m/c", "net_0/relu"),
        ("x", 3, "m/a", None),
    ]
    assert table["error"][:2] == [0.25, 0.5]
    assert table["final"] == [False, False, True]
    assert table["global_step"] == [0, 0, 6]
    assert table.where(key="m/a")["step"] == [0, 3]
    assert table.where(key="m/c", layer="net_0/relu", run="x")["value"] == [2.0]
    assert len(table.where(layer=None)) == 2
    with pytest.raises(KeyError, match="There is no column 'name'; there are run, monitor"):
        table["name"]
    with pytest.raises(KeyError):
        table.where(name=1)


def test_the_table_goes_to_pandas_and_to_csv(tmp_path):
    pandas = pytest.importorskip("pandas")
    write(tmp_path / "x", [0, 5])
    table = load_records(tmp_path / "x")
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert frame["value"].tolist() == [1.0, 1.0]
    table.to_csv(tmp_path / "t.csv")
    back = pandas.read_csv(tmp_path / "t.csv")
    assert back["step"].tolist() == [0, 5]
    assert back["error"].isna().all()
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith("x,M,0,0,0,100.0,m/a,,1.0,,False")
