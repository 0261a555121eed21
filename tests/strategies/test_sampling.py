"""Whole fits in an order: which batches come, what is refused, and that a resumed run goes on where it stopped."""

from __future__ import annotations

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from helpers.fit import fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_dynamics import GradientNoiseMonitor, Probe, SamplingOrderStrategy, _compat, compose_strategy
from lightning_dynamics.callbacks.map_style import MapStyleSource
from lightning_dynamics.callbacks.optimization import sampling_order
from lightning_dynamics.strategies.order import ORDERS, OrderSampler

N = 22  # samples, in six batches of four, the last one short


class Numbered(Dataset):
    """Samples that know their number."""

    def __init__(self, n=N):
        self.x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbered())


class Plain:
    def __iter__(self):
        return iter(loader())


class Follows(pl.LightningModule):
    """A least-squares fit without randomness that keeps the numbers of its samples."""

    def __init__(self, asks=False):
        super().__init__()
        self.net = nn.Linear(3, 1)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)
        self.asks = asks
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        loaders = batch.values() if isinstance(batch, dict) else [batch]
        loaders = [one for one in loaders if one is not None]
        self.seen.append(
            (self.current_epoch, batch_idx, *(torch.as_tensor(one[1]).flatten().tolist() for one in loaders))
        )
        return sum((self.net(x) - torch.as_tensor(i)[..., None] / N).square().mean() for x, i in loaders)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[1].tolist())

    def configure_optimizers(self):
        if self.asks:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def samples(self, epoch, loader=0):
        return [i for e, _, *loaders in self.seen if e == epoch for i in loaders[loader]]


