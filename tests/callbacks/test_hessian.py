"""HessianMonitor in whole fits, against numbers that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import ConvModule, NoisySamples, Regression, loader, regression_data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam

from lightning_dynamics import HessianMonitor, Probe

WHOLE = Probe(whole=True)


def exact_spectrum(n=24):
    x, _ = regression_data(n)
    return torch.linalg.eigvalsh(x.double().mT @ x.double() / n).flip(0).tolist()


def series(monitor, key):
    return [record.scalars[f"hessian/{key}"] for record in monitor.history if f"hessian/{key}" in record.scalars]


def steps(monitor):
    return [record.step for record in monitor.history]


def slow(**arguments):
    """A rate at which the weights hardly move and nothing diverges."""
    return Regression(lr=1e-3, **arguments)


@pytest.mark.parametrize("data", [full_batch(), mini_batches(), mini_batches(batch_size=7)])
def test_linear_regression_has_its_known_spectrum_threshold_and_ratio(data):
    monitor = HessianMonitor(top_k=3, bottom_k=1, every_n_train_steps=1, probe=WHOLE)
    fit(monitor, slow(), data)
    expected = exact_spectrum()
    for record in monitor.history:
        values = [record.scalars[f"hessian/top_{i}"] for i in (1, 2, 3)]
        assert values == pytest.approx(expected[:3], rel=1e-3)
        assert record.scalars["hessian/bottom_1"] == pytest.approx(expected[3], abs=1e-2 * expected[0])
        assert abs(values[0] - expected[0]) <= record.errors["hessian/top_1"]
        assert record.scalars["hessian/stability_threshold"] == pytest.approx(2000.0)
        assert record.scalars["hessian/edge_ratio"] == pytest.approx(expected[0] / 2000, rel=1e-3)


def test_loss_and_gradient_are_those_of_the_probe_at_the_weights_of_the_step():
    """x = t means θ_t: the loss that the user logs for the whole set at step t."""
    module = slow()
    seen = []
    module.on_train_batch_start = lambda batch, index: seen.append(float(module.loss(batch).detach()))
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, module)
    assert steps(monitor) == [0, 1, 2, 3]
    assert series(monitor, "probe_loss")[:3] == pytest.approx(seen, rel=1e-6)
    with torch.no_grad():
        assert series(monitor, "probe_loss")[3] == pytest.approx(float(module.loss(regression_data())), rel=1e-6)
    assert monitor.history[-1].final
    x, y = regression_data()
    gradient = x.mT @ (x @ module.net.weight.detach().mT - y) / 24
    assert series(monitor, "gradient_norm")[3] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_pair_is_the_mean_of_two_steps_and_knows_its_swing():
    """At a rate beyond the edge a quartic loss alternates; an even cadence alone would show one phase."""

    class Quartic(Regression):
        def __init__(self):
            super().__init__(nn.Linear(1, 1, bias=False), lr=0.9)
            nn.init.constant_(self.net.weight, 0.3)

        def loss(self, batch):
            w = self.net.weight.squeeze()
            return (w**2 - 1) ** 2 / 4

    single = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(single, Quartic(), max_epochs=20)
    pairs = HessianMonitor(1, 0, every_n_train_steps=4, probe=WHOLE)
    fit(pairs, Quartic(), max_epochs=20)
    values = series(single, "top_1")
    for record in pairs.history[:-1]:
        first, second = values[record.step], values[record.step + 1]
        assert record.scalars["hessian/top_1"] == pytest.approx((first + second) / 2, rel=1e-5)
        assert record.scalars["hessian/top_1_swing"] == pytest.approx(abs(first - second) / 2, rel=1e-4)
    assert "hessian/top_1_swing" not in pairs.history[-1].scalars


def test_consecutive_points_share_their_measurements():
    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE)
    fit(monitor, slow(), max_epochs=5)
    assert steps(monitor) == [0, 1, 2, 3, 4, 5]
    assert monitor._session._ledger.states["HessianMonitor"].count == 6


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        ({"every_n_train_steps": 4}, [0, 4, 8, 9]),
        ({"every_n_epochs": 2}, [0, 6, 9]),
        ({"log_spaced": True}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
    ],
)
def test_points_are_where_the_cadence_says_and_at_the_end(cadence, expected):
    monitor = HessianMonitor(1, 0, probe=WHOLE, pair=False, **cadence)
    fit(monitor, slow(), mini_batches())
    assert steps(monitor) == expected


def test_with_accumulation_there_is_one_point_per_step():
    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, slow(), mini_batches(n=32), accumulate_grad_batches=2, max_epochs=2)
    assert steps(monitor) == [0, 1, 2, 3, 4]
    assert [r.global_step for r in monitor.history] == [0, 1, 2, 3, 4]


def test_probe_batches_have_the_training_size_and_the_facts_stand_with_every_point():
    monitor = HessianMonitor(every_n_train_steps=2, probe=Probe(size=10))
    fit(monitor, slow(), mini_batches(n=40, shuffle=True))
    for record in monitor.history:
        assert record.notes["probe"] == {
            "kind": "a random subset of the training set",
            "n": 16,
            "N": 40,
            "fraction": 0.4,
        }


def test_a_subset_estimates_its_own_bias():
    monitor = HessianMonitor(1, 0, every_n_train_steps=5, probe=Probe(size=32), pair=False)
    fit(monitor, slow(), mini_batches(n=256, batch_size=8), max_epochs=1)
    (bias,) = series(monitor, "probe_bias")
    assert bias > 0  # the mean of a convex function over halves
    whole = HessianMonitor(1, 0, every_n_train_steps=5, probe=WHOLE, pair=False)
    fit(whole, slow(), mini_batches(n=256, batch_size=8), max_epochs=1)
    assert series(whole, "probe_bias") == []


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (lambda p: SGD(p, 1e-3, momentum=0.9), 3800.0),
        (lambda p: SGD(p, 1e-3, momentum=0.9, nesterov=True), 3.8 / 2.8e-3),
        (lambda p: SGD(p, 1e-3, weight_decay=0.5), 1999.5),
    ],
)
def test_the_threshold_is_that_of_the_optimizer(optimizer, threshold):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    fit(monitor, Regression(optimizer=optimizer))
    assert series(monitor, "stability_threshold")[0] == pytest.approx(threshold)


def test_parameter_groups_have_a_ratio_but_no_threshold():
    """Against the generalized eigenvalue problem, with the optimizer's own state."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))

    def groups(parameters):
        decay = [p for p in net.parameters() if p.dim() > 1]
        plain = [p for p in net.parameters() if p.dim() < 2]
        return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3)

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    module = Regression(net, optimizer=groups)
    trainer = fit(monitor, module)
    assert series(monitor, "stability_threshold") == []
    assert len(series(monitor, "edge_ratio")) == 3  # none before Adam's first step
    from lightning_dynamics.metrics import stability_rule

    names = dict(module.named_parameters())
    x, y = regression_data()

    def loss(*values):
        called = torch.func.functional_call(net, dict(zip([n[4:] for n in names], values, strict=True)), x)
        return (called - y).square().sum(1).mean() / 2

    blocks = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in names.values()))
    sizes = [p.numel() for p in names.values()]
    dense = torch.cat(
        [
            torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
            for row, n in zip(blocks, sizes, strict=True)
        ]
    ).double()
    rule = stability_rule(trainer.optimizers, names)
    scale, shift = rule.diagonals({n: p.shape for n, p in names.items()}, torch.empty(0, dtype=torch.float64))
    exact = float(torch.linalg.eigvalsh(scale[:, None] * (dense + torch.diag(shift)) * scale)[-1]) / 2
    assert series(monitor, "edge_ratio")[-1] == pytest.approx(exact, rel=2e-3)


