"""Value, gradient and Hessian of an objective against closed forms and against the dense Hessian."""

import itertools

import pytest
import torch
from helpers.operators import generator
from torch import nn
from torch.nn import functional as F

from lightning_dynamics.linalg import eigenpairs
from lightning_dynamics.objective import Objective, hessian, symmetry_defect

MEMORY = "lightning_dynamics.objective.linearization"


def data(n=24, d=5, classes=3, seed=0, dtype=torch.float64):
    draw = generator(seed)
    x = torch.randn(n, d, generator=draw, dtype=dtype) * torch.arange(1, d + 1, dtype=dtype)
    return x, torch.randint(0, classes, (n,), generator=draw)


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def dense(operator):
    identity = torch.eye(operator.size, dtype=operator.dtype)
    return torch.stack([operator(row) for row in identity])


def reference(module, loss, batch):
    """Dense Hessian by torch.autograd.functional, through functional_call: an independent route."""
    names, values = zip(*[(n, p.detach()) for n, p in module.named_parameters() if p.requires_grad], strict=True)

    def flat(vector):
        parts = [part.view(v.shape) for part, v in zip(vector.split([v.numel() for v in values]), values, strict=True)]
        return loss(lambda x: torch.func.functional_call(module, dict(zip(names, parts, strict=True)), x), batch)

    return torch.autograd.functional.hessian(flat, torch.cat([v.flatten() for v in values]))


def split(batch, sizes):
    return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))


def test_linear_regression():
    x, _ = data()
    y = torch.randn(24, 1, generator=generator(1), dtype=torch.float64)
    module = nn.Linear(5, 1, bias=False).double()
    objective = Objective(module, lambda m, b: (m(b[0]) - b[1]).square().mean() / 2, [(x, y)])
    with hessian(objective) as H:
        torch.testing.assert_close(dense(H), x.mT @ x / 24)
        residual = module(x).detach() - y
        torch.testing.assert_close(H.gradient, (x.mT @ residual / 24).flatten())
        assert H.loss == pytest.approx(float(residual.square().mean() / 2))


def test_logistic_regression():
    x, _ = data()
    y = (torch.arange(24) % 2).double()[:, None]
    module = nn.Linear(5, 1, bias=False).double()
    objective = Objective(module, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), [(x, y)])
    p = torch.sigmoid(module(x).detach())
    with hessian(objective) as H:
        torch.testing.assert_close(dense(H), x.mT @ (p * (1 - p) * x) / 24)


def test_softmax_regression_at_zero_has_multiple_eigenvalues():
    """H = (I - 11ᵀ/K)/K ⊗ XᵀX/n: each eigenvalue of XᵀX/n, divided by K, K - 1 times, and d zeros."""
    x, y = data(classes=4)
    module = nn.Linear(5, 4, bias=False).double()
    nn.init.zeros_(module.weight)
    with hessian(Objective(module, cross_entropy, [(x, y)])) as H:
        centre = (torch.eye(4) - torch.full((4, 4), 0.25)).double() / 4
        torch.testing.assert_close(dense(H), torch.kron(centre, x.mT @ x / 24))
        covariance = torch.linalg.eigvalsh(x.mT @ x / 24).flip(0)
        found = eigenpairs(H, top=7, tolerance=1e-6)
        expected = torch.cat([covariance[:2].repeat_interleave(3), covariance[2:3]]) / 4
        torch.testing.assert_close(found.top.values, expected, rtol=1e-5, atol=0)