class Saves(pl.Callback):
    """Writes a checkpoint in a hook, once so many batches have begun."""

    def __init__(self, folder, hook, batches):
        self.hook, self.batches, self.file, self.seen_before = hook, batches, folder / "saved.ckpt", None

    def _save(self, hook, trainer, module):
        begun = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if (hook, begun) == (self.hook, self.batches) and self.seen_before is None:
            trainer.save_checkpoint(self.file)
            self.seen_before = len(module.seen)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._save("batch start", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._save("batch end", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._save("validation end", trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self._save("epoch start", trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._save("epoch end", trainer, pl_module)


def loader(n=N, batch_size=4, **options):
    return DataLoader(Numbered(n), batch_size, **options)


def train(order="random_reshuffling", data=None, callbacks=(), asks=False, seed=5, **options):
    module = Follows(asks)
    strategy = SamplingOrderStrategy(order=order, order_seed=seed)
    trainer = fit(list(callbacks), module, loader() if data is None else data, strategy=strategy, **options)
    return module, trainer


def expected(order, epoch, population=N, stream=0, seed=5, batch_size=4):
    sampler = OrderSampler(range(population), order, seed, batch_size=batch_size)
    sampler.begin(stream, epoch, 0, 0)
    return list(sampler)


def resumes(folder, hook, batches, make=loader, asks=False, order="random_reshuffling", **options):
    """An uninterrupted run, and one that goes on from a checkpoint; both end with the same bits."""
    saves = Saves(folder, hook, batches)
    whole, first = train(order, make(), [saves], asks, **options)
    again, second = train(order, make(), [], asks, ckpt_path=saves.file, **options)
    assert saves.seen_before is not None
    assert again.seen == whole.seen[saves.seen_before :]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [str(trainer.optimizers[0].state_dict()) for trainer in (first, second)]
    assert states[0] == states[1]
    assert first.global_step == second.global_step
    if again.seen:
        assert first.current_epoch == second.current_epoch
        if hook != "batch start":  # Lightning itself counts a step too many there
            assert _compat.curve_step(first) == _compat.curve_step(second)
    return whole


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_come_in_the_order_of_seed_and_epoch(order, shuffle):
    module, trainer = train(order, loader(shuffle=shuffle))
    assert [module.samples(epoch) for epoch in range(3)] == [expected(order, epoch) for epoch in range(3)]
    assert [len(one[2]) for one in module.seen[:6]] == [4, 4, 4, 4, 4, 2]
    assert trainer.strategy.order == order


@pytest.mark.parametrize("shuffle", [False, True])
def test_other_loaders_keep_their_order(shuffle):
    module = Follows()
    data = loader(drop_last=True, shuffle=shuffle, generator=torch.Generator().manual_seed(1))
    strategy = SamplingOrderStrategy(order="with_replacement")
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(), loader())
    assert list(chain(*module.validated))[-N:] == list(range(N))
    if not shuffle:
        module.validated.clear()
        trainer.validate(module, data, verbose=False)
        assert list(chain(*module.validated)) == list(range(20))


def test_the_seed_is_that_of_everything_by_default(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    module, trainer = train(seed=None)
    assert module.samples(1) == expected("random_reshuffling", 1)
    assert trainer.strategy.order_seed == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert train(seed=None)[0].samples(1) == expected("random_reshuffling", 1, seed=0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_installing_an_order_draws_no_random_numbers(shuffle):
    states = []
    for strategy in ("auto", SamplingOrderStrategy(order="with_replacement")):
        torch.manual_seed(0)
        data = loader(shuffle=shuffle, generator=torch.Generator().manual_seed(1))
        fit([], Follows(), data, strategy=strategy)
        states.append((torch.get_rng_state(), data.generator.get_state()))
    assert torch.equal(states[0][0], states[1][0])


def test_samplers_that_take_all_are_replaced():
    for sampler in (
        RandomSampler(Numbered()),
        SequentialSampler(Numbered()),
        DistributedSampler(Numbered(), num_replicas=2, rank=1, shuffle=False),
    ):
        assert train(data=loader(sampler=sampler))[0].samples(0) == expected("random_reshuffling", 0)


def test_a_part_of_the_data_stays_one():
    members = [3, 19, 4, 8, 11]
    for order in ORDERS:
        module, _ = train(order, loader(sampler=SubsetRandomSampler(members)))
        assert module.samples(0) == [members[i] for i in expected(order, 0, 5)]
    module, _ = train(data=DataLoader(Subset(Numbered(), members), 4))
    assert module.samples(0) == [members[i] for i in expected("random_reshuffling", 0, 5)]


class Own(torch.utils.data.Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return iter(range(6))

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler(torch.ones(N), N),
        RandomSampler(Numbered(), num_samples=10),
        RandomSampler(range(10)),
        DistributedSampler(Numbered(30), num_replicas=1, rank=0),
        SubsetRandomSampler([]),
        Own(),
        [4, 2, 0],
    ],
)
def test_samplers_with_a_law_of_their_own_are_refused(sampler):
    with pytest.raises(MisconfigurationException, match="would lose what it does"):
        train(data=loader(sampler=sampler))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (DataLoader(Stream(), 4), "The samples of Stream come in an order of their own"),
        (Plain(), "The training data is a Plain"),
        ({"a": loader(), "b": DataLoader(Stream(), 4)}, "The samples of Stream"),
    ],
)
def test_data_without_an_order_are_refused(data, match):
    with pytest.raises(MisconfigurationException, match=match):
        train(data=data)


def test_what_else_chooses_the_data_is_refused():
    with pytest.raises(MisconfigurationException, match="Use `limit_train_batches` with this strategy"):
        train(overfit_batches=2)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (loader(batch_size=23), "A batch of 23 cannot be drawn from 22 samples"),
        (DataLoader(Numbered(), batch_size=None), "Independent batches need the size of a batch"),
    ],
)
def test_batches_that_cannot_be_drawn_independently_are_refused(data, match):
    with pytest.raises(MisconfigurationException, match=match):
        train("independent_batches", data)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "reshuffle"}, "`order` must be one of random_reshuffling, single_shuffle"),
        ({"order": None}, "`order` must be one of"),
        ({"order_seed": 1.5}, "`order_seed` must be an int or None, got 1.5"),
        ({"order_seed": True}, "`order_seed` must be an int or None, got True"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match):
    with pytest.raises(MisconfigurationException, match=match):
        SamplingOrderStrategy(**options)


def test_loaders_without_batches_have_an_order_too():
    module, _ = train("with_replacement", DataLoader(Numbered(), batch_size=None), max_epochs=1)
    assert module.samples(0) == expected("with_replacement", 0)


class Tagged(BatchSampler):
    """Takes one argument more, and sorts within the batch and the next one."""

    def __init__(self, sampler, batch_size, drop_last, tag="none"):
        super().__init__(sampler, batch_size, drop_last)
        self.tag = tag

    def __iter__(self):
        for batch in super().__iter__():
            yield [*batch, self.tag] if self.tag == "marked" else sorted(batch, reverse=self.tag == "down")


