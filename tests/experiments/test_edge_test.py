import logging
import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_dynamics.experiments import Branch, edge_test

TOP = 2.0
"""Largest eigenvalue of the data's Hessian."""


def regression(n=8):
    """Linear data whose half mean squared residual has the Hessian diag(2, 0.5, 0.1), and the minimum at zero."""
    draw = torch.Generator().manual_seed(0)
    even = torch.linalg.qr(torch.randn(n, 3, generator=draw, dtype=torch.float64)).Q
    x = (n**0.5 * even * torch.tensor([TOP, 0.5, 0.1]).double().sqrt()).float()
    return TensorDataset(x, torch.zeros(n), torch.arange(n))


class Linear(pl.LightningModule):
    """A linear function, which notes the batches that it is trained on."""

    def __init__(self, lr=0.5, size=3, manual=False, scheduler=None, seen=None, **options):
        super().__init__()
        self.automatic_optimization = not manual
        self.lr, self.options, self.schedule = lr, options, scheduler
        self.seen = [] if seen is None else seen
        self.net = nn.Linear(size, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(batch[-1].tolist())
        torch.rand(len(self.seen))  # what training draws must not decide what comes next

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]).squeeze(1) - batch[1]).square().mean() / 2
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, **self.options)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def whole(data):
    return DataLoader(data, len(data))


class SavesAt(pl.Callback):
    """Saves in the midst of training, as ``ModelCheckpoint`` does."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trained(path, loader, steps=10, **options):
    """A checkpoint after so many steps."""
    quiet_trainer(max_steps=steps + 1, callbacks=[SavesAt(path, steps)]).fit(Linear(**options), loader)
    return path


def quiet_trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(checkpoint, loader, branches, steps=30, **options):
    module = options.pop("module", {})
    return edge_test(
        lambda: Linear(**module), loader, checkpoint, branches, steps=steps, watch=None, accelerator="cpu", **options
    )


@pytest.mark.parametrize("manual", [False, True])
def test_gradient_descent_catapults_beyond_two_over_eta_and_not_below(tmp_path, manual):
    data, options = regression(), {"lr": 0.95 * 2 / TOP, "manual": manual}
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), **options)
    branches = {"beyond": Branch(lr=1.05 / 0.95), "below": {"lr": 0.98 / 0.95}}
    found = run(checkpoint, whole(data), branches, module=options)
    assert found.catapults == {"beyond": True, "below": False}
    assert max(found.control.losses) == found.control.losses[0]
    assert found.branches["beyond"].lr == [pytest.approx(1.05 * 2 / TOP)]


@pytest.mark.parametrize("manual", [False, True])
def test_the_raised_run_is_gradient_descent_at_the_raised_rate(tmp_path, manual):
    data, options = regression(), {"lr": 0.3, "manual": manual}
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), **options)
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["net.weight"][0].double()
    found = run(checkpoint, whole(data), {"× 2": Branch(lr=2)}, 6, watch_every_n_steps=1, module=options)
    x = data.tensors[0].double()
    hessian = x.T @ x / len(x)
    for seen, lr in ((found.control, 0.3), (found.branches["× 2"], 0.6)):
        expected, w = [], weight
        for _ in range(7):
            expected.append(float(w @ hessian @ w) / 2)
            w = w - lr * hessian @ w
        assert seen.losses == pytest.approx(expected, rel=1e-4)
        assert seen.training_losses == pytest.approx(expected[:-1], rel=1e-4)
        assert list(seen.steps) == list(range(7))


def mean_square_edge(mean, variance):
    """Core B2: of SGD in one dimension with random curvature."""
    return 2 * mean / (mean**2 + variance)


def curvatures(low=0.2, high=3.8, n=64):
    h = torch.tensor([low, high]).repeat(n // 2)
    return TensorDataset(h.sqrt()[:, None], torch.zeros(n), torch.arange(n))


def drawn_with_replacement(data, batch):
    return DataLoader(data, batch, sampler=RandomSampler(data, replacement=True, num_samples=10 * len(data)))


@pytest.mark.parametrize(("lr", "catapults"), [(0.7, True), (0.45, False)])
def test_a_lower_batch_size_catapults_where_mean_square_stability_is_lost(tmp_path, lr, catapults):
    data = curvatures()
    mean, variance = 2.0, 1.8**2
    assert lr < mean_square_edge(mean, variance / 16), "stable as it is trained"
    assert (lr > mean_square_edge(mean, variance)) == catapults
    options = {"lr": lr, "size": 1}
    checkpoint = trained(tmp_path / "c.ckpt", drawn_with_replacement(data, 16), 5, **options)
    found = run(checkpoint, drawn_with_replacement(data, 16), {"b / 16": Branch(batch_size=1 / 16)}, 60, module=options)
    assert found.catapults == {"b / 16": catapults}
    assert found.branches["b / 16"].batch_size == 1
    assert found.control.peak == found.control.losses[0]


def batches_seen(checkpoint, loader, branches, steps, **options):
    """By run, the samples of every batch, the control's first."""
    seen = []

    def make():
        seen.append([])
        return Linear(seen=seen[-1], lr=0.1)

    edge_test(make, loader, checkpoint, branches, steps=steps, accelerator="cpu", **options)
    return seen


