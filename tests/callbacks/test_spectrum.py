"""The rare half of the HessianMonitor, and its other matrices, in whole fits against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.fit import fit, full_batch, mini_batches
from helpers.modules import Regression, regression_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.func import functional_call, jacrev

from lightning_dynamics import HessianMonitor, Probe, Spectrum, read_records
from lightning_dynamics.objective import HessianOperator, Layout

WHOLE = Probe(whole=True)


def module(lr=1e-2, seed=0, **options):
    torch.manual_seed(seed)
    return Regression(nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1)), lr=lr, **options)


def monitor(**options):
    return HessianMonitor(**{"every_n_train_steps": 2, "probe": WHOLE, "spectrum": Spectrum(2), **options})


def dense_hessian(model):
    x, y = (part.double() for part in regression_data())
    shapes = {name: p.shape for name, p in model.net.named_parameters()}

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return (functional_call(model.net, values, (x,)) - y).square().sum(1).mean() / 2

    flat = torch.cat([p.detach().double().reshape(-1) for p in model.net.parameters()])
    return jacrev(jacrev(loss))(flat), jacrev(loss)(flat)


def first_point(model, **options):
    made = monitor(pair=False, **options)
    fit(made, model, max_epochs=1)
    return made.history[0]


def test_sums_over_the_spectrum_agree_with_a_dense_hessian():
    model = module()
    H, gradient = dense_hessian(model)
    record = first_point(model, spectrum=Spectrum(2, num_vectors=60, num_steps=40))
    values, vectors = torch.linalg.eigh(H)
    scalars, errors = record.scalars, record.errors
    assert abs(scalars["hessian/trace"] - float(values.sum())) <= 4 * errors["hessian/trace"]
    assert scalars["hessian/trace_stderr"] == errors["hessian/trace"]
    alpha = record.notes["effective_parameters"]["alpha"]
    assert alpha == pytest.approx(0.01 * float(values[-1]), rel=1e-3)
    positive = values.clamp(min=0)
    count = float((positive / (positive + alpha)).sum())
    assert abs(scalars["hessian/effective_parameters"] - count) <= 4 * errors["hessian/effective_parameters"]
    assert record.notes["effective_parameters"]["at_least"] <= count
    negative = float(-values.clamp(max=0).sum() / values.abs().sum())
    assert scalars["hessian/negative_mass"] == pytest.approx(negative, rel=0.15)
    small = float((values.abs() < 0.01 * values[-1]).double().mean())
    assert abs(scalars["hessian/spectral_sparsity"] - small) <= 4 * errors["hessian/spectral_sparsity"]
    top = vectors.flip(1)[:, :3].mT
    share = float((top @ gradient).square().sum() / gradient.square().sum())
    assert scalars["hessian/gradient_in_top_k"] == pytest.approx(share, rel=1e-2)


def test_the_density_integrates_to_one_and_its_first_moment_is_the_trace():
    record = first_point(module())
    nodes, weights = (torch.tensor(record.arrays[f"hessian/density_{part}"]) for part in ("nodes", "weights"))
    size = record.notes["spectrum"]["size"]
    assert size == 73
    assert float(weights.sum()) == pytest.approx(1, rel=1e-5)
    assert float((nodes * weights).sum()) == pytest.approx(record.scalars["hessian/trace"] / size, rel=1e-4)
    assert float(nodes.max()) == pytest.approx(record.scalars["hessian/top_1"], rel=1e-2)


def test_layers_have_spectra_of_their_own():
    model = module()
    H, _ = dense_hessian(model)
    record = first_point(model, spectrum=Spectrum(2, per_layer=True, diagonal=1000))
    diagonal = H.diagonal()
    for layer, block in (("net_0", slice(0, 60)), ("net_2", slice(60, 73))):
        values = torch.linalg.eigvalsh(H[block, block])
        assert record.scalars[f"hessian/block_top_1/{layer}"] == pytest.approx(float(values[-1]), rel=2e-3)
        error = record.errors[f"hessian/block_trace/{layer}"]
        assert abs(record.scalars[f"hessian/block_trace/{layer}"] - float(values.sum())) <= 5 * error
        entries = diagonal[block].abs().sort().values
        ratio = float(entries[-1] / entries[(len(entries) - 1) // 2])
        assert record.scalars[f"hessian/median_ratio/{layer}"] == pytest.approx(ratio, rel=1e-3)
        assert f"hessian/block_density_nodes/{layer}" in record.arrays
    entries = diagonal.abs().sort().values
    assert record.scalars["hessian/median_ratio"] == pytest.approx(float(entries[-1] / entries[36]), rel=1e-3)


def test_layers_whose_keys_would_be_the_same_are_refused():
    class Twins(Regression):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), lr=1e-3)
            self.net_0 = nn.Linear(4, 1)
            self.more = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(1, 1)])})
            self.more_net = nn.ModuleList([nn.Linear(1, 1)])

        def loss(self, batch):
            out = self.more_net[0](self.more["net"][0](self.net_0(self.net(batch[0]))))
            return (out - batch[1]).square().mean()

    with pytest.raises(MisconfigurationException, match=r"'more\.net\.0' and 'more_net\.0' would both be called"):
        fit(monitor(spectrum=Spectrum(2, per_layer=True)), Twins(), max_epochs=1)
    fit(monitor(), Twins(), max_epochs=1)  # without layers nothing is called by their names


def matrix_of(record, which):
    """Squared cosines of single eigenvectors, a row for each earlier one."""
    return torch.tensor(record.arrays[f"hessian/overlap_{which}_matrix"]).view(3, 3)


def test_eigenvectors_that_stay_overlap_wholly():
    made = monitor()
    fit(made, module(lr=0.0), max_epochs=5)
    first, second = made.history[:2]
    assert "hessian/overlap_previous" not in first.scalars
    for which, lag in (("previous", 2), ("first", 2)):
        assert second.scalars[f"hessian/overlap_{which}"] == pytest.approx(
            1, abs=second.errors["hessian/overlap_first"]
        )
        assert second.notes["overlap"][f"lag_{which}"] == lag
    assert made.history[2].notes["overlap"]["lag_first"] == 4
    assert second.notes["overlap"]["null"] == 3 / 73
    for which in ("previous", "first"):
        assert f"hessian/overlap_{which}_matrix" not in first.arrays
        assert matrix_of(second, which) == pytest.approx(torch.eye(3), abs=1e-3)


def test_overlaps_are_those_of_the_dense_eigenvectors():
    model = module(lr=5e-2)
    before, _ = dense_hessian(model)
    made = monitor(pair=False)
    fit(made, model, max_epochs=2)
    after, _ = dense_hessian(model)
    old, new = (torch.linalg.eigh(H).eigenvectors.flip(1)[:, :3] for H in (before, after))
    overlap = float((old.mT @ new).square().sum() / 3)
    last = made.history[-1]
    assert last.final
    assert last.scalars["hessian/overlap_first"] == pytest.approx(overlap, abs=last.errors["hessian/overlap_first"])
    assert last.errors["hessian/overlap_first"] < 0.05
    assert overlap < 0.99
    dense = (old.mT @ new).square()
    found = matrix_of(last, "first").double()
    assert found == pytest.approx(dense, abs=5e-3)
    assert float(found.sum() / 3) == pytest.approx(last.scalars["hessian/overlap_first"], rel=1e-6)
    assert float((dense - dense.mT).abs().max()) > 0.05  # so that rows and columns are told apart


def test_a_multiple_eigenvalue_gives_no_overlap():
    """Two inputs of equal curvature: the top eigenvalue of the linear map is double, its vectors are anyone's."""
    x = torch.eye(4)[[0, 1, 0, 1]]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(4, 1)), 4)
    made = monitor(top_k=1, bottom_k=0)
    fit(made, Regression(lr=1e-2), data, max_epochs=5)
    for record in made.history:
        assert "hessian/overlap_first" not in record.scalars
        assert "gap" in record.notes["overlap"]["not_certified"]


