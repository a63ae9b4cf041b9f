"""Reading partitions as one stream of events: a consumer, and the merge of what it fetches.

A `Cursor` is assigned partitions and belongs to no consumer group. It reads up to a horizon: the ends of all its partitions as
they were at one moment. Within it, events of different partitions come in the order of the broker's clock, so that what an event
rests on (the round that an update answers) is read before it, as far as brokers' clocks agree; within a partition Kafka's order
holds.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import UnreachableError
from fedloop_events.kafka import codec
from fedloop_events.kafka.admin import Admin, Place, Trouble, translated
from fedloop_events.kafka.settings import Settings
from fedloop_events.log import Batch, Position

REMEMBERED: Final = 100_000
"""A cursor knows at least so many of the events that it read last, and drops one that comes again."""
_FETCHED_AT_ONCE: Final = 1000
_MOST_BUFFERED: Final = 50_000
_HIDDEN_PAUSE_S: Final = 0.02
_PAUSE_S: Final = 0.2
"""A wait inside librdkafka lasts no longer, so that Ctrl-C is heard."""
_HARMLESS: Final = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,  # a cursor is in no group, but librdkafka looks for one's coordinator
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
    }
)
_logger = logging.getLogger(__name__)
_clock = attrgetter("appended_ms")


class _Partition:
    """One partition: what was fetched and not yet handed out. `fetched` and `horizon` are Kafka's offsets of the next event."""

    __slots__ = ("buffer", "clock_ms", "fetched", "horizon", "place", "stream", "topic")

    def __init__(self, topic: str, place: Place) -> None:
        self.topic, self.place, self.stream = topic, place, f"{place[0]}-{place[1]}"
        self.start(0)

    def start(self, offset: int) -> None:
        self.buffer: list[Record] = []
        self.fetched = self.horizon = offset
        self.clock_ms = 0

    @property
    def complete(self) -> bool:
        return self.fetched >= self.horizon


