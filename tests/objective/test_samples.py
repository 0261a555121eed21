"""Gradients of single samples against loops over batches of one, and what must be refused."""

import dataclasses
import random
import warnings
from collections import OrderedDict, UserDict, namedtuple
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.operators import generator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_dynamics.objective import Objective
from lightning_dynamics.objective.samples import CoupledSamplesError, SampleGradients, slices

SAME = {torch.float32: {"rtol": 1e-4, "atol": 1e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-12}}


def seeded(build):
    """A module whose initialization leaves no random numbers behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def images(n=7, dtype=torch.float32, seed=0):
    draw = generator(seed)
    return torch.randn(n, 2, 5, 5, generator=draw).to(dtype), torch.randint(0, 3, (n,), generator=draw)


def vectors(n=7, dtype=torch.float32, seed=0):
    draw = generator(seed)
    return torch.randn(n, 4, generator=draw).to(dtype), torch.randint(0, 3, (n,), generator=draw)


def tokens(n=7, length=6, seed=0):
    draw = generator(seed)
    return torch.randint(1, 9, (n, length), generator=draw), torch.randint(0, 3, (n,), generator=draw)


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 3)
    )


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, words):
        return self.head(self.layer(self.embedding(words), src_key_padding_mask=words == 0).mean(1))


class Tied(nn.Module):
    """One matrix that embeds and reads out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words):
        return self.out(torch.tanh(self.mix(self.embedding(words)))).mean(1)


@contextmanager
def opened(objective, **how):
    """The objective's samples, inside the open sandbox, and what they need of a batch."""
    with objective.linearize() as at:
        yield SampleGradients(objective, at._leaves, at.layout, **how), at


def measured(objective, batch, **how):
    """Rows of one batch, and what was used to compute them."""
    with opened(objective, **how) as (samples, at):
        loss, gradient = at.evaluate(keep=False)
        weight = at.weights["all"]
        blocks = list(samples.of_batch(0, batch, 0, gradient / weight, loss / weight))
        return torch.cat(blocks), samples, blocks


def gradients(module, loss, batch, where=None, **how):
    """Rows of a module's samples, and what was used to compute them."""
    return measured(Objective(module, loss, [batch], parameters=where), batch, **how)


def brute_force(module, loss, parts, names=None):
    """One gradient per sample by an independent route: ``functional_call`` over batches of one."""
    values = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters() if p.requires_grad}
    rows = []
    for part in parts:

        def call(*args, **kwargs):
            return torch.func.functional_call(module, values, args, kwargs)

        found = torch.autograd.grad(loss(call, part), list(values.values()), allow_unused=True)
        flat = [torch.zeros_like(v) if g is None else g for g, v in zip(found, values.values(), strict=True)]
        rows.append(torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in flat]))
    return torch.stack(rows)


def pairs(batch):
    return [tuple(member[i : i + 1] for member in batch) for i in range(len(batch[0]))]


MODULES = {
    "mlp": (mlp, vectors),
    "convnet": (convnet, images),
    "attention": (Attention, tokens),
    "tied": (Tied, tokens),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_rows_are_the_gradients_of_batches_of_one(name, dtype):
    build, data = MODULES[name]
    module, batch = seeded(build).to(dtype), data()
    if batch[0].is_floating_point():
        batch = (batch[0].to(dtype), batch[1])
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped
    assert not samples.is_noisy
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[dtype])


