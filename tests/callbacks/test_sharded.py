"""Weights that are sharded over processes (FSDP2): the numbers are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ddp

TESTS = Path(__file__).parents[1]


def run(folder, processes, monitor="projection", resume="no"):
    """Run the script; return what it printed if it failed."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "helpers" / "sharded_fit.py"), folder, processes, monitor, resume],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return None if done.returncode == 0 else done.stderr


def curves(file):
    return dict(json.loads(file.read_text()))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for step, scalars in expected.items():
        assert found[step].keys() == scalars.keys()
        for key, value in scalars.items():
            assert found[step][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for processes in ("1", "2"):
        failure = run(folder, processes)
        assert failure is None, failure
    return folder


def test_sharded_weights_give_the_numbers_of_one_process(folder):
    expected = curves(folder / "1.json")
    assert expected[6]["displacement/from_reference"] > 0
    assert_same(curves(folder / "2.json"), expected)


@pytest.mark.slow
def test_a_resumed_run_of_sharded_weights_goes_on(folder):
    failure = run(folder, "2", resume=str(folder / "2-step=3.ckpt"))
    assert failure is None, failure
    assert_same(curves(folder / "2-resumed.json"), curves(folder / "2.json"))


@pytest.mark.slow
def test_whole_copies_are_refused_with_the_cure(tmp_path):
    assert "Use `memory='projection'`" in run(tmp_path, "2", "device")
