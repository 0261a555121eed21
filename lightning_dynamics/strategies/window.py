"""The batches that make an optimizer step, and how to evaluate them a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_dynamics import _compat
from lightning_dynamics.objective.copies import private_copy
from lightning_dynamics.objective.randomness import RandomState, fork_rng
from lightning_dynamics.objective.rerun import Rerun
from lightning_dynamics.objective.signals import DeferredSignals

_WRITES = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize", "after_save_checkpoint")


@dataclass
class Batch:
    """A batch of the window.

    Attributes:
        arguments: Of ``training_step``: copies, since the step may write into them.
        number: Number of the batch in its epoch.
        random: Where the generators stood when the step began.
    """

    arguments: tuple[Any, ...]
    number: int
    random: RandomState | None = None


class Window:
    """The batches that make an optimizer step, as they came, and the state of the module before the first of them.

    Args:
        trainer: The Trainer.
        module: Its module, not wrapped.
        same_noise: Whether a second evaluation draws the random numbers of the first.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, same_noise: bool) -> None:
        self.trainer = trainer
        self.module = module
        self.batches: list[Batch] = []
        self._same_noise = same_noise
        self._rerun = Rerun(module)
        self._has_told = False

    def close(self) -> None:
        """Forget the batches."""
        self.batches = []
        self._rerun.forget()

    def run(self, step: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run the module's step on its next batch, and add the batch unless the step skips it."""
        try:
            copies = private_copy(arguments)
        except Exception as error:
            raise MisconfigurationException(
                f"SAM keeps a copy of each batch, since a step may write into it; this one cannot be "
                f"copied ({type(error).__name__}: {error}). Let its class define `__deepcopy__`."
            ) from error
        batch = Batch(copies, _compat.batch_number(self.trainer))
        # noted where the module's own code begins: a wrapper sends buffers first, and may move the batch
        with _first(self.module, "training_step", lambda: self._note(batch)):
            output = step(*arguments)
        if output is not None:
            self.batches.append(batch)
        return output

    def begin(self) -> None:
        """A closure is about to be called, which is evaluated again as a whole."""
        batch = Batch((), _compat.batch_number(self.trainer))
        self._note(batch)
        self.batches.append(batch)

    @contextmanager
    def rerunning(self, optimizer: Optimizer, model: nn.Module | None) -> Iterator[None]:
        """With the module as it was before the window, so that evaluations leave gradients and nothing else.

        Args:
            optimizer: The optimizer, whose parameters keep what ``.grad`` they get; all others keep their own.
            model: What wraps the module, if anything.
        """
        own = {id(parameter) for parameter in parameters_of(optimizer)}
        others = [(p, None if p.grad is None else p.grad.clone()) for p in self.module.parameters() if id(p) not in own]
        with ExitStack() as stack:
            stack.enter_context(DeferredSignals())  # a handler may save a checkpoint
            if self._same_noise:
                stack.enter_context(fork_rng())
            stack.enter_context(self._rerun.again())
            for submodule in self.module.modules():
                if isinstance(submodule, LightningModule):
                    vars(submodule).update(dict.fromkeys(("log", "log_dict", "print"), _nothing))
            loggers = [_silent(logger) for logger in self.trainer.loggers]
            stack.enter_context(_attribute(self.trainer, _compat.LOGGERS, loggers))
            stack.enter_context(_compat.other_results(self.trainer))
            if isinstance(model, DistributedDataParallel):  # what was sent the first time need not be sent again
                stack.enter_context(_attribute(model, "broadcast_buffers", False))
            try:
                for parameter, _ in others:
                    parameter.grad = None
                yield
            finally:
                for parameter, gradient in others:
                    parameter.grad = gradient

    def _note(self, batch: Batch) -> None:
        if not self._rerun.is_marked:
            optimizers, wrapped = _compat.optimizer_lists(self.trainer)
            schedulers = [config.scheduler for config in self.trainer.strategy.lr_scheduler_configs]
            kept = [*_compat.parts(self.trainer), *_compat.callbacks(self.trainer), *self.trainer.loggers]
            trained = [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]
            self._rerun.mark(trained, [*kept, *optimizers, *wrapped, *schedulers])
            if self._rerun.shared and not self._has_told:
                self._has_told = True
                rank_zero_warn(
                    "SAM runs the step twice, and shares between the two what it cannot copy: "
                    f"{', '.join(sorted(self._rerun.shared))}."
                )
        if self._same_noise:
            batch.random = RandomState()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _attribute(owner: object, name: str, value: Any) -> Iterator[None]:
    """With an attribute of an object at another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _first(owner: object, name: str, action: Callable[[], None]) -> Iterator[None]:
    """With a method of an object that does something first, once, and is itself again by then."""
    attributes = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    method = getattr(owner, name)

    def put_back() -> None:
        attributes.pop(name, None)
        attributes.update(before)

    def act_first(*args: Any, **kwargs: Any) -> Any:
        put_back()
        action()
        return method(*args, **kwargs)

    attributes[name] = act_first
    try:
        yield
    finally:
        if attributes.get(name) is act_first:
            put_back()


@cache
def _silenced(kind: type[Logger]) -> type[Logger]:
    """The class of a logger without everything that writes."""
    silent: dict[str, Any] = dict.fromkeys(_WRITES, _nothing)
    return type(kind.__name__, (kind,), {**silent, "experiment": property(lambda _: _compat.DummyLogger().experiment)})


def _silent(logger: Logger) -> Logger:
    """A logger that knows its folder and its name, and writes nothing."""
    silent = object.__new__(_silenced(type(logger)))
    vars(silent).update(vars(logger))
    return silent


def _nothing(*_: Any, **__: Any) -> None:
    pass
