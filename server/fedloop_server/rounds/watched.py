"""The log as a round's grid sees it, which waits inside Flower's call for as long as the round lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from fedloop_events import topics
from fedloop_events.envelope import Event
from fedloop_events.logs.port import START, Batch, EventLog, Position


class StoppedError(Exception):
    """The server was told to stop while a round waited; the round goes on when a server is started again."""


class WatchedLog:
    """An `EventLog` that tells `look` of news with each read, and raises `StoppedError` from a read once `stop` is set."""

    def __init__(self, log: EventLog, stop: threading.Event, look: Callable[[], None]) -> None:
        self._log, self._stop, self._look = log, stop, look

    def append(self, events: Sequence[Event]) -> None:
        self._log.append(events)

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        if self._stop.is_set():
            raise StoppedError
        batch = self._log.read(topics, after, limit=limit, wait_s=wait_s)
        if batch.records:
            self._look()
        return batch

    def end(self) -> Position:
        return self._log.end()

    def close(self) -> None:
        self._log.close()
