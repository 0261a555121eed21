"""Against an independent implementation, neural-collapse of rhubarbwu, on features of a trained network.

Written against its commit c05a0b8 of February 2025, whose setup.py says version 0.1, with scikit-learn 1.9 and SciPy
1.17.
"""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_dynamics.metrics import Classifier, ClassSums, ScatterSums, collapse_measures

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("neural_collapse")

from neural_collapse.accumulate import (  # noqa: E402
    CovarAccumulator,
    DecAccumulator,
    MeanAccumulator,
    VarNormAccumulator,
)
from neural_collapse.kernels import kernel_stats, log_kernel  # noqa: E402
from neural_collapse.measure import (  # noqa: E402
    clf_ncc_agreement,
    covariance_ratio,
    mean_norms,
    self_duality_error,
    similarities,
    simplex_etf_error,
    variability_cdnv,
)

K, D = 10, 48
F64 = torch.float64


class Problem:
    """Features of digits in a network trained well past its first errors, with both implementations' sums."""

    def __init__(self):
        torch.manual_seed(0)
        pixels, labels = load_digits(return_X_y=True)
        x, self.labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        body, head = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, D), nn.ReLU()), nn.Linear(D, K)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(body(x)), self.labels).backward()
            optimizer.step()
        # they sum in the type that they are told, their grids of pairs in the default type
        self.features, self.classifier = body(x).detach(), Classifier.of(head)
        self.batches = [(h.double(), y) for h, y in zip(self.features.split(128), self.labels.split(128), strict=True)]
        means = MeanAccumulator(K, D, dtype=F64)
        for h, y in self.batches:
            means.accumulate(h, y)
        self.means, self.global_mean = means.compute()
        self.ours = self.measure(self.classifier)

    def measure(self, classifier):
        sums = ClassSums(K)
        for h, y in zip(self.features.split(100), self.labels.split(100), strict=True):
            sums.update(h, y)
        scatter = ScatterSums(sums.centers())
        for h, y in zip(self.features.split(100), self.labels.split(100), strict=True):
            scatter.update(h, y, classifier.predict(h))
        return collapse_measures(scatter, classifier).values


@pytest.fixture(scope="module")
def problem():
    before = torch.get_default_dtype()
    found = Problem()
    torch.set_default_dtype(F64)
    yield found
    torch.set_default_dtype(before)


def test_the_network_separates_its_classes(problem):
    assert problem.ours["accuracy"] > 0.98
    assert problem.ours["effective_rank"] == K - 1


def test_variability(problem):
    """They divide by K and average scatter over samples, as we do; their pseudoinverse squares the condition number."""
    covariance = CovarAccumulator(K, D, dtype=F64)
    variances = VarNormAccumulator(K, D, dtype=F64)
    for h, y in problem.batches:
        covariance.accumulate(h, y, problem.means)
        variances.accumulate(h, y, problem.means)
    within, ours = covariance.compute(), problem.ours
    pinv = covariance_ratio(within, problem.means, problem.global_mean, "pinv")
    assert ours["nc1"] == pytest.approx(pinv, rel=1e-6)
    assert ours["nc1_raw"] == pytest.approx(pinv * K, rel=1e-6)
    assert ours["nc1"] == pytest.approx(covariance_ratio(within, problem.means, problem.global_mean, "svd"), rel=1e-6)
    quotient = covariance_ratio(within, problem.means, problem.global_mean, "quotient")
    assert ours["nc1_trace_ratio"] == pytest.approx(quotient, rel=1e-6)
    norms, _ = variances.compute()
    assert ours["cdnv"] == pytest.approx(variability_cdnv(norms, problem.means), rel=1e-6)


def test_geometry(problem):
    ours, means, middle = problem.ours, problem.means, problem.global_mean
    norms = mean_norms(means, middle)
    assert ours["nc2_equinorm"] == pytest.approx(float(norms.std(correction=0) / norms.mean()), rel=1e-6)
    # their documentation takes torch's standard deviation, which divides by K - 1
    assert ours["nc2_equinorm"] == pytest.approx(float(norms.std() / norms.mean()) * ((K - 1) / K) ** 0.5, rel=1e-6)
    assert ours["nc2_etf_distance"] == pytest.approx(simplex_etf_error(means, middle), rel=1e-6)
    average, variance = kernel_stats(means, middle, log_kernel)
    assert ours["nc2_uniformity"] == pytest.approx(average, rel=1e-6)
    assert ours["nc2_uniformity_variance"] == pytest.approx(variance, rel=1e-6)


def test_self_duality(problem):
    """They leave the classifier as it is; ours is centred, so theirs is given the centred one."""
    ours, means, middle = problem.ours, problem.means, problem.global_mean
    weight = problem.classifier.weight
    centred = weight - weight.mean(0)
    assert ours["nc2_etf_distance_weights"] == pytest.approx(simplex_etf_error(centred), rel=1e-6)
    assert ours["nc3_product"] == pytest.approx(self_duality_error(centred, means, middle), rel=1e-6)
    assert ours["nc3_product"] != pytest.approx(self_duality_error(weight, means, middle), rel=1e-6)
    cosines = similarities(centred, means, middle, cos=True)
    assert ours["nc3_cosine"] == pytest.approx(float((1 - cosines).mean()), rel=1e-6)
    assert ours["nc3_uniformity"] == pytest.approx(float(cosines.var(correction=0)), rel=1e-6)


def test_nearest_centres(problem):
    """They leave out the bias, and give the rate of agreement in the place of the mismatch."""

    def theirs(weight):
        agreement = DecAccumulator(K, D, dtype=F64)
        for h, y in problem.batches:
            agreement.accumulate(h, y, weight, problem.means)
        return clf_ncc_agreement(agreement)

    weight, bias = problem.classifier.weight, problem.classifier.bias
    unbiased = problem.measure(Classifier(weight))
    assert unbiased["nc4"] == pytest.approx(1 - theirs(weight), abs=1e-9)
    # with a strong bias the difference shows
    strong = problem.measure(Classifier(weight, bias + 3 * torch.arange(K)))
    assert strong["nc4"] > 2 * unbiased["nc4"] + 0.01
