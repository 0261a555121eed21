"""StochasticSharpnessMonitor in whole fits, against dense Hessians of the very batches that it drew."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers.dense import dense, dense_loss, flat, with_weights
from helpers.fit import fit, mini_batches
from helpers.modules import Classification, Regression, class_data, regression_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dynamics import GradientNoiseMonitor, HessianMonitor, Probe, StochasticSharpnessMonitor, read_records
from lightning_dynamics.callbacks.map_style import MapStyleSource
from lightning_dynamics.callbacks.survey import Survey
from lightning_dynamics.metrics import (
    DrawnCurvature,
    Estimate,
    UnresolvedGradientError,
    batch_sharpness,
    batch_sharpness_ratio_of_means,
    gni,
    gradient_sharpness,
    ias,
    minibatch_sharpness,
    predicted_gni,
    sharpness_gap,
    update_edge,
)


def network(optimizer=None, lr=0.05, seed=1):
    torch.manual_seed(seed)
    return Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=lr, optimizer=optimizer)


def monitor(every=1, detail=1, draws=8, **options):
    probe = options.pop("probe", Probe(draws=draws, seed=options.pop("seed", 0)))
    every_detail = {"eigenvalues_every_n_train_steps": detail} if detail else {"eigenvalues": False}
    return StochasticSharpnessMonitor(every_n_train_steps=every, probe=probe, solved=draws, **every_detail, **options)


class Weights(pl.Callback):
    """The weights at every step, and the optimizer's momentum buffers before it."""

    def __init__(self):
        self.at, self.buffers, self.batches = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.at.append({name: p.detach().clone() for name, p in module.named_parameters()})
            state = trainer.optimizers[0].state
            buffers = [state.get(p, {}).get("momentum_buffer") for p in module.parameters()]
            self.buffers.append([None if b is None else b.detach().clone() for b in buffers])
            self.batches.append([])
        self.batches[-1].append([part.clone() for part in batch])

    def on_train_end(self, trainer, module):
        self.at.append({name: p.detach().clone() for name, p in module.named_parameters()})


def drawn_batches(data, draws, batch_size, seed=0):
    """The batches that a probe draws."""
    source = MapStyleSource(data, range(len(data.dataset)), data.batch_size)
    order = source.draw(draws, batch_size, seed)
    tensors = data.dataset.tensors
    return [[t[order[i : i + batch_size]] for t in tensors] for i in range(0, len(order), batch_size)]


def columns(module, batches):
    """Dense gradients and Hessians of all batches, and the table that is made of them."""
    found = [dense(module, batch) for batch in batches]
    g, h = torch.stack([each[1] for each in found]), torch.stack([each[2] for each in found])
    mean, partner = g.mean(0), g.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    image = torch.einsum("mij,j->mi", h, mean)
    table = DrawnCurvature(
        g.square().sum(1),
        torch.einsum("mi,mij,mj->m", g, h, g),
        torch.einsum("mi,mij,mj->m", partner, h, partner),
        g @ mean,
        float(mean @ mean),
        image @ mean,
        g @ image.mean(0),
        (g * image).sum(1),
    )
    return g, h, table


def resolved(estimator, *arguments):
    """An estimate, None where it cannot be told from noise."""
    try:
        return estimator(*arguments)
    except UnresolvedGradientError:
        return None


