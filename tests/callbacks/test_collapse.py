"""Neural collapse of a network in training: the right layers, the right data, the right numbers."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from helpers.fit import fit
from helpers.modules import Classification, class_data, perceptron
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import NeuralCollapseMonitor, Probe
from lightning_dynamics.callbacks import feature_monitor
from lightning_dynamics.objective import features

WHOLE = Probe(whole=True)


def batches(batch_size=16, data=None, **options):
    return DataLoader(TensorDataset(*(class_data() if data is None else data)), batch_size, **options)


def run(monitor, module=None, data=None, *, at=-1, **options):
    """One epoch with a point at its beginning and one at its end: one of the records."""
    module = Classification() if module is None else module
    fit(monitor, module, batches() if data is None else data, **{"max_epochs": 1, **options})
    return monitor.history[at]


def monitor_of(*layers, **options):
    return NeuralCollapseMonitor(*layers, every_n_epochs=1, **{"probe": WHOLE, **options})


def by_hand(h, y, weight=None, bias=None, predictions=None):
    """The measures by their definitions, with d × d matrices, in double precision."""
    h, classes = h.double(), sorted(set(y.tolist()))
    means = torch.stack([h[y == c].mean(0) for c in classes])
    centred = means - means.mean(0)
    residuals = h - means[torch.tensor([classes.index(c) for c in y.tolist()])]
    within, between = residuals.mT @ residuals / len(h), centred.mT @ centred / len(classes)
    values = {
        "nc1": float((within @ torch.linalg.pinv(between, rtol=1e-8, hermitian=True)).trace() / len(classes)),
        "nc1_trace_ratio": float(within.trace() / between.trace()),
        "nc2_equinorm": float(centred.norm(dim=1).std(correction=0) / centred.norm(dim=1).mean()),
    }
    variances = [residuals[y == c].square().sum(1).mean() for c in classes]
    pairs = [(a, b) for a in range(len(classes)) for b in range(a)]
    values["cdnv"] = float(
        sum((variances[a] + variances[b]) / (2 * (means[a] - means[b]).square().sum()) for a, b in pairs) / len(pairs)
    )
    cosines = [F.cosine_similarity(centred[a], centred[b], dim=0) for a, b in pairs]
    values["nc2_equiangular"] = float(sum(abs(c + 1 / (len(classes) - 1)) for c in cosines) / len(pairs))
    nearest = torch.cdist(h, means).argmin(1)
    values["ncc_accuracy"] = float((torch.tensor(classes)[nearest] == y).double().mean())
    if weight is not None:
        rows = weight.double() - weight.double().mean(0)
        values["nc3"] = float((rows / rows.norm() - centred / centred.norm()).square().sum())
        predictions = (h @ weight.double().mT + bias.double()).argmax(1)
    if predictions is not None:
        values["nc4"] = float((torch.tensor(classes)[nearest] != predictions).double().mean())
    return values


def agrees(record, expected, layer="", family="collapse"):
    for name, value in expected.items():
        assert record.scalars[f"{family}/{name}{layer}"] == pytest.approx(value, rel=2e-5, abs=1e-9), name


def features_of(net, x, upto):
    with torch.no_grad():
        return copy.deepcopy(net).eval()[:upto](x)


def test_the_values_are_those_of_the_definitions():
    monitor, module = monitor_of(), Classification()
    before = copy.deepcopy(module.net)
    run(monitor, module)
    x, y = class_data()
    for record, net in ((monitor.history[0], before), (monitor.history[-1], module.net)):
        logits = features_of(net, x, 7)
        head = net[6].weight.detach(), net[6].bias.detach()
        agrees(record, by_hand(features_of(net, x, 6), y, *head))
        agrees(record, by_hand(features_of(net, x, 3), y, predictions=logits.argmax(1)), "/net_2")
    assert monitor.history[0].scalars["collapse/nc1"] != monitor.history[-1].scalars["collapse/nc1"]
    assert monitor.history[0].step == 0
    assert monitor.history[-1].final


def test_a_block_is_measured_behind_its_activation_and_the_record_says_where():
    record = run(monitor_of())
    assert record.notes["layers"] == {
        "net_2": {"tap": "net.2", "reduce": None, "features": 8},  # in evaluation mode dropout does nothing
        "last": {"tap": "net.6:input", "reduce": None, "features": 8},
    }
    assert record.notes["num_classes"] == 3
    assert record.notes["probe"]["n"] == 60


def test_an_operation_in_place_does_not_change_what_was_tapped_before():
    """The batch norm's output is overwritten by the activation that follows."""
    module = Classification()
    record = run(monitor_of(["net.1"]), module)
    x, y = class_data()
    logits = features_of(module.net, x, 7)
    agrees(record, by_hand(features_of(module.net, x, 2), y, predictions=logits.argmax(1)), "/net_1")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("net.4", ["net_4"]),
        (["net.5", "net.0"], ["net_0", "net_5"]),  # in order of execution
        (r"net\.[01]", ["net_0", "net_1"]),
        (["net.4:input"], ["net_4_input"]),
        ([], []),
        ("auto", ["net_2"]),
        (["auto", "net.0"], ["net_0", "net_2"]),
    ],
)
def test_layers_are_named_or_found(layers, expected):
    record = run(monitor_of(layers))
    assert list(record.notes["layers"]) == [*expected, "last"]
    assert sorted(key for key in record.scalars if "/cdnv/" in key) == sorted(
        f"collapse/cdnv/{layer}" for layer in expected
    )