class Cursor:
    """Reads `wanted` topics from any position. Used by one thread at a time.

    `written` says up to where the caller has appended, which it is sure to read. Raises UnreachableError when brokers stay away
    for `timeout_s`, NotAllowedError without the right to read, `LogError` for events that are gone.
    """

    def __init__(
        self, settings: Settings, admin: Admin, written: Mapping[Place, int], wanted: Collection[str], timeout_s: float
    ) -> None:
        self.topics = tuple(name for name in topics.ALL if name in wanted)
        self._admin, self._written, self._timeout_s = admin, written, timeout_s
        self._trouble = Trouble()
        self._partitions = {
            place: _Partition(name, place)
            for name in self.topics
            for number in range(topics.DECLARED[name].partitions)
            for place in [(settings.topic(name), number)]
        }
        self._consumer = Consumer(
            {
                **settings.client(),
                "group.id": f"{settings.prefix}-reader",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "check.crcs": True,
                "queued.max.messages.kbytes": 32_768,
                "fetch.queue.backoff.ms": 5,
                # A cursor that is sent elsewhere waits for the fetch under way to come back.
                "fetch.wait.max.ms": 100,
                "max.poll.interval.ms": 86_400_000,
                "error_cb": self._trouble,
            }
        )
        self._position: dict[str, int]
        self._before: dict[str, int]
        """The position before the batch that was handed out last, of `_taken` events: it can be read again."""
        self._taken = self._next = 0
        self._start({})

    def close(self) -> None:
        self._consumer.close()

    def at(self, after: Position) -> bool:
        """Whether it can go on from `after` without fetching anything again."""
        return any(all(after.offsets.get(s, 0) == o for s, o in place.items()) for place in (self._position, self._before))

    def read(self, after: Position, limit: int, wait_s: float) -> Batch:
        """See `EventLog.read`."""
        self._go_to(after)
        deadline = time.monotonic() + wait_s
        while self._next >= len(self._ready) and not self._fill():
            if not self._wait(deadline):
                break
        return Batch(self._take(limit), Position({**after.offsets, **self._position}))

    # --- where it is -------------------------------------------------------------------------------------------------

    def _go_to(self, after: Position) -> None:
        offsets = {each.stream: after.offsets.get(each.stream, 0) for each in self._partitions.values()}
        if offsets == self._position:
            return
        if offsets == self._before:
            self._next -= self._taken
            self._position, self._taken = self._before, 0
            return
        self._start(offsets)

    def _start(self, offsets: Mapping[str, int]) -> None:
        for each in self._partitions.values():
            each.start(offsets.get(each.stream, 0))
        self._consumer.assign([TopicPartition(*place, each.fetched) for place, each in self._partitions.items()])
        self._position = {each.stream: each.fetched for each in self._partitions.values()}
        self._before, self._taken = self._position, 0
        self._ready: list[Record] = []
        self._next = 0
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()

    def _take(self, limit: int) -> Sequence[Record]:
        records = self._ready[self._next : self._next + limit]
        self._before, self._taken = self._position, len(records)
        self._next += len(records)
        self._position = position = dict(self._position)
        for record in records:
            position[record.stream] = record.offset
        if self._next >= len(self._ready):
            for each in self._partitions.values():
                if not each.buffer:  # what was dropped, and what Kafka keeps for itself, is passed with the last event
                    position[each.stream] = each.fetched
        return records

    # --- filling -----------------------------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Make the next events ready: all that can be put in order. False if there were none a moment ago."""
        if not any(each.buffer or not each.complete for each in self._partitions.values()):
            self._look_ahead()
        deadline = time.monotonic() + self._timeout_s
        while True:
            behind = [each for each in self._partitions.values() if not each.buffer and not each.complete]
            if not behind:
                self._merge()
                if self._next < len(self._ready):
                    return True
                if not any(each.buffer or not each.complete for each in self._partitions.values()):
                    return False
                self._look_ahead()
                continue
            self._fetch(deadline, behind)

    def _look_ahead(self) -> None:
        """Set the horizon to the ends of all partitions now.

        What was acknowledged lies beyond the end while another producer's transaction is open before it.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            ends = self._admin.ends(self._partitions, self._timeout_s)
            hidden = [place for place, end in ends.items() if end < self._written.get(place, 0)]
            if not hidden:
                break
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"partition {hidden[0][0]}-{hidden[0][1]} does not show what it has acknowledged",
                    cause="another producer holds a transaction open",
                    hint="find its transactional.id with kafka-transactions.sh, and deny it the right to have one",
                )
            time.sleep(_HIDDEN_PAUSE_S)
        for place, end in ends.items():
            self._partitions[place].horizon = end

    def _fetch(self, deadline: float, behind: list[_Partition]) -> None:
        messages = self._consumer.consume(_FETCHED_AT_ONCE, 0)
        if not messages:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise UnreachableError(
                    f"partition {behind[0].stream} gave nothing for {self._timeout_s:g} s",
                    cause=self._trouble.last,
                    hint="fedloop doctor says which brokers answer",
                )
            messages = self._consumer.consume(1, min(left_s, _PAUSE_S))
            self._trouble.check()
        self._keep(messages)
        if sum(len(each.buffer) for each in self._partitions.values()) > _MOST_BUFFERED:
            # The leader of one partition is away, or slow: let the others wait for it.
            full = [TopicPartition(*each.place) for each in self._partitions.values() if len(each.buffer) > _FETCHED_AT_ONCE]
            self._consumer.pause(full)
            try:
                while not behind[0].buffer and not behind[0].complete and time.monotonic() < deadline:
                    self._keep(self._consumer.consume(1, _PAUSE_S))
            finally:
                self._consumer.resume(full)

    def _wait(self, deadline: float) -> bool:
        """Whether something has come before `deadline`."""
        while (left_s := deadline - time.monotonic()) > 0:
            messages = self._consumer.consume(1, min(left_s, _PAUSE_S))
            self._keep(messages)
            if any(message.error() is None for message in messages):
                return True
        return False

    def _keep(self, messages: Sequence[Message]) -> None:
        partitions, make = self._partitions, codec.record
        for message in messages:
            error = message.error()
            if error is not None:
                self._failed(message, error)
                continue
            partition = partitions[message.topic(), message.partition()]
            offset = message.offset()
            if offset < partition.fetched:
                continue  # fetched before a seek
            partition.fetched = offset + 1
            # The clock of a new leader may be behind the last one's; the log's clock never runs backwards in a stream.
            partition.clock_ms = max(partition.clock_ms, message.timestamp()[1])
            record = make(
                partition.topic,
                message.key(),
                message.value(),
                message.headers(),
                stream=partition.stream,
                offset=offset + 1,
                appended_ms=partition.clock_ms,
            )
            if self._first(record):
                partition.buffer.append(record)

    def _first(self, record: Record) -> bool:
        """Whether the event was not seen before. Only the very same one is the same: another one under its id may be forged."""
        mark = hash((record.id, record.signature or record.data))
        if mark in self._seen or mark in self._seen_before:
            return False
        self._seen.add(mark)
        if len(self._seen) >= REMEMBERED:
            self._seen, self._seen_before = set(), self._seen
        return True

    def _merge(self) -> None:
        """Put in order what is buffered within the horizon, up to where a partition with more to come may still come first."""
        parts = [each for each in self._partitions.values() if each.buffer]
        more = [each.buffer[-1].appended_ms for each in parts if not each.complete]
        if len(parts) > 1 and more:
            before_ms = min(more)
            # Where all are of one millisecond, the order of the topics decides as far as it is known.
            counts = _counts(parts, before_ms - 1) if any(_counts(parts, before_ms - 1)) else _counts(parts, before_ms)
        else:
            counts = _counts(parts, None)
        ready: list[Record] = []
        for each, count in zip(parts, counts, strict=True):
            ready += each.buffer[:count]
            del each.buffer[:count]
        if len(parts) > 1:
            ready.sort(key=_clock)
        self._ready, self._next = ready, 0
        self._before, self._taken = self._position, 0

    def _failed(self, message: Message, error: KafkaError) -> None:
        code, topic = error.code(), message.topic() or ""
        partition = self._partitions.get((topic, message.partition()))
        if code == KafkaError._PARTITION_EOF and partition is not None:
            partition.fetched = max(partition.fetched, message.offset())
        elif code == KafkaError._AUTO_OFFSET_RESET and partition is not None and _expires(partition.topic):
            _logger.warning("retention has removed events of %s that were not read yet", partition.stream)
            self._consumer.seek(TopicPartition(*partition.place, OFFSET_BEGINNING))
        elif code in _HARMLESS:
            self._trouble(error)
        else:
            raise translated(error, topic, "read")


def _counts(parts: Sequence[_Partition], until_ms: int | None) -> list[int]:
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


def _expires(topic: str) -> bool:
    return topics.DECLARED[topic].retention_ms != topics.KEPT
