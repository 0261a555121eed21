"""Sums over classes: exact where features have collapsed, and the same however samples are split."""

import pickle

import pytest
import torch
from helpers.operators import generator

from lightning_dynamics.metrics import ClassSums, ScatterSums

F64 = torch.float64


def blobs(num_classes=4, num_features=30, num_samples=200, seed=0, dtype=torch.float32):
    """Classes of unequal size around random means."""
    draw = generator(seed)
    labels = torch.randint(0, num_classes, (num_samples,), generator=draw)
    means = torch.randn(num_classes, num_features, generator=draw, dtype=F64)
    noise = torch.randn(num_samples, num_features, generator=draw, dtype=F64)
    return (means[labels] + 0.7 * noise).to(dtype), labels


def centers_of(features, labels, num_classes):
    sums = ClassSums(num_classes)
    sums.update(features, labels)
    return sums.centers()


def scatter_of(features, labels, num_classes, predictions=None, centers=None):
    scatter = ScatterSums(centers_of(features, labels, num_classes) if centers is None else centers)
    scatter.update(features, labels, predictions)
    return scatter


def brute_force(features, labels, num_classes):
    """Every sum of the second pass in float64, from its definition."""
    h = features.double()
    means = torch.stack([h[labels == c].mean(0) for c in range(num_classes)])
    residuals = h - means[labels]
    squares = torch.stack([residuals[labels == c].square().sum() for c in range(num_classes)])
    nearest = torch.cdist(h, means).argmin(1)
    _, _, right = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    return squares, (residuals @ right[: num_classes - 1].mT).square().sum(0), nearest


def assert_same(first, second, rtol=1e-6):
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = float(second[name].abs().max()) if second[name].numel() else 0.0
        if name == "drift":  # sums of residuals: zero but for rounding
            scale = float(second["squares"].sum()) ** 0.5
        assert torch.allclose(value, second[name], rtol=rtol, atol=rtol * scale), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_features", [3, 30, 3000])
def test_every_sum_is_what_its_definition_says(dtype, num_features):
    features, labels = blobs(num_features=num_features, dtype=dtype)
    predictions = labels.roll(3)
    scatter = scatter_of(features, labels, 4, predictions)
    squares, energies, nearest = brute_force(features, labels, 4)
    rtol = 1e-11 if dtype == F64 else 1e-5
    assert torch.allclose(scatter["squares"], squares, rtol=rtol)
    assert torch.allclose(scatter["energies"], energies[: len(scatter["energies"])], rtol=rtol)
    assert torch.equal(scatter["counts"], torch.bincount(labels, minlength=4).double())
    assert scatter["nearest_is_label"].sum() == (nearest == labels).sum()
    assert scatter["nearest_is_predicted"].sum() == (nearest == predictions).sum()
    assert scatter["predicted_is_label"].sum() == (predictions == labels).sum()
    assert scatter["predicted"].sum() == 200


