"""Neural collapse where data, modules and Trainers are not plain."""

from __future__ import annotations

import copy
import time
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from helpers.modules import Classification, class_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_dynamics import HessianMonitor, NeuralCollapseMonitor, Probe
from lightning_dynamics.callbacks.collapse_table import collapse_table
from lightning_dynamics.callbacks.journal import Journal
from lightning_dynamics.objective import features
from lightning_dynamics.recording.record import Cost, Record

WHOLE = Probe(whole=True)


def batches(batch_size=16, data=None, **options):
    return DataLoader(TensorDataset(*(class_data() if data is None else data)), batch_size, **options)


def network(seed=4):
    """Without noise and batch norm: its features do not depend on the mode."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def still(net=None):
    """A module whose weights stay as they are."""
    return Classification(network() if net is None else net, lr=0.0)


def monitor_of(*layers, **options):
    return NeuralCollapseMonitor(*layers, **{"every_n_train_steps": 1, "probe": WHOLE, **options})


def records(monitor, module=None, data=None, **options):
    fit(
        monitor,
        still() if module is None else module,
        batches() if data is None else data,
        **{"max_epochs": 1, **options},
    )
    return monitor.history


def accuracy(logits, y):
    return pytest.approx(float((logits.argmax(1) == y).double().mean()))


def trace_ratio(h, y):
    """tr Σ_W / tr Σ_B by its definition."""
    h = h.double()
    means = torch.stack([h[y == c].mean(0) for c in y.unique()])
    of_class = {int(c): i for i, c in enumerate(y.unique())}
    within = (h - means[[of_class[int(c)] for c in y]]).square().sum(1).mean()
    return pytest.approx(float(within / (means - means.mean(0)).square().sum(1).mean()), rel=2e-5)


# Which data


def test_a_validation_probe_is_of_the_validation_set():
    """Also where only its size is given, ``validation=Probe(size=…)``."""
    other = batches(data=class_data(40, seed=1))
    found = []
    for validation in (True, Probe(size=40), Probe(split="validation", whole=True)):
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[monitor_of(validation=validation)],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(still(), batches(), other)
        found.append(trainer.callbacks[0].history[0].scalars["collapse/cdnv_validation"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


class Augmented(pl.LightningDataModule):
    """Augments behind the transfer while the Trainer trains, as one does on a device; here what is easily seen."""

    def train_dataloader(self):
        return batches()

    def val_dataloader(self):
        return batches(data=class_data(40, seed=1))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0], (batch[1] + 1) % 3] if self.trainer.training else batch


def test_validation_data_are_not_augmented_like_training_data():
    (record, *_) = records(monitor_of(validation=True), data=Augmented())
    x, y = class_data(40, seed=1)
    with torch.no_grad():
        logits = network()(x)
    assert accuracy(logits, (y + 1) % 3) != accuracy(logits, y).expected
    assert record.scalars["collapse/accuracy_validation"] == accuracy(logits, y)


def test_another_fit_measures_its_own_validation_set():
    monitor, module, data = monitor_of(validation=True), still(), batches()
    trainer = fit(monitor, module, Both(data, 1), max_epochs=1)
    first = monitor.history[-1].scalars["collapse/cdnv_validation"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Both(data, 2))
    assert monitor.history[-1].scalars["collapse/cdnv_validation"] != first


class Both(pl.LightningDataModule):
    def __init__(self, training, seed):
        super().__init__()
        self.training, self.seed = training, seed

    def train_dataloader(self):
        return self.training

    def val_dataloader(self):
        return batches(data=class_data(40, seed=self.seed))


@pytest.mark.parametrize(
    "make",
    [
        lambda: monitor_of(validation=True),
        lambda: HessianMonitor(1, 0, every_n_train_steps=4, probe=Probe(split="validation", size=16)),
    ],
    ids=["collapse", "hessian"],
)
def test_validation_may_come_later_than_the_first_point(make):
    """With ``check_val_every_n_epoch`` there is no loader yet where no sanity check runs, as in every resumed run."""
    monitor = make()
    fit(monitor, still(), Both(batches(), 1), max_epochs=2, check_val_every_n_epoch=2)
    assert monitor.history


class Several(Both):
    def val_dataloader(self):
        return [batches(), batches()]


def test_validation_that_comes_late_and_cannot_be_read_does_not_end_the_run(caplog):
    class Ignores(Classification):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    monitor = monitor_of(validation=True)
    trainer = fit(monitor, Ignores(network(), lr=0.0), Several(batches(), 1), max_epochs=4, check_val_every_n_epoch=2)
    assert trainer.state.finished
    assert caplog.text.count("there are 2 validation loaders") == 1
    assert len(monitor.history) == 17
    assert not any("validation" in key for key in monitor.history[-1].scalars)


def test_the_batch_of_the_step_may_have_classes_that_the_first_one_had_not():
    x, y = class_data()
    order = y.argsort()
    options = {"head": None, "probe": Probe(current_batch=True)}
    data = batches(data=(x[order], y[order]))
    with pytest.raises(MisconfigurationException, match=r"other classes.*`num_classes=`"):
        records(monitor_of(["net.3"], **options), data=data)
    assert len(records(monitor_of(["net.3"], num_classes=3, **options), data=data)) == 4


def test_outputs_without_a_class_are_predictions_that_miss():
    """Five outputs, three classes, no head."""
    torch.manual_seed(0)
    net = network()
    net[4] = nn.Linear(8, 5)
    nn.init.constant_(net[4].bias[4:], 0.3)
    (record, *_) = records(monitor_of(["net.3"], head=None), still(net))
    x, y = class_data()
    assert record.scalars["collapse/accuracy"] == accuracy(net(x).detach(), y)


def test_each_current_batch_is_measured_at_its_weights():
    seen = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append((copy.deepcopy(module.net), batch[0].clone(), batch[1].clone()))

    monitor = monitor_of(probe=Probe(current_batch=True))
    fit([Keep(), monitor], Classification(network()), batches(shuffle=True), max_epochs=1)
    assert len(monitor.history) == len(seen) == 4
    for record, (net, x, y) in zip(monitor.history, seen, strict=True):
        assert record.scalars["collapse/nc1_trace_ratio"] == trace_ratio(net[:4](x).detach(), y)


def test_a_weighted_sampler_is_measured_on_what_it_draws():
    seen = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append((batch[0].clone(), batch[1].clone()))

    data = TensorDataset(*class_data())
    torch.manual_seed(0)
    sampler = WeightedRandomSampler(torch.rand(60), 60)
    monitor, module = monitor_of(probe=Probe(size=30)), still()
    fit([Keep(), monitor], module, DataLoader(data, 16, sampler=sampler), max_epochs=1)
    x, y = (torch.cat(parts) for parts in zip(*seen[:2], strict=True))
    for record in monitor.history:
        assert record.scalars["collapse/nc1_trace_ratio"] == trace_ratio(module.net[:4](x).detach(), y)


def test_points_before_the_first_batches_are_complete_are_taken_at_their_own_weights():
    module, (x, y) = Classification(network()), class_data()
    nets = [copy.deepcopy(module.net)]

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            nets.append(copy.deepcopy(module.net))

    monitor = monitor_of(probe=Probe(first_batches=3))
    fit([monitor, Keep()], module, batches(), max_epochs=1)
    assert [record.step for record in monitor.history] == [0, 1, 2, 3, 4]
    for record, net in zip(monitor.history, nets, strict=True):
        assert record.scalars["collapse/nc1_trace_ratio"] == trace_ratio(net[:4](x[:48]).detach(), y[:48])


# Which predictions


class PerPosition(Classification):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


def labels_of_positions():
    return torch.randint(0, 3, (60, 3), generator=torch.Generator().manual_seed(1))


class TimeFirst(nn.Module):
    """Returns scores of shape (t, n, K)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x.view(len(x), 3, 2).transpose(0, 1)))


