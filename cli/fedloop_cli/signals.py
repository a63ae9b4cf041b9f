"""Ending a command that runs until it is interrupted: the first Ctrl-C or SIGTERM lets it finish its step, the second ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Set by a signal; `interrupted` if it was Ctrl-C."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.interrupted = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it, the first signal sets the event; another one raises `KeyboardInterrupt`."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.event.is_set():
            raise KeyboardInterrupt
        stop.interrupted = number == signal.SIGINT
        stop.event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