def test_the_sharpening_rate_is_that_of_small_steps():
    model = module(lr=1e-4)
    before, _ = dense_hessian(model)
    made = monitor(sharpening_rate=True, pair=False)
    fit(made, model, max_epochs=1)
    after, _ = dense_hessian(model)
    change = float(torch.linalg.eigvalsh(after)[-1] - torch.linalg.eigvalsh(before)[-1])
    assert made.history[0].scalars["hessian/sharpening_rate"] == pytest.approx(change / 1e-4, rel=2e-2)


def test_without_a_third_derivative_the_point_stands_without_the_rate(monkeypatch):
    def missing(self, vector):
        raise RuntimeError("batch_norm does not support 3rd+ order derivatives.")

    monkeypatch.setattr(HessianOperator, "slope", missing)
    record = first_point(module(), sharpening_rate=True)
    assert "hessian/sharpening_rate" not in record.scalars
    assert "batch_norm" in record.notes["no_sharpening_rate"]
    assert "hessian/trace" in record.scalars


@pytest.mark.parametrize("seed", range(4))
def test_the_error_of_the_sharpening_rate_contains_that_of_the_vector(seed):
    """At points that start from old vectors, which are known to the tolerance of their values only."""
    model, rates = module(lr=3e-2, seed=seed), []

    class Exact(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            H, gradient = dense_hessian(pl_module)
            vector = torch.linalg.eigh(H).eigenvectors[:, -1]
            unit = 1e-4 * gradient / gradient.norm()
            state = [p.detach().clone() for p in pl_module.parameters()]
            curvatures = []
            for sign in (1, -1):
                with torch.no_grad():
                    place = 0
                    for p, old in zip(pl_module.parameters(), state, strict=True):
                        p.copy_(old.double() + sign * unit[place : place + p.numel()].view(p.shape))
                        place += p.numel()
                curvatures.append(vector @ dense_hessian(pl_module.double())[0] @ vector)
                pl_module.float()
            with torch.no_grad():
                for p, old in zip(pl_module.parameters(), state, strict=True):
                    p.copy_(old)
            rates.append(-float((curvatures[0] - curvatures[1]) / 2e-4 * gradient.norm()))

    made = monitor(sharpening_rate=True, pair=False, every_n_train_steps=1, spectrum=False)
    fit([made, Exact()], model, max_epochs=6)
    for record, exact in zip(made.history, rates, strict=False):
        error = record.errors["hessian/sharpening_rate"]
        assert abs(record.scalars["hessian/sharpening_rate"] - exact) <= error + 2e-2 * abs(exact)


def test_alpha_is_the_weight_decay_where_there_is_one():
    def optimizer(parameters):
        return torch.optim.SGD(parameters, 1e-2, weight_decay=0.02)

    notes = first_point(module(optimizer=optimizer)).notes["effective_parameters"]
    assert (notes["alpha"], notes["alpha_is"]) == (0.02, "weight decay")
    warming = module(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0, weight_decay=0.02))
    assert first_point(warming).notes["effective_parameters"]["alpha"] == 0.02
    coupled = module(optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, weight_decay=0.02))
    assert first_point(coupled).notes["effective_parameters"]["alpha"] == 0.02
    decoupled = module(optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.02))
    assert first_point(decoupled).notes["effective_parameters"]["alpha_is"] == "1 % of the largest eigenvalue"
    notes = first_point(module(optimizer=optimizer), spectrum=Spectrum(2, alpha=0.5)).notes["effective_parameters"]
    assert (notes["alpha"], notes["alpha_is"]) == (0.5, "given")


