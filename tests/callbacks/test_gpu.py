"""The same on an accelerator: no trace, and the values of the CPU."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from helpers.modules import ConvModule, NoisySamples, loader
from helpers.state import equal

from lightning_dynamics import HessianMonitor, Probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def trained(monitors, accelerator, **options):
    pl.seed_everything(3)
    module = ConvModule()
    fit(monitors, module, loader(NoisySamples(), shuffle=True), accelerator=accelerator, devices=1, **options)
    return {
        "weights": {k: v.cpu().clone() for k, v in module.state_dict().items()},
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "order": module.order,
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_on_a_gpu_is_the_run_without(precision, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        without = trained([], "cuda", precision=precision)
        monitor = HessianMonitor(every_n_train_steps=1, probe=Probe(size=24))
        with_monitor = trained([monitor], "cuda", precision=precision)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [key for key in without if not equal(without[key], with_monitor[key])] == []
    assert len(monitor.history) > 5


def test_values_are_those_of_the_cpu():
    histories = []
    for accelerator in ("cpu", "cuda"):
        monitor = HessianMonitor(every_n_train_steps=4, probe=Probe(size=24), mode="eval", pair=False)
        trained([monitor], accelerator, max_epochs=1)
        histories.append(monitor.history[0])
    for key, value in histories[0].scalars.items():
        loose = 0.02 * histories[0].scalars["hessian/top_1"] if "bottom" in key else 1e-5
        assert histories[1].scalars[key] == pytest.approx(value, rel=3e-3, abs=loose), key
