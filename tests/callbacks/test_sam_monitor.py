"""SAMMonitor in whole fits: the numbers are those of the step, the run is none the wiser."""

from __future__ import annotations

from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit, mini_batches
from helpers.modules import Regression
from helpers.sharp import RHO, Sharp, data, loader, total
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from lightning_dynamics import DDPSAMStrategy, HessianMonitor, Probe, SAMMonitor, SAMStrategy, read_records

KEYS = ["sharpness_gap", "gradient_cosine", "perturbation_norm", "rho", "gradient_norm"]


def plain():
    """Without what a second evaluation of the same batch may not repeat."""
    return Sharp(norm=False, schedule=False)


def sharpened(monitors, module=None, data=None, strategy=None, **options):
    torch.manual_seed(1)
    module = plain() if module is None else module
    strategy = SAMStrategy(rho=RHO) if strategy is None else strategy
    with_options = {"max_epochs": 1, "strategy": strategy, **options}
    return fit(monitors, module, loader() if data is None else data, **with_options)


class Steps(pl.Callback):
    """Weights before every step, and whether the strategy was watched in it."""

    def __init__(self):
        self.weights, self.observed = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.observed.append(trainer.strategy.observed)


def expected(weights, batches, rho=RHO):
    """The numbers of a step of SAM, written by hand."""
    net = plain().net
    parameters = list(net.parameters())

    def losses_and_gradients():
        loss = sum(F.cross_entropy(net(x), y) for x, y in batches) / len(batches)
        return float(loss.detach()), torch.autograd.grad(loss, parameters)

    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
    loss, gradient = losses_and_gradients()
    with torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            p.add_(g, alpha=rho / total(gradient))
    perturbed, other = losses_and_gradients()
    dots = float(sum((a * b).sum() for a, b in zip(gradient, other, strict=True)))
    values = [perturbed - loss, dots / total(gradient) / total(other), rho, rho, total(gradient)]
    return dict(zip((f"sam/{key}" for key in KEYS), values, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_numbers_are_those_of_the_step_that_is_taken_from_the_point(accumulate):
    monitor, steps = SAMMonitor(every_n_train_steps=2), Steps()
    sharpened([steps, monitor], accumulate_grad_batches=accumulate)
    batches = list(zip(*(t.split(8) for t in data()), strict=True))
    assert [record.step for record in monitor.history] == list(range(0, 6 // accumulate, 2))
    for record in monitor.history:
        first = record.step * accumulate
        found = dict(record.scalars)
        assert found == pytest.approx(expected(steps.weights[first], batches[first : first + accumulate]), rel=1e-4)
        assert found["sam/sharpness_gap"] > 0
        assert record.global_step == record.step
        assert not record.final


def test_the_strategy_is_watched_in_due_steps_alone():
    """From before the first batch of the step on; the hook of a callback behind the monitor sees it."""
    monitor, steps = SAMMonitor(every_n_train_steps=2), Steps()
    trainer = sharpened([monitor, steps], accumulate_grad_batches=2, max_epochs=2)
    assert steps.observed == [True, True, False, False] * 3
    assert trainer.strategy.observed is False


def test_an_exception_in_a_due_step_leaves_nothing_behind():
    class Breaks(Sharp):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    monitor, strategy = SAMMonitor(every_n_train_steps=1), SAMStrategy(rho=RHO)
    with pytest.raises(RuntimeError, match="out of luck"):
        sharpened(monitor, Breaks(), strategy=strategy, accumulate_grad_batches=2)
    assert strategy.observed is False
    assert [record.step for record in monitor.history] == [0]


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        ({}, [0, 10, 20]),
        ({"every_n_train_steps": 7}, [0, 7, 14, 21]),
        ({"every_n_epochs": 2}, [0, 12]),
        ({"log_spaced": True}, [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]),
    ],
    ids=str,
)
def test_points_are_where_the_cadence_says(cadence, steps):
    """And none at the end, from where no step is taken."""
    monitor = SAMMonitor(**cadence)
    sharpened(monitor, max_epochs=4)
    assert [record.step for record in monitor.history] == steps


@pytest.mark.parametrize("variant", ["sam", "asam", "usam", "gsam"])
def test_every_variant_has_all_numbers(variant):
    monitor = SAMMonitor(every_n_train_steps=1)
    sharpened(monitor, strategy=SAMStrategy(rho=0.05, variant=variant))
    for record in monitor.history:
        assert list(record.scalars) == [f"sam/{key}" for key in KEYS]
        length = record.scalars["sam/perturbation_norm"]
        if variant == "usam":
            assert length == pytest.approx(0.05 * record.scalars["sam/gradient_norm"])
        assert length == pytest.approx(0.05) or variant in ("asam", "usam")


def test_parts_of_a_batch_have_their_means():
    monitor = SAMMonitor(every_n_train_steps=1)
    sharpened(monitor, strategy=SAMStrategy(rho=RHO, m=4))
    assert [len(record.scalars) for record in monitor.history] == [5] * 6


def test_scheduled_rho_is_that_of_the_step():
    monitor = SAMMonitor(every_n_train_steps=2)
    sharpened(monitor, strategy=SAMStrategy(rho=lambda step, lr: 0.01 * (step + 1)))
    assert [record.scalars["sam/rho"] for record in monitor.history] == pytest.approx([0.01, 0.03, 0.05])


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"rho": 0.0}, {0: "ρ is 0", 1: "ρ is 0", 2: "ρ is 0"}),
        ({"rho": RHO, "every_k": 2}, {1: "`every_k=2`"}),
        ({"rho": lambda step, lr: RHO * (step != 1)}, {1: "ρ = 0"}),
    ],
    ids=["none", "every_k", "scheduled"],
)
def test_a_step_that_was_not_perturbed_says_so_and_has_no_values(options, reasons, tmp_path):
    monitor = SAMMonitor(every_n_train_steps=1)
    sharpened(monitor, strategy=SAMStrategy(**options), limit_train_batches=3, logger=CSVLogger(tmp_path, "", ""))
    assert [record.step for record in monitor.history] == [0, 1, 2]
    for record in monitor.history:
        if record.step in reasons:
            assert reasons[record.step] in record.notes["no_values"]
            assert record.scalars == {}
        else:
            assert len(record.scalars) == 5
            assert "no_values" not in record.notes


