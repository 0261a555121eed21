"""GradientNoiseMonitor in whole fits, against dense gradients of the very batches and samples that it drew."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import combinations

import lightning.pytorch as pl
import pytest
import torch
from helpers.dense import dense, with_weights
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression, class_data, regression_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dynamics import GradientNoiseMonitor, Probe
from lightning_dynamics.callbacks import gradient_series, mini_batch_monitor
from lightning_dynamics.callbacks.map_style import MapStyleSource
from lightning_dynamics.callbacks.session import Session
from lightning_dynamics.metrics import (
    DrawnGradients,
    autocorrelation,
    drift_weight,
    noise_scale,
    reshuffling_autocorrelation,
    tail_index,
)
from lightning_dynamics.metrics.estimates import UnresolvedGradientError, student_quantile

ALWAYS = {"trace", "squared_gradient_norm", "signal_to_noise", "noise_scale"}


def network(optimizer=None, lr=0.05, seed=1):
    torch.manual_seed(seed)
    return Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=lr, optimizer=optimizer)


def monitor(every=1, detail=1, draws=6, **options):
    probe = options.pop("probe", Probe(draws=draws, seed=options.pop("seed", 0)))
    options.setdefault("directions", 2)
    return GradientNoiseMonitor(every_n_train_steps=every, detail_every_n_train_steps=detail, probe=probe, **options)


class Weights(pl.Callback):
    """The weights at every step, the last ones included."""

    def __init__(self):
        self.at = []

    def keep(self, module):
        self.at.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.keep(module)

    def on_train_end(self, trainer, module):
        self.keep(module)


class Gradients(pl.Callback):
    """The gradient of every optimizer step before clipping, as one vector; those of several optimizers together."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.current = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = [
            p.grad.double().reshape(-1) if id(p) in held and p.grad is not None else torch.zeros(p.numel()).double()
            for p in module.parameters()
        ]
        gradient = torch.cat(parts)
        self.current = gradient if self.current is None else self.current + gradient

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.current is not None:
            self.rows.append(self.current)


def drawn_batches(data, draws, batch_size, seed=0):
    """The batches that a probe draws, and the samples in them."""
    source = MapStyleSource(data, range(len(data.dataset)), data.batch_size)
    order = source.draw(draws, batch_size, seed)
    tensors = data.dataset.tensors
    return [[t[order[i : i + batch_size]] for t in tensors] for i in range(0, len(order), batch_size)]


def gradients(module, batches):
    """Dense gradients of batches, shape (M, p)."""
    module = copy.deepcopy(module).double()
    parameters, rows = list(module.parameters()), []
    for batch in batches:
        wide = [part.double() if part.is_floating_point() else part for part in batch]
        parts = torch.autograd.grad(module.loss(wide), parameters)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def sample_gradients(module, batch):
    """Dense gradients of the samples of a batch, shape (b, p)."""
    return gradients(module, [[part[i : i + 1] for part in batch] for i in range(len(batch[0]))])


def extremes(module, batches, count):
    """The top and bottom eigenpairs of the Hessian of all batches together: values, and vectors as rows."""
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    values, vectors = torch.linalg.eigh(dense(module, together)[2])
    chosen = [*range(-1, -count - 1, -1), *range(count)]
    return values[chosen], vectors[:, chosen].T


# What each number is, as a function of batch gradients g (M, p) and sample gradients s (M, b, p).


def trace(g):
    return float(g.var(0).sum())


def norm(g):
    products = g @ g.T
    return float(products.sum() - products.diagonal().sum()) / (len(g) * (len(g) - 1))


def jackknifed(function, *rows):
    """A statistic of independent draws, and the standard error of the delete-one jackknife."""
    count = len(rows[0])
    keep = [[i for i in range(count) if i != out] for out in range(count)]
    others = torch.tensor([function(*(row[kept] for row in rows)) for kept in keep], dtype=torch.float64)
    return float(function(*rows)), float(((count - 1) * others.var(correction=0)).sqrt())


def table(g, b, population=None):
    mean = g.mean(0)
    columns = (g.square().sum(1), (g - mean).square().sum(1), g @ mean)
    return DrawnGradients(*columns, float(mean @ mean), b, population)


def check(record, name, expected, rel=1e-3):
    """A number and its error against dense ones."""
    value, error = expected
    assert record.scalars[f"noise/{name}"] == pytest.approx(value, rel=rel, abs=1e-3 * error), name
    assert record.errors[f"noise/{name}"] == pytest.approx(error, rel=1e-2), name


def value(record, key):
    return record.scalars[f"noise/{key}"]


def keys(record):
    return {key.removeprefix("noise/") for key in record.scalars}


