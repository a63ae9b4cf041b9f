"""The `EventLog` port: append, read, position. Every state anywhere is a fold over it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

from msgspec import Struct

from fedloop_events import topics
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import LogChangedError


class Position(Struct, frozen=True):
    """How far a reader has come: for each stream, the offset of the last event read. Serialisable; comparable by `covers`."""

    offsets: Mapping[str, int] = MappingProxyType({})

    def covers(self, stream: str, offset: int) -> bool:
        """Whether the event at `offset` of `stream` has been read."""
        return self.offsets.get(stream, 0) >= offset


START = Position()
READ_AHEAD: Final = 250
"""Events at a time for whoever reads everything: a few hundred KB, which stay in the processor's cache until they are decoded."""


class Batch(Struct, frozen=True):
    """Events in order within each stream, and the position after the last one."""

    records: Sequence[Record]
    position: Position


@runtime_checkable
class EventLog(Protocol):
    """An append-only log of events, shared by many processes.

    Order holds within one key of one topic; between keys and topics a log gives the order of its own clock, as well as it can.
    An event that is appended again, byte for byte, is read once by whoever reads on from where it began; a reader that begins in
    the middle may meet one again. Of different events under one id the embedded log keeps the first; another log may show all of
    them, in one order for every reader. So folds count an id, and a decision, once, and the first authentic one holds; a writer
    that must know whether its event is the one that counts reads it back.
    """

    def append(self, events: Sequence[Event]) -> None:
        """Make `events` durable, in this order. When it returns they survive the loss of power, and every `read` finds them.

        Idempotent: the same call can always be made again. An event that no log may hold raises `InvalidEventError`, and nothing
        is appended. After a crash, or UnreachableError (the log stays busy or away), a first part of each key's events may be in
        the log; the embedded log appends all or none.
        """

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        """Up to `limit` events of `topics` after a position, waiting up to `wait_s` for the first one, without burning a core.

        It is empty only if the log held nothing more when it was called. The position of the answer is at least `after` and is to
        be used with the same topics. Raises `LogChangedError`, or another `LogError`, if the log ends before `after`.
        """

    def end(self) -> Position:
        """The position after everything that has been appended so far."""

    def close(self) -> None:
        """Let go of files and connections; nothing is lost."""


def check_reaches(end: Position, after: Position) -> None:
    """Raise `LogChangedError` if the log ends, at `end`, before a position up to which it has been read."""
    for stream, offset in after.offsets.items():
        if not end.covers(stream, offset):
            raise LogChangedError(
                f"the log ends before event {offset} of stream {stream!r}, which was read: it has {end.offsets.get(stream, 0)}",
                cause="it was cut short, restored from a backup, or replaced",
                hint="restore the whole log",
            )


def read_all(log: EventLog, topics: Collection[str] = topics.ALL, after: Position = START) -> Iterator[Record]:
    """Every event of `topics` that was in the log when this began reading its last batch."""
    while True:
        batch = log.read(topics, after, limit=READ_AHEAD)
        if not batch.records:
            return
        yield from batch.records
        after = batch.position