def samples(batches):
    return [sample for batch in batches for sample in batch]


def shuffled(data, own=True):
    return DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(5) if own else None)


@pytest.mark.parametrize("own", [True, False])
def test_the_order_of_the_data_is_that_of_the_control_and_a_lower_batch_size_cuts_it(tmp_path, own):
    data = regression(16)
    loader = shuffled(data, own)
    checkpoint = trained(tmp_path / "c.ckpt", loader, 7, lr=0.1)
    control, raised, cut = batches_seen(checkpoint, loader, {"η": Branch(lr=1.5), "b": Branch(batch_size=0.5)}, 12)
    assert raised == control
    assert [len(batch) for batch in control] == [4] * 12
    assert [len(batch) for batch in cut] == [2] * 12
    assert samples(cut) == samples(control)[:24]
    for one_pass in range(3):
        assert sorted(samples(control[4 * one_pass : 4 * one_pass + 4])) == list(range(16)), "no sample twice"
    assert control[:4] != control[4:8]


def test_the_order_of_the_data_depends_on_the_seed_and_on_nothing_before(tmp_path):
    data = regression(16)
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 3, lr=0.1)
    branch = {"η": Branch(lr=1.5)}
    first = batches_seen(checkpoint, shuffled(data), branch, 4)
    torch.manual_seed(1234)
    loader = shuffled(data)
    list(loader)
    assert batches_seen(checkpoint, loader, branch, 4) == first
    assert batches_seen(checkpoint, shuffled(data), branch, 4, seed=1) != first


def test_momentum_and_schedules_go_on(tmp_path):
    data = regression()
    options = {
        "lr": 0.2,
        "momentum": 0.9,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    }
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 10, **options)

    class Losses(pl.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.found.append(float(outputs["loss"]))

    losses = Losses()
    quiet_trainer(max_steps=16, callbacks=[losses]).fit(Linear(**options), whole(data))
    found = run(checkpoint, whole(data), {"× 2": Branch(lr=2)}, 6, watch_every_n_steps=1, module=options)
    assert found.control.training_losses == pytest.approx(losses.found[10:], rel=1e-6)
    assert found.control.lr == [pytest.approx(0.2 * 0.9**10)]
    assert found.branches["× 2"].lr == [pytest.approx(0.4 * 0.9**10)]

    # heavy ball by hand, at twice the rate of the schedule
    state = torch.load(checkpoint, weights_only=True)
    w = state["state_dict"]["net.weight"][0].double()
    buffer = state["optimizer_states"][0]["state"][0]["momentum_buffer"][0].double()
    x = data.tensors[0].double()
    hessian, expected = x.T @ x / len(x), []
    for step in range(7):
        expected.append(float(w @ hessian @ w) / 2)
        buffer = 0.9 * buffer + hessian @ w
        w = w - 0.4 * 0.9 ** (10 + step) * buffer
    assert found.branches["× 2"].losses == pytest.approx(expected, rel=1e-4)


class SetsItsRate(Linear):
    """Sets the learning rate in its step, as a schedule of its own."""

    def training_step(self, batch, batch_idx):
        if self.trainer.training:
            for group in self.optimizers().param_groups:
                group["lr"] = 0.3
        return super().training_step(batch, batch_idx)


def test_a_step_that_sets_its_learning_rate_does_not_undo_the_branch(tmp_path):
    data = regression()
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), lr=0.3)
    branch = {"× 2": Branch(lr=2)}
    found = [
        edge_test(lambda make=make: make(lr=0.3), whole(data), checkpoint, branch, steps=5, accelerator="cpu")
        for make in (Linear, SetsItsRate)
    ]
    assert found[0].branches["× 2"].losses == found[1].branches["× 2"].losses
    assert found[0].branches["× 2"].losses != found[0].control.losses


