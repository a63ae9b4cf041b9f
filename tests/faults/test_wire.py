"""What stands on a topic beside events: whatever it is, a reader goes on past it, counts it, and loses nothing valid."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import Any, Final

import msgspec
import pytest
import samples
from confluent_kafka import OFFSET_INVALID, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, NewTopic
from fedloop_events import topics, types
from fedloop_events.envelope import MAX_EVENT_BYTES, Event, Record
from fedloop_events.errors import InvalidEventError, LogError, UnreachableError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.kafka import KafkaLog, codec
from fedloop_events.logs.port import START, EventLog, Position, read_all

ANSWER_S: Final = 30.0


class Collected:
    """A fold that keeps the ids of what it is given."""

    topics = topics.ALL

    def __init__(self) -> None:
        self.ids: list[str] = []

    def apply(self, record: Record, payload: types.Payload) -> None:
        self.ids.append(record.id)


class Wire:
    """Any Kafka client with the right to write: it keeps to nothing."""

    def __init__(self, bootstrap: str, log: KafkaLog) -> None:
        self.bootstrap, self.log = bootstrap, log
        self.admin = AdminClient({"bootstrap.servers": bootstrap})

    def producer(self, **settings: Any) -> Producer:
        return Producer({"bootstrap.servers": self.bootstrap, "acks": "all", **settings})

    def put(self, event: Event, producer: Producer | None = None, **changes: Any) -> None:
        """The message of `event`, but for `changes` (topic, key, value, headers, partition)."""
        message = {
            "topic": self.log.settings.topic(event.topic),
            "key": event.key.encode(),
            "value": event.data,
            "headers": codec.headers(event),
            **changes,
        }
        failed: list[object] = []
        producer = producer or self.producer()
        producer.produce(**message, on_delivery=lambda error, _: failed.append(error) if error else None)
        assert producer.flush(ANSWER_S) == 0
        assert not failed

    def transaction(self) -> Producer:
        producer = self.producer(**{"transactional.id": secrets.token_hex(8)})
        producer.init_transactions(ANSWER_S)
        producer.begin_transaction()
        return producer

    def remove_head(self, topic: str, partition: int, before: int) -> None:
        """What retention does to the oldest events."""
        place = TopicPartition(self.log.settings.topic(topic), partition, before)
        for removed in self.admin.delete_records([place]).values():
            removed.result(ANSWER_S)

    def make_anew(self, topic: str) -> None:
        name, declared = self.log.settings.topic(topic), topics.DECLARED[topic]
        self.admin.delete_topics([name])[name].result(ANSWER_S)
        deadline = time.monotonic() + ANSWER_S
        while name in self.admin.list_topics(timeout=ANSWER_S).topics:
            assert time.monotonic() < deadline
        fresh = NewTopic(name, declared.partitions, 1, config=dict(declared.settings))
        while (error := self.admin.create_topics([fresh])[name].exception(ANSWER_S)) is not None:
            assert time.monotonic() < deadline, error


@pytest.fixture
def log(kafka_url: str) -> Iterator[KafkaLog]:
    log = KafkaLog(kafka_url, create=True)
    yield log
    log.close()


@pytest.fixture
def wire(kafka: str, log: KafkaLog) -> Wire:
    return Wire(kafka, log)


def collected(log: EventLog, identities: Identities | None = None) -> Reader[Collected]:
    reader = Reader(log, Collected(), identities=identities)
    reader.catch_up()
    return reader


def epochs(count: int) -> list[Event]:
    return [samples.signed(samples.epoch(number)) for number in range(1, count + 1)]


# --- messages that are no events -------------------------------------------------------------------------------------

HOSTILE: Final[dict[str, Callable[[codec.Headers, bytes], dict[str, Any]]]] = {
    "tombstone": lambda headers, value: {"value": None},
    "empty": lambda headers, value: {"value": b""},
    "oversize": lambda headers, value: {"value": b" " * (MAX_EVENT_BYTES + 1)},
    "no key": lambda headers, value: {"key": None},
    "key is not UTF-8": lambda headers, value: {"key": b"\xff\xfe"},
    "no headers": lambda headers, value: {"headers": []},
    "specversion": lambda headers, value: {"headers": [("ce_specversion", b"2.0"), *headers[1:]]},
    "no id": lambda headers, value: {"headers": [each for each in headers if each[0] != "ce_id"]},
    "two ids": lambda headers, value: {"headers": [*headers, ("ce_id", b"0" * 32)]},
    "the same id twice": lambda headers, value: {"headers": [*headers, headers[1]]},
    "source is not UTF-8": lambda headers, value: {"headers": [*headers[:2], ("ce_source", b"\xff"), *headers[3:]]},
    "header without value": lambda headers, value: {"headers": [*headers[:2], ("ce_source", None), *headers[3:]]},
    "signature is not ASCII": lambda headers, value: {"headers": [*headers[:-1], ("ce_dssematerial", b"\xc3\xa4")]},
    "signature is oversize": lambda headers, value: {"headers": [*headers[:-1], ("ce_dssematerial", b"x" * 100_000)]},
    "a thousand headers": lambda headers, value: {"headers": [*headers, *((f"x-{number}", b"") for number in range(1000))]},
    "value is not JSON": lambda headers, value: {"value": b"\x00" + value},
    "value is deeper than any stack": lambda headers, value: {"value": b"[" * 50_000},
}


def test_what_is_no_event_is_counted_and_passed_each_time(wire: Wire, log: KafkaLog) -> None:
    good = epochs(4 * len(HOSTILE) + 1)[::2]
    log.append(good[:1])
    for number, change in enumerate(2 * list(HOSTILE.values()), 1):
        bad = samples.signed(samples.epoch(2 * number))
        wire.put(bad, **change(codec.headers(bad), bad.data))
        log.append(good[number : number + 1])
    reader = collected(log)
    # Headers that nobody knows are no fault: the CloudEvents binding lets others add some.
    harmless = 2
    assert [each for each in reader.fold.ids if each in {event.id for event in good}] == [event.id for event in good]
    assert (reader.refused, len(reader.fold.ids)) == (2 * len(HOSTILE) - harmless, len(good) + harmless)


def test_random_bytes_anywhere_never_stop_a_reader(wire: Wire, log: KafkaLog) -> None:
    producer, count = wire.producer(), 300
    for _ in range(count):
        headers = [(f"ce_{name}", secrets.token_bytes(8)) for name in ("id", "source", "type", "specversion", "time")]
        wire.put(samples.signed(samples.feedback()), producer, key=secrets.token_bytes(4), headers=headers)
    (good,) = epochs(1)
    log.append([good])
    reader = collected(log)
    assert (reader.refused, reader.fold.ids) == (count, [good.id])


@pytest.mark.parametrize("codec_name", ["gzip", "zstd", "lz4", "snappy"])
@pytest.mark.parametrize("size_mb", [1, 12])
def test_a_compressed_bomb_is_one_refused_event_at_most(wire: Wire, log: KafkaLog, codec_name: str, size_mb: int) -> None:
    before, after = epochs(2)
    log.append([before])
    settings = {"compression.type": codec_name, "message.max.bytes": 100_000_000, "linger.ms": 0}
    bomb = samples.signed(samples.epoch(9))
    refused = 0
    with suppress(AssertionError):  # a broker refuses a batch that is too large when it is packed
        wire.put(bomb, wire.producer(**settings), value=bytes(size_mb * 1_000_000))
        refused = 1
    log.append([after])
    reader = collected(log)
    assert (reader.refused, reader.fold.ids) == (refused, [before.id, after.id])


@pytest.mark.parametrize("codec_name", ["gzip", "zstd", "lz4", "snappy"])
def test_a_bomb_that_is_too_large_to_unpack_stops_no_reader(wire: Wire, log: KafkaLog, codec_name: str) -> None:
    """A few KB on the wire, more than librdkafka unpacks: whoever may write to a topic could put one there."""
    (after,) = epochs(1)
    settings = {"compression.type": codec_name, "message.max.bytes": 200_000_000, "message.timeout.ms": 10_000}
    with suppress(AssertionError):  # that the broker refuses it is as good
        wire.put(samples.signed(samples.epoch(9)), wire.producer(**settings), value=bytes(110_000_000))
    log.append([after])
    assert collected(log).fold.ids == [after.id]


# --- events in the wrong place ---------------------------------------------------------------------------------------


def deployment() -> list[Event]:
    return [samples.signed(samples.created()), *(samples.signed(samples.enrolled(f"device-{n}", str(n))) for n in (1, 2, 3))]


def test_a_copy_that_was_put_elsewhere_beforehand_does_not_hide_the_event(wire: Wire, log: KafkaLog) -> None:
    """Who carries an event (a gateway) knows its id and signature before the log does."""
    log.append(deployment())
    wanted = [samples.signed(samples.feedback(number), by="device-1") for number in range(4)]
    wire.put(wanted[0], key=b"device-2")
    wire.put(wanted[0], topic=log.settings.topic(topics.UPDATES))
    wire.put(wanted[1], value=msgspec.structs.replace(wanted[2], id=wanted[1].id).data)
    for partition in range(topics.DECLARED[topics.FEEDBACK].partitions):
        wire.put(wanted[2], key=b"device-2", partition=partition)
    log.append(wanted)
    reader = collected(log, Identities())
    assert [each for each in reader.fold.ids if each in {event.id for event in wanted}] == [event.id for event in wanted]
    assert reader.refused == 3 + topics.DECLARED[topics.FEEDBACK].partitions


def test_a_true_event_in_the_wrong_partition_is_one_event(wire: Wire, log: KafkaLog) -> None:
    log.append(deployment())
    events = [samples.signed(samples.feedback(number)) for number in range(3)]
    log.append(events)
    for partition in range(topics.DECLARED[topics.FEEDBACK].partitions):
        wire.put(events[1], partition=partition)
    reader = collected(log, Identities())
    mine = [each for each in reader.fold.ids if each in {event.id for event in events}]
    assert list(dict.fromkeys(mine)) == [event.id for event in events]
    assert reader.refused == 0


# --- transactions ----------------------------------------------------------------------------------------------------


def test_an_open_transaction_delays_what_comes_after_it_and_loses_nothing(wire: Wire, log: KafkaLog, kafka_url: str) -> None:
    before, held, after, other = *epochs(3), samples.signed(samples.feedback())
    writer = KafkaLog(kafka_url, timeout_s=1.0)
    writer.append([before])
    producer = wire.transaction()
    wire.put(held, producer)
    writer.append([after, other])
    reader = collected(log)
    assert set(reader.fold.ids) == {before.id, other.id}
    position = msgspec.json.decode(msgspec.json.encode(reader.position), type=Position)
    assert not log.read((topics.ROUNDS,), position, wait_s=0.3).records
    with pytest.raises(UnreachableError, match="does not show"):  # to its writer it would be as if it were lost
        writer.read((topics.ROUNDS,), position)
    producer.commit_transaction(ANSWER_S)
    assert log.read(topics.ALL, position, wait_s=ANSWER_S).records
    for each in (log, writer):
        assert [record.id for record in read_all(each, topics.ALL, position)] == [held.id, after.id]
    writer.close()


def test_aborted_transactions_are_never_seen_and_their_offsets_are_passed(wire: Wire, log: KafkaLog) -> None:
    kept = epochs(5)
    log.append(kept[:1])
    for number, event in enumerate(kept[1:4]):
        producer = wire.transaction()
        for more in range(20):
            wire.put(samples.signed(samples.epoch(1000 + 100 * number + more)), producer)
        producer.abort_transaction(ANSWER_S)
        log.append([event])
    producer = wire.transaction()
    wire.put(samples.signed(samples.epoch(2000)), producer)
    producer.abort_transaction(ANSWER_S)
    assert collected(log).fold.ids == [event.id for event in kept[:4]]
    # The last offsets hold nothing: whoever waits at the end reads what comes then.
    position = START
    found: list[str] = []
    for _ in range(2):
        while (batch := log.read((topics.ROUNDS,), position, limit=1)).records:
            found += [record.id for record in batch.records]
            position = batch.position
        position = batch.position
        log.append(kept[4:])
    assert found == [event.id for event in kept]
    assert log.end().offsets[f"{log.settings.topic(topics.ROUNDS)}-0"] > 60


# --- topics that change under a reader -------------------------------------------------------------------------------


def partition_of(log: KafkaLog, event: Event) -> tuple[int, int]:
    """Where `event` lies: its partition, and Kafka's offset."""
    (record,) = [record for record in read_all(log) if record.id == event.id]
    return int(record.stream.rpartition("-")[2]), record.offset - 1


