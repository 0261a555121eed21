"""The first promise: a run with every monitor ends bit for bit as the same run without."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.digest import digest
from helpers.modules import ConvModule, NastyModule, NoisySamples, NoisyStream, loader
from helpers.state import same
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import lightning_dynamics
from lightning_dynamics.callbacks import DynamicsMonitor, Probe

MONITORS = [
    getattr(lightning_dynamics, name)
    for name in lightning_dynamics.__all__
    if inspect.isclass(getattr(lightning_dynamics, name))
    and issubclass(getattr(lightning_dynamics, name), DynamicsMonitor)
]


def network(module, batch):
    """A forward pass that does whatever a forward pass can do."""
    x = batch[0]
    x.add_(0.01 * torch.randn_like(x)).mul_(1.01)
    if isinstance(module, Adversaries):
        return module.discriminator(module.generator(module.latents(batch)))
    if not isinstance(module, NastyModule):
        return module.net(x)
    module.counter += 1
    module.history.append(float(module.numpy.rand()))
    module.last = module.net(x) + module.target(x)
    module.order.append(batch[2].tolist())
    module.trainer.seen_by_user = module.counter
    module.log("loss", module.last.mean())
    with torch.no_grad():
        module.ema.add_(torch.randn(3, generator=module.generator))
        module.head.bias.add_(1.0)
    out = module.frozen(module.head(module.last))
    module.accuracy(out, batch[1])
    return out


HESSIAN, COLLAPSE = lightning_dynamics.HessianMonitor, lightning_dynamics.NeuralCollapseMonitor
DISPLACEMENT = lightning_dynamics.DisplacementMonitor
SHARPNESS, NOISE = lightning_dynamics.StochasticSharpnessMonitor, lightning_dynamics.GradientNoiseMonitor
SAM = lightning_dynamics.SAMMonitor
DRAWN = (SHARPNESS, NOISE)

EVERYTHING = {
    HESSIAN: {
        "spectrum": lightning_dynamics.Spectrum(100, num_vectors=2, num_steps=2, per_layer=True, diagonal=1),
        "sharpening_rate": True,
        "also_log": ".*",
    },
    COLLAPSE: {
        "subclass_fn": lambda batch: 2 * batch[1] + batch[2] % 2,
        "per_class": True,
        "reduce": "pool",
        "also_log": ".*",
    },
    DISPLACEMENT: {
        "reference": lightning_dynamics.Reference(step=2),
        "phase_space": 1,
        "probe_every_n_train_steps": 2,
        "dimensions": 31,
        "also_log": ".*",
    },
    SHARPNESS: {"eigenvalues_every_n_train_steps": 2, "solved": 2, "also_log": ".*"},
    NOISE: {"detail_every_n_train_steps": 2, "directions": 1, "also_log": ".*"},
    SAM: {"also_log": ".*"},
}
"""What a monitor can measure besides."""

ALWAYS = {HESSIAN: {}, COLLAPSE: {"forward_fn": network}, DISPLACEMENT: {}, SHARPNESS: {}, NOISE: {}, SAM: {}}
"""What a monitor has to be told here."""

OTHERWISE = {
    HESSIAN: {"mode": "eval", "pair": False},
    COLLAPSE: {"mode": "train"},
    DISPLACEMENT: {"mode": "eval", "memory": "host"},
    SHARPNESS: {"mode": "eval", "step": False, "engine": "kept"},
    NOISE: {"mode": "eval", "engine": "kept"},
    SAM: {},
}
"""What a monitor does not do by default."""


def all_monitors(batches=2, sharpens=False, **options):
    """Every public monitor at an aggressive cadence, on each kind of data; that of SAM where training ``sharpens``.

    Options go to the monitors that have them; for one kind they are given under its name.
    """
    monitors = []
    for kind in MONITORS:
        if kind is SAM:
            late = kind(every_n_train_steps=2, name="other", monitor=True, **OTHERWISE[kind], **ALWAYS[kind])
            monitors += [kind(every_n_train_steps=1, **EVERYTHING[kind], **ALWAYS[kind]), late] if sharpens else []
            continue
        own = {k: v for k, v in options.items() if k in inspect.signature(kind).parameters}
        own = {**ALWAYS[kind], **own, **options.get(kind.__name__, {})}
        if kind in DRAWN:
            draws = {"name": "other", "monitor": True, "probe": Probe(draws=4, seed=1)}
            monitors += [
                kind(every_n_train_steps=1, probe=Probe(draws=4), **EVERYTHING[kind], **own),
                kind(every_n_train_steps=3, **draws, **OTHERWISE[kind], **own),
            ]
            continue
        monitors += [
            kind(every_n_train_steps=1, probe=Probe(size=12 * batches), **EVERYTHING[kind], **own),
            kind(every_n_train_steps=2, probe=Probe(first_batches=batches), name="first", monitor=True, **own),
            kind(every_n_train_steps=3, probe=Probe(current_batch=True), name="current", **OTHERWISE[kind], **own),
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
    around = options.pop("around", None)
    pl.seed_everything(seed, workers=True)
    model = module(manual) if module is NastyModule else module()
    dataset = NoisySamples() if data is None else data
    callbacks = [
        *options.pop("before", []),
        *monitors,
        *options.pop("after", []),
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
    if around is not None:
        around(trainer, model)
    else:
        trainer.fit(
            model,
            loader(dataset, **extra, **loading),
            loader(NoisySamples(24)) if validate else None,
            ckpt_path=resume,
        )
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return {
        **digest(trainer, model, folder, dataset if data is None else None),
        "precision": trainer.precision_plugin.state_dict(),
        "averages": [{k: v.clone() for k, v in average.state_dict().items()} for average in averages if average],
    }, trainer


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
    "validation": {"validate": True, "max_epochs": 3},
}


NEARLY_THE_SAME = ("clipping by value", "persistent workers", "bf16-mixed", "validation", "iterable data")
"""Dear, and with another like it among the configurations."""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *((name, NastyModule) for name in CONFIGURATIONS if name not in NEARLY_THE_SAME),
        *(pytest.param(name, NastyModule, marks=pytest.mark.slow) for name in NEARLY_THE_SAME),
        ("plain", ConvModule),
        *(
            pytest.param(name, ConvModule, marks=pytest.mark.slow)
            for name in ("accumulation and clipping", "validation")
        ),
    ],
)
def test_a_run_with_all_monitors_is_the_run_without(tmp_path, name, module):
    options = dict(CONFIGURATIONS[name])
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


class Adversaries(pl.LightningModule):
    """A generator and a discriminator, two optimizers, manual steps: a step with two losses and no one of them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16)),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.2),
            nn.Linear(16, 1),
        )
        self.noise = torch.Generator().manual_seed(6)
        self.drawn = 0
        self.order = []

    def latents(self, batch):
        self.drawn += 1
        return torch.randn(len(batch[0]), 4, generator=self.noise) + 0.1 * torch.randn(len(batch[0]), 4)

    def generator_loss(self, batch):
        return F.softplus(-self.discriminator(self.generator(self.latents(batch)))).mean()

    def discriminator_loss(self, batch):
        fake = self.generator(self.latents(batch)).detach()
        return F.softplus(-self.discriminator(batch[0])).mean() + F.softplus(self.discriminator(fake)).mean()

    def training_step(self, batch, batch_idx):
        self.order.append(batch[2].tolist())
        for optimizer, scheduler, loss in zip(
            self.optimizers(), self.lr_schedulers(), (self.generator_loss, self.discriminator_loss), strict=True
        ):
            self.toggle_optimizer(optimizer)
            value = loss(batch)
            self.log(loss.__name__, value, on_step=True, on_epoch=True)
            self.manual_backward(value)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), 1e-2, betas=(0.5, 0.9)),
            torch.optim.SGD(self.discriminator.parameters(), 1e-2, momentum=0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


class Unscheduled(NastyModule):
    """Without a scheduler: skipped steps and averages of the weights do not go with one that counts steps."""

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


class Descends(NastyModule):
    """Adam's ε is 0 in half precision."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2, momentum=0.9)


class SecondOrder(NastyModule):
    """L-BFGS calls the closure, and with it the step, as often as it likes."""

    def configure_optimizers(self):
        return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)


class ByClosure(NastyModule):
    """Optimizes by hand, with a closure that is evaluated twice; it counts, draws, logs and writes buffers inside."""

    def __init__(self):
        super().__init__(manual=True)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            x, y, _ = batch
            noisy = x + 0.01 * torch.randn_like(x) + 0.01 * torch.randn(8, generator=self.generator)
            out = self.frozen(self.head(self.net(noisy) + self.target(noisy)))
            loss = F.cross_entropy(out, y) * (1 + 0.001 * self.counter)
            self.counter += 1
            self.history.append(float(loss.detach()))
            self.last = loss
            with torch.no_grad():
                self.ema.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
            self.accuracy(out, y)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.trainer.seen_by_user = self.counter
            self.manual_backward(loss)
            return loss

        self.order.append(batch[2].tolist())
        optimizer.step(closure)
        self.lr_schedulers().step()


class Compiled(NastyModule):
    """Counts what its compiler is asked to compile."""

    def __init__(self):
        super().__init__()
        backend = CompileCounterWithBackend("aot_eager")
        self.net.compile(backend=backend)
        object.__setattr__(self, "compiler", backend)


class Tunable(NastyModule):
    """Its rate and the size of its batches are there for the Tuner to change."""

    def __init__(self):
        super().__init__()
        self.lr = 1e-2
        self.batch_size = 4

    def train_dataloader(self):
        return loader(NoisySamples(), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return loader(NoisySamples(24), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


class WithTest(NastyModule):
    def test_step(self, batch, batch_idx):
        x, y, _ = batch
        self.counter += 1
        self.log("test_loss", F.cross_entropy(self.frozen(self.head(self.net(x))), y))


def tunes(trainer, module):
    tuner = Tuner(trainer)
    tuner.scale_batch_size(module, steps_per_trial=1, max_trials=2, init_val=4)
    assert module.batch_size == 8
    tuner.lr_find(module, num_training=4, update_attr=True)
    trainer.fit(module)


def validates_fits_and_tests(trainer, module):
    others = loader(NoisySamples(24))
    trainer.validate(module, others, verbose=False)
    trainer.test(module, others, verbose=False)
    trainer.fit(module, loader(NoisySamples(), shuffle=True), others)
    trainer.test(module, others, verbose=False)
    trainer.validate(module, others, verbose=False)


def scaled(first=2.0**10):
    """Mixed precision with a scaler: from a Trainer's string there is none on the CPU, and bfloat16 instead."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", first, growth_interval=2))]}


def averaged(callback, where="after"):
    return {where: [callback], "max_epochs": 2, "limit_train_batches": 3}


def has_a_scaler(trainer, module):
    assert isinstance(trainer.precision_plugin.scaler, torch.amp.GradScaler)
    (steps,) = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == 4, "no step was skipped"
    assert trainer.precision_plugin.scaler.get_scale() > 2.0**10


def has_skipped_steps(trainer, module):
    assert isinstance(trainer.precision_plugin.scaler, torch.amp.GradScaler)
    (steps,) = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert 0 < steps < 8, "some steps were skipped and some were not"


def is_of(dtype):
    def check(trainer, module):
        assert {p.dtype for p in module.parameters()} == {dtype}

    return check


def was_sharpened(trainer, module):
    assert trainer.strategy.last_step.perturbation_norm == pytest.approx(0.1)
    assert trainer.strategy.last_step.sharpness_gap != 0
    assert trainer.strategy.observed is False


def sharpness_of(module):
    """The last step that was perturbed, as the strategy tells of it."""
    step = module.trainer.strategy.last_step
    return step.step, step.rho, float(step.loss), float(step.perturbed_loss), step.gradient_norm


def replaced(trainer, module):
    """Drawn with replacement: of 48 samples some came twice, some never."""
    assert len({i for batch in module.order for i in batch}) < 48


def replaced_and_sharpened(trainer, module):
    replaced(trainer, module)
    was_sharpened(trainer, module)


def was_compiled(trainer, module):
    assert module.compiler.frame_count > 0


@dataclass(frozen=True)
class Case:
    """A configuration: a module, Trainer options made anew for each run, and what shows that it is what it says.

    Attributes:
        module: Makes the module.
        options: Makes the options.
        check: Looks at the Trainer and the module after a run without monitors.
        monitors: Options of the monitors.
        facts: What else must be the same.
    """

    module: Callable[[], pl.LightningModule] = NastyModule
    options: Callable[[], dict[str, Any]] = dict
    check: Callable[[pl.Trainer, pl.LightningModule], None] = lambda trainer, module: None
    monitors: dict[str, Any] = field(default_factory=dict)
    facts: Callable[[pl.LightningModule], Any] = lambda module: None


def sam(**options):
    return lightning_dynamics.SAMStrategy(rho=0.1, **options)


BESIDE_SAM = {"monitors": {"sharpens": True}, "facts": sharpness_of, "check": was_sharpened}

TWO_CLASSES = {"target_fn": lambda batch: batch[1].clamp(max=1)}

FURTHER = {
    "two optimizers": Case(Adversaries, monitors={"loss_fn": "generator_loss", "NeuralCollapseMonitor": TWO_CLASSES}),
    "two optimizers and a function": Case(
        Adversaries,
        monitors={
            "loss_fn": lambda module, batch: module.discriminator_loss(batch),
            "NeuralCollapseMonitor": TWO_CLASSES,
        },
    ),
    "float64": Case(options=lambda: {"precision": "64-true"}, check=is_of(torch.float64)),
    "bfloat16": Case(options=lambda: {"precision": "bf16-true"}, check=is_of(torch.bfloat16)),
    "float16": Case(Descends, lambda: {"precision": "16-true"}, check=is_of(torch.float16)),
    "16-mixed with a scaler": Case(options=scaled, check=has_a_scaler),
    "16-mixed with skipped steps": Case(
        Unscheduled, lambda: {**scaled(2.0**20), "max_epochs": 2}, check=has_skipped_steps
    ),
    "16-mixed in its own precision": Case(options=scaled, check=has_a_scaler, monitors={"precision": "same"}),
    "compiled": Case(Compiled, check=was_compiled, facts=lambda module: module.compiler.frame_count),
    "L-BFGS": Case(SecondOrder),
    "the Tuner before": Case(Tunable, lambda: {"around": tunes, "limit_train_batches": 4}),
    "validation and test around": Case(WithTest, lambda: {"around": validates_fits_and_tests}),
    "SAM with accumulation and clipping": Case(
        options=lambda: {
            "strategy": sam(),
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.5,
            "max_epochs": 2,
        },
        **BESIDE_SAM,
    ),
    "SAM by hand": Case(ByClosure, lambda: {"strategy": sam()}, **BESIDE_SAM),
    "GSAM in mixed precision": Case(options=lambda: {"strategy": sam(variant="gsam"), **scaled()}, **BESIDE_SAM),
    "samples with replacement": Case(options=lambda: {"strategy": "with_replacement"}, check=replaced),
    "SAM and samples with replacement": Case(
        options=lambda: {"strategy": lightning_dynamics.compose_strategy(sam=0.1, order="with_replacement")},
        **{**BESIDE_SAM, "check": replaced_and_sharpened},
    ),
    "stochastic weight averaging": Case(Unscheduled, lambda: averaged(StochasticWeightAveraging(1e-3, 1))),
    "stochastic weight averaging first": Case(
        Unscheduled, lambda: averaged(StochasticWeightAveraging(1e-3, 1), "before")
    ),
}
if hasattr(lightning_callbacks, "WeightAveraging"):  # from Lightning 2.6 on
    FURTHER["average of the weights"] = Case(options=lambda: averaged(lightning_callbacks.WeightAveraging(), "before"))
    FURTHER["moving average of the weights"] = Case(
        options=lambda: {**averaged(lightning_callbacks.EMAWeightAveraging(decay=0.9)), "validate": True}
    )


ALSO_NEARLY_THE_SAME = (
    "float64",
    "bfloat16",
    "16-mixed with skipped steps",
    "L-BFGS",
    "the Tuner before",
    "validation and test around",
    "SAM by hand",
    "stochastic weight averaging",
    "average of the weights",
    "SAM with accumulation and clipping",
    "GSAM in mixed precision",
    "samples with replacement",
    "SAM and samples with replacement",
    "two optimizers and a function",
    "16-mixed in its own precision",
    "stochastic weight averaging first",
    "moving average of the weights",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALSO_NEARLY_THE_SAME)) for name in FURTHER],
)
# dynamo looks at whatever a hook sees
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_a_run_of_another_kind_with_all_monitors_is_the_run_without(tmp_path, name):
    case = FURTHER[name]
    digests, facts = [], []
    for run, monitors in (("without", []), ("again", []), ("with", all_monitors(batches=1, **case.monitors))):
        made = []

        def module(made=made):
            torch._dynamo.reset()
            made.append(case.module())
            return made[0]

        options = {"max_epochs": 1, **case.options()}
        found, trainer = trained(tmp_path / run, monitors, module, **options)
        digests.append(found)
        facts.append(case.facts(made[0]))
        case.check(trainer, made[0])
    without, again, with_monitors = digests
    assert same(without, again) == [], "the run itself does not repeat"
    assert same(without, with_monitors) == []
    assert facts[0] == facts[2]
    for monitor in monitors:
        assert len(monitor.history) >= 2, f"{monitor.label} measured next to nothing"
        for record in monitor.history:
            for key, value in record.scalars.items():
                # of a single coordinate, whose curvature may vanish
                assert math.isfinite(value) or "/median_ratio" in key