def spectral(directions):
    ends = [f"{end}_{i}" for end in ("top", "bottom") for i in range(1, directions + 1)]
    return {f"{kind}_{end}" for kind in ("variance", "curvature") for end in ends} | {"share_in_directions"}


def check_all(record, module, batches, b, population, directions=2):
    """Whatever does not depend on how training steps."""
    g = gradients(module, batches)
    check(record, "trace", jackknifed(trace, g))
    check(record, "squared_gradient_norm", jackknifed(norm, g))
    check(record, "signal_to_noise", jackknifed(lambda g: norm(g) / trace(g), g))
    try:
        scale = noise_scale(table(g, b, population))
        check(record, "noise_scale", (scale.value, scale.error))
        factor = b if population is None else b * (population - 1) / (population - b)
        assert scale.value == pytest.approx(factor * trace(g) / norm(g))
    except UnresolvedGradientError:
        assert "noise_scale" in record.notes["unresolved"]
        assert "noise/noise_scale" not in record.scalars
    if "noise/fisher_trace" in record.scalars:
        squares = torch.stack([sample_gradients(module, batch).square().sum(1).mean() for batch in batches])
        check(record, "fisher_trace", jackknifed(lambda s: float(s.mean()), squares))
        check(record, "sample_trace", jackknifed(lambda s, g: float(s.mean()) - norm(g), squares, g))
    if "noise/share_in_directions" in record.scalars:
        values, vectors = extremes(module, batches, directions)
        names = [f"{end}_{i}" for end in ("top", "bottom") for i in range(1, directions + 1)]
        for name, curvature, vector in zip(names, values, vectors, strict=True):
            allowed = record.errors[f"noise/curvature_{name}"] + 1e-5 * float(values.abs().max())
            assert value(record, f"curvature_{name}") == pytest.approx(float(curvature), rel=0, abs=allowed)
            check(record, f"variance_{name}", jackknifed(lambda g, v=vector: float((g @ v).var()), g), rel=5e-3)
        share = jackknifed(lambda g: float((g @ vectors.T).var(0).sum()) / trace(g), g)
        check(record, "share_in_directions", share, rel=5e-3)
    return g


@pytest.fixture
def exact_eigenvectors(monkeypatch):
    """Closer to the dense ones than a measurement needs."""
    exact = partial(mini_batch_monitor.eigenpairs, bottom_tolerance=1e-6)
    monkeypatch.setattr(
        mini_batch_monitor, "eigenpairs", lambda *args, tolerance, **how: exact(*args, tolerance=1e-6, **how)
    )


@pytest.mark.usefixtures("exact_eigenvectors")
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5}, {"weight_decay": 0.1}], ids=["plain", "momentum", "weight decay"]
)
def test_every_number_is_that_of_dense_gradients_of_the_drawn_batches(options):
    data, weights = mini_batches(24, 6, shuffle=True), Weights()
    subject = monitor(every=4, detail=4, draws=12)
    module = network(lambda p: SGD(p, 0.01, **options))
    fit([weights, subject], module, data, max_epochs=1)
    assert [record.step for record in subject.history] == [0, 4]
    batches = drawn_batches(data, 12, 6)
    for record, at in zip(subject.history, weights.at[::4], strict=True):
        there = with_weights(module, at)
        g = check_all(record, there, batches, 6, 24)
        found = keys(record) | set(record.notes.get("unresolved", ()))
        of_sgd = {"modified_loss_gd", "modified_loss_sgd", "weighted_trace"}
        assert found - of_sgd == ALWAYS | {"sample_trace", "fisher_trace"} | spectral(2)
        assert "at least 5" in record.notes["no_tail_index"]
        if options:
            assert not of_sgd & found
            (culprit,) = options
            assert culprit.replace("_", " ") in record.notes["no_modified_loss"]
            assert culprit.replace("_", " ") in record.notes["no_weighted_trace"]
            continue
        assert of_sgd <= found
        check(record, "modified_loss_gd", jackknifed(lambda g: 0.01 / 4 * norm(g), g))
        check(record, "modified_loss_sgd", jackknifed(lambda g: 0.01 / 4 * float(g.square().sum(1).mean()), g))
        values, vectors = extremes(there, batches, 2)
        w = drift_weight(0.01 * 4 * values)

        def weighted(g, w=w, vectors=vectors):
            c = (g @ vectors.T).var(0)
            return float(w @ c) + (trace(g) - float(c.sum())) / 2

        check(record, "weighted_trace", jackknifed(weighted, g), rel=5e-3)


