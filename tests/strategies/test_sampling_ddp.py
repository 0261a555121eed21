"""An order on two processes: one global order, whatever the loader, and after a resume."""

from __future__ import annotations

from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from helpers.fit import fit
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler

from lightning_dynamics import compose_strategy
from lightning_dynamics.callbacks.map_style import MapStyleSource
from lightning_dynamics.callbacks.optimization import sampling_order
from lightning_dynamics.strategies.order import ORDERS, OrderSampler

pytestmark = pytest.mark.ddp

N = 22


class Numbered(Dataset):
    def __init__(self, n=N):
        self.x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], i


class Follows(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        x, i = batch
        self.seen.append((self.current_epoch, batch_idx, i.tolist()))
        return (self.net(x) - i[:, None] / N).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[1].tolist())

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0  # sets up the loaders before the run is restored
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Report(pl.Callback):
    """What each rank saw, brought home by rank zero, and a checkpoint on the way."""

    def __init__(self, folder, batches=None):
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(pl_module.seen) == self.batches:
            trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_end(self, trainer, pl_module):
        source = MapStyleSource.of([trainer.train_dataloader], None, trainer.num_training_batches)
        mine = {
            "seen": pl_module.seen,
            "validated": pl_module.validated[-2:],
            "weights": torch.cat([p.detach().flatten() for p in pl_module.parameters()]),
            "order": sampling_order(trainer),
            "members": sorted(source.members),
            "replaces": source.replaces,
        }
        everyone = [None] * trainer.world_size
        dist.all_gather_object(everyone, mine)
        if trainer.is_global_zero:
            torch.save(everyone, self.folder / "report.pt")


def two(order):
    return compose_strategy("ddp_fork", order=order, timeout=timedelta(seconds=60))


def train(folder, order, data, batches=None, **options):
    folder.mkdir(exist_ok=True)
    options = {"devices": 2, "strategy": two({"order": order, "order_seed": 5}), "max_epochs": 2, **options}
    fit(Report(folder, batches), Follows(), data, **options)
    return torch.load(folder / "report.pt", weights_only=False)


class Data(pl.LightningDataModule):
    def __init__(self, **options):
        super().__init__()
        self.options = {"batch_size": 3, "shuffle": True, **options}

    def train_dataloader(self):
        return DataLoader(Numbered(), **self.options)

    def val_dataloader(self):
        return DataLoader(Numbered(12), 3)


@pytest.mark.parametrize("order", ORDERS)
def test_two_ranks_draw_as_one_process_and_go_on_where_they_stopped(tmp_path, order):
    ranks = train(tmp_path, order, Data(), batches=6)
    for epoch in range(2):
        sampler = OrderSampler(range(N), order, 5, batch_size=6)
        sampler.set_epoch(epoch)
        whole = list(sampler)
        steps = zip(*([i for e, _, i in one["seen"] if e == epoch] for one in ranks), strict=True)
        blocks = [whole[start : start + 6] for start in range(0, N, 6)]
        assert [sorted(first + second) for first, second in steps] == [sorted(block) for block in blocks]
    for rank, one in enumerate(ranks):
        assert sorted(i for batch in one["validated"] for i in batch) == list(range(rank, 12, 2))
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    known = {"random_reshuffling": "reshuffled", "with_replacement": "with_replacement"}
    known["independent_batches"] = "with_replacement"
    for one in ranks:
        assert one["order"] == (known.get(order), 4)
        assert one["members"] == list(range(N))
        assert one["replaces"] == (order == "with_replacement")

    again = train(tmp_path / "again", order, Data(num_workers=1), ckpt_path=tmp_path / "saved.ckpt")
    for one, other in zip(ranks, again, strict=True):
        assert other["seen"] == one["seen"][6:]
        assert torch.equal(other["weights"], one["weights"])


def test_ranks_share_a_part_of_the_data_and_are_padded_from_its_start(tmp_path):
    members = [4, 8, 15, 16, 21]
    data = DataLoader(Numbered(), 2, sampler=SubsetRandomSampler(members))
    ranks = train(tmp_path, "random_reshuffling", data, limit_val_batches=0)
    sampler = OrderSampler(members, "random_reshuffling", 5)
    samples = [[i for epoch, _, batch in one["seen"] if epoch == 0 for i in batch] for one in ranks]
    together = [i for pair in zip(*samples, strict=True) for i in pair]
    assert together == [*sampler, next(iter(sampler))]


def test_ranks_that_may_have_their_own_samples_are_refused():
    with pytest.raises(ProcessRaisedException, match="give every process all samples"):
        fit([], Follows(), Data(), devices=2, strategy=two("incremental"), use_distributed_sampler=False)


class SeedsOfItsOwn(Follows):
    """Seeds each rank differently, as some do for their augmentation."""

    def setup(self, stage):
        pl.seed_everything(7 + self.global_rank, verbose=False)


def test_ranks_with_seeds_of_their_own_share_one_order(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    tmp_path.mkdir(exist_ok=True)
    fit([Report(tmp_path)], SeedsOfItsOwn(), Data(), devices=2, strategy=two("random_reshuffling"), max_epochs=1)
    ranks = torch.load(tmp_path / "report.pt", weights_only=False)
    assert sorted(i for one in ranks for _, _, batch in one["seen"] for i in batch) == list(range(N))
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_batches_of_all_ranks_must_fit_into_the_data():
    with pytest.raises(
        ProcessRaisedException,
        match="MisconfigurationException: A batch of 12 on each of 2 ranks cannot be drawn from 22",
    ):
        fit([], Follows(), Data(batch_size=12), devices=2, strategy=two("independent_batches"))


def test_lightning_itself_reshuffles_what_is_not_to_be_shuffled(tmp_path):
    """The trap that an incremental order avoids; the docs speak of it."""
    options = {"strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=60))}

    class Seen(Report):
        def on_train_end(self, trainer, pl_module):
            torch.save(pl_module.seen, self.folder / f"{trainer.global_rank}.pt")

    fit(Seen(tmp_path), Follows(), Data(shuffle=False), devices=2, max_epochs=1, **options)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [i for _, _, batch in ranks[0] for i in batch] != list(range(0, N, 2))
