"""Seeds that all ranks share, and generators made of them."""

from __future__ import annotations

import os
from typing import Literal

import torch
from lightning.pytorch.strategies import Strategy

from lightning_dynamics.objective.randomness import stream_seed

_PURPOSES = {"order": 1, "noise": 2}


def shared_seed(strategy: Strategy, given: int | None) -> int:
    """The seed given, else that of ``seed_everything``, else 0: rank zero's, where ranks have seeds of their own.

    To be called on every rank.
    """
    return int(strategy.broadcast(int(os.environ.get("PL_GLOBAL_SEED", 0)) if given is None else given))


def generator_of(purpose: Literal["order", "noise"], *key: int) -> torch.Generator:
    """A generator that depends on the key alone, and on what it is for."""
    return torch.Generator().manual_seed(stream_seed(_PURPOSES[purpose], *key))