def test_the_means_are_exact():
    features, labels = blobs(dtype=torch.float32)
    centers = centers_of(features, labels, 4)
    expected = torch.stack([features[labels == c].double().mean(0) for c in range(4)])
    assert torch.allclose(centers.means, expected, rtol=1e-14, atol=0)
    assert torch.allclose(centers.global_mean, expected.mean(0), rtol=1e-13, atol=0)  # unweighted
    weighted = features.double().mean(0)
    assert not torch.allclose(centers.global_mean, weighted, rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_features", [5, 40, 3000])
def test_random_splits_equal_the_whole(num_features):
    features, labels = blobs(num_features=num_features)
    predictions = labels.roll(1)
    centers = centers_of(features, labels, 4)
    whole = scatter_of(features, labels, 4, predictions, centers).state()
    for seed in range(3):
        order = torch.randperm(len(labels), generator=generator(seed))
        cuts = torch.randint(0, 60, (20,), generator=generator(seed)).tolist()
        first, parts, at = ClassSums(4), [], 0
        for width in [*cuts, len(labels)]:
            parts.append(order[at : at + width])
            at = min(at + width, len(labels))
        for part in parts:
            first.update(features[part], labels[part])
        assert torch.allclose(first.centers().means, centers.means, rtol=1e-13, atol=1e-15)
        second = ScatterSums(first.centers())
        for part in parts:
            second.update(features[part], labels[part], predictions[part])
        assert_same(second.state(), whole)


def test_the_sums_of_two_processes_are_those_of_one():
    """One of them has no sample of class 3, a third process none at all."""
    features, labels = blobs()
    mine = (torch.arange(200) % 3 == 0) & (labels != 3)
    firsts = [ClassSums(4) for _ in range(2)] + [ClassSums(4, num_features=30)]
    for sums, part in zip(firsts, (mine, ~mine), strict=False):
        sums.update(features[part], labels[part])
    added = ClassSums(4)
    added.load({name: sum(sums.state()[name] for sums in firsts) for name in firsts[0].state()})
    centers = added.centers()
    assert torch.allclose(centers.means, centers_of(features, labels, 4).means, rtol=1e-13, atol=1e-15)
    seconds = [ScatterSums(pickle.loads(pickle.dumps(centers))) for _ in range(3)]
    for scatter, part in zip(seconds, (mine, ~mine), strict=False):
        scatter.update(features[part], labels[part], labels[part])
    whole = ScatterSums(centers)
    whole.load({name: sum(scatter.state()[name] for scatter in seconds) for name in whole.state()})
    assert_same(whole.state(), scatter_of(features, labels, 4, labels).state())


def collapsed(spread, shift=1.0, dtype=torch.float32):
    """Features whose residuals are ``spread`` of their means, as rounded to ``dtype``; and their exact variances."""
    draw = generator(1)
    labels = torch.arange(5).repeat(40)
    means = shift * (1 + torch.rand(5, 64, generator=draw, dtype=F64))
    noise = torch.randn(200, 64, generator=draw, dtype=F64)
    features = (means[labels] + spread * shift * noise).to(dtype)
    exact = torch.stack([features[labels == c].double().var(0, correction=0).sum() for c in range(5)])
    return features, labels, exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("shift", [1.0, 1e4, 1e-4])
def test_variances_are_right_when_collapse_is_complete_to_the_resolution_of_the_type(dtype, spread, shift):
    features, labels, exact = collapsed(spread, shift, dtype)
    found = scatter_of(features, labels, 5)["squares"] / 40
    assert torch.allclose(found, exact, rtol=1e-5, atol=0)


def test_a_one_pass_formula_in_float32_fails_exactly_then():
    features, labels, exact = collapsed(1e-5)
    one_pass = torch.stack(
        [features[labels == c].square().mean(0).sum() - features[labels == c].mean(0).square().sum() for c in range(5)]
    )
    assert ((one_pass - exact).abs() > 10 * exact).any()
    found = scatter_of(features, labels, 5)["squares"] / 40
    assert torch.allclose(found, exact, rtol=1e-5, atol=0)


def test_centres_rounded_to_float32_would_not_do():
    """Residuals of 1e-7 of the means: why centres are held as two numbers."""
    features, labels, exact = collapsed(1e-7)
    means = centers_of(features, labels, 5).means.float()
    rounded = torch.stack([(features - means[labels])[labels == c].square().sum(1).mean() for c in range(5)])
    assert not torch.allclose(rounded.double(), exact, rtol=1e-2, atol=0)


def test_residuals_around_the_centres_of_other_data_are_as_exact():
    features, labels, _ = collapsed(1e-6)
    others = (features.double() + 3e-6).float()
    centers = centers_of(features, labels, 5)
    exact = torch.stack([(others.double() - centers.means[labels])[labels == c].square().sum() for c in range(5)])
    assert torch.allclose(scatter_of(others, labels, 5, centers=centers)["squares"], exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25])
def test_squares_neither_vanish_nor_overflow(scale):
    features, labels = blobs()
    features = features.double()
    small = scatter_of((features * scale).float(), labels, 4)
    usual = scatter_of(features.float(), labels, 4)
    assert torch.allclose(small["squares"] / scale**2, usual["squares"], rtol=1e-5, atol=0)
    assert torch.allclose(small["energies"] / scale**2, usual["energies"], rtol=1e-5, atol=0)


def test_settings_of_the_program_change_nothing():
    features, labels = blobs(num_features=300)
    expected = scatter_of(features, labels, 4).state()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = scatter_of(features.requires_grad_(), labels, 4).state()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        assert not value.requires_grad


def test_many_classes_and_many_features_stay_within_memory_of_the_centres():
    """K = 1000 at d = 2048 would be 16 GB as pairs of means, d = 100,000 would be 80 GB as a covariance."""
    labels = torch.arange(1000).repeat(2)
    features = torch.randn(2000, 64, generator=generator(0)).repeat(1, 32)
    sums = ClassSums(1000)
    sums.update(features, labels)
    assert sums.state()["sums"].shape == (1000, 2048)
    scatter = scatter_of(torch.randn(30, 100_000, generator=generator(0)), torch.arange(10).repeat(3), 10)
    assert max(value.numel() for value in scatter.state().values()) <= 1000


def test_singular_values_that_are_rounding_are_left_out():
    draw = generator(3)
    basis = torch.randn(2, 50, generator=draw, dtype=F64)
    features = torch.randn(6, 2, generator=draw, dtype=F64) @ basis + 100
    centers = centers_of(features, torch.arange(6), 6)
    assert centers.effective_rank == 2
    left, values, right = centers.decomposition
    assert torch.allclose(left * values @ right, centers.centred, atol=1e-12)
    equal = centers_of(torch.full((6, 50), 0.1), torch.arange(6), 6)
    assert equal.effective_rank == 0


def test_between_equal_centres_the_first_class_is_the_nearest():
    features = torch.tensor([[0.0, 1.0], [5.0, 5.0], [5.0, 5.0]])
    scatter = scatter_of(features, torch.tensor([0, 1, 2]), 3)
    assert scatter["nearest_is_label"].tolist() == [1, 1, 0]


