"""Against an independent implementation: the matrices of curvlinops-for-pytorch, whole and as operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dynamics.linalg import eigenpairs, spectral_density
from lightning_dynamics.objective import Objective, hessian

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
curvlinops = pytest.importorskip("curvlinops")


class Problem:
    """A convolutional classifier in double precision, in batches of unequal size."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2),
            nn.Tanh(),
            nn.Conv2d(6, 8, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(8, 5),
        ).double()
        self.criterion = nn.CrossEntropyLoss()
        self.batches = [(torch.randn(n, 1, 8, 8).double(), torch.randint(0, 5, (n,))) for n in (16, 16, 7)]

    @property
    def whole(self):
        """All samples in one batch: what a mean over samples cannot depend on."""
        return [tuple(torch.cat(parts) for parts in zip(*self.batches, strict=True))]

    def ours(self, batches=None, **options):
        def loss(net, batch):
            return self.criterion(net(batch[0]), batch[1])

        return hessian(Objective(self.net, loss, self.batches if batches is None else batches, **options))

    def theirs(self, kind=curvlinops.HessianLinearOperator, batches=None):
        batches = self.batches if batches is None else batches
        return kind(self.net, self.criterion, list(self.net.parameters()), batches)

    def dense(self):
        """Their Hessian as a matrix."""
        operator = self.theirs()
        return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


@pytest.fixture
def problem():
    return Problem()


def test_products_and_eigenvalues(problem):
    theirs = problem.theirs()
    with problem.ours() as ours:
        vector = torch.randn(ours.size, dtype=torch.float64)
        assert torch.allclose(ours(vector), theirs @ vector, rtol=1e-9, atol=1e-12)
        pairs = eigenpairs(ours, 3, 2, tolerance=1e-6, bottom_tolerance=1e-6)
    values = torch.linalg.eigvalsh(problem.dense())
    assert (pairs.top.values - values.flip(0)[:3]).abs().le(pairs.top.bounds + 1e-9).all()
    assert (pairs.bottom.values - values[:2]).abs().le(pairs.bottom.bounds + 1e-9).all()


def test_unequal_batches_are_weighted_by_their_samples_in_both(problem):
    """The exact reference is one batch of all samples."""
    vector = torch.randn(sum(p.numel() for p in problem.net.parameters()), dtype=torch.float64)
    with problem.ours(problem.whole) as exact:
        product = exact(vector)
    with problem.ours() as ours:
        assert torch.allclose(ours(vector), product, rtol=1e-9, atol=1e-12)
    assert torch.allclose(problem.theirs() @ vector, product, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("known", [0, 4])
def test_the_trace(problem, known):
    matrix = problem.dense()
    exact = float(matrix.trace())
    with problem.ours() as ours:
        top = eigenpairs(ours, 4, tolerance=1e-8).top
        deflated = {"known": top.values, "vectors": top.vectors} if known else {}
        trace = spectral_density(ours, num_vectors=16, num_steps=20, **deflated).trace
    assert abs(trace.value - exact) < 3 * trace.error
    # the standard error of 16 vectors that are uniform on the sphere of the complement
    rest = torch.linalg.eigvalsh(matrix)[: ours.size - known]
    n = len(rest)
    variance = 2 * n / (n + 2) * float((rest**2).sum() - rest.sum() ** 2 / n)
    assert trace.error == pytest.approx((variance / 16) ** 0.5, rel=0.5)
    torch.manual_seed(1)
    theirs = [float(curvlinops.hutchinson_trace(problem.theirs(), 16)) for _ in range(8)]
    spread = float(np.std(theirs, ddof=1))
    assert abs(trace.value - np.mean(theirs)) < 3 * (trace.error**2 + spread**2 / len(theirs)) ** 0.5


@pytest.mark.parametrize("known", [0, 4])
def test_the_density(problem, known):
    """Smooth sums over the spectrum, and the density smoothed, against the eigenvalues of their matrix."""
    values = torch.linalg.eigvalsh(problem.dense())
    with problem.ours() as ours:
        top = eigenpairs(ours, 4, tolerance=1e-8).top
        deflated = {"known": top.values, "vectors": top.vectors} if known else {}
        density = spectral_density(ours, num_vectors=16, num_steps=40, **deflated)
    scale = float(values[-1])
    for alpha in (0.05 * scale, 0.5 * scale):
        counted = density.sum(lambda v, a=alpha: v**2 / (v**2 + a**2))
        assert abs(counted.value - float((values**2 / (values**2 + alpha**2)).sum())) < 3 * counted.error
    grid, width = torch.linspace(-0.5 * scale, 1.3 * scale, 400, dtype=torch.float64), 0.05 * scale
    kernel = torch.exp(-(((grid[:, None] - values) / width) ** 2) / 2) / (width * (2 * torch.pi) ** 0.5)
    distance = torch.trapezoid((density.smoothed(grid, width) - kernel.mean(1)).abs(), grid)
    assert distance < 0.1
    # the same from their own estimator, which smooths with a kernel of its own
    torch.manual_seed(0)
    points, theirs = curvlinops.lanczos_approximate_spectrum(
        problem.theirs(), 20, num_repeats=2, kappa=3, boundaries=(float(values[0]), scale)
    )
    mean = float((points * theirs).sum() / theirs.sum())
    assert mean == pytest.approx(density.trace.value / len(values), abs=0.02 * scale)


def test_gauss_newton_and_the_empirical_fisher(problem):
    """For a cross-entropy the Gauss-Newton matrix is the Fisher as well."""

    def outputs(net, batch):
        return net(batch[0]), lambda f: nn.functional.cross_entropy(f, batch[1], reduction="none")

    def model(net, batch):
        return net(batch[0]), lambda f: torch.distributions.Categorical(logits=f)

    vector = torch.randn(sum(p.numel() for p in problem.net.parameters()), dtype=torch.float64)
    gauss_newton = problem.theirs(curvlinops.GGNLinearOperator) @ vector
    empirical = problem.theirs(curvlinops.EFLinearOperator) @ vector
    with problem.ours(output_fn=outputs) as ours:
        assert torch.allclose(ours.operator("gauss_newton")(vector), gauss_newton, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ours.operator("empirical_fisher")(vector), empirical, rtol=1e-9, atol=1e-12)
        residual = problem.theirs() @ vector - gauss_newton
        assert torch.allclose(ours.operator("residual")(vector), residual, rtol=1e-9, atol=1e-12)
    with problem.ours(output_fn=model) as ours:
        assert torch.allclose(ours.operator("fisher")(vector), gauss_newton, rtol=1e-9, atol=1e-12)
