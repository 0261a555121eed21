"""Measures of neural collapse against closed forms, against their definitions, and where they are not defined."""

import copy
import doctest
import math
import pickle

import pytest
import torch
from helpers.operators import generator
from torch import nn
from torchmetrics import MetricCollection

from lightning_dynamics.metrics import (
    Classifier,
    ClassSums,
    NeuralCollapse,
    ScatterSums,
    class_sums,
    collapse,
    collapse_measures,
    neural_collapse,
    separation_law,
)
from lightning_dynamics.metrics.noise_floor import noise_floor

F64 = torch.float64
MEANS = ("nc2_equinorm", "nc2_equiangular", "nc2_cosine_std", "nc2_etf_distance")
WEIGHTS = ("nc2_equinorm_weights", "nc2_equiangular_weights", "nc2_etf_distance_weights")
DUAL = ("nc3", "nc3_distance", "nc3_product", "nc3_cosine", "nc3_uniformity")


def scatter_of(features, labels, num_classes=None, predictions=None, others=None):
    """Sums around the class means of these data, or of ``others``."""
    num_classes = num_classes or int(labels.max()) + 1
    sums = ClassSums(num_classes)
    sums.update(*(others or (features, labels)))
    scatter = ScatterSums(sums.centers())
    scatter.update(features, labels, predictions)
    return scatter


def measure(features, labels, classifier=None, num_classes=None, predictions=None):
    return collapse_measures(scatter_of(features, labels, num_classes, predictions), classifier)


def rotation(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=F64))[0]


def simplex(num_classes, num_features, norm=1.0):
    """Rows of a simplex ETF, in a random direction."""
    rows = (torch.eye(num_classes, dtype=F64) - 1 / num_classes) * norm * (num_classes / (num_classes - 1)) ** 0.5
    return rows @ rotation(max(num_classes, num_features))[:num_classes, :num_features]


def around(means, spread):
    """Samples whose covariance within each class is exactly spread² I: μ ± spread √d e_i."""
    d = means.shape[1]
    steps = spread * d**0.5 * torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)])
    return (means[:, None] + steps).flatten(0, 1), torch.arange(len(means)).repeat_interleave(2 * d)


def random_problem(seed=0, num_classes=5, num_features=12, num_samples=300):
    draw = generator(seed)
    labels = torch.randint(0, num_classes, (num_samples,), generator=draw)
    means = torch.randn(num_classes, num_features, generator=draw, dtype=F64)
    mix = torch.randn(num_features, num_features, generator=draw, dtype=F64) / 3
    features = means[labels] + torch.randn(num_samples, num_features, generator=draw, dtype=F64) @ mix + 2
    weight = torch.randn(num_classes, num_features, generator=draw, dtype=F64)
    bias = torch.randn(num_classes, generator=draw, dtype=F64)
    return features, labels, Classifier(weight, bias)


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_a_noisy_simplex_has_the_values_of_its_closed_forms():
    """K = 10, d = 64, norm 3, spread 1/2."""
    values = measure(*around(simplex(10, 64, 3.0), 0.5)).values
    assert values["nc1_raw"] == pytest.approx(2.25, rel=1e-10)  # s²(K-1)²/ρ²
    assert values["nc1"] == pytest.approx(0.225, rel=1e-10)  # with the factor 1/K
    assert values["nc1_trace_ratio"] == pytest.approx(0.25 * 64 / 9, rel=1e-10)
    assert values["cdnv"] == pytest.approx(0.8, rel=1e-10)  # s²d(K-1)/(2Kρ²)
    assert values["nc2_uniformity"] == pytest.approx(-math.log(20 / 9) / 2, rel=1e-10)
    assert values["nc2_orthogonal_frame"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt(0.9)), rel=1e-10)
    for name in (*MEANS, "nc2_uniformity_variance"):
        assert values[name] == pytest.approx(0, abs=1e-12), name


@pytest.mark.parametrize("num_classes", [3, 10, 40])
def test_an_exact_simplex_with_its_dual_classifier_has_collapsed(num_classes):
    means = simplex(num_classes, 64, 2.0)
    shift = torch.randn(64, generator=generator(4), dtype=F64)
    features = (means + shift).repeat(2, 1)
    # a row added to all of W, and the bias that brings the global mean to equal scores of zero, change nothing
    weight = 0.3 * means + torch.randn(64, generator=generator(5), dtype=F64)
    found = measure(
        features,
        torch.arange(num_classes).repeat(2),
        Classifier(weight, -weight @ shift),
        predictions=torch.arange(num_classes).repeat(2),
    )
    for name in (*MEANS, *WEIGHTS, *DUAL, "nc3_bias", "nc1", "nc1_raw", "nc1_trace_ratio", "cdnv", "nc4"):
        assert found.values[name] == pytest.approx(0, abs=1e-10), name
    assert found.values["ncc_accuracy"] == found.values["accuracy"] == 1
    assert found.values["effective_rank"] == num_classes - 1