def test_what_retention_removed_is_passed(wire: Wire, log: KafkaLog, kafka_url: str) -> None:
    events = [samples.signed(samples.feedback(number)) for number in range(6)]
    others = [samples.signed(samples.feedback(number, f"device-{number}")) for number in range(2, 30)]
    log.append([*events, *others])
    early = log.read((topics.FEEDBACK,), limit=1).position
    partition, offset = partition_of(log, events[4])
    wire.remove_head(topics.FEEDBACK, partition, offset)
    for position in (early, START):
        reader = KafkaLog(kafka_url)
        found = [record.id for record in read_all(reader, (topics.FEEDBACK,), position)]
        assert [each for each in found if each in {event.id for event in events}] == [event.id for event in events[4:]]
        reader.close()


def test_a_partition_of_which_retention_removed_all_is_empty_and_goes_on(wire: Wire, log: KafkaLog, kafka_url: str) -> None:
    events = [samples.signed(samples.feedback(number)) for number in range(3)]
    log.append(events[:2])
    partition, offset = partition_of(log, events[1])
    wire.remove_head(topics.FEEDBACK, partition, offset + 1)
    late = KafkaLog(kafka_url)
    assert not late.read((topics.FEEDBACK,)).records
    log.append(events[2:])
    assert [record.id for record in read_all(late)] == [events[2].id]
    late.close()


