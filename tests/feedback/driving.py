"""Events of the feedback pipeline by the thousand, and operators run over them without a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from fedloop_events import envelope, ids
from fedloop_events.envelope import Record
from fedloop_events.masked import MaskedText
from fedloop_events.types import FeedbackScored, Payload, Reaction
from fedloop_server.feedback.operator import Emit, Operator
from samples import ORIGIN

USE_CASE = "support"


class Emitted(NamedTuple):
    """What its id is made of, and the event."""

    record_id: str
    number: int
    emit: Emit


def scored(number: int, satisfaction: float | None = None, *, text: str = "", **fields: Any) -> FeedbackScored:
    reaction = Reaction(
        msgspec.convert({"text": text or f"question {number}"}, MaskedText), predicted=fields.pop("predicted", None)
    )
    return FeedbackScored(
        ORIGIN,
        USE_CASE,
        ids.derived_id("feedback", number),
        f"c{number % 7}",
        f"f{number}",
        f"r{number}",
        "release-1",
        1000 * number,
        1000 * number + 500,
        reaction,
        satisfaction=satisfaction,
        **fields,
    )


def recorded(payloads: Iterable[Payload]) -> Iterator[tuple[Record, Payload]]:
    for offset, payload in enumerate(payloads):
        event = envelope.encode(payload, id=ids.derived_id("event", offset), time_s=offset)
        fields = {name: getattr(event, name) for name in event.__struct_fields__}
        yield Record(**fields, stream=f"{event.topic}/0", offset=offset, appended_ms=1000 * offset + 700), payload


def drive(operator: Operator[Any], payloads: Sequence[Payload], *, restored_after: int | None = None) -> list[Emitted]:
    """What the operator emits; its states go through their stored form after so many events each."""
    states: dict[str, Any] = {}
    emitted = []
    for offset, (record, payload) in enumerate(recorded(payloads)):
        if (key := operator.key(record, payload)) is None:
            continue
        state = states.setdefault(key, operator.state_type())
        emitted += [Emitted(record.id, n, each) for n, each in enumerate(operator.apply(state, record, payload))]
        if restored_after and offset % restored_after == 0:
            states[key] = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=operator.state_type)
    return emitted
