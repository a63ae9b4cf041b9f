"""Topic `quarantine`: what counts for nothing."""

from __future__ import annotations

from fedloop_events import topics
from fedloop_events.types.fields import (
    EventId,
    Identifier,
    Line,
)
from fedloop_events.types.payload import Audience, Payload


class EventQuarantined(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An event that counts for nothing: where it stands and why, never what it holds."""

    topic = topics.QUARANTINE
    type_name = "io.fedloop.event.quarantined.v1"
    audience = Audience.NOBODY

    source_topic: Line
    event_id: EventId
    reason: Identifier
    detail: Line = ""

    @property
    def key(self) -> str:
        return self.source_topic
