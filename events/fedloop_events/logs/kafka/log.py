"""The `EventLog` on Kafka.

Appending is by an idempotent producer with `acks=all`, without transactions (docs/decisions/0008): one that was cut off half way
is made again, and readers and folds count each event once. What a failed append left behind is always a first part of its events
in each partition, for a producer never goes on after one that it could not deliver.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from fedloop_events import envelope
from fedloop_events import topics as all_topics
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError, LogError, UnreachableError
from fedloop_events.logs.kafka import codec
from fedloop_events.logs.kafka.admin import Admin, PartitionKey, Trouble, stream_of, translated
from fedloop_events.logs.kafka.reading import Cursor
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_events.logs.port import START, Batch, Position

MAX_CURSORS: Final = 8
"""Consumers that are kept; one more costs the least recently used one its place."""
_PAUSE_S: Final = 0.2
_PERMANENT: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)


class _Handle:
    """One process's connections. A forked child must not touch its parent's: librdkafka's threads are not in it."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.pid = os.getpid()
        self.settings = settings
        self.write_lock, self.lock = threading.Lock(), threading.Lock()
        self.producer: Producer | None = None
        self.trouble = Trouble()
        self.cursors: list[Cursor] = []
        self.written: dict[PartitionKey, int] = {}
        """Up to where each partition is known to hold what was appended here."""
        self._admin: Admin | None = None

    @property
    def admin(self) -> Admin:
        with self.lock:
            if self._admin is None:
                self._admin = Admin(self.settings)
            return self._admin


_inherited: list[_Handle] = []


