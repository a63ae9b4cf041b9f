"""The cluster as a log sees it: its topics, made as `topics.py` declares them or compared and refused, and where each ends.

Kafka makes a topic with whatever the cluster's defaults are, and a producer's clock decides what retention removes; so nothing is
appended to a topic before it is known to keep its promises.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any, Final, NamedTuple

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from fedloop_events import topics
from fedloop_events.errors import FedloopError, LogError, NotAllowedError, PolicyError, UnreachableError, UsageError
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_events.topics import Topic

REPLICAS: Final = 3
"""Of each partition, where there are as many brokers; then two must have an event before it is acknowledged."""
_PAUSE_S: Final = 0.1
_LOOK_UP_S: Final = 1.0
_ANSWERS_EACH: Final = 6
_NOT_ALLOWED: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)
_NOT_LET_IN: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})
_MISSING: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
_GONE: Final = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})

PartitionKey = tuple[str, int]
"""A topic's name on the cluster, and the number of a partition."""
AWAY: Final = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._TIMED_OUT})
"""What a consumer says while brokers are away: it goes on by itself when they are back."""


class Surplus(NamedTuple):
    """Partitions beyond those that are declared, which no reader reads, and those of them that something was written to."""

    places: Sequence[PartitionKey]
    used: Sequence[PartitionKey]


def stream_of(place: PartitionKey) -> str:
    """What a position calls a partition."""
    return f"{place[0]}-{place[1]}"


def translated(error: KafkaError, topic: str = "", operation: str = "use") -> FedloopError:
    """The error of ours that a librdkafka error is."""
    code = error.code()
    if code in _NOT_ALLOWED:
        return NotAllowedError(topic, operation, cause=error.str())
    if code in _NOT_LET_IN:
        return PolicyError("the brokers do not let this user in", cause=error.str(), hint="check the name and the password")
    if code in _MISSING:
        return LogError(
            f"the topic {topic} is not on the cluster",
            hint="`fedloop init kafka --log kafka://HOST:PORT/PREFIX` makes what is missing; what was in it is lost",
        )
    if code in _GONE:
        return LogError(
            f"the topic {topic} no longer has what was not yet read",
            cause=error.str(),
            hint="its events were deleted, or the topic was made anew: nothing can be folded from it",
        )
    return UnreachableError("the Kafka brokers cannot be reached", cause=error.str(), hint="`fedloop doctor` says what is wrong")


class Trouble:
    """What librdkafka says of its connections, out of band: an `error_cb`. A password that is refused ends all waiting."""

    def __init__(self) -> None:
        self.last = ""
        self._refused: KafkaError | None = None

    def __call__(self, error: KafkaError) -> None:
        self.last = error.str()
        if error.code() in _NOT_LET_IN:
            self._refused = error

    def check(self) -> None:
        """Raise `PolicyError` if the brokers do not let this user in."""
        if self._refused is not None:
            raise translated(self._refused)


