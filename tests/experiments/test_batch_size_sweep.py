import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lightning_dynamics.experiments import batch_size_sweep

N, SIZE = 40, 5


def linear_data(n=N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, SIZE, generator=draw) * torch.tensor([2.0, 1.0, 0.7, 0.4, 0.2])
    return x, torch.randn(n, generator=draw)


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(SIZE, 1, bias=False)


def half_square(module, batch):
    x, y = batch
    return (module(x).squeeze(1) - y).square().mean() / 2


def hessian_of(x):
    return (x.double().T @ x.double()) / len(x)


def test_of_linear_regression_every_number_is_known():
    x, y = linear_data()
    module = linear()
    found = batch_size_sweep(module, TensorDataset(x, y), [1, N], loss=half_square, draws=64)
    top = float(torch.linalg.eigvalsh(hessian_of(x))[-1])
    trace = float(hessian_of(x).trace())
    assert found.sharpness == pytest.approx(top, rel=1e-4)
    # at b = 1 the Hessian has rank one, along the gradient
    first = found.minibatch_sharpness[0]
    assert abs(first.value - trace) < 4 * first.error
    assert abs(found.gaps[0].value - (trace - top)) < 4 * found.gaps[0].error
    # where the Hessian has rank one, both are ‖x‖², of the same draws; the error is that of ‖x‖² - (v₁·x)²
    norms, vector = x.double().square().sum(1), torch.linalg.eigh(hessian_of(x))[1][:, -1]
    own = found.batch_sharpness[0]
    assert abs(own.value - trace) < 4 * own.error
    assert own.error == pytest.approx(float(norms.std()) / 8, rel=0.25)
    beside = norms - (x.double() @ vector).square()
    assert first.error == pytest.approx(float(beside.std()) / 8, rel=0.25)
    assert first.error < own.error / 2
    # at b = N there is one batch
    assert found.gaps[-1].value == found.gaps[-1].error == 0
    gradient = x.double().T @ (x.double() @ module.weight[0].detach().double() - y.double()) / N
    along = float(gradient @ hessian_of(x) @ gradient / gradient.square().sum())
    assert found.batch_sharpness[-1].value == pytest.approx(along, rel=1e-5)
    assert along < top


def test_the_gap_is_without_bias_and_its_error_is_its_scatter():
    """Twelve sweeps of a known gap, E λmax(H_B) - λmax(H) at b = 2 by enumeration."""
    x, y = linear_data(8)
    pairs = [(i, j) for i in range(8) for j in range(i)]
    tops = [float(torch.linalg.eigvalsh(hessian_of(x[[i, j]]))[-1]) for i, j in pairs]
    truth = sum(tops) / len(tops) - float(torch.linalg.eigvalsh(hessian_of(x))[-1])
    found = [
        batch_size_sweep(linear(), TensorDataset(x, y), [2], loss=half_square, draws=8, seed=seed).gaps[0]
        for seed in range(12)
    ]
    values = torch.tensor([gap.value for gap in found], dtype=torch.float64)
    error = math.sqrt(sum(gap.error**2 for gap in found) / 12)
    assert abs(float(values.mean()) - truth) < 3 * error / math.sqrt(12)
    assert 0.6 < float(values.std()) / error < 1.6


def test_the_gap_falls_with_the_batch_size_and_the_exponent_is_fitted_where_it_can_be():
    x, y = linear_data(400, seed=1)
    sizes = [4, 8, 16, 32, 64, 200, 400]
    found = batch_size_sweep(linear(), TensorDataset(x, y), sizes, loss=half_square, draws=12)
    gaps = [gap.value for gap in found.gaps]
    assert gaps == sorted(gaps, reverse=True)
    assert found.fitted == [4, 8, 16, 32, 64]
    assert -1.2 < found.exponent.value < -0.5
    assert found.exponent.error < 0.15
    slope = np.polyfit(np.log(found.fitted), np.log(gaps[:5]), 1)[0]
    assert found.exponent.value == pytest.approx(slope, abs=3 * found.exponent.error)


def test_no_exponent_is_made_up():
    x, y = linear_data()
    data = TensorDataset(x, y)
    assert (
        "three batch sizes up to 10"
        in batch_size_sweep(linear(), data, [1, 20, 40], loss=half_square, draws=2).no_exponent
    )
    same = TensorDataset(torch.ones(N, SIZE), torch.zeros(N))
    found = batch_size_sweep(linear(), same, [1, 2, 4], loss=half_square, draws=4)
    assert found.exponent is None
    assert "cannot be told from zero" in found.no_exponent
    assert "No exponent" in str(found)


def test_all_samples_are_the_same_function_in_whatever_chunks():
    x, y = linear_data()
    first, second = (
        batch_size_sweep(linear(), TensorDataset(x, y), [4], loss=half_square, draws=2, chunk=chunk)
        for chunk in (7, 100)
    )
    assert first.sharpness == pytest.approx(second.sharpness, rel=1e-5)


