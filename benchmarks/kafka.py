"""The log on Kafka: durable publishing, and catching up, against confluent-kafka alone on the same broker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from fedloop_events import envelope, topics, types
from fedloop_events.envelope import Event
from fedloop_events.logs.kafka import KafkaLog, codec
from fedloop_events.logs.port import read_all

from benchmarks.broker import broker
from benchmarks.harness import Pair, Row, per_second, rates, seconds, timed_in_turn
from benchmarks.log import maker

PEER_TOPIC = "peer"
_Message = tuple[bytes, bytes, codec.Headers]


def rows(quick: bool) -> list[Row]:
    count, runs = (20_000, 1) if quick else (1_000_000, 5)
    with broker() as bootstrap:
        admin = AdminClient({"bootstrap.servers": bootstrap})
        partitions = topics.DECLARED[topics.FEEDBACK].partitions
        for future in admin.create_topics([NewTopic(PEER_TOPIC, num_partitions=partitions)]).values():
            future.result()
        log = KafkaLog(f"kafka://{bootstrap}/bench", create=True)
        producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": 0,
                "linger.ms": 5,
                "compression.type": "lz4",
                "message.max.bytes": topics.MAX_BATCH_BYTES,
                "queue.buffering.max.messages": 200_000,
            }
        )
        result = [_publish(log, producer, batch, count // 20, runs) for batch in (100, 1000)]
        result.append(_catch_up(log, bootstrap, count, runs=min(runs, 3)))
        log.close()
    return result


def _publish(log: KafkaLog, producer: Producer, batch: int, count: int, runs: int) -> Row:
    """The peer gets each message's key, value and headers ready made, and counts acknowledgements.

    A run is ten chunks, of which both publish each; they take turns at going first. One chunk before them warms both.
    """
    make = maker(18, signed=True)

    def chunk(*, ours_first: bool) -> Pair:
        events = [make() for _ in range(count // 10)]
        messages = [(event.key.encode(), event.data, codec.headers(event)) for event in events]
        ours, theirs = (
            partial(_batches, log.append, events, batch),
            partial(_batches, partial(_produce, producer), messages, batch),
        )
        if ours_first:
            ours_s, theirs_s = seconds(ours), seconds(theirs)
        else:
            theirs_s, ours_s = seconds(theirs), seconds(ours)
        return Pair(ours_s, theirs_s)

    chunk(ours_first=True)
    times = []
    for _ in range(runs):
        chunks = [chunk(ours_first=number % 2 == 0) for number in range(10)]
        times.append(Pair(*map(sum, zip(*chunks, strict=True))))
    what, peer = (
        f"publish durably on Kafka, signed, 1 KB, batches of {batch:,}",
        "confluent-kafka producer, same messages and settings",
    )
    return rates(what, peer, per_second(count, times), "/s", 0.7)


def _produce(producer: Producer, messages: Sequence[_Message]) -> None:
    acknowledged = 0

    def count(error: object, message: object) -> None:
        nonlocal acknowledged
        acknowledged += error is None

    for key, value, headers in messages:
        producer.produce(PEER_TOPIC, value, key, headers=headers, on_delivery=count)
    producer.flush()
    assert acknowledged == len(messages)


def _catch_up(log: KafkaLog, bootstrap: str, count: int, *, runs: int) -> Row:
    make = maker(3, signed=False)
    before = log.end()
    for _ in range(count // 10_000):
        log.append([make() for _ in range(10_000)])
    counts: Counter[str] = Counter()

    def ours() -> None:
        for record in read_all(log, (topics.FEEDBACK,), before):
            counts[envelope.expect(record, types.FeedbackRecorded).client_id] += 1

    def theirs() -> None:
        topic = log.settings.topic(topics.FEEDBACK)
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "peer", "fetch.queue.backoff.ms": 5})
        starts = [
            TopicPartition(topic, number, before.offsets[f"{topic}-{number}"])
            for number in range(topics.DECLARED[topics.FEEDBACK].partitions)
        ]
        consumer.assign(starts)
        left = count
        while left:
            for message in consumer.consume(1000, 1.0):
                message.key(), message.value(), message.headers()
                left -= 1
        consumer.close()

    times = timed_in_turn(ours, theirs, runs=runs)
    assert counts.total() == (1 + runs) * count
    what = f"catch up on Kafka: read, decode and fold {count:,} events of 300 B"
    return rates(what, "confluent-kafka consumer reading the same bytes", per_second(count, times), "/s", 0.4)


def _batches(write: Callable[[Any], None], items: Sequence[Event | _Message], batch: int) -> None:
    for start in range(0, len(items), batch):
        write(items[start : start + batch])
