"""Against an independent implementation: the Hessian of curvlinops-for-pytorch with SciPy's Lanczos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dynamics.linalg import eigenpairs
from lightning_dynamics.objective import Objective, hessian

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
curvlinops = pytest.importorskip("curvlinops")
sparse = pytest.importorskip("scipy.sparse.linalg")


@pytest.fixture
def problem():
    """A convolutional classifier in double precision, in batches of unequal size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).double()
    batches = [(torch.randn(n, 1, 8, 8).double(), torch.randint(0, 5, (n,))) for n in (16, 16, 7)]
    return net, batches


def test_products_and_eigenvalues(problem):
    net, batches = problem
    criterion = nn.CrossEntropyLoss()
    theirs = curvlinops.HessianLinearOperator(net, criterion, list(net.parameters()), batches)
    with hessian(Objective(net, lambda net, batch: criterion(net(batch[0]), batch[1]), batches)) as ours:
        vector = torch.randn(ours.size, dtype=torch.float64)
        product = ours(vector)
        assert torch.allclose(product, theirs @ vector, rtol=1e-9, atol=1e-12)
        pairs = eigenpairs(ours, 3, 2, tolerance=1e-6, bottom_tolerance=1e-6)
    matrix = sparse.LinearOperator(
        (ours.size, ours.size),
        matvec=lambda v: (theirs @ torch.from_numpy(v.reshape(-1).copy())).numpy(),
        dtype=np.float64,
    )
    top = np.sort(sparse.eigsh(matrix, 3, which="LA", return_eigenvectors=False))[::-1].copy()
    bottom = np.sort(sparse.eigsh(matrix, 2, which="SA", return_eigenvectors=False)).copy()
    assert (pairs.top.values.cpu() - torch.from_numpy(top)).abs().le(pairs.top.bounds + 1e-9).all()
    assert (pairs.bottom.values.cpu() - torch.from_numpy(bottom)).abs().le(pairs.bottom.bounds + 1e-9).all()