@pytest.mark.parametrize("most_bytes", [1, 3 * 57 * 8, 4 * 57 * 8 + 5, 1 << 20])
def test_blocks_are_bounded_and_leave_no_sample_out(most_bytes):
    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    expected = brute_force(module, cross_entropy, pairs(batch))
    assert expected.shape[1] == 51
    rows, _, blocks = gradients(module, cross_entropy, batch, most_bytes=most_bytes)
    torch.testing.assert_close(rows, expected, **SAME[torch.float64])
    most = max(1, most_bytes // (51 * 8))
    assert [len(block) for block in blocks[:-1]] == [most] * (len(blocks) - 1)
    assert all(block.shape[1:] == (51,) for block in blocks)
    assert 0 < len(blocks[-1]) <= most


def test_weights_that_are_frozen_or_not_measured():
    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    full = brute_force(module, cross_entropy, pairs(batch))
    rows, samples, _ = gradients(module, cross_entropy, batch, where="2.*")
    assert samples.is_mapped
    torch.testing.assert_close(rows, full[:, 30:], **SAME[torch.float64])
    module[0].requires_grad_(False)
    rows, _, _ = gradients(module, cross_entropy, batch)
    torch.testing.assert_close(rows, full[:, 30:], **SAME[torch.float64])


def test_parametrized_and_normalized_weights():
    def build():
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))

    module, batch = seeded(build).double(), vectors(dtype=torch.float64)
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


def test_complex_weights_have_two_coordinates_each():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
            self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x):
            return (x.to(torch.complex128) @ self.phase).abs() + self.bias

    module, batch = seeded(Rotated), vectors(dtype=torch.float64)
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped
    assert rows.shape == (7, 27)
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


def test_recurrent_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5, num_layers=2, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x.unsqueeze(1).expand(-1, 4, -1))[0][:, -1])

    module, batch = seeded(Recurrent).double(), vectors(dtype=torch.float64)
    rows, _, _ = gradients(module, cross_entropy, batch)
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


def test_weights_that_hide_in_lists_are_not_missed():
    class Penalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.decayed = {"all": [[self.net[0].weight]]}

    def loss(module, batch):
        return cross_entropy(module.net, batch) + 0.1 * module.decayed["all"][0][0].square().sum()

    module, batch = seeded(Penalized).double(), vectors(dtype=torch.float64)
    rows, samples, _ = gradients(module, loss, batch)
    assert not samples.is_mapped
    expected = brute_force(module.net, cross_entropy, pairs(batch))
    expected[:, :24] += 0.2 * module.net[0].weight.detach().flatten()
    torch.testing.assert_close(rows, expected, **SAME[torch.float64])


def test_autocast_and_weights_narrower_than_float32():
    module, batch = seeded(mlp), vectors()
    objective = Objective(module, cross_entropy, [batch], context=lambda: torch.autocast("cpu", torch.bfloat16))
    rows, samples, _ = measured(objective, batch)
    assert samples.is_mapped
    assert rows.dtype == torch.float32
    full = brute_force(module, cross_entropy, pairs(batch))
    assert float((rows - full).norm() / full.norm()) < 0.03
    narrow = seeded(mlp).bfloat16()
    rows, _, _ = gradients(narrow, cross_entropy, vectors(dtype=torch.bfloat16))
    assert rows.dtype == torch.float32
    wide = [(x.float(), y) for x, y in pairs(vectors(dtype=torch.bfloat16))]
    torch.testing.assert_close(rows, brute_force(narrow.float(), cross_entropy, wide), **SAME[torch.float32])


def test_label_smoothing_and_penalties_do_not_couple():
    def loss(module, batch):
        penalty = sum(p.square().sum() for p in module.parameters())
        return F.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1) + 0.01 * penalty

    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    rows, _, _ = gradients(module, loss, batch)
    alone = [gradients(module, loss, pair)[0] for pair in pairs(batch)]
    torch.testing.assert_close(rows, torch.cat(alone), **SAME[torch.float64])


def test_batches_in_dicts_with_text_and_numbers():
    x, y = vectors(dtype=torch.float64)
    batch = {"x": x, "target": {"y": y}, "names": list("abcdefg"), "scale": torch.tensor(2.0), "name": "digits"}

    def loss(module, batch):
        assert len(batch["names"]) == len(batch["x"])
        return F.cross_entropy(module(batch["x"] * batch["scale"]), batch["target"]["y"])

    module = seeded(mlp).double()
    expected = brute_force(module, cross_entropy, pairs((2 * x, y)))
    rows, samples, _ = gradients(module, loss, batch)
    assert not samples.is_mapped  # text is not a tensor
    torch.testing.assert_close(rows, expected, **SAME[torch.float64])
    del batch["names"]
    rows, samples, _ = gradients(module, lambda m, b: F.cross_entropy(m(b["x"] * b["scale"]), b["target"]["y"]), batch)
    assert samples.is_mapped
    torch.testing.assert_close(rows, expected, **SAME[torch.float64])


