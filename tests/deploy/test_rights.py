"""What each role may do on a real cluster, tried: exactly what `rights.ROLES` declares, and what must never be."""

from __future__ import annotations

import json
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest
from brokers import Cluster
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from fedloop_cli.main import run
from fedloop_cli.provisioning.certificates import make_ca
from fedloop_events import ids, topics
from fedloop_events.envelope import Event
from fedloop_events.errors import NotAllowedError, PolicyError, UnreachableError, UsageError
from fedloop_events.logs.kafka import KafkaLog, rights
from fedloop_events.logs.kafka.rights import ROLES, Operation, User
from fedloop_events.logs.kafka.settings import KafkaSettings

ANSWER_S: Final = 30.0
DENIED: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError._NOENT,  # "no leaders": of a topic that one may not even see
    }
)
PREFIX: Final = f"rights-{secrets.token_hex(4)}"
Urls = Mapping[str, str]


@pytest.fixture(scope="module")
def urls(secure_kafka: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Urls:
    """The log's location for one user of each role, made by the command, and for the administrator. Each topic has an event."""
    folder = tmp_path_factory.mktemp("users")
    admin = f"kafka://{secure_kafka.bootstrap}/{PREFIX}?config={secure_kafka.properties()}"
    users = [each for role in ROLES for each in ("--create-user", f"{role}:{PREFIX}-{role}")]
    assert run(["init", "kafka", "--log", admin, "--into", str(folder), *users]) == 0
    KafkaLog(admin).append([event(topic) for topic in topics.ALL])
    named = {role: folder / f"{PREFIX}-{role}.properties" for role in ROLES}
    return {role: f"kafka://{secure_kafka.bootstrap}/{PREFIX}?config={path}" for role, path in named.items()} | {"admin": admin}


def event(topic: str) -> Event:
    return Event(topic, "k", ids.new_id(), "tests", "io.fedloop.client.seen.v1", 0, b"{}")


def admin_of(url: str) -> AdminClient:
    return AdminClient(KafkaSettings.parse(url).client())


def allowed(attempt: Callable[[], object]) -> bool:
    """Whether it succeeds; anything but success and a refusal for want of rights is raised."""
    try:
        attempt()
    except NotAllowedError:
        return False
    except KafkaException as error:
        if error.args[0].code() in DENIED:
            return False
        raise
    return True


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_and_writes_exactly_what_is_declared(urls: Urls, role: str) -> None:
    log = KafkaLog(urls[role])
    found = {}
    for topic in topics.ALL:
        reads, writes = allowed(lambda: log.read((topic,))), allowed(lambda: log.append([event(topic)]))  # noqa: B023
        found[topic] = {Operation.READ: reads, Operation.WRITE: writes}
    log.close()
    assert found == {
        topic: {each: each in ROLES[role].topics.get(topic, ()) for each in (Operation.READ, Operation.WRITE)}
        for topic in topics.ALL
    }


def alterations(url: str, topic: str) -> dict[str, Callable[[], object]]:
    """What changes a topic; where Kafka can, it only checks whether it might."""
    admin, name = admin_of(url), f"{PREFIX}.{topic}"
    kept_for_a_day = ConfigEntry("retention.ms", "86400000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[kept_for_a_day])
    return {
        "add partitions": lambda: admin.create_partitions([NewPartitions(name, 12)], validate_only=True)[name].result(ANSWER_S),
        "shorten retention": lambda: admin.incremental_alter_configs([resource], validate_only=True)[resource].result(ANSWER_S),
        "delete": lambda: admin.delete_topics([name])[name].result(ANSWER_S),
        "empty": lambda: next(iter(admin.delete_records([TopicPartition(name, 0, 1)]).values())).result(ANSWER_S),
    }


@pytest.mark.parametrize("role", ROLES)
def test_nobody_but_the_operator_alters_a_topic_and_nobody_deletes(urls: Urls, role: str) -> None:
    for topic in topics.ALL:
        found = {name: allowed(attempt) for name, attempt in alterations(urls[role], topic).items()}
        alters = role == "operator"
        assert found == {"add partitions": alters, "shorten retention": alters, "delete": False, "empty": False}, topic


@pytest.mark.parametrize("role", ROLES)
def test_nobody_but_the_operator_makes_users_rights_or_topics(urls: Urls, role: str) -> None:
    admin, mine = admin_of(urls[role]), f"{PREFIX}-{role}"
    name = f"{PREFIX}.rounds"
    entry = AclBinding(
        ResourceType.TOPIC,
        name,
        ResourcePatternType.LITERAL,
        f"User:{mine}-more",
        "*",
        AclOperation.WRITE,
        AclPermissionType.ALLOW,
    )
    user = UserScramCredentialUpsertion(f"{mine}-more", ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), b"secret")
    other = f"{PREFIX}-{role}-other"
    found = {
        "rights": allowed(lambda: admin.create_acls([entry])[entry].result(ANSWER_S)),
        "users": allowed(lambda: admin.alter_user_scram_credentials([user])[user.user].result(ANSWER_S)),
        "topics of others": allowed(lambda: admin.create_topics([NewTopic(other, 1, 1)])[other].result(ANSWER_S)),
    }
    assert found == {"rights": role == "operator", "users": role == "operator", "topics of others": False}


MUST_NOT: Final = [
    ("agent", "read", "updates"),
    ("agent", "read", "feedback"),
    ("agent", "read", "quarantine"),
    ("agent", "write", "rounds"),
    ("agent", "write", "releases"),
    ("agent", "write", "quarantine"),
    ("gateway", "write", "rounds"),
    ("gateway", "write", "releases"),
    ("server", "write", "updates"),
    ("server", "write", "feedback"),
    ("operator", "write", "updates"),
    ("operator", "write", "audit"),
    *[("auditor", "write", topic) for topic in topics.ALL],
]


@pytest.mark.parametrize(("role", "what", "topic"), MUST_NOT)
def test_it_is_refused_with_an_error_that_names_the_topic(urls: Urls, role: str, what: str, topic: str) -> None:
    log = KafkaLog(urls[role])
    before = KafkaLog(urls["admin"]).end().offsets
    with pytest.raises(NotAllowedError) as raised:
        log.read((topic,)) if what == "read" else log.append([event(topic)])
    assert (raised.value.topic, raised.value.operation) == (f"{PREFIX}.{topic}", what)
    assert raised.value.exit_status == 4
    assert KafkaLog(urls["admin"]).end().offsets == before
    log.close()


@pytest.mark.parametrize("role", [role for role in ROLES if role != "operator"])
def test_nobody_has_transactions_and_servers_alone_consumer_groups(urls: Urls, role: str) -> None:
    settings = KafkaSettings.parse(urls[role])
    producer = Producer({**settings.client(), "transactional.id": "mine"})
    with pytest.raises(KafkaException) as raised:
        producer.init_transactions(ANSWER_S)
    assert raised.value.args[0].code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
    consumer = Consumer({**settings.client(), "group.id": f"{PREFIX}-group"})
    consumer.subscribe([settings.topic(topics.ROUNDS)])
    assert refused(consumer) == (None if role == "server" else KafkaError.GROUP_AUTHORIZATION_FAILED)
    consumer.close()


def refused(consumer: Consumer) -> int | None:
    """Why the group does not take it in; None once it has been assigned partitions."""
    deadline = time.monotonic() + ANSWER_S
    while not consumer.assignment():
        assert time.monotonic() < deadline
        message = consumer.poll(0.1)
        if message is not None and message.error() is not None:
            return int(message.error().code())
    return None


def changed(urls: Urls, folder: Path, role: str = "agent", **properties: str) -> str:
    """The location with other properties; one that is "" is dropped."""
    bare, _, path = urls[role].partition("?config=")
    lines = dict(line.split("=", 1) for line in Path(path).read_text().splitlines()) | {
        key.replace("_", "."): value for key, value in properties.items()
    }
    (folder / "changed.properties").write_text("".join(f"{key}={value}\n" for key, value in lines.items() if value))
    return f"{bare}?config={folder / 'changed.properties'}"


def test_a_wrong_password_and_an_unknown_user_are_not_let_in(urls: Urls, tmp_path: Path) -> None:
    for wrong in ({"sasl_password": "wrong"}, {"sasl_username": "nobody"}, {"sasl_mechanism": "SCRAM-SHA-256"}):
        with pytest.raises(PolicyError) as raised:
            KafkaLog(changed(urls, tmp_path, **wrong), timeout_s=10)
        assert "wrong" not in str(raised.value) + raised.value.cause


def test_who_comes_without_tls_without_a_user_or_with_another_authority_is_not_answered(urls: Urls, tmp_path: Path) -> None:
    plain = urls["agent"].partition("?")[0]
    nobody = changed(urls, tmp_path, security_protocol="SSL", sasl_mechanism="", sasl_username="", sasl_password="")
    for url in (plain, nobody):
        with pytest.raises(UnreachableError):
            KafkaLog(url, timeout_s=2)
    deceived = changed(urls, tmp_path, ssl_ca_location=str(make_ca(tmp_path / "other").certificate))
    with pytest.raises(UnreachableError):
        KafkaLog(deceived, timeout_s=2)


def test_a_password_is_never_sent_in_plain_text(urls: Urls, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SASL_PLAINTEXT is not allowed"):
        KafkaLog(changed(urls, tmp_path, security_protocol="SASL_PLAINTEXT"))


def test_the_listener_between_brokers_takes_certificates_alone_and_gives_other_holders_no_rights(
    secure_kafka: Cluster, tmp_path: Path
) -> None:
    authority = make_ca(secure_kafka.folder / "ca")
    issued = authority.issue("agent-1", [], tmp_path)
    bootstrap = f"127.0.0.1:{secure_kafka._state.ports[0][1]}"
    tls = {"bootstrap.servers": bootstrap, "security.protocol": "SSL", "ssl.ca.location": str(authority.certificate)}
    with pytest.raises(KafkaException):
        AdminClient({**tls, "log_level": 0}).list_topics(timeout=2)
    keys = {"ssl.certificate.location": str(issued.certificate), "ssl.key.location": str(issued.key)}
    known = AdminClient({**tls, **keys, "log_level": 0})
    assert known.list_topics(timeout=ANSWER_S).topics == {}
    assert not allowed(lambda: known.create_topics([NewTopic("mine", 1, 1)])["mine"].result(ANSWER_S))


# --- how users are made -----------------------------------------------------------------------------------------------


def entries(secure_kafka: Cluster, name: str) -> set[AclBinding]:
    wanted = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, f"User:{name}", None, AclOperation.ANY, AclPermissionType.ANY
    )
    return set(secure_kafka.admin().describe_acls(wanted).result(ANSWER_S))


def test_making_a_user_again_changes_nothing(secure_kafka: Cluster, urls: Urls, tmp_path: Path) -> None:
    settings, user = KafkaSettings.parse(urls["admin"]), User("agent", f"{PREFIX}-again")
    (first,) = rights.grant(settings, [user], tmp_path)
    before, password = entries(secure_kafka, user.name), first.properties.read_bytes()
    (second,) = rights.grant(settings, [user], tmp_path)
    assert (first.new, second.new) == (True, False)
    assert (first.added, second.added, second.removed) == (len(before), 0, 0)
    assert entries(secure_kafka, user.name) == before == rights.entries(user, PREFIX)
    assert first.properties.read_bytes() == password
    assert stat.S_IMODE(first.properties.stat().st_mode) == 0o600
    KafkaLog(f"{urls['admin'].partition('?')[0]}?config={first.properties}").close()


def test_another_role_takes_the_old_one_s_rights_and_leaves_what_is_not_this_log_s(
    secure_kafka: Cluster, urls: Urls, tmp_path: Path
) -> None:
    settings, name = KafkaSettings.parse(urls["admin"]), f"{PREFIX}-moved"
    (made,) = rights.grant(settings, [User("operator", name)], tmp_path)
    denied = AclBinding(
        ResourceType.TOPIC,
        f"{PREFIX}.audit",
        ResourcePatternType.LITERAL,
        f"User:{name}",
        "*",
        AclOperation.READ,
        AclPermissionType.DENY,
    )
    others = rights.entries(User("server", name), "another")
    for future in secure_kafka.admin().create_acls([denied, *others]).values():
        future.result(ANSWER_S)
    rights.grant(settings, [User("auditor", name)], tmp_path)
    assert entries(secure_kafka, name) == {denied} | others | rights.entries(User("auditor", name), PREFIX)
    log = KafkaLog(f"{urls['admin'].partition('?')[0]}?config={made.properties}")
    with pytest.raises(NotAllowedError):
        log.append([event("rounds")])
    log.close()


def test_a_user_whose_file_is_lost_is_refused_and_keeps_its_password(urls: Urls, tmp_path: Path) -> None:
    settings, user = KafkaSettings.parse(urls["admin"]), User("agent", f"{PREFIX}-lost")
    (made,) = rights.grant(settings, [user], tmp_path / "one")
    with pytest.raises(UsageError, match="the cluster has a user"):
        rights.grant(settings, [user], tmp_path / "two")
    KafkaLog(f"{urls['admin'].partition('?')[0]}?config={made.properties}").close()


def test_the_administrator_s_own_name_and_one_name_twice_are_refused(urls: Urls, tmp_path: Path) -> None:
    settings = KafkaSettings.parse(urls["admin"])
    for users in ([User("agent", "admin")], [User("agent", "x"), User("auditor", "x")]):
        with pytest.raises(UsageError, match="second role"):
            rights.grant(settings, users, tmp_path)


@pytest.mark.parametrize("text", ["agent", "agent:", "admin:x", "agent:a b", "agent:*", "agent:CN=broker-1", ":x", "agent:a\n"])
def test_a_user_is_written_as_role_and_name(text: str) -> None:
    with pytest.raises(UsageError):
        User.parse(text)


def test_users_are_not_made_where_no_rights_are_checked(kafka_url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TLS alone"):
        rights.grant(KafkaSettings.parse(kafka_url), [User("agent", "x")], tmp_path)


def test_an_agent_cannot_make_users(
    secure_kafka: Cluster, urls: Urls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "kafka", "--log", urls["agent"], "--create-user", "operator:me", "--into", str(tmp_path), "--json"]
    assert run(arguments) == 4
    assert json.loads(capsys.readouterr().out)["error"]["exit_status"] == 4
    assert entries(secure_kafka, "me") == set()


def test_a_user_whose_making_was_cut_off_is_made_whole(secure_kafka: Cluster, urls: Urls, tmp_path: Path) -> None:
    settings, user = KafkaSettings.parse(urls["admin"]), User("agent", f"{PREFIX}-cut")
    rights._write(tmp_path / f"{user.name}.properties", settings, user.name, "drawn-before-the-crash")
    (made,) = rights.grant(settings, [user], tmp_path)
    assert made.properties.read_text().count("drawn-before-the-crash") == 1
    assert entries(secure_kafka, user.name) == rights.entries(user, PREFIX)
    KafkaLog(f"{urls['admin'].partition('?')[0]}?config={made.properties}").close()


def test_the_documentation_shows_the_roles_as_they_are() -> None:
    letters = {"R": Operation.READ, "W": Operation.WRITE, "C": Operation.DESCRIBE_CONFIGS, "A": Operation.ALTER}
    written = []
    for role, declared in ROLES.items():
        cells = [
            "".join(letter for letter, operation in letters.items() if operation in declared.topics.get(topic, ())) or "-"
            for topic in topics.ALL
        ]
        written.append(f"| {role} | {' | '.join(cells)} |")
    page = (Path(__file__).parents[2] / "docs" / "kafka.md").read_text(encoding="utf-8")
    assert "\n".join([f"| role | {' | '.join(topics.ALL)} |", f"|{' --- |' * (len(topics.ALL) + 1)}", *written]) in page
