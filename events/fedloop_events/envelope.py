"""The envelope of an event: CloudEvents 1.0 attributes around a JSON payload, and the codec between payloads and envelopes.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md. `specversion` is always "1.0", `datacontenttype` always
"application/json" and `dataschema` a function of the type, so none of the three is stored.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from fedloop_events import types
from fedloop_events.errors import InvalidEventError
from fedloop_events.topics import DECLARED

MAX_EVENT_BYTES: Final = 60 * 1024
"""Of the payload: CloudEvents intermediaries need forward only 64 KiB, and so do entries of a transparency log."""
SPECVERSION: Final = "1.0"
CONTENT_TYPE: Final = "application/json"
MALFORMED: Final = "io.fedloop.malformed"
"""Type of the record that stands for something in the log that is no event; its data says why, without any of its content."""
_LAST_TIME_S: Final = 253_402_300_799
"""The end of the year 9999: RFC 3339 knows no later one."""
EVENT_ID: Final = re.compile("[0-9a-f]{32}")

P = TypeVar("P", bound=types.Payload)

_encoder = msgspec.json.Encoder()
_decoders: Final[dict[str, msgspec.json.Decoder[types.Payload | types.Older]]] = {}
"""Made when first needed: a type may be registered after this module was imported."""


class Event(Struct, frozen=True, gc=False):
    """One event as it is appended.

    `id` is 32 hexadecimal digits, `time_s` whole seconds since 1970 (informative: order is position in the log), `data` the
    payload's JSON, `signature` the DSSE envelope of the CloudEvents verifiability extension (attribute `dssematerial`), or "".
    """

    topic: str
    key: str
    id: str
    source: str
    type: str
    time_s: int
    data: bytes
    signature: str = ""

    @property
    def dataschema(self) -> str:
        return f"urn:fedloop:schema:{self.type}"


class Record(Event, frozen=True, kw_only=True, gc=False):
    """An event and where it stands: `offset` rises within `stream`, `appended_ms` is the log's own clock."""

    stream: str
    offset: int
    appended_ms: int


def check(event: Event) -> None:
    """Raises `InvalidEventError` for an event that no log may hold, whatever its type says."""
    if EVENT_ID.fullmatch(event.id) is None:
        raise InvalidEventError("an event id is not 32 lower-case hexadecimal digits", hint="use fedloop_events.ids")
    if event.topic not in DECLARED:
        raise InvalidEventError(f"event {event.id} is for a topic that does not exist")
    if not 0 < len(event.data) <= MAX_EVENT_BYTES:
        raise InvalidEventError(f"event {event.id} has {len(event.data):,} bytes of data; 1 to {MAX_EVENT_BYTES:,} can be held")
    if not 0 <= event.time_s <= _LAST_TIME_S:
        raise InvalidEventError(f"event {event.id} has a time that is not between the years 1970 and 9999")


def source_of(payload: types.Payload) -> str:
    """CloudEvents `source` of whoever signs this: the server, or one client."""
    return f"/{payload.origin}/server" if payload.author == "server" else f"/{payload.origin}/clients/{payload.author}"


def size_bytes(part: Struct) -> int:
    """How much of an event's `MAX_EVENT_BYTES` a payload, or a part of one, takes."""
    return len(_encoder.encode(part))


def encode(payload: types.Payload, *, id: str, time_s: int) -> Event:  # noqa: A002 (the attribute's name)
    """The unsigned event of `payload`. Raises `InvalidEventError` if it is larger than `MAX_EVENT_BYTES`."""
    data = _encoder.encode(payload)
    if len(data) > MAX_EVENT_BYTES:
        raise InvalidEventError(
            f"a {payload.type_name} event of {len(data):,} bytes is larger than {MAX_EVENT_BYTES:,}",
            hint="put tensors into arrays, which are blobs, and send less in one event",
        )
    return Event(
        topic=payload.topic,
        key=payload.key,
        id=id,
        source=source_of(payload),
        type=payload.type_name,
        time_s=time_s,
        data=data,
    )


def decode(event: Event) -> types.Payload | None:
    """The payload, upcast to its newest version; None if this program does not know the type (a newer one wrote it).

    Raises `InvalidEventError` if the data is not exactly what the type says. Whether it is authentic is for
    `signatures.verify` to find.
    """
    if event.type == MALFORMED:
        raise InvalidEventError(f"a message in topic {event.topic} is no event: {event.data.decode(errors='replace')}")
    decoder = _decoders.get(event.type) or _decoder(event.type)
    if decoder is None:
        return None
    try:
        payload = decoder.decode(event.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # msgspec names the place and the expected type, never the value.
        raise InvalidEventError(f"event {event.id} is not a valid {event.type}: {error}") from None
    while isinstance(payload, types.Older):
        payload = payload.upcast()
    return payload


def _decoder(type_name: str) -> msgspec.json.Decoder[types.Payload | types.Older] | None:
    known: type[types.Payload | types.Older] | None = types.CURRENT.get(type_name) or types.OLDER.get(type_name)
    return None if known is None else _decoders.setdefault(type_name, msgspec.json.Decoder(known))


def expect(event: Event, payload_type: type[P]) -> P:
    """`decode`, for an event that must be a `payload_type`."""
    payload = decode(event)
    if not isinstance(payload, payload_type):
        raise InvalidEventError(f"event {event.id} is a {event.type}, not a {payload_type.type_name}")
    return payload