def test_batches_may_be_split_in_any_way():
    # at the end the batch norms have seen batches of other sizes
    one, other = run(monitor_of(), data=batches(60), at=0), run(monitor_of(), data=batches(7), at=0)
    assert set(one.scalars) == set(other.scalars)
    for key, value in one.scalars.items():
        assert other.scalars[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


def test_features_that_do_not_fit_are_read_twice(monkeypatch):
    forwards = []
    module = Classification()
    module.net[0].register_forward_hook(lambda *_: forwards.append(1))
    kept = run(monitor_of(), module, max_steps=1)
    once = len(forwards)
    monkeypatch.setattr(features, "_CACHE", 0)
    forwards.clear()
    module = Classification()
    module.net[0].register_forward_hook(lambda *_: forwards.append(1))
    again = run(monitor_of(), module, max_steps=1)
    assert len(forwards) == once + 2 * 4 + 2  # two points of four batches, and the two that the preflight looks at
    assert again.scalars == kept.scalars


def test_evaluation_mode_is_the_default_and_training_mode_another_function():
    def module():
        return Classification(lr=0.0)

    evaluated, trained = run(monitor_of(), module()), run(monitor_of(mode="train"), module())
    assert run(monitor_of(), module()).scalars == evaluated.scalars
    assert run(monitor_of(mode="train"), module()).scalars == trained.scalars  # the same masks every time
    assert trained.scalars["collapse/nc1"] != pytest.approx(evaluated.scalars["collapse/nc1"], rel=0.01)


# How the network is run, and on what


class Wrapped(Classification):
    """Has no forward, and its batches are dictionaries."""

    forward = Classification.__bases__[0].forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.logits(batch), batch["label"])

    def logits(self, batch):
        return self.net(batch["image"])


def dictionaries():
    x, y = class_data()
    return DataLoader([{"image": a, "label": b} for a, b in zip(x, y, strict=True)], 16)


def test_a_module_without_forward_is_told_how_to_say_it():
    with pytest.raises(MisconfigurationException, match=r"Wrapped has no `forward`.*`forward_fn=`"):
        run(monitor_of(), Wrapped(), dictionaries())


@pytest.mark.parametrize("forward", ["logits", lambda module, batch: module.net(batch["image"])])
def test_the_network_is_run_as_it_is_said(forward):
    expected = run(monitor_of(), Classification(lr=0.0)).scalars
    monitor = monitor_of(forward_fn=forward, target_fn=lambda batch: batch["label"])
    assert run(monitor, Wrapped(lr=0.0), dictionaries()).scalars == expected