# When


def test_the_spectrum_has_a_cadence_of_its_own():
    made = monitor(spectrum=Spectrum(every_n_train_steps=4))
    fit(made, module(), max_epochs=7)
    assert [r.step for r in made.history] == [0, 2, 4, 6, 7]
    assert [r.step for r in made.history if "hessian/trace" in r.scalars] == [0, 4, 7]


def test_a_spectrum_between_points_is_a_point_too():
    made = monitor(spectrum=Spectrum(every_n_train_steps=3))
    fit(made, module(), max_epochs=5)
    assert [r.step for r in made.history] == [0, 2, 3, 4, 5]
    assert [r.step for r in made.history if "hessian/trace" in r.scalars] == [0, 3, 5]


def test_spectra_at_epochs():
    made = monitor(spectrum=Spectrum(every_n_epochs=2))
    fit(made, module(), mini_batches(24, 8), max_epochs=4)
    assert [r.step for r in made.history if "hessian/trace" in r.scalars] == [0, 6, 12]


def test_by_default_a_short_run_is_not_charged_for_a_spectrum(caplog):
    made = monitor(spectrum=True)
    with caplog.at_level("INFO"):
        fit(made, module(), max_epochs=5)
    assert not any("hessian/trace" in r.scalars for r in made.history)
    assert any("does not measure the whole spectrum by itself" in r.message for r in caplog.records)


