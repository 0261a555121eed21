"""The examples, shortened: what they measure is what their pages say, and they leave curves, records and a picture."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path

import pytest
import torch

from lightning_dynamics import read_records

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(history, key):
    return [record.scalars[f"hessian/{key}"] for record in history]


def assert_left_behind(folder, runs, picture, steps):
    for run in runs:
        version = folder / run / "version_0"
        assert read_records(version)[-1].step == steps
        assert list(version.glob("events.out.tfevents.*"))
        header, *rows = (folder / f"{run}_csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        assert {"hessian/edge_ratio", "hessian/top_1", "train_loss"} <= set(header.split(","))
        assert rows
    assert (folder / picture).stat().st_size > 10_000


@pytest.fixture(scope="module")
def transformer():
    return load("transformer")


@pytest.fixture(scope="module")
def lstm():
    return load("lstm")


@pytest.fixture(scope="module")
def dqn():
    return load("dqn")


@pytest.fixture(scope="module")
def collapse():
    return load("neural_collapse")


@pytest.fixture(scope="module")
def regression():
    return load("linear_regression")


@pytest.fixture(scope="module")
def diffusion():
    return load("diffusion")


def test_the_transformer_comes_to_the_edge_of_adam_first_where_the_learning_rate_is_larger(
    transformer, tmp_path, capsys
):
    histories = transformer.main(["--steps", "48", "--every", "48", "--folder", str(tmp_path)])
    slow, fast = histories[1e-3], histories[3e-3]
    for history in (slow, fast):
        assert [record.step for record in history] == [0, 48]
        # Adam has no effective step before its first one
        assert "hessian/edge_ratio" not in history[0].scalars
        # no one threshold for the sharpness: effective steps differ
        assert all("hessian/stability_threshold" not in record.scalars for record in history)
    assert values(slow, "top_1")[0] == pytest.approx(values(fast, "top_1")[0], rel=0.05)
    assert values(fast[1:], "edge_ratio")[-1] > 0.4
    assert values(slow[1:], "edge_ratio")[-1] < 0.1
    assert values(fast, "probe_loss")[-1] < values(slow, "probe_loss")[-1] < values(slow, "probe_loss")[0] - 1
    out = capsys.readouterr().out
    assert out.count("In the last third the top eigenvalue lies between") == 2
    assert_left_behind(tmp_path, ["transformer_0.001", "transformer_0.003"], "transformer.png", 48)


def test_the_transformer_sees_the_past_alone_and_decays_matrices_alone(transformer):
    pieces, vocabulary = transformer.zen_of_python()
    torch.manual_seed(0)
    model = transformer.CharacterModel(1e-3, vocabulary)
    model.log = lambda *_, **__: None
    outputs = []
    model.head.register_forward_hook(lambda *arguments: outputs.append(arguments[-1].detach()))
    for text in (pieces[:1], torch.cat([pieces[:1, :20], pieces[1:2, 20:]], dim=1)):
        model.training_step((text,), 0)
    before, after = ((outputs[0] - outputs[1])[0, part].abs().max() for part in (slice(20), slice(20, None)))
    assert before < 1e-5 < 1e-2 < after
    decayed, others = model.configure_optimizers().param_groups
    assert {p.ndim for p in others["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_lstm_is_measured_per_token_and_clipping_stands_beside_its_ratio(lstm, tmp_path, capsys):
    found = lstm.main(["--steps", "24", "--every", "12", "--folder", str(tmp_path)])
    (clipped, _), (free, _) = found["clipped at 0.1"], found["not clipped"]
    for history, by_hand in found.values():
        assert values(history, "probe_loss")[-1] == pytest.approx(by_hand["over tokens"], rel=1e-5)
        assert by_hand["over batches"] != pytest.approx(by_hand["over tokens"], rel=1e-4)
        thresholds = values(history, "stability_threshold")
        assert thresholds == pytest.approx([2 * (1 + 0.9) / 2.0] * 3)
        ratios = [top / threshold for top, threshold in zip(values(history, "top_1"), thresholds, strict=True)]
        assert values(history, "edge_ratio") == pytest.approx(ratios)
    assert values(clipped, "edge_ratio")[1] > 1.2
    assert 0.1 < values(clipped[1:], "clip_factor")[-1] < 0.7
    assert all("hessian/clip_factor" not in record.scalars for record in free)
    assert values(clipped, "probe_loss")[-1] < values(free, "probe_loss")[-1] - 0.1
    assert "times the clip factor of the steps before it" in capsys.readouterr().out
    assert_left_behind(tmp_path, ["lstm_clipped", "lstm_not_clipped"], "lstm.png", 24)


def test_the_lstm_wants_what_was_read_three_steps_before(lstm):
    for read, wanted in lstm.sequences(5):
        assert (wanted[:3] == lstm.NOTHING).all()
        assert torch.equal(wanted[3:], read[:-3])
    read, wanted = lstm.pad(lstm.sequences(5))
    assert lstm.tokens((read, wanted)) == sum(len(r) - 3 for r, _ in lstm.sequences(5))


def test_the_dqn_climbs_higher_with_a_huber_loss_and_measures_a_frozen_sample(dqn, tmp_path, capsys, monkeypatch):
    agents = []
    create = dqn.Agent

    def remember(*arguments):
        agents.append(create(*arguments))
        return agents[-1]

    monkeypatch.setattr(dqn, "Agent", remember)
    histories = dqn.main(["--steps", "120", "--every", "40", "--folder", str(tmp_path)])
    for history, agent in zip(histories.values(), agents, strict=True):
        assert values(history, "stability_threshold") == pytest.approx([2 * (1 + 0.9) / 0.3] * 4)
        assert {record.notes["probe"]["n"] for record in history} == {128 * 8}
        # measurements play no game of their own: a move in each game at every tenth update
        assert len(agent.replay.everything()[0]) == (128 + 12) * 8
        pairs = zip(agent.online.parameters(), agent.target.parameters(), strict=True)
        assert not any(torch.equal(online, target) for online, target in pairs)
    assert max(values(histories["huber"], "edge_ratio")) > 1.2 * max(values(histories["cross_entropy"], "edge_ratio"))
    out = capsys.readouterr().out
    assert out.count("the threshold: the highest edge ratio is") == 2
    assert_left_behind(tmp_path, ["dqn_huber", "dqn_cross_entropy"], "dqn.png", 120)


def test_a_paddle_that_follows_the_ball_always_catches_it(dqn):
    torch.manual_seed(0)
    game = dqn.Catch(games=16)
    rewards = []
    for _ in range(3 * (dqn.ROWS - 1)):
        _, _, reward, _, ends = game.play((game.ball - game.paddle).sign() + 1)
        rewards += reward[ends].tolist()
    assert len(rewards) == 3 * 16
    assert statistics.mean(rewards) == 1


@pytest.mark.parametrize(("loss", "least"), [("huber", 0.0), ("cross_entropy", math.log(2))])
@torch.no_grad()
def test_the_td_loss_is_least_where_outputs_stand_for_the_target(dqn, loss, least):
    torch.manual_seed(0)
    agent = dqn.Agent(loss, 0.1)
    seen, actions, _, after, _ = agent.replay.everything()
    ends = torch.ones(len(seen), dtype=torch.bool)  # nothing follows: the target is the reward
    agent.online[-1].weight.zero_()
    if loss == "huber":
        agent.online[-1].bias.fill_(0.075)
    else:  # half on the return 0 and half on 0.15
        agent.online[-1].bias.view(dqn.ACTIONS, -1).zero_()[:, 10:12] = 50.0
    at, below, above = (
        float(agent.td_loss((seen, actions, torch.full((len(seen),), reward), after, ends)))
        for reward in (0.075, -0.3, 0.45)
    )
    assert at == pytest.approx(least, abs=1e-4)
    assert below == pytest.approx(above, rel=1e-3)
    assert below > at + 0.05


def at(record, key):
    return record.scalars[f"collapse/{key}"]


def test_features_collapse_the_more_the_deeper_and_a_random_layer_does_not(collapse, tmp_path, capsys):
    histories, random = collapse.main(["--epochs", "27", "--every", "3", "--folder", str(tmp_path)])
    (history,) = histories.values()
    start, end = collapse.start_of_terminal_phase(history), history[-1]
    for key in ("nc1", "nc2_equinorm", "nc2_equiangular", "nc3", "nc4"):
        assert at(end, key) < 0.5 * at(history[0], key), key
    for key in ("nc1", "cdnv", "nc2_equiangular", "nc3"):
        assert at(end, key) < 0.9 * at(start, key), key
    assert 0 < start.epoch < 12 < end.epoch
    assert collapse.order_of_depth(end) == pytest.approx(-1)
    assert collapse.order_of_depth(history[0]) > 0
    assert at(end, "class_imbalance") == 1
    assert end.notes["probe"]["n"] == 1500
    assert list(end.notes["layers"]) == ["net_2", "net_5", "net_8", "net_11", "last"]
    # nc1 takes the random layer for more collapsed than the second of the network, noise alone explains that
    second, noise = list(end.through_depth("collapse/nc1").values())[1], random["nc1_floor"]
    assert random["nc1"] < second
    assert random["nc1"] < noise + 2 * random["nc1_floor_error"]
    assert second < 0.05 * list(end.through_depth("collapse/nc1_floor").values())[1]
    assert random["cdnv"] == pytest.approx((collapse.PER_CLASS - 1) / 2, rel=0.02)
    assert random["ncc_accuracy"] == 1
    assert random["ncc_accuracy_validation"] < 0.2
    out = capsys.readouterr().out
    assert "rank correlation with depth -1.00" in out
    assert "A random layer: nc1 0.0" in out
    version = tmp_path / "collapse_seed_0" / "version_0"
    assert [record.epoch for record in read_records(version)] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 26]
    assert list(version.glob("events.out.tfevents.*"))
    header = (tmp_path / "collapse_seed_0_csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8").split("\n")[0]
    assert {"collapse/nc1", "collapse/nc1_floor", "collapse/nc3", "train_loss"} <= set(header.split(","))
    assert (tmp_path / "neural_collapse.png").stat().st_size > 10_000


@pytest.mark.slow
def test_five_seeds_collapse_in_the_terminal_phase_and_through_depth(collapse, tmp_path):
    histories, _ = collapse.main(["--seeds", "5", "--folder", str(tmp_path)])
    assert len(histories) == 5
    for history in histories.values():
        start, end = collapse.start_of_terminal_phase(history), history[-1]
        assert start.epoch <= 10
        assert at(end, "nc1") < at(start, "nc1") / 5
        for key in ("nc2_equinorm", "nc2_equiangular", "nc3"):
            assert at(end, key) < 0.8 * at(start, key), key
        assert at(end, "nc4") == 0
        assert at(history[0], "nc4") > 0.8
        assert at(end, "accuracy") == 1
        assert collapse.order_of_depth(end) <= -0.9
        assert at(end, "depth_slope") < -0.5
        assert at(end, "depth_r2") > 0.9
        pairs = zip(*(end.through_depth(f"collapse/{key}").values() for key in ("nc1", "nc1_floor")), strict=True)
        assert all(nc1 < 0.1 * floor for nc1, floor in pairs)


def test_the_digits_are_as_many_of_each_class(collapse):
    training, validation = collapse.digits()
    assert torch.bincount(training.tensors[1]).tolist() == [collapse.PER_CLASS] * collapse.CLASSES
    assert len(validation) == 297
    joined = torch.cat([training.tensors[0], validation.tensors[0]])
    assert joined.mean().abs() < 1e-5


@pytest.mark.slow
def test_a_solved_regression_moves_as_theory_says_for_the_order_of_its_batches(
    regression, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(regression, "MANY", torch.logspace(-1, -1.3, 200).tolist())  # they relax in 100 steps
    planes, ways = regression.main(["--steps", "1000", "--folder", str(tmp_path)])
    for found in planes.values():
        for rows in found.values():
            assert all(abs(row.deviation) < 5 for row in rows if row.error > 0)
    for order, found in planes.items():
        by_name = {mode: {row.name: row for row in rows} for mode, rows in found.items()}
        ratio, variance = by_name["bottom_1"]["Var p/Var q"], by_name["bottom_1"]["Var q"]
        if order == "with_replacement":
            assert ratio.theory == pytest.approx(ratio.white, rel=1e-3)
            assert by_name["top_2"]["frequency"].value == pytest.approx(by_name["top_2"]["frequency"].white, rel=0.2)
        else:
            assert ratio.theory > 14 * ratio.white
            assert ratio.value > 9 * ratio.white
            assert ratio.value - 5 * ratio.error > ratio.white
            assert variance.value < variance.white / 15
    for name, slow, fast in (("momentum", 1.8, 2.0), ("no_momentum", 0.9, 1.0)):
        rows = ways[name]
        assert all(abs(row.deviation) < 5 for _, row, _ in rows)
        assert all(null == pytest.approx(row.theory, abs=0.02) for _, row, null in rows)
        assert slow < rows[0][1].theory < fast
        assert rows[-1][1].theory < 0.35
    out = capsys.readouterr().out
    assert out.count("noise +") == 8
    assert out.count("drift and diffusion: ") == 2
    for run in ("with_replacement", "reshuffled", "momentum", "no_momentum"):
        version = tmp_path / run / "version_0"
        assert {record.monitor for record in read_records(version)} == {"DisplacementMonitor", "HessianMonitor"}
        assert list(version.glob("events.out.tfevents.*"))
    for picture in ("linear_regression.png", "linear_regression_planes.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_the_data_of_the_regression_have_the_hessian_and_the_minimum_that_were_asked_for(regression):
    data = regression.Regression([6.0, 2.0, 0.5])
    inputs, targets = data[range(len(data))]
    assert torch.linalg.eigvalsh(inputs.T @ inputs / len(data)).tolist() == pytest.approx([0.5, 2, 6], rel=1e-4)
    assert (inputs.T @ (inputs.sum(1) - targets) / len(data)).abs().max() < 1e-5
    gradients = (inputs.sum(1) - targets)[:, None] * (inputs.double() @ data.vectors)
    assert data.gradient_noise().tolist() == pytest.approx(gradients.square().mean(0).tolist(), rel=1e-4)


@pytest.mark.slow
def test_weights_of_the_digits_network_diffuse_beside_their_nulls(diffusion, tmp_path, capsys):
    detected, late = diffusion.main(["--steps", "1200", "--folder", str(tmp_path)])
    last = diffusion.fitted(detected)[-1]
    start = last.notes["reference"]["step"]
    losses = {r.step: r.scalars["displacement/training_loss"] for r in detected.history if r.step >= start}
    assert 200 <= start <= 800
    assert losses[1200] < losses[start] < 0.2
    for family, record in (("displacement", last), ("displacement_late", diffusion.fitted(late)[-1])):
        assert 0 < record.scalars[f"{family}/exponent"] < 1.2
        assert 0 < record.errors[f"{family}/exponent"] < 0.5
        assert record.scalars[f"{family}/exponent_drift"] > 0.999
        assert record.scalars[f"{family}/exponent_ou"] < 0.2
        # in the measured bowl weights would have turned back long ago
        assert record.notes["exponent"]["ou"]["excluded"]
        assert record.notes["exponent"]["ou"]["amplitude"] > 2
    end = detected.history[-1]
    assert end.scalars["displacement/gradient_norm"] > 0.01
    assert [each.partition(":")[0] for each in end.notes["symmetries"]] == [
        "scale",
        "shift",
        "shift",
        "rescale",
        "rescale",
    ]
    assert abs(end.scalars["displacement/radial_cosine/net_0"]) < 1e-4
    assert end.scalars["displacement/rescale_change/net_3-net_5"] > 0.1
    out = capsys.readouterr().out
    assert f"the reference lies, at step {start} of 1200" in out
    assert "Aging exponent" in out
    assert "scale: net.0.weight" in out
    version = tmp_path / "digits" / "version_0"
    assert read_records(version)[-1].step == 1200
    assert list(version.glob("events.out.tfevents.*"))
    assert (tmp_path / "diffusion.png").stat().st_size > 10_000


@pytest.mark.slow
def test_only_at_the_edge_a_higher_learning_rate_catapults(tmp_path):
    outcomes, sweep = load("edge_test").main(
        ["--at", "300", "--steps", "15", "--draws", "2", "--folder", str(tmp_path)]
    )
    assert outcomes["before"].catapults == dict.fromkeys(outcomes["before"].branches, False)
    assert outcomes["at"].catapults["η × 1.5"]
    assert outcomes["at"].catapults["η × 2"]
    gaps = [gap.value for gap in sweep.gaps]
    assert gaps[0] > 5 * gaps[-2] > gaps[-1] == 0
    assert (tmp_path / "edge_test" / "at.png").stat().st_size > 10_000


@pytest.mark.slow
def test_reshuffled_batches_leave_a_saddle_first_where_the_noise_is_across(tmp_path):
    table = load("saddle").main(["--runs", "60", "--folder", str(tmp_path)])
    assert all(found["GD"].mean == math.inf for found in table.values())
    assert table[0.0]["RR"].mean < 0.6 * table[0.0]["WR"].mean
    assert table[1.0]["RR"].mean > 1.5 * table[1.0]["WR"].mean
    injected, replaced = table[0.0]["noise"], table[0.0]["WR"]
    assert abs(injected.mean - replaced.mean) < 4 * math.hypot(injected.error, replaced.error)
    assert (tmp_path / "saddle.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_sharpness_is_the_lower_the_smaller_the_batch_and_no_run_is_lost_unseen(tmp_path, capsys, monkeypatch):
    example = load("stochastic_sharpness")
    monkeypatch.setattr(example, "LARGE", [(64, 0.5), (8, 0.5), (8, 5.0)])
    runs = example.main(["--steps", "240", "--draws", "16", "--tries", "2", "--folder", str(tmp_path)])
    large, small = runs  # with η = 5 all diverge
    assert "b = 8, η = 5: 2 of 2 seeds diverged" in capsys.readouterr().out
    for run in runs:
        late = {name: run.late(key) for name, key in example.COLUMNS.items()}
        assert late["λmax, all"][0] <= late["λmax, draws"][0] + 0.1 <= late["MiniBS"][0] + 0.1
        assert late["Batch Sharp."][0] < late["MiniBS"][0]
        assert 0 < late["Batch Sharp."][1] < 0.15
        assert 0.4 < late["Batch Sharp."][0] < 1.1
        version = tmp_path / "stochastic_sharpness" / f"b{run.batch_size}_lr{run.lr:g}_seed0" / "version_0"
        assert read_records(version)[-1].step == 240
    assert small.late("hessian/edge_ratio")[0] < large.late("hessian/edge_ratio")[0]
    assert small.late("noise/signal_to_noise")[0] < large.late("noise/signal_to_noise")[0]
    assert (tmp_path / "stochastic_sharpness" / "stochastic_sharpness.png").stat().st_size > 10_000


def test_sam_lowers_the_sharpness(tmp_path):
    sgd, sharp = load("sam").main(["--epochs", "5", "--rho", "0", "0.4", "--folder", str(tmp_path)])
    assert sharp.sharpness < 0.6 * sgd.sharpness
    assert sharp.gap > 0
    assert math.isnan(sgd.gap)
    for run in (sgd, sharp):
        assert run.hessian.record_path.exists()
        assert list((tmp_path / "sam").glob(f"rho{run.rho:g}_seed0/version_0/events.out.tfevents.*"))
    assert (tmp_path / "sam" / "sam.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_order_of_samples(tmp_path):
    found = load("sampling_order").main(["--seeds", "2", "--epochs", "1", "--folder", str(tmp_path)])
    assert set(found) == {"late_loss", "sharpness", "means after 1"}
    assert (tmp_path / "sampling_order.png").stat().st_size > 10_000
