import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules import _functions
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_dynamics.objective.double_backward import refuse_hidden_derivatives, twice_differentiable

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


def segment(x):
    return (x * x.tanh()).sin()


def test_reentrant_checkpointing_is_exact_inside_and_as_before_outside():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)

    def loss(checkpointed):
        y = 2 * x
        return (checkpoint(segment, y, use_reentrant=True) if checkpointed else segment(y)).square().sum()

    def second(loss):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), x)[0]

    with twice_differentiable(MODULE):
        value = loss(True)
        refuse_hidden_derivatives(value)
        assert torch.equal(second(value), second(loss(False)))
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        second(loss(True))
    assert "apply" not in vars(CheckpointFunction)


def test_reentrant_checkpointing_repeats_its_noise_and_its_mistakes():
    module = nn.Linear(3, 3)
    x = torch.ones(2, 3)
    with twice_differentiable(MODULE):
        # trained this way the parameters in the segment have no gradient
        assert not checkpoint(module, x, use_reentrant=True).requires_grad
        noisy = checkpoint(F.dropout, x.requires_grad_(), use_reentrant=True)
        (gradient,) = torch.autograd.grad(noisy.sum(), x)
        assert torch.equal(gradient, noisy)


def test_what_is_replaced_comes_back_after_an_error():
    with pytest.raises(ValueError, match="mine"), twice_differentiable(MODULE):
        raise ValueError("mine")
    assert "apply" not in vars(CheckpointFunction)
    assert "apply" not in vars(_functions.SyncBatchNorm)


def test_batch_norm_that_synchronizes_is_refused():
    with twice_differentiable(MODULE), pytest.raises(ValueError, match=r"SyncBatchNorm.*mode=\"eval\""):
        nn.modules.batchnorm.sync_batch_norm.apply(torch.ones(2, 3))


def test_batch_norm_that_could_synchronize_but_need_not_is_measured():
    module = nn.SyncBatchNorm(3)
    with twice_differentiable(module):
        assert torch.equal(module(torch.eye(3)), nn.BatchNorm1d(3)(torch.eye(3)))


def custom(name, backward):
    return type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda ctx, x: (ctx.save_for_backward(x), x.square())[1]),
            "backward": staticmethod(backward),
        },
    )


def derivative(ctx, gradient):
    return 2 * ctx.saved_tensors[0] * gradient


def test_custom_functions_that_can_be_differentiated_only_once_are_refused_by_name():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"`Squares`.*@once_differentiable.*loss_fn"):
        refuse_hidden_derivatives(custom("Squares", once_differentiable(derivative)).apply(2 * x).sum())
    refuse_hidden_derivatives(custom("Squares", derivative).apply(2 * x).sum())


def test_reentrant_checkpointing_that_is_not_pytorchs_is_refused():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"reentrant.*torch\.utils\.checkpoint"):
        refuse_hidden_derivatives(custom("CheckpointFunction", derivative).apply(2 * x).sum())
