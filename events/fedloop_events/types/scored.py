"""Topic `scored`: feedback that has passed the second gate, by use case, with what the pipeline found out about it.

The feedback pipeline reads topic `feedback` by client and everything after it by use case: this topic is where the key changes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types.fields import (
    Count,
    EventId,
    Identifier,
    Label,
    LatencyBin,
    Signal,
)
from fedloop_events.types.payload import Audience, Payload

Share = Annotated[float, Meta(ge=0, le=1)]
Language = Annotated[str, Meta(min_length=2, max_length=3, pattern=r"\A[a-z]{2,3}\Z")]
"""An ISO 639 code."""


class UseCaseEvent(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what the feedback pipeline emits about one use case."""

    use_case: Identifier

    @property
    def key(self) -> str:
        return self.use_case


class Reaction(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a `FeedbackRecorded` holds of a response and of what the user did about it; its fields mean the same."""

    text: MaskedText
    context: list[MaskedTurn] = []
    predicted: Label | None = None
    response: MaskedText | None = None
    thumb: Literal["up", "down"] | None = None
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: Label | None = None
    correction: MaskedText | None = None
    preferred_over: Identifier | None = None
    signal: Signal | None = None


class FeedbackScored(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One piece of feedback that has passed the second gate.

    `given_ms` is when the device says that it was given, `recorded_ms` the log's own clock; both since 1970. `satisfaction` is 1
    for content and 0 for not, `correct` whether the answer was right, as far as the reaction says so; `sentiment` of the comment
    from -1 to 1. `priority` decides the lane, and who is curated first. `novelty` is the distance of the text's embedding from
    what is curated (0: there already; 1: like nothing there), None where nothing embeds.
    """

    topic = topics.SCORED
    type_name = "io.fedloop.feedback.scored.v1"
    audience = Audience.NOBODY

    event_id: EventId
    """Of the `FeedbackRecorded`."""
    client_id: Identifier
    feedback_id: Identifier
    response_id: Identifier
    release: Identifier
    given_ms: Count
    recorded_ms: Count
    reaction: Reaction
    satisfaction: Share | None = None
    correct: bool | None = None
    sentiment: Annotated[float, Meta(ge=-1, le=1)] | None = None
    priority: Share = 0.0
    lane: Literal["high", "normal"] = "normal"
    novelty: Share | None = None
    language: Language | None = None
    masked: Count = 0
    """Placeholders in all of its texts."""


class ScoreWithdrawn(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's user took back feedback that was scored: whatever was made of it is to be withdrawn."""

    topic = topics.SCORED
    type_name = "io.fedloop.feedback.score.withdrawn.v1"
    audience = Audience.NOBODY

    client_id: Identifier
    feedback_id: Identifier


class UsageCounted(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Counts by use case of what stands in the log by client: of a `UsageSummarised`, or of an event that was quarantined.

    They are of the time from `from_ms` to `to_ms` by a device's clock (both the same: of one moment), and were `recorded_ms` by
    the log's own.
    """

    topic = topics.SCORED
    type_name = "io.fedloop.usage.counted.v1"
    audience = Audience.NOBODY

    release: Identifier
    from_ms: Count
    to_ms: Count
    recorded_ms: Count
    answers: Count = 0
    latency: Annotated[dict[LatencyBin, Count], Meta(max_length=2048)] = {}
    quarantined: Count = 0