def test_what_was_removed_from_a_topic_that_is_kept_is_an_error(wire: Wire, log: KafkaLog) -> None:
    log.append(epochs(4))
    wire.remove_head(topics.ROUNDS, 0, 2)
    with pytest.raises(LogError, match="no longer has"):
        log.read((topics.ROUNDS,), START)
    kept = Position({f"{log.settings.topic(topics.ROUNDS)}-0": 2})
    assert len(list(read_all(log, (topics.ROUNDS,), kept))) == 2


@pytest.mark.parametrize("topic", [topics.ROUNDS, topics.FEEDBACK])
def test_a_topic_that_was_made_anew_is_found_out(wire: Wire, log: KafkaLog, kafka_url: str, topic: str) -> None:
    """A position beyond its end belongs to another topic: going on from it would pass over what is there."""
    make = samples.epoch if topic == topics.ROUNDS else samples.feedback
    log.append([samples.signed(make(number)) for number in range(1, 6)])
    for record in read_all(log, (topic,)):
        position = Position({record.stream: record.offset})
    wire.make_anew(topic)
    fresh = KafkaLog(kafka_url, timeout_s=2.0)
    fresh.append([samples.signed(make(100))])
    with pytest.raises(LogError, match="ends before what was read"):
        fresh.read((topic,), position)
    assert len(list(read_all(fresh, (topic,)))) == 1
    fresh.close()