class Overflows(Sharp):
    """Its loss overflows in one step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e30 if batch_idx == 2 else 1)


def test_an_overflow_is_no_perturbation():
    monitor = SAMMonitor(every_n_train_steps=1)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    sharpened(monitor, Overflows(), plugins=[plugin])
    assert plugin.scaler.get_scale() == 2**15
    without = [record.step for record in monitor.history if not record.scalars]
    assert without == [2]
    assert "not finite" in monitor.history[2].notes["no_values"]


def test_a_gradient_of_zero_has_no_angle():
    class Flat(Regression):
        def loss(self, batch):
            return 0 * super().loss(batch)

    monitor = SAMMonitor(every_n_train_steps=1)
    sharpened(monitor, Flat(), mini_batches())
    record = monitor.history[0]
    assert record.scalars["sam/sharpness_gap"] == record.scalars["sam/perturbation_norm"] == 0
    assert record.scalars["sam/gradient_cosine"] != record.scalars["sam/gradient_cosine"]
    assert record.to_json()["scalars"]["sam/gradient_cosine"] is None


class Players(pl.LightningModule):
    """Two optimizers by hand; the second one skips every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(4, 1), nn.Linear(4, 1)
        with torch.no_grad():
            self.other.weight.mul_(10)

    def training_step(self, batch, batch_idx):
        for number, (optimizer, net) in enumerate(zip(self.optimizers(), (self.one, self.other), strict=True)):
            if number > batch_idx % 2:
                continue

            def closure(optimizer=optimizer, net=net):
                optimizer.zero_grad()
                self.manual_backward((net(batch[0]) - batch[1]).square().mean())

            optimizer.step(closure)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 1e-3) for net in (self.one, self.other)]


def test_of_several_optimizers_the_last_that_was_perturbed_in_the_batch_counts():
    class Norms(pl.Callback):
        seen = ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen = (*self.seen, trainer.strategy.last_step)

    monitor, norms = SAMMonitor(every_n_train_steps=1), Norms()
    torch.manual_seed(3)
    sharpened([monitor, norms], Players(), mini_batches(n=32, batch_size=8))
    assert [step.step for step in norms.seen] == [0, 2, 3, 5]
    assert [record.step for record in monitor.history] == [0, 1, 2, 3]
    for record, step in zip(monitor.history, norms.seen, strict=True):
        assert record.scalars["sam/gradient_norm"] == step.gradient_norm


def test_a_batch_without_a_step_of_the_users_is_no_perturbation():
    class Rarely(Players):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2 == 0:
                super().training_step(batch, batch_idx)

    monitor = SAMMonitor(every_n_train_steps=1)
    sharpened(monitor, Rarely(), mini_batches(n=32, batch_size=8))
    assert [bool(record.scalars) for record in monitor.history] == [True, False, True, False]


@pytest.mark.parametrize("strategy", ["auto", "with_replacement"])
def test_without_sam_it_is_refused_before_the_first_step(strategy):
    module = plain()
    with pytest.raises(MisconfigurationException, match=r"Trainer\(strategy='sam'\)"):
        sharpened(SAMMonitor(), module, strategy=strategy)
    assert module.calls == 0


def test_a_test_after_the_fit_needs_no_sam():
    class Tested(Sharp):
        def test_step(self, batch, batch_idx):
            self.log("tested", 1.0)

    monitor, module = SAMMonitor(), Tested()
    sharpened(monitor, module)
    trainer = pl.Trainer(accelerator="cpu", callbacks=[monitor], logger=False, enable_progress_bar=False)
    assert trainer.test(module, loader(), verbose=False) == [{"tested": 1.0}]


