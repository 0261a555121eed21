"""Against an independent implementation, hessian-eigenthings, where it is right, and where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dynamics.linalg import eigenpairs, spectral_density
from lightning_dynamics.objective import Objective, hessian

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
eigenthings = pytest.importorskip("hessian_eigenthings")
criterion = nn.CrossEntropyLoss()


def loss(net, batch):
    return criterion(net(batch[0]), batch[1])


def problem(*sizes):
    """A small classifier in double precision, in batches of these sizes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 4)).double()
    return net, [(torch.randn(n, 6).double(), torch.randint(0, 4, (n,))) for n in sizes]


def whole(batches):
    return [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]


def test_equal_batches_give_the_same_products_and_eigenvalues():
    net, batches = problem(12, 12, 12)
    theirs = eigenthings.HessianOperator(net, batches, loss)
    with hessian(Objective(net, loss, batches)) as ours:
        vector = torch.randn(ours.size, dtype=torch.float64)
        product = ours(vector)
        pairs = eigenpairs(ours, 4, tolerance=1e-6)
    assert torch.allclose(product, theirs.matvec(vector), rtol=1e-9, atol=1e-12)
    found = eigenthings.lanczos(theirs, k=4, which="LA", max_iter=80, reorthogonalize=True, seed=0)
    values = torch.as_tensor(found.eigenvalues).double().sort(descending=True).values
    assert (pairs.top.values - values).abs().le(pairs.top.bounds + 1e-8).all()


def test_by_default_there_is_one_eigenvalue_several_times_there_and_once_here():
    """Beyond 50 steps they do not orthogonalize fully, and ghosts of what has converged appear."""
    net, batches = problem(12, 12, 12)
    found = eigenthings.lanczos(eigenthings.HessianOperator(net, batches, loss), k=3, which="LA", max_iter=80, seed=0)
    theirs = torch.as_tensor(found.eigenvalues).double()
    assert float(theirs.max() - theirs.min()) < 1e-6
    with hessian(Objective(net, loss, batches)) as ours:
        values = eigenpairs(ours, 3, tolerance=1e-6).top.values
        dense = torch.stack([ours(row) for row in torch.eye(ours.size, dtype=torch.float64)])
    assert torch.allclose(values, torch.linalg.eigvalsh(dense).flip(0)[:3], atol=1e-6)
    assert float(values[0] - values[1]) > 0.1


def test_a_shorter_last_batch_weighs_by_its_samples_here_and_as_much_as_the_others_there():
    """The exact reference is one batch of all samples: their Hessian is that of another mean."""
    net, batches = problem(12, 12, 3)
    vector = torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    with hessian(Objective(net, loss, whole(batches))) as one:
        exact = one(vector)
    assert torch.allclose(eigenthings.HessianOperator(net, whole(batches), loss).matvec(vector), exact, atol=1e-12)
    with hessian(Objective(net, loss, batches)) as ours:
        assert torch.allclose(ours(vector), exact, rtol=1e-9, atol=1e-12)
        top = eigenpairs(ours, 1, tolerance=1e-6).top
    theirs = eigenthings.HessianOperator(net, batches, loss)
    assert (theirs.matvec(vector) - exact).norm() > 0.05 * exact.norm()
    # which is the mean over batches that weigh the same, and can be had here by saying so
    with hessian(Objective(net, loss, batches, weights=[1, 1, 1])) as equal:
        product = equal(vector)
    assert torch.allclose(product, theirs.matvec(vector), rtol=1e-9, atol=1e-12)
    with hessian(Objective(net, loss, whole(batches))) as one:
        assert abs(float(eigenpairs(one, 1, tolerance=1e-6).top.values[0] - top.values[0])) < 1e-6
    found = eigenthings.lanczos(theirs, k=1, which="LA", max_iter=80, reorthogonalize=True, seed=0)
    assert abs(float(found.eigenvalues[0]) - float(top.values[0])) > 10 * float(top.bounds[0])


def test_trace_and_density():
    net, batches = problem(12, 12, 12)
    theirs = eigenthings.HessianOperator(net, batches, loss)
    with hessian(Objective(net, loss, batches)) as ours:
        top = eigenpairs(ours, 4, tolerance=1e-8).top
        density = spectral_density(ours, known=top.values, vectors=top.vectors, num_vectors=16, num_steps=40)
    trace = eigenthings.trace(theirs, num_matvecs=60, method="hutchinson", seed=0)
    assert abs(density.trace.value - trace.estimate) < 3 * (density.trace.error**2 + trace.stderr**2) ** 0.5
    found = eigenthings.spectral_density(theirs, num_runs=16, lanczos_steps=40, seed=0)
    smoothed = density.smoothed(found.grid, found.sigma)
    assert float(torch.trapezoid((smoothed - found.density).abs(), found.grid)) < 0.1


def test_gauss_newton():
    net, batches = problem(12, 12, 12)

    def outputs(net, batch):
        return net(batch[0]), lambda f: criterion(f, batch[1])

    theirs = eigenthings.GGNOperator(
        net, batches, eigenthings.supervised_forward, eigenthings.supervised_loss_of_output(criterion)
    )
    with hessian(Objective(net, loss, batches, output_fn=outputs)) as ours:
        vector = torch.randn(ours.size, dtype=torch.float64)
        product = ours.operator("gauss_newton")(vector)
    assert torch.allclose(product, theirs.matvec(vector), rtol=1e-9, atol=1e-12)
