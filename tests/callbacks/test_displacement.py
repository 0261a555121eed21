"""The displacement monitor in whole fits, against trajectories that a callback has copied."""

from __future__ import annotations

import itertools
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Classification, Regression, class_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_dynamics import DisplacementMonitor, HessianMonitor, Probe, Reference, Spectrum
from lightning_dynamics.callbacks.optimization import heavy_ball, sampling_order
from lightning_dynamics.metrics import Displacement, HeavyBall, Settling

EACH = {"every_n_train_steps": 1}


class Copies(pl.Callback):
    """All weights at the start of every step, and after the last one."""

    def __init__(self):
        self.weights = []
        self.gradients = []

    def copy(self, module):
        self.weights.append({n: p.detach().double().clone() for n, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.copy(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))

    def on_train_end(self, trainer, pl_module):
        self.copy(pl_module)

    def flat(self, layer=""):
        return [torch.cat([w.flatten() for n, w in each.items() if n.startswith(layer)]) for each in self.weights]


def network(lr=0.05, **options):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return Regression(net, lr, lambda parameters: torch.optim.SGD(parameters, lr, **options))


def followed(monitor, module=None, data=None, **options):
    copies = Copies()
    fit([copies, monitor], network() if module is None else module, mini_batches() if data is None else data, **options)
    return copies


def distances(points):
    return [float((point - points[0]).norm()) for point in points]


def steps(points):
    return [float((now - before).norm()) for before, now in itertools.pairwise(points)]


def bowl(n=64, scale=(2.0, 1.0, 0.5, 0.2), seed=0):
    """Data of a linear regression with noise, whose Hessian has about the squares of these eigenvalues."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw) * torch.tensor(scale)
    return TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=draw))


class Led(Regression):
    """Trained by nobody: its weights are set after every step."""

    def __init__(self, way, size=400):
        super().__init__(nn.Linear(size, 1, bias=False), lr=0.0)
        self.way = way
        self.loss_now = lambda t: 1 + math.exp(-t / 5)

    def training_step(self, batch, batch_idx):
        return (self.net.weight * 0).sum() + self.loss_now(self.global_step)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.copy_(self.way(self.global_step).view_as(self.net.weight))


def one_batch():
    return DataLoader(TensorDataset(torch.zeros(1, 1)))


# The numbers of every step


@pytest.mark.parametrize("every", [1, 4])
def test_distances_and_paths_are_those_of_the_copied_trajectory(every):
    monitor = DisplacementMonitor(every_n_train_steps=every)
    copies = followed(monitor)
    for layer, key in (("", ""), ("net.0", "/net_0"), ("net.2", "/net_2")):
        points = copies.flat(layer)
        away, lengths = distances(points), steps(points)
        last = 0
        for record in monitor.history:
            values, t = record.scalars, record.step
            assert values[f"displacement/from_init{key}"] == pytest.approx(away[t], rel=1e-5)
            assert values[f"displacement/path_length{key}"] == pytest.approx(sum(lengths[:t]), rel=1e-5)
            if t:
                assert values[f"displacement/relative{key}"] == pytest.approx(
                    away[t] / float(points[0].norm()), rel=1e-5
                )
                mean = sum(length**2 for length in lengths[last:t]) / (t - last)
                assert values[f"displacement/step{key}"] == pytest.approx(math.sqrt(mean), rel=1e-5)
                last = t
    assert [record.step for record in monitor.history] == [*range(0, 9, every), 9]
    assert monitor.history[-1].final


def test_what_the_module_does_to_its_weights_after_the_step_counts():
    class Clamps(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                self.net.weight.clamp_(-0.02, 0.02)

    monitor = DisplacementMonitor(**EACH)
    copies = followed(monitor, Clamps(lr=0.5))
    for record in monitor.history:
        path = sum(steps(copies.flat())[: record.step])
        assert record.scalars["displacement/path_length"] == pytest.approx(path, rel=1e-5)


def test_accumulated_batches_are_one_step():
    monitor = DisplacementMonitor(**EACH)
    copies = followed(monitor, data=mini_batches(24, 4), accumulate_grad_batches=3)
    points = copies.flat()
    assert len(points) == 7
    assert [r.step for r in monitor.history] == list(range(7))
    assert monitor.history[-1].scalars["displacement/path_length"] == pytest.approx(sum(steps(points)), rel=1e-5)


@pytest.mark.parametrize("memory", ["device", "host"])
def test_copies_are_exact_and_have_no_error(memory):
    monitor = DisplacementMonitor(memory=memory, dimensions=7, **EACH)
    copies = followed(monitor)
    for record in monitor.history:
        assert record.scalars["displacement/from_init"] == pytest.approx(
            distances(copies.flat())[record.step], rel=1e-5
        )
        assert not record.errors


def test_projections_come_near_with_the_stated_error():
    monitor = DisplacementMonitor(dimensions=499, **EACH)
    torch.manual_seed(0)
    wide = Regression(nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 1)), lr=0.01)
    copies = followed(monitor, wide)
    record = monitor.history[-1]
    for key, exact in (("from_init", distances(copies.flat())[-1]), ("path_length", sum(steps(copies.flat())))):
        error = record.errors[f"displacement/{key}"]
        assert error == pytest.approx(exact / math.sqrt(2 * 499), rel=0.2)
        assert abs(record.scalars[f"displacement/{key}"] - exact) < 3 * error


def test_weights_in_half_precision_are_summed_in_single():
    monitor = DisplacementMonitor(memory="device", **EACH)
    copies = followed(monitor, network(lr=0.5), precision="bf16-true")
    for record in monitor.history[1:]:
        assert record.scalars["displacement/from_init"] == pytest.approx(
            distances(copies.flat())[record.step], rel=1e-5
        )


def test_cosines_are_those_of_the_trajectory():
    monitor = DisplacementMonitor(every_n_train_steps=3)
    points = followed(monitor, network(lr=0.3)).flat()
    moves = [now - before for before, now in itertools.pairwise(points)]
    cosine = nn.functional.cosine_similarity
    for record in monitor.history[1:3]:
        t = record.step
        pairs = [(i - 1, i) for i in range(t - 3, t) if i]
        mean = sum(float(cosine(moves[i], moves[j], dim=0)) for i, j in pairs) / len(pairs)
        assert record.scalars["displacement/step_cosine"] == pytest.approx(mean, abs=1e-4)
        back = float(cosine(moves[t - 1], points[t - 1] - points[0], dim=0))
        assert record.scalars["displacement/start_cosine"] == pytest.approx(back, abs=1e-4)


def test_the_default_cadence_is_dense_at_first_and_costs_nothing():
    monitor = DisplacementMonitor()
    fit(monitor, network(), mini_batches(24, 8), max_steps=210, max_epochs=-1)
    assert [r.step for r in monitor.history][:9] == [0, 1, 2, 3, 4, 5, 6, 8, 10]
    assert [r.step for r in monitor.history][-4:] == [126, 158, 200, 210]


def test_averaged_weights_are_no_step():
    monitor = DisplacementMonitor(**EACH)
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    copies = Copies()
    fit([swa, copies, monitor], network(), mini_batches(), max_epochs=4)
    last = monitor.history[-1]
    assert "averaged" in last.notes["weights"]
    points = copies.flat()
    assert last.scalars["displacement/from_init"] == pytest.approx(distances(points)[-1], rel=1e-5)
    path = [r.scalars["displacement/path_length"] for r in monitor.history if "weights" not in r.notes]
    assert last.scalars["displacement/path_length"] == pytest.approx(path[-1], rel=0.2)
    assert last.scalars["displacement/path_length"] == pytest.approx(sum(steps(points[:-1])[: len(path)]), rel=0.2)


def test_layers_that_are_frozen_at_first_have_not_moved_before():
    class Thaws(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    class Head(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), 0.05)

    monitor = DisplacementMonitor(**EACH)
    module = Head(network().net)
    before = module.net[0].weight.detach().clone()
    fit([Thaws(), monitor], module, mini_batches())
    early, last = monitor.history[2].scalars, monitor.history[-1].scalars
    assert "displacement/from_init/net_0" not in early
    assert last["displacement/from_init/net_0"] >= float((module.net[0].weight.detach() - before).norm()) * (1 - 1e-6)
    assert last["displacement/from_init"] > last["displacement/from_init/net_0"]


def test_only_the_parameters_asked_for_are_followed():
    monitor = DisplacementMonitor(parameters=r"net\.2\..*", **EACH)
    copies = followed(monitor)
    assert monitor.history[-1].scalars["displacement/from_init"] == pytest.approx(distances(copies.flat("net.2"))[-1])
    assert not any("net_0" in key for key in monitor.history[-1].scalars)


def test_layers_can_be_left_out_of_the_record():
    monitor = DisplacementMonitor(layers=False, conserved=False, **EACH)
    followed(monitor)
    assert all(key.count("/") == 1 for key in monitor.history[-1].scalars)


# References


@pytest.mark.parametrize(("reference", "at"), [(Reference(step=4), 4), (Reference(epoch=2), 6), (Reference(step=0), 0)])
def test_a_declared_reference_is_where_it_was_declared(reference, at):
    monitor = DisplacementMonitor(reference=reference, **EACH)
    points = followed(monitor).flat()
    for record in monitor.history:
        expected = (
            None if record.step < at else pytest.approx(float((points[record.step] - points[at]).norm()), rel=1e-5)
        )
        assert record.scalars.get("displacement/from_reference") == expected


def test_a_point_is_measured_at_the_reference_although_none_is_due():
    monitor = DisplacementMonitor(reference=Reference(step=4), every_n_train_steps=100)
    followed(monitor)
    assert [r.step for r in monitor.history] == [0, 4, 9]


@pytest.mark.parametrize("kind", ["lightning", "plain"])
def test_a_checkpoint_file_can_be_the_reference(tmp_path, kind):
    module = network()
    other = {name: each + 0.1 for name, each in module.state_dict().items()}
    torch.save({"state_dict": other, "epoch": 3} if kind == "lightning" else other, tmp_path / "other.ckpt")
    monitor = DisplacementMonitor(reference=Reference(checkpoint=tmp_path / "other.ckpt"), **EACH)
    points = followed(monitor, module).flat()
    there = torch.cat([each.double().flatten() for each in other.values()])
    for record in monitor.history:
        expected = float((points[record.step] - there).norm())
        assert record.scalars["displacement/from_reference"] == pytest.approx(expected, rel=1e-5)


def test_a_reference_of_another_architecture_is_refused_with_the_names_that_differ(tmp_path):
    other = {name.replace("net.2", "net.4"): each for name, each in network().state_dict().items()}
    other["net.0.weight"] = torch.zeros(5, 3)
    torch.save(other, tmp_path / "other.ckpt")
    monitor = DisplacementMonitor(reference=Reference(checkpoint=tmp_path / "other.ckpt"))
    with pytest.raises(
        MisconfigurationException, match=r"`net\.2\.weight`.*`net\.0\.weight` \(5, 3\) instead of \(5, 4\)"
    ):
        followed(monitor)


def test_a_reference_that_would_have_to_be_unpickled_is_refused(tmp_path):
    torch.save({"state_dict": network().net}, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match="cannot be read"):
        followed(DisplacementMonitor(reference=Reference(checkpoint=tmp_path / "other.ckpt")))


def test_the_reference_is_found_where_the_loss_has_settled():
    monitor = DisplacementMonitor(every_n_train_steps=50)
    module = Led(lambda t: torch.full((400,), float(t)))
    module.loss_now = lambda t: 1 + math.exp(-t / 80)
    fit(monitor, module, one_batch(), max_steps=1_200, max_epochs=-1)
    found = {r.notes["reference"]["step"] for r in monitor.history if "reference" in r.notes}
    (step,) = found
    # three quarters of the way e^(-t/80) must have come within one hundredth of its end
    assert 300 <= step <= 900
    assert all(r.scalars.get("displacement/exponent") is None for r in monitor.history if r.step <= step)


def test_a_loss_that_still_falls_gives_no_reference():
    monitor = DisplacementMonitor(every_n_train_steps=50)
    module = Led(lambda t: torch.full((400,), float(t)))
    module.loss_now = lambda t: 10 - t / 100
    fit(monitor, module, one_batch(), max_steps=900, max_epochs=-1)
    assert all("reference" not in r.notes for r in monitor.history)


def test_the_reference_is_moved_every_so_many_steps():
    monitor = DisplacementMonitor(reference=Reference(every_n_train_steps=200), every_n_train_steps=50)
    module = Led(lambda t: torch.full((400,), float(t)))
    fit(monitor, module, one_batch(), max_steps=900, max_epochs=-1)
    begun = sorted({r.notes["reference"]["step"] for r in monitor.history if "reference" in r.notes})
    assert begun == list(range(begun[0], 901, 200))
    for record in monitor.history:
        if "reference" in record.notes:
            away = record.step - record.notes["reference"]["step"]
            assert record.scalars["displacement/from_reference"] == pytest.approx(20 * away, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"step": 3, "epoch": 1}, {"step": -1}, {"epoch": 1.5}, {"checkpoint": 3}, {"every_n_train_steps": 0}],
)
def test_a_reference_that_makes_no_sense_is_refused(options):
    with pytest.raises(MisconfigurationException):
        Reference(**options)


# Diffusion


def exponents(monitor):
    return [
        (r.scalars["displacement/exponent"], r.errors.get("displacement/exponent"))
        for r in monitor.history
        if "displacement/exponent" in r.scalars
    ]


def led(way, n=600, **options):
    monitor = DisplacementMonitor(
        reference=Reference(step=0), every_n_train_steps=100, layers=False, conserved=False, **options
    )
    fit(monitor, Led(way), one_batch(), max_steps=n, max_epochs=-1)
    return monitor


def test_a_straight_line_has_exponent_two_and_straightness_one():
    monitor = led(lambda t: t * torch.linspace(-1, 1, 400))
    assert exponents(monitor)[-1][0] == pytest.approx(2, abs=1e-3)
    assert monitor.history[-1].scalars["displacement/straightness"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("c", [0.5, 1.0, 1.4])
def test_a_power_law_has_its_own_exponent(c):
    start = led(lambda t: t ** (c / 2) * torch.linspace(-1, 1, 400) if t else torch.zeros(400))
    # the first weights are those of the initialization, which is small against where the way leads
    assert exponents(start)[-1][0] == pytest.approx(c, abs=0.02)


def test_a_random_walk_has_exponent_one_within_its_error():
    draw = torch.Generator().manual_seed(0)
    place = [torch.zeros(400)]

    def walk(t):
        place[0] = place[0] + torch.randn(400, generator=draw)
        return place[0]

    monitor = led(walk)
    value, error = exponents(monitor)[-1]
    assert 0 < error < 0.2
    assert abs(value - 1) < 3 * error
    last = monitor.history[-1]
    assert last.scalars["displacement/step_cosine"] == pytest.approx(0, abs=0.05)
    assert last.notes["exponent"]["window"] == [56.2, 562.0]
    assert last.scalars["displacement/exponent_drift"] == pytest.approx(value, abs=0.2)
    assert abs(last.scalars["displacement/aging"]) < 3 * last.errors["displacement/aging"] + 0.2
    waits, lags = (last.arrays[f"displacement/two_time_{name}"] for name in ("waits", "lags"))
    assert len(last.arrays["displacement/two_time_squares"]) == len(waits) * len(lags)
    assert len(last.arrays["displacement/diffusion_lags"]) == len(last.arrays["displacement/diffusion_squares"])


def test_the_window_can_be_declared():
    monitor = led(lambda t: torch.full((400,), float(t if t < 500 else 500)), window=(20, 400))
    last = [r for r in monitor.history if "exponent" in r.notes][-1]
    assert last.notes["exponent"]["window"] == [20.0, 400.0]
    assert last.scalars["displacement/exponent"] == pytest.approx(2, abs=0.02)


def test_a_change_of_the_learning_rate_in_the_window_is_said():
    class Scheduled(Led):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1e-9)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [300])
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    monitor = DisplacementMonitor(reference=Reference(step=0), every_n_train_steps=100)
    fit(monitor, Scheduled(lambda t: torch.full((400,), float(t))), one_batch(), max_steps=800, max_epochs=-1)
    said = {r.step: " ".join(r.notes["exponent"]["remarks"]) for r in monitor.history if "exponent" in r.notes}
    assert "learning rate" not in said[200]
    assert "first at step 300" in said[400]


def test_no_exponent_before_the_reference():
    monitor = DisplacementMonitor(reference=Reference(step=1_000), every_n_train_steps=100)
    fit(monitor, Led(lambda t: torch.full((400,), float(t))), one_batch(), max_steps=900, max_epochs=-1)
    assert not exponents(monitor)
    assert len(monitor.history[-1].arrays["displacement/from_init_lags"]) > 30


def test_no_exponent_where_training_does_not_start_from_the_reference(tmp_path):
    torch.save({"net.weight": torch.full((1, 400), 77.0)}, tmp_path / "other.ckpt")
    monitor = DisplacementMonitor(reference=Reference(checkpoint=tmp_path / "other.ckpt"), every_n_train_steps=100)
    fit(monitor, Led(lambda t: torch.full((400,), float(t))), one_batch(), max_steps=300, max_epochs=-1)
    assert not exponents(monitor)
    assert "does not start" in monitor.history[-1].notes["no_exponent"]


def test_the_hessian_of_a_monitor_beside_it_gives_the_null_of_a_bowl():
    data = DataLoader(bowl(scale=(2.0, 1.5, 1.2, 1.0)), batch_size=8, shuffle=True)
    monitor = DisplacementMonitor(reference=Reference(step=200), every_n_train_steps=100, conserved=False)
    hessian = HessianMonitor(
        1, 1, every_n_train_steps=400, probe=Probe(whole=True), spectrum=Spectrum(400, num_vectors=2, num_steps=3)
    )
    fit([hessian, monitor], Regression(lr=0.05), data, max_steps=900, max_epochs=-1)
    last = [r for r in monitor.history if "displacement/exponent_ou" in r.scalars][-1]
    # stationary: neither moves away any more
    assert abs(last.scalars["displacement/exponent"]) < 3 * last.errors["displacement/exponent"]
    assert last.scalars["displacement/exponent_ou"] == pytest.approx(0, abs=0.05)
    assert 0.2 < last.notes["exponent"]["ou"]["amplitude"] < 5
    assert len(last.arrays["displacement/ou_squares"]) == len(last.arrays["displacement/diffusion_lags"])


def test_without_a_hessian_it_says_what_is_missing():
    monitor = DisplacementMonitor(reference=Reference(step=0), every_n_train_steps=100)
    fit(monitor, Regression(lr=0.01), DataLoader(bowl(), batch_size=8, shuffle=True), max_steps=200, max_epochs=-1)
    (said,) = {r.notes["exponent"]["no_ou"] for r in monitor.history if "exponent" in r.notes}
    assert "HessianMonitor" in said


# The optimizer and the order of the batches


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 8, "shuffle": True}, ("reshuffled", 3)),
        ({"batch_size": 8}, (None, 3)),
        ({"batch_size": 24, "shuffle": True}, (None, 1)),
    ],
)
def test_the_order_of_the_batches_is_read_off_the_loader(options, expected):
    trainer = fit([], data=DataLoader(full_batch().dataset, **options))
    assert sampling_order(trainer) == expected


def test_drawing_with_replacement_is_recognized():
    data = full_batch().dataset
    loader = DataLoader(data, batch_size=8, sampler=RandomSampler(data, replacement=True))
    assert heavy_ball(fit([], network(lr=0.1, momentum=0.5, weight_decay=0.01), loader)) == (HeavyBall(0.1, 0.5), 0.01)


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        (lambda: network(momentum=0.9, nesterov=True), {}, "Nesterov"),
        (lambda: network(), {"gradient_clip_val": 1.0}, "clipped"),
        (lambda: Regression(optimizer=torch.optim.Adam), {}, "Adam"),
    ],
)
def test_where_there_is_no_theory_the_reason_is_given(module, options, reason):
    trainer = fit([], module(), mini_batches(shuffle=True), **options)
    assert reason in heavy_ball(trainer)[0]


# Phase space


def test_positions_are_those_along_the_eigenvectors_of_the_hessian():
    data = bowl()
    matrix = data.tensors[0].T @ data.tensors[0] / len(data)
    values, vectors = torch.linalg.eigh(matrix.double())
    monitor = DisplacementMonitor(
        reference=Reference(step=20), phase_space=1, probe=Probe(whole=True), every_n_train_steps=50
    )
    module = Regression(lr=0.05, optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.5))
    copies = Copies()
    fit([copies, monitor], module, DataLoader(data, batch_size=8, shuffle=True), max_steps=300, max_epochs=-1)
    last = [r for r in monitor.history if "displacement/q_top_1" in r.arrays][-1]
    for mode, value, vector in (("top_1", values[-1], vectors[:, -1]), ("bottom_1", values[0], vectors[:, 0])):
        assert last.scalars.get(f"displacement/curvature_{mode}", float(value)) == pytest.approx(float(value), rel=1e-3)
        q = torch.tensor(last.arrays[f"displacement/q_{mode}"], dtype=torch.float64)
        expected = torch.stack(copies.flat()) @ vector
        expected = (expected - expected[21])[last.step - len(q) + 1 : last.step + 1]
        sign = torch.sign(q @ expected)
        assert torch.allclose(sign * q, expected, atol=2e-3 * float(expected.abs().max()))
        p = torch.tensor(last.arrays[f"displacement/p_{mode}"], dtype=torch.float64)
        assert torch.allclose(p[1:], q.diff() / 0.05, atol=1e-6 * float(p.abs().max()))


@pytest.mark.parametrize("order", ["reshuffled", pytest.param("with_replacement", marks=pytest.mark.slow)])
def test_a_quadratic_loss_keeps_to_the_theory_of_its_order(order):
    data = bowl(160)
    sampler = RandomSampler(data, replacement=order == "with_replacement", generator=torch.Generator().manual_seed(3))
    monitor = DisplacementMonitor(
        reference=Reference(step=300),
        phase_space=1,
        probe=Probe(whole=True),
        every_n_train_steps=1_000,
        conserved=False,
    )
    module = Regression(lr=0.02, optimizer=lambda p: torch.optim.SGD(p, 0.02, momentum=0.8))
    fit(monitor, module, DataLoader(data, batch_size=8, sampler=sampler), max_steps=2_400, max_epochs=-1)
    last = [r for r in monitor.history if "displacement/equipartition_top_1" in r.scalars][-1]
    for name in ("frequency", "equipartition", "current"):
        value = last.scalars[f"displacement/{name}_top_1"]
        predicted = last.scalars[f"displacement/{name}_predicted_top_1"]
        assert abs(value - predicted) < 4 * last.errors[f"displacement/{name}_top_1"] + 0.05 * abs(predicted)
    white = float(HeavyBall(0.02, 0.8).equipartition(last.scalars.get("displacement/curvature_top_1", 3.5)))
    if order == "reshuffled":
        assert last.scalars["displacement/equipartition_predicted_top_1"] > 1.1 * white


def test_eigenvectors_are_measured_on_what_a_hessian_monitor_measures_on():
    hessian = HessianMonitor(1, 1, every_n_train_steps=2, probe=Probe(whole=True), spectrum=False)
    monitor = DisplacementMonitor(reference=Reference(step=2), phase_space=1, **EACH)
    fit([hessian, monitor], network(), mini_batches())
    assert monitor.options.key == hessian.options.key
    frozen = next(r for r in monitor.history if "frozen" in r.notes)
    assert frozen.step == 2
    assert frozen.notes["probe"]["kind"] == "the whole training set"


def test_eigenvectors_that_were_frozen_are_compared_with_the_hessian_later():
    monitor = DisplacementMonitor(
        reference=Reference(step=2), phase_space=1, probe=Probe(whole=True), probe_every_n_train_steps=2, **EACH
    )
    fit(monitor, network(lr=0.3), mini_batches(), max_epochs=5)
    seen = {r.step: r.scalars.get("displacement/alignment_top_1") for r in monitor.history}
    assert seen[2] == pytest.approx(1, abs=1e-3)
    assert seen[1] is None
    assert seen[14] < 1


def test_more_eigenvectors_than_parameters_are_refused():
    monitor = DisplacementMonitor(phase_space=3, probe=Probe(whole=True))
    with pytest.raises(MisconfigurationException, match="6 eigenvectors of 4 parameters"):
        fit(monitor)


# Balance and what is conserved


def test_gradient_norms_of_batch_and_probe_stand_beside_each_other():
    monitor = DisplacementMonitor(probe=Probe(whole=True), probe_every_n_train_steps=1, **EACH)
    data = mini_batches()
    module = network()
    copies = followed(monitor, module, data, gradient_clip_val=1e-3)
    x, y = data.dataset.tensors
    for record in monitor.history[1:]:
        expected = float(copies.gradients[record.step - 1].norm())
        if record.step < 9:
            assert record.scalars["displacement/batch_gradient_norm"] == pytest.approx(expected, rel=1e-5)
        for name, weight in copies.weights[record.step].items():
            module.get_parameter(name).data = weight.float()
        loss = module.loss((x, y))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        assert record.scalars["displacement/probe_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert record.scalars["displacement/gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_gradients_are_unscaled_under_half_precision():
    monitor = DisplacementMonitor(**EACH)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    copies = Copies()
    fit([copies, monitor], network(), full_batch(), plugins=plugin)
    first = monitor.history[1].scalars["displacement/batch_gradient_norm"]
    assert first == pytest.approx(float(copies.gradients[0].norm()), rel=1e-3)
    assert first < 100


def test_the_mean_training_loss_and_its_change_are_told():
    monitor = DisplacementMonitor(every_n_train_steps=100)
    module = Led(lambda t: torch.full((400,), float(t)))
    module.loss_now = lambda t: 3 - 0.001 * t
    fit(monitor, module, one_batch(), max_steps=1_000, max_epochs=-1)
    last = monitor.history[-1].scalars
    assert last["displacement/training_loss"] == pytest.approx(3 - 0.875, abs=0.01)
    assert last["displacement/loss_change"] == pytest.approx(-0.25, abs=0.01)


class Symmetric(Classification):
    def __init__(self, weight_decay=0.0, lr=0.01):
        torch.manual_seed(1)
        super().__init__(
            nn.Sequential(
                nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
            ),
            lr,
        )
        self.weight_decay = weight_decay

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, weight_decay=self.weight_decay)


def symmetric(lr=0.01, weight_decay=0.0, epochs=12):
    monitor = DisplacementMonitor(**EACH)
    module = Symmetric(weight_decay, lr)
    data = DataLoader(TensorDataset(*class_data()), batch_size=20)
    fit(monitor, module, data, max_epochs=epochs)
    return monitor, module


def test_symmetries_are_found_without_being_told():
    monitor, module = symmetric()
    last = monitor.history[-1]
    assert any("net.2.weight" in each for each in last.notes["symmetries"] if each.startswith("scale"))
    assert any("net.5.weight" in each for each in last.notes["symmetries"] if each.startswith("shift"))
    assert last.scalars["displacement/shift_change/net_5"] < 1e-5
    rate = last.scalars["displacement/effective_learning_rate/net_2"]
    assert rate == pytest.approx(float((0.01 / module.net[2].weight.detach().square().sum(1)).mean()), rel=1e-4)
    assert abs(last.scalars["displacement/radial_cosine/net_2"]) < 1e-3


def test_what_is_conserved_is_broken_at_second_order_and_by_weight_decay():
    """Four times fewer steps of four times the length break it four times as much."""
    small, large = (symmetric(lr, epochs=epochs)[0].history[-1].scalars for lr, epochs in ((0.01, 48), (0.04, 12)))
    key = "displacement/scale_change/net_2"
    assert large[key] / small[key] == pytest.approx(4, rel=0.4)
    decayed = symmetric(weight_decay=0.1)[0].history[-1].scalars
    assert decayed[key] > 2 * symmetric()[0].history[-1].scalars[key]


def test_symmetries_need_not_be_looked_for():
    monitor = DisplacementMonitor(conserved=False, **EACH)
    fit(monitor, Symmetric(), DataLoader(TensorDataset(*class_data()), batch_size=20))
    assert "symmetries" not in monitor.history[-1].notes


# The run around it


def alike():
    """An epoch of three batches that are the same: Lightning begins a resumed epoch with its first batch."""
    x, y = full_batch(8).dataset.tensors
    return DataLoader(TensorDataset(x.repeat(3, 1), y.repeat(3, 1)), batch_size=8)


@pytest.mark.parametrize("at", [3, 4, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"reference": Reference(step=2), "dimensions": 7, "phase_space": 1, "probe": Probe(whole=True)},
        {"reference": Reference(step=5), "memory": "device"},
        {"reference": Reference(epoch=1), "memory": "host"},
    ],
)
def test_a_resumed_run_has_the_curves_of_the_uninterrupted_one(tmp_path, at, options):
    def run(folder, ckpt_path=None):
        monitor = DisplacementMonitor(every_n_train_steps=2, probe_every_n_train_steps=2, **options)
        keep = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        logger = CSVLogger(tmp_path / folder, name="", version="x")
        fit(
            [monitor, keep],
            network(momentum=0.9),
            alike(),
            max_epochs=4,
            enable_checkpointing=True,
            logger=logger,
            ckpt_path=ckpt_path,
        )
        return [(r.step, dict(r.scalars), dict(r.errors), dict(r.arrays)) for r in monitor.history]

    whole = run("whole")
    resumed = run("resumed", tmp_path / "whole" / f"step={at}.ckpt")
    assert resumed == whole


def test_a_second_fit_goes_on():
    monitor = DisplacementMonitor(**EACH)
    copies = Copies()
    module, data = network(), mini_batches()
    trainer = fit([copies, monitor], module, data)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, data)
    points = [each for i, each in enumerate(copies.flat()) if i != 9]  # the end of the first is the start of the second
    assert monitor.history[-1].step == 15
    assert monitor.history[-1].scalars["displacement/path_length"] == pytest.approx(sum(steps(points)), rel=1e-5)


@pytest.mark.parametrize("method", ["update", "read"])
def test_what_fails_on_the_way_costs_the_points_after_it_and_not_the_run(monkeypatch, method):
    whole = getattr(Displacement, method)

    def fails(self, *args, **kwargs):
        if self.steps == 4:
            raise torch.OutOfMemoryError("no memory left")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Displacement, method, fails)
    monitor = DisplacementMonitor(every_n_train_steps=2)
    module = network()
    with pytest.warns(UserWarning, match="skips a point: out of memory"):
        trainer = fit(monitor, module, mini_batches())
    assert trainer.global_step == 9
    assert [r.step for r in monitor.history] == [0, 2, 4] if method == "update" else [0, 2]


def test_a_run_that_is_resumed_after_a_failure_says_from_where_it_counts(tmp_path, monkeypatch):
    whole = Displacement.update

    def fails(self, *args, **kwargs):
        if self.steps == 4:
            raise torch.OutOfMemoryError("no memory left")
        return whole(self, *args, **kwargs)

    def run(folder, **options):
        monitor = DisplacementMonitor(every_n_train_steps=2)
        keep = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        logger = CSVLogger(tmp_path / folder, name="", version="x")
        fit([monitor, keep], network(), alike(), max_epochs=4, enable_checkpointing=True, logger=logger, **options)
        return monitor

    monkeypatch.setattr(Displacement, "update", fails)
    with pytest.warns(UserWarning, match="out of memory"):
        run("first")
    monkeypatch.undo()
    resumed = run("second", ckpt_path=tmp_path / "first" / "step=8.ckpt")
    last = resumed.history[-1]
    assert last.notes["steps"] == 4
    assert "count from step 8" in last.notes["remarks"][0]


def test_a_decision_that_fails_costs_points_and_not_the_run(monkeypatch):
    def fails(self):
        raise RuntimeError("no trend")

    monkeypatch.setattr(Settling, "trend", fails)
    with pytest.warns(UserWarning, match="no trend"):
        trainer = fit(DisplacementMonitor(), network(), mini_batches())
    assert trainer.global_step == 9


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"dimensions": 7}, "`dimensions` is not what it was"),
        ({}, {"parameters": "net.2.*"}, "`parameters` is not what it was"),
        ({"reference": Reference(step=1)}, {"reference": Reference(step=5)}, "the reference is another"),
        ({"phase_space": 1}, {"phase_space": 2}, "`phase_space` is not what it was"),
    ],
)
def test_options_that_change_on_resume_are_noticed(tmp_path, before, after, said):
    def run(folder, monitor, **options):
        keep = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"max_epochs": 4, "enable_checkpointing": True, "default_root_dir": tmp_path / folder, **options}
        fit([monitor, keep], network(), alike(), **options)
        return monitor.history[-1]

    every = {"every_n_train_steps": 1, "probe": Probe(whole=True), "probe_every_n_train_steps": 2}
    run("first", DisplacementMonitor(**every, **before))
    monitor = DisplacementMonitor(**every, **{**before, **after})
    last = run("second", monitor, ckpt_path=tmp_path / "first" / "step=4.ckpt")
    assert last.step == 12
    assert any(said in remark for remark in last.notes["remarks"])
    if "reference" in after:
        assert last.notes["reference"]["step"] == 5


def test_points_that_wait_for_their_data_are_not_lost():
    monitor = DisplacementMonitor(
        reference=Reference(step=3),
        phase_space=1,
        probe=Probe(first_batches=6),
        probe_every_n_train_steps=5,
        **EACH,
    )
    copies = followed(monitor, max_epochs=4)
    assert [r.step for r in monitor.history] == list(range(13))
    first = next(r for r in monitor.history if "frozen" in r.notes)
    assert first.step == 3
    for record in monitor.history:
        assert record.scalars["displacement/from_init"] == pytest.approx(
            distances(copies.flat())[record.step], rel=1e-5
        )
        lags = record.arrays.get("displacement/from_init_lags", [0])
        assert max(lags, default=0) <= record.step


def test_the_training_loss_does_not_depend_on_accumulation():
    levels = []
    for batches in (1, 4):
        monitor = DisplacementMonitor(every_n_train_steps=100)
        module = Led(lambda t: torch.zeros(400))
        module.loss_now = lambda t: 2.5
        options = {"accumulate_grad_batches": batches, "max_steps": 250 // batches, "max_epochs": -1}
        fit(monitor, module, DataLoader(TensorDataset(torch.zeros(4, 1))), **options)
        levels.append(monitor.history[-1].scalars["displacement/training_loss"])
    assert levels == pytest.approx([2.5, 2.5])


def test_layer_names_that_would_collide_are_refused_with_the_cure():
    def colliding():
        module = Regression(nn.Linear(4, 4, bias=False))
        module.net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 1))})
        module.net["a_0"] = nn.Linear(4, 1)
        module.loss = lambda batch: (module.net["a"](batch[0]) - module.net["a_0"](batch[0])).square().mean()
        return module

    with pytest.raises(MisconfigurationException, match="layers=False"):
        fit(DisplacementMonitor(), colliding(), mini_batches())
    fit(DisplacementMonitor(layers=False), colliding(), mini_batches())


def test_weights_that_are_not_numbers_are_not_taken_for_zero():
    monitor = DisplacementMonitor(**EACH)
    fit(monitor, Led(lambda t: torch.full((400,), math.nan if t > 3 else 1.0)), one_batch(), max_steps=6, max_epochs=-1)
    assert math.isnan(monitor.history[-1].scalars["displacement/norm"])


def test_where_the_loss_of_the_probe_is_lost_the_weights_are_told_of():
    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (math.nan if self.trainer.global_step == 4 else 1)

        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    monitor = DisplacementMonitor(probe=Probe(whole=True), probe_every_n_train_steps=1, **EACH)
    fit(monitor, Breaks(), mini_batches())
    record = next(r for r in monitor.history if r.step == 4)
    assert record.scalars["displacement/from_init"] > 0
    assert "not finite" in record.notes["no_probe"]


@pytest.mark.parametrize("options", [{"limit_train_batches": 2}, {"limit_train_batches": 0.5}])
def test_epochs_of_a_part_of_the_data_are_no_reshuffling(options):
    assert sampling_order(fit([], data=mini_batches(32, 8, shuffle=True), **options))[0] is None


def test_a_monitor_of_an_earlier_trainer_starts_afresh():
    monitor = DisplacementMonitor(**EACH)
    fit(monitor, network(), mini_batches())
    fit(monitor, network(lr=0.2), mini_batches())
    assert monitor.history[0].scalars["displacement/from_init"] == 0
    assert monitor.history[-1].notes["steps"] == 9


def test_it_lets_go_of_the_module_after_the_fit():
    monitor = DisplacementMonitor(**EACH)
    fit(monitor, Regression(), mini_batches())
    pickle.loads(pickle.dumps(monitor))
    assert not any(isinstance(each, (nn.Module, pl.Trainer)) for each in vars(monitor.follower).values())


def test_a_trial_run_reads_nothing():
    monitor = DisplacementMonitor()
    fit(monitor, network(), mini_batches(), fast_dev_run=True)
    assert monitor.history == []


def test_two_of_them_take_a_name():
    one, other = DisplacementMonitor(**EACH), DisplacementMonitor(name="late", reference=Reference(step=3), **EACH)
    fit([one, other], network(), mini_batches())
    assert other.history[-1].scalars["displacement_late/from_reference"] > 0


def test_lazy_weights_are_followed_from_where_they_are():
    class Lazy(Regression):
        def __init__(self):
            super().__init__(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[1].parameters(), 0.1)

        def on_fit_start(self):
            self.net(torch.zeros(1, 4))

    monitor = DisplacementMonitor(**EACH)
    fit(monitor, Lazy(), mini_batches())
    assert monitor.history[-1].scalars["displacement/from_init/net_1"] > 0


def test_a_network_that_becomes_another_begins_anew():
    class Prunes(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                nn.utils.prune.l1_unstructured(pl_module.net[0], "weight", amount=0.2)

    monitor = DisplacementMonitor(**EACH)
    fit([Prunes(), monitor], network(), mini_batches())
    late = monitor.history[-1]
    assert any("net.0.weight" in remark for remark in late.notes["remarks"])
    assert late.notes["steps"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "disk"},
        {"window": (10,)},
        {"window": (20, 10)},
        {"window": "all"},
        {"phase_space": -1},
        {"phase_window": 10},
        {"dimensions": 0},
        {"reference": 5},
        {"layers": 1},
        {"conserved": "yes"},
        {"every_n_train_steps": 0},
        {"also_log": "nothing_like_it"},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(MisconfigurationException):
        DisplacementMonitor(**options)


def test_a_filter_that_matches_nothing_is_refused_before_the_first_step():
    with pytest.raises(MisconfigurationException, match="matches no trainable parameter"):
        fit(DisplacementMonitor(parameters="head.*"), network(), mini_batches())


def test_only_four_numbers_and_a_figure_come_to_the_loggers_by_themselves():
    monitor = DisplacementMonitor(reference=Reference(step=1), **EACH)
    fit(monitor, network(), mini_batches())
    logged = {key for record in monitor.history for key in monitor.logged(record)}
    assert logged == {f"displacement/{key}" for key in ("from_init", "relative", "step", "path_length")}


def test_more_comes_on_request_and_to_other_callbacks():
    monitor = DisplacementMonitor(also_log=["straightness", "relative/.*"], monitor=True, **EACH)
    trainer = fit(monitor, network(), mini_batches())
    assert {"displacement/straightness", "displacement/relative/net_0"} <= set(trainer.callback_metrics)