def test_a_batch_of_unknown_form_asks_for_functions():
    class Unpacks(Wrapped):
        forward = Classification.forward

    with pytest.raises(MisconfigurationException, match=r"dict, not `\(x, y\)`.*labels are not known.*`target_fn=`"):
        run(monitor_of(forward_fn="logits"), Unpacks(), dictionaries())
    with pytest.raises(MisconfigurationException, match=r"dict, not `\(x, y\)`.*`forward_fn=`"):
        run(monitor_of(target_fn=lambda batch: batch["label"]), Unpacks(), dictionaries())


def labelled(y):
    return batches(data=(class_data()[0], y))


class Unsupervised(Classification):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.randint(0, 2, (60, 3)), "several classes"),
        (torch.full((60, 3), 1 / 3), "several classes"),
        (torch.linspace(0, 1, 60), "not one class per row"),
        (torch.zeros(60, 2, 2, dtype=torch.int64), "not one class per row"),
        (torch.arange(60) % 4, r"from 0 to 2.*from 0 to 3"),
        (torch.arange(60) % 3 - 1, r"from 0 to 2.*from -1 to 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_the_first_step(labels, message):
    with pytest.raises(MisconfigurationException, match=message):
        run(monitor_of(), Unsupervised(), labelled(labels))


@pytest.mark.parametrize(
    "of", [lambda y: F.one_hot(y, 3), lambda y: F.one_hot(y, 3).float(), lambda y: y[:, None], lambda y: y.int()]
)
def test_labels_of_other_forms_are_the_same_classes(of):
    expected = run(monitor_of(), Unsupervised(lr=0.0)).scalars
    assert run(monitor_of(), Unsupervised(lr=0.0), labelled(of(class_data()[1]))).scalars == expected


def test_rows_with_the_ignored_label_do_not_count():
    x, y = class_data()
    marked = y.clone()
    marked[::3] = -100
    record = run(monitor_of(), Unsupervised(), labelled(marked), at=0)
    others = batches(data=(x[y == marked], y[y == marked]))
    assert record.scalars == pytest.approx(run(monitor_of(), Unsupervised(), others, at=0).scalars, rel=1e-6, abs=1e-12)


# Which layers


def test_a_layer_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(MisconfigurationException, match=r"`net\.40` matches no submodule.*net\.4"):
        run(monitor_of(["net.40"]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.first(self.act(self.first(x)))))


def test_a_layer_that_is_used_twice_has_no_one_value():
    with pytest.raises(MisconfigurationException, match=r"`net\.act` is used more than once.*`forward_fn=`"):
        run(monitor_of(["net.act"]), Classification(Twice()))


class Tokens(nn.Module):
    """Labels every token of a sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x.view(len(x), 3, 2)))


class Tagging(Classification):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


def test_sequences_ask_for_a_function_and_are_measured_with_one():
    x, y = class_data()
    data = batches(data=(x, torch.stack([y, (y + 1) % 3, y], 1)))
    with pytest.raises(MisconfigurationException, match=r"`feature_fn=`"):
        run(monitor_of(), Tagging(Tokens()), data)
    monitor = monitor_of(
        ["net.embed"],
        head="net.head",
        feature_fn=lambda h, layer: h.flatten(0, 1),
        target_fn=lambda batch: batch[1].flatten(),
    )
    module = Tagging(Tokens())
    record = run(monitor, module, data)
    with torch.no_grad():
        h = module.net.embed(x.view(-1, 3, 2)).flatten(0, 1)
    labels = torch.stack([y, (y + 1) % 3, y], 1).flatten()
    agrees(record, by_hand(h, labels, module.net.head.weight.detach(), module.net.head.bias.detach()))


def test_rows_that_do_not_match_the_labels_are_refused():
    with pytest.raises(MisconfigurationException, match=r"180 rows of features for 60 labels|48 rows.*16 labels"):
        run(monitor_of([], head="net.head", feature_fn=lambda h, _: h.reshape(-1, 8)), Tagging(Tokens()))


class Convolutional(nn.Module):
    """Without a linear layer: a 1 × 1 convolution classifies, and positions are averaged."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU())
        self.classify = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.classify(self.body(x.view(-1, 1, 2, 3))).mean((2, 3))


def test_a_network_without_a_linear_head_is_measured_without_one():
    module = Classification(Convolutional())
    with pytest.raises(MisconfigurationException, match=r"`head=`"):
        run(monitor_of(), module)
    record = run(monitor_of(["net.body"], head=None), module)
    x, y = class_data()
    with torch.no_grad():
        h, logits = module.net.body(x.view(-1, 1, 2, 3)).flatten(1), module.net(x)
    agrees(record, by_hand(h, y, predictions=logits.argmax(1)))
    assert not any("nc3" in key or "weights" in key for key in record.scalars)


def test_positions_are_flattened_or_averaged_and_the_record_says_which(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 3)
    )
    x, y = class_data()
    found = {}
    for reduce, narrow in (("auto", False), ("pool", False), ("flatten", True), ("auto", True)):
        if narrow:
            monkeypatch.setattr(feature_monitor, "_WIDEST", 0)
        module = Classification(copy.deepcopy(net), lr=0.0)
        record = found[reduce, narrow] = run(monitor_of(["net.2"], reduce=reduce), module)
        how = record.notes["layers"]["net_2"]
        assert how["reduce"] == ("pool" if reduce == "pool" or (reduce == "auto" and narrow) else "flatten")
        assert how["features"] == (4 if how["reduce"] == "pool" else 8)
        h = features_of(net, x, 3)
        h = h.mean((2, 3)) if how["reduce"] == "pool" else h.flatten(1)
        agrees(record, by_hand(h, y), "/net_2")