def value(record, key):
    return record.scalars[f"sharpness/{key}"]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_every_number_is_that_of_dense_hessians_of_the_drawn_batches(options):
    data, weights = mini_batches(24, 6), Weights()
    subject = monitor(every=2, detail=2, draws=24)
    module = network(lambda p: SGD(p, 0.01, **options))
    fit([weights, subject], module, data, max_epochs=1)
    assert [record.step for record in subject.history] == [0, 2, 4]
    batches, resolved_points = drawn_batches(data, 24, 6), 0
    for record, at in zip(subject.history, weights.at[::2], strict=True):
        _, h, table = columns(with_weights(module, at), batches)
        top, vectors = torch.linalg.eigh(h.mean(0))
        tops = torch.linalg.eigvalsh(h)[:, -1]
        along = torch.einsum("i,mij,j->m", vectors[:, -1], h, vectors[:, -1])
        expected = {
            "batch_sharpness": batch_sharpness(table),
            "batch_sharpness_of_means": batch_sharpness_ratio_of_means(table),
            "gni": resolved(gni, table),
            "ias": ias(table),
            "minibatch_top_1": minibatch_sharpness(tops),
            "gap": sharpness_gap(tops, along),
        }
        if options:
            expected["gradient_sharpness"] = resolved(gradient_sharpness, table)
        for key, estimate in expected.items():
            if estimate is None:
                assert key in record.notes["unresolved"]
                assert f"sharpness/{key}" not in record.scalars
                continue
            allowed = 1e-3 * float(top[-1]) if key == "gap" else 0.0  # a difference of two eigenvalues
            assert value(record, key) == pytest.approx(estimate.value, rel=2e-3, abs=allowed), key
            assert record.errors[f"sharpness/{key}"] == pytest.approx(estimate.error, rel=1e-2), key
        assert value(record, "top_1") == pytest.approx(float(top[-1]), rel=1e-3)
        beta = options.get("momentum", 0.0)
        curvature = expected["gradient_sharpness"] if beta else Estimate(0.0, 0.0)
        if expected["gni"] is not None and curvature is not None:
            level = predicted_gni(0.01, beta, curvature.value)
            assert value(record, "gni_predicted") == pytest.approx(level, rel=2e-3)
            resolved_points += 1
        assert value(record, "edge_ratio") == pytest.approx(
            batch_sharpness(table).value * 0.01 / (2 * (1 + beta)), rel=1e-3
        )
    assert resolved_points
    if options:
        assert value(record, "small_batch_level") == pytest.approx(100.0)
        assert value(record, "stability_threshold") == pytest.approx(300.0)


def test_with_batches_of_one_linear_regression_has_its_closed_forms():
    """E‖x‖² is MiniBS and Batch Sharpness, in the mean over the draws."""
    data = DataLoader(TensorDataset(*regression_data(24)), batch_size=1)
    subject = monitor(every=24, detail=24, draws=16)
    module = Regression(lr=1e-4)
    fit(subject, module, data, max_epochs=1)
    batches = drawn_batches(data, 16, 1)
    squares = torch.stack([x.square().sum() for x, _ in batches]).double()
    first = subject.history[0]
    assert value(first, "batch_sharpness") == pytest.approx(float(squares.mean()), rel=1e-4)
    assert value(first, "minibatch_top_1") == pytest.approx(float(squares.mean()), rel=1e-3)
    assert value(first, "batch_sharpness_of_means") != pytest.approx(float(squares.mean()), rel=1e-2)


def test_batches_of_the_whole_set_agree_in_everything_but_the_sharpness():
    data = mini_batches(24, 8)
    subject = monitor(every=3, detail=3, probe=Probe(draws=4, batch_size=24))
    fit(subject, network(), data, max_epochs=1)
    for record in subject.history:
        same = [value(record, key) for key in ("batch_sharpness", "batch_sharpness_of_means", "gni", "ias")]
        assert same == pytest.approx([same[0]] * 4, rel=1e-4)
        assert value(record, "minibatch_top_1") == pytest.approx(value(record, "top_1"), rel=2e-3)
        assert same[0] < 0.999 * value(record, "top_1")
        assert record.notes["probe"]["batch_size"] == 24


