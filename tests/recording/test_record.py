import json
import math

import pytest

from lightning_dynamics.recording import Record, read_records
from lightning_dynamics.recording.reading import read_segments
from lightning_dynamics.recording.record import Parent, RecordFile, new_name


def record(step, value=1.0, monitor="M", **more):
    return Record(step=step, monitor=monitor, scalars={"m/a": value}, time=float(step), **more)


def write(directory, steps, *, run="run", segment="s0", parent=None, time=0.0, value=1.0, file=None):
    file = RecordFile(directory) if file is None else file
    file.begin(run, segment, parent, {"time": time})
    for step in steps:
        file.append(record(step, value))
    return file


def steps_and_values(path):
    return [(r.step, r.scalars["m/a"]) for r in read_records(path)]


def test_a_record_survives_the_file(tmp_path):
    original = Record(
        step=7,
        monitor="HessianMonitor[head]",
        scalars={"hessian/top_1": 1.5, "hessian/edge_ratio": math.nan, "hessian/x": -math.inf},
        errors={"hessian/top_1": 1e-3},
        arrays={"nodes": [0.0, 1.0, math.inf]},
        notes={"probe": {"n": 3, "kind": "λ"}},
        global_step=9,
        epoch=2,
        time=12.5,
        seconds=0.25,
        final=True,
    )
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, {"time": 1.0})
    file.append(original)
    (back,) = read_records(tmp_path)
    assert back.scalars["hessian/top_1"] == 1.5
    assert math.isnan(back.scalars["hessian/edge_ratio"])
    assert back.scalars["hessian/x"] == -math.inf
    assert back.arrays["nodes"][:2] == [0.0, 1.0]
    assert back.notes["probe"] == original.notes["probe"]
    for name in ("step", "monitor", "errors", "global_step", "epoch", "time", "seconds", "final"):
        assert getattr(back, name) == getattr(original, name)


def test_lines_are_valid_json_without_nan(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, {})
    file.append(record(0, math.nan))

    def refuse(name):
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in file.path.read_text().splitlines()]
    assert lines[1]["scalars"] == {"m/a": None}
    assert lines[1]["notes"]["not_finite"] == {"m/a": "nan"}


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    file = RecordFile(tmp_path)
    file.begin("run", "s", None, {})
    file.append(record(0))
    assert len(file.path.read_text().splitlines()) == 2


def test_a_new_run_never_touches_an_old_file(tmp_path):
    first = write(tmp_path, [0, 1])
    content = first.path.read_bytes()
    second = write(tmp_path, [0], run="other", segment="s1", time=5.0, value=2.0)
    assert second.path != first.path
    assert first.path.read_bytes() == content
    assert steps_and_values(tmp_path) == [(0, 2.0)]
    assert steps_and_values(first.path) == [(0, 1.0), (1, 1.0)]


def test_a_second_fit_of_the_process_goes_on_in_the_same_file(tmp_path):
    file = write(tmp_path, [0, 10, 20])
    write(tmp_path, [20, 30], segment="s1", parent=Parent("s0", 20, str(file.path)), time=1.0, value=2.0, file=file)
    assert len(list(tmp_path.iterdir())) == 1
    assert steps_and_values(tmp_path) == [(0, 1.0), (10, 1.0), (20, 2.0), (30, 2.0)]


def test_what_an_interrupted_run_recorded_beyond_the_resume_does_not_count(tmp_path):
    first = write(tmp_path / "a", [0, 10, 20, 30])
    second = write(
        tmp_path / "b", [20, 30], segment="s1", parent=Parent("s0", 20, str(first.path)), time=1.0, value=2.0
    )
    third = write(
        tmp_path / "c", [10, 20], segment="s2", parent=Parent("s1", 10, str(second.path)), time=2.0, value=3.0
    )
    assert steps_and_values(tmp_path / "b") == [(0, 1.0), (10, 1.0), (20, 2.0), (30, 2.0)]
    assert steps_and_values(third.path) == [(0, 1.0), (10, 3.0), (20, 3.0)]
    header = json.loads(second.path.read_text().splitlines()[0])
    assert header["parent"]["file"] == "../a/dynamics.jsonl"


def test_a_pair_that_both_lives_finished_counts_once(tmp_path):
    """The first half was in the checkpoint; the interrupted run wrote the pair after it, the resumed one again."""
    first = write(tmp_path, [0, 5, 10])
    write(tmp_path, [5, 10], segment="s1", parent=Parent("s0", 6, str(first.path)), time=1.0, value=2.0)
    assert steps_and_values(tmp_path) == [(0, 1.0), (5, 2.0), (10, 2.0)]


def test_a_parent_that_is_gone_leaves_what_there_is(tmp_path):
    write(tmp_path, [20], segment="s1", parent=Parent("s0", 20, str(tmp_path / "gone" / "dynamics.jsonl")))
    assert steps_and_values(tmp_path) == [(20, 1.0)]


def test_damaged_lines_are_named_and_skipped(tmp_path):
    file = write(tmp_path, [0, 1])
    with file.path.open("a") as stream:
        stream.write('{"type": "record", "st')
    with pytest.warns(UserWarning, match=r"dynamics\.jsonl, line 4 is damaged"):
        assert steps_and_values(tmp_path) == [(0, 1.0), (1, 1.0)]


def test_a_newer_schema_is_refused(tmp_path):
    file = tmp_path / "dynamics.jsonl"
    file.write_text(json.dumps({"type": "header", "schema": 99, "run": "r", "segment": "s"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: written with schema 99, this version reads up to 1"):
        read_segments(tmp_path)


def test_a_directory_without_records_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected dynamics\.jsonl"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "dynamics.jsonl")


def test_names_are_unique():
    assert len({new_name() for _ in range(100)}) == 100
