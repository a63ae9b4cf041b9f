"""The end of the log: its last events, and what is appended after them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import UsageError
from fedloop_events.logs.port import READ_AHEAD, START, Batch, EventLog, Position

_WAIT_S = 5.0
"""At a time: whoever follows can be interrupted in between."""


def last(log: EventLog, count: int, wanted: Collection[str] = topics.ALL) -> Batch:
    """The last `count` events of the topics `wanted`, and the position after them. Raises `UsageError` for an unknown topic."""
    for name in wanted:
        if name not in topics.ALL:
            raise UsageError(f"there is no topic {name!r}", hint=f"the topics are {', '.join(topics.ALL)}")
    kept: deque[Record] = deque(maxlen=count)
    position = START
    while True:
        batch = log.read(wanted, position, limit=READ_AHEAD)
        if not batch.records:
            return Batch(list(kept), position)
        kept.extend(batch.records)
        position = batch.position


def follow(log: EventLog, after: Position, wanted: Collection[str] = topics.ALL) -> Iterator[Record]:
    """Each event of the topics `wanted` after a position, as it is appended, without end."""
    while True:
        batch = log.read(wanted, after, wait_s=_WAIT_S)
        yield from batch.records
        after = batch.position