def test_parameters_in_no_optimizer_do_not_move_the_edge():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    module = Regression(net, optimizer=lambda _: SGD(net[1].parameters(), 1e-3))
    both = HessianMonitor(every_n_train_steps=1, probe=WHOLE, name="both")
    head = HessianMonitor(every_n_train_steps=1, probe=WHOLE, parameters=r"net\.1\..*", name="head")
    fit([both, head], module)
    one = [r.scalars["hessian_both/edge_ratio"] for r in both.history]
    other = [r.scalars["hessian_head/edge_ratio"] for r in head.history]
    assert one == pytest.approx(other, rel=2e-3)
    assert all("hessian_both/stability_threshold" not in r.scalars for r in both.history)
    assert all("hessian_head/stability_threshold" in r.scalars for r in head.history)


class OwnSGD(SGD):
    pass


@pytest.mark.parametrize("kind", [NAdam, OwnSGD])
def test_an_unknown_optimizer_has_no_ratio_and_it_is_said_once(kind, caplog):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    with caplog.at_level("INFO"):
        fit(monitor, Regression(optimizer=lambda p: kind(p, lr=1e-3)))
    assert series(monitor, "edge_ratio") == []
    assert len(series(monitor, "top_1")) == 4
    said = [r.message for r in caplog.records if "shows no stability threshold" in r.message]
    assert said == [
        f"HessianMonitor shows no stability threshold: {kind.__name__} is not an optimizer whose edge is known."
    ]


