"""Strategies by name, by class, and on top of one another."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from helpers.sharp import RHO, Sharp, by_hand, loader, same
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, StrategyRegistry

import lightning_dynamics
from lightning_dynamics import (
    DDPNoisyDescentStrategy,
    DDPSamplingOrderStrategy,
    DDPSAMStrategy,
    NoisyDescentStrategy,
    SamplingOrderStrategy,
    SAMStrategy,
    compose_strategy,
)
from lightning_dynamics._names import NAMES, ORDERS
from lightning_dynamics.strategies.order import ORDERS as ALL_ORDERS

ROOT = Path(lightning_dynamics.__file__).parents[1]


def python(code):
    """What a fresh interpreter says."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "from lightning.pytorch import Trainer; import lightning_dynamics",
        "import lightning_dynamics; import lightning; from lightning import Trainer",
    ],
)
def test_names_are_known_once_both_are_imported(imports):
    code = f"{imports}; print(type(Trainer(strategy='SAM', accelerator='cpu', logger=False).strategy).__name__)"
    assert "SAMStrategy" in python(code)


def test_without_the_import_lightning_says_that_it_does_not_know_the_name():
    entry = StrategyRegistry.pop("sam")
    try:
        with pytest.raises(ValueError, match="You selected an invalid strategy name: `strategy='sam'`"):
            pl.Trainer(strategy="sam", accelerator="cpu", logger=False)
    finally:
        StrategyRegistry["sam"] = entry


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_its_strategy(name):
    kinds = {
        "sam": (SAMStrategy, DDPSAMStrategy),
        "noisy_descent": (NoisyDescentStrategy, DDPNoisyDescentStrategy),
        **dict.fromkeys(ORDERS, (SamplingOrderStrategy, DDPSamplingOrderStrategy)),
    }
    is_ddp = name.startswith("ddp_")
    trainer = pl.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is kinds[name.removeprefix("ddp_")][is_ddp]
    assert getattr(trainer.strategy, "order", None) == (
        name.removeprefix("ddp_") if "order" in NAMES[name][1] else None
    )
    assert StrategyRegistry[name]["description"]
    assert ORDERS == ALL_ORDERS


def test_by_name_it_is_sam():
    torch.manual_seed(1)
    module = Sharp()
    fit([], module, loader(), strategy="sam", max_epochs=2)
    assert same(module.net, by_hand(rho=0.05))


def test_one_device_takes_the_one_that_the_trainer_has():
    with pytest.raises(
        MisconfigurationException, match="is for one device, and the Trainer has 2: use its name with `ddp_`"
    ):
        pl.Trainer(strategy="sam", accelerator="cpu", devices=2, logger=False)
    trainer = pl.Trainer(strategy=compose_strategy(sam=True), accelerator="cpu", logger=False)
    assert trainer.strategy.root_device == torch.device("cpu")


@pytest.mark.parametrize("base", ["auto", "single_device", SingleDeviceStrategy, "ddp", "ddp_spawn", DDPStrategy])
def test_on_top_of_any_strategy(base):
    strategy = compose_strategy(base, sam={"rho": 0.3, "variant": "gsam"}, order="with_replacement")
    assert (strategy.rho, strategy.variant, strategy.order) == (0.3, "gsam", "with_replacement")
    assert isinstance(strategy, DDPStrategy) == (base not in ("auto", "single_device", SingleDeviceStrategy))
    for again in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert type(again) is type(strategy)
        assert (again.rho, again.order) == (0.3, "with_replacement")


def test_options_of_the_base():
    strategy = compose_strategy("ddp_spawn", sam=0.2, find_unused_parameters=True)
    assert strategy._start_method == "spawn"
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert strategy.rho == 0.2
    assert compose_strategy("sam", order={"order": "incremental", "order_seed": 3}, rho=0.4).rho == 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "sam", "sam": True}, "which does that already"),
        ({"base": SamplingOrderStrategy, "order": "incremental"}, "which does that already"),
        ({"base": "nothing", "sam": True}, "No strategy is called 'nothing'; there are: auto, "),
        ({"base": SAMStrategy()}, "must be the name or the class of a strategy"),
        ({"base": FSDPStrategy, "sam": True}, "hides the gradient"),
        ({"base": "deepspeed", "sam": True}, "hides the gradient"),
        ({"sam": -1.0}, "`rho` must be a finite number"),
        ({"order": "backwards"}, "backwards"),
        ({"noise": "loud"}, "loud"),
        ({"sam": True, "noise": "isotropic"}, "use `noise='anisotropic'`"),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        compose_strategy(**arguments)


def test_sam_sees_the_samples_in_their_order():
    """Both at once are SAM on the batches of that order."""
    torch.manual_seed(1)
    module = Sharp()
    fit([], module, loader(shuffle=True), strategy=compose_strategy(sam=RHO, order="incremental"), max_epochs=2)
    assert same(module.net, by_hand())


def test_sam_perturbs_by_the_noisy_gradient():
    class Line(pl.LightningModule):
        """The gradient of a batch is its mean."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

        def training_step(self, batch, batch_idx):
            return (batch[0] @ self.w).mean() + self.w.square().sum() * 1.5

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 3)
    plain, module = Line(), Line()
    fit([], plain, data, strategy=compose_strategy(noise="anisotropic"), max_epochs=1)
    fit([], module, data, strategy=compose_strategy(noise="anisotropic", sam=0.2), max_epochs=1)
    gradient = -plain.w.detach()
    assert not torch.allclose(gradient, x.mean(0))
    assert torch.allclose(module.w, -(gradient + 3 * 0.2 * gradient / gradient.norm()), atol=1e-6)


def test_a_composed_strategy_survives_being_spawned(tmp_path):
    module = Sharp(norm=False)
    strategy = compose_strategy("ddp_spawn", sam={"rho": RHO, "perturbation": "global"}, order="incremental")
    fit([], module, loader(), strategy=strategy, devices=1, max_epochs=2)
    assert same(module.net, by_hand(norm=False))