def test_a_long_run_is(monkeypatch, caplog):
    monkeypatch.setattr("lightning_dynamics.callbacks.session._BUDGET", 300.0)
    made = monitor(spectrum=True)
    with caplog.at_level("INFO"):
        fit(made, module(), max_epochs=20)
    every = made._session._ledger.states["HessianMonitor"].every_detail
    assert 0 < every <= 10
    with_spectrum = [r.step for r in made.history if "hessian/trace" in r.scalars]
    assert with_spectrum[: len(range(0, 20, every))] == list(range(0, 20, every))


@pytest.mark.parametrize(("epochs", "expected"), [(8, [0, 4, 8]), (7, [0, 4, 7]), (5, [0, 4])])
def test_the_end_is_measured_if_it_is_due_or_half_due(epochs, expected):
    made = monitor(spectrum=True, every_n_train_steps=1, pair=False)

    class Every4(Callback):
        def on_train_start(self, trainer, pl_module):
            made._session._ledger.states["HessianMonitor"].every_detail = 4

    fit([made, Every4()], module(), max_epochs=epochs)
    assert [r.step for r in made.history if "hessian/trace" in r.scalars] == expected


def test_without_a_known_length_spectra_are_measured():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([regression_data()] * 3)

    made = monitor(spectrum=True, probe=Probe(first_batches=1))
    data = torch.utils.data.DataLoader(Stream(), None)
    fit(made, module(), data, max_epochs=1)
    assert made._session._ledger.states["HessianMonitor"].every_detail > 0


def test_what_is_asked_for_is_paid_for():
    plain = HessianMonitor()
    layout = Layout({"a.weight": torch.Size([50]), "b.weight": torch.Size([60])})
    assert HessianMonitor(spectrum=Spectrum(per_layer=True)).products_in_detail(layout) == pytest.approx(
        plain.products_in_detail(layout) + 2 * (128 + 20)
    )
    assert HessianMonitor(spectrum=Spectrum(diagonal=55)).products_in_detail(layout) == pytest.approx(
        plain.products_in_detail(layout) + 50 + 55
    )
    assert HessianMonitor(sharpening_rate=True).products_per_point == pytest.approx(plain.products_per_point + 12)
    residual = HessianMonitor(operator="residual", output_fn="net")
    assert residual.products_per_point == pytest.approx(2 * plain.products_per_point)


