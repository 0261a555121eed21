"""Every private name of Lightning that is in use, exercised: a new release that drops one is noticed here."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import torch
from helpers.fit import fit, mini_batches
from helpers.modules import Regression
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

from lightning_dynamics import _compat


class Looks(pl.Callback):
    """Asks each name in the middle of a run."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 4:
            return
        self.seen = {
            "curve_step": _compat.curve_step(trainer),
            "ends_step": _compat.ends_step(trainer),
            "step_trackers": [
                (getattr(tracker, _compat.STEPS), steps) for tracker, steps in _compat.step_trackers(trainer, 4)
            ],
            "batch_number": _compat.batch_number(trainer),
            "epoch_tracker": [getattr(_compat.epoch_tracker(trainer), name) for name in _compat.EPOCH],
            "callbacks": _compat.callbacks(trainer),
            "is_trial": _compat.is_trial(trainer),
            "training_loaders": _compat.training_loaders(trainer),
            "validation_loaders": _compat.validation_loaders(trainer),
            "optimizer_lists": _compat.optimizer_lists(trainer),
            "scheduler_configs_with": _compat.scheduler_configs_with(trainer, lambda scheduler: "stand-in"),
            "transforming_datamodule": _compat.transforming_datamodule(trainer),
            "parts": _compat.parts(trainer),
            "place": _compat.place(trainer),
            "previous_loaders": _compat.previous_loaders(trainer),
            "cycles_loaders": _compat.cycles_loaders(trainer),
            "has_own_state": _compat.has_own_state(trainer.train_dataloader),
            "with_sampler": list(_compat.with_sampler(trainer.train_dataloader, [2, 0]).batch_sampler),
            "wrapped_sampler": list(_compat.wrapped_sampler(DistributedSamplerWrapper([3, 1], 2, 0))),
            "loader_states_are_due": _compat.loader_states_are_due(trainer),
            "repair_progress": _compat.repair_progress(trainer),
            "reopen_loaders": _compat.reopen_loaders(trainer),
            "only_collects_statistics": _compat.only_collects_statistics(trainer),
            "ready_batch": _compat.ready_batch(trainer, pl_module, [batch[0].double(), "text"]),
            "is_overridden": _compat.is_overridden("configure_gradient_clipping", pl_module),
            "is_param_in_hook_signature": _compat.is_param_in_hook_signature(pl_module.training_step, "batch_idx"),
            "attributes": [
                hasattr(trainer, _compat.LOGGERS),
                hasattr(pl_module, _compat.CURRENT_HOOK),
                hasattr(pl_module, _compat.DTYPE),
                *(hasattr(trainer.strategy, name) for name in _compat.OPTIMIZERS),
            ],
            "shards_data": _compat.shards_data(trainer),
            "DummyLogger": _compat.DummyLogger().experiment,
            "do_nothing_closure": _compat.do_nothing_closure(),
        }
        _compat.set_root_device(trainer.strategy, torch.device("cpu"))
        self.seen["set_root_device"] = trainer.strategy.root_device
        with _compat.at_batch(trainer, 7):
            self.seen["at_batch"] = [_compat.batch_number(trainer)]
        self.seen["at_batch"].append(_compat.batch_number(trainer))
        with _compat.other_results(trainer):
            pl_module.log("thrown_away", 1.0)
        self.seen["other_results"] = "thrown_away" in str(trainer._results)
        _compat.expose_metrics(trainer, {"exposed": 3.0})
        self.seen["expose_metrics"] = trainer.callback_metrics["exposed"]


class Collects(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(_compat.only_collects_statistics(trainer))


def test_an_epoch_of_weight_averaging_that_only_collects_statistics_is_told():
    looks = Collects()
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    averaging = pl.callbacks.StochasticWeightAveraging(1e-3, 1)
    fit([averaging, looks], Regression(net, lr=1e-3), mini_batches(), max_epochs=2)
    assert looks.seen == [False] * 6 + [True] * 3


class Scheduled(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "frequency": 3}]


def test_every_private_name_does_what_is_said_of_it():
    looks, data = Looks(), mini_batches()
    module = Scheduled()
    trainer = fit(looks, module, data)
    seen = looks.seen
    seen["rewind_epoch"] = _compat.rewind_epoch(trainer)
    assert set(seen) == set(_compat.__all__) | {"attributes"}
    assert seen["curve_step"] == 4
    assert seen["batch_number"] == 1
    assert seen["set_root_device"] == torch.device("cpu")
    assert seen["other_results"] is False
    assert seen["at_batch"] == [7, 1]
    assert seen["do_nothing_closure"] is None
    assert seen["ends_step"]
    assert seen["shards_data"] is True
    assert seen["step_trackers"] == [(4, 4)]
    assert seen["epoch_tracker"] == [1, 1]
    assert looks in seen["callbacks"]
    assert seen["is_trial"] is False
    assert seen["place"] == (1, 0)
    assert seen["previous_loaders"].flattened == [data]
    assert seen["cycles_loaders"] is True
    assert seen["has_own_state"] is seen["loader_states_are_due"] is False
    assert seen["with_sampler"] == [[2, 0]]
    assert seen["wrapped_sampler"] == [3, 1]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 6  # a whole epoch of three batches was taken off
    assert (trainer.fit_loop.epoch_loop.restarting, *_compat.place(trainer)) == (False, 3, 0)
    assert seen["only_collects_statistics"] is False
    assert seen["transforming_datamodule"] is None
    assert seen["training_loaders"] == [data]
    (real,), (wrapped,) = seen["optimizer_lists"]
    assert isinstance(real, torch.optim.SGD)
    assert wrapped.optimizer is real
    (config,) = seen["scheduler_configs_with"]
    assert (config.scheduler, config.frequency) == ("stand-in", 3)
    assert trainer.lr_scheduler_configs[0].scheduler != "stand-in"
    assert seen["ready_batch"][0].dtype == torch.float64
    assert seen["is_overridden"] is False
    assert seen["is_param_in_hook_signature"] is True
    assert seen["attributes"] == [True] * 5
    assert {trainer, trainer.strategy, trainer.fit_loop} < set(seen["parts"])
    assert seen["expose_metrics"] == 3
    assert seen["DummyLogger"].anything() is None


def test_every_name_is_listed():
    functions = {n for n, f in vars(_compat).items() if inspect.isfunction(f) and f.__module__ == _compat.__name__}
    assert {name for name in functions if not name.startswith("_")} <= set(_compat.__all__)