class Regression(pl.LightningModule):
    """Logs, and draws noise in its step."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        loss = half_square(self.net, batch)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"again": loss})
        return {"loss": loss}


class WithoutIndex(Regression):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Noisy(Dataset):
    """Samples with noise from every generator, and a count of its reads."""

    def __init__(self):
        self.x, self.y = linear_data()

    def __len__(self):
        return N

    def __getitem__(self, i):
        noise = torch.randn(SIZE) + random.random() + float(np.random.rand())
        return self.x[i] + 0.1 * noise, self.y[i]


@pytest.mark.parametrize("make", [Regression, WithoutIndex])
def test_a_module_of_lightnings_is_measured_on_its_own_step_without_a_trainer(make):
    torch.manual_seed(0)
    module = make()
    data = TensorDataset(*linear_data())
    found = batch_size_sweep(module, data, [2, 4], draws=3)
    again = batch_size_sweep(module.net, data, [2, 4], draws=3, loss=half_square)
    assert found == again


def test_nothing_is_left_behind_and_the_same_call_gives_the_same_numbers():
    torch.manual_seed(0)
    module, data = Regression(dropout=0.5), Noisy()
    weights = {name: value.clone() for name, value in module.state_dict().items()}

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = state()
    first = batch_size_sweep(module, data, [2, 4, 8], draws=4)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training
    torch.rand(3)
    assert batch_size_sweep(module, data, [2, 4, 8], draws=4) == first
    # the draws of a size do not depend on which other sizes there are
    assert batch_size_sweep(module, data, [4], draws=4).gaps == first.gaps[1:2]
    assert batch_size_sweep(module, data, [4], draws=4, seed=1).gaps != first.gaps[1:2]


def test_a_function_that_makes_batches_does_as_well_as_a_data_set():
    x, y = linear_data()
    asked = []

    def batch_of(indices):
        asked.append(indices)
        return x[indices], y[indices]

    found = batch_size_sweep(linear(), batch_of, [2, 4], loss=half_square, num_samples=N, draws=3)
    assert found == batch_size_sweep(linear(), TensorDataset(x, y), [2, 4], loss=half_square, draws=3)
    assert asked[0] == list(range(N))
    assert [len(indices) for indices in asked[1:]] == [2] * 3 + [4] * 3
    assert all(len(set(indices)) == len(indices) for indices in asked)


def test_batches_without_a_gradient_have_no_batch_sharpness():
    module = linear()
    nn.init.zeros_(module.weight)
    found = batch_size_sweep(module, TensorDataset(linear_data()[0], torch.zeros(N)), [2, N], loss=half_square, draws=3)
    assert found.batch_sharpness == [None, None]
    assert found.gaps[0].value > 0
    assert len(str(found).splitlines()) == 5
    assert len(found.figure().axes) == 2


def test_batch_norm_in_training_mode_is_refused():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(SIZE, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    data = TensorDataset(*linear_data())
    with pytest.raises(ValueError, match=r"Batch norm in training mode \(1\) couples"):
        batch_size_sweep(module, data, [4], loss=half_square)
    found = batch_size_sweep(module, data, [4], loss=half_square, mode="eval", draws=2)
    assert module.training
    module.eval()
    assert batch_size_sweep(module, data, [4], loss=half_square, draws=2) == found


def test_misuse_is_refused():
    data = TensorDataset(*linear_data())
    with pytest.raises(ValueError, match="`loss` is needed"):
        batch_size_sweep(linear(), data, [1])
    for sizes in ([], [0], [N + 1], [1.5]):
        with pytest.raises(ValueError, match="between 1 and the 40 samples"):
            batch_size_sweep(linear(), data, sizes, loss=half_square)
    for name, value in (("draws", 1), ("chunk", 0), ("fit_up_to", 0.0), ("mode", "test")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            batch_size_sweep(linear(), data, [1], loss=half_square, **{name: value})
    with pytest.raises(ValueError, match="needs `num_samples`"):
        batch_size_sweep(linear(), lambda indices: None, [1], loss=half_square)
    with pytest.raises(ValueError, match="a map-style data set or a function"):
        batch_size_sweep(linear(), iter(data), [1], loss=half_square)
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="Under manual optimization"):
        batch_size_sweep(module, data, [1])


def test_the_table_and_the_figure_show_what_was_found():
    x, y = linear_data(400, seed=1)
    found = batch_size_sweep(linear(), TensorDataset(x, y), [4, 16, 64, 400], loss=half_square, draws=12)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["4", "16", "64", "400"]
    assert lines[-1].startswith("gap ∝ b^c with c = -")
    left, right = found.figure().axes
    assert left.get_legend() is not None
    assert math.isclose(right.lines[-1].get_xdata()[0], 4)
