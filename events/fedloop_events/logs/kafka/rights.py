"""Who may do what on a Kafka log: the roles, and how users get them (SCRAM credentials and access control lists).

These rights are the second fence. The first is the signature: what a client or the server appends counts by its key, whatever the
brokers let in. Rights keep texts, updates and the order of rounds from those who need not read or may not append them. Whatever
is not named is refused, transactions too: nobody needs them (docs/decisions/0008), and idempotent producers need WRITE alone.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from msgspec import Struct

from fedloop_events import topics
from fedloop_events.errors import LogError, NotAllowedError, PolicyError, UsageError
from fedloop_events.files import write_private
from fedloop_events.logs.kafka.admin import Admin, translated
from fedloop_events.logs.kafka.settings import READER_GROUP, KafkaSettings, read_properties

T = TypeVar("T")

SCRAM_ITERATIONS: Final = 8192
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
_CLUSTER: Final = "kafka-cluster"
_PAUSE_S: Final = 0.05


class Operation(Enum):
    """What can be allowed on a topic (kafka.apache.org/documentation/#operations_resources_and_protocols).

    Each of READ, WRITE and ALTER lets its holder describe the topic.
    """

    READ = AclOperation.READ
    WRITE = AclOperation.WRITE
    CREATE = AclOperation.CREATE
    ALTER = AclOperation.ALTER
    DESCRIBE_CONFIGS = AclOperation.DESCRIBE_CONFIGS
    ALTER_CONFIGS = AclOperation.ALTER_CONFIGS


Operations = frozenset[Operation]


class Role(Struct, frozen=True):
    """`topics`: what is allowed on each; one that is not named is closed. `cluster`: what is allowed on the cluster itself.

    `groups`: whether its processes may share work in the log's consumer groups (`sharing`).
    """

    topics: Mapping[str, Operations]
    cluster: frozenset[AclOperation] = frozenset()
    groups: bool = False


def _role(
    reads: Iterable[str],
    writes: Iterable[str] = (),
    more: Iterable[Operation] = (),
    cluster: Iterable[AclOperation] = (),
    *,
    groups: bool = False,
) -> Role:
    reads, writes, more = set(reads), set(writes), set(more)
    allowed = {
        name: frozenset({*([Operation.READ] * (name in reads)), *([Operation.WRITE] * (name in writes)), *more})
        for name in topics.ALL
        if name in reads | writes or more
    }
    return Role(MappingProxyType(allowed), frozenset(cluster), groups)


_OF_DEVICES: Final = (topics.CLIENTS, topics.FEEDBACK, topics.UPDATES, topics.AUDIT)
_OF_PIPELINES: Final = (topics.QUARANTINE, topics.SCORED, topics.METRICS, topics.TRAINING)
_OF_SERVERS: Final = (topics.CLIENTS, topics.ROUNDS, topics.RELEASES, topics.AUDIT, *_OF_PIPELINES)

ROLES: Final[Mapping[str, Role]] = MappingProxyType(
    {
        # Its ledger, and who is enrolled, it can only find among everybody's; behind a gateway a device sees its own alone.
        "agent": _role((topics.CLIENTS, topics.ROUNDS, topics.RELEASES, topics.AUDIT), _OF_DEVICES),
        "gateway": _role((topics.ROUNDS, topics.RELEASES, *_OF_DEVICES), _OF_DEVICES, (Operation.DESCRIBE_CONFIGS,)),
        "server": _role(topics.ALL, _OF_SERVERS, (Operation.DESCRIBE_CONFIGS,), groups=True),
        "auditor": _role(topics.ALL, (), (Operation.DESCRIBE_CONFIGS,)),
        # Asks for rounds, revokes clients, rolls releases back; makes topics and users. As whoever makes users, it can give
        # itself any right. Nobody may delete: the log is append-only.
        "operator": _role(
            topics.ALL,
            (topics.CLIENTS, topics.ROUNDS, topics.RELEASES, *_OF_PIPELINES),
            (Operation.CREATE, Operation.ALTER, Operation.DESCRIBE_CONFIGS, Operation.ALTER_CONFIGS),
            (AclOperation.ALTER, AclOperation.DESCRIBE, AclOperation.DESCRIBE_CONFIGS),
        ),
    }
)


class User(Struct, frozen=True):
    """A name on the cluster, and one of `ROLES`."""

    role: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `ROLE:NAME`. Raises `UsageError`."""
        role, _, name = text.partition(":")
        if role not in ROLES or _NAME.fullmatch(name) is None:
            raise UsageError(
                f"{text!r} names no user as ROLE:NAME",
                hint=f"roles are {', '.join(ROLES)}; a name is 1 to 60 ASCII letters, digits, - or _, the first no - or _",
            )
        return cls(role, name)


class Granted(Struct, frozen=True):
    """What was done for a user. `added` and `removed` count access control entries."""

    user: User
    properties: Path
    new: bool
    added: int
    removed: int


def entries(user: User, prefix: str) -> set[AclBinding]:
    """The access control entries that make `user` what its role says, for the log `prefix`."""
    role = ROLES[user.role]
    groups = _entry(user.name, ResourceType.GROUP, f"{prefix}-", AclOperation.READ, ResourcePatternType.PREFIXED)
    # A reader is in no group, but librdkafka asks again and again for the coordinator of the one that it must name.
    named = _entry(user.name, ResourceType.GROUP, f"{prefix}-{READER_GROUP}", AclOperation.DESCRIBE)
    return {
        _entry(user.name, ResourceType.TOPIC, f"{prefix}.{topic}", operation.value)
        for topic, operations in role.topics.items()
        for operation in operations
    } | {
        *(_entry(user.name, ResourceType.BROKER, _CLUSTER, operation) for operation in role.cluster),
        *([groups, named] if role.groups else [named]),
    }


def grant(settings: KafkaSettings, users: Sequence[User], folder: Path, timeout_s: float = 30.0) -> list[Granted]:
    """Make `users`, or make them anew what their roles say: what an earlier role allowed on this log is taken away.

    The password of each is drawn here and lies in its properties file in `folder` (0600) alone; a file that is there is kept, and
    its password set again. Raises `UsageError` for a user that the cluster has and `folder` does not, and for brokers that check
    no rights; PolicyError and UnreachableError.
    """
    if settings.properties.get("security.protocol", "PLAINTEXT").upper() not in {"SSL", "SASL_SSL"}:
        raise UsageError("users are made over TLS alone", hint="name the administrator's properties: kafka://…?config=FILE")
    admin = Admin(settings).client
    own = settings.properties.get("sasl.username")
    twice = {user.name for user in users if sum(each.name == user.name for each in users) > 1}
    if twice or own in {user.name for user in users}:
        raise UsageError(
            f"user {min(twice) if twice else own} would get a second role", hint="give each user one name and one role"
        )
    _check_authority(admin, timeout_s)
    present = {user: _present(admin, user, timeout_s) for user in users}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [_grant(admin, settings, user, folder, present[user], timeout_s) for user in users]


def held(settings: KafkaSettings, timeout_s: float = 30.0) -> dict[str, frozenset[AclOperation]]:
    """What the user of `settings` may do on each topic that it may see, as the brokers say. Raises as `grant` does."""
    names = {settings.topic(topic): topic for topic in topics.ALL}
    admin = Admin(settings).client
    asked = admin.describe_topics(TopicCollection(list(names)), include_authorized_operations=True, request_timeout=timeout_s)
    found = {}
    for name, future in asked.items():
        try:
            found[names[name]] = frozenset(_result(future, timeout_s).authorized_operations or ())
        except (NotAllowedError, LogError):  # hidden, or absent
            continue
    return found


def role_of(held: Mapping[str, frozenset[AclOperation]]) -> str | None:
    """The role whose rights are exactly those that are held."""
    for role in ROLES:
        if all(held.get(topic, frozenset()) == _implied(role, topic) for topic in topics.ALL):
            return role
    return None


def _implied(role: str, topic: str) -> frozenset[AclOperation]:
    operations = {each.value for each in ROLES[role].topics.get(topic, ())}
    if operations & {AclOperation.READ, AclOperation.WRITE, AclOperation.ALTER}:
        operations.add(AclOperation.DESCRIBE)
    return frozenset(operations)


def _grant(admin: AdminClient, settings: KafkaSettings, user: User, folder: Path, present: bool, timeout_s: float) -> Granted:
    path = (folder / f"{user.name}.properties").absolute()
    if path.exists():
        found = read_properties(path)
        password = found.get("sasl.password", "")
        if not password or found.get("sasl.username") != user.name:
            raise UsageError(f"{path} is not the file of a user {user.name}", hint="restore it, or name another folder")
    elif present:
        raise UsageError(
            f"the cluster has a user {user.name}, and there is no {path}", hint="restore the file, or choose another name"
        )
    else:
        password = secrets.token_urlsafe(32)
        _write(path, settings, user.name, password)
    # Rights before the password: there is no moment at which an old role's rights go with it.
    added, removed = _set_entries(admin, user, settings.prefix, timeout_s)
    mechanism = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS)
    upsertion = UserScramCredentialUpsertion(user.name, mechanism, password.encode())
    _result(admin.alter_user_scram_credentials([upsertion], request_timeout=timeout_s)[user.name], timeout_s)
    return Granted(user, path, not present, added, removed)