def test_the_gap_falls_with_the_batch_size():
    gaps = []
    for batch_size in (2, 12):
        subject = monitor(every=4, detail=4, probe=Probe(draws=16, batch_size=batch_size))
        subject.solved = 16
        fit(subject, network(lr=1e-4), mini_batches(24, 6), max_epochs=1)
        gaps.append(value(subject.history[0], "gap"))
    assert gaps[0] > 2 * gaps[1] > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: SGD(p, 0.05),
        lambda p: SGD(p, 0.05, momentum=0.8),
        lambda p: SGD(p, 0.05, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: AdamW(p, 0.01),
    ],
)
def test_the_step_really_made_is_judged_by_the_exact_change_of_the_weights(optimizer):
    data, weights, subject = mini_batches(24, 6, shuffle=True), Weights(), monitor(detail=None)
    module = network(optimizer)
    fit([weights, subject], module, data, max_epochs=1)
    batches = drawn_batches(data, 8, 6)
    for record, at, after, (batch,) in zip(
        subject.history[:-1], weights.at, weights.at[1:], weights.batches, strict=False
    ):
        there, step = with_weights(module, at), flat(after) - flat(at)
        g, h, _ = columns(there, batches)
        slopes, bends = g @ step, torch.einsum("i,mij,j->m", step, h, step)
        edge = resolved(update_edge, slopes, bends)
        if edge is None:
            assert "update_edge" in record.notes["unresolved"]
        else:
            assert value(record, "update_edge") == pytest.approx(edge.value, rel=2e-3)
        assert value(record, "predicted_change") == pytest.approx(float((slopes + bends / 2).mean()), rel=2e-3)
        losses = [dense_loss(there, each) for each in batches]
        realized = sum(float(loss(at + step) - loss(at)) for loss, at in losses) / len(losses)
        assert value(record, "realized_change") == pytest.approx(realized, rel=2e-3, abs=1e-6)
        _, gradient, hessian = dense(there, batch)
        edge = -(step @ hessian @ step) / (2 * gradient @ step)
        assert value(record, "step_edge") == pytest.approx(float(edge), rel=2e-3)
        rayleigh = gradient @ hessian @ gradient / (gradient @ gradient)
        assert value(record, "step_sharpness") == pytest.approx(float(rayleigh), rel=1e-3)
    assert subject.history[-1].final
    assert "sharpness/update_edge" not in subject.history[-1].scalars


def test_for_plain_sgd_the_edge_of_the_step_is_its_sharpness_over_the_threshold():
    subject = monitor(detail=None)
    fit(subject, network(), mini_batches(24, 6), max_epochs=1)
    for record in subject.history[:-1]:
        assert value(record, "step_edge") == pytest.approx(0.05 / 2 * value(record, "step_sharpness"), rel=1e-3)
        assert value(record, "step_sharpness_momentum") == pytest.approx(value(record, "step_sharpness"), rel=1e-3)


def test_the_momentum_aware_sharpness_is_along_buffer_and_gradient():
    """sᵀH_Bs/(sᵀg_B) with s = β·buf + g_B, the buffer before the step."""
    weights, subject = Weights(), monitor(detail=None)
    module = network(lambda p: SGD(p, 0.05, momentum=0.8))
    fit([weights, subject], module, mini_batches(24, 6), max_epochs=1)
    for i in (1, 2, 3):
        _, g, h = dense(with_weights(module, weights.at[i]), weights.batches[i][0])
        s = 0.8 * torch.cat([b.double().reshape(-1) for b in weights.buffers[i]]) + g
        expected = float(s @ h @ s / (s @ g))
        assert value(subject.history[i], "step_sharpness_momentum") == pytest.approx(expected, rel=2e-3)


def test_accumulated_batches_count_as_one():
    data, weights, subject = mini_batches(24, 4), Weights(), monitor(detail=None)
    module = network()
    fit([weights, subject], module, data, max_epochs=1, accumulate_grad_batches=3)
    assert [record.step for record in subject.history] == [0, 1, 2]
    drawn = drawn_batches(data, 8, 12)
    for record, at, parts in zip(subject.history[:2], weights.at, weights.batches, strict=False):
        assert record.notes["probe"]["batch_size"] == 12
        there = with_weights(module, at)
        _, _, table = columns(there, drawn)
        assert value(record, "batch_sharpness") == pytest.approx(batch_sharpness(table).value, rel=1e-3)
        whole = [torch.cat([part[i] for part in parts]) for i in range(2)]
        _, g, h = dense(there, whole)
        assert value(record, "step_sharpness") == pytest.approx(float(g @ h @ g / (g @ g)), rel=1e-3)
        assert value(record, "step_edge") == pytest.approx(0.025 * float(g @ h @ g / (g @ g)), rel=2e-3)


