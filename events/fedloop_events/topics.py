"""The topics of the log, and what each promises on Kafka (keys: the event types; meaning: docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct

CLIENTS: Final = "clients"
FEEDBACK: Final = "feedback"
ROUNDS: Final = "rounds"
UPDATES: Final = "updates"
RELEASES: Final = "releases"
AUDIT: Final = "audit"
QUARANTINE: Final = "quarantine"
SCORED: Final = "scored"
METRICS: Final = "metrics"
TRAINING: Final = "training"

ALL: Final = (CLIENTS, FEEDBACK, QUARANTINE, SCORED, METRICS, TRAINING, ROUNDS, UPDATES, RELEASES, AUDIT)
"""In an order in which one can cause the next: events of the same millisecond are read in it."""

KEPT: Final = -1
MAX_BATCH_BYTES: Final = 256 * 1024
"""Of a compressed batch on Kafka. LZ4 unpacks to at most 255 times as much, which librdkafka still unpacks: a batch that it will
not unpack would stop every reader for good. A batch in another compression is unpacked and packed anew by the broker."""
_DAY_MS: Final = 24 * 3600 * 1000


class Topic(Struct, frozen=True):
    """How a topic is kept on Kafka. `retention_ms` runs on the broker's clock; -1 keeps events for ever.

    A topic with one partition has one order over all its keys. `clients` needs it, for the first enrolment under a name, a key or
    a node id holds; `audit` has one Merkle tree.
    """

    name: str
    partitions: int = 1
    retention_ms: int = KEPT
    by_client: bool = False
    """Whether a key is the client that an event is by, or about."""

    @property
    def settings(self) -> dict[str, str]:
        """Kafka's topic configuration, whatever the number of replicas."""
        return {
            "cleanup.policy": "delete",
            "compression.type": "lz4",
            "max.message.bytes": str(MAX_BATCH_BYTES),
            "message.timestamp.type": "LogAppendTime",
            "retention.bytes": "-1",
            "retention.ms": str(self.retention_ms),
        }


DECLARED: Final[Mapping[str, Topic]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Topic(CLIENTS, by_client=True),
            Topic(FEEDBACK, partitions=6, retention_ms=90 * _DAY_MS, by_client=True),
            Topic(ROUNDS),
            Topic(UPDATES, partitions=6, by_client=True),
            Topic(RELEASES),
            Topic(AUDIT, by_client=True),
            Topic(QUARANTINE, retention_ms=14 * _DAY_MS),
            Topic(SCORED, partitions=6, retention_ms=14 * _DAY_MS),
            Topic(METRICS, partitions=6, retention_ms=400 * _DAY_MS),
            Topic(TRAINING, partitions=6, retention_ms=90 * _DAY_MS),
        )
    }
)