def test_predictions_of_sequences_are_put_in_the_order_of_the_labels():
    y = labels_of_positions()
    module = PerPosition(TimeFirst(), lr=0.0)
    monitor = monitor_of(
        ["net.embed"],
        head="net.head",
        feature_fn=lambda h, layer: h.transpose(0, 1).flatten(0, 1),
        target_fn=lambda batch: batch[1].flatten(),
    )
    (record, *_) = records(monitor, module, batches(data=(class_data()[0], y)))
    with torch.no_grad():
        logits = module.net(class_data()[0]).transpose(0, 1).flatten(0, 1)
    assert record.scalars["collapse/accuracy"] == accuracy(logits, y.flatten())


class ChannelsFirst(nn.Module):
    """Returns scores of shape (n, K, t), as cross-entropy wants them, with as many positions as classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Conv1d(2, 8, 1), nn.Tanh()), nn.Conv1d(8, 3, 1)

    def forward(self, x):
        return self.head(self.body(x.view(-1, 3, 2).transpose(1, 2)))


def test_predictions_of_positions_are_over_classes_and_not_over_positions():
    y = labels_of_positions()
    module = PerPosition(ChannelsFirst(), lr=0.0)
    monitor = monitor_of(
        ["net.body"],
        head=None,
        feature_fn=lambda h, layer: h.transpose(1, 2).flatten(0, 1),
        target_fn=lambda batch: batch[1].flatten(),
    )
    (record, *_) = records(monitor, module, batches(data=(class_data()[0], y)))
    with torch.no_grad():
        logits = module.net(class_data()[0]).transpose(1, 2).flatten(0, 1)
    assert record.scalars["collapse/accuracy"] == accuracy(logits, y.flatten())


# What a forward pass may do


def test_a_forward_pass_may_write_into_the_labels():
    class Writes(Classification):
        def run(self, batch):
            out = self.net(batch[0])
            batch[1].zero_()
            return out

    expected = records(monitor_of())[0].scalars
    assert records(monitor_of(forward_fn="run"), Writes(network(), lr=0.0))[0].scalars == expected


def test_what_runs_in_inference_mode_is_measured_before_it_is_overwritten():
    class Frozen(Classification):
        def forward(self, x):
            with torch.inference_mode():
                h = self.net[:4](x)
            return self.net[4](h.clone())

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    (record, *_) = records(monitor_of(["net.0"]), Frozen(network(), lr=0.0))
    x, y = class_data()
    assert record.scalars["collapse/nc1_trace_ratio/net_0"] == trace_ratio(network()[0](x).detach(), y)


class Masked(nn.Module):
    """PyTorch's own encoder with padding, which in evaluation mode would skip its submodules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(2, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(-1, 3, 2)
        padded = torch.zeros(len(x), 3, dtype=torch.bool)
        padded[:, 2] = x[:, 2, 0] > 0
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padded)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layers", ["auto", ["net.encoder.layers.0"], []])
def test_an_encoder_with_padding_is_measured(layers):
    module = Classification(Masked(), lr=0.0)
    (record, *_) = records(monitor_of(layers), module)
    # without PyTorch's shortcut, which computes the same in another order
    with torch.no_grad():
        logits = copy.deepcopy(module.net).eval()(class_data()[0])
    assert record.scalars["collapse/accuracy"] == accuracy(logits, class_data()[1])


