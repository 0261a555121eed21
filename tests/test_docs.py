"""What the README, the pages and the examples say is so."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.fit import fit

from lightning_dynamics import HessianMonitor, read_records

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks():
    for page in PAGES:
        if "_build" not in page.parts:
            for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
                yield pytest.param(match.group(1), id=f"{page.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize("code", list(blocks()))
def test_every_block_of_code_runs(code, tmp_path, monkeypatch):
    """With a module, a loader and the records that it may speak of."""
    import lightning.pytorch as pl
    from helpers.modules import Classification, Regression, class_data
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    monkeypatch.chdir(tmp_path)
    for version in ("version_0", "version_1") if "lightning_logs" in code else ():
        logger = CSVLogger("lightning_logs", name="", version=version)
        fit(HessianMonitor(every_n_train_steps=1), Regression(lr=1e-3), max_epochs=1, logger=logger)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}

    class Trainer(pl.Trainer):
        def __init__(self, **options):
            super().__init__(**{**options, **quiet, "max_epochs": 2, "enable_model_summary": False})

    monkeypatch.setattr(pl, "Trainer", Trainer)
    loader = DataLoader(TensorDataset(*class_data()), 20)
    names = {"any_lightning_module": Classification(lr=1e-3), "any_dataloader": loader}
    exec(compile(code, "block", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_keys_in_the_readme_are_those_that_are_logged():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = HessianMonitor().table
    for key in table.keys(default_only=True):
        assert key in text or key.partition("/")[2] in text or "top_2" in key, key


def test_the_examples_of_docstrings_hold():
    import doctest

    import torch

    from lightning_dynamics.linalg import eigenpairs as functions
    from lightning_dynamics.objective import Objective, curvature

    assert functions is not None
    result = doctest.testmod(curvature, extraglobs={"torch": torch, "Objective": Objective})
    assert result.attempted > 0
    assert result.failed == 0


COSTS = re.findall(
    r"^\| (.+?) \| (\d+) \| (\d+) \| \d+ \| \d+ \|$",
    (ROOT / "docs" / "howto" / "cadence.md").read_text("utf-8"),
    re.MULTILINE,
)
SHORT = ("`HessianMonitor()`",)


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [pytest.param(*row, id=row[0], marks=() if row[0] in SHORT else pytest.mark.slow) for row in COSTS],
)
def test_the_table_of_costs_is_what_is_counted(name, first, later):
    from statistics import median

    counting = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "point_cost.py"))
    counted = counting["products"](**counting["ROWS"][name])
    # the number of threads moves roundings, and with them single products
    assert counted[0] == pytest.approx(int(first), rel=0.15)
    assert median(counted[1:-1]) == pytest.approx(int(later), rel=0.15)


def test_the_table_of_costs_is_whole():
    assert [row[0] for row in COSTS] == list(
        runpy.run_path(str(ROOT / "tests" / "benchmarks" / "point_cost.py"))["ROWS"]
    )


def quickstart(folder, *arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=300).stdout


def test_the_quickstart_reaches_the_edge_and_its_control_does_not(tmp_path):
    out = quickstart(tmp_path, "--steps", "540")
    (mean,) = re.findall(r"the mean edge ratio from there on is (\S+)\.\n", out)
    (last,) = re.findall(r"the last edge ratio is (\S+)\.\n", out)
    assert 0.95 <= float(mean) <= 1.08
    assert float(last) < 0.5
    assert re.search(r"step +loss +top eigenvalue +threshold 2/η +edge ratio", out)
    run = tmp_path / "runs" / "step_size_0.2" / "version_0"
    steps = [record.step for record in read_records(run)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 540
    assert list(run.glob("events.out.tfevents.*"))
    assert (tmp_path / "runs" / "step_size_0.2_csv" / "version_0" / "metrics.csv").exists()
    assert (tmp_path / "runs" / "sharpness.png").stat().st_size > 10_000


@pytest.mark.clients
def test_the_quickstart_writes_a_wandb_run(tmp_path):
    out = quickstart(tmp_path, "--wandb", "--steps", "3")
    assert "wandb sync runs/wandb/offline-run-*" in out
    deadline = time.monotonic() + 30  # W&B's own process may write for a moment longer
    while len(written := list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))) < 2:
        assert time.monotonic() < deadline, (written, out)
        time.sleep(0.2)