class Loads(pl.LightningDataModule):
    def train_dataloader(self):
        return tagged()


def tagged():
    return DataLoader(Numbered(), batch_sampler=Tagged(SequentialSampler(Numbered()), 4, drop_last=True, tag="down"))


@pytest.mark.parametrize("make", [tagged, Loads])
def test_batch_samplers_keep_their_arguments(tmp_path, make):
    module, trainer = train(data=make())
    for epoch in range(3):
        drawn = expected("random_reshuffling", epoch)[:20]
        assert module.samples(epoch) == list(chain(*(sorted(drawn[i : i + 4], reverse=True) for i in range(0, 20, 4))))
    assert trainer.train_dataloader.batch_sampler.tag == "down"
    resumes(tmp_path, "batch end", 7, make)


class Bare:
    def __iter__(self):
        return iter([[0, 1], [2, 3]])

    def __len__(self):
        return 2


class Greedy(BatchSampler):
    def __init__(self, sampler, batch_size, drop_last, more):
        super().__init__(sampler, batch_size, drop_last)


def test_batch_samplers_that_take_no_sampler_are_refused():
    with pytest.raises(MisconfigurationException, match="no sampler that can be replaced"):
        train(data=DataLoader(Numbered(), batch_sampler=Bare()))
    with pytest.raises(MisconfigurationException, match=r"must take `sampler`.*made in the `train_dataloader` hook"):
        train(data=DataLoader(Numbered(), batch_sampler=Greedy(SequentialSampler(Numbered()), 4, False, 1)))


def several(mode="max_size_cycle", **options):
    loaders = {"a": loader(14, **options), "b": loader(6, batch_size=3, **options), "c": loader(14, **options)}
    return CombinedLoader(loaders, mode)


@pytest.mark.parametrize("order", ["random_reshuffling", "with_replacement"])
def test_several_loaders_draw_each_for_itself(order):
    alone, _ = train(order, loader(14))
    module, _ = train(order, several())
    assert module.samples(0, 0) == alone.samples(0) != module.samples(0, 2)
    assert module.samples(1, 2) == expected(order, 1, 14, stream=2)
    first, second = module.samples(2, 1)[:6], module.samples(2, 1)[6:]
    assert first == expected(order, 2, 6, stream=1)
    assert first != second
    assert order == "with_replacement" or sorted(first) == sorted(second)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
@pytest.mark.parametrize("batches", [2, 3])
def test_several_loaders_go_on_where_they_stopped(tmp_path, mode, batches):
    after = batches + (2 if mode == "min_size" else 4) - (mode == "min_size") * 1
    resumes(tmp_path, "batch end", after, lambda: several(mode), order="with_replacement", max_epochs=4)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_goes_on_in_mid_epoch(tmp_path, order):
    resumes(tmp_path, "batch end", 9, order=order)


@pytest.mark.parametrize(
    ("hook", "batches"),
    [
        ("batch start", 9),
        ("batch end", 1),
        ("batch end", 6),  # the last batch of an epoch
        ("batch end", 18),  # of all
        ("epoch start", 6),
        ("epoch end", 6),
        ("epoch end", 18),
    ],
)
@pytest.mark.parametrize("options", [{}, {"max_steps": 18, "max_epochs": -1}], ids=["epochs", "steps"])
def test_a_run_goes_on_from_wherever_it_was_saved(tmp_path, hook, batches, options):
    resumes(tmp_path, hook, batches, **options)


@pytest.mark.parametrize(
    ("hook", "batches", "interval"),
    [
        ("validation end", 2, 2),
        ("validation end", 8, 2),
        ("validation end", 12, 2),
        ("validation end", 6, 1.0),
        ("batch end", 8, 2),
        ("batch end", 9, 2),
        ("batch end", 6, 1.0),
        ("epoch end", 6, 1.0),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_and_accumulation_do_not_disturb_that(tmp_path, hook, batches, interval, accumulate):
    if accumulate == 2 and batches == 9:  # within a step a part of its gradient would be lost, in whatever order
        batches = 10
    module = resumes(
        tmp_path,
        hook,
        batches,
        Validates,
        val_check_interval=interval,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=2,
    )
    assert module.validated


class Validates(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


@pytest.mark.parametrize("asks", [False, True], ids=["", "loaders asked for early"])
@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}], ids=["none", "two", "kept"]
)
def test_workers_do_not_run_ahead_of_that(tmp_path, workers, asks):
    resumes(tmp_path, "batch end", 9, lambda: loader(**workers), asks)