def test_a_hundred_thousand_features_of_a_thousand_classes_are_averaged_and_of_ten_are_not():
    """Class means alone would take 819 MB."""
    x, y = torch.randn(16, 1, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    for classes, expected in ((1000, ("pool", 25)), (10, ("flatten", 102_400))):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 25, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(25, classes)
        )
        record = run(monitor_of(["net.1"]), Classification(net, lr=0.0), batches(8, data=(x, y)), max_steps=1)
        how = record.notes["layers"]["net_1"]
        assert (how["reduce"], how["features"]) == expected
        h = features_of(net, x, 2)
        agrees(record, {"cdnv": by_hand_cdnv(h.mean((2, 3)) if how["reduce"] == "pool" else h.flatten(1), y)}, "/net_1")


def by_hand_cdnv(h, y):
    """Of two classes."""
    means = [h[y == c].double().mean(0) for c in (0, 1)]
    scatter = sum((h[y == c].double() - means[c]).square().sum(1).mean() for c in (0, 1))
    return float(scatter / (2 * (means[0] - means[1]).square().sum()))


def test_one_logit_stands_for_two_classes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    x, y = class_data(classes=2)
    module = Classification(net)
    record = run(monitor_of(), module, batches(data=(x, y.float()[:, None])))
    logits = features_of(net, x, 3)[:, 0]
    h, w = features_of(net, x, 2), net[2].weight.detach()
    predictions = (logits > 0).long()
    agrees(record, {"accuracy": float((predictions == y).double().mean())})
    assert "collapse/nc2_equiangular" not in record.scalars
    assert "two classes" in record.notes["undefined"]["last"]["nc2_equiangular"]
    assert record.scalars["collapse/nc3"] == pytest.approx(
        by_hand(h, y, torch.cat([-w, w]) / 2, torch.zeros(2))["nc3"], rel=1e-5
    )


# Other data


