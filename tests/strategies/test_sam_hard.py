"""SAM on modules that real people write."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from helpers.sharp import RHO, Sharp, data, loader, same
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import DDPSAMStrategy, SAMStrategy
from lightning_dynamics.objective.rerun import Rerun
from lightning_dynamics.strategies.perturbation import across, dot, norm


def sharpened(module, rho=RHO, *, batches=None, callbacks=(), **options):
    """Fit with SAM, or without for ρ = None; the module and the Trainer."""
    sam = {key: options.pop(key) for key in ("every_k", "variant", "m") if key in options}
    strategy = "auto" if rho is None else SAMStrategy(rho=rho, **sam)
    torch.manual_seed(1)
    trainer = fit(
        list(callbacks),
        module,
        loader() if batches is None else batches,
        **{"max_epochs": 2, "strategy": strategy, **options},
    )
    return module, trainer


def almost_without(module, **options):
    """With so small a perturbation, SAM must be the base optimizer."""
    plain, _ = sharpened(module(), None, **options)
    sharp, trainer = sharpened(module(), 1e-30, **options)
    assert trainer.strategy.last_step is not None
    return plain, sharp


class Branches(Sharp):
    """On each rank one of two weights is used, of equal shapes."""

    def __init__(self):
        super().__init__(norm=False, schedule=False)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.experts[(self.global_rank + batch_idx) % 2](self.net(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Compares(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        both = trainer.strategy.all_gather(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
        assert torch.equal(both[0], both[1])


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{"m": 4}, {"variant": "gsam"}, {"every_k": 2}], ids=str)
def test_weights_that_only_one_rank_uses(options):
    strategy = DDPSAMStrategy(
        rho=RHO, start_method="fork", timeout=timedelta(seconds=60), find_unused_parameters=True, **options
    )
    fit([Compares()], Branches(), DataLoader(TensorDataset(*data()), 8), strategy=strategy, devices=2, max_epochs=1)


def test_trained_tensors_that_are_no_parameters_of_the_module():
    class Temperature(Sharp):
        def __init__(self):
            super().__init__(schedule=False)
            self.log_alpha = torch.zeros(1, requires_grad=True)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.log_alpha.exp() * 0.3).sum()

        def configure_optimizers(self):
            return torch.optim.SGD([*self.net.parameters(), self.log_alpha], 0.1)

    plain, sharp = almost_without(Temperature)
    assert torch.equal(plain.log_alpha, sharp.log_alpha)
    assert sharp.log_alpha != 0


class Store:
    """Keeps the input of a layer."""

    def __call__(self, module, arguments, output):
        self.calls = getattr(self, "calls", 0) + 1
        self.features = arguments[0]

    def keep(self, module, arguments, output):
        self(module, arguments, output)


@pytest.mark.parametrize("kind", ["object", "method", "closure", "partial"])
def test_what_hooks_write_to_is_what_the_step_reads(kind):
    class Hooked(Sharp):
        def __init__(self):
            super().__init__(norm=False, schedule=False)
            self.store, self.kept = Store(), {}
            kept = self.kept

            def closure(module, arguments, output):
                kept["features"] = arguments[0]

            hook = {
                "object": self.store,
                "method": self.store.keep,
                "closure": closure,
                "partial": partial(lambda store, *rest: store(*rest), self.store),
            }[kind]
            self.net[4].register_forward_hook(hook)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            features = self.kept.pop("features") if kind == "closure" else self.store.features
            return loss + 0.1 * features.square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    plain, sharp = almost_without(Hooked)
    assert same(plain, sharp)
    if kind != "closure":
        assert sharp.store.calls == plain.store.calls == 12


@pytest.mark.parametrize("assigns", [True, False])
def test_momentum_encoders_move_once(assigns):
    class Momentum(Sharp):
        def __init__(self):
            super().__init__(schedule=False)
            self.teacher = Sharp().net.requires_grad_(False)
            for network in (self.net, self.teacher):
                nn.init.zeros_(network[4].bias)

        def training_step(self, batch, batch_idx):
            for teacher, student in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                if assigns:
                    teacher.data = teacher.data * 0.9 + student.data * 0.1
                else:
                    teacher.data.mul_(0.9).add_(student.data, alpha=0.1)
            difference = (self.net(batch[0]) - self.teacher(batch[0])).square().mean()
            return F.cross_entropy(self.net(batch[0]), batch[1]) + difference

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

    plain, sharp = almost_without(Momentum)
    assert same(plain, sharp)


def test_a_second_gradient_now_and_then_stops_where_rho_is_zero():
    module, trainer = sharpened(Sharp(), lambda step, lr: 0.2 if step < 3 else 0.0, every_k=3)
    after, _ = sharpened(Sharp(), lambda step, lr: 0.2 if step < 1 else 0.0)
    assert trainer.strategy._orthogonal == {}
    assert trainer.strategy.last_step.step == 0
    assert not same(module, after)  # two steps between, which used the vector of the first


def test_a_step_of_which_the_first_batch_is_missing():
    def collate(samples):
        xs, ys = zip(*samples, strict=True)
        return None if ys[0] == 99 else (torch.stack(xs), torch.stack(ys))

    x, y = data(32)
    y = y.clone()
    y[0] = 99
    batches = DataLoader(TensorDataset(x, y), 8, collate_fn=collate)
    with pytest.warns(UserWarning, match="yielded None"):
        _, trainer = sharpened(Sharp(), batches=batches, accumulate_grad_batches=2, max_epochs=1)
    assert trainer.strategy.last_step.step == 1
    assert trainer.strategy._counts == {0: 2}


def test_an_optimizer_that_steps_by_itself_is_refused():
    class Bare(Sharp):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"use the one that `self\.optimizers\(\)` returns"):
        sharpened(Bare())


def test_complex_parameters():
    one, other = torch.tensor([1j, 2.0]), torch.tensor([1j, 1.0])
    assert dot([one], [other]) == 3
    assert norm([one]) == pytest.approx(5**0.5)
    (rest,) = across([one], [other])
    assert dot([rest], [other]) == pytest.approx(0, abs=1e-6)


def test_a_tensor_that_is_in_a_batch_twice():
    class Shifts(Sharp):
        def training_step(self, batch, batch_idx):
            x, again = batch["input"], batch["target"]
            x.add_(1)
            return F.mse_loss(self.net(x)[:, :1], again[:, :1])

    def collate(samples):
        x = torch.stack([x for x, _ in samples])
        return {"input": x, "target": x}

    plain, sharp = almost_without(Shifts, batches=DataLoader(TensorDataset(*data()), 8, collate_fn=collate))
    assert same(plain, sharp)


def test_loggers_know_their_folder_in_both_evaluations(tmp_path):
    class Asks(Sharp):
        def training_step(self, batch, batch_idx):
            logger = self.loggers[1]
            logger.experiment.log_metrics({"own": 1.0})
            logger.log_metrics({"other": 1.0}, step=self.calls)
            self.places = [*getattr(self, "places", []), self.trainer.log_dir, logger.log_dir, logger.version]
            assert None not in (self.logger.log_dir, self.trainer.log_dir, logger.version)
            return super().training_step(batch, batch_idx)

    def loggers(name):
        return [TensorBoardLogger(tmp_path / name), CSVLogger(tmp_path / name)]

    sharp, trainer = sharpened(Asks(), 1e-30, logger=loggers("sharp"), max_epochs=1)
    plain, plain_trainer = sharpened(Asks(), None, logger=loggers("plain"), max_epochs=1)
    assert same(plain, sharp)
    assert len(sharp.places) == len(plain.places) == 18
    written = [Path(each.loggers[1].log_dir, "metrics.csv").read_text("utf-8") for each in (trainer, plain_trainer)]
    assert written[0] == written[1]


def test_a_value_that_is_logged_past_the_module_is_logged_once():
    class Hides(Sharp):
        def __init__(self):
            super().__init__()
            self._log = partial(self.log, on_step=False, on_epoch=True)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self._log("mean", loss)
            pl.LightningModule.log(self, "last", loss)
            return loss

    _, trainer = sharpened(Hides(), max_epochs=1, limit_train_batches=1)
    _, plain = sharpened(Hides(), None, max_epochs=1, limit_train_batches=1)
    assert trainer.callback_metrics == plain.callback_metrics


class Grows(Sharp):
    """A backbone that is frozen at first."""

    def __init__(self):
        super().__init__(norm=False, schedule=False)
        self.backbone, self.head = self.net[:2], self.net[2:]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize("options", [{"every_k": 4}, {"variant": "gsam"}, {}], ids=str)
def test_parameters_that_join_the_optimizer(options):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False, backbone_initial_lr=0.05)
    module, _ = sharpened(Grows(), callbacks=[finetuning], **options)
    assert not torch.equal(module.net[0].weight, Grows().net[0].weight)


def test_a_checkpoint_that_was_only_validated_is_not_gone_on_from(tmp_path):
    class Validates(Sharp):
        def validation_step(self, batch, batch_idx):
            return None

    strategy = SAMStrategy(rho=RHO, every_k=3)
    torch.manual_seed(1)
    trainer = fit([], Validates(), loader(), strategy=strategy, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "sam.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "lightning_dynamics.sam" not in torch.load(tmp_path / "weights.ckpt", weights_only=False)
    trainer.validate(Validates(), loader(), ckpt_path=tmp_path / "sam.ckpt", verbose=False)
    assert strategy._restored is None


def test_optimizers_without_a_learning_rate_or_parameters():
    class Relative(Sharp):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            step = optimizer.step

            def step_of_its_own(closure=None):
                optimizer.param_groups[0]["lr"] = 0.1
                step(closure)
                optimizer.param_groups[0]["lr"] = None

            optimizer.step = step_of_its_own
            optimizer.param_groups[0]["lr"] = None
            return optimizer

    _, trainer = sharpened(Relative(norm=False))
    assert trainer.strategy.last_step.rho == RHO

    class Nothing(Sharp):
        def configure_optimizers(self):
            return None

    with pytest.warns(UserWarning, match="returned `None`"):
        sharpened(Nothing())


def test_batches_that_require_a_gradient():
    class Forces(Sharp):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].requires_grad_(), batch[1]

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            (force,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + force.square().sum()

    plain, sharp = almost_without(partial(Forces, norm=False))
    assert same(plain, sharp)


def test_what_cannot_be_copied(tmp_path):
    class Locked:
        def __init__(self, x, y):
            self.x, self.y, self.lock = x, y, threading.Lock()

    class Reads(Sharp):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch.x), batch.y)

    def collate(samples):
        return Locked(*(torch.stack(each) for each in zip(*samples, strict=True)))

    with pytest.raises(MisconfigurationException, match="Let its class define `__deepcopy__`"):
        sharpened(Reads(), batches=DataLoader(TensorDataset(*data()), 8, collate_fn=collate))

    class Holds(Sharp):
        def __init__(self):
            super().__init__()
            self.guarded = Locked(0, 0)

    with pytest.warns(UserWarning, match="shares between the two what it cannot copy: guarded"):
        sharpened(Holds())


def test_layers_without_a_size_are_refused():
    class Lazy(Sharp):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(3)

    with pytest.raises(MisconfigurationException, match="belongs to a lazy layer"):
        sharpened(Lazy())


def test_the_gap_of_a_short_last_step_is_a_mean():
    class Constant(Sharp):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + 1

    _, trainer = sharpened(Constant(norm=False), accumulate_grad_batches=4, max_epochs=1)
    assert float(trainer.strategy.last_step.loss) == 1


def test_copies_are_made_once_and_let_go():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.zeros(1 << 19)
            self.words = {str(i): i for i in range(10)}
            self.grown = [torch.zeros(2) for _ in range(100)]

    module = Holder()
    rerun = Rerun(module)
    rerun.mark([], [])
    first = dict(rerun._marked[0][1])
    with rerun.again():
        assert module.table is first["table"]
        module.words["new"] = 1
        module.grown.append(torch.ones(2))
        module.grown[0].add_(1)
    assert "new" not in module.words
    assert len(module.grown) == 100
    assert module.grown[0].sum() == 0
    rerun.mark([], [])
    second = dict(rerun._marked[0][1])
    assert second["table"] is first["table"]  # nobody wrote to it
    assert second["grown"][1] is first["grown"][1]
    assert second["grown"][0] is not first["grown"][0]
    module.grown.clear()
    module.table.add_(1)
    rerun.mark([], [])
    assert rerun._marked[0][1]["table"].sum() > 0
    assert len(rerun._clones) == 1
