import os

# tensors are small here, and workers of pytest-xdist share the cores; for processes that tests start, too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    """Whatever a test writes without saying where goes to a folder of its own."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(autouse=True)
def _no_seed_of_another_test(monkeypatch):
    """The seed that ``seed_everything`` leaves in the environment ends with its test: orders of samples follow it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