def test_off_is_off():
    made = monitor(spectrum=False)
    fit(made, module(), max_epochs=5)
    assert not any("hessian/trace" in r.scalars for r in made.history)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_vectors": 1}, "`num_vectors` must be an integer of at least 2, got 1"),
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1"),
        ({"alpha": -1.0}, "`alpha` must be a number above 0 or None"),
        ({"alpha": "much"}, "`alpha` must be a number above 0 or None, got 'much'"),
        ({"small": 2}, "`small` must be a number between 0 and 1"),
        ({"diagonal": -1}, "`diagonal` must be an integer of at least 0"),
        ({"per_layer": 1}, "`per_layer` must be True or False"),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, "exclude each other"),
    ],
)
def test_impossible_spectra_are_refused_when_they_are_made(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        Spectrum(**arguments)


# Other matrices


def outputs(model, batch):
    return model.net(batch[0]), lambda z: (z - batch[1]).square().sum(1) / 2


def dense_gauss_newton(model):
    x, _ = regression_data()
    shapes = {name: p.shape for name, p in model.net.named_parameters()}

    def out(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model.net, values, (x.double(),)).squeeze(1)

    flat = torch.cat([p.detach().double().reshape(-1) for p in model.net.parameters()])
    return jacrev(out)(flat), out(flat)


@pytest.mark.parametrize("where", ["net", "net.2", outputs], ids=["module", "last layer", "function"])
def test_gauss_newton_in_a_fit(where):
    model = module()
    J, _ = dense_gauss_newton(model)
    expected = torch.linalg.eigvalsh(J.mT @ J / 24).flip(0)
    record = first_point(model, operator="gauss_newton", output_fn=where)
    for i in range(3):
        assert record.scalars[f"gauss_newton/top_{i + 1}"] == pytest.approx(float(expected[i]), rel=1e-3)
    assert "gauss_newton/edge_ratio" not in record.scalars


def test_the_hessian_splits_in_a_fit():
    model = module()
    H, _ = dense_hessian(model)
    J, _ = dense_gauss_newton(model)
    expected = torch.linalg.eigvalsh(H - J.mT @ J / 24)
    record = first_point(model, operator="residual", output_fn="net")
    assert record.scalars["residual/top_1"] == pytest.approx(float(expected[-1]), rel=1e-3)
    assert record.scalars["residual/bottom_1"] == pytest.approx(float(expected[0]), rel=2e-2)


def test_the_empirical_fisher_in_a_fit():
    model = module()
    J, out = dense_gauss_newton(model)
    gradients = J * (out - regression_data()[1].squeeze(1).double())[:, None]
    expected = torch.linalg.eigvalsh(gradients.mT @ gradients / 24)[-1]
    record = first_point(model, operator="empirical_fisher", output_fn=outputs)
    assert record.scalars["empirical_fisher/top_1"] == pytest.approx(float(expected), rel=1e-3)


def test_the_preconditioned_hessian_is_twice_the_edge_ratio():
    def adam(parameters):
        return torch.optim.Adam(parameters, 1e-3)

    monitors = [monitor(operator="preconditioned", pair=False), monitor(pair=False)]
    fit(monitors, module(optimizer=adam), max_epochs=5)
    before, after = monitors[0].history[0], monitors[0].history[1]
    assert "preconditioned/top_1" not in before.scalars  # Adam has not taken a step
    assert "step yet" in before.notes["no_spectrum"]
    ratio = monitors[1].history[1].scalars["hessian/edge_ratio"]
    assert after.scalars["preconditioned/top_1"] / 2 == pytest.approx(ratio, rel=2e-3)
    assert monitors[0]._session._ledger.skipped == 0


def test_several_matrices_in_one_trainer_need_no_names():
    monitors = [monitor(), monitor(operator="gauss_newton", output_fn="net")]
    fit(monitors, module(), max_epochs=3)
    assert {r.monitor for r in read_records(monitors[0].record_path)} == {
        "HessianMonitor",
        "HessianMonitor[gauss_newton]",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "ggn"}, "`operator` must be one of 'hessian', 'preconditioned', 'gauss_newton'"),
        ({"operator": "gauss_newton"}, "needs `output_fn=`"),
        ({"operator": "fisher", "output_fn": "net"}, "gives no likelihood"),
        ({"operator": "empirical_fisher", "output_fn": "net"}, "gives no losses of single samples"),
        ({"spectrum": "yes"}, "`spectrum` must be True, False or a Spectrum"),
        ({"also_log": "("}, "`also_log` must hold regular expressions"),
        ({"also_log": 3}, "`also_log` must hold regular expressions"),
        ({"also_log": "spectral_sparcity"}, "`also_log='spectral_sparcity'` matches no key; there are: edge_ratio"),
        ({"sharpening_rate": "yes"}, "`sharpening_rate` must be True or False"),
        ({"pair": "no"}, "`pair` must be True or False"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        monitor(**options)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("head", "names no submodule; there are: net, net.0"),
        (lambda model, batch: model.net(batch[0]), "must return two things"),
        (lambda model, batch: (model.net(batch[0]), lambda z: z.square().mean()), "of another function"),
    ],
)
def test_outputs_that_are_none_are_refused_before_the_first_step(where, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(monitor(operator="gauss_newton", output_fn=where), module(), max_epochs=1)


def test_the_first_reference_outlasts_a_resume_however_large(tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    monkeypatch.setattr("lightning_dynamics.callbacks.monitor_state._SMALL", 10)

    def run(epochs, ckpt_path=None):
        made = monitor(pair=False)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "ckpt_path": ckpt_path}
        fit([made, saver], module(), full_batch(), max_epochs=epochs, **options)
        return made

    first = run(3)
    kept = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]["HessianMonitor"]
    assert not any(isinstance(value, torch.Tensor) for value in kept["memory"].values())
    assert first.record_path.parent.joinpath(kept["lasting"]).exists()
    last = run(5, tmp_path / "step=3.ckpt").history[-1]
    assert last.step == 5
    assert last.notes["overlap"]["lag_first"] == 5