def test_centring_hides_an_orthogonal_frame():
    """S6: the centred distance to a simplex is 0, only the uncentred measure can tell."""
    frame = rotation(16)[:10]
    values = measure(frame.repeat(2, 1), torch.arange(10).repeat(2)).values
    assert values["nc2_orthogonal_frame"] == pytest.approx(0, abs=1e-12)
    assert values["nc2_etf_distance"] == pytest.approx(0, abs=1e-12)
    gram = frame @ frame.mT
    target = (torch.eye(10, dtype=F64) - 0.1) / 3
    assert float((gram / gram.norm() - target).norm()) == pytest.approx(0.320364, abs=1e-6)
    simplex_values = measure(simplex(10, 16).repeat(2, 1), torch.arange(10).repeat(2)).values
    assert simplex_values["nc2_orthogonal_frame"] == pytest.approx(0.320364, abs=1e-6)


def test_two_antipodal_classes_among_five():
    """Means of rank one; √(2 - 2/√(K - 1)) = 1."""
    means = torch.zeros(5, 4, dtype=F64)
    means[0, 0], means[1, 0] = 1, -1
    found = measure(*around(means, 0.1))
    assert found.values["nc2_etf_distance"] == pytest.approx(1, rel=1e-10)
    assert found.values["effective_rank"] == 1
    assert any("span 1 of 4 directions" in note for note in found.notes)
    assert found.values["nc1"] == pytest.approx(0.01 / (2 / 5) / 5, rel=1e-10)  # s²/s₁²/K along the one direction
    assert found.undefined["cdnv"] == "two class means coincide"
    assert found.undefined["nc2_equiangular"] == "a class mean lies at the global mean"


def test_opposite_self_duality_is_four():
    means = simplex(4, 8)
    values = measure(means, torch.arange(4), Classifier(-means)).values
    assert values["nc3"] == pytest.approx(4)
    assert values["nc3_distance"] == pytest.approx(2)
    assert values["nc3_cosine"] == pytest.approx(2)
    assert values["nc3_product"] == pytest.approx(2)


def test_more_classes_than_dimensions_have_no_simplex_but_can_be_uniform():
    """Eight points spread over a circle, and the same pushed together."""
    angles = torch.arange(8, dtype=F64) * math.pi / 4
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    pushed = angles + 0.3 * angles.sin()
    uneven = torch.stack([pushed.cos(), pushed.sin()], 1)
    found = measure(circle.repeat(2, 1), torch.arange(8).repeat(2))
    assert any("no simplex ETF exists" in note for note in found.notes)
    assert found.values["nc2_etf_distance"] > 0.5
    # mean of -ln(2 sin(πj/8)) over j = 1..7, whose product is 8
    assert found.values["nc2_uniformity"] == pytest.approx(-math.log(8) / 7, rel=1e-10)
    assert measure(uneven.repeat(2, 1), torch.arange(8).repeat(2)).values["nc2_uniformity"] > -math.log(8) / 7


# --- definitions ------------------------------------------------------------------------------------------------------