def test_validation_data_are_measured_around_the_means_of_the_training_data():
    x, y = class_data()
    other, labels = class_data(40, seed=1)
    for validation, options in (
        (True, {"val_dataloaders": batches(data=(other, labels))}),
        (Probe(dataloader=batches(7, data=(other, labels))), {}),
    ):
        module, monitor = Classification(), monitor_of(validation=validation)
        trained(module, monitor, options)
        record = monitor.history[-1]
        h, v = features_of(module.net, x, 6).double(), features_of(module.net, other, 6).double()
        means = torch.stack([h[y == c].mean(0) for c in range(3)])
        centred, residuals = means - means.mean(0), v - means[labels]
        within, between = residuals.mT @ residuals / 40, centred.mT @ centred / 3
        nearest = torch.cdist(v, means).argmin(1)
        agrees(
            record,
            {
                "nc1_validation": float((within @ torch.linalg.pinv(between, rtol=1e-8, hermitian=True)).trace() / 3),
                "ncc_accuracy_validation": float((nearest == labels).double().mean()),
                "nc4_validation": float((nearest != features_of(module.net, other, 7).argmax(1)).double().mean()),
            },
        )
        assert record.scalars["collapse/nc1_validation"] > 0
        assert "collapse/nc1_validation" in monitor.logged(record)
        hidden = features_of(module.net, x, 3).double(), features_of(module.net, other, 3).double()
        means = torch.stack([hidden[0][y == c].mean(0) for c in range(3)])
        nearest = torch.cdist(hidden[1], means).argmin(1)
        agrees(record, {"ncc_accuracy_validation": float((nearest == labels).double().mean())}, "/net_2")


def trained(module, monitor, options):
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[monitor], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, batches(), **options)


def test_a_validation_set_that_does_not_come_leaves_its_values_out():
    record = run(monitor_of(validation=True))
    assert "collapse/nc1" in record.scalars
    assert not any("validation" in key for key in record.scalars)


def test_subclasses_are_compared_with_their_classes():
    x, y = class_data()
    fine = y + 3 * (torch.arange(60) % 2)
    x = x + 1.5 * (torch.arange(60) % 2)[:, None]
    data = batches(data=(x, y, fine))
    record = run(monitor_of(subclass_fn=lambda batch: batch[2]), data=data)
    assert 0 < record.scalars["collapse/subclass_variance_ratio"] < 1
    plain = run(monitor_of(), data=batches(data=(x, y, fine)))
    assert "collapse/subclass_variance_ratio" not in plain.scalars
    assert "undefined" not in plain.notes  # what was not asked for needs no reason


def test_classes_without_samples_are_left_out_and_named():
    x, y = class_data(classes=3)
    record = run(monitor_of(), Classification(perceptron(classes=5)), batches(data=(x, y)))
    assert record.notes["num_classes"] == 5
    assert any("classes 3, 4" in remark or "classes 3 and 4" in remark for remark in record.notes["remarks"]["last"])
    assert all(math.isfinite(value) for value in record.scalars.values())


def test_classes_can_be_recorded_one_by_one():
    record = run(monitor_of(per_class=True))
    assert record.arrays["collapse/class_counts"] == [20.0, 20.0, 20.0]
    assert len(record.arrays["collapse/class_variances/net_2"]) == 3
    assert run(monitor_of()).arrays == {}


# What a run sees


def test_what_is_logged_by_default_is_the_headline(tmp_path):
    run(monitor_of(), logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as stream:
        (*_, last) = csv.DictReader(stream)
    ours = {key for key in last if key.startswith("collapse/")}
    headline = "nc1 nc1_floor nc2_equinorm nc2_equiangular nc3 nc4 accuracy"
    assert ours == {f"collapse/{key}" for key in headline.split()}


def test_layers_are_logged_on_request(tmp_path):
    run(monitor_of(also_log="cdnv/.*"), logger=CSVLogger(tmp_path, name="", version=""))
    assert "collapse/cdnv/net_2" in (tmp_path / "metrics.csv").read_text()


def test_tensorboard_draws_depth_over_time_and_lays_out_the_charts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(monitor_of(also_log="cdnv/.*"), Classification(), batches(), max_epochs=6, logger=logger)
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [image.step for image in events.Images("collapse/depth")] == [0, 4, 12, 24]
    (layout,) = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for c in parsed.category for chart in c.chart}
    assert charts["NC1: variability"] == [r"^collapse/nc1$", r"^collapse/nc1_floor$"]
    assert charts["CDNV, by layer"] == [r"^collapse/cdnv/.+$"]
    assert "NC3: variants" not in charts
    assert "NC1: variability, by layer" not in charts


