"""Fetching partitions: a consumer that is assigned to them, in no group, and what it has fetched of each up to a horizon."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from fedloop_events import topics
from fedloop_events.envelope import MALFORMED, Record
from fedloop_events.errors import LogError, UnreachableError
from fedloop_events.logs.kafka import codec
from fedloop_events.logs.kafka.admin import AWAY, Admin, PartitionKey, Trouble, stream_of, translated
from fedloop_events.logs.kafka.settings import READER_GROUP, KafkaSettings

REMEMBERED: Final = 100_000
"""A fetcher knows at least so many of the events that it fetched last, and drops one that comes again."""
MOST_BUFFERED_BYTES: Final = 64 << 20
"""With more than that in hand, partitions that are ahead wait for those that are behind."""
_AT_ONCE: Final = 250
"""Messages at a time: so many stay in the processor's cache until they are events."""
_HIDDEN_PAUSE_S: Final = 0.02
_PAUSE_S: Final = 0.2
"""A wait inside librdkafka lasts no longer, so that Ctrl-C is noticed."""
_HARMLESS: Final = AWAY | frozenset(
    {
        KafkaError._RESOLVE,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,  # it is in no group, but librdkafka looks for one's coordinator
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
    }
)
_logger = logging.getLogger(__name__)


class Partition:
    """One partition: what was fetched and not yet taken. `fetched` and `horizon` are Kafka's offsets of the next event."""

    __slots__ = ("buffer", "clock_ms", "fetched", "horizon", "place", "size_bytes", "stream", "topic")

    def __init__(self, topic: str, place: PartitionKey) -> None:
        self.topic, self.place, self.stream = topic, place, stream_of(place)
        self.start(0)

    def start(self, offset: int) -> None:
        self.buffer: list[Record] = []
        self.fetched = self.horizon = offset
        self.clock_ms = self.size_bytes = 0

    @property
    def complete(self) -> bool:
        """Whether everything up to the horizon was fetched."""
        return self.fetched >= self.horizon

    def take(self, count: int) -> list[Record]:
        """The first `count` events of the buffer, which leave it."""
        taken = self.buffer[:count]
        del self.buffer[:count]
        self.size_bytes -= sum(len(record.data) for record in taken) if self.buffer else self.size_bytes
        return taken


