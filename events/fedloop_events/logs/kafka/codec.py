"""Events as Kafka messages and back: CloudEvents 1.0 in binary mode, for any other CloudEvents consumer to read.

Attributes are headers `ce_<name>`, the payload's JSON is the value, the event's key the message's key. The value is never empty:
on Kafka that would be a tombstone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final
from zlib import crc32

from fedloop_events.envelope import CONTENT_TYPE, EVENT_ID, MALFORMED, MAX_EVENT_BYTES, SPECVERSION, Event, Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.topics import DECLARED

_Header = tuple[str, bytes]
Headers = list[_Header]
_MAX_SIGNATURE_BYTES: Final = 8 * 1024
_SPECVERSION: Final = SPECVERSION.encode()
_CONTENT_TYPE: Final = CONTENT_TYPE.encode()
_SPECVERSION_HEADER: Final = ("ce_specversion", _SPECVERSION)
_CONTENT: Final = ("content-type", _CONTENT_TYPE)


def check(event: Event) -> None:
    """Raises `InvalidEventError` for an event with an attribute that cannot be a header."""
    for text in (event.key, event.source, event.type, event.signature):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidEventError(f"event {event.id} has an attribute that is no Unicode text") from None


def partition(topic: str, key: bytes) -> int:
    """Where events of a key stand: of the partitions that are declared, whatever the topic has got since, for order holds within
    one. It is the one that librdkafka chooses by itself (`consistent_random`, CRC-32)."""
    return crc32(key) % DECLARED[topic].partitions


def headers(event: Event) -> Headers:
    """The headers of an event that was checked."""
    kind, schema = _type(event.type, event.dataschema)
    found = [_SPECVERSION_HEADER, ("ce_id", event.id.encode()), _source(event.source), kind, _at(event.time_s), schema, _CONTENT]
    if event.signature:
        found.append(("ce_dssematerial", event.signature.encode()))
    return found


def record(
    topic: str,
    key: bytes | None,
    value: bytes | None,
    found: Headers | None,
    stream: str,
    offset: int,
    appended_ms: int,
) -> Record:
    """The event of one message. A message that is none becomes a record of type `MALFORMED`, which every reader refuses."""
    try:
        attributes: dict[str, bytes | None] = dict(found or ())
        identifier, source, when = attributes["ce_id"], attributes["ce_source"], attributes["ce_time"]
        kind, signature = attributes["ce_type"], attributes.get("ce_dssematerial", b"")
        if len(attributes) != len(found or ()):
            raise ValueError("a header stands twice")
        if attributes["ce_specversion"] != _SPECVERSION or attributes["content-type"] != _CONTENT_TYPE:
            raise ValueError("specversion or content-type is another")
        if identifier is None or source is None or when is None or kind is None or signature is None:
            raise ValueError("a header has no value")
        if attributes["ce_dataschema"] != b"urn:fedloop:schema:" + kind:
            raise ValueError("dataschema is another than the type's")
        if not value or key is None or len(value) > MAX_EVENT_BYTES or len(signature) > _MAX_SIGNATURE_BYTES:
            raise ValueError("it has no data, no key, or too much")
        event_id = identifier.decode("ascii")
        if EVENT_ID.fullmatch(event_id) is None:
            raise ValueError("id is not 32 hexadecimal digits")
        return Record(
            topic,
            key.decode(),
            event_id,
            source.decode(),
            kind.decode(),
            _seconds(when),
            value,
            signature.decode("ascii"),
            stream=stream,
            offset=offset,
            appended_ms=appended_ms,
        )
    except (KeyError, ValueError) as error:
        reason = f"it lacks header {error}" if isinstance(error, KeyError) else _reason(error)
        return Record(topic, "", "", "", MALFORMED, 0, reason.encode(), stream=stream, offset=offset, appended_ms=appended_ms)


def _reason(error: ValueError) -> str:
    return "an attribute is not UTF-8" if isinstance(error, UnicodeError) else str(error)


# Headers that many events have in common are made once: making them is most of what an append costs.


@lru_cache(maxsize=256)
def _type(kind: str, schema: str) -> tuple[_Header, _Header]:
    return ("ce_type", kind.encode()), ("ce_dataschema", schema.encode())


@lru_cache(maxsize=4096)
def _source(source: str) -> _Header:
    return "ce_source", source.encode()


@lru_cache(maxsize=4096)
def _at(time_s: int) -> _Header:
    return "ce_time", _time(time_s)


@lru_cache(maxsize=4096)
def _time(time_s: int) -> bytes:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


@lru_cache(maxsize=4096)
def _seconds(time: bytes) -> int:
    try:
        seconds = int(datetime.fromisoformat(time.decode("ascii")).timestamp())
    except (ValueError, OverflowError):
        seconds = -1
    if seconds < 0 or _time(seconds) != time:
        raise ValueError("time is not in whole seconds of UTC")
    return seconds
