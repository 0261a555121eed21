"""One measurement over all ranks: open the objective, measure on rank zero, tell everyone what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_dynamics.callbacks.joint import RankPart
from lightning_dynamics.callbacks.ranks import Interrupted, RankError, Ranks
from lightning_dynamics.objective.replay import Replay
from lightning_dynamics.objective.signals import DeferredSignals

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?_*(\w+?)(?:_backward)?'? is not implemented|double backward"
)


class AsymmetryError(ValueError):
    """A second derivative is not symmetric by more than rounding explains."""


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


Task = Callable[[Any], Any]
"""A function of what is measured on, with a small, picklable result."""


def measure_jointly(
    prepare: Callable[[], tuple[Replay, Sequence[Task]]],
    count: int,
    ranks: Ranks,
    kind: type[RankPart[Any]],
    vectors: int = 0,
    beat: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Run tasks on data that all ranks hold parts of. Called on every rank; never raises.

    Args:
        prepare: Makes this rank's part of the data, and the tasks. They run on rank zero only, in order; one that fails
            does not keep the others from running.
        count: Number of tasks.
        ranks: The ranks.
        kind: What is to be made of the data.
        vectors: Vectors of the size of the parameters that the tasks will hold, besides the gradient graphs.
        beat: Called on rank zero with 1 before every evaluation, with 0 before every batch of one.
    """
    shared: list[str] = []
    with DeferredSignals() as signals, ExitStack() as stack:
        part = kind(ranks, None)
        failure: Failure | None = None
        try:
            replay, tasks = prepare()
            if ranks.leads:
                replay.begins = partial(beat, 0)
            part.local = stack.enter_context(kind.open(replay))
        except Exception as error:
            failure = explain(error)
        if not ranks.leads:
            return part.serve()  # type: ignore[no-any-return]
        results: list[Any] = [failure] * count
        try:
            if part.local is not None:
                results = _run(part, tasks, signals, vectors, beat)
                shared = sorted(replay.shared)
        finally:
            outcome = part.end(Outcome(results, shared))
    return outcome  # type: ignore[no-any-return]


def _run(
    part: RankPart[Any], tasks: Sequence[Task], signals: DeferredSignals, vectors: int, beat: Callable[[int], None]
) -> list[Any]:
    def interrupted() -> bool:
        beat(1)
        return signals.pending

    results: list[Any] = []
    subject: Any = None
    for task in tasks:
        try:
            if subject is None:
                subject = part.subject(interrupted, vectors)
            results.append(task(subject))
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