def test_what_is_logged_by_default_on_request_and_for_other_callbacks(tmp_path):
    """One row for each point, with what other monitors measured at its step."""
    monitors = [
        SAMMonitor(every_n_train_steps=2, monitor=True),
        SAMMonitor(every_n_train_steps=3, name="late", also_log="rho"),
        HessianMonitor(1, 0, every_n_train_steps=2, pair=False, spectrum=False, probe=Probe(size=16)),
    ]
    trainer = sharpened(monitors, logger=CSVLogger(tmp_path, name="", version=""))
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    shown = {column for column in columns if column.startswith("sam")}
    three = ("sharpness_gap", "gradient_cosine", "perturbation_norm")
    assert shown == {f"sam/{key}" for key in three} | {f"sam_late/{key}" for key in (*three, "rho")}
    together = [int(row["step"]) for row in rows if row["sam/sharpness_gap"]]
    assert together == [int(row["step"]) for row in rows if row["hessian/top_1"]][:-1] == [0, 2, 4]
    assert [int(row["step"]) for row in rows if row["sam_late/rho"]] == [0, 3]
    assert {key for key in trainer.callback_metrics if key.startswith("sam")} == {f"sam/{key}" for key in three}


def test_a_trial_run_is_not_watched():
    monitor = SAMMonitor(every_n_train_steps=1)
    trainer = sharpened(monitor, fast_dev_run=True)
    assert monitor.history == []
    assert not trainer.strategy.observed


def kept(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


@pytest.mark.parametrize(("at", "often"), [(6, {"every_n_epochs": 1}), (8, {"every_n_train_steps": 1})], ids=str)
def test_a_resumed_run_has_the_curves_of_the_uninterrupted_one(tmp_path, at, often):
    """No gap, no duplicate; at a point, and behind one."""

    def trained(name, **options):
        monitor = SAMMonitor(every_n_train_steps=3)
        sharpened(
            [monitor, kept(tmp_path / name, **often)],
            Sharp(norm=False),
            enable_checkpointing=True,
            logger=CSVLogger(tmp_path / "logs" / name, name="", version="x"),
            **{"max_epochs": 3, **options},
        )
        return monitor

    whole = trained("whole")
    trained("first", max_steps=at)
    second = trained("second", ckpt_path=tmp_path / "first" / f"step={at}.ckpt")
    assert [record.step for record in second.history] == [record.step for record in whole.history]
    joined = read_records(tmp_path / "logs" / "second" / "x")
    assert [record.step for record in joined] == [0, 3, 6, 9, 12, 15]
    if at == 6:  # Lightning restarts the order of the data in the middle of an epoch, or repeats a step there
        assert [record.scalars for record in second.history] == [record.scalars for record in whole.history]


@pytest.mark.parametrize("options", [{}, {"m": 4}, {"perturbation": "global"}, {"every_k": 2}], ids=str)
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_on_two_ranks_the_values_are_means_over_both(tmp_path, options):
    class Saves(pl.Callback):
        """What the strategy says on each rank, where the monitor is due."""

        def __init__(self):
            self.values = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            step = trainer.strategy.last_step
            assert trainer.strategy.observed is False
            self.values.append([step.step, *(getattr(step, key) for key in KEYS)])

        def on_train_end(self, trainer, pl_module):
            everyone = trainer.strategy.all_gather(
                torch.tensor([[-1.0 if v is None else v for v in row] for row in self.values], dtype=torch.float64)
            )
            if trainer.is_global_zero:
                torch.save(everyone, tmp_path / "values.pt")

    monitor = SAMMonitor(every_n_train_steps=1)
    strategy = DDPSAMStrategy(rho=RHO, start_method="fork", timeout=timedelta(seconds=60), **options)
    sharpened([monitor, Saves()], strategy=strategy, devices=2, logger=CSVLogger(tmp_path, name="", version=""))
    ranks = torch.load(tmp_path / "values.pt", weights_only=True)
    assert not torch.equal(ranks[0], ranks[1])
    assert [record.step for record in monitor.history] == [0, 1, 2]
    for record, (step, *means) in zip(monitor.history, ranks.mean(0).tolist(), strict=True):
        assert bool(record.scalars) == (step == record.step)
        if record.scalars:
            assert list(record.scalars.values()) == pytest.approx(means, rel=1e-6)
            assert record.notes["ranks"] == 2


class SpoilsOneRank(Sharp):
    """Its loss is not finite in one batch of one rank."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1e30 if self.global_rank and batch_idx == 1 else 1)


@pytest.mark.ddp
@pytest.mark.chaos
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_a_rank_whose_step_is_not_perturbed_hangs_nobody(tmp_path):
    monitor = SAMMonitor(every_n_train_steps=1)
    strategy = DDPSAMStrategy(rho=RHO, start_method="fork", timeout=timedelta(seconds=60))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    module = SpoilsOneRank(norm=False, schedule=False)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = sharpened(monitor, module, strategy=strategy, devices=2, plugins=[plugin], logger=logger)
    assert trainer.state.finished
    assert [bool(record.scalars) for record in monitor.history] == [True, False, True]
