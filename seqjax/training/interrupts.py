"""Requests to stop: Ctrl-C, and the SIGTERM that precedes preemption."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted in `received` instead of ending the process.

    A second one acts as it did before: whoever cannot wait for the checkpoint presses Ctrl-C again. Outside the main
    thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.received: str | None = None
        self._signals = signals
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()
