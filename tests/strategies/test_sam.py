"""SAM is the hand-written loop, and leaves nothing of the second evaluation but the gradient."""

from __future__ import annotations

import signal

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from helpers.sharp import BATCH, RHO, Sharp, by_hand, differences, loader, same
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision

from lightning_dynamics import RhoByLearningRate, SAMStrategy, compose_strategy


def sharpened(module=None, data=None, *, strategy=None, seed=1, callbacks=(), **options):
    """Fit with SAM; the module and the Trainer."""
    module = Sharp() if module is None else module
    torch.manual_seed(seed)
    strategy = SAMStrategy(rho=RHO) if strategy is None else strategy
    trainer = fit(
        list(callbacks),
        module,
        loader() if data is None else data,
        **{"max_epochs": 2, "strategy": strategy, **options},
    )
    return module, trainer


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"accumulate": 4, "clip": 0.1}, {"clip_value": 0.01}], ids=str
)
def test_it_is_the_loop_written_by_hand(kind, options):
    trainer_options = {
        "accumulate_grad_batches": options.get("accumulate", 1),
        "gradient_clip_val": options.get("clip", options.get("clip_value")),
        "gradient_clip_algorithm": "value" if "clip_value" in options else "norm",
    }
    module, _ = sharpened(Sharp(kind), **trainer_options)
    assert same(module.net, by_hand(kind, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "asam", "rho": 0.5},
        {"variant": "usam", "rho": 0.3},
        {"variant": "usam", "rho": 0.3, "accumulate": 2},
        {"m": 4},
        {"m": 2, "accumulate": 2, "norm": False},
        {"m": 3, "batch": 18, "norm": False},
        {"dropout": 0.3},
        {"dropout": 0.3, "same_noise": False},
        {"dropout": 0.3, "accumulate": 3},
    ],
    ids=str,
)
def test_each_variant_is_its_formula(options):
    chosen = {key: options[key] for key in ("variant", "m", "same_noise") if key in options}
    strategy = SAMStrategy(rho=options.get("rho", RHO), **chosen)
    module = Sharp(norm=options.get("norm", True), dropout=options.get("dropout", 0.0))
    module, _ = sharpened(
        module,
        loader(options.get("batch", BATCH)),
        strategy=strategy,
        accumulate_grad_batches=options.get("accumulate", 1),
    )
    assert differences(module.net, by_hand(**options)) == 0


@pytest.mark.parametrize("options", [{"variant": "gsam"}, {"every_k": 3}, {"every_k": 2, "accumulate": 2}], ids=str)
def test_decomposed_gradients(options):
    chosen = {key: value for key, value in options.items() if key != "accumulate"}
    accumulate = options.get("accumulate", 1)
    module, _ = sharpened(strategy=SAMStrategy(rho=RHO, **chosen), accumulate_grad_batches=accumulate)
    assert differences(module.net, by_hand(**options)) < 2e-6
    assert differences(module.net, by_hand(accumulate=accumulate)) > 1e-3


def scaled(init=2.0**10):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init, growth_interval=10**6))


def test_bfloat16():
    module, _ = sharpened(precision="bf16-mixed")
    assert same(module.net, by_hand(autocast=torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "accumulate": 2}, {"variant": "usam"}, {"m": 4}], ids=str)
def test_float16_with_a_scaler(options):
    plugin = scaled()
    chosen = {key: options[key] for key in ("variant", "m") if key in options}
    module, trainer = sharpened(
        strategy=SAMStrategy(rho=RHO, **chosen),
        plugins=[plugin],
        gradient_clip_val=options.get("clip"),
        accumulate_grad_batches=options.get("accumulate", 1),
    )
    assert trainer.precision_plugin is plugin  # "16-mixed" as a string means bfloat16 on a CPU
    assert plugin.scaler.is_enabled()
    assert same(module.net, by_hand(autocast=torch.float16, scale=2.0**10, **options))