def test_a_rate_of_zero_has_no_ratio_and_nothing_is_said(caplog):
    def warm_up(parameters):
        return SGD(parameters, 0.0)

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    with caplog.at_level("INFO"):
        fit(monitor, Regression(optimizer=warm_up))
    assert series(monitor, "edge_ratio") == []
    assert not any("threshold" in r.message for r in caplog.records)


def test_the_threshold_follows_the_schedule():
    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), 1e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, Scheduled())
    assert series(monitor, "stability_threshold") == pytest.approx([2000.0, 4000.0, 6000.0, 8000.0])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_logged_with_the_ratio_and_marked(algorithm):
    factors = []

    class Watched(Regression):
        def on_before_optimizer_step(self, optimizer):
            self.before = self.net.weight.grad.norm()

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            factors.append(float(self.net.weight.grad.norm() / self.before))

    monitor = HessianMonitor(every_n_train_steps=2, probe=WHOLE, pair=False)
    fit(monitor, Watched(lr=1e-3), gradient_clip_val=0.5, gradient_clip_algorithm=algorithm, max_epochs=6)
    assert "hessian/clip_factor" not in monitor.history[0].scalars
    for record in monitor.history[1:]:
        since = factors[record.step - 2 : record.step]
        assert record.scalars["hessian/clip_factor"] == pytest.approx(np.mean(since), rel=1e-4)
        assert record.scalars["hessian/clipped_share"] == 1.0
        assert "unclipped" in record.notes["clipping"]
    loose = HessianMonitor(every_n_train_steps=2, probe=WHOLE, pair=False)
    fit(loose, slow(), gradient_clip_val=1e6, max_epochs=4)
    assert loose.history[-1].scalars["hessian/clipped_share"] == 0.0
    assert loose.history[-1].scalars["hessian/clip_factor"] == 1.0


def test_other_callbacks_can_monitor_the_keys(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, monitor=True, pair=False)
    saver = ModelCheckpoint(tmp_path, monitor="hessian/edge_ratio", mode="max", filename="{hessian/edge_ratio:.4f}")
    stopper = EarlyStopping("hessian/top_1", patience=2, mode="min")
    trainer = fit([monitor, saver, stopper], slow(), max_epochs=50, enable_checkpointing=True)
    assert trainer.current_epoch < 10  # a constant sharpness stops
    assert float(saver.best_model_score) == pytest.approx(exact_spectrum()[0] / 2000, rel=1e-3)


def test_without_being_asked_nothing_is_exposed():
    trainer = fit(HessianMonitor(every_n_train_steps=1, probe=WHOLE))
    assert not any(key.startswith("hessian") for key in trainer.callback_metrics)


def test_two_monitors_share_one_evaluation(monkeypatch):
    from lightning_dynamics.callbacks import measurements

    opened = []
    original = measurements.measure_jointly
    monkeypatch.setattr(measurements, "measure_jointly", lambda *a, **k: opened.append(a[1]) or original(*a, **k))
    first = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False)
    second = HessianMonitor(2, 1, every_n_train_steps=1, probe=WHOLE, pair=False, name="more")
    fit([first, second], slow())
    assert opened == [1, 2, 2, 2, 2, 2]  # the preflight, four points for both, and once in double precision
    assert series(first, "top_1") == pytest.approx([r.scalars["hessian_more/top_1"] for r in second.history], rel=1e-3)


