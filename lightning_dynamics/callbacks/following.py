"""What a monitor does at every step, besides measuring at some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_dynamics.callbacks.measured import When
from lightning_dynamics.callbacks.ranks import Ranks


class Follower(ABC):
    """Follows training step by step. Every method is called on every rank; nothing of the run is ever changed.

    At each step :meth:`observe`. Where a point is due, or :meth:`demands` one, ranks then agree: rank zero's
    :meth:`proposal` counts for all, and each takes its reading in :meth:`tell`. A follower that fails is left out for
    the rest of the fit, on all ranks.
    """

    @abstractmethod
    def start(
        self,
        trainer: Trainer,
        module: LightningModule,
        ranks: Ranks,
        goes_on: bool,
        restored: Mapping[str, Any] | None,
        notify: Callable[[str], None],
    ) -> None:
        """A fit begins.

        Args:
            trainer: The Trainer.
            module: Its module, not wrapped.
            ranks: The ranks.
            goes_on: Whether it goes on with an earlier fit of the Trainer.
            restored: What :meth:`state_dict` had given to the checkpoint that the fit goes on from.
            notify: How to speak to the user.
        """

    @abstractmethod
    def demands(self, when: When) -> bool:
        """Whether a point has to be measured at this step, in detail, although none is due; the same on all ranks."""

    @abstractmethod
    def observe(self, when: When) -> None:
        """Read the weights of a step."""

    @abstractmethod
    def proposal(self) -> Any:
        """What rank zero would have all ranks do at this point: something small."""

    @abstractmethod
    def tell(self, when: When, agreed: Any) -> bool:
        """Do what was agreed and take a reading for the measurement at this step.

        Args:
            when: The step.
            agreed: Rank zero's proposal.

        Returns:
            Whether the point shall be measured in detail.
        """

    @abstractmethod
    def batch_ends(self, outputs: Any) -> None:
        """A batch has been used; ``outputs`` is what Lightning hands to callbacks."""

    @abstractmethod
    def optimizer_steps(self, optimizer: Optimizer, is_due_next: bool) -> None:
        """Gradients are complete, and not yet clipped.

        Args:
            optimizer: Whose.
            is_due_next: Whether a point is measured after the step.
        """

    @abstractmethod
    def stop(self) -> None:
        """The fit is over: let go of Trainer and module."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after a resume, in plain containers and tensors; nobody waits for another rank."""