def test_a_forward_that_is_set_on_the_module_is_one():
    class Delegates(Classification):
        forward = pl.LightningModule.forward

        def __init__(self):
            super().__init__(network(), lr=0.0)
            self.forward = self.net.forward

    assert records(monitor_of(), Delegates())


def test_hooks_of_the_users_are_seen_and_left_alone():
    module = still()
    module.net[3].register_forward_hook(lambda layer, args, out: 2 * out)
    module.net[4].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    before = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in module.modules()]
    (record, *_) = records(monitor_of(), module)
    assert [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in module.modules()] == before
    x, y = class_data()
    assert record.scalars["collapse/nc1_trace_ratio"] == trace_ratio(2 * network()[:4](x).detach() + 1, y)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
def test_the_weight_of_a_parametrized_head_is_the_present_one(wrap):
    net = network()
    net[4] = wrap(net[4])
    module, (x, y) = Classification(net, lr=0.5), class_data()
    record = records(monitor_of(), module)[-1]
    module.eval()
    with torch.no_grad():
        module(x)
        h, weight = module.net[:4](x).double(), module.net[4].weight.double()
    rows = weight - weight.mean(0)
    means = torch.stack([h[y == c].mean(0) for c in range(3)])
    means = means - means.mean(0)
    expected = (rows / rows.norm() - means / means.norm()).square().sum()
    assert record.scalars["collapse/nc3"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("ours", ["float32", "same"])
def test_numbers_are_those_of_the_precision_that_was_asked_for(precision, ours):
    module, (x, y) = Classification(network()), class_data()
    record = records(monitor_of(precision=ours), module, precision=precision)[-1]
    net = copy.deepcopy(module.net)
    x = x.to(net[0].weight.dtype)
    if ours == "float32" and precision != "64-true":
        net, x = net.float(), x.float()
    narrow = ours == "same" and precision == "bf16-mixed"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        h = net[:4](x)
        logits = net[4](h)
    assert record.scalars["collapse/nc1_trace_ratio"] == trace_ratio(h, y)
    assert record.scalars["collapse/accuracy"] == accuracy(logits, y)


# What is kept, and for how long


def of_cache(monkeypatch, look):
    """What :func:`look` says of each tensor that a reader keeps."""
    found = []
    close = features.FeatureReader.close

    def watched(self):
        found.extend(look(t) for part in self._cached.values() for each in part for t in each.features.values())
        close(self)

    monkeypatch.setattr(features.FeatureReader, "close", watched)
    return found


class FirstToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Linear(6, 600), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.tokens(x).view(-1, 100, 6)[:, 0])


