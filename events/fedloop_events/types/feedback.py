"""Topic `feedback`: what users did about responses, masked."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedloop_events import topics
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types.fields import (
    Count,
    Identifier,
    Label,
    LatencyBin,
    Line,
    Signal,
)
from fedloop_events.types.payload import Audience, ClientEvent, Older


class FeedbackRecorded(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user did about one response, masked: its prompt is `text`, and before that came the turns of `context`.

    What does not fit into one event is left out: the oldest turns first, then the answer.
    """

    topic = topics.FEEDBACK
    type_name = "io.fedloop.feedback.recorded.v3"
    audience = Audience.SUBJECT

    feedback_id: Identifier
    response_id: Identifier
    release: Identifier
    use_case: Identifier
    text: MaskedText
    context: list[MaskedTurn] = []
    """Oldest first; the prompt is not among them."""
    turns_left_out: Count = 0
    """How many turns came before those of the context."""
    predicted: Label | None = None
    """What was answered, where that is one of a closed set of words."""
    response: MaskedText | None = None
    """What was answered in words of the model's own."""
    thumb: Literal["up", "down"] | None = None
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: Label | None = None
    correction: MaskedText | None = None
    comment: MaskedText | None = None
    preferred_over: Identifier | None = None
    """The `response_id` of the worse of two answers to the same prompt."""
    signal: Signal | None = None
    """What the user did that is no judgement, such as "copied": a word of the application's."""


class FeedbackRetracted(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's user took feedback back. Who reads feedback leaves out that of this client and id, wherever it stands."""

    topic = topics.FEEDBACK
    type_name = "io.fedloop.feedback.retracted.v1"
    audience = Audience.SUBJECT

    feedback_id: Identifier


class UsageSummarised(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a device answered of one use case with one release in one interval, in counts: no text, no single interaction.

    `latency` counts response times by bin: bin i (its decimal number is the key) holds those in (g ** (i - 1), g ** i] seconds,
    g = 1.01 / 0.99, so that quantiles of merged summaries are within 1% (DDSketch, Masson et al. 2019, VLDB 12). `masked` counts
    what the masker found, by type.
    """

    topic = topics.FEEDBACK
    type_name = "io.fedloop.usage.summarised.v1"
    audience = Audience.SUBJECT

    use_case: Identifier
    release: Identifier
    from_ms: Count
    to_ms: Count
    answers: Count
    latency: Annotated[dict[LatencyBin, Count], Meta(max_length=2048)] = {}
    signals: Annotated[dict[Signal, Count], Meta(max_length=64)] = {}
    masked: Annotated[dict[Line, Count], Meta(max_length=64)] = {}


class FeedbackRecordedV2(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 3: every answer was one of a closed set of words, to a prompt that nothing came before."""

    type_name = "io.fedloop.feedback.recorded.v2"
    becomes = FeedbackRecorded

    origin: Identifier
    client_id: Identifier
    seq: Count
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

    def upcast(self) -> FeedbackRecorded:
        return FeedbackRecorded(
            origin=self.origin,
            client_id=self.client_id,
            seq=self.seq,
            feedback_id=self.feedback_id,
            response_id=self.response_id,
            release=self.release,
            use_case=self.use_case,
            text=self.text,
            predicted=self.predicted,
            thumb=self.thumb,
            rating=self.rating,
            label=self.label,
            correction=self.correction,
            comment=self.comment,
        )


class FeedbackRecordedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: thumbs as a `score`, one use case for each deployment."""

    type_name = "io.fedloop.feedback.recorded.v1"
    becomes = FeedbackRecordedV2

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

    def upcast(self) -> FeedbackRecordedV2:
        thumbs: dict[int, Literal["up", "down"] | None] = {-1: "down", 0: None, 1: "up"}
        return FeedbackRecordedV2(
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