def test_a_function_that_splits_what_surrounds_the_batch():
    """As the loss of a LightningModule receives it: with a number and a mark that it was transferred."""
    calls = []

    def ready(item):
        calls.append(item[2])
        return item[0] if item[2] else (item[0][0] + 0.1 * torch.randn_like(item[0][0]), item[0][1])

    def loss(module, item):
        return cross_entropy(module, ready(item))

    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    item = (batch, 5, False)
    objective = Objective(
        module, loss, [item], samples_of=lambda item: [(part, item[1], True) for part in slices(ready(item))]
    )
    rows, samples, _ = measured(objective, item)
    assert samples.is_mapped
    assert not samples.is_noisy  # the noise is that of the batch
    assert set(calls) == {True, False}
    with opened(objective) as (_, at):
        _, weighted = at.evaluate(keep=False)
    torch.testing.assert_close(rows.mean(0), weighted / at.weights["all"], **SAME[torch.float64])


# What is refused


class Standardized(nn.Module):
    """Statistics of the batch without batch norm."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x - x.mean(0))


def class_weights(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0], dtype=batch[0].dtype))


def contrastive(module, batch):
    z = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(z @ z.detach().mT / 0.5, torch.arange(len(z)))


def detached_scale(module, batch):
    """Its value is a mean over samples, its gradient is not."""
    losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    scale = losses.detach().mean()
    return (losses / scale).mean() * scale * 0.0 + losses.detach().mean() + (losses / scale).mean() - 1.0


COUPLED = {
    "statistics": (Standardized, cross_entropy),
    "class weights": (mlp, class_weights),
    "contrastive": (mlp, contrastive),
    "by gradient only": (mlp, detached_scale),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_refused(name, dtype):
    build, loss = COUPLED[name]
    module, batch = seeded(build).to(dtype), vectors(dtype=dtype)
    with pytest.raises(CoupledSamplesError, match="samples are coupled"):
        gradients(module, loss, batch)


def test_a_sum_over_samples_is_refused_by_its_name():
    module, batch = seeded(mlp), vectors()
    with pytest.raises(CoupledSamplesError, match="reduction='mean'"):
        gradients(module, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), batch)


def batch_normalized():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def test_batch_norm_is_refused_in_training_and_taken_in_evaluation():
    module, batch = seeded(batch_normalized).double(), images(dtype=torch.float64)
    with pytest.raises(CoupledSamplesError, match=r"Batch norm.*eval"):
        gradients(module, cross_entropy, batch)
    with pytest.raises(CoupledSamplesError, match="Batch norm"):
        gradients(nn.SyncBatchNorm.convert_sync_batchnorm(module), cross_entropy, batch)
    module.eval()
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


def test_batch_norm_whose_scale_is_still_zero_is_refused():
    """Its samples look uncoupled as long as nothing but the weights before it is measured."""
    module = seeded(batch_normalized)
    nn.init.zeros_(module[1].weight)
    with pytest.raises(CoupledSamplesError, match="Batch norm"):
        gradients(module, cross_entropy, images(), where="0.*")


def test_batch_norm_beside_dropout_is_refused():
    module = seeded(lambda: nn.Sequential(nn.Dropout(0.5), batch_normalized()))
    with pytest.raises(CoupledSamplesError, match="Batch norm"):
        gradients(module, cross_entropy, images())


@pytest.mark.parametrize("pads", [False, True])
def test_means_over_tokens_are_refused_where_lengths_differ(pads):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))

    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1)

    words = tokens()[0]
    tags = words % 3
    tags[:, 4:] = -1
    if pads:
        tags[2, 3] = -1
    module = seeded(Tagger).double()
    if pads:
        with pytest.raises(CoupledSamplesError, match="different lengths"):
            gradients(module, loss, (words, tags))
    else:
        rows, _, _ = gradients(module, loss, (words, tags))
        alone = [gradients(module, loss, pair)[0] for pair in pairs((words, tags))]
        torch.testing.assert_close(rows, torch.cat(alone), **SAME[torch.float64])


def test_coupling_is_looked_for_in_every_batch():
    """Class weights do not couple a batch of one class."""
    module = seeded(mlp)
    x, _ = vectors()
    batches = [(x, torch.zeros(7, dtype=torch.long)), vectors(seed=1)]
    for dropout in (nn.Identity(), nn.Dropout(0.5)):
        objective = Objective(nn.Sequential(module, dropout), class_weights, batches)
        with opened(objective) as (samples, at):
            at.evaluate(keep=False)
            for number, batch in enumerate(batches):
                loss = objective._evaluate(number, batch, 0)
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, samples._leaves)])
                found = samples.of_batch(number, batch, 0, gradient, float(loss.detach()))
                if number == 0:
                    assert len(torch.cat(list(found))) == 7
                else:
                    with pytest.raises(CoupledSamplesError, match="class weights"):
                        list(found)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_residuals_that_are_rounding_errors_are_not_taken_for_coupling(seed):
    """A fit so close that float32 leaves nothing of the residuals."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Linear(4, 1)
    x, _ = vectors(n=64)
    x = x + 30
    y = (x.double() @ module.weight.detach().double().mT + module.bias.detach().double()).float()
    rows, _, _ = gradients(module, lambda m, b: (m(b[0]) - b[1]).square().mean(), (x, y))
    assert rows.shape == (64, 5)