@pytest.mark.usefixtures("exact_eigenvectors")
def test_batches_of_one_sample():
    data, weights, subject = mini_batches(12, 1, shuffle=True), Weights(), monitor(every=12, detail=12, draws=16)
    module = network(lr=1e-3)
    fit([weights, subject], module, data, max_epochs=1)
    batches = drawn_batches(data, 16, 1)
    for record, at in zip(subject.history, (weights.at[0], weights.at[-1]), strict=True):
        check_all(record, with_weights(module, at), batches, 1, 12)
        # tr Σ is E‖g_B - g‖² of one sample, and F that of one sample's gradient
        assert value(record, "sample_trace") == pytest.approx(value(record, "trace"), rel=1e-4)
        fisher = value(record, "squared_gradient_norm") + value(record, "trace")
        assert value(record, "fisher_trace") == pytest.approx(fisher, rel=1e-4)


def test_batches_of_the_whole_set_have_no_noise_and_the_exact_moments_of_samples():
    data = mini_batches(24, 6, shuffle=True)
    subject = monitor(every=4, detail=4, directions=1, probe=Probe(draws=4, batch_size=24))
    module = network()
    weights = Weights()
    fit([weights, subject], module, data, max_epochs=1)
    for record, at in zip(subject.history, (weights.at[0], weights.at[-1]), strict=True):
        s = sample_gradients(with_weights(module, at), data.dataset.tensors)
        full = s.mean(0)
        assert value(record, "trace") < 1e-10 * value(record, "fisher_trace")
        assert value(record, "squared_gradient_norm") == pytest.approx(float(full @ full), rel=1e-4)
        assert value(record, "sample_trace") == pytest.approx(float((s - full).square().sum(1).mean()), rel=1e-4)
        assert value(record, "fisher_trace") == pytest.approx(float(s.square().sum(1).mean()), rel=1e-4)
        for name in ("signal_to_noise", "noise_scale", "share_in_directions"):
            assert f"noise/{name}" not in record.scalars
            assert "do not differ" in record.notes["unresolved"][name]


def test_gradient_descent_has_only_the_modified_loss_of_gradient_descent():
    subject = monitor(every=2, detail=2, directions=1, probe=Probe(draws=4, batch_size=6))
    fit(subject, network(), full_batch(), max_epochs=2)
    for record in subject.history:
        assert "noise/modified_loss_gd" in record.scalars
        assert not {"modified_loss_sgd", "weighted_trace"} & keys(record)
        assert "not reshuffled" in record.notes["no_modified_loss_sgd"]
        assert "not reshuffled" in record.notes["no_weighted_trace"]


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: Adam(p, 0.01), "no theory of Adam"),
        (lambda p: SGD(p, 0.05, momentum=0.9, dampening=0.1), "dampening"),
        (lambda p: SGD(p, 0.0), "learning rate is 0"),
    ],
)
def test_what_a_theory_of_plain_sgd_gives_is_left_out_with_its_reason(optimizer, reason):
    subject = monitor(every=4, detail=4, directions=1, samples=False)
    fit(subject, network(optimizer), mini_batches(24, 6, shuffle=True), max_epochs=1)
    for record in subject.history:
        assert not {"modified_loss_gd", "modified_loss_sgd", "weighted_trace"} & keys(record)
        assert reason in record.notes["no_modified_loss"]
    assert reason in subject.history[0].notes["no_weighted_trace"]


def test_clipped_gradients_have_no_modified_loss():
    subject = monitor(every=4, detail=4, directions=0, samples=False)
    fit(subject, network(), mini_batches(24, 6, shuffle=True), max_epochs=1, gradient_clip_val=1.0)
    assert "clipped" in subject.history[0].notes["no_modified_loss"]


@pytest.mark.usefixtures("exact_eigenvectors")
@pytest.mark.parametrize(
    ("arguments", "population", "epoch"),
    [
        ({"shuffle": True}, 22, 4),
        ({"shuffle": True, "drop_last": True}, 22, 3),
        ({"drop_last": True}, 18, 3),
        ({}, 22, 4),
    ],
)
def test_uneven_epochs(arguments, population, epoch):
    """Without shuffling, the samples of the batch that is dropped are never trained on."""
    data, subject = mini_batches(22, 6, **arguments), monitor(every=100, detail=100)
    module, lr = network(), 0.05
    at = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(subject, module, data, max_epochs=1)
    source = MapStyleSource(data, range(population), 6)
    order = source.draw(6, 6, 0)
    batches = [[t[order[i : i + 6]] for t in data.dataset.tensors] for i in range(0, 36, 6)]
    there, record = with_weights(module, at), subject.history[0]
    g = check_all(record, there, batches, 6, population)
    assert ("noise/weighted_trace" in record.scalars) == ("shuffle" in arguments)
    if "shuffle" in arguments:
        values, vectors = extremes(there, batches, 2)
        c = (g @ vectors.T).var(0)
        expected = float(drift_weight(lr * epoch * values) @ c) + (trace(g) - float(c.sum())) / 2
        assert value(record, "weighted_trace") == pytest.approx(expected, rel=5e-3)


