"""Topic `audit`: what was masked and what was spent."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fedloop_events import topics
from fedloop_events.types.fields import (
    Count,
    EventId,
    Identifier,
    Mechanism,
    Positive,
)
from fedloop_events.types.payload import Audience, ClientEvent


class TextMasked(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many spans of each type were masked in one piece of feedback; no epsilon covers these counts."""

    topic = topics.AUDIT
    type_name = "io.fedloop.text.masked.v1"
    audience = Audience.SUBJECT

    feedback_id: Identifier
    counts: dict[Annotated[str, Meta(max_length=40)], Annotated[int, Meta(ge=1)]] = {}


class BudgetSpent(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the client is about to spend, recorded before it touches its data; it stays spent whatever happens.

    `spend_seq` is dense from 0 and `previous` is the SHA-256 of the previous spend's payload ("" for the first), so that a ledger
    rolled back or cloned is seen.
    """

    topic = topics.AUDIT
    type_name = "io.fedloop.budget.spent.v1"
    audience = Audience.SUBJECT

    spend_seq: Count
    previous: Annotated[str, Meta(max_length=64)]
    run_id: Identifier
    instruction_id: EventId
    mechanism: Mechanism
    round_id: Identifier | None = None


class BudgetRefused(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The client would not spend what a round asked for."""

    topic = topics.AUDIT
    type_name = "io.fedloop.budget.refused.v1"
    audience = Audience.SUBJECT

    run_id: Identifier
    instruction_id: EventId
    reason: Identifier
    budget_epsilon: Positive | None = None
    would_be_epsilon: float | None = None
    round_id: Identifier | None = None
