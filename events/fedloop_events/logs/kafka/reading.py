"""Reading partitions as one stream of events.

Events of several topics come in the order of the brokers' clock, up to a horizon: the ends of all partitions as they were at one
moment. So what an event rests on (the round that an update answers) is read before it, as far as brokers' clocks agree. Within a
partition Kafka's order holds, and between the keys of a single topic there is none.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.logs.kafka.admin import Admin, PartitionKey
from fedloop_events.logs.kafka.fetching import Fetcher, Partition
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_events.logs.port import Batch, Position

_clock = attrgetter("appended_ms")


class Cursor:
    """Reads `wanted` topics from any position; it goes on from where it stands without fetching anything again.

    Used by one thread at a time. Raises what `Fetcher` raises.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        admin: Admin,
        written: Mapping[PartitionKey, int],
        wanted: Collection[str],
        timeout_s: float,
    ) -> None:
        self.topics = tuple(name for name in topics.ALL if name in wanted)
        self._fetcher = Fetcher(settings, admin, written, self.topics, timeout_s)
        self._partitions = self._fetcher.partitions
        self._ready: list[Record] = []
        self._next = 0
        self._position = self._before = {each.stream: 0 for each in self._partitions}
        """`_before` is the position before the batch that was handed out last, of `_taken` events: it can be read again."""
        self._taken = 0

    def close(self) -> None:
        self._fetcher.close()

    def at(self, after: Position) -> bool:
        """Whether it can go on from `after` without fetching anything again."""
        return self._offsets(after) in (self._position, self._before)

    def read(self, after: Position, limit: int, wait_s: float) -> Batch:
        """See `EventLog.read`."""
        self._go_to(self._offsets(after))
        deadline = time.monotonic() + wait_s
        while self._next >= len(self._ready) and not self._fill():
            if not self._fetcher.wait(deadline):
                break
        return Batch(self._take(limit), Position({**after.offsets, **self._position}))

    def _offsets(self, after: Position) -> dict[str, int]:
        return {each.stream: after.offsets.get(each.stream, 0) for each in self._partitions}

    def _go_to(self, offsets: dict[str, int]) -> None:
        if offsets == self._position:
            return
        if offsets == self._before:
            self._next -= self._taken
        else:
            self._fetcher.start(offsets)
            self._ready, self._next = [], 0
        self._position, self._before, self._taken = offsets, offsets, 0

    def _take(self, limit: int) -> Sequence[Record]:
        records = self._ready[self._next : self._next + limit]
        self._before, self._taken = self._position, len(records)
        self._next += len(records)
        self._position = position = dict(self._position)
        for record in records:
            position[record.stream] = record.offset
        if self._next >= len(self._ready):
            for each in self._partitions:
                if not each.buffer:  # what was dropped, and what Kafka keeps for itself, is passed with the last event
                    position[each.stream] = each.fetched
        return records

    def _fill(self) -> bool:
        """Make the next events ready: all that can be put in order. False if there were none a moment ago."""
        looked = False
        while True:
            behind = [each for each in self._partitions if not each.buffer and not each.complete]
            if behind and (len(self.topics) > 1 or not any(each.buffer for each in self._partitions)):
                self._fetcher.fetch(behind)
                continue
            ready = self._merged([each for each in self._partitions if each.buffer])
            if ready:
                self._ready, self._next = ready, 0
                self._before, self._taken = self._position, 0
                return True
            if looked and not any(each.buffer for each in self._partitions):
                return False
            self._fetcher.look_ahead()
            looked = True

    def _merged(self, parts: Sequence[Partition]) -> list[Record]:
        """What is in hand within the horizon, in order, up to where a partition with more to come may still come first."""
        if len(self.topics) == 1 or len(parts) < 2:
            counts = _counts(parts, None)
        else:
            ahead_ms = min((each.buffer[-1].appended_ms for each in parts if not each.complete), default=None)
            counts = _counts(parts, None if ahead_ms is None else ahead_ms - 1)
            if not any(counts):  # of one millisecond: the order of the topics decides, as far as it is known
                counts = _counts(parts, ahead_ms)
        ready: list[Record] = []
        for each, count in zip(parts, counts, strict=True):
            ready += each.take(count)
        if len(parts) > 1:
            ready.sort(key=_clock)
        return ready


def _counts(parts: Sequence[Partition], until_ms: int | None) -> list[int]:
    """How many events of each partition lie within its horizon, and not after `until_ms`."""
    counts = []
    for each in parts:
        count = len(each.buffer)
        if each.buffer[-1].offset > each.horizon:
            count = sum(record.offset <= each.horizon for record in each.buffer)
        if until_ms is not None:
            count = min(count, bisect_right(each.buffer, until_ms, key=_clock))
        counts.append(count)
    return counts
