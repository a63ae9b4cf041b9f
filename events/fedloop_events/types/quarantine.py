"""Topic `quarantine`: what counts for nothing, and what the operator decided about it."""

from __future__ import annotations

from typing import Literal

from fedloop_events import topics
from fedloop_events.types.fields import (
    Count,
    EventId,
    Identifier,
    Line,
)
from fedloop_events.types.payload import Audience, Older, Payload


class EventQuarantined(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An event that counts for nothing: where it stands and why, never what it holds.

    `found` counts, by type, what looked personal in it, `client_id` is its author.
    """

    topic = topics.QUARANTINE
    type_name = "io.fedloop.event.quarantined.v2"
    audience = Audience.NOBODY

    source_topic: Line
    event_id: EventId
    reason: Identifier
    detail: Line = ""
    client_id: Identifier | None = None
    use_case: Identifier | None = None
    release: Identifier | None = None
    given_ms: Count = 0
    recorded_ms: Count = 0
    found: dict[Line, Count] = {}

    @property
    def key(self) -> str:
        return self.source_topic


class EventQuarantinedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: without its author and what was found."""

    type_name = "io.fedloop.event.quarantined.v1"
    becomes = EventQuarantined

    origin: Identifier
    source_topic: Line
    event_id: EventId
    reason: Identifier
    detail: Line = ""

    def upcast(self) -> EventQuarantined:
        return EventQuarantined(self.origin, self.source_topic, self.event_id, self.reason, self.detail)


class QuarantineDecided(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator looked at what the gate held back: "release" lets the pipeline take it in as it is, "drop" is for ever."""

    topic = topics.QUARANTINE
    type_name = "io.fedloop.quarantine.decided.v1"
    audience = Audience.NOBODY

    source_topic: Line
    event_id: EventId
    decision: Literal["release", "drop"]
    reason: Line = ""

    @property
    def key(self) -> str:
        return self.source_topic
