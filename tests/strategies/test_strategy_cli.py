"""Strategies from a configuration file."""

from __future__ import annotations

import contextlib
import io

import pytest
from helpers.sharp import Sharp, loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from lightning_dynamics import (
    DDPSamplingOrderStrategy,
    DDPSAMStrategy,
    NoisyDescentStrategy,
    SamplingOrderStrategy,
    SAMStrategy,
)
from lightning_dynamics.strategies import SAMMixin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()


class Plain(Sharp):
    def __init__(self, lr: float = 0.1):
        super().__init__()


TRAINER = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  strategy: {}
"""

FULL = """
    class_path: lightning_dynamics.SAMStrategy
    init_args:
      rho: 0.1
      variant: asam
      perturbation: global
      m: null
      every_k: 2
      look_alpha: 0.5
      gsam_alpha: 0.2
      same_noise: false
"""

SCHEDULED = """
    class_path: lightning_dynamics.SAMStrategy
    init_args:
      rho:
        class_path: lightning_dynamics.RhoByLearningRate
        init_args: {rho_max: 0.2, lr_max: 0.1, rho_min: 0.1}
"""

COMPOSED = """
    class_path: lightning_dynamics.compose_strategy
    init_args:
      base: auto
      sam: {rho: 0.1, variant: gsam}
      order: with_replacement
"""

DISTRIBUTED = """
    class_path: lightning_dynamics.DDPSAMStrategy
    init_args:
      rho: 0.1
      find_unused_parameters: true
      process_group_backend: gloo
"""


def trained(tmp_path, strategy, run="fit"):
    path = tmp_path / "config.yaml"
    path.write_text(TRAINER.format(strategy))
    return LightningCLI(Plain, Data, args=([run] if run else []) + [f"--config={path}"], run=bool(run))


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("sam", {"rho": 0.05, "variant": "sam"}),
        ("with_replacement", {"order": "with_replacement"}),
        (FULL, {"rho": 0.1, "variant": "asam", "every_k": 2, "look_alpha": 0.5, "same_noise": False}),
        (SCHEDULED, {"variant": "sam"}),
        (COMPOSED, {"rho": 0.1, "variant": "gsam", "order": "with_replacement"}),
    ],
    ids=["name", "order", "full", "scheduled", "composed"],
)
def test_a_configuration_trains(tmp_path, strategy, found):
    made = trained(tmp_path, strategy).trainer.strategy
    assert {name: getattr(made, name) for name in found} == found
    assert not isinstance(made, SAMMixin) or made.last_step.rho > 0.04


def test_options_of_the_base_strategy(tmp_path):
    strategy = trained(tmp_path, DISTRIBUTED, run=None).trainer.strategy
    assert isinstance(strategy, DDPStrategy)
    assert strategy.rho == 0.1
    assert strategy.process_group_backend == "gloo"
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (SAMStrategy, ("rho", "variant", "perturbation", "m", "every_k", "look_alpha", "gsam_alpha", "same_noise")),
        (DDPSAMStrategy, ("rho", "variant", "perturbation", "process_group_backend", "timeout")),
        (SamplingOrderStrategy, ("order", "order_seed")),
        (DDPSamplingOrderStrategy, ("order", "order_seed", "process_group_backend")),
        (NoisyDescentStrategy, ("noise", "noise_seed")),
    ],
)
def test_the_help_shows_every_option(strategy, options):
    said = io.StringIO()
    name = f"lightning_dynamics.{strategy.__name__}"
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        LightningCLI(Plain, Data, args=["fit", f"--trainer.strategy.help={name}"])
    for option in options:
        assert f"--trainer.strategy.{option}" in said.getvalue()