def test_a_step_that_cannot_run_on_one_sample_is_refused():
    def skips(module, batch):
        return cross_entropy(module, batch) if len(batch[0]) > 1 else None

    def fails(module, batch):
        assert len(batch[0]) > 1, "too few"
        return cross_entropy(module, batch)

    module, batch = seeded(mlp), vectors()
    with pytest.raises(CoupledSamplesError, match="skips"):
        gradients(module, skips, batch)
    with pytest.raises(ValueError, match="sample 0 alone: too few"):
        gradients(module, fails, batch)


def test_after_a_refusal_the_sandbox_goes_on_as_before():
    def writes(module, batch):
        if len(batch[0]) == 1:
            with torch.no_grad():
                module[0].weight.add_(1)
            raise RuntimeError("broken")
        return cross_entropy(module, batch)

    module, batch = seeded(mlp), vectors()
    objective = Objective(module, writes, [batch])
    with opened(objective) as (samples, at):
        before = at.evaluate(keep=False)
        with pytest.raises(ValueError, match="broken"):
            list(samples.of_batch(0, batch, 0, before[1] / 7, before[0] / 7))
        after = at.evaluate(keep=False)
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


# Noise


def dropped():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def linear_dropout(module, batch):
    """Linear in the mask, so that its expectation is known."""
    return (module[3](F.dropout(module[0](batch[0]), 0.5, module.training)) * batch[1][:, None]).mean()


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_each_sample_draws_its_own_noise(way):
    """Gradients with respect to the last weight are those of the mask: one in two, doubled, and independent."""
    module = seeded(dropped).double()
    x = torch.ones(400, 4, dtype=torch.float64)
    batch = (x, torch.ones(400, dtype=torch.float64))

    def loss(module, batch):
        if way == "loop":
            float(batch[0].sum())
        return linear_dropout(module, batch)

    rows, samples, _ = gradients(module, loss, batch, where="3.weight")
    assert samples.is_noisy
    assert samples.is_mapped == (way == "vmap")
    expected = (module[0](x[:1]).detach() / 3).repeat(1, 3)
    kept = rows / expected
    assert torch.all(torch.isclose(kept, torch.zeros(()).double()) | torch.isclose(kept, torch.full((), 2.0).double()))
    masks = kept[:, :6]
    assert (masks.mean(0) - 1).abs().max() < 0.2  # four standard deviations
    correlation = (masks - 1).mT @ (masks - 1) / 400
    assert (correlation - torch.eye(6, dtype=torch.float64)).abs().max() < 0.2
    assert len(masks.unique(dim=0)) > 32


