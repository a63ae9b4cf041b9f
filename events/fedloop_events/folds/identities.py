"""Whose key signs what, at which place of the log: the fold over topic `clients`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Self

import msgspec
from msgspec import Struct, structs

from fedloop_events import signatures, topics
from fedloop_events.envelope import Event, Record, source_of
from fedloop_events.errors import InvalidEventError
from fedloop_events.logs.port import Position
from fedloop_events.types import ClientEnrolled, ClientRevoked, ClientSeen, DeploymentCreated, Payload

MAX_SKEW_MS: Final = 5_000
"""How far the clocks of two brokers may be apart: what a client appends as soon as it is enrolled is accepted."""


class RecordPosition(Struct, frozen=True):
    """Where an event stands. Within one stream offsets decide what was first; across streams the log's clock does."""

    stream: str
    offset: int
    appended_ms: int

    def precedes(self, record: Record) -> bool:
        if self.stream == record.stream:
            return self.offset < record.offset
        return self.appended_ms <= record.appended_ms


class Client(Struct, frozen=True):
    """One enrolled device. `seen_ms` is when it last recorded that it is up (its enrolment at first)."""

    client_id: str
    public_key: str
    node_id: int
    epsilon: float | None
    delta: float
    enrolled_at: RecordPosition
    seen_ms: int
    examples_at_least: int = 0
    device: str = "cpu"
    revoked_at: RecordPosition | None = None

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None


class _State(Struct):
    origin: str = ""
    server_key: str = ""
    clients: dict[str, Client] = {}
    offsets: dict[str, int] = {}


class Identities:
    """The keys of the server and of the clients. The first deployment and the first enrolment under a name hold."""

    topics: Final = (topics.CLIENTS,)
    version: Final = 1

    def __init__(self) -> None:
        self._state = _State()
        self._nodes: set[int] = set()
        self._keys: set[str] = set()

    @property
    def origin(self) -> str:
        return self._state.origin

    @property
    def server_key(self) -> str:
        return self._state.server_key

    @property
    def position(self) -> Position:
        """Up to where topic `clients` has been taken in."""
        return Position(self._state.offsets)

    @property
    def clients(self) -> Mapping[str, Client]:
        return MappingProxyType(self._state.clients)

    def apply(self, record: Record, payload: Payload) -> None:
        """Take in one event of topic `clients`; one that was taken in already changes nothing.

        Raises `InvalidEventError` (`SignatureError`) if it is refused: then it changes nothing either.
        """
        offsets = self._state.offsets
        if record.offset <= offsets.get(record.stream, 0):
            return
        offsets[record.stream] = record.offset
        match payload:
            case DeploymentCreated():
                self._create(record, payload)
            case ClientEnrolled():
                self._enrol(record, payload)
            case ClientRevoked():
                self.authenticate(record, payload)
                self._replace(payload.client_id, revoked_at=_position(record))
            case ClientSeen():
                self.authenticate(record, payload)
                self._replace(
                    payload.client_id,
                    seen_ms=record.appended_ms,
                    examples_at_least=payload.examples_at_least,
                    device=payload.device,
                )
            case _:
                self.authenticate(record, payload)

    def authenticate(self, event: Event, payload: Payload) -> None:
        """Raise `InvalidEventError` or `SignatureError` unless `event` is by whom `payload` names.

        Its deployment, source, topic and key must be the payload's, and its signature by the author's key. For a `Record`, the
        author must have been enrolled, and not yet revoked, at its place in the log.
        """
        if not self.origin:
            raise InvalidEventError(f"event {event.id} stands in a log without a deployment")
        if payload.origin != self.origin:
            raise InvalidEventError(f"event {event.id} belongs to another deployment than {self.origin}")
        _check_envelope(event, payload)
        signatures.verify(event, self._key(event, payload))

    def to_state(self) -> bytes:
        return msgspec.json.encode(self._state)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        identities = cls()
        identities._state = msgspec.json.decode(state, type=_State)
        clients = identities._state.clients.values()
        identities._nodes = {client.node_id for client in clients}
        identities._keys = {client.public_key for client in clients}
        return identities

    def _create(self, record: Record, payload: DeploymentCreated) -> None:
        if self.origin:
            raise InvalidEventError(f"event {record.id} would create the deployment a second time")
        _check_envelope(record, payload)
        signatures.verify(record, payload.public_key)
        self._state.origin, self._state.server_key = payload.origin, payload.public_key

    def _enrol(self, record: Record, payload: ClientEnrolled) -> None:
        if payload.client_id == "server" or payload.public_key == self.server_key:
            raise InvalidEventError(f"event {record.id} enrols a client under the server's name or key")
        if payload.client_id in self._state.clients:
            raise InvalidEventError(f"event {record.id} enrols client {payload.client_id} a second time")
        if payload.origin != self.origin:
            raise InvalidEventError(f"event {record.id} belongs to another deployment than {self.origin}")
        node_id = int(payload.node_id)
        if not 0 < node_id < 1 << 64 or str(node_id) != payload.node_id or node_id in self._nodes:
            raise InvalidEventError(f"event {record.id} enrols a client under a node id that is malformed or taken")
        if payload.public_key in self._keys:
            raise InvalidEventError(f"event {record.id} enrols a client under the key of another")
        _check_envelope(record, payload)
        signatures.verify(record, payload.public_key)
        self._nodes.add(node_id)
        self._keys.add(payload.public_key)
        self._state.clients[payload.client_id] = Client(
            client_id=payload.client_id,
            public_key=payload.public_key,
            node_id=node_id,
            epsilon=payload.epsilon,
            delta=payload.delta,
            enrolled_at=_position(record),
            seen_ms=record.appended_ms,
        )

    def _key(self, event: Event, payload: Payload) -> str:
        if payload.author == "server":
            return self.server_key
        client = self._state.clients.get(payload.author)
        if client is None or (isinstance(event, Record) and not _enrolled(client, event)):
            raise InvalidEventError(f"event {event.id} is by {payload.author}, who is not enrolled")
        if client.revoked_at is not None and not (isinstance(event, Record) and not client.revoked_at.precedes(event)):
            raise InvalidEventError(f"event {event.id} is by {payload.author}, who has been revoked")
        return client.public_key

    def _replace(self, client_id: str, **changes: object) -> None:
        client = self._state.clients.get(client_id)
        if client is not None and client.revoked_at is None:
            self._state.clients[client_id] = structs.replace(client, **changes)


def _enrolled(client: Client, record: Record) -> bool:
    place = client.enrolled_at
    if place.stream == record.stream:
        return place.offset <= record.offset
    return place.appended_ms <= record.appended_ms + MAX_SKEW_MS


def _position(record: Record) -> RecordPosition:
    return RecordPosition(record.stream, record.offset, record.appended_ms)


def _check_envelope(event: Event, payload: Payload) -> None:
    if (event.topic, event.key, event.source) != (payload.topic, payload.key, source_of(payload)):
        raise InvalidEventError(f"event {event.id} stands under another topic, key or source than its data names")