class Dropout(Linear):
    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Dropout(0.5), self.net)


def test_nothing_of_the_caller_is_touched(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data = regression(16)
    loader = shuffled(data)
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(Dropout(lr=0.1), loader)
    trainer.save_checkpoint("c.ckpt")
    capfd.readouterr()

    def state():
        level = logging.getLogger("lightning.pytorch").level
        generators = (torch.get_rng_state(), loader.generator.get_state(), np.random.get_state()[1], random.getstate())
        return [str(part) if not isinstance(part, torch.Tensor) else part.tolist() for part in (*generators, level)]

    content, before = (tmp_path / "c.ckpt").read_bytes(), state()
    edge_test(lambda: Dropout(lr=0.1), loader, "c.ckpt", steps=9, accelerator="cpu")
    assert state() == before
    assert (tmp_path / "c.ckpt").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]
    shown = capfd.readouterr()
    assert shown.out == shown.err == ""


def test_the_same_call_gives_the_same_numbers(tmp_path):
    data = regression(16)
    checkpoint = trained(tmp_path / "c.ckpt", shuffled(data), 7, lr=0.1)
    first, second = (
        edge_test(
            lambda: Linear(lr=0.1), lambda: shuffled(data), checkpoint, {"η": Branch(lr=2)}, steps=9, accelerator="cpu"
        )
        for _ in range(2)
    )
    assert first == second


class Data(pl.LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return DataLoader(self.data, 4)


class OwnData(Linear):
    def train_dataloader(self):
        return DataLoader(regression(16), 4)


def test_a_data_module_and_a_module_with_data_of_its_own_do_as_well_as_a_loader(tmp_path):
    data = regression(16)
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 3, lr=0.1)
    branches = {"b / 2": Branch(batch_size=0.5)}
    found = run(checkpoint, DataLoader(data, 4), branches, 6, module={"lr": 0.1})
    module = Data(data)
    attributes = dict(vars(module))
    assert run(checkpoint, module, branches, 6, module={"lr": 0.1}) == found
    assert vars(module) == attributes
    assert (
        edge_test(lambda: OwnData(lr=0.1), None, checkpoint, branches, steps=6, watch=None, accelerator="cpu") == found
    )
    assert found.branches["b / 2"].batch_size == 2


class Stream(IterableDataset):
    def __iter__(self):
        data = regression(16)
        return iter([data[int(i)] for i in torch.randperm(16)])


def test_a_stream_has_branches_of_the_learning_rate_only(tmp_path):
    checkpoint = trained(tmp_path / "c.ckpt", whole(regression(16)), 3, lr=0.1)
    loader = DataLoader(Stream(), 4)
    control, raised = batches_seen(checkpoint, loader, {"η": Branch(lr=2)}, 9, watch=8)
    assert control == raised
    with pytest.raises(ValueError, match="Stream is iterable"):
        run(checkpoint, loader, {"b": Branch(batch_size=0.5)})


def test_a_batch_sampler_of_ones_own_has_no_batch_size_to_change(tmp_path):
    data = regression(16)

    class Own(BatchSampler):
        pass

    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 3, lr=0.1)
    loader = DataLoader(data, batch_sampler=Own(SequentialSampler(data), 4, False))
    with pytest.raises(ValueError, match="batch sampler is a Own"):
        run(checkpoint, loader, {"b": Branch(batch_size=0.5)})
    found = run(checkpoint, loader, {"η": Branch(lr=2)}, 6, module={"lr": 0.1})
    assert found.control.batch_size is None
    assert found.num_watched == 16


