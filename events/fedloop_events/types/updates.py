"""Topic `updates`: what clients answer to instructions."""

from __future__ import annotations

from fedloop_events import topics
from fedloop_events.types.fields import (
    Content,
    Count,
    EventId,
    Identifier,
    Line,
    Mechanism,
)
from fedloop_events.types.payload import Audience, ClientEvent


class UpdateSubmitted(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's reply to one instruction, with the mechanism it ran and the ledger entry that pays for it."""

    topic = topics.UPDATES
    type_name = "io.fedloop.update.submitted.v1"
    audience = Audience.SUBJECT

    run_id: Identifier
    instruction_id: EventId
    content: Content
    round_id: Identifier | None = None
    base_release: Identifier | None = None
    mechanism: Mechanism | None = None
    spend_seq: Count | None = None


class RoundDeclined(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client will not, or cannot, answer one instruction: a stable code, never the text of an exception."""

    topic = topics.UPDATES
    type_name = "io.fedloop.round.declined.v1"
    audience = Audience.SUBJECT

    run_id: Identifier
    instruction_id: EventId
    reason: Identifier
    detail: Line = ""
    round_id: Identifier | None = None