def test_a_damaged_reference_costs_itself(tmp_path, monkeypatch):
    from lightning_dynamics.callbacks.monitor_state import MonitorState

    monkeypatch.setattr("lightning_dynamics.callbacks.monitor_state._SMALL", 10)
    state = MonitorState(memory={"layout": "a", "first_vectors": torch.ones(3, 9), "first_step": 4, "rounding": 0.5})
    kept = state.to_checkpoint(tmp_path)
    assert MonitorState.from_checkpoint(kept).memory["first_step"] == 4
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="cannot be read"):
        restored = MonitorState.from_checkpoint(kept).memory
    assert "first_vectors" not in restored
    assert restored["rounding"] == 0.5


def test_what_was_monitored_is_monitored_after_a_resume(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    def run(epochs, ckpt_path=None):
        stopping = EarlyStopping("hessian/trace", patience=50, check_on_train_epoch_end=True)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        made = monitor(monitor=True, pair=False, spectrum=Spectrum(every_n_train_steps=6))
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path, "ckpt_path": ckpt_path}
        fit([made, stopping, saver], module(), full_batch(), max_epochs=epochs, **options)
        return made

    run(4)
    assert run(6, tmp_path / "step=4.ckpt").history[-1].step == 6


def test_what_is_asked_for_is_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    made = monitor(also_log=["spectral_sparsity", "block_.*"], spectrum=Spectrum(2, per_layer=True))
    fit(made, module(), max_epochs=3, logger=CSVLogger(tmp_path, name="", version=""))
    columns = set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"hessian/spectral_sparsity", "hessian/block_top_1/net_0", "hessian/block_trace/net_2"} <= columns
    assert "hessian/negative_mass" not in columns
    assert math.isfinite(made.history[0].scalars["hessian/negative_mass"])
