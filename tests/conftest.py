import pytest
import torch

# tensors are small here, and workers of pytest-xdist share the cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    """Whatever a test writes without saying where goes to a folder of its own."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