def test_a_step_of_uneven_batches_is_that_of_the_mean_of_their_losses():
    """As Lightning accumulates: each batch counts alike, and the last window has fewer."""
    data, weights, subject = mini_batches(22, 4), Weights(), monitor(detail=None)
    module = network()
    fit([weights, subject], module, data, max_epochs=1, accumulate_grad_batches=4)
    assert [len(parts) for parts in weights.batches] == [4, 2]
    assert len(weights.batches[1][1][0]) == 2
    there = with_weights(module, weights.at[1])
    found = [dense(there, batch) for batch in weights.batches[1]]
    g, h = (torch.stack([each[i] for each in found]).mean(0) for i in (1, 2))
    sharpness = float(g @ h @ g / (g @ g))
    assert value(subject.history[1], "step_sharpness") == pytest.approx(sharpness, rel=1e-3)
    # Lightning divides by four whatever is there
    assert value(subject.history[1], "step_edge") == pytest.approx(0.025 * sharpness * 2 / 4, rel=2e-3)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: Adam(p, 0.01), lambda p: SGD(p, 0.05, weight_decay=0.3), lambda p: Adam(p, 0.01, weight_decay=0.3)],
)
def test_under_adam_and_weight_decay_the_ratio_is_taken_in_the_optimizers_geometry(optimizer):
    data, weights, subject = mini_batches(24, 6), Weights(), monitor(detail=None)
    module = network(optimizer)
    seen = {}

    def remember(batch, index):
        from lightning_dynamics.metrics import stability_rule

        rule = stability_rule([module.trainer.optimizers[0]], dict(module.named_parameters()))
        seen[index] = None if rule.unavailable else rule

    module.on_train_batch_start = remember
    fit([weights, subject], module, data, max_epochs=1)
    batches = drawn_batches(data, 8, 6)
    for i in (1, 2, 3):
        at = weights.at[i]
        g, h, _ = columns(with_weights(module, at), batches)
        rule = seen[i]
        c = torch.cat([torch.as_tensor(rule.scales[n]).double().expand(p.shape).reshape(-1) for n, p in at.items()])
        w = torch.cat([torch.full((p.numel(),), rule.shifts[n], dtype=torch.float64) for n, p in at.items()])
        pulled = g + w * flat(at)
        step = c * pulled
        ratios = (torch.einsum("mi,mij,mj->m", step, h, step) + (w * step * step).sum(1)) / (pulled * step).sum(1) / 2
        assert value(subject.history[i], "edge_ratio") == pytest.approx(float(ratios.mean()), rel=2e-3)
    first = subject.history[0].scalars
    assert ("sharpness/edge_ratio" in first) == (seen[0] is not None)


def test_unknown_optimizers_have_batch_sharpness_and_no_ratio():
    subject = monitor(every=2, detail=2)
    fit(subject, network(lambda p: torch.optim.Adagrad(p, 0.01)), mini_batches(24, 6), max_epochs=1)
    for record in subject.history:
        assert "sharpness/batch_sharpness" in record.scalars
        assert "sharpness/edge_ratio" not in record.scalars
        assert "Adagrad" in record.notes["no_threshold"]


def test_monitors_of_the_same_mini_batches_read_them_once(monkeypatch):
    reads = []
    update = Survey.update

    def counted(self, first, second):
        reads.append(first.number)
        update(self, first, second)

    monkeypatch.setattr(Survey, "update", counted)
    subject = monitor(every=2, detail=2, step=False)
    noise = GradientNoiseMonitor(
        every_n_train_steps=2, detail_every_n_train_steps=2, probe=Probe(draws=8), directions=2
    )
    hessian = HessianMonitor(every_n_train_steps=2, probe=Probe(draws=8), engine="rebuilt", pair=False, spectrum=False)
    fit([subject, noise, hessian], network(), mini_batches(24, 6), max_epochs=1)
    assert len(subject.history) == len(noise.history) == len(hessian.history) == 3
    assert reads == [0, 2, 4, 6] * 3
    for one, other, third in zip(subject.history, noise.history, hessian.history, strict=True):
        assert one.step == other.step == third.step
        assert value(one, "top_1") == pytest.approx(third.scalars["hessian/top_1"], rel=1e-3)
        assert value(one, "top_1") == pytest.approx(other.scalars["noise/curvature_top_1"], rel=1e-3)
        assert one.scalars["sharpness/loss"] == pytest.approx(third.scalars["hessian/probe_loss"], rel=1e-5)