def test_accumulated_batches_make_one_step(tmp_path):
    data = regression(16)
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 3, lr=0.1)
    branch = {"η": Branch(lr=2)}
    seen = batches_seen(checkpoint, DataLoader(data, 4), branch, 6, accumulate_grad_batches=4)
    assert [len(batches) for batches in seen] == [24, 24]
    by_four = run(checkpoint, DataLoader(data, 4), branch, 6, module={"lr": 0.1}, accumulate_grad_batches=4)
    at_once = run(checkpoint, whole(data), branch, 6, module={"lr": 0.1})
    assert by_four.control.training_losses == pytest.approx(at_once.control.training_losses, rel=1e-5)
    assert by_four.branches["η"].losses == pytest.approx(at_once.branches["η"].losses, rel=1e-5)


def test_a_checkpoint_without_optimizer_states_is_refused(tmp_path):
    data = regression()
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(Linear(), whole(data))
    trainer.save_checkpoint(tmp_path / "c.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="holds no optimizer state"):
        run(tmp_path / "c.ckpt", whole(data), {"η": Branch(lr=2)})


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({}, "`branches` is empty"),
        ({"a": {"momentum": 0.5}}, r"changes \['momentum'\]; a branch can change lr or batch_size"),
        ({"control": Branch(lr=2)}, "changes nothing"),
        ({"a": 2.0}, "must be a Branch"),
        ({"a": {"lr": 2, "batch_size": 0.5}}, "changes one thing"),
        ({"a": {}}, "changes one thing"),
        ({"a": {"lr": -1}}, "positive factors"),
    ],
)
def test_branches_that_make_no_sense_are_refused(tmp_path, branches, message):
    with pytest.raises(ValueError, match=message):
        edge_test(Linear, whole(regression()), tmp_path / "c.ckpt", branches)


def test_other_misuse_is_refused(tmp_path):
    data = regression()
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), 3)
    branch = {"η": Branch(lr=2)}
    with pytest.raises(ValueError, match="no checkpoint"):
        run(tmp_path / "other.ckpt", whole(data), branch)
    with pytest.raises(ValueError, match="sets `logger` itself"):
        run(checkpoint, whole(data), branch, logger=True)
    with pytest.raises(ValueError, match="`steps` must be a positive integer"):
        run(checkpoint, whole(data), branch, steps=0)
    with pytest.raises(ValueError, match="batches of 0 out of batches of 8"):
        run(checkpoint, whole(data), {"b": Branch(batch_size=0.01)})
    with pytest.raises(ValueError, match="ended after 2 of 30 steps"):
        run(checkpoint, whole(data), branch, max_steps=5)
    with pytest.raises(ValueError, match="one training loader"):
        run(checkpoint, [whole(data), whole(data)], branch)


def test_a_run_that_explodes_ends_there(tmp_path):
    data, options = regression(), {"lr": 0.5}
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), **options)
    found = run(checkpoint, whole(data), {"η × 100": Branch(lr=100)}, 200, module=options)
    branch = found.branches["η × 100"]
    assert found.catapults == {"η × 100": True}
    assert branch.diverged
    assert branch.peak == math.inf
    assert branch.peak_step == branch.steps[-1] < 200
    assert "inf" in str(found)
    assert found.figure().axes[0].get_ylim()[1] < 1e31


def test_the_table_and_the_figure_show_every_run(tmp_path):
    data, options = regression(), {"lr": 0.9}
    checkpoint = trained(tmp_path / "c.ckpt", whole(data), **options)
    branches = {"up": Branch(lr=1.5), "down": Branch(lr=0.5), "half": Branch(batch_size=0.5)}
    found = run(checkpoint, whole(data), branches, module=options)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["control", "up", "down", "half"]
    assert [line.split()[-1] for line in lines[3:5]] == ["yes", "no"]
    assert "at the checkpoint (step 10)" in lines[0]
    axes = found.figure().axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["up, catapults", "down", f"half{', catapults' if found.catapults['half'] else ''}", "control"]