def test_noise_in_attention_and_recurrence_is_told_from_coupling():
    rows, samples, _ = gradients(seeded(lambda: Attention(0.3)), cross_entropy, tokens())
    assert samples.is_noisy
    assert samples.is_mapped
    assert rows.shape[0] == 7

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 5, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.rnn(x.unsqueeze(1))[0][:, -1]

    rows, samples, _ = gradients(seeded(Recurrent), cross_entropy, vectors())
    assert samples.is_noisy
    assert rows.shape[0] == 7


def test_coupling_is_found_behind_dropout():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Standardized(), nn.Dropout(0.1))

        def forward(self, x):
            return self.net(x)

    with pytest.raises(CoupledSamplesError, match="samples are coupled"):
        gradients(seeded(Both), cross_entropy, vectors())


@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: random.random(), lambda x: np.random.rand()])
def test_other_noise_than_dropout_leaves_the_question_open(draw):
    def loss(module, batch):
        return cross_entropy(module, (batch[0] * draw(batch[0]), batch[1]))

    with pytest.raises(CoupledSamplesError, match="could not be ruled out"):
        gradients(seeded(mlp), loss, vectors())


def test_layers_dropped_by_the_generator_of_python_are_drawn_for_each_sample():
    class LayerDrop(nn.Module):
        def forward(self, x):
            return 0 * x if self.training and random.random() < 0.5 else x

    module = seeded(lambda: nn.Sequential(nn.Linear(4, 3), LayerDrop()))
    rows, samples, _ = gradients(module, cross_entropy, vectors(n=40))
    assert samples.is_noisy
    assert not samples.is_mapped
    assert 5 < int((rows.norm(dim=1) == 0).sum()) < 35


def test_noise_that_the_first_sample_does_not_show_is_noise():
    def loss(module, batch):
        x = F.dropout(batch[0], 0.5) if len(batch[0]) > 1 or batch[1][0] else batch[0]
        return cross_entropy(module, (x, batch[1]))

    x, y = vectors()
    y[0], y[1:] = 0, 1
    _, samples, _ = gradients(seeded(mlp), loss, (x, y))
    assert samples.is_noisy


# Ways, and traces


def test_control_flow_that_needs_numbers_takes_the_loop():
    def loss(module, batch):
        factor = 1.0 if batch[0].sum().item() > -100 else 2.0
        return factor * cross_entropy(module, batch)

    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    rows, samples, _ = gradients(module, loss, batch)
    assert samples.is_mapped is False
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


class Counter(nn.Module):
    """A buffer that is written to in place, and changes the loss."""

    def __init__(self, of_data):
        super().__init__()
        self.net = mlp()
        self.of_data = of_data
        self.register_buffer("count", torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.count += x.detach().sum() * 0 + 1 if self.of_data else 1
        self.seen.append(x)
        return self.net(x) * self.count


@pytest.mark.parametrize("of_data", [False, True])
def test_every_sample_starts_from_the_same_buffers_and_nothing_stays(of_data):
    module, batch = seeded(lambda: Counter(of_data)).double(), vectors(dtype=torch.float64)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    held = {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]}
    own = module.__dict__.copy()
    states = random.getstate(), torch.get_rng_state()
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped is not of_data
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name: id(value) for name, value in [*module.named_parameters(), *module.named_buffers()]} == held
    assert module.seen == []
    assert all(p.grad is None for p in module.parameters())
    assert module.__dict__ == own

    def doubled(net, part):
        return F.cross_entropy(2 * net(part[0]), part[1])

    torch.testing.assert_close(rows, brute_force(module.net, doubled, pairs(batch)), **SAME[torch.float64])