def test_the_balance_is_taken_over_the_last_points():
    subject = monitor(every=1, detail=1, window=3)
    fit(subject, network(lambda p: SGD(p, 0.05, momentum=0.5)), mini_batches(24, 6), max_epochs=2)
    assert [record.notes["balance_points"] for record in subject.history] == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    known = [r for r in subject.history[:1] if "sharpness/balance_ratio" in r.scalars]
    for record in known:
        expected = value(record, "gni") / value(record, "gni_predicted")
        assert value(record, "balance_ratio") == pytest.approx(expected, rel=1e-4)
    assert known or "balance_ratio" in subject.history[0].notes["unresolved"]


def test_a_changed_momentum_begins_the_balance_anew():
    subject = monitor(every=1, detail=1)
    module = network(lambda p: SGD(p, 0.05, momentum=0.5))

    def halve(batch, index):
        if index == 2:
            module.trainer.optimizers[0].param_groups[0]["momentum"] = 0.25

    module.on_train_batch_end = lambda outputs, batch, index: halve(batch, index + 1)
    fit(subject, module, mini_batches(24, 6), max_epochs=1)
    assert [record.notes["balance_points"] for record in subject.history] == [1, 2, 1, 2, 3]


def test_streams_are_measured_on_the_batches_that_pass_first():
    x, y = regression_data(32)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y, strict=True))

    data, weights, subject = DataLoader(Stream(), batch_size=4), Weights(), monitor(detail=None, draws=4)
    module = network()
    fit([weights, subject], module, data, max_epochs=1)
    batches = [[x[i : i + 4], y[i : i + 4]] for i in range(0, 16, 4)]
    assert [record.step for record in subject.history] == list(range(9))
    for record, at in zip(subject.history, weights.at, strict=True):
        _, _, table = columns(with_weights(module, at), batches)
        assert value(record, "batch_sharpness") == pytest.approx(batch_sharpness(table).value, rel=1e-3)
        assert record.notes["probe"]["draws"] == 4


@pytest.mark.parametrize("probe", [Probe(), Probe(whole=True), Probe(current_batch=True), Probe(first_batches=4)])
def test_other_data_than_drawn_mini_batches_are_refused(probe):
    with pytest.raises(MisconfigurationException, match=r"Probe\(draws=32\)"):
        StochasticSharpnessMonitor(probe=probe)
    with pytest.raises(MisconfigurationException, match=r"Probe\(draws=32\)"):
        GradientNoiseMonitor(probe=probe)


@pytest.mark.parametrize("draws", [3, 5, 2])
def test_draws_come_in_pairs(draws):
    with pytest.raises(MisconfigurationException, match="draws"):
        Probe(draws=draws)


def test_larger_batches_than_there_are_samples_are_refused():
    with pytest.raises(MisconfigurationException, match="25 samples cannot be drawn from 24"):
        fit(monitor(probe=Probe(draws=4, batch_size=25)), network(), mini_batches(24, 6))


def test_draws_are_fixed_by_the_seed_and_independent_of_each_other():
    data = mini_batches(24, 6)
    source = MapStyleSource(data, range(24), 6)
    first, again, other = source.draw(40, 6, 0), source.draw(40, 6, 0), source.draw(40, 6, 1)
    assert first == again != other
    groups = [first[i : i + 6] for i in range(0, 240, 6)]
    assert all(len(set(group)) == 6 for group in groups)
    shared = [len(set(a) & set(b)) for i, a in enumerate(groups) for b in groups[:i]]
    assert sum(shared) / len(shared) == pytest.approx(1.5, abs=0.1)  # 6·6/24
    assert source.draw(20, 6, 0) == first[:120]