def test_workers_of_several_loaders_go_on_too(tmp_path):
    resumes(tmp_path, "batch end", 7, lambda: several(num_workers=1), asks=True)


@pytest.mark.parametrize("asks", [False, True])
def test_loaders_made_anew_each_epoch_go_on(tmp_path, asks):
    module = resumes(tmp_path, "batch end", 9, Validates, asks, reload_dataloaders_every_n_epochs=1)
    assert module.samples(2) == expected("random_reshuffling", 2)


def test_several_loaders_made_anew_keep_their_streams():
    module, _ = train(data=LoadsSeveral(), reload_dataloaders_every_n_epochs=1)
    kept, _ = train(data=several())
    assert module.seen == kept.seen


class LoadsSeveral(pl.LightningDataModule):
    def train_dataloader(self):
        return several()


@pytest.mark.parametrize("limit", [3, 0.5])
def test_a_limit_takes_the_first_batches_of_each_epoch(tmp_path, limit):
    module = resumes(tmp_path, "batch end", 5, limit_train_batches=limit)
    for epoch in range(3):
        assert module.samples(epoch) == expected("random_reshuffling", epoch)[:12]


def test_a_trial_takes_the_first_batch():
    assert train(fast_dev_run=True)[0].samples(0) == expected("random_reshuffling", 0)[:4]


