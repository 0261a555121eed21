"""Whatever a module does to itself while the sandbox is open, it is as it was afterwards, bit for bit."""

import collections
import random
import threading
import weakref

import numpy as np
import pytest
import torch
from helpers.state import module_state, same
from torch import nn
from torch.utils.data import TensorDataset

from lightning_dynamics.objective import Sandbox
from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import fork_rng, seed_everything


class Nasty(nn.Module):
    """Keeps state in every place that a module can keep it, and changes all of it in one step."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.net = nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.ReLU(inplace=True),
            shared,
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            shared,
        )
        self.target = nn.Linear(3, 4).requires_grad_(False)
        self.hidden = [nn.BatchNorm1d(4), {"deep": nn.Linear(4, 4)}]
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("alias", self.ema)
        self.counter = 0
        self.history = []
        self.recent = collections.deque(maxlen=3)
        self.table = {"sum": torch.zeros(2), "nested": [torch.zeros(1)]}
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.RandomState(4)
        self.last = None
        self.bank = torch.zeros(1 << 19)
        self.flag = nn.Parameter(torch.ones(2), requires_grad=False)
        self.fired = []
        self.net[0].register_forward_hook(lambda module, args, out: self.fired.append(float(out.detach().sum())))
        self.touched = 0

        def count(gradient):
            self.touched += 1
            return gradient

        self.net[0].weight.register_hook(count)

    def forward(self, x):
        x.add_(0.01 * torch.randn(x.shape, generator=self.generator)).mul_(1 + 0.01 * self.numpy.rand())
        out = self.net(x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        out = out + self.hidden[0](out) + self.hidden[1]["deep"](out)
        loss = out.square().mean() * (1 + 0.1 * self.counter)
        self.counter += 1
        self.history.append(float(loss.detach()))
        self.recent.append(loss)
        self.last = {"loss": loss, "again": [loss]}
        self.table["sum"] += 1
        self.table["nested"][0].add_(2)
        self.ema.mul_(0.9).add_(out.detach().mean(0))
        self.bank[0] += 1
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.net[0].parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
            self.net[0].weight.mul_(0.9)
            self.flag.data = torch.zeros(2 + self.counter)
        setattr(self, f"new_{self.counter}", True)
        del self.fired[:-5]
        return loss


@pytest.fixture
def module():
    torch.manual_seed(0)
    net = Nasty()
    net(torch.randn(5, 3)).backward()
    return net


def test_everything_a_step_changes_is_put_back(module):
    before = module_state(module)
    with Sandbox(module) as sandbox:
        for _ in range(3):
            sandbox.renew()
            module(torch.randn(5, 3)).backward()
    assert same(module_state(module), before) == []
    assert not hasattr(module, "new_2")


def test_without_the_sandbox_the_comparison_sees_all_of_it(module):
    """The control: the comparison is not blind."""
    before = module_state(module)
    module(torch.randn(5, 3)).backward()
    changed = set(same(module_state(module), before))
    expected = {"parameters", "buffers", "gradients", "attributes", "generators", "hidden"}
    assert expected <= changed


def test_references_come_back_not_copies(module):
    identities = {name: id(value) for name, value in vars(module).items()}
    parameters = [id(p) for p in module.parameters()]
    with Sandbox(module):
        assert id(module.history) != identities["history"]
    assert {name: id(value) for name, value in vars(module).items()} == identities
    assert [id(p) for p in module.parameters()] == parameters


def test_an_exception_inside_restores_too(module):
    before = module_state(module)

    def interrupted():
        module(torch.randn(5, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Sandbox(module):
        interrupted()
    assert same(module_state(module), before) == []


def test_every_evaluation_starts_from_the_same_state(module):
    x, losses = torch.randn(5, 3), []
    with fork_rng(), Sandbox(module) as sandbox:
        for _ in range(3):
            sandbox.renew()
            seed_everything(5)
            losses.append(module(x.clone()).detach())
            sandbox.mend()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_leaves_keep_their_values_when_a_step_writes_into_its_weights(module):
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with Sandbox(module) as sandbox:
        leaves, flag = sandbox.leaves(parameters), module.flag.shape
        module(torch.randn(5, 3))
        assert not torch.equal(leaves["net.0.weight"], parameters["net.0.weight"])
        assert sandbox.mend() == ["net.0.weight"]
        assert all(torch.equal(leaves[name], p) for name, p in parameters.items())
        assert module.flag.shape == flag


def test_gradients_go_to_private_leaves(module):
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    touched = module.touched
    parameters = dict(module.named_parameters())
    with Sandbox(module) as sandbox:
        leaf = sandbox.leaves(parameters)["net.0.weight"]
        module(torch.randn(5, 3)).backward()
        assert leaf.grad is not None
    assert module.touched == touched
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_tied_parameters_and_shared_buffers_stay_tied(module):
    with Sandbox(module):
        assert module.net[3].weight is module.net[5].weight
        assert module.ema is module.alias


def test_training_flags_are_set_and_put_back(module):
    module.net[1].eval()
    flags = [m.training for m in module.modules()]
    with Sandbox(module, training=False):
        assert not any(m.training for m in module.modules())
    with Sandbox(module):
        assert [m.training for m in module.modules()] == flags
    assert [m.training for m in module.modules()] == flags


def test_narrow_weights_are_raised_and_wide_ones_left():
    half = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    with Sandbox(half, dtype=torch.float32):
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        assert half[1].running_mean.dtype is torch.float32
        assert half[1].num_batches_tracked.dtype is torch.int64
    assert half[0].weight.dtype is torch.bfloat16
    double = nn.Linear(2, 2).double()
    with Sandbox(double, dtype=torch.float32):
        assert double.weight.dtype is torch.float64


def test_a_large_tensor_is_copied_once_until_someone_writes_to_it(module):
    with Sandbox(module) as sandbox:
        first = module.bank
        assert first is not None
        sandbox.renew()
        assert module.bank is first
        module.bank[3] = 7.0
        sandbox.renew()
        assert module.bank[3] == 0.0
        second = module.bank
    module.bank[4] = 5.0
    with sandbox:
        assert module.bank is not second
        assert module.bank[4] == 5.0


def test_what_cannot_be_copied_is_shared_and_named():
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()
    module.data = TensorDataset(torch.zeros(3))
    module.sets = [module.data]
    with Sandbox(module) as sandbox:
        assert module.data is not None
        assert module.sets[0] is module.data
    assert sandbox.shared == {"lock", "data"}


def test_stand_ins_and_overrides_last_as_long_as_the_sandbox():
    module, optimizer, owner = nn.Linear(2, 2), object(), nn.Linear(1, 1)
    module.optimizer = optimizer
    module.by_name = {"first": optimizer}
    plain = type("Plain", (), {})()
    plain.setting = 1
    with Sandbox(
        module,
        replace=[(optimizer, "stand-in")],
        overrides=[(module, "log", print), (plain, "setting", 2), (owner, "extra", 3)],
    ) as sandbox:
        assert module.optimizer == "stand-in"
        assert module.by_name == {"first": "stand-in"}
        assert module.log is print
        assert plain.setting == 2
        plain.other = 1
        sandbox.renew()
        assert module.log is print
    assert module.optimizer is optimizer
    assert "log" not in vars(module)
    assert vars(plain) == {"setting": 1}
    assert "extra" not in vars(owner)


def test_a_module_that_refers_to_itself_is_not_copied():
    module = nn.Linear(2, 2)
    module.bound = [module.forward]
    module.registry = {"me": module.weight}
    with Sandbox(module):
        assert module.bound[0].__self__ is module
        assert module.registry["me"] is module.weight


def test_random_number_generators_come_back():
    seed_before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    with fork_rng():
        seed_everything(1)
        first = (random.random(), np.random.rand(), torch.rand(1))
        seed_everything(1)
        assert first == (random.random(), np.random.rand(), torch.rand(1))
    assert random.getstate() == seed_before[0]
    assert np.array_equal(np.random.get_state()[1], seed_before[1])
    assert torch.equal(torch.get_rng_state(), seed_before[2])


def test_batches_are_copied_whatever_holds_them():
    pair = collections.namedtuple("pair", ["x", "y"])

    class Custom:
        def __init__(self, x):
            self.x = x

    graph = torch.ones(2, requires_grad=True) * 2
    batch = {"a": [torch.ones(2)], "b": pair(torch.zeros(1), "label"), "c": Custom(graph), "d": (1, None)}
    copied = private_copy(batch)
    assert type(copied["b"]) is pair
    assert copied["b"].y == "label"
    assert copied["d"] == (1, None)
    copied["a"][0].zero_()
    copied["c"].x.zero_()
    assert batch["a"][0].sum() == 2
    assert graph.sum() == 4
    halves = private_copy([torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.long)], torch.float32)
    assert [t.dtype for t in halves] == [torch.float32, torch.int64]


def test_nothing_private_outlives_the_sandbox(module):
    parameters = dict(module.named_parameters())
    with Sandbox(module) as sandbox:
        leaf = weakref.ref(sandbox.leaves(parameters)["net.0.weight"])
    assert leaf() is None


def test_private_state_can_be_gone_back_to():
    module = Nasty()
    with Sandbox(module) as box:
        module.counter, module.ema[0] = 7, 5.0
        state = box.state()
        box.renew()
        assert (module.counter, float(module.ema[0])) == (0, 0.0)
        box.resume(state)
        assert (module.counter, float(module.ema[0])) == (7, 5.0)
        box.renew()
        assert module.counter == 0
    assert (module.counter, float(module.ema[0])) == (0, 0.0)


@pytest.mark.parametrize("layer", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_lazy_layers_without_a_size_are_refused(layer):
    with pytest.raises(ValueError, match=r"`0\..*lazy layer.*Run the module once"), Sandbox(nn.Sequential(layer)):
        pass


def test_complex_state_is_raised_like_other_state():
    module = nn.Module()
    module.register_parameter("waves", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    module.register_buffer("shift", torch.ones(2, dtype=torch.complex64))
    with Sandbox(module, dtype=torch.float64):
        assert module.waves.dtype is module.shift.dtype is torch.complex128
    assert private_copy(module.shift, torch.float64).dtype is torch.complex128
    assert private_copy(module.shift, torch.float32).dtype is torch.complex64