def test_a_module_may_return_none_or_a_dict_or_take_what_it_likes():
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if len(batch[0]) == 4 else {"loss": self.loss(batch), "other": 1}

    class OnlyBatch(Regression):
        def training_step(self, batch):
            return self.loss(batch)

    class Pulls(Regression):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    for module in (OnlyBatch(lr=1e-3), Pulls(lr=1e-3)):
        monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
        fit(monitor, module)
        assert series(monitor, "top_1") == pytest.approx([exact_spectrum()[0]] * 4, rel=1e-3)
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(monitor, Skips(lr=1e-3), mini_batches(batch_size=10))
    x, _ = regression_data()
    expected = float(torch.linalg.eigvalsh(x[:20].mT @ x[:20] / 20)[-1])
    assert series(monitor, "top_1")[0] == pytest.approx(expected, rel=1e-3)


def test_a_step_that_pulls_batches_can_be_probed_on_passing_ones():
    class Pulls(Regression):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    monitor = HessianMonitor(every_n_train_steps=1, probe=Probe(first_batches=2), pair=False)
    fit(monitor, Pulls(lr=1e-3), mini_batches())
    assert steps(monitor) == list(range(10))
    x, _ = regression_data()
    expected = float(torch.linalg.eigvalsh(x[:16].mT @ x[:16] / 16)[-1])
    assert series(monitor, "top_1") == pytest.approx([expected] * 10, rel=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_points_that_were_due_before_the_probe_was_complete_are_taken_at_their_weights(mode):
    """Weights and, in evaluation mode, running statistics of each step, after the fact as in time."""
    module = Regression(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)), lr=0.05)
    late = HessianMonitor(every_n_train_steps=1, probe=Probe(first_batches=3), mode=mode, name="late")
    in_time = HessianMonitor(every_n_train_steps=1, probe=Probe(dataloader=list(mini_batches())), mode=mode)
    fit([late, in_time], module, mini_batches(), max_epochs=2)
    assert steps(late) == steps(in_time) == list(range(7))
    for key in ("top_1", "edge_ratio", "probe_loss", "gradient_norm"):
        values = [r.scalars[f"hessian_late/{key}"] for r in late.history]
        assert values == pytest.approx(series(in_time, key), rel=2e-3 if key in ("top_1", "edge_ratio") else 1e-6)
        assert len(set(values)) == 7


def test_training_shorter_than_the_probe_is_measured_on_what_there_was():
    monitor = HessianMonitor(every_n_train_steps=1, probe=Probe(first_batches=50), pair=False)
    fit(monitor, slow(), mini_batches(), max_epochs=1)
    assert steps(monitor) == [0, 1, 2, 3]
    assert series(monitor, "top_1") == pytest.approx([exact_spectrum()[0]] * 4, rel=1e-3)


def test_manual_optimization_with_one_loss():
    class Manual(Regression):
        automatic_optimization = False

        def __init__(self):
            super().__init__(lr=1e-3)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    fit(monitor, Manual())
    assert series(monitor, "top_1") == pytest.approx([exact_spectrum()[0]] * 4, rel=1e-3)


def test_a_loss_of_the_users_instead_of_the_steps():
    class Two(Regression):
        def half(self, batch):
            return 0.5 * self.loss(batch)

    by_name = HessianMonitor(every_n_train_steps=1, probe=WHOLE, loss_fn="half")
    fit(by_name, Two(lr=1e-3))
    by_function = HessianMonitor(every_n_train_steps=1, probe=WHOLE, loss_fn=lambda m, b: 0.5 * m.loss(b))
    fit(by_function, Two(lr=1e-3))
    expected = [exact_spectrum()[0] / 2] * 4
    assert series(by_name, "top_1") == pytest.approx(expected, rel=1e-3)
    assert series(by_function, "top_1") == pytest.approx(expected, rel=1e-3)