def test_a_second_fit_goes_on_counting_epochs():
    module, trainer = train(max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert module.seen == train()[0].seen


def test_a_step_that_takes_batches_itself_gets_the_order():
    class Takes(Follows):
        def training_step(self, dataloader_iter):
            batch, number, _ = next(dataloader_iter)
            return super().training_step(batch, number)

    module = Takes()
    fit([], module, loader(), strategy=SamplingOrderStrategy(order_seed=5))
    assert [module.samples(epoch) for epoch in range(3)] == [
        expected("random_reshuffling", epoch) for epoch in range(3)
    ]


class Stateful(DataLoader):
    """Knows by itself where it stopped."""

    used, loaded = 0, 0

    def state_dict(self):
        return {"used": self.used}

    def load_state_dict(self, state):
        self.loaded = state["used"]

    def __iter__(self):
        skipped, self.loaded = self.loaded, 0
        for self.used, batch in enumerate(super().__iter__(), 1):
            if self.used > skipped:
                yield batch


@pytest.mark.parametrize("asks", [False, True])
def test_a_loader_with_its_own_state_is_left_to_it(tmp_path, asks):
    resumes(tmp_path, "batch end", 9, lambda: Stateful(Numbered(), 4), asks)


def test_loaders_set_up_outside_of_training_are_refused():
    class Early(pl.Callback):
        def on_sanity_check_start(self, trainer, pl_module):
            assert trainer.estimated_stepping_batches

    with pytest.raises(MisconfigurationException, match="set up while the Trainer was not training"):
        train(data=Validates(), callbacks=[Early()], num_sanity_val_steps=1)


def test_an_order_composes_with_any_strategy():
    module = Follows()
    fit([], module, loader(), strategy=compose_strategy(order="with_replacement", order_seed=5))
    assert module.samples(1) == expected("with_replacement", 1)


class Looks(pl.Callback):
    """What the monitors know of the order."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.order = sampling_order(trainer)
        self.source = MapStyleSource.of([trainer.train_dataloader], None, trainer.num_training_batches)


@pytest.mark.parametrize(
    ("order", "known", "replaces"),
    [
        ("random_reshuffling", "reshuffled", False),
        ("single_shuffle", None, False),
        ("incremental", None, False),
        ("with_replacement", "with_replacement", True),
        ("independent_batches", "with_replacement", False),
    ],
)
def test_monitors_know_the_order(order, known, replaces):
    looks = Looks()
    members = [2, 3, 5, 7, 11, 13, 17, 19]
    train(order, loader(sampler=SubsetRandomSampler(members), batch_size=2), [looks])
    assert looks.order == (known, 4)
    assert looks.source.replaces == replaces
    assert (
        list(looks.source.members) == members if order != "single_shuffle" else sorted(looks.source.members) == members
    )


@pytest.mark.parametrize("order", ORDERS)
def test_monitors_know_which_samples_a_limit_leaves(order):
    looks = Looks()
    module, _ = train(order, callbacks=[looks], limit_train_batches=2)
    used = {i for epoch in range(3) for i in module.samples(epoch)}
    assert used <= set(looks.source.members)
    assert len(looks.source.members) == (8 if order in ("single_shuffle", "incremental") else N)
    assert looks.order[0] == ("with_replacement" if order in ("with_replacement", "independent_batches") else None)


def test_a_monitor_leaves_a_run_in_an_order_as_it_was():
    monitor = GradientNoiseMonitor(every_n_train_steps=3, directions=1, probe=Probe(draws=4))
    without, measured = train("with_replacement")[0], train("with_replacement", callbacks=[monitor])[0]
    assert without.seen == measured.seen
    assert torch.equal(without.net.weight, measured.net.weight)
    assert len(monitor.history) > 2


def test_loaders_that_lightning_has_set_up_before_are_taken_again():
    """It writes what it has processed into the user's CombinedLoader."""
    both = CombinedLoader({"a": loader(), "b": loader(10, 2)}, "max_size_cycle")
    first, _ = train(data=both)
    second, _ = train(data=both)
    assert second.seen == first.seen

    class Keeps(pl.LightningDataModule):
        def train_dataloader(self):
            return both

    again, _ = train(data=Keeps(), reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert again.seen[: len(first.seen)] == first.seen[: len(again.seen)]
    once, _ = train(data=CombinedLoader({"a": loader(), "b": loader(10, 2)}, "max_size_cycle"), max_epochs=3)
    assert again.seen == once.seen


class Nested(BatchSampler):
    """Draws from a batch sampler of its own."""

    def __init__(self, sampler, batch_size, drop_last):
        super().__init__(sampler, batch_size, drop_last)
        self.inner = BatchSampler(sampler, batch_size, drop_last)
        self.lengths = [1, 2, 3]

    def __iter__(self):
        return iter(self.inner)


class Once(BatchSampler):
    """Makes its batches when it is made."""

    def __init__(self, sampler, batch_size, drop_last):
        super().__init__(sampler, batch_size, drop_last)
        self.made = list(super().__iter__())

    def __iter__(self):
        return iter(self.made)


def test_batch_samplers_that_hold_the_sampler_more_than_once():
    batches = Nested(RandomSampler(Numbered()), 4, False)
    module, _ = train("incremental", DataLoader(Numbered(), batch_sampler=batches))
    assert module.samples(0) == module.samples(1) == list(range(N))
    with pytest.raises(MisconfigurationException, match="Once makes its batches without asking its sampler"):
        train(data=DataLoader(Numbered(), batch_sampler=Once(SequentialSampler(Numbered()), 4, False)))


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on(tmp_path):
    options = {"max_epochs": -1, "enable_checkpointing": True}
    whole, _ = train(max_steps=9, **options)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    first, _ = train(callbacks=[keep], max_steps=3, **options)
    second, trainer = train(max_steps=9, ckpt_path=tmp_path / "last.ckpt", **options)
    assert first.seen + second.seen == whole.seen
    assert trainer.current_epoch == 2
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_sampler_that_repeats_samples_is_no_permutation():
    repeats = loader(sampler=RandomSampler(Numbered(), replacement=True))
    with pytest.raises(MisconfigurationException, match="leave out `RandomSampler"):
        train(data=repeats)
    assert train("with_replacement", repeats)[0].samples(0) == expected("with_replacement", 0)


def test_batches_of_many_epochs_are_not_drawn_twice():
    """A generator's seed has few bits: one generator for each batch would soon repeat some."""
    sampler = OrderSampler(range(1000), "independent_batches", 0, batch_size=10)
    seen = set()
    for epoch in range(200):
        sampler.begin(0, epoch, 0, 0)
        order = list(sampler)
        seen |= {tuple(order[start : start + 10]) for start in range(0, 1000, 10)}
    assert len(seen) == 200 * 100
