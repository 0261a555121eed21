import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dynamics.objective.double_backward import twice_differentiable

MODULE = nn.Linear(2, 2)


def test_gradients_are_on_whatever_surrounds_it():
    with torch.inference_mode(), twice_differentiable(MODULE):
        x = torch.ones(2, requires_grad=True)
        (gradient,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
        assert gradient.requires_grad
    with torch.no_grad(), twice_differentiable(MODULE):
        assert torch.is_grad_enabled()


def test_attention_has_a_second_derivative_only_inside():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
        return torch.autograd.grad(gradient.sum(), q)[0]

    with pytest.raises(RuntimeError, match="not implemented"):
        second()
    with twice_differentiable(MODULE):
        assert second().isfinite().all()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_products_are_exact_inside_and_as_before_outside(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        with twice_differentiable(MODULE):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_backend_flags_come_back():
    before = (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    with twice_differentiable(nn.LSTM(2, 2)):
        assert not torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.benchmark
    assert (
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    ) == before


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
def test_compiled_functions_run_eagerly_inside():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with twice_differentiable(MODULE):
        double(torch.ones(2))
    assert graphs == []
    double(torch.ones(2))
    assert len(graphs) == 1
