"""Features of which every rank holds a part: what is accumulated over them is summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_dynamics.callbacks.joint import RankPart, make_way
from lightning_dynamics.objective import FeatureBatch, FeaturePlan, FeatureReader, Features

_ASK, _ACCUMULATE = 1, 2

Answer = TypeVar("Answer")


class Accumulator(Protocol):
    """Something that grows with every batch, and is the sum of what grows elsewhere. Can be pickled."""

    def update(self, batch: FeatureBatch) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


Some = TypeVar("Some", bound=Accumulator)


class FeaturesPart(RankPart[FeatureReader]):
    """A rank's part of the features of a network."""

    @staticmethod
    def open(features: Features) -> AbstractContextManager[FeatureReader]:
        return features.open()

    def subject(self, interrupted: Callable[[], bool], vectors: int) -> JointFeatures:
        return JointFeatures(self, interrupted)

    def carry_out(self, code: int, numbers: list[int]) -> BaseException | None:
        if code == _ASK:
            return self.ask(self.ranks.share(None))[1]
        return self.accumulate(*self.ranks.share(None))

    def ask(self, question: Callable[[FeatureReader], Any]) -> tuple[list[Any], BaseException | None]:
        """Every rank's answer, None from one that failed; and what failed here."""
        answer, error = None, None
        try:
            assert self.local is not None
            answer = question(self.local)
        except Exception as caught:
            error = caught
        return self.ranks.gather((answer, error is not None)), error

    def accumulate(self, into: Accumulator, plan: FeaturePlan, part: str) -> BaseException | None:
        """Accumulate this rank's batches; on rank zero the sum over ranks, if none has failed."""
        state: dict[str, Tensor] = {}
        error: BaseException | None = None
        try:
            assert self.local is not None
            for batch in self.local.read(plan, part):
                into.update(batch)
            state = into.state()
        except Exception as caught:
            error = caught
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        keeps = self.local is not None and self.local.keeps(part)
        verdicts = self.ranks.gather((_misuse(error), error is not None, shapes, keeps))
        failures = sum(failed for _, failed, _, _ in verdicts)
        differ = any(others != verdicts[0][2] for _, _, others, _ in verdicts)
        if self.local is not None and not all(keeps for *_, keeps in verdicts):
            # a forward pass that communicates has to run on all ranks or on none
            self.local.forget(part)
        if not failures and not differ:
            into.load({name: self.ranks.sum(tensor) for name, tensor in state.items()})
        if self.ranks.leads:
            self.check(failures, error or next((said for said, *_ in verdicts if said is not None), None))
            if differ:
                raise ValueError(
                    "The ranks' features have different sizes. Use samples of one size, or `reduce='pool'`."
                )
        return error


def _misuse(error: BaseException | None) -> ValueError | None:
    """What every rank should know of an error: a mistake with its cure, wherever it was noticed."""
    return ValueError(str(error)) if isinstance(error, ValueError) else None


class JointFeatures:
    """The features of a network over all ranks, as rank zero sees them.

    Args:
        part: Rank zero's own part.
        interrupted: Whether to make way, asked before every pass.
    """

    def __init__(self, part: FeaturesPart, interrupted: Callable[[], bool]) -> None:
        assert part.local is not None
        self._part = part
        self._interrupted = interrupted

    @property
    def local(self) -> FeatureReader:
        """Rank zero's own features."""
        assert self._part.local is not None
        return self._part.local

    def ask(self, question: Callable[[FeatureReader], Answer]) -> list[Answer]:
        """Every rank's answer to a question that can be pickled."""
        make_way(self._interrupted)
        self._part.command(_ASK)
        answers, error = self._part.ask(self._part.ranks.share(question))
        self._part.check(sum(failed for _, failed in answers), error)
        return [answer for answer, _ in answers]

    def accumulate(self, into: Some, plan: FeaturePlan, part: str) -> Some:
        """The same accumulator after all batches of a part, of all ranks."""
        make_way(self._interrupted)
        self._part.command(_ACCUMULATE)
        self._part.ranks.share((into, plan, part))
        self._part.accumulate(into, plan, part)
        return into
