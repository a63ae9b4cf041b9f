"""Events on the wire: CloudEvents 1.0 in their structured JSON form, one by one or in batches.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md. Topic and key stand in the extensions
`fedlooptopic` and `partitionkey`, the signature in `dssematerial` (binary, so base64), and the place of an event that was read in
`fedloopstream`, `fedloopoffset` and `recordedtime`. What is signed is the bytes of `data`: they are passed on as they are, and
as `data_base64` where they are not JSON.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw, Struct

from fedloop_events.envelope import CONTENT_TYPE, SPECVERSION, Event, Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.logs.port import Position

BATCH_TYPE: Final = "application/cloudevents-batch+json"
_Name = Annotated[str, Meta(max_length=200)]
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MS: Final = datetime.timedelta(milliseconds=1)


class _Wire(Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One CloudEvent, member by member."""

    id: _Name
    source: _Name
    type: _Name
    time: _Name
    dataschema: Annotated[str, Meta(max_length=300)]
    fedlooptopic: _Name
    partitionkey: _Name
    specversion: str = ""
    datacontenttype: str = ""
    data: Raw = Raw(b"")
    data_base64: str = ""
    dssematerial: Annotated[str, Meta(max_length=8192)] = ""
    fedloopstream: _Name = ""
    fedloopoffset: Annotated[str, Meta(max_length=20, pattern="^[0-9]*$")] = ""
    recordedtime: _Name = ""


class _Page(Struct, frozen=True, forbid_unknown_fields=True):
    events: list[_Wire]
    position: dict[str, int]
    more: bool


class Page(Struct, frozen=True):
    """What one answer of a gateway holds; `more`: there was more to read than it did."""

    records: Sequence[Record]
    position: Position
    more: bool


_encode = msgspec.json.Encoder().encode
_decode_one = msgspec.json.Decoder(_Wire).decode
_decode_batch = msgspec.json.Decoder(list[_Wire]).decode
_decode_page = msgspec.json.Decoder(_Page).decode
_skim = msgspec.json.Decoder(Raw).decode


def encode(event: Event) -> bytes:
    """One event. Raises `InvalidEventError` if it has a time that RFC 3339 cannot say."""
    wire = _Wire(
        specversion=SPECVERSION,
        id=event.id,
        source=event.source,
        type=event.type,
        datacontenttype=CONTENT_TYPE,
        dataschema=event.dataschema,
        time=_time(event.id, event.time_s * 1000)[:-5] + "Z",
        fedlooptopic=event.topic,
        partitionkey=event.key,
        dssematerial=base64.b64encode(event.signature.encode()).decode(),
    )
    if _is_json(event.data):
        wire.data = Raw(event.data)
    else:
        wire.data_base64 = base64.b64encode(event.data).decode()
    if isinstance(event, Record):
        wire.fedloopstream, wire.fedloopoffset = event.stream, str(event.offset)
        wire.recordedtime = _time(event.id, event.appended_ms)
    return _encode(wire)


def encode_batch(events: Iterable[Event]) -> bytes:
    """A JSON array of events."""
    return b"[" + b",".join(map(encode, events)) + b"]"


def encode_page(events: Sequence[bytes], position: Position, *, more: bool) -> bytes:
    """An answer of events that are encoded already."""
    return b'{"events":[%b],"position":%b,"more":%b}' % (
        b",".join(events),
        _encode(dict(position.offsets)),
        b"true" if more else b"false",
    )


def decode(data: bytes) -> Event:
    """One event. Raises `InvalidEventError` unless it is one in every member."""
    try:
        return _event(_decode_one(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidEventError("it is not one CloudEvent in JSON with the attributes that an event has") from None


def decode_batch(data: bytes) -> list[Event]:
    """The events of a batch, in order. Raises `InvalidEventError` unless each is one in every member."""
    try:
        wires = _decode_batch(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidEventError("it is not a JSON array of CloudEvents with the attributes that an event has") from None
    return [_event(wire) for wire in wires]


def decode_page(data: bytes) -> Page:
    """What a gateway answered. Raises `InvalidEventError`."""
    try:
        page = _decode_page(data)
        return Page([_record(wire) for wire in page.events], Position(page.position), page.more)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        raise InvalidEventError("it is not a page of events") from None


def encode_position(position: Position) -> str:
    """A position as one query parameter: `log:12`, or `fedloop.rounds-0:3,fedloop.updates-1:4`."""
    return ",".join(f"{stream}:{offset}" for stream, offset in sorted(position.offsets.items()))


def decode_position(text: str) -> Position:
    """Raises `ValueError`."""
    offsets: dict[str, int] = {}
    for part in text.split(",") if text else ():
        stream, _, offset = part.rpartition(":")
        if not stream or len(stream) > 300 or not offset.isascii() or not offset.isdigit() or len(offset) > 18:
            raise ValueError("not a position")
        offsets[stream] = int(offset)
    return Position(offsets)


def _event(wire: _Wire) -> Event:
    data, signature, time_s = bytes(wire.data), "", -1
    try:
        if wire.data_base64:
            if data:
                raise ValueError("two kinds of data")
            data = base64.b64decode(wire.data_base64, validate=True)
        signature = base64.b64decode(wire.dssematerial, validate=True).decode()
        moment = datetime.datetime.fromisoformat(wire.time)
        if len(wire.time) == 20 and wire.time.endswith("Z"):
            time_s = (moment - _EPOCH) // datetime.timedelta(seconds=1)
    except (ValueError, TypeError, OverflowError):
        time_s = -1
    event = Event(
        topic=wire.fedlooptopic,
        key=wire.partitionkey,
        id=wire.id,
        source=wire.source,
        type=wire.type,
        time_s=time_s,
        data=data,
        signature=signature,
    )
    fixed = (wire.specversion, wire.datacontenttype, wire.dataschema)
    if time_s < 0 or fixed != (SPECVERSION, CONTENT_TYPE, event.dataschema):
        raise InvalidEventError("an event has a specversion, time, content type, schema or data that no event of this log has")
    return event


def _record(wire: _Wire) -> Record:
    event = _event(wire)
    appended_ms = (datetime.datetime.fromisoformat(wire.recordedtime) - _EPOCH) // _MS
    return Record(
        event.topic,
        event.key,
        event.id,
        event.source,
        event.type,
        event.time_s,
        event.data,
        event.signature,
        stream=wire.fedloopstream,
        offset=int(wire.fedloopoffset),
        appended_ms=appended_ms,
    )


def _time(event_id: str, ms: int) -> str:
    try:
        moment = _EPOCH + ms * _MS
    except OverflowError:
        raise InvalidEventError(f"event {event_id} has a time that is not between the years 1 and 9999") from None
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"


def _is_json(data: bytes) -> bool:
    """Whether `data` can stand within JSON and come out of it byte for byte."""
    try:
        data.decode()
        return bool(bytes(_skim(data)) == data and data.strip() == data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def as_document(offsets: Mapping[str, int]) -> bytes:
    """A position alone, as an answer."""
    return _encode({"position": dict(offsets)})


class _End(Struct, frozen=True, forbid_unknown_fields=True):
    position: dict[str, int]


def decode_end(data: bytes) -> Position:
    """Raises `InvalidEventError`."""
    try:
        return Position(msgspec.json.decode(data, type=_End).position)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidEventError("it is not a position") from None
