"""The deployment's log and blobs, opened when they are first used: what a device knows already needs neither."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from fedloop_events import topics as all_topics
from fedloop_events.envelope import Event
from fedloop_events.errors import UnreachableError
from fedloop_events.logs.port import START, Batch, EventLog, Position

P = TypeVar("P")


class Lazy(Generic[P]):
    """What `open_` gives, once it has succeeded; whoever comes meanwhile waits for it."""

    def __init__(self, open_: Callable[[], P]) -> None:
        self._open, self._lock = open_, threading.Lock()
        self.opened: P | None = None

    def get(self) -> P:
        with self._lock:
            if self.opened is None:
                self.opened = self._open()
            return self.opened


class LazyLog:
    """An `EventLog` that is opened by the first call; each raises what opening raises, until it succeeds."""

    def __init__(self, open_: Callable[[], EventLog]) -> None:
        self._log = Lazy(open_)
        self._closed = False

    def append(self, events: Sequence[Event]) -> None:
        self._get().append(events)

    def read(
        self,
        topics: Collection[str] = all_topics.ALL,
        after: Position = START,
        *,
        limit: int = 1000,
        wait_s: float = 0.0,
    ) -> Batch:
        return self._get().read(topics, after, limit=limit, wait_s=wait_s)

    def end(self) -> Position:
        return self._get().end()

    def close(self) -> None:
        """Does not wait for a call that is opening the log: that call closes it."""
        self._closed = True
        if self._log.opened is not None:
            self._log.opened.close()

    def _get(self) -> EventLog:
        log = self._log.get()
        if self._closed:
            log.close()
            raise UnreachableError("the log has been closed")
        return log
