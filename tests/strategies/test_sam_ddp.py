"""SAM on two processes: each perturbs by itself, or both by the mean; the weights stay equal to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import sharded_sam
from helpers.fit import fit
from helpers.sharp import RHO, Sharp, data, inner, network, optimizer_of, same, total
from torch.multiprocessing import ProcessRaisedException
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dynamics import DDPSAMStrategy, SAMStrategy

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.ddp, pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")]


class Gathers(pl.Callback):
    """After every step, whether the weights are equal on both ranks; at the end rank zero's in a file."""

    def __init__(self, path):
        self.path, self.equal = path, True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        both = trainer.strategy.all_gather(weights)
        self.equal &= torch.equal(both[0], both[1])

    def on_train_end(self, trainer, pl_module):
        buffers = (
            trainer.strategy.all_gather(pl_module.net[1].running_mean) if len(pl_module.net.state_dict()) > 4 else 0
        )
        if trainer.is_global_zero:
            net = {k: v.clone() for k, v in pl_module.net.state_dict().items()}
            torch.save(
                {
                    "net": net,
                    "equal": self.equal,
                    "buffers": buffers,
                    "calls": pl_module.calls,
                    "cosine": (step := trainer.strategy.last_step) and step.gradient_cosine,
                },
                self.path,
            )


def two(path, module=None, *, strategy=None, accumulate=1, epochs=2, **options):
    """Fit on two processes; what rank zero ends with."""
    strategy = strategy or DDPSAMStrategy(rho=RHO, start_method="fork", timeout=timedelta(seconds=60), **options)
    fit(
        [Gathers(path)],
        Sharp(norm=False) if module is None else module,
        DataLoader(TensorDataset(*data()), 8),
        strategy=strategy,
        devices=2,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
    )
    return torch.load(path, weights_only=True)


def by_hand(perturbation, accumulate=1, epochs=2, every_k=1, variant="sam", m=None):
    """The same on one process: ranks take turns with the samples, as Lightning's sampler deals them."""
    net = network(norm=False)
    optimizer = optimizer_of(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    parameters = list(net.parameters())
    orthogonal, step = None, 0

    def gradient(batches):
        losses = [F.cross_entropy(net(x), y) for x, y in batches]
        return torch.autograd.grad(sum(losses) / len(losses), parameters)

    def mean(several):
        return [sum(g) / len(several) for g in zip(*several, strict=True)]

    def sharp(batches, first):
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(g, alpha=RHO / total(first))
        second = gradient(batches)
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)
        return second

    for epoch in range(epochs):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).tolist()
        ranks = [[t[order[rank::2]].split(8) for t in data()] for rank in range(2)]
        ranks = [list(zip(*batches, strict=True)) for batches in ranks]
        for start in range(0, 3, accumulate):
            windows = [batches[start : start + accumulate] for batches in ranks]
            share = len(windows[0]) / accumulate  # Lightning divides by the number asked for
            if m:
                parts = [
                    [part for x, y in window for part in zip(x.split(m), y.split(m), strict=True)] for window in windows
                ]
                second = mean([mean([sharp([part], gradient([part])) for part in of_rank]) for of_rank in parts])
            elif step % every_k == 0:
                firsts = [gradient(window) for window in windows]
                first = mean(firsts)
                own = firsts if perturbation == "per_rank" else [first, first]
                second = mean([sharp(window, g) for window, g in zip(windows, own, strict=True)])
                if variant == "gsam":
                    part = inner(first, second) / inner(second, second)
                    second = [s - 0.4 * (g - part * s) for g, s in zip(first, second, strict=True)]
                if every_k > 1:
                    part = inner(second, first) / inner(first, first)
                    orthogonal = [s - part * g for g, s in zip(first, second, strict=True)]
            else:
                first = mean([gradient(window) for window in windows])
                factor = 0.7 * total(first) / total(orthogonal)
                second = [g + factor * v for g, v in zip(first, orthogonal, strict=True)]
            for p, g in zip(parameters, second, strict=True):
                p.grad = g * share
            optimizer.step()
            scheduler.step()
            step += 1
    return net


