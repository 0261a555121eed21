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