def by_definition(features, labels, classifier):
    """Every measure from its definition, with d × d matrices and pseudoinverses."""
    h, K = features, int(labels.max()) + 1
    W, b = classifier.weight, classifier.bias
    means = torch.stack([h[labels == c].mean(0) for c in range(K)])
    centred = means - means.mean(0)
    residuals = h - means[labels]
    within = residuals.mT @ residuals / len(h)
    between = centred.mT @ centred / K
    raw = float(torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10)))
    variances = [float(residuals[labels == c].square().sum(1).mean()) for c in range(K)]
    pairs = [(i, j) for i in range(K) for j in range(K) if i != j]
    cdnv = [(variances[i] + variances[j]) / 2 / float((means[i] - means[j]).square().sum()) for i, j in pairs]
    target = (torch.eye(K, dtype=F64) - 1 / K) / math.sqrt(K - 1)
    expected = {
        "nc1": raw / K,
        "nc1_raw": raw,
        "nc1_trace_ratio": float(within.trace() / between.trace()),
        "cdnv": sum(cdnv) / len(cdnv),
    }
    rows = W - W.mean(0)
    for suffix, vectors in (("", centred), ("_weights", rows)):
        norms = vectors.norm(dim=1)
        cosines = torch.stack([unit(vectors)[i] @ unit(vectors)[j] for i, j in pairs])
        gram = vectors @ vectors.mT
        expected[f"nc2_equinorm{suffix}"] = float(((norms - norms.mean()) ** 2).mean().sqrt() / norms.mean())
        expected[f"nc2_equiangular{suffix}"] = float((cosines + 1 / (K - 1)).abs().mean())
        expected[f"nc2_etf_distance{suffix}"] = float((gram / gram.norm() - target).norm())
        if not suffix:
            expected["nc2_cosine_std"] = float(((cosines - cosines.mean()) ** 2).mean().sqrt())
    gram = means @ means.mT
    expected["nc2_orthogonal_frame"] = float((gram / gram.norm() - torch.eye(K, dtype=F64) / math.sqrt(K)).norm())
    energies = torch.stack([-(unit(centred)[i] - unit(centred)[j]).norm().log() for i, j in pairs])
    expected["nc2_uniformity"] = float(energies.mean())
    expected["nc2_uniformity_variance"] = float(((energies - energies.mean()) ** 2).mean())
    squared = float((rows / rows.norm() - centred / centred.norm()).square().sum())
    cosines = (unit(rows) * unit(centred)).sum(1)
    product = rows @ centred.mT
    chosen = (h @ W.mT + b).argmax(1)
    nearest = torch.cdist(h, means).argmin(1)
    counts = torch.bincount(labels).double()
    smaller = counts.argsort(stable=True)[: K // 2]
    inner = [float(unit(centred)[i] @ unit(centred)[j]) for i in smaller for j in smaller if i != j]
    return expected | {
        "nc3": squared,
        "nc3_distance": squared**0.5,
        "nc3_product": float((product / product.norm() - target).norm()),
        "nc3_cosine": float((1 - cosines).mean()),
        "nc3_uniformity": float(((cosines - cosines.mean()) ** 2).mean()),
        "nc3_bias": float((W @ means.mean(0) + b).norm()),
        "nc4": float((nearest != chosen).double().mean()),
        "ncc_accuracy": float((nearest == labels).double().mean()),
        "accuracy": float((chosen == labels).double().mean()),
        "effective_rank": min(K - 1, h.shape[1]),
        "class_imbalance": float(counts.max() / counts.min()),
        "minority_cosine": sum(inner) / len(inner),
    }


@pytest.mark.parametrize("shape", [(5, 12), (9, 4), (4, 60)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_measure_is_what_its_definition_says(shape, seed):
    features, labels, classifier = random_problem(seed, *shape)
    found = measure(features, labels, classifier, predictions=classifier.predict(features))
    expected = by_definition(features, labels, classifier)
    assert set(found.values) == {*expected, "nc1_floor"}
    for name, value in expected.items():
        assert found.values[name] == pytest.approx(value, rel=1e-9), name
    residuals = features - torch.stack([features[labels == c].mean(0) for c in range(shape[0])])[labels]
    variances = [float(residuals[labels == c].square().sum(1).mean()) for c in range(shape[0])]
    assert found.arrays["variances"] == pytest.approx(variances)
    assert found.arrays["counts"] == torch.bincount(labels).tolist()
    assert found.arrays["classes"] == list(range(shape[0]))


def test_large_classes_weigh_more_in_the_scatter_but_not_in_the_global_mean_nor_in_cdnv():
    means = simplex(3, 3, 2.0)
    counts = (60, 6, 6)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    spreads = torch.tensor([1.0, 0.1, 0.1], dtype=F64)
    steps = torch.cat([torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)])
    features = means[labels] + spreads[labels, None] * torch.cat([steps.repeat(n // 6, 1) for n in counts])
    values = measure(features, labels).values
    within = (60 * 1 + 12 * 0.01) / 72
    assert values["nc1_trace_ratio"] == pytest.approx(within / 4)  # norms stay 2: the global mean is unweighted
    distance = 4 * 2 * 3 / 2
    assert values["cdnv"] == pytest.approx((2 * (1 + 0.01) / 2 + 0.01) / 3 / distance)
    assert values["nc2_equinorm"] == pytest.approx(0, abs=1e-12)


def test_the_classifier_is_centred_in_all_but_its_bias():
    features, labels, classifier = random_problem()
    moved = Classifier(classifier.weight + 5 * torch.ones(12, dtype=F64), classifier.bias)
    first, second = (measure(features, labels, c).values for c in (classifier, moved))
    for name in (*WEIGHTS, *DUAL):
        assert first[name] == pytest.approx(second[name], rel=1e-9), name
    assert abs(first["nc3_bias"] - second["nc3_bias"]) > 1


def test_one_logit_stands_for_two_classes():
    draw = generator(2)
    layer = nn.Linear(6, 1)
    features = torch.randn(50, 6, generator=draw)
    labels = (features[:, 0] > 0).long()
    one = Classifier.of(layer)
    assert torch.equal(one.predict(features), (layer(features)[:, 0] > 0).long())
    assert one.weight.shape == (2, 6)
    found = measure(features, labels, one, predictions=one.predict(features))
    two = Classifier(torch.stack([torch.zeros(6), layer.weight[0]]), torch.stack([torch.zeros(()), layer.bias[0]]))
    other = measure(features, labels, two, predictions=two.predict(features))
    for name in ("nc3", "nc3_cosine", "nc3_product", "nc4"):
        assert found.values[name] == pytest.approx(other.values[name]), name


def test_nc4_counts_the_bias():
    features, labels, classifier = random_problem()
    biased = Classifier(classifier.weight, torch.tensor([1e6, 0, 0, 0, 0]))
    assert (biased.predict(features) == 0).all()
    values = measure(features, labels, biased, predictions=biased.predict(features)).values
    assert values["accuracy"] == pytest.approx(float((labels == 0).double().mean()))


# --- invariances ------------------------------------------------------------------------------------------------------

FREE = ("nc1_floor",)  # its sketch is of coordinates, so that a rotation draws another one


@pytest.mark.parametrize(
    "change",
    [
        lambda h, y, c: (h * 7, y, c),
        lambda h, y, c: (h @ rotation(12, 3), y, Classifier(c.weight @ rotation(12, 3), c.bias)),
        lambda h, y, c: (h.flip(0), y.flip(0), c),
        lambda h, y, c: (h, 4 - y, Classifier(c.weight.flip(0), c.bias.flip(0))),
        lambda h, y, c: (h, y, Classifier(3 * c.weight, 3 * c.bias)),
    ],
    ids=["scale", "rotation", "order of samples", "names of classes", "scale of the classifier"],
)
def test_what_must_not_matter(change):
    features, labels, classifier = random_problem()
    moved, relabelled, other = change(features, labels, classifier)
    predictions = classifier.predict(features)
    first = measure(features, labels, classifier, predictions=predictions).values
    if not torch.equal(relabelled, labels):
        predictions = predictions.flip(0) if torch.equal(relabelled, labels.flip(0)) else 4 - predictions
    second = measure(moved, relabelled, other, predictions=predictions).values
    assert first.keys() == second.keys()
    for name in first.keys() - {*FREE, "nc3_bias"}:
        assert first[name] == pytest.approx(second[name], rel=1e-8, abs=1e-10), name


def test_a_shift_changes_only_what_is_not_centred():
    features, labels, classifier = random_problem()
    first, second = (measure(features + s, labels, classifier).values for s in (0, 30))
    for name in first.keys() - {"nc2_orthogonal_frame", "nc3_bias"}:
        assert first[name] == pytest.approx(second[name], rel=1e-8, abs=1e-10), name
    assert first["nc2_orthogonal_frame"] != pytest.approx(second["nc2_orthogonal_frame"], rel=0.05)


# --- the noise floor --------------------------------------------------------------------------------------------------


def decaying(num_features, power):
    return torch.arange(1, num_features + 1, dtype=F64) ** -power


SPECTRA = {
    "isotropic": torch.ones(64, dtype=F64),
    "1/i": decaying(200, 1),
    "1/i²": decaying(200, 2),
    "one large": torch.cat([torch.tensor([100.0], dtype=F64), torch.ones(99, dtype=F64)]),
    "few features": torch.ones(13, dtype=F64),
    "fewer features than classes": torch.ones(3, dtype=F64),
}


@pytest.mark.parametrize("counts", [[30] * 8, [60, 40, 40, 30, 20, 20, 20, 10]], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_floor_is_what_noise_alone_shows(name, counts):
    """The mean nc1 of classes with equal means, over fresh data; for any spectrum, and with its error."""
    spectrum, labels = SPECTRA[name], torch.arange(8).repeat_interleave(torch.tensor(counts))
    draw = generator(5)
    shown, floors, errors = [], [], []
    for seed in range(160):  # what is shown varies more than its estimate
        features = torch.randn(len(labels), len(spectrum), generator=draw, dtype=F64) * spectrum.sqrt()
        sums = ClassSums(8)
        sums.update(features, labels)
        scatter = ScatterSums(sums.centers(), seed=seed)
        scatter.update(features, labels)
        total = float(scatter["counts"].sum())
        shown.append(float((scatter["energies"] / sums.centers().decomposition[1].square()).sum()) / total)
        if seed >= 40:
            continue
        floor, error = noise_floor(scatter)
        floors.append(floor)
        errors.append(error)
    shown, floors, errors = (torch.tensor(each, dtype=F64) for each in (shown, floors, errors))
    deviation = float((shown.var() / 160 + floors.var() / 40).sqrt())
    if name == "fewer features than classes":
        if counts[0] == counts[-1]:
            assert floors == pytest.approx(30 * 232 / 240 * 3 / (7 - 3 - 1))
        return
    assert abs(float(shown.mean() - floors.mean())) < 3.5 * deviation
    if name != "few features":  # there the error is that of the sketch alone, and the data vary more
        assert ((floors - shown.mean()).abs() <= 2 * errors).double().mean() >= 0.85
    # the two-moment formula is right for a flat spectrum far from K alone
    naive = sum(counts) * (1 - sum(n * n for n in counts) / sum(counts) ** 2)
    naive *= float(spectrum.square().sum() / spectrum.sum() ** 2)
    if name in ("1/i²", "one large"):
        assert naive > 2 * shown.mean()


def test_pure_noise_can_look_collapsed():
    """A13: 0.022 at d = 20,000 and fifty samples per class, where cdnv says 24."""
    draw = generator(0)
    features, labels = torch.randn(500, 20_000, generator=draw), torch.arange(10).repeat(50)
    found = measure(features, labels)
    assert found.values["nc1"] == pytest.approx(9 * 50 / 20_000, rel=0.1)
    assert found.values["cdnv"] == pytest.approx(25, rel=0.1)
    assert "too many directions for so few samples" in found.undefined["nc1_floor"]
    several = torch.randn(4000, 2_000, generator=draw), torch.arange(10).repeat(400)
    found = measure(*several)
    assert found.values["nc1"] == pytest.approx(9 * 400 / 2_000, rel=0.1)
    assert abs(found.values["nc1_floor"] - found.values["nc1"]) < 2 * found.errors["nc1_floor"] < found.values["nc1"]


def test_the_floor_does_not_know_of_the_class_means():
    """Noise of the same covariance around means far apart has the same floor."""
    draw = generator(1)
    noise, labels = torch.randn(400, 100, generator=draw, dtype=F64), torch.arange(4).repeat(100)
    means = 50 * torch.randn(4, 100, generator=draw, dtype=F64)
    first, second = measure(noise, labels), measure(noise + means[labels], labels)
    assert first.values["nc1_floor"] == pytest.approx(second.values["nc1_floor"], rel=1e-9)
    assert second.values["nc1"] < 0.01 * second.values["nc1_floor"]


def test_there_is_no_floor_around_the_means_of_other_data():
    features, labels, _ = random_problem()
    other = collapse_measures(scatter_of(features + 0.1, labels, others=(features, labels)))
    assert other.undefined["nc1_floor"] == "the centres are those of other data"


def test_as_many_classes_as_directions_have_no_floor():
    for d in (4, 5, 6):
        features = torch.randn(120, d, generator=generator(d), dtype=F64)
        assert "infinite" in measure(features, torch.arange(6).repeat(20)).undefined["nc1_floor"]
    features = torch.randn(8, 50, generator=generator(0), dtype=F64)
    assert measure(features, torch.arange(4).repeat(2)).undefined["nc1_floor"] == "too few samples"


# --- what is not defined ----------------------------------------------------------------------------------------------


def names_of(found):
    assert not set(found.values) & set(found.undefined)
    assert all(math.isfinite(value) for value in (*found.values.values(), *found.errors.values()))
    assert all(found.undefined.values())
    return set(found.values) | set(found.undefined)


ALL = {
    *MEANS, *WEIGHTS, *DUAL, "nc1", "nc1_raw", "nc1_trace_ratio", "nc1_floor", "cdnv", "nc2_orthogonal_frame",
    "nc2_uniformity", "nc2_uniformity_variance", "nc3_bias", "nc4", "ncc_accuracy", "accuracy", "effective_rank",
    "class_imbalance", "minority_cosine", "subclass_variance_ratio", "subclass_ncc_accuracy",
}  # fmt: skip


def cases():
    features, labels, classifier = random_problem()
    means = simplex(5, 12)
    yield "as usual", features, labels, classifier, {}
    yield (
        "one class",
        features,
        labels * 0,
        classifier,
        dict.fromkeys(("nc1", "cdnv", *MEANS, *WEIGHTS, *DUAL, "nc4"), "only one class has samples"),
    )
    yield "no samples", features[:0], labels[:0], classifier, {"nc1": "no class has samples", "nc3": "no class has"}
    yield (
        "two classes",
        features,
        labels % 2,
        classifier,
        dict.fromkeys((*MEANS, *WEIGHTS, "nc3_uniformity", "nc2_uniformity"), "two classes"),
    )
    yield (
        "equal means",
        around(means * 0 + 1, 0.5)[0],
        around(means, 0.5)[1],
        classifier,
        dict.fromkeys(("nc1", "nc1_raw", "nc1_trace_ratio", "cdnv", *MEANS, *DUAL), "all class means are equal"),
    )
    yield (
        "zero features",
        features * 0,
        labels,
        classifier,
        {
            "nc1": "all class means are equal",
            "nc2_orthogonal_frame": "all class means are zero",
            "nc1_floor": "the classes have no variance",
        },
    )
    yield (
        "one sample each",
        means,
        torch.arange(5),
        classifier,
        dict.fromkeys(("nc1", "nc1_raw", "nc1_trace_ratio", "nc1_floor", "cdnv"), "one sample per class"),
    )
    yield (
        "zero classifier",
        features,
        labels,
        Classifier(torch.zeros(5, 12), torch.ones(5)),
        dict.fromkeys((*DUAL, *WEIGHTS), "the centred classifier is zero"),
    )
    yield (
        "equal rows",
        features,
        labels,
        Classifier(torch.full((5, 12), 0.1)),
        dict.fromkeys((*DUAL, *WEIGHTS), "the centred classifier is zero"),
    )
    yield "no classifier", features, labels, None, dict.fromkeys((*DUAL, *WEIGHTS, "nc3_bias"), "no classifier")
    yield (
        "an infinite classifier",
        features,
        labels,
        Classifier(torch.full((5, 12), math.inf)),
        dict.fromkeys((*DUAL, *WEIGHTS), "not finite"),
    )


@pytest.mark.parametrize(("name", "case"), [(case[0], case[1:]) for case in cases()], ids=lambda x: str(x)[:22])
def test_what_is_not_defined_is_named(name, case):
    features, labels, classifier, expected = case
    found = measure(features, labels, classifier, num_classes=5)
    assert names_of(found) == ALL
    for key, reason in expected.items():
        assert reason in found.undefined[key], key


def test_a_class_without_samples_is_left_out_and_named():
    features, labels, classifier = random_problem()
    wider = torch.tensor([0, 2, 3, 5, 6])
    weight = torch.randn(7, 12, generator=generator(9), dtype=F64)
    weight[wider] = classifier.weight
    dense = measure(features, labels, Classifier(classifier.weight), predictions=labels).values
    found = measure(features, wider[labels], Classifier(weight), num_classes=7, predictions=wider[labels])
    assert "left out, no samples: classes 1, 4" in found.notes
    assert found.arrays["classes"] == wider.tolist()
    for name in dense.keys() - {"nc3_bias"}:
        assert found.values[name] == pytest.approx(dense[name], rel=1e-9), name


def test_coincident_means_are_measured_in_the_directions_that_there_are():
    features, labels, _ = random_problem(num_classes=4)
    mirrored = torch.cat([features, features[labels == 3]])
    found = measure(mirrored, torch.cat([labels, torch.full_like(labels[labels == 3], 4)]))
    assert found.values["effective_rank"] == 3
    assert any("span 3 of 4 directions" in note for note in found.notes)
    assert found.values["nc1"] > 0
    assert found.undefined["cdnv"] == "two class means coincide"
    assert found.undefined["nc2_uniformity"] == "two class means have the same direction"


def test_minorities_are_compared_only_where_there_are_some():
    features, labels = around(simplex(6, 8), 0.1)
    assert "same number" in measure(features, labels).undefined["minority_cosine"]
    more = measure(torch.cat([features, features[labels < 3]]), torch.cat([labels, labels[labels < 3]]))
    assert more.values["class_imbalance"] == 2
    assert more.values["minority_cosine"] == pytest.approx(-1 / 5)
    kept = labels < 3
    few = measure(torch.cat([features[kept], features[:5]]), torch.cat([labels[kept], labels[:5]]))
    assert "fewer than four" in few.undefined["minority_cosine"]


def test_a_classifier_of_another_layer_is_refused():
    features, labels, _ = random_problem()
    with pytest.raises(ValueError, match=r"shape \(5, 7\), class means have \(5, 12\)"):
        measure(features, labels, Classifier(torch.ones(5, 7)))
    with pytest.raises(ValueError, match=r"needs a weight of shape \(K, d\)"):
        Classifier(torch.ones(5))
    with pytest.raises(ValueError, match="a bias of shape"):
        Classifier(torch.ones(5, 2), torch.ones(4))


def test_validation_data_are_measured_around_the_training_means():
    train, labels, classifier = random_problem(0)
    other = train + 0.5
    found = collapse_measures(scatter_of(other, labels, others=(train, labels)), classifier)
    own = measure(train, labels, classifier)
    means = torch.stack([train[labels == c].mean(0) for c in range(5)])
    variances = [float((other - means[labels])[labels == c].square().sum(1).mean()) for c in range(5)]
    assert found.arrays["variances"] == pytest.approx(variances)
    for name in (*MEANS, *DUAL):  # the geometry is that of the training data
        assert found.values[name] == own.values[name]
    assert found.values["cdnv"] > own.values["cdnv"]


# --- subclasses -------------------------------------------------------------------------------------------------------


def with_subclasses(features, labels, subclasses):
    return collapse_measures(scatter_of(features, labels), None, scatter_of(features, subclasses)).values


def test_subclasses_that_are_points_explain_all_of_the_variance():
    points = torch.randn(8, 6, generator=generator(0), dtype=F64).repeat(5, 1)
    subclasses = torch.arange(8).repeat(5)
    values = with_subclasses(points, subclasses // 2, subclasses)
    assert values["subclass_variance_ratio"] == pytest.approx(1)
    assert values["subclass_ncc_accuracy"] == 1


def test_subclasses_without_difference_explain_nothing():
    """Few samples imitate (K_sub - 1)/(n_c - 1) = 3/19; that is taken off."""
    ratios, raw = [], []
    for seed in range(60):
        features = torch.randn(80, 30, generator=generator(seed), dtype=F64)
        subclasses = torch.arange(16).repeat(5)
        labels = subclasses // 4
        ratios.append(with_subclasses(features, labels, subclasses)["subclass_variance_ratio"])
        within, inside = (scatter_of(features, y)["squares"].sum() for y in (labels, subclasses))
        raw.append(float(1 - inside / within))
    ratios, raw = torch.tensor(ratios), torch.tensor(raw)
    assert raw.mean() == pytest.approx(3 / 19, rel=0.05)
    assert abs(ratios.mean()) < 3 * ratios.std() / 60**0.5


def test_subclasses_must_be_of_the_same_samples():
    features, labels, _ = random_problem()
    with pytest.raises(ValueError, match="the same samples"):
        collapse_measures(scatter_of(features, labels), None, scatter_of(features[1:], labels[1:]))


# --- the law of data separation ---------------------------------------------------------------------------------------


def test_the_separation_law_is_a_least_squares_line_through_natural_logarithms():
    law = separation_law([math.exp(2 - 0.7 * i) for i in range(6)])
    assert law.slope == pytest.approx(-0.7)
    assert law.r_squared == pytest.approx(1)
    assert law.error == pytest.approx(0, abs=1e-10)
    values = [3.0, 1.4, 0.9, 0.2, 0.15]
    x, y = torch.arange(5, dtype=F64), torch.tensor(values, dtype=F64).log()
    design = torch.stack([x, torch.ones(5, dtype=F64)], 1)
    beta = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    residual = float((y - design @ beta).square().sum())
    law = separation_law(values)
    assert law.slope == pytest.approx(float(beta[0]))
    assert law.r_squared == pytest.approx(1 - residual / float((y - y.mean()).square().sum()))
    assert law.error == pytest.approx(math.sqrt(residual / 3 / 10))


def test_a_law_needs_two_layers_and_positive_values():
    assert separation_law([2.0, 1.0]).error is None
    assert separation_law([2.0, 2.0, 2.0]).r_squared is None
    for values in ([1.0], [1.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match=r"at least two|positive and finite"):
            separation_law(values)


# --- the metric -------------------------------------------------------------------------------------------------------


def shown(metric, features, labels, size=64):
    for part in torch.arange(len(labels)).split(size):
        metric.update(features[part], labels[part])
    return metric.compute()


def same(first, second, rel=1e-9):
    assert first.keys() == second.keys()
    for name in first:
        assert float(first[name]) == pytest.approx(float(second[name]), rel=rel, abs=1e-12), name


def layer_of(classifier):
    layer = nn.Linear(*classifier.weight.shape[::-1], dtype=F64)
    layer.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    return layer


def test_the_metric_gives_the_measures_of_all_that_it_was_shown():
    features, labels, classifier = random_problem()
    expected = measure(features, labels, classifier, predictions=classifier.predict(features))
    metric = NeuralCollapse(5, layer_of(classifier))
    same(shown(metric, features, labels), expected.values)
    assert metric.undefined == expected.undefined
    assert all(value.dtype == F64 for value in metric.compute().values())
    metric.reset()
    assert metric.undefined == {}
    same(shown(metric, features, labels, 300), expected.values)


def test_with_centres_the_metric_streams():
    features, labels, classifier = random_problem()
    whole = NeuralCollapse(5, classifier)
    expected = shown(whole, features, labels)
    streaming = NeuralCollapse(5, classifier, centers=whole.centers)
    same(shown(streaming, features, labels), expected)
    held = sum(getattr(streaming, name).numel() for name in streaming._defaults)
    assert held < 500 < features.numel()
    streaming.reset()
    same(shown(streaming, features, labels, 31), expected)


def test_a_layer_is_read_anew_and_stays_outside_of_the_metric():
    features, labels, classifier = random_problem()
    layer = layer_of(classifier)
    metric = NeuralCollapse(5, layer)
    assert not list(metric.parameters())
    assert not metric.state_dict()
    first = shown(metric, features, labels)
    copied = copy.deepcopy(metric)
    with torch.no_grad():
        layer.weight.neg_()
    for each in (metric, copied):
        each.update(features[:0], labels[:0])  # compute caches until there is something new
        assert float(each.compute()["nc3"]) == pytest.approx(4 - float(first["nc3"]))
    assert layer.weight.grad is None


def test_given_predictions_go_before_those_of_the_layer():
    features, labels, classifier = random_problem()
    metric = NeuralCollapse(5, classifier)
    metric.update(features, labels, labels)
    assert float(metric.compute()["accuracy"]) == 1
    bare = NeuralCollapse(5)
    bare.update(features, labels)
    bare.compute()
    assert bare.undefined["nc4"] == "the network's predictions are not known"
    part = NeuralCollapse(5)
    part.update(features[:100], labels[:100], labels[:100])
    part.update(features[100:], labels[100:])
    assert float(part.compute()["accuracy"]) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_the_state_keeps_its_precision(streaming):
    features, labels, classifier = random_problem()
    whole = NeuralCollapse(5, classifier)
    expected = shown(whole, features, labels)
    metric = NeuralCollapse(5, classifier, centers=whole.centers if streaming else None)
    metric.update(features[:100], labels[:100])
    metric = pickle.loads(pickle.dumps(metric.half().float().to("cpu")))
    holder = nn.ModuleDict({"metric": metric}).half()
    holder["metric"].update(features[100:], labels[100:])
    same(holder["metric"].compute(), expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_forward_gives_the_batch_and_adds_it(streaming):
    features, labels, _ = random_problem()
    whole = NeuralCollapse(5)
    expected = shown(whole, features, labels)
    metric = NeuralCollapse(5, centers=whole.centers if streaming else None)
    batch = metric(features[:100], labels[:100])
    fresh = NeuralCollapse(5, centers=whole.centers if streaming else None)
    same(batch, shown(fresh, features[:100], labels[:100]))
    metric(features[100:], labels[100:])
    same(metric.compute(), expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_merging_states_is_measuring_all(streaming):
    features, labels, _ = random_problem()
    whole = NeuralCollapse(5)
    expected = shown(whole, features, labels)
    centers = whole.centers if streaming else None
    first, second = NeuralCollapse(5, centers=centers), NeuralCollapse(5, centers=centers)
    first.update(features[:90], labels[:90])
    second.update(features[90:], labels[90:])
    first.merge_state(second)
    same(first.compute(), expected)


def test_the_metric_works_in_a_collection():
    features, labels, classifier = random_problem()
    both = MetricCollection({"a": NeuralCollapse(5, classifier), "b": NeuralCollapse(5)}, prefix="val/")
    both.update(features, labels)
    values = both.compute()
    assert float(values["val/nc3" if "val/nc3" in values else "val/a_nc3"]) > 0
    assert sum(name.endswith("nc1") for name in values) >= 1


def test_the_metric_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least 1"):
        NeuralCollapse(0)
    features, labels, _ = random_problem()
    sums = ClassSums(5)
    sums.update(features, labels)
    with pytest.raises(ValueError, match="`centers` are of 5 classes, `num_classes` is 4"):
        NeuralCollapse(4, centers=sums.centers())
    metric = NeuralCollapse(4)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.3"):
        metric.update(features, labels)
    assert not metric.features


@pytest.mark.parametrize("module", [class_sums, collapse, neural_collapse])
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