def distance(found, net):
    return max(float((found["net"][k] - v).abs().max()) for k, v in net.state_dict().items())


@pytest.mark.parametrize("perturbation", ["per_rank", "global"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"variant": "gsam"}, {"every_k": 2}], ids=str)
def test_both_kinds_of_perturbation(tmp_path, perturbation, options):
    found = two(tmp_path / "found.pt", perturbation=perturbation, **options)
    other = {"per_rank": "global", "global": "per_rank"}[perturbation]
    assert found["equal"]
    assert distance(found, by_hand(perturbation, **options)) < 1e-6
    assert distance(found, by_hand(other, **options)) > 1e-4


def test_parts_of_each_ranks_batch(tmp_path):
    found = two(tmp_path / "found.pt", m=4)
    assert found["equal"]
    assert distance(found, by_hand("per_rank", m=4)) < 1e-6
    assert distance(found, by_hand("per_rank")) > 1e-4


@pytest.mark.parametrize("options", [{}, {"m": 4}, {"perturbation": "global"}], ids=str)
def test_the_cosine_is_of_mean_gradients(tmp_path, options):
    """With next to no perturbation it is 1, however different the ranks' own gradients are."""
    strategy = DDPSAMStrategy(rho=1e-6, start_method="fork", timeout=timedelta(seconds=60), **options)
    strategy.observed = True
    assert two(tmp_path / "found.pt", strategy=strategy)["cosine"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "perturbation": "global"},
        {"find_unused_parameters": True},
    ],
    ids=str,
)
def test_options_of_the_base_strategy(tmp_path, options):
    found = two(tmp_path / "found.pt", variant="gsam", **options)
    assert distance(found, by_hand(options.get("perturbation", "per_rank"), variant="gsam")) < 1e-6


def test_a_static_graph_must_be_synchronized_at_once(tmp_path):
    with pytest.raises(ProcessRaisedException, match="use `perturbation='global'`"):
        two(tmp_path / "found.pt", static_graph=True)


@pytest.mark.parametrize("perturbation", ["per_rank", "global"])
def test_batch_norm_has_seen_each_batch_once(tmp_path, perturbation):
    """On both ranks, whose statistics differ until the next step sends those of rank zero."""
    sharp = two(tmp_path / "sharp.pt", Sharp(), epochs=1, perturbation=perturbation)
    assert sharp["net"]["1.num_batches_tracked"] == 3
    assert sharp["calls"] == 3
    assert not torch.equal(sharp["buffers"][0], sharp["buffers"][1])


class Spoils(Sharp):
    """Its loss is not finite in one batch of one rank."""

    def __init__(self):
        super().__init__(norm=False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (float("inf") if self.global_rank and batch_idx == 1 else 1)


@pytest.mark.parametrize("options", [{}, {"m": 4}, {"perturbation": "global"}], ids=str)
def test_a_loss_that_is_not_finite_on_one_rank_hangs_nobody(tmp_path, options):
    found = two(tmp_path / "found.pt", Spoils(), epochs=1, **options)
    assert not any(value.isfinite().any() for value in found["net"].values())


def test_one_process_is_the_single_device(tmp_path):
    single, alone = Sharp(), Sharp()
    for module, strategy in (
        (single, SAMStrategy(rho=RHO)),
        (alone, DDPSAMStrategy(rho=RHO, start_method="fork", timeout=timedelta(seconds=60))),
    ):
        torch.manual_seed(1)
        options = {"strategy": strategy, "devices": 1, "max_epochs": 2, "use_distributed_sampler": False}
        fit([], module, DataLoader(TensorDataset(*data()), 8), **options)
    assert same(single.net, alone.net)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="sharding on the CPU needs a newer PyTorch")
@pytest.mark.parametrize("variant", [pytest.param("asam", marks=pytest.mark.slow), "gsam"])
def test_weights_that_are_sharded_over_processes(tmp_path, variant):
    """As on one process with both processes' samples in a batch."""
    sharded_sam.main(tmp_path, "1", variant)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(TESTS / "helpers" / "sharded_sam.py"), tmp_path, "2", variant],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (one, length), (both, same_length) = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, both, strict=True))
    assert length == pytest.approx(same_length)
