"""Every kind of module: measured rightly, refused with a cure, never altered."""

from __future__ import annotations

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from helpers.digest import digest
from helpers.state import same
from helpers.zoo import SAMPLES, ZOO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_dynamics import HessianMonitor, Probe

STEPS = 4
MEASURED = [name for name, species in ZOO.items() if species.options is not None]
REFUSED = [name for name, species in ZOO.items() if species.refused is not None]


class Watch(pl.Callback):
    """Keeps the first two batches, and counts steps."""

    def __init__(self):
        self.batches = []
        self.steps = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        if len(self.batches) < 2:
            self.batches.append(copy.deepcopy(batch))


def made(species):
    pl.seed_everything(5)
    return species.make()


def train(species, monitors, logger=False):
    module = made(species)
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=STEPS // 2,
        logger=logger,
        callbacks=[*species.callbacks(), *monitors, watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, None if species.data is None else species.data())
    return trainer, module, watch


# No trace


def every_kind_of_probe(species):
    kinds = {"subset": Probe(size=SAMPLES), "first": Probe(first_batches=2), "current": Probe(current_batch=True)}
    if not species.has_current:
        del kinds["current"]
    return [
        HessianMonitor(
            1, 0, every_n_train_steps=1 + i, probe=probe, pair=not i, tolerance=0.1, name=name, **species.options
        )
        for i, (name, probe) in enumerate(kinds.items())
    ]


@pytest.mark.parametrize("name", MEASURED)
def test_runs_end_as_without_monitors(name, tmp_path):
    species = ZOO[name]
    digests = []
    for folder, monitors in (("without", []), ("with", every_kind_of_probe(species))):
        torch.compiler.reset()
        trainer, module, _ = train(species, monitors, CSVLogger(tmp_path / folder, name="", version=""))
        digests.append(_real(digest(trainer, module, tmp_path / folder)))
    assert same(*digests) == []
    assert all(monitor.history for monitor in monitors)


def _real(thing):
    """What the comparison can compare: dense tensors, complex ones as pairs of numbers, no addresses of objects."""
    if isinstance(thing, dict):
        return {key: _real(member) for key, member in thing.items() if not str(key).endswith("_wrapper_id")}
    if not isinstance(thing, torch.Tensor):
        return thing
    dense = thing.to_dense() if thing.is_sparse else thing
    return torch.view_as_real(dense) if dense.is_complex() else dense


# The right numbers


@pytest.mark.parametrize("name", MEASURED)
def test_the_largest_eigenvalue_is_that_of_the_dense_hessian(name):
    species = ZOO[name]
    monitor = HessianMonitor(
        1, 0, every_n_train_steps=1, probe=species.probe, pair=False, tolerance=1e-4, **species.options
    )
    _, trained, watch = train(species, [monitor])
    torch.compiler.reset()
    module = made(species)
    module.configure_model()
    where = species.options.get("parameters", ".*")
    first, last = monitor.history[0], monitor.history[-1]
    assert (first.step, last.step) == (0, STEPS)
    assert first.scalars["hessian/top_1"] == pytest.approx(top_eigenvalue(species, module, watch.batches, where), 1e-3)
    if species.changes:
        expected = top_eigenvalue(species, trained, watch.batches, where)
        assert last.scalars["hessian/top_1"] == pytest.approx(expected, 1e-3)


def top_eigenvalue(species, module, batches, where):
    """Of the dense Hessian, by central differences of plain gradients in double precision."""
    _in_double_precision(module)
    batches = [_double(batch) for batch in batches]
    species.freeze(module, batches[0])
    parameters = [p for name, p in module.named_parameters() if p.requires_grad and re.fullmatch(where, name)]
    state = _state(module)

    def gradient():
        total = 0
        for batch in batches:
            for container, key, tensor in state:
                container[key] = tensor.clone() if not isinstance(tensor, nn.Parameter) else tensor
            for saved, tensor in frozen:
                tensor.data.copy_(saved)
            module.zero_grad()
            module.loss(batch).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total = total + torch.cat([_flat(grad) for grad in grads]) / len(batches)
        return total

    frozen = [(p.detach().clone(), p) for p in module.parameters() if not p.requires_grad]
    columns = []
    for parameter in parameters:
        coordinates = _flat(parameter.data)
        for i in range(len(coordinates)):
            ends = []
            for step in (1e-5, -2e-5):
                coordinates[i] += step
                ends.append(gradient())
            coordinates[i] += 1e-5
            columns.append((ends[0] - ends[1]) / 2e-5)
    hessian = torch.stack(columns)
    assert len(hessian) < 250
    assert (hessian - hessian.mT).norm() < 1e-5 * hessian.norm(), "the reference itself is no Hessian"
    return float(torch.linalg.eigvalsh((hessian + hessian.mT) / 2)[-1])


def _flat(tensor):
    """A view of the real coordinates."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)


def _in_double_precision(module):
    module.double()
    for parameter in module.parameters():
        if parameter.is_complex():
            parameter.data = parameter.data.to(torch.complex128)
    for container, key, tensor in _state(module):
        container[key] = _double(tensor)


def _state(module):
    """Buffers and tensors among the attributes, each with where it lies."""
    containers = [c for m in module.modules() for c in (vars(m), m._buffers)]
    return [(c, k, t) for c in containers for k, t in c.items() if isinstance(t, torch.Tensor) and not t.requires_grad]


def _double(thing):
    if isinstance(thing, torch.Tensor):
        return thing.double() if thing.is_floating_point() else thing
    if isinstance(thing, tuple):
        members = map(_double, thing)
        return type(thing)(*members) if hasattr(thing, "_fields") else tuple(members)
    if isinstance(thing, list):
        return [_double(member) for member in thing]
    other = copy.copy(thing)
    vars(other).update({key: _double(value) for key, value in vars(thing).items()})
    return other


# Refusals


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_with_the_cure(name):
    species = ZOO[name]
    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=species.probe)
    watch = Watch()
    with pytest.raises(MisconfigurationException, match=species.refused):
        train(species, [monitor, watch])
    assert watch.steps == 0
    assert monitor.history == []


def test_a_step_that_takes_an_iterator_has_no_current_batch():
    monitor = HessianMonitor(1, 0, every_n_train_steps=1, probe=Probe(current_batch=True))
    with pytest.raises(MisconfigurationException, match=r"iterator.*`first_batches`"):
        train(ZOO["a step that takes an iterator"], [monitor])