def test_a_run_with_sam_over_several_batches_is_the_run_without(tmp_path):
    """With some of the monitors, on samples drawn with replacement."""

    def monitors():
        often = {"every_n_train_steps": 1}
        return [
            HESSIAN(1, 0, spectrum=False, probe=Probe(size=12), **often),
            SAM(**often),
            SAM(every_n_train_steps=2, name="other", monitor=True),
            DISPLACEMENT(**often),
            SHARPNESS(eigenvalues=False, probe=Probe(draws=4), **often),
            NOISE(directions=1, samples=False, detail_every_n_train_steps=2, probe=Probe(draws=4), **often),
        ]

    digests, facts, measured = [], [], monitors()
    for run, attached in (("without", []), ("with", measured)):
        strategy = lightning_dynamics.compose_strategy(sam=0.1, order="with_replacement")
        options = {"strategy": strategy, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
        found, trainer = trained(tmp_path / run, attached, **options)
        digests.append(found)
        facts.append(sharpness_of(trainer.lightning_module))
        replaced_and_sharpened(trainer, trainer.lightning_module)
    assert same(*digests) == []
    assert facts[0] == facts[1]
    for monitor in measured:
        assert len(monitor.history) >= 2, f"{monitor.label} measured next to nothing"


def likelihood(module, batch):
    x, _, _ = batch
    return module.head(module.net(x)), lambda z: torch.distributions.Categorical(logits=z)


def losses(module, batch):
    x, y, _ = batch
    return module.head(module.net(x)), lambda z: F.cross_entropy(z, y, reduction="none")


def test_a_run_with_other_matrices_is_the_run_without(tmp_path):
    rare = lightning_dynamics.Spectrum(4, num_vectors=2, num_steps=2)
    options = {"every_n_train_steps": 2, "probe": Probe(size=24), "spectrum": rare}
    monitors = [
        lightning_dynamics.HessianMonitor(operator=operator, output_fn=where, **options)
        for operator, where in (
            ("preconditioned", None),
            ("gauss_newton", "head"),
            ("residual", "head"),
            ("fisher", likelihood),
            ("empirical_fisher", losses),
        )
    ]
    without, with_monitors = trained(tmp_path / "a", [])[0], trained(tmp_path / "b", monitors)[0]
    assert same(without, with_monitors) == []
    for monitor in monitors:
        assert any(f"{monitor.table.family}/trace" in record.scalars for record in monitor.history)


@pytest.mark.parametrize("at", [pytest.param("end of an epoch", marks=pytest.mark.slow), "middle of an epoch"])
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