def test_a_scale_that_changes_does_not_matter():
    """LookSAM keeps a vector over steps, and uses its direction."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3))
    module, _ = sharpened(strategy=SAMStrategy(rho=RHO, every_k=3), plugins=[plugin])
    assert plugin.scaler.get_scale() > 2**8
    reference = by_hand(autocast=torch.float16, every_k=3, scale=2.0**12)
    assert differences(module.net, reference) < 1e-4
    assert differences(module.net, by_hand(autocast=torch.float16, scale=2.0**12)) > 1e-3


class Overflows(Sharp):
    """Its loss overflows in one step."""

    def __init__(self, factor=1e30):
        super().__init__()
        self.factor = factor

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (self.factor if batch_idx == 2 else 1)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        before = [p.detach().clone() for p in self.parameters()]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.moved = {**getattr(self, "moved", {}), batch_idx: not all(map(torch.equal, before, self.parameters()))}


@pytest.mark.parametrize("m", [None, 4])
def test_an_overflow_skips_the_step_before_anything_is_perturbed(m):
    module, trainer = sharpened(
        Overflows(), strategy=SAMStrategy(rho=RHO, m=m), plugins=[scaled(2.0**16)], max_epochs=1
    )
    assert module.moved == {0: True, 1: True, 2: False, 3: True, 4: True, 5: True}
    assert trainer.precision_plugin.scaler.get_scale() == 2**15
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_gradient_that_is_not_finite_is_left_to_the_optimizer():
    """As without SAM: what overflowed overflows the weights, and nothing is perturbed."""
    module, trainer = sharpened(Overflows(factor=float("inf")), max_epochs=1, limit_train_batches=3)
    assert trainer.strategy.last_step.step == 1
    assert not any(p.isfinite().all() for p in module.net[4].parameters())


def test_what_the_user_sees_happens_once():
    class Steps(pl.Callback):
        calls = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.calls += 1

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.zeroed = getattr(self, "zeroed", 0) + 1

    steps, plain_steps = Steps(), Steps()
    module, trainer = sharpened(callbacks=[steps])
    plain, plain_trainer = sharpened(strategy="auto", callbacks=[plain_steps])
    assert module.calls == plain.calls == 12
    assert module.seen == plain.seen
    assert module.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 12
    assert module.accuracy._update_count == plain.accuracy._update_count
    assert trainer.global_step == plain_trainer.global_step == 12
    assert str(trainer.fit_loop.state_dict()) == str(plain_trainer.fit_loop.state_dict())
    assert (steps.calls, steps.zeroed) == (plain_steps.calls, plain_steps.zeroed) == (12, 12)
    assert sorted(vars(module)) == sorted(vars(plain))
    assert set(trainer.callback_metrics) == set(plain_trainer.callback_metrics)
    assert not torch.equal(module.net[0].weight, plain.net[0].weight)


def test_logged_values_are_those_of_the_first_evaluation():
    module, trainer = sharpened(max_epochs=1, limit_train_batches=1)
    plain, plain_trainer = sharpened(strategy="auto", max_epochs=1, limit_train_batches=1)
    assert trainer.callback_metrics == plain_trainer.callback_metrics
    assert torch.equal(module.net[1].running_mean, plain.net[1].running_mean)


@pytest.mark.parametrize("rho", [0, 0.0, lambda step, lr: 0.0])
def test_without_a_perturbation_it_is_the_base_optimizer(rho):
    module, _ = sharpened(Sharp(dropout=0.3), strategy=SAMStrategy(rho=rho))
    plain, _ = sharpened(Sharp(dropout=0.3), strategy="auto")
    assert same(module, plain)


def test_random_numbers_are_drawn_as_without_sam():
    sharpened(Sharp(dropout=0.3))
    after = torch.get_rng_state()
    sharpened(Sharp(dropout=0.3), strategy="auto")
    assert torch.equal(after, torch.get_rng_state())


def test_weights_come_back_to_the_bit():
    class Still(Sharp):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, trainer = sharpened(Still())
    fresh = Still()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))
    assert trainer.strategy.last_step.perturbation_norm == pytest.approx(RHO)


def test_weights_come_back_when_the_second_evaluation_fails():
    class Fails(Sharp):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and not torch.equal(self.net[0].weight, self.before):
                self.perturbed = True
                raise RuntimeError("in the second evaluation")
            self.before = self.net[0].weight.detach().clone()
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            self.at_start = [p.detach().clone() for p in self.parameters()]
            self.before = self.net[0].weight.detach().clone()

    module = Fails()
    with pytest.raises(RuntimeError, match="in the second evaluation"):
        sharpened(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), module.at_start, strict=True))
    assert module.calls == 3
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)


class Branches(Sharp):
    """Has a weight that only the first evaluation uses, and one that only the second uses."""

    def __init__(self):
        super().__init__(norm=False, schedule=False)
        self.first = torch.nn.Parameter(torch.ones(()))
        self.second = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_first = torch.equal(self.net[0].weight, self.at_start)
        return loss * (self.first if is_first else self.second)

    def on_train_batch_start(self, batch, batch_idx):
        self.at_start = self.net[0].weight.detach().clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_weights_without_a_gradient_in_one_evaluation():
    module, _ = sharpened(Branches(), max_epochs=1, limit_train_batches=1)
    assert module.first == 1  # perturbed, and put back; there is no gradient to step with
    assert module.second != 1


def test_gradients_that_are_zero_perturb_nothing():
    class Flat(Sharp):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx)

    module, trainer = sharpened(Flat(norm=False))
    assert trainer.strategy.last_step.perturbation_norm == 0
    assert trainer.strategy.last_step.gradient_norm == 0
    assert all(p.isfinite().all() for p in module.parameters())


class Writes(Sharp):
    """Its step writes into the batch, into a queue, and into a network that is trained by averaging."""

    def __init__(self):
        super().__init__(norm=False, schedule=False)
        self.teacher = torch.nn.Linear(8, 3).requires_grad_(False)
        self.frozen = torch.nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 8))
        self.history, self.steps = [], 0
        torch.manual_seed(7)
        for layer in (self.teacher, self.frozen):
            torch.nn.init.normal_(layer.weight)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x.add_(self.queue.mean(0))
        self.queue = torch.cat([self.queue[1:], x[:1]])
        self.teacher.weight.data.mul_(0.9).add_(self.net[4].weight.detach()[:, :8], alpha=0.1)
        self.steps += 1
        loss = super().training_step(batch, batch_idx)
        loss = loss + 0.1 * (self.net(x) - self.teacher(x)).square().mean() * (1 + self.steps % 2)
        self.history.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_both_evaluations_are_of_one_function(monkeypatch):
    """Of the batch as it came, and of the state that the module had before."""
    module, trainer = sharpened(Writes(), strategy=SAMStrategy(rho=1e-30))
    plain, _ = sharpened(Writes(), strategy="auto")
    step = trainer.strategy.last_step
    assert torch.equal(step.loss, step.perturbed_loss)
    assert same(module, plain)
    assert module.history == plain.history
    assert module.steps == 12


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_may_be_skipped():
    class Skips(Sharp):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    module, trainer = sharpened(Skips(norm=False))
    plain, _ = sharpened(Skips(norm=False), strategy=SAMStrategy(rho=1e-30))
    assert trainer.global_step == 12
    assert not same(module.net, plain.net)
    module, trainer = sharpened(Skips(norm=False), accumulate_grad_batches=2)
    assert trainer.strategy.last_step.step == 5


def test_what_the_strategy_tells():
    """On a quadratic all of it is known: L = wᵀHw/2, e = ρ·Hw/‖Hw‖."""
    curvature = torch.diag(torch.tensor([1.0, 2.0, 4.0]))

    class Quadratic(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))

        def training_step(self, batch, batch_idx):
            return self.w @ curvature @ self.w / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    strategy = SAMStrategy(rho=0.3)
    strategy.observed = True
    module, _ = sharpened(Quadratic(), strategy=strategy, max_epochs=1, limit_train_batches=1)
    w = torch.tensor([1.0, -1.0, 0.5])
    gradient = curvature @ w
    there = w + 0.3 * gradient / gradient.norm()
    second = curvature @ there
    assert torch.allclose(module.w, w - 0.1 * second, rtol=1e-6)
    step = strategy.last_step
    assert step.sharpness_gap == pytest.approx(float(there @ curvature @ there - w @ curvature @ w) / 2, rel=1e-5)
    assert step.gradient_cosine == pytest.approx(float(gradient @ second / gradient.norm() / second.norm()), rel=1e-6)
    assert step.gradient_norm == pytest.approx(float(gradient.norm()))
    assert (step.perturbation_norm, step.rho, step.step) == (pytest.approx(0.3), 0.3, 0)


def test_the_limit_cycle_in_one_dimension():
    """On λw²/2 the iterates settle at |w| = ηλρ/(2 - ηλ), at either sign."""

    class Line(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.7]))

        def training_step(self, batch, batch_idx):
            return self.w.square().sum() * 3 / 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.4)

    module, _ = sharpened(Line(), strategy=SAMStrategy(rho=0.2), max_epochs=40)
    assert abs(module.w.item()) == pytest.approx(0.4 * 3 * 0.2 / (2 - 0.4 * 3), rel=1e-5)


def test_rho_follows_a_schedule():
    seen = []

    def rho(step, lr):
        seen.append((step, lr))
        return 0.1 / (step + 1)

    strategy = SAMStrategy(rho=rho)
    sharpened(strategy=strategy, max_epochs=1)
    assert {step for step, _ in seen} == set(range(6))
    assert strategy.last_step.rho == pytest.approx(0.1 / 6)
    assert dict(seen)[4] == pytest.approx(0.1 / 4)  # the learning rate of the first group, by then halved twice
    by_rate = RhoByLearningRate(rho_max=0.4, lr_max=0.1, rho_min=0.2, lr_min=0.05)
    assert [by_rate(0, lr) for lr in (1.0, 0.1, 0.075, 0.05, 0.0)] == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.2])
    with pytest.raises(MisconfigurationException, match="`rho` must be a finite number"):
        sharpened(strategy=SAMStrategy(rho=lambda step, lr: -1.0))


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize("options", [{}, {"every_k": 4}, {"variant": "gsam"}, {"m": 4}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, options):
    whole, _ = sharpened(strategy=SAMStrategy(rho=RHO, **options), data=loader(n=24), max_epochs=4)
    first = SAMStrategy(rho=RHO, **options)
    _, trainer = sharpened(strategy=first, data=loader(n=24), max_epochs=stop // 3)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    module, trainer = sharpened(
        strategy=SAMStrategy(rho=RHO, **options), data=loader(n=24), max_epochs=4, ckpt_path=tmp_path / "stop.ckpt"
    )
    assert trainer.global_step == 12
    assert same(module.net, whole.net)


def test_checkpoints_load_with_and_without_sam(tmp_path):
    _, trainer = sharpened(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "sam.ckpt")
    _, trainer = sharpened(strategy="auto", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    plain, _ = sharpened(strategy="auto", ckpt_path=tmp_path / "sam.ckpt")
    module, _ = sharpened(ckpt_path=tmp_path / "plain.ckpt")
    assert all(p.isfinite().all() for p in [*plain.parameters(), *module.parameters()])
    trainer = pl.Trainer(accelerator="cpu", strategy=SAMStrategy(), logger=False, enable_progress_bar=False)
    loaded = Sharp.load_from_checkpoint(tmp_path / "sam.ckpt")
    assert isinstance(loaded, Sharp)


def test_the_gradient_norm_outlives_a_resume(tmp_path):
    strategy = SAMStrategy(rho=RHO)
    _, trainer = sharpened(strategy=strategy, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    again = SAMStrategy(rho=RHO)

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                self.norm, self.step = again.gradient_norm, again.last_step

    asks = Asks()
    sharpened(strategy=again, ckpt_path=tmp_path / "stop.ckpt", callbacks=[asks])
    assert asks.norm == strategy.gradient_norm
    assert asks.step is None


class ByHand(Sharp):
    """Optimizes by hand, with a closure."""

    def __init__(self, with_closure=True, zeroes=True, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.with_closure, self.zeroes = with_closure, zeroes

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            if self.zeroes:
                optimizer.zero_grad()
            loss = Sharp.training_step(self, batch, batch_idx)
            self.manual_backward(loss)

        if self.with_closure:
            if not self.zeroes:
                optimizer.zero_grad()
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("options", [{}, {"every_k": 3}, {"variant": "asam"}], ids=str)
def test_manual_optimization_with_a_closure(options, zeroes):
    module, trainer = sharpened(
        ByHand(schedule=False, dropout=0.2, zeroes=zeroes), strategy=SAMStrategy(rho=RHO, **options)
    )
    assert differences(module.net, by_hand(schedule=False, dropout=0.2, **options)) < (
        2e-6 if "every_k" in options else 1e-9
    )
    assert trainer.global_step == module.calls == 12
    assert module.net[1].num_batches_tracked == 12


def test_manual_optimization_without_a_closure_is_refused_with_the_cure():
    with pytest.raises(MisconfigurationException, match=r"call `optimizer.step\(closure\)` with a closure that"):
        sharpened(ByHand(with_closure=False))


class Two(pl.LightningModule):
    """A generator and a discriminator."""

    def __init__(self, looks=False):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.one, self.other = torch.nn.Linear(8, 3), torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        first, second = self.optimizers()
        second.zero_grad()

        def closure_one():
            first.zero_grad()
            self.manual_backward(self.other(self.one(x)).square().mean())

        first.step(closure=closure_one)
        self.seen = [None if p.grad is None else p.grad.clone() for p in self.other.parameters()]

        def closure_other():
            second.zero_grad()
            self.manual_backward((self.other(self.one(x).detach()) - 1).square().mean())

        second.step(closure=closure_other)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.one.parameters(), 0.1), torch.optim.SGD(self.other.parameters(), 0.1)]


def test_several_optimizers_perturb_their_own_weights():
    module, trainer = sharpened(Two(), max_epochs=1)
    reference = Two()
    one, other = reference.one, reference.other

    def step(parameters, loss):
        for p in reference.parameters():
            p.grad = None
        loss().backward()
        seen = [p.grad.clone() for p in other.parameters()]
        gradients = [p.grad.clone() for p in parameters]
        before = [p.detach().clone() for p in parameters]
        length = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=RHO / float(length))
        second = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            for p, b, g in zip(parameters, before, second, strict=True):
                p.copy_(b - 0.1 * g)
        return seen

    for x, _ in loader():
        seen = step(list(one.parameters()), lambda x=x: other(one(x)).square().mean())
        step(list(other.parameters()), lambda x=x: (other(one(x).detach()) - 1).square().mean())
    assert trainer.global_step == 12
    assert differences(module, reference) < 1e-6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module.seen, seen, strict=True))  # of one evaluation


def test_optimizers_that_evaluate_several_times_are_refused():
    class Quasi(Sharp):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Repeats(Sharp):
        def configure_optimizers(self):
            return Twice(self.parameters(), 0.1)

    for module in (Quasi(), Repeats()):
        with pytest.raises(MisconfigurationException, match="evaluates its closure several times"):
            sharpened(module)


def test_sam_twice_is_refused():
    class SAM(torch.optim.SGD):
        pass

    class Own(Sharp):
        def configure_optimizers(self):
            return SAM(self.parameters(), 0.1)

    with pytest.raises(MisconfigurationException, match="returns a SAM, and the strategy does SAM already"):
        sharpened(Own())
    with pytest.raises(MisconfigurationException, match="which does that already"):
        compose_strategy("sam", sam=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "`rho` must be a finite number, not negative, got -0.1"),
        ({"rho": float("nan")}, "`rho` must be"),
        ({"rho": float("inf")}, "`rho` must be"),
        ({"rho": "large"}, "`rho` must be"),
        ({"rho": True}, "`rho` must be"),
        ({"variant": "usam"}, "has no usual `rho`"),
        ({"variant": "esam"}, "`variant` must be one of 'sam', 'asam', 'usam', 'gsam', got 'esam'"),
        ({"perturbation": "local"}, "`perturbation` must be one of 'per_rank', 'global'"),
        ({"m": 0}, "`m` must be a positive int"),
        ({"m": 2.0}, "`m` must be a positive int"),
        ({"every_k": 0}, "`every_k` must be a positive int"),
        ({"look_alpha": -1}, "`look_alpha` must be"),
        ({"gsam_alpha": float("nan")}, "`gsam_alpha` must be"),
        ({"same_noise": 1}, "`same_noise` must be True or False"),
        ({"m": 4, "every_k": 2}, "goes with neither"),
        ({"m": 4, "perturbation": "global"}, "goes with neither"),
        ({"variant": "gsam", "every_k": 2}, "use one"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        SAMStrategy(**options)


def test_m_must_divide_the_batch_but_not_the_last_one():
    with pytest.raises(MisconfigurationException, match="`m=3` does not divide the batch size, 8"):
        sharpened(strategy=SAMStrategy(m=3))
    _, trainer = sharpened(strategy=SAMStrategy(m=4), data=loader(n=46), max_epochs=1)
    assert trainer.global_step == 6


def test_a_step_that_draws_its_own_batches_is_refused():
    class Draws(Sharp):
        def training_step(self, dataloader_iter):
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    with pytest.raises(MisconfigurationException, match="draws its own"):
        sharpened(Draws())


def test_weight_averaging_is_left_alone():
    """Its last epoch only lets batch norm see the averaged weights."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    module, trainer = sharpened(
        Sharp(schedule=False), callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=1)], max_epochs=3
    )
    assert trainer.strategy.last_step.step == 17
    assert module.calls == 24
    assert all(p.isfinite().all() for p in module.parameters())


def test_sparse_gradients():
    class Words(pl.LightningModule):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.out = torch.nn.Embedding(5, 4, sparse=sparse), torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.out(self.words(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(20) % 4), 5)
    for variant in ("sam", "asam", "gsam"):
        dense, _ = sharpened(Words(False), data, strategy=SAMStrategy(rho=RHO, variant=variant))
        sparse, _ = sharpened(Words(True), data, strategy=SAMStrategy(rho=RHO, variant=variant))
        assert differences(dense, sparse) < 1e-6


def test_a_handler_that_saves_waits_for_the_weights(tmp_path):
    """Lightning's handler for SLURM saves a checkpoint wherever the signal finds it."""

    class Interrupted(Sharp):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and not torch.equal(self.net[0].weight, self.at_start):
                signal.raise_signal(signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            self.at_start = self.net[0].weight.detach().clone()

    module, saved = Interrupted(), []
    before = signal.signal(
        signal.SIGUSR1, lambda *_: saved.append((module.net[0].weight.detach().clone(), module.at_start))
    )
    try:
        sharpened(module, max_epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(saved) == 1
    assert torch.equal(*saved[0])