def test_deep_linear_network():
    """L = (aᵀb - Φ)²/2: eigenvalues ±ε, d - 1 times each, and λ/2 ± √(λ²/4 + ε² + 2ε(ε + Φ))."""
    d, phi = 4, 1.5

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.9, -0.3, 0.5, 0.2], dtype=torch.float64))
            self.b = nn.Parameter(torch.tensor([0.4, 0.8, -0.1, 0.7], dtype=torch.float64))

    module = Product()
    objective = Objective(module, lambda m, _: (m.a.dot(m.b) - phi).square() / 2, [None])
    eps = float(module.a.detach().dot(module.b.detach())) - phi
    lam = float(module.a.detach().square().sum() + module.b.detach().square().sum())
    root = (lam**2 / 4 + eps**2 + 2 * eps * (eps + phi)) ** 0.5
    expected = (
        torch.tensor([lam / 2 + root, lam / 2 - root, *[eps] * (d - 1), *[-eps] * (d - 1)]).double().sort().values
    )
    with hessian(objective) as H:
        torch.testing.assert_close(torch.linalg.eigvalsh(dense(H)), expected)
        found = eigenpairs(H, top=4, bottom=4, tolerance=1e-8, bottom_tolerance=1e-8)
        torch.testing.assert_close(found.top.values, expected.flip(0)[:4])
        torch.testing.assert_close(found.bottom.values, expected[:4])


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
def test_a_small_network_against_its_dense_hessian(engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = data()
    expected = reference(module, cross_entropy, batch)
    with hessian(Objective(module, cross_entropy, [batch], engine=engine)) as H:
        torch.testing.assert_close(dense(H), expected)
        found = eigenpairs(H, top=3, bottom=2, tolerance=1e-7, bottom_tolerance=1e-7)
    ascending = torch.linalg.eigvalsh(expected)
    torch.testing.assert_close(found.top.values, ascending.flip(0)[:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.bottom.values, ascending[:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
@pytest.mark.parametrize("sizes", [[24], [10, 10, 4], [23, 1], [1] * 24])
def test_unequal_batches_are_weighted_by_their_samples(sizes, engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()
    batch = data()
    vector = torch.randn(39, generator=generator(2), dtype=torch.float64)
    with hessian(Objective(module, cross_entropy, [batch])) as H:
        whole = (H.loss, H.gradient, H(vector))
    with hessian(Objective(module, cross_entropy, split(batch, sizes), engine=engine)) as H:
        assert H.loss == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(H.gradient, whole[1])
        torch.testing.assert_close(H(vector), whole[2])


def test_batches_weighted_equally_would_be_another_hessian():
    """The control of the test above."""
    module = nn.Linear(5, 3).double()
    vector = torch.ones(18, dtype=torch.float64)
    batches = split(data(), [20, 4])
    with hessian(Objective(module, cross_entropy, batches)) as H:
        right = H(vector)
    with hessian(Objective(module, cross_entropy, batches, weights=[1.0, 1.0])) as H:
        assert (H(vector) - right).norm() > 0.05 * right.norm()


def test_the_halves_of_the_batches_average_to_the_whole():
    module = nn.Linear(5, 3).double()
    vector = torch.randn(18, generator=generator(3), dtype=torch.float64)
    batches = split(data(), [10, 6, 4, 4])
    with hessian(Objective(module, cross_entropy, batches)) as H:
        even, odd = H.product(vector, "even"), H.product(vector, "odd")
        torch.testing.assert_close((14 * even + 10 * odd) / 24, H(vector))
    with hessian(Objective(module, cross_entropy, [batches[0], batches[2]])) as H:
        torch.testing.assert_close(H(vector), even)


def test_rescaling_the_loss_rescales_curvature_and_gradient():
    module = nn.Linear(5, 3).double()
    with hessian(Objective(module, cross_entropy, [data()])) as H:
        once = (H.loss, H.gradient, eigenpairs(H, top=2).top.values)
    with hessian(Objective(module, lambda m, b: 3.5 * cross_entropy(m, b), [data()])) as H:
        assert H.loss == pytest.approx(3.5 * once[0])
        torch.testing.assert_close(H.gradient, 3.5 * once[1])
        torch.testing.assert_close(eigenpairs(H, top=2).top.values, 3.5 * once[2], rtol=1e-6, atol=0)


def test_skipped_batches_count_for_nothing():
    module = nn.Linear(5, 3).double()
    batches = split(data(), [10, 10, 4])
    calls = itertools.count()

    def skipping(m, batch):
        next(calls)
        return None if len(batch[0]) == 4 else cross_entropy(m, batch)

    with hessian(Objective(module, skipping, batches)) as H:
        loss, gradient = H.loss, H.gradient
    with hessian(Objective(module, cross_entropy, batches[:2])) as H:
        assert H.loss == pytest.approx(loss)
        torch.testing.assert_close(H.gradient, gradient)


def test_noise_is_fixed_and_differs_between_batches():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    batch = data(n=8)
    masks = []
    module[1].register_forward_hook(lambda m, args, out: masks.append(out.detach() == 0))
    objective = Objective(module, cross_entropy, [batch, batch])
    vector = torch.randn(64 * 5 + 64 + 64 * 3 + 3, generator=generator(2), dtype=torch.float64)
    results = []
    for _ in range(2):
        torch.rand(7)  # the global stream moves between measurements
        with hessian(objective) as H:
            results.append((H.loss, H(vector)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(masks[-1], masks[-3])
    assert not torch.equal(masks[-1], masks[-2])


def test_noise_draws_average_the_loss():
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def loss_of(draws, seed=0):
        with hessian(Objective(module, cross_entropy, [data()], noise_draws=draws, seed=seed)) as H:
            return H.loss

    many = loss_of(64)
    single = [loss_of(1, seed) for seed in range(20)]
    assert min(single) < many < max(single)
    assert abs(loss_of(64, 1) - many) < max(single) - min(single)


def test_noise_does_not_depend_on_who_holds_which_batch():
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    batches = split(data(), [8, 8, 8])

    def gradient(chosen):
        objective = Objective(module, cross_entropy, [batches[i] for i in chosen], indices=chosen)
        with hessian(objective) as H:
            return H.gradient

    torch.testing.assert_close((gradient([0]) + gradient([1]) + gradient([2])) / 3, gradient([0, 1, 2]))


def test_only_the_chosen_parameters_move():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    expected = reference(module, cross_entropy, data())
    with hessian(Objective(module, cross_entropy, [data()], parameters=r"2\..*")) as H:
        torch.testing.assert_close(dense(H), expected[24:, 24:])


def test_unused_and_frozen_parameters_and_linear_losses():
    module = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(2, 2), "linear": nn.Linear(1, 1)}).double()
    module["used"].bias.requires_grad_(False)

    def loss(m, batch):
        return cross_entropy(m["used"], batch) + m["linear"].weight.sum()

    with hessian(Objective(module, loss, [data()])) as H:
        assert H.size == 15 + 6 + 2
        matrix = dense(H)
        assert matrix[:15, :15].norm() > 0
        assert matrix[15:].norm() == 0
        assert H.gradient[21] == 1.0  # the linear term
    with hessian(Objective(module, lambda m, b: m["linear"].weight.sum(), [None])) as H:
        assert dense(H).norm() == 0


def test_tied_parameters_are_one_variable():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False)).double()
    module[2].weight = module[0].weight
    with hessian(Objective(module, lambda m, b: m(b).square().mean(), [data()[0]])) as H:
        matrix = dense(H)

    def flat(vector):
        weight = vector.view(5, 5)
        return (torch.tanh(data()[0] @ weight.mT) @ weight.mT).square().mean()

    torch.testing.assert_close(matrix, torch.autograd.functional.hessian(flat, module[0].weight.detach().flatten()))


def test_attention_has_a_second_derivative_here():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 4, 8)
    objective = Objective(layer, lambda m, b: m(b).square().mean(), [x])
    with hessian(objective) as H:
        assert symmetry_defect(H, generator()) < 1e-5


def test_a_wrong_second_derivative_is_not_symmetric():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient * 3 * x**2 + 1e3 * x.roll(1)  # a gradient field that is no gradient

    module = nn.Linear(6, 1, bias=False)
    module.weight.data.copy_(torch.arange(1.0, 7.0))
    with hessian(Objective(module, lambda m, _: Wrong.apply(m.weight.flatten()).square().sum(), [None])) as H:
        assert symmetry_defect(H, generator()) > 1e-2
    with hessian(Objective(module, lambda m, _: (m.weight**3).square().sum(), [None])) as H:
        assert symmetry_defect(H, generator()) < 1e-5


def test_rebuilding_gives_the_same_bits_as_keeping():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    batches = split(data(dtype=torch.float32), [10, 10, 4])
    vector = torch.randn(75, generator=generator(1))
    products = []
    for engine in ("kept", "rebuilt"):
        with hessian(Objective(module, cross_entropy, batches, engine=engine)) as H:
            products.append(H(vector))
    assert torch.equal(*products)


def test_graphs_are_rebuilt_where_they_do_not_fit(monkeypatch):
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for free, kept in ((1 << 30, True), (1000, False), (None, True)):
        monkeypatch.setattr(
            "lightning_dynamics.objective.linearization.available_memory", lambda device, free=free: free
        )
        with Objective(module, cross_entropy, [data()]).linearize() as at:
            at.evaluate()
            assert at.is_kept is kept
    monkeypatch.setattr(f"{MEMORY}.available_memory", lambda device: 1 << 30)
    with Objective(module, cross_entropy, [data()]).linearize() as at:
        at.evaluate(reserve=1 << 30)
        assert not at.is_kept


def test_a_closure_over_a_plain_module_leaves_it_as_it_was():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    with hessian(Objective(module, cross_entropy, [data(dtype=torch.float32)])) as H:
        eigenpairs(H, top=2)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_weights_are_measured_in_single():
    module = nn.Linear(5, 3).bfloat16()
    single = nn.Linear(5, 3)
    single.load_state_dict({k: v.float() for k, v in module.state_dict().items()})
    x, y = data(dtype=torch.float32)
    with hessian(Objective(module, cross_entropy, [(x.bfloat16(), y)])) as H:
        assert H.dtype is torch.float32
        found = dense(H)
    with hessian(Objective(single, cross_entropy, [(x.bfloat16().float(), y)])) as H:
        torch.testing.assert_close(found, dense(H), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), r"scalar tensor, got \(24, 3\)"),
        (lambda m, b: 1.0, "scalar tensor, got float"),
        (lambda m, b: m(b[0]).detach().mean(), "does not depend on any parameter"),
        (lambda m, b: None, "No batch of the probe gave a loss"),
        (
            lambda m, b: (b[0].requires_grad_() ** 2).mean(),
            r"depends on none of the measured parameters \(weight, bias\)",
        ),
    ],
)
def test_a_loss_that_cannot_be_measured_is_explained(loss, message):
    with pytest.raises(ValueError, match=message), hessian(Objective(nn.Linear(5, 3).double(), loss, [data()])):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "`batches` is empty"),
        ({"noise_draws": 0}, "`noise_draws` must be at least 1, got 0"),
        ({"weights": [1.0, 2.0]}, r"`weights` must have one entry per batch \(1\), got 2"),
        ({"weights": [-1.0]}, "must not be negative"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(nn.Linear(5, 3), cross_entropy, **{"batches": [data()], **arguments})
