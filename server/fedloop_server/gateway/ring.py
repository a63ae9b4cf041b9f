"""The newest events of the log in memory, by who may see them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from heapq import merge
from typing import Final

from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.logs.http import cloudevents
from fedloop_events.logs.port import Position

from fedloop_server.gateway.visibility import EVERYONE, Clients

_OVERHEAD_BYTES: Final = 1_000
_PER_READER_BYTES: Final = 100


class Entry:
    """One event in the ring; `wire` is made when somebody first reads it, and the same bytes serve everybody."""

    __slots__ = ("_wire", "audience", "number", "record")

    def __init__(self, record: Record, audience: Clients) -> None:
        self.record, self.audience = record, audience
        self.number = 0
        self._wire: bytes | None = None

    @property
    def wire(self) -> bytes:
        """The event as a CloudEvent; nothing for one that no CloudEvent can be."""
        if self._wire is None:
            try:
                self._wire = cloudevents.encode(self.record)
            except InvalidEventError:
                self._wire = b""
        return self._wire

    @property
    def size_bytes(self) -> int:
        record = self.record
        held = len(record.data) * 2 + len(record.signature) * 3
        return held + _OVERHEAD_BYTES + _PER_READER_BYTES * (1 if self.audience is EVERYONE else len(self.audience))


class Ring:
    """Up to `max_events` and `max_bytes` of the newest entries; `position` is where the newest one stands."""

    def __init__(self, start: Position, max_events: int, max_bytes: int) -> None:
        self._max_events, self._max_bytes = max_events, max_bytes
        self._offsets, self._base = dict(start.offsets), dict(start.offsets)
        self._all: deque[Entry] = deque()
        self._of: defaultdict[str, deque[Entry]] = defaultdict(deque)
        self._everyones: deque[Entry] = deque()
        self._next, self._bytes = 0, 0

    @property
    def position(self) -> Position:
        return Position(dict(self._offsets))

    def add(self, entries: Iterable[Entry], position: Position) -> None:
        """Take in what was read up to `position`, which may be further than the last entry: a log passes over duplicates."""
        for entry in entries:
            entry.number = self._next
            self._next += 1
            self._all.append(entry)
            self._bytes += entry.size_bytes
            for index in self._indices(entry):
                index.append(entry)
        self._offsets |= position.offsets
        while len(self._all) > self._max_events or self._bytes > self._max_bytes:
            self._drop(self._all.popleft())

    def covers(self, after: Position) -> bool:
        """Whether everything after this position is in the ring."""
        return all(after.covers(stream, offset) for stream, offset in self._base.items())

    def reaches(self, end: Position) -> bool:
        """Whether everything up to this position has been in the ring."""
        return all(self._offsets.get(stream, 0) >= offset for stream, offset in end.offsets.items())

    def after(self, position: Position, client_id: str | None, topics: Collection[str]) -> Iterator[Entry]:
        """What this client (None: the server) may see of `topics` after a position, in order."""
        found: Iterable[Entry]
        if client_id is None:
            found = self._all
        else:
            found = merge(self._everyones, self._of.get(client_id, ()), key=lambda entry: entry.number)
        for entry in found:
            record = entry.record
            if record.topic in topics and not position.covers(record.stream, record.offset):
                yield entry

    def _indices(self, entry: Entry) -> list[deque[Entry]]:
        return [self._everyones] if entry.audience is EVERYONE else [self._of[name] for name in entry.audience]

    def _drop(self, entry: Entry) -> None:
        self._bytes -= entry.size_bytes
        self._base[entry.record.stream] = entry.record.offset
        for index in self._indices(entry):
            index.popleft()
        if entry.audience is not EVERYONE:
            for name in entry.audience:
                if not self._of[name]:
                    del self._of[name]
