"""Events to test with: every type once, by deterministic keys."""

from __future__ import annotations

import hashlib

import msgspec
from fedloop_events import envelope, ids, signatures, types
from fedloop_events.envelope import Event, Record
from fedloop_events.masked import MaskedText
from fedloop_events.signatures import SigningKey

ORIGIN = "demo"


def key(name: str) -> SigningKey:
    """The same key for the same name."""
    return SigningKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def masked(text: str) -> MaskedText:
    return msgspec.convert({"text": text, "counts": {"PERSON": 1}}, MaskedText)


def created(origin: str = ORIGIN, server: str = "server") -> types.DeploymentCreated:
    return types.DeploymentCreated(origin=origin, public_key=key(server).public_key)


def enrolled(client_id: str = "device-1", node_id: str = "11", by: str | None = None) -> types.ClientEnrolled:
    return types.ClientEnrolled(
        origin=ORIGIN,
        client_id=client_id,
        seq=0,
        public_key=key(by or client_id).public_key,
        node_id=node_id,
        epsilon=8.0,
        delta=1e-5,
    )


def seen(client_id: str = "device-1", seq: int = 1) -> types.ClientSeen:
    return types.ClientSeen(origin=ORIGIN, client_id=client_id, seq=seq, examples_at_least=64)


def revoked(client_id: str = "device-1") -> types.ClientRevoked:
    return types.ClientRevoked(origin=ORIGIN, client_id=client_id, reason="lost")


def feedback(number: int = 0, client_id: str = "device-1") -> types.FeedbackRecorded:
    return types.FeedbackRecorded(
        origin=ORIGIN,
        client_id=client_id,
        seq=number,
        feedback_id=f"f{number}",
        response_id=f"r{number}",
        release="0001-0123456789ab",
        use_case="default",
        text=masked("my card <PERSON_1> is lost"),
        predicted="lost_card",
        thumb="up",
    )


def epoch(number: int = 1) -> types.EpochStarted:
    return types.EpochStarted(origin=ORIGIN, epoch=number, run_id="main", server_id="s1")


def event(payload: types.Payload, number: int | None = None) -> Event:
    """Unsigned; the same id for the same number."""
    identifier = ids.new_id() if number is None else ids.derived_id("test", number)
    return envelope.encode(payload, id=identifier, time_s=1_800_000_000)


def signed(payload: types.Payload, by: str | None = None, number: int | None = None) -> Event:
    return signatures.sign(event(payload, number), key(by or payload.author))


def record(event: Event, offset: int, stream: str = "log", appended_ms: int | None = None) -> Record:
    """`event` as if it stood at `offset`."""
    clock = offset if appended_ms is None else appended_ms
    return Record(**msgspec.structs.asdict(event), stream=stream, offset=offset, appended_ms=clock)