class KafkaLog:
    """An `EventLog` at `url` (`settings.KafkaSettings.parse`). Safe to share between threads; a forked child connects anew.

    With `create`, topics that are missing are made as `topics.py` declares them. Raises `LogError` for topics that would break a
    promise, `UsageError` if there are none, and from every method NotAllowedError without the right, and UnreachableError when
    the brokers stay away for `timeout_s`.
    """

    def __init__(self, url: str, *, create: bool = False, timeout_s: float = 30.0) -> None:
        self.url, self.settings = url, KafkaSettings.parse(url)
        self._timeout_s = timeout_s
        self._topics = {name: self.settings.topic(name) for name in all_topics.ALL}
        self._handle = _Handle(self.settings)
        self._closed = False
        if create:
            self._handle.admin.create(timeout_s)
        self._strays = self._handle.admin.check(timeout_s).used

    def append(self, events: Sequence[Event]) -> None:
        """See `EventLog.append`. Raises `LogError` where events stand in partitions that no reader reads."""
        if self._strays:
            raise LogError(
                f"something was written to {', '.join(map(stream_of, self._strays))}, which the log does not have: who wrote it "
                "does not keep the log's order, so nothing is appended",
                hint="read on, or begin anew under another prefix: "
                "`fedloop server init DIR --log kafka://HOST:PORT/PREFIX --blobs BLOBS --test CSV`",
            )
        for event in events:
            envelope.check(event)
            codec.check(event)
        handle = self._here()
        with handle.write_lock:
            deadline, left = time.monotonic() + self._timeout_s, events
            while left and (left := self._deliver(handle, left, deadline)):
                time.sleep(_PAUSE_S)

    def read(
        self, topics: Collection[str] = all_topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        """See `EventLog.read`."""
        if not any(name in all_topics.DECLARED for name in topics):
            return Batch([], after)
        with self._cursor(topics, after) as cursor:
            return cursor.read(after, limit, wait_s)

    def end(self) -> Position:
        """See `EventLog.end`: of the topics that this user may read."""
        admin = self._here().admin
        places = [
            (self.settings.topic(name), number)
            for name in admin.describe(all_topics.ALL, self._timeout_s)
            for number in range(all_topics.DECLARED[name].partitions)
        ]
        return Position({stream_of(place): end for place, end in admin.ends(places, self._timeout_s).items()})

    def close(self) -> None:
        self._closed = True
        handle = self._handle
        if handle.pid != os.getpid():
            return
        with handle.write_lock, handle.lock:
            handle.producer = None
            while handle.cursors:
                handle.cursors.pop().close()

    # --- appending ---------------------------------------------------------------------------------------------------

    def _deliver(self, handle: _Handle, events: Sequence[Event], deadline: float) -> Sequence[Event]:
        """Produce `events`; those that are not known to be in the log, in their order. Then the producer is a new one."""
        producer = handle.producer
        if producer is None:
            producer = handle.producer = self._producer(handle)
        outcomes: list[KafkaError | bool | None] = [False] * len(events)
        failed, written = False, handle.written

        def settle(index: int, error: KafkaError | None, message: Message) -> None:
            nonlocal failed
            outcomes[index] = error
            if error is None:
                written[message.topic(), message.partition()] = message.offset() + 1
            else:
                failed = True

        try:
            for index, event in enumerate(events):
                self._produce(producer, event, partial(settle, index), deadline)
            while producer.flush(_PAUSE_S) and not failed and time.monotonic() < deadline:
                handle.trouble.check()
        except KafkaException as error:  # the producer has failed for good: a user who may write nothing gets no number for one
            if error.args[0].code() in _PERMANENT:
                _abandon(handle)
                raise self._refused(error.args[0], events[0]) from None
        except BaseException:
            _abandon(handle)
            raise
        left = [index for index, outcome in enumerate(outcomes) if outcome is not None]
        if not left:
            return []
        _abandon(handle)
        for index in left:
            outcome = outcomes[index]
            if isinstance(outcome, KafkaError) and outcome.code() in _PERMANENT:
                raise self._refused(outcome, events[index])
        if time.monotonic() >= deadline:
            raise UnreachableError(
                f"the Kafka brokers did not acknowledge {len(left)} events within {self._timeout_s:g} s",
                cause=handle.trouble.last,
                hint="append the same events again: what has arrived counts once",
            )
        return [events[index] for index in left]

    def _produce(self, producer: Producer, event: Event, settle: partial[None], deadline: float) -> None:
        topic, key, headers = self._topics[event.topic], event.key.encode(), codec.headers(event)
        partition = codec.partition(event.topic, key)
        while True:
            try:
                producer.produce(topic, event.data, key, partition, headers=headers, on_delivery=settle)
                return
            except BufferError:  # its queue is full
                if time.monotonic() > deadline:
                    return
                producer.poll(_PAUSE_S)
            except KafkaException as error:
                if error.args[0].code() == KafkaError._FATAL:
                    return
                raise self._refused(error.args[0], event) from None

    def _refused(self, error: KafkaError, event: Event) -> Exception:
        if error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD):
            return InvalidEventError(f"the brokers refuse event {event.id}", cause=error.str())
        return translated(error, self._topics[event.topic], "write")

    def _producer(self, handle: _Handle) -> Producer:
        return Producer(
            {
                **self.settings.client(),
                "enable.idempotence": True,
                "acks": "all",
                # How long is waited is for `append` to say: librdkafka giving up one message would let a later one overtake it.
                "message.timeout.ms": 0,
                "linger.ms": 5,  # `flush` sends at once
                "compression.type": "lz4",
                "message.max.bytes": all_topics.MAX_BATCH_BYTES,
                "request.timeout.ms": 10_000,
                "queue.buffering.max.messages": 200_000,
                "error_cb": handle.trouble,
            }
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _cursor(self, wanted: Collection[str], after: Position) -> Iterator[Cursor]:
        """A cursor on `wanted` for this thread alone, best one that stands at `after`."""
        handle = self._here()
        admin = handle.admin
        with handle.lock:
            names = tuple(name for name in all_topics.ALL if name in wanted)
            idle = [each for each in handle.cursors if each.topics == names]
            cursor = next((each for each in idle if each.at(after)), None)
            surplus: Cursor | None = None
            if cursor is None and len(handle.cursors) >= MAX_CURSORS:
                if idle:
                    cursor = idle[0]
                else:
                    surplus = handle.cursors.pop(0)
            if cursor is not None:
                handle.cursors.remove(cursor)
        if surplus is not None:
            surplus.close()
        if cursor is None:
            cursor = Cursor(self.settings, admin, handle.written, names, self._timeout_s)
        try:
            yield cursor
        except BaseException:
            cursor.close()  # it may stand anywhere
            raise
        with handle.lock:
            if not self._closed:
                handle.cursors.append(cursor)
                return
        cursor.close()

    def _here(self) -> _Handle:
        if self._closed:
            raise LogError(f"the log {self.url} is closed")
        if self._handle.pid != os.getpid():
            _inherited.append(self._handle)
            self._handle = _Handle(self.settings)
        return self._handle


def _abandon(handle: _Handle) -> None:
    """Give the producer up with all it has not sent: what is in flight may arrive or not."""
    producer, handle.producer = handle.producer, None
    if producer is not None:
        producer.purge()