class Fetcher:
    """Fetches `names` from the position it is given. Used by one thread at a time.

    `written` says up to where the caller has appended, which lies within every horizon. Raises UnreachableError when brokers stay
    away for `timeout_s`, NotAllowedError without the right to read, `LogError` for events that are gone.
    """

    def __init__(
        self, settings: KafkaSettings, admin: Admin, written: Mapping[PartitionKey, int], names: Collection[str], timeout_s: float
    ) -> None:
        self._admin, self._written, self._timeout_s = admin, written, timeout_s
        self._trouble = Trouble()
        self._by_place = {
            place: Partition(name, place)
            for name in names
            for number in range(topics.DECLARED[name].partitions)
            for place in [(settings.topic(name), number)]
        }
        self.partitions = tuple(self._by_place.values())
        self._settings = {
            **settings.client(),
            "group.id": f"{settings.prefix}-{READER_GROUP}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "check.crcs": True,
            "queued.max.messages.kbytes": 32_768,
            "fetch.queue.backoff.ms": 5,
            "max.poll.interval.ms": 86_400_000,
            "error_cb": self._trouble,
        }
        self._consumer = self._assigned(self.partitions)
        self._side: Consumer | None = None
        self._side_of: set[Partition] = set()
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()

    def start(self, offsets: Mapping[str, int]) -> None:
        """Begin again: each stream at its offset in `offsets`, or at its first event."""
        for each in self.partitions:
            each.start(offsets.get(each.stream, 0))
        self._seen, self._seen_before = set(), set()
        self._connect()

    def close(self) -> None:
        self._consumer.close()
        self._leave_side()

    def look_ahead(self) -> None:
        """Set the horizon to the ends of all partitions now.

        What was acknowledged lies beyond the end while another producer's transaction is open before it. What was read already
        does only for a broker that does not know yet that it leads no more, or if it was another topic.
        """
        deadline, pause_s = time.monotonic() + self._timeout_s, _HIDDEN_PAUSE_S
        while True:
            ends = self._admin.ends(self._by_place, self._timeout_s)
            hidden = [place for place, end in ends.items() if end < self._written.get(place, 0)]
            gone = [place for place, end in ends.items() if end < self._by_place[place].fetched]
            if not hidden and not gone:
                break
            if time.monotonic() > deadline:
                if gone:
                    raise LogError(
                        f"partition {gone[0][0]}-{gone[0][1]} ends before what was read from it",
                        cause="the topic was made anew, or its brokers have lost events",
                        hint="nothing can be folded from it: restore it, or begin another log",
                    )
                raise UnreachableError(
                    f"partition {hidden[0][0]}-{hidden[0][1]} does not show what it has acknowledged",
                    cause="another producer holds a transaction open",
                    hint="find its transactional.id with kafka-transactions.sh, and deny it the right to have one",
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S)
        for place, end in ends.items():
            self._by_place[place].horizon = end

    def fetch(self, behind: Sequence[Partition]) -> None:
        """Fetch until at least one of `behind`, of which nothing is in hand, has an event or is complete."""
        deadline = time.monotonic() + self._timeout_s
        while not any(each.buffer or each.complete for each in behind):
            consumer = self._consumer_for(behind)
            messages = consumer.consume(_AT_ONCE, 0)
            if not messages:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise UnreachableError(
                        f"partition {behind[0].stream} gave nothing for {self._timeout_s:g} s",
                        cause=self._trouble.last,
                        hint="`fedloop doctor` says which brokers answer",
                    )
                messages = consumer.consume(1, min(left_s, _PAUSE_S))
                messages += consumer.consume(_AT_ONCE, 0)  # what came with it: a read that ends here gives all of it
                self._trouble.check()
            self._keep(messages)

    def wait(self, deadline: float) -> bool:
        """Whether something has come before `deadline`."""
        while (left_s := deadline - time.monotonic()) > 0:
            messages = self._consumer.consume(1, min(left_s, _PAUSE_S))
            self._trouble.check()
            self._keep(messages)
            if any(message.error() is None for message in messages):
                return True
        return False

    # librdkafka 2.12 skips a message when it resumes a partition that has reached its end (it counts the end as one), and aborts
    # when partitions are assigned anew while they are being stopped. So none is ever paused, or assigned twice: a consumer is
    # made for each start, and one beside it for partitions that are far behind. Making one takes a millisecond.

    def _connect(self) -> None:
        self._consumer.close()
        self._leave_side()
        self._consumer = self._assigned(self.partitions)

    def _assigned(self, partitions: Iterable[Partition]) -> Consumer:
        consumer = Consumer(self._settings)
        consumer.assign([TopicPartition(*each.place, each.fetched) for each in partitions])
        return consumer

    def _consumer_for(self, behind: Sequence[Partition]) -> Consumer:
        """With too much in hand, one for the partitions that are behind: the others wait in the queue of the first."""
        if sum(each.size_bytes for each in self.partitions) <= MOST_BUFFERED_BYTES:
            self._leave_side()
            return self._consumer
        if self._side is None or not self._side_of.issuperset(behind):
            self._leave_side()
            self._side, self._side_of = self._assigned(behind), set(behind)
        return self._side

    def _leave_side(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None

    def _keep(self, messages: Sequence[Message]) -> None:
        by_place, make, first = self._by_place, codec.record, self._first
        for message in messages:
            error = message.error()
            if error is not None:
                self._failed(message, error)
                continue
            partition, offset, value = by_place[message.topic(), message.partition()], message.offset(), message.value()
            if offset < partition.fetched:
                continue  # the consumer beside has fetched it before
            partition.fetched = offset + 1
            clock_ms = message.timestamp()[1]
            if clock_ms > partition.clock_ms:  # that of a new leader may be behind; the log's never runs backwards in a stream
                partition.clock_ms = clock_ms
            record = make(
                partition.topic, message.key(), value, message.headers(), partition.stream, offset + 1, partition.clock_ms
            )
            if first(record):
                partition.buffer.append(record)
                partition.size_bytes += len(record.data)

    def _first(self, record: Record) -> bool:
        """Whether the event was not seen before.

        Only the very same one in the same partition is: who carries an event can put another one under its id and signature, or
        itself elsewhere, before it. Of what is no event each counts.
        """
        if record.type == MALFORMED:
            return True
        mark = hash(
            (record.stream, record.id, record.key, record.type, record.source, record.time_s, record.data, record.signature)
        )
        if mark in self._seen or mark in self._seen_before:
            return False
        self._seen.add(mark)
        if len(self._seen) >= REMEMBERED:
            self._seen, self._seen_before = set(), self._seen
        return True

    def _failed(self, message: Message, error: KafkaError) -> None:
        code, topic = error.code(), message.topic() or ""
        partition = self._by_place.get((topic, message.partition()))
        if code == KafkaError._PARTITION_EOF and partition is not None:
            partition.fetched = max(partition.fetched, message.offset())
        elif code == KafkaError._AUTO_OFFSET_RESET and partition is not None and self._skip_expired(partition):
            _logger.warning("retention has removed events of %s that were not read yet", partition.stream)
        elif code in _HARMLESS:
            self._trouble(error)
        else:
            raise translated(error, topic, "read")

    def _skip_expired(self, partition: Partition) -> bool:
        """Go on with the first event that retention has left, if that is why there is nothing at `fetched`."""
        if topics.DECLARED[partition.topic].retention_ms == topics.KEPT:
            return False
        low, _ = self._consumer.get_watermark_offsets(TopicPartition(*partition.place), timeout=self._timeout_s) or (0, 0)
        if low <= partition.fetched:
            return False
        partition.fetched = low
        self._connect()
        return True
