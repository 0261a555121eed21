"""Signals wait until the originals are back: a handler that saves a checkpoint must save the real weights."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_DEFERRED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


class DeferredSignals:
    """While the context is open, signals with Python handlers are noted; on leaving, their handlers run, in order.

    The work inside should look at :attr:`pending` now and then and stop early: who sends SIGTERM gives little time.
    Signals without a Python handler (the system's default action) are left alone. Off the main thread this does
    nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._noted: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a signal is waiting."""
        return bool(self._noted)

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for name in _DEFERRED:
                number = getattr(signal, name, None)
                if number is not None and callable(handler := signal.getsignal(number)):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        handlers, noted = self._handlers, self._noted
        self._handlers, self._noted = {}, []
        for number in noted:
            handlers[number](number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)