def test_centres_that_differ_by_rounding_are_equal():
    """The same samples, once and three times: their means differ in the last digit."""
    draw = generator(6)
    features = torch.randn(40, 33, generator=draw, dtype=F64)
    others = 10 * torch.randn(5, 33, generator=draw, dtype=F64)
    labels = torch.tensor([0, 1, *range(2, 7)]).repeat_interleave(torch.tensor([40, 120, 1, 1, 1, 1, 1]))
    scatter = scatter_of(torch.cat([features, features.flip(0).repeat(3, 1), others]), labels, 7)
    assert scatter.centers.means[0].ne(scatter.centers.means[1]).any()
    assert scatter["nearest_is_label"].tolist() == [40, 0, 1, 1, 1, 1, 1]


def test_classes_without_samples_are_nobodys_nearest():
    features, labels = blobs()
    labels = labels * 2 + 1  # of nine classes four have samples; zero would be near
    scatter = scatter_of(features, labels, 9)
    dense = scatter_of(features, labels // 2, 4)
    assert torch.equal(scatter["nearest_is_label"][1::2], dense["nearest_is_label"])
    assert scatter.centers.present.tolist() == [c % 2 == 1 for c in range(9)]


def test_samples_of_classes_without_a_centre_are_counted_and_left_out():
    features, labels = blobs()
    known = labels != 2
    centers = centers_of(features[known], labels[known], 4)
    scatter = scatter_of(features, labels, 4, labels, centers)
    assert scatter["left_out"] == (labels == 2).sum()
    assert_same(
        {**scatter.state(), "left_out": torch.zeros((), dtype=F64)},
        scatter_of(features[known], labels[known], 4, labels[known], centers).state(),
    )


def test_an_empty_batch_adds_nothing():
    features, labels = blobs()
    sums, scatter = ClassSums(4), ScatterSums(centers_of(features, labels, 4))
    sums.update(features[:0], labels[:0])
    assert sums.state()["sums"].shape == (4, 30)
    scatter.update(features[:0], labels[:0])
    assert all(not value.any() for value in scatter.state().values())


def test_sums_can_be_pickled_and_loaded():
    features, labels = blobs()
    scatter = scatter_of(features, labels, 4)
    again = pickle.loads(pickle.dumps(scatter))
    again.update(features, labels)
    scatter.update(features, labels)
    assert_same(again.state(), scatter.state(), rtol=1e-12)
    with pytest.raises(ValueError, match="belongs to other centres"):
        ScatterSums(centers_of(features, labels, 5)).load(scatter.state())
    with pytest.raises(ValueError, match="is not of 7 classes"):
        ClassSums(7).load(ClassSums(4).state())


def test_states_are_copies():
    features, labels = blobs()
    scatter = scatter_of(features, labels, 4)
    scatter.state()["squares"].zero_()
    assert scatter["squares"].all()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1, 4]), r"must lie in 0\.\.3, got 0\.\.4"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "Drop samples without a label"),
        (torch.zeros(3, 2), torch.zeros(3), "must be integers"),
        (torch.zeros(3, 2), torch.zeros(3, 4, dtype=torch.long), "one-hot"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), "3 samples came with 2 labels"),
        (torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long), r"flatten\(1\)"),
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long), "floating-point"),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), "5 dimensions, those before had 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(features, labels, message):
    sums = ClassSums(4)
    sums.update(torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        sums.update(features, labels)
    with pytest.raises(ValueError, match=message):
        ScatterSums(sums.centers()).update(features, labels)
    with pytest.raises(ValueError, match="at least 1"):
        ClassSums(0)


def test_predictions_must_fit_too():
    scatter = scatter_of(*blobs(), 4)
    with pytest.raises(ValueError, match="2 samples came with 1 predictions"):
        scatter.update(torch.zeros(2, 30), torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"`predictions` must lie in -1\.\., got -2\.\.0"):
        scatter.update(torch.zeros(2, 30), torch.tensor([0, 1]), torch.tensor([0, -2]))


def test_an_output_that_is_no_class_is_a_prediction_that_misses():
    (features, labels), scatter = blobs(), scatter_of(*blobs(), 4)
    before = float(scatter["predicted_is_label"].sum())
    scatter.update(features[:2], labels[:2], torch.tensor([4, 7]))
    assert float(scatter["predicted"].sum()) - float(scatter_of(features, labels, 4)["predicted"].sum()) == 2
    assert float(scatter["predicted_is_label"].sum()) == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_are_refused_and_nothing_is_added(bad):
    features, labels = blobs()
    sums, scatter = ClassSums(4), ScatterSums(centers_of(features, labels, 4))
    features[3, 4] = features[3, 5] = features[7, 0] = bad
    for accumulator in (sums, scatter):
        before = accumulator.state()
        with pytest.raises(FloatingPointError, match="3 of 6000 features are not finite, in 2 of 200 samples"):
            accumulator.update(features, labels)
        for name, value in before.items():
            assert not value.any(), name
            assert not accumulator.state()[name].any(), name