def _check_authority(admin: AdminClient, timeout_s: float) -> None:
    """Before anything is asked that may be refused: librdkafka 2.12 corrupts its memory when a question for SCRAM users is."""
    cluster = _result(admin.describe_cluster(include_authorized_operations=True, request_timeout=timeout_s), timeout_s)
    if not {AclOperation.ALTER, AclOperation.DESCRIBE} <= set(cluster.authorized_operations or ()):
        raise PolicyError("this user may not make users", hint="name an administrator's or operator's properties in --log")


def _set_entries(admin: AdminClient, user: User, prefix: str, timeout_s: float) -> tuple[int, int]:
    wanted, there = entries(user, prefix), _entries(admin, user, prefix, timeout_s)
    filters = [_exactly(each) for each in there - wanted]
    for future in admin.delete_acls(filters, request_timeout=timeout_s).values() if filters else ():
        _result(future, timeout_s)
    missing = list(wanted - there)
    for created in admin.create_acls(missing, request_timeout=timeout_s).values() if missing else ():
        _result(created, timeout_s)
    # The controller has taken them; each broker learns of them a moment later. (Who may not ask is told of none, and no error.)
    deadline = time.monotonic() + timeout_s
    while _entries(admin, user, prefix, timeout_s) != wanted:
        if time.monotonic() > deadline:
            raise LogError(f"the rights of {user.name} are not what was asked for", hint="is somebody else changing them?")
        time.sleep(_PAUSE_S)
    return len(missing), len(filters)