def test_an_event_that_the_brokers_find_too_large_is_refused_and_the_next_one_goes_through(wire: Wire, log: KafkaLog) -> None:
    large = msgspec.structs.replace(samples.signed(samples.epoch(1)), signature="x" * 1_100_000)
    with pytest.raises(InvalidEventError):
        log.append([large])
    (good,) = epochs(1)
    log.append([good])
    assert collected(log).fold.ids == [good.id]


class _Silent:
    """An admin client to which at first a broker says nothing: librdkafka then gives -1001 for an offset, and no error."""

    def __init__(self, client: AdminClient, times: int) -> None:
        self._client, self.left = client, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def list_offsets(self, specs: Any, **settings: Any) -> Any:
        if not self.left:
            return self._client.list_offsets(specs, **settings)
        self.left -= 1
        found = {place: Future[ListOffsetsResultInfo]() for place in specs}
        for future in found.values():
            future.set_result(ListOffsetsResultInfo(OFFSET_INVALID, -1, -1))
        return found


def test_an_end_that_no_broker_has_told_is_asked_for_again(log: KafkaLog, kafka_url: str) -> None:
    """Taken for an end it would hide from a reader what was acknowledged."""
    (event,) = epochs(1)
    log.append([event])
    with closing(KafkaLog(kafka_url)) as reader:
        admin = reader._handle.admin
        admin.client = silent = _Silent(admin.client, 2)  # type: ignore[assignment,unused-ignore]
        assert [record.id for record in read_all(reader)] == [event.id]
        assert silent.left == 0
        silent.left = 1
        assert min(reader.end().offsets.values()) >= 0