class Normed(Regression):
    def __init__(self):
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)), lr=0.05)


def test_with_batch_norm_the_noise_of_samples_comes_from_batches_and_the_record_says_why():
    data, weights = mini_batches(24, 6, shuffle=True), Weights()
    subject = monitor(every=2, detail=2, draws=16, directions=0)
    module = Normed()
    fit([weights, subject], module, data, max_epochs=1)
    batches = drawn_batches(data, 16, 6)
    for record, at in zip(subject.history, weights.at[::2], strict=True):
        there = Normed()
        there.load_state_dict(at, strict=False)
        g = check_all(record, there, batches, 6, 24)
        check(record, "sample_trace", jackknifed(lambda g: 6 * 23 / 18 * trace(g), g))
        assert not {"fisher_trace", "tail_index"} & keys(record)
        assert "BatchNorm" in record.notes["no_samples"] or "batch norm" in record.notes["no_samples"].lower()


def test_gradients_of_samples_that_are_demanded_and_coupled_stop_the_run_before_its_first_step():
    module = Normed()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(MisconfigurationException, match="single samples"):
        fit(monitor(samples=True), module, mini_batches(24, 6))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("samples", [False, True])
def test_without_samples_their_trace_comes_from_batches(samples):
    subject = monitor(every=4, detail=4, samples=samples, directions=0)
    fit(subject, network(), mini_batches(24, 6), max_epochs=1)
    for record in subject.history:
        assert ("noise/fisher_trace" in record.scalars) == bool(samples)
        assert "no_samples" not in record.notes
        by_batches = 6 * 23 / 18 * value(record, "trace")
        assert (value(record, "sample_trace") == pytest.approx(by_batches)) == (not samples)


def test_dropout_counts_as_noise():
    """Against 4000 draws of the masks on all samples, in closed form for a linear map."""
    keep, (x, y) = 0.7, regression_data(24)
    torch.manual_seed(0)
    module = Regression(nn.Sequential(nn.Dropout(1 - keep), nn.Linear(4, 1, bias=False)), lr=0.0)
    subject = monitor(every=10, detail=10, draws=64, directions=0)
    fit(subject, module, mini_batches(24, 6), max_epochs=1)
    record, w = subject.history[0], module.net[1].weight.detach()[0].double()
    masked = x.double() * (torch.rand(4000, 24, 4, generator=torch.Generator().manual_seed(1)) < keep) / keep
    g = (masked @ w - y.double()[:, 0])[..., None] * masked
    means = g.mean(0)
    between, within = float((means - means.mean(0)).square().sum(1).mean()), float(g.var(0).sum(1).mean())
    expected = {
        "trace": between * 18 / (6 * 23) + within / 6,
        "squared_gradient_norm": float(means.mean(0).square().sum()),
        "fisher_trace": float(g.square().sum(2).mean()),
        "sample_trace": between + within,
    }
    for name, exact in expected.items():
        assert abs(value(record, name) - exact) < 3 * record.errors[f"noise/{name}"], name
    assert value(record, "trace") > 1.5 * between * 18 / (6 * 23)


@pytest.mark.usefixtures("exact_eigenvectors")
def test_a_step_that_branches_on_values_has_its_samples_one_after_the_other():
    class Branches(Regression):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            return loss if loss.item() >= 0 else -loss

    torch.manual_seed(1)
    module, weights = Branches(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=0.05), Weights()
    data, subject = mini_batches(24, 6, shuffle=True), monitor(every=4, detail=4, samples=True)
    fit([weights, subject], module, data, max_epochs=1)
    batches = drawn_batches(data, 6, 6)
    for record, at in zip(subject.history, (weights.at[0], weights.at[-1]), strict=True):
        check_all(record, with_weights(module, at), batches, 6, 24)
        assert "noise/fisher_trace" in record.scalars


@pytest.mark.usefixtures("exact_eigenvectors")
def test_accumulated_batches_count_as_one_and_run_in_pieces():
    sizes = set()

    class Watched(Regression):
        def training_step(self, batch, batch_idx):
            sizes.add(len(batch[0]))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(1)
    module = Watched(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=0.05)
    data, weights = mini_batches(24, 4, shuffle=True), Weights()
    subject = monitor(every=2, detail=2, samples=False)
    fit([weights, subject], module, data, max_epochs=1, accumulate_grad_batches=3)
    assert [record.step for record in subject.history] == [0, 2]
    assert sizes == {4}
    batches = drawn_batches(data, 6, 12)
    for record, at in zip(subject.history, weights.at[::2], strict=True):
        assert record.notes["probe"]["batch_size"] == 12
        there = with_weights(module, at)
        g = check_all(record, there, batches, 12, 24)
        values, vectors = extremes(there, batches, 2)
        c = (g @ vectors.T).var(0)
        expected = float(drift_weight(0.05 * 2 * values) @ c) + (trace(g) - float(c.sum())) / 2
        assert value(record, "weighted_trace") == pytest.approx(expected, rel=5e-3)