def _entries(admin: AdminClient, user: User, prefix: str, timeout_s: float) -> set[AclBinding]:
    """What the user is allowed on this log's topics and on the cluster; what an administrator denies stays as it is."""
    everything = AclBindingFilter(
        ResourceType.ANY,
        None,
        ResourcePatternType.ANY,
        f"User:{user.name}",
        None,
        AclOperation.ANY,
        AclPermissionType.ALLOW,
    )
    found = _result(admin.describe_acls(everything, request_timeout=timeout_s), timeout_s)
    return {
        each
        for each in found
        if each.name in (_CLUSTER, f"{prefix}-", f"{prefix}-{READER_GROUP}") or each.name.startswith(f"{prefix}.")
    }


def _present(admin: AdminClient, user: User, timeout_s: float) -> bool:
    future = admin.describe_user_scram_credentials([user.name], request_timeout=timeout_s)[user.name]
    try:
        _result(future, timeout_s)
    except _AbsentError:
        return False
    return True


class _AbsentError(Exception):
    pass


def _result(future: Future[T], timeout_s: float) -> T:
    try:
        return future.result(timeout_s + 1)
    except KafkaException as raised:
        error = raised.args[0]
        if error.code() == KafkaError.RESOURCE_NOT_FOUND:
            raise _AbsentError from None
        if error.code() == KafkaError.SECURITY_DISABLED:
            raise UsageError(
                "the brokers check no rights: whoever reaches them may do everything",
                hint="set authorizer.class.name and allow.everyone.if.no.acl.found=false on each",
            ) from None
        raise translated(error, _CLUSTER, "alter") from None


def _write(path: Path, settings: KafkaSettings, name: str, password: str) -> None:
    properties = {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": name,
        "sasl.password": password,
    }
    if "ssl.ca.location" in settings.properties:
        properties["ssl.ca.location"] = str(Path(settings.properties["ssl.ca.location"]).absolute())
    write_private(path, "".join(f"{key}={value}\n" for key, value in properties.items()).encode())


def _entry(
    name: str,
    kind: ResourceType,
    resource: str,
    operation: AclOperation,
    pattern: ResourcePatternType = ResourcePatternType.LITERAL,
) -> AclBinding:
    return AclBinding(kind, resource, pattern, f"User:{name}", "*", operation, AclPermissionType.ALLOW)


def _exactly(entry: AclBinding) -> AclBindingFilter:
    return AclBindingFilter(
        entry.restype,
        entry.name,
        entry.resource_pattern_type,
        entry.principal,
        entry.host,
        entry.operation,
        entry.permission_type,
    )
