"""Features of which every rank holds a part: what is accumulated over them is summed over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from lightning_dynamics.callbacks.joint import Accumulator, RankPart, make_way
from lightning_dynamics.objective import FeatureBatch, FeaturePlan, FeatureReader, Features

_ASK, _ACCUMULATE = 1, 2

Answer = TypeVar("Answer")


class FeatureSums(Accumulator, Protocol):
    """Something that grows with every batch of features."""

    def update(self, batch: FeatureBatch) -> None: ...


Some = TypeVar("Some", bound=FeatureSums)


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

    def accumulate(self, into: FeatureSums, plan: FeaturePlan, part: str) -> BaseException | None:
        """Accumulate this rank's batches; on rank zero the sum over ranks, if none has failed."""
        local = self.local

        def read(reader: FeatureReader) -> None:
            for batch in reader.read(plan, part):
                into.update(batch)

        def heeded(keeps: list[bool]) -> None:
            if local is not None and not all(keeps):
                # a forward pass that communicates has to run on all ranks or on none
                local.forget(part)

        return self.summed(into, read, lambda: local is not None and local.keeps(part), heeded)


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
