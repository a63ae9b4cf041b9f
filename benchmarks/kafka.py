"""The log on Kafka: durable publishing, and catching up, against confluent-kafka alone on the same broker."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from brokers import Cluster
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from fedloop_events import envelope, topics, types
from fedloop_events.envelope import Event
from fedloop_events.logs.kafka import KafkaLog, codec
from fedloop_events.logs.port import read_all

from benchmarks.harness import Row, rates, scratch, seconds
from benchmarks.log import maker

PEER_TOPIC = "peer"
_Message = tuple[bytes, bytes, codec.Headers]


def rows(quick: bool) -> list[Row]:
    count = 20_000 if quick else 1_000_000
    with scratch() as folder, Cluster(folder) as cluster:
        admin = AdminClient({"bootstrap.servers": cluster.bootstrap})
        partitions = topics.DECLARED[topics.FEEDBACK].partitions
        for future in admin.create_topics([NewTopic(PEER_TOPIC, num_partitions=partitions)]).values():
            future.result()
        log = KafkaLog(f"kafka://{cluster.bootstrap}/bench", create=True)
        producer = Producer(
            {
                "bootstrap.servers": cluster.bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "message.timeout.ms": 0,
                "linger.ms": 5,
                "compression.type": "lz4",
                "message.max.bytes": topics.MAX_BATCH_BYTES,
                "queue.buffering.max.messages": 200_000,
            }
        )
        result = [_publish(log, producer, batch, count // 20) for batch in (100, 1000)]
        result.append(_catch_up(log, cluster.bootstrap, count))
        log.close()
    return result


def _publish(log: KafkaLog, producer: Producer, batch: int, count: int) -> Row:
    """The peer is given each message's key, value and headers, and told when it is acknowledged; both in turn."""
    make = maker(18, signed=True)
    ours_s, theirs_s = [], []
    for _ in range(10):
        events = [make() for _ in range(count // 10)]
        messages = [(event.key.encode(), event.data, codec.headers(event)) for event in events]
        theirs_s.append(seconds(partial(_batches, partial(_produce, producer), messages, batch)))
        ours_s.append(seconds(partial(_batches, log.append, events, batch)))
    count = count // 10
    return rates(
        f"publish durably, 1 KB, batches of {batch:,}",
        "confluent-kafka producer, same messages",
        count / statistics.median(ours_s),
        count / statistics.median(theirs_s),
        "/s",
        0.7,
    )


def _produce(producer: Producer, messages: Sequence[_Message]) -> None:
    acknowledged = 0

    def count(error: object, message: object) -> None:
        nonlocal acknowledged
        acknowledged += error is None

    for key, value, headers in messages:
        producer.produce(PEER_TOPIC, value, key, headers=headers, on_delivery=count)
    producer.flush()
    assert acknowledged == len(messages)


def _catch_up(log: KafkaLog, bootstrap: str, count: int) -> Row:
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

    ours_s, theirs_s = [], []
    for _ in range(3):
        ours_s.append(seconds(ours))
        theirs_s.append(seconds(theirs))
    assert counts.total() == 3 * count
    return rates(
        f"catch up: read, decode and fold {count:,} events of 300 B",
        "confluent-kafka consumer reading the same bytes",
        count / statistics.median(ours_s),
        count / statistics.median(theirs_s),
        "/s",
        0.4,
    )


def _batches(write: Callable[[Any], None], items: Sequence[Event | _Message], batch: int) -> None:
    for start in range(0, len(items), batch):
        write(items[start : start + batch])
