"""Topic `feedback`: what users did about responses, masked."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedloop_events import topics
from fedloop_events.masked import MaskedText
from fedloop_events.types.fields import (
    Count,
    Identifier,
    Label,
)
from fedloop_events.types.payload import Audience, ClientEvent, Older


class FeedbackRecorded(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user did about one response, masked. Version 1 had `score` (-1, 0, 1) in place of `thumb`, and no `use_case`."""

    topic = topics.FEEDBACK
    type_name = "io.fedloop.feedback.recorded.v2"
    audience = Audience.SUBJECT

    feedback_id: Identifier
    response_id: Identifier
    release: Identifier
    use_case: Identifier
    text: MaskedText
    predicted: Label
    thumb: Literal["up", "down"] | None = None
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: Label | None = None
    correction: MaskedText | None = None
    comment: MaskedText | None = None


class FeedbackRetracted(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's user took feedback back. Who reads feedback leaves out that of this client and id, wherever it stands."""

    topic = topics.FEEDBACK
    type_name = "io.fedloop.feedback.retracted.v1"
    audience = Audience.SUBJECT

    feedback_id: Identifier


class FeedbackRecordedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: thumbs as a `score`, one use case for each deployment."""

    type_name = "io.fedloop.feedback.recorded.v1"
    becomes = FeedbackRecorded

    origin: Identifier
    client_id: Identifier
    seq: Count
    feedback_id: Identifier
    response_id: Identifier
    release: Identifier
    text: MaskedText
    predicted: Label
    score: Annotated[int, Meta(ge=-1, le=1)] = 0
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: Label | None = None
    correction: MaskedText | None = None
    comment: MaskedText | None = None

    def upcast(self) -> FeedbackRecorded:
        thumbs: dict[int, Literal["up", "down"] | None] = {-1: "down", 0: None, 1: "up"}
        return FeedbackRecorded(
            origin=self.origin,
            client_id=self.client_id,
            seq=self.seq,
            feedback_id=self.feedback_id,
            response_id=self.response_id,
            release=self.release,
            use_case="default",
            text=self.text,
            predicted=self.predicted,
            thumb=thumbs[self.score],
            rating=self.rating,
            label=self.label,
            correction=self.correction,
            comment=self.comment,
        )
