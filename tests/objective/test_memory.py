import pytest
import torch
from torch import nn

from lightning_dynamics.objective.memory import SavedBytes, available_memory, double_precision


def test_saved_bytes_count_each_storage_once():
    x = torch.randn(100, 10, requires_grad=True)
    saved = SavedBytes()
    with saved.counting():
        (x * x).sum()  # saves x twice
    assert saved.total == 100 * 10 * 4


def test_double_backward_graphs_are_counted():
    net = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
    x = torch.randn(200, 10)
    first, second = SavedBytes(), SavedBytes()
    with first.counting():
        loss = net(x).square().mean()
    with second.counting():
        torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    assert first.total >= 200 * 50 * 4
    assert second.total > 0


def test_free_memory_is_plausible():
    free = available_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert available_memory(torch.device("meta")) is None


@pytest.mark.parametrize("content", ["max", "1000000"])
def test_a_container_limit_is_respected(tmp_path, monkeypatch, content):
    (tmp_path / "memory.max").write_text(content)
    (tmp_path / "memory.current").write_text("400000")
    monkeypatch.setattr("lightning_dynamics.objective.memory._CGROUP", tmp_path)
    free = available_memory(torch.device("cpu"))
    assert (free == 600000) == (content != "max")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", None, "fast"),
        ("mps", None, "missing"),
        ("cuda", (8, 0), "fast"),
        ("cuda", (9, 0), "fast"),
        ("cuda", (8, 9), "slow"),
        ("cuda", (12, 0), "slow"),
    ],
)
def test_some_devices_are_slow_at_double_precision(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert double_precision(torch.device(device)) == expected