def test_batches_can_weigh_something_else_than_their_samples():
    """Token means: a batch counts by the number of terms of its loss."""

    class Tokens(Regression):
        def loss(self, batch):
            x, y = batch
            valid = torch.arange(len(x)) < len(x) // 2
            return ((self.net(x) - y).square().sum(1) * valid).sum() / valid.sum() / 2

    whole = HessianMonitor(every_n_train_steps=1, probe=WHOLE, weight_fn=lambda batch: len(batch[0]) // 2)
    fit(whole, Tokens(lr=1e-3), mini_batches(n=24, batch_size=10))
    x, _ = regression_data()
    valid = torch.cat([x[0:5], x[10:15], x[20:22]])
    expected = float(torch.linalg.eigvalsh(valid.mT @ valid / 12)[-1])
    assert series(whole, "top_1")[0] == pytest.approx(expected, rel=1e-3)


def test_evaluation_mode_is_another_function():
    module = ConvModule()
    train = HessianMonitor(every_n_train_steps=1, probe=Probe(size=24), name="train")
    evaluate = HessianMonitor(every_n_train_steps=1, probe=Probe(size=24), mode="eval", name="eval")
    fit([train, evaluate], module, loader(NoisySamples()), max_epochs=1)
    assert train.history[0].scalars["hessian_train/top_1"] != evaluate.history[0].scalars["hessian_eval/top_1"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_narrow_runs_are_measured_in_float32(precision):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    fit(monitor, slow(), precision=precision)
    # bf16-true rounds the data, not the arithmetic
    relative = 1e-3 if precision == "bf16-mixed" else 1e-2
    assert series(monitor, "top_1") == pytest.approx([exact_spectrum()[0]] * 4, rel=relative)
    assert all(r.notes["converged"] for r in monitor.history)


def test_double_runs_are_measured_in_double():
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, tolerance=1e-9)
    fit(monitor, slow(), precision="64-true")
    assert series(monitor, "top_1") == pytest.approx([exact_spectrum()[0]] * 4, rel=1e-7)


def test_the_runs_own_precision_on_request():
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, precision="same")
    fit(monitor, slow(), precision="bf16-mixed")
    assert series(monitor, "top_1")[0] == pytest.approx(exact_spectrum()[0], rel=0.1)


def test_a_trial_run_measures_once_and_writes_nothing(tmp_path):
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    fit(monitor, slow(), fast_dev_run=2, default_root_dir=tmp_path)
    assert monitor.history == []
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_a_default_cadence_is_found_by_counting_gradients(caplog):
    monitor = HessianMonitor(probe=Probe(size=16))
    with caplog.at_level("INFO"):
        fit(monitor, slow(), mini_batches(n=64, batch_size=8), max_epochs=1)
    every = monitor._session._ledger.states["HessianMonitor"].every
    assert every == 1000
    assert any(f"measures every {every} steps" in r.message for r in caplog.records)
    assert steps(monitor) == [0, 8]


def test_no_batches_means_no_measurement():
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE)
    fit(monitor, slow(), limit_train_batches=0)
    assert monitor.history == []


def test_a_second_fit_goes_on():
    monitor = HessianMonitor(1, 0, every_n_train_steps=2, probe=WHOLE, pair=False)
    module = slow()
    trainer = fit(monitor, module, max_epochs=3)
    assert steps(monitor) == [0, 2, 3]
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, full_batch())
    assert steps(monitor) == [0, 2, 4, 5]  # the end of the first fit was not the end


def test_averaged_weights_are_named():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    monitor = HessianMonitor(1, 0, every_n_train_steps=2, probe=WHOLE, pair=False)
    fit([StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1), monitor], slow(), max_epochs=4)
    assert monitor.history[-1].notes["weights"] == "averaged by StochasticWeightAveraging"
    assert "weights" not in monitor.history[0].notes


def test_frozen_parameters_are_left_out_and_unfreezing_starts_cold():
    class Unfreezes(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)), lr=1e-3)
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                self.net[0].requires_grad_(True)

    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, Unfreezes(), max_epochs=4)
    values = series(monitor, "top_1")
    assert len(values) == 5
    assert values[3] > 1.01 * values[1]


def test_adam_enters_the_ratio_after_its_first_step():
    monitor = HessianMonitor(every_n_train_steps=1, probe=WHOLE, pair=False)
    fit(monitor, Regression(optimizer=lambda p: Adam(p, 1e-3)))
    assert ["hessian/edge_ratio" in r.scalars for r in monitor.history] == [False, True, True, True]
