"""What is said to the user, once each, on rank zero."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class Notices:
    """Says each thing once for as long as it lives."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_info(text)

    def warn(self, kind: str, text: str) -> None:
        """Warn once about things of this kind."""
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_warn(text, stacklevel=2)