def test_a_resumed_run_has_the_curves_of_the_run_that_was_not_interrupted(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        subject = monitor(every=1, detail=2, window=4)
        keep = ModelCheckpoint(folder, every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
        data = mini_batches(24, 6)
        module = network(lambda p: SGD(p, 0.05, momentum=0.5))
        fit(
            [subject, keep], module, data, max_epochs=epochs, ckpt_path=ckpt_path, enable_checkpointing=True,
            default_root_dir=folder,
        )  # fmt: skip
        return subject

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "first", 1)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    resumed = run(tmp_path / "second", 2, checkpoint)
    assert [r.step for r in resumed.history] == [r.step for r in whole.history]
    for one, other in zip(whole.history, resumed.history, strict=True):
        assert one.scalars == other.scalars
        assert one.errors == other.errors
    assert len(read_records(resumed.record_path)) == len(whole.history)


def test_a_step_that_changes_nothing_has_no_edge():
    subject = monitor(detail=None)
    fit(subject, network(lambda p: SGD(p, 0.0)), mini_batches(24, 6), max_epochs=1)
    for record in subject.history[:-1]:
        assert "sharpness/update_edge" not in record.scalars
        assert value(record, "realized_change") == 0.0
        assert "where they were" in record.notes["no_update"]


def test_without_the_step_points_are_measured_at_once():
    subject = monitor(detail=None, step=False)
    weights = Weights()
    fit([weights, subject], network(), mini_batches(24, 6), max_epochs=1)
    assert all("sharpness/step_edge" not in record.scalars for record in subject.history)
    assert len(subject.history) == 5


def test_batch_norm_is_run_at_the_size_of_training():
    """Pieces of the loader's size, whatever the drawn batch."""
    sizes = []

    class Watched(Classification):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    data = DataLoader(TensorDataset(*class_data(60)), batch_size=6)
    subject = StochasticSharpnessMonitor(every_n_train_steps=5, eigenvalues=False, probe=Probe(draws=4, batch_size=18))
    fit(subject, Watched(), data, max_epochs=1)
    assert set(sizes) == {6}
    assert len(subject.history) == 3


def test_a_run_that_fails_in_its_step_keeps_the_points_before_it(tmp_path):
    class Fails(Regression):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == 2:
                raise RuntimeError("broken")

    subject = monitor(detail=None)
    other = HessianMonitor(every_n_train_steps=1, pair=False, spectrum=False)
    with pytest.raises(RuntimeError, match="broken"):
        fit([subject, other], Fails(), mini_batches(24, 6), default_root_dir=tmp_path)
    assert [record.step for record in subject.history] == [record.step for record in other.history] == [0, 1, 2]
    assert "sharpness/step_edge" in subject.history[1].scalars
    assert "sharpness/step_edge" not in subject.history[2].scalars


@pytest.mark.slow
def test_stated_errors_cover_the_truth_over_all_batches():
    """200 seeds at the same weights, sixteen draws each; truth by all subsets of three of nine samples."""
    from itertools import combinations

    x, y = regression_data(9)
    data = DataLoader(TensorDataset(x, y), batch_size=3)
    module = network(lr=0.0, seed=3)
    everything = [[x[list(c)], y[list(c)]] for c in combinations(range(9), 3)]
    g, h, _ = columns(module, everything)
    full_g, full_h = g.mean(0), h.mean(0)
    truth = {
        "batch_sharpness": float((torch.einsum("mi,mij,mj->m", g, h, g) / g.square().sum(1)).mean()),
        "batch_sharpness_of_means": float(torch.einsum("mi,mij,mj->m", g, h, g).mean() / g.square().sum(1).mean()),
        "minibatch_top_1": float(torch.linalg.eigvalsh(h)[:, -1].mean()),
        "gni": float(torch.einsum("mi,ij,mj->m", g, full_h, g).mean() / (full_g @ full_g)),
        "ias": float(torch.einsum("mi,ij,mj->m", g, full_h, g).mean() / g.square().sum(1).mean()),
    }
    hits, counts = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    quantile = {True: 2.365, False: 2.131}  # Student's t for 7 pairs, 15 draws
    for seed in range(200):
        subject = monitor(every=3, detail=3, draws=16, seed=seed, step=False)
        fit(subject, module, data, max_epochs=1, max_steps=1)
        record = subject.history[0]
        for key, exact in truth.items():
            if f"sharpness/{key}" in record.scalars:
                counts[key] += 1
                allowed = quantile[key in ("gni", "ias")] * record.errors[f"sharpness/{key}"]
                hits[key] += abs(value(record, key) - exact) <= allowed
    print({key: (hits[key] / max(1, counts[key]), counts[key]) for key in truth})
    for key in truth:
        assert counts[key] >= 100
        assert hits[key] / counts[key] >= 0.89, key


def test_each_mini_batch_counts_once_whatever_it_weighs():
    """A weight is for the pieces of a mini-batch; training takes a step for each mini-batch."""
    data, weights = mini_batches(24, 6), Weights()
    subject = monitor(every=4, detail=None, weight_fn=lambda batch: float(batch[0].abs().sum()))
    noise = GradientNoiseMonitor(
        every_n_train_steps=4, samples=False, directions=0, probe=Probe(draws=8), weight_fn=subject.options.weight_fn
    )
    module = network()
    fit([weights, subject, noise], module, data, max_epochs=1)
    g, _, table = columns(with_weights(module, weights.at[0]), drawn_batches(data, 8, 6))
    assert value(subject.history[0], "batch_sharpness") == pytest.approx(batch_sharpness(table).value, rel=1e-3)
    assert noise.history[0].scalars["noise/trace"] == pytest.approx(float(g.var(0).sum()), rel=1e-3)


def test_skipped_mini_batches_are_left_out_with_their_partners():
    """What is left has a mean of its own."""

    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if float(batch[0].sum()) < -6.0 else super().training_step(batch, batch_idx)

    data, weights = mini_batches(24, 6), Weights()
    subject = monitor(every=4, detail=None, draws=16)
    noise = GradientNoiseMonitor(
        every_n_train_steps=4, samples=False, directions=0, probe=Probe(draws=16), engine="rebuilt"
    )
    torch.manual_seed(1)
    module = Skips(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=1e-3)
    fit([weights, subject, noise], module, data, max_epochs=1)
    batches = drawn_batches(data, 16, 6)
    pairs = list(zip(batches[::2], batches[1::2], strict=True))
    read = [batch for pair in pairs if all(float(x.sum()) >= -6.0 for x, _ in pair) for batch in pair]
    assert 4 <= len(read) < 16
    g, _, table = columns(with_weights(module, weights.at[0]), read)
    assert subject.history[0].notes["mini_batches"] == len(read)
    assert value(subject.history[0], "batch_sharpness") == pytest.approx(batch_sharpness(table).value, rel=1e-3)
    assert noise.history[0].scalars["noise/trace"] == pytest.approx(float(g.var(0).sum()), rel=1e-3)


def test_a_point_is_of_the_state_before_its_step():
    """A loss that depends on the step, and on an attribute that it advances; another monitor beside it too."""

    class Anneals(Regression):
        def training_step(self, batch, batch_idx):
            return (1 + self.global_step) * self.loss(batch)

    data, weights = mini_batches(24, 6), Weights()
    subject = monitor(detail=None)
    other = HessianMonitor(1, 0, every_n_train_steps=1, probe=Probe(draws=8), engine="rebuilt", pair=False)
    torch.manual_seed(1)
    module = Anneals(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=1e-3)
    fit([weights, subject, other], module, data, max_epochs=1)
    batches = drawn_batches(data, 8, 6)
    for step, (record, beside, at) in enumerate(zip(subject.history, other.history, weights.at, strict=True)):
        _, h, table = columns(with_weights(module, at), batches)
        scale = 1 + step
        assert value(record, "batch_sharpness") == pytest.approx(scale * batch_sharpness(table).value, rel=1e-3)
        top = float(torch.linalg.eigvalsh(h.mean(0))[-1])
        assert beside.scalars["hessian/top_1"] == pytest.approx(scale * top, rel=1e-3)
        if not record.final:
            _, g, h = dense(with_weights(module, at), weights.batches[step][0])
            assert value(record, "step_sharpness") == pytest.approx(scale * float(g @ h @ g / (g @ g)), rel=1e-3)


def test_a_batch_that_a_hook_leaves_out_is_not_part_of_the_step():
    """A batch start that is answered by -1 ends the epoch; Lightning then never says that the batch has ended."""
    weights, subject = Weights(), monitor(detail=None)
    module = network()

    def start(batch, batch_idx):
        return -1 if batch_idx == 2 and module.current_epoch == 0 else None

    module.on_train_batch_start = start
    fit([weights, subject], module, mini_batches(24, 6, shuffle=True), max_epochs=2)
    assert [record.step for record in subject.history] == [0, 1, 2, 3, 4, 5, 6]
    # the weights before step 2 were seen twice: with the batch that was left out, and with that of the step
    batch, at = weights.batches[3][0], weights.at[3]
    _, g, h = dense(with_weights(module, at), batch)
    assert value(subject.history[2], "step_sharpness") == pytest.approx(float(g @ h @ g / (g @ g)), rel=1e-3)


def test_a_resumed_run_with_other_draws_draws_them(tmp_path):
    def run(folder, draws, epochs, ckpt_path=None):
        subject = monitor(every=1, detail=None, draws=draws)
        keep = ModelCheckpoint(folder, every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "default_root_dir": folder}
        fit([subject, keep], network(), mini_batches(24, 6), ckpt_path=ckpt_path, **options)
        return subject

    run(tmp_path / "first", 12, 1)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    for draws in (8, 16):
        resumed = run(tmp_path / str(draws), draws, 2, checkpoint)
        late = [record for record in resumed.history if record.step > 4]
        assert len(late) == 4
        assert {record.notes["mini_batches"] for record in late} == {draws}


def test_a_step_that_skips_the_first_draws_does_not_end_the_run():
    data = mini_batches(24, 6)
    first = [float(batch[0].sum()) for batch in drawn_batches(data, 16, 6)[:2]]

    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            skips = any(float(batch[0].sum()) == pytest.approx(each, rel=1e-5) for each in first)
            return None if skips else super().training_step(batch, batch_idx)

    subject = monitor(detail=None, draws=16)
    fit(subject, Skips(lr=1e-3), data, max_epochs=1)
    assert {record.notes["mini_batches"] for record in subject.history} == {14}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_train_batches": 3, "accumulate_grad_batches": 4}, 18),
        ({"callbacks": {0: 4}}, 24),
        ({"callbacks": {0: 1, 2: 4}}, 6),
    ],
)
def test_the_drawn_size_is_that_of_a_step(options, expected):
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    schedule = options.pop("callbacks", None) if "callbacks" in options else None
    others = [] if schedule is None else [GradientAccumulationScheduler(schedule)]
    subject = monitor(detail=None)
    fit([*others, subject], network(), mini_batches(24, 6), max_epochs=1, **options)
    assert subject.history[0].notes["probe"]["batch_size"] == expected


def test_where_training_draws_with_replacement_so_are_mini_batches():
    from torch.utils.data import RandomSampler

    dataset = mini_batches(24, 8).dataset
    data = DataLoader(dataset, batch_size=8, sampler=RandomSampler(dataset, replacement=True))
    noise = GradientNoiseMonitor(
        every_n_train_steps=3, samples=True, directions=0, detail_every_n_train_steps=3, probe=Probe(draws=256)
    )
    module = network(lr=1e-6)
    fit(noise, module, data, max_epochs=1)
    x, y = dataset.tensors
    g = torch.stack([dense(module, [x[i : i + 1], y[i : i + 1]])[1] for i in range(24)])
    trace = float((g - g.mean(0)).square().sum(1).mean())
    record = noise.history[0]
    for key, truth in (("trace", trace / 8), ("sample_trace", trace)):
        assert abs(record.scalars[f"noise/{key}"] - truth) < 3 * record.errors[f"noise/{key}"]
    assert record.errors["noise/trace"] < 0.1 * trace / 8  # without repetition it were less by a third
