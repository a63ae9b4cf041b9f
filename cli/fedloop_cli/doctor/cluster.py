"""A Kafka log, checked from here: connection, certificates, versions, topics, rights, and how the brokers are set."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AclOperation, ConfigResource, ResourceType
from fedloop_events import topics
from fedloop_events.errors import LogError, UnreachableError, UsageError
from fedloop_events.logs.kafka import KafkaLog, rights
from fedloop_events.logs.kafka.admin import Admin, Surplus, stream_of, translated
from fedloop_events.logs.kafka.settings import KafkaSettings

from fedloop_cli.doctor import broker_version, findings
from fedloop_cli.doctor.findings import ANSWER_S, Finding

_FILES: Final = {"ssl.ca.location": "the authority's certificate", "ssl.certificate.location": "this client's certificate"}

# Otherwise a topic is made by whoever misspells one, and what was acknowledged can be lost.
_BROKER_SETTINGS: Final = {"auto.create.topics.enable": "false", "unclean.leader.election.enable": "false"}


def cluster(location: str) -> Iterator[Finding]:
    """Everything about the log at `location`; what rests on what does not answer is left out."""
    yield Finding("versions", "ok", f"librdkafka {confluent_kafka.libversion()[0]}")
    files = [Path(each) for each in parse_qs(urlsplit(location).query).get("config", [])]
    yield from findings.modes("kafka", files)
    settings = KafkaSettings.parse(location)
    yield from _files(settings.properties)
    answered = 0
    for broker in settings.bootstrap.split(","):
        try:
            yield from _broker(broker, settings.properties)
            answered += 1
        except UnreachableError as error:
            yield Finding("kafka", "fail", f"{error.message}: {error.cause}", error.hint)
    if answered:
        yield from _inside(location, settings)


def _files(properties: Mapping[str, str]) -> Iterator[Finding]:
    for key, what in _FILES.items():
        if key in properties:
            path = Path(properties[key])
            yield findings.expiry("kafka", f"{what}, {path},", findings.valid_until(path))
    if "ssl.key.location" in properties:
        yield from findings.modes("kafka", [Path(properties["ssl.key.location"])])
    if properties.get("security.protocol", "PLAINTEXT").upper() == "PLAINTEXT":
        yield Finding(
            "kafka", "warn", "nothing is encrypted and nobody is asked for a name", "for development on one machine alone"
        )


def _broker(address: str, properties: Mapping[str, str]) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    tls = None
    if properties.get("security.protocol", "PLAINTEXT").upper() != "PLAINTEXT":
        tls = ssl.create_default_context(cafile=properties.get("ssl.ca.location"))
        if "ssl.certificate.location" in properties and "ssl.key.location" in properties:
            password = properties.get("ssl.key.password")
            tls.load_cert_chain(properties["ssl.certificate.location"], properties["ssl.key.location"], password)
    with findings.connected(host.strip("[]"), int(port), tls) as connection:
        yield from findings.served("kafka", address, connection)
        newest_known = broker_version.metadata_version(connection)
    if newest_known < broker_version.KAFKA_3_9:
        yield Finding("versions", "fail", f"{address} is older than Kafka 3.9", "3.9.1 or newer: CVE-2024-56128, CVE-2025-27818")
    elif newest_known == broker_version.KAFKA_3_9:
        yield Finding("versions", "warn", f"{address} is a Kafka 3.9", "make sure that it is 3.9.1 or newer: CVE-2025-27818")
    else:
        yield Finding("versions", "ok", f"{address} is a Kafka 4.0 or newer (metadata.version {newest_known})")


def _inside(location: str, settings: KafkaSettings) -> Iterator[Finding]:
    admin = Admin(settings)
    unnamed = "the certificate's holder" if "ssl.certificate.location" in settings.properties else "whoever connects"
    user = settings.properties.get("sasl.username", unnamed)
    admin.describe(topics.ALL, ANSWER_S)
    yield Finding("kafka", "ok", f"{settings.bootstrap} lets {user} in")
    yield from _brokers(admin)
    yield from _rights(settings, user)
    try:
        surplus = admin.check(ANSWER_S)
    except (LogError, UsageError) as error:
        yield Finding("topics", "fail", error.message, error.hint)
        return
    yield from _topics(admin)
    yield from _surplus(surplus)
    with closing(KafkaLog(location, timeout_s=ANSWER_S)) as log:
        yield from findings.log_clock(log)


def _brokers(admin: Admin) -> Iterator[Finding]:
    """How they are set, where the user may see it: an administrator or an operator."""
    try:
        nodes = admin.client.describe_cluster(request_timeout=ANSWER_S).result(ANSWER_S).nodes
        resources = [ConfigResource(ResourceType.BROKER, str(node.id)) for node in nodes]
        asked = [admin.client.describe_configs([each], request_timeout=ANSWER_S)[each] for each in resources]
        found = [each.result(ANSWER_S) for each in asked]
    except KafkaException as error:
        if error.args[0].code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
            return
        raise translated(error.args[0]) from None
    for node, entries in zip(nodes, found, strict=True):
        wrong = [
            f"{key}={entries[key].value}"
            for key, value in _BROKER_SETTINGS.items()
            if key in entries and entries[key].value != value
        ]
        if wrong:
            right = ", ".join(f"{key}={value}" for key, value in _BROKER_SETTINGS.items())
            yield Finding("brokers", "warn", f"broker {node.id} has {', '.join(wrong)}", f"set {right}")
        else:
            yield Finding("brokers", "ok", f"broker {node.id} is set as it should be")


def _topics(admin: Admin) -> Iterator[Finding]:
    seen = admin.describe(topics.ALL, ANSWER_S)
    yield Finding("topics", "ok", f"{len(seen)} of {len(topics.ALL)} are this user's to see, and as declared")
    if min(min(each) for each in seen.values()) < 2:
        yield Finding("topics", "warn", "each event is on one broker alone", "three brokers keep it when one is lost")


def _surplus(surplus: Surplus) -> Iterator[Finding]:
    if surplus.used:
        named = ", ".join(map(stream_of, surplus.used))
        yield Finding(
            "topics",
            "fail",
            f"something was written to {named}, which no reader reads: nothing is appended to this log",
            "find out who writes there; begin anew under another prefix: "
            "`fedloop server init DIR --log kafka://HOST:PORT/PREFIX --blobs BLOBS --test CSV`",
        )
    elif surplus.places:
        topic = surplus.places[0][0]
        yield Finding(
            "topics",
            "warn",
            f"{topic} has more partitions than are declared, of which the log uses none",
            "nothing needs to be done, as long as no other program writes there",
        )


def _rights(settings: KafkaSettings, user: str) -> Iterator[Finding]:
    held = rights.held(settings, ANSWER_S)
    if not held:
        return
    role = rights.role_of(held)
    if role is not None:
        yield Finding("rights", "ok", f"{user} has the rights of role {role}, and no other")
    elif all(AclOperation.DELETE in operations for operations in held.values()):
        yield Finding(
            "rights",
            "warn",
            f"{user} may do everything, also delete the log",
            "run with a user that `fedloop init kafka` makes; if all may do so, set authorizer.class.name on the brokers",
        )
    else:
        listed = "; ".join(f"{topic} {', '.join(sorted(each.name for each in allowed))}" for topic, allowed in held.items())
        yield Finding(
            "rights",
            "warn",
            f"{user} has the rights of no role: {listed}",
            "an administrator gives it those of one with "
            f"`fedloop init kafka --log kafka://HOST:PORT/PREFIX?config=FILE --create-user ROLE:{user}`",
        )