def test_what_is_kept_of_a_token_is_not_the_whole_sequence(monkeypatch):
    """A ViT's head is given a view: 197 times as much memory as the limit of 256 MiB counts."""
    sizes = of_cache(monkeypatch, lambda t: t.untyped_storage().nbytes() / (t.numel() * t.element_size()))
    records(monitor_of([]), Classification(FirstToken()))
    assert sizes
    assert max(sizes) <= 2


class Differentiates(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = self.energy(x).tanh()
            (gradient,) = torch.autograd.grad(e.sum(), x, create_graph=True)
            return self.head(e + gradient)


def test_what_is_kept_holds_no_graph(monkeypatch):
    graphs = of_cache(monkeypatch, lambda t: t.grad_fn)
    records(monitor_of([]), Classification(Differentiates()))
    assert graphs
    assert not any(graphs)


def test_a_figure_of_all_points_is_not_prepared_at_every_point(monkeypatch):
    """Counted, not timed."""
    from lightning_dynamics.recording.figures import views as module

    made = []
    line = module.DepthLine
    monkeypatch.setattr(module, "DepthLine", lambda *args: made.append(1) or line(*args))
    journal = Journal("run", None, [])
    journal._tables = [collapse_table(None, False)]
    scalars = {"collapse/nc1": 1.0, "collapse/nc1/a": 2.0}
    for step in range(200):
        record = Record(
            step=step, monitor="NeuralCollapseMonitor", scalars=scalars, errors={}, arrays={},
            notes={"layers": {"a": {}, "last": {}}}, global_step=step, epoch=0, time=time.time(), seconds=0.0,
            final=False,
        )  # fmt: skip
        journal.write([record], {}, Cost(step, 0.0, 0.0, 0, {}))
    assert len(made) <= 200 * 24  # a figure has 24 lines


# What a plan depends on


def test_a_head_that_grows_is_looked_at_again():
    class Incremental(Classification):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[4] = nn.Linear(8, 5)

    monitor = NeuralCollapseMonitor(every_n_epochs=1, probe=WHOLE)
    fit(monitor, Incremental(network()), batches(), max_epochs=2)
    assert [record.notes["num_classes"] for record in monitor.history] == [3, 5, 5]


@pytest.mark.parametrize(
    ("options", "layers"),
    [({"layers": ["net.0"]}, ["net_0", "last"]), ({"head": None, "layers": ["net.0", "net.2"]}, ["net_0", "last"])],
)
def test_a_resumed_run_measures_the_layers_that_are_asked_for_now(tmp_path, options, layers):
    def one(monitor, epochs, **more):
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        fit([monitor, keep], Classification(network()), batches(), max_epochs=epochs, enable_checkpointing=True, **more)

    one(monitor_of(), 1)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    monitor = monitor_of(**options)
    one(monitor, 2, ckpt_path=checkpoint)
    record = monitor.history[-1]
    assert list(record.notes["layers"]) == layers
    assert ("collapse/nc3" in record.scalars) == ("head" not in options)


def test_a_checkpoint_of_before_the_second_probe_is_read(tmp_path):
    """Its state has the key ``probe``."""

    def one(folder, epochs, **more):
        monitor = HessianMonitor(1, 0, every_n_train_steps=1, pair=False, probe=Probe(first_batches=2))
        keep = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1)
        fit([monitor, keep], still(), batches(shuffle=True, generator=torch.Generator().manual_seed(len(folder))),
            max_epochs=epochs, enable_checkpointing=True, **more)  # fmt: skip
        return monitor.history

    before = one("a", 1)[-1].scalars["hessian/probe_loss"]
    (checkpoint,) = (tmp_path / "a").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)
    (kept,) = [value for key, value in state["callbacks"].items() if "Hessian" in key]
    (kept["probe"],) = kept.pop("probes")
    torch.save(state, tmp_path / "old.ckpt")
    assert one("ab", 2, ckpt_path=tmp_path / "old.ckpt")[-1].scalars["hessian/probe_loss"] == pytest.approx(before)


