"""Topic `training`: examples that the feedback pipeline has curated of masked feedback, by use case."""

from __future__ import annotations

from typing import Literal

from fedloop_events import topics
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types.fields import (
    EventId,
    Identifier,
    Label,
    Line,
)
from fedloop_events.types.payload import Audience
from fedloop_events.types.scored import Language, Share, UseCaseEvent


class ExampleCurated(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One example: `kind` says which of the fields after `text` it has.

    "label": `label` is the text's. "sft": `completion` is the wanted answer. "kto": `completion` is an answer, `desirable` what
    was thought of it. "dpo": `completion` is better than `rejected`. Its id is derived from the feedback and the kind.
    """

    topic = topics.TRAINING
    type_name = "io.fedloop.example.curated.v1"
    audience = Audience.NOBODY

    example_id: EventId
    kind: Literal["label", "sft", "kto", "dpo"]
    client_id: Identifier
    feedback_id: Identifier
    event_id: EventId
    """Of the `FeedbackRecorded`."""
    release: Identifier
    text: MaskedText
    context: list[MaskedTurn] = []
    label: Label | None = None
    completion: MaskedText | None = None
    rejected: MaskedText | None = None
    desirable: bool | None = None
    priority: Share = 0.0
    language: Language | None = None


class ExampleWithdrawn(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A curated example counts no more: its feedback was retracted, or better ones took its place."""

    topic = topics.TRAINING
    type_name = "io.fedloop.example.withdrawn.v1"
    audience = Audience.NOBODY

    example_id: EventId
    reason: Line = ""
