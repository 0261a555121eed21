"""The first promise: a run with every monitor ends bit for bit as the same run without."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import pytest
from helpers.digest import digest
from helpers.modules import ConvModule, NastyModule, NoisySamples, NoisyStream, loader
from helpers.state import same
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_dynamics
from lightning_dynamics.callbacks import DynamicsMonitor, Probe

MONITORS = [
    getattr(lightning_dynamics, name)
    for name in lightning_dynamics.__all__
    if inspect.isclass(getattr(lightning_dynamics, name))
    and issubclass(getattr(lightning_dynamics, name), DynamicsMonitor)
]


def all_monitors():
    """Every public monitor at an aggressive cadence, on each kind of data."""
    monitors = []
    for kind in MONITORS:
        monitors += [
            kind(every_n_train_steps=1, probe=Probe(size=24)),
            kind(every_n_train_steps=2, probe=Probe(first_batches=2), name="first", monitor=True),
            kind(every_n_train_steps=3, probe=Probe(current_batch=True), name="current", mode="eval", pair=False),
        ]
    return monitors


class Naive(pl.Callback):
    """What home-grown Hessian callbacks do: the negative control."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        output = module.training_step(batch, batch_idx)
        if output is not None:
            output["loss"].backward()


def trained(folder, monitors, module=NastyModule, *, data=None, manual=False, resume=None, seed=11, **options):
    folder.mkdir(exist_ok=True)
    workers = options.pop("workers", 0)
    validate = options.pop("validate", False)
    pl.seed_everything(seed, workers=True)
    model = module(manual) if module is NastyModule else module()
    dataset = NoisySamples() if data is None else data
    callbacks = [
        *monitors,
        ModelCheckpoint(
            folder,
            filename="{epoch}-{step}",
            save_top_k=-1,
            monitor="val_loss" if validate else None,
            every_n_train_steps=options.pop("save_every", None),
        ),
    ]
    if validate:
        callbacks.append(EarlyStopping("val_loss", patience=1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.pop("max_epochs", 2),
        logger=CSVLogger(folder, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=1 if validate else 0,
        **options,
    )
    extra = {"shuffle": True} if data is None else {}
    loading = {"num_workers": abs(workers), "persistent_workers": workers < 0} if workers else {}
    trainer.fit(
        model,
        loader(dataset, **extra, **loading),
        loader(NoisySamples(24)) if validate else None,
        ckpt_path=resume,
    )
    return digest(trainer, model, folder, dataset if data is None else None), trainer


def resumed(folder, monitors_of, at, **options):
    """Killed after a checkpoint and started again, in a folder of its own."""
    first, second = folder / "first", folder / "second"
    folder.mkdir(exist_ok=True)
    save_every = 4 if at.startswith("end") else 3
    trained(first, monitors_of(), max_epochs=1, save_every=save_every, **options)
    (checkpoint,) = first.glob("*.ckpt")
    return trained(second, monitors_of(), max_epochs=3, resume=checkpoint, seed=12, save_every=save_every, **options)[0]


CONFIGURATIONS = {
    "plain": {},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "manual optimization": {"manual": True},
    "workers": {"workers": 2},
    "persistent workers": {"workers": -2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "iterable data": {"data": "stream"},
    "validation": {"validate": True, "max_epochs": 4},
}


@pytest.mark.parametrize("module", [NastyModule, ConvModule])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_with_all_monitors_is_the_run_without(tmp_path, name, module):
    options = dict(CONFIGURATIONS[name])
    if options.get("manual") and module is ConvModule:
        pytest.skip("trains automatically")
    results = []
    for run, monitors in (("without", []), ("again", []), ("with", all_monitors())):
        if options.get("data") is not None:
            options["data"] = NoisyStream()
        results.append(trained(tmp_path / run, monitors, module, **options)[0])
    without, again, with_monitors = results
    assert same(without, again) == [], "the run itself does not repeat"
    assert same(without, with_monitors) == []
    for monitor in monitors:
        assert monitor.history, f"{monitor.label} measured nothing"


@pytest.mark.parametrize("at", ["end of an epoch", "middle of an epoch"])
def test_a_resumed_run_with_all_monitors_is_the_resumed_run_without(tmp_path, at):
    without = resumed(tmp_path / "without", list, at)
    again = resumed(tmp_path / "again", list, at)
    with_monitors = resumed(tmp_path / "with", all_monitors, at)
    assert same(without, again) == []
    assert same(without, with_monitors) == []


def test_a_naive_measurement_does_not_pass(tmp_path):
    """The negative control: the comparison sees what others do to a run."""
    without, _ = trained(tmp_path / "without", [])
    naive, _ = trained(tmp_path / "naive", [Naive()])
    broken = set(same(without, naive))
    assert {
        "parameters",
        "buffers",
        "gradients",
        "attributes",
        "optimizers",
        "torch",
        "logged",
        "callback_metrics",
    } <= broken


def test_there_are_monitors():
    assert MONITORS