@pytest.mark.usefixtures("exact_eigenvectors")
def test_samples_of_accumulated_batches():
    data, weights = mini_batches(24, 4, shuffle=True), Weights()
    subject, module = monitor(every=2, detail=2, samples=True, directions=0), network()
    fit([weights, subject], module, data, max_epochs=1, accumulate_grad_batches=3)
    for record, at in zip(subject.history, (weights.at[0], weights.at[-1]), strict=True):
        check_all(record, with_weights(module, at), drawn_batches(data, 6, 12), 12, 24)
        assert "noise/fisher_trace" in record.scalars


@pytest.mark.usefixtures("exact_eigenvectors")
def test_streams_are_measured_on_the_batches_that_pass_first():
    x, y = regression_data(40)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(x, y, strict=True))

    data, weights = DataLoader(Stream(), batch_size=4), Weights()
    subject, module = monitor(every=5, detail=5, samples=True), network()
    fit([weights, subject], module, data, max_epochs=1)
    batches = [[x[i : i + 4], y[i : i + 4]] for i in range(0, 24, 4)]
    assert [record.step for record in subject.history] == [0, 5, 10]
    for record, at in zip(subject.history, weights.at[::5], strict=True):
        check_all(record, with_weights(module, at), batches, 4, None)
        assert {"noise/fisher_trace", "noise/modified_loss_gd"} <= set(record.scalars)
        assert "noise/modified_loss_sgd" not in record.scalars
        assert record.notes["probe"]["N"] is None


