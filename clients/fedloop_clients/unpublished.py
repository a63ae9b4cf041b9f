"""Feedback as it is in the device's store before it is published: all of its texts masked."""

from __future__ import annotations

from typing import Final

from fedloop_events.masked import MaskedText, MaskedTurn
from msgspec import Struct

from fedloop_clients import texts
from fedloop_clients.feedback import Thumb


class Unpublished(Struct, frozen=True):
    """Masked feedback that is not in the outbox yet. `logged`: the log has it, as a store restored from a backup learns."""

    feedback_id: str
    response_id: str
    release: str
    predicted: str | None
    thumb: Thumb | None
    rating: int | None
    label: str | None
    preferred_over: str | None
    signal: str | None
    logged: bool
    remembered: bool
    context: list[MaskedTurn]
    left_out: int
    prompt: MaskedText
    response: MaskedText | None
    correction: MaskedText | None
    comment: MaskedText | None

    @property
    def of_device(self) -> bool:
        """Whether it says nothing but how a remembered answer was liked: that concerns the device's memory, and no release."""
        said = (self.label, self.preferred_over, self.correction, self.comment)
        return self.remembered and all(each is None for each in said)


_OF_RELEASE: Final = "CASE WHEN remembered IS NULL THEN {} END"
"""What is measured of a release. An answer that was remembered is none of its answers: what is published of such feedback are a
label, a better answer, a comment, or which answer was preferred."""
UNPUBLISHED: Final = f"""
SELECT feedback_id, response_id, release, predicted, {_OF_RELEASE.format("thumb")}, {_OF_RELEASE.format("rating")}, label,
    preferred_over, {_OF_RELEASE.format("signal")}, logged, remembered IS NOT NULL,
    {texts.CONTEXT}, left_out, prompt.masked, response.masked, correction.masked, comment.masked
FROM feedback JOIN responses USING (response_id)
JOIN texts AS prompt ON prompt.owner = response_id AND prompt.kind = 'prompt'
LEFT JOIN texts AS response ON response.owner = response_id AND response.kind = 'response'
LEFT JOIN texts AS correction ON correction.owner = feedback_id AND correction.kind = 'correction'
LEFT JOIN texts AS comment ON comment.owner = feedback_id AND comment.kind = 'comment'
WHERE state = 'captured' AND NOT {texts.ANY_RAW} ORDER BY feedback.number LIMIT ?
"""
"""Up to so many pieces, oldest first: what `of` takes of each."""


def of(
    feedback_id: str,
    response_id: str,
    release: str,
    predicted: str | None,
    thumb: Thumb | None,
    rating: int | None,
    label: str | None,
    preferred_over: str | None,
    signal: str | None,
    logged: int,
    remembered: int,
    context: str | None,
    left_out: int,
    prompt: bytes,
    response: bytes | None,
    correction: bytes | None,
    comment: bytes | None,
) -> Unpublished:
    return Unpublished(
        feedback_id=feedback_id,
        response_id=response_id,
        release=release,
        predicted=predicted,
        thumb=thumb,
        rating=rating,
        label=label,
        preferred_over=preferred_over,
        signal=signal,
        logged=bool(logged),
        remembered=bool(remembered),
        context=texts.context(context),
        left_out=left_out,
        prompt=texts.of(prompt),
        response=texts.masked(response),
        correction=texts.masked(correction),
        comment=texts.masked(comment),
    )