def test_other_callbacks_may_monitor_it(tmp_path):
    module = Classification()
    monitor = monitor_of(monitor=True)
    stop = EarlyStopping("collapse/nc1", patience=0, mode="max", check_on_train_epoch_end=True)
    fit([monitor, stop], module, batches(), max_epochs=30)
    assert module.trainer.current_epoch < 30


def test_a_record_gives_a_quantity_through_depth():
    record = run(monitor_of(["net.0", "net.2"]))
    assert list(record.through_depth("collapse/cdnv")) == ["net_0", "net_2", "last"]
    assert record.through_depth("collapse/cdnv")["last"] == record.scalars["collapse/cdnv"]
    assert list(record.through_depth("collapse/nc3")) == ["last"]


def test_a_default_cadence_is_found_by_counting_forward_passes(caplog):
    monitor = NeuralCollapseMonitor(probe=WHOLE)
    fit(monitor, Classification(), batches(), max_epochs=1)
    assert "NeuralCollapseMonitor measures every 30 steps" in caplog.text  # one gradient on four batches, at 15 %


def test_two_of_them_take_names():
    monitors = [monitor_of(), monitor_of(["net.0"], name="other")]
    fit(monitors, Classification(), batches(), max_epochs=1)
    assert "collapse_other/cdnv/net_0" in monitors[1].history[0].scalars


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "sum"}, "`reduce` must be one of"),
        ({"num_classes": 1}, "`num_classes` must be an integer of at least 2"),
        ({"validation": "yes"}, "`validation` must be"),
        ({"per_class": 1}, "`per_class` must be"),
        ({"mode": "both"}, "`mode` must be one of"),
        ({"also_log": "nc7"}, "matches no key"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        NeuralCollapseMonitor(**options)


def test_a_number_of_classes_that_is_not_the_heads_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`num_classes` is 4, but the classifier has 3 outputs"):
        run(monitor_of(num_classes=4, head="net.6"))


# Weather


class Breaks(Classification):
    """Its features are not finite, or its memory is out, from some step on."""

    def __init__(self, how, step=2):
        super().__init__()
        self.how, self.step = how, step

    def forward(self, x):
        if not self.training and self.trainer.global_step >= self.step:
            if self.how == "memory":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return self.net(x * math.inf)
        return self.net(x)


@pytest.mark.parametrize(("how", "said"), [("memory", "out of memory"), ("infinite", "finite")])
def test_a_point_that_fails_costs_that_point(how, said):
    monitor = NeuralCollapseMonitor(every_n_train_steps=1, probe=WHOLE)
    with pytest.warns(UserWarning, match=f"skips a point.*{said}"):
        fit(monitor, Breaks(how), batches(), max_epochs=1)
    assert [record.step for record in monitor.history] == [0, 1]


def test_a_network_that_changes_its_parts_is_looked_at_again():
    class Grows(Classification):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net = nn.Sequential(*self.net[:6], nn.Linear(8, 8), nn.ReLU(), self.net[6])

    monitor = monitor_of()
    fit(monitor, Grows(), batches(), max_epochs=2)
    assert [list(record.notes["layers"]) for record in monitor.history] == [
        ["net_2", "last"],
        ["net_2", "net_5", "last"],
        ["net_2", "net_5", "last"],
    ]


def test_a_resumed_run_has_the_curves_of_the_uninterrupted_one(tmp_path):
    def one(folder, epochs, **options):
        monitor = NeuralCollapseMonitor(every_n_train_steps=3, probe=Probe(size=32))
        checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
        net = nn.Sequential(*(layer for layer in perceptron() if not isinstance(layer, nn.Dropout)))
        logger = CSVLogger(folder, name="", version="")
        fit([monitor, checkpoint], Classification(net), batches(), max_epochs=epochs, enable_checkpointing=True,
            logger=logger, **options)  # fmt: skip
        return [(record.step, record.scalars, record.notes["probe"]) for record in monitor.history]

    whole = one(tmp_path / "whole", 4)
    one(tmp_path / "first", 2)
    (checkpoint,) = (tmp_path / "first").glob("*step=8.ckpt")
    assert one(tmp_path / "second", 4, ckpt_path=checkpoint) == whole
