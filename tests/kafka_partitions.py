"""Messages in partitions that have just been added."""

from __future__ import annotations

import time
from typing import Final

from confluent_kafka import KafkaError, Producer

SHOWN_S: Final = 30.0
"""By when a broker shows a partition that it has made."""


def written(bootstrap: str, topic: str, partition: int) -> None:
    """Have a message acknowledged there, as soon as the broker shows the partition."""
    deadline, failed = time.monotonic() + SHOWN_S, list[KafkaError | None]()
    while failed[-1:] != [None]:
        assert time.monotonic() < deadline, failed[-1:]
        producer = Producer({"bootstrap.servers": bootstrap})
        producer.produce(topic, b"{}", b"x", partition=partition, on_delivery=lambda error, _: failed.append(error))
        assert producer.flush(SHOWN_S) == 0