class Classes(pl.LightningModule):
    """Cross-entropy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return SGD(self.parameters(), 0.1)


def outputs_of(module, batch):
    x, _ = batch
    return module.net(x), lambda z: Categorical(logits=z)


def true_fisher(module, batches):
    """(1/n)Σᵢ Σ_y p(y|xᵢ) ‖∇ log p(y|xᵢ)‖² over all samples in the batches."""
    x = torch.cat([batch[0] for batch in batches])
    p = module.net(x).softmax(1).detach().double()
    squares = [
        sample_gradients(module, (x, torch.full((len(x),), label))).square().sum(1) for label in range(p.shape[1])
    ]
    return float((p * torch.stack(squares, dim=1)).sum(1).mean())


def test_the_true_fisher_trace_is_that_of_labels_from_the_model():
    data = DataLoader(TensorDataset(*class_data(30)), batch_size=6, shuffle=True)
    weights, subject = Weights(), monitor(draws=4, directions=0, output_fn=outputs_of)
    module = Classes()
    fit([weights, subject], module, data, max_epochs=2)
    batches, away = drawn_batches(data, 4, 6), []
    for record, at in zip(subject.history, weights.at, strict=True):
        exact = true_fisher(with_weights(module, at), batches)
        away.append((value(record, "true_fisher_trace") - exact) / record.errors["noise/true_fisher_trace"])
        assert value(record, "fisher_trace") != pytest.approx(value(record, "true_fisher_trace"), rel=1e-2)
    assert len(away) == 11
    assert max(map(abs, away)) < 5.4  # Student's t for 7 degrees of freedom, 0.1 %
    assert sum(abs(t) < 2.365 for t in away) >= 8


def test_the_tail_index_is_that_of_the_samples_of_the_first_batches():
    data = mini_batches(400, 20, shuffle=True)
    subject, module = monitor(every=100, detail=100, draws=8, directions=0), network(lr=0.0)
    fit(subject, module, data, max_epochs=1)
    batches = drawn_batches(data, 8, 20)
    mean = gradients(module, batches).mean(0)
    chosen = batches[:5]  # a quarter of the set
    distances = torch.cat([(sample_gradients(module, batch) - mean).norm(dim=1) for batch in chosen])
    expected = tail_index(distances)
    check(subject.history[0], "tail_index", (expected.value, expected.error))


# The training's own gradients


class Rows(pl.Callback):
    """What the monitor has followed by the end of training; stands before it among the callbacks."""

    def __init__(self, subject):
        self.subject = subject

    def on_train_end(self, trainer, module):
        kept = self.subject.follower.state_dict()
        self.direction = torch.cat([part.reshape(-1) for part in kept["directions"].values()]).double()
        self.rows = kept["rows"][:, 0]


@pytest.mark.usefixtures("exact_eigenvectors")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 3}],
    ids=["plain", "clipped", "accumulated"],
)
def test_the_monitor_follows_the_gradients_of_training_before_clipping(options):
    subject = monitor(every=100, detail=100, directions=1, samples=False)
    rows, seen = Rows(subject), Gradients()
    module = network()
    at = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = mini_batches(24, 4, shuffle=True)
    fit([rows, seen, subject], module, data, max_epochs=2, **options)
    b = 4 * options.get("accumulate_grad_batches", 1)
    assert len(seen.rows) == len(rows.rows) == 48 // b
    assert torch.allclose(rows.rows, torch.stack(seen.rows) @ rows.direction, rtol=1e-4, atol=1e-6)
    _, vectors = extremes(with_weights(module, at), drawn_batches(data, 6, b), 1)
    assert abs(float(rows.direction @ vectors[0])) == pytest.approx(1.0, abs=1e-4)
    assert float(rows.rows.abs().max()) > 1e-2


def test_optimizers_that_step_by_hand_make_one_row_each_batch():
    class ByHand(Regression):
        def __init__(self):
            torch.manual_seed(1)
            super().__init__(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer, factor in ((first, 1.0), (second, 0.5)):
                loss = factor * self.loss(batch)
                self.manual_backward(loss)
                optimizer.step()
                self.zero_grad()

        def configure_optimizers(self):
            return SGD(self.net[0].parameters(), 0.05), SGD(self.net[2].parameters(), 0.02)

    subject = monitor(every=100, detail=100, loss_fn="loss", samples=False)
    rows, seen = Rows(subject), Gradients()
    fit([rows, seen, subject], ByHand(), mini_batches(24, 6), max_epochs=2)
    assert len(rows.rows) == len(seen.rows) == 8
    assert torch.allclose(rows.rows, torch.stack(seen.rows) @ rows.direction, rtol=1e-4, atol=1e-6)
    assert "no theory of SGD and SGD" in subject.history[0].notes["no_modified_loss"]


def test_a_closure_that_is_evaluated_again_counts_once():
    subject = monitor(every=100, detail=100, samples=False)
    rows, seen = Rows(subject), Gradients()
    calls = []

    def optimizer(parameters):
        return torch.optim.LBFGS(parameters, 0.1, max_iter=3)

    class First(Gradients):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            calls.append(trainer.global_step)
            if self.current is None:
                super().on_before_optimizer_step(trainer, module, optimizer)

    seen = First()
    fit([rows, seen, subject], network(optimizer), mini_batches(24, 6), max_epochs=1)
    assert len(calls) > len(seen.rows) == len(rows.rows) == 4
    assert torch.allclose(rows.rows, torch.stack(seen.rows) @ rows.direction, rtol=1e-4, atol=1e-6)


def test_at_fixed_weights_the_autocorrelation_is_that_of_reshuffling():
    """An identity of the sampler, whatever the loss: -(1 - h/k)/(k - 1) up to h = k, then 0."""
    subject = monitor(every=600, detail=600, directions=1, samples=False)
    torch.manual_seed(0)
    fit(subject, network(lr=0.0), mini_batches(24, 6, shuffle=True), max_epochs=150)
    first, last = subject.history
    assert "0 steps" in first.notes["no_autocorrelation"]
    assert last.notes["autocorrelation_steps"] == 600
    lags = [int(lag) for lag in last.arrays["noise/autocorrelation_lags"]]
    found = torch.tensor(last.arrays["noise/autocorrelation_values"], dtype=torch.float64)
    errors = torch.tensor(last.arrays["noise/autocorrelation_errors"], dtype=torch.float64)
    expected = reshuffling_autocorrelation(4, lags)
    assert lags[:4] == [1, 2, 3, 4]
    assert lags[-1] == 50
    away = (found - expected).abs() / errors
    assert float(away.max()) < 3.5
    assert bool((errors < 0.08).all())
    assert value(last, "autocorrelation") == pytest.approx(float(found[0]))
    assert last.errors["noise/autocorrelation"] == pytest.approx(float(errors[0]))


def test_only_the_last_gradients_are_kept():
    subject, seen = monitor(every=260, detail=1000, directions=1, series=100, samples=False), Gradients()
    rows = Rows(subject)
    module = network(lr=1e-3)
    torch.manual_seed(0)
    fit([rows, seen, subject], module, mini_batches(24, 6, shuffle=True), max_epochs=70)
    record = next(record for record in subject.history if record.step == 260)
    assert record.notes["autocorrelation_steps"] == 100
    lags = [1, 2, 3, 4, 5, 6, 8, 10]
    expected = autocorrelation(torch.stack(seen.rows[160:260]) @ rows.direction, lags)
    assert record.arrays["noise/autocorrelation_lags"] == lags
    assert record.arrays["noise/autocorrelation_values"] == pytest.approx([e.value for e in expected], abs=1e-4)
    assert record.arrays["noise/autocorrelation_errors"] == pytest.approx([e.error for e in expected], rel=1e-3)
    assert len(rows.rows) == 100


def test_a_gradient_that_is_not_finite_begins_the_series_anew():
    class Breaks(Regression):
        def on_after_backward(self):
            if self.trainer.global_step == 20:
                self.net[0].weight.grad[0, 0] = math.inf

        def on_before_optimizer_step(self, optimizer):  # as a gradient scaler does
            for parameter in self.parameters():
                parameter.grad.zero_()

    torch.manual_seed(1)
    module = Breaks(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), lr=0.0)
    subject = monitor(every=130, detail=1000, directions=1, samples=False)
    fit(subject, module, mini_batches(24, 6, shuffle=True), max_epochs=33)
    record = next(record for record in subject.history if record.step == 130)
    assert record.notes["autocorrelation_steps"] == 109


def run(folder, epochs, ckpt_path=None, **options):
    subject = monitor(every=20, detail=1000, directions=1, samples=False, **options)
    keep = ModelCheckpoint(folder, every_n_epochs=15, save_on_train_epoch_end=True, save_top_k=-1)
    fit(
        [subject, keep], network(lr=0.01), mini_batches(24, 6), max_epochs=epochs, ckpt_path=ckpt_path,
        enable_checkpointing=True, default_root_dir=folder,
    )  # fmt: skip
    return subject


def test_a_resumed_run_has_the_curves_of_the_run_that_was_not_interrupted(tmp_path):
    whole = run(tmp_path / "whole", 31)
    run(tmp_path / "first", 15)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    resumed = run(tmp_path / "second", 31, checkpoint)
    assert [r.step for r in resumed.history] == [r.step for r in whole.history] == [*range(0, 121, 20), 124]
    for one, other in zip(whole.history[:-1], resumed.history[:-1], strict=True):  # the last is in detail
        assert one.scalars == other.scalars
        assert one.errors == other.errors
        assert one.arrays == other.arrays
    assert whole.history[5].notes["autocorrelation_steps"] == 100
    assert resumed.history[-1].scalars.keys() == whole.history[-1].scalars.keys()
    assert resumed.history[-1].notes["autocorrelation_steps"] == 124


def test_directions_that_are_too_large_for_a_checkpoint_are_left_out_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_series, "_SMALL", 100)
    run(tmp_path / "first", 15)
    (checkpoint,) = (tmp_path / "first").glob("*.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = [state for name, state in kept.items() if "GradientNoise" in name]
    assert state["followed"] == {}
    resumed = run(tmp_path / "second", 31, checkpoint)
    assert "0 steps" in resumed.history[-1].notes["no_autocorrelation"]
    assert resumed.history[-1].step == 124


def test_monitors_of_the_same_mini_batches_may_want_different_numbers_of_directions():
    data = mini_batches(24, 6, shuffle=True)
    many = [monitor(every=4, detail=4, directions=n, name=f"n{n}", samples=False) for n in (1, 2, 0)]
    alone = monitor(every=4, detail=4, directions=2, samples=False)
    fit(many, network(lr=0.0), data, max_epochs=1)
    fit(alone, network(lr=0.0), data, max_epochs=1)
    for together in many:
        family = f"noise_{together.name}/"
        assert len(together.history) == len(alone.history) == 2
        for one, other in zip(together.history, alone.history, strict=True):
            found = {key.removeprefix(family): value for key, value in one.scalars.items()}
            assert {key for key in found if key in spectral(2)} == (
                spectral(together.directions) if together.directions else set()
            )
            for key, here in found.items():
                if key != "share_in_directions" or together.directions == 2:
                    assert here == pytest.approx(value(other, key), rel=1e-2, abs=1e-3), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": "yes"}, "samples"),
        ({"samples": 1}, "samples"),
        ({"directions": -1}, "directions"),
        ({"directions": 1.5}, "directions"),
        ({"series": -1}, "series"),
        ({"series": 99}, "at least 100, or 0"),
        ({"detail_every_n_train_steps": 0}, "detail_every_n_train_steps"),
        ({"every_n_train_steps": 0}, "every_n_train_steps"),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, "exclude each other"),
        ({"output_fn": "net"}, "output_fn"),
        ({"engine": "fast"}, "engine"),
        ({"noise_draws": 0}, "noise_draws"),
        ({"mode": "predict"}, "mode"),
        ({"precision": "double"}, "precision"),
        ({"also_log": "nothing"}, "matches no key"),
        ({"also_log": "variance_top_4"}, "matches no key"),
        ({"name": "a/b"}, "name"),
        ({"probe": Probe(size=8)}, r"Probe\(draws=32\)"),
        ({"monitor": 1}, "monitor"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(MisconfigurationException, match=words):
        GradientNoiseMonitor(**options)


def test_more_directions_than_there_are_parameters_are_refused():
    with pytest.raises(MisconfigurationException, match="6 eigenvectors of 4 parameters"):
        fit(monitor(directions=3), Regression(), mini_batches())


def test_without_directions_nothing_is_followed():
    subject = monitor(directions=0, every=4, detail=4)
    assert subject.follower is None
    fit(subject, network(), mini_batches(24, 6, shuffle=True), max_epochs=1)
    expected = ALWAYS | {"modified_loss_gd", "modified_loss_sgd", "sample_trace", "fisher_trace"}
    for record in subject.history:
        assert keys(record) | set(record.notes.get("unresolved", ())) == expected


def test_what_stands_in_the_record_and_what_is_logged():
    subject = monitor(every=4, detail=4, samples=False, also_log="variance_.*", monitor=True)
    trainer = fit(subject, network(), mini_batches(24, 6, shuffle=True), max_epochs=1)
    logged = {key for key in trainer.callback_metrics if key.startswith("noise/")}
    variances = {f"variance_{end}_{i}" for end in ("top", "bottom") for i in (1, 2)}
    assert {key.removeprefix("noise/") for key in logged} - {"noise_scale"} == (ALWAYS - {"noise_scale"}) | variances


@pytest.mark.slow
@pytest.mark.usefixtures("exact_eigenvectors")
def test_stated_errors_cover_the_truth_over_all_batches(monkeypatch):
    """200 seeds at the same weights, 32 draws each; truth by all subsets of three of nine samples.

    Along eigenvectors the truth is the variance along those that were measured with: those of the drawn batches.
    """
    x, y = regression_data(9)
    data = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    everything = [[x[list(c)], y[list(c)]] for c in combinations(range(9), 3)]
    initial, lr = network(seed=3), 0.05
    g, s = gradients(initial, everything), sample_gradients(initial, (x, y))
    full = g.mean(0)
    covariance = (g - full).T @ (g - full) / len(g)
    signal, noise = float(full @ full), float(covariance.trace())
    sample_trace = float((s - full).square().sum(1).mean())
    truth = {
        "trace": noise,
        "squared_gradient_norm": signal,
        "signal_to_noise": signal / noise,
        "noise_scale": sample_trace / signal,
        "sample_trace": sample_trace,
        "fisher_trace": float(s.square().sum(1).mean()),
        "modified_loss_gd": lr / 4 * signal,
        "modified_loss_sgd": lr / 4 * (signal + noise),
    }
    hits = {}
    monkeypatch.setattr(Session, "end", lambda *_: None)  # one point is enough
    for group in range(20):
        subjects = [
            monitor(every=9, detail=9, draws=32, seed=10 * group + i, name=f"n{i}", series=0, engine="kept")
            for i in range(10)
        ]
        fit(subjects, copy.deepcopy(initial), data, max_epochs=1, max_steps=1)
        for i, subject in enumerate(subjects):
            record = subject.history[0]
            batches = drawn_batches(data, 32, 3, seed=10 * group + i)
            values, vectors = extremes(initial, batches, 2)
            c = (vectors @ covariance * vectors).sum(1)
            names = ("variance_top_1", "variance_top_2", "variance_bottom_1", "variance_bottom_2")
            weighted = float(drift_weight(lr * 3 * values) @ c) + (noise - float(c.sum())) / 2
            here = {
                **truth,
                **dict(zip(names, c.tolist(), strict=True)),
                "share_in_directions": float(c.sum()) / noise,
                "weighted_trace": weighted,
            }
            for name, exact in here.items():
                key = f"noise_n{i}/{name}"
                if key in record.scalars:
                    away = abs(record.scalars[key] - exact)
                    hits.setdefault(name, []).append(away <= student_quantile(31) * record.errors[key])
    rates = {name: (sum(found) / len(found), len(found)) for name, found in hits.items()}
    print(rates)
    assert len(rates) == len(truth) + 6
    for name, (rate, count) in rates.items():
        assert count >= 150, name
        assert rate >= 0.89, name


@pytest.mark.slow
def test_stated_errors_cover_the_autocorrelation_of_reshuffled_gradients():
    """At fixed weights, 200 orders of 1000 steps, with gradients along one direction."""
    g = sample_gradients(network(seed=3), regression_data(24))[:, 0]
    lags = [1, 2, 3, 4, 8, 20]
    truth, hits = reshuffling_autocorrelation(4, lags), torch.zeros(len(lags))
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        series = torch.cat([g[torch.randperm(24, generator=generator)].view(4, 6).mean(1) for _ in range(250)])
        found = autocorrelation(series, lags)
        hits += torch.tensor([abs(e.value - t) <= 1.96 * e.error for e, t in zip(found, truth, strict=True)])
    print(dict(zip(lags, (hits / 200).tolist(), strict=True)))
    assert bool((hits / 200 >= 0.89).all())
