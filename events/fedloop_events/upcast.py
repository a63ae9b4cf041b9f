"""Older versions of event types, and the step from each to the next. Events in the log are never rewritten."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from fedloop_events import types
from fedloop_events.masked import MaskedText


class FeedbackRecordedV1(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: thumbs as a `score`, one use case for each deployment."""

    origin: types.Identifier
    client_id: types.Identifier
    seq: types.Count
    feedback_id: types.Identifier
    response_id: types.Identifier
    release: types.Identifier
    text: MaskedText
    predicted: types.Label
    score: Annotated[int, Meta(ge=-1, le=1)] = 0
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: types.Label | None = None
    correction: MaskedText | None = None
    comment: MaskedText | None = None


def _feedback_v2(old: FeedbackRecordedV1) -> types.FeedbackRecorded:
    thumbs: dict[int, Literal["up", "down"] | None] = {-1: "down", 0: None, 1: "up"}
    return types.FeedbackRecorded(
        origin=old.origin,
        client_id=old.client_id,
        seq=old.seq,
        feedback_id=old.feedback_id,
        response_id=old.response_id,
        release=old.release,
        use_case="default",
        text=old.text,
        predicted=old.predicted,
        thumb=thumbs[old.score],
        rating=old.rating,
        label=old.label,
        correction=old.correction,
        comment=old.comment,
    )


_feedback_v1 = msgspec.json.Decoder(FeedbackRecordedV1)


def decode(type_name: str, data: bytes) -> types.Payload | None:
    """The newest version of an older type's payload, or None if `type_name` is no older type."""
    if type_name == "io.fedloop.feedback.recorded.v1":
        return _feedback_v2(_feedback_v1.decode(data))
    return None