def test_products_from_kept_graphs_are_the_same_before_and_after():
    module, batch = seeded(Attention), tokens()
    objective = Objective(module, cross_entropy, [batch], engine="kept")
    with opened(objective) as (samples, at):
        loss, gradient = at.evaluate()
        vector = torch.randn(at.size, generator=generator(3))
        before = at.product(vector)
        assert len(torch.cat(list(samples.of_batch(0, batch, 0, gradient / 7, loss / 7)))) == 7
        assert samples.is_mapped
        assert torch.equal(at.product(vector), before)
        assert torch.equal(at.evaluate(keep=False)[1], gradient)


def test_what_vmap_gets_wrong_is_computed_by_the_loop(monkeypatch):
    module, batch = seeded(mlp).double(), vectors(dtype=torch.float64)
    right = SampleGradients._mapped

    def wrong(self, *args):
        rows, losses = right(self, *args)
        rows[-1] *= 1.001
        return rows, losses

    monkeypatch.setattr(SampleGradients, "_mapped", wrong)
    rows, samples, _ = gradients(module, cross_entropy, batch)
    assert samples.is_mapped is False
    torch.testing.assert_close(rows, brute_force(module, cross_entropy, pairs(batch)), **SAME[torch.float64])


def test_a_batch_of_one_is_its_own_sample():
    module, batch = seeded(dropped), vectors(n=1)
    objective = Objective(module, cross_entropy, [batch])
    rows, _, _ = measured(objective, batch)
    with opened(objective) as (_, at):
        assert torch.equal(rows, at.evaluate(keep=False)[1][None])


def test_operations_without_a_batching_rule_do_not_warn():
    def loss(module, batch):
        return (torch.histc(batch[0].detach().cpu(), 3).sum() * 0) + cross_entropy(module, batch)

    module, batch = seeded(mlp), vectors()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients(module, loss, batch)
    assert not caught


# How batches are split

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Labelled:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "none"


def test_containers_keep_their_types():
    x, y = vectors(n=3)
    batches = [
        (x, y),
        [x, y],
        Pair(x, y),
        {"x": x, "y": y},
        OrderedDict(x=x, y=y),
        UserDict({"x": x, "y": y}),
        Labelled(x, y),
        (x.numpy(), {"deep": [y, None, 3, "text"]}),
    ]
    for batch in batches:
        parts = slices(batch)
        assert len(parts) == 3
        assert all(type(part) is type(batch) for part in parts)
    assert torch.equal(slices(Pair(x, y))[1].y, y[1:2])
    assert torch.equal(slices(UserDict({"x": x}))[2]["x"], x[2:3])
    assert torch.equal(slices(Labelled(x, y))[0].x, x[:1])
    assert slices(Labelled(x, y))[0].note == "none"
    assert slices(batches[-1])[1][1]["deep"][1:] == [None, 3, "text"]
    assert np.array_equal(slices(batches[-1])[1][0], x.numpy()[1:2])


def test_lists_of_samples_are_sliced_and_numbers_shared():
    x, _ = vectors(n=3)
    scalar = torch.tensor(4.0)
    parts = slices((x, ["a", "b", "c"], [scalar, scalar + 1, scalar + 2], ({"id": 1}, {"id": 2}, {"id": 3}), scalar))
    assert parts[1][1] == ["b"]
    assert parts[1][2] == [torch.tensor(5.0)]
    assert parts[1][3] == ({"id": 2},)
    assert all(part[4] is scalar for part in parts)


def test_what_cannot_be_split_is_refused_with_its_place():
    x, y = vectors(n=3)
    packed = nn.utils.rnn.pack_sequence([x[0], x[1]], enforce_sorted=False)
    refused = {
        r"batch\['edges'\].*length 8": {"x": x, "edges": torch.zeros(8, 2)},
        r"batch\[1\].*length 1 ": (x, y[:1]),
        r"batch\[1\].*`?object": (x, object()),
        r"batch\[1\].*PackedSequence": (x, packed),
        r"batch\[1\].*layout": (x, torch.eye(3).to_sparse()),
        "no samples": ("text", 3),
        "length 0": (x[:0], y[:0]),
    }
    for match, batch in refused.items():
        with pytest.raises(ValueError, match=match):
            slices(batch)