# What is refused before the first step


class Transposed(nn.Module):
    """A layer whose weight has shape (d, K), like that of GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return x @ self.weight


def test_a_head_with_a_transposed_weight_is_refused_at_once():
    net = network()
    net[4] = Transposed()
    with pytest.raises(MisconfigurationException, match="weight has shape"):
        records(monitor_of(head="net.4"), still(net))


def test_subclasses_without_a_label_are_refused_at_once():
    x, y = class_data()
    fine = y.clone()
    fine[3] = -100
    with pytest.raises(MisconfigurationException, match="subclass"):
        records(monitor_of(subclass_fn=lambda batch: batch[2]), data=batches(data=(x, y, fine)))


def test_subclasses_that_several_classes_share_are_refused_at_once():
    """Numbered within each class, 0 and 1."""
    data = batches(data=(*class_data(), torch.arange(60) % 2))
    with pytest.raises(MisconfigurationException, match="subclass"):
        records(monitor_of(subclass_fn=lambda batch: batch[2]), data=data)


@pytest.mark.parametrize("options", [{"forward_fn": 5}, {"target_fn": "y"}, {"layers": 5}, {"head": 5}, {"probe": 5}])
def test_options_of_a_wrong_type_are_refused_when_they_are_given(options):
    with pytest.raises(MisconfigurationException, match=next(iter(options))):
        NeuralCollapseMonitor(**options)


# Two processes


def two(timeout=20):
    return {"devices": 2, "strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=timeout))}


class Gathers(Classification):
    def forward(self, x):
        out = self.net(x)
        self.all_gather(out.detach().mean())
        return out


@pytest.mark.ddp
def test_a_forward_pass_that_gathers_runs_equally_often_on_all_ranks():
    """Or one rank would wait for the others in the gathering, and they for its next command."""
    assert len(records(monitor_of(), Gathers(network(), lr=0.0), **two())) == 3


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.parametrize("probe", [WHOLE, Probe(size=20, batch_size=4)], ids=["whole", "part"])
def test_two_parts_on_two_ranks_are_those_of_one_process(probe):
    found = []
    for options in ({}, two()):
        monitor = monitor_of(probe=probe, validation=Probe(split="validation", whole=True, batch_size=5))
        found.append(records(monitor, data=Both(batches(), 1), **options)[0])
    one, both = found
    assert both.scalars == pytest.approx(one.scalars, rel=1e-6, abs=1e-9)
    assert both.notes == one.notes


@pytest.mark.ddp
def test_classes_that_only_another_rank_has_are_counted():
    x, _ = class_data(64)
    place = torch.arange(64)
    y = (place // 16) % 2 + (place >= 32).long()  # the third class lies in the last batch
    found = []
    for options in ({}, two()):
        monitor = monitor_of(["net.3"], head=None, subclass_fn=lambda batch: 2 * batch[1])
        found.append(records(monitor, data=batches(data=(x, y)), **options)[0].scalars)
    assert found[1] == pytest.approx(found[0], rel=1e-6, abs=1e-9)


class Uneven(Classification):
    """Its features have another size on rank one."""

    def forward(self, x):
        h = self.net[:4](x)
        self.wide(h if self.global_rank == 0 or self.training else torch.cat([h, h[:, :1]], 1))
        return self.net[4](h)


@pytest.mark.ddp
def test_features_of_different_sizes_are_refused_before_the_first_step():
    module = Uneven(network())
    module.wide = nn.Identity()
    with pytest.raises(Exception, match=r"cannot measure Uneven.*different sizes"):
        records(monitor_of(["wide"]), module, **two())