class Admin:
    """Asks the cluster. Raises UnreachableError, NotAllowedError, or PolicyError for a user that is not let in."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings, self._trouble = settings, Trouble()
        self.client = AdminClient(
            {
                **settings.client(),
                # With sparse connections librdkafka 2.12 tries a broker that is away without any pause while a request waits
                # for it (docs/decisions/0016); without them it keeps to its backoff.
                "enable.sparse.connections": False,
                "reconnect.backoff.max.ms": 1000,
                "error_cb": self._trouble,
            }
        )

    def create(self, timeout_s: float) -> None:
        """Make the topics that are missing, and wait until the brokers know them."""
        missing = sorted(set(topics.DECLARED) - self.describe(topics.ALL, timeout_s).keys())
        if not missing:
            return
        brokers = self._settled([self.client.describe_cluster(request_timeout=timeout_s)], timeout_s)[0].result().nodes
        replicas = min(REPLICAS, len(brokers))
        wanted = [
            NewTopic(
                self._settings.topic(name),
                num_partitions=topics.DECLARED[name].partitions,
                replication_factor=replicas,
                config=expected(topics.DECLARED[name], replicas),
            )
            for name in missing
        ]
        made = self.client.create_topics(wanted, operation_timeout=timeout_s, request_timeout=timeout_s)
        for topic, future in zip(made, self._settled(made.values(), timeout_s), strict=True):
            error = _error(future)
            if error is not None and error.code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another process was faster
                raise translated(error, topic, "create")
        self._wait_until_shown(_ANSWERS_EACH * len(brokers), timeout_s)

    def _wait_until_shown(self, answers: int, timeout_s: float) -> None:
        """Any broker may answer, and one may know of new topics before another does: so many answers in a row must show all."""
        deadline, shown = time.monotonic() + timeout_s, 0
        while shown < answers:
            if set(topics.DECLARED) <= self.describe(topics.ALL, timeout_s).keys():
                shown += 1
                continue
            if time.monotonic() > deadline:
                raise UnreachableError(f"the brokers do not show the topics of {self._settings.prefix}, which they have made")
            shown = 0
            time.sleep(_PAUSE_S)

    def check(self, timeout_s: float) -> Surplus:
        """Raise `LogError` that names each difference unless the topics are as `topics.py` declares them. They may have more
        partitions, for Kafka cannot take any away: those are given back, and stay empty.

        Topics, and configurations, that this user may not describe are not compared. Raises `UsageError` if there are none.
        """
        found = self.describe(topics.ALL, timeout_s)
        if not found:
            raise UsageError(
                f"there is no log {self._settings.prefix} on {self._settings.bootstrap}, or this user may see nothing of it",
                hint="check the address; an operator makes one with `fedloop server init DIR --log "
                f"kafka://{self._settings.bootstrap}/{self._settings.prefix} --blobs BLOBS --test CSV`",
            )
        differences = [
            f"{self._settings.topic(name)} has {len(replicas)} partitions, not {topics.DECLARED[name].partitions}"
            for name, replicas in found.items()
            if len(replicas) < topics.DECLARED[name].partitions
        ]
        hint = "use another prefix: partitions that are added now would change where a key belongs" if differences else ""
        differences += self._other_settings(found, timeout_s)
        if differences:
            raise LogError(
                f"topics of {self._settings.prefix} would break the log's promises: {'; '.join(differences)}",
                hint=hint or "give them what is declared (kafka-configs.sh), or use another prefix",
            )
        return self._surplus(found, timeout_s)

    def _surplus(self, found: Mapping[str, list[int]], timeout_s: float) -> Surplus:
        places = [
            (self._settings.topic(name), number)
            for name, replicas in found.items()
            for number in range(topics.DECLARED[name].partitions, len(replicas))
        ]
        used = []
        for place in places:
            with suppress(NotAllowedError):
                used += [place for end in self.ends([place], timeout_s).values() if end]
        return Surplus(places, used)

    def describe(self, names: Collection[str], timeout_s: float) -> dict[str, list[int]]:
        """For each topic that is there and that this user may describe: the number of replicas of each partition."""
        collection = TopicCollection([self._settings.topic(name) for name in names])
        asked = self.client.describe_topics(collection, request_timeout=timeout_s)
        self._settled(asked.values(), timeout_s)
        found = {}
        for name in names:
            future = asked[self._settings.topic(name)]
            error = _error(future)
            if error is None:
                found[name] = [len(partition.replicas) for partition in future.result().partitions]
            elif error.code() not in _MISSING | _NOT_ALLOWED:
                raise translated(error, self._settings.topic(name), "describe")
        return found

    def ends(self, partitions: Iterable[PartitionKey], timeout_s: float) -> dict[PartitionKey, int]:
        """The offset of what comes next in each partition."""
        ends: dict[PartitionKey, int] = {}
        wanted, deadline = set(partitions), time.monotonic() + timeout_s
        while wanted:
            left_s = max(_PAUSE_S, deadline - time.monotonic())
            specs = {TopicPartition(*place): OffsetSpec.latest() for place in wanted}
            asked = self.client.list_offsets(
                specs, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=min(left_s, 5.0)
            )
            self._settled(asked.values(), left_s)
            for partition, future in asked.items():
                error = _error(future)
                if error is None and (offset := future.result().offset) < 0:
                    # librdkafka 2.12 reports no error for what a broker that went away was asked.
                    error = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
                if error is None:
                    ends[partition.topic, partition.partition] = offset
                    wanted.remove((partition.topic, partition.partition))
                elif not isinstance(failed := translated(error, partition.topic, "read"), UnreachableError):
                    raise failed
                elif time.monotonic() > deadline:
                    failed.cause = self._trouble.last or failed.cause
                    raise failed
            if wanted:
                self._look_up({topic for topic, _ in wanted})
                time.sleep(_PAUSE_S)  # a partition's leader is being chosen
        return ends

    def _look_up(self, names: Collection[str]) -> None:
        """Learn who leads the partitions of `names` now, from any broker: `describe_topics` waits for one that may be away.

        librdkafka finds "no leader" of a topic that this user may not see: there is none to wait for.
        """
        for name in names:
            try:
                error = self.client.list_topics(name, timeout=_LOOK_UP_S).topics[name].error
            except KafkaException:
                return  # no broker answers
            if error is not None and error.code() in _NOT_ALLOWED:
                raise translated(error, name, "read")

    def _other_settings(self, found: Mapping[str, list[int]], timeout_s: float) -> list[str]:
        resources = {name: ConfigResource(ResourceType.TOPIC, self._settings.topic(name)) for name in found}
        asked = self.client.describe_configs(list(resources.values()), request_timeout=timeout_s)
        self._settled(asked.values(), timeout_s)
        differences = []
        for name, resource in resources.items():
            error = _error(asked[resource])
            if error is not None:
                if error.code() in _NOT_ALLOWED:
                    continue
                raise translated(error, self._settings.topic(name), "describe")
            actual = asked[resource].result()
            for key, value in expected(topics.DECLARED[name], min(found[name], default=0)).items():
                set_to = actual[key].value
                enough = int(set_to) >= int(value) if key == "min.insync.replicas" else set_to == value
                if not enough:
                    differences.append(f"{self._settings.topic(name)} has {key}={set_to}, not {value}")
        return differences

    def _settled(self, futures: Iterable[Future[Any]], timeout_s: float) -> list[Future[Any]]:
        """`futures`, each with a result or an error."""
        waited, deadline = list(futures), time.monotonic() + timeout_s + 1
        while wait_for(waited, _PAUSE_S).not_done:
            self.client.poll(0)
            self._trouble.check()
            if time.monotonic() > deadline:
                raise UnreachableError("the Kafka brokers do not answer", cause=self._trouble.last)
        return waited


def expected(topic: Topic, replicas: int) -> dict[str, str]:
    """The topic configuration that `topic` needs with so many replicas."""
    return {**topic.settings, "min.insync.replicas": "2" if replicas >= REPLICAS else "1"}


def _error(future: Future[Any]) -> KafkaError | None:
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, KafkaException) and isinstance(error.args[0], KafkaError):
        return error.args[0]
    raise error
