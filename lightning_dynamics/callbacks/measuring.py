"""One measurement over all ranks: open the objective, measure on rank zero, tell everyone what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_dynamics.callbacks.checks import AsymmetryError
from lightning_dynamics.callbacks.ranks import Interrupted, JointLinearization, RankError, Ranks
from lightning_dynamics.callbacks.signals import DeferredSignals
from lightning_dynamics.objective import HessianOperator, Linearization, Objective

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward)?'? is not implemented|double backward"
)


@dataclass(frozen=True)
class Failure:
    """Why there is no result, on every rank.

    Attributes:
        reason: In words.
        is_weather: Whether it is nobody's mistake (memory, numbers that are not finite, a signal, another rank).
        is_asymmetry: Whether the symmetry test failed.
    """

    reason: str
    is_weather: bool
    is_asymmetry: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement, the same on every rank.

    Attributes:
        results: One result per task, each a value or a :class:`Failure`.
        shared: Attributes of the module that the evaluation shared with it instead of copying them.
    """

    results: list[Any]
    shared: list[str]


Task = Callable[[HessianOperator], Any]


def measure_jointly(
    prepare: Callable[[], tuple[Objective, Sequence[Task]]], count: int, ranks: Ranks, vectors: int = 0
) -> Outcome:
    """Run tasks on the Hessian of an objective that all ranks hold parts of. Called on every rank; never raises.

    Args:
        prepare: Makes this rank's part of the objective, and the tasks: functions of the Hessian with small, picklable
            results. They run on rank zero only, in order; one that fails does not keep the others from running.
        count: Number of tasks.
        ranks: The ranks.
        vectors: Vectors of the size of the parameters that the tasks will hold, besides the gradient graphs.
    """
    shared: list[str] = []
    with DeferredSignals() as signals, ExitStack() as stack:
        local: Linearization | None = None
        failure: Failure | None = None
        try:
            objective, tasks = prepare()
            local = stack.enter_context(objective.linearize())
        except Exception as error:
            failure = explain(error)
        if not ranks.leads:
            return ranks.serve(local)  # type: ignore[no-any-return]
        results: list[Any] = [failure] * count
        try:
            if local is not None:
                results = _run(local, tasks, ranks, signals, vectors)
                shared = sorted(objective.shared)
        finally:
            outcome = ranks.end(Outcome(results, shared))
    return outcome  # type: ignore[no-any-return]


def _run(
    local: Linearization, tasks: Sequence[Task], ranks: Ranks, signals: DeferredSignals, vectors: int
) -> list[Any]:
    results: list[Any] = []
    hessian: HessianOperator | None = None
    for task in tasks:
        try:
            if hessian is None:
                reserve = vectors * local.size * local.dtype.itemsize
                hessian = HessianOperator(JointLinearization(local, ranks, lambda: signals.pending), reserve=reserve)
            results.append(task(hessian))
        except Exception as error:
            results.append(explain(error))
    return results


def explain(error: BaseException) -> Failure:
    """What an exception means to a user: a mistake with its cure, or weather."""
    if isinstance(error, Interrupted):
        return Failure(str(error), is_weather=True)
    if is_oom_error(error) or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        if torch.cuda.is_available():
            garbage_collection_cuda()
        return Failure(f"out of memory ({_first_line(error)})", is_weather=True)
    if isinstance(error, (RankError, FloatingPointError)):
        return Failure(str(error), is_weather=True)
    if isinstance(error, ValueError):
        return Failure(str(error), is_weather=False, is_asymmetry=isinstance(error, AsymmetryError))
    text = _first_line(error)
    missing = _NO_SECOND_DERIVATIVE.search(str(error))
    if missing:
        operation = f"`{missing[1]}`" if missing[1] else "An operation of the step"
        return Failure(
            f"{operation} has no second derivative in PyTorch ({text}). Use an implementation that is composed of "
            "differentiable operations, or measure another loss with `loss_fn=`.",
            is_weather=False,
        )
    return Failure(f"{type(error).__name__}: {text}", is_weather=False)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
