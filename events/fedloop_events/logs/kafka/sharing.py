"""Work that several processes share: each event goes to one member of a consumer group, at least once.

For a state that is folded, use `KafkaLog.read`: it sees every event. Here a member sees those of the partitions that it holds,
and another one goes on with them, from what was committed last, when it leaves or dies.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.logs.kafka import codec
from fedloop_events.logs.kafka.admin import AWAY, PartitionKey, Trouble, stream_of, translated
from fedloop_events.logs.kafka.settings import KafkaSettings

SESSION_TIMEOUT_S: Final = 10.0
"""After so long without a sign of life a member's partitions go to others."""
_PAUSE_S: Final = 0.2
_MOVED: Final = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError._NO_OFFSET,
        KafkaError._ASSIGNMENT_LOST,
    }
)


class SharedReader:
    """A member of the group `PREFIX-<group>` over `wanted` topics of the log at `url`. Used by one thread."""

    def __init__(self, url: str, wanted: Collection[str], group: str) -> None:
        settings = KafkaSettings.parse(url)
        self._names = {settings.topic(name): name for name in topics.ALL if name in wanted}
        self._trouble = Trouble()
        self._done: dict[PartitionKey, int] = {}
        self._consumer = Consumer(
            {
                **settings.client(),
                "group.id": f"{settings.prefix}-{group}",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "session.timeout.ms": int(SESSION_TIMEOUT_S * 1000),
                "error_cb": self._trouble,
            }
        )
        self._consumer.subscribe(list(self._names), on_revoke=self._revoked, on_lost=self._revoked)

    def read(self, limit: int = 1000, wait_s: float = 0.0) -> Sequence[Record]:
        """Up to `limit` events that no member has committed, waiting up to `wait_s` for the first one.

        Raises NotAllowedError, or PolicyError for a user that is not let in.
        """
        deadline, records = time.monotonic() + wait_s, list[Record]()
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            for message in self._consumer.consume(limit, 0) or self._consumer.consume(1, min(left_s, _PAUSE_S)):
                error, topic = message.error(), message.topic() or ""
                if error is not None:
                    if error.code() not in AWAY:
                        raise translated(error, topic, "read")
                    continue
                place, offset = (topic, message.partition()), message.offset() + 1
                self._done[place] = offset
                records.append(
                    codec.record(
                        self._names[topic],
                        message.key(),
                        message.value(),
                        message.headers(),
                        stream=stream_of(place),
                        offset=offset,
                        appended_ms=message.timestamp()[1],
                    )
                )
            self._trouble.check()
            if records or time.monotonic() >= deadline:
                return records

    @property
    def assigned(self) -> int:
        """How many partitions this member holds now."""
        return len(self._consumer.assignment())

    def commit(self) -> bool:
        """Everything that `read` gave is done. False if some of it has moved to another member, who does it again."""
        if not self._done:
            return True
        offsets = [TopicPartition(*place, offset) for place, offset in self._done.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if error.args[0].code() in _MOVED:
                return False
            raise translated(error.args[0], operation="commit") from None
        finally:
            self._done.clear()
        return True

    def close(self) -> None:
        """Leave the group: others go on at once."""
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _revoked(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        for each in partitions:
            self._done.pop((each.topic, each.partition), None)
